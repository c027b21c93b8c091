"""The response to one client: what was sent, and what may still be sent.

1. It is one whole response, or a head, pieces, and either an end or a cut.
2. Comments may send the head of a stream before any answer is known. The status is fixed then, and an error becomes the only event.
3. Bytes that are held for the client count against the budget of all answers until the client has taken them.
4. Nothing is read from a server while the client is clogged, and no comment is written.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec

from multiverse_gateway.core.comments import Comments, headers_comment, place_comment, prefill_comment
from multiverse_gateway.core.error_events import error_event, refusal_event
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.failover import Failure
from multiverse_gateway.core.fairness import Place
from multiverse_gateway.core.load import ByteBudget
from multiverse_gateway.core.servers import ServerId, model_key
from multiverse_gateway.core.sse import EventStream
from multiverse_gateway.core.waits import LEAST_WAIT_SECONDS
from multiverse_gateway.relay.heads import Headers
from multiverse_gateway.relay.ports import Client, ClientRequest

_CLIENT_LEFT = 499
"""The status that nginx logs for a client that left; no client gets it from the gateway itself."""

_Headers = Sequence[tuple[bytes, bytes]]

_EVENT_STREAM = (b"content-type", b"text/event-stream")
_STREAM_HEADERS = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]


class ClientResponse:
    """The response to one request.

    `is_committed`: a server's answer is being relayed, so no other one can be. `is_clogged`: the client has to read first. `held` is
    what counts against the budget. `error_code` says how the request ended; it is `None` after an answer without an error.
    `is_canceled`: the client left, or stopped reading, before the end.
    """

    __slots__ = (
        "_budget",
        "_request",
        "client",
        "comments",
        "error_code",
        "held",
        "is_canceled",
        "is_clogged",
        "is_committed",
        "sent_bytes",
        "status",
    )

    def __init__(
        self,
        client: Client,
        request: ClientRequest,
        budget: ByteBudget,
        comments: Comments | None,
    ) -> None:
        self.client = client
        self._request = request
        self._budget = budget
        self.comments = comments
        self.status = 0
        self.error_code: str | None = None
        self.sent_bytes = 0
        self.held = 0
        self.is_committed = False
        self.is_clogged = False
        self.is_canceled = False

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Send an answer that is whole."""
        self.status = status
        self.sent_bytes = len(body)
        self.client.answer(status, headers, body)

    def begin(self, status: int, content_type: bytes, own_headers: _Headers, *, is_stream: bool) -> None:
        """Send the head of an answer; if a comment sent it before, another comment holds the headers that were not known then."""
        self.status = status
        if self.comments is not None and self.comments.have_begun:
            self.client.body(headers_comment(own_headers))
            return
        headers = [(b"content-type", content_type), *own_headers]
        if is_stream:
            headers += self._stream_headers()
        self.client.head(status, headers)

    def _stream_headers(self) -> Headers:
        return _STREAM_HEADERS[1:] if self._request.envelope.is_lookup else _STREAM_HEADERS  # the front adds `no-store` to every look-up

    def send(self, data: bytes) -> None:
        """Send a piece of the answer."""
        self.sent_bytes += len(data)
        self.client.body(data)

    def end(self) -> None:
        """Finish the answer, which is whole."""
        self.release()
        self.client.end()

    def refuse(self, error: GatewayError, own_headers: _Headers) -> None:
        """Send an error of the gateway."""
        self.release()
        self.error_code = error.code
        headers = [(b"content-type", b"application/json"), *error.headers(), *own_headers]
        self._send_error(error.status, headers, error.body(self._request.envelope.path, self._request.request_id))

    def relay_failure(self, failure: Failure, own_headers: _Headers) -> None:
        """Send a server's own error."""
        self.error_code = "relayed"
        headers = [(b"content-type", failure.content_type), *own_headers]
        if failure.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(failure.retry_after))))
        if failure.is_final:
            headers.append((b"x-should-retry", b"false"))
        self._send_error(failure.status or 502, headers, failure.body or b"")

    def _send_error(self, status: int, headers: Headers, body: bytes) -> None:
        """Send an error: a whole response, or the only event of a stream whose head was sent while it waited.

        Such a stream ends properly, because no part of an answer is missing: Chromium drops the last event of a body that is cut off.
        """
        if self.comments is not None and self.comments.have_begun:
            event = refusal_event(self._request.envelope.dialect, status, body)
            self.sent_bytes = len(event)
            self.client.body(event)
            self.client.end()
        else:
            self.answer(status, headers, body)

    def cancel(self, code: str) -> None:
        """Note that the client takes no more; nothing is sent."""
        self.is_canceled = True
        self.error_code = code
        self.status = _CLIENT_LEFT

    def cut(self, message: str, code: str, events: EventStream | None) -> None:
        """Finish an answer whose rest is missing; `events` are those of a stream, which gets an error event before."""
        self.release()
        self.error_code = code
        if events is not None:
            self.send(error_event(events.dialect, message, code, events.next_sequence_number))
        self.client.cut()

    def may_comment(self, now: float) -> bool:
        """Return whether a comment can be due: cheaper than to find out which."""
        return self.comments is not None and not self.is_clogged and self.comments.may_take(now)

    def comment(self, place: Place | None, tried: int, now: float) -> None:
        """Write a comment if one is due: the place in the queue, or without one the number of attempts. Only if it `may_comment`.

        The first one sends the head.
        """
        comments = self.comments
        assert comments is not None
        has_head = comments.have_begun
        comment = place_comment(place) if place is not None else prefill_comment(tried)
        if comments.take(comment, now):
            if not has_head:
                self.status = 200
                self.client.head(200, [_EVENT_STREAM, *self._stream_headers()])
            self.client.body(comment)

    def hold(self, count: int) -> bool:
        """Hold so many bytes of the answer in all; return whether there was room for them."""
        more = count - self.held
        if more <= 0:
            self._budget.release(-more)
        elif not self._budget.hold(more):
            return False
        self.held = count
        return True

    def release(self) -> None:
        """Stop counting the answer as held: the client has all of it, or is gone, or gets another one."""
        if self.held:
            self._budget.release(self.held)
            self.held = 0


TRUNCATED = (b"x-multiverse-truncated", b"1")
"""Says that the server has probably read only a part of the request's text (`core.needs.was_cut`)."""


def wait_headers(waited_seconds: float) -> Headers:
    """Return the header that says how long the request waited in the queue, if it did."""
    return [(b"x-multiverse-queued-ms", b"%d" % (1000 * waited_seconds))] if waited_seconds >= LEAST_WAIT_SECONDS else []


def model_headers(asked: str, model: str) -> Headers:
    """Return the header that names the model which serves a request for an alias."""
    return [] if model_key(model) == asked or not asked else [(b"x-multiverse-model", model.encode())]


def choice_headers(choice_trace: Sequence[Mapping[str, object]]) -> Headers:
    """Return the header that says why each server was chosen."""
    return [(b"x-multiverse-why", msgspec.json.encode(choice_trace))]


# Saves 1 µs per answer: the headers of one server's answers are nearly always the same.
@lru_cache(maxsize=4096)
def attempt_headers(tried: int, server_id: ServerId | None) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers that say how many attempts were made, and on which server the last one."""
    attempts = (b"x-multiverse-attempts", b"%d" % tried)
    if server_id is None:
        return (attempts,)
    return attempts, (b"x-gateway-server-id", server_id.encode()), (b"x-multiverse-server", server_id.encode())
