"""How many requests of a client run or wait at once."""

from collections.abc import Collection

from attrs import define, field


@define(eq=False)
class AtOnce:
    """Count the requests of each client that run or wait, in all models together; a client without any is not kept.

    The caller calls `take` when a request begins and `give_back` at its one exit. A limit holds for waiting only: while servers are
    free, a client may use as many of them as it likes.

    >>> at_once = AtOnce()
    >>> for _ in range(3):
    ...     at_once.take("key-1")
    >>> at_once.may_wait("key-1", 3), at_once.may_wait("key-1", 2), at_once.may_wait("key-1", 0)
    (True, False, True)
    """

    _live: dict[str, int] = field(factory=dict, init=False)

    def take(self, client: str) -> None:
        """Count one more request of a client."""
        live = self._live
        live[client] = live.get(client, 0) + 1

    def give_back(self, client: str) -> None:
        """Count a request no more.

        Raises:
            KeyError: None is counted for this client.
        """
        live = self._live
        left = live[client] - 1
        if left:
            live[client] = left
        else:
            del live[client]

    def live(self, client: str) -> int:
        """Return how many requests of a client run or wait."""
        return self._live.get(client, 0)

    def may_wait(self, client: str, limit: int) -> bool:
        """Return whether a request that is counted already may wait; a limit of 0 means no limit."""
        return not limit or self.live(client) <= limit

    @property
    def total(self) -> int:
        """The requests of all clients."""
        return sum(self._live.values())

    @property
    def clients(self) -> Collection[str]:
        """The clients with at least one request."""
        return self._live.keys()
