"""Round robin: every usable server of a model in turn."""

from collections.abc import Sequence

from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.protocols import LoadView
from multiverse_gateway.settings import Settings

MAX_MODELS = 4096
"""Models whose turns are remembered; beyond that number all of them start from zero together."""
_REMEMBERED = 4
"""Servers remembered for each one that is there: those that are away for a moment keep their place."""


class _Turns:
    """The turns of one model: while the servers stay the same, `order` is gone through in a circle."""

    __slots__ = ("count", "credit", "last", "next", "order", "servers")

    def __init__(self) -> None:
        self.servers: tuple[Server, ...] = ()
        self.order: Sequence[Server] = ()
        self.next = 0
        self.count = 0
        self.last: dict[ServerId, int] = {}
        self.credit: dict[ServerId, float] = {}

    def take(self, servers: Sequence[Server], load: LoadView) -> Server:
        if servers is not self.servers and servers != self.servers:
            self._sort(servers)
        order = self.order
        for _ in range(4 * len(order)):
            server = self._turn(order)
            share = load.traffic_share(server.id)
            if share >= 1.0 or self._is_due(server.id, share):
                return server
        return self._turn(order)

    def _turn(self, order: Sequence[Server]) -> Server:
        turn = self.next
        server = order[turn]
        self.next = turn + 1 if turn + 1 < len(order) else 0
        self.count += 1
        self.last[server.id] = self.count
        return server

    def _is_due(self, server_id: ServerId, share: float) -> bool:
        """Return whether a server in its slow start, which gets a part of its turns, takes this one."""
        credit = self.credit.get(server_id, 0.0) + share
        self.credit[server_id] = credit - 1.0 if credit >= 1.0 else credit
        return credit >= 1.0

    def _sort(self, servers: Sequence[Server]) -> None:
        """Begin a circle: whose last turn is the longest ago comes first."""
        last = self.last
        if len(last) > _REMEMBERED * (len(servers) + _REMEMBERED):
            last = self.last = {server.id: last[server.id] for server in servers if server.id in last}
            self.credit.clear()
        self.servers = tuple(servers)  # the same one if it is a tuple; a list may change behind our back
        self.order = sorted(servers, key=lambda server: last.get(server.id, 0))
        self.next = 0


class RoundRobin:
    """Give the turn to the server whose last one is the longest ago.

    Exact for each model, even if servers come, go or are left out of a second attempt: no server is passed over, and a server
    that was away gets at most one turn for it. During its slow start a server takes only its share of its turns.
    """

    def __init__(self) -> None:
        self._models: dict[str, _Turns] = {}

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        """Return the server that has waited longest."""
        turns = self._models.get(request.model)
        if turns is None:
            if len(self._models) >= MAX_MODELS:
                self._models.clear()
            turns = self._models[request.model] = _Turns()
        return turns.take(servers, load)


def create(settings: Settings) -> RoundRobin:
    """Return a new balancer of this kind; the entry point of the plug-in."""
    return RoundRobin()
