// Read a stream of the gateway: the `data` of each event, and before the first one what the gateway's comments say (`queue`, `prefill`,
// `headers`); later comments are a server's.
const COMMENT = /^: (queue|prefill|headers) (\{.*\})$/;
const LINE_END = /\r\n|\n|\r(?!$)/; // after a CR at the end of the text, an LF may follow

export async function* pieces(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  let begun = false;
  for (;;) {
    const { value, done } = await reader.read();
    const lines = done ? (rest === "\r" ? [""] : []) : (rest + decoder.decode(value, { stream: true })).split(LINE_END);
    if (!done) rest = lines.pop();
    for (const line of lines) {
      const [, name, fields] = begun ? [] : line.match(COMMENT) ?? [];
      if (name) yield { [name]: JSON.parse(fields) };
      else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      else if (!line) {
        const event = data.join("\n");
        data = [];
        if (event === "[DONE]") return;
        if (!event) continue;
        begun = true;
        yield { data: JSON.parse(event) };
      }
    }
    if (done) return;
  }
}
