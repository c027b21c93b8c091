"""Send requests to one server until it is full, so that idle servers can sleep."""

from collections.abc import Sequence

from multiverse_gateway import Envelope, LoadView, Server, Settings

REQUESTS = 4
"""Concurrent requests at which a server is full."""


class FillFirst:
    """Choose the first server that is not full, or the one with the fewest requests if all are full."""

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        for server in servers:
            if load.in_flight(server.id) < REQUESTS * load.traffic_share(server.id):
                return server
        return min(servers, key=lambda server: load.in_flight(server.id))


def create(settings: Settings) -> FillFirst:
    """Create the balancer; the entry point names this function."""
    return FillFirst()
