// Copy a text: of an element named by data-copy, or of the code beside the button.
import { toast } from "./toasts.js";

const DONE = "Copied";

export async function copyFrom(button) {
  const source = button.dataset.copy ? document.getElementById(button.dataset.copy) : button.closest(".code").querySelector("code");
  await copyText(source.textContent, button);
}
export async function copyText(text, button) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    done = byHand(text);
  }
  if (!done) { toast("warning", "This browser does not let pages copy. Select the text and copy it yourself."); return; }
  const [words, label] = [button.textContent, button.getAttribute("aria-label")];
  if (words === DONE) return;
  button.textContent = DONE;
  if (label) button.setAttribute("aria-label", label.replace(words, DONE));
  setTimeout(() => {
    button.textContent = words;
    if (label) button.setAttribute("aria-label", label);
  }, 1500);
}
function byHand(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "visually-hidden";
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
