"""Exchanges without I/O: an engine made of the real core, a client and sendings that record and refuse what the rules forbid."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import attrs

from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.dialects import dialect_of
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.health import AttemptFailed, Health, HealthEvent, HealthPolicy, fresh
from multiverse_gateway.core.load import Admission, ByteBudget, Load
from multiverse_gateway.core.routing import (
    Candidates,
    RoutingTable,
    build_table,
    candidates,
    candidates_at,
    has_slot,
    pools_of,
    with_health,
)
from multiverse_gateway.core.servers import Capabilities, Server, ServerId
from multiverse_gateway.core.usage import OPERATOR
from multiverse_gateway.health_book import HealthBook
from multiverse_gateway.relay.attempt import Attempt
from multiverse_gateway.relay.commentary import LOOK_SECONDS, Commentary
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers, HeadFacts
from multiverse_gateway.relay.ports import Client, ClientRequest, Limits, Phase
from multiverse_gateway.relay.requests import Requests
from multiverse_gateway.relay.waiting import WaitingRoom
from multiverse_gateway.stores.memory import MemoryStore

MODEL = "tiny"
CHAT = "/v1/chat/completions"
SPEECH = "/v1/audio/speech"
JSON = {b"content-type": b"application/json"}
EVENTS = {b"content-type": b"text/event-stream"}
_COMMENT = re.compile(rb"^: (?:queue|prefill|headers) [^\n]*\n", re.MULTILINE)


def server(name: str, *, model: str = MODEL, cap: int | None = None, streaming: bool = True, registered_at: float = 0.0) -> Server:
    """Return a server; its id is its name."""
    return Server(
        id=ServerId(name),
        model_name=model,
        endpoint_url=f"http://{name}.example",
        capabilities=Capabilities(streaming=streaming),
        max_concurrency=cap,
        registered_at=registered_at,
        created_at=0.0,
        updated_at=0.0,
    )


def envelope(
    *, stream: bool = False, path: str = CHAT, model: str = MODEL, stateful: bool = False, response_id: str | None = None
) -> Envelope:
    """Return what the gateway knows of a request."""
    dialect = dialect_of(path)
    return Envelope(
        model=model,
        stream=stream,
        stateful=stateful,
        wants_usage=False,
        path=path,
        dialect=dialect,
        leaves_usage=stream,
        response_id=response_id,
        written_model=model,
    )


def failure(kind: FailureClass, status: int | None = None) -> Failure:
    """Return a failure as the wire tells it."""
    return Failure(kind, "it broke", status)


@attrs.define(eq=False)
class RecordingClient:
    """The door's side of one response; refuses everything that no client could be told."""

    headers: dict[bytes, bytes] = attrs.field(factory=dict)
    status: int | None = None
    length: int | None = None
    pieces: list[bytes] = attrs.field(factory=list)
    ended: bool = False
    was_cut: bool = False
    gone: bool = False
    high_water: int | None = None
    is_slow: bool = False
    """Whether a whole answer stays in the door's hands until the test calls `taken`."""
    exchange: Exchange | None = None

    @property
    def data(self) -> bytes:
        """Everything of the body so far."""
        return b"".join(self.pieces)

    @property
    def comments(self) -> list[bytes]:
        """The gateway's own comments."""
        return _COMMENT.findall(self.data)

    @property
    def relayed(self) -> bytes:
        """The body without them."""
        return _COMMENT.sub(b"", self.data)

    @property
    def is_silent(self) -> bool:
        """Return whether nothing was sent yet, not even a head."""
        return self.status is None

    @property
    def is_finished(self) -> bool:
        """Return whether the response is over, whole or cut."""
        return self.ended or self.was_cut

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Take a whole response."""
        self.head(status, headers)
        self.length = len(body)
        if body:
            self.body(body)
        self.end()
        if self.exchange is not None and not self.is_slow:
            self.exchange.taken()

    def head(self, status: int, headers: Headers) -> None:
        """Take the only head."""
        assert not self.gone
        assert self.status is None
        self.status = status
        self.headers = dict(headers)
        assert len(self.headers) == len(headers), "a header stands twice"

    def body(self, data: bytes) -> None:
        """Take a piece between head and end; with a `high_water`, ask for a pause beyond it as a door does."""
        assert not self.gone
        assert self.status is not None
        assert not self.is_finished
        assert data
        self.pieces.append(data)
        if self.high_water is not None and self.exchange is not None and len(self.data) > self.high_water:
            self.exchange.client_clogged()

    def end(self) -> None:
        """Take the end of a whole response."""
        self._finish()
        self.ended = True

    def cut(self) -> None:
        """Take the end of a broken one."""
        self._finish()
        self.was_cut = True

    def _finish(self) -> None:
        assert not self.gone
        assert self.status is not None
        assert not self.is_finished


@attrs.define(eq=False)
class RecordingSending:
    """One attempt, driven by the test: what it says reaches the exchange as long as the wire would let it."""

    attempt: Attempt
    exchange: Exchange
    aborted: bool = False
    over: bool = False
    paused: bool = False

    @property
    def server(self) -> Server:
        """The server of the attempt."""
        return self.attempt.server

    @property
    def is_live(self) -> bool:
        """Return whether the exchange may still receive events."""
        return not self.aborted and not self.over

    def abort(self) -> None:
        """Note that the connection was closed."""
        assert not self.over, "nothing is left to abort"
        self.aborted = True

    def pause(self) -> None:
        """Note that reading stopped."""
        assert self.is_live
        self.paused = True

    def resume(self) -> None:
        """Note that reading goes on."""
        assert self.is_live
        self.paused = False

    def head(self, status: int = 200, headers: Mapping[bytes, bytes] = JSON) -> None:
        """Send the head of the answer."""
        assert self.is_live
        self.attempt.head(status, headers)

    def body(self, *pieces: bytes) -> None:
        """Send pieces of the body until the exchange takes no more."""
        for piece in pieces:
            if self.is_live:
                self.attempt.body(piece)

    def end(self) -> None:
        """Report that the answer is complete, unless it was aborted."""
        if self.is_live:
            self.over = True
            self.attempt.end()

    def fail(self, kind: FailureClass = FailureClass.BROKEN) -> None:
        """Break."""
        assert self.is_live
        self.over = True
        self.attempt.failed(failure(kind))

    def answer(self, status: int = 200, headers: Mapping[bytes, bytes] = JSON, body: bytes = b'{"ok":true}') -> None:
        """Send a whole answer."""
        self.head(status, headers)
        self.body(*([body] if body else []))
        self.end()

    def stream(self, *pieces: bytes) -> None:
        """Begin a stream of events."""
        self.head(200, EVENTS)
        self.body(*pieces)


@attrs.define(eq=False)
class RecordingPlaces:
    """The places of stored responses, as the test says them."""

    locating: list[Exchange] = attrs.field(factory=list)
    stored: list[tuple[ServerId, str]] = attrs.field(factory=list)

    def locate(self, exchange: Exchange) -> None:
        """Note who looks for a stored response; the test says where it is."""
        self.locating.append(exchange)

    def keep(self, source: str, server: Server, response_id: str) -> None:
        """Note the response and the server that has it."""
        self.stored.append((server.id, response_id))


@attrs.define(eq=False)
class RecordingChecks:
    """The checks that exchanges ask for; the test says what they find."""

    asked: list[tuple[Server, Callable[[bool], None]]] = attrs.field(factory=list)

    def ask(self, server: Server, probed: Callable[[bool], None]) -> None:
        """Note the server, and what is to be called with the result."""
        self.asked.append((server, probed))


class RecordingHealth(HealthBook):
    """The real health of the servers; it notes what was reported."""

    def __init__(self, policy: HealthPolicy, **values: Any) -> None:
        super().__init__(policy, **values)
        self.reports: list[tuple[ServerId, HealthEvent]] = []
        self.good: list[ServerId] = []

    def passed(self, server: Server, path: str) -> None:
        """Note the server."""
        self.good.append(server.id)
        super().passed(server, path)

    def report(self, server_id: ServerId, event: HealthEvent) -> None:
        """Note the event."""
        self.reports.append((server_id, event))
        super().report(server_id, event)


def sent_by(caller: str, asked: Envelope, arrived: float, *, body: bytes = b"{}") -> ClientRequest:
    """Return a plain request of a caller who is counted by this name."""
    return ClientRequest(asked, body, "request-1", arrived, Caller(caller, caller), HeadFacts())


@attrs.define
class RecordingCharge:
    """What a request has used up of its client's limits; counts how often that was taken back."""

    taken_back: int = 0

    def take_back(self) -> None:
        """Count."""
        self.taken_back += 1


@attrs.define(eq=False)
class ChargedRequest(ClientRequest):
    """A request that notes whether it was taken back."""

    charge: RecordingCharge | None = None

    def take_back(self) -> None:
        """Count."""
        if self.charge is not None:
            self.charge.take_back()


class StrictBudget(ByteBudget):
    """The real budget; it refuses to get back more than it gave."""

    def release(self, count: int) -> None:
        """Count the bytes no more."""
        super().release(count)
        assert self.held >= 0


@attrs.define(eq=False)
class RecordingEngine:
    """The gateway without sockets, store and tasks: real routing, health, load and queue; time passes when the test says so."""

    servers: Sequence[Server] = ()
    limits: Limits = attrs.field(factory=Limits)
    max_queue: int = 32
    uncapped_slots: int | None = None
    clock: float = 1000.0
    stopped: float = 0.0
    """For how long the process was stopped, until an exchange asks."""
    random_number: float = 0.5
    answer_budget: int = 1 << 40
    load: Load = attrs.field(factory=Load, init=False)
    admission: Admission = attrs.field(init=False)
    room: WaitingRoom = attrs.field(init=False)
    requests: Requests = attrs.field(factory=lambda: Requests(count_stream_tokens=False), init=False)
    commentary: Commentary = attrs.field(init=False)
    health_book: RecordingHealth = attrs.field(init=False)
    sendings: list[RecordingSending] = attrs.field(factory=list, init=False)
    exchanges: list[Exchange] = attrs.field(factory=list, init=False)
    over: list[Exchange] = attrs.field(factory=list, init=False)
    calls: list[Callable[[], None]] = attrs.field(factory=list, init=False)
    timers: list[tuple[float, Callable[[], None]]] = attrs.field(factory=list, init=False)
    checks: RecordingChecks = attrs.field(factory=RecordingChecks, init=False)
    refused_retries: int = attrs.field(default=0, init=False)
    responses: RecordingPlaces = attrs.field(factory=RecordingPlaces, init=False)

    @admission.default
    def _make_admission(self) -> Admission:
        return Admission(answers=StrictBudget(self.answer_budget))

    @room.default
    def _make_room(self) -> WaitingRoom:
        return WaitingRoom(self.max_queue, self.uncapped_slots)

    @commentary.default
    def _make_commentary(self) -> Commentary:
        return Commentary(self.room.queue)

    @health_book.default
    def _make_health(self) -> RecordingHealth:
        book = RecordingHealth(
            HealthPolicy(), store=MemoryStore(), now=self.now, wall=self.wall, random=self.random, changed=self._health_changed
        )
        health = {server.id: fresh(1, now=self.clock, wall=self.clock, policy=book.policy) for server in self.servers}
        book.table = build_table(1, self.servers, health)
        return book

    @property
    def table(self) -> RoutingTable:
        """The servers and their health."""
        return self.health_book.table

    @table.setter
    def table(self, table: RoutingTable) -> None:
        self.health_book.table = table

    def _health_changed(self, server: Server, before: Health, after: Health) -> None:
        if after.state is not before.state:
            self._note_pools()
            self.slot_freed(server.model_name)

    def __attrs_post_init__(self) -> None:
        self._note_pools()

    def _note_pools(self) -> None:
        self.room.queue.serve(pools_of(self.table))

    # The port

    def now(self) -> float:
        """Return the test's clock."""
        return self.clock

    def wall(self) -> float:
        """Return the test's clock."""
        return self.clock

    def random(self) -> float:
        """Return the random number that the test has chosen."""
        return self.random_number

    def candidates(self, envelope: Envelope, excluded: frozenset[ServerId], now: float) -> Candidates | None:
        """Ask the real routing."""
        model = self.table.models.get(envelope.model)
        if model is None:
            return None
        if envelope.server_id is not None:
            return candidates_at(model, self.load, envelope, excluded=excluded, now=now)
        if envelope.needs is not None:
            model = model.suited(envelope.needs, excluded)
        return candidates(model, self.load, stream=envelope.stream, path=envelope.path, excluded=excluded, now=now)

    def is_registered(self, server: Server) -> bool:
        """Ask the table, as the gateway does."""
        route = self.table.routes.get(server.id)
        return route is not None and route.server.generation == server.generation

    def has_slot(self, server: Server) -> bool:
        """Ask the table and the load, as the gateway does."""
        return self.is_registered(server) and has_slot(self.table.routes[server.id], self.load)

    def model_names(self) -> Sequence[str]:
        """Return the names in the table."""
        return sorted(self.table.models)

    def pick(self, servers: Sequence[Server], envelope: Envelope) -> Server:
        """Take the first."""
        return servers[0]

    def send(self, attempt: Attempt) -> RecordingSending:
        """Note the attempt; the earlier one of the exchange must be closed by now."""
        server, exchange = attempt.server, attempt.exchange
        assert isinstance(exchange, Exchange)
        assert not [sending for sending in self.of(exchange) if sending.is_live], "two attempts at a time"
        is_within = server.max_concurrency is None or self.load.in_flight(server.id) <= server.max_concurrency
        assert is_within or attempt.request.envelope.is_lookup, "over the cap"
        self.requests.write(server, attempt.request, asks_usage=attempt.asks_usage)
        sending = RecordingSending(attempt, exchange)
        self.sendings.append(sending)
        return sending

    @property
    def answer_bytes(self) -> int:
        """The bytes that are held of all answers."""
        return self.admission.answers.held

    @property
    def usage_refusers(self) -> list[ServerId]:
        """The servers that are not asked for token counts any more."""
        return [server.id for server in self.servers if self.requests.refuses_usage(server)]

    def soon(self, call: Callable[[], None]) -> None:
        """Keep the call for the test's next `turn`."""
        self.calls.append(call)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Keep the call until the test has let so much time pass."""
        self.timers.append((self.clock + seconds, call))

    def notice_pause(self, now: float) -> None:
        """Postpone every exchange by the pause that the test made, once."""
        stopped, self.stopped = self.stopped, 0.0
        for exchange in self.exchanges:
            exchange.postpone(stopped)

    def budget_refused(self) -> None:
        """Count."""
        self.refused_retries += 1

    def explain(self, exchange: Exchange, server: Server, now: float) -> Mapping[str, object]:
        """Return the server that was chosen."""
        return {"server": server.id}

    def slot_freed(self, model: str) -> None:
        """Offer a slot, as the gateway does."""
        self.room.slot_freed(model, self.clock)

    def finished(self, exchange: Exchange) -> None:
        """Note the end, which comes once."""
        assert exchange not in self.over
        self.commentary.discard(exchange)
        self.room.at_once.give_back(exchange.request.caller.quota)
        self.over.append(exchange)

    # For tests

    def of(self, exchange: Exchange) -> list[RecordingSending]:
        """Return the attempts of an exchange."""
        return [sending for sending in self.sendings if sending.exchange is exchange]

    def exchange(
        self,
        client: Client,
        *,
        asked: Envelope | None = None,
        source: str = "",
        is_bulk: bool = False,
        wants_comments: bool = False,
        max_at_once: int = 0,
        charge: RecordingCharge | None = None,
        caller: str = "",
        explains: bool = False,
        body: bytes = b"{}",
        **fields: object,
    ) -> Exchange:
        """Make an exchange that is not started yet, of the envelope or of one with the `fields`."""
        request = ChargedRequest(
            asked or envelope(**fields),  # type: ignore[arg-type]
            body=body,
            request_id=f"request-{len(self.exchanges)}",
            arrived=self.clock,
            caller=Caller(source or f"client-{len(self.exchanges)}", OPERATOR if explains else caller, max_at_once=max_at_once),
            facts=HeadFacts(is_bulk=is_bulk, wants_comments=wants_comments, explains=explains),
            charge=charge,
        )
        exchange = Exchange(self, request, client)
        self.room.at_once.take(exchange.request.caller.quota)
        if exchange.response.comments is not None:
            self.commentary.add(exchange)
        self.exchanges.append(exchange)
        exchange.number = len(self.exchanges)
        return exchange

    def begin(self, client: RecordingClient | None = None, **fields: object) -> tuple[Exchange, RecordingClient]:
        """Make an exchange with a recording client."""
        client = client or RecordingClient()
        client.exchange = self.exchange(client, **fields)  # type: ignore[arg-type]
        return client.exchange, client

    def start(self, client: RecordingClient | None = None, **fields: object) -> tuple[Exchange, RecordingClient]:
        """Make an exchange and start it."""
        exchange, client = self.begin(client, **fields)
        exchange.start()
        return exchange, client

    @property
    def last(self) -> RecordingSending:
        """The newest attempt."""
        return self.sendings[-1]

    def find(self, *, alive: bool) -> None:
        """Let the probes end that were asked for."""
        asked, self.checks.asked = self.checks.asked, []
        for _, probed in asked:
            probed(alive)

    def turn(self) -> None:
        """Make the calls that are ready, as one turn of the event loop does."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()

    def forget_the_dead(self) -> None:
        """Keep nothing of exchanges that are over, so that many can be checked."""
        self.exchanges = [exchange for exchange in self.exchanges if exchange.phase is not Phase.OVER]
        self.sendings = [sending for sending in self.sendings if sending.exchange in self.exchanges]
        self.over.clear()

    def wait(self, seconds: float) -> None:
        """Let time pass, then do what is due, as the gateway's sweep does: who is due is decided before anybody is called."""
        self.clock += seconds
        self.room.look(self.clock)
        self.commentary.look(self.clock)
        due = [call for at, call in self.timers if at <= self.clock]
        self.timers = [timer for timer in self.timers if timer[0] > self.clock]
        for call in due:
            call()
        for exchange in [exchange for exchange in self.exchanges if exchange not in self.over and exchange.due <= self.clock]:
            exchange.tick(self.clock)

    def wait_on(self, seconds: float) -> None:
        """Let time pass as it does: look every `LOOK_SECONDS`."""
        for _ in range(round(seconds / LOOK_SECONDS)):
            self.wait(LOOK_SECONDS)

    def blamed(self) -> list[tuple[str, FailureClass]]:
        """Return who was reported with which failure."""
        return [(server_id, event.failure.kind) for server_id, event in self.health_book.reports if isinstance(event, AttemptFailed)]

    def praised(self) -> list[str]:
        """Return who was reported as having answered."""
        return list(self.health_book.good)

    def tried(self) -> list[str]:
        """Return the servers of all attempts, in order."""
        return [sending.server.id for sending in self.sendings]

    def health(self, name: str) -> Health:
        """Return a server's health."""
        return self.table.routes[ServerId(name)].health

    def set_health(self, name: str, **changes: object) -> None:
        """Change a server's health behind the exchanges' back."""
        self.table = with_health(self.table, ServerId(name), attrs.evolve(self.health(name), **changes))  # type: ignore[arg-type]
        self._note_pools()

    def remove(self, name: str) -> None:
        """Take a server out of the table, as its owner's DELETE does."""
        routes = [route for route in self.table.routes.values() if route.server.id != name]
        servers = [route.server for route in routes]
        self.table = build_table(self.table.version + 1, servers, {route.server.id: route.health for route in routes})
        self._note_pools()

    def change(self, name: str) -> None:
        """Give a server another generation, as its owner's PUT does."""
        servers = [route.server for route in self.table.routes.values()]
        changed = [attrs.evolve(each, generation=each.generation + (each.id == name)) for each in servers]
        self.table = build_table(self.table.version + 1, changed, {route.server.id: route.health for route in self.table.routes.values()})
        self._note_pools()

    def check(self) -> None:
        """Assert what holds between any two inputs."""
        running = [exchange for exchange in self.exchanges if exchange.phase in (Phase.TRYING, Phase.RELAYING)]
        assert self.load.total == len(running), "slots and attempts differ"
        for exchange in self.exchanges:
            live = [sending for sending in self.of(exchange) if sending.is_live]
            client = exchange.response.client
            assert isinstance(client, RecordingClient)
            assert len(live) <= 1
            assert bool(live) == (exchange.phase in (Phase.TRYING, Phase.RELAYING, Phase.DRAINING))
            assert (exchange.phase is Phase.OVER) == (exchange in self.over)
            if exchange.phase is Phase.OVER:
                assert client.gone or client.is_finished
                assert client.gone or exchange.response.status == client.status
            if exchange.phase in (Phase.CHOOSING, Phase.QUEUED, Phase.TRYING, Phase.BACKOFF):
                assert client.status == (200 if client.comments else None)
                assert not client.relayed
            if client.status is not None:
                assert exchange.response.sent_bytes == len(client.relayed)
        for capped in self.servers:
            assert capped.max_concurrency is None or self.load.in_flight(capped.id) <= capped.max_concurrency
        assert self.answer_bytes == sum(exchange.response.held for exchange in self.exchanges)
        alive = Counter(exchange.request.caller.quota for exchange in self.exchanges if exchange.phase is not Phase.OVER)
        assert {client: self.room.at_once.live(client) for client in self.room.at_once.clients} == alive
        for exchange in self.exchanges:
            charge = cast(ChargedRequest, exchange.request).charge
            if charge is not None:
                is_turned_away = exchange.response.error_code == "too_many_at_once"
                assert charge.taken_back == is_turned_away, "a refused request uses up something, or another one nothing"
                assert not is_turned_away or not exchange.search.tried
        if len(self.over) == len(self.exchanges):
            assert not any(self.load.retries_in_flight(model) for model in self.table.models)
