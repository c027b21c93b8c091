"""One client of the direct door: its requests, one after the other. The states and what leads from one to another: see `relay.listener`."""

import asyncio
import re
from collections.abc import Callable
from enum import Enum
from math import inf
from typing import Final, Generic, Protocol, cast

import attrs

from multiverse_gateway.relay.heads import Heads, RequestHead
from multiverse_gateway.relay.intake_port import IntakePort, V
from multiverse_gateway.relay.read_ahead import ReadAhead
from multiverse_gateway.relay.request_body import DROPPED_BYTES, WHOLE_BODY, ChunkedBody, MalformedBodyError, PlainBody, begin_chunked
from multiverse_gateway.relay.response_writer import ResponseWriter

HIGH_WATER: Final = 16384
AHEAD_BYTES: Final = 65536
"""What a client may send before its answer is complete; more ends the connection after that answer."""
SPARED_BYTES: Final = 65536
"""A refused body of which no more than this is missing is dropped, and the connection kept."""
FAREWELL_SECONDS: Final = 0.5
"""How long a connection that was made right before the end may take until its first request, which is then answered."""

_EMPTY_LINES: Final = re.compile(rb"(?:\r?\n)+")
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@attrs.frozen(kw_only=True)
class Patience:
    """Seconds that a client has: for its first head, between two requests, for reading, for the rest of a refused body."""

    head: float
    keep_alive: float
    write: float
    dropping: float


class _State(Enum):
    READY = "ready"
    ADMITTING = "admitting"
    READING = "reading"
    BUSY = "busy"
    DROPPING = "dropping"
    CLOSING = "closing"


# Every callback compares states, and in Python 3.11 reading a member of an enum costs as much as a call; a global does not.
_READY, _ADMITTING, _READING, _BUSY, _DROPPING, _CLOSING = _State


class Door(Protocol[V]):
    """What the connections of a listener share."""

    @property
    def time(self) -> Callable[[], float]:
        """Return the clock of the event loop."""

    @property
    def closing(self) -> bool:
        """Return whether connections close after their response."""

    @property
    def date(self) -> bytes:
        """Return the header line with the current time."""

    @property
    def intake(self) -> IntakePort[V]:
        """Return the rules for incoming requests."""

    @property
    def heads(self) -> Heads:
        """Return the reader of heads."""

    @property
    def head_bytes(self) -> int:
        """Return how long a head may be."""

    @property
    def patience(self) -> Patience:
        """Return the seconds that clients have."""

    @property
    def hand_over(self) -> Callable[[asyncio.Transport, bytes], None]:
        """Return the function that takes connections which are not for this door."""

    def add(self, connection: "ClientConnection[V]") -> None:
        """Add a connection that has just been opened."""

    def discard(self, connection: "ClientConnection[V]") -> None:
        """Remove a connection that has been closed."""


class ClientConnection(asyncio.Protocol, Generic[V]):
    """One client, from the first byte to the last."""

    __slots__ = (
        "_admitting",
        "_ahead",
        "_asked",
        "_begun",
        "_body",
        "_door",
        "_head",
        "_peer",
        "_pieces",
        "_state",
        "_unsent",
        "due",
        "request",
        "transport",
        "writer",
    )

    transport: asyncio.Transport
    writer: ResponseWriter
    _head: RequestHead

    def __init__(self, door: Door[V]) -> None:
        self._door = door
        self._state = _READY
        self._peer: str | None = None
        self._asked = False
        self._body: PlainBody | ChunkedBody = WHOLE_BODY
        self._pieces: list[bytes] = []
        self._begun = 0.0
        self._ahead = ReadAhead()
        self._admitting: asyncio.Task[None] | None = None
        self._unsent = 0
        self.request: V | None = None
        self.due = inf

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request."""
        self.transport = cast(asyncio.Transport, transport)
        self.writer = ResponseWriter(self, self.transport, self._door)
        secured = transport.get_extra_info("ssl_object")
        if secured is not None and secured.selected_alpn_protocol() not in (None, "http/1.1"):
            self._hand_over(b"")
            return
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) else None
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self.due = self._door.time() + self._door.patience.head
        self._door.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """End whatever is done for this client."""
        self._state = _CLOSING
        self._door.discard(self)
        self._part()
        self._body.close()
        self.writer.close()

    def eof_received(self) -> None:
        """Treat a client that sends no more as one that has left; what is written already may still be read."""
        self._part()
        self.close()

    def _part(self) -> None:
        if self._admitting is not None:
            self._admitting.cancel()
        self.writer.end_exchange()
        self.release()

    def data_received(self, data: bytes) -> None:
        """Take bytes, whatever they are the beginning, the middle or the end of."""
        state = self._state
        if state is _READY:
            self._begin(data)
        elif state is _READING:
            self._read(data)
        elif state is _DROPPING:
            self._drop(data)
        else:
            self._keep_ahead(data)

    def pause_writing(self) -> None:
        """Stop the server until the client reads."""
        self._watch()
        self.writer.clog()

    def resume_writing(self) -> None:
        """Take data from the server again, or finish the response: the client reads again."""
        self.writer.is_clogged = False
        if self._state is _BUSY:
            self.due = inf
            if self.writer.exchange is not None:
                self.writer.exchange.client_drained()
            else:
                self.writer.forget_unread()
                self.finish()

    def _watch(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self.due = self._door.time() + self._door.patience.write

    # Called by the listener

    def postpone(self, seconds: float) -> None:
        """Move what is due, and the beginning of a body: the process was stopped for so long."""
        self.due += seconds
        self._begun += seconds

    def tick(self) -> None:
        """Do what was to be done at `due`."""
        if self._state is _READING:
            self._refuse(self._door.intake.too_slow())
        elif self._state in (_BUSY, _CLOSING):
            unsent = self._unsent
            self._watch()
            if self._unsent >= unsent:
                self.writer.cut_off()
        elif self._state is _DROPPING:
            self.transport.abort()
        else:
            self.close()

    def stop(self) -> None:
        """Close now if no request is under way, and after its response otherwise.

        A connection that has not sent anything yet gets `FAREWELL_SECONDS`: its client may have sent a request before it could know.
        """
        if self._state is not _READY:
            return
        if self._asked:
            self.close()
        else:
            self.due = min(self.due, self._door.time() + FAREWELL_SECONDS)

    # The head of a request

    def _begin(self, data: bytes) -> None:
        door = self._door
        end = data.find(b"\r\n\r\n") + 4
        read = door.heads.read(data, end) if 4 <= end <= door.head_bytes and data.startswith(b"POST ") else None
        if read is None:
            self._begin_otherwise(data)
            return
        head, length = read
        received = len(data) - end
        if received == length:  # the usual case; not making a body saves 7 % of the door's work
            self._body, self._pieces = WHOLE_BODY, [data[end:]]
        elif length is not None and received < length:
            self._body, self._pieces = PlainBody(length, received), [data[end:]] if received else []
        else:
            begun = begin_chunked(data, end) if length is None else None
            if begun is None:
                self._hand_over(data)
                return
            self._body, self._pieces = begun
        self._asked = True
        self._head = head
        self.writer.keeps = head.keeps
        self._begun = door.time()
        request = self.request = door.intake.request(head, length or 0, self._peer)
        try:
            waiting = door.intake.admit(request)
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._refuse(error)
            return
        if waiting is None and received == length:  # nearly always: such a request gets to its exchange without a task
            self._arrived()
        elif waiting is None:
            self._admitted()
        else:
            self._state = _ADMITTING
            self.due = inf
            self._admitting = asyncio.get_running_loop().create_task(waiting)
            self._admitting.add_done_callback(self._decided)

    def _begin_otherwise(self, data: bytes) -> None:
        """Ignore empty lines before a request (RFC 9112, 2.2); hand anything else over."""
        empty = _EMPTY_LINES.match(data)
        if empty is None:
            self._hand_over(data)
        elif empty.end() < len(data):
            self._begin(data[empty.end() :])

    def _hand_over(self, data: bytes) -> None:
        self._door.discard(self)
        self._body.close()
        self.writer.close()
        self._door.hand_over(self.transport, data)

    def _decided(self, admission: asyncio.Task[None]) -> None:
        """Continue with a request whose admission had to wait, unless its client has left in the meantime."""
        self._admitting = None
        if admission.cancelled() or self._state is not _ADMITTING:
            return
        error = admission.exception()
        if isinstance(error, Exception):
            self._refuse(error)
            return
        self._admitted()
        if self._state is _READING and self._ahead.pieces:
            self._read(self._take_ahead())

    def _admitted(self) -> None:
        body = self._body
        if body.is_whole:
            self._arrived()
            return
        if not self._holds(self._pieces):
            return
        self._state = _READING
        self._await_body()
        if not body.received and self._head.names.get(b"expect", b"").lower() == b"100-continue":
            self.transport.write(_CONTINUE)

    # The body of a request

    def _holds(self, pieces: list[bytes]) -> bool:
        """Have pieces of the body counted, or refuse it."""
        assert self.request is not None
        try:
            if pieces:
                self._door.intake.hold(self.request, sum(map(len, pieces)))
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._refuse(error)
            return False
        return True

    def _await_body(self) -> None:
        door = self._door
        self.due = self._begun + door.intake.body_deadline(self._body.received, door.time() - self._begun)

    def _read(self, data: bytes) -> None:
        body = self._body
        try:
            pieces = body.feed(data)
        except MalformedBodyError:
            self._refuse(self._door.intake.misread("The chunks of the body are malformed; send the body with a Content-Length"))
            return
        if body.is_followed:
            self.writer.keeps = False
        elif body.rest:
            self._keep_ahead(body.rest)
        if self._holds(pieces):
            self._pieces += pieces
            if body.is_whole:
                self._arrived()
            else:
                self._await_body()

    def _arrived(self) -> None:
        pieces, self._pieces = self._pieces, []
        self._state = _BUSY
        self.due = inf
        assert self.request is not None
        try:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)  # most bodies come in one piece: no copy
            exchange = self.writer.exchange = self._door.intake.begin(self.request, body, self.writer)
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._refuse(error)
        else:
            exchange.start()

    def _keep_ahead(self, data: bytes) -> None:
        ahead = self._ahead
        ahead.add(data)
        if ahead.size <= AHEAD_BYTES:
            return
        if self._state is _ADMITTING:
            self.transport.pause_reading()
            return
        self.writer.keeps = False
        ahead.drop()
        if ahead.size > DROPPED_BYTES:
            self.transport.abort()

    def _take_ahead(self) -> bytes:
        if self._ahead.size > AHEAD_BYTES:
            self.transport.resume_reading()
        return self._ahead.take()

    # A body that is refused

    def _refuse(self, error: Exception) -> None:
        """Respond with an error, whether the body has arrived or not."""
        assert self.request is not None
        response = self._door.intake.refuse(self.request, error)
        body, writer = self._body, self.writer
        self._pieces = []
        body.close()
        if response.closes or not (body.is_whole or (body.missing is not None and body.missing <= SPARED_BYTES)):
            writer.keeps = False
        self._state = _BUSY
        if body.is_whole:
            writer.answer(response.status, response.headers, response.body)
            return
        writer.answer_early(response.status, response.headers, response.body)
        self.release()
        self._state = _DROPPING
        self.due = self._door.time() + self._door.patience.dropping
        if self._ahead.pieces:
            self.data_received(self._take_ahead())

    def _drop(self, data: bytes) -> None:
        body = self._body
        body.skip(data)
        if body.received > DROPPED_BYTES:
            self.transport.abort()
        if body.is_whole:
            if self.writer.keeps and body.rest:
                self._keep_ahead(body.rest)
            self.finish()

    # The end of a request, and of the connection

    def release(self) -> None:
        """Forget the current request and what is held of its body."""
        if self.request is not None:
            self._door.intake.release_body(self.request)
            self.request = None

    def finish(self) -> None:
        """Get ready for the next request, or close."""
        door = self._door
        if not self.writer.keeps or door.closing:
            self.close()
            return
        self._state = _READY
        self.due = door.time() + door.patience.keep_alive
        if self._ahead.pieces:
            self._state = _BUSY
            asyncio.get_running_loop().call_soon(self._begin_next)

    def _begin_next(self) -> None:
        if self._state is _BUSY:
            self._state = _READY
            self._begin(self._take_ahead())

    def close(self, after: float = 0.0) -> None:
        """Write what is left, and close, after so many seconds; a client that does not take it is cut off."""
        self._state = _CLOSING
        self._watch()
        if after:
            asyncio.get_running_loop().call_later(after, self.transport.close)
        else:
            self.transport.close()
