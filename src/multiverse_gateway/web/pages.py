"""The pages for browsers: each one works after a plain reload, and HTMX asks the same URLs for fragments.

1. Without sign-in nothing is shown but the form to sign in, and with `public_dashboard` what visitors may see of two pages.
2. Whatever changes something passes one gate: sign-in, an origin of our own, the session's token (a request with the admin key has no
   cookie to abuse and needs none).
3. Links are made by name, so that every prefix works.
"""

import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import anyio
import attrs
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import NoMatchFound, Route

from multiverse_gateway._version import __version__
from multiverse_gateway.core.errors import BadRequest, GatewayError, NotFound
from multiverse_gateway.core.history import statistics
from multiverse_gateway.core.routing import Route as ServerRoute
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.registration import check, iso, parse_change, refreshed, register, remove, saved, server_id_of, update
from multiverse_gateway.web import views
from multiverse_gateway.web.admin import LEVELS, recent_logs
from multiverse_gateway.web.assets import load_assets, serve_asset
from multiverse_gateway.web.errors import REQUEST_ID, response_of
from multiverse_gateway.web.live import Parts, Streams, follow, follow_lines
from multiverse_gateway.web.security import (
    ADDRESS,
    MAX_TESTS,
    ClientGone,
    Entrance,
    LocalWindow,
    digest,
    is_below,
    is_secure,
    path_of,
    read_body,
    verified,
)
from multiverse_gateway.web.sessions import SAFE_METHODS, Session, Sessions
from multiverse_gateway.web.wizard import (
    FIELDS,
    Form,
    change_body,
    changed_fields,
    check_field,
    field_of,
    message_of,
    recognise,
    registration_of,
    try_steps,
    values_of,
)

MAX_SIGN_INS = 10
MAX_FIELDS = 100
HISTORY_SECONDS = 15.0
LOG_LINES = 200
COMPONENTS = ("api", "health", "registry", "routing", "ui")
THEMES = ("light", "dark")
NAVIGATION = (
    ("dashboard", "Dashboard"),
    ("register", "Register"),
    ("models", "Models"),
    ("playground", "Playground"),
    ("logs", "Logs"),
    ("settings", "Settings"),
    ("docs", "API docs"),
)
OPEN_TO_VISITORS = ("dashboard", "models", "docs")

_TOO_OLD = "This page has grown too old"
_log = logging.getLogger("multiverse_gateway.ui")


@attrs.define(eq=False)
class Visit:
    """A request of somebody who may see the page: signed in, with the admin key, or a visitor of the public pages."""

    request: Request
    session: Session | None = None
    is_operator: bool = False
    form: Form = attrs.field(factory=dict)

    @property
    def is_fragment(self) -> bool:
        """Whether HTMX asks, for a part of the page."""
        return self.request.headers.get("hx-request") == "true"

    @property
    def query(self) -> Mapping[str, str]:
        """The query of the URL."""
        return self.request.query_params


Handler = Callable[[Visit], Awaitable[Response]]


@attrs.define(eq=False)
class Histories:
    """The last checks of each server, read from the store again only when there may be new ones."""

    gateway: Gateway
    _kept: dict[ServerId, tuple[object, float, Sequence[ProbeResult]]] = attrs.field(factory=dict, init=False)

    async def all(self) -> dict[ServerId, Sequence[ProbeResult]]:
        """Return the checks of every server, newest first."""
        routes = self.gateway.table.routes
        for gone in self._kept.keys() - routes.keys():
            self._kept.pop(gone, None)
        return {server_id: await self.of(route) for server_id, route in list(routes.items())}

    async def of(self, route: ServerRoute) -> Sequence[ProbeResult]:
        """Return the checks of one server, newest first; what is known of them while the store cannot be read."""
        server_id, now = route.server.id, self.gateway.now()
        key = (route.health.last_checked_at, route.server.generation)
        known = self._kept.get(server_id)
        if known is not None and known[0] == key and now - known[1] < HISTORY_SECONDS:
            return known[2]
        try:
            await saved(self.gateway)
            checks = tuple(await self.gateway.store.history(server_id, views.HISTORY))
        except GatewayError:
            return () if known is None else known[2]
        self._kept[server_id] = (key, now, checks)
        return checks


class Pages:
    """All pages of a gateway."""

    def __init__(self, gateway: Gateway, *, sessions: Sessions, entrance: Entrance, admin_digests: Callable[[], Collection[bytes]]) -> None:
        self._gateway = gateway
        self._sessions = sessions
        self._entrance = entrance
        self._admin_digests = admin_digests
        self._sign_ins = LocalWindow(MAX_SIGN_INS)
        self._tests = LocalWindow(MAX_TESTS)
        self._streams = Streams()
        self._histories = Histories(gateway)
        self._rows: dict[tuple[str, bool, str], tuple[views.Row, str]] = {}
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(span=views.span, size=views.size, count=views.count)

    def routes(self) -> list[Route]:
        """Make the routes of all pages."""
        page, public = self._operators, self._everybody
        return [
            Route("/", self._root, name="ui:root"),
            Route("/static/{digest}/{path:path}", serve_asset, name="ui:static"),
            Route("/login", self._login, methods=["GET", "POST"], name="ui:login"),
            Route("/logout", page(self._logout), methods=["POST"], name="ui:logout"),
            Route("/session", page(self._session_token), name="ui:session"),
            Route("/dashboard", public(self._dashboard), name="ui:dashboard"),
            Route("/dashboard/live", public(self._dashboard_live), name="ui:dashboard_live"),
            Route("/models", public(self._models), name="ui:models"),
            Route("/models/live", public(self._models_live), name="ui:models_live"),
            Route("/register", page(self._register), methods=["GET", "POST"], name="ui:register"),
            Route("/register/address", page(self._recognise), methods=["POST"], name="ui:recognise"),
            Route("/register/field", page(self._validate), methods=["POST"], name="ui:validate"),
            Route("/register/test", page(self._test), methods=["POST"], name="ui:try_server"),
            Route("/server/{server_id}", page(self._server), name="ui:server"),
            Route("/server/{server_id}/live", page(self._server_live), name="ui:server_live"),
            Route("/server/{server_id}/check", page(self._check_now), methods=["POST"], name="ui:check_now"),
            Route("/server/{server_id}/delete", page(self._delete), methods=["POST"], name="ui:delete"),
            Route("/server/{server_id}/edit", page(self._edit), methods=["GET", "POST"], name="ui:edit"),
            Route("/test", page(self._playground), name="ui:playground"),
            Route("/logs", page(self._logs), name="ui:logs"),
            Route("/logs/live", page(self._logs_live), name="ui:logs_live"),
            Route("/settings", page(self._settings), name="ui:settings"),
        ]

    # The gate

    def _operators(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        return self._gate(handler, visitors=False)

    def _everybody(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        return self._gate(handler, visitors=self._gateway.settings.public_dashboard)

    def _gate(self, handler: Handler, *, visitors: bool) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            headers = request.scope["headers"]
            session = self._sessions.find(headers)
            has_key = session is None and verified(headers, self._admin_digests()) is not None
            visit = Visit(request, session, is_operator=session is not None or has_key)
            if not visit.is_operator and not visitors:
                return self._ask_to_sign_in(visit)
            try:
                if request.method not in SAFE_METHODS:
                    visit.form = await self._read_form(request)
                    sent = request.headers.get("x-csrf-token") or visit.form.get("csrf", "")
                    if not has_key and (session is None or not self._sessions.may_change(session, headers, sent)):
                        return self._problem(
                            visit, 403, "This page has grown too old", "Nothing was changed. Reload the page and try again."
                        )
                return await handler(visit)
            except ClientGone:
                raise
            except GatewayError as error:
                return self._refuse(visit, error)
            except Exception:  # noqa: BLE001  a page says so in words; the log has the rest
                fields = {"request_id": request.scope.get(REQUEST_ID), "path": request.url.path}
                _log.exception("a page failed", extra={"fields": fields})
                return self._problem(visit, 500, "The gateway made a mistake", "Try again; if it stays so, tell the operator the id below.")

        return serve

    async def _read_form(self, request: Request) -> Form:
        settings = self._gateway.settings
        body = await read_body(
            request.receive, settings.max_admin_body_bytes, settings.client_body_timeout_seconds, headers=request.scope["headers"]
        )
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
        except ValueError:
            raise BadRequest("The form cannot be read; reload the page and try again") from None
        return dict(pairs)

    def _ask_to_sign_in(self, visit: Visit) -> Response:
        request = visit.request
        if visit.is_fragment or "text/html" not in request.headers.get("accept", "text/html"):
            return Response("Sign in first.", 401, {"cache-control": "no-store"}, media_type="text/plain")
        wanted = path_of(request.scope)
        if request.url.query:
            wanted += f"?{request.url.query}"
        query = urlencode({"next": wanted}) if request.method == "GET" and wanted not in ("/", "/dashboard") else ""
        return self._redirect(request, "login", query)

    def _refuse(self, visit: Visit, error: GatewayError) -> Response:
        titles = {404: "There is no such page", 429: "Too many at once", 503: "Not possible now", 400: "That cannot be used"}
        response = self._problem(visit, error.status, titles.get(error.status, "That did not work"), message_of(error))
        response.raw_headers.extend(error.headers())
        return response

    def _problem(self, visit: Visit, status: int, title: str, words: str) -> Response:
        if visit.is_fragment:
            return self._toast(Response(status_code=status), "error", f"{title}. {words}")
        return self._page(visit, "error.html", status=status, title=title, code=status, words=words)

    async def not_found(self, request: Request, error: Exception) -> Response:
        """Answer what no route matches: with a page where a browser asks for one."""
        assert isinstance(error, HTTPException)
        path = path_of(request.scope)
        wants_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
        if error.status_code != 404 or not wants_page or is_below(path, "/v1") or is_below(path, "/admin"):
            return response_of(error, request.scope)
        headers = request.scope["headers"]
        session = self._sessions.find(headers)
        visit = Visit(request, session, is_operator=session is not None)
        return self._problem(visit, 404, "There is no such page", "The address may be misspelt, or what it showed was removed.")

    # Rendering

    def _url(self, request: Request, name: str, **parameters: Any) -> str:
        root = str(request.scope.get("root_path", "")).rstrip("/")
        return f"{root}{request.app.url_path_for(_route_name(name), **parameters)}"

    def _redirect(self, request: Request, name: str, query: str = "", **parameters: Any) -> Response:
        url = self._url(request, name, **parameters) + (f"?{query}" if query else "")
        return RedirectResponse(url, 303, {"cache-control": "no-store"})

    def _has_route(self, request: Request, name: str) -> bool:
        try:
            request.app.url_path_for(_route_name(name))
        except NoMatchFound:
            return False
        return True

    def _context(self, visit: Visit) -> dict[str, Any]:
        request, assets = visit.request, load_assets()
        theme = request.cookies.get("mvg_theme", "")
        return {
            "url": lambda name, **parameters: self._url(request, name, **parameters),
            "static": lambda path: self._url(request, "static", digest=assets.digest, path=path),
            "visit": visit,
            "public": not visit.is_operator,
            "overview": views.overview(self._gateway),
            "csrf": visit.session.token if visit.session else "",
            "version": __version__,
            "fields": FIELDS,
        } | {"theme": theme if theme in THEMES else ""}

    def _render(self, visit: Visit, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(self._context(visit) | values)

    def _page(self, visit: Visit, template: str, *, status: int = 200, **values: Any) -> Response:
        request = visit.request
        shown = [item for item in NAVIGATION if (visit.is_operator or item[0] in OPEN_TO_VISITORS) and self._has_route(request, item[0])]
        if not visit.is_operator and not self._gateway.settings.public_dashboard:
            shown = []
        values.setdefault("active", "")
        html = self._render(
            visit,
            template,
            navigation=shown,
            notes=visit.session.take_notes() if visit.session else [],
            request_id=request.scope.get(REQUEST_ID, ""),
            reveals=visit.is_operator or self._gateway.settings.public_dashboard,
            **values,
        )
        return HTMLResponse(html, status, {"cache-control": "no-store", "vary": "HX-Request, Cookie"})

    def _fragment(
        self, visit: Visit, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
    ) -> Response:
        html = self._render(visit, template, **values)
        return HTMLResponse(html, status, {"cache-control": "no-store", "vary": "HX-Request, Cookie", **(headers or {})})

    def _toast(self, response: Response, kind: str, words: str) -> Response:
        response.headers["hx-trigger"] = json.dumps({"toast": {"kind": kind, "text": words}})
        response.headers["cache-control"] = "no-store"
        return response

    def _done(self, visit: Visit, kind: str, words: str, name: str, **parameters: Any) -> Response:
        """Go to another page, which says what was done."""
        if visit.session is not None:
            visit.session.note(kind, words)
        if visit.is_fragment:
            return Response(
                status_code=204, headers={"hx-redirect": self._url(visit.request, name, **parameters), "cache-control": "no-store"}
            )
        return self._redirect(visit.request, name, **parameters)

    def _lasts(self, visit: Visit) -> Callable[[], bool]:
        session, gateway = visit.session, self._gateway
        return lambda: not gateway.shutting_down and (session is None or self._sessions.lasts(session))

    def _stream(self, events: AsyncIterator[bytes]) -> Response:
        if self._streams.are_full:
            return Response("Too many open pages; ask again later.", 503, {"retry-after": "30"}, media_type="text/plain")
        return self._streams.response(events)

    def _base_url(self, request: Request) -> str:
        scheme = "https" if is_secure(request.scope, self._entrance.trusted) else "http"
        host = request.headers.get("host", "localhost")
        return f"{scheme}://{host}{str(request.scope.get('root_path', '')).rstrip('/')}"

    # Signing in

    async def _root(self, request: Request) -> Response:
        return self._redirect(request, "dashboard")

    async def _login(self, request: Request) -> Response:
        headers = request.scope["headers"]
        visit = Visit(request, self._sessions.find(headers))
        visit.is_operator = visit.session is not None
        if request.method == "POST":
            return await self._sign_in(visit)
        token = request.query_params.get("token")
        if token is not None and request.method == "GET" and "prefetch" not in request.headers.get("sec-purpose", ""):
            if self._sessions.use_link(token):
                return self._signed_in(visit, "")
            return self._login_page(visit, 403, "This sign-in link was used already, or is too old. Sign in with the admin key.")
        if visit.session is not None:
            return self._redirect(request, "dashboard")
        return self._login_page(visit)

    async def _sign_in(self, visit: Visit) -> Response:
        request = visit.request
        try:
            form = await self._read_form(request)
        except GatewayError as error:
            return self._login_page(visit, error.status, message_of(error))
        visit.form = form
        if not self._sessions.is_own_form(request.scope["headers"], form.get("form_token", "")):
            return self._login_page(visit, 403, "This page has grown too old. Send the key again.")
        quota = self._sign_ins.hit(request.scope.get(ADDRESS, "unknown"), self._gateway.now())
        if not quota.allowed:
            wait = max(1, round(quota.wait or 0))
            response = self._login_page(visit, 429, f"Too many attempts from your address. Wait {wait} seconds, then try again.", wait=wait)
            response.headers["retry-after"] = str(wait)
            return response
        presented = digest(form.get("key", "").strip().encode("utf-8", "surrogateescape"))
        if not any([hmac.compare_digest(presented, known) for known in self._admin_digests()]):  # noqa: C419  all are compared
            _log.warning("sign-in refused", extra={"fields": {"address": request.scope.get(ADDRESS)}})
            return self._login_page(visit, 403, "That is not the admin key. It was shown when the gateway started first.")
        return self._signed_in(visit, form.get("next", ""))

    def _login_page(self, visit: Visit, status: int = 200, problem: str = "", *, wait: int = 0) -> Response:
        request = visit.request
        nonce, token = self._sessions.form_token(request.scope["headers"])
        wanted = visit.form.get("next") or request.query_params.get("next", "")
        response = self._page(
            attrs.evolve(visit, is_operator=False, session=None),
            "login.html",
            status=status,
            problem=problem,
            form_token=token,
            next=_own_path(wanted),
            wait=wait,
        )
        secure = is_secure(request.scope, self._entrance.trusted)
        response.headers.append("set-cookie", self._sessions.form_cookie(nonce, secure=secure))
        return response

    def _signed_in(self, visit: Visit, wanted: str) -> Response:
        request = visit.request
        secure = is_secure(request.scope, self._entrance.trusted)
        self._sessions.close(request.scope["headers"])
        token, _ = self._sessions.open(secure=secure)
        _log.info("signed in", extra={"fields": {"address": request.scope.get(ADDRESS)}})
        path = _own_path(wanted)
        url = str(request.scope.get("root_path", "")).rstrip("/") + path if path else self._url(request, "dashboard")
        response = RedirectResponse(url, 303, {"cache-control": "no-store"})
        response.headers.append("set-cookie", self._sessions.cookie(token, secure=secure))
        return response

    async def _logout(self, visit: Visit) -> Response:
        request = visit.request
        self._sessions.close(request.scope["headers"])
        response = self._redirect(request, "login")
        response.headers.append("set-cookie", self._sessions.end_cookie(secure=is_secure(request.scope, self._entrance.trusted)))
        response.headers["clear-site-data"] = '"cache"'
        return response

    async def _session_token(self, visit: Visit) -> Response:
        """Tell our own scripts the token of a session that was begun in another tab; other origins cannot read the answer."""
        return JSONResponse({"token": visit.session.token if visit.session else ""}, headers={"cache-control": "no-store"})

    # Dashboard

    async def _all_rows(self, visit: Visit) -> list[views.Row]:
        await refreshed(self._gateway)
        histories = await self._histories.all()
        public = not visit.is_operator
        return [
            views.row_of(self._gateway, route, histories.get(server_id, ()), public=public)
            for server_id, route in self._gateway.table.routes.items()
        ]

    def _row_html(self, visit: Visit, row: views.Row) -> str:
        """Render a row, or take what was rendered when it was the same."""
        key = (row.id, visit.is_operator, str(visit.request.scope.get("root_path", "")))
        known = self._rows.get(key)
        if known is not None and known[0] == row:
            return known[1]
        html = self._render(visit, "_row.html", row=row)
        if len(self._rows) > 4 * len(self._gateway.table.routes) + 100:
            self._rows.clear()
        self._rows[key] = (row, html)
        return html

    async def _dashboard_parts(self, visit: Visit) -> Parts:
        query = views.Query.of(visit.query, public=not visit.is_operator)
        everything = await self._all_rows(visit)
        rows = views.chosen(everything, query)
        shown = {f"row-{row.id}": self._row_html(visit, row) for row in rows}
        if not rows:
            shown = {"row-none": self._render(visit, "_row_none.html")}
        fragments = {
            "counts": self._render(visit, "_counts.html"),
            "summary": self._render(visit, "_summary.html"),
            "shown": self._render(visit, "_shown.html", shown=len(rows), total=len(everything)),
        }
        return Parts(shape="servers" if everything else "empty", fragments=fragments, container="rows", rows=shown)

    async def _dashboard(self, visit: Visit) -> Response:
        query = views.Query.of(visit.query, public=not visit.is_operator)
        parts = await self._dashboard_parts(visit)
        routes = [route.server for route in self._gateway.table.routes.values()]
        values: dict[str, Any] = {
            "query": query,
            "parts": parts,
            "live": f"{self._url(visit.request, 'dashboard_live')}?{urlencode({**query.pairs(), 'seen': parts.digest})}",
            "here": self._here(visit, "dashboard", query.pairs()),
            "sorts": {sort: self._sort_link(visit, query, sort) for sort in views.SORTS},
        }
        if visit.is_fragment and visit.request.headers.get("hx-target") == "live":
            return self._fragment(visit, "_board.html", headers={"hx-replace-url": values["here"]}, **values)
        return self._page(
            visit,
            "dashboard.html",
            active="dashboard",
            statuses=views.STATUSES,
            sort_words=views.SORTS,
            models=sorted({server.model_name for server in routes}),
            owners=sorted({server.metadata.student_id for server in routes if server.metadata.student_id}) if visit.is_operator else [],
            base_url=self._base_url(visit.request),
            **values,
        )

    def _here(self, visit: Visit, name: str, pairs: Mapping[str, str]) -> str:
        return self._url(visit.request, name) + (f"?{urlencode(pairs)}" if pairs else "")

    def _sort_link(self, visit: Visit, query: views.Query, sort: str) -> tuple[str, str]:
        """Return where the head of a column leads, and how the column is sorted now."""
        now = query.sort == sort
        order = "desc" if now and not query.order else ""
        state = "none" if not now else "descending" if query.order else "ascending"
        return self._here(visit, "dashboard", attrs.evolve(query, sort=sort, order=order).pairs()), state

    async def _dashboard_live(self, visit: Visit) -> Response:
        return self._stream(follow(lambda: self._dashboard_parts(visit), self._lasts(visit), visit.query.get("seen", "")))

    # Models

    async def _model_cards(self, visit: Visit) -> list[views.ModelCard]:
        wanted = visit.query.get("q", "").strip().casefold()[:200]
        rows = await self._all_rows(visit)
        by_model: dict[str, list[views.Row]] = {}
        for row in rows:
            by_model.setdefault(row.model, []).append(row)
        models = self._gateway.table.models
        names = sorted((name for name in by_model if name in models), key=lambda name: (name.casefold(), name))
        cards = [views.model_card(models[name], by_model[name], number) for number, name in enumerate(names)]
        return [card for card in cards if wanted in card.name.casefold()]

    async def _models_parts(self, visit: Visit) -> Parts:
        cards = await self._model_cards(visit)
        fragments = {"counts": self._render(visit, "_counts.html")}
        for card in cards:
            fragments[f"share-{card.number}"] = self._render(visit, "_share.html", card=card)
            fragments[f"servers-{card.number}"] = self._render(visit, "_model_servers.html", card=card)
        return Parts(shape="|".join(card.name for card in cards), fragments=fragments)

    async def _models(self, visit: Visit) -> Response:
        cards = await self._model_cards(visit)
        parts = await self._models_parts(visit)
        q = visit.query.get("q", "").strip()[:200]
        base = f"{self._base_url(visit.request)}/v1"
        needs_key = self._gateway.settings.require_client_auth
        pairs = {"q": q} if q else {}
        values: dict[str, Any] = {
            "cards": cards,
            "parts": parts,
            "snippets": {card.name: views.snippets(base, card.name, needs_key=needs_key) for card in cards},
            "live": f"{self._url(visit.request, 'models_live')}?{urlencode({**pairs, 'seen': parts.digest})}",
            "q": q,
            "here": self._here(visit, "models", pairs),
            "total": len(self._gateway.table.models),
        }
        if visit.is_fragment and visit.request.headers.get("hx-target") == "live":
            return self._fragment(visit, "_models.html", headers={"hx-replace-url": values["here"]}, **values)
        return self._page(visit, "models.html", active="models", **values)

    async def _models_live(self, visit: Visit) -> Response:
        return self._stream(follow(lambda: self._models_parts(visit), self._lasts(visit), visit.query.get("seen", "")))

    # Registering

    async def _register(self, visit: Visit) -> Response:
        if visit.request.method == "GET":
            given = {name: visit.query.get(name, "") for name in FIELDS if name != "api_key"} | {"streaming": "on"}
            return self._page(visit, "register.html", active="register", values=given, problems={}, problem="")
        try:
            self._limit_tests(visit)
            server, is_new = await register(self._gateway, registration_of(visit.form))
        except GatewayError as error:
            return self._form_problem(visit, "register.html", error)
        snippets = views.snippets(
            f"{self._base_url(visit.request)}/v1", server.model_name, needs_key=self._gateway.settings.require_client_auth
        )
        values: dict[str, Any] = {"server": server, "is_new": is_new, "snippets": snippets}
        if visit.is_fragment:
            headers = {"hx-retarget": "#wizard", "hx-reswap": "outerHTML show:window:top"}
            response = self._fragment(visit, "_registered.html", headers=headers, **values)
            return self._toast(response, "success", f"{server.model_name} is registered.")
        return self._page(visit, "registered.html", active="register", **values)

    def _form_problem(self, visit: Visit, template: str, error: GatewayError, **values: Any) -> Response:
        """Show what is wrong beside the field; what was typed stays."""
        field, words = field_of(error), message_of(error)
        problems = {field: words} if field else {}
        if visit.is_fragment:
            response = self._fragment(visit, "_problem.html", status=422, field=field, problem=words)
        else:
            shown = {name: visit.form.get(name, "") for name in FIELDS if name != "api_key"}
            values.setdefault("active", "register")
            response = self._page(visit, template, status=error.status, values=shown, problems=problems, problem=words, **values)
        response.raw_headers.extend(error.headers())
        return response

    def _limit_tests(self, visit: Visit) -> None:
        quota = self._tests.hit(visit.request.scope.get(ADDRESS, "unknown"), self._gateway.now())
        if not quota.allowed:
            raise quota.error(f"At most {MAX_TESTS} tries per minute are possible; wait {round(quota.wait or 0)} seconds, then try again")

    async def _recognise(self, visit: Visit) -> Response:
        return self._fragment(visit, "_note.html", note=recognise(self._gateway, visit.form.get("endpoint_url", "")))

    async def _validate(self, visit: Visit) -> Response:
        name = visit.query.get("name", "")
        if name not in FIELDS:
            raise NotFound("There is no such field")
        return self._fragment(visit, "_note.html", note=check_field(visit.form, name))

    async def _test(self, visit: Visit) -> Response:
        try:
            self._limit_tests(visit)
            form = dict(visit.form)
            known = self._route_of(form["server_id"]) if form.get("server_id") else None
            if known is not None and not form.get("api_key") and form.get("endpoint_url", "").strip() == known.server.endpoint_url:
                form["api_key"] = known.server.api_key or ""  # to the address that it belongs to, and to no other
            found = await try_steps(self._gateway, form)
        except GatewayError as error:
            return self._form_problem(visit, "register.html", error)
        return self._fragment(visit, "_steps.html", test=found, named=visit.form.get("model_name", "").strip())

    # One server

    def _route_of(self, server_id: str) -> ServerRoute:
        route = self._gateway.table.routes.get(server_id_of(server_id))
        if route is None:
            raise NotFound("There is no server with this id, or it was removed")
        return route

    async def _server_values(self, visit: Visit) -> dict[str, Any]:
        await refreshed(self._gateway)
        route = self._route_of(visit.request.path_params["server_id"])
        checks = await self._histories.of(route)
        row = views.row_of(self._gateway, route, checks)
        found = statistics(checks, wall=self._gateway.wall())
        return {
            "server": route.server,
            "health": route.health,
            "row": row,
            "found": found,
            "chart": views.chart_of(checks),
            "events": views.events_of(route, checks),
            "registered_at": iso(route.server.registered_at),
            "updated_at": iso(route.server.updated_at),
            "transition_at": iso(route.health.last_transition_at),
            "next_check": views.next_check_words(route.health, self._gateway.now()) if row.status != "healthy" else "",
        }

    async def _server_parts(self, visit: Visit) -> Parts:
        try:
            values = await self._server_values(visit)
        except GatewayError:
            return Parts(shape="gone")
        names = {"state": "_server_state.html", "figures": "_server_figures.html", "chart": "_chart.html", "events": "_events.html"}
        fragments = {name: self._render(visit, template, **values) for name, template in names.items()}
        return Parts(shape="server", fragments={"counts": self._render(visit, "_counts.html"), **fragments})

    async def _server(self, visit: Visit) -> Response:
        values = await self._server_values(visit)
        parts = await self._server_parts(visit)
        server = values["server"]
        return self._page(
            visit,
            "server.html",
            active="dashboard",
            parts=parts,
            live=f"{self._url(visit.request, 'server_live', server_id=server.id)}?seen={parts.digest}",
            **values,
        )

    async def _server_live(self, visit: Visit) -> Response:
        return self._stream(follow(lambda: self._server_parts(visit), self._lasts(visit), visit.query.get("seen", "")))

    async def _check_now(self, visit: Visit) -> Response:
        server_id = server_id_of(visit.request.path_params["server_id"])
        self._limit_tests(visit)
        result = await check(self._gateway, server_id)
        kind = "success" if result.passed else "error"
        took = f"The check passed in {round(1000 * result.duration)} ms." if result.passed else "The check failed: "
        words = took if result.passed else took + views.sentence(result.reason or "no answer")
        if visit.is_fragment:
            return self._toast(Response(status_code=204), kind, words)
        return self._done(visit, kind, words, "server", server_id=server_id)

    async def _delete(self, visit: Visit) -> Response:
        route = self._route_of(visit.request.path_params["server_id"])
        await remove(self._gateway, route.server.id)
        return self._done(visit, "success", f"{route.server.model_name} was removed. It can be registered again at any time.", "dashboard")

    async def _edit(self, visit: Visit) -> Response:
        await refreshed(self._gateway)
        server = self._route_of(visit.request.path_params["server_id"]).server
        more: dict[str, Any] = {"server": server, "active": "dashboard", "before": values_of(server)}
        if visit.request.method == "GET":
            return self._page(visit, "edit.html", values=values_of(server), problems={}, problem="", **more)
        names = changed_fields(visit.form, server)
        if not names:
            return self._done(visit, "info", "Nothing was changed.", "server", server_id=server.id)
        try:
            await update(self._gateway, server.id, parse_change(change_body(visit.form, names)))
        except GatewayError as error:
            return self._form_problem(visit, "edit.html", error, **more)
        words = ", ".join(FIELDS[name] for name in names)
        return self._done(visit, "success", f"Saved: {words}.", "server", server_id=server.id)

    # Playground

    async def _playground(self, visit: Visit) -> Response:
        await refreshed(self._gateway)
        models = self._gateway.table.models
        names = {
            name: sum(route.health.status == "healthy" for route in models[name].routes)
            for name in sorted(models, key=lambda name: (name.casefold(), name))
        }
        wanted = visit.query.get("model", "")
        return self._page(
            visit,
            "playground.html",
            active="playground",
            names=names,
            wanted=wanted if wanted in names else "",
            base_url=f"{self._base_url(visit.request)}/v1",
            needs_key=self._gateway.settings.require_client_auth,
        )

    # Logs and settings

    def _log_lines(self, visit: Visit, *, limit: int = LOG_LINES) -> list[Mapping[str, Any]]:
        query = visit.query
        level = query.get("level", "INFO")
        minutes = {"5": 300, "60": 3600, "1440": 86_400}.get(query.get("since", ""))
        component = query.get("component", "")
        records = recent_logs(
            self._gateway,
            level=level if level in LEVELS else "INFO",
            component=component if component in COMPONENTS else None,
            text=query.get("text", "").strip()[:200] or None,
            since=None if minutes is None else self._gateway.wall() - minutes,
            limit=limit,
        )
        return sorted(records, key=lambda record: record["number"], reverse=True)

    async def _logs(self, visit: Visit) -> Response:
        lines = self._log_lines(visit)
        asked = {name: visit.query.get(name, "") for name in ("level", "component", "text", "since")}
        pairs = {name: value for name, value in asked.items() if value}
        last = max((int(line["number"]) for line in lines), default=0)
        values: dict[str, Any] = {
            "lines": [self._log_html(visit, line) for line in lines],
            "live": f"{self._url(visit.request, 'logs_live')}?{urlencode({**pairs, 'after': str(last)})}",
            "here": self._here(visit, "logs", pairs),
        }
        if visit.is_fragment and visit.request.headers.get("hx-target") == "live":
            return self._fragment(visit, "_logs.html", headers={"hx-replace-url": values["here"]}, **values)
        return self._page(visit, "logs.html", active="logs", asked=asked, levels=LEVELS, components=COMPONENTS, **values)

    def _log_html(self, visit: Visit, line: Mapping[str, Any]) -> str:
        known = ("number", "time", "timestamp", "level", "component", "message", "traceback", "request_id")
        more = {name: value for name, value in line.items() if name not in known and value is not None}
        return self._render(visit, "_log.html", line=line, more=more)

    async def _logs_live(self, visit: Visit) -> Response:
        after = visit.query.get("after", "")

        def read(last: int) -> list[tuple[int, str]]:
            lines = [line for line in self._log_lines(visit) if int(line["number"]) > last]
            return [(int(line["number"]), self._log_html(visit, line)) for line in lines]

        first = int(after) if after.isascii() and after.isdigit() and len(after) < 15 else 0
        return self._stream(follow_lines(read, self._lasts(visit), first, "log-rows"))

    async def _settings(self, visit: Visit) -> Response:
        settings = self._gateway.settings
        fields = attrs.fields_dict(type(settings))
        shown = [
            {
                "name": f"MULTIVERSE_{name.upper()}",
                "value": _written(value),
                "description": fields[name].metadata["description"],
                "is_secret": fields[name].metadata["secret"],
            }
            for name, value in settings.masked().items()
        ]
        return self._page(
            visit,
            "settings.html",
            active="settings",
            shown=shown,
            database=await _database(settings.database_url),
            started_at=iso(self._gateway.started_at),
            uptime=self._gateway.wall() - self._gateway.started_at,
            totals=self._gateway.statistics(),
            sessions=len(self._sessions),
        )


def _route_name(name: str) -> str:
    """Return a page's name among the routes: the admin API has functions of the same names."""
    return name if name == "docs" else f"ui:{name}"


def _written(value: object) -> str:
    if value is None or value == () or value == "":
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


async def _database(url: str) -> dict[str, Any]:
    """Say where the registry lives and how much room it takes; a server's address is left out."""
    scheme, _, rest = url.partition("://")
    if scheme != "sqlite":
        return {"kind": scheme, "path": None, "bytes": None}
    path = anyio.Path(rest.removeprefix("/"))
    try:
        taken = (await path.stat()).st_size
    except OSError:
        return {"kind": "SQLite", "path": str(path), "bytes": None}
    return {"kind": "SQLite", "path": str(await path.absolute()), "bytes": taken}


def _own_path(text: str) -> str:
    """Return a path of ours to go to after signing in, or nothing: no other host, no control characters.

    >>> _own_path("/logs?level=ERROR"), _own_path("//evil.example"), _own_path("https://evil.example"), _own_path("/\\\\evil.example")
    ('/logs?level=ERROR', '', '', '')
    """
    is_ours = text.startswith("/") and text[1:2] not in ("/", "\\") and text.isprintable() and text.isascii() and "\\" not in text
    return text if is_ours and len(text) < 1000 and not text.startswith("/login") else ""
