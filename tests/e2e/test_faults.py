"""What servers do to a request before the first byte of its answer: the rows F of the fault matrix."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Literal

import httpx2
import openai
import pytest

from e2e.deployment import FIRST_BYTE_SECONDS, Deployment, error_of
from support import answers, behaviours
from support.backends import Backend, Outcome
from support.processes import GatewayProcess
from support.sockets import BlackHole, wait_until

pytestmark = pytest.mark.e2e

Deploy = Callable[..., Deployment]


def text_of(answer: httpx2.Response) -> str:
    """Return what a chat answer says; it names the server."""
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_server_that_refuses_connections_is_left_out_at_once(deploy: Deploy) -> None:
    """F01: answers come from the others, and the server is unhealthy after one attempt."""
    deployment = deploy(Backend("gone"), Backend("two"), Backend("three"))
    deployment.backends[0].crash()
    answers_got = [deployment.ask() for _ in range(12)]
    assert {text_of(answer).split()[0] for answer in answers_got} == {"two", "three"}
    assert sum(int(answer.headers["x-multiverse-attempts"]) - 1 for answer in answers_got) == 1
    assert deployment.record(0)["health_status"] == "unhealthy"


@pytest.mark.skipif(sys.platform != "linux", reason="a full queue of connections is silent on Linux only")
def test_a_black_hole_costs_one_connect_timeout(deploy: Deploy, gateway: GatewayProcess) -> None:
    """F02: a server that does not even accept is given up after the connect timeout, and another server answers."""
    deployment = deploy(Backend("swallowed"), Backend("good"))
    deployment.keep_down()
    swallowed = deployment.backends[0]
    swallowed.crash()
    with BlackHole(port=swallowed.port):
        answers_got = [deployment.ask() for _ in range(2)]
    assert {text_of(answer).split()[0] for answer in answers_got} == {"good"}
    assert deployment.record(0)["health_status"] == "unhealthy"


@pytest.mark.parametrize("stream", [False, True])
def test_a_silent_server_is_given_up_at_the_first_byte_timeout(deploy: Deploy, stream: bool) -> None:
    """F03: its connection is closed before the next attempt begins."""
    deployment = deploy(Backend("silent", behaviours.stall()), Backend("good"))
    silent, good = deployment.backends
    answer = deployment.ask_until_tried(silent, stream=stream)
    assert answer.status_code == 200
    assert answer.headers["x-multiverse-attempts"] == "2"
    wait_until(lambda: silent.last.ended_at is not None)
    assert silent.last.outcome is Outcome.ABORTED
    assert silent.last.ended_at is not None
    assert silent.last.ended_at <= good.last.received_at + 0.05  # what one thread sees of two connections may lag a little
    allowed = FIRST_BYTE_SECONDS * (1.0 if stream else 1.512)  # a plain answer may have 512 tokens, and comes whole
    assert allowed - 0.1 <= silent.last.ended_at - silent.last.received_at <= allowed + 0.5
    assert deployment.state(0) == "healthy"


def test_a_silent_server_alone(deploy: Deploy) -> None:
    """F03, TC-INF-006: 504 as soon as a probe fails, too, and the client need not try again."""
    deployment = deploy(Backend("silent", behaviours.stall()))
    deployment.keep_down()
    answer = deployment.ask()
    assert answer.status_code == 504
    assert error_of(answer)["code"] == "upstream_timeout"
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "fault",
    [behaviours.reset_first(), behaviours.eof_first(), behaviours.garbage(), behaviours.partial_head(), behaviours.truncated_body()],
    ids=["reset", "eof", "garbage", "partial head", "truncated body"],
)
def test_a_connection_that_breaks_before_the_answer(deploy: Deploy, fault: behaviours.Behaviour) -> None:
    """F04: the client gets the answer of another server; a probe decides at once whether the first one is down."""
    deployment = deploy(Backend("broken", fault), Backend("good"))
    deployment.keep_down()
    assert text_of(deployment.ask_until_tried(deployment.backends[0])).startswith("good")
    wait_until(lambda: deployment.record(0)["health_status"] == "unhealthy", within=5.0, what="the server was not probed at once")
    assert deployment.in_flight() == 0


@pytest.mark.parametrize("code", [500, 502, 504, 599])
def test_one_server_error_is_one_strike(deploy: Deploy, code: int) -> None:
    """F06: another server answers, and the first one stays healthy."""
    deployment = deploy(Backend("shaky", [behaviours.status(code), behaviours.good()]), Backend("good"))
    assert text_of(deployment.ask_until_tried(deployment.backends[0])).startswith("good")
    assert deployment.state(0) == "healthy"
    assert text_of(deployment.ask_until_tried(deployment.backends[0])).startswith("shaky")


def test_no_more_than_three_servers_are_tried(deploy: Deploy, gateway: GatewayProcess) -> None:
    """F07: three attempts on three servers, a 504 that tells their status, and a client that does not try again by itself."""
    deployment = deploy(*(Backend(f"number {number}", behaviours.status(500)) for number in range(4)))
    with openai.OpenAI(base_url=gateway.base_url, api_key="anything") as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=deployment.model, messages=[{"role": "user", "content": "Hello"}])
    assert caught.value.status_code == 504
    assert caught.value.code == "upstream_timeout"
    assert "(3 attempts: status 500)" in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.headers["x-multiverse-attempts"] == "3"
    assert sorted(backend.hits for backend in deployment.backends) == [0, 1, 1, 1]


@pytest.mark.parametrize("code", [400, 402, 409, 413, 415, 422, 451])
def test_the_clients_own_mistakes_are_its_own(deploy: Deploy, code: int) -> None:
    """F08: status, body and content type arrive unchanged after one attempt; nobody is blamed, and a good request is answered."""
    body = b'{"detail" :  [ {"msg":"context too long \xc3\xa4","n": 1.50e+3} ]}\n'
    mistake = behaviours.answer(code, body, content_type="application/problem+json; charset=utf-8")
    deployment = deploy(Backend("one", mistake), Backend("two", mistake))
    for _ in range(20):
        answer = deployment.ask()
        assert (answer.status_code, answer.content) == (code, body)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-multiverse-attempts"] == "1"
    assert [deployment.state(0), deployment.state(1)] == ["healthy", "healthy"]
    assert sum(backend.hits for backend in deployment.backends) == 20
    for backend in deployment.backends:
        backend.behave = behaviours.good()
    assert deployment.ask().status_code == 200


def test_a_context_that_is_too_long_is_said_a_hundred_times(deploy: Deploy) -> None:
    """F08: a hundred 400 in a row change nothing about the servers."""
    deployment = deploy(Backend("one", behaviours.context_too_long()))
    bodies = {deployment.ask().content for _ in range(100)}
    assert len(bodies) == 1
    assert json.loads(bodies.pop())["error"]["code"] == "context_length_exceeded"
    assert deployment.state() == "healthy"
    deployment.backends[0].behave = behaviours.good()
    assert deployment.ask().status_code == 200


def test_a_busy_server_rests(deploy: Deploy) -> None:
    """F10: another server answers at once; the busy one rests as long as it asked, and is not unhealthy."""
    deployment = deploy(Backend("busy", behaviours.status(429, retry_after=3)), Backend("good"))
    assert text_of(deployment.ask_until_tried(deployment.backends[0])).startswith("good")
    record = deployment.record(0)
    assert (record["state"], record["resting"]) == ("healthy", True)
    for _ in range(4):
        assert deployment.ask().headers["x-multiverse-attempts"] == "1"
    assert deployment.backends[0].hits == 1
    deployment.backends[0].behave = behaviours.good()
    wait_until(lambda: not deployment.record(0)["resting"], within=4)
    assert text_of(deployment.ask_until_tried(deployment.backends[0])).startswith("busy")


def test_a_busy_server_alone_says_when(deploy: Deploy) -> None:
    """F10: 429 with the seconds that are left, and again without asking the server."""
    deployment = deploy(Backend("busy", behaviours.status(429, retry_after=3)))
    first = deployment.ask()
    assert first.status_code == 429
    assert 1 <= int(first.headers["retry-after"]) <= 3
    assert error_of(first)["type"] == "rate_limit_error"
    second = deployment.ask()
    assert (second.status_code, error_of(second)["code"]) == (429, "upstream_busy")
    assert 1 <= int(second.headers["retry-after"]) <= 3
    assert deployment.backends[0].hits == 1


def test_the_later_of_two_pauses_holds(deploy: Deploy) -> None:
    """F11: a second answer that asks for less does not shorten the rest."""
    gates = [behaviours.Gate(), behaviours.Gate()]
    pauses = [gates[0].held(behaviours.status(429, retry_after=30)), gates[1].held(behaviours.status(429, retry_after=1))]
    deployment = deploy(Backend("busy", pauses))
    got: list[httpx2.Response] = []
    threads = [threading.Thread(target=lambda: got.append(deployment.ask())) for _ in gates]
    for thread in threads:
        thread.start()
    wait_until(lambda: deployment.backends[0].hits == 2)
    for number, gate in enumerate(gates):
        gate.open()
        wait_until(lambda number=number: len(got) == number + 1)  # type: ignore[misc]
    for thread in threads:
        thread.join(10)
    assert {answer.status_code for answer in got} == {429}
    assert 20 <= int(deployment.ask().headers["retry-after"]) <= 30


def past() -> str:
    """Return an HTTP date an hour ago."""
    return format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("soon", 1, 2),
        ("-5", 1, 2),
        ("1e3", 1, 2),
        ("", 1, 2),
        ("1000000000", 55, 60),
        ("9" * 400, 1, 60),
        (past(), 1, 2),
        ("Thu, 99 Nonsense 2026 25:61:61 GMT", 1, 2),
    ],
    ids=["words", "negative", "exponent", "empty", "huge", "endless", "past", "nonsense"],
)
def test_an_odd_retry_after_has_bounds(deploy: Deploy, said: str, least: int, most: int) -> None:
    """F12: garbage means the default, and nothing means more than 60 s."""
    deployment = deploy(Backend("busy", behaviours.status(429, retry_after=said)))
    assert deployment.ask().status_code == 429
    assert least <= int(deployment.ask().headers["retry-after"]) <= most
    assert deployment.state() == "healthy"


def test_a_server_that_loads_its_model_rests(deploy: Deploy) -> None:
    """F13: busy is not sick."""
    deployment = deploy(Backend("loading", behaviours.loading()), Backend("good"))
    assert text_of(deployment.ask_until_tried(deployment.backends[0])).startswith("good")
    record = deployment.record(0)
    assert (record["state"], record["resting"]) == ("healthy", True)


@pytest.mark.parametrize("style", ["openai", "ollama", "ollama-native", "vllm"])
def test_a_missing_model_rests_alone(
    deploy: Deploy, gateway: GatewayProcess, style: Literal["openai", "ollama", "ollama-native", "vllm"]
) -> None:
    """F14: the server keeps serving its other models, and this one's requests go elsewhere."""
    deployment = deploy(Backend("partial"), Backend("good"))
    partial = deployment.backends[0]
    partial.behave = behaviours.for_model(deployment.model, behaviours.model_not_found(style))
    other = gateway.register(f"{deployment.model}-other", partial.url)
    assert text_of(deployment.ask_until_tried(partial)).startswith("good")
    hits = partial.hits
    assert [text_of(deployment.ask()).split()[0] for _ in range(4)] == ["good"] * 4
    assert partial.hits == hits
    assert deployment.record(0)["health_status"] == "healthy"
    assert text_of(gateway.chat(f"{deployment.model}-other")).startswith("partial")
    assert not gateway.server(other)["resting"]
    gateway.admin("DELETE", f"/servers/{other}")


@pytest.mark.parametrize("style", ["openai", "ollama", "ollama-native", "vllm"])
def test_a_model_that_no_server_has_is_404(deploy: Deploy, style: Literal["openai", "ollama", "ollama-native", "vllm"]) -> None:
    """F14: with the body of the last server."""
    deployment = deploy(Backend("partial", behaviours.model_not_found(style)))
    answer = deployment.ask()
    assert answer.status_code == 404
    assert answer.content == answers.model_not_found(style, deployment.model)


@pytest.mark.parametrize(
    "page",
    [
        behaviours.ngrok_interstitial(),
        behaviours.ngrok_offline(),
        behaviours.ngrok_offline(with_header=False),
        behaviours.cloudflared_530(),
    ],
    ids=["interstitial", "offline", "offline by its page", "cloudflare"],
)
def test_the_page_of_a_tunnel_is_no_answer(deploy: Deploy, gateway: GatewayProcess, page: behaviours.Behaviour) -> None:
    """F16: another server answers; a probe counts it as failure; the header that avoids the page is sent with both."""
    deployment = deploy(Backend("tunnel", page), Backend("good"))
    tunnel = deployment.backends[0]
    assert text_of(deployment.ask_until_tried(tunnel)).startswith("good")
    assert tunnel.last.header("ngrok-skip-browser-warning")
    tunnel.behave_models = page
    check = gateway.admin("POST", f"/servers/{deployment.ids[0]}/health-check")
    assert check.status_code == 200
    assert check.json()["passed"] is False
    assert deployment.record(0)["health_status"] == "unhealthy"
    assert tunnel.probes[-1].header("ngrok-skip-browser-warning")


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_key_is_the_owners_business(deploy: Deploy, code: int) -> None:
    """F17: another server answers, and the owner sees what is wrong."""
    locked = Backend("locked", behaviours.status(code))
    deployment = deploy(locked, Backend("good"))
    locked.behave_access = behaviours.status(code)
    assert text_of(deployment.ask_until_tried(locked)).startswith("good")
    wait_until(lambda: deployment.state(0) == "misconfigured", within=5.0, what="the refusal was not confirmed")


def test_a_refused_key_never_looks_like_the_clients(deploy: Deploy) -> None:
    """F17: 502, not 401."""
    deployment = deploy(Backend("locked", behaviours.unauthorized()))
    answer = deployment.ask()
    assert answer.status_code == 502
    assert error_of(answer)["code"] == "upstream_auth_failed"
    assert "www-authenticate" not in answer.headers


NONSENSE: dict[str, behaviours.Behaviour] = {
    "broken JSON": behaviours.broken_json(),
    "empty": behaviours.answer(200, b""),
    "not UTF-8": behaviours.answer(200, b'{"text":"\xff\xfe"}'),
    "HTML": behaviours.html_page(),
    "text": behaviours.wrong_content_type(),
    "redirect": behaviours.redirect("http://169.254.169.254/"),
    "status 999": behaviours.odd_status(999),
    "compressed": behaviours.encoded("br"),
    "many headers": behaviours.many_headers(),
    "big header": behaviours.big_header(),
    "endless continue": behaviours.endless_continue(),
    "a stream": behaviours.stream([answers.DONE]),
}


@pytest.mark.parametrize("fault", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_not_relayed(deploy: Deploy, fault: behaviours.Behaviour) -> None:
    """F19 (and L11): another server answers."""
    deployment = deploy(Backend("confused", fault), Backend("good"))
    answer = deployment.ask_until_tried(deployment.backends[0])
    assert text_of(answer).startswith("good")
    assert "location" not in answer.headers
    assert deployment.in_flight() == 0


@pytest.mark.parametrize("fault", [behaviours.broken_json(), behaviours.html_page(), behaviours.redirect("http://127.0.0.1/")])
def test_nonsense_alone_is_502(deploy: Deploy, fault: behaviours.Behaviour) -> None:
    """F19: said as the server's fault, which the client need not try again."""
    answer = deploy(Backend("confused", fault)).ask()
    assert answer.status_code == 502
    assert error_of(answer)["code"] == "upstream_bad_response"
    assert answer.headers["x-should-retry"] == "false"


def test_json_instead_of_a_stream(deploy: Deploy) -> None:
    """F21: the SDK would read it as an empty answer, so another server streams."""
    deployment = deploy(Backend("confused", behaviours.json_for_stream()), Backend("good"))
    answer = deployment.ask_until_tried(deployment.backends[0], stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content == bytes(deployment.backends[1].last.payload)


def test_json_instead_of_a_stream_alone(deploy: Deploy) -> None:
    """F21: 502."""
    answer = deploy(Backend("confused", behaviours.json_for_stream())).ask(stream=True)
    assert answer.status_code == 502
    assert error_of(answer)["code"] == "upstream_bad_response"


REPORTS: dict[str, bytes] = {
    "no endpoint": b'{"error":"Unexpected endpoint or method. (POST /v1/chat/completions)"}',
    "no memory": b'{"error":{"message":"CUDA out of memory"}}',
    "busy": b'{"error":{"message":"slow down","code":429}}',
    "vLLM": b'{"object":"error","message":"no such path","code":404,"choices":null}',
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS.keys())
@pytest.mark.parametrize("how", ["plain", "streamed", "first event"])
def test_an_error_with_status_200_is_not_an_answer(deploy: Deploy, report: bytes, how: str) -> None:
    """Another server answers: openai-python would fail with a TypeError."""
    first_event = behaviours.stream([b"data: " + report + b"\n\n"])
    deployment = deploy(Backend("sick", first_event if how == "first event" else behaviours.answer(200, report)), Backend("good"))
    answer = deployment.ask_until_tried(deployment.backends[0], stream=how != "plain")
    assert answer.status_code == 200
    assert answer.content == bytes(deployment.backends[1].last.payload)
    assert answer.headers["x-multiverse-attempts"] == "2"


@pytest.mark.parametrize("how", ["plain", "streamed", "first event"])
def test_a_clients_error_with_status_200_raises_what_it_means(deploy: Deploy, gateway: GatewayProcess, how: str) -> None:
    """It is sent with its own status, and no other server is asked."""
    report = b'{"error":{"message":"context too long","type":"invalid_request_error","code":400}}'
    fault = behaviours.stream([b"data: " + report + b"\n\n"]) if how == "first event" else behaviours.answer(200, report)
    deployment = deploy(Backend("one", fault), Backend("two", fault))
    transport = httpx2.HTTPTransport(verify=False, trust_env=False)
    client = openai.OpenAI(base_url=gateway.base_url, api_key="anything", http_client=httpx2.Client(transport=transport))
    with client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=deployment.model, messages=[{"role": "user", "content": "Hello"}], stream=how != "plain")
    assert "context too long" in caught.value.message
    assert deployment.backends[0].hits + deployment.backends[1].hits == 1
    assert (deployment.state(0), deployment.state(1)) == ("healthy", "healthy")


@pytest.mark.parametrize(
    "body",
    [
        b'\xef\xbb\xbf{"choices":[{"index":0,"message":{"content":"one"},"finish_reason":"stop"}]}',
        rb'{"choices":[{"index":0,"message":{"content":"\ud83d"},"finish_reason":"stop"}]}',
        b'{"choices":[{"index":0,"message":{"content":"one"},"logprobs":{"content":[{"logprob":-Infinity}]}}],"score":NaN}',
    ],
)
def test_json_that_clients_read_is_relayed(deploy: Deploy, body: bytes) -> None:
    """A byte order mark, half of a surrogate pair and NaN are no fault of the server."""
    deployment = deploy(Backend("odd", behaviours.answer(200, body)))
    answer = deployment.ask()
    assert (answer.status_code, answer.content) == (200, body)
    assert answer.json()["choices"]
    assert deployment.state() == "healthy"
