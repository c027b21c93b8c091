// What HTMX cannot do: toasts, tips, copying, times in words, dialogs, theme, trouble with the network or the session.
import { announce, closeToast, toast } from "./toasts.js";
import { tick } from "./times.js";
import { offline, online } from "./trouble.js";
import { signedIn, signedOut, stay, watchSession } from "./session.js";
import { follow, poll, retry } from "./live.js";
import { copyFrom } from "./copy.js";
import { hideTip, showTip } from "./tips.js";
import { chooseTab, tabKeys } from "./tabs.js";
import { askBeforeSaving, fill, markChanges, markNote, unfoldField, wouldLose } from "./forms.js";
import { keepLast, showPieces } from "./pieces.js";

const minutes = "rect[data-at], svg[data-tones]";
const token = () => document.querySelector("meta[name=csrf-token]");

// Clicks, for whatever the page holds now or later

document.addEventListener("click", (event) => {
  const on = (selector) => event.target.closest(selector);
  let found;
  if ((found = on("[data-copy]"))) copyFrom(found);
  else if ((found = on("[data-fill]"))) fill(found);
  else if ((found = on("[role=tab]"))) chooseTab(found);
  else if ((found = on("[data-opens]"))) { event.preventDefault(); document.getElementById(found.dataset.opens).showModal(); }
  else if ((found = on(".toast [data-close]"))) closeToast(found.closest(".toast"));
  else if ((found = on("dialog [data-close]"))) found.closest("dialog").close();
  else if ((found = on("[data-theme-switch]"))) switchTheme();
  else if ((found = on("[data-menu], [data-whole]"))) unfold(found);
  else if ((found = on("[data-discards]"))) leaves(document.querySelector("form[data-form]"));
  else if ((found = on("[data-retry]"))) retry();
  else if (on("[data-signed-in]")) signedIn();
  else if (on("[data-stay]")) stay();
  if (on(minutes)) showTip(on(minutes), event.clientX);
  else hideTip();
});
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest?.(minutes);
  if (mark) showTip(mark, event.clientX);
  else if (event.pointerType === "mouse") hideTip();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
  if (event.target.matches("[role=tab]")) tabKeys(event);
});

function unfold(button) {
  button.setAttribute("aria-expanded", String(button.getAttribute("aria-expanded") !== "true"));
}
function switchTheme() {
  const dark = getComputedStyle(document.documentElement).colorScheme;
  const isDark = dark === "dark" || (dark !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = isDark ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  document.cookie = `mvg_theme=${theme}; Path=/; Max-Age=31536000; SameSite=Lax`;
}

// Requests of HTMX: the token, busy buttons, what went wrong

document.addEventListener("htmx:configRequest", (event) => {
  event.detail.headers["X-CSRF-Token"] = token().content;
});
const waiting = new Map();
document.addEventListener("htmx:beforeSwap", (event) => keepLast(event.detail));
document.addEventListener("htmx:beforeRequest", (event) => {
  const elt = event.detail.elt;
  showPieces(event.detail);
  const button = elt.matches("button") ? elt : elt.matches("form[data-form], dialog form") ? elt.querySelector("button:not([type=button])") : null;
  if (!button) return;
  waiting.set(event.detail.xhr, [button, button.textContent]);
  button.setAttribute("aria-busy", "true");
  if (button.dataset.busy) button.textContent = button.dataset.busy;
});
document.addEventListener("htmx:afterRequest", (event) => {
  const [button, words] = waiting.get(event.detail.xhr) ?? [];
  if (!button) return;
  waiting.delete(event.detail.xhr);
  button.removeAttribute("aria-busy");
  button.textContent = words;
});
document.addEventListener("htmx:responseError", (event) => {
  const { xhr, elt } = event.detail;
  if (xhr.status === 401) signedOut();
  else if (xhr.status === 429) tooMany(xhr, elt);
  else if (!xhr.getResponseHeader("HX-Trigger")) toast("error", "Something went wrong. Try again in a moment.");
});
function tooMany(xhr, elt) {
  const words = xhr.getResponseHeader("Content-Type")?.startsWith("text/plain") ? xhr.responseText : "Too many requests.";
  const again = () => htmx.trigger(elt, elt.matches("form") ? "submit" : "click");
  toast("warning", words, { wait: Number(xhr.getResponseHeader("Retry-After")) || 10, again });
}
document.addEventListener("htmx:sendError", offline);
document.addEventListener("htmx:timeout", offline);
document.addEventListener("htmx:afterOnLoad", online);
document.addEventListener("toast", (event) => toast(event.detail.kind, event.detail.text));

// Whatever HTMX puts in: what was unfolded stays so, what is offered alone is taken

document.addEventListener("htmx:oobBeforeSwap", (event) => {
  const { target, fragment } = event.detail;
  for (const old of target.querySelectorAll("[id][aria-expanded=true]")) {
    fragment.querySelector(`#${CSS.escape(old.id)}`)?.setAttribute("aria-expanded", "true");
  }
});
const kept = new Set();
document.addEventListener("toggle", (event) => {
  const name = event.target.dataset?.keep;
  if (name && event.target.isConnected) kept[event.target.open ? "add" : "delete"](name);
}, true);
function open(root) {
  for (const fold of root.querySelectorAll?.("details[data-keep]") ?? []) fold.open ||= kept.has(fold.dataset.keep);
}

document.addEventListener("htmx:load", (event) => {
  tick(event.target);
  open(event.target);
  if (event.target.matches?.("#live[data-sort]")) showOrder(event.target);
  for (const note of event.target.querySelectorAll?.(".note[data-field]") ?? []) markNote(note);
  if (event.target.matches?.(".note[data-field]")) markNote(event.target);
  const alone = event.target.querySelector?.("[data-at-once]");
  if (alone) fill(alone);
});
function showOrder(board) {
  const { sort, order } = document.getElementById("filter").elements;
  sort.value = board.dataset.sort;
  order.value = board.dataset.order;
}
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target?.id === "wizard" || event.target.id === "registered") document.getElementById("registered")?.focus();
  if (event.detail.target?.id === "test") unfoldField(event.detail.target);
});
document.getElementById("pause")?.addEventListener("click", (event) => {
  const pause = event.currentTarget;
  const paused = pause.getAttribute("aria-pressed") !== "true";
  pause.setAttribute("aria-pressed", String(paused));
  pause.textContent = paused ? "Resume" : "Pause";
  if (!paused) poll();
});

// At first

const filters = document.querySelector("details.filters"); // without a script they are all there
if (filters && matchMedia("(max-width: 760px)").matches) filters.open = ["model", "status", "owner"].some((name) => new URLSearchParams(location.search).get(name));

document.addEventListener("change", (event) => { if (event.target.name === "sort") event.target.form.elements.order.value = ""; }, true);
document.addEventListener("input", (event) => markChanges(event.target.form));
document.addEventListener("submit", askBeforeSaving, true);
// Ask before what was typed is lost, unless it was saved or discarded.
window.addEventListener("beforeunload", (event) => { if (wouldLose(document.querySelector("form[data-form]"))) event.preventDefault(); });
const leaves = (form) => { if (form?.matches("form[data-form]")) form.dataset.leaves = "true"; };
document.addEventListener("htmx:beforeOnLoad", (event) => { if (event.detail.xhr.status < 300) leaves(event.detail.elt); });
document.addEventListener("input", (event) => { delete event.target.form?.dataset.leaves; });
document.addEventListener("submit", (event) => { if (event.target.matches("[data-sign-out]")) leaves(document.querySelector("form[data-form]")); });
document.addEventListener("submit", (event) => { if (event.target.matches("[data-sign-out]")) sessionStorage.clear(); });
document.addEventListener("signed-out", signedOut);
follow();
watchSession();
tick(document);
setInterval(() => tick(document), 5000);
const problem = document.querySelector("[data-wait]");
if (problem) announce(problem, Number(problem.dataset.wait));
for (const shown of document.querySelectorAll(".toast")) setTimeout(() => closeToast(shown), 8000);
