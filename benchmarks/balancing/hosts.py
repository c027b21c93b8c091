"""Model servers as volunteers run them: unequal, moody, and not always there. Simulated; all times are seconds."""

import random
from collections import deque
from collections.abc import Callable
from enum import Enum

import attrs


class Mood(Enum):
    """What a host is up to."""

    WELL = "well"
    SLOW = "slow"
    DOWN = "down"


@attrs.frozen(kw_only=True)
class Kind:
    """What a host is like.

    A request takes `first` to its first token and `token` for each one after it, when it runs alone; each other request at work makes
    it slower by the fraction `contention`. At most `slots` are at work, the others wait in the host. `failing` of all requests get a 500 at
    once. Every `well_for` on average it is in its bad `mood` for `ill_for`; slow means `slower` times as long.
    """

    first: float = 0.3
    token: float = 0.02
    slots: int = 4
    contention: float = 0.1
    failing: float = 0.0
    mood: Mood = Mood.WELL
    well_for: float = 120.0
    ill_for: float = 30.0
    slower: float = 8.0
    declares_slots: bool = False
    """Whether the gateway was told `slots` as the server's `max_concurrency`."""

    def throughput(self, tokens: float) -> float:
        """Return the requests of so many tokens that it answers well in a second when it is full."""
        concurrency = 1 + self.contention * (self.slots - 1)
        rate = (1 - self.failing) * self.slots / (concurrency * (self.first + tokens * self.token))
        if self.mood is Mood.WELL:
            return rate
        ill = self.ill_for / (self.well_for + self.ill_for)
        return rate * (1 - ill + (ill / self.slower if self.mood is Mood.SLOW else 0.0))


@attrs.define(eq=False)
class Job:
    """One request at a host: `effort` is a random factor of its duration, `fails` says whether it gets a 500."""

    tokens: int
    effort: float
    fails: bool
    began: Callable[[], None]
    """To be called at the first token."""
    ended: Callable[[], None]
    broke: Callable[[bool], None]
    """To be called when there will be no answer: was there a connection?"""
    refused: Callable[[], None]
    """To be called with a 500."""
    over: bool = False
    ends_at: float = 0.0


Later = Callable[[float, Callable[[], None]], None]
"""Call a function after so many seconds."""

REFUSED_AFTER = 0.001
FAILED_AFTER = 0.005


class Host:
    """One host at work."""

    def __init__(self, kind: Kind, rng: random.Random, now: Callable[[], float], later: Later) -> None:
        self.kind = kind
        self.mood = Mood.WELL
        self._rng = rng
        self._now = now
        self._later = later
        self.working: list[Job] = []
        self.waiting: deque[Job] = deque()
        if kind.mood is not Mood.WELL:
            self._later(self._rng.expovariate(1 / kind.well_for), self._fall_ill)

    def take(self, job: Job) -> None:
        """Begin a job, let it wait, or refuse it."""
        if self.mood is Mood.DOWN:
            self._later(REFUSED_AFTER, lambda: self._break(job, reached=False))
        elif job.fails:
            self._later(FAILED_AFTER, lambda: self._refuse(job))
        elif len(self.working) < self.kind.slots:
            self._begin(job)
        else:
            self.waiting.append(job)

    def drop(self, job: Job) -> None:
        """Forget a job whose client left."""
        job.over = True
        self._leave(job)

    def wait(self) -> float:
        """Return the seconds until a new job would have its first token; infinite for a host that is down. For the oracle."""
        if self.mood is Mood.DOWN:
            return float("inf")
        concurrency = min(len(self.working) + 1, self.kind.slots)
        first = self.kind.first * self._slowness(concurrency)
        if len(self.working) < self.kind.slots:
            return first
        ends = sorted(job.ends_at for job in self.working)
        rounds, place = divmod(len(self.waiting), self.kind.slots)
        return max(0.0, ends[place] - self._now()) + rounds * (ends[-1] - self._now()) + first

    def _slowness(self, concurrency: int) -> float:
        return (1 + self.kind.contention * (concurrency - 1)) * (self.kind.slower if self.mood is Mood.SLOW else 1.0)

    def _begin(self, job: Job) -> None:
        self.working.append(job)
        slowness = self._slowness(len(self.working)) * job.effort
        first = self.kind.first * slowness
        whole = first + job.tokens * self.kind.token * slowness
        job.ends_at = self._now() + whole
        self._later(first, lambda: None if job.over else job.began())
        self._later(whole, lambda: self._end(job))

    def _end(self, job: Job) -> None:
        if not job.over:
            job.over = True
            self._leave(job)
            job.ended()

    def _leave(self, job: Job) -> None:
        if job in self.working:
            self.working.remove(job)
            if self.waiting:
                self._begin(self.waiting.popleft())
        elif job in self.waiting:
            self.waiting.remove(job)

    def _refuse(self, job: Job) -> None:
        if not job.over:
            job.over = True
            job.refused()

    def _break(self, job: Job, *, reached: bool) -> None:
        if not job.over:
            job.over = True
            job.broke(reached)

    def _fall_ill(self) -> None:
        self.mood = self.kind.mood
        if self.mood is Mood.DOWN:
            lost = [*self.working, *self.waiting]
            self.working.clear()
            self.waiting.clear()
            for job in lost:
                self._break(job, reached=True)
        self._later(self._rng.expovariate(1 / self.kind.ill_for), self._recover)

    def _recover(self) -> None:
        self.mood = Mood.WELL
        self._later(self._rng.expovariate(1 / self.kind.well_for), self._fall_ill)
