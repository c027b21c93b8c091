"""What both versions of HTTP need: the time for a head, the way out to the client, the way in to the application."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.typing import TaskGroup

from multiverse_gateway.core.pauses import stopped_seconds

HELD_BYTES = 16 * 1024
"""Bytes of one answer, and of one request's body, that are held before the sender waits. The transport may hold as many again."""
CLOSING_SECONDS = 2.0
"""Seconds within which a client must take some of what is still to be sent on a connection that is closing."""

Message = dict[str, Any]


class HardenedConfig(Config):
    """Hypercorn's configuration, with the limits of the hardened protocols."""

    head_timeout = 10.0
    """Seconds within which the head of a request must arrive."""
    write_timeout = 60.0
    """Seconds within which a client must take some of what is sent to it."""


class _Ended:
    """Take the place of a protocol whose connection has ended."""

    async def handle(self, event: Event) -> None:
        """Ignore an event that arrives after the connection has ended."""


class HardenedServer(TCPServer):
    """One connection of hypercorn, freed when it has ended.

    Its parts refer to each other, and what its requests brought hangs on them. The collector, which looks for cycles seldom, would
    find them late.
    """

    async def run(self) -> None:
        """Serve the connection to its end."""
        try:
            await super().run()
        finally:
            wrapper: Any = getattr(self, "protocol", None)
            if wrapper is not None:
                self.protocol = _Ended()  # type: ignore[assignment]
                wrapper.protocol.release()
                for part in (wrapper.protocol.connection, wrapper.protocol, wrapper):
                    vars(part).clear()


def stopped_before(timer: asyncio.TimerHandle) -> float:
    """Return for how many seconds the process was stopped when a timer that has fired was due; 0 if it fired on time."""
    return stopped_seconds(timer.when(), asyncio.get_running_loop().time())


class HeadTimer:
    """Call `expire` once the time for a head is up, unless it is ended before."""

    def __init__(self, seconds: float, expire: Callable[[], None]) -> None:
        self._seconds = seconds
        self._expire = expire
        self._handle: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Start the clock, if it does not run yet."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(self._seconds, self._expired)

    def end(self) -> None:
        """Stop the timer, because the awaited event has come."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _expired(self) -> None:
        assert self._handle is not None
        was_stopped = stopped_before(self._handle)
        self._handle = None
        if was_stopped:  # first read what already waits in the socket
            self.begin()
        else:
            self._expire()


class Outlet:
    """Send a protocol's events through hypercorn's TCP server, and cut off a client that takes nothing of them.

    Once the client has left, hypercorn is no longer told that the connection waits for a request, which would begin a long wait.
    """

    def __init__(self, send: Callable[[Event], Awaitable[None]], write_timeout: float) -> None:
        self._send = send
        self._patience = write_timeout
        server = getattr(send, "__self__", None)
        self._transport = server.writer.transport if isinstance(server, TCPServer) else None
        self._has_left = False
        self._sent = self._taken = 0
        self._since = 0.0
        self._watch: asyncio.TimerHandle | None = None
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=HELD_BYTES)

    async def __call__(self, event: Event) -> None:
        """Send an event; bytes wait until the transport holds few of them."""
        if self._has_left and isinstance(event, Updated):
            return
        if isinstance(event, RawData):
            self._sent += len(event.data)
            if self._watch is None:  # started on demand: bytes that the kernel takes immediately need no watch
                self._begin_to_watch()
        elif isinstance(event, Closed):
            self._patience = min(self._patience, CLOSING_SECONDS)
            self._stop_watching()
            self._begin_to_watch()
        await self._send(event)

    async def leave(self) -> None:
        """Note that the client has left."""
        if not self._has_left:
            self._has_left = True
            await self._send(Updated(idle=False))

    def _begin_to_watch(self) -> None:
        if self._transport is not None:
            loop = asyncio.get_running_loop()
            self._since = loop.time()
            self._watch = loop.call_later(self._patience / 4, self._look)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _look(self) -> None:
        assert self._transport is not None
        assert self._watch is not None
        self._since += stopped_before(self._watch)
        self._watch = None
        left = self._transport.get_write_buffer_size()
        if not left:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        taken = self._sent - left
        if taken > self._taken:
            self._taken, self._since = taken, now
        elif now - self._since >= self._patience:
            self._transport.abort()
            return
        self._watch = loop.call_later(self._patience / 4, self._look)


class Inbox:
    """The messages that an application receives of one request: at most `HELD_BYTES` and one piece, unless `taken` makes the client wait.

    Hypercorn has a queue here. When it is full, hypercorn reads nothing more from the connection, not even that the client left, and
    when the application has ended it stays full. Here the client's leaving replaces all that was not received yet, and is received by
    every later call; an application that has ended is sent nothing.

    With `taken`, putting never waits: the function gets the size of each piece that the application has taken, or never will.
    """

    def __init__(self, taken: Callable[[int], None] | None = None) -> None:
        self._taken = taken
        self._messages: deque[Message] = deque()
        self._size = 0
        self._left: Message | None = None
        self._is_closed = False
        self._arrived = asyncio.Event()
        self._has_room = asyncio.Event()

    async def put(self, message: Message) -> None:
        """Add a message, and wait until there is room for another."""
        size = len(message.get("body", b""))
        if self._is_closed or self._left is not None:
            self._give_back(size)
            return
        if message["type"] == "http.disconnect":
            self._left = message
            self._forget()
        else:
            self._messages.append(message)
            self._size += size
        self._arrived.set()
        if self._taken is None:
            while self._size > HELD_BYTES:
                self._has_room.clear()
                await self._has_room.wait()

    async def get(self) -> Message:
        """Wait for the next message and return it; after the client has left, return that it has."""
        while not self._messages and self._left is None:
            self._arrived.clear()
            await self._arrived.wait()
        if not self._messages:
            assert self._left is not None
            return self._left
        message = self._messages.popleft()
        size = len(message.get("body", b""))
        self._size -= size
        self._has_room.set()
        self._give_back(size)
        return message

    def close(self) -> None:
        """Release every sender that waits: the application has ended."""
        self._is_closed = True
        self._forget()

    def _forget(self) -> None:
        size, self._size = self._size, 0
        self._messages.clear()
        self._has_room.set()
        self._give_back(size)

    def _give_back(self, size: int) -> None:
        if size and self._taken is not None:
            self._taken(size)


class Applications:
    """Take the place of the task group that hypercorn's streams use, to run applications with our `Inbox`."""

    def __init__(self, group: TaskGroup, taken: Callable[[int], None] | None = None) -> None:
        self._group = group
        self._taken = taken

    async def spawn_app(
        self, app: Any, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Message], Awaitable[None]]:
        """Start the application for a request, and return what passes messages to it."""
        inbox = Inbox(self._taken)
        self._group.spawn(self._run, app, config, scope, inbox, send)
        return inbox.put

    async def _run(self, app: Any, config: Config, scope: Any, inbox: Inbox, send: Callable[[Any], Awaitable[None]]) -> None:
        try:
            await app(scope, inbox.get, send, None, None)  # the last two are for WSGI, which we do not have
        except Exception:  # noqa: BLE001  whatever the application raises: its stream is ended below
            await config.log.exception("Error in ASGI Framework")
        finally:
            inbox.close()
            await send(None)
