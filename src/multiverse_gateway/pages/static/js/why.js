// Why the gateway chose the server of an answer: what the header x-multiverse-why says, as a table.
const cell = (words, tag = "td") => Object.assign(document.createElement(tag), { textContent: words ?? "–" });
const line = (words, tag) => {
  const row = document.createElement("tr");
  row.append(...words.map((word) => cell(word, tag)));
  return row;
};

export function why(headers, nameOf) {
  let choices = [];
  try {
    choices = JSON.parse(headers?.get("x-multiverse-why") ?? "[]");
  } catch {
    return null;
  }
  if (!choices.length) return null;
  const details = document.createElement("details");
  details.className = "why";
  details.append(Object.assign(document.createElement("summary"), { textContent: "Why this server" }));
  for (const choice of choices) {
    const words = [`Attempt ${choice.attempt}: ${nameOf(choice.server)}, by ${choice.balancer}.`];
    for (const [server, kind, reason] of choice.failed.slice(-1)) words.unshift(`${nameOf(server)} failed (${kind}: ${reason}).`);
    const table = document.createElement("table");
    const head = document.createElement("thead");
    head.append(line(["Server", "Verdict", "State", "Running", "Latency", "Score"], "th"));
    const body = document.createElement("tbody");
    for (const candidate of choice.candidates) {
      const latency = candidate.latency === null ? null : `${Math.round(1000 * candidate.latency)} ms`;
      const chosen = candidate.server === choice.server ? "chosen" : candidate.verdict;
      body.append(line([nameOf(candidate.server), chosen, candidate.state, candidate.in_flight, latency, candidate.score]));
    }
    table.append(head, body);
    const scroller = Object.assign(document.createElement("div"), { className: "scroller", tabIndex: 0 });
    scroller.setAttribute("role", "group");
    scroller.setAttribute("aria-label", `Attempt ${choice.attempt}`);
    scroller.append(table);
    details.append(Object.assign(document.createElement("p"), { textContent: words.join(" ") }), scroller);
  }
  return details;
}
