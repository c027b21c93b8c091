r"""An HTTP/1.1 client on a raw socket: sends any bytes, notes when what arrived, leaves as rudely as a test wants.

    with RawClient(port) as client:
        client.request("POST", "/v1/chat/completions", json={"model": "m", "messages": [], "stream": True})
        head = client.read_head()
        first = client.read_event()                  # b"data: {...}\n\n", stamped in client.response.pieces
        client.abort()                               # RST

It blocks, never longer than its timeout. For tests on a loop there is `AsyncRawClient` with the same methods, awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import json as json_module
import re
import socket
import ssl
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import attrs

from support.sockets import set_reset_on_close

Headers = Sequence[tuple[str, str]]
UNSET: Any = object()
BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")


@attrs.frozen
class Piece:
    """Body bytes that arrived together. `at` is `time.monotonic()`."""

    at: float
    data: bytes


@attrs.define(eq=False)
class Response:
    """One answer, as far as it has arrived."""

    status: int = 0
    reason: str = ""
    headers: list[tuple[str, str]] = attrs.field(factory=list)
    """Names in lower case, in order of arrival."""
    raw_head: bytes = b""
    informational: list[int] = attrs.field(factory=list)
    """Statuses of the 1xx answers that came before."""
    head_at: float = 0.0
    pieces: list[Piece] = attrs.field(factory=list)
    """The body without chunk sizes, as it arrived."""
    complete: bool = False
    """Whether the body came to its proper end: length, last chunk, or FIN where neither was announced."""
    ended_by: str | None = None
    """`eof` or `reset` once the connection has ended."""
    ended_at: float = 0.0

    @property
    def body(self) -> bytes:
        """All body bytes so far."""
        return b"".join(piece.data for piece in self.pieces)

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json_module.loads(self.body)

    @property
    def events(self) -> list[bytes]:
        """The complete server-sent events so far, each with its blank line."""
        return split_events(self.body)[0]

    @property
    def rest(self) -> bytes:
        """What follows the last complete event."""
        return split_events(self.body)[1]

    @property
    def data(self) -> list[Any]:
        """The data of each event, parsed; `[DONE]` as that string; comments left out."""
        return [value for event in self.events if (value := event_data(event)) is not UNSET]

    def header(self, name: str) -> str | None:
        """Return the first header called `name`, or None."""
        return next((value for key, value in self.headers if key == name.lower()), None)

    def all_headers(self, name: str) -> list[str]:
        """Return all headers called `name`."""
        return [value for key, value in self.headers if key == name.lower()]


def split_events(body: bytes) -> tuple[list[bytes], bytes]:
    """Return the complete events of a stream, each with its blank line, and what follows them."""
    events: list[bytes] = []
    start = 0
    for blank in BLANK_LINE.finditer(body):
        events.append(body[start : blank.end()])
        start = blank.end()
    return events, body[start:]


def event_data(event: bytes) -> Any:
    """Return the parsed data of one event, the string `[DONE]`, or `UNSET` when it has none."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    if not lines:
        return UNSET
    text = b"\n".join(lines)
    return "[DONE]" if text == b"[DONE]" else json_module.loads(text)


def request_bytes(
    method: str, target: str, *, host: str, json: Any = UNSET, body: bytes | None = None, headers: Headers = (), chunked: bool = False
) -> bytes:
    """Return a well-formed request; what `headers` names is not added a second time."""
    if json is not UNSET:
        body = json_module.dumps(json).encode()
    given = {name.lower() for name, _ in headers}
    lines = [("host", host)]
    if json is not UNSET:
        lines.append(("content-type", "application/json"))
    if body is not None:
        lines.append(("transfer-encoding", "chunked") if chunked else ("content-length", str(len(body))))
    lines = [line for line in lines if line[0] not in given] + list(headers)
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines) + "\r\n"
    if body is not None and chunked:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    return head.encode("latin-1") + (body or b"")


class ResponseReader:
    """Turn bytes into one response after the other. Knows no sockets."""

    def __init__(self) -> None:
        """Expect the first response."""
        self.response = Response()
        self.unread = b""
        """Bytes not yet understood; after a complete response, those of the next one."""
        self._head_request = False
        self._events: list[bytes] = []
        self._pieces_split, self._tail = 0, b""
        self._left: int | None = None
        self._chunked = self._in_trailer = False

    @property
    def has_head(self) -> bool:
        """Whether the head is complete."""
        return self.response.status != 0

    @property
    def is_finished(self) -> bool:
        """Whether nothing more of this response can come."""
        return self.response.complete or self.response.ended_by is not None

    def expect(self, *, head_request: bool = False) -> None:
        """Begin a new response; the old one stays with who has it."""
        ended, at = self.response.ended_by, self.response.ended_at
        self.response = Response(ended_by=ended, ended_at=at)
        self._head_request = head_request
        self._events, self._pieces_split, self._tail = [], 0, b""
        self._left, self._chunked, self._in_trailer = None, False, False
        self._advance(time.monotonic())

    def feed(self, data: bytes) -> None:
        """Take what arrived."""
        self.unread += data
        self._advance(time.monotonic())

    def feed_end(self, how: str) -> None:
        """Take the end of the connection: `eof` or `reset`."""
        response = self.response
        if how == "eof" and self.has_head and self._left is None and not self._chunked:
            response.complete = True
        if response.ended_by is None:
            response.ended_by, response.ended_at = how, time.monotonic()

    def next_event(self) -> bytes | None:
        """Return the next server-sent event that is complete and was not returned yet."""
        if not self._events:
            new = self.response.pieces[self._pieces_split :]
            self._pieces_split += len(new)
            self._events, self._tail = split_events(self._tail + b"".join(piece.data for piece in new))
        return self._events.pop(0) if self._events else None

    def _advance(self, now: float) -> None:
        if not self.has_head:
            self._read_heads(now)
        if not self.has_head or self.response.complete:
            return
        if self._chunked:
            self._read_chunks(now)
            return
        if self.unread:
            size = len(self.unread) if self._left is None else min(self._left, len(self.unread))
            if size:
                self.response.pieces.append(Piece(now, self.unread[:size]))
            self.unread = self.unread[size:]
            if self._left is not None:
                self._left -= size
        if self._left == 0:
            self.response.complete = True

    def _read_heads(self, now: float) -> None:
        while (end := self.unread.find(b"\r\n\r\n")) >= 0:
            raw, self.unread = self.unread[: end + 4], self.unread[end + 4 :]
            first, *lines = raw[:-4].decode("latin-1").split("\r\n")
            _, status, reason = [*first.split(" ", 2), "", ""][:3]
            if status.startswith("1") and status != "101":
                self.response.informational.append(int(status))
                continue
            response = self.response
            response.status, response.reason, response.raw_head, response.head_at = int(status), reason, raw, now
            response.headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
            self._chunked = "chunked" in (response.header("transfer-encoding") or "").lower()
            length = response.header("content-length")
            self._left = int(length) if length is not None and not self._chunked else None
            if self._head_request or response.status in (204, 304):
                self._left, self._chunked = 0, False
            return

    def _read_chunks(self, now: float) -> None:
        while not self.response.complete:
            if self._left:
                piece, self.unread = self.unread[: self._left], self.unread[self._left :]
                if not piece:
                    return
                self.response.pieces.append(Piece(now, piece))
                self._left -= len(piece)
                continue
            line, mark, rest = self.unread.partition(b"\r\n")
            if not mark:
                return
            self.unread = rest
            if self._left == 0:  # the line end after a chunk
                self._left = None
            elif self._in_trailer:
                self.response.complete = not line
            else:
                size = int(line.partition(b";")[0], 16)
                self._in_trailer = size == 0
                self._left = size or None


class EndedError(Exception):
    """The connection ended before what was waited for. The response so far is in `client.response`."""


class RawClient:
    """One connection, for plain tests. Each wait ends after `timeout` seconds with TimeoutError."""

    def __init__(
        self,
        port: int,
        *,
        host: str = "127.0.0.1",
        timeout: float = 10.0,
        receive_buffer: int | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Connect. A small `receive_buffer` (4096) makes a client that can stall its peer quickly."""
        self.host, self.port = host, port
        self.reader = ResponseReader()
        self.raw = bytearray()
        """Everything that arrived."""
        self.timeout = timeout
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.socket.connect((host, port))
            if tls is not None:
                self.socket = tls.wrap_socket(self.socket, server_hostname=host)
        except BaseException:
            self.socket.close()
            raise

    @property
    def response(self) -> Response:
        """The current response, as far as it has arrived."""
        return self.reader.response

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def request(
        self, method: str, target: str, *, json: Any = UNSET, body: bytes | None = None, headers: Headers = (), chunked: bool = False
    ) -> None:
        """Send a well-formed request and begin a new response."""
        self.reader.expect(head_request=method == "HEAD")
        host = f"{self.host}:{self.port}"
        self.send(request_bytes(method, target, host=host, json=json, body=body, headers=headers, chunked=chunked))

    def fetch(self, method: str, target: str, **parts: Any) -> Response:
        """Send a request and read its whole response, also one that came, with the end, before all was sent."""
        with contextlib.suppress(ConnectionError):
            self.request(method, target, **parts)
        return self.read_response()

    def read_more(self) -> bool:
        """Wait for more bytes; False when the connection has ended instead.

        Raises:
            TimeoutError: neither happened in time.
        """
        if self.response.ended_by is not None:
            return False
        try:
            data = self.socket.recv(65_536)
        except TimeoutError:
            raise
        except OSError:
            self.reader.feed_end("reset")
            return False
        if not data:
            self.reader.feed_end("eof")
            return False
        self.raw += data
        self.reader.feed(data)
        return True

    def read_head(self) -> Response:
        """Wait for a head. Raises EndedError when none comes."""
        while not self.reader.has_head:
            if not self.read_more():
                raise EndedError(f"no head: {self.response.ended_by}, {bytes(self.raw[:200])!r}")
        return self.response

    def read_event(self) -> bytes:
        """Wait for the next server-sent event that was not returned yet. Raises EndedError when none comes."""
        while (event := self.reader.next_event()) is None:
            if self.reader.is_finished or not self.read_more():
                raise EndedError(f"no further event: {self.response.ended_by or 'end of body'}, rest {self.response.rest[:200]!r}")
        return event

    def read_response(self) -> Response:
        """Wait for the whole response or the end of the connection: look at `complete` and `ended_by`."""
        while not self.reader.is_finished:
            self.read_more()
        return self.response

    def read_to_end(self) -> bytes:
        """Wait for the end of the connection and return all bytes that ever arrived on it."""
        while self.read_more():
            pass
        return bytes(self.raw)

    def half_close(self) -> None:
        """Send FIN, go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Leave by RST."""
        set_reset_on_close(self.socket)
        self.socket.close()

    def close(self) -> None:
        """Leave by FIN. Unread bytes would turn it into RST, so what already arrived is read first."""
        with contextlib.suppress(OSError):
            self.socket.setblocking(False)
            while self.socket.recv(65_536):
                pass
        self.socket.close()

    def __enter__(self) -> Self:
        """Return the connection."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the socket."""
        self.socket.close()


class AsyncRawClient:
    """The same for tests on a loop: `async with AsyncRawClient(port) as client`. Only for asyncio."""

    def __init__(
        self,
        port: int,
        *,
        host: str = "127.0.0.1",
        timeout: float = 10.0,
        receive_buffer: int | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare; entering connects."""
        self.host, self.port, self.timeout = host, port, timeout
        self.reader = ResponseReader()
        self.raw = bytearray()
        self._receive_buffer, self._tls = receive_buffer, tls
        self._input: asyncio.StreamReader
        self._output: asyncio.StreamWriter

    async def connect(self) -> Self:
        """Connect, without `async with`."""
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        connection.setblocking(False)
        if self._receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.timeout(self.timeout):
                await loop.sock_connect(connection, (self.host, self.port))
                name = None if self._tls is None else self.host
                # the limit is what asyncio reads ahead of the test: keep it small for clients that shall stall
                limit = self._receive_buffer or 65_536
                self._input, self._output = await asyncio.open_connection(sock=connection, limit=limit, ssl=self._tls, server_hostname=name)
        except BaseException:
            connection.close()
            raise
        return self

    @property
    def response(self) -> Response:
        """The current response, as far as it has arrived."""
        return self.reader.response

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._output.write(data)
        async with asyncio.timeout(self.timeout):
            await self._output.drain()

    async def request(
        self, method: str, target: str, *, json: Any = UNSET, body: bytes | None = None, headers: Headers = (), chunked: bool = False
    ) -> None:
        """Send a well-formed request and begin a new response."""
        self.reader.expect(head_request=method == "HEAD")
        host = f"{self.host}:{self.port}"
        await self.send(request_bytes(method, target, host=host, json=json, body=body, headers=headers, chunked=chunked))

    async def fetch(self, method: str, target: str, **parts: Any) -> Response:
        """Send a request and read its whole response, also one that came, with the end, before all was sent."""
        with contextlib.suppress(ConnectionError):
            await self.request(method, target, **parts)
        return await self.read_response()

    async def read_more(self) -> bool:
        """Wait for more bytes; False when the connection has ended instead. Raises TimeoutError."""
        if self.response.ended_by is not None:
            return False
        try:
            async with asyncio.timeout(self.timeout):
                data = await self._input.read(65_536)
        except TimeoutError:
            raise
        except OSError:
            self.reader.feed_end("reset")
            return False
        if not data:
            self.reader.feed_end("eof")
            return False
        self.raw += data
        self.reader.feed(data)
        return True

    async def read_head(self) -> Response:
        """Wait for a head. Raises EndedError when none comes."""
        while not self.reader.has_head:
            if not await self.read_more():
                raise EndedError(f"no head: {self.response.ended_by}, {bytes(self.raw[:200])!r}")
        return self.response

    async def read_event(self) -> bytes:
        """Wait for the next server-sent event that was not returned yet. Raises EndedError when none comes."""
        while (event := self.reader.next_event()) is None:
            if self.reader.is_finished or not await self.read_more():
                raise EndedError(f"no further event: {self.response.ended_by or 'end of body'}, rest {self.response.rest[:200]!r}")
        return event

    async def read_response(self) -> Response:
        """Wait for the whole response or the end of the connection: look at `complete` and `ended_by`."""
        while not self.reader.is_finished:
            await self.read_more()
        return self.response

    async def read_to_end(self) -> bytes:
        """Wait for the end of the connection and return all bytes that ever arrived on it."""
        while await self.read_more():
            pass
        return bytes(self.raw)

    def half_close(self) -> None:
        """Send FIN, go on reading."""
        self._output.write_eof()

    def abort(self) -> None:
        """Leave by RST."""
        set_reset_on_close(self._output.get_extra_info("socket"))
        self._output.transport.abort()

    def close(self) -> None:
        """Leave by FIN (RST when the kernel holds unread bytes)."""
        self._output.close()

    async def __aenter__(self) -> Self:
        """Connect."""
        return await self.connect()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the socket and wait for it, a moment at most."""
        self._output.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._output.wait_closed()
        self._output.transport.abort()
