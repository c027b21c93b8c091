"""The pages of the first steps: engines of this computer, who can reach the gateway, and the answers of the settings."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from html import unescape
from typing import Any

import anyio
import attrs
import httpx2
import pytest

from multiverse_gateway.core.engine_offers import ENGINES, LocalEngine
from multiverse_gateway.pages.settings_page import with_code
from multiverse_gateway.testing.store import make_server
from support import behaviours
from support.backends import Backend
from support.gateways import ADMIN_KEY
from support.pages import Browser, browsing

OLLAMA = ["llama3.2:3b", "qwen3:4b", "nomic-embed-text:latest"]
FORWARDED = {"x_forwarded_for": "198.51.100.7"}


@attrs.define(eq=False)
class Computer:
    """The operator's computer: the gateway, an Ollama, and a program at a port that is not looked at."""

    browser: Browser
    ollama: Backend
    neighbor: Backend

    @property
    def offer(self) -> dict[str, str]:
        """The form of the first offer."""
        return {"port": str(self.ollama.port), "model": OLLAMA[0]}

    async def servers(self) -> list[dict[str, Any]]:
        """The registered servers."""
        answer = await self.browser.client.get(f"{self.browser.prefix}/admin/servers", headers={"x-api-key": ADMIN_KEY})
        return list(answer.json())


@asynccontextmanager
async def computer(listener: str | None = "127.0.0.1", *, signed_in: bool = True, **settings: Any) -> AsyncIterator[Computer]:
    """Run a gateway that looks for Ollama at the port of a scripted one; `listener` is where the gateway listens."""
    with Backend("ollama", models=OLLAMA) as ollama, Backend("neighbor") as neighbor:
        ollama.owned_by = "library"
        ollama.states = {"/api/version": {"version": "0.13.0"}}
        async with browsing(probes=True, engines=[LocalEngine("Ollama", ollama.port)], **{"host": "localhost:8000", **settings}) as browser:
            if listener is not None:
                browser.parts.gateway.network.listen_on(listener)
                browser.parts.gateway.network.learn_local_addresses()
            if signed_in:
                await browser.sign_in()
            yield Computer(browser, ollama, neighbor)


def text_of(page: httpx2.Response) -> str:
    """Return what a person reads of a page's content."""
    content = page.text.partition("<main")[2].partition("</main>")[0]
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", content)))


def test_the_ports_are_those_of_the_engines_documentation() -> None:
    assert [(engine.name, engine.url) for engine in ENGINES] == [
        ("Ollama", "http://127.0.0.1:11434"),
        ("LM Studio", "http://127.0.0.1:1234"),
        ("llama.cpp", "http://127.0.0.1:8080"),
    ]


async def test_a_found_engine_is_offered_and_one_click_registers_its_model() -> None:
    """Then it serves, what is left is offered on the page that registers, and nothing else on the computer was asked."""
    async with computer() as here:
        assert "Found Ollama on this computer, 3 models" in text_of(await here.browser.open("/dashboard"))
        done = await here.browser.send("/register/found", here.offer)
        assert (done.status_code, "llama3.2:3b is registered" in done.text) == (200, True)
        (server,) = await here.servers()
        assert (server["model_name"], server["endpoint_url"], server["max_concurrency"]) == (OLLAMA[0], here.ollama.url, 1)
        body = {"model": OLLAMA[0], "messages": [{"role": "user", "content": "Hi"}]}
        assert (await here.browser.client.post("/v1/chat/completions", json=body)).status_code == 200
        page = await here.browser.open("/register")
        assert "Found Ollama on this computer, 2 models" in text_of(page)
        assert "Found Ollama" not in text_of(await here.browser.open("/dashboard"))
        assert here.neighbor.connections == 0
        opened = f"127.0.0.1:{here.ollama.port}"
        assert f"may also connect to {opened}, which you opened" in text_of(await here.browser.open("/settings"))


async def test_what_was_found_is_kept_for_a_moment() -> None:
    """Reloading and several tabs cost the engine nothing; later it is asked again."""
    async with computer() as here:
        here.browser.parts.gateway.now = lambda: 1e8
        for _ in range(3):
            await here.browser.open("/dashboard")
        assert len(here.ollama.probes) == 1
        async with anyio.create_task_group() as group:
            here.browser.parts.gateway.now = lambda: 1e9
            for _ in range(3):
                group.start_soon(here.browser.open, "/register")
        assert len(here.ollama.probes) == 2


@pytest.mark.parametrize(
    ("listener", "settings"),
    [
        (None, {}),
        ("0.0.0.0", {}),
        ("192.168.1.20", {}),
        ("127.0.0.1", {"trusted_proxies": ("127.0.0.1/32",)}),
        ("127.0.0.1", {"public_url": ("http://localhost:8000",)}),
        ("127.0.0.1", {"root_path": "/ai"}),
        (None, {"prefix": "/ai"}),
        ("0.0.0.0", {"allow_private_networks": "true"}),
    ],
)
async def test_nothing_is_looked_for_where_others_may_reach_the_gateway(listener: str | None, settings: dict[str, Any]) -> None:
    """Inside another application nobody knows that, so nothing is looked for either; a form that is sent all the same opens nothing."""
    async with computer(listener, **settings) as here:
        for path in ("/dashboard", "/register", "/settings"):
            assert "Found Ollama" not in (await here.browser.open(path)).text
        refused = await here.browser.send("/register/found", here.offer)
        assert refused.status_code == 400
        assert "reload the page" in refused.text
        assert (await here.servers(), here.ollama.connections) == ([], 0)


@contextmanager
def nothing_is_asked(here: Computer) -> Iterator[None]:
    seen = here.ollama.connections
    yield
    assert here.ollama.connections == seen


async def test_only_the_operators_session_on_this_computer_makes_the_gateway_look() -> None:
    """Strangers, programs with the admin key, and requests that a proxy or tunnel forwards find out nothing, and open nothing."""
    async with computer(signed_in=False, public_dashboard=True) as here:
        browser = here.browser
        with nothing_is_asked(here):
            for path in ("/dashboard", "/register", "/models", "/login", "/settings", "/docs"):
                await browser.open(path)
                await browser.open(path, x_api_key=ADMIN_KEY)
                await browser.open(path, authorization=f"Bearer {ADMIN_KEY}")
            stranger = await browser.send("/register/found", here.offer)
            program = await browser.client.post("/register/found", data=here.offer, headers={"x-api-key": ADMIN_KEY})
            assert (stranger.status_code, program.status_code) == (303, 403)
        await browser.sign_in()
        with nothing_is_asked(here):
            for headers in (FORWARDED, {"cf_connecting_ip": "198.51.100.7"}, {"via": "1.1 tunnel"}, {"forwarded": "for=198.51.100.7"}):
                assert "Found Ollama" not in (await browser.open("/register", **headers)).text
                assert (await browser.send("/register/found", here.offer, **headers)).status_code == 403
            without_token = await browser.client.post("/register/found", data=here.offer, headers={"origin": "http://localhost:8000"})
            elsewhere = await browser.send("/register/found", here.offer, origin="http://evil.example")
            assert (without_token.status_code, elsewhere.status_code) == (403, 403)
            assert "Found Ollama" not in (await browser.open("/register")).text, "a tunnel was noticed"
            assert (await browser.send("/register/found", here.offer)).status_code == 403
        assert await here.servers() == []


async def test_an_operator_at_another_computer_is_offered_nothing() -> None:
    """Through whatever forwards without a trace: the other end of the connection is not here."""
    async with computer(peer="192.168.1.30") as here:
        with nothing_is_asked(here):
            assert "Found Ollama" not in (await here.browser.open("/register")).text
            assert (await here.browser.send("/register/found", here.offer)).status_code == 403


@pytest.mark.parametrize(
    "host", ["gateway.example", "gateway.example:8000", "192.168.1.20:8000", "localhost.evil.example", "rebound.example:8000"]
)
async def test_a_gateway_that_is_called_by_another_name_is_behind_something(host: str) -> None:
    """A proxy that leaves no trace in the headers, or a name that was made to lead here: nothing is looked for, and the banner says so."""
    async with computer(host=host) as here:
        with nothing_is_asked(here):
            assert "Found Ollama" not in (await here.browser.open("/register")).text
            assert (await here.browser.send("/register/found", here.offer)).status_code == 403
        assert f"Others reach the gateway through a proxy or tunnel at http://{host}." in text_of(await here.browser.open("/settings"))


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "mine.localhost"])
async def test_the_names_of_this_computer_are_known(host: str) -> None:
    async with computer(host=host) as here:
        assert "Found Ollama on this computer" in text_of(await here.browser.open("/register"))


@pytest.mark.parametrize(
    "form",
    [
        {"port": "NEIGHBOR"},
        {"port": "22"},
        {"port": ""},
        {"port": "127.0.0.1:NEIGHBOR"},
        {"model": "not-listed"},
        {"model": ""},
        {"endpoint_url": "http://127.0.0.1:NEIGHBOR", "port": "NEIGHBOR", "host": "127.0.0.1"},
    ],
)
async def test_a_form_cannot_name_another_address_or_model(form: dict[str, str]) -> None:
    async with computer() as here:
        changed = {name: value.replace("NEIGHBOR", str(here.neighbor.port)) for name, value in form.items()}
        assert (await here.browser.send("/register/found", {**here.offer, **changed})).status_code == 400
        assert (await here.servers(), here.neighbor.connections) == ([], 0)


async def test_the_api_cannot_use_what_an_offer_opened() -> None:
    """Not for the same server, not for another one, and not by naming the field that the gateway keeps."""
    async with computer() as here:
        client, headers = here.browser.client, {"x-api-key": ADMIN_KEY}
        await here.browser.send("/register/found", here.offer)
        (server,) = await here.servers()
        opened = {"opened_address": f"127.0.0.1:{here.ollama.port}"}
        for fields in ({"model_name": OLLAMA[0]}, {"model_name": OLLAMA[1]}, {"model_name": OLLAMA[1], **opened}):
            body = {"endpoint_url": here.ollama.url, **fields}
            for path in ("/admin/register", "/admin/test-connection"):
                assert (await client.post(path, json=body, headers=headers)).status_code in (400, 404)
        change = {"endpoint_url": here.neighbor.url, "opened_address": f"127.0.0.1:{here.neighbor.port}"}
        for method in ("PUT", "PATCH"):
            answer = await client.request(method, f"/admin/register/{server['registration_id']}", json=change, headers=headers)
            assert answer.status_code in (400, 405)
        form = {"endpoint_url": here.ollama.url, "model_name": OLLAMA[1], **opened}
        assert (await here.browser.send("/register", form)).status_code == 400
        assert len(await here.servers()) == 1
        assert here.neighbor.connections == 0


async def test_an_opened_server_can_be_edited_and_tested_at_its_address() -> None:
    """The test on its page goes to the address that was opened, and to no other one."""
    async with computer() as here:
        await here.browser.send("/register/found", here.offer)
        (server,) = await here.servers()
        form = {"server_id": server["registration_id"], "endpoint_url": here.ollama.url, "model_name": OLLAMA[1]}
        assert "3 models found." in (await here.browser.send("/register/test", form)).text
        elsewhere = await here.browser.send("/register/test", {**form, "endpoint_url": here.neighbor.url})
        assert "does not connect to" in elsewhere.text
        assert here.neighbor.connections == 0
        answer = await here.browser.send(f"/server/{server['registration_id']}/edit", {**form, "max_concurrency": "1", "weight": "1"})
        assert answer.status_code == 303
        (server,) = await here.servers()
        assert server["model_name"] == OLLAMA[1]


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        (behaviours.answer(200, b'{"object": "list", "data": null}'), "Ollama runs on this computer, but has no model yet"),
        (
            behaviours.answer(200, b'{"data": [{"id": "<script>alert(1)</script>"}, {"id": "good"}]}'),
            "Found Ollama on this computer, 1 model",
        ),
        (behaviours.answer(200, b'{"data": [{"id": "x", "owned_by": "multiverse-gateway"}]}'), None),
        (behaviours.answer(200, b'{"data": [{"id": "x", "owned_by": "llamacpp"}]}'), "Found llama.cpp on this computer, 1 model"),
        (behaviours.answer(200, b"[]" * 600_000), None),
        (behaviours.redirect("http://169.254.169.254/latest"), None),
        (behaviours.status(404), None),
        (behaviours.unauthorized(), None),
        (behaviours.html_page(), None),
        (behaviours.garbage(), None),
        (behaviours.reset_first(), None),
        (behaviours.huge_model_list(), None),
    ],
)
async def test_whatever_answers_at_the_port_does_no_harm(behave: Any, words: str | None) -> None:
    async with computer() as here:
        here.ollama.behave_models = behave
        page = await here.browser.open("/dashboard")
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        assert (words in text_of(page)) if words else ("on this computer," not in text_of(page))


async def test_a_port_that_hangs_does_not_keep_the_page_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines that answer are offered all the same."""
    monkeypatch.setattr("multiverse_gateway.local_engines.FIND_SECONDS", 0.2)
    with Backend("hangs", behave_models=behaviours.stall()) as hangs, Backend("answers", models=["tiny"]) as answers:
        engines = [LocalEngine("LM Studio", hangs.port), LocalEngine("llama.cpp", answers.port, is_shared=True)]
        async with browsing(probes=True, engines=engines, host="127.0.0.1:8000") as browser:
            browser.parts.gateway.network.listen_on("127.0.0.1")
            browser.parts.gateway.network.learn_local_addresses()
            await browser.sign_in()
            page = text_of(await browser.open("/dashboard"))
            assert "Found vLLM on this computer, 1 model" in page
            assert "LM Studio on this computer" not in page


@pytest.mark.parametrize("typed", ["localhost:11434", "http://127.0.0.1:8080/v1", "[::1]:8080", "0.0.0.0:11434", "my.localhost:1234"])
@pytest.mark.parametrize("allowed", ["", "true"])
async def test_localhost_is_explained_to_whoever_types_it(typed: str, allowed: str) -> None:
    """In yellow, before anything is tested; a person who registers it nevertheless reads it again, in the API too."""
    async with browsing(allow_private_networks=allowed) as browser:
        await browser.sign_in()
        note = await browser.send("/register/address", {"endpoint_url": typed}, hx_request="true")
        words = "localhost means the gateway's computer, not yours. Use your computer's address or a tunnel."
        assert words in unescape(note.text)
        assert 'class="note warn"' in note.text
        if not allowed:
            sent = {"endpoint_url": f"http://{typed.removeprefix('http://')}", "model_name": "tiny"}
            for answer in (
                await browser.send("/register", sent),
                await browser.client.post("/admin/register", json=sent, headers={"x-api-key": ADMIN_KEY}),
            ):
                assert answer.status_code == 400
                assert words.removesuffix(".") in unescape(answer.text)


@pytest.mark.parametrize(
    ("listener", "settings", "words"),
    [
        (
            "127.0.0.1",
            {},
            "Only this computer can reach the gateway. How to open it To open it to your network, stop the gateway and start it "
            "again with: "
            "multiverse-gateway run --host 0.0.0.0 --allow-private-networks true",
        ),
        ("127.0.0.1", {"allow_private_networks": "10.0.0.0/8"}, "multiverse-gateway run --host 0.0.0.0"),
        ("192.168.1.20", {}, "Every computer in your network can reach the gateway at http://192.168.1.20:8000. Programs there"),
        ("0.0.0.0", {}, "can reach the gateway at http://10.1.2.3:8000. Programs there use this base URL: http://10.1.2.3:8000/v1"),
        ("127.0.0.1", {"public_url": ("https://models.example",)}, "through a proxy or tunnel at https://models.example. Programs use"),
        ("127.0.0.1", {"trusted_proxies": ("127.0.0.1/32",)}, "through a proxy or tunnel. Anyone who knows its address"),
        (None, {}, None),
    ],
)
async def test_the_operator_reads_who_can_reach_the_gateway(listener: str | None, settings: dict[str, Any], words: str | None) -> None:
    """On the dashboard, empty or not, and with the settings; visitors do not."""
    async with browsing(public_dashboard=True, **settings) as browser:
        network = browser.parts.gateway.network
        if listener is not None:
            network.listen_on(listener)
            network.learn_local_addresses()
            network.network_hosts = ("10.1.2.3", "fd00::7")
        assert 'class="reach"' not in (await browser.open("/dashboard")).text
        await browser.sign_in()
        await browser.register()
        for path in ("/dashboard", "/settings"):
            page = await browser.open(path, host="localhost:8000")
            assert ('class="reach"' in page.text) is (words is not None)
            assert words is None or words in text_of(page)


async def test_a_tunnel_that_nobody_named_is_noticed() -> None:
    async with computer() as here:
        await here.browser.client.get("/v1/models", headers={"x-forwarded-for": "198.51.100.7"})
        await here.browser.open("/dashboard", **FORWARDED)
        assert "Others reach the gateway through a proxy or tunnel." in text_of(await here.browser.open("/settings"))


@pytest.mark.parametrize(
    ("host", "hosts", "expected"),
    [
        ("localhost:8000", ("10.1.2.3",), "http://10.1.2.3:8000/v1"),
        ("127.0.0.1:8000", ("fd00::7",), "http://[fd00::7]:8000/v1"),
        ("[::1]:8000", ("10.1.2.3",), "http://10.1.2.3:8000/v1"),
        ("localhost:8000", (), "http://localhost:8000/v1"),
        ("gateway.example:8000", ("10.1.2.3",), "http://gateway.example:8000/v1"),
    ],
)
async def test_others_can_use_the_base_url_that_is_shown(host: str, hosts: tuple[str, ...], expected: str) -> None:
    """If the gateway listens for them, the address that leads every computer to itself is replaced."""
    async with browsing() as browser:
        network = browser.parts.gateway.network
        network.listen_on("0.0.0.0")
        network.network_hosts = hosts
        page = await browser.open("/docs", host=host)
        assert f"<code>{expected}</code>" in page.text


async def test_the_settings_begin_with_three_answers() -> None:
    """Each in words, with the line to set; no back-ticks, and the admin key that is in force is not called unset."""
    async with browsing(rate_limit_per_minute=60) as browser:
        await browser.sign_in()
        page = text_of(await browser.open("/settings"))
        assert "Who may use the models? Everyone who can reach the gateway." in page
        assert "To require keys: REQUIRE_CLIENT_AUTH=true" in page
        assert "Where may model servers be? Model servers must have a public address or a tunnel." in page
        assert "To allow computers in your network: ALLOW_PRIVATE_NETWORKS=true" in page
        assert "Which limits hold? Without a key: 60 requests per minute from each address, 256 at once when servers are busy." in page
        assert "`" not in page
        assert "direct door" not in page
    async with browsing(
        require_client_auth=True, client_api_keys=("a-client-key-of-the-class",), allow_private_networks="10.0.0.0/8", max_at_once_per_key=0
    ) as browser:
        await browser.sign_in()
        page = text_of(await browser.open("/settings"))
        assert "People with a client key; 1 key can be used now." in page
        assert "a public address or a tunnel, or be in 10.0.0.0/8." in page
        assert "Without a key: any number of requests per minute" in page
        assert "any number at once; a key can have limits of its own" in page
    async with browsing(allow_private_networks="true") as browser:
        await browser.sign_in()
        assert "Model servers may be anywhere" in text_of(await browser.open("/settings"))


async def test_the_admin_key_of_the_first_start_is_in_force() -> None:
    async with browsing(admin_api_key=None) as browser:
        created = browser.parts.admin_keys.created
        assert created
        await browser.sign_in(created)
        assert "in force (made at first start)" in text_of(await browser.open("/settings"))


def test_what_stands_between_back_ticks_is_code() -> None:
    assert with_code("a `b` & <c> `d") == "a <code>b</code> &amp; &lt;c&gt; `d"


@pytest.mark.parametrize("url", ["http://127.0.0.1:PORT", "http://localhost:PORT", "http://[::1]:PORT"])
async def test_what_is_registered_is_not_offered_again(url: str) -> None:
    """By whatever name of this computer; the same model at another port or computer is."""
    async with computer(allow_private_networks="true") as here:
        gateway = here.browser.parts.gateway
        for model, endpoint_url in (
            (OLLAMA[0].removesuffix(":latest"), url.replace("PORT", str(here.ollama.port))),
            (OLLAMA[1], f"http://127.0.0.1:{here.neighbor.port}"),
            (OLLAMA[2], "http://gpu.example:11434"),
        ):
            server = make_server(model, model_name=model, endpoint_url=endpoint_url, opened_address=None)
            await gateway.store.save_server(server)
        await gateway.store.save_server(make_server("old", model_name=OLLAMA[1], endpoint_url="http://127.1:11434", opened_address=None))
        await gateway.refresh()
        page = await here.browser.open("/register")
        assert re.findall(r"<option>([^<]+)</option>", page.text) == OLLAMA[1:]


@pytest.mark.parametrize(("required", "key"), [(False, "not-needed"), (True, "your-client-key")])
async def test_the_lines_to_copy_say_which_key_a_program_needs(required: bool, key: str) -> None:
    async with browsing(require_client_auth=required) as browser:
        await browser.sign_in()
        assert f'base_url="http://gateway/v1", api_key="{key}")' in unescape((await browser.open("/dashboard")).text)
