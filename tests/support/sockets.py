"""Ports, listeners and loops that the misbehaving servers stand on.

A server is run either on the test's own loop (`async with server:`) or on a thread of its own (`with server:`), so that
asynchronous and plain tests use the same classes. Its switches may be turned from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio

Result = TypeVar("Result")

LOWEST_PORT, HIGHEST_PORT = 20_000, 32_000
"""Below the ports that systems give to outgoing connections: a port stays ours while its server is down."""
CALL_TIMEOUT = 10.0
POLL_SECONDS = 0.002


@functools.cache
def ports() -> Iterator[int]:
    """Return the ports of our range in random order, for ever: no two servers of a process get the same one, nor of two of pytest-xdist."""
    worker, workers = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = range(LOWEST_PORT + worker, HIGHEST_PORT, workers)
    return itertools.cycle(random.SystemRandom().sample(own, len(own)))


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port on which nobody listens and which this process did not get before."""
    for port in itertools.islice(ports(), 200):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise RuntimeError(f"no free port between {LOWEST_PORT} and {HIGHEST_PORT}")


def set_reset_on_close(connection: Any) -> None:
    """Make closing `connection` (a socket or asyncio's view of one) send RST instead of FIN."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def wait_until(claim: Callable[[], object], *, within: float = 5.0, what: str = "") -> None:
    """Return as soon as `claim()` is true. For plain tests.

    Raises:
        AssertionError: it was not true `within` seconds.
    """
    deadline = time.monotonic() + within
    while not claim():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what or claim}")
        time.sleep(POLL_SECONDS)


async def until(claim: Callable[[], object], *, within: float = 5.0, what: str = "") -> None:
    """Return as soon as `claim()` is true. For asynchronous tests; else as `wait_until`."""
    deadline = time.monotonic() + within
    while not claim():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what or claim}")
        await anyio.sleep(POLL_SECONDS)


class LoopThread:
    """Run an asyncio loop on a daemon thread of its own."""

    def __init__(self) -> None:
        """Start the thread."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-servers", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` on the loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(CALL_TIMEOUT)

    def stop(self) -> None:
        """End loop and thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(CALL_TIMEOUT)
        self.loop.close()


class LoopServer:
    """Listen on one loopback port and give each accepted connection to `connected`.

    The port stays the same while the server refuses connections and accepts them again.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int | None = None, backlog: int = 1024) -> None:
        """Choose the port; nothing listens before the server is entered."""
        self.host = host
        self.port = free_port(host) if port is None else port
        self.backlog = backlog
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: LoopThread | None = None
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The root URL, without a slash at the end."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    async def connected(self, connection: socket.socket) -> None:
        """Take one accepted, non-blocking connection over."""
        raise NotImplementedError

    async def hang_up(self) -> None:
        """Drop all connections and end all tasks; called on leaving."""
        raise NotImplementedError

    def refuse(self) -> None:
        """Close the listening socket: further connections are refused. Open ones live on."""
        self.on_loop(self._close_listener)

    def accept(self) -> None:
        """Listen again on the same port."""
        self.on_loop(self._open_listener)

    def on_loop(self, action: Callable[[], None]) -> None:
        """Run `action` on the server's loop, from whichever thread, and wait for it."""
        if self._loop is None:
            raise RuntimeError("enter the server first: `with server:` or `async with server:`")
        try:
            here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is self._loop:
            return action()
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result(CALL_TIMEOUT)

    def _open_listener(self) -> None:
        if self._listening is not None:
            return
        listening = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setblocking(False)
        try:
            listening.bind((self.host, self.port))
            listening.listen(self.backlog)
        except OSError:
            listening.close()
            raise
        self._listening = listening
        self._accepting = asyncio.get_running_loop().create_task(self._accept_all(listening))

    def _close_listener(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
        if self._listening is not None:
            with contextlib.suppress(NotImplementedError):  # Windows has no readers
                asyncio.get_running_loop().remove_reader(self._listening)
            self._listening.close()
        self._accepting = self._listening = None

    async def _accept_all(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            ready = loop.create_future()
            loop.add_reader(listening, _set, ready)
            await ready  # `_close_listener` cancels it, and removes the reader itself
            loop.remove_reader(listening)
            try:
                connection, _ = listening.accept()  # not `sock_accept`: cancelled at the wrong moment, that forgets what it accepted
            except BlockingIOError:
                continue
            except OSError:
                await asyncio.sleep(0.01)  # out of file descriptors: go on when some are free again
                continue
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self.connected(connection)

    async def __aenter__(self) -> Self:
        """Listen, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._open_listener()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop listening and drop everything."""
        accepting = self._accepting
        self._close_listener()
        if accepting is not None:
            await asyncio.wait([accepting], timeout=CALL_TIMEOUT)
        await self.hang_up()
        self._loop = None

    def __enter__(self) -> Self:
        """Listen, on a thread of our own."""
        self._thread = LoopThread()
        try:
            return self._thread.call(self.__aenter__())
        except BaseException:
            self._thread.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop listening, drop everything, end the thread."""
        assert self._thread is not None
        try:
            self._thread.call(self.__aexit__(kind, error, trace))
        finally:
            self._thread.stop()
            self._thread = None


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


@contextlib.contextmanager
def serving(*servers: LoopServer) -> Iterator[None]:
    """Run many servers on one thread, for plain tests with dozens of them."""
    thread = LoopThread()

    async def leave(entered: contextlib.AsyncExitStack) -> None:
        await entered.aclose()

    async def enter() -> contextlib.AsyncExitStack:
        async with contextlib.AsyncExitStack() as entered:
            for server in servers:
                await entered.enter_async_context(server)
            return entered.pop_all()

    try:
        entered = thread.call(enter())
        try:
            yield
        finally:
            thread.call(leave(entered))
    finally:
        thread.stop()


class BlackHole:
    """Own a port on which connecting hangs: its queue of one is full and nobody accepts (Linux drops the SYN)."""

    def __init__(self, *, host: str = "127.0.0.1", port: int | None = None) -> None:
        """Choose the port."""
        self.host = host
        self.port = free_port(host) if port is None else port
        self._sockets: list[socket.socket] = []

    @property
    def url(self) -> str:
        """The root URL."""
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> Self:
        """Listen and fill the queue."""
        listening = socket.socket()
        self._sockets.append(listening)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((self.host, self.port))
        listening.listen(0)
        for _ in range(4):
            filler = socket.socket()
            self._sockets.append(filler)
            filler.setblocking(False)
            filler.connect_ex((self.host, self.port))
        time.sleep(0.05)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close everything."""
        for held in reversed(self._sockets):
            held.close()
        self._sockets.clear()

    async def __aenter__(self) -> Self:
        """As `with`."""
        return self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """As `with`."""
        self.__exit__(kind, error, trace)
