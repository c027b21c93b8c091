// The description of the API in Swagger UI, within our own page. An operator who is signed in can try calls at once; others type a key.
const place = document.getElementById("api");
const token = document.querySelector("meta[name=csrf-token]").content;

// Swagger UI's own layout brings a second <main> and <h1>; this one has only the calls and the button for keys.
function layout({ React: { createElement: make } }) {
  const Layout = ({ getComponent, specSelectors }) => {
    const part = (name) => make(getComponent(name, true));
    const loading = make("p", { role: "status" }, "Loading …");
    const calls = [make("div", { className: "keys", key: "keys" }, part("AuthorizeBtnContainer")), make("div", { key: "calls" }, part("operations"))];
    const status = specSelectors.loadingStatus();
    return make("div", { className: "swagger-ui" }, make(getComponent("SvgAssets")), part("errors"), status === "success" ? calls : status !== "failed" && loading);
  };
  const DeepLink = ({ text }) => make("span", null, text); // it is inside a button, where no link may be
  return { components: { Layout, DeepLink, CopyToClipboardBtn: () => null } };
}

// What Swagger UI leaves out for those who use a keyboard or a screen reader.
const MISSING = {
  "pre:not([tabindex])": { tabindex: "0" },
  "select:not([aria-label])": { "aria-label": "Example" },
  "textarea:not([aria-label])": { "aria-label": "Request body" },
  ".close-modal:not([aria-label])": { "aria-label": "Close" },
  "table[role=region]": { role: "table" },
};
const SPOKEN_OTHERWISE = ".modal-btn[aria-label]"; // their labels are not what is written on them

new MutationObserver(() => {
  for (const [selector, attributes] of Object.entries(MISSING)) {
    for (const element of place.querySelectorAll(selector)) Object.entries(attributes).forEach((pair) => element.setAttribute(...pair));
  }
  for (const button of place.querySelectorAll(SPOKEN_OTHERWISE)) button.removeAttribute("aria-label");
}).observe(place, { childList: true, subtree: true });

window.SwaggerUIBundle({
  domNode: place,
  url: place.dataset.description,
  layout: "Layout",
  deepLinking: true,
  defaultModelsExpandDepth: -1,
  syntaxHighlight: { activated: false },
  validatorUrl: null,
  plugins: [layout],
  requestInterceptor: (request) => {
    if (token) request.headers["x-csrf-token"] = token;
    return request;
  },
});
