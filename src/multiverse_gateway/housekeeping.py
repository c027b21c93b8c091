"""When the gateway's sweep is due, whether this process keeps up or was stopped, and what runs beside the requests.

One sweep every `SWEEP_SECONDS` looks at all deadlines, in place of a timer per request. Without anything to watch, the loop rests. A
sweep that comes far too late means that the process was stopped (SIGSTOP, suspend): it learns by how much.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
from anyio.abc import TaskGroup

from multiverse_gateway.core.load import DECAY_SECONDS, LagDetector
from multiverse_gateway.core.pauses import stopped_seconds
from multiverse_gateway.usage_book import TALLY_SECONDS

SWEEP_SECONDS = 0.05
REST_SECONDS = 1.0
"""How often a gateway without requests checks whether anything is due."""

Background = Callable[[], Coroutine[Any, Any, None]]


class Housekeeping:
    """The loop that sweeps, and the tasks in the background. `now` is the monotonic clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._due = now() + SWEEP_SECONDS
        self._resting: anyio.Event | None = None
        self._lag = LagDetector()
        self._decay_at = now() + DECAY_SECONDS
        self._flush_tallies_at = now() + TALLY_SECONDS
        self._background: asyncio.Queue[Background] = asyncio.Queue()

    def wake(self) -> None:
        """Sweep again from now on, if the loop rests: a request has come."""
        if self._resting is not None:
            self._resting.set()
            self._resting = None
            self._due = self._now() + SWEEP_SECONDS

    async def sweep_forever(self, sweep: Callable[[float], None], may_rest: Callable[[], bool]) -> None:
        """Call `sweep` with the monotonic instant every `SWEEP_SECONDS`, except while there is nothing to do."""
        while True:
            if may_rest():
                await self._rest()
            await anyio.sleep(SWEEP_SECONDS)
            sweep(self._now())

    async def _rest(self) -> None:
        """Wait for a request, at most `REST_SECONDS`. The one that ends the rest sets when the next sweep is due."""
        self._resting = anyio.Event()
        with anyio.move_on_after(REST_SECONDS):
            await self._resting.wait()
        if self._resting is not None:
            self._due = self._now() + SWEEP_SECONDS

    def begin_sweep(self, now: float) -> tuple[float, bool]:
        """Return for how long the process was stopped before this sweep, and whether it has been late again and again.

        A process that is late again and again should take nothing new.
        """
        late = now - self._due
        stopped = self.stopped_seconds(now)
        self._due = now + SWEEP_SECONDS
        return stopped, self._lag.note(late, now)

    def stopped_seconds(self, now: float) -> float:
        """Return for how many seconds the process was stopped since the last sweep; a pause is reported once."""
        stopped = stopped_seconds(self._due, now)
        if stopped:
            self._due = now + SWEEP_SECONDS
        return stopped

    def should_flush_tallies(self, now: float) -> bool:
        """Return whether it is time to flush the tallies of finished requests."""
        is_due = now >= self._flush_tallies_at
        if is_due:
            self._flush_tallies_at = now + TALLY_SECONDS
        return is_due

    def should_decay(self, now: float) -> bool:
        """Return whether it is time to let old latencies decay."""
        is_due = now >= self._decay_at
        if is_due:
            self._decay_at = now + DECAY_SECONDS
        return is_due

    def in_background(self, call: Background) -> None:
        """Run a function beside everything else, until the gateway ends. It may raise nothing."""
        self._background.put_nowait(call)

    async def run_background(self, group: TaskGroup) -> None:
        """Start what is to run in the background: callbacks of sockets run in no task, and only a task can start others in a group."""
        while True:
            group.start_soon(await self._background.get())
