"""The direct door: inference requests on HTTP/1.1, from the callbacks of the socket straight into their exchange.

1. It takes a request only if it is beyond doubt: `POST /v1/...` in HTTP/1.1 with a host, its head whole in the first bytes that arrive
   and free of errors, nothing to upgrade, nothing behind it. Any other connection is handed over with the bytes read so far, and stays
   with who gets it.
2. No request has a task or a timer of its own: connections have a `due` that one sweep looks at.
3. Reading goes on whatever is being done, so that a client that leaves is noticed; what it sends ahead is kept up to a limit.
4. A request is answered once. An answer before the end of its body closes the connection, or the little that is missing is dropped.
5. A client that stops reading stops the server that it is sent from, and is cut off when it takes nothing for too long.
"""

import asyncio
from collections.abc import Callable
from email.utils import formatdate
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from math import inf
from typing import Any, Final, Protocol, cast

import attrs
import httptools

from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.relay.exchange import Client, Exchange, Headers

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

    def visit(self, method: str, path: str, query: bytes, fields: Headers, peer: str | None) -> Any:
        """Take note of a head; `visit.headers` is what every answer gets."""

    def admit_now(self, visit: Any) -> None:
        """Raise the answer if the body is not wanted."""

    async def admit(self, visit: Any) -> None:
        """Do the same."""

    def hold(self, visit: Any, count: int) -> None:
        """Count bytes of the body, or raise the answer if there is no room."""

    def body_deadline(self, received: int) -> float:
        """Return the seconds after its beginning by which more of a body must have come."""

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


class Connection(asyncio.Protocol):
    """One client, and the client's side of one exchange after the other."""

    __slots__ = (
        "_admitting",
        "_ahead",
        "_ahead_size",
        "_begun",
        "_chunked",
        "_clogged",
        "_exchange",
        "_extra",
        "_fields",
        "_head",
        "_headed",
        "_keep",
        "_left",
        "_listener",
        "_parser",
        "_peer",
        "_pieces",
        "_received",
        "_state",
        "_unsent",
        "_url",
        "_visit",
        "_whole",
        "due",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, listener: "Listener") -> None:
        self._listener = listener
        self._parser = httptools.HttpRequestParser(self)
        self._state = _State.READY
        self._peer: str | None = None
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._left: int | None = None
        self._received = 0
        self._begun = 0.0
        self._headed = False
        self._whole = False
        self._extra = False
        self._keep = True
        self._ahead: list[bytes] = []
        self._ahead_size = 0
        self._visit: Any = None
        self._admitting: asyncio.Task[None] | None = None
        self._exchange: Exchange | None = None
        self._head: bytes | None = None
        self._chunked = False
        self._clogged = False
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
        self._state = _State.CLOSING
        self._listener.discard(self)
        self._part()
        del self._parser  # which holds our methods: no cycle is left for the collector

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
        if state is _State.READY:
            self._begin(data)
        elif state is _State.READING:
            self._read(data)
        elif state is _State.DROPPING:
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
        """Go on."""
        self._clogged = False
        if self._state is _State.BUSY:
            self.due = inf
            if self._exchange is not None:
                self._exchange.client_drained()
            else:
                self._finish()

    def _watch(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self.due = self._listener.time() + self._listener.patience.write

    # Time

    def tick(self) -> None:
        """Do what was to be done at `due`."""
        if self._state is _State.READING:
            self._refuse(self._listener.front.too_slow())
        elif self._state in (_State.BUSY, _State.CLOSING):
            unsent = self._unsent
            self._watch()
            if self._unsent >= unsent:
                self._cut_off()
        elif self._state is _State.DROPPING:
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
        end = data.find(b"\r\n\r\n") + 4
        if not (data.startswith(b"POST /v1/") and 4 <= end <= self._listener.head_bytes and self._parses(data)):
            self._hand_over(data)
            return
        names = dict(self._fields)
        path, _, query = self._url.partition(b"?")
        length = names.get(b"content-length", b"0")
        is_plain = data.startswith(b" HTTP/1.1\r\n", data.find(b"\r\n") - 9)
        if not is_plain or b"host" not in names or b"%" in path or not length.isdigit():
            self._hand_over(data)
            return
        self._received = len(data) - end
        self._left = None if b"transfer-encoding" in names else int(length) - self._received
        if self._left is not None and self._left < 0:
            self._hand_over(data)
            return
        self._begun = self._listener.time()
        self._visit = self._listener.front.visit("POST", path.decode("ascii"), query, self._fields, self._peer)
        if self._listener.front.must_wait:
            self._state = _State.ADMITTING
            self.due = inf
            self._admitting = asyncio.get_running_loop().create_task(self._wait_for_admission())
        else:
            self._admit()

    def _parses(self, data: bytes) -> bool:
        self._url = b""
        self._fields = []
        self._pieces = []
        self._headed = self._whole = self._extra = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return False
        return not self._extra

    def _hand_over(self, data: bytes) -> None:
        self._listener.discard(self)
        del self._parser
        self._listener.hand_over(self.transport, data)

    def _admit(self) -> None:
        try:
            self._listener.front.admit_now(self._visit)
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._refuse(error)
        else:
            self._admitted()

    async def _wait_for_admission(self) -> None:
        try:
            await self._listener.front.admit(self._visit)
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._admitting = None
            self._refuse(error)
        else:
            self._admitting = None
            self._admitted()
            if self._state is _State.READING and self._ahead:
                self._read(self._take_ahead())

    def _admitted(self) -> None:
        try:
            if self._pieces:
                self._listener.front.hold(self._visit, sum(map(len, self._pieces)))
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._refuse(error)
            return
        if self._whole:
            self._arrived()
            return
        self._state = _State.READING
        self._await_body()
        if not self._received and any(name == b"expect" and value.lower() == b"100-continue" for name, value in self._fields):
            self.transport.write(_CONTINUE)

    def _await_body(self) -> None:
        self.due = self._begun + self._listener.front.body_deadline(self._received)

    def _read(self, data: bytes) -> None:
        if self._left is not None:
            if len(data) > self._left:
                data, rest = data[: self._left], data[self._left :]
                self._keep_ahead(rest)
            self._left -= len(data)
        self._received += len(data)
        known = len(self._pieces)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if not self._whole:
                self._refuse(self._listener.front.misread("The body's chunks cannot be told apart; send it with a Content-Length"))
                return
            self._extra = True
        if self._extra:  # a request behind a chunked body: where it begins is not known any more
            self._keep = False
        try:
            self._listener.front.hold(self._visit, sum(map(len, self._pieces[known:])))
        except Exception as error:  # noqa: BLE001  every error has its answer
            self._refuse(error)
            return
        if self._whole:
            self._arrived()
        else:
            self._await_body()

    def _arrived(self) -> None:
        pieces, self._pieces = self._pieces, []
        self._state = _State.BUSY
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
        elif self._state is _State.ADMITTING:
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

    # llhttp

    def on_url(self, url: bytes) -> None:
        """Take the target; a second one belongs to another request."""
        if self._url:
            self._extra = True
        self._url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers are not read."""
        if not self._headed:
            self._fields.append((name.lower(), value.rstrip()))

    def on_headers_complete(self) -> None:
        """Take note of the end of the head."""
        if not self._headed:
            self._headed = True
            self._keep = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        if not self._whole:
            self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Note that the request is whole."""
        self._whole = True

    # The answer: relay.exchange.Client

    def head(self, status: int, headers: Headers, length: int | None = None) -> None:
        """Write the head, together with what follows at once."""
        self._keep = self._keep and not self._listener.closing
        self._chunked = length is None
        lines = [_first_lines(status, tuple(headers)), self._listener.date]
        lines += [b"%b: %b\r\n" % header for header in self._visit.headers]
        lines.append(b"transfer-encoding: chunked\r\n" if length is None else b"content-length: %d\r\n" % length)
        lines.append(b"\r\n" if self._keep else b"connection: close\r\n\r\n")
        self._head = b"".join(lines)

    def body(self, data: bytes) -> None:
        """Write a piece."""
        head = self._take_head()
        if len(data) <= COPIED_BYTES:
            self.transport.write(b"%b%x\r\n%b\r\n" % (head, len(data), data) if self._chunked else head + data)
        elif self._chunked:
            self.transport.writelines((b"%b%x\r\n" % (head, len(data)), data, b"\r\n"))
        else:
            self.transport.writelines((head, data))
        if self._clogged and self._exchange is not None:
            self._exchange.client_clogged()

    def _take_head(self) -> bytes:
        head = self._head
        if head is None:
            return b""
        self._head = None
        return head

    def end(self) -> None:
        """Write the end; the connection may serve the next request."""
        self._exchange = None
        rest = self._take_head() + (b"0\r\n\r\n" if self._chunked else b"")
        if rest:
            self.transport.write(rest)
        self._leave()
        if not self._clogged:
            self._finish()

    def cut(self) -> None:
        """Close the connection without the end."""
        self._exchange = None
        head = self._take_head()
        if head:
            self.transport.write(head)
        self._leave()
        self.close()

    def _finish(self) -> None:
        """Be ready for the next request, or close."""
        if not self._keep or self._listener.closing:
            self.close()
            return
        self._state = _State.READY
        self.due = self._listener.time() + self._listener.patience.keep_alive
        if self._ahead:
            self._state = _State.BUSY
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._state is _State.BUSY:
            self._state = _State.READY
            self._begin(self._take_ahead())

    def _refuse(self, error: Exception) -> None:
        """Answer, whether the body has arrived or not."""
        refusal = self._listener.front.refuse(self._visit, error)
        self._pieces = []
        if refusal.closes or not (self._whole or (self._left is not None and self._left <= SPARED_BYTES)):
            self._keep = False
        self._state = _State.BUSY
        self.head(refusal.status, refusal.headers, len(refusal.body))
        self.body(refusal.body)
        if self._whole:
            self.end()
            return
        self._leave()
        self._state = _State.DROPPING
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
        if self._keep:
            self._parser = httptools.HttpRequestParser(self)  # the old one has not seen the end
            if self._left:
                self._keep_ahead(data[missing:])
        self._finish()

    def _leave(self) -> None:
        if self._visit is not None:
            self._listener.front.leave(self._visit)
            self._visit = None

    # The end

    def stop(self) -> None:
        """Close now if nothing is being answered, and after the answer otherwise; who has just come is heard first."""
        if self._state is not _State.READY:
            return
        if self._url:
            self.close()
        else:
            self.due = min(self.due, self._listener.time() + FAREWELL_SECONDS)

    def close(self) -> None:
        """Write what is left, and close; a client that does not take it is cut off."""
        self._state = _State.CLOSING
        self._watch()
        self.transport.close()


class Listener:
    """All connections of the direct door in this process; `protocol` makes one for each that is accepted.

    `hand_over` gets the transport of a connection that is not for this door, and the bytes that were read of it. Made on the event
    loop that it serves.
    """

    def __init__(self, front: Front, hand_over: Callable[[asyncio.Transport, bytes], None], *, patience: Patience, head_bytes: int) -> None:
        self.front = front
        self.hand_over = hand_over
        self.patience = patience
        self.head_bytes = head_bytes
        self.closing = False
        self.connections: set[Connection] = set()
        self.date = b""
        self.time = asyncio.get_running_loop().time
        self._empty = asyncio.Event()
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
        for connection in [connection for connection in self.connections if connection.due <= now]:
            connection.tick()
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)
