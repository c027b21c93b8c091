// One message on the page: its text, the reasoning before it, what went wrong, figures and buttons.
import { writer } from "./markdown.js";
import { why } from "./why.js";

const create = (tag, className, textContent = "") => Object.assign(document.createElement(tag), { className, textContent });
const seconds = (milliseconds) => (milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`);
const whole = (milliseconds) => `${Math.max(1, Math.round(milliseconds / 1000))} s`;

export function button(words, label, pressed) {
  const made = Object.assign(create("button", "plain", words), { type: "button" });
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => pressed(made));
  return made;
}

/** Return what is known of a finished request, in words. */
export function figuresOf({ headers, began, first, ended, pieces, usage, stopped }) {
  const items = [];
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
  return items;
}

/** Put an empty message on the page and return what fills it; `shown` is called whenever its height may have changed. */
export function message(talk, role, name, shown) {
  const outer = create("div", `message-box ${role}`);
  const text = create("div", role === "assistant" ? "text prose" : "text");
  const measures = create("p", "measures");
  outer.append(create("h2", "who", name), text, measures);
  talk.append(outer);
  const answer = writer(text, shown);
  let thoughts = null;

  function openThoughts() {
    const details = create("details", "thoughts");
    const summary = create("summary", "", "Thinking…");
    const place = create("div", "prose");
    details.append(summary, place);
    text.before(details);
    return { summary, page: writer(place, shown) };
  }
  return {
    outer,
    text,
    measures,
    /** Show reasoning so far; `duration` in milliseconds, or null when it is not known. */
    think(reasoning, duration, isOpen) {
      if (!reasoning) return;
      thoughts ??= openThoughts();
      thoughts.page[isOpen ? "write" : "end"](reasoning);
      const done = duration === null ? "Reasoning" : `Thought for ${whole(duration)}`;
      const words = isOpen ? `Thinking… ${whole(duration)}` : done;
      if (thoughts.summary.textContent !== words) thoughts.summary.textContent = words;
    },
    write: (words) => answer.write(words),
    end: (words) => answer.end(words),
    fail(words) {
      outer.classList.add("failed");
      text.hidden = !text.hasChildNodes();
      text.after(create("p", "trouble", words));
    },
    /** Show figures, the server that answered and why it was chosen, then buttons. */
    measure(turn, server, nameOf, buttons) {
      measures.append(...turn.figures.map((words) => create("span", "", words)));
      if (turn.server) {
        const link = Object.assign(create("a", "", `server ${nameOf(turn.server)}`), { href: server, title: turn.server });
        measures.append(link);
      }
      measures.append(...buttons);
      const reasons = why({ get: () => turn.why ?? "[]" }, nameOf);
      if (reasons) outer.append(reasons);
    },
  };
}
