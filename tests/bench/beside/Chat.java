import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.io.IOException;
import java.io.Serializable;
import java.net.URI;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** What both contenders in Java do with a record: from the prompt to the call, from the answer to the completion. */
final class Chat implements Serializable {
    private static final ObjectMapper JSON = new ObjectMapper();
    private static final String INSTRUCTIONS =
            "Answer the question from the numbered sources that come with it. After each statement give the number of "
                    + "the source that it rests on in square brackets, like [1].";
    final ObjectNode record;

    Chat(byte[] prompt) throws IOException {
        record = (ObjectNode) JSON.readTree(prompt);
    }

    HttpRequest request(URI url) throws IOException {
        var text = new StringBuilder();
        var number = 0;
        for (var passage : record.get("passages")) {
            text.append("<source n=\"").append(++number).append("\" from=\"");
            text.append(passage.get("document").asText()).append("\">\n");
            text.append(passage.get("text").asText()).append("\n</source>\n");
        }
        text.append(record.get("request").get("prompt").asText());
        var body = JSON.createObjectNode().put("model", "fixed").put("max_tokens", 1024).put("stream", false);
        var messages = body.putArray("messages");
        messages.addObject().put("role", "system").put("content", INSTRUCTIONS);
        messages.addObject().put("role", "user").put("content", text.toString());
        return HttpRequest.newBuilder(url).header("content-type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofByteArray(JSON.writeValueAsBytes(body))).build();
    }

    byte[] completion(HttpResponse<byte[]> response) throws IOException {
        if (response.statusCode() != 200) throw new IOException("the model answered " + response.statusCode());
        var reply = JSON.readTree(response.body());
        var choice = reply.get("choices").get(0);
        record.put("cache", "miss");
        var answer = record.putObject("answer");
        answer.set("text", choice.get("message").get("content"));
        answer.putArray("citations");
        answer.set("model", reply.get("model"));
        answer.put("provider", "openai_compatible");
        answer.set("usage", reply.get("usage"));
        answer.set("finish_reason", choice.get("finish_reason"));
        return JSON.writeValueAsBytes(record);
    }
}
