"""A discrete-event simulation around the real gateway: its balancer, load, health, failover, queue and exchanges; only hosts and time
are made up. The same seed gives the same arrivals and the same hosts to every balancer.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import attrs
from benchmarks.balancing.hosts import Host, Job, Kind, Mood
from benchmarks.clock import Clock

from multiverse_gateway.balancers.least_busy import LeastBusy
from multiverse_gateway.balancers.round_robin import RoundRobin
from multiverse_gateway.balancers.two_choices import TwoChoices
from multiverse_gateway.balancers.weighted import Weighted
from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.health import fresh
from multiverse_gateway.core.probing import due
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.gateway import SWEEP_SECONDS, Gateway
from multiverse_gateway.plugins import probe as named_probe
from multiverse_gateway.protocols import Balancer, LoadView, ProbeResult, Registry
from multiverse_gateway.relay.attempt import Attempt
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers, HeadFacts
from multiverse_gateway.relay.ports import ClientRequest, Sending
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.memory import MemoryStore

MODEL = "model"
CHAT = "/v1/chat/completions"
TOKENS = 120
"""Tokens of an answer, on average."""
PATIENCE = 5.0
"""Seconds to the first token after which an answer is no good."""
PROBE_SECONDS = 0.25
ORACLE = "oracle"
BALANCERS: Mapping[str, Callable[[random.Random], Balancer]] = {
    "round_robin": lambda rng: RoundRobin(),
    "weighted": lambda rng: Weighted(),
    "least_busy": lambda rng: LeastBusy(),
    "two_choices": TwoChoices,
}
"""Each balancer gets its own random generator, so that the seed determines the results."""

_EVENTS = {b"content-type": b"text/event-stream"}
_JSON = {b"content-type": b"application/json"}
_FIRST = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
_LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
_ERROR = b'{"error": {"message": "out of memory"}}'
_ENVELOPE = Envelope(model=MODEL, stream=True, stateful=False, wants_usage=False, path=CHAT, dialect=Dialect.CHAT)


@attrs.define(eq=False)
class User:
    """The client of one request: waits from `arrived` for the first token, then for the end."""

    clock: Clock
    arrived: float
    first: float | None = None
    """Seconds to the first token."""
    good: bool = False

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Take a whole answer: of a stream, only a refusal is one."""
        self.head(status, headers)
        self.end()

    def head(self, status: int, headers: Headers) -> None:
        """Note the answer's begin."""
        if status == 200:
            self.first = self.clock.now - self.arrived

    def body(self, data: bytes) -> None:
        """Read."""

    def end(self) -> None:
        """Note that the answer is whole."""
        self.good = self.first is not None

    def cut(self) -> None:
        """Note nothing: the answer is not good."""


class _Running:
    """A request at a host, as the exchange knows it."""

    def __init__(self, host: Host, job: Job) -> None:
        self._host = host
        self._job = job

    def abort(self) -> None:
        self._host.drop(self._job)

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


class Oracle:
    """Know what no gateway can: when each host would have the first token ready."""

    def __init__(self) -> None:
        self.hosts: dict[ServerId, Host] = {}

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        """Return the server that would be the first to answer."""

        def cost(server: Server) -> float:
            host = self.hosts[server.id]
            return host.wait() / (1 - min(0.999, host.kind.failing))

        return min(servers, key=cost)


class SimulatedGateway(Gateway):
    """The gateway, with hosts in the place of wires."""

    hosts: dict[ServerId, Host]

    def send(self, attempt: Attempt) -> Sending:
        """Give the request to its host."""
        host = self.hosts[attempt.server.id]
        rng = random.Random(f"{attempt.request.request_id} {attempt.search.tried}")  # the same for every balancer

        def began() -> None:
            attempt.head(200, _EVENTS)
            attempt.body(_FIRST)

        def ended() -> None:
            attempt.body(_LAST)
            attempt.end()

        def refused() -> None:
            attempt.head(500, _JSON)
            attempt.body(_ERROR)
            attempt.end()

        def broke(reached: bool) -> None:
            attempt.failed(Failure(FailureClass.BROKEN if reached else FailureClass.CONNECT, "it broke"))

        job = Job(
            tokens=1 + int(rng.expovariate(1 / TOKENS)),
            effort=rng.lognormvariate(0, 0.25),
            fails=rng.random() < host.kind.failing,
            began=began,
            ended=ended,
            refused=refused,
            broke=broke,
        )
        host.take(job)
        return _Running(host, job)


@attrs.frozen(kw_only=True)
class Outcome:
    """What the users of one run lived through: seconds to the first token of those who had one, in order, and how many had a good answer.

    A good answer is whole, and began within `PATIENCE`. `tries` is how many servers a request was sent to, on average.
    """

    asked: int
    firsts: tuple[float, ...]
    good: int
    tries: float = 1.0

    def percentile(self, part: float) -> float:
        """Return the time within which this part of the answers began.

        >>> Outcome(asked=4, firsts=(1.0, 2.0, 3.0, 4.0), good=4).percentile(0.5)
        2.0
        """
        if not self.firsts:
            return float("inf")
        return self.firsts[max(0, math.ceil(part * len(self.firsts)) - 1)]

    @property
    def goodput(self) -> float:
        """Return the part of all requests that got a good answer."""
        return self.good / self.asked


@attrs.define(eq=False)
class World:
    """Hosts, the gateways before them, which know nothing of each other, and time."""

    clock: Clock
    hosts: dict[ServerId, Host]
    gateways: list[SimulatedGateway]
    users: list[User] = attrs.field(factory=list)

    def arrive(self, number: int, gateway: SimulatedGateway) -> None:
        """Let a user ask a gateway."""
        user = User(self.clock, self.clock.now)
        self.users.append(user)
        request = ClientRequest(
            _ENVELOPE,
            body=b"",
            request_id=str(number),
            arrived=self.clock.now,
            caller=Caller(str(number)),
            facts=HeadFacts(),
        )
        exchange = Exchange(gateway, request, user)
        gateway.begin(exchange)
        exchange.start()

    def sweep(self) -> None:
        """Do what gateways do all the time."""
        for gateway in self.gateways:
            gateway.sweep(self.clock.now)
        self.clock.later(SWEEP_SECONDS, self.sweep)

    def probe(self) -> None:
        """Probe what is due."""
        for gateway in self.gateways:
            for server in due(gateway.table.routes.values(), self.clock.now):
                gateway.checks.note_result(_probed(self.hosts[server.id], server, self.clock.now))
        self.clock.later(PROBE_SECONDS, self.probe)

    def is_quiet(self) -> bool:
        """Return whether no request runs."""
        return not any(gateway.exchanges for gateway in self.gateways)


def build(kinds: Sequence[Kind], balancers: Sequence[Balancer], seed: int) -> World:
    """Make hosts of these kinds, and a gateway for each balancer; all servers are registered and well."""
    clock = Clock()
    hosts = {}
    for number, kind in enumerate(kinds):
        hosts[ServerId(f"{number:03}")] = Host(kind, random.Random(f"{seed} host {number}"), lambda: clock.now, clock.later)
    servers = tuple(_server(server_id, host.kind) for server_id, host in hosts.items())
    settings = Settings(database_url="memory://", max_in_flight=100_000)
    world = World(clock, hosts, [])
    for number, balancer in enumerate(balancers):
        gateway = SimulatedGateway(
            settings,
            store=MemoryStore(),
            balancer=balancer,
            probe=named_probe(settings),
            now=lambda: clock.now,
            wall=lambda: clock.now,
            random=random.Random(f"{seed} gateway {number}").random,
        )
        gateway.hosts = hosts
        health = {server.id: fresh(1, now=0.0, wall=0.0, policy=gateway.health_book.policy) for server in servers}
        gateway.follow(Registry(version=1, servers=servers, health=health))
        world.gateways.append(gateway)
    return world


def simulate(
    kinds: Sequence[Kind], *, balancer: str, busy: float, requests: int, seed: int = 1, gateways: int = 1, warm_up: float = 0.1
) -> Outcome:
    """Send so many requests, at random instants, as would keep the hosts `busy` (a part of 1), and tell how their users fared.

    `balancer` is a name as in the settings, or `oracle`. The first `warm_up` of the requests are not counted.
    """
    oracle = Oracle()
    makers: dict[str, Callable[[random.Random], Balancer]] = {**BALANCERS, ORACLE: lambda rng: oracle}
    rngs = [random.Random(f"{seed} balancer {number}") for number in range(gateways)]
    world = build(kinds, [makers[balancer](rng) for rng in rngs], seed)
    oracle.hosts = world.hosts
    arrivals = random.Random(f"{seed} arrivals")
    rate = busy * sum(kind.throughput(TOKENS) for kind in kinds)

    def arrive() -> None:
        world.arrive(len(world.users), arrivals.choice(world.gateways))
        if len(world.users) < requests:
            world.clock.later(arrivals.expovariate(rate), arrive)

    world.clock.later(0.0, arrive)
    world.sweep()
    world.probe()
    world.clock.run(lambda: len(world.users) == requests and world.is_quiet())
    tries = sum(gateway.usage_book.totals["attempts"] for gateway in world.gateways) / requests
    return outcome(world.users[int(warm_up * requests) :], tries)


def outcome(users: Sequence[User], tries: float = 1.0) -> Outcome:
    """Sum up what users lived through."""
    firsts = sorted(user.first for user in users if user.first is not None)
    good = sum(user.good and user.first is not None and user.first <= PATIENCE for user in users)
    return Outcome(asked=len(users), firsts=tuple(firsts), good=good, tries=tries)


def _server(server_id: ServerId, kind: Kind) -> Server:
    return Server(
        id=server_id,
        model_name=MODEL,
        endpoint_url=f"http://{server_id}.example",
        max_concurrency=kind.slots if kind.declares_slots else None,
        registered_at=0.0,
        created_at=0.0,
        updated_at=0.0,
    )


def _probed(host: Host, server: Server, now: float) -> ProbeResult:
    """Probe a host: it lists its models even while every second request of it fails."""
    passed = host.mood is not Mood.DOWN
    return ProbeResult(
        server_id=server.id,
        generation=server.generation,
        passed=passed,
        checked_at=now,
        duration=0.0,
        reason=None if passed else "refused",
    )
