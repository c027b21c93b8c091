"""Round robin: every usable server of a model in turn."""

from collections.abc import Sequence

from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import LoadView
from multiverse_gateway.settings import Settings

MAX_MODELS = 4096


class RoundRobin:
    """Remember the server that had the last turn of each model; the next one in order has this one."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, str]] = {}

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        """Return the first server after the one that had the last turn."""
        last = self._last.get(request.model)
        chosen = servers[0]
        if last is not None:
            chosen = next((server for server in servers if (server.registered_at, server.id) > last), chosen)
        elif len(self._last) >= MAX_MODELS:
            self._last.clear()
        self._last[request.model] = (chosen.registered_at, chosen.id)
        return chosen


def create(settings: Settings) -> RoundRobin:
    """Make a balancer."""
    return RoundRobin()
