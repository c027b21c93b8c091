import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.stream.Collectors;

/** Asks for a plain and a streamed completion, a few times each, with the JDK's own client as it is without any setting. */
public class Chat {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        URI uri = URI.create(arguments[0] + "/v1/chat/completions");
        for (int turn = 0; turn < 3; turn++) {
            for (boolean stream : new boolean[] {false, true}) {
                String body = "{\"model\":\"" + arguments[1] + "\",\"messages\":[],\"stream\":" + stream + "}";
                HttpRequest request = HttpRequest.newBuilder(uri)
                    .header("Content-Type", "application/json")
                    .POST(BodyPublishers.ofString(body))
                    .build();
                var answer = client.send(request, BodyHandlers.ofLines());
                String lines = answer.body().collect(Collectors.joining("|"));
                System.out.println(answer.version() + " " + answer.statusCode() + " " + lines);
            }
            HttpRequest list = HttpRequest.newBuilder(URI.create(arguments[0] + "/v1/models")).build();
            var models = client.send(list, BodyHandlers.ofString());
            System.out.println(models.version() + " " + models.statusCode() + " " + models.body());
        }
    }
}
