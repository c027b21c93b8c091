"""Connections to servers: dialled through the address policy, parsed by llhttp, kept alive per server.

* The address that is dialled is the very one that was checked, at every connect.
* A receiver gets one answer and one ending, `end` or `failed`; it is not called after `abort`, nor during `send`.
* A connection is used again only for the same endpoint, after a complete answer, with nothing after it, to a request that was
  written in full.
* A request is written once. A kept connection that ends unanswered is a failure like any other; whether the request is sent again is
  decided in `core.failover`.
* However a server cuts its body into chunks, the receiver gets at most two pieces per buffer that is read.
* At most one buffer is read and `MAX_HEAD_BYTES` are parsed without a byte of the body: nothing here grows with what a server sends.
* Foreign errors become `Failure` here and nowhere else.
"""

import asyncio
import contextlib
import ipaddress
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol, cast

import httptools

from multiverse_gateway.core.addresses import AddressPolicy, AddressRefusal, Endpoint, explained, refusal_of_any
from multiverse_gateway.core.failover import ConnectFailure, Failure, FailureClass
from multiverse_gateway.core.pauses import stopped_seconds
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.relay.names import SystemResolver

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

BUFFER_BYTES: Final = 65536
MAX_HEAD_BYTES: Final = 16384
MAX_HEADERS: Final = 100
MAX_INFORMATIONAL: Final = 8
MAX_IDLE: Final = 64
MAX_ADDRESSES: Final = 8
IDLE_SECONDS: Final = 30.0
SWEEPS: Final = 10
"""How often the idle connections are looked over in the time that they may idle."""
STALE_SECONDS: Final = 2.0
"""A kept connection that ends later than this after the request was not stale: the server had begun to work."""
CLOSING_SECONDS: Final = 2.0

_WAITING: Final = 0
_HEADED: Final = 1
_DONE: Final = 2


class Receiver(Protocol):
    """Who asked; called on the event loop, may call `Sending.abort`, `pause`, `resume` and `Wire.send` at any time."""

    def head(self, status: int, headers: Mapping[bytes, bytes], /) -> None:
        """Take the head: names in lower case, of repeated ones the last value."""

    def body(self, data: bytes, /) -> None:
        """Take a piece of the body."""

    def end(self) -> None:
        """Take the end of a complete answer; its connection is already kept or closed."""

    def failed(self, failure: Failure, /) -> None:
        """Take any other ending."""


def _broken(reason: str) -> Failure:
    return Failure(FailureClass.BROKEN, reason, after_request=True)


_CLOSED = _broken("the server closed the connection before its answer was complete")
_STALE = Failure(FailureClass.BROKEN, "the server closed a kept connection without an answer", is_stale=True)
_GARBAGE = _broken("the server's answer is no HTTP")
_STALLED = _broken("the server does not read the request")
_TOO_LARGE = Failure(FailureClass.NONSENSE, "the head of the server's answer is too large")
_INTERIM = Failure(FailureClass.NONSENSE, "the server gives interim answers without end")
_CODED = Failure(FailureClass.NONSENSE, "the server uses a transfer coding that it was not asked for")
_STATUS = Failure(FailureClass.NONSENSE, "the server's answer has an impossible status")
_BUG = Failure(FailureClass.LOCAL, "the gateway could not handle the server's answer")
_STOPPING = Failure(FailureClass.LOCAL, "the gateway is being stopped")


_CONNECTING: Mapping[ConnectFailure, str] = {
    ConnectFailure.RESOLVE: "the name of the server could not be resolved",
    ConnectFailure.REFUSED_ADDRESS: "the address may not be dialled",
    ConnectFailure.TIMEOUT: "the connection could not be made in time",
    ConnectFailure.REFUSED: "the connection was refused",
    ConnectFailure.TLS: "the connection could not be secured (TLS)",
    ConnectFailure.OTHER: "the connection could not be made",
}


def _unreached(cause: ConnectFailure, refusal: AddressRefusal | None = None) -> Failure:
    words = _CONNECTING[cause] if refusal is None else f"{_CONNECTING[cause]}: {explained(refusal)}"
    return Failure(FailureClass.CONNECT, words, connect=cause, refusal=refusal)


class _StopParsingError(Exception):
    """The answer cannot be taken; `_Connection._bad` says why."""


class _NotDialledError(Exception):
    """The server is not dialled: its name cannot be resolved, or the address policy refuses an address."""

    def __init__(self, cause: ConnectFailure, refusal: AddressRefusal | None = None) -> None:
        self.failure = _unreached(cause, refusal)


class _Pool:
    """The connections of one server that wait for the next request, the latest one last."""

    __slots__ = ("endpoint", "idle", "keeps")

    def __init__(self, endpoint: Endpoint, *, keeps: bool) -> None:
        self.endpoint = endpoint
        self.idle: deque[_Connection] = deque()
        self.keeps = keeps
        """False once the pool was dropped: what still runs is closed when it ends."""

    def close(self) -> None:
        """Close the idle connections, and keep no others from now on."""
        self.keeps = False
        self.close_idle()

    def close_idle(self) -> None:
        """Close the idle connections."""
        while self.idle:
            self.idle.pop().discard()


class _Connection(asyncio.BufferedProtocol):
    """One connection: at most one answer at a time."""

    __slots__ = (
        "_bad",
        "_doubtful",
        "_extra",
        "_fields",
        "_informational",
        "_is_first",
        "_keep",
        "_parser",
        "_pieces",
        "_quiet",
        "_receiver",
        "_sending",
        "_stall",
        "_state",
        "_unbounded",
        "_unsent",
        "_wire",
        "pool",
        "since",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, wire: "Wire", sending: "Sending") -> None:
        self._wire = wire
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(lenient_chunked_length=True)  # chunks win: see `on_headers_complete`
        self._sending: Sending | None = sending
        self._receiver: Receiver | None = None
        self._fields: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._is_first = True
        self._state = _WAITING
        self._quiet = 0
        self._informational = 0
        self._unbounded = False
        self._doubtful = False
        self._keep = False
        self._extra = False
        self._bad: Failure | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._unsent = 0
        self.pool = sending.pool
        self.since = 0.0

    def ask(self, sending: "Sending", now: float) -> None:
        """Send the request of `sending`, which gets the answer; `now` is the loop's time."""
        self._sending = sending
        self._receiver = sending.receiver
        self._state = _WAITING
        self._quiet = 0
        self._informational = 0
        self.since = now
        sending.connection = self
        if len(sending.request) == 1:
            self.transport.write(sending.request[0])
        else:
            self.transport.writelines(sending.request)

    def discard(self) -> None:
        """Close immediately, without a call to the receiver."""
        self._sending = self._receiver = None
        self._forget_stall()
        self.transport.abort()

    def fail(self, failure: Failure) -> None:
        """Close immediately, and pass the failure on to the request."""
        sending = self._sending
        self.discard()
        if sending is not None:
            sending.connection = None
            sending.fail(failure)

    def _leave_pool(self) -> None:
        with contextlib.suppress(ValueError):
            self.pool.idle.remove(self)

    def _lost(self) -> None:
        """Take the end of the connection, which may have been closed while it was idle."""
        sending = self._sending
        if sending is None:
            self._leave_pool()
            self.discard()
            return
        unanswered = self._state == _WAITING and not self._quiet
        is_stale = sending.reused and unanswered and self._wire.time() - self.since < self._wire.stale_timeout
        self.fail(_STALE if is_stale else _CLOSED)

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request that the connection was made for."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none, by name
        self._wire.connections.add(self)
        sending = self._sending
        if sending is None or sending.over:
            self.discard()
            return
        if self.pool.endpoint.tls:
            self.transport.set_write_buffer_limits(high=1, low=0)  # the TLS transports pause at `>= high`, at 0 even when nothing waits
        else:
            self.transport.set_write_buffer_limits(high=0)
        if sending.paused:
            self.transport.pause_reading()
        self.ask(sending, self._wire.time())

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the request that is waiting."""
        if self in self._wire.connections:
            self._wire.gone(self)
            self._lost()
            del self._parser  # which holds our methods: no cycle is left for the collector

    def eof_received(self) -> bool:
        """End a body that has no stated length; anything else is incomplete."""
        if self._sending is not None and self._state == _HEADED and self._unbounded:
            self._finish(keep=False)
        else:
            self._lost()
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        """Lend the buffer of all connections: what is read is parsed before anything else is read."""
        return self._wire.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what came."""
        sending = self._sending
        if sending is None:  # nobody asked
            self._lost()
            return
        if sending.paused:
            self.transport.pause_reading()  # uvloop begins to read after `connection_made`, whatever that wished
        self._quiet += nbytes
        self._is_first = True
        error: Exception | None = None
        try:
            self._parser.feed_data(self._wire.buffer[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as problem:
            error = problem
        if self._pieces:
            self._pass_on()
        if self._receiver is None:  # aborted by its receiver
            return
        if self._state == _DONE:
            self._finish(keep=self._keep and not self._extra and error is None)
        elif error is not None:
            self.fail(self._translated(error))
        elif self._quiet > MAX_HEAD_BYTES:
            self.fail(_TOO_LARGE)

    def _translated(self, error: Exception) -> Failure:
        if self._bad is not None:
            return self._bad
        if not isinstance(error, httptools.HttpParserCallbackError):
            return _GARBAGE
        return self._bug(error.__context__)  # llhttp stops at an exception of the receiver: it is ours, not the server's

    def _bug(self, error: BaseException | None) -> Failure:
        context = {"message": "a receiver failed", "exception": error, "protocol": self}
        asyncio.get_running_loop().call_exception_handler(context)
        return _BUG

    def _pass_on(self) -> None:
        """Pass on the rest of a buffer in one piece: chunks of a byte each must not cost a call each."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        receiver = self._receiver
        if receiver is not None:
            try:
                receiver.body(data)
            except Exception as error:  # noqa: BLE001  a mistake of ours, which must not be blamed on the server
                self.fail(self._bug(error))

    def _finish(self, *, keep: bool) -> None:
        sending = self._sending
        assert sending is not None
        pool = self.pool
        written = self._stall is None or not self.transport.get_write_buffer_size()
        if keep and written and pool.keeps and len(pool.idle) < MAX_IDLE:
            if self._stall is not None:
                self._forget_stall()
            self._sending = self._receiver = None
            if sending.paused:
                self.transport.resume_reading()
            self.since = self._wire.time()
            pool.idle.append(self)
            if self._wire.sweeper is None:
                self._wire.sweep_later()
        else:
            self.discard()
        sending.connection = None
        sending.over = True
        sending.receiver.end()

    # Writing: any byte that the system does not take pauses; `_stall is None` says that the request was written in full.

    def pause_writing(self) -> None:
        """Allow the server some time to read on."""
        self._watch_writing(self.transport.get_write_buffer_size())

    def _watch_writing(self, unsent: int) -> None:
        self._unsent = unsent
        loop = asyncio.get_running_loop()
        self._stall = loop.call_at(loop.time() + self._wire.write_timeout, self._check_stall)

    def resume_writing(self) -> None:
        """Stop watching whether the server reads."""
        self._forget_stall()

    def _check_stall(self) -> None:
        assert self._stall is not None
        unsent = self.transport.get_write_buffer_size()
        if unsent < self._unsent or stopped_seconds(self._stall.when(), asyncio.get_running_loop().time()):
            self._watch_writing(unsent)
        else:
            self.fail(_STALLED)

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    # llhttp

    def on_message_begin(self) -> None:
        """Start over; a second answer was not asked for."""
        if self._state == _DONE:
            self._extra = True
        self._fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, or a trailer that nobody reads."""
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """Pass the head on."""
        if self._state == _DONE:
            return
        status = self._parser.get_status_code()
        fields = self._fields
        if not 200 <= status < 600:
            self._pass_over(status)
            return
        if len(fields) > MAX_HEADERS or (self._quiet > MAX_HEAD_BYTES and _size(fields) > MAX_HEAD_BYTES):
            self._stop(_TOO_LARGE)
        headers = {name.lower(): value for name, value in fields}
        coding = headers.get(b"transfer-encoding")
        if coding is None:
            self._unbounded = b"content-length" not in headers
        elif coding.lower() == b"chunked":
            self._unbounded = False
            if headers.pop(b"content-length", None) is not None:  # chunks override it (RFC 9112, 6.3)
                self._doubtful = True
        else:
            self._stop(_CODED)
        self._state = _HEADED
        self._quiet = 0
        if self._receiver is not None:
            self._receiver.head(status, headers)

    def _pass_over(self, status: int) -> None:
        self._informational += 1
        if not 100 <= status < 200 or status == 101:
            self._stop(_STATUS)
        if self._informational > MAX_INFORMATIONAL:
            self._stop(_INTERIM)

    def _stop(self, failure: Failure) -> None:
        self._bad = failure
        raise _StopParsingError

    def on_body(self, data: bytes) -> None:
        """Pass on the first piece of a buffer, usually the only one; keep the others until the whole buffer is parsed."""
        self._quiet = 0
        receiver = self._receiver
        if receiver is not None and self._state == _HEADED:
            if self._is_first:
                self._is_first = False
                receiver.body(data)
            else:
                self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Note the end: it is told when it is known whether anything follows."""
        if self._state == _HEADED:
            self._state = _DONE
            self._keep = self._parser.should_keep_alive() and not self._doubtful


def _size(fields: Sequence[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + 4 for name, value in fields)


class Sending:
    """One request on its way; see `Wire.send`. `reused` says whether it went out on a kept connection."""

    __slots__ = ("_dialling", "_wire", "connection", "over", "paused", "pool", "receiver", "request", "reused")

    def __init__(self, wire: "Wire", pool: _Pool, request: Sequence[bytes], receiver: Receiver) -> None:
        self._wire = wire
        self._dialling: asyncio.Task[None] | None = None
        self.pool = pool
        self.request = request
        self.receiver = receiver
        self.connection: _Connection | None = None
        self.over = False
        self.paused = False
        self.reused = False

    def abort(self) -> None:
        """Close the connection, or stop dialling, without a further call to the receiver. May be called at any time and again."""
        if self.over:  # its dialling may still be on its way back from a connection that serves somebody else by now
            return
        self.over = True
        if self._dialling is not None:
            self._dialling.cancel()
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.discard()

    def pause(self) -> None:
        """Stop reading; data that was read before, at most `BUFFER_BYTES`, is still passed on."""
        self.paused = True
        if self.connection is not None:
            self.connection.transport.pause_reading()

    def resume(self) -> None:
        """Resume reading."""
        self.paused = False
        if self.connection is not None:
            self.connection.transport.resume_reading()

    def fail(self, failure: Failure) -> None:
        """End, if this has not ended yet."""
        if not self.over:
            self.over = True
            self.receiver.failed(failure)

    def dial(self) -> None:
        """Make a connection of its own; called by the wire."""
        self.reused = False
        self.connection = None
        self._dialling = asyncio.get_running_loop().create_task(self._wire.dial(self))
        self._wire.dialling[self._dialling] = self
        self._dialling.add_done_callback(self._dialled)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling = None
        del self._wire.dialling[task]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            context = {"message": "dialling failed", "exception": error, "task": task}
            asyncio.get_running_loop().call_exception_handler(context)
        if self.connection is None:
            self.fail(_STOPPING if error is None else _BUG)  # a no-op after `abort`, and after the dialling told the reason


class _Reached:
    """The receiver of a connection without a request: whatever the server sends is ignored."""

    def __init__(self) -> None:
        self.failure: Failure | None = None

    def head(self, status: int, headers: Mapping[bytes, bytes], /) -> None:
        """Ignore a head."""

    def body(self, data: bytes, /) -> None:
        """Ignore a piece of a body."""

    def end(self) -> None:
        """Ignore the end of an answer."""

    def failed(self, failure: Failure, /) -> None:
        """Keep the reason."""
        self.failure = failure


class Wire:
    """All connections of one gateway to its servers. Belongs to the event loop it is first used on.

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
        self._policy = policy
        self._resolve = resolve or SystemResolver()
        self._connect_timeout = connect_timeout
        self._dns_timeout = dns_timeout
        self.write_timeout = write_timeout
        self._idle_timeout = idle_timeout
        self.stale_timeout = stale_timeout
        self._verify_tls = verify_tls
        self._tls = tls
        self._pools: dict[ServerId, _Pool] = {}
        self.sweeper: asyncio.TimerHandle | None = None
        self._closing: asyncio.Future[None] | None = None
        self.time = time.monotonic
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        self.connections: set[_Connection] = set()
        """All that are open."""
        self.dialling: dict[asyncio.Task[None], Sending] = {}

    @property
    def idle(self) -> int:
        """How many connections wait for a request."""
        return sum(len(pool.idle) for pool in self._pools.values())

    def send(
        self, server: ServerId | None, endpoint: Endpoint, request: Sequence[bytes], receiver: Receiver, *, fresh: bool = False
    ) -> Sending:
        """Send a request, head and body as built; the answer goes to `receiver`, never during this call.

        Connections of a `server` are kept for its next requests; without one the connection is made and closed for this request.
        A `fresh` request gets a new connection, because the server may already have closed a kept one.
        """
        pool = _Pool(endpoint, keeps=False) if server is None else self._pools.get(server)
        if pool is None:
            pool = self._replace_pool(server, endpoint)
        elif pool.endpoint is not endpoint:
            if pool.endpoint != endpoint:
                pool = self._replace_pool(server, endpoint)
            pool.endpoint = endpoint
        sending = Sending(self, pool, request, receiver)
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

    def _replace_pool(self, server: ServerId | None, endpoint: Endpoint) -> _Pool:
        assert server is not None
        self.drop(server)
        pool = self._pools[server] = _Pool(endpoint, keeps=self._closing is None)
        return pool

    def drop(self, server: ServerId) -> None:
        """Close the idle connections of a server, and those that are in use when their answer is complete."""
        pool = self._pools.pop(server, None)
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
        tasks = list(self.dialling)
        for task in tasks:
            task.cancel()
        for connection in list(self.connections):
            connection.fail(_STOPPING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_SECONDS):
                await asyncio.gather(*tasks, return_exceptions=True)
                if self.connections:
                    await self._closing

    # For connection tests

    async def resolve(self, endpoint: Endpoint) -> Sequence[str] | Failure:
        """Return the addresses of an endpoint, unjudged, or why its name has none."""
        try:
            return await self._named(endpoint)
        except _NotDialledError as error:
            return error.failure

    async def reach(self, endpoint: Endpoint) -> str | Failure:
        """Make a connection as for a request, close it, and return the address that it led to, or why there is none."""
        reached = _Reached()
        sending = Sending(self, _Pool(endpoint, keeps=False), (), reached)
        await self.dial(sending)
        if reached.failure is not None:
            return reached.failure
        assert sending.connection is not None
        peer = sending.connection.transport.get_extra_info("peername")
        sending.abort()
        return str(peer[0])

    # For connections

    def gone(self, connection: _Connection) -> None:
        """Take note of a closed connection."""
        self.connections.discard(connection)
        if self._closing is not None and not self.connections and not self._closing.done():
            self._closing.set_result(None)

    def sweep_later(self) -> None:
        """Look over the idle connections after a while."""
        self.sweeper = asyncio.get_running_loop().call_later(self._idle_timeout / SWEEPS, self._sweep)

    def _sweep(self) -> None:
        self.sweeper = None
        expired = self.time() - self._idle_timeout
        for pool in self._pools.values():
            while pool.idle and pool.idle[0].since <= expired:
                pool.idle.popleft().discard()
        if self.idle:
            self.sweep_later()

    # Dialling

    async def dial(self, sending: Sending) -> None:
        """Connect `sending`, or fail it with the reason."""
        began = self.time()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self._connect(sending)
        except _NotDialledError as error:
            failure = error.failure
        except TimeoutError:
            stopped = stopped_seconds(began + self._connect_timeout, self.time())
            if stopped and sending.connection is None and not sending.over:
                await self.dial(sending)  # the server did not get its time
                return
            failure = _unreached(ConnectFailure.TIMEOUT)
        except ssl.SSLError:
            failure = _unreached(ConnectFailure.TLS)
        except ConnectionRefusedError:
            failure = _unreached(ConnectFailure.REFUSED)
        except OSError:
            failure = _unreached(ConnectFailure.OTHER)
        else:
            return
        if sending.connection is None:
            sending.fail(failure)

    async def _connect(self, sending: Sending) -> None:
        """Resolve, check, and dial the addresses in turn, each in its part of the time that is left."""
        if self._closing is not None:
            raise asyncio.CancelledError
        deadline = self.time() + self._connect_timeout
        endpoint = sending.pool.endpoint
        addresses = await self._addresses(endpoint)
        tls = await self._context() if endpoint.tls else None
        failure: OSError | None = None
        for turn, address in enumerate(addresses):
            now = self.time()
            try:
                async with asyncio.timeout_at(now + (deadline - now) / (len(addresses) - turn)):
                    await self._open(sending, address, tls)
            except OSError as error:
                failure = error
                if sending.connection is None and not sending.over:
                    continue
            return
        assert failure is not None
        raise failure

    async def _open(self, sending: Sending, address: str, tls: ssl.SSLContext | None) -> None:
        connection = _Connection(self, sending)
        endpoint = sending.pool.endpoint
        name = endpoint.host if tls is not None else None
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection, address, endpoint.port, ssl=tls, server_hostname=name)
        except BaseException:
            if connection in self.connections:  # uvloop does not tell a connection whose dialling was cancelled that it is lost
                connection.connection_lost(None)
            raise

    async def _named(self, endpoint: Endpoint) -> Sequence[str]:
        try:
            ipaddress.ip_address(endpoint.host)
        except ValueError:
            return await self._resolved(endpoint)
        return [endpoint.host]

    async def _addresses(self, endpoint: Endpoint) -> Sequence[str]:
        addresses = await self._named(endpoint)
        refused = refusal_of_any(addresses, endpoint.port, self._policy())
        if refused is not None:
            raise _NotDialledError(ConnectFailure.REFUSED_ADDRESS, refused)
        return addresses[:MAX_ADDRESSES]

    async def _resolved(self, endpoint: Endpoint) -> Sequence[str]:
        began = self.time()
        try:
            async with asyncio.timeout(self._dns_timeout):
                return list(dict.fromkeys(await self._resolve(endpoint.host, endpoint.port)))
        except (OSError, UnicodeError) as error:
            if isinstance(error, TimeoutError) and stopped_seconds(began + self._dns_timeout, self.time()):
                return await self._resolved(endpoint)  # the resolver did not get its time
            raise _NotDialledError(ConnectFailure.RESOLVE) from None

    async def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await asyncio.to_thread(_tls_context, verify=self._verify_tls)  # reads all certificates: 40 ms
        return self._tls


def _tls_context(*, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
