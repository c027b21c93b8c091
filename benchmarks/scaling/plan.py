"""What is simulated, what each thing costs, and what comes out."""

import attrs

from multiverse_gateway.core.health import HealthPolicy


@attrs.frozen
class Cost:
    """Seconds of a call, and of each row in it."""

    call: float
    row: float = 0.0

    def of(self, rows: float = 0.0) -> float:
        """Return the seconds of a call with so many rows.

        >>> Cost(2.0, 0.5).of(4)
        4.0
        """
        return self.call + self.row * rows


@attrs.frozen(kw_only=True)
class Call:
    """What a call costs: CPU of PostgreSQL and of the gateway, and for writes of the registry how long they keep others from writing."""

    there: Cost
    here: Cost
    alone: Cost = Cost(0.0)


@attrs.frozen(kw_only=True)
class Costs:
    """What everything costs; the defaults were measured on two cores of a small machine, with fsync. Seconds."""

    ask: Call = Call(there=Cost(0.17e-3), here=Cost(0.7e-3))
    """The version."""
    look: Call = Call(there=Cost(0.21e-3), here=Cost(0.8e-3))
    """A question about the holder of a lease."""
    claim: Call = Call(there=Cost(0.39e-3), here=Cost(1.05e-3))
    """A lease renewed, or claimed in vain."""
    save: Call = Call(there=Cost(1.2e-3, 0.27e-3), here=Cost(2.4e-3, 0.15e-3), alone=Cost(2.2e-3, 0.42e-3))
    """A batch of verdicts, each with a row of history."""
    usage: Call = Call(there=Cost(0.7e-3, 0.025e-3), here=Cost(1.5e-3, 0.03e-3))
    """Usage counts."""
    read: Call = Call(there=Cost(0.7e-3, 2.7e-6), here=Cost(2.5e-3, 17.5e-6))
    """The registry."""
    probe: float = 1.7e-3
    request: float = 0.1e-3


@attrs.frozen(kw_only=True)
class Plan:
    """What is simulated. Durations are seconds, rates per second; an outage is a host that does not answer, as a laptop that sleeps."""

    gateways: int
    servers: int
    requests: float = 20.0
    """Of each gateway."""
    clients: int = 30
    """Keys that use a server: each pair is counted apart."""
    outages_per_hour: float = 1.0
    outage: float = 600.0
    cores: int = 4
    """Of PostgreSQL."""
    policy: HealthPolicy = attrs.field(factory=HealthPolicy)
    answer: float = 0.15
    silence: float = 5.0
    """How long a probe takes of a host that is up, and of one that is not: the connect timeout."""
    warm_up: float = 75.0
    lasts: float = 120.0
    seed: int = 1
    costs: Costs = attrs.field(factory=Costs)


@attrs.frozen(kw_only=True)
class Outcome:
    """What a plan comes to: rates per second, parts of 1 of what there is, delays in seconds."""

    transactions: float
    """As PostgreSQL counts them."""
    probes: float
    most_probes: float
    """Of the busiest gateway, as a part of what it can have under way."""
    rows: float
    changes: float
    reads: float
    """Of the registry, by all gateways."""
    cores: float
    """CPU of PostgreSQL."""
    row: float
    """The time in which somebody writes the registry, and all others would have to wait."""
    cpu: float
    """One core of the busiest gateway."""
    seen: tuple[float, float]
    """The median and the 99th percentile of the time after which a change is in another gateway's table."""
    oldest: float
    """The age of the oldest verdict on a host that is up."""

    @property
    def shares(self) -> dict[str, float]:
        """Return how much is used of what may run out."""
        return {"CPU of PostgreSQL": self.cores, "writes": self.row, "CPU of a gateway": self.cpu, "probes under way": self.most_probes}
