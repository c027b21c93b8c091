// The network is gone, or the session is: what was typed stays.
import { toast } from "./toasts.js";

const show = (id, shown) => { document.getElementById(id).hidden = !shown; };
export const offline = () => show("offline", true);
export const online = () => show("offline", false);
export const signedOut = () => show("signed-out", true);

export async function signedIn() {
  try {
    const answer = await fetch(document.querySelector("meta[name=session-url]").content, { headers: { "HX-Request": "true" } });
    if (!answer.ok) { toast("warning", "Not signed in yet."); return; }
    const { token } = await answer.json();
    document.querySelector("meta[name=csrf-token]").content = token;
    for (const field of document.querySelectorAll("input[name=csrf]")) field.value = token;
    show("signed-out", false);
    toast("success", "Signed in again. Go on where you were.");
  } catch {
    offline();
  }
}
