"""Smooth weighted round robin: turns in proportion to the servers' weights, spread as evenly as can be."""

from collections.abc import Sequence

from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.protocols import LoadView
from multiverse_gateway.settings import Settings

MAX_MODELS = 4096
"""Models whose turns are remembered; beyond that number all of them start from zero together."""
_REMEMBERED = 4


class Weighted:
    """Give each server `weight` times share turns out of the sum of all, as nginx does.

    Every pick adds each server's weight to its credit, takes the highest credit, and takes the sum of all weights off it. The share is
    less than 1 during a server's slow start.
    """

    def __init__(self) -> None:
        self._models: dict[str, dict[ServerId, float]] = {}

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        """Return the server with the highest credit; the first one of several."""
        credits = self._credits(request.model, servers)
        chosen, highest, total = servers[0], float("-inf"), 0.0
        for server in servers:
            weight = server.weight * load.traffic_share(server.id)
            total += weight
            credit = credits[server.id] = credits.get(server.id, 0.0) + weight
            if credit > highest:
                chosen, highest = server, credit
        credits[chosen.id] = highest - total
        return chosen

    def _credits(self, model: str, servers: Sequence[Server]) -> dict[ServerId, float]:
        credits = self._models.get(model)
        if credits is None:
            if len(self._models) >= MAX_MODELS:
                self._models.clear()
            credits = self._models[model] = {}
        elif len(credits) > _REMEMBERED * (len(servers) + _REMEMBERED):
            credits = self._models[model] = {server.id: credits[server.id] for server in servers if server.id in credits}
        return credits


def create(settings: Settings) -> Weighted:
    """Return a new balancer of this kind; the entry point of the plug-in."""
    return Weighted()
