"""Seeing the queue: `GET /v1/queue`, and streams that tell in comments where they stand. At both doors, and over HTTP/2."""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import h2.events
import httpx2
import pytest

from support import behaviours
from support.backends import Backend
from support.busy import CHAT, Busy, check_program
from support.h2_client import H2Client
from support.processes import DOORS, Door, GatewayProcess, door_setting
from support.raw_client import RawClient
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

ONE, OTHER = ("a-key-of-one-person-000000000000001", "a-key-of-the-other-0000000000000002")
PROGRAMS = Path(__file__).parent / "programs"
ORIGIN = "https://class.example"
FIELDS = [("authorization", f"Bearer {ONE}"), ("content-type", "application/json"), ("x-multiverse-queue", "comments")]
WAITING = b': queue {"position":1,"waiting":1,"about_seconds":null}\n'


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    """Return a gateway with two client keys that pages of another origin may use."""
    door: Door = request.param
    settings = {
        "CLIENT_API_KEYS": f"{ONE},{OTHER}",
        "REQUIRE_CLIENT_AUTH": "true",
        "ENABLE_CORS": "true",
        "CORS_ORIGINS": ORIGIN,
        **door_setting(door),
    }
    with GatewayProcess(settings) as process:
        yield process


@pytest.fixture
def open_gateway(gateways: Callable[[Door], GatewayProcess]) -> GatewayProcess:
    """Return the shared gateway, which needs no key."""
    return gateways("direct")


@pytest.fixture
def busy(gateway: GatewayProcess, request: pytest.FixtureRequest) -> Iterator[Busy]:
    """Return a busy model."""
    with ExitStack() as connections:
        yield Busy(gateway, request.node.name.split("[")[0], connections, key=ONE)


def read_until(client: RawClient, wanted: bytes) -> bytes:
    """Read until the body contains a text; return the body."""
    while wanted not in client.response.body:
        assert client.read_more(), client.response.body
    return client.response.body


def told(body: bytes) -> dict[str, str]:
    """Return what the last comment before the first event says of the headers; the comment ends with one line end."""
    comments, _, events = body.partition(b"data: ")
    lines = comments.splitlines(keepends=True)
    assert all(line.startswith(b": ") and line.endswith(b"}\n") for line in lines), "only comments, and no blank line"
    assert events
    found: dict[str, str] = json.loads(lines[-1].removeprefix(b": headers "))
    return found


def test_a_waiting_stream_tells_its_place(busy: Busy) -> None:
    """The head comes with the first comment, and the server's stream follows, byte for byte."""
    client = busy.ask()
    assert read_until(client, b"\n") == WAITING
    head = client.response
    assert (head.status, head.header("content-type"), head.header("cache-control")) == (200, "text/event-stream", "no-store")
    assert head.header("x-request-id")
    assert head.header("x-multiverse-attempts") is None
    busy.gate.open()
    answer = client.read_response()
    assert answer.complete
    assert answer.data[-1] == "[DONE]"
    headers = told(answer.body)
    assert headers["x-multiverse-attempts"] == "1"
    assert headers["x-gateway-server-id"] == headers["x-multiverse-server"]
    assert int(headers["x-multiverse-queued-ms"]) >= 1000
    assert b"\n:" not in answer.body.partition(b"data: ")[2], "no comment after the first event"


def test_the_same_over_http_2(busy: Busy) -> None:
    """The first comment is not held back, and neither is what follows."""
    with H2Client(busy.gateway.port) as client:
        stream = client.ask("POST", CHAT, json.dumps(busy.body(stream=True)).encode(), headers=FIELDS)
        assert client.status(stream) == 200
        first = client.read(h2.events.DataReceived, stream)
        assert isinstance(first, h2.events.DataReceived)
        assert first.data == WAITING
        busy.gate.open()
        body = WAITING + client.body(stream)
    assert told(body)["x-multiverse-attempts"] == "1"
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_openais_library_reads_a_stream_with_comments(open_gateway: GatewayProcess, kind: str) -> None:
    """It sees the events alone, and raises an error that comes after the head. `nox -s clients` tries other libraries and versions."""
    check_program(open_gateway, f"library-{kind}", [sys.executable, str(PROGRAMS / "waiting_openai.py"), kind])


def test_without_the_header_nothing_is_sent_while_it_waits(busy: Busy) -> None:
    """Nor for another value, nor for a plain answer."""
    clients = [busy.ask(comments="yes"), busy.ask(stream=False), busy.ask()]
    read_until(clients[2], b"\n")
    assert select.select([client.socket for client in clients[:2]], [], [], 0)[0] == [], "nothing has arrived"
    busy.gate.open()
    for client in clients[:2]:
        answer = client.read_response()
        assert answer.status == 200
        assert answer.header("x-multiverse-attempts") == "1"
        assert not answer.body.startswith(b":")


def test_a_slow_prefill_is_commented_and_may_fail_over(gateway: GatewayProcess) -> None:
    """The first server fails after the head was sent; the second one answers in the same response."""
    model, gate = "prefill", behaviours.Gate()
    first, second = (Backend(f"{model}-{number}", models=(model,)) for number in (1, 2))
    for server in (first, second):
        server.behave = gate.held(behaviours.status(500))
    with serving(first, second), RawClient(gateway.port) as client:
        for server in (first, second):
            gateway.register(model, server.url)
        body = {"model": model, "messages": [], "stream": True}
        client.request("POST", CHAT, json=body, headers=[("authorization", f"Bearer {ONE}"), ("x-multiverse-queue", "comments")])
        assert read_until(client, b"\n") == b': prefill {"attempt":1}\n'
        (second if first.running else first).behave = behaviours.good()
        gate.open()
        answer = client.read_response()
    assert (answer.complete, answer.data[-1]) == (True, "[DONE]")
    assert told(answer.body)["x-multiverse-attempts"] == "2"


def test_a_client_that_leaves_gives_up_its_place(busy: Busy) -> None:
    """Also after the head was sent."""
    client = busy.ask()
    read_until(client, b"\n")
    assert busy.waiting() == 1
    client.abort()
    wait_until(lambda: busy.waiting() == 0)
    busy.gate.open()


@pytest.mark.parametrize("how", ["timeout", "shutdown"])
@pytest.mark.parametrize("door", DOORS)
def test_an_error_after_the_head_comes_in_the_stream(door: Door, how: str) -> None:
    """The libraries raise it; there is no `[DONE]`. The body ends properly: browsers drop what a broken one held last."""
    settings = {"CLIENT_API_KEYS": ONE, "MULTIVERSE_QUEUE_TIMEOUT_SECONDS": "2" if how == "timeout" else "60", **door_setting(door)}
    with GatewayProcess(settings) as gateway, ExitStack() as connections:
        busy = Busy(gateway, "ending", connections, key=ONE)
        client = busy.ask()
        read_until(client, b"\n")
        second = connections.enter_context(H2Client(gateway.port))
        stream = second.ask("POST", CHAT, json.dumps(busy.body(stream=True)).encode(), headers=FIELDS)
        second.read(h2.events.DataReceived, stream)
        if how == "shutdown":
            gateway.terminate()
        answer = client.read_response()
        ending = second.body(stream)
        busy.gate.open()
    assert (answer.status, answer.complete) == (200, True)
    comments = answer.body.partition(b"data: ")[0]
    assert comments.startswith(WAITING)
    for body in (answer.body.removeprefix(comments), ending[ending.index(b"data: ") :]):
        assert body.endswith(b"}\n\n")
        error = json.loads(body.removeprefix(b"data: "))["error"]
        assert error["code"] == {"timeout": "overloaded", "shutdown": "gateway_shutting_down"}[how]
        assert error["type"] == "service_unavailable_error"


def test_the_queue_shows_everybody_how_full_it_is_and_each_caller_its_own_requests(busy: Busy) -> None:
    """A caller is a key; no other one sees a request's id or place. The other has used less, and is next."""
    busy.ask(headers={"x-request-id": "mine-1"})
    wait_until(lambda: busy.waiting() == 1)
    busy.ask(OTHER, headers={"x-request-id": "theirs", "x-multiverse-priority": "bulk"})
    wait_until(lambda: busy.waiting() == 2)
    shown = {"model": busy.model, "slots": 1, "running": 1, "waiting": 2, "people_waiting": 2}
    mine, theirs = busy.queue(), busy.queue(OTHER)
    assert list(mine) == ["object", "data", "yours"]
    assert mine["object"] == "list"
    for answer in (mine, theirs):
        assert [entry for entry in answer["data"] if entry["model"] == busy.model] == [shown]
    waited = mine["yours"][0].pop("waited_seconds")
    assert 0 <= waited < 30
    common = {"model": busy.model, "waiting": 2, "about_seconds": None}
    assert mine["yours"] == [{"request_id": "mine-1", "position": 2, "priority": "interactive", **common}]
    assert [(entry["request_id"], entry["position"], entry["priority"]) for entry in theirs["yours"]] == [("theirs", 1, "bulk")]
    busy.gate.open()
    wait_until(lambda: busy.queue()["yours"] == [])


def test_a_key_sees_the_models_that_it_may_use(busy: Busy) -> None:
    """As in the list of models."""
    made = busy.gateway.admin("POST", "/keys", {"name": "other", "models": ["another-model"]})
    assert made.status_code == 201, made.text
    busy.ask()
    wait_until(lambda: busy.waiting() == 1)
    assert busy.queue(made.json()["key"]) == {"object": "list", "data": [], "yours": []}
    busy.gate.open()


def test_the_queue_is_read_as_its_siblings_are(gateway: GatewayProcess) -> None:
    """HEAD as GET without its body, 405 for what it does not have, 401 without a key, and CORS for the origins that may use the API."""
    key = {"authorization": f"Bearer {ONE}"}

    def call(method: str, path: str = "/v1/queue", **headers: str) -> httpx2.Response:
        return gateway.call(method, path, headers={**key, **headers})

    assert (call("HEAD").status_code, call("HEAD").content) == (200, b"")
    for method in ("POST", "PUT", "DELETE"):
        refused = call(method)
        assert (refused.status_code, set(refused.headers["allow"].split(", "))) == (405, {"GET", "HEAD"}), method
    assert call("GET", "/v1/queue/more").status_code == 404
    assert call("GET", "/v1//queue/").json()["object"] == "list"
    assert gateway.call("GET", "/v1/queue").status_code == 401
    allowed = call("GET", origin=ORIGIN)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert (allowed.headers["cache-control"], allowed.headers["x-content-type-options"]) == ("no-store", "nosniff")
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-multiverse-queue"}
    preflight = gateway.call("OPTIONS", CHAT, headers={"origin": ORIGIN, **asked})
    assert preflight.status_code == 200
    assert "x-multiverse-queue" in preflight.headers["access-control-allow-headers"]


def test_strangers_are_told_apart_by_their_addresses() -> None:
    """Without keys, `yours` are the requests of the same address."""
    settings = {"TRUSTED_PROXIES": "127.0.0.1/32"}
    with GatewayProcess(settings) as gateway, ExitStack() as connections:
        busy = Busy(gateway, "open", connections)
        busy.ask(headers={"authorization": "none", "x-forwarded-for": "203.0.113.7", "x-request-id": "mine"})
        wait_until(lambda: busy.waiting() == 1)
        seen = {}
        for address in ("203.0.113.7", "203.0.113.8"):
            shown = gateway.call("GET", "/v1/queue", headers={"x-forwarded-for": address}).json()
            seen[address] = [entry["request_id"] for entry in shown["yours"]]
        assert seen == {"203.0.113.7": ["mine"], "203.0.113.8": []}
        busy.gate.open()
