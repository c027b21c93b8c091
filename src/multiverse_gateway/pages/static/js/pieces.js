// An answer that comes in pieces: each is shown until the next one comes, and HTMX puts in the last one.
const split = (text) => text.split("<!--next-->");

export function showPieces({ elt, xhr, target }) {
  if (!elt.matches("[data-pieces]")) return;
  let shown = 1;
  const before = target.innerHTML;
  target.setAttribute("aria-busy", "true"); // to be read out once, when it is over
  xhr.addEventListener("loadend", () => target.removeAttribute("aria-busy"));
  for (const cut of ["error", "abort", "timeout"]) xhr.addEventListener(cut, () => { target.innerHTML = before; });
  xhr.addEventListener("progress", () => {
    const pieces = split(xhr.responseText);
    if (pieces.length > shown) target.innerHTML = pieces.at(-2);
    shown = pieces.length;
  });
}
export function keepLast(detail) {
  detail.serverResponse = split(detail.serverResponse).at(-1);
}
