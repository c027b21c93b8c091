// The state of the servers in the head of the page, in the title of its tab and in its icon.
export function showState({ tone, title, counts }) {
  const head = document.getElementById("counts");
  if (head && head.dataset.html !== counts) {
    head.outerHTML = counts;
    document.getElementById("counts").dataset.html = counts;
  }
  const page = document.querySelector("meta[name=page-title]").content;
  const words = title ? `${title} · ${page}` : page;
  if (document.title !== words) document.title = words;
  const icon = document.getElementById("icon");
  const address = icon.dataset[tone] ?? icon.dataset.good;
  if (icon.getAttribute("href") !== address) icon.href = address;
}
