"""Attacks by servers, and by clients through servers: what one request or one server may cost the others; real sockets and processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import httpx2
import pytest

from e2e.deployment import Deployment
from support import answers, behaviours
from support.backends import Backend, Behaviour, Exchange
from support.h2_client import H2Client
from support.processes import DOORS, Door, GatewayProcess, door_setting
from support.raw_client import RawClient
from support.sockets import serving, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True, scope="module")]

Deploy = Callable[..., Deployment]
EMBEDDING = answers.body("/v1/embeddings", speaker="e", model="m")
assert EMBEDDING is not None
PLAIN = {"/v1/embeddings": EMBEDDING, "/v1/rerank": b'{"results": []}', "/v1/audio/speech": b'{"audio": ""}', "/v1/score": b'{"data": []}'}


# A request that kills servers (S5)


@pytest.mark.parametrize("stateful", [False, True])
def test_a_request_that_kills_servers_reaches_three_at_most(deploy: Deploy, stateful: bool) -> None:
    """Kept connections do not multiply it; a request that may leave something behind reaches one server once, and is final."""

    async def behave(exchange: Exchange) -> None:
        await (behaviours.eof_first() if exchange.request.asked("temperature") == 2 else behaviours.good())(exchange)

    deployment = deploy(*(Backend(f"server-{number}", behave) for number in range(3)))
    for _ in range(9):
        assert deployment.ask().status_code == 200  # each server has a kept connection now
    before = sum(backend.hits for backend in deployment.backends)
    answer = deployment.ask(temperature=2, **({"store": True} if stateful else {}))
    hits = sum(backend.hits for backend in deployment.backends) - before
    assert answer.status_code == 504
    assert answer.headers["x-multiverse-attempts"] == str(hits)
    assert hits == 1 if stateful else 1 < hits <= 3


def test_a_stream_that_kills_servers_reaches_three_at_most(door: Door) -> None:
    """The attempt without the field that the gateway had added is one of them: a server whose model crashes answers 500, as Ollama does."""

    async def behave(exchange: Exchange) -> None:
        await (behaviours.status(500) if exchange.request.asked("temperature") == 2 else behaviours.good())(exchange)

    backends = [Backend(f"server-{number}", behave) for number in range(3)]
    with small_gateway(door) as gateway, serving(*backends):
        for backend in backends:
            gateway.register("tiny", backend.url)
        assert gateway.chat("tiny", stream=True, temperature=2).status_code == 504
        assert 1 < sum(backend.hits for backend in backends) <= 3


def test_a_stale_connection_costs_no_request(deploy: Deploy) -> None:
    """A server that closes its kept connections is asked again on a new one, and not blamed."""
    deployment = deploy(Backend("restarted"))
    assert deployment.ask().status_code == 200
    (backend,) = deployment.backends
    backend.behave = [behaviours.eof_first(), behaviours.good()]
    answer = deployment.ask()
    assert (answer.status_code, answer.headers["x-multiverse-attempts"]) == (200, "2")
    assert deployment.state() == "healthy"


# What the client chose (S4)


@pytest.mark.parametrize("path", sorted(PLAIN))
def test_a_stream_that_a_path_does_not_have_is_answered_plainly(deploy: Deploy, path: str) -> None:
    """As often as one likes: all servers stay, and other clients are served."""
    deployment = deploy(*(Backend(name, behaviours.answer(200, PLAIN[path])) for name in ("one", "two")))
    for _ in range(8):
        answer = deployment.client.post(path, json={"model": deployment.model, "input": "x", "stream": True})
        assert (answer.status_code, answer.content) == (200, PLAIN[path])
        assert answer.headers["x-multiverse-attempts"] == "1"
    assert [deployment.state(number) for number in range(2)] == ["healthy", "healthy"]


def test_a_transcription_that_ignores_stream_is_relayed(deploy: Deploy) -> None:
    """The same for a form."""
    deployment = deploy(Backend("whisper", behaviours.answer(200, b'{"text": "hello"}')))
    for _ in range(4):
        form = {"model": deployment.model, "stream": "true"}
        answer = deployment.client.post("/v1/audio/transcriptions", data=form, files={"file": ("a.wav", b"RIFF")})
        assert (answer.status_code, answer.json()) == (200, {"text": "hello"})
    assert deployment.state() == "healthy"


def repeat(sentence: str, status: int) -> Behaviour:
    """Refuse a request with a sentence that repeats the id, the tool or the voice that it names."""

    async def behave(exchange: Exchange) -> None:
        body = exchange.request.json
        said = body.get("previous_response_id") or body.get("voice") or body["tools"][0]["function"]["name"]
        await exchange.answer(status, answers.error_body(sentence.format(said)))

    return behave


@pytest.mark.parametrize("status", [400, 404, 422])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/audio/speech", {"voice": "my model voice"}),
        ("/v1/chat/completions", {"tools": [{"function": {"name": "find a model"}}], "messages": []}),
    ],
)
def test_words_that_a_server_repeats_take_it_from_nobody(deploy: Deploy, status: int, path: str, fields: dict[str, Any]) -> None:
    """No server rests or is taken out, whatever a client makes it say."""
    deployment = deploy(*(Backend(name, repeat("There is no '{}'; it was not found", status)) for name in ("one", "two")))
    for _ in range(4):
        answer = deployment.client.post(path, json={"model": deployment.model, **fields})
        assert answer.status_code == status
    records = [deployment.record(number) for number in range(2)]
    assert [(record["state"], record["resting"]) for record in records] == [("healthy", False)] * 2


@pytest.mark.parametrize("status", [400, 404, 422])
def test_the_words_of_a_response_id_take_its_server_from_nobody(deploy: Deploy, status: int) -> None:
    """The server that made the response repeats the id in its refusal: that speaks of the response, not of the model."""
    name = "resp_ model m"
    made = behaviours.answer(200, json.dumps({"id": name, "output": []}).encode())
    deployment = deploy(Backend("one", [made, repeat("There is no '{}'; it was not found", status)]))
    assert deployment.client.post("/v1/responses", json={"model": deployment.model}).status_code == 200
    for _ in range(4):
        answer = deployment.client.post("/v1/responses", json={"model": deployment.model, "previous_response_id": name})
        assert (answer.status_code, name in answer.text) == (status, True)
    assert (deployment.record()["state"], deployment.record()["resting"]) == ("healthy", False)


# Floods of events (S7)


FLOODS = {
    "blank lines": b"\n\n" * 5000,
    "returns": b"\r\r" * 5000,
    "comments": b": x\n\n" * 5000,
    "empty events": b"data:{}\n\n" * 5000,
    "heartbeats": b"data:\n\n" * 5000,
}


def flood(data: bytes) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.chunk(answers.chat_event("one", "m", {"content": "Hello"}))
        while True:
            await exchange.chunk(data)

    return behave


def tiny_chunks() -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.start_stream()
        while True:
            await exchange.send(b"1\r\nx\r\n" * 5000)

    return behave


@pytest.mark.parametrize("kind", [*FLOODS, "chunks of a byte"])
def test_floods_of_events_do_not_keep_others_waiting(deploy: Deploy, kind: str) -> None:
    """Eight streams as fast as they come, and the requests of others run beside them."""
    hostile = deploy(Backend("hostile", tiny_chunks() if kind == "chunks of a byte" else flood(FLOODS[kind])))
    good = deploy(Backend("good"))
    with ExitStack() as open_clients:
        clients = [open_clients.enter_context(RawClient(hostile.gateway.port)) for _ in range(8)]
        for client in clients:
            hostile.begin(client, stream=True)
        wait_until(lambda: hostile.backends[0].hits == 8, within=10.0)
        for _ in range(20):
            assert good.ask().status_code == 200
    hostile.wait_for_quiet(within=5.0)


# Answers that nobody reads (S6)


LARGE = json.dumps({"object": "list", "data": [], "text": "x" * (4 << 20)}).encode()
BUDGET = 16 << 20


@contextmanager
def small_gateway(door: Door, **settings: str) -> Iterator[GatewayProcess]:
    """Run a gateway of its own."""
    with GatewayProcess({**door_setting(door), **settings}) as gateway:
        yield gateway


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/rerank"])
def test_answers_that_nobody_reads_take_no_more_than_their_budget(door: Door, path: str) -> None:
    """Beyond it 503 with Retry-After; once their clients are gone, there is room again."""
    backend = Backend("large", behaviours.answer(200, LARGE))
    with small_gateway(door, ANSWER_BUDGET_BYTES=str(BUDGET)) as gateway, serving(backend):
        registration = gateway.register("tiny", backend.url)
        before = gateway.memory_bytes()
        with ExitStack() as open_clients:
            clients = [open_clients.enter_context(RawClient(gateway.port, receive_buffer=4096)) for _ in range(24)]
            for client in clients:
                client.request("POST", path, json={"model": "tiny", "messages": []})
            wait_until(lambda: backend.hits == len(clients), within=20.0)
            refused = httpx2.post(gateway.url + path, json={"model": "tiny", "messages": []}, trust_env=False, timeout=20.0)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert "retry-after" in refused.headers
            assert gateway.memory_bytes() - before < BUDGET + (24 << 20)
            assert gateway.server(registration)["state"] == "healthy"
        wait_until(lambda: answer_bytes(gateway) == 0, within=10.0)
        accepted = httpx2.post(gateway.url + path, json={"model": "tiny", "messages": []}, trust_env=False, timeout=20.0)
        assert (accepted.status_code, accepted.content) == (200, LARGE)


def answer_bytes(gateway: GatewayProcess) -> int:
    """Return what the gateway says that it holds of answers."""
    text = httpx2.get(f"{gateway.url}/metrics", trust_env=False).text
    (line,) = [line for line in text.splitlines() if line.startswith("multiverse_answer_bytes ")]
    return int(float(line.split()[1]))


# A pause of the gateway's process (S9)


TIMEOUT_SECONDS = "3"
"""Of the gateway that is stopped: a busy machine may take a second of it before the pause begins, and after it."""
PAUSE_SECONDS = 4.0


@pytest.mark.parametrize("kind", ["stream", "plain", "silent"])
def test_a_stopped_gateway_blames_no_server_for_the_time(door: Door, kind: str) -> None:
    """What came meanwhile is read before anything times out: no stream is cut, no request fails."""
    settings = {f"{name}_TIMEOUT_SECONDS": TIMEOUT_SECONDS for name in ("IDLE", "FIRST_BYTE", "CONNECT", "REQUEST")}
    resumed = threading.Event()
    behave = {
        "stream": behaviours.held_stream(resumed),
        "plain": behaviours.held(resumed, b'content-length: 9\r\n\r\n{"id"', b":1 }"),
        "silent": behaviours.held(resumed, b"", b'content-length: 9\r\n\r\n{"id":1 }'),
    }[kind]
    backend = Backend("slow", behave)
    with small_gateway(door, **settings) as gateway, serving(backend):
        registration = gateway.register("tiny", backend.url)
        with RawClient(gateway.port, timeout=20.0) as client:
            client.request("POST", "/v1/chat/completions", json={"model": "tiny", "messages": [], "stream": kind == "stream"})
            if kind == "stream":
                client.read_event()
            else:
                wait_until(lambda: backend.hits == 1)
            gateway.pause()
            resumed.wait(PAUSE_SECONDS)
            resumed.set()
            wait_until(lambda: backend.last.ended_at is not None)
            gateway.resume()
            response = client.read_response()
        assert (response.status, response.complete) == (200, True)
        assert response.body.endswith(b"[DONE]\n\n" if kind == "stream" else b":1 }")
        assert gateway.server(registration)["state"] == "healthy"


@pytest.mark.parametrize("kind", ["head", "body", "admin", "HTTP/2"])
def test_a_stopped_gateway_gives_requests_their_time(door: Door, kind: str) -> None:
    """S9: the rest of a request lies in the socket when the process goes on, whichever door reads it."""
    settings = {f"MULTIVERSE_CLIENT_{part}_TIMEOUT_SECONDS": TIMEOUT_SECONDS for part in ("BODY", "HEAD")}
    backend = Backend("well")
    with small_gateway(door, **settings) as gateway, serving(backend):
        gateway.register("tiny", backend.url)
        fields = {"model_name": "tiny", "endpoint_url": backend.url} if kind == "admin" else {"model": "tiny", "messages": []}
        body = json.dumps(fields).encode()
        send: Callable[[], None]
        status: Callable[[], int]
        with ExitStack() as open_clients:
            if kind == "HTTP/2":
                client = open_clients.enter_context(H2Client(gateway.port))
                stream = client.ask("POST", "/v1/chat/completions", body[:9], end=False, headers=[("content-type", "application/json")])
                send, status = partial(client.send_body, stream, body[9:]), partial(client.status, stream)
            else:
                raw = open_clients.enter_context(RawClient(gateway.port, timeout=20.0))
                path = "/admin/register" if kind == "admin" else "/v1/chat/completions"
                key = f"x-api-key: {gateway.admin_key}"
                head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{key}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                request = head.encode() + body
                begun = 9 if kind == "head" else len(head) + 9
                raw.send(request[:begun])
                send, status = partial(raw.send, request[begun:]), lambda: raw.read_response().status
            threading.Event().wait(0.3)  # until what was sent has been read: the time of the rest runs
            gateway.pause()
            send()
            threading.Event().wait(PAUSE_SECONDS)
            gateway.resume()
            assert status() in (200, 201)
