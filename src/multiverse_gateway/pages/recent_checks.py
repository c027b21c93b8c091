"""What is known of each server's last checks: read from the store once, then continued by the probes of this process."""

from collections.abc import Sequence

import attrs

from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.routing import Route
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.health_book import MAX_RECENT
from multiverse_gateway.pages.charts import CHART_CHECKS
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.registration import flush_if_possible

HISTORY_SECONDS = 15.0
"""After this time the store is asked for the checks of other processes."""
MOST_READS = 5
"""Histories that are read again at a time only because they are old; all others stay as they are until the next time."""


@attrs.frozen
class _History:
    """The checks of a server, newest first, as they were at `read_at` on the monotonic clock; `key` says of which health."""

    key: object
    read_at: float
    checks: tuple[ProbeResult, ...]


@attrs.define(eq=False)
class RecentChecks:
    """The last checks of each server. While nothing changes, the same object is returned."""

    gateway: Gateway
    _kept: dict[ServerId, _History] = attrs.field(factory=dict, init=False)

    async def all(self) -> dict[ServerId, Sequence[ProbeResult]]:
        """Return the checks of every server, newest first."""
        routes = dict(self.gateway.table.routes)
        for gone in self._kept.keys() - routes.keys():
            self._kept.pop(gone, None)
        old = [server_id for server_id, route in routes.items() if self._is_old(route)]
        for server_id in sorted(old, key=lambda server_id: self._kept[server_id].read_at)[:MOST_READS]:
            await self._read(routes[server_id])
        return {server_id: await self._known(route) for server_id, route in routes.items()}

    async def of(self, route: Route) -> Sequence[ProbeResult]:
        """Return the checks of one server, newest first; what is known of them while the store cannot be read."""
        return await self._read(route) if self._is_old(route) else await self._known(route)

    async def _known(self, route: Route) -> Sequence[ProbeResult]:
        """Return what is known, continued by this process's own probes; read what is missing."""
        kept = self._kept.get(route.server.id)
        if kept is None:
            return await self._read(route)
        if kept.key == _key(route):
            return kept.checks
        newest = kept.checks[0].checked_at if kept.checks else 0.0
        recent = tuple(self.gateway.health_book.recent.get(route.server.id, ()))
        later = [check for _, check in recent if check.checked_at > newest]
        if not later or len(later) == len(recent) == MAX_RECENT or recent[0][0] != route.health.last_checked_at:
            return await self._read(route)
        checks = (*later, *kept.checks)[:CHART_CHECKS]
        self._kept[route.server.id] = _History(_key(route), self.gateway.now(), checks)
        return checks

    def _is_old(self, route: Route) -> bool:
        """Return whether another process may have checked a server since its history was read."""
        kept = self._kept.get(route.server.id)
        return kept is not None and kept.key == _key(route) and self.gateway.now() - kept.read_at >= HISTORY_SECONDS

    async def _read(self, route: Route) -> Sequence[ProbeResult]:
        server_id, kept = route.server.id, self._kept.get(route.server.id)
        try:
            await flush_if_possible(self.gateway)
            checks = tuple(await self.gateway.store.history(server_id, CHART_CHECKS))
        except GatewayError:
            return () if kept is None else kept.checks
        if kept is not None and kept.checks == checks:
            checks = kept.checks
        self._kept[server_id] = _History(_key(route), self.gateway.now(), checks)
        self.gateway.health_book.timelines.learn(server_id, checks)
        return checks


def _key(route: Route) -> object:
    return route.health.last_checked_at, route.server.generation
