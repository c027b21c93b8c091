"""Connections to servers: dialled through the address policy, parsed by llhttp, kept alive per server.

* The address that is dialled is the very one that was checked, at every connect.
* A receiver hears of one answer and one ending: `end` or `failed`; after `abort` nothing more.
* A connection is used again only after a complete answer to a request that was written in full.
* Foreign errors become `Failure` here and nowhere else.
"""

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import httptools

from multiverse_gateway.core.addresses import AddressPolicy, Endpoint, refusal_of_any
from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.servers import ServerId

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_HEAD_BYTES = 16384
MAX_HEADERS = 100
MAX_IDLE = 64
MAX_INFORMATIONAL = 8
IDLE_SECONDS = 30.0


class Receiver(Protocol):
    """Who asked; called on the event loop."""

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        """Take the head: names in lower case, of repeated ones the last value."""

    def body(self, data: bytes) -> None:
        """Take a piece of the body."""

    def end(self) -> None:
        """Take the end of a complete answer."""

    def failed(self, failure: Failure) -> None:
        """Take any other ending."""


async def resolve_by_system(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a name, as the system resolves it."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _broken(reason: str) -> Failure:
    return Failure(kind=FailureClass.BROKEN, reason=reason)


def _nonsense(reason: str) -> Failure:
    return Failure(kind=FailureClass.NONSENSE, reason=reason)


class _Connection(asyncio.Protocol):
    """One connection: at most one answer at a time."""

    __slots__ = (
        "_bad",
        "_head_bytes",
        "_headers",
        "_informational",
        "_parser",
        "_pool",
        "_sending",
        "_stall",
        "_wire",
        "answered",
        "clogged",
        "idle_since",
        "transport",
    )

    def __init__(self, wire: "Wire", pool: "deque[_Connection]") -> None:
        self._wire = wire
        self._pool = pool
        self._sending: Sending | None = None
        self._stall: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None
        self.clogged = False
        self.idle_since = 0.0
        self._renew()

    def _renew(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._informational = 0
        self._bad: Failure | None = None
        self.answered = False

    def ask(self, sending: "Sending", request: Sequence[bytes]) -> None:
        """Send a request whose answer goes to `sending`."""
        self._sending = sending
        self._renew()
        assert self.transport is not None
        self.transport.writelines(request)

    def close(self) -> None:
        """Close at once; nothing more is told."""
        self._sending = None
        self._forget()
        if self.transport is not None:
            self.transport.abort()

    def _forget(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        with contextlib.suppress(ValueError):
            self._pool.remove(self)

    def _fail(self, failure: Failure) -> None:
        sending = self._sending
        self.close()
        if sending is not None:
            sending.lost(failure, answered=self.answered)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._wire.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell who waits; a body that ends with the connection is complete now."""
        self._wire.connections.discard(self)
        self._fail(_broken("the server closed the connection before its answer was complete"))

    def eof_received(self) -> bool:
        """End a body that has no stated length."""
        unbounded = b"content-length" not in self._headers and b"chunked" not in self._headers.get(b"transfer-encoding", b"").lower()
        if self._sending is not None and self.answered and unbounded and self._head_bytes < 0:
            self._complete(keep=False)
        return False

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self._sending is None:
            self.close()
            return
        self.answered = True
        if not self._headers or self._head_bytes >= 0:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(self._bad or _broken("the server's answer is no HTTP"))
            return
        if self._bad is not None:
            self._fail(self._bad)
        elif self._head_bytes > 4 * MAX_HEAD_BYTES and self._sending is not None:
            self._fail(_nonsense("the head of the answer is too large"))

    def pause_writing(self) -> None:
        """Allow the server some time to read on."""
        self.clogged = True
        loop = asyncio.get_running_loop()
        self._stall = loop.call_later(self._wire.write_timeout, self._fail, _broken("the server does not read the request"))

    def resume_writing(self) -> None:
        """Go on."""
        self.clogged = False
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    # llhttp

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, within bounds."""
        if len(self._headers) >= MAX_HEADERS or len(name) + len(value) > MAX_HEAD_BYTES:
            self._bad = _nonsense("the head of the answer is too large")
            raise ValueError
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """Pass the head on."""
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._informational += 1
            if self._informational > MAX_INFORMATIONAL or status == 101:
                self._bad = _nonsense("interim answers without end")
                raise ValueError
            self._headers = {}
            return
        self._head_bytes = -(1 << 60)
        if not 200 <= status < 600:
            self._bad = _nonsense(f"an answer with the status {status}")
            raise ValueError
        if self._sending is not None:
            self._sending.receiver.head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        """Pass a piece on."""
        if self._sending is not None:
            self._sending.receiver.body(data)

    def on_message_complete(self) -> None:
        """Pass the end on and keep the connection if it can be used again."""
        if 100 <= self._parser.get_status_code() < 200:
            return
        self._complete(keep=self._parser.should_keep_alive())

    def _complete(self, *, keep: bool) -> None:
        sending, self._sending = self._sending, None
        if sending is None:
            return
        transport = self.transport
        assert transport is not None
        if keep and not transport.get_write_buffer_size() and not transport.is_closing() and len(self._pool) < MAX_IDLE:
            transport.resume_reading() if not transport.is_reading() else None
            self.idle_since = asyncio.get_running_loop().time()
            self._pool.append(self)
        else:
            self.close()
        sending.over = True
        sending.connection = None
        sending.receiver.end()


class Sending:
    """One request on its way; see `Wire.send`."""

    __slots__ = ("_dialling", "_endpoint", "_request", "_server", "_wire", "connection", "over", "paused", "receiver", "reused")

    def __init__(self, wire: "Wire", server: ServerId, endpoint: Endpoint, request: Sequence[bytes], receiver: Receiver) -> None:
        self._wire = wire
        self._server = server
        self._endpoint = endpoint
        self._request = request
        self.receiver = receiver
        self.connection: _Connection | None = None
        self._dialling: asyncio.Task[None] | None = None
        self.over = False
        self.paused = False
        self.reused = False

    def begin(self) -> None:
        """Use an idle connection, or dial."""
        connection = self._wire.idle(self._server)
        if connection is None:
            self._dial()
        else:
            self.reused = True
            self.connection = connection
            connection.ask(self, self._request)

    def abort(self) -> None:
        """Close the connection, or stop dialling; nothing more is told."""
        self.over = True
        if self._dialling is not None:
            self._dialling.cancel()
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.close()

    def pause(self) -> None:
        """Stop reading."""
        self.paused = True
        if self.connection is not None and self.connection.transport is not None:
            self.connection.transport.pause_reading()

    def resume(self) -> None:
        """Go on reading."""
        self.paused = False
        if self.connection is not None and self.connection.transport is not None:
            self.connection.transport.resume_reading()

    def lost(self, failure: Failure, *, answered: bool) -> None:
        """Take the end of the connection: one that was idle too long is replaced once, in silence."""
        self.connection = None
        if self.over:
            return
        if self.reused and not answered:
            self.reused = False
            self._dial()
        else:
            self.over = True
            self.receiver.failed(failure)

    def _dial(self) -> None:
        self._dialling = asyncio.ensure_future(self._connect())
        self._wire.tasks.add(self._dialling)
        self._dialling.add_done_callback(self._wire.tasks.discard)

    async def _connect(self) -> None:
        reason = "the connection could not be made"
        try:
            async with asyncio.timeout(self._wire.connect_timeout):
                connection = await self._wire.connect(self._server, self._endpoint)
        except _RefusedError as error:
            reason = str(error)
        except TimeoutError:
            reason = "the connection could not be made in time"
        except ssl.SSLError:
            reason = "the connection could not be secured (TLS)"
        except ConnectionRefusedError:
            reason = "the connection was refused"
        except (OSError, UnicodeError):
            pass
        else:
            if self.over:
                connection.close()
                return
            self.connection = connection
            connection.ask(self, self._request)
            if self.paused:
                self.pause()
            return
        if not self.over:
            self.over = True
            self.receiver.failed(Failure(kind=FailureClass.CONNECT, reason=reason))


class _RefusedError(Exception):
    """The address policy, or the resolver, says no."""


class Wire:
    """All connections of one gateway to its servers. Belongs to the event loop it is first used on."""

    def __init__(
        self,
        *,
        policy: Callable[[], AddressPolicy],
        resolve: Resolver | None = None,
        connect_timeout: float = 5.0,
        dns_timeout: float = 3.0,
        write_timeout: float = 30.0,
        verify_tls: bool = True,
    ) -> None:
        self._policy = policy
        self._resolve = resolve or resolve_by_system
        self.connect_timeout = connect_timeout
        self._dns_timeout = dns_timeout
        self.write_timeout = write_timeout
        self._verify_tls = verify_tls
        self._tls: ssl.SSLContext | None = None
        self._pools: dict[ServerId, deque[_Connection]] = {}
        self.connections: set[_Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    def send(self, server: ServerId, endpoint: Endpoint, request: Sequence[bytes], receiver: Receiver) -> Sending:
        """Send a request, head and body as built; the answer goes to `receiver`, never during this call."""
        sending = Sending(self, server, endpoint, request, receiver)
        sending.begin()
        return sending

    def idle(self, server: ServerId) -> _Connection | None:
        """Take the idle connection that was used last, if it is still fresh."""
        pool = self._pools.get(server)
        while pool:
            connection = pool.pop()
            transport = connection.transport
            fresh = asyncio.get_running_loop().time() - connection.idle_since < IDLE_SECONDS
            if fresh and transport is not None and not transport.is_closing():
                return connection
            connection.close()
        return None

    async def connect(self, server: ServerId, endpoint: Endpoint) -> _Connection:
        """Resolve, check and dial."""
        addresses = await self._addresses(endpoint)
        pool = self._pools.setdefault(server, deque())
        loop = asyncio.get_running_loop()
        tls = self._context() if endpoint.tls else None
        failure: OSError | None = None
        for address in addresses:
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(self, pool),
                    address,
                    endpoint.port,
                    ssl=tls,
                    server_hostname=endpoint.host if tls is not None else None,
                )
            except OSError as error:
                failure = error
            else:
                return connection
        raise failure or OSError

    async def _addresses(self, endpoint: Endpoint) -> Sequence[str]:
        try:
            async with asyncio.timeout(self._dns_timeout):
                addresses = list(dict.fromkeys(await self._resolve(endpoint.host, endpoint.port)))
        except (OSError, TimeoutError, UnicodeError):
            raise _RefusedError("the name of the server could not be resolved") from None
        refused = refusal_of_any(addresses, endpoint.port, self._policy())
        if refused is not None:
            raise _RefusedError(f"the address may not be dialled: {refused}")
        return addresses

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            if not self._verify_tls:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        return self._tls

    def drop(self, server: ServerId) -> None:
        """Close the idle connections of a server."""
        for connection in list(self._pools.pop(server, ())):
            connection.close()

    async def aclose(self) -> None:
        """Close everything."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for connection in list(self.connections):
            connection.close()
        self._pools.clear()
        await asyncio.sleep(0)
