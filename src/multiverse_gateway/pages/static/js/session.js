// The session ends some day: the page says so before, and what was typed stays.
import { toast } from "./toasts.js";
import { offline, show } from "./trouble.js";

const WARNING = 300; // seconds before the end
const TWICE = 3000; // ms within which a second click belongs to the first one
const meta = (name) => document.querySelector(`meta[name=${name}]`);
const until = (seconds) => Date.now() + 1000 * seconds;
let ends = until(Number(meta("session-left")?.content ?? 0));
let asked = 0;

/** Fetch the session and take over its token and its end; return whether there is one. */
async function ask(path = "", method = "GET") {
  const headers = { "HX-Request": "true", "X-CSRF-Token": meta("csrf-token").content };
  const answer = await fetch(meta("session-url").content + path, { method, headers });
  if (answer.status === 401) { signedOut(); return false; }
  if (!answer.ok) throw new Error(answer.status);
  const { token, seconds_left: left } = await answer.json();
  meta("csrf-token").content = token;
  for (const field of document.querySelectorAll("input[name=csrf]")) field.value = token;
  ends = until(left);
  return true;
}

const isTyped = (field) => {
  if (field.type === "checkbox" || field.type === "radio") return field.checked !== field.defaultChecked;
  if (field.options) return [...field.options].some((option) => option.selected !== option.defaultSelected) && field.form.method === "post";
  return field.type !== "hidden" && field.value !== field.defaultValue;
};
const hasTyped = () => [...document.querySelectorAll("#page form:not(.filter) :is(input, textarea, select)")].some(isTyped);

export function signedOut() {
  show("session-ends", false);
  const banner = document.getElementById("signed-out");
  const [typed, plain] = ["typed", "plain"].map((name) => banner.querySelector(`[data-${name}]`));
  typed.hidden = !hasTyped();
  plain.hidden = !typed.hidden;
  plain.querySelector("a").search = `?next=${encodeURIComponent(location.pathname.slice(meta("root-path").content.length) + location.search)}`;
  show("signed-out", true);
}
export async function signedIn() {
  try {
    if (!(await ask())) { toast("warning", "Not signed in yet."); return; }
    show("signed-out", false);
    toast("success", "Signed in again. Continue where you were.");
    document.dispatchEvent(new Event("signed-in"));
  } catch {
    offline();
  }
}
export async function stay() {
  try {
    if (!(await ask("/stay", "POST"))) return;
    show("session-ends", false);
    toast("success", "You stay signed in.");
  } catch {
    offline();
  }
}

/** Announce the end of the session; another tab may have put it off, so the gateway is asked first. */
async function watch() {
  if (!ends || !document.getElementById("signed-out").hidden) return;
  const left = Math.round((ends - Date.now()) / 1000);
  if (left > WARNING) { show("session-ends", false); return; }
  if (Date.now() - asked > 60_000 || left <= 0) {
    asked = Date.now();
    try { if (!(await ask()) || ends - Date.now() > 1000 * WARNING) return; } catch { return; }
  }
  const minutes = Math.max(1, Math.round((ends - Date.now()) / 60_000));
  document.querySelector("#session-ends [data-left]").textContent = `${minutes} min`;
  show("session-ends", true);
}

/** A form that the browser sends itself would lead to the sign-in page without what was typed: send it only with a session, and a double
 * click only once: the second answer would replace the first one, with what it shows only once. */
async function send(event) {
  const form = event.target;
  if (form.method !== "post" || !form.elements.csrf || form.matches("[hx-post], [data-sign-out]") || event.defaultPrevented) return;
  event.preventDefault();
  if ("sent" in form.dataset) return;
  form.dataset.sent = "";
  setTimeout(() => delete form.dataset.sent, TWICE);
  try {
    if (await ask()) HTMLFormElement.prototype.submit.call(form);
    else delete form.dataset.sent; // it was not sent
  } catch {
    delete form.dataset.sent;
    offline();
  }
}

export function watchSession() {
  if (!Number(meta("session-left")?.content)) return;
  setInterval(watch, 5000);
  watch();
  document.addEventListener("submit", send);
}
