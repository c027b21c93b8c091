// Instants in the reader's own time zone and words; the server writes ISO 8601.
const long = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const short = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });
const full = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

export function ago(instant) {
  const seconds = Math.max(0, Math.round((Date.now() - instant) / 1000));
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${seconds - (seconds % 5)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ago`;
  return long.format(instant);
}
function local(instant) {
  return instant.toDateString() === new Date().toDateString() ? `today, ${short.format(instant)}` : long.format(instant);
}
const since = (instant) => (instant.toDateString() === new Date().toDateString() ? short.format(instant) : long.format(instant));
export const range = (from, to) => short.formatRange(from, to);
export const exactly = (text) => full.format(new Date(text));

export function tick(root) {
  for (const time of root.querySelectorAll?.("time[datetime]") ?? []) {
    const instant = new Date(time.dateTime);
    if (Number.isNaN(instant.valueOf())) continue;
    const words = "ago" in time.dataset ? ago(instant) : "clock" in time.dataset ? clock.format(instant) : "since" in time.dataset ? since(instant) : local(instant);
    if (time.textContent !== words) time.textContent = words;
    if (!time.title) time.title = full.format(instant);
  }
}
