// Show the Markdown of an answer. A model's text is hostile input: markdown-it escapes HTML and loads no images, DOMPurify then lets through
// only the elements and attributes listed here, and the policy of the page forbids scripts, styles and pictures from elsewhere in any case.
/* global markdownit, DOMPurify */
import { highlight } from "./highlight.js";

const LINK = /^(?:https?:\/\/|mailto:)/i;
const CLEAN = {
  ALLOWED_TAGS: "a blockquote br code del em h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul #text".split(" "),
  ALLOWED_ATTR: ["href", "class", "start"],
  ADD_URI_SAFE_ATTR: ["start"],
  ALLOWED_URI_REGEXP: LINK,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  KEEP_CONTENT: true,
  RETURN_DOM_FRAGMENT: true,
};
const clean = (html) => DOMPurify.sanitize(html, CLEAN);

const md = markdownit({ html: false, linkify: true, breaks: false, typographer: false });
md.validateLink = (address) => LINK.test(address.trim());
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
const { escapeHtml } = md.utils;

// A picture would be loaded from elsewhere: its place takes a link to it.
md.renderer.rules.image = (tokens, at) => {
  const address = tokens[at].attrGet("src");
  return `<a href="${escapeHtml(address)}">${escapeHtml(tokens[at].content || address)}</a>`;
};

// Formulas stay as they were written: `$a_1*b$`, `$$…$$`, `\(x\)` and `\[x\]` are no emphasis and no escapes.

const LONGEST = 2000; // characters of a formula, so that a text full of opening marks is not searched again and again
const MOST_LINES = 100;
const CLOSING = { "$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]" };
function formula(text, at) {
  const opening = ["$$", "\\(", "\\[", "$"].find((mark) => text.startsWith(mark, at));
  if (!opening) return null;
  const closing = CLOSING[opening];
  const end = text.slice(0, at + LONGEST).indexOf(closing, at + opening.length);
  if (end <= at + opening.length) return null;
  const inner = text.slice(at + opening.length, end);
  const isMoney = opening === "$" && (/^\s|\s$|\n/.test(inner) || /\d/.test(text[end + 1] ?? ""));
  return isMoney ? null : text.slice(at, end + closing.length);
}
md.inline.ruler.before("escape", "formula", (state, silent) => {
  const found = formula(state.src.slice(0, state.posMax), state.pos);
  if (!found) return false;
  if (!silent) state.push("formula", "", 0).content = found;
  state.pos += found.length;
  return true;
});
md.block.ruler.before("fence", "formula", (state, first, last, silent) => {
  const line = (number) => state.src.slice(state.bMarks[number] + state.tShift[number], state.eMarks[number]).trim();
  const closing = { "$$": "$$", "\\[": "\\]" }[line(first).slice(0, 2)];
  if (!closing || state.sCount[first] - state.blkIndent >= 4) return false;
  let end = first;
  for (let from = 2; !line(end).slice(from).includes(closing); from = 0) {
    end += 1;
    if (end >= last || end > first + MOST_LINES || state.sCount[end] < state.blkIndent) return false;
  }
  const ending = line(end);
  if (ending.indexOf(closing, end === first ? 2 : 0) !== ending.length - closing.length) return false; // it goes on behind the formula
  if (silent) return true;
  const token = state.push("formula", "", 0);
  token.block = true;
  token.content = state.getLines(first, end + 1, state.blkIndent, false).trim();
  token.map = [first, end + 1];
  state.line = end + 1;
  return true;
}, { alt: ["paragraph", "reference", "blockquote", "list"] });
md.renderer.rules.formula = (tokens, at) => {
  const text = escapeHtml(tokens[at].content);
  return tokens[at].block ? `<p class="formula block">${text}</p>` : `<span class="formula">${text}</span>`;
};

// What the page needs beyond Markdown: headings below those of the page and without gaps, alignment as a class instead of a style.

md.core.ruler.push("page", ({ tokens }) => {
  const above = [];
  for (const token of tokens) {
    if (token.type === "heading_open") {
      const level = Number(token.tag[1]);
      while (above.at(-1) >= level) above.pop();
      above.push(level);
    }
    if (token.type.startsWith("heading_")) token.tag = `h${Math.min(above.length + 2, 6)}`;
    const side = token.attrGet("style")?.replace("text-align:", "");
    if (side) token.attrs = [["class", `to-${side}`]];
  }
});

/** Return the HTML of each block at the top level, so that a growing answer changes only its last ones. */
function blocksOf(text) {
  const env = {};
  const blocks = [];
  let block = [];
  for (const token of md.parse(text, env)) {
    block.push(token);
    if (token.level === 0 && token.nesting <= 0) {
      blocks.push(md.renderer.render(block, md.options, env).trim());
      block = [];
    }
  }
  return blocks;
}

// Nodes of the page

const element = (tag, properties) => Object.assign(document.createElement(tag), properties);

function codeBlock(pre) {
  const code = pre.querySelector("code");
  const language = code.className.replace("language-", "");
  const outer = element("div", { className: "code" });
  const copy = element("button", { type: "button", className: "small copy", textContent: "Copy" });
  const name = language ? `${language} code` : "Code";
  outer.dataset.language = language;
  copy.dataset.copy = "";
  copy.setAttribute("aria-label", `Copy ${language ? name : "code"}`);
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", name);
  pre.replaceWith(outer);
  outer.append(pre, copy);
}
function scrolling(table) {
  const outer = element("div", { className: "scroller", tabIndex: 0 });
  outer.setAttribute("role", "group");
  outer.setAttribute("aria-label", "Table");
  table.replaceWith(outer);
  outer.append(table);
}
function nodeOf(html) {
  const block = element("div", { className: "block" });
  block.append(clean(html));
  for (const link of block.querySelectorAll("a")) Object.assign(link, { rel: "noopener noreferrer nofollow", target: "_blank" });
  block.querySelectorAll("pre").forEach(codeBlock);
  block.querySelectorAll("table").forEach(scrolling);
  return block;
}

/** Put a block in place of another; where both are the same code block, which has grown, only its text changes. */
function put(place, old, block) {
  const [before, after] = [old, block].map((node) => node?.querySelector(":scope > .code:only-child"));
  if (before && after && before.dataset.language === after.dataset.language) {
    before.querySelector("code").textContent = after.querySelector("code").textContent;
    delete old.dataset.painted;
  } else if (old) old.replaceWith(block);
  else place.append(block);
}
function paint(block) {
  for (const code of block.querySelectorAll(".code")) highlight(code.querySelector("code"), code.dataset.language, clean);
}

const PAUSE = 70; // milliseconds between two renderings: about 14 a second
const SHARE = 8; // a rendering that took long is followed by a pause of this many times its duration
const TOO_LONG = 1000; // milliseconds; an answer that takes longer to render stays plain text

/** Show a growing text as Markdown in an element; `shown` is called after each change. */
export function writer(place, shown = () => {}) {
  let blocks = [];
  let text = "";
  let timer = 0;
  let isPlain = false;
  const render = (isEnd) => {
    const began = performance.now();
    clearTimeout(timer);
    timer = 0;
    if (isPlain) place.textContent = text;
    else {
      const next = blocksOf(text);
      next.forEach((html, number) => {
        if (html !== blocks[number]) put(place, place.children[number], nodeOf(html));
      });
      while (place.children.length > next.length) place.lastElementChild.remove();
      const done = isEnd ? next.length : next.length - 1; // the last block may still grow
      for (const block of [...place.children].slice(0, done)) {
        if (block.dataset.painted) continue;
        block.dataset.painted = "true";
        paint(block);
      }
      blocks = next;
    }
    const took = performance.now() - began;
    if (took > TOO_LONG && !isPlain) {
      isPlain = true;
      place.classList.add("plain");
      place.textContent = text;
    }
    shown();
    return took;
  };
  let pause = PAUSE;
  return {
    write(all) {
      text = all;
      timer ||= setTimeout(() => { pause = Math.max(PAUSE, SHARE * render(false)); }, pause);
    },
    end(all) {
      text = all;
      render(true);
    },
  };
}
