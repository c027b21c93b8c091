"""What the store knows of each server's last checks, kept for a few seconds."""

from collections.abc import Sequence

import attrs

from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.routing import Route
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.pages.charts import CHART_CHECKS
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.registration import flush_if_possible

HISTORY_SECONDS = 15.0


@attrs.define(eq=False)
class RecentChecks:
    """The last checks of each server, read from the store again only when there may be new ones."""

    gateway: Gateway
    _kept: dict[ServerId, tuple[object, float, Sequence[ProbeResult]]] = attrs.field(factory=dict, init=False)

    async def all(self) -> dict[ServerId, Sequence[ProbeResult]]:
        """Return the checks of every server, newest first."""
        routes = self.gateway.table.routes
        for gone in self._kept.keys() - routes.keys():
            self._kept.pop(gone, None)
        return {server_id: await self.of(route) for server_id, route in list(routes.items())}

    async def of(self, route: Route) -> Sequence[ProbeResult]:
        """Return the checks of one server, newest first; what is known of them while the store cannot be read."""
        server_id, now = route.server.id, self.gateway.now()
        key = (route.health.last_checked_at, route.server.generation)
        cached = self._kept.get(server_id)
        if cached is not None and cached[0] == key and now - cached[1] < HISTORY_SECONDS:
            return cached[2]
        try:
            await flush_if_possible(self.gateway)
            checks = tuple(await self.gateway.store.history(server_id, CHART_CHECKS))
        except GatewayError:
            return () if cached is None else cached[2]
        self._kept[server_id] = (key, now, checks)
        self.gateway.health_book.timelines.learn(server_id, checks)
        return checks
