// What a stroke of a bar or chart says: when, how long, why.
import { exactly } from "./times.js";

export function showTip(mark) {
  const tip = document.getElementById("tip");
  const when = document.createElement("strong");
  when.textContent = `${exactly(mark.dataset.at)}, ${Number(mark.dataset.ms).toLocaleString()} ms`;
  tip.replaceChildren(when, mark.dataset.words);
  tip.hidden = false;
  const place = mark.getBoundingClientRect();
  const left = Math.min(Math.max(8, place.left + place.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  const above = place.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : place.bottom + 8}px`;
}
export function hideTip() {
  document.getElementById("tip").hidden = true;
}
