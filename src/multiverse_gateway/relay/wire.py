"""The connections of one gateway to its servers.

Theory of operation. `Wire.send` takes a request as bytes and a receiver for the answer, and returns at once. If the server has a connection
that waits for a request, the request is written to it in the same call; otherwise a task of the `Dialer` makes one. From then on nothing
has a task: the event loop calls the `ServerConnection`, which parses what it reads and calls the receiver. After a complete answer the
connection waits in the `ServerPool` of its server, the latest one last; the latest is taken first, so that the others get old and close.

* A pool belongs to one endpoint. If the endpoint of a server changes, its pool is dropped: no request goes to the old address, and what
  still runs there is closed when it ends.
* A connection that was idle for `idle_timeout` is closed by a sweep, or when it would be taken. There is no sweep while none is idle.
* A connection is made for one request. If that request is aborted meanwhile, the connection is closed, not kept for another one.
* Errors of the network become `Failure` values, in `dialer` until the connection is made, in `server_connection` from then on.
* Everything ends in `aclose`: it returns when no socket and no task is left.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from multiverse_gateway.core.addresses import AddressPolicy, Endpoint
from multiverse_gateway.core.failover import Failure
from multiverse_gateway.core.servers import HostId
from multiverse_gateway.relay.dialer import Dialer, Resolver
from multiverse_gateway.relay.receiver import STOPPING, Receiver
from multiverse_gateway.relay.server_connection import ServerConnection, ServerPool, WireSending

BUFFER_BYTES: Final = 65536
IDLE_SECONDS: Final = 30.0
SWEEPS: Final = 10
"""How many times the idle connections are swept within `idle_timeout`."""
STALE_SECONDS: Final = 2.0
"""A kept connection that ends later than this after its request was not stale: the server had begun to work on it."""
CLOSING_SECONDS: Final = 2.0


class _Reached:
    """The receiver of a connection without a request: whatever the server sends is ignored."""

    def __init__(self) -> None:
        self.failure: Failure | None = None

    def head(self, status: int, headers: Mapping[bytes, bytes], /) -> None:
        """Ignore a head that no receiver waits for."""

    def body(self, data: bytes, /) -> None:
        """Ignore a piece of a body."""

    def end(self) -> None:
        """Ignore the end of an answer."""

    def failed(self, failure: Failure, /) -> None:
        """Keep the reason of the failure."""
        self.failure = failure


class Wire:
    """All connections of one gateway to its servers. It belongs to the event loop that it is first used on.

    Times are seconds: `connect_timeout` holds for name, connection and TLS together, `write_timeout` for a server that takes
    nothing of the request. `tls` replaces the context that `verify_tls` describes.
    """

    def __init__(
        self,
        *,
        policy: Callable[[], AddressPolicy],
        resolve: Resolver | None = None,
        connect_timeout: float = 5.0,
        dns_timeout: float = 3.0,
        write_timeout: float = 30.0,
        idle_timeout: float = IDLE_SECONDS,
        stale_timeout: float = STALE_SECONDS,
        verify_tls: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.write_timeout = write_timeout
        self._idle_timeout = idle_timeout
        self.stale_timeout = stale_timeout
        self._pools: dict[HostId, ServerPool] = {}
        self.sweeper: asyncio.TimerHandle | None = None
        self._closing: asyncio.Future[None] | None = None
        self.time = time.monotonic
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        self.connections: set[ServerConnection] = set()
        """The connections that are open."""
        self.dialing: dict[asyncio.Task[None], WireSending] = {}
        self._dialer = Dialer(
            self,
            policy=policy,
            resolve=resolve,
            connect_timeout=connect_timeout,
            dns_timeout=dns_timeout,
            verify_tls=verify_tls,
            tls=tls,
        )

    @property
    def idle(self) -> int:
        """Return how many connections wait for a request."""
        return sum(len(pool.idle) for pool in self._pools.values())

    def send(
        self, host: HostId | None, endpoint: Endpoint, request: Sequence[bytes], receiver: Receiver, *, fresh: bool = False
    ) -> WireSending:
        """Send a request, head and body as built; the answer goes to `receiver`, never during this call.

        Connections to a `host` are kept for its next requests; without one the connection is made and closed for this request.
        A `fresh` request gets a new connection, because the server may already have closed a kept one.
        """
        pool = ServerPool(endpoint, keeps=False) if host is None else self._pools.get(host)
        if pool is None:
            pool = self._replace_pool(host, endpoint)
        elif pool.endpoint is not endpoint:  # usually it is the same object, which saves comparing its fields
            if pool.endpoint != endpoint:
                pool = self._replace_pool(host, endpoint)
            pool.endpoint = endpoint
        sending = WireSending(self, pool, request, receiver)
        if pool.idle and not fresh:
            now = self.time()
            connection = pool.idle.pop()
            if now - connection.since < self._idle_timeout:
                sending.reused = True
                connection.ask(sending, now)
                return sending
            connection.discard()
        sending.dial()
        return sending

    def _replace_pool(self, host: HostId | None, endpoint: Endpoint) -> ServerPool:
        assert host is not None
        self.drop(host)
        pool = self._pools[host] = ServerPool(endpoint, keeps=self._closing is None)
        return pool

    def drop(self, host: HostId) -> None:
        """Close the idle connections to a host, and those that are in use when their answer is complete."""
        pool = self._pools.pop(host, None)
        if pool is not None:
            pool.close()

    def close_idle(self, endpoint: Endpoint) -> bool:
        """Close the connections to an endpoint that wait for a request; return whether there were any."""
        pools = [pool for pool in self._pools.values() if pool.endpoint == endpoint and pool.idle]
        for pool in pools:
            pool.close_idle()
        return bool(pools)

    async def aclose(self) -> None:
        """Close everything immediately; requests that are still waiting fail. Returns when no socket and no task is left."""
        self._closing = asyncio.get_running_loop().create_future()
        if self.sweeper is not None:
            self.sweeper.cancel()
            self.sweeper = None
        for server in list(self._pools):
            self.drop(server)
        tasks = list(self.dialing)
        for task in tasks:
            task.cancel()
        for connection in list(self.connections):
            connection.fail(STOPPING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_SECONDS):
                await asyncio.gather(*tasks, return_exceptions=True)
                if self.connections:
                    await self._closing

    # For connection tests

    async def resolve(self, endpoint: Endpoint) -> Sequence[str] | Failure:
        """Return the addresses of an endpoint without judging them, or why its name has none."""
        return await self._dialer.resolve(endpoint)

    async def reach(self, endpoint: Endpoint) -> str | Failure:
        """Make a connection as for a request, close it, and return the address that was dialed, or why there is no connection."""
        reached = _Reached()
        sending = WireSending(self, ServerPool(endpoint, keeps=False), (), reached)
        await self.dial(sending)
        if reached.failure is not None:
            return reached.failure
        assert sending.connection is not None
        peer = sending.connection.transport.get_extra_info("peername")
        sending.abort()
        return str(peer[0])

    # For connections

    async def dial(self, sending: WireSending) -> None:
        """Make a connection for a request, or fail the request with the reason."""
        if self._closing is not None:
            raise asyncio.CancelledError
        await self._dialer.dial(sending)

    def gone(self, connection: ServerConnection) -> None:
        """Forget a connection that has ended."""
        self.connections.discard(connection)
        if self._closing is not None and not self.connections and not self._closing.done():
            self._closing.set_result(None)

    def sweep_later(self) -> None:
        """Schedule a sweep of the idle connections."""
        self.sweeper = asyncio.get_running_loop().call_later(self._idle_timeout / SWEEPS, self._sweep)

    def _sweep(self) -> None:
        self.sweeper = None
        expired = self.time() - self._idle_timeout
        for pool in self._pools.values():
            while pool.idle and pool.idle[0].since <= expired:
                pool.idle.popleft().discard()
        if self.idle:
            self.sweep_later()
