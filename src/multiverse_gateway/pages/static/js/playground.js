// The playground: a chat with a model over the same API that programs use. What a model writes is shown as Markdown by markdown.js; errors, names and what people write are text.
import { copyText } from "./copy.js";
import { writer } from "./markdown.js";
import { badge } from "./standing.js";
import { pieces } from "./stream.js";
import { why } from "./why.js";
import { toast } from "./toasts.js";
import { offline, online, signedOut } from "./trouble.js";

const form = document.getElementById("playground");
const talk = document.getElementById("talk");
const send = document.getElementById("send");
const stop = document.getElementById("stop-now");
const spoken = document.getElementById("announce");
const hint = document.getElementById("hint");
const field = (name) => form.elements[name];
let messages = [];
let running = null;

function settings() {
  const body = { model: field("model").value };
  const system = field("system").value.trim();
  const said = messages.map(({ role, content }) => ({ role, content }));
  body.messages = system ? [{ role: "system", content: system }, ...said] : said;
  for (const name of ["temperature", "max_tokens", "top_p", "seed"]) {
    if (field(name).value !== "") body[name] = Number(field(name).value);
  }
  if (field("stop").value) body.stop = field("stop").value;
  if (field("stream").checked) {
    body.stream = true;
    body.stream_options = { include_usage: true };
  }
  return body;
}

// As code

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
function asCode() {
  const body = settings();
  const draft = field("prompt").value.trim();
  if (draft) body.messages = [...body.messages, { role: "user", content: draft }];
  const { stream, stream_options: _, ...plain } = body;
  const base = JSON.stringify(form.dataset.base);
  const key = form.dataset.needsKey === "true" ? "your-client-key" : "not-needed";
  const pairs = Object.entries(plain);
  const python = pairs.map(([name, value]) => `    ${name}=${JSON.stringify(value, null, 4).replaceAll("\n", "\n    ")},`).join("\n");
  const node = pairs.map(([name, value]) => `  ${name}: ${JSON.stringify(value, null, 2).replaceAll("\n", "\n  ")},`).join("\n");
  const show = (id, text) => { document.getElementById(id).textContent = text; };
  show("as-python", `from openai import OpenAI\n\nclient = OpenAI(base_url=${base}, api_key="${key}")\nanswer = client.chat.completions.create(\n${python}\n${stream ? "    stream=True,\n)\nfor chunk in answer:\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or \"\", end=\"\", flush=True)\n" : ")\nprint(answer.choices[0].message.content)\n"}`);
  show("as-node", `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: ${base}, apiKey: "${key}" });\nconst answer = await client.chat.completions.create({\n${node}\n${stream ? "  stream: true,\n});\nfor await (const chunk of answer) process.stdout.write(chunk.choices[0]?.delta?.content ?? \"\");\n" : "});\nconsole.log(answer.choices[0].message.content);\n"}`);
  const head = key === "your-client-key" ? '  -H "Authorization: Bearer your-client-key" \\\n' : "";
  show("as-curl", `curl ${stream ? "-N " : ""}${quote(`${form.dataset.base}/chat/completions`)} \\\n${head}  -H "Content-Type: application/json" \\\n  -d ${quote(JSON.stringify(stream ? { ...plain, stream } : plain, null, 2))}\n`);
}

// Messages on the page

function box(role, who) {
  hint.remove();
  const outer = document.createElement("div");
  outer.className = `message-box ${role}`;
  const name = document.createElement("h2");
  name.className = "who";
  name.textContent = who;
  const text = document.createElement("div");
  text.className = "text";
  const measures = document.createElement("p");
  measures.className = "measures";
  outer.append(name, text, measures);
  talk.append(outer);
  follow(true);
  return { outer, text, measures };
}
let follows = true; // until a person scrolls up to read
talk.addEventListener("scroll", () => { follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120; });
function follow(always = false) {
  follows ||= always;
  if (follows) talk.scrollTop = talk.scrollHeight;
}
const seconds = (milliseconds) => (milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`);

const nameOf = (server) => [...document.getElementById("hosts").options].find((option) => option.value === server)?.label ?? server.slice(0, 8);

function measure(place, { headers, began, first, ended, pieces, usage, stopped }) {
  const items = [];
  const server = headers?.get("x-gateway-server-id");
  if (first) items.push(`first token after ${seconds(first - began)}`);
  items.push(`${seconds(ended - began)} in all`);
  const queued = Number(headers?.get("x-multiverse-queued-ms") ?? 0);
  if (queued) items.push(`${seconds(queued)} of it in the queue`);
  const tokens = usage?.completion_tokens ?? pieces;
  if (first && ended - first > 20 && tokens > 1) items.push(`${((tokens - 1) / ((ended - first) / 1000)).toFixed(1)} tokens/s`);
  if (usage) items.push(`${usage.prompt_tokens ?? "?"} in, ${usage.completion_tokens ?? "?"} out`);
  const attempts = Number(headers?.get("x-multiverse-attempts") ?? 0);
  if (attempts) items.push(attempts === 1 ? "1 attempt" : `${attempts} attempts`);
  if (stopped) items.push("stopped");
  place.replaceChildren(...items.map((words) => Object.assign(document.createElement("span"), { textContent: words })));
  if (server) {
    const link = document.createElement("a");
    link.href = form.dataset.server.replace("SERVER", encodeURIComponent(server));
    link.textContent = `server ${nameOf(server)}`;
    link.title = server;
    place.append(link);
  }
}

// One request

async function trouble(response) {
  if (response.status === 401 || response.status === 403) signedOut();
  let words = "";
  try {
    words = (await response.json()).error.message;
  } catch {
    words = "The gateway gave no reason.";
  }
  const wait = Number(response.headers.get("retry-after")) || 0;
  if (response.status === 429) toast("warning", "Too many requests.", { wait: wait || 10, again: () => form.requestSubmit() });
  return `${words} (status ${response.status})`;
}

async function ask() {
  const body = settings();
  const answer = box("assistant", body.model);
  answer.text.classList.add("writing", "prose");
  const page = writer(answer.text, () => follow());
  const run = { began: performance.now(), first: 0, pieces: 0, usage: null, stopped: false };
  running = new AbortController();
  send.hidden = true;
  stop.hidden = false;
  talk.setAttribute("aria-busy", "true");
  const place = badge(run.began);
  answer.text.after(place.element);
  let written = "";
  let problem = "";
  const write = (piece) => {
    if (!piece) return;
    place.remove();
    run.first ||= performance.now();
    run.pieces += 1;
    written += piece;
    page.write(written);
  };
  try {
    const headers = { "Content-Type": "application/json", "X-CSRF-Token": document.querySelector("meta[name=csrf-token]").content, "X-Multiverse-Explain": "1" };
    if (body.stream) headers["X-Multiverse-Queue"] = "comments";
    const response = await fetch(form.dataset.post, { method: "POST", headers, body: JSON.stringify(body), signal: running.signal });
    run.response = response;
    run.headers = new Headers(response.headers);
    online();
    if (!response.ok) problem = await trouble(response);
    else if (response.headers.get("content-type")?.startsWith("text/event-stream")) {
      for await (const { data, queue, prefill, headers: late } of pieces(response.body)) {
        if (queue) place.waits(queue);
        else if (prefill) place.reads(prefill);
        else if (late) {
          for (const [name, value] of Object.entries(late)) run.headers.set(name, value);
        } else {
          if (data.error) { problem = data.error.message ?? "The answer broke off."; break; }
          run.usage = data.usage ?? run.usage;
          const delta = data.choices?.[0]?.delta ?? {};
          write(delta.content ?? delta.reasoning_content ?? "");
        }
        follow();
      }
    } else {
      const whole = await response.json();
      run.usage = whole.usage ?? null;
      write(whole.choices?.[0]?.message?.content ?? "");
      run.first = 0;
    }
  } catch (error) {
    if (error.name === "AbortError") run.stopped = true;
    else {
      problem = run.response ? "The answer broke off before its end. Send your message again." : "The connection to the gateway broke. Try again.";
      if (!navigator.onLine || !run.response) offline();
    }
  }
  run.ended = performance.now();
  place.remove();
  answer.text.classList.remove("writing");
  measure(answer.measures, run);
  const reasons = why(run.headers, nameOf);
  if (reasons) answer.outer.append(reasons);
  if (written) {
    page.end(written);
    messages.push({ role: "assistant", content: written });
    const copy = Object.assign(document.createElement("button"), { type: "button", className: "plain", textContent: "Copy" });
    copy.addEventListener("click", () => copyText(written, copy));
    copy.setAttribute("aria-label", "Copy the answer");
    answer.measures.append(copy);
  }
  if (problem) {
    const failed = written ? box("failed", "Problem") : answer;
    failed.outer.classList.add("failed");
    failed.text.classList.remove("prose");
    failed.text.textContent = problem;
  } else if (!written) answer.text.textContent = run.stopped ? "Stopped before the first token." : "The answer is empty.";
  if (problem && messages.at(-1)?.role === "user") field("prompt").value ||= messages.pop().content;
  spoken.textContent = problem || (run.stopped ? "Stopped." : `The answer is complete: ${written.slice(0, 400)}`);
  talk.removeAttribute("aria-busy");
  send.hidden = false;
  stop.hidden = true;
  running = null;
  asCode();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = field("prompt").value.trim();
  if (running || !text || !field("model").value) return;
  messages.push({ role: "user", content: text });
  box("user", "You").text.textContent = text;
  field("prompt").value = "";
  field("prompt").focus();
  ask();
});
field("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => { running?.abort(); field("prompt").focus(); });
document.getElementById("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  talk.replaceChildren(hint);
  field("prompt").focus();
  asCode();
});
form.addEventListener("input", asCode);
asCode();
