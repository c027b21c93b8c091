"""Power of two choices: the cheaper one of two servers that are drawn at random.

Nearly as good as knowing the best one where servers are alike, however many they are, and several gateways that know the same do not
all run to the same server (Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001). Where they are not alike, two
slow servers are drawn together often enough to drown: `least_busy` looks at all.
"""

import random
from collections.abc import Mapping, Sequence

from multiverse_gateway.balancers.cost import costs, costs_by_id
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.protocols import LoadView
from multiverse_gateway.settings import Settings


class TwoChoices:
    """Draw two servers and take the cheaper one (`cost.costs`)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        """Return the cheaper one of two random servers."""
        count = len(servers)
        if count == 1:
            return servers[0]
        first = int(self._rng.random() * count)
        second = int(self._rng.random() * (count - 1))
        drawn = servers[first], servers[second + (second >= first)]
        one, other = costs(drawn, load)
        return drawn[0] if one <= other else drawn[1]

    def scores(self, servers: Sequence[Server], load: LoadView) -> Mapping[ServerId, float]:
        """Return what each server costs."""
        return costs_by_id(servers, load)


def create(settings: Settings) -> TwoChoices:
    """Return a new balancer of this kind; the entry point of the plug-in."""
    return TwoChoices(random.Random())  # noqa: S311  # picks servers, no secrets
