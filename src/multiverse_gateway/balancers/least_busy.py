"""Least busy: the server where a request would wait the least, by its running requests and its latency."""

from collections.abc import Mapping, Sequence

from multiverse_gateway.balancers.cost import costs, costs_by_id
from multiverse_gateway.balancers.round_robin import RoundRobin
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.protocols import LoadView
from multiverse_gateway.settings import Settings


class LeastBusy:
    """Look at all servers and take the cheapest (`cost.costs`); those that are equally cheap take turns."""

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        """Return one of the cheapest servers."""
        server_costs = costs(servers, load)
        least = min(server_costs)
        equal = [server for server, cost in zip(servers, server_costs, strict=True) if cost == least]
        return equal[0] if len(equal) == 1 else self._turns.pick(equal, load, request)

    def scores(self, servers: Sequence[Server], load: LoadView) -> Mapping[ServerId, float]:
        """Return what each server costs."""
        return costs_by_id(servers, load)


def create(settings: Settings) -> LeastBusy:
    """Return a new balancer of this kind; the entry point of the plug-in."""
    return LeastBusy()
