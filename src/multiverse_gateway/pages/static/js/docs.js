// The description of the API, as Swagger UI shows it. Who is signed in tries calls as operator; keys can be typed in, too.
const place = document.getElementById("api");
const token = document.querySelector("meta[name=csrf-token]").content;
const nothing = () => null;

window.SwaggerUIBundle({
  domNode: place,
  url: place.dataset.description,
  deepLinking: true,
  defaultModelsExpandDepth: -1,
  validatorUrl: null,
  // Our own page says what these would say.
  plugins: [() => ({ components: { info: nothing, ServersContainer: nothing, CopyToClipboardBtn: nothing } })],
  onComplete: () => place.querySelector("main").setAttribute("role", "group"), // the page has a main part already
  requestInterceptor: (request) => {
    if (token) request.headers["x-csrf-token"] = token;
    return request;
  },
});
