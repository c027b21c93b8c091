"""The wire: one answer and one ending for each request, over checked addresses, with nothing left behind; on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from multiverse_gateway.core.addresses import AddressPolicy, Endpoint, parse_endpoint
from multiverse_gateway.core.failover import ConnectFailure, Failure, FailureClass
from multiverse_gateway.core.servers import HostId
from multiverse_gateway.relay.server_connection import MAX_HEAD_BYTES, MAX_HEADERS, MAX_IDLE, MAX_INFORMATIONAL, WireSending
from multiverse_gateway.relay.wire import BUFFER_BYTES, Wire
from support import behaviours as act
from support.backends import Backend, Behaviour, Exchange
from support.require import require
from support.sockets import BlackHole, LoopServer, free_port, until

pytestmark = pytest.mark.e2e

ALICE = HostId("alice")
OPEN = AddressPolicy(allow_private=True)
BODY = b'{"model":"test-model","messages":[]}'
OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = OK + b"content-length: 0\r\n\r\n"


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Run every test of this module on both loops."""
    if request.param == "uvloop":
        require("uvloop", "the wire on uvloop")
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


class Told:
    """A receiver that writes down what it was told; `at` is called after each thing."""

    def __init__(self, at: Callable[[str], None] = lambda what: None) -> None:
        self.at = at
        self.said: list[str] = []
        self.status = 0
        self.headers: Mapping[bytes, bytes] = {}
        self.pieces: list[bytes] = []
        self.failure: Failure | None = None
        self.over = asyncio.Event()

    def _say(self, what: str) -> None:
        assert not self.over.is_set(), f"{what} after the end"
        self.said.append(what)
        if what in ("end", "failed"):
            self.over.set()
        self.at(what)

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        self.status, self.headers = status, headers
        self._say("head")

    def body(self, data: bytes) -> None:
        self.pieces.append(data)
        self._say("body")

    def end(self) -> None:
        self._say("end")

    def failed(self, failure: Failure) -> None:
        self.failure = failure
        self._say("failed")

    @property
    def content(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def kind(self) -> FailureClass | None:
        return None if self.failure is None else self.failure.kind


class Wires:
    """Make wires, send over them, and see that nothing is left of them."""

    def __init__(self) -> None:
        self.made: list[Wire] = []

    def __call__(self, policy: AddressPolicy = OPEN, **options: Any) -> Wire:
        wire = Wire(policy=lambda: policy, **options)
        self.made.append(wire)
        return wire


@pytest.fixture
async def wires() -> AsyncIterator[Wires]:
    """Close the wires of a test and find neither sockets nor tasks of theirs."""
    wires = Wires()
    yield wires
    for wire in wires.made:
        await wire.aclose()
        assert (len(wire.connections), len(wire.dialing), wire.idle) == (0, 0, 0)


@pytest.fixture
def alice() -> Iterator[Backend]:
    """Run one good backend, on a thread and a loop of its own: it does not run on uvloop."""
    with Backend("alice") as backend:
        yield backend


def request(endpoint: Endpoint, body: bytes = BODY) -> tuple[bytes, bytes]:
    """Build a request in two parts."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {endpoint.authority}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode(), body


def start(wire: Wire, url: str, told: Told, *, server: HostId | None = ALICE, body: bytes = BODY, fresh: bool = False) -> WireSending:
    """Send one request."""
    endpoint = parse_endpoint(url)
    sending = wire.send(server, endpoint, request(endpoint, body), told, fresh=fresh)
    assert told.said == [], "told during send"
    return sending


async def ask(wire: Wire, url: str, *, server: HostId | None = ALICE, body: bytes = BODY) -> Told:
    """Send one request and wait for its ending."""
    told = Told()
    start(wire, url, told, server=server, body=body)
    async with asyncio.timeout(10):
        await told.over.wait()
    return told


def found(addresses: Mapping[str, Sequence[str]]) -> Callable[[str, int], Any]:
    """Resolve names as a table says."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses[host]

    return resolve


# Good answers


async def test_an_answer_is_told_in_order_and_its_connection_is_used_again(wires: Wires, alice: Backend) -> None:
    """Head, body, end; the next request goes out on the same connection."""
    wire = wires()
    for number in (1, 2, 3):
        told = await ask(wire, alice.url)
        assert (told.said[0], told.said[-1], told.status) == ("head", "end", 200)
        assert told.content == bytes(alice.last.payload)
        assert told.headers[b"content-type"] == b"application/json"
        assert (alice.hits, alice.connections, wire.idle) == (number, 1, 1)
    assert alice.last.body == BODY


async def test_names_are_lower_case_and_the_last_value_wins(wires: Wires, alice: Backend) -> None:
    """`X-Thing` given twice is one header."""
    alice.behave = act.answer(200, b"{}", headers=[("X-Thing", "one"), ("x-thiNG", "two")])
    assert (await ask(wires(), alice.url)).headers[b"x-thing"] == b"two"


@pytest.mark.parametrize("seed", range(5))
async def test_any_segmentation_gives_the_same_stream(wires: Wires, alice: Backend, seed: int) -> None:
    """A chunked answer cut anywhere arrives whole, and its connection is kept."""
    alice.behave = act.in_pieces(act.good(), seed=seed)
    wire = wires()
    body = b'{"model":"test-model","messages":[],"stream":true}'
    told = await ask(wire, alice.url, body=body)
    assert told.content == bytes(alice.last.payload)
    assert told.content.endswith(b"data: [DONE]\n\n")
    assert (told.said[-1], wire.idle) == ("end", 1)


async def test_a_body_without_length_ends_with_the_connection(wires: Wires, alice: Backend) -> None:
    """FIN is the end when nothing else was promised; the connection is not kept."""
    alice.behave = act.raw(OK + b"\r\nall of it")
    wire = wires()
    told = await ask(wire, alice.url)
    assert (told.content, told.said[-1], wire.idle) == (b"all of it", "end", 0)


@pytest.mark.parametrize("head", [b"HTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 304 No\r\ncontent-length: 5\r\n\r\n", EMPTY])
async def test_answers_without_body_end_at_once(wires: Wires, alice: Backend, head: bytes) -> None:
    """No body is waited for where there can be none."""
    alice.behave = act.raw(head, end="stall")
    assert (await ask(wires(), alice.url)).said == ["head", "end"]


async def test_some_interim_answers_are_passed_over(wires: Wires, alice: Backend) -> None:
    """100 and 103 before the answer are not the answer, and their headers are not its headers."""
    interim = b"HTTP/1.1 103 Early\r\nx-early: 1\r\n\r\n" * MAX_INFORMATIONAL
    alice.behave = act.raw(interim + EMPTY, end="stall")
    wire = wires()
    told = await ask(wire, alice.url)
    assert (told.status, told.said, dict(told.headers), wire.idle) == (200, ["head", "end"], {b"content-length": b"0"}, 1)


async def test_one_ending_may_send_the_next_request_on_the_same_connection(wires: Wires, alice: Backend) -> None:
    """The connection is given back before `end` is told."""
    wire = wires()
    second = Told()
    sent: list[WireSending] = []

    def at(what: str) -> None:
        if what == "end":
            sent.append(start(wire, alice.url, second))

    start(wire, alice.url, Told(at))
    await second.over.wait()
    assert (second.said[-1], sent[0].reused, alice.connections) == ("end", True, 1)


# Bad answers

CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
BROKEN = {
    "reset first": act.reset_first(),
    "end first": act.eof_first(),
    "garbage": act.garbage(),
    "half a head": act.partial_head(),
    "a head that is reset": act.partial_head(end="reset"),
    "half a body": act.truncated_body(),
    "half a body, reset": act.truncated_body(end="reset"),
    "reset without length": act.raw(OK + b"\r\nsome", end="reset"),
    "a chunk that is cut": act.raw(CHUNKED + b"5\r\nab"),
    "no last chunk": act.raw(CHUNKED + b"2\r\nab\r\n"),
    "an odd chunk size": act.raw(CHUNKED + b"xyz\r\nab\r\n", end="stall"),
    "two lengths": act.raw(OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\nabc", end="stall"),
    "two lengths and chunks": act.raw(OK + b"content-length: 2\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", end="stall"),
    "a split header": act.split_header(),
    "a folded header": act.raw(OK + b"x: a\r\n b\r\n\r\n", end="stall"),
    "NUL in a header": act.raw(OK + b"x: a\0b\r\n\r\n", end="stall"),
    "bare line feeds": act.raw(b"HTTP/1.1 200 OK\ncontent-length: 0\n\n", end="stall"),
    "an endless status line": act.raw(b"HTTP/1.1 200 " + b"x" * 5, end="close"),
}
NONSENSE = {
    "too many headers": act.many_headers(MAX_HEADERS + 1),
    "20,000 headers": act.many_headers(),
    "one header many times": act.raw(OK + b"x: y\r\n" * (MAX_HEADERS + 1) + b"\r\n", end="stall"),
    "a header of 1 MiB": act.big_header(),
    "a header over the limit": act.big_header(MAX_HEAD_BYTES),
    "large headers in one piece with the body": act.raw(OK + b"x: %b\r\n" % (b"y" * 9000) * 2 + b"content-length: 2\r\n\r\n{}"),
    "a header without end": act.raw(OK + b"x: " + b"y" * 2 * BUFFER_BYTES, end="stall"),
    "a status line without end": act.raw(b"HTTP/1.1 200 " + b"y" * 2 * BUFFER_BYTES, end="stall"),
    "a trailer without end": act.raw(CHUNKED + b"1\r\na\r\n0\r\nx: " + b"y" * 3 * BUFFER_BYTES, end="stall"),
    "trailers without end": act.raw(CHUNKED + b"1\r\na\r\n0\r\n" + b"x: y\r\n" * BUFFER_BYTES, end="stall"),
    "a chunk extension without end": act.raw(CHUNKED + b"1;" + b"y" * 3 * BUFFER_BYTES, end="stall"),
    "endless 100": act.endless_continue(),
    "one interim answer too many": act.raw(b"HTTP/1.1 100 Go\r\n\r\n" * (MAX_INFORMATIONAL + 1), end="stall"),
    "101": act.raw(b"HTTP/1.1 101 Switch\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", end="stall"),
    "status 999": act.odd_status(),
    "status 600": act.odd_status(600),
    "status 099": act.raw(b"HTTP/1.1 099 Odd\r\n\r\n", end="stall"),
    "a coding nobody asked for": act.raw(OK + b"transfer-encoding: gzip\r\n\r\nabc"),
    "chunks inside something else": act.raw(OK + b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("fault", BROKEN)
async def test_a_broken_answer_fails_as_broken(wires: Wires, alice: Backend, fault: str) -> None:
    """[F04, S01, S02, X05] Reset, early end, garbage and truncation are class B, told once, and the connection is gone."""
    alice.behave = BROKEN[fault]
    told = await ask(wires(), alice.url)
    assert (told.kind, told.said.count("failed"), "end" in told.said) == (FailureClass.BROKEN, 1, False)
    await until(lambda: alice.open_connections == 0)


@pytest.mark.parametrize("fault", NONSENSE)
async def test_nonsense_fails_as_nonsense(wires: Wires, alice: Backend, fault: str) -> None:
    """[L11] Oversized heads, endless interim answers and impossible statuses are class K; nothing is kept of them."""
    alice.behave = NONSENSE[fault]
    told = await ask(wires(), alice.url)
    assert (told.kind, "end" in told.said) == (FailureClass.NONSENSE, False)
    await until(lambda: alice.open_connections == 0)


@pytest.mark.parametrize("count", [1, MAX_HEADERS])
async def test_a_head_within_the_limits_passes(wires: Wires, alice: Backend, count: int) -> None:
    """100 headers, 16 KiB together, are fine."""
    room = MAX_HEAD_BYTES // count - len(b"content-length: 2\r\n") - 10
    lines = b"".join(b"x-%d: %b\r\n" % (number, b"y" * room) for number in range(count - 1)) if count > 1 else b""
    alice.behave = act.raw(OK + lines + b"content-length: 2\r\n\r\n{}", end="stall")
    told = await ask(wires(), alice.url)
    assert (told.content, len(told.headers)) == (b"{}", count)


@pytest.mark.parametrize("length", [0, 2, 10_000])
@pytest.mark.parametrize("comes_first", [True, False])
async def test_chunks_win_over_a_length(wires: Wires, alice: Backend, length: int, comes_first: bool) -> None:
    """RFC 9112, 6.3: the answer is read in chunks, and its connection is not used again."""
    lines = [b"content-length: %d\r\n" % length, b"transfer-encoding: chunked\r\n"]
    head = OK + b"".join(lines if comes_first else reversed(lines)) + b"\r\n"
    alice.behave = act.raw(head + b"5\r\nhello\r\n0\r\n\r\n", end="stall")
    wire = wires()
    for _ in range(2):
        told = await ask(wire, alice.url)
        assert (told.content, told.said[-1]) == (b"hello", "end")
        assert b"content-length" not in told.headers
    await until(lambda: alice.open_connections == 0)


# Keeping connections


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"connection: close\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
        EMPTY + b"HTTP/1.1 200 OK\r\n",
        EMPTY + EMPTY,
        EMPTY + b"garbage",
    ],
)
async def test_a_connection_that_must_not_be_used_again_is_closed(wires: Wires, alice: Backend, answer: bytes) -> None:
    """The answer is complete nevertheless."""
    alice.behave = act.raw(answer, end="stall")
    wire = wires()
    told = await ask(wire, alice.url)
    assert (told.said, wire.idle) == (["head", "end"], 0)
    await until(lambda: alice.open_connections == 0)


@pytest.mark.parametrize("late", ["data", "end", "reset"])
async def test_anything_on_an_idle_connection_closes_it(wires: Wires, alice: Backend, late: str) -> None:
    """An answer that nobody asked for is no answer to the next request."""
    gate = act.Gate()
    more = {"data": act.answer(200, b'{"not": "yours"}'), "end": act.eof_first(), "reset": act.reset_first()}

    async def behave(exchange: Exchange) -> None:
        await exchange.answer(200, b"{}")
        await gate.held(more[late])(exchange)

    alice.behave = [behave, act.answer(200, b'{"yours": 1}')]
    wire = wires()
    await ask(wire, alice.url)
    assert wire.idle == 1
    gate.open()
    await until(lambda: not wire.connections)
    assert wire.idle == 0
    assert (await ask(wire, alice.url)).content == b'{"yours": 1}'


@pytest.mark.parametrize("end", [act.eof_first, act.reset_first])
async def test_a_kept_connection_that_ends_unanswered_is_stale(wires: Wires, alice: Backend, end: Callable[[], Behaviour]) -> None:
    """RFC 9112, 9.3.1: the server may have closed it before the request came. The wire says so, and sends nothing twice."""
    wire = wires()
    await ask(wire, alice.url)
    alice.behave = [end(), end()]
    stale, broken = (await ask(wire, alice.url)).failure, (await ask(wire, alice.url)).failure
    assert stale is not None
    assert broken is not None
    assert (stale.kind, stale.is_stale) == (FailureClass.BROKEN, True)
    assert (broken.kind, broken.is_stale, broken.after_request) == (FailureClass.BROKEN, False, True)
    assert (alice.hits, alice.connections) == (3, 2)


async def test_a_stale_connection_may_end_before_the_request_is_written_in_full(wires: Wires, alice: Backend) -> None:
    """A large body does not make it the server's fault."""
    wire = wires()
    told = Told()
    await ask(wire, alice.url)
    alice.reset_all()
    start(wire, alice.url, told, body=b" " * (8 << 20))
    await told.over.wait()
    assert told.failure is not None
    assert (told.failure.is_stale, alice.connections) == (True, 1)


async def test_a_fresh_request_gets_a_connection_of_its_own(wires: Wires, alice: Backend) -> None:
    """Whatever is kept may be closed already; it stays for others."""
    wire = wires()
    await ask(wire, alice.url)
    told = Told()
    assert not start(wire, alice.url, told, fresh=True).reused
    await told.over.wait()
    assert (told.said[-1], alice.connections, wire.idle) == ("end", 2, 2)


async def test_chunks_of_a_byte_each_are_one_piece_per_buffer(wires: Wires, alice: Backend) -> None:
    """A hostile server does not make the gateway work for each of its chunks."""
    wire = wires()

    async def behave(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n")

    alice.behave = behave
    told = await ask(wire, alice.url)
    assert told.content == b"x" * 20_000
    assert len(told.pieces) < 200


async def test_a_kept_connection_that_ends_after_a_while_was_not_stale(wires: Wires, alice: Backend) -> None:
    """A server that dies over a request gets it once."""
    wire = wires(stale_timeout=0)
    await ask(wire, alice.url)
    alice.behave = act.eof_first()
    assert (await ask(wire, alice.url)).kind is FailureClass.BROKEN
    assert alice.hits == 2


@pytest.mark.parametrize("fault", ["garbage", "half a head", "half a body"])
async def test_a_kept_connection_that_answered_anything_is_not_replaced(wires: Wires, alice: Backend, fault: str) -> None:
    """Only silence is stale."""
    wire = wires()
    await ask(wire, alice.url)
    alice.behave = BROKEN[fault]
    assert (await ask(wire, alice.url)).kind is FailureClass.BROKEN
    assert alice.hits == 2


async def test_idle_connections_are_closed_in_time(wires: Wires, alice: Backend) -> None:
    """Nobody has to send for it."""
    wire = wires(idle_timeout=0.05)
    await ask(wire, alice.url)
    await until(lambda: alice.open_connections == 0)
    assert (wire.idle, len(wire.connections)) == (0, 0)


async def test_a_connection_that_idled_too_long_is_not_used(wires: Wires, alice: Backend) -> None:
    """Even when it was not swept yet."""
    wire = wires(idle_timeout=0)
    await ask(wire, alice.url)
    told = Told()
    assert not start(wire, alice.url, told).reused
    await told.over.wait()
    assert alice.connections == 2


async def test_only_so_many_connections_are_kept(wires: Wires, alice: Backend) -> None:
    """The others are closed when their answer is complete."""
    wire = wires()
    gate = act.Gate()
    alice.behave = gate.held()
    told = [Told() for _ in range(MAX_IDLE + 6)]
    for one in told:
        start(wire, alice.url, one)
    await until(lambda: alice.running == len(told))
    gate.open()
    for one in told:
        await one.over.wait()
    assert wire.idle == MAX_IDLE
    await until(lambda: alice.open_connections == MAX_IDLE)


async def test_dropping_a_server_closes_its_idle_connections_and_then_the_others(wires: Wires, alice: Backend) -> None:
    """What runs may end; it is not kept. Other servers keep theirs."""
    wire = wires()
    gate = act.Gate()
    alice.behave = [act.good(), act.good(), gate.held()]
    await ask(wire, alice.url, server=HostId("bob"))
    told = Told()
    await ask(wire, alice.url)
    start(wire, alice.url, told)
    await until(lambda: alice.hits == 3)
    wire.drop(ALICE)
    wire.drop(HostId("nobody"))
    gate.open()
    await told.over.wait()
    assert (told.said[-1], wire.idle) == ("end", 1)
    await until(lambda: alice.open_connections == 1)


async def test_a_server_that_moved_is_not_asked_at_its_old_place(wires: Wires, alice: Backend) -> None:
    """Connections belong to an endpoint: after a change of the URL the old ones are closed."""
    wire = wires()
    with Backend("bob") as bob:
        await ask(wire, alice.url)
        await ask(wire, bob.url)
        assert (alice.hits, bob.hits, wire.idle) == (1, 1, 1)
        await until(lambda: alice.open_connections == 0)


async def test_without_a_server_nothing_is_kept(wires: Wires, alice: Backend) -> None:
    """Probes and tests of connections use their connection once."""
    wire = wires()
    await ask(wire, alice.url, server=None)
    await until(lambda: alice.open_connections == 0)
    assert wire.idle == 0


# Flow


class Deaf(LoopServer):
    """Accept, perhaps say something, never read."""

    def __init__(self, says: bytes = b"") -> None:
        super().__init__()
        self.says = says
        self.held: list[socket.socket] = []

    async def connected(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.held.append(connection)
        await asyncio.get_running_loop().sock_sendall(connection, self.says)

    async def hang_up(self) -> None:
        for connection in self.held:
            connection.close()


async def test_a_server_that_does_not_read_is_given_up(wires: Wires) -> None:
    """The request stands still for the write timeout: class B."""
    with Deaf() as deaf:
        told = await ask(wires(write_timeout=0.1), deaf.url, body=b" " * (16 << 20))
    assert told.kind is FailureClass.BROKEN
    assert told.failure is not None
    assert "read" in told.failure.reason


async def test_a_server_that_reads_slowly_is_not_given_up(wires: Wires, alice: Backend) -> None:
    """What counts is that something goes, not that all has gone."""
    wire = wires(write_timeout=0.02)
    large = b" " * (24 << 20)
    told = await ask(wire, alice.url, body=large)
    assert (told.said[-1], len(alice.last.body)) == ("end", len(large))


async def test_an_answer_may_come_before_the_request_was_written(wires: Wires) -> None:
    """413 to a large body is told; the connection, with half a request on it, is closed."""
    with Deaf(b"HTTP/1.1 413 Large\r\ncontent-length: 2\r\n\r\n{}") as deaf:
        wire = wires()
        told = await ask(wire, deaf.url, body=b" " * (16 << 20))
        assert (told.status, told.content, told.said[-1], wire.idle) == (413, b"{}", "end", 0)
        await until(lambda: not wire.connections)


async def test_pausing_stops_reading_and_resuming_goes_on(wires: Wires, alice: Backend) -> None:
    """No more than one buffer is told after `pause`; nothing is lost; the connection is kept and reads again."""
    large = b"x" * (6 << 20)
    alice.behave = act.answer(200, large)
    wire = wires()
    told = Told(lambda what: sending.pause() if what == "head" else None)
    sending = start(wire, alice.url, told)
    await until(lambda: told.said)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(told.content) <= BUFFER_BYTES
    sending.resume()
    await told.over.wait()
    assert (len(told.content), wire.idle) == (len(large), 1)


async def test_pausing_before_the_connection_is_made_holds(wires: Wires, alice: Backend) -> None:
    """At most one buffer is told; after the ending, `pause` and `resume` do not touch the kept connection."""
    large = b"x" * (6 << 20)
    alice.behave = act.answer(200, large)
    wire = wires()
    told = Told()
    sending = start(wire, alice.url, told)
    sending.pause()
    await until(lambda: alice.hits == 1)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(told.content) <= BUFFER_BYTES
    sending.resume()
    await told.over.wait()
    assert len(told.content) == len(large)
    sending.pause()
    sending.resume()
    alice.reset_all()
    await until(lambda: not wire.connections)


async def test_an_answer_that_ends_while_paused_leaves_a_connection_that_reads(wires: Wires, alice: Backend) -> None:
    """Otherwise its next answer would never come."""
    wire = wires()
    told = Told(lambda what: sending.pause() if what == "body" else None)
    sending = start(wire, alice.url, told)
    await told.over.wait()
    assert wire.idle == 1
    assert (await ask(wire, alice.url)).said[-1] == "end"
    assert alice.connections == 1


# Aborting


@pytest.mark.parametrize("moment", ["head", "body"])
async def test_aborting_inside_a_callback_is_the_last_thing_heard(wires: Wires, alice: Backend, moment: str) -> None:
    """The rest of what was read goes nowhere; the server notices."""
    alice.behave = act.endless_stream()
    wire = wires()
    told = Told(lambda what: sending.abort() if what == moment else None)
    sending = start(wire, alice.url, told)
    await until(lambda: alice.aborted == 1)
    assert told.said == ["head", "body"][: 1 + (moment == "body")]
    assert (wire.idle, len(wire.connections)) == (0, 0)


async def test_aborting_an_attempt_that_waits_closes_the_connection(wires: Wires, alice: Backend) -> None:
    """[D02] Before the first byte, too; again and again does no harm."""
    alice.behave = act.stall()
    told = Told()
    sending = start(wires(), alice.url, told)
    await until(lambda: alice.hits == 1)
    sending.abort()
    sending.abort()
    sending.pause()
    sending.resume()
    await until(lambda: alice.aborted == 1 and alice.open_connections == 0)
    assert told.said == []


async def test_aborting_after_the_end_does_not_touch_the_kept_connection(wires: Wires, alice: Backend) -> None:
    """It may serve somebody else by now."""
    wire = wires()
    told = Told(lambda what: sending.abort() if what == "end" else None)
    sending = start(wire, alice.url, told)
    await told.over.wait()
    other = Told()
    start(wire, alice.url, other)
    sending.abort()
    await other.over.wait()
    assert (other.said[-1], alice.connections) == ("end", 1)


async def test_aborting_ends_resolving(wires: Wires) -> None:
    """The resolver's task is canceled."""
    cancelled = asyncio.Event()
    asked = asyncio.Event()

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    wire = wires(resolve=resolve, connect_timeout=60, dns_timeout=60)
    told = Told()
    sending = start(wire, "http://alice.example", told)
    await asked.wait()
    sending.abort()
    await cancelled.wait()
    await until(lambda: not wire.dialing)
    assert told.said == []


async def test_aborting_ends_dialling(wires: Wires) -> None:
    """A server that does not accept holds nothing."""
    wire = wires(connect_timeout=60)
    told = Told()
    async with BlackHole() as hole:
        sending = start(wire, hole.url, told)
        await asyncio.sleep(0.01)  # until the connection is under way; there is no event for that
        sending.abort()
        await until(lambda: not wire.dialing)
    assert told.said == []


async def test_random_aborts_leave_nothing(wires: Wires, alice: Backend) -> None:
    """[D05] After 500 requests that were given up anywhere, 20 of 20 are answered and no socket and no task is left."""
    chance = random.Random(7)
    wire = wires()
    tasks = len(asyncio.all_tasks())

    async def one() -> None:
        told = Told()
        stop_at = chance.choice(["head", "body", "end", ""])
        stream = chance.random() < 0.5
        body = b'{"model":"m","messages":[],"stream":true}' if stream else BODY

        def at(what: str) -> None:
            if what == stop_at:
                sending.abort()

        told.at = at
        sending = start(wire, alice.url, told, body=body)
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        before = len(told.said)
        sending.abort()
        await asyncio.sleep(0)
        assert len(told.said) == before

    for _ in range(10):
        await asyncio.gather(*(one() for _ in range(50)))
    for _ in range(20):
        assert (await ask(wire, alice.url)).said[-1] == "end"
    await until(lambda: not wire.dialing and len(wire.connections) == wire.idle)
    await until(lambda: alice.open_connections == wire.idle and alice.running == 0)
    wire.drop(ALICE)
    await until(lambda: alice.open_connections == 0)
    await until(lambda: len(asyncio.all_tasks()) == tasks)
    assert not wire.connections


# Addresses


async def test_nothing_private_is_dialled(wires: Wires, alice: Backend) -> None:
    """[X01] A literal, a name, and one bad answer among good ones are refused: no packet goes out."""
    table = {
        "private.example": ["127.0.0.1"],
        "mixed.example": ["93.184.215.14", "127.0.0.1"],
        "mapped.example": ["::ffff:127.0.0.1"],
        "scoped.example": ["fe80::1%eth0"],
        "odd.example": ["2130706433"],
        "none.example": [],
    }
    wire = wires(AddressPolicy(), resolve=found(table))
    for host in ["127.0.0.1", "[::1]", *table]:
        told = await ask(wire, f"http://{host}:{alice.port}")
        assert (told.kind, told.said) == (FailureClass.CONNECT, ["failed"])
        assert told.failure is not None
        assert "127" not in told.failure.reason
        assert told.failure.connect is ConnectFailure.REFUSED_ADDRESS
        assert told.failure.refusal is not None
    assert (alice.connections, len(wire.connections)) == (0, 0)


async def test_an_answer_that_changes_is_checked_again(wires: Wires, alice: Backend) -> None:
    """[X01] Rebinding: the name is public when it is looked at first and private at the connect; nothing is dialed.

    Names are resolved and checked at every connect, so a name that was good once is no better the second time.
    """
    policies = [AddressPolicy(allow_private=True)]
    answers = [["127.0.0.1"], ["169.254.169.254"]]

    async def resolve(host: str, port: int) -> Sequence[str]:
        return answers.pop(0)

    wire = Wire(policy=lambda: policies[0], resolve=resolve)
    wires.made.append(wire)
    url = f"http://alice.example:{alice.port}"
    assert (await ask(wire, url, server=None)).said[-1] == "end"
    assert (await ask(wire, url, server=None)).kind is FailureClass.CONNECT
    policies[0] = AddressPolicy()
    answers.append(["127.0.0.1"])
    assert (await ask(wire, url, server=None)).kind is FailureClass.CONNECT
    assert (alice.connections, answers) == (1, [])


async def test_a_literal_is_not_resolved(wires: Wires, alice: Backend) -> None:
    """And a name is dialed at what was checked, without a second look-up."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"]

    wire = wires(resolve=resolve)
    assert (await ask(wire, alice.url, server=None)).said[-1] == "end"
    assert asked == []
    assert (await ask(wire, f"http://no-such-name.example:{alice.port}", server=None)).said[-1] == "end"
    assert asked == ["no-such-name.example"]


async def test_a_pause_while_a_name_is_resolved_is_not_the_servers_fault(wires: Wires, alice: Backend) -> None:
    """S9: the process was stopped for longer than names may take, so the name is looked up once more."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        if len(asked) == 1:
            time.sleep(0.8)  # noqa: ASYNC251 - the whole process stands still
            await asyncio.sleep(60)
        return ["127.0.0.1"]

    wire = wires(resolve=resolve, connect_timeout=60, dns_timeout=0.1)
    assert (await ask(wire, f"http://alice.example:{alice.port}", server=None)).said[-1] == "end"
    assert len(asked) == 2


async def test_names_are_resolved_by_the_system(wires: Wires, alice: Backend) -> None:
    """`localhost` needs no network; its other address does not answer here."""
    assert (await ask(wires(), f"http://localhost:{alice.port}")).said[-1] == "end"


async def test_the_next_address_is_tried(wires: Wires, alice: Backend) -> None:
    """One that refuses and one that swallows everything cost only their part of the time."""
    wire = wires(resolve=found({"alice.example": ["127.0.0.9", "127.0.0.8", "127.0.0.1"]}), connect_timeout=0.6)
    hole = BlackHole(host="127.0.0.8", port=alice.port)
    async with hole:
        assert (await ask(wire, f"http://alice.example:{alice.port}")).said[-1] == "end"


async def test_a_server_that_refuses_fails_to_connect(wires: Wires) -> None:
    """[F01] Class A."""
    told = await ask(wires(), f"http://127.0.0.1:{free_port()}")
    assert (told.kind, told.said) == (FailureClass.CONNECT, ["failed"])
    assert told.failure is not None
    assert "refused" in told.failure.reason
    assert told.failure.connect is ConnectFailure.REFUSED


async def test_a_server_that_does_not_accept_fails_in_time(wires: Wires) -> None:
    """[F02] Class A after the connect timeout."""
    async with BlackHole() as hole:
        told = await ask(wires(connect_timeout=0.1), hole.url)
    assert told.kind is FailureClass.CONNECT
    assert told.failure is not None
    assert "time" in told.failure.reason
    assert told.failure.connect is ConnectFailure.TIMEOUT


@pytest.mark.parametrize("error", [socket.gaierror(-2, "no such name"), TimeoutError(), UnicodeError("label too long")])
async def test_a_name_that_cannot_be_resolved_fails_to_connect(wires: Wires, error: Exception) -> None:
    """Class A, in words of ours."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        raise error

    told = await ask(wires(resolve=resolve), "http://alice.example")
    assert told.kind is FailureClass.CONNECT
    assert told.failure is not None
    assert told.failure.reason == "the name of the server could not be resolved"
    assert told.failure.connect is ConnectFailure.RESOLVE


async def test_a_resolver_that_hangs_is_given_up(wires: Wires) -> None:
    """After the DNS timeout."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        await asyncio.get_running_loop().create_future()
        return []

    told = await ask(wires(resolve=resolve, dns_timeout=0.05), "http://alice.example")
    assert told.kind is FailureClass.CONNECT


async def test_a_server_that_speaks_first_is_broken(wires: Wires) -> None:
    """Whatever comes before the request is no answer to it, and nobody waits for ever."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", free_port())
    async with server:
        told = await ask(wires(), f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        assert told.kind is FailureClass.BROKEN


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Make the contexts of a server called alice.example and of a client that trusts it."""
    directory: Path = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "alice.example")])
    today = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("alice.example"), x509.IPAddress(ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain = directory / "chain.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    chain.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(chain)
    client = ssl.create_default_context(cafile=str(chain))
    return server, client


TlsContexts = tuple[ssl.SSLContext, ssl.SSLContext]
LOCAL_NAMES = {"alice.example": ["127.0.0.1"], "bob.example": ["127.0.0.1"]}


async def test_tls_verifies_the_name_and_keeps_the_connection(wires: Wires, certificate: TlsContexts) -> None:
    """The name stands in SNI and is checked, though an address is dialed; a large body and stream pass."""
    with Backend("alice", tls=certificate[0]) as alice:
        wire = wires(tls=certificate[1], resolve=found(LOCAL_NAMES))
        url = f"https://alice.example:{alice.port}"
        large = b" " * (3 << 20)
        for _ in range(2):
            told = await ask(wire, url, body=large)
            assert (told.said[-1], len(alice.last.body), wire.idle) == ("end", len(large), 1)
        assert alice.connections == 1
        assert (await ask(wire, f"https://bob.example:{alice.port}")).kind is FailureClass.CONNECT
        assert alice.hits == 2


@pytest.mark.parametrize("verify", [True, False])
async def test_an_unknown_certificate_is_refused_unless_told_otherwise(wires: Wires, certificate: TlsContexts, verify: bool) -> None:
    """Class A; with `verify_tls=False` it is taken."""
    with Backend("alice", tls=certificate[0]) as alice:
        told = await ask(wires(verify_tls=verify), alice.url)
        assert told.kind is (FailureClass.CONNECT if verify else None)
        assert alice.hits == (0 if verify else 1)


async def test_tls_to_a_server_without_tls_fails_to_connect(wires: Wires, alice: Backend) -> None:
    """Class A."""
    assert (await ask(wires(connect_timeout=0.2), alice.url.replace("http", "https"))).kind is FailureClass.CONNECT


@pytest.mark.parametrize("behave", [act.cut_stream(), act.reset_stream(), act.eof_first(), act.truncated_body()])
async def test_tls_that_ends_early_is_broken(wires: Wires, certificate: TlsContexts, behave: Behaviour) -> None:
    """As without TLS."""
    with Backend("alice", behave, tls=certificate[0]) as alice:
        told = await ask(wires(tls=certificate[1]), alice.url, body=b'{"model":"m","messages":[],"stream":true}')
        assert told.kind is FailureClass.BROKEN


def tasks_of(backend: Backend) -> int:
    """Count the tasks on a backend's loop: accepting, answering, and handshakes, which are not counted as connections yet."""
    counted: list[int] = []
    backend.on_loop(lambda: counted.append(len(asyncio.all_tasks())))
    return counted[0]


async def test_aborting_tls_leaves_nothing(wires: Wires, certificate: TlsContexts) -> None:
    """At any moment of the handshake or after it."""
    with Backend("alice", act.stall(), tls=certificate[0]) as alice:
        wire = wires(tls=certificate[1])
        at_rest = tasks_of(alice)
        for turns in range(40):
            told = Told()
            sending = start(wire, alice.url, told)
            for _ in range(turns):
                await asyncio.sleep(0)
            sending.abort()
            assert told.said == []
        await until(lambda: not wire.connections and not wire.dialing and alice.open_connections == 0)
        await until(lambda: tasks_of(alice) == at_rest)


# Ends of everything


async def test_closing_tells_everybody_who_waits(wires: Wires, alice: Backend) -> None:
    """A request that waits for its answer, one that is being dialed, and one that comes too late: class L, each once."""
    alice.behave = act.stall()
    wire = wires()
    answering, dialling, late = Told(), Told(), Told()
    async with BlackHole() as hole:
        start(wire, alice.url, answering)
        await until(lambda: alice.hits == 1)
        start(wire, hole.url, dialling, server=HostId("hole"))
        await wire.aclose()
        start(wire, alice.url, late)
        await late.over.wait()
    for told in (answering, dialling, late):
        assert (told.kind, told.said) == (FailureClass.LOCAL, ["failed"])
    await until(lambda: alice.open_connections == 0)


@contextlib.contextmanager
def complaints() -> Any:
    """Collect what the loop's exception handler is told."""
    loop = asyncio.get_running_loop()
    collected: list[BaseException] = []
    loop.set_exception_handler(lambda loop, context: collected.append(context["exception"]))
    try:
        yield collected
    finally:
        loop.set_exception_handler(None)


@pytest.mark.parametrize("moment", ["head", "body"])
async def test_a_mistake_of_the_receiver_is_not_the_servers(wires: Wires, alice: Backend, moment: str) -> None:
    """It is told as class L and reported to the loop, not taken for a broken answer."""

    def at(what: str) -> None:
        if what == moment:
            raise RuntimeError("mistake")

    told = Told(at)
    with complaints() as collected:
        start(wires(), alice.url, told)
        await told.over.wait()
    assert told.kind is FailureClass.LOCAL
    assert [str(error) for error in collected] == ["mistake"]


async def test_a_mistake_of_the_resolver_is_not_the_servers(wires: Wires) -> None:
    """It is told as class L and reported to the loop."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        raise RuntimeError("mistake")

    with complaints() as collected:
        told = await ask(wires(resolve=resolve), "http://alice.example")
        await until(lambda: collected)
    assert told.kind is FailureClass.LOCAL


async def test_closed_connections_are_freed_at_once(wires: Wires, alice: Backend) -> None:
    """No cycle waits for the garbage collector."""
    wire = wires()
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing).__name__ == "ServerConnection" for thing in gc.get_objects())
        for _ in range(5):
            await ask(wire, alice.url, server=None)
        await until(lambda: not wire.connections)
        await asyncio.sleep(0)
        assert sum(type(thing).__name__ == "ServerConnection" for thing in gc.get_objects()) <= before + 1
    finally:
        gc.enable()
