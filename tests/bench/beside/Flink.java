import java.io.File;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.Arrays;
import java.util.Comparator;
import java.util.Set;
import java.util.concurrent.TimeUnit;
import org.apache.flink.api.common.eventtime.WatermarkStrategy;
import org.apache.flink.api.common.typeinfo.TypeInformation;
import org.apache.flink.configuration.Configuration;
import org.apache.flink.configuration.RestartStrategyOptions;
import org.apache.flink.connector.base.DeliveryGuarantee;
import org.apache.flink.connector.kafka.sink.KafkaRecordSerializationSchema;
import org.apache.flink.connector.kafka.sink.KafkaSink;
import org.apache.flink.connector.kafka.source.KafkaSource;
import org.apache.flink.connector.kafka.source.enumerator.initializer.OffsetsInitializer;
import org.apache.flink.connector.kafka.source.reader.deserializer.KafkaRecordDeserializationSchema;
import org.apache.flink.streaming.api.datastream.AsyncDataStream;
import org.apache.flink.streaming.api.environment.StreamExecutionEnvironment;
import org.apache.flink.streaming.api.functions.async.AsyncFunction;
import org.apache.flink.streaming.api.functions.async.ResultFuture;
import org.apache.flink.util.Collector;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.producer.ProducerRecord;

/**
 * Flink's async I/O in a cluster inside this process: Kafka source, unordered calls with a capacity of CAP, Kafka sink; a
 * checkpoint every second, each run going on from the last one.
 *
 * <p>Arguments: KAFKA FROM TO GROUP MODEL_URL CAP FOLDER
 */
final class Flink {
    public static void main(String[] args) throws Exception {
        var folder = new File(args[6]);
        var configuration = new Configuration();
        configuration.setString("execution.checkpointing.storage", "filesystem");
        configuration.setString("execution.checkpointing.dir", folder.toURI().toString());
        configuration.setString("execution.checkpointing.externalized-checkpoint-retention", "RETAIN_ON_CANCELLATION");
        configuration.set(RestartStrategyOptions.RESTART_STRATEGY, "disable");
        var last = last(folder);
        if (last != null) configuration.setString("execution.state-recovery.path", last.toURI().toString());
        var environment = StreamExecutionEnvironment.createLocalEnvironment(1, configuration);
        environment.enableCheckpointing(1000);
        environment.getConfig().enableObjectReuse();
        var source = KafkaSource.<String[]>builder()
                .setBootstrapServers(args[0]).setTopics(args[1]).setGroupId(args[3])
                .setStartingOffsets(OffsetsInitializer.earliest())
                .setDeserializer(new Reading()).build();
        var sink = KafkaSink.<String[]>builder()
                .setBootstrapServers(args[0]).setDeliveryGuarantee(DeliveryGuarantee.AT_LEAST_ONCE)
                .setProperty("acks", "all")
                .setRecordSerializer(new Writing(args[2])).build();
        var read = environment.fromSource(source, WatermarkStrategy.noWatermarks(), "prompts").uid("prompts");
        AsyncDataStream.unorderedWait(
                        read, new Asking(args[4]), 5, TimeUnit.MINUTES, Integer.parseInt(args[5]))
                .uid("infer").sinkTo(sink).uid("completions");
        environment.execute("infer");
    }

    /** The newest checkpoint that is whole: JOB/chk-N/_metadata. */
    private static File last(File folder) {
        var jobs = folder.listFiles();
        if (jobs == null) return null;
        return Arrays.stream(jobs)
                .flatMap(job -> Arrays.stream(job.listFiles((at, name) -> name.startsWith("chk-"))))
                .filter(checkpoint -> new File(checkpoint, "_metadata").exists())
                .max(Comparator.comparingLong(checkpoint -> new File(checkpoint, "_metadata").lastModified()))
                .orElse(null);
    }

    /** Key and value of a record; headers are left behind. */
    private static final class Reading implements KafkaRecordDeserializationSchema<String[]> {
        @Override
        public void deserialize(ConsumerRecord<byte[], byte[]> message, Collector<String[]> out) {
            out.collect(new String[] {text(message.key()), text(message.value())});
        }

        @Override
        public TypeInformation<String[]> getProducedType() {
            return TypeInformation.of(String[].class);
        }
    }

    private static final class Writing implements KafkaRecordSerializationSchema<String[]> {
        private final String topic;

        Writing(String topic) {
            this.topic = topic;
        }

        @Override
        public ProducerRecord<byte[], byte[]> serialize(String[] record, KafkaSinkContext context, Long timestamp) {
            return new ProducerRecord<>(topic, bytes(record[0]), bytes(record[1]));
        }
    }

    private static final class Asking implements AsyncFunction<String[], String[]> {
        private static final HttpClient CLIENT = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        private final String url;

        Asking(String url) {
            this.url = url;
        }

        @Override
        public void asyncInvoke(String[] record, ResultFuture<String[]> result) throws Exception {
            var chat = new Chat(bytes(record[1]));
            CLIENT.sendAsync(chat.request(URI.create(url)), HttpResponse.BodyHandlers.ofByteArray())
                    .whenComplete((response, error) -> {
                        try {
                            if (error != null) throw new Exception(error);
                            result.complete(Set.<String[]>of(
                                    new String[] {record[0], text(chat.completion(response))}));
                        } catch (Exception wrong) {
                            result.completeExceptionally(wrong);
                        }
                    });
        }
    }

    private static String text(byte[] bytes) {
        return new String(bytes, java.nio.charset.StandardCharsets.UTF_8);
    }

    private static byte[] bytes(String text) {
        return text.getBytes(java.nio.charset.StandardCharsets.UTF_8);
    }
}
