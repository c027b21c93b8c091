// Copy a text: of an element named by data-copy, or of the code beside the button.
import { toast } from "./toasts.js";

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
  const words = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = words; }, 1500);
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
