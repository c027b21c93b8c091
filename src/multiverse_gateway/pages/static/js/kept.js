// Keep the conversation and the form in this tab, so that reload and Back lose nothing. Signing out removes them (main.js).
const isReturn = ["reload", "back_forward"].includes(performance.getEntriesByType("navigation")[0]?.type);

export function keeper(form) {
  const name = `mvg-playground:${form.dataset.post}`;
  const fields = () => [...form.elements].filter((field) => field.name && field.type !== "hidden");
  let isOver = false;
  document.addEventListener("submit", (event) => { isOver ||= event.target.matches("[data-sign-out]"); });
  return {
    save(turns) {
      if (isOver) return;
      const values = fields().map((field) => [field.name, field.type === "checkbox" ? field.checked : field.value]);
      for (let from = 0; from <= turns.length; from = from ? from * 2 : 1) { // the oldest turns give way when there is no room for all
        try {
          sessionStorage.setItem(name, JSON.stringify({ values, turns: turns.slice(from) }));
          return;
        } catch (error) {
          if (error.name !== "QuotaExceededError") return; // a browser that keeps nothing
        }
      }
    },
    /** Fill the form and return the turns of the conversation. A model in the address wins, unless the page was reloaded. */
    restore() {
      let kept = null;
      try {
        kept = JSON.parse(sessionStorage.getItem(name));
      } catch {
        return [];
      }
      const models = new Set([...document.querySelectorAll("#models [data-name]")].map((option) => option.dataset.name));
      const keepsModel = new URLSearchParams(location.search).has("model") && !isReturn;
      for (const [field, value] of kept?.values ?? []) {
        const element = form.elements[field];
        if (!element || (field === "model" && keepsModel) || (["model", "other"].includes(field) && !models.has(value))) continue;
        if (element.type === "checkbox") element.checked = value;
        else element.value = value;
      }
      return kept?.turns ?? [];
    },
  };
}
