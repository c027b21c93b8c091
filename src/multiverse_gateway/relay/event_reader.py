"""Read the stream of one attempt: relay its events as they come, some at a time, and find out how it ends.

1. What comes before the first event is not relayed, and commits to nothing. A first event that is an error fails the attempt.
2. At most `sse.EVENTS_PER_CALL` events are handled in one turn of the event loop, and the server is not read until all are handled.
   Its end waits for that, too.
3. Nothing is read while the client is clogged, and little from a server that sends noise.
4. A reader is closed when its attempt gives its slot back. Calls that come later, of timers and turns, do nothing.
"""

from collections.abc import Callable
from functools import partial

from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.sse import DONE_EVENT, EventStream
from multiverse_gateway.relay.answer_reader import Answered, fail_as_reported
from multiverse_gateway.relay.exchange_errors import REPORTED_ERROR, event_too_large
from multiverse_gateway.relay.ports import UNCOUNTED_BYTES

NOISE_BYTES = 16384
"""A read of this size without a single event is noise: blank lines or comments as fast as a server can send them."""
NOISE_SECONDS = 0.05
"""How long a server is not read after such a read; a comment now and then is relayed at once."""

_NO_EVENT = Failure(FailureClass.NONSENSE, "a stream with comments but without events")
_ENDED_EARLY = Failure(FailureClass.BROKEN, "the stream ended too early", after_request=True)
_CHAT = Dialect.CHAT  # a look-up in an enum costs as much as a call


class EventReader:
    """The reader of a stream. `feed` takes the pieces of the body, `end` and `failed` how it ended."""

    __slots__ = (
        "_attempt",
        "_ending",
        "_exchange",
        "_limits",
        "_noticed",
        "_resources",
        "_response",
        "content_type",
        "events",
        "is_open",
        "received",
    )

    def __init__(self, attempt: Answered, content_type: bytes) -> None:
        limits, exchange, envelope = attempt.limits, attempt.exchange, attempt.request.envelope
        self.events = EventStream(
            envelope.dialect,
            max_event_bytes=limits.max_event_bytes if envelope.dialect is _CHAT else limits.max_large_event_bytes,
            drops_usage=attempt.asks_usage,
            on_response=attempt.note_response if envelope.stores_response else None,
        )
        self.content_type = content_type
        self.received = 0
        self.is_open = True
        self._attempt = attempt
        self._exchange = exchange
        self._response = exchange.response
        self._resources = attempt.resources
        self._limits = limits
        self._noticed = -1
        self._ending: Callable[[], None] | None = None

    @property
    def holds_part(self) -> bool:
        """Return false: it collects nothing before it answers."""
        return False

    @property
    def usage(self) -> tuple[int, int]:
        """Prompt and completion tokens as the server reported them; of a stream that ended early, at least those that came."""
        events = self.events
        if self._response.error_code is None:
            return events.reported_tokens
        prompt_tokens, completion_tokens = events.reported_tokens
        return prompt_tokens, max(completion_tokens, events.counted_tokens)

    def close(self) -> None:
        """Take no more, and hold the attempt and the exchange no longer, or they would be a cycle."""
        self.is_open = False
        self._ending = None
        self.events.on_response = None
        del self._attempt, self._exchange

    def feed(self, data: bytes) -> None:
        """Take a piece of the body. Called for every chunk: `send` and `expect_more` are written out, which saves two calls."""
        self.received += len(data)
        events, response = self.events, self._response
        whole = events.feed(data)
        if response.is_committed:
            if whole:
                response.sent_bytes += len(whole)
                response.client.body(whole)
            if not response.is_clogged:
                exchange = self._exchange
                due = self._resources.now() + self._limits.idle_timeout
                exchange.due = due if due < exchange.deadline else exchange.deadline
        else:
            self._before_first_event(whole)
            if not self.is_open:
                return
        if events.is_over or self.received > self._limits.max_stream_bytes:
            self._end_by_itself()
        elif not whole or response.held or events.has_more or len(data) >= NOISE_BYTES:
            self._hold_unfinished(len(data))

    def end(self) -> None:
        """Take the regular end of the body, once all events before it are handled."""
        if self.events.has_more:
            self._ending = self._end
        else:
            self._end()

    def failed(self, failure: Failure) -> None:
        """Take any other end of the connection, once all events before it are handled."""
        if self.events.has_more:
            self._ending = partial(self._fail, failure)
        else:
            self._fail(failure)

    def _before_first_event(self, whole: bytes) -> None:
        events, exchange = self.events, self._exchange
        if events.first_error is not None:
            fail_as_reported(self._attempt, events.first_error)
        elif events.has_data:
            exchange.begin_answer(self.content_type, is_stream=True)
            self._response.send(whole)
        elif events.over_limit:
            exchange.refuse_answer(event_too_large(events))
        elif events.broken is not None:
            exchange.fail_attempt(Failure(FailureClass.NONSENSE, events.broken))
        elif self.received > self._limits.max_stream_bytes:
            exchange.fail_attempt(_NO_EVENT)

    def _end_by_itself(self) -> None:
        """End a stream that came to its own end, or to the end of what may be relayed of it."""
        events, exchange = self.events, self._exchange
        if events.ended:
            exchange.complete()
        elif events.failed:
            exchange.break_answer(REPORTED_ERROR)
        elif events.broken is None or events.over_limit:
            exchange.break_answer(None)
        else:
            exchange.break_answer(Failure(FailureClass.NONSENSE, events.broken))

    def _end(self) -> None:
        events = self.events
        whole = events.finish()
        if not self._response.is_committed:
            self._before_first_event(whole)
        elif whole:
            self._response.send(whole)
        if self.is_open and events.is_over:
            self._end_by_itself()
        if not self.is_open:
            return
        if events.complete():
            if events.needs_done:
                self._response.send(DONE_EVENT)
            self._exchange.complete()
        else:
            self._fail(_ENDED_EARLY)

    def _fail(self, failure: Failure) -> None:
        if self._response.is_committed:
            self._exchange.break_answer(failure)
        else:
            self._exchange.fail_attempt(failure)

    # What was read and cannot be relayed yet

    def _hold_unfinished(self, size: int) -> None:
        """Hold what was read of a stream and not relayed: events for the next turns, or a large event that is not complete yet."""
        events = self.events
        if events.has_more:
            self._attempt.pause()
            self._resources.soon(self._handle_more)
        elif events.unfinished > UNCOUNTED_BYTES or self._response.held:
            self._exchange.hold(events.unfinished)
        elif size >= NOISE_BYTES and not events.unfinished:
            self._slow_down()

    def read_on(self) -> None:
        """Continue after the client has read what was sent."""
        if self.events.has_more:
            self._resources.soon(self._handle_more)
        else:
            self._attempt.resume()

    def _handle_more(self) -> None:
        """Handle the next events of what was read, unless the client has to read first."""
        if self.is_open and self.events.has_more and not self._response.is_clogged:
            self.feed(b"")
            self._continue()

    def _continue(self) -> None:
        """Once all events that were read are handled, take the end of the stream, or resume reading."""
        if not self.is_open or self.events.has_more:
            return
        ending, self._ending = self._ending, None
        if ending is not None:
            ending()
        elif not self._response.is_clogged:
            self._attempt.resume()

    def _slow_down(self) -> None:
        """Read a server less often that sends noise: reading it takes time that belongs to others."""
        if self.events.events == self._noticed:
            self._attempt.pause()
            self._resources.later(NOISE_SECONDS, self._continue)
        self._noticed = self.events.events
