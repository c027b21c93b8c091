"""What helps an operator begin: who can reach the gateway, and the engines that run on this computer."""

from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.core.engine_offers import Offer
from multiverse_gateway.entry.identity import is_forwarded
from multiverse_gateway.local_engines import LocalEngines
from multiverse_gateway.pages.guides import GUIDES
from multiverse_gateway.pages.reaching import ReachNote, reach_note
from multiverse_gateway.pages.registered import registered_values
from multiverse_gateway.pages.rendering import Renderer, Visit, is_loopback_host
from multiverse_gateway.pages.sign_in import SignIn
from multiverse_gateway.web.middleware import ADDRESS


class FirstSteps:
    """Help for the first steps; other pages show what the functions here return."""

    def __init__(self, renderer: Renderer, engines: LocalEngines) -> None:
        self._renderer = renderer
        self._gateway = renderer.gateway
        self._engines = engines

    def routes(self, sign_in: SignIn) -> list[Route]:
        """Return the route that accepts an offer."""
        return [Route("/register/found", sign_in.operators(self._accept), methods=["POST"], name="ui:accept_offer")]

    def reach(self, visit: Visit) -> ReachNote | None:
        """Return who can reach the gateway; visitors do not learn it."""
        if not visit.is_operator:
            return None
        return reach_note(
            self._gateway.network.reach,
            self._gateway.settings,
            url=self._renderer.network_url(visit.request),
            is_forwarded=self._renderer.rules.proxy.remedy is not None or not _names_this_computer(visit),
            has_openings=any(route.server.opened_address for route in self._gateway.table.routes.values()),
        )

    async def offers(self, visit: Visit) -> tuple[Offer, ...]:
        """Return the engines of this computer that the operator can offer.

        Only a session on this computer is offered any: a request with the admin key, one that a proxy or tunnel forwarded, or one for
        another host name, which a proxy may forward without a trace, finds out nothing about what listens here. Once a proxy or tunnel
        was noticed, no session is.
        """
        return await self._engines.offers() if self._is_at_this_computer(visit) else ()

    async def welcome(self, visit: Visit) -> dict[str, Any]:
        """Return what the page shows that stands where no server is registered yet."""
        allows_private = self._gateway.settings.allow_private_networks.strip().lower() not in ("", "false")
        key = "your-client-key" if self._gateway.settings.require_client_auth else "not-needed"
        return {"guides": GUIDES, "allows_private": allows_private, "key": key, "offers": await self.offers(visit)}

    def _is_at_this_computer(self, visit: Visit) -> bool:
        request = visit.request
        peer = request.client.host if request.client else None
        names = dict(request.scope["headers"])
        rules = self._renderer.rules
        is_local = rules.is_local(peer, is_forwarded(names)) and _names_this_computer(visit)
        return visit.session is not None and is_local and rules.proxy.remedy is None

    async def _accept(self, visit: Visit) -> Response:
        if not self._is_at_this_computer(visit):
            message = "Only an operator who is signed in on the gateway's own computer can offer its engines."
            return self._renderer.problem(visit, 403, "Nothing was registered", message)
        await self._renderer.rules.count_probe(visit.request.scope.get(ADDRESS, "unknown"))
        accepted = await self._engines.accept(visit.form.get("port", ""), visit.form.get("model", ""))
        values = registered_values(self._renderer, visit, accepted)
        return self._renderer.page(visit, "registered.html", active="register", **values)


def _names_this_computer(visit: Visit) -> bool:
    return is_loopback_host(visit.request.headers.get("host", ""))
