"""The pages for browsers: each one works after a plain reload, and HTMX asks the same URLs for fragments.

1. Without sign-in nothing is shown but the form to sign in, and with `public_dashboard` what visitors may see of two pages.
2. Every request that changes something passes one check: sign-in, an origin of our own, the token of the session. A request with the
   admin key needs no token, because it has no cookie to abuse.
3. Links are made by name, so that every prefix works.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from multiverse_gateway.api.admin import LEVELS
from multiverse_gateway.core.servers import model_key
from multiverse_gateway.entry.access import AccessRules
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.local_engines import LocalEngines
from multiverse_gateway.observability.tail import RecentLogs
from multiverse_gateway.pages.assets import serve_asset
from multiverse_gateway.pages.dashboard import Dashboard
from multiverse_gateway.pages.first_steps import FirstSteps
from multiverse_gateway.pages.key_pages import KeyPages
from multiverse_gateway.pages.live import Followed, FollowedLines
from multiverse_gateway.pages.live_topics import LiveTopics
from multiverse_gateway.pages.recent_checks import RecentChecks
from multiverse_gateway.pages.rendering import Live, Renderer, Visit
from multiverse_gateway.pages.server_pages import ServerPages
from multiverse_gateway.pages.sessions import Sessions
from multiverse_gateway.pages.settings_page import SettingsPage, written
from multiverse_gateway.pages.sign_in import SignIn
from multiverse_gateway.pages.usage_page import UsagePage, client_names
from multiverse_gateway.pages.wall import Wall
from multiverse_gateway.pages.words import bare_url
from multiverse_gateway.registration import refresh_if_possible

LOG_LINES = 200
COMPONENTS = ("api", "health", "registry", "routing", "ui")


class Pages:
    """All pages of a gateway."""

    def __init__(
        self,
        gateway: Gateway,
        *,
        sessions: Sessions,
        rules: AccessRules,
        admin_digests: Callable[[], Collection[bytes]],
        recent_logs: RecentLogs,
        local_engines: LocalEngines,
    ) -> None:
        self._gateway = gateway
        self._recent_logs = recent_logs
        self._renderer = Renderer(gateway, sessions, rules)
        self._sign_in = SignIn(self._renderer, admin_digests)
        recent_checks = RecentChecks(gateway)
        self._first_steps = FirstSteps(self._renderer, local_engines)
        self._dashboard = Dashboard(self._renderer, recent_checks, self._first_steps)
        self._servers = ServerPages(self._renderer, recent_checks, self._first_steps)
        self._keys = KeyPages(self._renderer)
        self._usage = UsagePage(self._renderer)
        self._wall = Wall(self._renderer, self._sign_in)
        self._live = LiveTopics(self._renderer, self._wall.link_of)
        self._live.add({**self._dashboard.topics(), **self._servers.topics(), "logs": self._followed_logs, "wall": self._wall.follow})
        self._settings = SettingsPage(self._renderer, self._sign_in, self._first_steps)

    def routes(self) -> list[Route]:
        """Make the routes of all pages."""
        page = self._sign_in.operators
        return [
            Route("/", self._root, name="ui:root"),
            Route("/static/{digest}/{path:path}", serve_asset, name="ui:static"),
            *self._sign_in.routes(),
            *self._live.routes(self._sign_in),
            *self._wall.routes(),
            *self._dashboard.routes(self._sign_in),
            *self._servers.routes(self._sign_in),
            *self._first_steps.routes(self._sign_in),
            *self._keys.routes(self._sign_in),
            *self._usage.routes(self._sign_in),
            Route("/playground", page(self._playground), name="ui:playground"),
            Route("/test", self._moved_to_playground, name="ui:test"),
            Route("/logs", page(self._logs), name="ui:logs"),
            *self._settings.routes(),
            Route("/docs", self._sign_in.visitors(self._docs), name="ui:docs"),
        ]

    async def not_found(self, request: Request, error: Exception) -> Response:
        """Answer what no route matches: with a page where a browser asks for one."""
        return await self._renderer.not_found(request, error)

    async def _root(self, request: Request) -> Response:
        return self._renderer.redirect(request, "dashboard")

    async def _moved_to_playground(self, request: Request) -> Response:
        """Redirect from the address that the playground had before, for bookmarks."""
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(self._renderer.url(request, "playground") + query, 308)

    async def _playground(self, visit: Visit) -> Response:
        await refresh_if_possible(self._gateway)
        models = self._gateway.table.models
        names = {
            model.name: sum(route.health.status == "healthy" for route in model.routes)
            for model in sorted(models.values(), key=lambda model: (model.name.casefold(), model.name))
        }
        wanted = visit.query.get("model", "")
        wanted = models[model_key(wanted)].name if model_key(wanted) in models else ""
        return self._renderer.page(
            visit,
            "playground.html",
            active="playground",
            names=names,
            wanted=wanted,
            base_url=f"{self._renderer.base_url(visit.request)}/v1",
            needs_key=self._gateway.settings.require_client_auth,
            hosts={server_id: bare_url(route.server.endpoint_url) for server_id, route in self._gateway.table.routes.items()},
        )

    def _log_lines(self, visit: Visit, after: int | None = None) -> list[Mapping[str, Any]]:
        query = visit.query
        level = query.get("level", "INFO")
        minutes = {"5": 300, "60": 3600, "1440": 86_400}.get(query.get("since", ""))
        component = query.get("component", "")
        records = self._recent_logs.select(
            level=level if level in LEVELS else "INFO",
            component=component if component in COMPONENTS else None,
            text=query.get("text", "").strip()[:200] or None,
            client=query.get("client", "")[:200] or None,
            since=None if minutes is None else self._gateway.wall() - minutes,
            limit=LOG_LINES,
            after=after,
        )
        return sorted(records, key=lambda record: record["number"], reverse=True)

    async def _logs(self, visit: Visit) -> Response:
        lines = self._log_lines(visit)
        asked = {name: visit.query.get(name, "") for name in ("level", "component", "text", "client", "since")}
        pairs = {name: value for name, value in asked.items() if value}
        last = max((int(line["number"]) for line in lines), default=0)
        values: dict[str, Any] = {
            "lines": self._log_html(visit, lines),
            "live": Live(f"logs?{urlencode(pairs)}", str(last)),
            "here": self._renderer.here(visit, "logs", pairs),
        }
        if visit.is_fragment and visit.request.headers.get("hx-target") == "live":
            return self._renderer.fragment(visit, "_logs.html", headers={"hx-replace-url": values["here"]}, **values)
        clients = client_names(self._gateway)
        chosen = asked["client"]
        return self._renderer.page(
            visit,
            "logs.html",
            active="logs",
            asked=asked,
            levels=LEVELS,
            components=COMPONENTS,
            clients=clients if not chosen or chosen in clients else {chosen: chosen, **clients},
            **values,
        )

    def _log_html(self, visit: Visit, lines: Iterable[Mapping[str, Any]]) -> list[str]:
        shown_apart = ("number", "time", "timestamp", "level", "component", "message", "traceback", "request_id")
        values = {"servers": self._gateway.table.routes, "clients": client_names(self._gateway)}
        shown = []
        for line in lines:
            more = {name: written(value) for name, value in line.items() if name not in shown_apart and value not in (None, "", [])}
            shown.append(self._renderer.render(visit, "_log.html", line=line, more=more, **values))
        return shown

    def _followed_logs(self, visit: Visit) -> Followed:
        after = visit.query.get("seen", "")

        def read(last: int) -> list[tuple[int, str]]:
            lines = self._log_lines(visit, last)
            return [(int(line["number"]), html) for line, html in zip(lines, self._log_html(visit, lines), strict=True)]

        first = int(after) if after.isascii() and after.isdigit() and len(after) < 15 else 0
        return FollowedLines(read, first, "log-rows")

    async def _docs(self, visit: Visit) -> Response:
        root = str(visit.request.scope.get("root_path", "")).rstrip("/")
        base_url = f"{self._renderer.base_url(visit.request)}/v1"
        return self._renderer.page(visit, "docs.html", active="docs", base_url=base_url, description=f"{root}/openapi.json")
