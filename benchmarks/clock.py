"""The clock of the simulations."""

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """Simulated time, and what is to happen in it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something after so many seconds; of two things at one time, what was asked for first."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), action))

    def run(self, done: Callable[[], bool]) -> None:
        """Let time pass until it is done."""
        while self._events and not done():
            self.now, _, action = heapq.heappop(self._events)
            action()
