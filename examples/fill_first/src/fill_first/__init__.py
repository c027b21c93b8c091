"""Fill one server before the next one gets work, so that the others may sleep."""

from collections.abc import Sequence

from multiverse_gateway import Envelope, LoadView, Server, Settings

REQUESTS = 4
"""How many requests fill a server."""


class FillFirst:
    """Take the first server that has room; when none has, the one that has least to do."""

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        for server in servers:
            if load.in_flight(server.id) < REQUESTS * load.traffic_share(server.id):
                return server
        return min(servers, key=lambda server: load.in_flight(server.id))


def create(settings: Settings) -> FillFirst:
    """Make it; this is what the entry point names."""
    return FillFirst()
