"""Clients whose base URL lacks `/v1`, has a slash too many or is a whole URL: they are served, under the same rules as all others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from support import behaviours
from support.backends import Backend
from support.processes import DOORS, GatewayProcess, door_setting
from support.raw_client import RawClient, Response
from support.sockets import serving

pytestmark = pytest.mark.e2e

KEY = "client-key-of-the-class"
CALLS = ("/chat/completions", "/completions", "/embeddings", "/responses", "/messages", "/rerank")
SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda call: f"/v1{call}",
    "without /v1": lambda call: call,
    "a slash at the end": lambda call: f"/v1{call}/",
    "without /v1, a slash at the end": lambda call: f"{call}/",
    "two slashes first": lambda call: f"//v1{call}",
    "two slashes within": lambda call: f"/v1/{call}",
    "without /v1, two slashes first": lambda call: f"/{call}",
    "an absolute target": lambda call: f"http://gateway.example/v1{call}",
    "an absolute target without /v1": lambda call: f"http://gateway.example:8000{call}",
    "escaped": lambda call: f"/v1{call}".replace("s", "%73"),
}
EVERY = pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())

_numbers = itertools.count()
Ask = Callable[..., Response]


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """Return a server that knows every call."""
    with serving(server := Backend("tiny", behaviours.good())):
        yield server


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest, backend: Backend) -> Iterator[GatewayProcess]:
    """Return a gateway that asks for keys, by each door."""
    settings = {"REQUIRE_CLIENT_AUTH": "true", "CLIENT_API_KEYS": KEY, "RATE_LIMIT_PER_MINUTE": "0", "MAX_BODY_BYTES": "4096"}
    with GatewayProcess({**settings, **door_setting(request.param)}) as process:
        process.register("tiny", backend.url)
        yield process


@pytest.fixture
def ask(gateway: GatewayProcess) -> Ask:
    """Return a function that sends a request whose target is written as it is, on a connection of its own."""

    def send(method: str, target: str, *, key: str | None = KEY, headers: Any = (), body: Any = None) -> Response:
        own = [("authorization", f"Bearer {key}")] if key else []
        with RawClient(gateway.port) as client:
            return client.fetch(method, target, headers=[*own, *headers], **({} if body is None else {"json": body}))

    return send


def body(call: str = "/chat/completions", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [], "input": "x", "prompt": "x", "query": "x", "documents": ["x"], **fields}


@EVERY
@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_served_in_every_spelling(ask: Ask, backend: Backend, call: str, spell: Callable[[str], str]) -> None:
    """The server sees the one spelling, whatever the client wrote."""
    hits = backend.hits
    assert ask("POST", spell(call), body=body()).status == 200
    assert (backend.hits, backend.last.path) == (hits + 1, f"/v1{call}")


@pytest.mark.parametrize("target", ["/rerank", "/v2/rerank", "/v2/rerank/", "/v1/rerank"])
def test_reranking_has_three_paths(ask: Ask, backend: Backend, target: str) -> None:
    """Cohere's and Jina's clients differ in the path only."""
    assert ask("POST", target, body=body()).status == 200
    assert backend.last.path == "/v1/rerank"


@EVERY
def test_a_stream_is_relayed_in_every_spelling(ask: Ask, spell: Callable[[str], str]) -> None:
    """The path decides how a stream ends, too."""
    answer = ask("POST", spell("/chat/completions"), body=body(stream=True))
    assert (answer.status, answer.events[-1]) == (200, b"data: [DONE]\n\n")


@EVERY
def test_no_spelling_needs_no_key(ask: Ask, backend: Backend, spell: Callable[[str], str]) -> None:
    """A key that is missing or wrong is refused before anything else."""
    hits = backend.hits
    for key in (None, "wrong"):
        for method, call in (("POST", "/chat/completions"), ("POST", "/messages"), ("GET", "/models")):
            answer = ask(method, spell(call), key=key, body=body() if method == "POST" else None)
            assert answer.status == 401
            kind = answer.json["error"]["type"]
            assert kind == ("authentication_error" if call == "/messages" else "invalid_request_error")
    assert backend.hits == hits


@EVERY
def test_every_spelling_counts_for_the_same_quota(gateway: GatewayProcess, ask: Ask, spell: Callable[[str], str]) -> None:
    """A key for two requests in a minute has none left after two plain ones; one for another model stays for that."""
    number = next(_numbers)
    few = gateway.admin("POST", "/keys", json={"name": f"few {number}", "rate_limit": 2}).json()["key"]
    assert [ask("POST", SPELLINGS["plain"]("/chat/completions"), key=few, body=body()).status for _ in range(2)] == [200, 200]
    assert ask("POST", spell("/chat/completions"), key=few, body=body()).status == 429
    other = gateway.admin("POST", "/keys", json={"name": f"other {number}", "models": ["another"]}).json()["key"]
    assert ask("POST", spell("/chat/completions"), key=other, body=body()).status == 403


@EVERY
def test_every_spelling_has_the_same_limits(gateway: GatewayProcess, ask: Ask, backend: Backend, spell: Callable[[str], str]) -> None:
    """Body size, framing, loops and names that stand twice."""
    hits = backend.hits
    target = spell("/chat/completions")
    assert ask("POST", target, body=body(padding="x" * 5000)).status == 413
    assert ask("POST", target, headers=[("x-multiverse-hop", "1")], body=body()).status == 508
    assert ask("POST", target, body=body(Model="other")).status == 400
    assert ask("POST", target, body={}).status == 400
    inside = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    for framing in (b"content-length: 5\r\ntransfer-encoding: chunked\r\n", b"content-length: 3\r\ncontent-length: 4\r\n", b"host: y\r\n"):
        head = b"POST %b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n%b\r\n" % (target.encode(), KEY.encode(), framing)
        with RawClient(gateway.port) as client:
            client.send(head + inside)
            assert client.read_response().status == 400
    assert backend.hits == hits


@EVERY
def test_every_spelling_is_guarded_against_browsers(ask: Ask, backend: Backend, spell: Callable[[str], str]) -> None:
    """A form of another site is refused, and no answer is a document in the gateway's origin."""
    hits = backend.hits
    foreign = [("content-type", "text/plain"), ("sec-fetch-site", "cross-site"), ("origin", "http://evil.example")]
    assert ask("POST", spell("/chat/completions"), headers=foreign, body=body()).status == 403
    assert backend.hits == hits
    for answer in (ask("POST", spell("/chat/completions"), body=body()), ask("POST", spell("/chat/completions"), key=None, body=body())):
        named = dict(answer.headers)
        assert named["x-content-type-options"] == "nosniff"
        assert named["content-security-policy"].startswith("sandbox")


def test_a_model_in_the_path_is_not_used_instead_of_the_one_in_the_body(ask: Ask, backend: Backend) -> None:
    """Servers with the old engines API take the model from the path, which a key could be for no longer."""
    hits = backend.hits
    for target in ("/v1/engines/big/completions", "/v1//engines/big/embeddings", "/v1/engines/big/chat/completions/"):
        assert ask("POST", target, body=body()).status == 404
    assert backend.hits == hits


@EVERY
def test_models_are_listed_in_every_spelling(ask: Ask, spell: Callable[[str], str]) -> None:
    """Programs get the list, and one model; what asks for HTML gets the page where a page has the path."""
    assert [model["id"] for model in ask("GET", spell("/models")).json["data"]] == ["tiny"]
    assert ask("GET", spell("/models"), headers=[("accept", "application/json")]).json["object"] == "list"
    assert ask("GET", spell("/models/tiny")).json["id"] == "tiny"


@pytest.mark.parametrize("headers", [("accept", "text/html,application/xhtml+xml,*/*;q=0.8"), ("hx-request", "true")])
def test_a_browser_gets_the_page_of_models(gateway: GatewayProcess, ask: Ask, headers: tuple[str, str]) -> None:
    """The page stays where it was, for browsers and for htmx within them."""
    admin = [("x-api-key", gateway.admin_key), headers]
    answer = ask("GET", "/models", key=None, headers=admin)
    assert answer.status == 200
    assert b"<" in answer.body
    assert not answer.body.startswith(b"{")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "target",
    [
        "//admin/servers",
        "/admin//servers",
        "/v1/../admin/servers",
        "/v1//../admin/servers",
        "/v1/%2e%2e/admin/servers",
        "/responses/../admin/servers",
        "/models/../admin/servers",
        "http://gateway.example/admin/servers",
        "http://gateway.example//admin/servers",
        "//settings",
        "/v1/../settings",
        "http://gateway.example/settings",
        "http://gateway.example/login",
    ],
)
def test_no_spelling_leads_elsewhere(gateway: GatewayProcess, ask: Ask, backend: Backend, method: str, target: str) -> None:
    """Neither the admin API nor a page is found by a path that was not its own before, even with the admin key."""
    hits = backend.hits
    answer = ask(method, target, headers=[("x-api-key", gateway.admin_key)], body=body() if method == "POST" else None)
    assert answer.status in (400, 404, 405), answer.body
    assert "application/json" in dict(answer.headers)["content-type"]
    assert backend.hits == hits


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "target",
    ["/v1/v1/chat/completions", "/v1/v1/models", "/v1/v1", "/v1//v1/messages", "/v1/chat/completions/chat/completions", "/v1", "/v1/"],
)
def test_a_wrong_base_url_is_explained(ask: Ask, backend: Backend, method: str, target: str) -> None:
    """404 whose words say what the base URL should be."""
    hits = backend.hits
    answer = ask(method, target, body=body() if method == "POST" else None)
    assert answer.status == 404
    assert "/v1" in answer.json["error"]["message"]
    assert answer.json["error"].get("code", "unknown_url") == "unknown_url"
    assert dict(answer.headers)["x-should-retry"] == "false"
    assert backend.hits == hits


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "BREW"])
@pytest.mark.parametrize("target", ["/v1/nope", "/v1/files", "/v1/files/file-1", "/v1/batches", "/v1/chat", "/v1/messages/x"])
def test_a_call_that_does_not_exist_is_not_found(ask: Ask, method: str, target: str) -> None:
    """404 where no method would do; clients take 405 for a call that they make wrongly."""
    answer = ask(method, target)
    assert answer.status == 404
    assert answer.json["error"].get("code", "unknown_url") == "unknown_url"


@EVERY
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize(("call", "allowed"), [("/chat/completions", "POST"), ("/embeddings", "POST"), ("/models", "GET")])
def test_a_call_with_another_method_is_not_allowed(ask: Ask, method: str, call: str, allowed: str, spell: Callable[[str], str]) -> None:
    """405 where another method would do, which `Allow` names; a bare path is an API call only with the right method."""
    answer = ask(method, spell(call))
    if "/v1" in spell(call):
        assert answer.status == 405
        assert allowed in dict(answer.headers)["allow"]
    else:
        assert answer.status in (404, 405)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "HEAD"])
@pytest.mark.parametrize("path", ["/api/version", "/api/tags", "/api/chat", "/api/generate", "/api/show", "/api/v0/models", "/api"])
def test_clients_of_ollama_learn_the_base_url(gateway: GatewayProcess, ask: Ask, method: str, path: str) -> None:
    """Ollama's own API is another one; the words name the address that works."""
    answer = ask(method, path, key=None, body={"model": "tiny"} if method == "POST" else None)
    assert answer.status == 404
    if method != "HEAD":
        assert answer.json["error"]["code"] == "unknown_url"
        assert f"{gateway.url}/v1" in answer.json["error"]["message"]


@pytest.mark.parametrize("host", ["<script>", "a b", "x" * 300, "evil.example/path"])
def test_no_host_of_a_client_is_quoted_unread(ask: Ask, host: str) -> None:
    """The message holds a host name, and nothing else that a client wrote."""
    answer = ask("GET", "/api/tags", headers=[("host", host)])
    assert answer.status in (400, 404)
    assert host.encode() not in answer.body


@pytest.mark.parametrize("target", ["/v1/messages", "/messages", "/messages/", "//v1//messages/", "/v1/v1/messages", "//admin/servers"])
def test_http2_has_the_same_spellings(gateway: GatewayProcess, target: str) -> None:
    """Whichever protocol carries a path, the same rules see it."""
    transport = httpx2.HTTPTransport(http1=False, http2=True, trust_env=False)
    with httpx2.Client(transport=transport, timeout=20.0) as client:
        for key, status in ((KEY, 200), ("wrong", 401)):
            answer = client.post(gateway.url + target, json=body(), headers={"x-api-key": key})
            if "admin" in target:
                assert answer.status_code in (404, 405)
            else:
                assert answer.status_code == (404 if status == 200 and "v1/v1" in target else status)
                assert "request-id" in answer.headers or "v1/v1" in target


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/", "//v1"])
def test_the_openai_library_works_with_every_base_url(gateway: GatewayProcess, base: str) -> None:
    """Requests, streams, the list of models and one of them."""
    with openai.OpenAI(base_url=gateway.url + base, api_key=KEY, max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "Hello"}]
        assert client.chat.completions.create(model="tiny", messages=messages).choices
        assert list(client.chat.completions.create(model="tiny", messages=messages, stream=True))
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        assert client.embeddings.create(model="tiny", input="x", encoding_format="float").data


@pytest.mark.parametrize("base", ["/v1/v1", "/v1/chat/completions"])
def test_the_openai_library_shows_what_is_wrong_with_the_base_url(gateway: GatewayProcess, base: str) -> None:
    """The exception's text is the hint."""
    with openai.OpenAI(base_url=gateway.url + base, api_key=KEY) as client:
        with pytest.raises(openai.NotFoundError, match="base URL"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
        with pytest.raises(openai.NotFoundError, match="base URL"):
            client.models.list()
