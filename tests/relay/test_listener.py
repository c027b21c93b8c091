"""The direct door on real sockets and both event loops: what it takes and hands over, and what becomes of bodies, answers and clients."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest

from multiverse_gateway.core.errors import BadRequest, GatewayError, InvalidClientKey, RequestTimeout, RequestTooLarge
from multiverse_gateway.core.failover import FailureClass
from multiverse_gateway.core.sse import DONE_EVENT
from multiverse_gateway.relay.client_connection import AHEAD_BYTES, HIGH_WATER, SPARED_BYTES, Patience
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers, RequestHead
from multiverse_gateway.relay.listener import Listener
from multiverse_gateway.relay.ports import Client, Phase
from support.answers import chat_event
from support.exchanges import MODEL, SPEECH, RecordingEngine, server
from support.raw_client import Response, ResponseReader
from support.require import require
from support.sockets import set_reset_on_close, until

pytestmark = pytest.mark.e2e

ONE = chat_event("one", MODEL, {"content": "Hello"})
LAST = chat_event("one", MODEL, {}, finish="stop")
BODY = b'{"model": "tiny"}'
STREAM = b'{"stream": true}'
HEAD_BYTES = 4096
LONG = 3600.0


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Run every test of this module on both loops."""
    if request.param == "uvloop":
        require("uvloop", "the direct door on uvloop")
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@attrs.frozen
class Answer:
    """A refusal."""

    status: int
    headers: Headers
    body: bytes
    closes: bool


@attrs.define(eq=False)
class Request:
    """A request on its way in."""

    path: str
    query: bytes
    fields: Headers
    peer: str | None
    held: int = 0

    def lines(self) -> bytes:
        """Return the header lines of every response to it."""
        return b"x-request-id: r1\r\n"


@attrs.define(eq=False)
class RecordingIntake:
    """An intake that does what the test wants. The exchange is real; what it sends to servers is recorded."""

    engine: RecordingEngine = attrs.field(factory=lambda: RecordingEngine([server("a"), server("b", registered_at=1)]))
    refusal: Exception | None = None
    limit: int = 1 << 20
    body_seconds: float = LONG
    must_wait: bool = False
    gate: asyncio.Event = attrs.field(factory=asyncio.Event)
    visits: list[Request] = attrs.field(factory=list)
    bodies: list[bytes] = attrs.field(factory=list)
    held: int = 0
    waiting: int = 0

    def request(self, head: RequestHead, length: int, peer: str | None) -> Request:
        assert head.method == "POST"
        self.visits.append(Request(head.path, head.query, head.fields, peer))
        return self.visits[-1]

    def admit(self, request: Request) -> Coroutine[Any, Any, None] | None:
        if self.must_wait:
            return self.admit_later()
        self.decide()
        return None

    async def admit_later(self) -> None:
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        self.decide()

    def decide(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def hold(self, request: Request, count: int) -> None:
        if request.held + count > self.limit:
            raise RequestTooLarge("Send less.")
        request.held += count
        self.held += count

    def body_deadline(self, received: int, elapsed: float) -> float:
        return self.body_seconds

    def too_slow(self) -> GatewayError:
        return RequestTimeout("Send it faster.")

    def misread(self, message: str) -> GatewayError:
        return BadRequest(message, code="bad_framing")

    def begin(self, request: Request, body: bytes, client: Client) -> Exchange:
        self.bodies.append(body)
        if len(body) > request.held:
            self.hold(request, len(body) - request.held)
        try:
            stream = bool(json.loads(body).get("stream"))
        except ValueError:
            raise BadRequest("Send JSON.") from None
        return self.engine.exchange(client, stream=stream, path=request.path)

    def refuse(self, request: Request, error: Exception) -> Answer:
        assert isinstance(error, GatewayError)
        closes = isinstance(error, RequestTimeout | RequestTooLarge) or error.code == "bad_framing"
        return Answer(error.status, error.headers(), error.body(), closes)

    def release_body(self, request: Request) -> None:
        self.held -= request.held
        request.held = 0

    @property
    def last(self) -> Exchange:
        return self.engine.exchanges[-1]


@attrs.define(eq=False)
class Visitor:
    """A client on a raw socket."""

    sock: socket.socket
    reader: ResponseReader = attrs.field(factory=ResponseReader)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def _receive(self) -> None:
        try:
            async with asyncio.timeout(10):
                data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        except ConnectionError:
            self.reader.feed_end("reset")
            return
        if data:
            self.reader.feed(data)
        else:
            self.reader.feed_end("eof")

    async def answer(self) -> Response:
        """Read one whole answer, or what there is of it; then expect the next."""
        while not self.reader.is_finished:
            await self._receive()
        response = self.reader.response
        self.reader.expect()
        return response

    async def until_body(self, data: bytes) -> None:
        """Read until the body is this."""
        while self.reader.response.body != data:
            assert not self.reader.is_finished
            await self._receive()

    async def end(self) -> str:
        """Read to the end of the connection."""
        while self.reader.response.ended_by is None:
            await self._receive()
        return self.reader.response.ended_by

    def leave(self, how: str) -> None:
        """Close the connection: FIN or RST; or just the sending side."""
        if how == "half":
            self.sock.shutdown(socket.SHUT_WR)
            return
        if how == "RST":
            set_reset_on_close(self.sock)
        self.sock.close()


@attrs.define(eq=False)
class Door:
    """A direct door on a port of its own."""

    intake: RecordingIntake
    listener: Listener[Request]
    port: int
    handed: list[tuple[asyncio.Transport, bytes]]

    @asynccontextmanager
    async def visitor(self, *, receive_buffer: int | None = None) -> AsyncIterator[Visitor]:
        """Connect."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        with sock:
            yield Visitor(sock)

    async def tried(self, count: int = 1) -> None:
        """Wait until so many attempts were made."""
        await until(lambda: len(self.intake.engine.sendings) == count)


@asynccontextmanager
async def door(
    *, head: float = LONG, keep_alive: float = LONG, write: float = LONG, dropping: float = LONG, **options: Any
) -> AsyncIterator[Door]:
    """Open a direct door; in the end nothing is held, nothing runs and nobody is connected."""
    handed: list[tuple[asyncio.Transport, bytes]] = []

    def hand_over(transport: asyncio.Transport, data: bytes) -> None:
        transport.set_protocol(asyncio.Protocol())
        handed.append((transport, data))

    intake = RecordingIntake(**options)
    patience = Patience(head=head, keep_alive=keep_alive, write=write, dropping=dropping)
    listener = Listener(intake, hand_over, patience=patience, head_bytes=HEAD_BYTES)
    made = await asyncio.get_running_loop().create_server(listener.protocol, "127.0.0.1", 0)
    try:
        yield Door(intake, listener, made.sockets[0].getsockname()[1], handed)
        await until(lambda: not listener.connections)
        assert intake.held == 0
        assert intake.waiting == 0
        assert intake.engine.load.total == 0
    finally:
        made.close()
        for transport, _ in handed:
            transport.abort()
        async with asyncio.timeout(5):
            await listener.finish()


def request(body: bytes = BODY, *, fields: str = "", length: int | None = None, path: str = "/v1/chat/completions") -> bytes:
    """Return a good request."""
    size = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{fields}content-length: {size}\r\n\r\n".encode() + body


def chunked(*pieces: bytes, trailer: bytes = b"") -> bytes:
    """Return a body in chunks."""
    return b"".join(b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailer + b"\r\n"


CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


# What it takes


async def test_a_request_and_its_answer() -> None:
    """Whole in one segment; the head is complete and the connection serves the next one."""
    async with door() as it, it.visitor() as visitor:
        for number in range(3):
            await visitor.send(request(fields="X-Odd:  value \t\r\n", path="/v1/chat/completions?a=b"))
            await it.tried(number + 1)
            it.intake.engine.last.answer(body=b'{"a":1}')
            answer = await visitor.answer()
            assert (answer.status, answer.reason, answer.body, answer.complete) == (200, "OK", b'{"a":1}', True)
            assert (answer.header("content-length"), answer.header("x-request-id")) == ("7", "r1")
            assert answer.header("connection") is None
            assert (answer.header("date") or "").endswith("GMT")
        seen = it.intake.visits[0]
        assert (seen.path, seen.query, seen.peer) == ("/v1/chat/completions", b"a=b", "127.0.0.1")
        assert seen.fields == [(b"host", b"x"), (b"x-odd", b"value"), (b"content-length", b"17")]
        assert it.intake.bodies == [BODY] * 3
        assert it.handed == []


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("form", ["length", "chunks"])
async def test_a_body_comes_in_pieces(form: str, size: int) -> None:
    body = BODY + b" " * 3000
    data = body if form == "length" else chunked(BODY, b" " * 3000, trailer=b"x-sum: 1\r\n")
    async with door() as it, it.visitor() as visitor:
        for number in range(2):
            await visitor.send(request(b"", length=len(body)) if form == "length" else CHUNKED)
            for start in range(0, len(data), size):
                await visitor.send(data[start : start + size])
                await asyncio.sleep(0)
            await it.tried(number + 1)
            assert it.intake.held == len(body)
            it.intake.engine.last.answer()
            assert (await visitor.answer()).status == 200
        assert it.intake.bodies == [body] * 2
        assert not any(name == b"x-sum" for seen in it.intake.visits for name, _ in seen.fields), "a trailer is no header"


async def test_events_leave_in_chunks_as_they_come() -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(request(STREAM))
        await it.tried()
        it.intake.engine.last.stream(ONE)
        await visitor.until_body(ONE)
        large = chat_event("one", MODEL, {"content": "x" * 10_000})
        it.intake.engine.last.body(large)
        await visitor.until_body(ONE + large)
        it.intake.engine.last.body(LAST + DONE_EVENT)
        answer = await visitor.answer()
        assert (answer.header("transfer-encoding"), answer.header("content-length")) == ("chunked", None)
        assert (answer.body, answer.complete) == (ONE + large + LAST + DONE_EVENT, True)
        await visitor.send(request())
        await it.tried(2)
        it.intake.engine.last.answer(body=b'["' + b"x" * 10_000 + b'"]')
        assert len((await visitor.answer()).body) == 10_004


async def test_a_broken_stream_ends_without_its_last_chunk() -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(request(STREAM))
        await it.tried()
        it.intake.engine.last.stream(ONE)
        await visitor.until_body(ONE)
        it.intake.engine.last.fail(FailureClass.BROKEN)
        answer = await visitor.answer()
        assert answer.body.startswith(ONE + b'data: {"error":')
        assert (answer.complete, answer.ended_by) == (False, "eof")


async def test_an_answer_that_is_cut_before_anything_followed_its_head() -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(request(path=SPEECH))
        await it.tried()
        writer = next(iter(it.listener.connections)).writer
        writer.head(200, [])
        it.intake.last.client_gone()
        writer.cut()
        answer = await visitor.answer()
        assert (answer.status, answer.complete) == (200, False)


async def test_an_empty_answer_has_a_length() -> None:
    async with door() as it, it.visitor() as visitor:
        for number in (1, 2):
            await visitor.send(request(path=SPEECH))
            await it.tried(number)
            it.intake.engine.last.head()
            it.intake.engine.last.end()
            answer = await visitor.answer()
            assert (answer.status, answer.body, answer.header("content-length")) == (200, b"", "0")


# What it hands over

OTHERS = {
    "nothing of the API": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "another method": b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "one byte": b"P",
    "half a head": request()[:40],
    "the admin API": b"POST /admin/register HTTP/1.1\r\nhost: x\r\n\r\n",
    "an absolute target of another call": request(path="http://x/admin/register"),
    "an authority": b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    "HTTP/1.0": request().replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/2.0": request().replace(b"HTTP/1.1", b"HTTP/2.0"),
    "HTTP/0.9": b"POST /v1/chat/completions\r\n\r\n",
    "no host": request().replace(b"Host: x\r\n", b""),
    "a percent sign": request(path="/v1/chat%2Fcompletions"),
    "an upgrade before chunks": CHUNKED.replace(b"\r\n\r\n", b"\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", 1),
    "length and coding": request(fields="transfer-encoding: chunked\r\n"),
    "two lengths": request(fields="content-length: 17\r\n"),
    "a length with a sign": request().replace(b"content-length: ", b"content-length: +"),
    "another coding": CHUNKED.replace(b"chunked", b"xchunked"),
    "a folded line": request(fields="x-a: b\r\n c\r\n"),
    "a bare line feed": request(fields="x-a: b\n"),
    "a bare carriage return": request(fields="x-a: b\rx-b: c\r\n"),
    "a null": request(fields="x-a: \0\r\n"),
    "a space before the colon": request(fields="x-a : b\r\n"),
    "garbage": b"\x16\x03\x01" + b"\xff" * 60,
    "half an empty line first": b"\r" + request(),
    "a large head": request(fields=f"x-large: {'x' * HEAD_BYTES}\r\n"),
    "two requests at once": request() * 2,
    "a bad chunk at once": CHUNKED + b"zz\r\n",
    "a request behind chunks at once": CHUNKED + chunked(BODY) + request(),
}


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.0, h2c"])
async def test_the_offer_of_another_protocol_is_ignored(protocol: str) -> None:
    """RFC 9110, 7.8: answered in HTTP/1.1, again and again on one connection, as the JDK's client sends it."""
    fields = f"connection: Upgrade, HTTP2-Settings\r\nupgrade: {protocol}\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"
    async with door() as it, it.visitor() as visitor:
        for number in range(3):
            await visitor.send(request(fields=fields))
            await it.tried(number + 1)
            it.intake.engine.last.answer()
            assert (await visitor.answer()).status == 200
        assert not it.handed


@pytest.mark.parametrize("served", [0, 1])
@pytest.mark.parametrize("empty", [b"\r\n", b"\n", b"\r\n\r\n", b"\n\r\n\n"])
async def test_empty_lines_before_a_request_are_ignored(empty: bytes, served: int) -> None:
    """With the request or alone, at the beginning of a connection and after a request that was served: RFC 9112, 2.2."""
    async with door() as it, it.visitor() as visitor:
        requests = [request()] * served + [empty + request(), empty, request()]
        tried = 0
        for data in requests:
            await visitor.send(data)
            if data == empty:
                continue
            tried += 1
            await it.tried(tried)
            it.intake.engine.last.answer()
            assert (await visitor.answer()).status == 200
        assert not it.handed


@pytest.mark.parametrize("served", [0, 1])
@pytest.mark.parametrize("name", OTHERS)
async def test_what_is_not_beyond_doubt_is_handed_over_as_it_came(name: str, served: int) -> None:
    """At the beginning of a connection, and after a request that was served."""
    async with door() as it, it.visitor() as visitor:
        for _ in range(served):
            await visitor.send(request())
            await it.tried()
            it.intake.engine.last.answer()
            assert (await visitor.answer()).status == 200
        await visitor.send(OTHERS[name])
        await until(lambda: it.handed)
        assert it.handed[0][1] == OTHERS[name]
        assert len(it.intake.visits) == served
        assert not it.listener.connections


# Bodies that are not wanted, or no bodies


BAD_CHUNKS = [b"zz\r\n", b"-1\r\n", b"0x2\r\n{}\r\n", b"f" * 40 + b"\r\n", b"2\r\n{}x\r\n", b"2\n{}\n0\n\n", b"0\r\nno trailer\r\n\r\n"]


@pytest.mark.parametrize("bad", BAD_CHUNKS)
async def test_chunks_that_are_none_end_the_connection(bad: bytes) -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(CHUNKED)
        await until(lambda: it.intake.visits)
        await visitor.send(bad)
        answer = await visitor.answer()
        assert (answer.status, answer.header("connection")) == (400, "close")
        assert await visitor.end() == "eof"
        assert it.intake.bodies == []


async def test_a_continue_is_said_when_the_body_is_wanted() -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(request(b"", length=len(BODY), fields="Expect: 100-Continue\r\n"))
        await until(lambda: it.intake.visits)
        await visitor._receive()
        assert visitor.reader.response.informational == [100]
        await visitor.send(BODY)
        await it.tried()
        it.intake.engine.last.answer()
        assert (await visitor.answer()).status == 200


async def test_no_continue_is_said_otherwise() -> None:
    """RFC 9110, 10.1.1: not when the answer is final, nor when the body is on its way."""
    expecting = "expect: 100-continue\r\n"
    async with door() as it, it.visitor() as visitor:
        await visitor.send(request(fields=expecting))
        await it.tried()
        it.intake.engine.last.answer()
        assert (await visitor.answer()).informational == []
        await visitor.send(request(BODY[:3], length=len(BODY), fields=expecting))
        await until(lambda: len(it.intake.visits) == 2)
        await visitor.send(BODY[3:])
        await it.tried(2)
        it.intake.engine.last.answer()
        assert (await visitor.answer()).informational == []
        it.intake.refusal = InvalidClientKey("Send a key.")
        await visitor.send(request(b"", length=SPARED_BYTES + 1, fields=expecting))
        answer = await visitor.answer()
        assert (answer.status, answer.informational, answer.header("connection")) == (401, [], "close")


async def test_a_refusal_of_a_whole_request_keeps_the_connection() -> None:
    async with door() as it, it.visitor() as visitor:
        for body in (b"[", b"{", b""):
            await visitor.send(request(body))
            answer = await visitor.answer()
            assert (answer.status, answer.header("connection")) == (400, None)


async def test_a_refusal_before_a_small_body_keeps_the_connection() -> None:
    """The body is dropped when it comes, and what follows is the next request."""
    async with door(refusal=InvalidClientKey("Send a key.")) as it, it.visitor() as visitor:
        await visitor.send(request(b"", length=len(BODY)))
        assert (await visitor.answer()).status == 401
        it.intake.refusal = None
        await visitor.send(BODY[:4])
        await visitor.send(BODY[4:] + request())
        await it.tried()
        it.intake.engine.last.answer()
        assert (await visitor.answer()).status == 200
        it.intake.refusal = InvalidClientKey("Send a key.")
        await visitor.send(request(BODY[:2], length=len(BODY)))
        assert (await visitor.answer()).status == 401
        it.intake.refusal = None
        await visitor.send(BODY[2:])
        await asyncio.sleep(0.01)
        await visitor.send(request())
        await it.tried(2)
        it.intake.engine.last.answer()
        assert (await visitor.answer()).status == 200
        assert it.intake.bodies == [BODY, BODY]


@pytest.mark.parametrize("form", ["length", "chunks"])
async def test_a_refusal_before_a_large_body_arrives_while_it_is_sent(form: str) -> None:
    """The answer comes at once, the rest is read and dropped, and the connection ends."""
    size = 4 << 20
    async with door(refusal=InvalidClientKey("Send a key.")) as it, it.visitor() as visitor:
        await visitor.send(request(b"", length=size) if form == "length" else CHUNKED + b"%x\r\n" % size)
        answer = await visitor.answer()
        assert (answer.status, answer.header("connection"), answer.complete) == (401, "close", True)
        for _ in range(4):
            await visitor.send(b"x" * (size // 4))
        if form == "chunks":
            visitor.leave("half")
        assert await visitor.end() == "eof"
        assert it.intake.held == 0


async def test_a_body_that_grows_too_large_is_refused() -> None:
    async with door(limit=1000) as it, it.visitor() as one, it.visitor() as other:
        await one.send(CHUNKED)
        await until(lambda: it.intake.visits)
        await one.send(chunked(BODY, b" " * 2000))
        assert (await one.answer()).status == 413
        await other.send(request(BODY + b" " * 2000))
        answer = await other.answer()
        assert (answer.status, answer.header("connection")) == (413, "close")
        assert await other.end() == "eof"


async def test_a_slow_body_is_refused() -> None:
    async with door(body_seconds=0.0) as it, it.visitor() as visitor:
        await visitor.send(request(b"{", length=100))
        answer = await visitor.answer()
        assert (answer.status, answer.header("connection")) == (408, "close")
        assert await visitor.end() == "eof"


async def test_a_pause_of_the_process_refuses_no_body() -> None:
    """S9: a sweep that comes late moves what is due; the next one, in time, finds nothing to do."""
    async with door(body_seconds=5.0) as it, it.visitor() as visitor:
        await visitor.send(request(b"{", length=2))
        await until(lambda: bool(it.intake.held))
        now = it.listener.time()
        for time in (now + 1000.0, now + 1000.2):
            it.listener.time = lambda time=time: time  # type: ignore[misc]
            it.listener._sweeper.cancel()
            it.listener._sweep()
        await visitor.send(b"}")
        await it.tried()
        it.intake.engine.last.answer()
        assert (await visitor.answer()).status == 200


async def test_a_refused_body_without_end_is_not_read_for_ever() -> None:
    async with door(refusal=InvalidClientKey("Send a key."), dropping=0.0) as it, it.visitor() as visitor:
        await visitor.send(request(b"", length=1 << 30))
        assert (await visitor.answer()).status == 401
        await visitor.end()
        await until(lambda: not it.listener.connections)


# One after the other


async def test_a_request_sent_ahead_is_answered_in_its_turn() -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(request(STREAM))
        await it.tried()
        await visitor.send(request(b'{"n": 2}'))
        await asyncio.sleep(0.01)
        assert len(it.intake.bodies) == 1
        it.intake.engine.last.stream(ONE)
        it.intake.engine.last.body(LAST + DONE_EVENT)
        assert (await visitor.answer()).body == ONE + LAST + DONE_EVENT
        await it.tried(2)
        it.intake.engine.last.answer()
        assert (await visitor.answer()).status == 200
        assert it.intake.bodies == [STREAM, b'{"n": 2}']


async def test_a_request_behind_a_body_waits_too() -> None:
    """In the segment that ends the body; behind a chunked one it cannot be found again, and the connection ends."""
    async with door() as it, it.visitor() as plain, it.visitor() as coded:
        await plain.send(request(b"", length=len(BODY)))
        await until(lambda: it.intake.visits)
        await plain.send(BODY + request(b'{"n": 2}'))
        await it.tried()
        it.intake.engine.last.answer()
        assert (await plain.answer()).status == 200
        await it.tried(2)
        it.intake.engine.last.answer()
        assert (await plain.answer()).status == 200
        await coded.send(CHUNKED)
        await until(lambda: len(it.intake.visits) == 3)
        await coded.send(chunked(BODY) + request())
        await it.tried(3)
        it.intake.engine.last.answer()
        answer = await coded.answer()
        assert (answer.status, answer.header("connection")) == (200, "close")
        assert await coded.end() == "eof"
        assert len(it.intake.bodies) == 3


@pytest.mark.parametrize("behind", [b"\x00garbage", b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"])
async def test_garbage_behind_chunks_does_not_spoil_the_request(behind: bytes) -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(CHUNKED)
        await until(lambda: it.intake.visits)
        await visitor.send(chunked(BODY) + behind)
        await it.tried()
        it.intake.engine.last.answer()
        assert (await visitor.answer()).header("connection") == "close"


async def test_who_sends_too_much_ahead_gets_one_answer() -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(request(STREAM))
        await it.tried()
        it.intake.engine.last.stream(ONE)
        await visitor.until_body(ONE)
        await visitor.send(b"x" * (2 * AHEAD_BYTES))
        await asyncio.sleep(0.05)
        it.intake.engine.last.body(DONE_EVENT)
        answer = await visitor.answer()
        assert answer.complete
        await visitor.end()
        assert len(it.intake.visits) == 1


async def test_the_client_may_close_after_the_answer() -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(request(fields="connection: close\r\n"))
        await it.tried()
        it.intake.engine.last.answer()
        assert (await visitor.answer()).header("connection") == "close"
        assert await visitor.end() == "eof"


@pytest.mark.parametrize("served", [0, 1])
async def test_silence_ends_the_connection(served: int) -> None:
    """Before the first request, and between two."""
    async with door(head=LONG if served else 0.0, keep_alive=0.0) as it, it.visitor() as visitor:
        for _ in range(served):
            await visitor.send(request())
            await it.tried()
            it.intake.engine.last.answer()
            assert (await visitor.answer()).status == 200
        assert await visitor.end() == "eof"


# Quotas that are counted elsewhere


async def test_a_request_waits_for_its_admission() -> None:
    """What arrives meanwhile is kept: the rest of the body, and the next request."""
    body = BODY + b" " * 2 * AHEAD_BYTES
    async with door(must_wait=True) as it, it.visitor() as visitor:
        await visitor.send(request(body[:20], length=len(body)))
        await until(lambda: it.intake.waiting == 1)
        sending = asyncio.ensure_future(visitor.send(body[20:]))
        await asyncio.sleep(0.05)
        it.intake.gate.set()
        await it.tried()
        await sending
        it.intake.engine.last.answer()
        assert (await visitor.answer()).status == 200
        await visitor.send(request())
        await it.tried(2)
        it.intake.engine.last.answer()
        assert (await visitor.answer()).status == 200
        assert it.intake.bodies == [body, BODY]


async def test_a_request_that_is_not_admitted_is_answered() -> None:
    async with door(must_wait=True, refusal=InvalidClientKey("Send a key.")) as it, it.visitor() as visitor:
        await visitor.send(request(b"", length=len(BODY)))
        await until(lambda: it.intake.waiting == 1)
        await visitor.send(BODY)
        await asyncio.sleep(0.01)
        it.intake.gate.set()
        assert (await visitor.answer()).status == 401
        it.intake.refusal = None
        await visitor.send(request())
        await it.tried()
        it.intake.engine.last.answer()
        assert (await visitor.answer()).status == 200


# Clients that leave, and clients that do not read


@pytest.mark.parametrize("how", ["FIN", "RST", "half"])
@pytest.mark.parametrize("phase", ["admission", "body", "queue", "attempt", "relay", "refused body"])
async def test_a_client_that_leaves_is_noticed_in_every_phase(phase: str, how: str) -> None:
    """The attempt is closed and what was held is given back; the end of the fixture checks the rest."""
    cap = 1 if phase == "queue" else None
    options: dict[str, Any] = {"must_wait": phase == "admission", "engine": RecordingEngine([server("a", cap=cap)])}
    if phase == "refused body":
        options["refusal"] = InvalidClientKey("Send a key.")
    async with door(**options) as it, it.visitor() as visitor:
        busy = it.intake.engine.start()[0] if phase == "queue" else None
        partial = phase in ("body", "refused body")
        await visitor.send(request(STREAM[:3], length=1 << 20) if partial else request(STREAM))
        if phase == "admission":
            await until(lambda: it.intake.waiting == 1)
        elif partial:
            await until(lambda: it.intake.visits)
        elif phase == "queue":
            await until(lambda: it.intake.bodies and it.intake.last.phase is Phase.QUEUED)
        else:
            await it.tried()
        if phase == "relay":
            it.intake.engine.last.stream(ONE)
            await visitor.until_body(ONE)
        visitor.leave(how)
        await until(lambda: not it.listener.connections)
        if phase in ("queue", "attempt", "relay"):
            assert (it.intake.last.phase, it.intake.last.response.status, it.intake.last.response.error_code) == (
                Phase.OVER,
                499,
                "client_gone",
            )
        if busy is not None:
            busy.client_gone()


async def test_a_client_that_does_not_read_stops_its_server() -> None:
    """And reading again lets it go on; what is held is bounded."""
    async with door() as it, it.visitor(receive_buffer=4096) as visitor:
        await visitor.send(request(STREAM))
        await it.tried()
        sending = it.intake.engine.last
        sending.stream(ONE)
        large = chat_event("one", MODEL, {"content": "x" * 60_000})
        sent = len(ONE)
        async with asyncio.timeout(10):
            while not sending.paused:
                sending.body(large)
                sent += len(large)
                await asyncio.sleep(0)
        connection = next(iter(it.listener.connections))
        assert connection.transport.get_write_buffer_size() <= HIGH_WATER + len(large) + 100
        while it.intake.engine.last.paused:
            await visitor._receive()
        sending.body(LAST + DONE_EVENT)
        answer = await visitor.answer()
        assert answer.complete
        assert len(answer.body) == sent + len(LAST + DONE_EVENT)


@pytest.mark.parametrize("what", ["stream", "answer"])
async def test_a_client_that_takes_nothing_is_cut_off(what: str) -> None:
    """Whether its server waits for it, or has finished long ago."""
    async with door(write=0.0) as it, it.visitor(receive_buffer=4096) as visitor:
        await visitor.send(request(STREAM if what == "stream" else BODY))
        await it.tried()
        sending = it.intake.engine.last
        if what == "stream":
            sending.stream(ONE)
            while sending.is_live and not sending.paused:
                sending.body(chat_event("one", MODEL, {"content": "x" * 60_000}))
                await asyncio.sleep(0)
        else:
            sending.answer(body=b'["' + b"x" * (12 << 20) + b'"]')
        await until(lambda: not it.listener.connections)
        if what == "stream":
            assert (it.intake.last.response.status, it.intake.last.response.error_code) == (499, "client_stalled")


async def test_a_slow_client_is_not_a_stalled_one() -> None:
    """It takes something each time that it is looked at; the next request waits until the answer is out."""
    async with door(write=0.3) as it, it.visitor(receive_buffer=4096) as visitor:
        await visitor.send(request())
        await it.tried()
        it.intake.engine.last.answer(body=b'["' + b"x" * (8 << 20) + b'"]')
        await visitor.send(request())
        await asyncio.sleep(0.1)
        assert len(it.intake.bodies) == 1
        assert (await visitor.answer()).complete
        await it.tried(2)
        it.intake.engine.last.answer()
        assert (await visitor.answer()).status == 200


# The end


async def test_the_end_waits_for_answers_only() -> None:
    """Who is idle is closed, who is answered learns in the head or by the end that the connection is over."""
    async with door() as it, it.visitor() as idle, it.visitor() as waiting, it.visitor() as reading, it.visitor() as fresh:
        await idle.send(request())
        await it.tried()
        it.intake.engine.last.answer()
        await idle.answer()
        await reading.send(request(STREAM))
        await it.tried(2)
        stream = it.intake.engine.last
        stream.stream(ONE)
        await reading.until_body(ONE)
        await waiting.send(request())
        await it.tried(3)
        await until(lambda: len(it.listener.connections) == 4)
        end = asyncio.ensure_future(it.listener.finish())
        assert await idle.end() == "eof"
        it.intake.engine.last.answer()
        assert (await waiting.answer()).header("connection") == "close"
        assert await waiting.end() == "eof"
        it.intake.refusal = InvalidClientKey("Send a key.")
        await fresh.send(request())
        answer = await fresh.answer()
        assert (answer.status, answer.header("connection")) == (401, "close")
        assert not end.done()
        stream.body(LAST + DONE_EVENT)
        assert (await reading.answer()).complete
        assert await reading.end() == "eof"
        await end


async def test_the_end_can_be_hurried() -> None:
    async with door() as it, it.visitor() as visitor:
        await visitor.send(request(STREAM))
        await it.tried()
        end = asyncio.ensure_future(it.listener.finish())
        await asyncio.sleep(0)
        end.cancel()
        await visitor.end()
        await until(lambda: not it.listener.connections)
        assert it.intake.last.response.error_code == "client_gone"
