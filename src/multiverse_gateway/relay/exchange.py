"""One inference request's journey, as a state machine that does no I/O.

Rules that hold here, whatever the order of inputs and however bytes are cut:

* Before the commit point (the head of a server's answer) an attempt may be replaced by another one; after it never.
* At most one attempt runs at a time; its slot is given back exactly once, before the next attempt begins.
* Of a stream at most `sse.EVENTS_PER_CALL` events are handled before other requests get their turn; the server is not read meanwhile.
* What is held of an answer beyond `UNCOUNTED_BYTES` counts against the budget of all answers until the client has taken it.
* The client gets one whole `answer`, or one `head` and after it one of `end` and `cut`; nothing at all once it is gone.
* A stream is relayed in complete events only, so that the error event of a broken one can never be glued onto half an event.
* The head of a stream with `comments` may be sent before the commit point, with the first comment. The status is fixed then, and an error
  becomes an event; an attempt may still be replaced.

Inputs are method calls: from the wire (`head`, `body`, `end`, `failed`), the door (`start`, `client_gone`, `client_stalled`,
`client_clogged`, `client_drained`), the gateway's clock (`tick`, when `due` has passed, and `comment`), its queue (`turn`) and its shutdown
(`interrupt`).
Outputs are calls to the three ports below. Everything runs on one event loop.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from math import inf
from typing import Protocol

import attrs
import msgspec

from multiverse_gateway.core.answers import PassingJson, read_answer
from multiverse_gateway.core.comments import Comments, headers_comment, place_comment, prefill_comment
from multiverse_gateway.core.content_types import relayed_type
from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.error_events import error_event, refusal_event
from multiverse_gateway.core.errors import (
    AnswerTooLarge,
    GatewayError,
    ModelNotFound,
    NoHealthyServer,
    Overloaded,
    ShuttingDown,
    StreamingUnsupported,
    TooManyAtOnce,
    UpstreamTimeout,
)
from multiverse_gateway.core.failover import (
    JSON_FOR_STREAM,
    FailedAttempt,
    Failure,
    FailureClass,
    GiveUp,
    Retry,
    RetryPolicy,
    after_failure,
    busy_error,
    classify,
    classify_report,
    final_error,
)
from multiverse_gateway.core.fairness import Band, Place, Share, Ticket, actual_cost, estimated_cost
from multiverse_gateway.core.health import AttemptFailed, HealthEvent
from multiverse_gateway.core.load import Load, retry_seconds
from multiverse_gateway.core.patience import first_byte_allowance, requested_tokens
from multiverse_gateway.core.routing import Candidates, close_names
from multiverse_gateway.core.servers import Server, ServerId, model_key
from multiverse_gateway.core.sse import DONE_EVENT, EventStream
from multiverse_gateway.core.stored import id_of, response_not_found, usable_id
from multiverse_gateway.core.usage import NOBODY, OPERATOR
from multiverse_gateway.relay.heads import Headers
from multiverse_gateway.relay.ports import UNCOUNTED_BYTES, Charge, Client, Limits, Phase, Sending
from multiverse_gateway.relay.requests import Requests
from multiverse_gateway.relay.waiting import LOOK_SECONDS, WaitingRoom, bulk_flow_of, flow_of

MAX_ERROR_BYTES = 65536
EMBEDDINGS = "/v1/embeddings"
MAX_HELD_EMBEDDINGS = 1 << 20
"""Embeddings up to this size are held until they are known to be whole; larger ones are relayed as they come."""
SILENCE_FACTOR = 5
"""A server that passes a probe may be silent in the middle of an answer for so many times the idle timeout."""
NOISE_BYTES = 16384
"""A read of this size without a single event is noise: blank lines or comments as fast as a server can send them."""
NOISE_SECONDS = 0.05
"""How long a server is not read after such a read; a comment now and then is relayed at once."""
DRAINING_SECONDS = 1.0
LAST_RESORT_SECONDS = 0.05
"""How long a request waits for the one that tries the last resort: a rejected client gets its response within 100 ms."""

_EVENT_STREAM = (b"content-type", b"text/event-stream")
_STREAM_HEADERS = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
_BLAMELESS = frozenset({FailureClass.CLIENT_ERROR, FailureClass.TRANSIENT, FailureClass.LOCAL})
_REPORTED_ERROR = Failure(FailureClass.SERVER_ERROR, "the stream ended with an error")
_NO_EVENT = Failure(FailureClass.NONSENSE, "a stream with comments but without events")
_FAILED_PROBE = Failure(FailureClass.TIMEOUT, "no data, and the server failed a probe")
_KNOWN_REFUSALS = frozenset({401, 403, 404, 405, 408, 413, 429})
"""Statuses of 4xx that say something else than that a field of the request is not known."""


class Places(Protocol):
    """Where stored responses are (`response_places`)."""

    def locate(self, exchange: "Exchange") -> None:
        """Find the server that has the stored response which the exchange needs; it comes through `located` or `not_located`."""

    def keep(self, exchange: "Exchange", response_id: str) -> None:
        """Remember that the exchange's server keeps a response for its caller."""


class HealthReports(Protocol):
    """Who is told how attempts went (`health_book`)."""

    def passed(self, server: Server, path: str) -> None:
        """Report an attempt that went well to the health machine."""

    def has_answered(self, server: Server, path: str) -> bool:
        """Return whether the server has answered this call before."""

    def report(self, server_id: ServerId, event: HealthEvent) -> None:
        """Tell the health machine anything else."""


class Checks(Protocol):
    """The object that probes servers (`server_checks`)."""

    def ask(self, exchange: "Exchange", server: Server) -> None:
        """Probe a server that keeps the exchange waiting; the result comes through `probed`, never during this call."""


class Engine(Protocol):
    """What an exchange asks of the gateway."""

    limits: Limits
    load: Load
    room: WaitingRoom
    requests: Requests

    @property
    def retry_policy(self) -> RetryPolicy:
        """Return when a failed request is tried again, and how often."""

    @property
    def health_book(self) -> HealthReports:
        """Return who is told how attempts went."""

    @property
    def checks(self) -> Checks:
        """Return the object that probes servers."""

    @property
    def responses(self) -> Places:
        """Return where stored responses are."""

    def now(self) -> float:
        """Return the clock that measures intervals, in seconds."""

    def wall(self) -> float:
        """Return the time of day, in epoch seconds."""

    def chance(self) -> float:
        """Return a random number in [0, 1)."""

    def notice_pause(self, now: float) -> None:
        """Postpone the exchanges if this process was stopped and nothing of what is due was looked at since."""

    def candidates(self, envelope: Envelope, excluded: frozenset[ServerId], now: float) -> Candidates | None:
        """Return the servers that could serve it now; `None` for a model without a registered server."""

    def is_registered(self, server: Server) -> bool:
        """Return whether a server was neither removed nor changed in anything that an answer depends on."""

    def has_slot(self, server: Server) -> bool:
        """Return whether a server is registered as it was, and may have one more request now."""

    def model_names(self) -> Sequence[str]:
        """Return the models there are."""

    def pick(self, servers: Sequence[Server], envelope: Envelope) -> Server:
        """Return the server that the balancer chooses from the candidates."""

    def send(self, server: Server, exchange: "Exchange") -> Sending:
        """Open an attempt; its outcome comes back through the exchange's wire methods, never during this call."""

    def budget_refused(self) -> None:
        """Count a retry that the model's budget did not let begin in time."""

    def soon(self, call: Callable[[], None]) -> None:
        """Call a function in the next turn of the event loop, after everything else that is ready."""

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function after so many seconds."""

    def hold_answer(self, count: int) -> bool:
        """Count bytes of an answer that are held; return whether there was room for them."""

    def release_answer(self, count: int) -> None:
        """Count bytes of an answer that are held no more."""

    def explain(self, exchange: "Exchange", server: Server, now: float) -> Mapping[str, object]:
        """Say why this server was chosen: who else could have been, and why not."""

    def finished(self, exchange: "Exchange") -> None:
        """Take note of the end: log, count, forget."""


_NO_SERVERS: frozenset[ServerId] = frozenset()  # made once, not for each exchange
_NO_HEADERS: Mapping[bytes, bytes] = {}
_CHAT = Dialect.CHAT
_WAITING = frozenset({Phase.CHOOSING, Phase.QUEUED, Phase.TRYING, Phase.BACKOFF})
_CHOOSING, _QUEUED, _TRYING, _BACKOFF, _RELAYING, _DRAINING, _OVER = Phase  # a look-up in an enum costs as much as a call


class Exchange:
    """The journey of one request from its complete arrival to its answer.

    `due` is the monotonic instant at which the gateway calls `tick`. After `Phase.OVER` the record of what happened stands in
    `status`, `attempts`, `server`, `events`, `sent_bytes`, `error_code`, `first_byte_seconds` and `usage`. `caller` is what its use is
    counted by. Strikes against a server name `source`, the key or address that the request came from, and `number`, the gateway's own
    number of the request. `why`, if it is a list, collects why each server was chosen; `shows_why` hands it to the client. `traceparent`
    is the client's (W3C Trace Context), for tracing. `forwarded` holds the lines that the client's headers add to the head of each
    attempt (`core.forwarding`). `asks_usage`: the engine asked the server for the tokens of a stream, which
    the client did not; `refuser` is the server that rejected it, and no other server is asked then. `replays`: the attempt repeats one
    whose kept connection ended unanswered, so the engine opens a new one. `held` is what counts against the budget of all answers.
    `comments` is set if the client of a stream asked for comments while it waits.
    """

    _backoff_server: Server | None
    _budget_by: float
    _is_picky: bool
    _try_began: float

    __slots__ = (
        "_asked_until",
        "_backoff_server",
        "_budget_by",
        "_chunks",
        "_clogged",
        "_committed",
        "_content_type",
        "_ending",
        "_engine",
        "_events",
        "_excluded",
        "_head_status",
        "_headers",
        "_is_picky",
        "_limits",
        "_noticed",
        "_passing",
        "_paused",
        "_queue",
        "_received",
        "_retrying",
        "_sending",
        "_slot",
        "_tokens",
        "_try_began",
        "arrived",
        "asks_usage",
        "attempts",
        "body_bytes",
        "caller",
        "charge",
        "client",
        "comments",
        "content_type",
        "deadline",
        "due",
        "envelope",
        "error_code",
        "first_byte_seconds",
        "forwarded",
        "held",
        "max_at_once",
        "number",
        "phase",
        "query",
        "refuser",
        "replays",
        "request_id",
        "sent_bytes",
        "server",
        "shows_why",
        "source",
        "status",
        "ticket",
        "traceparent",
        "tried",
        "why",
    )

    def __init__(
        self,
        engine: Engine,
        envelope: Envelope,
        client: Client,
        *,
        body: bytes,
        content_type: bytes,
        query: bytes,
        request_id: str,
        arrived: float,
        caller: str = "",
        source: str = "",
        is_bulk: bool = False,
        wants_comments: bool = False,
        max_at_once: int = 0,
        charge: Charge | None = None,
    ) -> None:
        self._engine = engine
        limits = self._limits = engine.limits
        self.caller = caller
        self.source = source
        self.max_at_once = max_at_once
        self.charge = charge
        self._queue = engine.room.queue
        self.ticket = Ticket(envelope.model, bulk_flow_of(source) if is_bulk else flow_of(source), self)
        self.number = 0
        self.why: list[Mapping[str, object]] | None = None
        self.shows_why = False
        self.traceparent: str | None = None
        self.forwarded = b""
        self.asks_usage = False
        self.refuser: Server | None = None
        self.replays = False
        self.held = 0
        self._tokens = (0, 0)
        self.envelope = envelope
        self.client = client
        self.body_bytes = body
        self.content_type = content_type
        self.query = query
        self.request_id = request_id
        self.arrived = arrived
        now = engine.now()
        self.comments = Comments(now) if wants_comments and envelope.stream else None
        self.deadline = self.due = now + limits.request_timeout  # the body is complete; how long that took does not count
        self.phase = _CHOOSING
        self.attempts: list[FailedAttempt] = []
        self.tried = 0
        self.server: Server | None = None
        self.status = 0
        self.error_code: str | None = None
        self.first_byte_seconds: float | None = None
        self.sent_bytes = 0
        self._excluded = _NO_SERVERS
        self._sending: Sending | None = None
        self._slot = False
        self._retrying = False
        self._committed = False
        self._clogged = False
        self._paused = False
        self._noticed = -1
        self._ending: Callable[[], None] | None = None
        self._asked_until = 0.0
        self._passing: PassingJson | None = None
        self._events: EventStream | None = None
        self._chunks: list[bytes] = []
        self._received = 0
        self._head_status = 0
        self._headers = _NO_HEADERS
        self._content_type = b""

    @property
    def waits_for_budget(self) -> bool:
        """Whether a retry waits until the model's budget lets it begin."""
        return self.phase is _BACKOFF and not self._retrying

    @property
    def awaits_answer(self) -> bool:
        """Whether the request waits in the queue, or for the first event of a server."""
        return self.phase in _WAITING

    @property
    def events(self) -> int:
        """Number of data events relayed."""
        return self._events.events if self._events is not None else 0

    @property
    def is_attempting(self) -> bool:
        """Whether an attempt runs on a server, which is then `server`."""
        return self._slot

    @property
    def attempt_began(self) -> float:
        """The monotonic instant at which the attempt began that runs."""
        return self._try_began

    @property
    def received(self) -> int:
        """Bytes of the server's answer that arrived so far; its head counts as one."""
        return self._received + (self._head_status != 0)

    @property
    def excluded(self) -> frozenset[ServerId]:
        """The servers that were tried."""
        return self._excluded

    @property
    def usage(self) -> tuple[int, int]:
        """Prompt and completion tokens as the server told them in the answer, 0 where it did not, or told them of an earlier request."""
        if not self._committed or self.envelope.is_lookup:
            return 0, 0
        return (self._events.prompt_tokens, self._events.completion_tokens) if self._events is not None else self._tokens

    # From the door

    def start(self) -> None:
        """Begin: choose a server, wait for a slot, or refuse. Without effect when it is over already."""
        if self.phase is not _CHOOSING:
            return
        if self.envelope.response_id is None:
            self._choose()
        else:
            self._engine.responses.locate(self)

    def client_gone(self) -> None:
        """Drop everything: the client left. No server is to blame."""
        self._leave("client_gone")

    def client_stalled(self) -> None:
        """Drop everything: the client reads no more."""
        self._leave("client_stalled")

    def _leave(self, code: str) -> None:
        if self.phase in (_OVER, _DRAINING):
            return
        self.error_code = code
        self.status = 499
        self._abandon_attempt()
        self._over()
        self.taken()

    def client_clogged(self) -> None:
        """Stop reading from the server until the client has read what was sent."""
        if self.phase is _RELAYING and not self._clogged:
            self._clogged = True
            self.due = self.deadline
            self._pause()
        elif self.comments is not None:  # no comment is written until the client has read the earlier ones
            self._clogged = True

    def client_drained(self) -> None:
        """Resume reading from the server."""
        if self.phase is _RELAYING and self._clogged:
            self._clogged = False
            self._expect_more()
            if self._is_behind:
                self._engine.soon(self._handle_more)
            else:
                self._resume()
        else:
            self._clogged = False

    def taken(self) -> None:
        """Stop counting the answer as held: the client has all of it, or is gone."""
        if self.held:
            self._engine.release_answer(self.held)
            self.held = 0

    def _pause(self) -> None:
        if self._sending is not None and not self._paused:
            self._paused = True
            self._sending.pause()

    def _resume(self) -> None:
        if self._sending is not None and self._paused:
            self._paused = False
            self._sending.resume()

    # From the gateway

    def located(self, server: Server) -> None:
        """Send the request to the server that has the stored response, and to no other."""
        if self.phase is _CHOOSING:
            model = self.envelope.model or model_key(server.model_name)
            self.envelope = attrs.evolve(self.envelope, model=model, server_id=server.id, generation=server.generation)
            self.ticket = Ticket(model, self.ticket.flow, self)
            self._choose()

    def not_located(self, error: GatewayError) -> None:
        """Refuse the request: the stored response is unknown, or cannot be looked up now."""
        if self.phase is _CHOOSING:
            self._refuse(error)

    def turn(self) -> None:
        """Try again: a slot of the model may be free. Stays in the queue if there is none."""
        if self.phase is _QUEUED:
            self._choose()

    def drop(self) -> None:
        """Leave the queue: too many requests wait, and no client has more of them there."""
        self._give_up_without_server(self._no_slot())

    def turn_away(self) -> None:
        """End: the request would have to wait, and its client has reached its limit. It uses up none of the client's other limits."""
        if self.charge is not None:
            self.charge.take_back()
        owner = "address" if self.caller in (NOBODY, OPERATOR) else "key"
        live, seconds = self._engine.room.at_once.live(self.source) - 1, self._until_next_end()
        requests = "1 request" if live == 1 else f"{live:,} requests"
        self._refuse(
            TooManyAtOnce(
                f"{self._why_no_slot()}, and your {owner} has {requests} running or waiting; its limit is {self.max_at_once:,}. "
                f"Try again in {max(1.0, seconds):.0f} s, or send fewer requests at once.",
                retry_after=seconds,
            )
        )

    def postpone(self, seconds: float) -> None:
        """Move all deadlines: the process was stopped for so long, and what its sockets hold was not read yet."""
        self.due += seconds
        self.deadline += seconds
        self._asked_until += seconds
        if self.ticket.is_waiting:
            self.ticket.joined_at += seconds
        elif self.waits_for_budget:
            self._budget_by += seconds

    def tick(self, now: float) -> None:
        """Do what was to be done at `due`, if that has come at this instant: another exchange's tick may just have moved it."""
        phase = self.phase
        if now < self.due or phase is _OVER:
            return
        if phase is _DRAINING:
            self._abandon_attempt()
            self._over()
        elif phase is _RELAYING:
            self._tick_relaying(now)
        elif phase is _QUEUED:
            self._choose()
        elif now >= self.deadline:
            self._abandon_attempt()
            self._refuse(
                UpstreamTimeout(
                    f"There was no answer within {self._limits.request_timeout:g} seconds (REQUEST_TIMEOUT_SECONDS). "
                    "Ask for less (for example a smaller max_tokens), stream the answer, or try again later."
                )
            )
        elif phase is _BACKOFF:
            self._after_backoff()
        elif phase is _TRYING:
            self._tick_trying(now)

    def may_comment(self, now: float) -> bool:
        """Return whether a comment can be due: cheaper than to find out which."""
        return self.comments is not None and not self._clogged and self.comments.may_take(now)

    def comment(self, place: Place | None, now: float) -> None:
        """Write a comment if one is due; `place` is that in the queue, `None` for a request that waits for a server's first event.

        The first one sends the head of the response. Only for an exchange that `may_comment`.
        """
        comments = self.comments
        assert comments is not None
        if not self.awaits_answer or (place is None and not self.tried):
            return
        has_head = comments.have_begun
        comment = place_comment(place) if place is not None else prefill_comment(self.tried)
        if comments.take(comment, now):
            if not has_head:
                self.status = 200
                self.client.head(200, [_EVENT_STREAM, *self._stream_headers()])
            self.client.body(comment)

    def interrupt(self) -> None:
        """End now, telling the client that the gateway is shutting down."""
        if self.phase in (_OVER, _DRAINING):
            return
        self._abandon_attempt()
        if self._committed:
            self._break_off("The gateway is shutting down. Send the request again in a moment.", "gateway_shutting_down")
        else:
            self._refuse(ShuttingDown("The gateway is shutting down. Send the request again in a moment.", retry_after=5.0))

    # From the wire

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        """Take the head of the server's answer."""
        self._head_status = status
        self._headers = headers
        if not 200 <= status < 300:
            return
        envelope = self.envelope
        wall = self._engine.wall()
        failure = classify(status, headers, None, stream=envelope.stream, checks_json=envelope.answers_json, now_wall=wall)
        if failure is not None and not failure.may_hold_error:
            self._fail_attempt(failure)
            return
        self._content_type = relayed_type(headers.get(b"content-type"), envelope.answers_json)
        if self._content_type.startswith(b"text/event-stream"):  # in lower case now, and no other allowed type begins so
            limits = self._limits
            longest = limits.max_event_bytes if envelope.dialect is _CHAT else limits.max_large_event_bytes
            self._events = EventStream(
                envelope.dialect,
                max_event_bytes=longest,
                drops_usage=self.asks_usage,
                on_response=self._note_response if envelope.stores_response else None,
            )

    def body(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._received += len(data)
        events = self._events
        if self.phase is _DRAINING:
            return
        if events is not None:
            whole = events.feed(data)
            if self.phase is _TRYING:
                self._before_first_event(whole, events)
                if self._events is not events:
                    return
            else:
                if whole:
                    self.sent_bytes += len(whole)
                    self.client.body(whole)
                if not self._clogged:
                    due = self._engine.now() + self._limits.idle_timeout
                    self.due = due if due < self.deadline else self.deadline
            if events.is_over or self._received > self._limits.max_stream_bytes:
                self._end_by(events)
            elif not whole or self.held or events.has_more or len(data) >= NOISE_BYTES:
                self._hold_unfinished(events, len(data))
        elif self.envelope.answers_json or not 200 <= self._head_status < 300:
            self._collect(data)
        else:
            self._relay_raw(data)

    def _hold_unfinished(self, events: EventStream, size: int) -> None:
        """Hold what was read of a stream and not relayed: events for the next turns, or a large event that is not complete yet."""
        if events.has_more:
            self._pause()
            self._engine.soon(self._handle_more)
        elif events.unfinished > UNCOUNTED_BYTES or self.held:
            self._hold(events.unfinished)
        elif size >= NOISE_BYTES and not events.unfinished:
            self._slow_down(events)

    def _slow_down(self, events: EventStream) -> None:
        """Read a server less often that sends noise: reading it takes time that belongs to others."""
        if events.events == self._noticed:
            self._pause()
            self._engine.later(NOISE_SECONDS, self._read_on)
        self._noticed = events.events

    def _read_on(self) -> None:
        if self.phase in (_TRYING, _RELAYING) and not self._clogged and not self._is_behind:
            self._resume()

    @property
    def _is_behind(self) -> bool:
        """Whether events were read that are not handled yet."""
        return self._events is not None and self._events.has_more

    def _handle_more(self) -> None:
        """Handle the next events of what was read, unless the client has to read first; then resume reading, or take the end."""
        events = self._events
        if events is None or not self._is_behind or self._clogged or self.phase not in (_TRYING, _RELAYING):
            return
        self.body(b"")
        if self._is_up_to_date(events):
            ending, self._ending = self._ending, None
            if ending is not None:
                ending()
            elif not self._clogged:
                self._resume()

    def _is_up_to_date(self, events: EventStream) -> bool:
        """Return whether all that was read of the attempt's stream is handled, and the stream is not over."""
        return self._events is events and not self._is_behind and self.phase in (_TRYING, _RELAYING)

    def end(self) -> None:
        """Take the regular end of the body; that of a stream once all events before it are handled."""
        self._sending = None
        if self.phase is _DRAINING:
            self._over()
        elif self._events is not None:
            if self._events.has_more:
                self._ending = partial(self._end_of_stream, self._events)
            else:
                self._end_of_stream(self._events)
        elif not 200 <= self._head_status < 300:
            if self._may_refuse_usage(self._head_status):
                self._ask_without_usage()
            else:
                self._fail_attempt(self._classified())
        elif self.envelope.answers_json:
            self._end_of_json()
        elif self._committed:
            self._complete()
        else:
            self._answer(b"")

    def _may_refuse_usage(self, status: int) -> bool:
        """Return whether the server may have refused the field that the gateway added; servers do it in many words."""
        server = self.server
        assert server is not None
        if not self.asks_usage:
            return False
        refuses = (400 <= status < 500 and status not in _KNOWN_REFUSALS) or status in (500, 501)
        return refuses and not self._engine.requests.accepts_usage(server)

    def _end_of_json(self) -> None:
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if self._received > UNCOUNTED_BYTES:
            self._chunks = []  # the client may take long to read the answer: hold it once
            if self._passing is not None:
                self._end_of_passing(self._passing)
                return
        answer = read_answer(body)
        if answer is None:
            self._fail_attempt(Failure(kind=FailureClass.NONSENSE, reason="an answer that is not JSON", status=self._head_status))
        elif answer.reports_error:
            self._fail_as_reported(body)
        elif self.envelope.stream:
            self._fail_attempt(self._not_a_stream())
        else:
            self._tokens = answer.tokens
            if self.envelope.stores_response:
                self._note_response(id_of(body))
            self._answer(body)

    def _fail_as_reported(self, report: bytes) -> None:
        """Fail the attempt, or make it again without what the gateway added: the server reported an error with status 200."""
        failure = classify_report(
            report,
            self._headers,
            now_wall=self._engine.wall(),
            request=self.body_bytes,
            names_response=self.envelope.names_response,
        )
        if self._may_refuse_usage(failure.status or 500):
            self._abort_sending()
            self._ask_without_usage()
        else:
            self._fail_attempt(failure)

    def _not_a_stream(self) -> Failure:
        return Failure(kind=FailureClass.NONSENSE, reason=JSON_FOR_STREAM, status=self._head_status)

    def _note_response(self, value: object) -> None:
        """Remember the id of a response before the client can use it."""
        response_id = usable_id(value)
        if response_id is not None:
            self._engine.responses.keep(self, response_id)

    def failed(self, failure: Failure) -> None:
        """Take the end of the connection in any other way, once all events before it were handled."""
        self._sending = None
        if self._is_behind and self.phase is not _DRAINING:
            self._ending = partial(self._failed, failure)
        else:
            self._failed(failure)

    def _failed(self, failure: Failure) -> None:
        if self.phase is _DRAINING:
            self._over()
        elif self._committed:
            self._break_stream(failure)
        else:
            self._fail_attempt(failure)

    # Before the commit point

    def _ask_without_usage(self) -> None:
        """Make the same attempt again: what the server refuses may be nothing that the client said."""
        server, was_retry = self.server, self._retrying
        assert server is not None
        self.refuser = server
        self._release_slot(None)
        self.tried -= 1
        if was_retry:
            self._reserve_retry()
        if self._engine.is_registered(server):
            self._try(server, self._engine.now())
        else:
            self._choose()
            self._offer_slot()

    def _choose(self) -> None:
        engine = self._engine
        now = engine.now()
        found = engine.candidates(self.envelope, self._excluded, now)
        if found is None:
            self._give_up_without_server(self._unknown_model())
        elif ready := found.ready_for(self.source):
            if self._queue.may_begin(self.ticket, now) or self._may_pass():
                self._try(engine.pick(ready, self.envelope), now)
            else:
                self._wait_for_slot(found, now, inf, self._no_slot)
        elif found.full:
            self._wait_for_slot(found, now, inf, self._no_slot)
        elif found.last_resort is not None and (self._queue.may_begin(self.ticket, now) or self._may_pass()):
            self._try(found.last_resort, now)
        elif found.last_resort is not None or found.last_resort_taken:
            self._wait_for_slot(found, now, LAST_RESORT_SECONDS, partial(self._nobody_usable, found))
        elif found.streaming_unsupported:
            self._give_up_without_server(
                StreamingUnsupported(
                    f"No server of the model {self.envelope.model!r} supports streaming. Send the request with stream=false.",
                    param="stream",
                )
            )
        else:
            self._give_up_without_server(self._nobody_usable(found))

    def _may_pass(self) -> bool:
        """Return whether the request may take what is free though others wait, or though its client is over its share of the slots.

        It may if it is its turn, if it needs no slot, or if it cannot wait.
        """
        room = self._engine.room
        return self.envelope.is_lookup or room.has_turn(self) or not room.has_places or self.ticket.waited_seconds >= self._queue_timeout

    def _unknown_model(self) -> GatewayError:
        if self.envelope.server_id is not None:  # removed or changed since it was located
            return response_not_found()
        names = self._engine.model_names()
        model = self.envelope.model
        close = close_names(model, names)
        shown = ", ".join(close or names[:20]) or "none yet; register a server at /register"
        return ModelNotFound(f"There is no model {model!r} here. Models: {shown}.", param="model")

    def _nobody_usable(self, found: Candidates) -> GatewayError:
        wait = min(60.0, max(1.0, found.returns_in if found.returns_in is not None else 60.0))
        if found.busy is not None:
            return busy_error(found.busy, wait)
        if self.envelope.server_id is not None:
            return NoHealthyServer(
                f"The server that has the stored response is not available now. Try again in {wait:.0f} s; no other server has it.",
                retry_after=wait,
            )
        return NoHealthyServer(
            f"No server of the model {self.envelope.model!r} is available now. Try again in {wait:.0f} s, or choose another model.",
            param="model",
            retry_after=wait,
        )

    def _give_up_without_server(self, error: GatewayError) -> None:
        self._queue.leave(self.ticket, self._engine.now())
        if self.attempts:
            self._finish_as(final_error(self.attempts))
        else:
            self._refuse(error)

    def _wait_for_slot(self, found: Candidates, now: float, patience: float, refusal: Callable[[], GatewayError]) -> None:
        """Wait in the queue until that takes too long, or the queue does not move for the seconds of `patience`, or it is full.

        All waits of a request together may take as long as one.
        """
        ticket = self.ticket
        self.phase = _QUEUED
        self._is_picky = bool(found.resting) and not (found.ready or found.full)
        joined_at = ticket.joined_at if ticket.is_waiting else now
        moved_at = max(joined_at, self._engine.room.moved_at(self.envelope.model))
        until = min(joined_at + self._queue_timeout - ticket.waited_seconds, moved_at + patience)
        self.due = min(until, now + LOOK_SECONDS)
        if now >= until or not self._engine.room.join(self, now):
            self._give_up_without_server(refusal())

    @property
    def _queue_timeout(self) -> float:
        limits = self._limits
        return limits.bulk_queue_timeout if self.ticket.flow.band is Band.BULK else limits.queue_timeout

    def _no_slot(self) -> GatewayError:
        """Return the refusal of a request that waited too long, or for which there is no place; it says when a slot is likely."""
        seconds, waiting = self._until_next_end(), self._queue.waiting(self.envelope.model) - self.ticket.is_waiting
        return Overloaded(
            f"{self._why_no_slot()}, and {'1 other request waits' if waiting == 1 else f'{waiting} other requests wait'}. "
            f"Try again in {max(1.0, seconds):.0f} s, or send fewer requests at once.",
            retry_after=seconds,
            queue_length=waiting,
        )

    def _until_next_end(self) -> float:
        """Return about how many seconds it takes until the client has a place again."""
        return self._queue.until_next_end(self.envelope.model, self.ticket.flow) or retry_seconds(self._engine.chance())

    def _why_no_slot(self) -> str:
        """Return the first half of a sentence: what keeps the request from being served now."""
        now, model = self._engine.now(), self.envelope.model
        share = self._queue.used_up(self.ticket, now)
        found = None if share is None else self._engine.candidates(self.envelope, self._excluded, now)
        if share is None or found is None or not found.ready_for(self.source):
            return f"Every server of the model {model!r} is busy"
        if share is Share.BULK:
            return f"Bulk requests hold {share} of the slots of the model {model!r}, their limit while interactive requests use it"
        return f"Your requests hold {share} of the slots of the model {model!r}, the limit of one client while others use it"

    # What the fair queue asks

    @property
    def needs(self) -> tuple[object, ...]:
        """What the request needs of a server: of two requests with equal needs both can use what is free, or none can."""
        envelope = self.envelope
        source = self.source if self._is_picky else None  # only servers that rest for somebody else are left
        return envelope.stream, envelope.path, envelope.server_id, self._excluded, source

    @property
    def _generates(self) -> bool:
        return self.envelope.dialect is not Dialect.OTHER

    def estimated_cost(self) -> float:
        """Return the weighted tokens that the request is expected to use."""
        mean = self._queue.mean_output_tokens(self.envelope.model)
        tokens = requested_tokens(self.body_bytes) if self._generates else None
        return estimated_cost(len(self.body_bytes), max_tokens=tokens, mean_output_tokens=mean, generates=self._generates)

    def actual_cost(self) -> float:
        """Return the weighted tokens that the request has used; nothing if no server answered it."""
        if not self._committed:
            return 0.0
        return actual_cost(len(self.body_bytes), self.sent_bytes, usage=self.usage, events=self.events, generates=self._generates)

    # One attempt

    def _try(self, server: Server, now: float) -> None:
        engine = self._engine
        ticket = self.ticket
        if ticket.is_waiting:
            self.deadline += now - ticket.joined_at  # waiting has a limit of its own
        if self.envelope.is_lookup:  # needs no slot
            self._queue.leave(ticket, now)
        else:
            self._queue.begin(ticket, now, server.id)
        self.phase = _TRYING
        self.server = server
        self.tried += 1
        if self.why is not None:
            self.why.append(engine.explain(self, server, now))
        self._try_began = now
        if self.tried > 1 or self.refuser is not None:
            self._forget_attempt(server)
        self._slot = True
        engine.load.started(server.id, self.envelope.model)
        timeout = self._limits.first_byte_timeout
        if 2 * timeout > self.deadline - now and self._has_substitute(now):
            timeout = (self.deadline - now) / 2
        due = now + timeout
        self.due = due if due < self.deadline else self.deadline
        self._sending = engine.send(server, self)

    def _has_substitute(self, now: float) -> bool:
        """Return whether another server could take the request over from the one that is asked."""
        assert self.server is not None
        found = self._engine.candidates(self.envelope, self._excluded | {self.server.id}, now)
        return found is not None and bool(found.ready or found.full)

    # Waiting for a server

    def _tick_trying(self, now: float) -> None:
        """Give a server more time that may only be slow, once; then fail the attempt."""
        is_silent = bool(self._chunks) and self._events is None
        if self.due == self._asked_until:
            reason = self._silence() if is_silent else f"no first byte within {now - self._try_began:.0f} s (FIRST_BYTE_TIMEOUT_SECONDS)"
            self._fail_attempt(Failure(kind=FailureClass.TIMEOUT, reason=reason))
        elif is_silent:
            self._ask_about_silence()
        else:
            self._extend(now)

    def _silence(self) -> str:
        return f"no data for {self._limits.idle_timeout * SILENCE_FACTOR:g} s (IDLE_TIMEOUT_SECONDS)"

    def _extend(self, now: float) -> None:
        """Give the server the time that a prompt and an answer of this size may take; a probe tells meanwhile whether it lives."""
        until = self.deadline
        if self._has_substitute(now):
            began = self._try_began
            allowance = first_byte_allowance(self._limits.first_byte_timeout, self.body_bytes, stream=self.envelope.stream)
            until = max(now, began + min(allowance, (self.deadline - began) / 2))
        self._ask(until)

    def _ask_about_silence(self) -> None:
        """Probe a server that fell silent in the middle of its answer; while it passes, it may be silent for longer."""
        last = self.due - self._limits.idle_timeout
        self._ask(min(self.deadline, last + self._limits.idle_timeout * SILENCE_FACTOR))

    def _ask(self, until: float) -> None:
        assert self.server is not None
        self.due = self._asked_until = until
        self._engine.checks.ask(self, self.server)

    def probed(self, server: Server, *, alive: bool) -> None:
        """Take the result of the probe of a server that kept the exchange waiting; without effect once any data came."""
        if alive or self.server is not server or self.due != self._asked_until:
            return
        if self.phase is _TRYING:
            self._fail_attempt(_FAILED_PROBE)
        elif self.phase is _RELAYING:
            self._abort_sending()
            self._break_stream(_FAILED_PROBE)

    def _forget_attempt(self, server: Server) -> None:
        """Drop what came of the attempt before; the body of its failure, too, now that another attempt decides what the client sees."""
        last = self.attempts[-1] if self.attempts else None
        self.replays = last is not None and last.failure.is_stale and last.server_id == server.id
        self._events = None
        self._chunks = []
        self._received = self._head_status = 0
        self._paused = False
        if self.held:
            if last is not None:
                self.attempts[-1] = attrs.evolve(last, failure=attrs.evolve(last.failure, body=b""))
            self.taken()

    def _hold(self, count: int) -> bool:
        """Hold so many bytes of the answer in all; without room for them the request ends, and no server is blamed."""
        more = count - self.held
        if more <= 0:
            self._engine.release_answer(-more)
        elif not self._engine.hold_answer(more):
            self._abandon_attempt()
            if self._committed:
                self._break_off("The gateway has no memory left for an event of this size. Send the request again later.", "overloaded")
            else:
                self._refuse(
                    Overloaded(
                        "The gateway has no memory left for an answer of this size. Send the request again in a few seconds.",
                        retry_after=retry_seconds(self._engine.chance()),
                    )
                )
            self._offer_slot()
            return False
        self.held = count
        return True

    def _collect(self, data: bytes) -> None:
        """Keep a piece of a body that must be known in full; of a server's own error the beginning is enough."""
        self._chunks.append(data)
        if self._received > self._limits.unchecked_bytes and not self._may_keep(data):
            return
        if self._head_status < 300:
            if self.envelope.stream and self._received > MAX_ERROR_BYTES:
                self._fail_attempt(self._not_a_stream())
            else:
                self._expect_more()
        elif self._head_status >= 500 and self._received > MAX_ERROR_BYTES:
            self._fail_attempt(self._classified())

    def _may_keep(self, data: bytes) -> bool:
        """Return whether a large body is still held; else it is relayed as it comes, or the request is over."""
        if self._passing is not None:
            self._chunks = []
            self._pass_on(self._passing, data)
        elif self.envelope.path == EMBEDDINGS and self._head_status < 300:
            if self._received <= MAX_HELD_EMBEDDINGS:
                return self._count(self._received)
            self._begin_to_pass()
        elif self._received > self._limits.max_response_bytes:
            self._refuse_size(self._limits.max_response_bytes, "MULTIVERSE_MAX_RESPONSE_BYTES")
        else:
            return self._count(self._received)
        return False

    def _count(self, count: int) -> bool:
        """Hold so many bytes of a body, unless every exchange may hold as many."""
        return count <= UNCOUNTED_BYTES or self._hold(count)

    def _refuse_size(self, limit: int, setting: str) -> None:
        """Refuse an answer over a limit of the gateway: another server's would be as large, and none is to blame."""
        self._abandon_attempt()
        self._refuse(
            AnswerTooLarge(
                f"The answer is larger than {limit:,} bytes, the limit of this gateway ({setting}). "
                "Ask for less, for example with a smaller max_tokens or fewer inputs, or ask the operator to raise the limit."
            )
        )

    def _begin_to_pass(self) -> None:
        """Commit a large answer before its end, and relay what comes of it at once."""
        self._passing = PassingJson()
        body, self._chunks = b"".join(self._chunks), []
        self.taken()
        self._begin_answer()
        self._pass_on(self._passing, body)

    def _pass_on(self, passing: PassingJson, data: bytes) -> None:
        passing.feed(data)
        self._send(data)
        self._expect_more()
        if passing.is_broken:
            self._abort_sending()
            self._break_stream(Failure(kind=FailureClass.NONSENSE, reason="an answer that is not JSON", status=self.status))
        elif self._received > self._limits.max_embeddings_bytes:
            self._abort_sending()
            self._break_stream(None)

    def _end_of_passing(self, passing: PassingJson) -> None:
        if passing.is_whole:
            self._tokens = passing.tokens
            self._complete()
        else:
            self._break_stream(Failure(kind=FailureClass.BROKEN, reason="the answer ended too early", after_request=True))

    def _classified(self) -> Failure:
        assert self.server is not None
        failure = classify(
            self._head_status,
            self._headers,
            b"".join(self._chunks),
            stream=self.envelope.stream,
            checks_json=self.envelope.answers_json,
            now_wall=self._engine.wall(),
            request=self.body_bytes,
            names_response=self.envelope.names_response,
            answered_before=self._head_status == 404 and self._engine.health_book.has_answered(self.server, self.envelope.call),
        )
        self._chunks = []
        assert failure is not None, "only 2xx are good answers"
        return failure

    def _fail_attempt(self, failure: Failure) -> None:
        """End the attempt that runs and decide what is next."""
        engine = self._engine
        server = self.server
        assert server is not None
        self._abort_sending()
        self._release_slot(failure)
        self._blame(server, failure)
        self._excluded = frozenset(attempt.server_id for attempt in self.attempts)
        now = engine.now()
        engine.notice_pause(now)
        found = engine.candidates(self.envelope, self._excluded, now)
        verdict = after_failure(
            self.attempts,
            others=0
            if found is None
            else len(found.ready_for(self.source)) + found.full + (found.last_resort is not None or found.last_resort_taken),
            policy=engine.retry_policy,
            remaining=self.deadline - now,
            stateful=self.envelope.stateful,
            budget_left=engine.load.retry_budget_left(self.envelope.model),
            chance=engine.chance(),
            repeated=self.refuser is not None,
        )
        if isinstance(verdict, Retry):
            self._wait_to_retry(verdict, server, now)
        else:
            self._finish_as(verdict)
        self._offer_slot()

    def _wait_to_retry(self, retry: Retry, server: Server, now: float) -> None:
        self._backoff_server = server if retry.same_server else None
        self.phase = _BACKOFF
        self.due = min(self.deadline, now + retry.delay)
        if retry.waits:
            self._budget_by = now + min(self._engine.retry_policy.budget_wait, (self.deadline - now) / 2)
        else:
            self._reserve_retry()
        if retry.delay <= 0:
            self._after_backoff()

    def _reserve_retry(self) -> None:
        self._retrying = True
        self._engine.load.retry_started(self.envelope.model)

    def _after_backoff(self) -> None:
        now = self._engine.now()
        if not self._retrying:
            if not self._engine.load.retry_budget_left(self.envelope.model):
                self._wait_for_budget(now)
                return
            self._reserve_retry()
        server = self._backoff_server
        if server is not None and (self.attempts[-1].failure.is_stale or self._is_alone(now)):
            if self._engine.has_slot(server) and self._queue.used_up(self.ticket, now) is None:
                self._try(server, now)
                return
            self._excluded -= {server.id}  # the request waits for its second attempt there in the place that it had
        self._choose()

    def _wait_for_budget(self, now: float) -> None:
        if now >= self._budget_by:
            self._engine.budget_refused()
            self._finish_as(final_error(self.attempts))
        else:
            self.due = min(self.deadline, now + self._engine.retry_policy.budget_delay)

    def _is_alone(self, now: float) -> bool:
        """Return whether no server can serve the request but those that failed."""
        found = self._engine.candidates(self.envelope, self._excluded, now)
        return found is not None and not found.ready and not found.full

    def _finish_as(self, verdict: GiveUp) -> None:
        failure = verdict.relay
        if failure is None:
            assert verdict.error is not None
            self._refuse(verdict.error)
            return
        self.error_code = "relayed"
        headers = [(b"content-type", failure.content_type), *self._own_headers(), *self._retry_after(failure)]
        if failure.is_final:
            headers.append((b"x-should-retry", b"false"))
        self._refuse_with(failure.status or 502, headers, failure.body or b"")

    @staticmethod
    def _retry_after(failure: Failure) -> Headers:
        return [] if failure.retry_after is None else [(b"retry-after", b"%d" % max(1, round(failure.retry_after)))]

    def _refuse(self, error: GatewayError) -> None:
        self._chunks = []
        self.taken()
        self.error_code = error.code
        headers = [(b"content-type", b"application/json"), *error.headers(), *self._own_headers()]
        self._refuse_with(error.status, headers, error.body(self.envelope.path, self.request_id))

    def _refuse_with(self, status: int, headers: Headers, body: bytes) -> None:
        """End with an error: a whole response, or the only event of a stream whose head was sent while it waited.

        Such a stream ends properly, because no part of an answer is missing: Chromium drops the last event of a body that is cut off.
        """
        if self.comments is not None and self.comments.have_begun:
            event = refusal_event(self.envelope.dialect, status, body)
            self.sent_bytes = len(event)
            self.client.body(event)
            self.client.end()
        else:
            self.status = status
            self.sent_bytes = len(body)
            self.client.answer(status, headers, body)
        self._over()

    # The commit point and after

    def _commit(self, now: float) -> None:
        self._committed = True
        self.phase = _RELAYING
        self.status = self._head_status
        self.first_byte_seconds = now - self._try_began
        if self.refuser is not None and self.refuser is self.server and self.status < 300:
            self._engine.requests.usage_refused(self.refuser)
        elif self.asks_usage and self.server is not None:
            self._engine.requests.usage_accepted(self.server)

    def _answer(self, body: bytes) -> None:
        """Pass a whole answer on."""
        engine, server = self._engine, self.server
        assert server is not None
        self._commit(engine.now())
        self.sent_bytes = len(body)
        self.client.answer(self.status, [(b"content-type", self._content_type), *self._own_headers()], body)
        self._release_slot(None)
        engine.health_book.passed(server, self.envelope.call)
        self._over()
        self._offer_slot()

    def _begin_answer(self) -> None:
        now = self._engine.now()
        self._commit(now)
        self.deadline = now + self._limits.max_stream_seconds
        if self.comments is not None and self.comments.have_begun:
            self._continue_answer()
            return
        self._expect_more()
        headers = [(b"content-type", self._content_type), *self._own_headers()]
        if self._events is not None:
            headers += self._stream_headers()
        self.client.head(self.status, headers)

    def _continue_answer(self) -> None:
        """Begin an answer whose head was sent with a comment: another comment holds the headers that were not known then."""
        self.client.body(headers_comment(self._own_headers()))
        if self._clogged:
            self.due = self.deadline
            self._pause()
        else:
            self._expect_more()

    def _stream_headers(self) -> Headers:
        return _STREAM_HEADERS[1:] if self.envelope.is_lookup else _STREAM_HEADERS  # the front adds `no-store` to every look-up

    def _expect_more(self) -> None:
        if not self._clogged:
            due = self._engine.now() + self._limits.idle_timeout
            self.due = due if due < self.deadline else self.deadline

    def _own_headers(self) -> Sequence[tuple[bytes, bytes]]:
        headers: Sequence[tuple[bytes, bytes]] = _attempt_headers(self.tried, None if self.server is None else self.server.id)
        if self.ticket.waited_seconds:
            headers = [*headers, (b"x-multiverse-queued-ms", b"%d" % (1000 * self.ticket.waited_seconds))]
        if self.why is not None and self.shows_why:
            return [*headers, (b"x-multiverse-why", msgspec.json.encode(self.why))]
        return headers

    def _send(self, data: bytes) -> None:
        self.sent_bytes += len(data)
        self.client.body(data)

    def _end_by(self, events: EventStream) -> None:
        """End a stream that came to its own end, or to the end of what may be relayed of it."""
        if self.phase is not _RELAYING:
            return
        if events.ended:
            self._complete()
            return
        self._abort_sending()
        if events.failed:
            self._break_stream(_REPORTED_ERROR)
        elif events.broken is None or events.over_limit:
            self._break_stream(None)
        else:
            self._break_stream(Failure(kind=FailureClass.NONSENSE, reason=events.broken))

    def _before_first_event(self, whole: bytes, events: EventStream) -> None:
        if events.first_error is not None:
            self._fail_as_reported(events.first_error)
        elif events.has_data:
            self._begin_answer()
            self._send(whole)
        elif events.over_limit:
            self._abandon_attempt()
            self._refuse(AnswerTooLarge(self._over_limit(events)))
        elif events.broken is not None:
            self._fail_attempt(Failure(kind=FailureClass.NONSENSE, reason=events.broken))
        elif self._received > self._limits.max_stream_bytes:
            self._fail_attempt(_NO_EVENT)

    def _over_limit(self, events: EventStream) -> str:
        setting = "MULTIVERSE_MAX_EVENT_BYTES" if events.dialect is _CHAT else "MULTIVERSE_MAX_LARGE_EVENT_BYTES"
        return (
            f"The server sent {events.broken}, and the gateway does not relay it. Ask for less at once, for example fewer choices or a "
            f"smaller image. The operator sets the limit in bytes with {setting}."
        )

    def _end_of_stream(self, events: EventStream) -> None:
        whole = events.finish()
        if self.phase is _TRYING:
            self._before_first_event(whole, events)
        elif whole:
            self._send(whole)
        if events.is_over:
            self._end_by(events)
        if self._events is not events or self.phase not in (_TRYING, _RELAYING):
            return
        if events.complete():
            if events.needs_done:
                self._send(DONE_EVENT)
            self._complete()
            return
        ending = Failure(kind=FailureClass.BROKEN, reason="the stream ended too early", after_request=True)
        if self._committed:
            self._break_stream(ending)
        else:
            self._fail_attempt(ending)

    def _relay_raw(self, data: bytes) -> None:
        if not self._committed:
            self._begin_answer()
        self._send(data)
        self._expect_more()
        if self._received > self._limits.max_stream_bytes:
            self._abort_sending()
            self._break_stream(None)

    def _complete(self) -> None:
        """End a complete answer, or an error that the server reported; the connection may still deliver the rest of its ending."""
        server = self.server
        assert server is not None
        self.taken()
        self.client.end()
        if self._events is not None and self._events.failed:
            self.error_code = "upstream_error"
            self._release_slot(_REPORTED_ERROR)
            self._blame(server, _REPORTED_ERROR)
        else:
            self._release_slot(None)
            self._engine.health_book.passed(server, self.envelope.call)
        if self._events is not None and self._events.carries_more:
            self._engine.requests.usage_refused(server)
        if self._sending is None:
            self._over()
        else:
            self.phase = _DRAINING
            self.due = self._engine.now() + DRAINING_SECONDS
            self._resume()
        self._offer_slot()

    def _tick_relaying(self, now: float) -> None:
        if now >= self.deadline:
            self._abort_sending()
            self._break_stream(None)
        elif self.due == self._asked_until:
            self._abort_sending()
            self._break_stream(Failure(kind=FailureClass.TIMEOUT, reason=self._silence()))
        else:
            self._ask_about_silence()

    def _break_stream(self, failure: Failure | None) -> None:
        """End a committed answer that cannot be completed; `failure` is `None` when a limit of ours ends it."""
        server = self.server
        assert server is not None
        self._release_slot(failure)
        if failure is not None:
            self._blame(server, failure)
            happened = "reported an error" if failure is _REPORTED_ERROR else "stopped"
            why = f": {failure.reason}" if failure.kind is FailureClass.TIMEOUT else ""
            message = (
                f"The server {happened} in the middle of its answer{why}. The part that arrived is incomplete; send the request again."
            )
            self._break_off(message, "upstream_stream_interrupted")
        else:
            self._break_off(self._limit_in_words(), "stream_limit_reached")
        self._offer_slot()

    def _limit_in_words(self) -> str:
        limits, events = self._limits, self._events
        if events is not None and events.over_limit:
            return self._over_limit(events)
        if self._received > limits.max_stream_bytes:
            return f"The answer exceeds {limits.max_stream_bytes:,} bytes, the limit of this gateway (MULTIVERSE_MAX_STREAM_BYTES)."
        return f"The answer takes longer than {limits.max_stream_seconds:g} s, the limit of this gateway (MULTIVERSE_MAX_STREAM_SECONDS)."

    def _blame(self, server: Server, failure: Failure) -> None:
        event = AttemptFailed(
            generation=server.generation,
            client=self.source,
            number=self.number,
            failure=failure,
            path=self.envelope.call,
            counts=not failure.is_stale,
        )
        self._engine.health_book.report(server.id, event)
        self.attempts.append(FailedAttempt(server_id=server.id, failure=failure, has_key=server.api_key is not None))

    def _break_off(self, message: str, code: str) -> None:
        self.taken()
        self.error_code = code
        events = self._events
        if events is not None:
            self._send(error_event(events.dialect, message, code, events.next_sequence_number))
        self.client.cut()
        self._over()

    # Giving back

    def _abort_sending(self) -> None:
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.abort()

    def _release_slot(self, failure: Failure | None) -> None:
        server = self.server
        assert server is not None
        assert self._slot
        self._slot = False
        self._queue.release(self.ticket)
        self._engine.load.finished(
            server.id,
            self.envelope.model,
            seconds=None if self.envelope.is_lookup else self.first_byte_seconds,
            failed=failure is not None and failure.kind not in _BLAMELESS and not failure.is_stale,
            first_byte_timeout=self._limits.first_byte_timeout,
        )
        if self._retrying:
            self._release_retry()

    def _release_retry(self) -> None:
        self._retrying = False
        self._engine.load.retry_finished(self.envelope.model)

    def _offer_slot(self) -> None:
        """Offer the slot that was given back to the requests that wait."""
        if self._queue.total_waiting:
            self._engine.room.slot_freed(self.envelope.model, self._engine.now())

    def _abandon_attempt(self) -> None:
        """Stop everything that is running, without blaming a server."""
        self._queue.leave(self.ticket, self._engine.now())
        self._abort_sending()
        if self._slot:
            self._release_slot(None)
            self._offer_slot()

    def _over(self) -> None:
        self.phase = _OVER
        self._ending = None
        if self._retrying:
            self._release_retry()
        self._queue.end(self.ticket, self._engine.now())
        self._engine.finished(self)
        del self.ticket.request  # or each exchange would be a cycle, which only the garbage collector frees


@lru_cache(maxsize=4096)
def _attempt_headers(tried: int, server_id: ServerId | None) -> tuple[tuple[bytes, bytes], ...]:
    attempts = (b"x-multiverse-attempts", b"%d" % tried)
    if server_id is None:
        return (attempts,)
    return attempts, (b"x-gateway-server-id", server_id.encode()), (b"x-multiverse-server", server_id.encode())
