// The tip of a minute: in a chart when, how long and why; in a bar its range and how the server was.
import { exactly, range } from "./times.js";

const states = { g: "Up", w: "Up, but slow or with a warning", b: "Down", i: "Not known" };

export function showTip(mark, x) {
  const place = mark.getBoundingClientRect();
  if (mark.matches("rect")) {
    show(`${exactly(mark.dataset.at)}, ${Number(mark.dataset.ms).toLocaleString()} ms`, mark.dataset.words, place, place.left + place.width / 2);
    return;
  }
  const { begins, tones } = mark.dataset;
  const minute = Math.min(tones.length - 1, Math.max(0, Math.floor((tones.length * (x - place.left)) / place.width)));
  const from = Date.parse(begins) + 60000 * minute;
  show(range(from, from + 60000), states[tones[minute]], place, x);
}
function show(title, words, place, x) {
  const tip = document.getElementById("tip");
  const when = document.createElement("strong");
  when.textContent = title;
  tip.replaceChildren(when, words);
  tip.hidden = false;
  const left = Math.min(Math.max(8, x - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  const above = place.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : place.bottom + 8}px`;
}
export function hideTip() {
  document.getElementById("tip").hidden = true;
}
