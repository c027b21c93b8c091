// Color the code of an answer. A language's grammar loads when an answer first uses that language.
import hljs from "../vendor/highlight-core.min.js";

const ALIASES = {
  bash: "sh shell zsh console",
  cpp: "c cc c++ h hpp cxx arduino",
  java: "kotlin kt scala csharp cs c#",
  json: "jsonc json5 jsonl",
  python: "py python3 py3 ipython",
  sql: "postgres postgresql sqlite mysql",
  typescript: "ts tsx javascript js jsx mjs cjs node",
  xml: "html svg xhtml vue plist",
  yaml: "yml",
};
const FILES = new Map(Object.entries(ALIASES).flatMap(([file, names]) => [file, ...names.split(" ")].map((name) => [name, file])));
const MOST = 60_000; // characters of code; longer code stays plain, so that the page stays quick
const loading = new Map();

async function load(file) {
  const { default: grammar } = await import(new URL(`../vendor/highlight-${file}.min.js`, import.meta.url));
  hljs.registerLanguage(file, grammar);
}

/** Put spans with classes of highlight.js into a code element; `clean` turns markup into harmless nodes. */
export async function highlight(code, language, clean) {
  const file = FILES.get(language.toLowerCase());
  const source = code.textContent;
  if (!file || source.length > MOST) return;
  if (!loading.has(file)) loading.set(file, load(file));
  try {
    await loading.get(file);
    if (code.textContent === source) code.replaceChildren(clean(hljs.highlight(source, { language: file, ignoreIllegals: true }).value));
  } catch {
    loading.delete(file); // plain code is readable, and the next block tries again
  }
}
