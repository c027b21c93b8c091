"""Read the answer of one attempt that is not a stream of events.

Errors and JSON are collected, because the whole body decides what they mean; large embeddings are relayed before their end, and so is
every other type. What is collected beyond `UNCOUNTED_BYTES` counts against the budget of all answers.
"""

from typing import ClassVar

from msgspec import Struct, field

from multiverse_gateway.core.answers import PassingJson, read_answer
from multiverse_gateway.core.failover import JSON_FOR_STREAM, Failure, FailureClass, classify
from multiverse_gateway.core.stored import id_of
from multiverse_gateway.relay.answer_reader import Answered, fail_as_reported
from multiverse_gateway.relay.exchange_errors import answer_too_large
from multiverse_gateway.relay.ports import UNCOUNTED_BYTES

MAX_ERROR_BYTES = 65536
EMBEDDINGS = "/v1/embeddings"
MAX_HELD_EMBEDDINGS = 1 << 20
"""Embeddings up to this size are held until they are known to be whole; larger ones are relayed as they come."""

_NOT_JSON = "an answer that is not JSON"
_ENDED_EARLY = Failure(FailureClass.BROKEN, "the answer ended too early", after_request=True)


class _BodyReader(Struct, eq=False):
    """What readers of bodies have in common."""

    attempt: Answered
    content_type: bytes = b""
    received: int = 0
    usage: tuple[int, int] = (0, 0)
    events: ClassVar[None] = None

    @property
    def holds_part(self) -> bool:
        return False

    def failed(self, failure: Failure) -> None:
        exchange = self.attempt.exchange
        if exchange.response.is_committed:
            exchange.break_answer(failure)
        else:
            exchange.fail_attempt(failure)

    def read_on(self) -> None:
        self.attempt.resume()

    def close(self) -> None:
        del self.attempt


class _Collected(_BodyReader):
    """A reader of bodies that must be known in full."""

    chunks: list[bytes] = []  # each reader gets one of its own

    @property
    def holds_part(self) -> bool:
        return bool(self.chunks)

    def feed(self, data: bytes) -> None:
        self.chunks.append(data)
        self.received += len(data)
        if self.received <= self.attempt.limits.unchecked_bytes or self._may_keep():
            self._kept()

    def close(self) -> None:
        self.chunks = []  # the exchange lives until its client has read a refusal
        del self.attempt

    def _may_keep(self) -> bool:
        """Return whether a large body is still collected; else the request is over, or another reader relays the body."""
        if self.received > self.attempt.limits.max_response_bytes:
            self.attempt.exchange.refuse_answer(answer_too_large(self.attempt.limits))
            return False
        return self._count()

    def _count(self) -> bool:
        """Hold what was collected, unless every exchange may hold as much."""
        return self.received <= UNCOUNTED_BYTES or self.attempt.exchange.hold(self.received)

    def _kept(self) -> None:
        """Decide what follows from the size of what was collected."""

    def _body(self) -> bytes:
        """Return what was collected, and hold it no longer: the client may take long to read it."""
        chunks, self.chunks = self.chunks, []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class ErrorReader(_Collected):
    """The reader of an answer whose status is not 2xx. The beginning of a server's own error is enough."""

    def _kept(self) -> None:
        if self.attempt.status >= 500 and self.received > MAX_ERROR_BYTES:
            self.attempt.exchange.fail_attempt(self._classified())

    def end(self) -> None:
        """Fail the attempt, now that it is known why."""
        attempt = self.attempt
        if attempt.may_refuse_usage(attempt.status):
            attempt.exchange.repeat_without_usage()
        else:
            attempt.exchange.fail_attempt(self._classified())

    def _classified(self) -> Failure:
        attempt = self.attempt
        envelope, status = attempt.request.envelope, attempt.status
        failure = classify(
            status,
            attempt.headers,
            self._body(),
            stream=envelope.stream,
            checks_json=envelope.answers_json,
            now_wall=attempt.resources.wall(),
            request=attempt.request.body,
            names_response=envelope.names_response,
            answered_before=status == 404 and attempt.resources.health_book.has_answered(attempt.server, envelope.call),
        )
        assert failure is not None, "only 2xx are good answers"
        return failure


class JsonReader(_Collected):
    """The reader of an answer in JSON."""

    def feed(self, data: bytes) -> None:
        """Collect a piece. While the answer is small and no stream was asked for, nothing is to be decided, which saves a call."""
        attempt = self.attempt
        if attempt.request.envelope.stream or self.received + len(data) > attempt.limits.unchecked_bytes:
            super().feed(data)
        else:
            self.chunks.append(data)
            self.received += len(data)
            attempt.exchange.expect_more()

    def _may_keep(self) -> bool:
        if self.attempt.request.envelope.path != EMBEDDINGS:
            return super()._may_keep()
        if self.received <= MAX_HELD_EMBEDDINGS:
            return self._count()
        self._begin_to_pass()
        return False

    def _begin_to_pass(self) -> None:
        """Commit a large answer before its end, and relay what comes of it at once."""
        attempt, body = self.attempt, self._body()
        passing = PassingReader(attempt, received=self.received)
        attempt.read_with(passing)
        attempt.exchange.response.release()
        attempt.exchange.begin_answer(self.content_type)
        passing.pass_on(body)

    def _kept(self) -> None:
        if self.attempt.request.envelope.stream and self.received > MAX_ERROR_BYTES:
            self.attempt.exchange.fail_attempt(self._not_a_stream())
        else:
            self.attempt.exchange.expect_more()

    def end(self) -> None:
        """Answer the client, if the answer is one; fail the attempt otherwise."""
        attempt, chunks = self.attempt, self.chunks  # `close` lets go of them: `_body` would cost 0.3 % of a request
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        answer = read_answer(body)
        if answer is None:
            attempt.exchange.fail_attempt(Failure(FailureClass.NONSENSE, _NOT_JSON, attempt.status))
        elif answer.reports_error:
            fail_as_reported(attempt, body)
        elif attempt.request.envelope.stream:
            attempt.exchange.fail_attempt(self._not_a_stream())
        else:
            self.usage = answer.tokens
            if attempt.request.envelope.stores_response:
                attempt.note_response(id_of(body))
            attempt.exchange.answer(self.content_type, body)

    def _not_a_stream(self) -> Failure:
        return Failure(FailureClass.NONSENSE, JSON_FOR_STREAM, self.attempt.status)


class PassingReader(_BodyReader):
    """The reader of the rest of a large answer in JSON, which is relayed; only its structure is checked."""

    json: PassingJson = field(default_factory=PassingJson)

    def feed(self, data: bytes) -> None:
        """Count and relay a piece of the body."""
        self.received += len(data)
        self.pass_on(data)

    def pass_on(self, data: bytes) -> None:
        """Relay a piece of the body that is counted already."""
        attempt = self.attempt
        exchange = attempt.exchange
        self.json.feed(data)
        exchange.response.send(data)
        exchange.expect_more()
        if self.json.is_broken:
            exchange.break_answer(Failure(FailureClass.NONSENSE, _NOT_JSON, attempt.status))
        elif self.received > attempt.limits.max_embeddings_bytes:
            exchange.break_answer(None)

    def end(self) -> None:
        """Complete the answer, if its structure is whole."""
        if self.json.is_whole:
            self.usage = self.json.tokens
            self.attempt.exchange.complete()
        else:
            self.attempt.exchange.break_answer(_ENDED_EARLY)


class RawReader(_BodyReader):
    """The reader of any other answer: it is relayed as it comes."""

    def feed(self, data: bytes) -> None:
        """Relay a piece of the body; the first one commits to the answer."""
        self.received += len(data)
        attempt = self.attempt
        exchange = attempt.exchange
        if not exchange.response.is_committed:
            exchange.begin_answer(self.content_type)
        exchange.response.send(data)
        exchange.expect_more()
        if self.received > attempt.limits.max_stream_bytes:
            exchange.break_answer(None)

    def end(self) -> None:
        """Complete the answer, even one without a body."""
        exchange = self.attempt.exchange
        if exchange.response.is_committed:
            exchange.complete()
        else:
            exchange.answer(self.content_type, b"")
