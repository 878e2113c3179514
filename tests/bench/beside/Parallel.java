import io.confluent.parallelconsumer.ParallelConsumerOptions;
import io.confluent.parallelconsumer.ParallelStreamProcessor;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/**
 * Confluent Parallel Consumer as its README shows it: unordered, CAP threads that each wait for their call, offsets and
 * what is finished beyond them committed every second (its own default is every five).
 *
 * <p>Arguments: KAFKA FROM TO GROUP MODEL_URL CAP
 */
final class Parallel {
    public static void main(String[] args) {
        var consumer = new KafkaConsumer<byte[], byte[]>(Map.of(
                "bootstrap.servers", args[0], "group.id", args[3], "auto.offset.reset", "earliest",
                "enable.auto.commit", "false", "session.timeout.ms", "10000",
                "key.deserializer", ByteArrayDeserializer.class, "value.deserializer", ByteArrayDeserializer.class));
        var producer = new KafkaProducer<byte[], byte[]>(Map.of(
                "bootstrap.servers", args[0], "acks", "all",
                "key.serializer", ByteArraySerializer.class, "value.serializer", ByteArraySerializer.class));
        var client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        var url = URI.create(args[4]);
        var options = ParallelConsumerOptions.<byte[], byte[]>builder()
                .ordering(ParallelConsumerOptions.ProcessingOrder.UNORDERED)
                .maxConcurrency(Integer.parseInt(args[5]))
                .commitInterval(Duration.ofSeconds(1))
                .consumer(consumer).producer(producer).build();
        var processor = ParallelStreamProcessor.createEosStreamProcessor(options);
        processor.subscribe(List.of(args[1]));
        processor.pollAndProduceMany(context -> {
            var message = context.getSingleConsumerRecord();
            try {
                var chat = new Chat(message.value());
                var response = client.send(chat.request(url), HttpResponse.BodyHandlers.ofByteArray());
                return List.of(new ProducerRecord<>(
                        args[2], null, message.key(), chat.completion(response), message.headers()));
            } catch (Exception error) {
                throw new RuntimeException(error);
            }
        });
    }
}
