"""What hosts are told: by the connection test, beside the fields, and when things go wrong."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import httpx2
import pytest

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.servers import Server
from multiverse_gateway.pages import server_pages
from multiverse_gateway.pages.live import MAX_STREAMS
from multiverse_gateway.pages.rendering import NEXT_PIECE
from multiverse_gateway.pages.sign_in import MAX_FIELDS
from multiverse_gateway.protocols import Client
from multiverse_gateway.stores.memory import MemoryStore
from support.gateways import ADMIN_KEY, Verdicts
from support.pages import browsing

Answer = Callable[[httpx2.Request], Awaitable[httpx2.Response]]


class Servers(httpx2.AsyncBaseTransport):
    """Model servers that answer as the test wants."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: list[httpx2.Request] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Note the request and answer it."""
        self.asked.append(request)
        return await self._answer(request)


def status(code: int) -> Answer:
    """Answer with a status, and with a choice."""

    async def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(code, json={"choices": [{"message": {"content": "H"}}]})

    return answer


async def chatless(request: httpx2.Request) -> httpx2.Response:
    """List a model, and know no chat."""
    return httpx2.Response(200, json={"data": [{"id": "tiny"}]}) if request.method == "GET" else httpx2.Response(404)


async def rambles(request: httpx2.Request) -> httpx2.Response:
    """Answer with a page, as a tunnel or a router does."""
    return httpx2.Response(200, html="<html>Welcome</html>")


async def breaks(request: httpx2.Request) -> httpx2.Response:
    """Break the connection."""
    raise httpx2.ReadError("gone", request=request)


async def hangs(request: httpx2.Request) -> httpx2.Response:
    """End as a request does whose time is over."""
    raise httpx2.ReadTimeout("slow", request=request)


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        (status(200), "good", "tiny answers."),
        (chatless, "good", "tiny does not chat, which is normal for an embedding model."),
        (status(404), "warn", "/v1/models returns status 404"),
        (rambles, "warn", "The answer to a chat completion is not JSON"),
        (breaks, "warn", "The connection broke before the answer was complete"),
        (hangs, "warn", "is the server overloaded or still loading its model?"),
    ],
)
async def test_the_last_step_asks_for_one_token(answer: Answer, state: str, words: str) -> None:
    """With the key that was typed; what comes back is named in a category only."""
    servers = Servers(answer)
    async with browsing(servers=servers) as browser:
        await browser.sign_in()
        found = await browser.send("/register/test", {"endpoint_url": "gpu.example:8000/v1", "api_key": "sk-typed"}, hx_request="true")
        last = re.findall(r'<li class="(\w+)">.*', found.text)[-1]
        assert last == state
        assert words in found.text
        assert ("All checks passed." in found.text) is (state == "good")
    asked = servers.asked[0]
    assert str(asked.url) == "http://gpu.example:8000/v1/chat/completions"
    assert asked.headers["authorization"] == "Bearer sk-typed"


async def test_the_steps_come_one_after_the_other() -> None:
    """What is done, what is being tried, and what comes later; the last piece is what was found."""
    async with browsing(servers=Servers(status(200))) as browser:
        await browser.sign_in()
        found = await browser.send("/register/test", {"endpoint_url": "http://gpu.example:8000"}, hx_request="true")
        states = [re.findall(r'<li class="(\w+)">', piece) for piece in found.text.split(NEXT_PIECE)]
        assert states == [["busy", *["idle"] * 5], [*["good"] * 5, "busy"], [*["good"] * 5, "good"]]
        assert "choices" not in found.text.rpartition(NEXT_PIECE)[0]
        assert found.headers["cache-control"] == "no-store"
        closed = await browser.send("/register/test", {"endpoint_url": "http://169.254.169.254"}, hx_request="true")
        assert NEXT_PIECE not in closed.text


async def test_a_test_that_fails_in_the_middle_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is sent, so the last piece tells; the log has the cause."""

    async def forget(self: Verdicts, server: Server, http: Client) -> None:
        """Return nothing, as a probe of somebody's might."""

    monkeypatch.setattr(Verdicts, "check", forget)
    async with browsing() as browser:
        await browser.sign_in()
        found = await browser.send("/register/test", {"endpoint_url": "http://gpu.example:8000"}, hx_request="true")
        steps, last = found.text.split(NEXT_PIECE)
        assert 'class="busy"' in steps
        assert "Internal error. Try again" in last
        assert "busy" not in last
        logged = await browser.client.get("/admin/logs?component=ui&level=ERROR", headers={"x-api-key": ADMIN_KEY})
        assert "AttributeError" in logged.json()[0]["traceback"]


async def test_an_only_model_is_taken_and_others_are_offered() -> None:
    """A name that was typed stays, with a word when the server does not list it."""
    async with browsing(servers=Servers(status(200))) as browser:
        await browser.sign_in()
        form = {"endpoint_url": "http://gpu.example:8000"}
        alone = await browser.send("/register/test", form, hx_request="true")
        assert "1 model found." in alone.text
        assert 'data-value="tiny" data-at-once' in alone.text
        other = await browser.send("/register/test", {**form, "model_name": "other"}, hx_request="true")
        assert "The server does not list other. Choose one of its models below." in other.text
        assert "data-at-once" not in other.text


async def test_a_refused_key_and_a_refused_address_end_the_test_where_they_stand() -> None:
    """The steps after them were not tried."""
    async with browsing() as browser:
        await browser.sign_in()
        browser.probe.unauthorized.add("http://gpu.example:8000")
        denied = await browser.send("/register/test", {"endpoint_url": "http://gpu.example:8000"}, hx_request="true")
        assert re.search(r'<li class="bad">.*<strong>Authentication</strong>', denied.text)
        assert denied.text.rpartition(NEXT_PIECE)[2].count('class="good"') == 3
        closed = await browser.send("/register/test", {"endpoint_url": "http://169.254.169.254"}, hx_request="true")
        assert re.search(r'<li class="bad">.*<strong>Address allowed</strong>.*This gateway does not connect to this address', closed.text)


async def test_a_name_that_leads_to_a_refused_address_ends_the_test_at_the_address() -> None:
    """The resolver's answer is judged, as the gateway's own probe does it."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["169.254.169.254"]

    async with browsing(probes=True, resolve=resolve) as browser:
        await browser.sign_in()
        moved = await browser.send("/register/test", {"endpoint_url": "http://moved.example"}, hx_request="true")
        assert re.search(r'<li class="bad">.*<strong>Address allowed</strong>', moved.text)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model_name", "", "Required."),
        ("model_name", "with space", "Model name must be"),
        ("model_name", "llama3.2:3b", ""),
        ("weight", "0", "Weight must be"),
        ("weight", "1_0", ""),
        ("max_tokens", "", ""),
        ("streaming", "on", ""),
    ],
)
async def test_a_field_says_whether_it_can_be_used(name: str, value: str, words: str) -> None:
    """While one is still in the next one."""
    async with browsing() as browser:
        await browser.sign_in()
        note = await browser.send(f"/register/field?name={name}", {name: value}, hx_request="true")
        assert note.status_code == 200
        assert words in note.text
        assert ('data-state="bad"' in note.text) is bool(words)
        missing = await browser.send("/register/field?name=colour", {}, hx_request="true")
        assert missing.status_code == 404
        assert "This field does not exist" in missing.headers["hx-trigger"]


@pytest.mark.parametrize(
    ("typed", "kind"),
    [
        ("192.168.1.20:11434", "a computer in the local network"),
        ("[fd00::1]:8080", "a computer in the local network"),
        ("fdroid.example", "the host fdroid.example"),
        ("10.gpu.example", "the host 10.gpu.example"),
        ("8.8.8.8", "a public address"),
        ("pc.tail1234.ts.net", "a tunnel"),
    ],
)
async def test_what_stands_nearby_is_recognized(typed: str, kind: str) -> None:
    """Where the operator opened such addresses."""
    async with browsing(allow_private_networks="true") as browser:
        await browser.sign_in()
        note = await browser.send("/register/address", {"endpoint_url": typed}, hx_request="true")
        assert f"This is {kind}." in note.text


async def test_fragments_follow_what_was_asked_for() -> None:
    """HTMX gets the part, and the address that belongs to it; whole pages come to everybody else."""
    async with browsing() as browser:
        await browser.register()
        await browser.sign_in()
        live = {"hx_request": "true", "hx_target": "live"}
        board = await browser.open("/dashboard?q=tin&sort=model", **live)
        assert board.headers["hx-replace-url"] == "/dashboard?q=tin&sort=model"
        assert board.text.lstrip().startswith('<div id="live"')
        assert 'id="headline" hx-swap-oob="true"' in board.text
        models = await browser.open("/models?q=tin", **live)
        assert models.headers["hx-replace-url"] == "/models?q=tin"
        logs = await browser.open("/logs?level=DEBUG&since=60&component=ui", **live)
        assert logs.headers["hx-replace-url"] == "/logs?level=DEBUG&component=ui&since=60"
        assert "<html" not in board.text + models.text + logs.text


async def test_too_many_open_pages_are_told_to_ask_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """They poll then."""
    async with browsing() as browser:
        await browser.sign_in()
        assert MAX_STREAMS > 100
        monkeypatch.setattr("multiverse_gateway.pages.live.MAX_STREAMS", 0)
        for path in ("/live", "/live?of=dashboard&of=logs"):
            answer = await browser.open(path)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "30"


async def test_a_store_that_cannot_be_read_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages go on without the history."""
    async with browsing() as browser:
        server_id = await browser.register()
        await browser.sign_in()

        async def away(*_: object) -> None:
            raise StorageUnavailable("the disk is full")

        monkeypatch.setattr(MemoryStore, "history", away)
        page = await browser.open(f"/server/{server_id}")
        assert page.status_code == 200
        assert "No checks yet." in page.text


async def test_a_mistake_of_ours_is_a_page_with_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a toast; and it says nothing of the code."""
    async with browsing() as browser:
        server_id = await browser.register()
        await browser.sign_in()

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("a secret of the code")

        monkeypatch.setattr(server_pages, "statistics", broken)
        failed = await browser.open(f"/server/{server_id}")
        assert failed.status_code == 500
        assert "Internal error" in failed.text
        assert failed.headers["x-request-id"] in failed.text
        assert "a secret of the code" not in failed.text
        toast = await browser.open(f"/server/{server_id}", hx_request="true")
        assert "Internal error" in toast.headers["hx-trigger"]


@pytest.mark.parametrize("hx_request", ["true", ""])
async def test_a_failed_save_fills_the_steps_of_the_test(hx_request: str) -> None:
    """The page says where the server failed instead of "not run", for a registration and for a change, with scripts and without."""
    async with browsing() as browser:
        await browser.sign_in()
        server_id = await browser.register()
        url = "http://elsewhere.example"
        browser.probe.failing[url] = "/v1/models returns status 500"
        form = {"model_name": "tiny", "endpoint_url": url, "streaming": "on"}
        for path in ("/register", f"/server/{server_id}/edit"):
            answer = await browser.send(path, form, hx_request=hx_request)
            steps = re.findall(r'<li class="(\w+)">', answer.text)
            assert steps == ["good", "good", "good", "good", "bad", "idle"], answer.text
            assert ('id="test" hx-swap-oob' in answer.text) is bool(hx_request)
            assert "The connection test failed: /v1/models returns status 500." in answer.text
        forbidden = await browser.send("/register", form | {"endpoint_url": "http://169.254.169.254"}, hx_request=hx_request)
        assert re.findall(r'<li class="(\w+)">', forbidden.text) == ["good", "bad", "idle", "idle", "idle", "idle"]
        weight = await browser.send("/register", form | {"weight": "x"}, hx_request=hx_request)
        assert 'class="bad"' not in weight.text


async def test_a_form_that_cannot_be_read_is_refused() -> None:
    """At the gate, and at the form to sign in."""
    async with browsing() as browser:
        await browser.sign_in()
        fields = {f"field{number}": "x" for number in range(MAX_FIELDS + 1)}
        assert (await browser.send("/register", fields)).status_code == 400
        assert (await browser.send("/login", fields)).status_code == 400


async def states_slots(request: httpx2.Request) -> httpx2.Response:
    """State 4 slots, as llama.cpp does."""
    return httpx2.Response(200, json={"total_slots": 4}) if request.url.path == "/props" else httpx2.Response(404)


@pytest.mark.parametrize(
    ("typed", "stored", "words"),
    [
        ("", "4", "llama.cpp states 4 slots, so it gets at most 4 requests at once."),
        ("7", "7", "The registration sets the limit to 7."),
        ("none", "", "The registration asks for no limit."),
        (" No limit ", "", "The registration asks for no limit."),
    ],
)
async def test_registering_says_how_many_requests_a_server_gets_at_once_and_why(typed: str, stored: str, words: str) -> None:
    async with browsing(servers=Servers(states_slots)) as browser:
        await browser.sign_in()
        browser.probe.owned_by = "llamacpp"
        form = {"model_name": "tiny", "endpoint_url": "gpu.example:8000", "streaming": "on", "max_concurrency": typed}
        note = await browser.send("/register/field?name=max_concurrency", form, hx_request="true")
        assert 'data-state="bad"' not in note.text
        done = await browser.send("/register", form, hx_request="true")
        assert f"Max concurrent requests: <strong>{stored or 'no limit'}</strong>. {words}" in done.text
        (server,) = (await browser.client.get("/admin/servers", headers={"x-api-key": ADMIN_KEY})).json()
        assert server["max_concurrency"] == (int(stored) if stored else None)


async def test_a_server_without_a_limit_is_offered_what_its_engine_states() -> None:
    """By one button on its page, with scripts and without them; a server with a limit keeps it, and has no button."""
    async with browsing(servers=Servers(states_slots)) as browser:
        server_id = await browser.register(max_concurrency=None)
        await browser.sign_in()
        assert "Use the engine's own limit" in (await browser.open(f"/server/{server_id}")).text
        saved = await browser.send(f"/server/{server_id}/limit")
        assert saved.status_code == 303
        page = await browser.open(f"/server/{server_id}")
        assert "Saved: 4 requests at once. llama.cpp states 4 slots." in page.text
        assert "Use the engine's own limit" not in page.text
        assert (await browser.send(f"/server/{server_id}/limit", hx_request="true")).headers["hx-redirect"] == f"/server/{server_id}"


async def lists_as_vllm(request: httpx2.Request) -> httpx2.Response:
    """List a model as vLLM does, and know nothing else."""
    known = request.url.path == "/v1/models"
    return httpx2.Response(200, json={"data": [{"id": "tiny", "owned_by": "vllm"}]}) if known else httpx2.Response(404)


@pytest.mark.parametrize(("answer", "engine"), [(status(404), "The server"), (breaks, "The server"), (lists_as_vllm, "vLLM")])
async def test_an_engine_that_states_nothing_changes_nothing(answer: Answer, engine: str) -> None:
    async with browsing(servers=Servers(answer)) as browser:
        server_id = await browser.register()
        await browser.sign_in()
        await browser.send(f"/server/{server_id}/limit")
        page = await browser.open(f"/server/{server_id}")
        assert f"{engine} does not state how many requests it answers at once. Nothing was changed." in page.text
        assert "Use the engine's own limit" in page.text
