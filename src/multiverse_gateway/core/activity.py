"""What a server does for this process while it is probed: a server that sends bytes is alive, whether or not it answers the probe."""

from collections.abc import Mapping

from attrs import frozen

AttemptKey = tuple[int, int]
"""The gateway's number of a request, and the number of its attempt."""


@frozen
class Running:
    """An attempt that runs, and the monotonic instant until which it may take at present."""

    key: AttemptKey
    allowed_until: float


@frozen(kw_only=True)
class Activity:
    """What a server has done for this process up to one moment.

    `answers` is the number of its answers so far. `received` holds the bytes that arrived for each running attempt; `oldest` is the
    first of these attempts, `None` if none runs.
    """

    answers: int = 0
    received: Mapping[AttemptKey, int] = {}
    oldest: Running | None = None

    def shows_life_since(self, before: "Activity") -> bool:
        """Return whether any byte of an answer arrived since an earlier moment.

        >>> before = Activity(received={(7, 1): 100})
        >>> Activity(received={(7, 1): 101}).shows_life_since(before), Activity(received={(7, 1): 100, (8, 1): 0}).shows_life_since(before)
        (True, False)
        """
        return self.answers > before.answers or any(count > before.received.get(key, 0) for key, count in self.received.items())
