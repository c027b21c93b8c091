"""Render pages: the visit, links by name, templates, fragments, toasts and problems.

A new page is a route, an entry in `NAVIGATION` and a template that extends `base.html`.
"""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import attrs
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import NoMatchFound

from multiverse_gateway._version import __version__
from multiverse_gateway.core.errors import GatewayError, RateLimited
from multiverse_gateway.core.origins import normalize_origin
from multiverse_gateway.core.paths import is_below
from multiverse_gateway.core.reach import Reach, network_url
from multiverse_gateway.entry.access import AccessRules
from multiverse_gateway.entry.asgi_types import REQUEST_ID
from multiverse_gateway.entry.headers import path_of
from multiverse_gateway.entry.identity import is_loopback, is_secure
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.pages import views
from multiverse_gateway.pages.assets import load_assets
from multiverse_gateway.pages.live import Parts, Streams, Versions
from multiverse_gateway.pages.masking import masked
from multiverse_gateway.pages.server_form import Form, message_of
from multiverse_gateway.pages.sessions import Session, Sessions, cookie_values, end_note
from multiverse_gateway.pages.words import count, percent, sentence, size, span, speed
from multiverse_gateway.web.error_middleware import response_of

THEMES = ("light", "dark")
NAVIGATION = (
    ("dashboard", "Dashboard"),
    ("register", "Register"),
    ("models", "Models"),
    ("playground", "Playground"),
    ("keys", "Keys"),
    ("usage", "Usage"),
    ("logs", "Logs"),
    ("settings", "Settings"),
    ("docs", "API docs"),
)
"""The pages of the menu, by the names of their routes; one that has no route is left out."""
NEXT_PIECE = "<!--next-->"
"""What js/pieces.js looks for; no rendered value holds it, for templates escape it."""
MAX_URLS = 10_000
"""Paths that are remembered: to find one takes as long as to render half a row."""
OPEN_TO_VISITORS = ("dashboard", "models", "docs")

_log = logging.getLogger("multiverse_gateway.ui")


@attrs.define(eq=False)
class Visit:
    """A request of somebody who may see the page: signed in, with the admin key, or a visitor of the public pages."""

    request: Request
    session: Session | None = None
    is_operator: bool = False
    form: Form = attrs.field(factory=dict)
    topic: Mapping[str, str] | None = None
    """The query of the topic that is followed, instead of that of the URL."""

    @property
    def is_fragment(self) -> bool:
        """Whether HTMX asks, for a part of the page."""
        return self.request.headers.get("hx-request") == "true"

    @property
    def query(self) -> Mapping[str, str]:
        """The query of the URL, or of the topic."""
        return self.request.query_params if self.topic is None else self.topic


@attrs.frozen
class Live:
    """What a page follows: its topic, and the digest of what it shows."""

    topic: str
    seen: str


Handler = Callable[[Visit], Awaitable[Response]]


class Renderer:
    """Templates, links, toasts and problems, as all pages need them."""

    def __init__(self, gateway: Gateway, sessions: Sessions, rules: AccessRules) -> None:
        self.gateway = gateway
        self.sessions = sessions
        self.rules = rules
        self.versions = Versions()
        self._urls: dict[tuple[object, ...], str] = {}
        self._streams = Streams()
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(span=span, size=size, count=count, percent=percent, speed=speed)

    def refuse(self, visit: Visit, error: GatewayError) -> Response:
        """Answer a request that a rule forbids."""
        if isinstance(error, RateLimited) and visit.is_fragment:
            problem = sentence(error.problem)  # our own scripts count down, so the remedy is left out
            return Response(problem, 429, dict(_text(error.headers())), media_type="text/plain")
        titles = {404: "Page not found", 429: "Too many requests", 503: "Temporarily unavailable", 400: "Invalid input"}
        response = self.problem(visit, error.status, titles.get(error.status, "Something went wrong"), message_of(error))
        response.raw_headers.extend(error.headers())
        return response

    def problem(self, visit: Visit, status: int, title: str, message: str) -> Response:
        """Show an error: on its own page, or to HTMX in a toast."""
        if visit.is_fragment:
            return self.toast(Response(status_code=status), "error", f"{title}. {message}")
        return self.page(visit, "error.html", status=status, title=title, code=status, message=message)

    def failed(self, visit: Visit) -> tuple[str, str]:
        """Log the exception that is being handled, and return the title and the words to show for it."""
        request = visit.request
        fields = {"request_id": request.scope.get(REQUEST_ID), "path": path_of(request.scope)}
        _log.exception("a page failed", extra={"fields": fields})
        return "Internal error", "Try again. If the error persists, give the operator the request id below."

    async def not_found(self, request: Request, error: Exception) -> Response:
        """Answer what no route matches: with a page where a browser asks for one."""
        assert isinstance(error, HTTPException)
        path = path_of(request.scope)
        wants_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
        if error.status_code != 404 or not wants_page or is_below(path, "/v1") or is_below(path, "/admin"):
            return response_of(error, request.scope)
        headers = request.scope["headers"]
        session = await self.sessions.seek(headers)
        visit = Visit(request, session, is_operator=session is not None)
        return self.problem(visit, 404, "Page not found", "The page may have been moved or deleted.")

    def url(self, request: Request, name: str, **parameters: Any) -> str:
        """Return the path of a page by its name, under whatever prefix we are mounted."""
        key = (_root(request), name, *parameters.values())
        if key not in self._urls:
            if len(self._urls) > MAX_URLS:
                self._urls.clear()
            self._urls[key] = f"{key[0]}{request.app.url_path_for(_route_name(name), **parameters)}"
        return self._urls[key]

    def redirect(self, request: Request, name: str, query: str = "", **parameters: Any) -> Response:
        """Send the browser to a page."""
        url = self.url(request, name, **parameters) + (f"?{query}" if query else "")
        return RedirectResponse(url, 303, {"cache-control": "no-store"})

    def here(self, visit: Visit, name: str, pairs: Mapping[str, str]) -> str:
        """Return the path of a page with a query."""
        return self.url(visit.request, name) + (f"?{urlencode(pairs)}" if pairs else "")

    def _has_route(self, request: Request, name: str) -> bool:
        try:
            request.app.url_path_for(_route_name(name))
        except NoMatchFound:
            return False
        return True

    def _context(self, visit: Visit) -> dict[str, Any]:
        request, assets = visit.request, load_assets()
        themes = cookie_values(request.scope["headers"], "mvg_theme")
        return {
            "url": lambda name, **parameters: self.url(request, name, **parameters),
            "static": lambda path: self.url(request, "static", digest=assets.digest, path=path),
            "visit": visit,
            "public": not visit.is_operator,
            "csrf": masked(visit.session.token) if visit.session else "",
            "seconds_left": self.sessions.seconds_left(visit.session) if visit.session else 0,
            "version": __version__,
            "theme": next((theme for theme in themes if theme in THEMES), ""),
        }

    def render(self, visit: Visit, template: str, **values: Any) -> str:
        """Render a template and return the page as a response."""
        return self._templates.get_template(template).render(self._context(visit) | values)

    def render_shared(self, template: str, **values: Any) -> str:
        """Render a template that is the same on every page and for every visit."""
        return self._templates.get_template(template).render(values)

    def live(self, topic: str, pairs: Mapping[str, str], parts: Parts) -> Live:
        """Return what a page follows that shows these parts."""
        return Live(f"{topic}?{urlencode(pairs)}" if pairs else topic, self.versions.remember(parts))

    def page(self, visit: Visit, template: str, *, status: int = 200, **values: Any) -> Response:
        """Answer with a whole page."""
        request = visit.request
        reveals = visit.is_operator or self.gateway.settings.public_dashboard
        if reveals and "overview" not in values:
            values["overview"] = views.overview(self.gateway)
        values.setdefault("active", "")
        allowed = [item for item in NAVIGATION if visit.is_operator or (reveals and item[0] in OPEN_TO_VISITORS)]
        note = visit.session.noted(request.scope["headers"]) if visit.session else None
        html = self.render(
            visit,
            template,
            navigation=[item for item in allowed if self._has_route(request, item[0])],
            notes=[note] if note else [],
            request_id=request.scope.get(REQUEST_ID, ""),
            reveals=reveals,
            proxy_remedy=self.rules.proxy.remedy if visit.is_operator else None,
            **values,
        )
        response = HTMLResponse(html, status, {"cache-control": "no-store", "vary": "HX-Request, Cookie"})
        if note:
            response.headers.append("set-cookie", end_note())
        return response

    def fragment(
        self, visit: Visit, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
    ) -> Response:
        """Answer with a part of a page."""
        html = self.render(visit, template, **values)
        return HTMLResponse(html, status, {"cache-control": "no-store", "vary": "HX-Request, Cookie", **(headers or {})})

    def pieces(self, visit: Visit, pieces: AsyncIterator[str]) -> Response:
        """Answer with a part of a page in pieces: what ends with `NEXT_PIECE` is shown until the next one comes."""
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._ended(visit, pieces), media_type="text/html", headers=headers)

    async def _ended(self, visit: Visit, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        """Let the last piece say that there was a mistake, if there was one: the head is sent, and HTTP/2 would never see an end."""
        try:
            async for piece in pieces:
                yield piece
        except Exception:  # noqa: BLE001  the log has it
            yield self.render(visit, "_problem.html", field="", problem=". ".join(self.failed(visit)))

    def toast(self, response: Response, kind: str, message: str) -> Response:
        """Let an answer to HTMX bring a toast."""
        response.headers["hx-trigger"] = json.dumps({"toast": {"kind": kind, "text": message}})
        response.headers["cache-control"] = "no-store"
        return response

    def done(self, visit: Visit, kind: str, message: str, name: str, **parameters: Any) -> Response:
        """Go to another page, which says what was done."""
        response = self.redirect(visit.request, name, **parameters)
        if visit.is_fragment:
            response = Response(status_code=204, headers={"hx-redirect": response.headers["location"], "cache-control": "no-store"})
        if visit.session is not None:
            response.headers.append("set-cookie", visit.session.note(kind, message))
        return response

    def lasts(self, visit: Visit) -> Callable[[], bool]:
        """Return a function that tells whether a live page may still be fed."""
        session, gateway = visit.session, self.gateway
        return lambda: not gateway.admission.is_closed and (session is None or self.sessions.lasts(session))

    def stream(self, events: AsyncIterator[bytes]) -> Response:
        """Return a response that streams server-sent events."""
        if self._streams.are_full:
            return Response("Too many live pages are open. Try again in 30 seconds.", 503, {"retry-after": "30"}, media_type="text/plain")
        return self._streams.response(events)

    def base_url(self, request: Request) -> str:
        """Return the address of this gateway as the visitor wrote it, or its public one where a proxy hides that."""
        scheme = "https" if is_secure(request.scope, self.rules.trusted) else "http"
        origin = f"{scheme}://{request.headers.get('host', 'localhost')}"
        public = self.gateway.settings.public_url
        if public and normalize_origin(origin) not in self.rules.origins.public:
            origin = public[0].rstrip("/")
        elif scheme == "http" and self.gateway.network.reach is Reach.NETWORK:
            return self.network_url(request) or origin + _root(request)
        return origin + _root(request)

    def network_url(self, request: Request) -> str:
        """Return the address under which other computers reach this gateway, or nothing if it is not known.

        It is the one that the visitor wrote, unless that leads every computer to itself.
        """
        scheme = "https" if is_secure(request.scope, self.rules.trusted) else "http"
        host = request.headers.get("host", "localhost")
        origin = f"{scheme}://{host}"
        if is_loopback_host(host):
            origin = network_url(self.gateway.network.hosts_for_others, self.gateway.settings.port, scheme=scheme)
        return origin and origin + _root(request)


def _text(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, str]]:
    for name, value in headers:
        yield name.decode("latin-1"), value.decode("latin-1")


def _root(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/")


def is_loopback_host(host: str) -> bool:
    """Return whether a `Host` header leads to the visitor's own computer, whichever that is.

    >>> is_loopback_host("localhost:8000"), is_loopback_host("[::1]:8000"), is_loopback_host("gateway.example")
    (True, True, False)
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def _route_name(name: str) -> str:
    """Return a page's name among the routes: the admin API has functions of the same names."""
    return f"ui:{name}"
