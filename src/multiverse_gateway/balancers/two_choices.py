"""Power of two choices: the cheaper one of two servers that are drawn at random.

Nearly as good as knowing the best one, and several gateways that know the same do not all run to the same server
(Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001).
"""

import random
from collections.abc import Sequence

from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import LoadView
from multiverse_gateway.settings import Settings


class TwoChoices:
    """Compare (running requests + 1) * latency / (weight * share) of two servers; failures count as slow in the latency.

    Until both have a latency, only the running requests are compared: an unknown server is tried, not flooded.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        """Return the cheaper one of two random servers."""
        count = len(servers)
        if count == 1:
            return servers[0]
        first = int(self._chance.random() * count)
        second = int(self._chance.random() * (count - 1))
        one, other = servers[first], servers[second + (second >= first)]
        one_latency, other_latency = load.latency(one.id), load.latency(other.id)
        if one_latency is None or other_latency is None:
            one_latency = other_latency = 1.0
        return one if _cost(one, load, one_latency) <= _cost(other, load, other_latency) else other


def _cost(server: Server, load: LoadView, latency: float) -> float:
    return (load.in_flight(server.id) + 1) * latency / (server.weight * load.share(server.id))


def create(settings: Settings) -> TwoChoices:
    """Make a balancer."""
    return TwoChoices(random.Random())  # noqa: S311  # chance, no secret
