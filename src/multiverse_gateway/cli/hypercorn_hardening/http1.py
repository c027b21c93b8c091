"""HTTP/1.1 of hypercorn, hardened: heads that are late or folded, empty lines before a request, bytes behind the last one."""

import asyncio
import re
from typing import Any

import h11
from hypercorn.events import Closed, Event
from hypercorn.protocol.events import Body, Request, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H2ProtocolAssumedError, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream

from multiverse_gateway.cli.hypercorn_hardening.shared import Applications, HardenedConfig, HeadTimer, Outlet

AHEAD_BYTES = 65_536
"""Bytes that a client may send ahead while a request is answered."""
PIECE_BYTES = 32_768
"""Bytes of a body that are written before the client must have taken most of them."""

_HEAD_END = re.compile(rb"\n\r?\n")
_FOLD = re.compile(rb"\n[ \t]")
_EMPTY_LINES = re.compile(rb"(?:\r?\n)+")


def _is_folded(data: bytes) -> bool:
    """Return whether a line of a head begins with a blank, which others may read as another header (RFC 9112, 5.2)."""
    end = _HEAD_END.search(data)
    return _FOLD.search(data, 0, end.start() if end else len(data)) is not None


class _Connection(h11.Connection):
    """The protocol of one connection, stricter than h11 but for three things that servers must or may ignore.

    They are empty lines before a request (RFC 9112, 2.2), all that follows the last request of a connection (RFC 9112, 9.6), and the
    offer of another protocol (RFC 9110, 7.8).

    What a client sends before its answer is complete is kept, so that reading goes on and a client that leaves is noticed. A client that
    sends more than `AHEAD_BYTES` has its connection closed after the answer.
    """

    has_ended = False
    """Whether the client has left; what it had sent ahead is then ignored."""

    def receive_data(self, data: bytes) -> None:
        """Take bytes, unless no request can follow."""
        if self.their_state is not h11.MUST_CLOSE:
            super().receive_data(data)

    def next_event(self) -> Any:
        """Return the next event; events of the next request wait until the current one is answered."""
        if self.their_state is h11.DONE and len(self._receive_buffer) > AHEAD_BYTES:
            self._cstate.process_keep_alive_disabled()
        if self.has_ended or self.their_state in (h11.DONE, h11.MUST_CLOSE):
            return h11.NEED_DATA
        if self.their_state is h11.IDLE:
            self._skip_empty_lines()
            waiting = self.trailing_data[0]
            if waiting == b"\r":
                return h11.NEED_DATA
            if _is_folded(waiting):
                raise h11.RemoteProtocolError("a header is folded")
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._cstate.pending_switch_proposals.clear()  # otherwise h11 reads nothing until the answer, not even that the client has left
            if event.http_version == b"1.0" and b"transfer-encoding" in dict(event.headers):
                raise h11.RemoteProtocolError("HTTP/1.0 does not define transfer codings")  # RFC 9112, 6.1
        return event

    def _skip_empty_lines(self) -> None:
        empty = _EMPTY_LINES.match(self.trailing_data[0])
        if empty is not None:
            self._receive_buffer.maybe_extract_at_most(empty.end())


class HardenedH11(H11Protocol):
    """One connection that speaks HTTP/1.1."""

    config: HardenedConfig

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connection = self._requests = _Connection(h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size)
        self.send = self._outlet = Outlet(self.send, self.config.write_timeout)
        self._applications = Applications(self.task_group)
        self._reading = asyncio.Lock()
        self._head_timer = HeadTimer(self.config.head_timeout, self._give_up)

    async def initiate(self) -> None:
        """Wait for the first head."""
        await super().initiate()
        self._head_timer.begin()

    async def handle(self, event: Event) -> None:
        """Take bytes; an unfinished head starts the clock."""
        await super().handle(event)
        if isinstance(event, Closed):
            self._requests.has_ended = True
            self._head_timer.end()
            await self._outlet.leave()
        else:
            self._time_head()

    async def stream_send(self, event: StreamEvent) -> None:
        """Send what the application sends, a large body in pieces, and nothing once the client has left."""
        if self.stream is None and not isinstance(event, StreamClosed):
            return
        if isinstance(event, Response) and self.connection.their_state is h11.SEND_BODY:
            event.headers.append((b"connection", b"close"))  # hypercorn will close, because the body was not read, but does not say so
        if not isinstance(event, Body):
            await super().stream_send(event)
            return
        rest = memoryview(event.data)
        while rest and self.stream is not None:
            await super().stream_send(Body(stream_id=event.stream_id, data=bytes(rest[:PIECE_BYTES])))
            rest = rest[PIECE_BYTES:]

    async def _handle_events(self) -> None:
        async with self._reading:  # both the reader and the end of an answer call this: another request may be waiting
            await super()._handle_events()

    async def _maybe_recycle(self) -> None:
        await super()._maybe_recycle()
        if self.connection.our_state is h11.IDLE and self.connection.trailing_data[0]:
            self.task_group.spawn(self._go_on)

    async def _go_on(self) -> None:
        """Handle what the client sent ahead."""
        await self._handle_events()
        self._time_head()

    def _time_head(self) -> None:
        """Start the clock if a head has begun."""
        if self.stream is None and self.connection.trailing_data[0] and not self._requests.has_ended:
            self._head_timer.begin()

    def release(self) -> None:
        """Stop all timers: the connection has ended."""
        self._head_timer.end()

    def _give_up(self) -> None:
        self.task_group.spawn(self._close_unheard)

    async def _close_unheard(self) -> None:
        """Close the connection, after a 408 if a head was under way."""
        if self.stream is not None:
            return
        if self.connection.our_state is h11.IDLE and self.connection.trailing_data[0]:
            await self._send_error_response(408)
        await self.send(Closed())

    async def _create_stream(self, request: h11.Request) -> None:
        """Start the application, for requests for a WebSocket too, which hypercorn would serve in another way."""
        self._head_timer.end()
        ends = (self.ssl, self.client, self.server)
        start: Any = self._applications
        stream = self.stream = HTTPStream(self.app, self.config, self.context, start, *ends, self.stream_send, STREAM_ID)
        await stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1
        await self.context.mark_request()

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.method == b"PRI" and event.target == b"*" and event.http_version == b"2.0" and not self.keep_alive_requests:
            self._head_timer.end()
            raise H2ProtocolAssumedError(b"PRI * HTTP/2.0\r\n\r\n" + self.connection.trailing_data[0])
