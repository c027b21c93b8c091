// What a model thinks before it answers: in a field of its own, or between tags at the beginning of the text.
const OPENING = /^\s*<(think|thinking)>\s*/i;
const BEGINNINGS = ["<think>", "<thinking>"];
const CLOSING_LINE = /^<\/think(?:ing)?>[ \t]*$/im; // some templates write the opening tag into the prompt
const FENCE = /^ {0,3}(?:```|~~~)/m;

/** Return the text of a field that should be text; some servers send a list of parts, or something else. */
export function textOf(value) {
  if (typeof value === "string") return value;
  return Array.isArray(value) ? value.map((part) => (typeof part?.text === "string" ? part.text : "")).join("") : "";
}

/** Divide what a model wrote into its reasoning and its answer; `isOpen` while the reasoning may go on. */
export function divide(text) {
  const opening = text.match(OPENING);
  if (opening) {
    const closing = text.toLowerCase().indexOf(`</${opening[1].toLowerCase()}>`);
    if (closing < 0) return { reasoning: text.slice(opening[0].length), answer: "", isOpen: true };
    const after = closing + opening[1].length + 3;
    return { reasoning: text.slice(opening[0].length, closing).trimEnd(), answer: text.slice(after).trimStart(), isOpen: false };
  }
  const closing = text.match(CLOSING_LINE);
  if (closing && !FENCE.test(text.slice(0, closing.index))) {
    const after = closing.index + closing[0].length;
    return { reasoning: text.slice(0, closing.index).trim(), answer: text.slice(after).trimStart(), isOpen: false };
  }
  return { reasoning: "", answer: text, isOpen: false };
}

/** Return whether a text may still turn out to begin with an opening tag. */
export function mayOpen(text) {
  const begun = text.trimStart().toLowerCase();
  return BEGINNINGS.some((tag) => tag.startsWith(begun));
}
