"""What a request would cost on each server, in no unit: the rule that `least_busy` and `two_choices` share."""

from collections.abc import Mapping, Sequence
from math import sqrt

from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.protocols import LoadView

LEAST_LATENCY = 0.01
"""Seconds; servers that are faster than this count as equally fast."""


def costs(servers: Sequence[Server], load: LoadView) -> list[float]:
    """Return (requests running on its host + 1) * √latency / (weight * share) of each server; failures count as slow in the latency.

    A server without a latency counts as one as fast as the fastest: it is tried, and not flooded. The root was chosen by simulation:
    with the latency itself one slow answer keeps a server away for too long, without it a laptop gets what a data centre's card gets.
    """
    latencies = [load.latency(server.id) for server in servers]
    fastest = min((latency for latency in latencies if latency is not None), default=1.0)
    return [
        (load.host_in_flight(server.host_id) + 1)
        * sqrt(max(LEAST_LATENCY, fastest if latency is None else latency))
        / (server.weight * load.traffic_share(server.id))
        for server, latency in zip(servers, latencies, strict=True)
    ]


def costs_by_id(servers: Sequence[Server], load: LoadView) -> Mapping[ServerId, float]:
    """Return the same by the servers' ids, to explain a choice."""
    return {server.id: cost for server, cost in zip(servers, costs(servers, load), strict=True)}
