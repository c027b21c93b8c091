"""What a server does for this process while it is probed: a server that sends bytes is alive, whether or not it answers the probe."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

from attrs import frozen

AttemptKey = tuple[int, int]
"""The gateway's number of a request, and the number of its attempt."""


@frozen
class Running:
    """A running attempt, and the monotonic instant until which it is currently allowed to run."""

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


ELSEWHERE: Final = (0, 0)
"""Stands for an attempt of another process; nothing else is known about it."""
_LONGEST_HOLD = 5.0
_HOLDS = 3


def hold_seconds(probe_timeout: float) -> float:
    """Return how often, in seconds, a process says that it has requests running on a machine: sooner than a probe of it times out."""
    return min(_LONGEST_HOLD, probe_timeout / 4)


def held_seconds(probe_timeout: float) -> float:
    """Return for how many seconds other processes believe that."""
    return _HOLDS * hold_seconds(probe_timeout)


def busy_role(endpoint_url: str) -> str:
    """Return the name of the lease by which a process says that it has requests running on a machine.

    >>> busy_role("http://a") == busy_role("http://a") != busy_role("http://b")
    True
    """
    return f"busy-{blake2b(endpoint_url.encode(), digest_size=16).hexdigest()}"
