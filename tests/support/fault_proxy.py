"""A TCP proxy that is a bad network: late, slow, silent, cut or closed, switchable while connections are open.

with FaultProxy(backend.port) as proxy:          # or `async with`, on the test's own loop
    ...                                          # register proxy.url instead of backend.url
    proxy.blackhole()                            # nothing passes any more, nothing is closed
    proxy.heal()                                 # what was held back arrives
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Literal

import attrs

from support.sockets import LoopServer, set_reset_on_close

Side = Literal["client", "server"]
PIECE = 65_536
HELD_POLL_SECONDS = 0.005
CLOSING_TIMEOUT = 5.0
SLICES_PER_SECOND = 50


@attrs.define
class Way:
    """What happens to the bytes that go one way. May be changed at any time, also for open connections."""

    delay: float = 0.0
    """Seconds that each piece read waits before it is passed on."""
    rate: float | None = None
    """Bytes per second and connection; None is as fast as it goes."""
    held: bool = False
    """Keep back everything (it is delivered when this ends), like a cable pulled out."""
    lost: bool = False
    """Throw everything away."""
    cut_after: int | None = None
    """Reset a connection, both ways, once so many of its bytes have passed this way."""
    cut_in: int | None = None
    """Reset the connection on which so many more bytes have passed this way, of all connections together; this happens once."""
    passed: int = 0
    """Bytes passed on so far."""


@attrs.define(eq=False)
class Pipe:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    task: asyncio.Task[None] | None = None

    def reset(self) -> None:
        """End both sides by RST."""
        for writer in (self.client, self.server):
            set_reset_on_close(writer.get_extra_info("socket"))
            writer.transport.abort()


class FaultProxy(LoopServer):
    """Forward connections to a port of 127.0.0.1, with the faults that are switched on."""

    def __init__(self, target_port: int, *, target_host: str = "127.0.0.1", host: str = "127.0.0.1", port: int | None = None) -> None:
        """Prepare without any fault; it listens once it is entered."""
        super().__init__(host=host, port=port)
        self.target_host = target_host
        self.target_port = target_port
        self.to_server = Way()
        self.to_client = Way()
        self.connections = 0
        self._pipes: set[Pipe] = set()
        self._dialling: set[asyncio.Task[None]] = set()

    @property
    def open_connections(self) -> int:
        """How many connections pass through now."""
        return len(self._pipes)

    def delay(self, seconds: float) -> None:
        """Delay both ways."""
        self.to_server.delay = self.to_client.delay = seconds

    def limit(self, bytes_per_second: float | None) -> None:
        """Slow both ways down."""
        self.to_server.rate = self.to_client.rate = bytes_per_second

    def blackhole(self) -> None:
        """Hold everything back, both ways. New connections are accepted, and held too."""
        self.to_server.held = self.to_client.held = True

    def drop(self) -> None:
        """Throw everything away, both ways."""
        self.to_server.lost = self.to_client.lost = True

    def heal(self) -> None:
        """Switch all faults off, and listen again."""
        for way in (self.to_server, self.to_client):
            way.delay, way.rate, way.held, way.lost, way.cut_after, way.cut_in = 0.0, None, False, False, None, None
        self.accept()

    def reset(self) -> None:
        """Reset all open connections now, on both sides. New ones are forwarded as before."""

        def drop_pipes() -> None:
            for pipe in list(self._pipes):
                pipe.reset()

        self.on_loop(drop_pipes)

    def cut(self) -> None:
        """Refuse new connections and reset the open ones: the machine is gone. `heal()` brings it back."""
        self.refuse()
        self.reset()

    def half_close(self, towards: Side) -> None:
        """Send FIN to one side of every open connection; the other direction stays open."""

        def close_half() -> None:
            for pipe in list(self._pipes):
                writer = pipe.client if towards == "client" else pipe.server
                with contextlib.suppress(OSError, RuntimeError):
                    writer.write_eof()

        self.on_loop(close_half)

    async def connected(self, connection: socket.socket) -> None:
        """Forward one connection, beside the others."""
        self.connections += 1
        dialling = asyncio.get_running_loop().create_task(self._forward(connection))
        self._dialling.add(dialling)
        dialling.add_done_callback(self._dialling.discard)

    async def _forward(self, connection: socket.socket) -> None:
        from_client, client = await asyncio.open_connection(sock=connection)
        try:
            from_server, server = await asyncio.open_connection(self.target_host, self.target_port)
        except OSError:
            set_reset_on_close(client.get_extra_info("socket"))
            return client.transport.abort()
        server.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipe = Pipe(client, server)
        self._pipes.add(pipe)
        up = asyncio.ensure_future(pump(from_client, server, self.to_server))
        down = asyncio.ensure_future(pump(from_server, client, self.to_client))
        ways = {up, down}
        try:
            while ways:
                done, ways = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                if any(way.result() == "reset" for way in done):
                    return pipe.reset()
            client.close()
            server.close()
        finally:
            for way in (up, down):
                way.cancel()
            await asyncio.wait([up, down], timeout=CLOSING_TIMEOUT)
            for writer in (client, server):
                if not writer.transport.is_closing():
                    writer.transport.abort()
            self._pipes.discard(pipe)

    async def hang_up(self) -> None:
        """Drop all connections."""
        for pipe in list(self._pipes):
            pipe.reset()
        tasks = list(self._dialling)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSING_TIMEOUT)
        await asyncio.sleep(0)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> Literal["end", "reset"]:
    """Pass on what comes, as `way` says at each moment; tell whether it ended by FIN or by RST."""
    passed = 0
    try:
        while data := await reader.read(PIECE if way.rate is None else slice_size(way.rate)):
            if way.delay:
                await asyncio.sleep(way.delay)
            await while_held(way)
            if way.lost:
                continue
            left = way.cut_in if way.cut_after is None else way.cut_after - passed
            if left is not None and len(data) >= left:
                way.cut_in = None
                writer.write(data[: max(0, left)])
                await writer.drain()
                await asyncio.sleep(0.02)  # the reset must not overtake the last bytes
                return "reset"
            if way.cut_in is not None:
                way.cut_in -= len(data)
            writer.write(data)
            await writer.drain()
            passed += len(data)
            way.passed += len(data)
            if way.rate is not None:
                await asyncio.sleep(len(data) / way.rate)
        await while_held(way)
        if not writer.transport.is_closing():
            writer.write_eof()
    except (OSError, RuntimeError):
        await while_held(way)
        return "reset"
    return "end"


def slice_size(rate: float) -> int:
    """Return how much to pass on at once, so that a slow way is slow and not jerky."""
    return max(1, min(PIECE, int(rate / SLICES_PER_SECOND)))


async def while_held(way: Way) -> None:
    """Wait while the way is held."""
    while way.held:  # noqa: ASYNC110 - the switch is turned on other threads
        await asyncio.sleep(HELD_POLL_SECONDS)
