// Where a request stands while there is no answer: its place in the queue, or for how long a server has been reading the prompt.
const ENDINGS = { one: "st", two: "nd", few: "rd", other: "th" };
const order = new Intl.PluralRules("en", { type: "ordinal" });
const ordinal = (number) => `${number.toLocaleString("en")}${ENDINGS[order.select(number)]}`;
const about = (duration) => (duration < 60 ? `about ${duration} s` : `about ${Math.round(duration / 60)} min`);

export function placeWords({ position, waiting, about_seconds: duration }) {
  return `${ordinal(position)} of ${waiting.toLocaleString("en")}${duration === null ? "" : `, ${about(duration)}`}`;
}

export function badge(sent, model) {
  const element = document.createElement("p");
  element.className = "standing";
  element.setAttribute("aria-live", "polite");
  const words = document.createElement("span");
  const time = document.createElement("span");
  time.setAttribute("aria-hidden", "true"); // it changes each second, which nobody wants to hear
  element.append(words, time);
  let since = sent; // when a server may have begun to read
  let counts = false;
  const tick = () => { time.textContent = counts ? ` ${Math.round((performance.now() - since) / 1000)} s` : ""; };
  const timer = setInterval(tick, 1000);
  const show = (text, counted) => {
    if (words.textContent !== text) words.textContent = text;
    counts = counted;
    tick();
  };
  show(`Waiting for ${model}…`, true);
  return {
    element,
    waits(place) {
      since = 0;
      show(`Waiting: ${placeWords(place)}`, false);
    },
    reads({ attempt }) {
      since ||= performance.now();
      show(attempt > 1 ? "Another server is reading your prompt…" : "The model is reading your prompt…", true);
    },
    remove() {
      clearInterval(timer);
      element.remove();
    },
  };
}
