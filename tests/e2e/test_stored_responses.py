"""Stored responses (semantics of `previous_response_id` and the calls below `/v1/responses`) at two gateways on one database.

The first gateway serves HTTP/1.1 by the direct door, the second by hypercorn; what one of them relays, the other finds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import httpx2
import openai
import pytest

from e2e.deployment import IMPATIENT, error_of
from support import behaviours
from support.backends import Backend
from support.h2_client import H2Client
from support.processes import GatewayProcess, LlamaServer, door_setting
from support.raw_client import RawClient
from support.shelf import Shelf
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

ALICE, BOB = "a-client-key-of-alice", "a-client-key-of-bob"
UNKNOWN = "resp_unknown"
LOOKUPS = {
    "get": ("GET", ""),
    "stream": ("GET", "?stream=true"),
    "items": ("GET", "/input_items?limit=5"),
    "cancel": ("POST", "/cancel"),
    "delete": ("DELETE", ""),
}
_numbers = count(1)


@attrs.frozen
class Pair:
    """The gateways, and two servers of a model that nobody else has."""

    gateways: tuple[GatewayProcess, GatewayProcess]
    model: str
    backends: tuple[Backend, ...]
    shelves: tuple[Shelf, ...]
    ids: tuple[str, ...]

    def call(self, method: str, path: str, body: Any = None, *, at: int = 0, key: str = ALICE, **headers: str) -> httpx2.Response:
        """Call one of the gateways as the holder of a key; an empty key is none."""
        sent = {"authorization": f"Bearer {key}"} if key else {}
        return self.gateways[at].call(method, path, body, headers=sent | {name.replace("_", "-"): value for name, value in headers.items()})

    def make(self, *, at: int = 0, key: str = ALICE, **fields: Any) -> httpx2.Response:
        """Ask for a response."""
        return self.call("POST", "/v1/responses", {"model": self.model, "input": "Hello", **fields}, at=at, key=key)

    def made(self, **fields: Any) -> tuple[str, int]:
        """Make a response, and return its id and the number of the server that has it."""
        answer = self.make(**fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"], self.ids.index(answer.headers["x-gateway-server-id"])

    def hits(self) -> list[int]:
        """Return how many requests each server got."""
        return [backend.hits for backend in self.backends]

    def state(self, number: int, at: int = 0) -> str:
        """Return the state of a server as a gateway knows it."""
        return str(self.gateways[at].server(self.ids[number])["state"])


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GatewayProcess, GatewayProcess]]:
    """Start two gateways on one file."""
    shared = {
        **IMPATIENT,
        "DATABASE_URL": f"sqlite:///{(tmp_path_factory.mktemp('shared') / 'multiverse.db').as_posix()}",
        "CLIENT_API_KEYS": f"{ALICE},{BOB}",
        "TRUSTED_PROXIES": "127.0.0.1/32",
        "HEALTH_CHECK_INTERVAL_SECONDS": "60",
    }
    with GatewayProcess({**shared, **door_setting("direct")}) as first, GatewayProcess({**shared, **door_setting("hypercorn")}) as second:
        yield first, second


@pytest.fixture
def pair(gateways: tuple[GatewayProcess, GatewayProcess]) -> Iterator[Callable[..., Pair]]:
    """Return a function that registers servers which store responses, and waits until both gateways know them."""
    with ExitStack() as stack:

        def begin(servers: int = 2, *, holds_back: bool = False, **fields: Any) -> Pair:
            number = next(_numbers)
            names = [f"shelf{number}{letter}" for letter in "ab"[:servers]]
            shelves = tuple(Shelf(name, holds_back=holds_back) for name in names)
            backends = tuple(Backend(shelf.name, shelf) for shelf in shelves)
            stack.enter_context(serving(*backends))
            model = f"stored-{number}"
            ids = tuple(gateways[0].register(model, backend.url, **fields) for backend in backends)
            known = [lambda server=server: gateways[1].admin("GET", f"/admin/servers/{server}").status_code == 200 for server in ids]
            for one in known:
                wait_until(one, within=5)
            return Pair(gateways, model, backends, shelves, ids)

        yield begin


@pytest.mark.parametrize("at", [0, 1], ids=["direct door", "hypercorn"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_response_is_continued_where_it_is(pair: Callable[..., Pair], at: int, stream: bool) -> None:
    """Each of six requests that continue it goes to its server, whichever gateway they come through."""
    deployment = pair()
    first, where = deployment.made(at=at)
    before = deployment.hits()
    for number in range(6):
        answer = deployment.make(at=(at + number) % 2, previous_response_id=first, stream=stream)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-gateway-server-id"] == deployment.ids[where]
    after = deployment.hits()
    assert (after[where] - before[where], after[1 - where] - before[1 - where]) == (6, 0)


@pytest.mark.parametrize("at", [0, 1], ids=["direct door", "hypercorn"])
@pytest.mark.parametrize("other", [False, True], ids=["same process", "other process"])
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"background": True}, {"stream": True, "background": True}], ids=str)
def test_every_call_finds_the_server(pair: Callable[..., Pair], at: int, other: bool, fields: dict[str, Any]) -> None:
    """A response is shown, streamed, listed, canceled and deleted by its server, right after it was made, however it was made."""
    deployment = pair()
    made = deployment.make(at=at, **fields)
    where = deployment.ids.index(made.headers["x-gateway-server-id"])
    (name,) = deployment.shelves[where].stored
    for method, rest in LOOKUPS.values():
        answer = deployment.call(method, f"/v1/responses/{name}{rest}", at=at ^ other)
        assert answer.status_code == 200, (method, rest, answer.text)
        assert answer.headers["x-gateway-server-id"] == deployment.ids[where]
        assert answer.headers["cache-control"] == "no-store"
        received = deployment.backends[where].requests[-1]
        assert (received.method, received.target) == (method, f"/v1/responses/{name}{rest}")
        if rest.endswith("stream=true"):
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert b"response.completed" in answer.content
    assert deployment.backends[1 - where].hits == 0
    gone = deployment.call("GET", f"/v1/responses/{name}", at=at ^ other)
    assert (gone.status_code, gone.json()["error"]["message"]) == (404, f"Response with id '{name}' not found.")
    assert deployment.state(where) == "healthy"


@pytest.mark.parametrize("at", [0, 1], ids=["direct door", "hypercorn"])
def test_another_caller_gets_what_an_unknown_id_gets(pair: Callable[..., Pair], at: int) -> None:
    """By another key, by no key, from another address: the same bytes as for an id that never was, and no server is asked."""
    deployment = pair()
    name, _ = deployment.made(at=at)
    of_address, _ = deployment.made(at=at, key="")
    before = deployment.hits()
    strangers = [(name, BOB, {}), (name, "", {}), (of_address, "", {"x_forwarded_for": "198.51.100.7"}), (of_address, ALICE, {})]

    def ask(call: tuple[str, str, dict[str, str]]) -> list[list[Any]]:
        found, key, headers = call
        body = {"model": deployment.model, "input": "x", "previous_response_id": found}
        answers = [
            deployment.call("GET", f"/v1/responses/{found}", at=at, key=key, **headers),
            deployment.call("POST", f"/v1/responses/{found}/cancel", at=at, key=key, **headers),
            deployment.call("POST", "/v1/responses", body, at=at, key=key, **headers),
        ]
        assert {error_of(answer)["code"] for answer in answers} == {"response_not_found"}
        assert "one server" in error_of(answers[0])["message"]
        headed = ("x-should-retry", "x-multiverse-attempts")
        return [[answer.status_code, answer.content, *(answer.headers[name] for name in headed)] for answer in answers]

    with ThreadPoolExecutor() as threads:
        first, *others = threads.map(ask, [(UNKNOWN, ALICE, {}), *strangers])
    assert [answer[0] for answer in first] == [404] * 3
    assert [answer[2:] for answer in first] == [["false", "0"]] * 3
    assert others == [first] * len(strangers)
    assert deployment.hits() == before
    assert deployment.call("GET", f"/v1/responses/{of_address}", at=at, key="").status_code == 200


@pytest.mark.parametrize("at", [0, 1], ids=["direct door", "hypercorn"])
def test_a_server_that_is_gone_or_changed_has_no_responses(pair: Callable[..., Pair], at: int) -> None:
    """404 in the gateway's words, and the other server is not asked."""
    deployment = pair()
    names: dict[int, str] = {}
    while len(names) < 2:
        name, where = deployment.made(at=at)
        names[where] = name
    assert deployment.gateways[at].admin("DELETE", f"/admin/register/{deployment.ids[0]}").status_code == 200
    change = {"endpoint_url": deployment.backends[1].url, "api_key": "another-key"}
    assert deployment.gateways[at].admin("PUT", f"/admin/register/{deployment.ids[1]}", change).status_code == 200
    before = deployment.hits()
    for name in names.values():
        for answer in (deployment.call("GET", f"/v1/responses/{name}", at=at), deployment.make(at=at, previous_response_id=name)):
            assert (answer.status_code, error_of(answer)["code"]) == (404, "response_not_found")
            assert answer.headers["x-should-retry"] == "false"
    assert deployment.hits() == before


@pytest.mark.parametrize("at", [0, 1], ids=["direct door", "hypercorn"])
def test_a_server_that_is_down_is_waited_for(pair: Callable[..., Pair], at: int) -> None:
    """503 with `Retry-After`, and no other server is asked; when it is back it answers."""
    deployment = pair()
    name, where = deployment.made(at=at)
    down = deployment.backends[where]
    before = deployment.backends[1 - where].hits
    down.behave_models = behaviours.status(500)
    deployment.gateways[at].admin("POST", f"/admin/servers/{deployment.ids[where]}/health-check")
    assert deployment.state(where, at) == "unhealthy"
    for answer in (deployment.call("GET", f"/v1/responses/{name}", at=at), deployment.make(at=at, previous_response_id=name)):
        assert (answer.status_code, error_of(answer)["code"]) == (503, "no_healthy_server")
        assert int(answer.headers["retry-after"]) >= 1
    assert deployment.backends[1 - where].hits == before
    down.behave_models = behaviours.list_models
    deployment.gateways[at].admin("POST", f"/admin/servers/{deployment.ids[where]}/health-check")
    assert deployment.call("GET", f"/v1/responses/{name}", at=at).status_code == 200


@pytest.mark.parametrize("status", [400, 404, 405, 422, 501])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_refusal_of_the_server_is_relayed(pair: Callable[..., Pair], status: int, stream: bool) -> None:
    """A server may have forgotten a response: its own words reach the client, no other server is asked, and nothing is held against it."""
    deployment = pair()
    name, where = deployment.made()
    body = json.dumps({"error": {"message": "The model response was not found", "code": "not_found", "param": None, "type": "x"}}).encode()
    deployment.backends[where].behave = behaviours.answer(status, body)
    before = deployment.backends[1 - where].hits
    calls = [deployment.call("GET", f"/v1/responses/{name}"), deployment.make(previous_response_id=name, stream=stream)]
    assert [(answer.status_code, answer.content) for answer in calls] == [(status, body)] * 2
    assert deployment.backends[1 - where].hits == before
    assert deployment.state(where) == "healthy"


def test_a_page_of_a_tunnel_is_no_word_of_the_server(pair: Callable[..., Pair]) -> None:
    """A 404 that is not JSON says nothing about the response, which is there when the tunnel is back."""
    deployment = pair(1)
    name, _ = deployment.made()
    assert deployment.call("GET", f"/v1/responses/{name}").status_code == 200
    deployment.backends[0].behave = behaviours.answer(404, b"<h1>Not found</h1>", content_type="text/html")
    assert deployment.call("GET", f"/v1/responses/{name}").status_code == 504
    deployment.backends[0].behave = deployment.shelves[0]
    wait_until(lambda: deployment.call("GET", f"/v1/responses/{name}").status_code == 200, within=10)


def test_an_id_of_base64_is_found(pair: Callable[..., Pair]) -> None:
    """As LiteLLM makes them."""
    deployment = pair(1)
    odd = "resp_bGl0ZWxsbQ+=="
    deployment.shelves[0].stored[odd] = {"id": odd}
    deployment.backends[0].behave = [behaviours.answer(200, json.dumps({"id": odd, "output": []}).encode()), deployment.shelves[0]]
    deployment.make()
    for path in (odd, odd.replace("=", "%3D").replace("+", "%2B")):
        for at in (0, 1):
            assert deployment.call("GET", f"/v1/responses/{path}", at=at).json() == {"id": odd}
            assert deployment.call("POST", f"/v1/responses/{path}/cancel", at=at).status_code == 200
            deployment.shelves[0].stored[odd] = {"id": odd}


def test_a_stream_can_be_cancelled_while_it_takes_the_only_slot(pair: Callable[..., Pair]) -> None:
    """Its id is known from its first event on, in each process, and the call that cancels it waits for no slot."""
    for at in (0, 1):
        deployment = pair(1, holds_back=True, max_concurrency=1)
        with RawClient(deployment.gateways[0].port, timeout=20) as client:
            body = {"model": deployment.model, "input": "Hello", "stream": True}
            client.request("POST", "/v1/responses", json=body, headers=[("authorization", f"Bearer {ALICE}")])
            assert b"response.created" in client.read_event()
            (name,) = deployment.shelves[0].stored
            cancelled = deployment.call("POST", f"/v1/responses/{name}/cancel", at=at)
            assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
            assert b"response.completed" in client.read_event()


def test_another_model_at_the_same_url_has_the_same_responses(pair: Callable[..., Pair]) -> None:
    """One engine may serve two models; a model that is elsewhere cannot continue the response, and says so."""
    deployment = pair(1)
    name, _ = deployment.made()
    twin, other = f"{deployment.model}-twin", pair(1)
    registered = deployment.gateways[0].register(twin, deployment.backends[0].url)
    try:
        answer = deployment.call("POST", "/v1/responses", {"model": twin, "input": "x", "previous_response_id": name})
        assert (answer.status_code, answer.headers["x-gateway-server-id"]) == (200, registered)
        answer = deployment.call("POST", "/v1/responses", {"model": other.model, "input": "x", "previous_response_id": name})
        assert (answer.status_code, error_of(answer)["code"]) == (404, "response_not_found")
        assert other.model in answer.json()["error"]["message"]
    finally:
        deployment.gateways[0].admin("DELETE", f"/admin/register/{registered}")


@pytest.mark.parametrize("at", [0, 1], ids=["direct door", "hypercorn"])
@pytest.mark.parametrize(
    "fields",
    [
        '"previous_response_id": "resp_own", "previous_response_id": "resp_foreign"',
        '"previous_response_id": "resp_own", "Previous_Response_Id": "resp_foreign"',
        '"previou\\u017f_re\\u017fpon\\u017fe_id": "resp_foreign"',
        '"previous_response_id": 7',
        '"previous_response_id": ["resp_foreign"]',
    ],
)
def test_no_body_names_two_responses(pair: Callable[..., Pair], at: int, fields: str) -> None:
    """A server must not read another id than the one whose caller was checked."""
    deployment = pair(1)
    body = f'{{"model": "{deployment.model}", "input": "x", {fields}}}'.encode()
    sent = {"authorization": f"Bearer {ALICE}", "content-type": "application/json"}
    answer = httpx2.post(f"{deployment.gateways[at].url}/v1/responses", content=body, headers=sent, trust_env=False)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "previous_response_id")
    assert deployment.backends[0].hits == 0


def test_what_no_response_is_needed_for_goes_anywhere(pair: Callable[..., Pair]) -> None:
    """A field that is null or empty names no response, and other paths may have a field of that name."""
    deployment = pair(1)
    for value in (None, ""):
        assert deployment.make(previous_response_id=value if value is None else "").status_code in (200, 404)
        assert deployment.backends[0].hits
    deployment.backends[0].behave = behaviours.good()
    body = {"model": deployment.model, "messages": [], "previous_response_id": "x"}
    assert deployment.call("POST", "/v1/chat/completions", body).status_code == 200


def test_a_response_that_is_not_stored_is_not_known(pair: Callable[..., Pair]) -> None:
    """With `store: false` there is nothing to ask for."""
    deployment = pair(1)
    name, _ = deployment.made(store=False)
    assert deployment.call("GET", f"/v1/responses/{name}").status_code == 404


@pytest.mark.parametrize("at", [0, 1], ids=["direct door", "hypercorn"])
def test_headers_are_those_of_every_relayed_answer(pair: Callable[..., Pair], at: int) -> None:
    """Of the client's and the server's headers only those on the lists pass; a document of the server is text."""
    deployment = pair(1, api_key="the-servers-own-key")
    name, _ = deployment.made(at=at)
    answer = deployment.call("GET", f"/v1/responses/{name}", at=at, cookie="a=b", x_secret="x", x_request_id="mine")
    assert not {"set-cookie", "x-powered-by"} & answer.headers.keys()
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
    received = deployment.backends[0].requests[-1]
    assert received.header("authorization") == "Bearer the-servers-own-key"
    assert not {"cookie", "x-secret", "content-type", "content-length"} & {header for header, _ in received.headers}
    deployment.backends[0].behave = behaviours.answer(400, b"<script>", content_type="text/html")
    page = deployment.call("DELETE", f"/v1/responses/{name}", at=at)
    assert (page.status_code, page.headers["content-type"]) == (400, "text/plain; charset=utf-8")


def test_http2_has_the_same_rules(pair: Callable[..., Pair]) -> None:
    """The calls work there, too, and so does the refusal."""
    deployment = pair()
    name, _ = deployment.made()
    headers = [("authorization", f"Bearer {ALICE}")]
    with H2Client(deployment.gateways[0].port) as client:
        for path, expected in ((f"/v1/responses/{name}", 200), (f"/v1/responses/{UNKNOWN}", 404)):
            stream = client.ask("GET", path, headers=headers)
            assert client.status(stream) == expected
            assert json.loads(client.body(stream))


@pytest.mark.parametrize("at", [0, 1], ids=["direct door", "hypercorn"])
def test_a_base_url_without_v1_finds_them_too(pair: Callable[..., Pair], at: int) -> None:
    """The rules see one spelling."""
    deployment = pair(1)
    name, _ = deployment.made(at=at)
    for path in (f"/responses/{name}", f"//v1//responses/{name}/", f"/responses/{name}/input_items"):
        assert deployment.call("GET", path, at=at).status_code == 200, path
    assert deployment.call("POST", f"/responses/{name}/cancel", at=at).status_code == 200
    assert deployment.call("GET", f"/responses/{name}", at=at, key=BOB).status_code == 404
    assert deployment.call("DELETE", f"/responses/{name}", at=at).status_code == 200


def test_other_methods_are_refused(pair: Callable[..., Pair]) -> None:
    """With 405, and a WebSocket with 404."""
    deployment = pair(1)
    name, _ = deployment.made()
    before = deployment.backends[0].hits
    for method, rest in (("HEAD", ""), ("PUT", ""), ("DELETE", "/input_items"), ("GET", "/cancel"), ("HEAD", "/cancel")):
        assert deployment.call(method, f"/v1/responses/{name}{rest}").status_code == 405, (method, rest)
    secret = "dGhlIHNhbXBsZSBub25jZQ=="
    upgraded = deployment.call(
        "GET", f"/v1/responses/{name}", upgrade="websocket", connection="Upgrade", sec_websocket_key=secret, sec_websocket_version="13"
    )
    assert upgraded.status_code == 404
    assert deployment.backends[0].hits == before


def test_looking_up_counts_as_a_request(pair: Callable[..., Pair]) -> None:
    """Against the rate limit of the key; its tokens are counted once."""
    deployment = pair(1)
    made = deployment.gateways[0].admin("POST", "/admin/keys", {"name": deployment.model, "rate_limit": 3})
    assert made.status_code == 201, made.text
    key = made.json()["key"]
    name, _ = deployment.made(key=key)
    answers = [deployment.call("GET", f"/v1/responses/{name}", key=key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"

    def use() -> Any:
        rows = deployment.gateways[0].admin("GET", "/admin/usage?by=model").json()["rows"]
        return next((row for row in rows if row["model"] == deployment.model), None)

    wait_until(lambda: (use() or {}).get("requests") == 3, within=15)
    assert (use()["prompt_tokens"], use()["completion_tokens"]) == (7, 5)


def test_a_page_of_another_site_may_ask_where_cors_allows_it(pair: Callable[..., Pair]) -> None:
    """A GET is no form: `Sec-Fetch-Site` does not matter, and a POST from a form is refused."""
    deployment = pair(1)
    name, _ = deployment.made()
    assert deployment.call("GET", f"/v1/responses/{name}", sec_fetch_site="cross-site").status_code == 200
    assert deployment.call("POST", f"/v1/responses/{name}/cancel", sec_fetch_site="cross-site").status_code == 403


def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    """What was made right before SIGTERM is known afterward."""
    backend = Backend("restart", Shelf("restart"))
    with GatewayProcess(IMPATIENT, cwd=tmp_path) as gateway, serving(backend):
        gateway.register("restart", backend.url)
        name = gateway.call("POST", "/v1/responses", {"model": "restart", "input": "x"}).json()["id"]
        gateway.stop()
        gateway.restart()
        wait_until(lambda: gateway.call("GET", f"/v1/responses/{name}").status_code == 200, within=10)


def test_the_openai_library_works_with_stored_responses(pair: Callable[..., Pair]) -> None:
    """It makes, continues, shows, lists, cancels and deletes them, and raises `NotFoundError` for another key's, without a retry."""
    deployment = pair()
    url = deployment.gateways[0].base_url
    with openai.OpenAI(api_key=ALICE, base_url=url) as client, openai.OpenAI(api_key=BOB, base_url=url) as stranger:
        made = client.responses.create(model=deployment.model, input="Hello", store=True)
        for _ in range(3):
            assert (
                client.responses.create(model=deployment.model, input="And?", previous_response_id=made.id).previous_response_id == made.id
            )
        with client.responses.stream(model=deployment.model, input="And?", previous_response_id=made.id) as events:
            streamed = events.get_final_response()
        assert client.responses.retrieve(streamed.id).id == streamed.id
        assert [event.type for event in client.responses.retrieve(made.id, stream=True)][-1] == "response.completed"
        assert list(client.responses.input_items.list(made.id)) == []
        queued = client.responses.create(model=deployment.model, input="Hello", background=True)
        assert client.responses.cancel(queued.id).status == "cancelled"
        before = deployment.hits()
        with pytest.raises(openai.NotFoundError, match="one server"):
            stranger.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError, match="one server"):
            stranger.responses.create(model=deployment.model, input="Mine?", previous_response_id=made.id)
        assert deployment.hits() == before
        client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError, match=made.id):
            client.responses.retrieve(made.id)


def test_a_real_server_that_stores_nothing_is_asked_all_the_same(
    pair: Callable[..., Pair], llamas: tuple[LlamaServer, LlamaServer]
) -> None:
    """What llama.cpp says of its own response is relayed, and the other server, which cannot know better, is not asked."""
    deployment = pair(1)
    model = f"{deployment.model}-llama"
    ids = [deployment.gateways[0].register(model, llama.url) for llama in llamas]
    try:
        body = {"model": model, "input": "Hello", "max_output_tokens": 5}
        made = deployment.call("POST", "/v1/responses", body)
        assert made.status_code == 200, made.text
        for number in range(2):
            shown = deployment.call("GET", f"/v1/responses/{made.json()['id']}", at=number)
            assert (shown.status_code, shown.headers["x-gateway-server-id"]) == (404, made.headers["x-gateway-server-id"])
            assert shown.json()["error"]["message"] == "File Not Found"
        continued = deployment.call("POST", "/v1/responses", {**body, "previous_response_id": made.json()["id"]})
        assert (continued.status_code, continued.headers["x-gateway-server-id"]) == (400, made.headers["x-gateway-server-id"])
        assert "previous_response_id" in continued.json()["error"]["message"]
        assert {deployment.gateways[0].server(server)["state"] for server in ids} == {"healthy"}
    finally:
        for server in ids:
            deployment.gateways[0].admin("DELETE", f"/admin/register/{server}")
