// One event stream for all tabs of a browser: over plain HTTP a browser opens only six connections to a host. The hub runs in a shared
// worker, or in the tab itself where there are none. Visible tabs follow their pages. Hidden ones only get the state, for their titles;
// while all are hidden, the stream is closed and the state is asked for once a minute.
const SETTLE = 30; // milliseconds to wait for further tabs before the stream is opened again
const RETRY = [2, 4, 8, 16, 30]; // seconds
const LOOK = 60_000;
const SILENT = 45_000; // the gateway sends something every 15 s
const GONE = 30_000; // a visible tab that is silent for so long has crashed

async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { name: "", data: [], id: "" };
      for (const line of block.split("\n")) {
        const colon = line.indexOf(": ");
        const [field, text] = [line.slice(0, colon), line.slice(colon + 2)];
        if (field === "event") event.name = text;
        else if (field === "data") event.data.push(text);
        else if (field === "id") event.id = text;
      }
      yield { ...event, data: event.data.join("\n") };
    }
  }
}

export class Hub {
  #tabs = new Map(); // by port: topic, what the page shows of it, whether the tab is hidden, when it was heard
  #url = "";
  #following = null; // the topics of the stream that is open or being opened
  #abort = null;
  #failures = 0;
  #timer = 0;
  #state = null;
  #heard = 0;
  #looked = 0;

  constructor() {
    setInterval(() => this.#watch(), 10_000);
  }

  add(port) {
    port.onmessage = ({ data }) => this.#hear(port, data);
  }

  #hear(port, message) {
    const tab = this.#tabs.get(port);
    if (message === "bye") this.#tabs.delete(port);
    else if (message === "ping") {
      if (tab) tab.heard = Date.now();
      port.postMessage({ name: tab ? "pong" : "who" });
      return;
    } else {
      this.#url = message.url;
      this.#tabs.set(port, { ...message, heard: Date.now() });
      this.#failures = 0;
      if (this.#state) port.postMessage(this.#state);
      if (this.#heard) port.postMessage({ name: "open" });
    }
    this.#soon(SETTLE);
  }

  #soon(wait) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#follow(), wait);
  }

  #visible() {
    return [...this.#tabs].filter(([, tab]) => !tab.hidden);
  }

  #tell(message, ports = this.#tabs.keys()) {
    for (const port of ports) port.postMessage(message);
  }

  #follow() {
    const tabs = this.#visible();
    const wanted = tabs.length ? JSON.stringify(tabs.map(([, { topic }]) => topic)) : null;
    if (wanted === this.#following && this.#abort && tabs.every(([, tab]) => tab.followed)) return;
    this.#abort?.abort();
    this.#abort = null;
    this.#following = wanted;
    this.#heard = 0;
    this.#looked = Date.now();
    if (wanted !== null) this.#open(tabs, (this.#abort = new AbortController()));
  }

  async #open(tabs, abort) {
    const followed = tabs.filter(([, { topic }]) => topic);
    const query = new URLSearchParams(followed.map(([, { topic, seen }]) => {
      return ["of", `${topic}${topic.includes("?") ? "&" : "?"}seen=${encodeURIComponent(seen)}`];
    }));
    for (const [, tab] of tabs) tab.followed = true;
    let wait = 0;
    try {
      const answer = await fetch(`${this.#url}?${query}`, { headers: { "HX-Request": "true" }, cache: "no-store", signal: abort.signal });
      if (answer.status === 401) {
        this.#tell({ name: "out" });
        this.#abort = null;
        return;
      }
      wait = Number(answer.headers.get("Retry-After"));
      if (!answer.ok) throw new Error(answer.status);
      this.#tell({ name: "open" }, tabs.map(([port]) => port));
      this.#heard = Date.now();
      for await (const event of events(answer.body)) {
        if (abort.signal.aborted) return;
        this.#heard = Date.now();
        this.#failures = 0;
        this.#pass(event, followed);
      }
    } catch {
      // lost, as when it ends
    }
    if (abort.signal.aborted) return;
    this.#abort = null;
    this.#heard = 0;
    this.#tell({ name: "lost" }, tabs.map(([port]) => port));
    this.#soon(1000 * (wait || RETRY[Math.min(this.#failures++, RETRY.length - 1)]));
  }

  #pass({ name, data, id }, followed) {
    if (name === "state") {
      this.#state = { name, data };
      this.#tell(this.#state);
    } else if (id) {
      const [number, seen] = id.split(" ");
      const [port, tab] = followed[number];
      if (seen) tab.seen = seen;
      port.postMessage({ name, data, seen, topic: tab.topic });
    }
  }

  async #look() {
    this.#looked = Date.now();
    try {
      const answer = await fetch(`${this.#url}/state`, { headers: { "HX-Request": "true" }, cache: "no-store" });
      if (answer.status === 401) this.#tell({ name: "out" });
      if (answer.ok) this.#tell((this.#state = { name: "state", data: await answer.text() }));
    } catch {
      // the next look is a minute away
    }
  }

  #watch() {
    const now = Date.now();
    const gone = this.#visible().filter(([, { heard }]) => now - heard > GONE);
    for (const [port] of gone) this.#tabs.delete(port);
    if (gone.length) this.#soon(SETTLE);
    if (this.#heard && now - this.#heard > SILENT) {
      this.#abort?.abort();
      this.#abort = null;
      this.#soon(SETTLE);
    }
    if (this.#tabs.size && !this.#visible().length && now - this.#looked > LOOK) this.#look();
  }
}
