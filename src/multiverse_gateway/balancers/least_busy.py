"""Least busy: the server with the fewest running requests for its weight."""

from collections.abc import Sequence

from multiverse_gateway.balancers.round_robin import RoundRobin
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import LoadView
from multiverse_gateway.settings import Settings


class LeastBusy:
    """Compare running requests / (weight * share); those that are equally busy take turns.

    Failing fast looks like being idle; a server that does it is soon taken out by its strikes. Use `two_choices` where that is too late.
    """

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        """Return one of the least busy servers."""
        least = float("inf")
        equal: list[Server] = []
        for server in servers:
            busy = load.in_flight(server.id) / (server.weight * load.share(server.id))
            if busy < least:
                least, equal = busy, [server]
            elif busy == least:
                equal.append(server)
        return self._turns.pick(equal, load, request)


def create(settings: Settings) -> LeastBusy:
    """Make a balancer."""
    return LeastBusy()
