"""Bad requests to the inference API: always an error in OpenAI's form, never 500 or 422, and the gateway goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs
import httpx2
import pytest

from e2e.scene import BODY_BYTES, Scene, error_of
from support import behaviours
from support.backends import Backend
from support.processes import DOORS
from support.raw_client import RawClient

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True, scope="module")]

Stage = Callable[..., Scene]
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
def test_a_bad_body(stage: Stage, shared: Scene, path: str, body: bytes, bad: Bad) -> None:
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
def shared(shared_scene: Callable[..., Scene]) -> Scene:
    """Return one scene for all these tests: no server should be asked."""
    return shared_scene(Backend("never asked"))


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"])
def test_the_content_type_does_not_decide(shared: Scene, content_type: str) -> None:
    """JSON is read whatever it is called, as clients in the wild do."""
    content = json.dumps(shared.body()).encode()
    answer = shared.client.post(CHAT, content=content, headers={"content-type": content_type} if content_type else {})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed; boundary=x", 'multipart/form-data; boundary="' + "x" * 90],
)
def test_a_form_that_is_none(shared: Scene, content_type: str) -> None:
    """400."""
    answer = shared.client.post("/v1/audio/transcriptions", content=b"--x\r\n\r\n", headers={"content-type": content_type})
    assert answer.status_code == 400
    error_of(answer)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses"])
def test_a_wrong_method(shared: Scene, method: str, path: str) -> None:
    """405."""
    answer = shared.client.request(method, path)
    assert answer.status_code == 405
    if method != "HEAD":
        assert error_of(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/models"), ("DELETE", "/v1/models/x"), ("PUT", "/v1/models"), ("POST", "/livez")]
)
def test_a_wrong_method_elsewhere(shared: Scene, method: str, path: str) -> None:
    """405, not taken for inference."""
    answer = shared.client.request(method, path, content=b"{}")
    assert answer.status_code == 405
    assert error_of(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path", ["/v1/nothing", "/v1/", "/v1", "/v1/chat", "/v1/chat/completions/", "/v2/chat/completions", "/v1/models/none"]
)
def test_a_path_that_is_none(shared: Scene, path: str) -> None:
    """404 or 405 with a proper body."""
    answer = shared.client.get(path)
    assert answer.status_code in (404, 405)
    error_of(answer)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(shared: Scene, chunked: bool) -> None:
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


def test_a_length_alone_is_refused(shared: Scene) -> None:
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
def test_what_the_gateway_does_not_read_is_the_servers_business(stage: Stage, fields: dict[str, Any]) -> None:
    """FR-API-INF-007: it reaches the server unchanged, and the server's refusal comes back unchanged."""
    refusal = b'{"error":{"message":"no","type":"invalid_request_error","param":null,"code":null}}'
    scene = stage(Backend("strict", behaviours.answer(422, refusal)))
    answer = scene.ask(**fields)
    assert (answer.status_code, answer.content) == (422, refusal)
    assert scene.backends[0].last.json == scene.body(**fields)
