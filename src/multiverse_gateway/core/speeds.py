"""How fast servers answer, in tokens per second: a moving average over the answers that this process relayed."""

from collections.abc import Container

from attrs import define, field

from multiverse_gateway.core.servers import ServerId

WEIGHT = 0.2
"""Weight of one answer against all earlier ones."""
LEAST_TOKENS = 8
"""Mean size of the answers that count: the time for a shorter one is that for its prompt."""


@define(eq=False)
class Speeds:
    """The speed of each server, completion tokens by seconds from the request to the end of its answer.

    >>> speeds = Speeds()
    >>> speeds.learn(ServerId("a"), tokens=300, seconds=10.0, answers=3)
    >>> speeds.of(ServerId("a")), speeds.of(ServerId("b"))
    (30.0, None)
    """

    _speeds: dict[ServerId, float] = field(factory=dict)

    def learn(self, server_id: ServerId, *, tokens: int, seconds: float, answers: int) -> None:
        """Note good answers that took `seconds` together; they count for as many as they are."""
        if seconds <= 0 or tokens < LEAST_TOKENS * answers:
            return
        speed, before = tokens / seconds, self._speeds.get(server_id)
        weight = 1.0 - (1.0 - WEIGHT) ** answers
        self._speeds[server_id] = speed if before is None else before + weight * (speed - before)

    def of(self, server_id: ServerId) -> float | None:
        """Return the speed of a server in tokens per second, `None` before its first answer."""
        return self._speeds.get(server_id)

    def keep(self, servers: Container[ServerId]) -> None:
        """Forget servers that are not among these."""
        self._speeds = {server_id: speed for server_id, speed in self._speeds.items() if server_id in servers}
