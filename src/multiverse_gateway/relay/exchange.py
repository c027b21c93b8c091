"""One inference request's journey, as a state machine that does no I/O.

Theory of operation. A door makes an exchange once a request arrived in full, and starts it. The exchange looks for a server
(`server_search`), makes an attempt on it (`attempt`), and writes the response to the client (`client_response`). What the attempt reads
(`event_reader`, `body_readers`) decides what follows: an answer, another attempt, or an error. Inputs are method calls: from the door,
from the gateway's clock, queue and shutdown, and from the attempt. Outputs are calls to the ports (`ports`, `resources`, `Engine`).
Everything runs on one event loop.

These rules hold, whatever the order of inputs and however bytes are cut:

* Before the commit point (the head of a server's answer) an attempt may be replaced by another one; after it never.
* At most one attempt runs at a time; its slot is given back exactly once, before the next attempt begins.
* The client gets one whole answer, or one head and after it an end or a cut; nothing at all once it is gone.
* A stream is relayed in complete events only, so that the error event of a broken one can never be glued onto half an event.
* The head of a stream with comments may be sent before the commit point, with the first comment. The status is fixed then, and an
  error becomes an event; an attempt may still be replaced.
* When an exchange is over, none of its parts refers back to it: no cycle is left to the garbage collector.

    phase     input                                        next phase
    CHOOSING  start, located; a server is free             TRYING
              no server is free                            QUEUED
              no server is usable, not located             OVER (refused)
    QUEUED    turn, or a look at the queue: a slot         TRYING
              waited too long, dropped, turned away        OVER (refused)
    TRYING    the attempt failed, and may be replaced      BACKOFF
              the attempt failed for good, time is up      OVER (refused)
              the server may refuse `stream_options`       TRYING (the same server again, or QUEUED)
              a whole answer                               OVER (answered)
              the beginning of an answer: commit           RELAYING
    BACKOFF   the pause is over, and there is budget       TRYING, or QUEUED
              no budget in time, time is up                OVER (refused)
    RELAYING  the end of the answer, connection busy       DRAINING (answered)
              the end of the answer, connection free       OVER (answered)
              failure, silence, or a limit                 OVER (cut)
    DRAINING  the end of the connection, or a second       OVER
    any but DRAINING: the client leaves or stalls          OVER (499)
              the gateway stops                            OVER (refused or cut)
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from multiverse_gateway.core.comments import Comments
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.failover import Failure, GiveUp
from multiverse_gateway.core.fairness import Place
from multiverse_gateway.core.load import retry_seconds
from multiverse_gateway.core.servers import Server
from multiverse_gateway.relay.attempt import Attempt
from multiverse_gateway.relay.client_response import TRUNCATED, ClientResponse, choice_headers
from multiverse_gateway.relay.exchange_errors import (
    NO_ROOM_FOR_EVENT,
    REPORTED_ERROR,
    STOPPING,
    interrupted,
    limit_reached,
    no_answer_in_time,
    no_room_for_answer,
    stopping,
)
from multiverse_gateway.relay.ports import Client, ClientRequest, Phase, Sending
from multiverse_gateway.relay.resources import KnownResponses, Resources
from multiverse_gateway.relay.server_search import ServerSearch

DRAINING_SECONDS = 1.0

_WAITING = frozenset({Phase.CHOOSING, Phase.QUEUED, Phase.TRYING, Phase.BACKOFF})
_CHOOSING, _QUEUED, _TRYING, _BACKOFF, _RELAYING, _DRAINING, _OVER = Phase  # a look-up in an enum costs as much as a call


class Places(KnownResponses, Protocol):
    """Where stored responses are (`response_places`)."""

    def locate(self, exchange: "Exchange") -> None:
        """Find the server that has the stored response which the exchange needs; it comes through `located` or `not_located`."""


class Engine(Resources, Protocol):
    """The gateway, as its exchanges see it."""

    @property
    def responses(self) -> Places:
        """Return where stored responses are."""

    def send(self, attempt: Attempt) -> Sending:
        """Send the request of an attempt to its server; the answer comes through its wire methods, never during this call."""

    def explain(self, exchange: "Exchange", server: Server, now: float) -> Mapping[str, object]:
        """Return why this server was chosen: which other ones could have been, and why they were not."""

    def finished(self, exchange: "Exchange") -> None:
        """Take note of the end: log, count, forget."""


class Exchange:
    """The journey of one request from its complete arrival to its answer.

    `due` is the monotonic instant at which the gateway calls `tick`. After `Phase.OVER` the record of what happened stands in `request`,
    `response`, `search` and `attempt`, which is the last attempt. `number` is the gateway's own number of the request, which strikes
    against a server name. `choice_trace`, if it is a list, collects why each server was chosen.
    """

    __slots__ = ("attempt", "choice_trace", "deadline", "due", "engine", "number", "phase", "request", "response", "search")

    def __init__(self, engine: Engine, request: ClientRequest, client: Client) -> None:
        now = engine.now()
        self.engine = engine
        self.request = request
        comments = Comments(now) if request.facts.wants_comments and request.envelope.stream else None
        self.response = ClientResponse(client, request, engine.admission.answers, comments)
        self.search = ServerSearch(self)
        self.attempt: Attempt | None = None
        self.phase = _CHOOSING
        self.deadline = self.due = now + engine.limits.request_timeout  # the body is complete; how long that took does not count
        self.number = 0
        self.choice_trace: list[Mapping[str, object]] | None = [] if request.facts.explains and request.explains else None

    @property
    def running(self) -> Attempt | None:
        """The attempt that holds a slot of its server."""
        return self.attempt if self.attempt is not None and self.attempt.is_running else None

    @property
    def awaits_answer(self) -> bool:
        """Whether the request waits in the queue, or for the first event of a server."""
        return self.phase in _WAITING

    @property
    def events(self) -> int:
        """Number of data events relayed."""
        reader = None if self.attempt is None else self.attempt.reader
        return 0 if reader is None or reader.events is None else reader.events.events

    @property
    def usage(self) -> tuple[int, int]:
        """Prompt and completion tokens as the reader of the answer knows them, 0 without one, and for a report of an earlier request's."""
        reader = None if self.attempt is None else self.attempt.reader
        if reader is None or not self.response.is_committed or self.request.envelope.is_lookup:
            return 0, 0
        return reader.usage

    # From the door

    def start(self) -> None:
        """Begin: choose a server, wait for a slot, or refuse. Without effect when it is over already."""
        if self.phase is not _CHOOSING:
            return
        if self.request.envelope.response_id is None:
            self.search.choose()
        else:
            self.engine.responses.locate(self)

    def client_gone(self) -> None:
        """Drop everything: the client left. No server is to blame."""
        self._leave("client_gone")

    def client_stalled(self) -> None:
        """Drop everything: the client reads no more."""
        self._leave("client_stalled")

    def _leave(self, code: str) -> None:
        if self.phase in (_OVER, _DRAINING):
            return
        self.response.cancel(code)
        self._abandon_attempt()
        self.end()
        self.response.release()

    def client_clogged(self) -> None:
        """Stop reading from the server until the client has read what was sent; no comment is written meanwhile."""
        response = self.response
        if self.phase is _RELAYING and not response.is_clogged:
            response.is_clogged = True
            self._current().wait_for_client()
        elif response.comments is not None:
            response.is_clogged = True

    def client_drained(self) -> None:
        """Resume reading from the server."""
        was_clogged, self.response.is_clogged = self.response.is_clogged, False
        if self.phase is _RELAYING and was_clogged:
            self.expect_more()
            attempt = self._current()
            assert attempt.reader is not None
            attempt.reader.read_on()

    def taken(self) -> None:
        """Stop counting the answer as held: the client has all of it, or is gone."""
        self.response.release()

    # From the gateway

    def located(self, server: Server) -> None:
        """Send the request to the server that has the stored response, and to no other."""
        if self.phase is _CHOOSING:
            self.search.choose_at(server)

    def not_located(self, error: GatewayError) -> None:
        """Refuse the request: the stored response is unknown, or cannot be looked up now."""
        if self.phase is _CHOOSING:
            self.refuse(error)

    def postpone(self, seconds: float) -> None:
        """Move all deadlines: the process was stopped for so long, and what its sockets hold was not read yet."""
        self.due += seconds
        self.deadline += seconds
        self.search.postpone(seconds)
        if self.attempt is not None:
            self.attempt.postpone(seconds)

    def tick(self, now: float) -> None:
        """Do what was to be done at `due`, if that has come at this instant: another exchange's tick may just have moved it."""
        phase = self.phase
        if now < self.due or phase is _OVER:
            return
        if phase is _DRAINING:
            self._abandon_attempt()
            self.end()
        elif phase is _QUEUED:
            self.search.choose()
        elif now >= self.deadline:
            if phase is _RELAYING:
                self.break_answer(None)
            else:
                self._abandon_attempt()
                self.refuse(no_answer_in_time(self.engine.limits))
        elif phase is _BACKOFF:
            self.search.begin_retry()
        elif phase is not _CHOOSING:
            self._current().tick(now)

    def comment(self, place: Place | None, now: float) -> None:
        """Write a comment if one is due; `place` is that in the queue, `None` for a request that waits for a server's first event.

        Only if the response `may_comment`.
        """
        if self.awaits_answer and (place is not None or self.search.tried):
            self.response.comment(place, self.search.tried, now)

    def interrupt(self) -> None:
        """End now, telling the client that the gateway is shutting down."""
        if self.phase not in (_OVER, _DRAINING):
            self._stop(STOPPING, "gateway_shutting_down", stopping())

    # From the search

    def begin_attempt(self, server: Server, now: float) -> None:
        """Take a slot of a server, and send it the request."""
        engine, search = self.engine, self.search
        if search.is_waiting:
            self.deadline += now - search.joined_at  # waiting has a limit of its own
        self.phase = _TRYING
        search.tried += 1
        if self.choice_trace is not None:
            self.choice_trace.append(engine.explain(self, server, now))
        if self.response.held:
            self.response.release()
            search.forget_body()
        attempt = self.attempt = Attempt(self, engine, search, server, now)
        attempt.sending = engine.send(attempt)

    def refuse(self, error: GatewayError) -> None:
        """End with an error of the gateway."""
        self.response.refuse(error, self._own_headers())
        self.end()

    def give_up(self, verdict: GiveUp) -> None:
        """End with what is left of the failed attempts: an error of the gateway, or the last server's own."""
        if verdict.relay is None:
            assert verdict.error is not None
            self.refuse(verdict.error)
        else:
            self.response.relay_failure(verdict.relay, self._own_headers())
            self.end()

    # From the attempt

    def fail_attempt(self, failure: Failure) -> None:
        """End the attempt, and decide what is next."""
        attempt = self._current()
        attempt.abort()
        attempt.release(failure)
        self.search.failures += (attempt.blame(failure, self.number),)
        self.search.after_failure(attempt.server)
        self._offer_slot()

    def repeat_without_usage(self) -> None:
        """Make the same attempt again: what the server refuses may be nothing that the client said. It counts once."""
        attempt, engine, search = self._current(), self.engine, self.search
        search.usage_refused_by = attempt.server
        search.retry, attempt.retry = attempt.retry, None
        search.tried -= 1
        attempt.release(None)
        if engine.is_registered(attempt.server):
            self.begin_attempt(attempt.server, engine.now())
        else:
            search.choose()
            self._offer_slot()

    def answer(self, content_type: bytes, body: bytes) -> None:
        """Pass a whole answer on."""
        now = self.engine.now()
        attempt = self._commit(now)
        cut = (TRUNCATED,) if self.request.envelope.needs is not None and attempt.was_cut else ()
        self.response.answer(attempt.status, [(b"content-type", content_type), *self._own_headers(), *cut], body)
        attempt.release(None)
        self.engine.health_book.passed(attempt.server, self.request.envelope.call)
        self.end(now)
        if self.engine.room.queue.total_waiting:  # as `_offer_slot` asks; most answers need no call of it
            self._offer_slot()

    def begin_answer(self, content_type: bytes, *, is_stream: bool = False) -> None:
        """Commit to an answer that is relayed as it comes."""
        now = self.engine.now()
        attempt = self._commit(now)
        self.deadline = now + self.engine.limits.max_stream_seconds
        self.due = min(now + self.engine.limits.idle_timeout, self.deadline)
        self.response.begin(attempt.status, content_type, self._own_headers(), is_stream=is_stream)
        if self.response.is_clogged:
            attempt.wait_for_client()

    def _commit(self, now: float) -> Attempt:
        """Pass the commit point: the answer of this attempt is the one that the client gets."""
        attempt = self.attempt
        assert attempt is not None
        self.phase = _RELAYING
        self.response.is_committed = True
        attempt.first_byte_seconds = now - attempt.began
        if attempt.asks_usage:
            self.engine.requests.usage_accepted(attempt.server)
        elif attempt.status < 300 and self.search.usage_refused_by is attempt.server:
            self.engine.requests.usage_refused(attempt.server)
        return attempt

    def expect_more(self) -> None:
        """Set the instant by which more of the answer has to come."""
        if not self.response.is_clogged:
            due = self.engine.now() + self.engine.limits.idle_timeout
            self.due = due if due < self.deadline else self.deadline

    def complete(self) -> None:
        """End a complete answer, or an error that the server reported; the connection may still deliver the rest of its ending."""
        attempt, engine = self._current(), self.engine
        events = None if attempt.reader is None else attempt.reader.events
        self.response.end()
        if events is not None and events.failed:
            self.response.error_code = "upstream_error"
            attempt.release(REPORTED_ERROR)
            self.search.failures += (attempt.blame(REPORTED_ERROR, self.number),)
        else:
            attempt.release(None)
            engine.health_book.passed(attempt.server, self.request.envelope.call)
        if events is not None and events.carries_more:
            engine.requests.usage_refused(attempt.server)
        if attempt.sending is None:
            self.end()
        else:
            self.phase = _DRAINING
            self.due = engine.now() + DRAINING_SECONDS
            attempt.resume()
        self._offer_slot()

    def break_answer(self, failure: Failure | None) -> None:
        """End a committed answer that cannot be completed; `failure` is `None` when a limit of the gateway ends it."""
        attempt = self._current()
        attempt.abort()
        attempt.release(failure)
        if failure is not None:
            self.search.failures += (attempt.blame(failure, self.number),)
            self._cut(interrupted(failure), "upstream_stream_interrupted")
        else:
            assert attempt.reader is not None
            self._cut(limit_reached(self.engine.limits, attempt.reader.received, attempt.reader.events), "stream_limit_reached")
        self._offer_slot()

    def hold(self, count: int) -> bool:
        """Hold so many bytes of the answer in all; without room for them the request ends, and no server is to blame."""
        if self.response.hold(count):
            return True
        self._stop(NO_ROOM_FOR_EVENT, "overloaded", no_room_for_answer(retry_seconds(self.engine.random())))
        self._offer_slot()
        return False

    def refuse_answer(self, error: GatewayError) -> None:
        """Refuse an answer over a limit of the gateway: another server's would be as large, and none is to blame."""
        self._abandon_attempt()
        self.refuse(error)

    # Parts of these

    def _current(self) -> Attempt:
        """Return the last attempt, in a phase in which there is one. No property: to read one costs three times as much as a call."""
        assert self.attempt is not None
        return self.attempt

    def _own_headers(self) -> Sequence[tuple[bytes, bytes]]:
        headers = self.search.headers(None if self.attempt is None else self.attempt.server)
        if self.choice_trace is not None and self.request.explains:
            return [*headers, *choice_headers(self.choice_trace)]
        return headers

    def _stop(self, message: str, code: str, error: GatewayError) -> None:
        """End with an error of the gateway's own: after the commit point with a message, if there are events."""
        self._abandon_attempt()
        if self.response.is_committed:
            self._cut(message, code)
        else:
            self.refuse(error)

    def _cut(self, message: str, code: str) -> None:
        """End a committed answer without its rest."""
        reader = self._current().reader
        self.response.cut(message, code, None if reader is None else reader.events)
        self.end()

    def _abandon_attempt(self) -> None:
        """Stop everything that is running, without blaming a server."""
        self.engine.room.queue.leave(self.search, self.engine.now())
        attempt = self.attempt
        if attempt is not None:
            attempt.abort()
            if attempt.is_running:
                attempt.release(None)
                self._offer_slot()

    def _offer_slot(self) -> None:
        """Offer the slot that was given back to the requests that wait."""
        if self.engine.room.queue.total_waiting:
            self.engine.room.slot_freed(self.request.envelope.model, self.engine.now(), self._current().server.host_id)

    def end(self, now: float | None = None) -> None:
        """End the exchange, after the client got its response or left."""
        self.phase = _OVER
        if self.search.retry is not None:
            self.search.retry.release()
        self.engine.room.queue.end(self.search, self.engine.now() if now is None else now)
        self.engine.finished(self)
        self.search.let_go()
        if self.attempt is not None:
            del self.attempt.exchange
