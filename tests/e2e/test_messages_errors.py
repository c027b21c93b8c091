"""Errors on the calls of Anthropic's API: in Anthropic's form, whatever refuses the request and whichever door it came in by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from support import behaviours
from support.backends import Backend, Exchange
from support.processes import DOORS, GatewayProcess, door_setting
from support.raw_client import RawClient
from support.sockets import serving

pytestmark = pytest.mark.e2e

KEY = "client-key-of-the-class"
BODY_BYTES = 4096
MESSAGES = "/v1/messages"
CHAT = "/v1/chat/completions"
FINAL = {401, 403, 404, 405, 413, 502, 504}
"""Statuses after which no repetition helps, so that the answer says so."""

Send = Callable[..., httpx2.Response]


async def odd_if_asked(exchange: Exchange) -> None:
    """Redirect a request that is to be answered oddly; the good answers in between keep the server healthy."""
    await (behaviours.redirect("/elsewhere") if exchange.request.asked("max_tokens") == 5 else behaviours.answer_well)(exchange)


@pytest.fixture(scope="module", params=[*DOORS, "http/2"])
def send(request: pytest.FixtureRequest) -> Iterator[Send]:
    """Return a function that sends a request to a gateway with several models, by each door and in each protocol."""
    settings = {
        "REQUIRE_CLIENT_AUTH": "true",
        "CLIENT_API_KEYS": KEY,
        "RATE_LIMIT_PER_MINUTE": "0",
        "MAX_BODY_BYTES": str(BODY_BYTES),
        "CONNECT_TIMEOUT_SECONDS": "1",
        **door_setting("direct" if request.param == "http/2" else request.param),
    }
    is_http2 = request.param == "http/2"
    transport = httpx2.HTTPTransport(http1=not is_http2, http2=is_http2, trust_env=False)
    busy = Backend("busy", behaviours.status(503), models=("busy",))
    broken = Backend("broken", behaviours.status(408), models=("broken",))  # which counts as no fault of the server
    odd = Backend("odd", odd_if_asked, models=("odd",))
    large = Backend("large", behaviours.answer(413, b'{"error":{"message":"too long"}}'), models=("large",))
    lacking = Backend("lacking", behaviours.model_not_found(), models=("lacking",))
    overloaded = Backend("overloaded", behaviours.status(429), models=("overloaded",))
    with GatewayProcess(settings) as gateway, serving(busy, broken, odd, large, lacking, overloaded):
        for backend in (busy, broken, odd, large, lacking, overloaded):
            gateway.register(backend.name, backend.url)
        gateway.register("lacking-too", lacking.url)
        admin = {"x-api-key": gateway.admin_key}
        with httpx2.Client(transport=transport, base_url=gateway.url, timeout=20.0) as client:
            made = client.post("/admin/keys", json={"name": "small", "models": ["busy"]}, headers=admin)
            limited = client.post("/admin/keys", json={"name": "limited", "rate_limit": 1}, headers=admin)
            keys = {"small": made.json()["key"], "limited": limited.json()["key"], "good": KEY}

            def sending(method: str, path: str, *, key: str | None = "good", **fields: Any) -> httpx2.Response:
                headers = {"x-request-id": "the-id"} if key is None else {"x-api-key": keys[key], "x-request-id": "the-id"}
                return client.request(method, path, headers=headers, **fields)

            yield sending


def body(model: str = "busy", **fields: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]} | fields


REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no key": ({"key": None, "json": body()}, 401, "authentication_error"),
    "a key for another model": ({"key": "small", "json": body("odd")}, 403, "permission_error"),
    "no such model": ({"json": body("nowhere")}, 404, "not_found_error"),
    "not JSON": ({"content": b"{"}, 400, "invalid_request_error"),
    "no model": ({"json": {}}, 400, "invalid_request_error"),
    "too large": ({"content": b" " * (BODY_BYTES + 1)}, 413, "request_too_large"),
    "a failing server": ({"json": body("broken")}, 504, "timeout_error"),
    "nonsense of a server": ({"json": body("odd")}, 502, "api_error"),
    "a busy server": ({"json": body("busy")}, 503, "overloaded_error"),
    "a server with a rate limit": ({"json": body("overloaded")}, 429, "rate_limit_error"),
    "a stream": ({"json": body("broken", stream=True)}, 504, "timeout_error"),
}


def check_error(answer: httpx2.Response, status: int, kind: str) -> None:
    """Check that an answer is an error of Anthropic's form, and carries the headers that its clients read."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    read = answer.json()
    assert read == {"type": "error", "error": {"type": kind, "message": read["error"]["message"]}, "request_id": "the-id"}
    assert read["error"]["message"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == "the-id"
    assert answer.headers.get("x-should-retry") == ("false" if status in FINAL else None)
    if status in FINAL:
        assert answer.headers["x-multiverse-attempts"].isdigit()


@pytest.mark.parametrize("path", [MESSAGES, "/v1/messages/count_tokens", "/v1/messages/unknown"])
@pytest.mark.parametrize(("fields", "status", "kind"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_has_the_form_of_anthropic(send: Send, path: str, fields: dict[str, Any], status: int, kind: str) -> None:
    """Anthropic's clients read the type of an error, its message and its id, before or after the body was read."""
    check_error(send("POST", path, **fields), status, kind)


def test_a_quota_is_refused_in_the_form_of_anthropic(send: Send) -> None:
    """The second request of a key for one request in a minute gets 429."""
    send("POST", MESSAGES, key="limited", json=body("nowhere"))
    answer = send("POST", MESSAGES, key="limited", json=body("nowhere"))
    check_error(answer, 429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(("method", "path", "status"), [("GET", MESSAGES, 405), ("DELETE", MESSAGES, 405), ("PUT", MESSAGES, 405)])
def test_a_wrong_method_is_refused_in_the_form_of_anthropic(send: Send, method: str, path: str, status: int) -> None:
    """What no inference door sees has the same form."""
    check_error(send(method, path), status, "invalid_request_error")


@pytest.mark.parametrize(("fields", "status", "kind"), REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize("path", [CHAT, "/v1/messages_of_others"])
def test_every_other_call_keeps_the_form_of_openai(send: Send, path: str, fields: dict[str, Any], status: int, kind: str) -> None:
    """The same refusals elsewhere are OpenAI's, and say as well whether a repetition helps."""
    answer = send("POST", path, **fields)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert "request-id" not in answer.headers
    assert answer.headers.get("x-should-retry") == ("false" if status in FINAL else None)
    if status in FINAL:
        assert answer.headers["x-multiverse-attempts"].isdigit()


@pytest.mark.parametrize(
    ("path", "model", "status"), [(MESSAGES, "large", 413), (CHAT, "large", 413), (MESSAGES, "lacking", 404), (CHAT, "lacking-too", 404)]
)
def test_a_relayed_refusal_says_that_no_repetition_helps(send: Send, path: str, model: str, status: int) -> None:
    """The bytes are the server's; the header tells clients that would wait and repeat for minutes that it is of no use."""
    answer = send("POST", path, json=body(model))
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-multiverse-attempts"] == "1"


@pytest.mark.parametrize("door", DOORS)
def test_a_body_that_never_comes_is_refused_in_the_form_of_anthropic(door: Any) -> None:
    """A refusal by the head alone, and one of a body in broken chunks, read the same."""
    with GatewayProcess({"MAX_BODY_BYTES": str(BODY_BYTES), **door_setting(door)}) as gateway:
        with RawClient(gateway.port) as raw:
            raw.send(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-request-id: the-id\r\ncontent-length: 9999\r\n\r\n")
            answer = raw.read_response()
        assert (answer.status, answer.json["error"]["type"]) == (413, "request_too_large")
        assert json.dumps(answer.json).startswith('{"type": "error"')
        assert dict(answer.headers)["request-id"] == "the-id"
