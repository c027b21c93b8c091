// The wall view follows the servers; when its link is revoked, the page is read again and says so.
import { follow } from "./live.js";

document.addEventListener("signed-out", () => location.reload());
follow();
