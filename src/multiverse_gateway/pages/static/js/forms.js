// The forms that register and edit: notes beside fields, offers, what was changed, and asking before it is saved.
export function markNote(note) {
  const field = document.getElementById(note.dataset.field);
  if (!field) return;
  if (note.dataset.state === "bad") field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}
export function fill(button) {
  const field = document.getElementById(button.dataset.fill);
  field.value = button.dataset.value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  field.dispatchEvent(new Event("change", { bubbles: true }));
  for (const other of button.parentElement.querySelectorAll("[data-fill]")) other.classList.toggle("chosen", other === button);
}

/** Show and focus the field that an answer is about, such as the API key that a server asked for. */
export function unfoldField(root) {
  const wanted = root.querySelector?.("[data-unfold]");
  const field = wanted && document.getElementById(wanted.dataset.unfold);
  if (!field) return;
  for (let fold = field.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  field.focus();
}

const differs = (field) => (field.type === "checkbox" ? field.checked !== field.defaultChecked : field.value.trim() !== field.defaultValue.trim());
const said = (field, value) => (field.type === "checkbox" ? (value ? "yes" : "no") : value.trim() || "nothing");
const change = (field) => {
  if (field.type === "password") return "a new one";
  const [before, after] = field.type === "checkbox" ? [field.defaultChecked, field.checked] : [field.defaultValue, field.value];
  return `${said(field, before)} → ${said(field, after)}`;
};

export function changed(form) {
  return [...form.querySelectorAll(".field input")].filter(differs);
}
/** Whether leaving the page would lose what was typed into a form. */
export function wouldLose(form) {
  return form !== null && form.isConnected && !form.dataset.leaves && changed(form).length > 0;
}
export function markChanges(form) {
  if (!form?.dataset.edit) return;
  const names = new Set(changed(form).map((field) => field.closest(".field").dataset.field));
  const words = names.size === 0 ? "No changes yet." : names.size === 1 ? "1 field changed." : `${names.size} fields changed.`;
  const count = form.querySelector("[data-count]");
  if (count.textContent !== words) count.textContent = words;
  for (const field of form.querySelectorAll(".field")) {
    const mark = field.querySelector(".changed");
    if (mark) mark.hidden = !names.has(field.dataset.field);
  }
}
export function askBeforeSaving(event) {
  const form = event.target;
  if (!form.dataset?.edit) return;
  event.preventDefault();
  const fields = changed(form);
  const dialog = document.getElementById(form.dataset.edit);
  const list = dialog.querySelector("[data-changes]");
  list.replaceChildren(...fields.map((field) => {
    const item = document.createElement("li");
    const label = field.labels[0].cloneNode(true);
    for (const extra of label.querySelectorAll(".muted, .changed")) extra.remove();
    item.textContent = field.name === "remove_key" ? "The stored API key is deleted" : `${label.textContent.trim()}: ${change(field)}`;
    return item;
  }));
  if (!fields.length) { htmx.trigger(form, "confirmed"); return; }
  dialog.querySelector("[data-confirm]").onclick = () => { dialog.close(); htmx.trigger(form, "confirmed"); };
  dialog.showModal();
}
