"""Bad requests to the inference API: always an error in OpenAI's form, never 500 or 422, and the gateway goes on."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import attrs
import httpx2
import pytest

from e2e.deployment import BODY_BYTES, Deployment, error_of
from support import behaviours
from support.backends import Backend
from support.processes import DOORS, Door
from support.raw_client import RawClient

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True, scope="module")]

Deploy = Callable[..., Deployment]
CHAT = "/v1/chat/completions"
MODEL = b"MODEL"
"""Stands for the name of a model that exists."""


@attrs.frozen
class Bad:
    """A request and what is answered."""

    status: int
    code: str | None
    param: str | None = None


BODIES: dict[str, tuple[bytes, Bad]] = {
    "nothing": (b"", Bad(400, "invalid_json")),
    "blanks": (b" \r\n\t", Bad(400, "invalid_json")),
    "words": (b"hello", Bad(400, "invalid_json")),
    "half an object": (b'{"model": "MODEL", "messages": [', Bad(400, "invalid_json")),
    "two objects": (b'{"model": "MODEL"}{"model": "MODEL"}', Bad(400, "invalid_json")),
    "a list": (b'[{"model": "MODEL"}]', Bad(400, "invalid_json")),
    "a string": (b'"MODEL"', Bad(400, "invalid_json")),
    "null": (b"null", Bad(400, "invalid_json")),
    "single quotes": (b"{'model': 'MODEL'}", Bad(400, "invalid_json")),
    "NaN": (b'{"model": "MODEL", "temperature": NaN}', Bad(400, "invalid_json")),
    "not UTF-8": (b'{"model": "MODEL", "messages": "\xff\xfe"}', Bad(400, "invalid_json")),
    "UTF-16": ('{"model": "MODEL"}'.encode("utf-16"), Bad(400, "invalid_json")),
    "a lone surrogate in bytes": (b'{"model": "MODEL", "messages": "\xed\xa0\x80"}', Bad(400, "invalid_json")),
    "deep lists": (b'{"model": "MODEL", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", Bad(400, "invalid_json")),
    "deep objects": (b'{"model": "MODEL", "messages": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", Bad(400, "invalid_json")),
    "deep and unfinished": (b"[" * 500_000, Bad(400, "invalid_json")),
    "no model": (b'{"messages": []}', Bad(400, None, "model")),
    "model null": (b'{"model": null}', Bad(400, None, "model")),
    "model empty": (b'{"model": ""}', Bad(400, None, "model")),
    "model a number": (b'{"model": 7}', Bad(400, None, "model")),
    "model a list": (b'{"model": ["MODEL"]}', Bad(400, None, "model")),
    "model an object": (b'{"model": {"name": "MODEL"}}', Bad(400, None, "model")),
    "model too long": (b'{"model": "' + b"m" * 5000 + b'"}', Bad(400, None, "model")),
    "model twice": (b'{"model": "MODEL", "model": "other"}', Bad(400, None, "model")),
    "model and Model": (b'{"model": "MODEL", "Model": "other"}', Bad(400, None, "model")),
    "MODeL before model": (b'{"MODeL": "other", "model": "MODEL"}', Bad(400, None, "model")),
    "an escaped Model": (rb'{"model": "MODEL", "\u004dod\u0065l": "other"}', Bad(400, None, "model")),
    "Stream beside stream": (b'{"model": "MODEL", "stream": false, "Stream": true}', Bad(400, None, "stream")),
    "a long s in stream": ('{"model": "MODEL", "\u017ftream": true}'.encode(), Bad(400, None, "stream")),
    "model twice, once escaped": (b'{"model": "MODEL", "\\u006dodel": "other"}', Bad(400, None, "model")),
    "stream a string": (b'{"model": "MODEL", "stream": "true"}', Bad(400, None, "stream")),
    "stream a number": (b'{"model": "MODEL", "stream": 1}', Bad(400, None, "stream")),
    "stream twice": (b'{"model": "MODEL", "stream": true, "stream": false}', Bad(400, None, "stream")),
    "another model": (b'{"model": "nobody-has-this"}', Bad(404, "model_not_found", "model")),
    "a model with marks": (b'{"model": "<script>\\u0000\\n../../etc"}', Bad(404, "model_not_found", "model")),
    "a model in another case": (b'{"model": "MODEL-X"}', Bad(404, "model_not_found", "model")),
}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize(("body", "bad"), BODIES.values(), ids=BODIES.keys())
def test_a_bad_body(deploy: Deploy, shared: Deployment, path: str, body: bytes, bad: Bad) -> None:
    """TC-ERR-001, TC-ERR-002, L06: 400 or 404, and the message names the field; no server hears of it."""
    hits = shared.backends[0].hits
    sent = body.replace(MODEL, shared.model.encode())
    answer = shared.client.post(path, content=sent, headers={"content-type": "application/json"})
    assert answer.status_code == bad.status
    error = error_of(answer)
    assert (error["code"], error["param"]) == (bad.code, bad.param)
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"]
    assert shared.backends[0].hits == hits


@pytest.fixture(scope="module")
def shared(shared_deployment: Callable[..., Deployment]) -> Deployment:
    """Return one deployment for all these tests: no server should be asked."""
    return shared_deployment(Backend("never asked"))


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"])
def test_the_content_type_does_not_decide(shared: Deployment, content_type: str) -> None:
    """JSON is read whatever it is called, as clients in the wild do; a server that would read a form of that type reads JSON, too."""
    content = json.dumps(shared.body(user="&model=another&x=")).encode()
    answer = shared.client.post(CHAT, content=content, headers={"content-type": content_type} if content_type else {})
    assert answer.status_code == 200
    assert shared.backends[0].last.header("content-type") == "application/json"


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed; boundary=x", 'multipart/form-data; boundary="' + "x" * 90],
)
def test_a_form_that_is_none(shared: Deployment, content_type: str) -> None:
    """400."""
    answer = shared.client.post("/v1/audio/transcriptions", content=b"--x\r\n\r\n", headers={"content-type": content_type})
    assert answer.status_code == 400
    error_of(answer)


CODINGS = {
    "gzip": gzip.compress(b"{}"),
    "deflate": zlib.compress(b"{}"),
    "br": b"\x0b\x01\x80{}\x03",
    "zstd": b"\x28\xb5\x2f\xfd",
    "x-gzip": b"x",
    "identity, gzip": b"x",
    "GZIP": b"x",
}


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages", "/chat/completions", "/v1/audio/transcriptions"])
@pytest.mark.parametrize("coding", CODINGS)
def test_a_compressed_body_is_refused_by_name(shared: Deployment, path: str, coding: str) -> None:
    """415 that names the coding and says what to do; no server is asked."""
    hits = shared.backends[0].hits
    headers = {"content-type": "application/json", "content-encoding": coding}
    answer = shared.client.post(path, content=CODINGS[coding], headers=headers)
    assert answer.status_code == 415
    message = answer.json()["error"]["message"]
    assert coding.rpartition(", ")[2].lower() in message
    assert "compression" in message
    assert (answer.headers["accept-encoding"], answer.headers["x-should-retry"]) == ("identity", "false")
    assert shared.backends[0].hits == hits


@pytest.mark.parametrize(
    "more", [b"content-length: 1000\r\n", b"transfer-encoding: chunked\r\n", b"content-length: 5\r\nexpect: 100-continue\r\n"]
)
def test_a_compressed_body_is_refused_before_it_comes(shared: Deployment, door: Door, more: bytes) -> None:
    """Nothing of the body need be sent, and the direct door does not tell a client that waits for 100 to send it."""
    with RawClient(shared.gateway.port) as raw:
        raw.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-encoding: zstd\r\n%b\r\n" % more)
        answer = raw.read_response()
    assert answer.status == 415
    assert not answer.informational or door == "hypercorn"
    assert "zstd" in answer.json["error"]["message"]


def test_a_coding_that_is_none_is_not_quoted(shared: Deployment) -> None:
    """`identity` means nothing; what is no token is not repeated."""
    for coding in ("identity", "", "identity, identity"):
        assert shared.client.post(CHAT, json=shared.body(), headers={"content-encoding": coding}).status_code == 200
    answer = shared.client.post(CHAT, json=shared.body(), headers={"content-encoding": '<b onclick="x">'})
    assert answer.status_code == 415
    assert "onclick" not in answer.text


def test_a_compressed_body_of_the_admin_api_is_refused_as_well(shared: Deployment) -> None:
    """The same words as for users."""
    answer = shared.client.post("/admin/register", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_content_encoding")


@pytest.mark.parametrize("stream", [False, True])
def test_a_byte_order_mark_is_taken_off(shared: Deployment, stream: bool) -> None:
    """Programs on Windows write one before JSON, and few servers can read it."""
    body = json.dumps(shared.body(stream=stream)).encode()
    answer = shared.client.post(CHAT, content=b"\xef\xbb\xbf" + body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert shared.backends[0].last.body == body
    twice = shared.client.post(CHAT, content=b"\xef\xbb\xbf\xef\xbb\xbf" + body, headers={"content-type": "application/json"})
    assert (twice.status_code, error_of(twice)["code"]) == (400, "invalid_json")


def test_a_byte_order_mark_of_a_server_does_no_harm(deploy: Deploy) -> None:
    """Before an answer, and before the list of models that registering asks for."""
    backend = Backend("windows", behaviours.answer(200, b'\xef\xbb\xbf{"choices":[],"usage":{"prompt_tokens":3}}'))
    backend.behave_models = behaviours.answer(200, b'\xef\xbb\xbf{"data":[]}')
    answer = deploy(backend).ask()
    assert (answer.status_code, json.loads(answer.content)["choices"]) == (200, [])


def test_a_byte_order_mark_of_an_operator_does_no_harm(shared: Deployment) -> None:
    """The admin API reads what an editor saved."""
    body = b"\xef\xbb\xbf" + json.dumps({"name": f"key of {shared.model}"}).encode()
    assert shared.client.post("/admin/keys", content=body).status_code in (200, 201)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses"])
def test_a_wrong_method(shared: Deployment, method: str, path: str) -> None:
    """405."""
    answer = shared.client.request(method, path)
    assert answer.status_code == 405
    if method != "HEAD":
        assert error_of(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/models"), ("DELETE", "/v1/models/x"), ("PUT", "/v1/models"), ("POST", "/livez")]
)
def test_a_wrong_method_elsewhere(shared: Deployment, method: str, path: str) -> None:
    """405, not taken for inference, with the right methods in `Allow`."""
    answer = shared.client.request(method, path, content=b"{}")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert error_of(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path", ["/v1/nothing", "/v1/", "/v1", "/v1/chat", "/v1/chat/completions/", "/v2/chat/completions", "/v1/models/none"]
)
def test_a_path_that_is_none(shared: Deployment, path: str) -> None:
    """404 or 405 with a proper body."""
    answer = shared.client.get(path)
    assert answer.status_code in (404, 405)
    error_of(answer)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(shared: Deployment, chunked: bool) -> None:
    """L04: 413, whether its length is told or not; one byte less is read."""
    client: httpx2.Client = shared.client
    for size, status in ((BODY_BYTES, 200), (BODY_BYTES + 1, 413), (8 * BODY_BYTES, 413)):
        start = json.dumps(shared.body())[:-1] + ', "filler": "'
        body = (start + "x" * (size - len(start) - 2) + '"}').encode()
        assert len(body) == size
        with RawClient(shared.gateway.port) as raw:
            answer = raw.fetch("POST", CHAT, body=body, chunked=chunked, headers=[("content-type", "application/json")])
        assert answer.status == status
        if status == 413:
            assert answer.json["error"]["code"] == "request_too_large"
    assert client.get("/livez").status_code == 200


def test_a_length_alone_is_refused(shared: Deployment) -> None:
    """L04: nothing of the body need be sent."""
    with RawClient(shared.gateway.port) as raw:
        raw.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert raw.read_response().status == 413


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": "not a list"},
        {"messages": None},
        {"messages": [1, None, {"role": 5}]},
        {"temperature": "hot", "max_tokens": -1},
        {"unknown": {"deep": [[[[]]]]}},
        {"numbers": 10**300},
    ],
)
def test_what_the_gateway_does_not_read_is_the_servers_business(deploy: Deploy, fields: dict[str, Any]) -> None:
    """FR-API-INF-007: it reaches the server unchanged, and the server's refusal comes back unchanged."""
    refusal = b'{"error":{"message":"no","type":"invalid_request_error","param":null,"code":null}}'
    deployment = deploy(Backend("strict", behaviours.answer(422, refusal)))
    answer = deployment.ask(**fields)
    assert (answer.status_code, answer.content) == (422, refusal)
    assert deployment.backends[0].last.json == deployment.body(**fields)
