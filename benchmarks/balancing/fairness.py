"""Measure the fair queue: one careless client beside a class, and six clients that all want everything.

Real are the queue, the exchanges and the gateway around them; the server, its clients and time are made up, and so is the limit on
requests at once. The first-come queue and the variants that lack a part of the fair one are here for comparison.
"""

import argparse
import logging
import math
import random
import time
import timeit
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from itertools import combinations

import attrs
from benchmarks.balancing.hosts import Kind
from benchmarks.balancing.simulation import _server
from benchmarks.clock import Clock

from multiverse_gateway.balancers.round_robin import RoundRobin
from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.fairness import (
    OUTPUT_WEIGHT,
    AtOnce,
    Band,
    FairQueue,
    Flow,
    Pool,
    Ticket,
    jain,
)
from multiverse_gateway.core.health import fresh
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.gateway import BULK_QUEUE_SECONDS, SWEEP_SECONDS, Gateway
from multiverse_gateway.plugins import probe as named_probe
from multiverse_gateway.protocols import Registry
from multiverse_gateway.relay.attempt import Attempt
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers, HeadFacts
from multiverse_gateway.relay.ports import ClientRequest, Limits, Sending
from multiverse_gateway.relay.waiting import Waiter, WaitingRoom
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.memory import MemoryStore

MODEL = "model"
SLOTS = 4
TOKENS_PER_SECOND = 30.0
PREFILL_PER_SECOND = 1000.0
AGAIN_SECONDS = 2.0
"""When the script sends a refused request again."""
WARM_UP = 300.0
_JSON = {b"content-type": b"application/json"}
_ENVELOPE = Envelope(model=MODEL, stream=False, stateful=False, wants_usage=False, path="/v1/chat/completions", dialect=Dialect.CHAT)


class FirstCome(FairQueue):
    """The queue as it was: first come, first served, and the last to come is dropped."""

    def pick(self, name: str, now: float, *, unmet: Collection[Hashable] = ()) -> Ticket | None:
        able = (ticket for ticket in self.order(name) if ticket.request.needs not in unmet)
        return min(able, key=lambda ticket: ticket.number, default=None)

    def overflow(self, name: str) -> Ticket | None:
        return _newest(self, name)


class TailDrop(FairQueue):
    """Fair order, but the last to come is dropped."""

    def overflow(self, name: str) -> Ticket | None:
        return _newest(self, name)


def _newest(queue: FairQueue, name: str) -> Ticket | None:
    return max(queue.order(name), key=lambda ticket: ticket.number) if queue.waiting(name) > queue.max_waiting else None


class PlainClient:
    """The client of an exchange whose answer comes whole."""

    status = 0

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        self.status = status

    def head(self, status: int, headers: Headers) -> None:
        raise AssertionError("a plain answer has no head of its own")

    def body(self, data: bytes) -> None:
        raise AssertionError("a plain answer comes whole")

    def end(self) -> None:
        raise AssertionError("a plain answer comes whole")

    def cut(self) -> None:
        raise AssertionError("no server breaks")


@attrs.define(eq=False)
class Call(PlainClient):
    """One request of a person."""

    person: "Person"
    prompt: int
    answer_tokens: int
    arrived: float
    began: float | None = None
    status: int = 0


class _Running:
    """A request on the server. No client leaves, so nothing is ever aborted."""

    def abort(self) -> None:
        raise AssertionError("nobody leaves")

    def pause(self) -> None:
        """Do nothing: there is no wire."""

    def resume(self) -> None:
        """Do nothing."""


class MeasuredRoom(WaitingRoom):
    """The gateway's room, which measures how busy the slots are."""

    def __init__(self, queue: FairQueue, measure: Callable[[], None]) -> None:
        super().__init__(queue.max_waiting)
        self.queue = queue
        self.measure = measure

    def join(self, waiter: Waiter, now: float) -> bool:
        self.measure()
        return super().join(waiter, now)

    def slot_freed(self, model: str, now: float, pool: Hashable = None) -> None:
        self.measure()
        super().slot_freed(model, now, pool)


class SimulatedGateway(Gateway):
    """The gateway with one server of `SLOTS` slots in the place of wires."""

    clock: Clock
    max_at_once: int
    has_shares: bool
    busy_seconds = 0.0
    waiting_seconds = 0.0
    """Seconds in which any request waited, and slot seconds in use meanwhile."""
    used_while_waiting = 0.0
    _measured_at = 0.0

    def measure(self) -> None:
        """Add up how busy the slots were since the last call."""
        seconds, self._measured_at = self.clock.now - self._measured_at, self.clock.now
        self.busy_seconds += seconds * self.load.total
        if self.room.queue.anybody_waits:
            self.waiting_seconds += seconds
            self.used_while_waiting += seconds * self.load.total

    def send(self, attempt: Attempt) -> Sending:
        call = attempt.exchange.response.client
        assert isinstance(call, Call)
        call.began = self.clock.now

        def end() -> None:
            self.measure()
            attempt.head(200, _JSON)
            usage = b'"usage":{"prompt_tokens":%d,"completion_tokens":%d}' % (call.prompt, call.answer_tokens)
            attempt.body(b'{"choices":[{"message":{"content":"%b"}}],%b}' % (b"word" * call.answer_tokens, usage))
            attempt.end()

        self.clock.later(call.prompt / PREFILL_PER_SECOND + call.answer_tokens / TOKENS_PER_SECOND, end)
        return _Running()

    def finished(self, exchange: Exchange) -> None:
        call = exchange.response.client
        assert isinstance(call, Call)
        super().finished(exchange)
        call.person.finished(call)

    def sweep(self, now: float) -> None:
        self.measure()
        super().sweep(now)

    def _note_pools(self) -> None:
        if self.has_shares:
            super()._note_pools()


Sizes = Callable[[random.Random], int]


def about(mean: float, most: float = math.inf) -> Sizes:
    """Return sizes with a long tail: log-normal, sigma 0.5, cut at `most`."""
    return lambda rng: max(1, int(min(most, rng.lognormvariate(math.log(mean) - 0.125, 0.5))))


ANSWERS = about(250)


@attrs.frozen(kw_only=True)
class Habit:
    """What a client does: so many `loops` at once of thinking (seconds on average), sending a request, and waiting for its answer."""

    loops: int = 1
    think: float = 0.0
    prompt: int = 300
    tokens: Sizes = ANSWERS
    band: Band = Band.INTERACTIVE
    weight: float = 1.0


@attrs.define(eq=False)
class Person:
    """One client at work."""

    name: str
    habit: Habit
    gateway: SimulatedGateway
    rng: random.Random
    waits: list[float] = attrs.field(factory=list)
    refused: int = 0
    served: float = 0.0
    longest: float = 0.0
    """Seconds that the longest answer took."""
    totals: list[tuple[float, float]] = attrs.field(factory=list)
    """Weighted tokens served up to an instant."""

    def begin(self) -> None:
        """Start all loops, spread over the first seconds of thinking."""
        for _ in range(self.habit.loops):
            self._after(self._thinking())

    def _thinking(self) -> float:
        return self.rng.expovariate(1 / self.habit.think) if self.habit.think else 0.0

    def _after(self, seconds: float) -> None:
        self.gateway.clock.later(seconds, self._send)

    def _send(self) -> None:
        gateway, habit = self.gateway, self.habit
        gateway.measure()
        call = Call(self, habit.prompt, habit.tokens(self.rng), gateway.clock.now)
        request = ClientRequest(
            _ENVELOPE,
            body=b" " * (4 * habit.prompt),
            request_id="",
            arrived=gateway.clock.now,
            caller=Caller(self.name, max_at_once=gateway.max_at_once),
            facts=HeadFacts(is_bulk=habit.band is Band.BULK),
        )
        exchange = Exchange(gateway, request, call)
        exchange.search.weight = habit.weight
        gateway.begin(exchange)
        exchange.start()

    def finished(self, call: Call) -> None:
        """Count a request, and go on."""
        now, counts = self.gateway.clock.now, call.arrived >= WARM_UP
        if call.status == 200:
            assert call.began is not None
            self.longest = max(self.longest, now - call.began)
            if counts:
                self.waits.append(call.began - call.arrived)
            if now >= WARM_UP:
                self.served += call.prompt + OUTPUT_WEIGHT * call.answer_tokens
                self.totals.append((now, self.served))
            self._after(self._thinking())
        else:
            self.refused += counts
            self._after(self._thinking() or AGAIN_SECONDS)


@attrs.frozen(kw_only=True)
class Rules:
    """A queue and its limits."""

    kind: type[FairQueue] = FairQueue
    places: int = 256
    timeout: float = 60.0
    shares: bool = False
    """Whether a client may hold only a share of the slots."""
    at_once: int = 0


def run(rules: Rules, habits: Mapping[str, Habit], *, seed: int, minutes: float) -> tuple[SimulatedGateway, list[Person]]:
    """Let these clients at one model for so many minutes after the warm-up."""
    clock = Clock()
    gateway = SimulatedGateway(
        Settings(database_url="memory://", max_in_flight=100_000),
        store=MemoryStore(),
        balancer=RoundRobin(),
        probe=named_probe(Settings(database_url="memory://")),
        now=lambda: clock.now,
        wall=lambda: clock.now,
        random=random.Random(f"{seed} gateway").random,
    )
    gateway.clock = clock
    gateway.has_shares = rules.shares
    gateway.max_at_once = rules.at_once
    gateway.room = MeasuredRoom(rules.kind(max_waiting=rules.places), gateway.measure)
    gateway.limits = Limits(
        request_timeout=1e6,
        first_byte_timeout=1e6,
        queue_timeout=rules.timeout,
        bulk_queue_timeout=max(rules.timeout, BULK_QUEUE_SECONDS),
    )
    server = _server(ServerId("lab"), Kind(slots=SLOTS, declares_slots=True))
    health = {server.id: fresh(1, now=0.0, wall=0.0, policy=gateway.health_book.policy)}
    gateway.follow(Registry(version=1, servers=(server,), health=health))
    if not rules.shares:
        gateway.room.queue.serve({server.id: Pool((MODEL,), None)})
    people = [Person(name, habit, gateway, random.Random(f"{seed} {name}")) for name, habit in habits.items()]

    def sweep() -> None:
        gateway.sweep(clock.now)
        clock.later(SWEEP_SECONDS, sweep)

    def settle() -> None:
        gateway.measure()
        gateway.busy_seconds = gateway.waiting_seconds = gateway.used_while_waiting = 0.0

    for person in people:
        person.begin()
    sweep()
    clock.later(WARM_UP, settle)
    end = WARM_UP + 60 * minutes
    clock.run(lambda: clock.now >= end)
    gateway.measure()
    return gateway, people


def percentile(values: Sequence[float], part: float) -> float:
    """Return the value that this part of all values does not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)] if values else math.nan


LIGHT = Habit(think=60.0)
FLOOD = Habit(loops=100, prompt=2000, tokens=about(800))
SCRIPT = "script"


def light(count: int) -> dict[str, Habit]:
    """Return so many people who read and think between their requests."""
    return {f"person {number}": LIGHT for number in range(count)}


OLD = Rules(kind=FirstCome, places=32, timeout=10.0)
OLD_LARGE = Rules(kind=FirstCome)
FAIR = Rules()
SHARES = Rules(shares=True)
BULK = attrs.evolve(FLOOD, band=Band.BULK)
ROWS: Sequence[tuple[str, Rules, int, Habit | None]] = (
    ("no script, first come, 32 places, 10 s", OLD, 20, None),
    ("no script, the fair queue", SHARES, 20, None),
    ("script, first come, 32 places, 10 s", OLD, 20, FLOOD),
    ("script, first come, 256 places, 60 s", OLD_LARGE, 20, FLOOD),
    ("fair order, 32 places, drops the last to come", Rules(kind=TailDrop, places=32), 20, FLOOD),
    ("fair order, 32 places, drops from the longest", Rules(places=32), 20, FLOOD),
    ("fair order, 256 places, 60 s", FAIR, 20, FLOOD),
    ("the same, and at most half of the slots", SHARES, 20, FLOOD),
    ("the same, and at most 64 at once", attrs.evolve(SHARES, at_once=64), 20, FLOOD),
    ("half of the slots, and the script is bulk", SHARES, 20, BULK),
    ("half of the slots, answers of 500 tokens at most", SHARES, 20, attrs.evolve(FLOOD, tokens=about(400, 500))),
    ("half of the slots, a flood of small requests", SHARES, 20, attrs.evolve(FLOOD, prompt=100, tokens=about(60))),
    ("40 people, first come, 256 places, 60 s", OLD_LARGE, 40, FLOOD),
    ("40 people, half of the slots", SHARES, 40, FLOOD),
)
HEADS = ("", "wait p50 s", "wait p95 s", "refused", "script's share", "work/s", "slots busy", "while any wait", "longest answer s")


def line(name: str, rules: Rules, count: int, flood: Habit | None, *, seeds: int, minutes: float) -> str:
    """Return one row of the table: waits and refusals of the people, and who got how much."""
    waits: list[float] = []
    refused = script = everybody = busy = used = waiting = longest = 0.0
    for seed in range(1, seeds + 1):
        gateway, people = run(rules, light(count) | ({SCRIPT: flood} if flood else {}), seed=seed, minutes=minutes)
        for person in people:
            everybody += person.served
            longest = max(longest, person.longest)
            if person.name == SCRIPT:
                script += person.served
            else:
                waits += person.waits
                refused += person.refused
        busy += gateway.busy_seconds
        used += gateway.used_while_waiting
        waiting += gateway.waiting_seconds
    seconds = 60 * minutes * seeds
    cells = (
        f"{percentile(waits, 0.5):.1f}",
        f"{percentile(waits, 0.95):.1f}",
        f"{refused / (len(waits) + refused):.1%}",
        f"{script / everybody:.0%}" if flood else "-",
        f"{everybody / seconds:.0f}",
        f"{busy / seconds / SLOTS:.1%}",
        f"{used / waiting / SLOTS:.1%}" if waiting else "-",
        f"{longest:.0f}",
    )
    return f"| {name} | {' | '.join(cells)} |"


GREEDY: Mapping[str, Habit] = {
    "a": Habit(loops=32, prompt=100, tokens=about(50)),
    "b": Habit(loops=16, prompt=300, tokens=about(250)),
    "c": Habit(loops=16, prompt=1000, tokens=about(100)),
    "d": Habit(loops=8, prompt=2000, tokens=about(800)),
    "e": Habit(loops=8, prompt=6000, tokens=about(400)),
    "f": Habit(loops=8, prompt=12_000, tokens=about(1000, 2000)),
}
"""Six clients that always want more, with requests of very different sizes; the dearest costs 16,000 weighted tokens."""
PATIENT = 1e5
GREEDY_ROWS: Sequence[tuple[str, Rules]] = (
    ("first come", Rules(kind=FirstCome, timeout=PATIENT)),
    ("fair order", Rules(timeout=PATIENT)),
    ("fair order, and at most half of the slots", Rules(timeout=PATIENT, shares=True)),
)
GREEDY_HEADS = ("", "Jain's index", "largest gap", "share of the one with weight 2")


def largest_gap(people: Sequence[Person]) -> float:
    """Return the largest difference of what two clients were served, over any two clients and any interval."""
    events = sorted((instant, person.name, served) for person in people for instant, served in person.totals)
    totals = dict.fromkeys((person.name for person in people), 0.0)
    pairs = list(combinations(totals, 2))
    most, least = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)
    for _, name, served in events:
        totals[name] = served
        for pair in pairs:
            if name in pair:
                difference = totals[pair[0]] - totals[pair[1]]
                most[pair], least[pair] = max(most[pair], difference), min(least[pair], difference)
    return max(most[pair] - least[pair] for pair in pairs)


def greedy_line(name: str, rules: Rules, *, seed: int, minutes: float) -> str:
    """Return one row of the second table."""
    _, people = run(rules, GREEDY, seed=seed, minutes=minutes)
    heavier = {**GREEDY, "b": attrs.evolve(GREEDY["b"], weight=2.0)}
    _, weighted = run(rules, heavier, seed=seed, minutes=minutes)
    part = next(person.served for person in weighted if person.name == "b") / sum(person.served for person in weighted)
    return f"| {name} | {jain(person.served for person in people):.3f} | {largest_gap(people):,.0f} | {part:.1%} |"


class NoQueue(FairQueue):
    """A queue that does nothing, to see what the fair one costs."""

    def may_begin(self, ticket: Ticket, now: float) -> bool:
        return True

    def begin(self, ticket: Ticket, now: float, pool: Hashable = None) -> None:
        pass

    def release(self, ticket: Ticket) -> None:
        pass

    def end(self, ticket: Ticket, now: float) -> None:
        pass


class _SilentGateway(Gateway):
    """The gateway without wires: the caller answers in the place of its only server."""

    def send(self, attempt: Attempt) -> Sending:
        return _Running()


def _whole_request(queue: FairQueue) -> Callable[[], None]:
    """Return an action: a request that is answered at once by a server with a slot."""
    settings = Settings(database_url="memory://")
    gateway = _SilentGateway(settings, store=MemoryStore(), balancer=RoundRobin(), probe=named_probe(settings), now=lambda: 0.0)
    gateway.room.queue = queue
    server = _server(ServerId("lab"), Kind(slots=SLOTS, declares_slots=True))
    health = {server.id: fresh(1, now=0.0, wall=0.0, policy=gateway.health_book.policy)}
    gateway.follow(Registry(version=1, servers=(server,), health=health))
    client = PlainClient()

    def request() -> None:
        exchange = Exchange(gateway, ClientRequest(_ENVELOPE, b"{}", "", 0.0, Caller("key"), HeadFacts()), client)
        gateway.begin(exchange)
        exchange.start()
        attempt = exchange.attempt
        assert attempt is not None
        attempt.head(200, _JSON)
        attempt.body(b'{"choices":[]}')
        attempt.end()

    return request


class _Anything:
    """A request that costs the same as every other."""

    needs = None

    def estimated_cost(self) -> float:
        return 500.0

    def actual_cost(self) -> float:
        return 450.0


def prices() -> Iterator[tuple[str, float]]:
    """Return what the queue costs in microseconds: the least of many rounds, because other programs run here, too."""
    request = _Anything()
    flows = [Flow(f"key {number}") for number in range(60)]
    queue = FairQueue()
    queue.serve({"lab": Pool((MODEL,), SLOTS)})
    at_once = AtOnce()

    def pass_through() -> None:
        ticket = Ticket(MODEL, flows[0], request)
        if queue.may_begin(ticket, 1.0):
            queue.begin(ticket, 1.0, "lab")
        queue.end(ticket, 2.0)

    def count() -> None:
        at_once.take("key")
        at_once.give_back("key")

    yield "a request while nothing waits", _price(pass_through)
    requests = [_whole_request(kind()) for kind in (FairQueue, NoQueue)]
    whole, rest = map(min, zip(*([_price(request, 100, 20) for request in requests] for _ in range(20)), strict=True))
    yield "the same, as part of its exchange", whole - rest
    yield "its whole exchange, without door and wire", whole
    yield "counting it among those at once", _price(count)
    for number in range(SLOTS):
        queue.begin(Ticket(MODEL, flows[number], request), 0.0, "lab")
    for number in range(256):
        queue.join(Ticket(MODEL, flows[number % 60], request), 1.0)
    yield "choosing the next of 256 requests of 60 flows", _price(lambda: queue.pick(MODEL, 2.0), 20)
    yield "all 256 places", _price(lambda: queue.places(MODEL, 2.0), 5)
    queue.max_waiting = 255
    yield "choosing which request to drop", _price(lambda: queue.overflow(MODEL), 20)


def _price(action: Callable[[], object], count: int = 1000, rounds: int = 200) -> float:
    return min(timeit.repeat(action, number=count, repeat=rounds)) / count * 1e6


def main(arguments: Sequence[str]) -> int:
    """Print the tables of `docs/explanation/fairness.md`."""
    parser = argparse.ArgumentParser(prog="nox -s balancing -- fairness", description=__doc__)
    parser.add_argument("--minutes", type=float, default=55.0, help="simulated minutes that count, after 5 of warm-up")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    began = time.monotonic()
    _print_heads(HEADS)
    for name, rules, count, flood in ROWS:
        print(line(name, rules, count, flood, seeds=given.seeds, minutes=given.minutes), flush=True)
    _print_heads(GREEDY_HEADS)
    for name, rules in GREEDY_ROWS:
        print(greedy_line(name, rules, seed=1, minutes=given.minutes), flush=True)
    _print_heads(("", "µs"))
    for name, price in prices():
        print(f"| {name} | {price:.2f} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")
    return 0


def _print_heads(heads: Sequence[str]) -> None:
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
