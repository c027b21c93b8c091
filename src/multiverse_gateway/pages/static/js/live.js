// The page follows what happens on the server: changes come from the hub, which all tabs share.
import { Hub } from "./hub.js";
import { showState } from "./state.js";
import { tick } from "./times.js";
import { offline, online } from "./trouble.js";

const PING = 5000;
const POLL = 15_000;
const url = document.querySelector("meta[name=live-url]")?.content;
const board = () => document.querySelector("#live[data-topic]");
const isPaused = () => document.getElementById("pause")?.getAttribute("aria-pressed") === "true";

let port = null;
let unanswered = 0;
let streaming = false;
let shown = null; // the part of the page that is followed
let seen = "";

// The hub

function join() {
  unanswered = 0;
  try {
    const worker = new SharedWorker(new URL("./worker.js", import.meta.url), { type: "module", name: "live" });
    worker.onerror = alone;
    use(worker.port);
  } catch {
    alone();
  }
}
function alone() {
  const { port1, port2 } = new MessageChannel();
  new Hub().add(port2);
  use(port1);
}
function use(other) {
  port?.postMessage("bye");
  port = other;
  port.onmessage = ({ data }) => heard[data.name]?.(data);
  here();
}
function here() {
  const live = board();
  if (live !== shown) {
    shown = live;
    seen = live?.dataset.seen ?? "";
  }
  port?.postMessage({ url, topic: live?.dataset.topic ?? "", seen, hidden: document.hidden });
}
function ping() {
  if (document.hidden || !port) return;
  if (unanswered > 2) join(); // the worker has ended
  else {
    unanswered += 1;
    port.postMessage("ping");
  }
}

const heard = {
  pong() { unanswered = 0; },
  who: here,
  open() { streaming = true; online(); },
  lost() { streaming = false; setTimeout(() => { if (!streaming) poll(); }, 1000); },
  out() {
    streaming = false;
    document.dispatchEvent(new Event("signed-out"));
  },
  state({ data }) { showState(JSON.parse(data)); },
  reload: ifOurs(() => htmx.trigger("#live [hx-trigger=reload]", "reload")),
  update: ifOurs(({ data }) => {
    htmx.swap(board(), data, { swapStyle: "none", swapDelay: 0, settleDelay: 20 });
    tick(document);
    trimLogs();
  }),
  rows: ifOurs(({ data }) => changeRows(JSON.parse(data))),
};
function ifOurs(show) {
  return (event) => {
    if (event.topic !== board()?.dataset.topic || isPaused()) return;
    seen = event.seen;
    show(event);
  };
}

// Rows of a table: new ones, single cells, their order

function changeRows({ into, order, rows = {}, cells = {} }) {
  const body = document.getElementById(into);
  for (const [name, html] of Object.entries(rows)) {
    const template = document.createElement("template");
    template.innerHTML = html;
    const row = template.content.firstElementChild;
    const old = document.getElementById(name);
    if (old) old.replaceWith(row);
    else body.append(row);
    htmx.process(row);
    tick(row);
  }
  for (const [name, changed] of Object.entries(cells)) {
    const row = document.getElementById(name);
    if (!row) continue;
    for (const [place, html] of Object.entries(changed)) {
      const unfolded = [...row.cells[place].querySelectorAll("[id][aria-expanded=true]")].map(({ id }) => id);
      row.cells[place][/^<t[dh][\s>]/.test(html) ? "outerHTML" : "innerHTML"] = html;
      for (const id of unfolded) document.getElementById(id)?.setAttribute("aria-expanded", "true");
    }
    tick(row);
  }
  if (!order) return;
  const wanted = new Set(order);
  for (const row of [...body.rows]) if (!wanted.has(row.id)) row.remove();
  let next = body.firstElementChild;
  for (const name of order) {
    const row = document.getElementById(name);
    if (row === next) next = next.nextElementSibling;
    else if (row) body.insertBefore(row, next);
  }
}
export function trimLogs() {
  document.querySelector("[data-nothing]")?.remove();
  const rows = document.getElementById("log-rows");
  while (rows && rows.rows.length > 500) rows.lastElementChild.remove();
}

// Asking every 15 s while there is no stream; while nothing answers, every 5 s

export function poll() {
  const live = board();
  if (live?.dataset.poll && !document.hidden) htmx.ajax("GET", live.dataset.poll, { target: "#live", swap: "outerHTML", select: "#live" });
}
export async function retry() {
  if (board()?.dataset.poll) { poll(); return; }
  try {
    await fetch(document.querySelector("meta[name=session-url]").content, { headers: { "HX-Request": "true" } });
    online();
  } catch {
    offline();
  }
}

export function follow() {
  if (url) {
    join();
    setInterval(ping, PING);
    setInterval(() => { if (!streaming) poll(); }, POLL);
    document.addEventListener("visibilitychange", here);
    document.addEventListener("htmx:load", () => { if (board() !== shown) here(); });
    window.addEventListener("pagehide", () => port?.postMessage("bye"));
    document.addEventListener("signed-in", here);
    window.addEventListener("pageshow", ({ persisted }) => { if (persisted) here(); });
  }
  setInterval(() => { if (!document.getElementById("offline").hidden) retry(); }, 5000);
  window.addEventListener("offline", offline);
  window.addEventListener("online", retry);
}
