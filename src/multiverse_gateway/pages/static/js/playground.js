// The playground: a chat with a model over the same API that programs use. What a model writes is shown as Markdown by markdown.js; errors,
// names and what people write are text. A conversation is a list of turns: plain values, which kept.js keeps in the tab.
import { codeOf } from "./code.js";
import { copyText } from "./copy.js";
import { keeper } from "./kept.js";
import { menu } from "./menu.js";
import { button, figuresOf, message } from "./message.js";
import { badge } from "./standing.js";
import { pieces } from "./stream.js";
import { divide, mayOpen, textOf } from "./thinking.js";
import { toast } from "./toasts.js";
import { signedOut } from "./session.js";
import { offline, online } from "./trouble.js";

const form = document.getElementById("playground");
const talk = document.getElementById("talk");
const send = document.getElementById("send");
const stop = document.getElementById("stop-now");
const spoken = document.getElementById("announce");
const hint = document.getElementById("hint");
const field = (name) => form.elements[name];
const kept = keeper(form);
const PAUSE = 30; // milliseconds in which the pieces of an answer are gathered
let turns = [];
let running = null;

/** Return the conversation with the model on one side; a question that got no answer there counts only while it is the last one. */
function messages(side = 0) {
  const said = [];
  const last = turns.findLast(({ role }) => role === "user");
  for (const [at, turn] of turns.entries()) {
    if (turn.role !== "user") continue;
    const next = turns.slice(at + 1).findIndex(({ role }) => role === "user");
    const answers = turns.slice(at + 1, next < 0 ? turns.length : at + 1 + next);
    const pair = [turn, answers.find((answer) => answer.side === side) ?? answers[0]];
    if (turn === last || pair[1]?.content) said.push(...pair.filter((one) => one?.content));
  }
  return said.map(({ role, content }) => ({ role, content }));
}
function settings(said = messages(), model = field("model").value) {
  const body = { model };
  const system = field("system").value.trim();
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
function asCode() {
  const draft = field("prompt").value.trim();
  const all = draft ? [...messages(), { role: "user", content: draft }] : messages();
  const last = all.filter(({ role }) => role === "user").slice(-1);
  const example = [{ role: "user", content: "Hello" }];
  const said = document.getElementById("whole").checked ? all : last;
  const code = codeOf(settings(said.length ? said : example), form.dataset);
  for (const [language, text] of Object.entries(code)) document.getElementById(`as-${language}`).textContent = text;
}

// Turns on the page

let follows = true; // until a person scrolls up to read
talk.addEventListener("scroll", () => { follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120; });
function follow() {
  if (follows) talk.scrollTop = talk.scrollHeight;
}
const nameOf = (server) => [...document.getElementById("hosts").options].find((option) => option.value === server)?.label ?? server.slice(0, 8);

function home({ isCompared, side }) {
  if (!isCompared) return talk;
  if (side === 0) talk.append(Object.assign(document.createElement("div"), { className: "compared" }));
  return talk.lastElementChild;
}
function place(turn) {
  hint.remove();
  const box = message(home(turn), turn.role, turn.role === "user" ? "You" : turn.model, follow);
  follows = true;
  follow();
  return box;
}
function show(turn, box = place(turn)) {
  if (turn.role === "user") {
    box.text.textContent = turn.content;
    box.measures.append(button("Edit", "Edit this message", () => edit(turn, box)));
    return;
  }
  box.think(turn.reasoning, turn.thought, false);
  if (turn.content) box.end(turn.content);
  if (turn.problem) box.fail(turn.problem);
  else if (!turn.content) box.text.textContent = turn.stopped ? "Stopped before the first token." : "The answer is empty.";
  const again = turn.problem || turn.stopped ? ["Try again", "Try again"] : ["Regenerate", "Regenerate the answer"];
  const buttons = turn.content ? [button("Copy", "Copy the answer", (pressed) => copyText(turn.content, pressed))] : [];
  buttons.push(button(...again, () => retry(turn)));
  box.measure(turn, form.dataset.server.replace("SERVER", encodeURIComponent(turn.server)), nameOf, buttons);
  follow();
}
function showAll() {
  talk.replaceChildren(...(turns.length ? [] : [hint]));
  for (const turn of turns) show(turn);
}

/** Drop this turn, the one beside it and all after them, then ask for an answer to what is left. */
function retry(turn) {
  const at = turns.indexOf(turn) - (turn.side ?? 0);
  if (running || at < 0 || !field("model").value) return;
  turns.length = at;
  showAll();
  ask();
}
function edit(turn, box) {
  if (running) return;
  const area = Object.assign(document.createElement("textarea"), { value: turn.content, rows: 3 });
  area.setAttribute("aria-label", "Edit this message");
  const cancel = () => { showAll(); field("prompt").focus(); };
  const save = () => {
    const content = area.value.trim();
    const at = turns.indexOf(turn);
    if (running || !content || at < 0) return;
    turns.length = at;
    turns.push({ role: "user", content });
    showAll();
    field("prompt").focus();
    ask();
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); save(); }
  });
  box.outer.classList.add("editing");
  box.text.replaceChildren(area);
  box.measures.replaceChildren(button("Send again", "Send again", save), button("Cancel", "Cancel", cancel));
  if (turns.some(({ role }, at) => role === "user" && at > turns.indexOf(turn))) box.measures.prepend("The messages below are removed.");
  area.focus();
}

// One request

const reasonOf = (error) => textOf(error?.message) || textOf(error);
async function trouble(response) {
  if (response.status === 401 || response.status === 403) signedOut();
  let words = "";
  try {
    words = reasonOf((await response.json()).error);
  } catch {
    // not JSON, so not from the gateway itself
  }
  words ||= "The gateway gave no reason.";
  const wait = Number(response.headers.get("retry-after")) || 0;
  const again = () => { if (turns.at(-1)?.problem) retry(turns.at(-1)); };
  if (response.status === 429) toast("warning", "Too many requests.", { wait: wait || 10, again });
  return `${words} (status ${response.status})`;
}

/** Collect what comes of an answer in its turn, and show it. */
function collector(turn, box, run, waiting) {
  let text = "";
  let thoughts = ""; // of the field for reasoning
  let since = 0;
  let timer = 0;
  let wasThinking = false;
  const update = (isEnd) => {
    clearTimeout(timer);
    timer = 0;
    const parts = thoughts ? { reasoning: thoughts, answer: text, isOpen: !text } : divide(text);
    const isThinking = parts.isOpen && !isEnd;
    turn.reasoning = parts.reasoning;
    turn.content = !isEnd && !thoughts && mayOpen(text) ? "" : parts.answer;
    if (turn.reasoning) {
      since ||= performance.now();
      if (run.streams && (isThinking || wasThinking)) turn.thought = performance.now() - since;
      wasThinking = isThinking;
      box.think(turn.reasoning, turn.thought, isThinking);
    }
    if (turn.content) box.write(turn.content);
  };
  return {
    take({ content, reasoning_content: reasoning, reasoning: other }) {
      const [words, thought] = [textOf(content), textOf(reasoning) || textOf(other)];
      if (!words && !thought) return;
      waiting.remove();
      run.first ||= performance.now();
      run.pieces += 1;
      text += words;
      thoughts += thought;
      timer ||= setTimeout(() => update(false), PAUSE);
    },
    end: () => update(true),
  };
}

async function fetchAnswer(body, run, answer, waiting) {
  const headers = { "Content-Type": "application/json", "X-CSRF-Token": document.querySelector("meta[name=csrf-token]").content, "X-Multiverse-Explain": "1" };
  if (body.stream) headers["X-Multiverse-Queue"] = "comments";
  const response = await fetch(form.dataset.post, { method: "POST", headers, body: JSON.stringify(body), signal: running.signal });
  run.response = response;
  run.headers = new Headers(response.headers);
  online();
  if (!response.ok) return trouble(response);
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
    const whole = await response.json();
    run.usage = whole.usage ?? null;
    answer.take(whole.choices?.[0]?.message ?? {});
    run.first = 0;
    return "";
  }
  run.streams = true;
  for await (const { data, queue, prefill, headers: late } of pieces(response.body)) {
    if (queue) waiting.waits(queue);
    else if (prefill) waiting.reads(prefill);
    else if (late) {
      for (const [name, value] of Object.entries(late)) run.headers.set(name, value);
    } else {
      if (data.error) return reasonOf(data.error) || "The answer broke off.";
      run.usage = data.usage ?? run.usage;
      answer.take(data.choices?.[0]?.delta ?? {});
    }
    follow();
  }
  return "";
}

/** Ask the chosen model, or both of them at the same time. */
async function ask() {
  const models = [field("model").value, field("other").value].filter(Boolean);
  running = new AbortController();
  send.hidden = true;
  stop.hidden = false;
  talk.setAttribute("aria-busy", "true");
  const bodies = models.map((model, side) => settings(messages(side), model));
  await Promise.all(bodies.map((body, side) => askOne(body, { side, isCompared: bodies.length > 1 })));
  running = null;
  talk.removeAttribute("aria-busy");
  send.hidden = false;
  stop.hidden = true;
  kept.save(turns);
}
async function askOne(body, column) {
  const turn = { role: "assistant", ...column, model: body.model, content: "", reasoning: "", thought: null, problem: "", stopped: true, figures: [] };
  turns.push(turn); // stopped, should the page be left
  const box = place(turn);
  box.text.classList.add("writing");
  const run = { began: performance.now(), first: 0, pieces: 0, usage: null, stopped: false, streams: false };
  const waiting = badge(run.began, body.model);
  box.text.after(waiting.element);
  const answer = collector(turn, box, run, waiting);
  try {
    turn.problem = await fetchAnswer(body, run, answer, waiting);
  } catch (error) {
    if (error.name === "AbortError") run.stopped = true;
    else {
      turn.problem = run.response ? "The answer broke off before its end. Try again." : "Connection lost. Try again.";
      if (!navigator.onLine || !run.response) offline();
    }
  }
  run.ended = performance.now();
  answer.end();
  waiting.remove();
  box.text.classList.remove("writing");
  if (!turns.includes(turn)) return; // a new conversation began
  Object.assign(turn, {
    stopped: run.stopped,
    figures: figuresOf(run),
    server: run.headers?.get("x-gateway-server-id") ?? "",
    why: run.headers?.get("x-multiverse-why") ?? null,
  });
  show(turn, box);
  spoken.textContent = turn.problem || (run.stopped ? "Stopped." : `The answer is complete: ${turn.content.slice(0, 400)}`);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const content = field("prompt").value.trim();
  if (running || !content || !field("model").value) return;
  turns.push({ role: "user", content });
  show(turns.at(-1));
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
  turns = [];
  showAll();
  field("prompt").focus();
  kept.save(turns);
});
for (const [id, event] of [["view-code", "click"], ["whole", "change"]]) document.getElementById(id).addEventListener(event, asCode);
addEventListener("pagehide", () => kept.save(turns));
turns = kept.restore();
for (const name of ["model", "other"]) menu(field(name), () => field("prompt").focus());
showAll();
