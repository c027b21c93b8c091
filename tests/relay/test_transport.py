"""httpx2 over the wire: the same checked door, whole answers of bounded size, errors in words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

import httpx2
import pytest

from multiverse_gateway.core.addresses import AddressPolicy, AddressRefusal
from multiverse_gateway.core.failover import ConnectFailure
from multiverse_gateway.protocols import MAX_PROBE_BYTES, ServerUnreachable
from multiverse_gateway.relay.transport import WireTransport
from multiverse_gateway.relay.wire import Wire
from support import behaviours as act
from support.backends import Backend, Behaviour
from support.sockets import free_port, until

pytestmark = pytest.mark.e2e

OPEN = AddressPolicy(allow_private=True)


@pytest.fixture
def alice() -> Iterator[Backend]:
    """Run one good backend."""
    with Backend("alice") as backend:
        yield backend


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    """Make a wire on which private addresses are open, and find nothing left of it."""
    wire = Wire(policy=lambda: OPEN)
    yield wire
    await until(lambda: not wire.connections and not wire.dialing)
    await wire.aclose()


@pytest.fixture
async def http(wire: Wire) -> AsyncIterator[httpx2.AsyncClient]:
    """Make a client over the wire."""
    async with httpx2.AsyncClient(transport=WireTransport(wire), trust_env=False, timeout=None) as client:
        yield client


async def test_an_answer_is_read_whole(http: httpx2.AsyncClient, alice: Backend) -> None:
    """Path, query, headers and no body arrive; the connection is closed afterward."""
    answer = await http.get(f"{alice.url}/v1/models", params={"a": "b c"}, headers={"authorization": "Bearer key"})
    assert (answer.status_code, answer.json()["data"][0]["id"]) == (200, "test-model")
    assert answer.headers["content-type"] == "application/json"
    [asked] = alice.probes
    assert (asked.method, asked.target, asked.body) == ("GET", "/v1/models?a=b+c", b"")
    assert (asked.header("authorization"), asked.header("connection")) == ("Bearer key", "close")
    assert (asked.header("host"), asked.header("content-length")) == (alice.url.removeprefix("http://"), None)
    await until(lambda: alice.open_connections == 0)


async def test_a_body_is_sent(http: httpx2.AsyncClient, alice: Backend) -> None:
    """One of known length, one that is made on the way, and an empty one."""
    path = f"{alice.url}/v1/chat/completions"
    assert (await http.post(path, json={"model": "m"})).json()["model"] == "m"

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"model":'
        yield b'"m2"}'

    assert (await http.post(path, content=pieces())).json()["model"] == "m2"
    assert alice.last.header("transfer-encoding") is None
    await http.post(path)
    assert alice.last.header("content-length") == "0"


async def test_chunks_are_put_together(http: httpx2.AsyncClient, alice: Backend) -> None:
    """The answer states no coding that was undone already."""
    answer = await http.post(f"{alice.url}/v1/chat/completions", json={"model": "m", "stream": True})
    assert answer.content == bytes(alice.last.payload)
    assert "transfer-encoding" not in answer.headers


async def test_an_answer_to_head_has_no_body(http: httpx2.AsyncClient, alice: Backend) -> None:
    """Its length is that of another answer and is not waited for."""
    alice.behave = act.head_only()
    assert (await http.head(f"{alice.url}/v1/thing")).content == b""


@pytest.mark.parametrize("code", [301, 404, 500])
async def test_any_status_is_an_answer(http: httpx2.AsyncClient, alice: Backend, code: int) -> None:
    """Redirects are not followed, not even looked at."""
    alice.behave = act.answer(code, b"{}", headers=[("location", "http://[bad"), ("set-cookie", "a=b")])
    answer = await http.post(f"{alice.url}/v1/thing")
    assert (answer.status_code, answer.content, answer.next_request) == (code, b"{}", None)
    assert not http.cookies
    assert not {"location", "set-cookie"} & set(answer.headers)


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        (act.answer(200, b"x" * (MAX_PROBE_BYTES + 1)), "larger than 1 MiB"),
        (act.endless_body(), "larger than 1 MiB"),
        (act.gzip_bomb(), "compressed"),
        (act.encoded(), "compressed"),
        (act.truncated_body(), "before its answer was complete"),
        (act.reset_first(), "before its answer was complete"),
        (act.garbage(), "not HTTP"),
        (act.big_header(), "too large"),
    ],
)
async def test_a_bad_answer_raises_in_words(http: httpx2.AsyncClient, alice: Backend, behave: Behaviour, words: str) -> None:
    """[L10, H10] The message is fit for the owner of the server and bounded, as is the memory."""
    alice.behave = behave
    with pytest.raises(httpx2.RemoteProtocolError, match=words) as raised:
        await http.post(f"{alice.url}/v1/thing")
    assert raised.value.request.method == "POST"
    await until(lambda: alice.open_connections == 0)


async def test_an_answer_of_exactly_the_limit_is_read(http: httpx2.AsyncClient, alice: Backend) -> None:
    """1 MiB is allowed."""
    alice.behave = act.answer(200, b"x" * MAX_PROBE_BYTES)
    assert len((await http.post(f"{alice.url}/v1/thing")).content) == MAX_PROBE_BYTES


async def test_a_server_that_is_not_there_raises_connect_error(http: httpx2.AsyncClient) -> None:
    """In words, and with the cause for programs."""
    with pytest.raises(httpx2.ConnectError, match="refused") as raised:
        await http.get(f"http://127.0.0.1:{free_port()}/v1/models")
    assert isinstance(raised.value, ServerUnreachable)
    assert (raised.value.cause, raised.value.refusal) == (ConnectFailure.REFUSED, None)


async def test_nothing_private_is_dialled(alice: Backend) -> None:
    """[X01] Literals, names and names that change their mind: no connection is made through this door either."""
    answers = [["93.184.215.14", "127.0.0.1"], ["127.0.0.1"]]

    async def resolve(host: str, port: int) -> Sequence[str]:
        return answers.pop(0)

    wire = Wire(policy=AddressPolicy, resolve=resolve)
    async with httpx2.AsyncClient(transport=WireTransport(wire), trust_env=False) as http:
        for host in ("127.0.0.1", "[::1]", "alice.example", "alice.example"):
            with pytest.raises(ServerUnreachable, match="may not connect to this address") as raised:
                await http.get(f"http://{host}:{alice.port}/v1/models")
            assert (raised.value.cause, raised.value.refusal) == (ConnectFailure.REFUSED_ADDRESS, AddressRefusal.LOOPBACK)
    await wire.aclose()
    assert (alice.connections, answers) == (0, [])


@pytest.mark.parametrize("url", ["ftp://alice.example/v1", "http://0x7f.1/v1", "http://alice.example:22/", "unix://socket/v1"])
async def test_other_urls_are_refused(http: httpx2.AsyncClient, url: str) -> None:
    """The URL obeys the rules of registration."""
    with pytest.raises(httpx2.UnsupportedProtocol):
        await http.get(url)


@pytest.mark.parametrize("value", [b"Bearer a\r\nx-injected: 1", b"a\nb", b"a\0b"])
async def test_a_header_of_two_lines_is_not_sent(http: httpx2.AsyncClient, alice: Backend, value: bytes) -> None:
    """A stored key cannot smuggle a second header or request."""
    with pytest.raises(httpx2.LocalProtocolError):
        await http.get(f"{alice.url}/v1/models", headers=[(b"authorization", value)])
    assert alice.connections == 0


async def test_an_answer_that_takes_too_long_times_out(http: httpx2.AsyncClient, alice: Backend) -> None:
    """The read timeout bounds the whole answer, whether it is silent or endless."""
    alice.behave = act.stall()
    with pytest.raises(httpx2.ReadTimeout):
        await http.post(f"{alice.url}/v1/thing", timeout=0.05)
    await until(lambda: alice.aborted == 1)


async def test_cancelling_closes_the_connection(http: httpx2.AsyncClient, alice: Backend) -> None:
    """The owner of the timeout cancels; the server notices."""
    alice.behave = act.stall()
    asking = asyncio.ensure_future(http.post(f"{alice.url}/v1/thing"))
    await until(lambda: alice.hits == 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(lambda: alice.aborted == 1 and alice.open_connections == 0)


async def test_closing_the_wire_ends_a_request(alice: Backend) -> None:
    """Nobody waits for ever at the stop."""
    alice.behave = act.stall()
    wire = Wire(policy=lambda: OPEN)
    async with httpx2.AsyncClient(transport=WireTransport(wire), trust_env=False, timeout=None) as http:
        asking = asyncio.ensure_future(http.post(f"{alice.url}/v1/thing"))
        await until(lambda: alice.hits == 1)
        await wire.aclose()
        with pytest.raises(httpx2.RemoteProtocolError, match="shutting down"):
            await asking
