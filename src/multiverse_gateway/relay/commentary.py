"""The exchanges whose clients want comments while they wait. The gateway calls `look` while there is anything to do."""

from multiverse_gateway.core.fairness import FairQueue, Place, Ticket
from multiverse_gateway.relay.exchange import Exchange

LOOK_SECONDS = 0.25
"""How often places are computed: it costs about a microsecond for each request that waits for the same model."""


class Commentary:
    """Send the places of their requests to the clients that asked for comments. An exchange is kept until its answer begins."""

    def __init__(self, queue: FairQueue) -> None:
        self._queue = queue
        self._exchanges: set[Exchange] = set()
        self._looks_at = 0.0

    def add(self, exchange: Exchange) -> None:
        """Follow an exchange that has `comments`."""
        self._exchanges.add(exchange)

    def discard(self, exchange: Exchange) -> None:
        """Forget an exchange that is over."""
        self._exchanges.discard(exchange)

    def look(self, now: float) -> None:
        """Write the comments that are due at a monotonic instant, every `LOOK_SECONDS`."""
        if not self._exchanges or now < self._looks_at:
            return
        self._looks_at = now + LOOK_SECONDS
        self._exchanges = {exchange for exchange in self._exchanges if exchange.awaits_answer}
        ready = [exchange for exchange in self._exchanges if exchange.response.may_comment(now)]
        places: dict[Ticket, Place] = {}
        for model in {exchange.search.model for exchange in ready if exchange.search.is_waiting}:
            places |= self._queue.places(model, now)
        for exchange in ready:
            exchange.comment(places.get(exchange.search), now)
