// The menu of models: a field in which one searches, and a list below it (the combobox of the ARIA practices).
export function menu(field, chosen) {
  const list = document.getElementById(field.getAttribute("aria-controls"));
  const none = list.querySelector("[aria-disabled]");
  let value = field.value;
  let active = null;

  const shown = () => [...list.querySelectorAll("[data-name]")].filter((option) => !option.hidden);
  function mark(option) {
    active?.setAttribute("aria-selected", "false");
    active = option;
    if (option) {
      option.setAttribute("aria-selected", "true");
      option.scrollIntoView({ block: "nearest" });
      field.setAttribute("aria-activedescendant", option.id);
    } else field.removeAttribute("aria-activedescendant");
  }
  function open(text) {
    const words = text.toLowerCase().split(/\s+/);
    for (const option of list.querySelectorAll("[data-name]")) {
      option.hidden = !words.every((word) => option.dataset.name.toLowerCase().includes(word));
    }
    const options = shown();
    none.hidden = options.length > 0;
    list.hidden = false;
    field.setAttribute("aria-expanded", "true");
    mark(options.find((option) => option.dataset.name === value) ?? (text ? options[0] : null) ?? null);
  }
  function close() {
    list.hidden = true;
    field.setAttribute("aria-expanded", "false");
    mark(null);
    field.value = value;
  }
  function choose(option) {
    value = option.dataset.name;
    close();
    chosen();
  }
  function move(step) {
    if (list.hidden) { open(""); return; }
    const options = shown();
    if (options.length) mark(options[(options.indexOf(active) + step + options.length) % options.length]);
  }

  field.addEventListener("click", () => { open(""); field.select(); });
  field.addEventListener("input", () => open(field.value.trim()));
  field.addEventListener("blur", close);
  field.addEventListener("keydown", (event) => {
    const actions = {
      ArrowDown: () => move(1),
      ArrowUp: () => move(-1),
      Enter: () => { if (active) choose(active); else close(); },
      Escape: close,
    };
    if (!(event.key in actions) || event.isComposing) return;
    event.preventDefault();
    actions[event.key]();
  });
  list.addEventListener("mousedown", (event) => event.preventDefault()); // the field keeps the focus
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[data-name]");
    if (option) choose(option);
  });
}
