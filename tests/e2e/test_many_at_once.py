"""Many requests and streams at once, each byte compared with what the server sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import httpx2
import pytest

from e2e.deployment import Deployment
from support import answers, behaviours
from support.backends import Backend, Exchange
from support.processes import GatewayProcess
from support.sockets import until

pytestmark = pytest.mark.e2e

Deploy = Callable[..., Deployment]


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """Start a patient gateway: a slow machine takes its time until a hundred requests are there at once, and none may be sent twice."""
    with GatewayProcess({"MULTIVERSE_COUNT_STREAM_TOKENS": "false"}) as running:
        yield running


KINDS = pytest.mark.parametrize("http", ["1.1", "2"])


def words_of(body: bytes, count: int) -> list[str]:
    """Return text that only this request gets."""
    return [hashlib.sha256(body + str(number).encode()).hexdigest()[: 8 + number % 48] + " " for number in range(count)]


async def say_something_else_to_everybody(exchange: Exchange) -> None:
    """Answer with text made of the request's own bytes."""
    request, name = exchange.request, exchange.backend.name
    if request.wants_stream:
        events = [answers.chat_event(name, exchange.model, {"content": word}) for word in words_of(request.body, 60)]
        await behaviours.send_events(exchange, [*events, answers.chat_event(name, exchange.model, {}, finish="stop"), answers.DONE])
        return
    body = answers.body(request.path, speaker=name, model=exchange.model, text="".join(words_of(request.body, 400)))
    assert body is not None
    await exchange.answer(200, body)


def connect(deployment: Deployment, http: str) -> httpx2.AsyncClient:
    """Return a client that opens as many connections, or streams of one, as it is asked for."""
    limits = httpx2.Limits(max_connections=200, max_keepalive_connections=200)
    transport = httpx2.AsyncHTTPTransport(http1=http == "1.1", http2=http == "2", verify=False, trust_env=False, limits=limits)
    return httpx2.AsyncClient(transport=transport, base_url=deployment.gateway.url, timeout=30.0)


async def ask_all(deployment: Deployment, http: str, count: int, *, stream: bool) -> dict[str, bytes]:
    """Send so many requests at once; return the answers by the ids of the requests."""
    got: dict[str, bytes] = {}

    async def ask(client: httpx2.AsyncClient, number: int) -> None:
        identity = f"request-{http[0]}-{number}"
        body: dict[str, Any] = deployment.body(stream=stream, number=number)
        answer = await client.post("/v1/chat/completions", content=json.dumps(body).encode(), headers={"x-request-id": identity})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == identity
        got[identity] = answer.content

    with anyio.fail_after(30):
        async with connect(deployment, http) as client, anyio.create_task_group() as group:
            for number in range(count):
                group.start_soon(ask, client, number)
    return got


def check_bytes(deployment: Deployment, got: dict[str, bytes], count: int) -> None:
    """Check that each answer is, byte for byte, what a server sent for that request, and that both servers took part."""
    requests = [request for backend in deployment.backends for request in backend.requests]
    meant = {request.header("x-request-id"): bytes(request.payload) for request in requests}
    assert len(got) == len(requests) == count
    assert got == meant
    assert len(set(got.values())) == count
    assert all(backend.hits for backend in deployment.backends)


@KINDS
async def test_a_hundred_requests_at_once(deploy: Deploy, http: str) -> None:
    """PERF-TEST-001: nobody gets a byte of another's answer."""
    gate = behaviours.Gate()
    held = gate.held(say_something_else_to_everybody)
    deployment = deploy(Backend("one", held), Backend("two", held))
    async with anyio.create_task_group() as group:
        got: dict[str, bytes] = {}

        async def ask() -> None:
            got.update(await ask_all(deployment, http, 100, stream=False))

        group.start_soon(ask)
        await until(lambda: sum(backend.running for backend in deployment.backends) == 100, within=20, what="100 at once")
        gate.open()
    check_bytes(deployment, got, 100)


@KINDS
async def test_fifty_streams_at_once(deploy: Deploy, http: str) -> None:
    """TC-INF-005: nor an event of another's stream, however the servers cut their bytes."""
    gate = behaviours.Gate()
    held = gate.held(behaviours.in_pieces(say_something_else_to_everybody, largest=300))
    deployment = deploy(Backend("one", held), Backend("two", held))
    async with anyio.create_task_group() as group:
        got: dict[str, bytes] = {}

        async def ask() -> None:
            got.update(await ask_all(deployment, http, 50, stream=True))

        group.start_soon(ask)
        await until(lambda: sum(backend.running for backend in deployment.backends) == 50, within=20, what="50 at once")
        gate.open()
    check_bytes(deployment, got, 50)
    deployment.wait_for_quiet()


async def test_slow_and_quick_readers_get_the_same(deploy: Deploy) -> None:
    """A client that pauses holds up nobody, and misses nothing."""
    deployment = deploy(Backend("long", behaviours.good(events=3000)))
    slow, quick = b"", b""
    async with (
        connect(deployment, "1.1") as client,
        client.stream("POST", "/v1/chat/completions", json=deployment.body(stream=True)) as answer,
    ):
        pieces = answer.aiter_raw()
        slow += await anext(pieces)
        quick = (await client.post("/v1/chat/completions", json=deployment.body(stream=True))).content
        async for piece in pieces:
            slow += piece
    assert slow == quick == bytes(deployment.backends[0].last.payload)
