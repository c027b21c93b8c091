"""The wall view: the state of the servers in large type, for a projector, without a session.

1. A link is `/wall#TOKEN`. Browsers send what follows `#` in no request and no `Referer`, so the token is in no log of the gateway or of
   a proxy. A script sends it once, in a form, and the gateway puts it into a cookie that scripts cannot read.
2. The view shows the names of models and how many of their servers are up, and nothing else: no reason, address or owner.
3. It follows the servers like every live page. Its stream ends when the link is revoked.
"""

from collections.abc import Mapping

import attrs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.api.request_reading import read
from multiverse_gateway.api.response_types import iso
from multiverse_gateway.api.screens import NewWallLink
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.servers import WallLink
from multiverse_gateway.entry.identity import Headers, is_secure
from multiverse_gateway.entry.quotas import LocalWindow
from multiverse_gateway.pages import views
from multiverse_gateway.pages.live import Followed, FollowedParts, Parts
from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.server_form import message_of
from multiverse_gateway.pages.sessions import cookie_name, cookie_values, set_cookie
from multiverse_gateway.pages.sign_in import SignIn
from multiverse_gateway.registration import refresh_if_possible
from multiverse_gateway.wall_links import create_wall_link, revoke_wall_link, wall_link_of
from multiverse_gateway.web.middleware import ADDRESS

COOKIE = "mvg_wall"
COOKIE_SECONDS = 400 * 86_400
MAX_TRIES = 30
MOST_MODELS = 40
_PRIVATE = {"referrer-policy": "no-referrer", "cache-control": "no-store"}


class Wall:
    """The wall view, and the links to it."""

    def __init__(self, renderer: Renderer, sign_in: SignIn) -> None:
        self._renderer = renderer
        self._gateway = renderer.gateway
        self._sign_in = sign_in
        self._tries = LocalWindow(MAX_TRIES)

    def routes(self) -> list[Route]:
        """Return the routes of the view and of its links."""
        page = self._sign_in.operators
        return [
            Route("/wall", self._sign_in.visitors(self._wall), name="ui:wall"),
            Route("/wall/open", self._open, methods=["POST"], name="ui:open_wall"),
            Route("/settings/wall-links", page(self._links), methods=["GET", "POST"], name="ui:wall_links"),
            Route("/settings/wall-links/{link_id}/revoke", page(self._revoke), methods=["POST"], name="ui:revoke_wall_link"),
        ]

    # Who may look

    def link_of(self, headers: Headers) -> WallLink | None:
        """Return the link whose token a request carries in its cookie, if that still works."""
        names = (cookie_name(COOKIE, secure=secure) for secure in (True, False))
        found = (wall_link_of(self._gateway, token) for name in names for token in cookie_values(headers, name))
        return next((link for link in found if link is not None), None)

    async def _open(self, request: Request) -> Response:
        """Take the token of a link, and put it into a cookie."""
        tried = self._tries.hit(request.scope.get(ADDRESS, "unknown"), self._gateway.now())
        try:
            token = (await self._sign_in.read_form(request)).get("token", "").strip().rpartition("#")[2]
        except GatewayError as error:
            return self._entry(Visit(request), error.status, message_of(error))
        if not tried.allowed:
            wait = f"Wait {tried.wait_seconds} seconds, then try again."
            return self._entry(Visit(request), 429, f"Too many attempts from your address. {wait}")
        await refresh_if_possible(self._gateway)
        if wall_link_of(self._gateway, token) is None:
            return self._entry(Visit(request), 403, "This link does not work. It may have been revoked; ask the operator for another one.")
        secure = is_secure(request.scope, self._renderer.rules.trusted)
        response = self._renderer.redirect(request, "wall")
        response.headers.append("set-cookie", set_cookie(COOKIE, token, secure=secure, max_age=COOKIE_SECONDS))
        response.headers.update(_PRIVATE)
        return response

    def _entry(self, visit: Visit, status: int = 200, problem: str = "") -> Response:
        """Show the form that the link's script sends; without scripts the link can be pasted into it."""
        stranger = attrs.evolve(visit, is_operator=False, session=None)
        response = self._renderer.page(stranger, "wall_open.html", status=status, problem=problem)
        response.headers.update(_PRIVATE)
        return response

    # The view

    async def _wall(self, visit: Visit) -> Response:
        await refresh_if_possible(self._gateway)
        if not visit.is_operator and self.link_of(visit.request.scope["headers"]) is None:
            return self._entry(visit)
        parts = self._parts(visit)
        live = self._renderer.live("wall", {}, parts)
        screen = attrs.evolve(visit, session=None)
        response = self._renderer.page(screen, "wall.html", parts=parts, live=live, overview=self._overview())
        response.headers.update(_PRIVATE)
        return response

    def follow(self, visit: Visit) -> Followed:
        """Return what a stream sends of the view."""

        async def read() -> Parts:
            return self._parts(visit)

        return FollowedParts(read, self._renderer.versions, visit.query.get("seen", ""))

    def _overview(self) -> views.Overview:
        return views.overview(self._gateway)

    def _parts(self, visit: Visit) -> Parts:
        models = views.model_states(self._gateway)
        html = self._renderer.render(
            visit, "_wall.html", overview=self._overview(), models=models[:MOST_MODELS], more=len(models[MOST_MODELS:])
        )
        return Parts(shape="wall", fragments={"wall": html})

    # The links

    async def _links(self, visit: Visit) -> Response:
        made: Mapping[str, str] = {}
        problem = ""
        if visit.request.method == "POST":
            try:
                link, token = await create_wall_link(self._gateway, read({"name": visit.form.get("name", "")}, NewWallLink).name)
                made = {"name": link.name, "url": f"{self._renderer.base_url(visit.request)}/wall#{token}"}
            except GatewayError as error:
                problem = message_of(error)
        await refresh_if_possible(self._gateway)
        kept = self._gateway.registrations.registry.wall_links
        links = [{"id": link.id, "name": link.name, "at": iso(link.created_at)} for link in kept]
        return self._renderer.page(
            visit, "wall_links.html", status=400 if problem else 200, active="settings", links=links, made=made, problem=problem
        )

    async def _revoke(self, visit: Visit) -> Response:
        link = await revoke_wall_link(self._gateway, visit.request.path_params["link_id"])
        return self._renderer.done(visit, "success", f"The link of {link.name} no longer works.", "wall_links")
