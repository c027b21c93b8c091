"""What pages of other sites can make a browser send, and what a browser may do with the answers: by either door and in HTTP/2."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx2
import pytest

from e2e.deployment import BODY_BYTES, Deployment, error_of
from multiverse_gateway.entry.headers import EXPOSED_HEADERS
from support import behaviours
from support.backends import Backend
from support.processes import DOORS, GatewayProcess
from support.raw_client import RawClient

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True, scope="module")]

CHAT = "/v1/chat/completions"
SPEECH = "/v1/audio/speech"
NOSNIFF = "x-content-type-options"
POLICY = "content-security-policy"


@pytest.fixture(scope="module")
def shared(shared_deployment: Callable[..., Deployment]) -> Deployment:
    """Return one deployment for tests whose server answers well."""
    return shared_deployment(Backend("well"))


UNTOLD = {
    "access-control-allow-origin",
    "access-control-expose-headers",
    "cache-control",
    "connection",
    "content-length",
    "content-security-policy",
    "content-type",
    "cross-origin-opener-policy",
    "date",
    "referrer-policy",
    "server",
    "transfer-encoding",
    "vary",
    "x-accel-buffering",
    "x-content-type-options",
    "x-frame-options",
}
"""Headers that tell a program nothing that it could use, or that browsers show without leave."""


def is_sealed(headers: httpx2.Headers) -> bool:
    """Return whether a browser neither guesses the type of an answer nor runs anything in it; each header stands there once."""
    return headers.get_list(NOSNIFF) == ["nosniff"] and headers.get_list(POLICY) == ["sandbox; default-src 'none'"]


@pytest.fixture(params=["1.1", "2"])
def client(request: pytest.FixtureRequest, gateway: GatewayProcess) -> Iterator[httpx2.Client]:
    """Return a client of one version of HTTP."""
    transport = httpx2.HTTPTransport(http1=request.param == "1.1", http2=request.param == "2", verify=False, trust_env=False)
    with httpx2.Client(transport=transport, base_url=gateway.url, timeout=30.0) as made:
        yield made


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status"),
    [
        ("POST", CHAT, b'{"model": "MODEL", "messages": []}', {}, 200),
        ("POST", CHAT, b'{"model": "MODEL", "messages": [], "stream": true}', {}, 200),
        ("POST", CHAT, b'{"model": "nobody-has-this", "messages": []}', {}, 404),
        ("POST", CHAT, b"{", {}, 400),
        ("POST", CHAT, b"{}" + b" " * BODY_BYTES, {}, 413),
        ("POST", CHAT, b'{"model": "MODEL"}', {"x-multiverse-hop": "1"}, 508),
        ("POST", CHAT, b'{"model": "MODEL"}', {"content-type": "text/plain", "origin": "http://evil.example"}, 403),
        ("POST", "/v1/no<thing", b'{"model": "MODEL"}', {}, 404),
        ("POST", "/v1/models", b"{}", {}, 405),
        ("POST", "/v1/models", b"{}", {"content-type": "text/plain", "sec-fetch-site": "cross-site"}, 403),
        ("GET", CHAT, b"", {}, 405),
        ("GET", CHAT, b"", {"accept": "text/html"}, 405),
        ("DELETE", CHAT, b"", {}, 405),
        ("OPTIONS", CHAT, b"", {"origin": "http://evil.example", "access-control-request-method": "POST"}, 405),
        ("PUT", "/v1/files", b"x", {}, 4),
        ("GET", "/v1/models", b"", {}, 200),
        ("HEAD", "/v1/models", b"", {}, 200),
        ("GET", "/v1/models/MODEL", b"", {"accept": "text/html"}, 200),
        ("GET", "/v1/models/<svg onload=alert(1)>", b"", {"accept": "text/html"}, 404),
        ("GET", "/v1", b"", {"accept": "text/html"}, 404),
        ("POST", "/chat/completions", b'{"model": "MODEL", "messages": []}', {}, 200),
        ("POST", "/audio/speech", b'{"model": "nobody-has-this"}', {}, 404),
        ("POST", "//v1//chat/completions/", b'{"model": "MODEL", "messages": []}', {}, 200),
        ("POST", "/v1/v1/chat/completions", b'{"model": "MODEL"}', {}, 404),
        ("GET", "/models", b"", {"accept": "application/json"}, 200),
        ("OPTIONS", "/chat/completions", b"", {"origin": "http://evil.example", "access-control-request-method": "POST"}, 4),
        ("GET", "/v1/responses/resp_1", b"", {"accept": "text/html"}, 4),
        ("DELETE", "/v1/responses/resp_1", b"", {}, 4),
    ],
)
def test_every_answer_of_the_api_is_sealed(
    shared: Deployment, client: httpx2.Client, method: str, path: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    """S1: good ones, streams, refusals before and after the body, wrong methods and paths (4 stands for any refusal)."""
    named = {"content-type": "application/json", **headers} if content else headers
    model = shared.model
    answer = client.request(method, path.replace("MODEL", model), content=content.replace(b"MODEL", model.encode()), headers=named)
    assert status in (answer.status_code, answer.status_code // 100), answer.text
    assert is_sealed(answer.headers), answer.headers
    assert answer.headers.keys() - UNTOLD <= set(EXPOSED_HEADERS), "CORS lets pages read all that we add"


@pytest.mark.parametrize("status", [200, 400, 404, 422])
@pytest.mark.parametrize(
    ("sent", "relayed"),
    [
        ("image/svg+xml", "text/plain; charset=utf-8"),
        ("text/html; charset=x", "text/plain; charset=utf-8"),
        ("application/pdf", "application/octet-stream"),
        ("multipart/x-mixed-replace; boundary=x", "application/octet-stream"),
        ("audio/mpeg", "audio/mpeg"),
        (None, "application/octet-stream"),
    ],
)
def test_no_answer_of_a_server_is_a_document(
    deploy: Callable[..., Deployment], client: httpx2.Client, status: int, sent: str | None, relayed: str
) -> None:
    """S1: whatever its type and status; nor does the server seal or unseal it."""
    loose = [(POLICY, "script-src *"), (NOSNIFF, "off")]
    deployment = deploy(Backend("hostile", behaviours.answer(status, b"<svg/>", content_type=sent, headers=loose)))
    answer = client.post(SPEECH, json={"model": deployment.model, "input": "x"})
    if sent is not None and "html" in sent and status == 200:
        assert (answer.status_code, answer.headers["content-type"]) == (502, "application/json")
    else:
        assert (answer.status_code, answer.content, answer.headers["content-type"]) == (status, b"<svg/>", relayed)
    assert is_sealed(answer.headers)


FORMS = [None, "", "text/plain", "TEXT/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
FOREIGN = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "origin": "null"},
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://["},
    {"origin": "\xff"},
]
OURS: list[dict[str, str]] = [{}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}, {"origin": "OURS"}]


@pytest.mark.parametrize("content_type", FORMS)
def test_a_form_of_another_site_reaches_no_server(shared: Deployment, content_type: str | None) -> None:
    """S1: and is told why; the same request of our own page, or of a program, is answered."""
    body = json.dumps(shared.body()).encode()
    port = shared.gateway.port
    hits = shared.backends[0].hits
    for headers in FOREIGN:
        with RawClient(port) as raw:
            given = [("content-type", content_type)] if content_type is not None else []
            answer = raw.fetch("POST", CHAT, body=body, headers=[*given, *headers.items()])
        assert (answer.status, answer.json["error"]["code"]) == (403, "foreign_form"), headers
        assert answer.header("access-control-allow-origin") is None
    assert shared.backends[0].hits == hits
    if content_type is None or not content_type.startswith("multipart"):
        for headers in OURS:
            with RawClient(port) as raw:
                given = [("content-type", content_type)] if content_type is not None else []
                sent = [(name, value.replace("OURS", f"http://127.0.0.1:{port}")) for name, value in headers.items()]
                answer = raw.fetch("POST", CHAT, body=body, headers=[("host", f"127.0.0.1:{port}"), *given, *sent])
            assert answer.status == 200, headers
        assert shared.backends[0].hits == hits + len(OURS)


@pytest.mark.parametrize(
    "path", ["/chat/completions", "//v1/chat/completions", "/v1/chat/completions/", "http://any.example/chat/completions"]
)
def test_no_spelling_of_the_path_lets_a_form_in(shared: Deployment, path: str) -> None:
    """S1: clients write their base URL with `/v1` or without, and so might a page of another site."""
    hits = shared.backends[0].hits
    with RawClient(shared.gateway.port) as raw:
        headers = [("content-type", "text/plain"), ("origin", "http://evil.example")]
        assert raw.fetch("POST", path, body=json.dumps(shared.body()).encode(), headers=headers).status == 403
    assert shared.backends[0].hits == hits


@pytest.mark.parametrize("headers", FOREIGN)
def test_json_is_left_to_the_browser(shared: Deployment, headers: dict[str, str]) -> None:
    """It asks before a page of another site may send any, and programs may send any header; unreadable origins do no harm."""
    with RawClient(shared.gateway.port) as raw:
        assert raw.fetch("POST", CHAT, json=shared.body(), headers=list(headers.items())).status == 200
        assert raw.fetch("GET", "/v1/models", headers=list(headers.items())).status == 200
        assert raw.fetch("GET", "/login", headers=list(headers.items())).status == 200


def test_the_refusal_comes_before_the_body(shared: Deployment) -> None:
    """A page of another site cannot make the gateway hold its uploads."""
    with RawClient(shared.gateway.port) as raw:
        raw.send(b"POST %s HTTP/1.1\r\nhost: x\r\norigin: null\r\ncontent-length: 99999\r\n\r\n" % CHAT.encode())
        assert raw.read_response().status == 403


def test_the_refusal_says_what_to_do(shared: Deployment, client: httpx2.Client) -> None:
    """An app of the user's own has a way: JSON, or leave by CORS."""
    answer = client.post(CHAT, content=b"{}", headers={"content-type": "text/plain", "origin": "http://evil.example"})
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("permission_error", "foreign_form")
    assert "CORS_ORIGINS" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
