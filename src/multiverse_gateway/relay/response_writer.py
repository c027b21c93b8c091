"""Responses of the direct door: what an exchange says to its client, written as HTTP/1.1.

1. A response whose length is known has a `Content-Length`, any other is chunked. A chunked response that is cut has no last chunk, so that
   the client can tell.
2. A head is written together with the first piece of its body. A client gets both in one segment, and the system is called once.
3. `keeps` only ever turns false during a request. Once it is false, the head says `Connection: close`.
4. Everything is given to the transport at once. If the client does not read, the transport buffers it and calls `pause_writing` on the
   connection, which sets `is_clogged`; the exchange then stops reading from its server.
"""

import asyncio
from functools import lru_cache
from http import HTTPStatus
from typing import Final, Protocol

from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers
from multiverse_gateway.relay.intake_port import HasLines
from multiverse_gateway.relay.ports import CUT_SECONDS

COPIED_BYTES: Final = 4096
"""Up to this size a piece is copied into its frame, which costs less than a second buffer; a larger one is passed on uncopied beside it."""

_LINES: Final = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}


# Saves 0.25 µs per response: the headers of one server's responses are nearly always the same.
@lru_cache(maxsize=1024)
def _first_lines(status: int, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Return the status line and the headers that the responses of one server have in common."""
    line = _LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return line + b"".join([b"%b: %b\r\n" % header for header in headers])


class ResponseSettings(Protocol):
    """What the responses of all connections of a listener have in common."""

    @property
    def closing(self) -> bool:
        """Return whether connections close after their response."""

    @property
    def date(self) -> bytes:
        """Return the header line with the current time."""


class RespondingConnection(Protocol):
    """The connection whose requests are answered."""

    @property
    def request(self) -> HasLines | None:
        """Return the request that is being answered."""

    def release(self) -> None:
        """Forget the current request and its body: its response is written."""

    def finish(self) -> None:
        """Get ready for the next request, or close."""

    def close(self, after: float = 0.0) -> None:
        """Close once everything is written, after so many seconds."""


class ResponseWriter:
    """Write what the exchanges of one connection answer, one after the other (`relay.ports.Client`)."""

    __slots__ = ("_connection", "_head", "_settings", "_transport", "_unread", "exchange", "is_clogged", "keeps")

    def __init__(self, connection: RespondingConnection, transport: asyncio.Transport, settings: ResponseSettings) -> None:
        self._connection: RespondingConnection | None = connection
        self._transport = transport
        self._settings = settings
        self._head: bytes | None = None
        self._unread: Exchange | None = None
        self.exchange: Exchange | None = None
        """The exchange whose response is not complete yet."""
        self.is_clogged = False
        """Whether the transport holds as much as it should, because the client does not read."""
        self.keeps = True
        """Whether the connection may serve another request after this response."""

    # Called by the exchange

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a whole response; the connection may serve the next request once the client has taken it."""
        exchange, self.exchange = self.exchange, None
        head = self._head_of(status, headers, b"content-length: %d\r\n" % len(body))
        if len(body) <= COPIED_BYTES:  # `_write_whole`, written out: a call is 0.2 % of a request
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        connection = self._connection
        assert connection is not None
        connection.release()
        if self.is_clogged:
            self._unread = exchange
            return
        if exchange is not None and exchange.response.held:
            exchange.taken()
        connection.finish()

    def head(self, status: int, headers: Headers) -> None:
        """Note the head, which is written together with what follows."""
        self._head = self._head_of(status, headers, b"transfer-encoding: chunked\r\n")

    def body(self, data: bytes) -> None:
        """Write a piece as a chunk. Called for every event of a stream: one formatting and one write, no other call."""
        head = self._head
        if head is None:
            head = b""
        else:
            self._head = None
        if len(data) <= COPIED_BYTES:
            self._transport.write(b"%b%x\r\n%b\r\n" % (head, len(data), data))
        else:
            self._transport.writelines((b"%b%x\r\n" % (head, len(data)), data, b"\r\n"))
        if self.is_clogged and self.exchange is not None:
            self.exchange.client_clogged()

    def end(self) -> None:
        """Write the end; the connection may serve the next request."""
        connection = self._connection
        assert connection is not None
        self.exchange = None
        self._transport.write(b"0\r\n\r\n")
        connection.release()
        if not self.is_clogged:
            connection.finish()

    def cut(self) -> None:
        """Close the connection without the end, a moment after what was written last."""
        connection = self._connection
        assert connection is not None
        self.exchange = None
        if self._head is not None:
            self._transport.write(self._head)
            self._head = None
        connection.release()
        connection.close(CUT_SECONDS)

    def _write_whole(self, status: int, headers: Headers, body: bytes) -> None:
        head = self._head_of(status, headers, b"content-length: %d\r\n" % len(body))
        if len(body) <= COPIED_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def _head_of(self, status: int, headers: Headers, framing: bytes) -> bytes:
        connection, settings = self._connection, self._settings
        assert connection is not None
        request = connection.request
        assert request is not None
        self.keeps = self.keeps and not settings.closing
        ending = b"\r\n" if self.keeps else b"connection: close\r\n\r\n"
        return b"".join((_first_lines(status, tuple(headers)), settings.date, request.lines(), framing, ending))

    # Called by the connection

    def answer_early(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a whole response while the body of its request is still arriving, and send the end (FIN) if no other response follows."""
        self._write_whole(status, headers, body)
        if not self.keeps and self._transport.can_write_eof():
            self._transport.write_eof()

    def clog(self) -> None:
        """Stop the server: the client does not read."""
        self.is_clogged = True
        if self.exchange is not None:
            self.exchange.client_clogged()

    def end_exchange(self) -> None:
        """End the exchange, if one runs: the client has left."""
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()

    def cut_off(self) -> None:
        """End the exchange, if one runs, and the connection immediately: the client takes nothing."""
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_stalled()
        self._transport.abort()

    def forget_unread(self) -> None:
        """Notify the exchange of the last complete response that the client has read it, or never will."""
        if self._unread is not None:
            self._unread.taken()
            self._unread = None

    def close(self) -> None:
        """Let go of the connection, after which no response can be written: no cycle is left for the garbage collector."""
        self.forget_unread()
        self._connection = None
