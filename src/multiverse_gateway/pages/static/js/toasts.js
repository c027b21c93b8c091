// Short words in the corner, read out by screen readers.
export function toast(kind, words, { wait = 0, again = null } = {}) {
  if (!words && !wait) return;
  const box = document.createElement("div");
  box.className = `toast ${kind}`;
  const text = document.createElement("span");
  text.textContent = words;
  box.append(text);
  if (wait) countDown(text, words, wait, again);
  const close = document.createElement("button");
  close.type = "button";
  close.className = "quiet icon";
  close.dataset.close = "";
  close.setAttribute("aria-label", "Close");
  close.textContent = "×";
  box.append(close);
  const all = document.getElementById("toasts");
  all.append(box);
  while (all.children.length > 4) all.firstElementChild.remove();
  setTimeout(() => closeToast(box), (kind === "error" ? 12000 : 6000) + wait * 1000);
  return box;
}
export function closeToast(box) {
  box?.remove();
}
function countDown(text, words, wait, again) {
  let left = Math.ceil(wait);
  const show = () => {
    if (left > 0) {
      text.textContent = `${words} Try again in ${left} s.`.trim();
      left -= 1;
      setTimeout(show, 1000);
      return;
    }
    text.textContent = "You can try again now. ";
    if (!again) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "small";
    button.textContent = "Try again";
    button.addEventListener("click", () => { closeToast(text.parentElement); again(); });
    text.append(button);
  };
  show();
}
export function announce(element, wait) {
  let left = wait;
  const show = () => {
    element.textContent = left > 0 ? `Too many attempts from your address. Try again in ${left} s.` : "You can try again now.";
    if (left-- > 0) setTimeout(show, 1000);
  };
  show();
}
