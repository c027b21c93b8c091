"""How many servers and models there are, by the state of the servers."""

import attrs

from multiverse_gateway.core.routing import RoutingTable


@attrs.frozen(kw_only=True)
class ServerTotals:
    """Numbers of servers and models. `inactive` servers were taken out or archived; the other states count active servers only."""

    servers: int
    healthy: int
    unhealthy: int
    unknown: int
    inactive: int
    models: int

    @property
    def active(self) -> int:
        """Return how many servers are checked as usual."""
        return self.servers - self.inactive


def totals_of(table: RoutingTable) -> ServerTotals:
    """Return the totals of a routing table; a model counts if it has an active server."""
    healths = [route.health for route in table.routes.values()]
    active = [health.status for health in healths if health.is_active]
    return ServerTotals(
        servers=len(healths),
        healthy=active.count("healthy"),
        unhealthy=active.count("unhealthy"),
        unknown=active.count("unknown"),
        inactive=len(healths) - len(active),
        models=sum(any(route.health.is_active for route in model.routes) for model in table.models.values()),
    )
