"""How many requests each client key has sent today: what daily limits are held against.

1. Days are those of UTC, by the clock of the process that counts. The first call of another day resets the counts.
2. A count is never more than what was sent, so a key whose count has reached its limit can be refused without asking another process.
   A call is therefore counted before any other process is asked, and a larger count of another process replaces this one instead of
   being added.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

from attrs import define, field

DAY_SECONDS = 86_400


def day_of(wall: float) -> int:
    """Return the number of the day of an instant in epoch seconds."""
    return int(wall // DAY_SECONDS)


def day_name(day: int) -> str:
    """Write a day as ISO 8601 does.

    >>> day_name(day_of(86_400.0))
    '1970-01-02'
    """
    return datetime.fromtimestamp(day * DAY_SECONDS, UTC).date().isoformat()


def until_next_day(wall: float) -> float:
    """Return the seconds until the next day begins, more than 0.

    >>> until_next_day(86_399.0)
    1.0
    """
    return DAY_SECONDS - wall % DAY_SECONDS


@define(eq=False)
class DayCounts:
    """Count the requests of today by client key; a call costs the same however many keys there are, and only keys that call are kept.

    >>> counts = DayCounts()
    >>> [counts.count("alice", 0.0), counts.count("alice", 1.0), counts.count("alice", 86_400.0)]
    [1, 2, 1]
    """

    _day: int = field(default=-1, init=False)
    _totals: dict[str, int] = field(factory=dict, init=False)

    def total(self, key: str, wall: float) -> int:
        """Return how many requests of a key are known today."""
        self._turn(wall)
        return self._totals.get(key, 0)

    def count(self, key: str, wall: float) -> int:
        """Count a request; return the total with it."""
        total = self._totals[key] = self.total(key, wall) + 1
        return total

    def take_back(self, key: str, day: int) -> None:
        """Count a request of a day no more; of a day that is over nothing is counted any longer."""
        if day == self._day and self._totals.get(key):
            self._totals[key] -= 1

    def learn(self, totals: Mapping[str, int], day: int, wall: float) -> None:
        """Note how many requests of a day others know of, those that were counted here among them; a day that is over is left alone."""
        self._turn(wall)
        if day == self._day:
            for key, total in totals.items():
                self._totals[key] = max(self._totals.get(key, 0), total)

    def _turn(self, wall: float) -> None:
        day = day_of(wall)
        if day != self._day:
            self._day, self._totals = day, {}
