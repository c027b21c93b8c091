"""A discrete-event simulation of gateways on one PostgreSQL: which gateway sends which call when, and what that costs.

The shards, the rhythm of probes and what counts as a change are the gateway's own code; hosts, time and the database are made up, and each
call costs what `benchmarks/scaling/costs.py` measured.
Left out: requests that find a server dead before its probe does, usage counts that wait for each other, and all failures of the database
and of the network.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import attrs
from benchmarks.clock import Clock
from benchmarks.scaling.plan import Call, Outcome, Plan

from multiverse_gateway.core.health import Health, NextProbe, ProbeFailed, ProbePassed, advance, fresh
from multiverse_gateway.core.probing import MAX_PARALLEL, claim_period, shard_count, shard_of
from multiverse_gateway.core.servers import HostId
from multiverse_gateway.monitor import FOLLOW_SECONDS, USAGE_SECONDS
from multiverse_gateway.stores.postgres_database import GATHER_SECONDS
from multiverse_gateway.stores.rows import shown

TRANSACTIONS = 2
"""How many PostgreSQL counts per call: the pool looks first whether the connection still works."""


@attrs.define(eq=False)
class Line:
    """What so many may use at a time; the others wait in the order in which they came. `busy` is the sum of all uses, in seconds."""

    clock: Clock
    places: int
    taken: int = 0
    busy: float = 0.0
    _waiting: deque[tuple[float, Callable[[], None]]] = attrs.field(factory=deque)

    def use(self, seconds: float, then: Callable[[], None] = lambda: None) -> None:
        """Take a place for so many seconds as soon as one is free, and do something afterward."""
        if self.taken >= self.places:
            self._waiting.append((seconds, then))
            return
        self.taken += 1
        self.busy += seconds
        self.clock.later(seconds, lambda: self._left(then))

    def _left(self, then: Callable[[], None]) -> None:
        self.taken -= 1
        if self._waiting:
            self.use(*self._waiting.popleft())
        then()


class Host:
    """A server of somebody's, which is up and down by turns."""

    def __init__(self, plan: Plan, rng: random.Random) -> None:
        up, down = 3600.0 / plan.outages_per_hour if plan.outages_per_hour else math.inf, plan.outage
        self.is_up = rng.random() < (1.0 if math.isinf(up) else up / (up + down))
        self._means = {True: up, False: down}
        self._rng = rng
        self._turns_at = self._next(0.0)

    def _next(self, now: float) -> float:
        mean = self._means[self.is_up]
        return math.inf if math.isinf(mean) else now + self._rng.expovariate(1 / mean)

    def answers(self, now: float) -> bool:
        """Return whether it is up at an instant; instants only grow."""
        while self._turns_at <= now:
            self.is_up = not self.is_up
            self._turns_at = self._next(self._turns_at)
        return self.is_up


@attrs.define(eq=False)
class Counted:
    """What was counted since the warm-up. Durations are seconds."""

    calls: int = 0
    probes: int = 0
    rows: int = 0
    """Of history."""
    changes: int = 0
    """Changes of the registry's version."""
    reads: int = 0
    delays: list[float] = attrs.field(factory=list)
    """From the moment when a change was found to that when another gateway routes by it, for each gateway."""
    ages: list[float] = attrs.field(factory=list)
    """How old each verdict was when the next one came, of hosts that are up."""


class Database:
    """PostgreSQL: cores, one row by which writes of the registry wait for each other, and a version that grows."""

    def __init__(self, world: "World") -> None:
        self.version = 0
        self.news: list[tuple[Member | None, Sequence[float]]] = [(None, ())]
        """Who found the changes of each version, and when."""
        self.cores = Line(world.clock, world.plan.cores)
        self.row = Line(world.clock, 1)
        self._world = world

    def call(self, call: Call, rows: float = 0.0, then: Callable[[], None] = lambda: None, *, times: int = 1) -> None:
        """Let a gateway call, so many times in a row; `then` happens at the end."""
        self._world.counted.calls += times
        here, there = times * call.here.of(rows), times * call.there.of(rows)
        self.cores.use(there, lambda: self._world.clock.later(here, then))

    def save(self, finder: "Member", rows: int, found: Sequence[float], then: Callable[[], None]) -> None:
        """Let a gateway save verdicts, `found` being the instants of those that change anything; all gateways are told of these."""
        save = self._world.plan.costs.save

        def done() -> None:
            self._world.counted.rows += rows
            if found:
                self.version += 1
                self._world.counted.changes += 1
                self.news.append((finder, found))
                for member in self._world.members:
                    member.told()
            then()

        self._world.counted.calls += 1
        self.cores.use(save.there.of(rows), lambda: self.row.use(save.alone.of(rows), done))


class Member:
    """One of the gateways: follows the registry, holds or wants the lease of a shard, probes its servers, saves results and counts."""

    def __init__(self, world: "World", number: int) -> None:
        self.number = number
        self.cpu = 0.0
        self.probing = Line(world.clock, MAX_PARALLEL)
        self.version = 0
        self._world = world
        self._plan = world.plan
        self._checks = 0
        self._found: list[float] = []
        self._is_told = False
        self._waits: object | None = None

    def begin(self, rng: random.Random) -> None:
        """Begin all loops, at moments of its own."""
        for loop, period in (
            (self.follow, FOLLOW_SECONDS),
            (self.flush, FOLLOW_SECONDS),
            (self.lead, claim_period(shard_count(self._plan.servers))),
            (self.flush_usage, USAGE_SECONDS),
        ):
            self._world.clock.later(rng.random() * period, loop)

    def _call(self, call: Call, rows: float = 0.0, then: Callable[[], None] = lambda: None, *, times: int = 1) -> None:
        self.cpu += times * call.here.of(rows)
        self._world.database.call(call, rows, then, times=times)

    def _again(self, seconds: float, loop: Callable[[], None]) -> Callable[[], None]:
        return partial(self._world.clock.later, seconds, loop)

    # The registry

    def told(self) -> None:
        """Take the news of a change: wait for more for a moment, or remember it while busy."""
        if self._waits is None:
            self._is_told = True
        else:
            self._waits = None
            self._world.clock.later(GATHER_SECONDS, self.follow)

    def follow(self) -> None:
        """Ask for the version, and read the registry if it is another one."""
        self._is_told = False
        self._call(self._plan.costs.ask, then=self._judge)

    def _judge(self) -> None:
        version = self._world.database.version
        if version == self.version:
            self._wait()
            return
        self._world.counted.reads += 1
        self._call(self._plan.costs.read, self._plan.servers, lambda: self._swap(version))

    def _swap(self, version: int) -> None:
        now = self._world.clock.now
        for finder, found in self._world.database.news[self.version + 1 : version + 1]:
            if finder is not self:
                self._world.counted.delays.extend(now - instant for instant in found)
        self.version = version
        self._wait()

    def _wait(self) -> None:
        if self._is_told:
            self._world.clock.later(GATHER_SECONDS, self.follow)
            return
        token = self._waits = object()

        def over() -> None:
            if self._waits is token:
                self._waits = None
                self.follow()

        self._world.clock.later(FOLLOW_SECONDS, over)

    # Probes

    def lead(self) -> None:
        """Renew the lease and ask about the others, or try to get one of them."""
        costs, count = self._plan.costs, shard_count(self._plan.servers)
        again = self._again(claim_period(count), self.lead)
        if self.number >= count:
            self._call(costs.claim, then=again, times=count)
        elif count == 1:
            self._call(costs.claim, then=again)
        else:
            self._call(costs.claim, then=lambda: self._call(costs.look, then=again, times=count - 1))

    def probe(self, host: Host, health: Health, rng: random.Random) -> None:
        """Probe a server when it is due, again and again."""
        clock, plan = self._world.clock, self._plan

        def begin() -> None:
            is_up = host.answers(clock.now)
            self.cpu += plan.costs.probe
            self.probing.use(plan.answer if is_up else plan.silence, lambda: judge(is_up))

        def judge(is_up: bool) -> None:
            event = ProbePassed(generation=1) if is_up else ProbeFailed(generation=1, reason="no answer")
            after = advance(health, event, plan.policy, now=clock.now, wall=clock.now, random=rng.random())
            self._note(health, after, is_up=is_up)
            self.probe(host, after, rng)

        clock.later(max(0.0, health.next_probe.at - clock.now), begin)

    def _note(self, before: Health, after: Health, *, is_up: bool) -> None:
        counted, now = self._world.counted, self._world.clock.now
        counted.probes += 1
        self._checks += 1
        if is_up and before.status == "healthy" and before.last_checked_at is not None:
            counted.ages.append(now - before.last_checked_at)
        if shown(before) != shown(after):
            self._found.append(now)

    def flush(self) -> None:
        """Save the verdicts since the last time."""
        again = self._again(FOLLOW_SECONDS, self.flush)
        if not self._checks:
            again()
            return
        rows, found = self._checks, self._found
        self._checks, self._found = 0, []
        self.cpu += self._plan.costs.save.here.of(rows)
        self._world.database.save(self, rows, found, again)

    # Use

    def flush_usage(self) -> None:
        """Save what was used since the last time: a row for each client of a server, however often it asked."""
        requests, pairs = self._plan.requests * USAGE_SECONDS, self._plan.servers * self._plan.clients
        again = self._again(USAGE_SECONDS, self.flush_usage)
        self.cpu += requests * self._plan.costs.request
        self._call(self._plan.costs.usage, distinct(requests, pairs), again) if requests else again()


class World:
    """Gateways, hosts, a database and time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.clock = Clock()
        self.counted = Counted()
        self.database = Database(self)
        self.members = [Member(self, number) for number in range(plan.gateways)]
        rng = random.Random(plan.seed)
        for member in self.members:
            member.begin(rng)
        taken = range(min(plan.gateways, shard_count(plan.servers)))
        for number in range(plan.servers):
            own = random.Random(f"{plan.seed} {number}")
            due = attrs.evolve(fresh(1, now=0.0, wall=0.0), next_probe=NextProbe(at=own.random() * plan.policy.interval))
            self.members[shard_of(HostId(f"s{number}"), taken)].probe(Host(plan, own), due, own)

    def run(self, until: float) -> None:
        """Let time pass."""
        self.clock.later(until - self.clock.now, lambda: None)
        self.clock.run(lambda: self.clock.now >= until)

    def lines(self) -> Iterator[Line]:
        """Return all that may be used up."""
        yield from (self.database.cores, self.database.row)
        yield from (member.probing for member in self.members)

    def forget(self) -> None:
        """Count from now on."""
        self.counted = Counted()
        for line in self.lines():
            line.busy = 0.0
        for member in self.members:
            member.cpu = 0.0


def simulate(plan: Plan) -> Outcome:
    """Run a plan; the same plan comes to the same outcome."""
    world = World(plan)
    world.run(plan.warm_up)
    world.forget()
    world.run(plan.warm_up + plan.lasts)
    counted, database = world.counted, world.database
    delays = sorted(counted.delays)
    return Outcome(
        transactions=TRANSACTIONS * counted.calls / plan.lasts,
        probes=counted.probes / plan.lasts,
        most_probes=max(member.probing.busy for member in world.members) / MAX_PARALLEL / plan.lasts,
        rows=counted.rows / plan.lasts,
        changes=counted.changes / plan.lasts,
        reads=counted.reads / plan.lasts,
        cores=database.cores.busy / plan.cores / plan.lasts,
        row=database.row.busy / plan.lasts,
        cpu=max(member.cpu for member in world.members) / plan.lasts,
        seen=(percentile(delays, 0.5), percentile(delays, 0.99)),
        oldest=max(counted.ages, default=0.0),
    )


def percentile(ordered: Sequence[float], part: float) -> float:
    """Return the value below which this part of them lies; 0 of none.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([], 0.5)
    (2.0, 0.0)
    """
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0


def distinct(draws: float, kinds: int) -> float:
    """Return how many different kinds come up on average in so many draws.

    >>> distinct(1e9, 30), round(distinct(10, 1_000_000), 3)
    (30.0, 10.0)
    """
    return kinds * (1.0 - math.exp(-draws / kinds)) if kinds else 0.0
