"""How many servers and models there are, by the state of the servers."""

import attrs

from multiverse_gateway.core.health import needs_attention
from multiverse_gateway.core.routing import RoutingTable


@attrs.frozen(kw_only=True)
class ServerTotals:
    """Numbers of servers and models. `inactive` servers were taken out or archived; the other states count active servers only.

    `attention` counts the healthy servers that may not have their model.
    """

    servers: int
    healthy: int
    unhealthy: int
    unknown: int
    inactive: int
    attention: int
    models: int

    @property
    def active(self) -> int:
        """Return how many servers are checked as usual."""
        return self.servers - self.inactive


def totals_of(table: RoutingTable, now: float) -> ServerTotals:
    """Return the totals of a routing table at a monotonic instant; a model counts if it has an active server."""
    healths = [route.health for route in table.routes.values()]
    active = [health.status for health in healths if health.is_active]
    return ServerTotals(
        servers=len(healths),
        healthy=active.count("healthy"),
        unhealthy=active.count("unhealthy"),
        unknown=active.count("unknown"),
        inactive=len(healths) - len(active),
        attention=sum(needs_attention(health, now) for health in healths),
        models=sum(any(route.health.is_active for route in model.routes) for model in table.models.values()),
    )
