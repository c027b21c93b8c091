"""What hypercorn 0.18 leaves open at the front door, closed.

1. A head has to be complete in the time of `GuardedConfig` after the connection was made, or after its first byte on a kept one.
2. Nothing is upgraded to h2c: the request goes on as HTTP/1.1, to be refused (RFC 9113 dropped the upgrade). No header is folded.
3. A client that resets HTTP/2 streams without end is cut off (CVE-2023-44487); a request that is reset in the same breath never
   begins. What a client still sends on a stream that was answered is dropped, where hypercorn would drop the connection.
4. A connection that the client closed is closed at once: hypercorn would wait for the end of its keep-alive time first.
5. A client that takes nothing more of an answer does not keep its connection for ever: closing waits for no one.
"""

import asyncio
import math
import re
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import h2.errors
import h2.events
import h11
import hypercorn.protocol
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H2ProtocolAssumedError, H11Protocol

MAX_RESETS = 100
"""Resets of one connection in `RESET_SECONDS`: more than a person can cause, whose client has at most 100 streams."""
RESET_SECONDS = 10.0
SLICE_BYTES = 1024
"""What is read of a connection before others have their turn."""
CLOSING_SECONDS = 2.0
"""Seconds in which a client must take some of what is left to send on a connection that is to be closed."""

_HEAD_END = re.compile(rb"\n\r?\n")
_FOLD = re.compile(rb"\n[ \t]")


class GuardedConfig(Config):
    """Hypercorn's configuration, and ours of the guards."""

    head_timeout = 10.0
    """Seconds in which the head of a request must have come."""


def guard_hypercorn() -> None:
    """Make hypercorn use the guarded protocols, in this process; it has no setting for that."""
    vars(hypercorn.protocol).update(H11Protocol=GuardedH11, H2Protocol=GuardedH2)


def _is_folded(data: bytes) -> bool:
    """Tell whether a head goes on in a line that begins with a blank: others may read that as another header (RFC 9112, 5.2)."""
    end = _HEAD_END.search(data)
    return _FOLD.search(data, 0, end.start() if end else len(data)) is not None


class _Ending:
    """Send what a protocol says, until the end, and see to it that there is one.

    Once the client has left, it is no more said that another request is waited for, which would begin a long wait. When the
    connection is to be closed, a client that takes nothing of what is left to send is cut off.
    """

    def __init__(self, send: Callable[[Event], Awaitable[None]]) -> None:
        self._send = send
        self._has_left = False

    async def __call__(self, event: Event) -> None:
        if self._has_left and isinstance(event, Updated):
            return
        if isinstance(event, Closed):
            self._watch(math.inf)
        await self._send(event)

    def _watch(self, left_before: float) -> None:
        server = getattr(self._send, "__self__", None)
        if not isinstance(server, TCPServer):
            return
        left = server.writer.transport.get_write_buffer_size()
        if left >= left_before:
            server.writer.transport.abort()
        elif left:
            asyncio.get_running_loop().call_later(CLOSING_SECONDS, self._watch, left)

    async def leave(self) -> None:
        if not self._has_left:
            self._has_left = True
            await self._send(Updated(idle=False))


class _Timer:
    """Wait for a head, once at a time."""

    def __init__(self, protocol: "GuardedH11 | GuardedH2") -> None:
        self._protocol = protocol
        self._handle: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(self._protocol.config.head_timeout, self._expire)

    def end(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _expire(self) -> None:
        self._handle = None
        self._protocol.task_group.spawn(self._protocol.give_up)


class GuardedH11(H11Protocol):
    """HTTP/1.1 with the first two rules."""

    config: GuardedConfig

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._timer = _Timer(self)
        self.send = self._ending = _Ending(self.send)

    async def initiate(self) -> None:
        """Wait for the first head."""
        await super().initiate()
        self._timer.begin()

    async def handle(self, event: Event) -> None:
        """Take bytes; those of an unfinished head start the clock."""
        if isinstance(event, RawData) and self.stream is None and _is_folded(self.connection.trailing_data[0] + event.data):
            await self._send_error_response(400)
            await self.send(Closed())
            return
        await super().handle(event)
        if isinstance(event, Closed):
            self._timer.end()
            await self._ending.leave()
        elif self.stream is None and self.connection.trailing_data[0]:
            self._timer.begin()

    async def give_up(self) -> None:
        """Close the connection, with a word to who had begun to send a head."""
        if self.stream is not None:
            return
        if self.connection.our_state is h11.IDLE and self.connection.trailing_data[0]:
            await self._send_error_response(408)
        await self.send(Closed())

    async def _create_stream(self, request: h11.Request) -> None:
        self._timer.end()
        await super()._create_stream(request)

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.method == b"PRI" and event.target == b"*" and event.http_version == b"2.0":
            self._timer.end()
            raise H2ProtocolAssumedError(b"PRI * HTTP/2.0\r\n\r\n" + self.connection.trailing_data[0])


class GuardedH2(H2Protocol):
    """HTTP/2 with the first and the third rule."""

    config: GuardedConfig

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._timer = _Timer(self)
        self.send = self._ending = _Ending(self.send)
        self._resets: deque[float] = deque()

    async def initiate(self, headers: Any = None, settings: Any = None) -> None:
        """Wait for the client's first frame."""
        self._timer.begin()
        await super().initiate(headers, settings)

    async def handle(self, event: Event) -> None:
        """Take bytes, as long as the connection is open: a few at a time, so that a flood is cut off, and others served, within it."""
        if isinstance(event, RawData):
            for start in range(0, len(event.data), SLICE_BYTES):
                if self.closed:
                    return
                await super().handle(RawData(event.data[start : start + SLICE_BYTES]))
                await asyncio.sleep(0)
        else:
            await super().handle(event)
        if isinstance(event, Closed):
            self._timer.end()
            await self._ending.leave()

    async def give_up(self) -> None:
        """Close the connection."""
        await self.send(Closed())

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        if events:
            self._timer.end()
        if self._resets_too_often(events):
            self.connection.close_connection(error_code=h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
            await self._flush()
            await self.handle(Closed())
            await self.send(Closed())
            return
        await super()._handle_events(self._worth_handling(events))

    def _resets_too_often(self, events: Sequence[h2.events.Event]) -> bool:
        now = asyncio.get_running_loop().time()
        self._resets.extend(now for event in events if isinstance(event, h2.events.StreamReset))
        while self._resets and self._resets[0] < now - RESET_SECONDS:
            self._resets.popleft()
        return len(self._resets) > MAX_RESETS

    def _worth_handling(self, events: Sequence[h2.events.Event]) -> list[h2.events.Event]:
        """Leave out requests that are over already, and what belongs to no request."""
        reset = {event.stream_id for event in events if isinstance(event, h2.events.StreamReset)}
        known = set(self.streams)
        kept: list[h2.events.Event] = []
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                if event.stream_id in reset:
                    continue
                if not any(name == b":path" for name, _ in event.headers) or (b":method", b"CONNECT") in event.headers:
                    self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
                    continue
                known.add(event.stream_id)
            elif isinstance(event, h2.events.DataReceived) and event.stream_id not in known:
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                continue
            kept.append(event)
        return kept
