"""One connection to a server: writes a request, parses the answer with llhttp, and goes back to the connections that wait for the next one.

Theory of operation. A connection is an `asyncio.BufferedProtocol`, and the object whose methods llhttp calls. It reads into the one buffer
that all connections of a wire share, parses the whole buffer in the same call, and passes on what the parser finds. The buffer is free
again before anything else is read, so that reading needs no memory per connection.

1. A receiver gets one answer and one ending, `end` or `failed`. It is not called after `abort`, nor while its request is being sent.
2. However a server cuts its body into chunks, the receiver gets at most two pieces per buffer that is read.
3. At most one buffer is read and `MAX_HEAD_BYTES` are parsed without a byte of the body: nothing here grows with what a server sends.
4. A connection is used again only after a complete answer, with nothing after it, to a request that was written in full.
5. A request is written once. A kept connection that ends unanswered is a failure like any other, marked as stale; whether the request is
   sent again is decided in `core.failover`.
6. What llhttp and the system raise becomes a `Failure`. An error of ours, in a receiver, is never blamed on the server.

How answers are read, beyond llhttp's strict mode:

* Informational answers (1xx) are skipped, `MAX_INFORMATIONAL` at most. 101 is an error, because no upgrade was asked for.
* Chunks override a `Content-Length` (RFC 9112, 6.3); the connection is closed after such an answer. Any transfer coding but `chunked` is an
  error, and an answer with neither ends where the connection ends.
* Of headers that are repeated the last value counts. Trailers are dropped.

| `_state`   | the answer                 | bytes that arrive                         | the end of the connection             |
|------------|----------------------------|-------------------------------------------|---------------------------------------|
| `_WAITING` | has not begun              | are its head, or an informational answer  | is a failure                          |
| `_HEADED`  | is passed on as it arrives | are its body                              | is a failure, or ends an endless body |
| `_DONE`    | is complete                | were not asked for: the connection closes | is expected: no request is under way  |
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, cast

import httptools

from multiverse_gateway.core.addresses import Endpoint
from multiverse_gateway.core.failover import Failure
from multiverse_gateway.core.pauses import stopped_seconds
from multiverse_gateway.relay.receiver import BUG, CLOSED, CODED, GARBAGE, INTERIM, STALE, STALLED, STATUS, STOPPING, TOO_LARGE, Receiver

MAX_HEAD_BYTES: Final = 16384
MAX_HEADERS: Final = 100
MAX_INFORMATIONAL: Final = 8
MAX_IDLE: Final = 64

_WAITING: Final = 0
_HEADED: Final = 1
_DONE: Final = 2


class _StopParsingError(Exception):
    """The answer cannot be taken; `ServerConnection._bad` says why."""


class ConnectionOwner(Protocol):
    """What the connections of a wire share, and what they tell it."""

    @property
    def time(self) -> Callable[[], float]:
        """Return the time of the event loop, in seconds."""

    @property
    def buffer(self) -> memoryview:
        """Return the buffer into which all connections read."""

    @property
    def connections(self) -> set["ServerConnection"]:
        """Return the connections that are open."""

    @property
    def dialing(self) -> dict[asyncio.Task[None], "WireSending"]:
        """Return the tasks that make connections."""

    @property
    def write_timeout(self) -> float:
        """Return the seconds after which a server that takes nothing of a request has failed."""

    @property
    def stale_timeout(self) -> float:
        """Return the seconds after a request within which the end of a kept connection means that it was stale."""

    @property
    def sweeper(self) -> asyncio.TimerHandle | None:
        """Return the timer that will close the connections which were idle for too long, if it is set."""

    def sweep_later(self) -> None:
        """Set the timer for the next sweep of idle connections."""

    def gone(self, connection: "ServerConnection") -> None:
        """Forget a connection that has ended."""

    async def dial(self, sending: "WireSending") -> None:
        """Make a connection for a request, or fail the request."""


class ServerPool:
    """The connections of one server that wait for the next request, the latest one last."""

    __slots__ = ("endpoint", "idle", "keeps")

    def __init__(self, endpoint: Endpoint, *, keeps: bool) -> None:
        self.endpoint = endpoint
        self.idle: deque[ServerConnection] = deque()
        self.keeps = keeps
        """False once the pool was dropped: connections in use are closed when their answer is complete."""

    def close(self) -> None:
        """Close the idle connections, and keep no connection from now on."""
        self.keeps = False
        self.close_idle()

    def close_idle(self) -> None:
        """Close the connections that no request uses."""
        while self.idle:
            self.idle.pop().discard()


class ServerConnection(asyncio.BufferedProtocol):
    """One connection, with one request at a time."""

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

    def __init__(self, wire: ConnectionOwner, sending: "WireSending") -> None:
        self._wire = wire
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(lenient_chunked_length=True)  # chunks win: see `on_headers_complete`
        self._sending: WireSending | None = sending
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

    def ask(self, sending: "WireSending", now: float) -> None:
        """Send the request of `sending`, which gets the answer; `now` is the loop's time."""
        self._sending = sending
        self._receiver = sending.receiver
        self._state = _WAITING
        self._quiet = 0
        self._informational = 0
        self.since = now
        sending.connection = self
        if len(sending.request) == 1:  # up to 16 KiB (`relay.requests`); `writelines` does more before it writes
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
        """Handle the end of the connection: fail the request, or leave the pool if there is none."""
        sending = self._sending
        if sending is None:
            self._leave_pool()
            self.discard()
            return
        unanswered = self._state == _WAITING and not self._quiet
        is_stale = sending.reused and unanswered and self._wire.time() - self.since < self._wire.stale_timeout
        self.fail(STALE if is_stale else CLOSED)

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request that the connection was made for."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
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
            del self._parser  # it holds our methods: no cycle is left for the garbage collector

    def eof_received(self) -> bool:
        """End a body without a length; any other answer is incomplete and fails."""
        if self._sending is not None and self._state == _HEADED and self._unbounded:
            self._finish(keep=False)
        else:
            self._lost()
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        """Lend the buffer of all connections, which saves an allocation per read: what is read is parsed before anything else is read."""
        return self._wire.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse the bytes that were read into the buffer."""
        sending = self._sending
        if sending is None:  # no request is under way
            self._lost()
            return
        if sending.paused:
            self.transport.pause_reading()  # uvloop starts to read after `connection_made`, even if that paused it
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
            self.fail(TOO_LARGE)

    def _translated(self, error: Exception) -> Failure:
        if self._bad is not None:
            return self._bad
        if not isinstance(error, httptools.HttpParserCallbackError):
            return GARBAGE
        return self._bug(error.__context__)  # llhttp stops at an exception of the receiver, which is our bug, not the server's

    def _bug(self, error: BaseException | None) -> Failure:
        context = {"message": "a receiver raised an exception", "exception": error, "protocol": self}
        asyncio.get_running_loop().call_exception_handler(context)
        return BUG

    def _pass_on(self) -> None:
        """Pass on the rest of a buffer in one piece, so that chunks of one byte do not cost a call each."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        receiver = self._receiver
        if receiver is not None:
            try:
                receiver.body(data)
            except Exception as error:  # noqa: BLE001  a bug of ours must not be blamed on the server
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

    # Writing. The transport pauses as soon as the system does not take every byte: `_stall is None` means that the request was written.

    def pause_writing(self) -> None:
        """Give the server `write_timeout` to read more of the request."""
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
            self.fail(STALLED)

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    # llhttp

    def on_message_begin(self) -> None:
        """Begin to read an answer; a second one in the same buffer was not asked for."""
        if self._state == _DONE:
            self._extra = True
        self._fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, or a trailer, which is not used."""
        self._fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Pass the head on to the receiver, unless it is informational or the answer cannot be read safely."""
        if self._state == _DONE:
            return
        status = self._parser.get_status_code()
        fields = self._fields
        if not 200 <= status < 600:
            self._pass_over(status)
            return
        if len(fields) > MAX_HEADERS or (self._quiet > MAX_HEAD_BYTES and _size(fields) > MAX_HEAD_BYTES):
            self._stop(TOO_LARGE)
        headers = dict(fields)
        coding = headers.get(b"transfer-encoding")
        if coding is None:
            self._unbounded = b"content-length" not in headers
        elif coding.lower() == b"chunked":
            self._unbounded = False
            if headers.pop(b"content-length", None) is not None:  # chunks override it (RFC 9112, 6.3)
                self._doubtful = True
        else:
            self._stop(CODED)
        self._state = _HEADED
        self._quiet = 0
        if self._receiver is not None:
            self._receiver.head(status, headers)

    def _pass_over(self, status: int) -> None:
        self._informational += 1
        if not 100 <= status < 200 or status == 101:
            self._stop(STATUS)
        if self._informational > MAX_INFORMATIONAL:
            self._stop(INTERIM)

    def _stop(self, failure: Failure) -> None:
        self._bad = failure
        raise _StopParsingError

    def on_body(self, data: bytes) -> None:
        """Pass on the first piece of a buffer, usually the only one, without copying it; keep others until the whole buffer is parsed."""
        self._quiet = 0
        receiver = self._receiver
        if receiver is not None and self._state == _HEADED:
            if self._is_first:
                self._is_first = False
                receiver.body(data)
            else:
                self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Note the end, which is passed on once the whole buffer is parsed: only then it is known whether anything follows."""
        if self._state == _HEADED:
            self._state = _DONE
            self._keep = self._parser.should_keep_alive() and not self._doubtful


def _size(fields: Sequence[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + 4 for name, value in fields)


class WireSending:
    """One request on its way; see `Wire.send`. `reused` says whether it went out on a kept connection."""

    __slots__ = ("_dialing", "_wire", "connection", "over", "paused", "pool", "receiver", "request", "reused")

    def __init__(self, wire: ConnectionOwner, pool: ServerPool, request: Sequence[bytes], receiver: Receiver) -> None:
        self._wire = wire
        self._dialing: asyncio.Task[None] | None = None
        self.pool = pool
        self.request = request
        self.receiver = receiver
        self.connection: ServerConnection | None = None
        self.over = False
        self.paused = False
        self.reused = False

    def abort(self) -> None:
        """Close the connection, or stop dialing, without another call to the receiver. May be called at any time, and repeatedly."""
        if self.over:  # its dialing task may still be ending although its connection serves another request by now
            return
        self.over = True
        if self._dialing is not None:
            self._dialing.cancel()
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.discard()

    def pause(self) -> None:
        """Stop reading. Data that was read before, one buffer at most, is still passed on."""
        self.paused = True
        if self.connection is not None:
            self.connection.transport.pause_reading()

    def resume(self) -> None:
        """Resume reading from the socket."""
        self.paused = False
        if self.connection is not None:
            self.connection.transport.resume_reading()

    def fail(self, failure: Failure) -> None:
        """Fail the request, unless it has ended."""
        if not self.over:
            self.over = True
            self.receiver.failed(failure)

    def dial(self) -> None:
        """Start a task that makes a connection for this request."""
        self.reused = False
        self.connection = None
        self._dialing = asyncio.get_running_loop().create_task(self._wire.dial(self))
        self._wire.dialing[self._dialing] = self
        self._dialing.add_done_callback(self._dialed)

    def _dialed(self, task: asyncio.Task[None]) -> None:
        self._dialing = None
        del self._wire.dialing[task]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            context = {"message": "dialing failed", "exception": error, "task": task}
            asyncio.get_running_loop().call_exception_handler(context)
        if self.connection is None:
            self.fail(STOPPING if error is None else BUG)  # no effect after `abort`, or if the dialer has given a reason
