"""One attempt: a request on one server, from the slot that it takes to the slot that it gives back.

1. It holds its slot until `release`, which comes exactly once, whatever happens: the exchange calls it before another attempt begins.
2. The wire calls `head` once, then `body` for each piece, then `end`; or `failed` at any time; and nothing after `abort`. A reader
   takes the body, chosen by the head. What it finds out goes to the exchange, which decides what follows.
3. A server that keeps the request waiting too long is probed once. It has more time while it passes; then the attempt fails.
4. Once the slot is given back, the attempt only waits for the end of its connection, and reads nothing more.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from multiverse_gateway.core.content_types import relayed_type
from multiverse_gateway.core.failover import FailedAttempt, Failure, FailureClass, unusable_head
from multiverse_gateway.core.health import AttemptFailed
from multiverse_gateway.core.patience import first_byte_allowance
from multiverse_gateway.core.servers import Server
from multiverse_gateway.core.stored import usable_id
from multiverse_gateway.relay.answer_reader import Reader
from multiverse_gateway.relay.body_readers import ErrorReader, JsonReader, RawReader
from multiverse_gateway.relay.event_reader import EventReader
from multiverse_gateway.relay.ports import Sending
from multiverse_gateway.relay.resources import Journey, Resources
from multiverse_gateway.relay.server_search import ServerSearch

SILENCE_FACTOR = 5
"""A server that passes a probe may be silent in the middle of an answer for so many times the idle timeout."""

_BLAMELESS = frozenset({FailureClass.CLIENT_ERROR, FailureClass.TRANSIENT, FailureClass.LOCAL})
_FAILED_PROBE = Failure(FailureClass.TIMEOUT, "no data, and the server failed a probe")
_KNOWN_REFUSALS = frozenset({401, 403, 404, 405, 408, 413, 429})
"""Statuses of 4xx that say something else than that a field of the request is not known."""
_NO_HEADERS: Mapping[bytes, bytes] = MappingProxyType({})


def _ignore(data: bytes) -> None:
    """Drop a piece of a body that is not needed."""


class Attempt:
    """One request to one server; the receiver of what the wire reads.

    To make it takes a slot, and sets the instant by which the first byte has to come.

    `asks_usage`: the server is asked for the token counts of a stream, though the client does not ask for them. `is_replay`: the attempt
    repeats one whose kept connection ended unanswered, so it needs a new one. `retry` is the share of the retry budget that it uses.
    `first_byte_seconds` is known from the commit point on.
    """

    __slots__ = (
        "_asked_until",
        "_is_paused",
        "asks_usage",
        "began",
        "body",
        "exchange",
        "first_byte_seconds",
        "headers",
        "is_replay",
        "is_running",
        "limits",
        "reader",
        "request",
        "resources",
        "retry",
        "search",
        "sending",
        "server",
        "status",
    )

    def __init__(self, exchange: Journey, resources: Resources, search: ServerSearch, server: Server, now: float) -> None:
        request = self.request = exchange.request
        limits = self.limits = resources.limits
        envelope, queue = request.envelope, resources.room.queue
        self.exchange = exchange
        self.resources = resources
        self.search = search
        self.server = server
        self.began = now
        self.asks_usage = envelope.leaves_usage and resources.requests.may_ask_usage(server, search.usage_refused_by)
        self.is_replay = search.is_replay_at(server) if search.failures else False
        self.retry, search.retry = search.retry, None
        self.sending: Sending | None = None
        self.first_byte_seconds: float | None = None
        self.status = 0
        self.headers = _NO_HEADERS
        self.reader: Reader | None = None
        self.body: Callable[[bytes], None] = _ignore  # then `feed` of the reader: a method that calls it would cost 2 % of each chunk
        self.is_running = True
        self._asked_until = 0.0
        self._is_paused = False
        if envelope.is_lookup:  # needs no slot
            queue.leave(search, now)
        else:
            queue.begin(search, now, server.host_id)
        resources.load.started(server.id, envelope.model, server.host_id)
        timeout, deadline = limits.first_byte_timeout, exchange.deadline
        if 2 * timeout > deadline - now and search.has_substitute(server, now):
            timeout = (deadline - now) / 2
        due = now + timeout
        exchange.due = due if due < deadline else deadline

    @property
    def received(self) -> int:
        """Bytes of the answer that arrived so far; its head counts as one."""
        return (self.status != 0) + (0 if self.reader is None else self.reader.received)

    @property
    def was_cut(self) -> bool:
        """Whether the server has probably read only a part of the request's text."""
        needs, reader = self.request.envelope.needs, self.reader
        return needs is not None and reader is not None and self.resources.health_book.was_cut(self.server, needs, reader.usage[0])

    # The slot

    def release(self, failure: Failure | None) -> None:
        """Give the slot back, and the share of the retry budget: the attempt is over. `failure` counts against the server's latency."""
        assert self.is_running
        self.is_running = False
        self.body = _ignore
        if self.reader is not None:
            self.reader.close()
        envelope, resources = self.request.envelope, self.resources
        if envelope.needs is not None and failure is None and self.was_cut:
            resources.health_book.note_cut(self.server)
        resources.room.queue.release(self.search)
        resources.load.finished(
            self.server.id,
            envelope.model,
            self.server.host_id,
            seconds=None if envelope.is_lookup else self.first_byte_seconds,
            failed=failure is not None and failure.kind not in _BLAMELESS and not failure.is_stale,
            first_byte_timeout=self.limits.first_byte_timeout,
        )
        if self.retry is not None:
            self.retry.release()

    def blame(self, failure: Failure, number: int) -> FailedAttempt:
        """Report the failure to the health of the server, which counts it once per request; `number` is that of the request."""
        server = self.server
        event = AttemptFailed(
            generation=server.generation,
            client=self.request.caller.quota,
            number=number,
            failure=failure,
            path=self.request.envelope.call,
            counts=not failure.is_stale,
        )
        self.resources.health_book.report(server.id, event)
        return FailedAttempt(server_id=server.id, failure=failure, has_key=server.api_key is not None)

    def abort(self) -> None:
        """Close the connection, if there still is one."""
        if self.sending is not None:
            sending, self.sending = self.sending, None
            sending.abort()

    def pause(self) -> None:
        """Stop reading from the server."""
        if self.sending is not None and not self._is_paused:
            self._is_paused = True
            self.sending.pause()

    def wait_for_client(self) -> None:
        """Stop reading from the server; the client has until the deadline to read what was sent."""
        self.exchange.due = self.exchange.deadline
        self.pause()

    def resume(self) -> None:
        """Resume reading from the server."""
        if self.sending is not None and self._is_paused:
            self._is_paused = False
            self.sending.resume()

    # From the wire

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        """Take the head of the answer, and choose a reader for its body."""
        self.status = status
        self.headers = headers
        if not 200 <= status < 300:
            self.read_with(ErrorReader(self))
            return
        envelope = self.request.envelope
        failure = unusable_head(status, headers, stream=envelope.stream, checks_json=envelope.answers_json)
        if failure is not None and not failure.may_hold_error:
            self.exchange.fail_attempt(failure)
            return
        content_type = relayed_type(headers.get(b"content-type"), envelope.answers_json)
        if content_type.startswith(b"text/event-stream"):  # in lower case now, and no other allowed type begins so
            self.reader = EventReader(self, content_type)
        elif envelope.answers_json:
            self.reader = JsonReader(self, content_type)
        else:
            self.reader = RawReader(self, content_type)
        self.body = self.reader.feed

    def read_with(self, reader: Reader) -> None:
        """Let this reader take the rest of the body."""
        if self.reader is not None:
            self.reader.close()
        self.reader = reader
        self.body = reader.feed

    def end(self) -> None:
        """Take the regular end of the body."""
        self.sending = None
        if self.is_running:
            assert self.reader is not None, "there is no end without a head"
            self.reader.end()
        else:
            self.exchange.end()

    def failed(self, failure: Failure) -> None:
        """Take any other end of the connection."""
        self.sending = None
        if not self.is_running:
            self.exchange.end()
        elif self.reader is not None:
            self.reader.failed(failure)
        else:
            self.exchange.fail_attempt(failure)

    # From the reader

    def may_refuse_usage(self, status: int) -> bool:
        """Return whether the server may have refused the field that the gateway added; servers do it in many words."""
        if not self.asks_usage:
            return False
        refuses = (400 <= status < 500 and status not in _KNOWN_REFUSALS) or status in (500, 501)
        return refuses and not self.resources.requests.accepts_usage(self.server)

    def note_response(self, value: object) -> None:
        """Remember the id of a stored response before the client can use it."""
        response_id = usable_id(value)
        if response_id is not None:
            self.resources.responses.keep(self.request.caller.quota, self.server, response_id)

    # Waiting for the server

    def tick(self, now: float) -> None:
        """Give a server more time that may only be slow, once; then fail the attempt."""
        exchange, reader = self.exchange, self.reader
        is_committed = exchange.response.is_committed
        is_silent = is_committed or (reader is not None and reader.holds_part)
        if exchange.due == self._asked_until:
            waited = f"no first byte within {now - self.began:.0f} s (FIRST_BYTE_TIMEOUT_SECONDS)"
            failure = Failure(FailureClass.TIMEOUT, self._silence() if is_silent else waited)
            if is_committed:
                exchange.break_answer(failure)
            else:
                exchange.fail_attempt(failure)
        elif is_silent:
            self._ask_about_silence()
        else:
            self._extend(now)

    def _silence(self) -> str:
        return f"no data for {self.limits.idle_timeout * SILENCE_FACTOR:g} s (IDLE_TIMEOUT_SECONDS)"

    def _extend(self, now: float) -> None:
        """Give the server the time that a prompt and an answer of this size may take; a probe finds out meanwhile whether it lives."""
        exchange, request = self.exchange, self.request
        until = exchange.deadline
        if self.search.has_substitute(self.server, now):
            allowance = first_byte_allowance(self.limits.first_byte_timeout, request.body, stream=request.envelope.stream)
            until = max(now, self.began + min(allowance, (exchange.deadline - self.began) / 2))
        self._ask(until)

    def _ask_about_silence(self) -> None:
        """Probe a server that fell silent in the middle of its answer; while it passes, it may be silent for longer."""
        idle_timeout = self.limits.idle_timeout
        self._ask(min(self.exchange.deadline, self.exchange.due - idle_timeout + idle_timeout * SILENCE_FACTOR))

    def _ask(self, until: float) -> None:
        self.exchange.due = self._asked_until = until
        self.resources.checks.ask(self.server, self.probed)

    def probed(self, alive: bool) -> None:
        """Take the result of the probe; without effect once any data came."""
        if alive or not self.is_running or self.exchange.due != self._asked_until:
            return
        if self.exchange.response.is_committed:
            self.exchange.break_answer(_FAILED_PROBE)
        else:
            self.exchange.fail_attempt(_FAILED_PROBE)

    def postpone(self, seconds: float) -> None:
        """Move the instant until which the server has time: the process was stopped for so long."""
        self._asked_until += seconds
