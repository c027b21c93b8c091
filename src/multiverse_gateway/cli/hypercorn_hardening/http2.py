"""HTTP/2 in place of hypercorn's: the `h2` library speaks the protocol, hypercorn's `HTTPStream` is the bridge to the application.

What the application sends goes into the `StreamOutbox` of its stream, and one task of the connection writes frames from the outboxes in
turn. The application waits while its outbox is full, and at the end until the last frame is written.

1. A stream ends once, in `_end_stream`: the outbox is closed, so that no sender waits any longer, and the application receives that its
   client has left. A connection that ends, whichever way, ends all its streams.
2. A stream that takes less than `LEAST_BYTES` in the write timeout although it is offered more is reset. The client's window may stay
   closed for as long as it likes, but not our memory in use.
3. A body that arrives is acknowledged when the application has taken it: the window of a stream bounds what is held of it, and the
   window of the connection is large enough for all streams, so that none has to wait for another.
4. What arrives on a stream that was answered already is dropped, up to `DROPPED_BYTES`.
5. Priorities are ignored (RFC 9113, 5.3.2 lets us), so a client cannot make us remember any. Nothing is pushed.
6. A client that resets streams without end is cut off (CVE-2023-44487); a request that is reset in the same breath never begins.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from h2.errors import ErrorCodes
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Request, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup, WorkerContext
from hypercorn.utils import filter_pseudo_headers

from multiverse_gateway.cli.hypercorn_hardening.http2_frames import FrameWatch
from multiverse_gateway.cli.hypercorn_hardening.http2_outbox import StreamOutbox
from multiverse_gateway.cli.hypercorn_hardening.shared import Applications, HardenedConfig, HeadTimer, Outlet, stopped_before
from multiverse_gateway.relay.request_body import DROPPED_BYTES

MAX_RESETS = 100
"""Resets of one connection in `RESET_SECONDS`. A person's client, with at most 100 streams, does not cause more."""
RESET_SECONDS = 10.0
SLICE_BYTES = 1024
"""Bytes that are read from a connection before other connections get their turn."""
STREAM_WINDOW = 65_535
"""Bytes that a client may send ahead on one stream: the protocol's default."""

_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})


class HardenedH2:
    """One connection that speaks HTTP/2. Hypercorn makes it, and calls `initiate` and `handle`."""

    def __init__(
        self,
        app: AppWrapper,
        config: HardenedConfig,
        context: WorkerContext,
        task_group: TaskGroup,
        connection_state: ConnectionState,
        ssl: bool,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._tasks = task_group
        self._state = connection_state
        self._ends = (ssl, client, server)
        self._outlet = Outlet(send, config.write_timeout)
        self._head_timer = HeadTimer(config.head_timeout, self._give_up)
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.connection.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: config.h2_max_concurrent_streams,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: config.h2_max_header_list_size,
            },
        )
        self._frames = FrameWatch(self.connection.max_inbound_frame_size)
        self._streams: dict[int, HTTPStream] = {}
        self._outboxes: dict[int, StreamOutbox] = {}
        self._turns: dict[int, None] = {}
        """The streams that may have something to write, in the order of their turns."""
        self._has_work = asyncio.Event()
        self._unread: dict[int, int] = {}
        """Bytes that arrived on streams that were answered before their request had ended."""
        self._unfinished: set[int] = set()
        """The streams whose requests have not ended."""
        self._resets: deque[float] = deque()
        self._stall_watch: asyncio.TimerHandle | None = None
        self._requests = 0
        self._is_closed = False

    # Called by hypercorn

    async def initiate(self, headers: Any = None, settings: Any = None) -> None:
        """Send our settings and wait for the client's first frame."""
        self._head_timer.begin()
        self.connection.initiate_connection()
        self.connection.increment_flow_control_window((self._config.h2_max_concurrent_streams - 1) * STREAM_WINDOW)
        await self._flush()
        self._tasks.spawn(self._write)

    async def handle(self, event: Event) -> None:
        """Take bytes, a few at a time, so that a flood is cut off, and others served, within it; or the end of the connection."""
        if isinstance(event, RawData):
            for start in range(0, len(event.data), SLICE_BYTES):
                if self._is_closed:
                    return
                await self._read(event.data[start : start + SLICE_BYTES])
                await asyncio.sleep(0)
        elif isinstance(event, Closed):
            await self._end()

    def release(self) -> None:
        """Stop all timers: the connection has ended."""
        self._is_closed = True
        self._head_timer.end()
        if self._stall_watch is not None:
            self._stall_watch.cancel()

    # The connection

    async def _end(self) -> None:
        """End everything that belongs to this connection."""
        if self._is_closed:
            return
        self.release()
        for stream_id in list(self._streams):
            await self._end_stream(stream_id)
        self._turns.clear()
        self._has_work.set()
        await self._outlet.leave()

    async def _close(self) -> None:
        """Send what is left, and end this connection from our side."""
        await self._flush()
        await self._end()
        await self._outlet(Closed())

    def _give_up(self) -> None:
        self._tasks.spawn(self._close)

    async def _flush(self) -> None:
        data = self.connection.data_to_send()
        if data and not self._is_closed:
            await self._outlet(RawData(data=data))

    @property
    def _is_leaving(self) -> bool:
        return self._context.terminated.is_set() or self._requests > self._config.keep_alive_max_requests

    # Reading

    async def _read(self, data: bytes) -> None:
        if not self._frames.accepts(data):
            self.connection.close_connection(error_code=ErrorCodes.FRAME_SIZE_ERROR)
            await self._close()
            return
        try:
            events = self.connection.receive_data(data)
        except h2.exceptions.ProtocolError:
            await self._close()
            return
        if events:
            self._head_timer.end()
        if self._resets_too_often(events):
            self.connection.close_connection(error_code=ErrorCodes.ENHANCE_YOUR_CALM)
            await self._close()
            return
        reset = {event.stream_id for event in events if isinstance(event, h2.events.StreamReset)}
        for event in events:
            if self._is_closed:
                return
            await self._take(event, reset)
        await self._flush()

    def _resets_too_often(self, events: Sequence[h2.events.Event]) -> bool:
        now = asyncio.get_running_loop().time()
        self._resets.extend(now for event in events if isinstance(event, h2.events.StreamReset))
        while self._resets and self._resets[0] < now - RESET_SECONDS:
            self._resets.popleft()
        return len(self._resets) > MAX_RESETS

    async def _take(self, event: h2.events.Event, reset: set[int]) -> None:
        if isinstance(event, h2.events.RequestReceived):
            if event.stream_id not in reset:
                await self._begin_stream(event)
        elif isinstance(event, h2.events.DataReceived):
            await self._take_data(event)
        elif isinstance(event, h2.events.StreamEnded):
            self._unfinished.discard(event.stream_id)
            self._unread.pop(event.stream_id, None)
            if event.stream_id in self._streams:
                await self._streams[event.stream_id].handle(EndBody(stream_id=event.stream_id))
        elif isinstance(event, h2.events.StreamReset):
            await self._end_stream(event.stream_id)
            self._unread.pop(event.stream_id, None)
            await self._tell_idle()
        elif isinstance(event, h2.events.WindowUpdated):
            self._may_write([event.stream_id] if event.stream_id else self._outboxes)
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            self._may_write(self._outboxes)
        elif isinstance(event, h2.events.ConnectionTerminated):  # after it h2 sends nothing more
            await self._close()

    async def _begin_stream(self, event: h2.events.RequestReceived) -> None:
        stream_id, fields = event.stream_id, dict(event.headers)
        method, path = fields.get(b":method", b""), fields.get(b":path", b"")
        if self._is_leaving or not path or not path.isascii() or not method.isascii():
            self._reset(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        applications: Any = Applications(self._tasks, partial(self._acknowledge, stream_id))
        ends = self._ends
        stream = HTTPStream(self._app, self._config, self._context, applications, *ends, self._stream_send, stream_id)
        self._streams[stream_id] = stream
        self._unfinished.add(stream_id)
        self._outboxes[stream_id] = StreamOutbox()
        self._requests += 1
        request = Request(
            stream_id=stream_id,
            headers=filter_pseudo_headers(event.headers),
            http_version="2",
            method=method.decode("ascii").upper(),
            raw_path=path,
            state=self._state,
        )
        await stream.handle(request)
        await self._context.mark_request()
        if len(self._streams) == 1:
            await self._outlet(Updated(idle=False))

    async def _take_data(self, event: h2.events.DataReceived) -> None:
        stream_id = event.stream_id
        stream = self._streams.get(stream_id)
        if stream is None:
            self._acknowledge(stream_id, event.flow_controlled_length)
            if stream_id in self._unread:
                self._unread[stream_id] += len(event.data)
                if self._unread[stream_id] > DROPPED_BYTES:
                    self._reset(stream_id, ErrorCodes.NO_ERROR)
            return
        self._acknowledge(stream_id, event.flow_controlled_length - len(event.data))  # padding
        if event.data:
            await stream.handle(Body(stream_id=stream_id, data=event.data))

    def _acknowledge(self, stream_id: int, count: int) -> None:
        """Allow the client to send as many bytes more."""
        if count and not self._is_closed:
            try:
                self.connection.acknowledge_received_data(count, stream_id)
            except h2.exceptions.ProtocolError:
                return  # the connection is closing
            self._has_work.set()

    # Streams

    async def _end_stream(self, stream_id: int, error: ErrorCodes | None = None) -> None:
        """End a stream, so that no task waits for it; with `error` it is reset, so that the client knows its answer is not whole."""
        outbox = self._outboxes.pop(stream_id, None)
        if outbox is not None:
            outbox.close()
        self._turns.pop(stream_id, None)
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        if outbox is not None and error is not None:
            self._reset(stream_id, error)
        elif stream_id in self._unfinished:
            self._unread[stream_id] = 0
        self._unfinished.discard(stream_id)
        await stream.handle(StreamClosed(stream_id=stream_id))

    def _reset(self, stream_id: int, error: ErrorCodes) -> None:
        self._unread.pop(stream_id, None)
        try:
            self.connection.reset_stream(stream_id, error)
        except h2.exceptions.ProtocolError:
            return  # it has ended already
        self._has_work.set()

    async def _stream_send(self, event: StreamEvent) -> None:
        """Take what the application sends on a stream."""
        stream_id = event.stream_id
        outbox = self._outboxes.get(stream_id)
        if isinstance(event, StreamClosed):
            await self._end_stream(stream_id, ErrorCodes.INTERNAL_ERROR)
            await self._flush()
            await self._tell_idle()
        elif outbox is None or self._is_closed:
            return
        elif isinstance(event, Response):
            await self._send_head(event)
        elif isinstance(event, Body):
            await self._send_body(stream_id, outbox, event.data)
        elif isinstance(event, EndBody):
            outbox.complete()
            self._may_write([stream_id])
            await outbox.ended()

    async def _send_head(self, event: Response) -> None:
        headers = [(name, value) for name, value in event.headers if name.lower() not in _HOP_BY_HOP]
        try:
            self.connection.send_headers(
                event.stream_id, [(b":status", b"%d" % event.status_code), *headers, *self._config.response_headers("h2")]
            )
        except h2.exceptions.ProtocolError:
            await self._end_stream(event.stream_id, ErrorCodes.INTERNAL_ERROR)
        await self._flush()

    async def _send_body(self, stream_id: int, outbox: StreamOutbox, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            added = await outbox.add(rest)
            if not added:
                return
            rest = rest[added:]
            self._may_write([stream_id])
            self._watch_for_stalls()

    async def _tell_idle(self) -> None:
        """Start the time for the next request if no stream is left, or end the connection if it should take no more requests."""
        if self._streams or self._is_closed:
            return
        if self._is_leaving:
            self.connection.close_connection()
            await self._close()
        else:
            await self._outlet(Updated(idle=True))

    # Writing

    def _may_write(self, stream_ids: Iterable[int]) -> None:
        """Give streams a turn; a stream with nothing to write, or no window, loses it again."""
        self._turns.update(dict.fromkeys(stream_ids))
        self._has_work.set()

    async def _write(self) -> None:
        """Write a frame of each stream in turn, until the end of the connection."""
        while not self._is_closed:
            if not self._turns:
                self._has_work.clear()
                await self._flush()
                await self._has_work.wait()
                continue
            stream_id = next(iter(self._turns))
            del self._turns[stream_id]
            if self._write_frame(stream_id):
                self._turns[stream_id] = None
            await self._flush()

    def _write_frame(self, stream_id: int) -> bool:
        """Write as much of one stream as the windows allow, up to a frame; return whether the stream needs another turn."""
        outbox = self._outboxes.get(stream_id)
        if outbox is None:
            return False
        try:
            room = min(self.connection.local_flow_control_window(stream_id), self.connection.max_outbound_frame_size)
            data = outbox.take(max(0, room))
            if data:
                self.connection.send_data(stream_id, data, end_stream=outbox.is_over)
            elif outbox.is_over:
                self.connection.end_stream(stream_id)
        except h2.exceptions.ProtocolError:  # it has ended; the event that says so is on its way
            outbox.close()
            del self._outboxes[stream_id]
            return False
        if outbox.is_over:
            outbox.close()
            del self._outboxes[stream_id]
        return bool(data) and len(outbox) > 0

    # Clients that take nothing

    def _watch_for_stalls(self) -> None:
        if self._stall_watch is None:
            self._stall_watch = asyncio.get_running_loop().call_later(self._config.write_timeout / 4, self._look_for_stalls)

    def _look_for_stalls(self) -> None:
        assert self._stall_watch is not None
        seconds = stopped_before(self._stall_watch)
        self._stall_watch = None
        for outbox in self._outboxes.values():
            outbox.postpone(seconds)
        if not self._is_closed:
            self._tasks.spawn(self._end_stalled)

    async def _end_stalled(self) -> None:
        now = asyncio.get_running_loop().time()
        for stream_id, outbox in list(self._outboxes.items()):
            if outbox.is_stalled(now, self._config.write_timeout):
                await self._end_stream(stream_id, ErrorCodes.CANCEL)
        await self._flush()
        await self._tell_idle()
        if any(self._outboxes.values()):
            self._watch_for_stalls()
