"""One client of the direct door, on a transport in memory: in every state, whatever arrives, nothing is lost and nothing is taken twice."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.errors import BadRequest, GatewayError, InvalidClientKey, RequestTimeout
from multiverse_gateway.relay.client_connection import AHEAD_BYTES, SPARED_BYTES, ClientConnection, Patience
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers, Heads, RequestHead
from multiverse_gateway.relay.ports import Client
from multiverse_gateway.relay.request_body import DROPPED_BYTES
from support.exchanges import RecordingEngine, server

BODY = b'{"model": "tiny"}'
PATIENCE = Patience(head=1.0, keep_alive=2.0, write=3.0, dropping=4.0)
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


def request(body: bytes = BODY, *, length: int | None = None) -> bytes:
    """Return a good request."""
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (len(body) if length is None else length) + body


@attrs.define(eq=False)
class MemoryTransport:
    """What the connection writes, and what it does to the transport."""

    written: list[bytes] = attrs.field(factory=list)
    calls: list[str] = attrs.field(factory=list)
    unsent: int = 0

    def get_extra_info(self, name: str) -> Any:
        return ("192.0.2.1", 4711) if name == "peername" else None

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def writelines(self, data: tuple[bytes, ...]) -> None:
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.calls.append(name)


@attrs.frozen
class Early:
    """A response to a request that comes to no exchange."""

    status: int
    headers: Headers
    body: bytes
    closes: bool


@attrs.define(eq=False)
class Request:
    """A request on its way in."""

    def lines(self) -> bytes:
        """Return no header lines."""
        return b""


@attrs.define(eq=False)
class Rules:
    """Rules for requests that a test decides; the exchanges are real."""

    engine: RecordingEngine = attrs.field(factory=lambda: RecordingEngine([server("a")]))
    refusal: Exception | None = None
    must_wait: bool = False
    admitted: asyncio.Event = attrs.field(factory=asyncio.Event)
    bodies: list[bytes] = attrs.field(factory=list)
    open: int = 0

    def request(self, head: RequestHead, length: int, peer: str | None) -> Request:
        self.open += 1
        return Request()

    def admit(self, request: Request) -> Coroutine[Any, Any, None] | None:
        if self.must_wait:
            return self.admit_later()
        self.decide()
        return None

    async def admit_later(self) -> None:
        await self.admitted.wait()
        self.decide()

    def decide(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def hold(self, request: Request, count: int) -> None:
        pass

    def body_deadline(self, received: int, elapsed: float) -> float:
        return 10.0

    def too_slow(self) -> GatewayError:
        return RequestTimeout("Send it faster.")

    def misread(self, message: str) -> GatewayError:
        return BadRequest(message)

    def begin(self, request: Request, body: bytes, client: Client) -> Exchange:
        self.bodies.append(body)
        return self.engine.exchange(client, stream=bool(json.loads(body).get("stream")))

    def refuse(self, request: Request, error: Exception) -> Early:
        assert isinstance(error, GatewayError)
        return Early(error.status, error.headers(), error.body(), isinstance(error, RequestTimeout))

    def release_body(self, request: Request) -> None:
        self.open -= 1


@attrs.define(eq=False)
class Doorway:
    """What a listener is to its connections, and one of them on a transport in memory."""

    intake: Rules
    date: bytes = b"date: now\r\n"
    closing: bool = False
    now: float = 1000.0
    head_bytes: int = 4096
    patience: Patience = PATIENCE
    heads: Heads = attrs.field(factory=Heads)
    noted: set[Any] = attrs.field(factory=set)
    handed: list[bytes] = attrs.field(factory=list)
    transport: MemoryTransport = attrs.field(factory=MemoryTransport)

    def time(self) -> float:
        return self.now

    def add(self, connection: ClientConnection[Request]) -> None:
        self.noted.add(connection)

    def discard(self, connection: ClientConnection[Request]) -> None:
        self.noted.discard(connection)

    def hand_over(self, transport: asyncio.Transport, data: bytes) -> None:
        self.handed.append(data)

    @property
    def state(self) -> str:
        (connection,) = self.noted
        return str(connection._state.name)

    @property
    def status(self) -> list[int]:
        """The status codes of the responses so far."""
        return [int(data[9:12]) for data in self.transport.written if data.startswith(b"HTTP/1.1 ")]


def connected(**rules: Any) -> tuple[Doorway, ClientConnection[Request]]:
    """Return a connection that was just accepted."""
    door = Doorway(Rules(**rules))
    connection: ClientConnection[Request] = ClientConnection(door)
    connection.connection_made(door.transport)  # type: ignore[arg-type]
    return door, connection


def in_state(state: str) -> tuple[Doorway, ClientConnection[Request]]:
    """Return a connection that was brought to a state; call it on a loop."""
    refusal = InvalidClientKey("Send a key.") if state == "DROPPING" else None
    door, connection = connected(refusal=refusal, must_wait=state == "ADMITTING")
    if state in ("ADMITTING", "BUSY", "CLOSING"):
        connection.data_received(request())
    elif state in ("READING", "DROPPING"):
        connection.data_received(request(BODY[:3], length=len(BODY)))
    if state == "CLOSING":
        connection.close()
    assert door.state == state
    return door, connection


STATES = ["READY", "ADMITTING", "READING", "BUSY", "DROPPING", "CLOSING"]


@given(
    st.lists(st.integers(min_value=0, max_value=5).map(lambda n: request(b'{"n": "%b"}' % (b"x" * n * n))), min_size=1, max_size=4),
    st.lists(st.integers(min_value=0, max_value=600), max_size=8),
    st.lists(st.booleans(), max_size=20),
)
def test_nothing_is_lost_and_nothing_taken_twice(requests: list[bytes], places: list[int], turns: list[bool]) -> None:
    """However a stream of requests is cut and whenever they are answered: a part is served, in order, and the rest is handed over."""
    stream = b"".join(requests)

    async def run() -> None:
        door, connection = connected()
        edges = sorted({0, len(stream), *(place for place in places if place < len(stream))})
        answers = iter(turns)
        sent = 0
        for start, end in pairwise(edges):
            if door.handed:
                break
            connection.data_received(stream[start:end])
            sent = end
            if door.intake.engine.exchanges and connection.writer.exchange is not None and next(answers, True):
                door.intake.engine.last.answer()
                await asyncio.sleep(0)
        while connection.writer.exchange is not None:
            door.intake.engine.last.answer()
            await asyncio.sleep(0)
        served = b"".join(request(body) for body in door.intake.bodies)
        unfinished = b"".join(connection._pieces)
        assert stream.startswith(served)
        if door.handed:
            assert served + door.handed[0] == stream[:sent]
        elif unfinished or door.state == "READING":
            assert stream[len(served) : sent].endswith(b"\r\n\r\n" + unfinished)
        else:
            assert served == stream
        connection.connection_lost(None)
        assert door.intake.open == 0

    asyncio.run(run())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["lost", "eof"])
async def test_a_client_that_leaves_is_forgotten_in_every_state(state: str, how: str) -> None:
    """What was done for it ends, what was held is given back, and no cycle is left for the garbage collector."""
    door, connection = in_state(state)
    if how == "eof":
        connection.eof_received()
        assert "close" in door.transport.calls
    connection.connection_lost(None)
    await asyncio.sleep(0)
    assert (door.noted, door.intake.open, door.intake.engine.load.total) == (set(), 0, 0)
    assert connection.writer._connection is None
    assert all(sending.aborted for sending in door.intake.engine.sendings)


async def test_a_connection_leaves_no_cycle() -> None:
    """Short connections would otherwise pile up until the garbage collector runs, which is rare in a gateway."""
    gc.collect()
    gc.disable()
    try:
        door, connection = connected()
        connection.data_received(CHUNKED + b"2\r\n")
        connection.connection_lost(None)
        other: ClientConnection[Request] = ClientConnection(door)
        other.connection_made(door.transport)  # type: ignore[arg-type]
        other.data_received(b"GET / HTTP/1.1\r\n\r\n")
        assert door.handed
        del connection, other
        assert not [each for each in gc.get_objects() if isinstance(each, ClientConnection)]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("behind", "state"),
    [(b"", "READING"), (BODY[:3], "READING"), (BODY, "BUSY"), (BODY + b"x", None), (BODY + request(), None)],
)
async def test_a_body_begins_behind_its_head(behind: bytes, state: str | None) -> None:
    """If more than the body follows its head, the request is in doubt: the connection is handed over with all that was read."""
    door, connection = connected()
    data = request(b"", length=len(BODY)) + behind
    connection.data_received(data)
    if state is None:
        assert (door.handed, door.noted, door.intake.open) == ([data], set(), 0)
    else:
        assert (door.handed, door.state) == ([], state)
        connection.connection_lost(None)


DUE = {
    "READY": (1.0, ["close"], []),
    "READING": (10.0, ["write_eof"], [408]),
    "DROPPING": (4.0, ["abort"], [401]),
    "CLOSING": (3.0, ["close", "abort"], []),
}


@pytest.mark.parametrize("state", DUE)
async def test_what_is_done_when_a_client_is_late(state: str) -> None:
    door, connection = in_state(state)
    seconds, calls, status = DUE[state]
    assert connection.due == door.now + seconds
    connection.tick()
    assert (door.transport.calls, door.status) == (calls, status)
    connection.connection_lost(None)


@pytest.mark.parametrize("state", ["ADMITTING", "BUSY"])
async def test_the_gateway_takes_its_time(state: str) -> None:
    """While the gateway works, the client is not late."""
    _, connection = in_state(state)
    assert connection.due == float("inf")
    connection.connection_lost(None)


async def test_a_client_that_reads_slowly_has_time_as_long_as_it_reads() -> None:
    door, connection = in_state("BUSY")
    door.transport.unsent = 100
    connection.pause_writing()
    door.transport.unsent = 99
    connection.tick()
    assert door.transport.calls == []
    connection.tick()
    assert door.transport.calls == ["abort"]
    assert door.intake.engine.load.total == 0


async def test_a_process_that_was_suspended_blames_no_client() -> None:
    door, connection = in_state("READING")
    connection.postpone(100.0)
    assert connection.due == door.now + 110.0
    door.now += 100.0
    connection.data_received(BODY[3:5])
    assert connection.due == door.now + 10.0
    connection.connection_lost(None)


@pytest.mark.parametrize(("missing", "kept"), [(SPARED_BYTES, True), (SPARED_BYTES + 1, False)])
async def test_a_small_rest_of_a_refused_body_spares_the_connection(missing: int, kept: bool) -> None:
    """The rest is dropped; only if it was small the next request is served."""
    door, connection = connected(refusal=InvalidClientKey("Send a key."))
    connection.data_received(request(b"", length=missing))
    assert door.status == [401]
    assert (b"connection: close" not in door.transport.written[0], "write_eof" not in door.transport.calls) == (kept, kept)
    connection.data_received(b"x" * (missing - 1))
    assert door.state == "DROPPING"
    door.intake.refusal = None
    connection.data_received(b"x" + request())
    await asyncio.sleep(0)
    assert (door.state, door.intake.bodies) == (("BUSY", [BODY]) if kept else ("CLOSING", []))
    connection.connection_lost(None)


@pytest.mark.parametrize("head", [request(b"", length=DROPPED_BYTES + 10), CHUNKED])
async def test_a_refused_body_is_not_read_for_ever(head: bytes) -> None:
    door, connection = connected(refusal=InvalidClientKey("Send a key."))
    connection.data_received(head)
    for _ in range(DROPPED_BYTES // (1 << 20)):
        connection.data_received(b"x" * (1 << 20))
    assert "abort" not in door.transport.calls
    connection.data_received(b"x")
    assert "abort" in door.transport.calls
    connection.connection_lost(None)


async def test_a_client_that_leaves_just_after_its_admission_gets_no_exchange() -> None:
    """The decision has been made, and the connection is lost before it hears of that."""
    door, connection = connected(must_wait=True)
    connection.data_received(request())
    await asyncio.sleep(0)
    door.intake.admitted.set()
    await asyncio.sleep(0)
    connection.connection_lost(None)
    await asyncio.sleep(0)
    assert (door.intake.bodies, door.intake.open) == ([], 0)


async def test_a_client_that_must_wait_is_not_read_without_end() -> None:
    """Nothing that it sent is dropped: once it is admitted, its body is read, and reading continues."""
    body = b'{"a": "' + b"x" * AHEAD_BYTES + b'"}'
    door, connection = connected(must_wait=True)
    connection.data_received(request(body[:10], length=len(body)))
    await asyncio.sleep(0)
    connection.data_received(body[10:])
    assert door.transport.calls == []
    connection.data_received(request())
    assert door.transport.calls == ["pause_reading"]
    door.intake.admitted.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert (door.transport.calls, door.intake.bodies) == (["pause_reading", "resume_reading"], [body])
    connection.connection_lost(None)


async def test_who_sends_too_much_ahead_gets_one_response() -> None:
    door, connection = in_state("BUSY")
    connection.data_received(b"x" * (AHEAD_BYTES + 1))
    door.intake.engine.last.answer()
    assert (door.state, door.status) == ("CLOSING", [200])
    assert b"connection: close" in door.transport.written[0]
    connection.data_received(b"x" * DROPPED_BYTES)
    assert door.transport.calls == ["close", "abort"]
    connection.connection_lost(None)
