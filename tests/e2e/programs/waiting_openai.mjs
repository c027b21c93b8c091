// Print a stream of openai-node that may wait with comments, or which error it threw: BASE_URL MODEL.

import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, defaultHeaders: { "X-Multiverse-Queue": "comments" } });
try {
  const stream = await client.chat.completions.create({ model, messages: [{ role: "user", content: "Hello" }], stream: true });
  let text = "";
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  console.log(text);
} catch (error) {
  console.log("raised", error.constructor.name, error.message);
}
