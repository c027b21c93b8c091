// The same request as code, in three languages.
const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const python = (value) => JSON.stringify(value, null, 4).replaceAll("\n", "\n    ");
const node = (value) => JSON.stringify(value, null, 2).replaceAll("\n", "\n  ");

export function codeOf(body, { base: url, needsKey }) {
  const { stream, stream_options: _, ...plain } = body;
  const base = JSON.stringify(url);
  const key = needsKey === "true" ? "your-client-key" : "not-needed";
  const fields = (write, line) => Object.entries(plain).map(([name, value]) => line(name, write(value))).join("\n");
  const inPython = fields(python, (name, value) => `    ${name}=${value},`);
  const inNode = fields(node, (name, value) => `  ${name}: ${value},`);
  const head = needsKey === "true" ? '  -H "Authorization: Bearer your-client-key" \\\n' : "";
  return {
    python: `from openai import OpenAI\n\nclient = OpenAI(base_url=${base}, api_key="${key}")\nanswer = client.chat.completions.create(\n${inPython}\n${stream ? "    stream=True,\n)\nfor chunk in answer:\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or \"\", end=\"\", flush=True)\n" : ")\nprint(answer.choices[0].message.content)\n"}`,
    node: `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: ${base}, apiKey: "${key}" });\nconst answer = await client.chat.completions.create({\n${inNode}\n${stream ? "  stream: true,\n});\nfor await (const chunk of answer) process.stdout.write(chunk.choices[0]?.delta?.content ?? \"\");\n" : "});\nconsole.log(answer.choices[0].message.content);\n"}`,
    curl: `curl ${stream ? "-N " : ""}${quote(`${url}/chat/completions`)} \\\n${head}  -H "Content-Type: application/json" \\\n  -d ${quote(JSON.stringify(stream ? { ...plain, stream } : plain, null, 2))}\n`,
  };
}
