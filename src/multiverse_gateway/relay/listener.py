"""The direct door: inference requests on HTTP/1.1, from the callbacks of the socket straight into their exchange.

1. It takes a request only if it is beyond doubt: `POST` to the API in HTTP/1.1 with a host, its head whole in the first bytes that arrive
   and free of errors, nothing behind it and nothing but empty lines before it. Any other connection is handed over
   with the bytes read so far, and stays with who gets it.
2. No request has a task or a timer of its own: connections have a `due` that one sweep looks at.
3. Reading goes on whatever is being done, so that a client that leaves is noticed; what it sends ahead is kept up to a limit.
4. A request is answered once. An answer before the end of its body closes the connection, or the little that is missing is dropped.
5. A client that stops reading stops the server that it is sent from, and is cut off when it takes nothing for too long.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from email.utils import formatdate
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from math import inf
from typing import Any, Final, Protocol, cast

import attrs
import httptools

from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.pauses import stopped_seconds
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers, Heads, RequestHead
from multiverse_gateway.relay.ports import Client

HIGH_WATER: Final = 16384
AHEAD_BYTES: Final = 65536
"""What a client may send before its answer is complete; more ends the connection after that answer."""
SPARED_BYTES: Final = 65536
"""A refused body of which no more than this is missing is dropped, and the connection kept."""
DROPPED_BYTES: Final = 64 << 20
"""Most that is read of a body that nobody wants."""
SWEEP_SECONDS: Final = 0.25
FAREWELL_SECONDS: Final = 0.5
"""How long a connection that was made right before the end may take until its first request, to be told so."""
COPIED_BYTES: Final = 4096
"""Up to this size a chunk is copied into its frame; a larger one is passed on beside it."""

_LINES: Final = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}
_EMPTY_LINES: Final = re.compile(rb"(?:\r?\n)+")
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@lru_cache(maxsize=1024)
def _first_lines(status: int, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Write what answers of one server have in common."""
    line = _LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return line + b"".join([b"%b: %b\r\n" % header for header in headers])


class Refusal(Protocol):
    """An answer to a request that comes to no exchange."""

    @property
    def status(self) -> int:
        """Its status."""

    @property
    def headers(self) -> Headers:
        """Its headers, without a length."""

    @property
    def body(self) -> bytes:
        """Its body."""

    @property
    def closes(self) -> bool:
        """Tell whether the connection is of no use after it."""


class Front(Protocol):
    """What the door asks about a request (`web.front`); a `visit` is whatever the front makes of its head."""

    @property
    def must_wait(self) -> bool:
        """Tell whether `admit` has to be awaited."""

    def visit(self, head: RequestHead, length: int, peer: str | None) -> Any:
        """Take note of a request; `length` is that of its body as far as it is said, `visit.lines` are what every answer gets."""

    def admit_now(self, visit: Any) -> None:
        """Raise the answer if the body is not wanted."""

    async def admit(self, visit: Any) -> None:
        """Do the same."""

    def hold(self, visit: Any, count: int) -> None:
        """Count bytes of the body, or raise the answer if there is no room."""

    def body_deadline(self, received: int, elapsed: float) -> float:
        """Return the seconds after its beginning by which more of a body must arrive; its last piece arrived after `elapsed` seconds."""

    def too_slow(self) -> GatewayError:
        """Return the refusal of a body that came too slowly."""

    def misread(self, message: str) -> GatewayError:
        """Return the refusal of what is no proper HTTP."""

    def begin(self, visit: Any, body: bytes, client: Client) -> Exchange:
        """Make the exchange, or raise the answer."""

    def refuse(self, visit: Any, error: Exception) -> Refusal:
        """Return the answer that an error is."""

    def leave(self, visit: Any) -> None:
        """Forget the body."""


@attrs.frozen(kw_only=True)
class Patience:
    """Seconds that a client has: for its first head, between two requests, for reading, for the rest of a refused body."""

    head: float
    keep_alive: float
    write: float
    dropping: float


class _State(Enum):
    READY = "ready"
    """Waits for a request."""
    ADMITTING = "admitting"
    """Waits for the word whether the request may come in; what arrives meanwhile is kept."""
    READING = "reading"
    """Reads a body."""
    BUSY = "busy"
    """An exchange runs, or its answer is not all written."""
    DROPPING = "dropping"
    """Reads the rest of a body that is refused."""
    CLOSING = "closing"
    """Writes the rest and is gone."""


_READY, _ADMITTING, _READING, _BUSY, _DROPPING, _CLOSING = _State  # a look-up in an enum costs as much as a call


class _Chunks:
    """A body in chunks, read by llhttp behind its head; trailers are not read.

    Raises:
        HttpParserError: It cannot be told apart.
    """

    def __init__(self, head: bytes) -> None:
        self.pieces: list[bytes] = []
        self.is_whole = False
        self.has_extra = False
        """Whether something follows: where that begins is not known."""
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(head)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes, return the pieces of the body in them."""
        self.pieces = []
        self._parser.feed_data(data)
        return self.pieces

    def close(self) -> None:
        """Leave no cycle for the collector: the parser holds our methods."""
        del self._parser

    def on_message_begin(self) -> None:
        """Notice a second request."""
        self.has_extra = self.is_whole

    def on_body(self, data: bytes) -> None:
        """Take a piece."""
        if not self.is_whole:
            self.pieces.append(data)

    def on_message_complete(self) -> None:
        """Note the end."""
        self.is_whole = True


class Connection(asyncio.Protocol):
    """One client, and the client's side of one exchange after the other."""

    __slots__ = (
        "_admitting",
        "_ahead",
        "_ahead_size",
        "_asked",
        "_begun",
        "_chunks",
        "_clogged",
        "_exchange",
        "_head",
        "_incoming",
        "_keep",
        "_left",
        "_listener",
        "_peer",
        "_pieces",
        "_received",
        "_state",
        "_unread",
        "_unsent",
        "_visit",
        "due",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, listener: "Listener") -> None:
        self._listener = listener
        self._state = _READY
        self._peer: str | None = None
        self._asked = False
        self._incoming: RequestHead | None = None
        self._chunks: _Chunks | None = None
        self._pieces: list[bytes] = []
        self._left: int | None = 0
        self._received = 0
        self._begun = 0.0
        self._keep = True
        self._ahead: list[bytes] = []
        self._ahead_size = 0
        self._visit: Any = None
        self._admitting: asyncio.Task[None] | None = None
        self._exchange: Exchange | None = None
        self._head: bytes | None = None
        self._clogged = False
        self._unread: Exchange | None = None
        self._unsent = 0
        self.due = inf

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request."""
        self.transport = cast(asyncio.Transport, transport)
        secured = transport.get_extra_info("ssl_object")
        if secured is not None and secured.selected_alpn_protocol() not in (None, "http/1.1"):
            self._hand_over(b"")
            return
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) else None
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self.due = self._listener.time() + self._listener.patience.head
        self._listener.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell whoever works for this client."""
        self._state = _CLOSING
        self._listener.discard(self)
        self._part()
        self._forget_chunks()
        self._forget_answer()

    def eof_received(self) -> None:
        """Take half a goodbye for a whole one; what is written already may still be read."""
        self._part()
        self.close()

    def _part(self) -> None:
        if self._admitting is not None:
            self._admitting.cancel()
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange.client_gone()
        self._leave()

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
        """Let the server wait for this client."""
        self._clogged = True
        self._watch()
        if self._exchange is not None:
            self._exchange.client_clogged()

    def resume_writing(self) -> None:
        """Take data from the server again, or finish the answer: the client reads again."""
        self._clogged = False
        if self._state is _BUSY:
            self.due = inf
            if self._exchange is not None:
                self._exchange.client_drained()
            else:
                self._forget_answer()
                self._finish()

    def _watch(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self.due = self._listener.time() + self._listener.patience.write

    # Time

    def postpone(self, seconds: float) -> None:
        """Move what is due, and the beginning of a body: the process was stopped for so long."""
        self.due += seconds
        self._begun += seconds

    def tick(self) -> None:
        """Do what was to be done at `due`."""
        if self._state is _READING:
            self._refuse(self._listener.front.too_slow())
        elif self._state in (_BUSY, _CLOSING):
            unsent = self._unsent
            self._watch()
            if self._unsent >= unsent:
                self._cut_off()
        elif self._state is _DROPPING:
            self.transport.abort()
        else:
            self.close()

    def _cut_off(self) -> None:
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange.client_stalled()
        self.transport.abort()

    # A request

    def _begin(self, data: bytes) -> None:
        listener = self._listener
        end = data.find(b"\r\n\r\n") + 4
        read = listener.heads.read(data, end) if 4 <= end <= listener.head_bytes and data.startswith(b"POST ") else None
        if read is None:
            self._begin_otherwise(data)
            return
        head, length = read
        self._received = received = len(data) - end
        if length is None:
            self._left = None
            if not self._begin_chunks(data, end):
                self._hand_over(data)
                return
        elif received > length:
            self._hand_over(data)
            return
        else:
            self._left = length - received
            self._pieces = [data[end:]] if received else []
        self._asked = True
        self._incoming = head
        self._keep = head.keeps
        self._begun = listener.time()
        front = listener.front
        visit = self._visit = front.visit(head, length or 0, self._peer)
        if front.must_wait:
            self._state = _ADMITTING
            self.due = inf
            self._admitting = asyncio.get_running_loop().create_task(self._wait_for_admission())
            return
        try:
            front.admit_now(visit)
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._refuse(error)
        else:
            self._admitted()

    def _begin_otherwise(self, data: bytes) -> None:
        """Ignore empty lines before a request (RFC 9112, 2.2); hand anything else over."""
        empty = _EMPTY_LINES.match(data)
        if empty is None:
            self._hand_over(data)
        elif empty.end() < len(data):
            self._begin(data[empty.end() :])

    def _begin_chunks(self, data: bytes, end: int) -> bool:
        """Begin a body in chunks; false if it is in doubt already."""
        try:
            chunks = self._chunks = _Chunks(data[:end])
            self._pieces = chunks.feed(data[end:])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # llhttp reads no chunks behind the offer of an upgrade
            return False
        return not chunks.has_extra

    @property
    def _is_whole(self) -> bool:
        return self._left == 0 if self._chunks is None else self._chunks.is_whole

    def _forget_chunks(self) -> None:
        if self._chunks is not None:
            self._left = 0 if self._chunks.is_whole else None
            self._chunks.close()
            self._chunks = None

    def _hand_over(self, data: bytes) -> None:
        self._listener.discard(self)
        self._forget_chunks()
        self._listener.hand_over(self.transport, data)

    async def _wait_for_admission(self) -> None:
        try:
            await self._listener.front.admit(self._visit)
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._admitting = None
            self._refuse(error)
        else:
            self._admitting = None
            self._admitted()
            if self._state is _READING and self._ahead:
                self._read(self._take_ahead())

    def _admitted(self) -> None:
        if self._is_whole:
            self._arrived()
            return
        if not self._holds(self._pieces):
            return
        self._state = _READING
        self._await_body()
        assert self._incoming is not None
        if not self._received and self._incoming.names.get(b"expect", b"").lower() == b"100-continue":
            self.transport.write(_CONTINUE)

    def _holds(self, pieces: Sequence[bytes]) -> bool:
        """Have pieces of the body counted, or refuse it."""
        try:
            if pieces:
                self._listener.front.hold(self._visit, sum(map(len, pieces)))
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._refuse(error)
            return False
        return True

    def _await_body(self) -> None:
        listener = self._listener
        self.due = self._begun + listener.front.body_deadline(self._received, listener.time() - self._begun)

    def _read(self, data: bytes) -> None:
        pieces = self._read_chunks(data) if self._left is None else self._read_plain(data, self._left)
        if pieces is None:
            self._refuse(self._listener.front.misread("The body's chunks cannot be told apart; send it with a Content-Length"))
        elif self._holds(pieces):
            self._pieces += pieces
            if self._is_whole:
                self._arrived()
            else:
                self._await_body()

    def _read_plain(self, data: bytes, left: int) -> list[bytes]:
        if len(data) > left:
            data, rest = data[:left], data[left:]
            self._keep_ahead(rest)
        self._left = left - len(data)
        self._received += len(data)
        return [data]

    def _read_chunks(self, data: bytes) -> list[bytes] | None:
        """Return what a part of a body in chunks holds; `None` if that cannot be told."""
        chunks = self._chunks
        assert chunks is not None
        self._received += len(data)
        try:
            chunks.feed(data)
        except httptools.HttpParserError:
            if not chunks.is_whole:
                return None
            self._keep = False
        if chunks.has_extra:
            self._keep = False
        return chunks.pieces

    def _arrived(self) -> None:
        pieces, self._pieces = self._pieces, []
        if self._chunks is not None:
            self._forget_chunks()
        self._state = _BUSY
        self.due = inf
        try:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            exchange = self._exchange = self._listener.front.begin(self._visit, body, self)
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._refuse(error)
        else:
            exchange.start()

    def _keep_ahead(self, data: bytes) -> None:
        self._ahead_size += len(data)
        if self._ahead_size <= AHEAD_BYTES:
            self._ahead.append(data)
        elif self._state is _ADMITTING:
            self._ahead.append(data)
            self.transport.pause_reading()
        else:
            self._keep = False
            self._ahead.clear()
            if self._ahead_size > DROPPED_BYTES:
                self.transport.abort()

    def _take_ahead(self) -> bytes:
        data = b"".join(self._ahead)
        if self._ahead_size > AHEAD_BYTES:
            self.transport.resume_reading()
        self._ahead.clear()
        self._ahead_size = 0
        return data

    # The answer: relay.exchange.Client

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a whole response; the connection may serve the next request once the client has taken it."""
        exchange, self._exchange = self._exchange, None
        self._write_whole(status, headers, body)
        self._leave()
        if self._clogged:
            self._unread = exchange
            return
        if exchange is not None and exchange.held:
            exchange.taken()
        self._finish()

    def _forget_answer(self) -> None:
        if self._unread is not None:
            self._unread.taken()
            self._unread = None

    def _write_whole(self, status: int, headers: Headers, body: bytes) -> None:
        head = self._head_of(status, headers, b"content-length: %d\r\n" % len(body))
        if len(body) <= COPIED_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    def head(self, status: int, headers: Headers) -> None:
        """Write the head, together with what follows at once."""
        self._head = self._head_of(status, headers, b"transfer-encoding: chunked\r\n")

    def _head_of(self, status: int, headers: Headers, framing: bytes) -> bytes:
        self._keep = self._keep and not self._listener.closing
        ending = b"\r\n" if self._keep else b"connection: close\r\n\r\n"
        return b"".join((_first_lines(status, tuple(headers)), self._listener.date, self._visit.lines, framing, ending))

    def body(self, data: bytes) -> None:
        """Write a piece."""
        head = self._head
        if head is None:
            head = b""
        else:
            self._head = None
        if len(data) <= COPIED_BYTES:
            self.transport.write(b"%b%x\r\n%b\r\n" % (head, len(data), data))
        else:
            self.transport.writelines((b"%b%x\r\n" % (head, len(data)), data, b"\r\n"))
        if self._clogged and self._exchange is not None:
            self._exchange.client_clogged()

    def end(self) -> None:
        """Write the end; the connection may serve the next request."""
        self._exchange = None
        self.transport.write(b"0\r\n\r\n")
        self._leave()
        if not self._clogged:
            self._finish()

    def cut(self) -> None:
        """Close the connection without the end."""
        self._exchange = None
        if self._head is not None:
            self.transport.write(self._head)
            self._head = None
        self._leave()
        self.close()

    def _finish(self) -> None:
        """Be ready for the next request, or close."""
        if not self._keep or self._listener.closing:
            self.close()
            return
        self._state = _READY
        self.due = self._listener.time() + self._listener.patience.keep_alive
        if self._ahead:
            self._state = _BUSY
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._state is _BUSY:
            self._state = _READY
            self._begin(self._take_ahead())

    def _refuse(self, error: Exception) -> None:
        """Answer, whether the body has arrived or not."""
        refusal = self._listener.front.refuse(self._visit, error)
        self._pieces = []
        is_whole, left = self._is_whole, self._left
        self._forget_chunks()
        if refusal.closes or not (is_whole or (left is not None and left <= SPARED_BYTES)):
            self._keep = False
        self._state = _BUSY
        if is_whole:
            self.answer(refusal.status, refusal.headers, refusal.body)
            return
        self._write_whole(refusal.status, refusal.headers, refusal.body)
        self._leave()
        self._state = _DROPPING
        self.due = self._listener.time() + self._listener.patience.dropping
        if not self._keep and self.transport.can_write_eof():
            self.transport.write_eof()
        if self._ahead:
            self.data_received(self._take_ahead())

    def _drop(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > DROPPED_BYTES:
            self.transport.abort()
        if self._left is None:
            return
        missing, self._left = self._left, self._left - len(data)
        if self._left > 0:
            return
        if self._keep and self._left:
            self._keep_ahead(data[missing:])
        self._finish()

    def _leave(self) -> None:
        if self._visit is not None:
            self._listener.front.leave(self._visit)
            self._visit = None

    # The end

    def stop(self) -> None:
        """Close now if nothing is being answered, and after the answer otherwise; who has just come is heard first."""
        if self._state is not _READY:
            return
        if self._asked:
            self.close()
        else:
            self.due = min(self.due, self._listener.time() + FAREWELL_SECONDS)

    def close(self) -> None:
        """Write what is left, and close; a client that does not take it is cut off."""
        self._state = _CLOSING
        self._watch()
        self.transport.close()


class Listener:
    """All connections of the direct door in this process; `protocol` makes one for each that is accepted.

    `hand_over` gets the transport of a connection that is not for this door, and the bytes that were read of it. `root` is the path below
    which a proxy serves the gateway. Made on the event loop that it serves.
    """

    def __init__(
        self,
        front: Front,
        hand_over: Callable[[asyncio.Transport, bytes], None],
        *,
        patience: Patience,
        head_bytes: int,
        root: str = "",
    ) -> None:
        self.front = front
        self.hand_over = hand_over
        self.patience = patience
        self.head_bytes = head_bytes
        self.closing = False
        self.heads = Heads(root)
        self.connections: set[Connection] = set()
        self.date = b""
        self.time = asyncio.get_running_loop().time
        self._empty = asyncio.Event()
        self._planned = self.time()
        self._sweep()

    def protocol(self) -> Connection:
        """Make the protocol of a connection."""
        return Connection(self)

    async def finish(self) -> None:
        """Let what is being answered come to its end, and take nothing more. Cancelled, it ends all at once."""
        self.closing = True
        for connection in list(self.connections):
            connection.stop()
        try:
            if self.connections:
                await self._empty.wait()
        finally:
            for connection in list(self.connections):
                connection.transport.abort()
            self._sweeper.cancel()

    def add(self, connection: Connection) -> None:
        """Take note of a connection."""
        self.connections.add(connection)
        if self.closing:
            connection.stop()

    def discard(self, connection: Connection) -> None:
        """Forget a connection, if it is known."""
        self.connections.discard(connection)
        if self.closing and not self.connections:
            self._empty.set()

    def _sweep(self) -> None:
        now = self.time()
        self.date = b"date: %b\r\n" % formatdate(usegmt=True).encode()
        stopped = stopped_seconds(self._planned, now)
        if stopped:
            for connection in self.connections:
                connection.postpone(stopped)
        self._planned = now + SWEEP_SECONDS
        for connection in [connection for connection in self.connections if connection.due <= now]:
            connection.tick()
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)
