"""The page of models: rows, the chosen model, its code."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import attrs
import pytest

from multiverse_gateway.core.engine_facts import Abilities, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.health.listing import UNLISTED
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.speeds import LEAST_TOKENS, Speeds
from multiverse_gateway.pages.snippets import snippets_of
from support.gateways import ADMIN_KEY
from support.pages import Browser, browsing

A = ServerId("a")
NOTHING = "\N{EN DASH}"


def test_a_speed_follows_the_newest_answers() -> None:
    """Several answers at once weigh as much as one after the other; tiny answers say nothing."""
    speeds, one_by_one = Speeds(), Speeds()
    speeds.learn(A, tokens=LEAST_TOKENS - 1, seconds=1.0, answers=1)
    speeds.learn(A, tokens=100, seconds=0.0, answers=1)
    assert speeds.of(A) is None
    for each in (speeds, one_by_one):
        each.learn(A, tokens=100, seconds=1.0, answers=1)
    speeds.learn(A, tokens=60, seconds=3.0, answers=3)
    for _ in range(3):
        one_by_one.learn(A, tokens=20, seconds=1.0, answers=1)
    assert speeds.of(A) == pytest.approx(one_by_one.of(A))
    assert 20 < (speeds.of(A) or 0) < 100
    speeds.keep({})
    assert speeds.of(A) is None


def rows_of(text: str) -> list[str]:
    """Return the texts of the rows, in their order."""
    body = re.search(r'<tbody id="models">(.*?)</tbody>', text, re.DOTALL)
    assert body
    return [" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in re.findall(r"<tr.*?</tr>", body[1], re.DOTALL)]


def measure(browser: Browser, server_id: str, **facts: Any) -> None:
    """Let a server's engine say something about its model."""
    book = browser.parts.gateway.health_book
    server = book.table.routes[ServerId(server_id)].server
    model = attrs.evolve(ModelFacts(name=server.model_name), **facts)
    book.note_measured(server, Measured(kind=EngineKind.OLLAMA, model=model))


async def test_models_are_rows_and_those_that_are_offline_come_last() -> None:
    """Each with its context, its speed, how many servers are up, and since when it is offline."""
    async with browsing() as browser:
        await browser.register(model_name="big", endpoint_url="http://big0.example", capabilities={"context_length": 8192})
        big = await browser.register(model_name="big", endpoint_url="http://big1.example")
        await browser.register(model_name="small", endpoint_url="http://small.example")
        await browser.register(model_name="another", endpoint_url="http://dead.example")
        await browser.register(model_name="odd", endpoint_url="http://odd.example")
        measure(browser, big, context=4096)
        browser.parts.gateway.usage_book.speeds.learn(ServerId(big), tokens=420, seconds=10.0, answers=1)
        browser.probe.failing |= {"http://dead.example": "it is off", "http://big0.example": "it is off"}
        browser.probe.warnings["http://odd.example"] = UNLISTED
        await browser.sign_in()
        for route in list(browser.parts.gateway.table.routes.values()):
            await browser.send(f"/server/{route.server.id}/check", hx_request="true")
        page = await browser.open("/models")
        rows = rows_of(page.text)
        assert [row.split(" Copy ")[0].split()[-1] for row in rows] == ["big", "odd", "small", "another"]
        assert rows[0] == "Available on some servers: big Copy 4,096 42 tokens/s 1 of 2"
        assert rows[1].endswith("0 of 1 Needs attention")
        assert rows[2] == f"Available: small Copy {NOTHING} {NOTHING} 1 of 1"
        assert re.fullmatch(rf"Offline: another Copy {NOTHING} {NOTHING} Offline since 20\S+", rows[3])
        record = (await browser.client.get(f"/admin/servers/{big}", headers={"x-api-key": "an-admin-key-for-tests"})).json()
        assert record["tokens_per_second"] == 42.0
        assert f'multiverse_server_tokens_per_second{{model="big",server="{big}"}} 42.0' in (await browser.client.get("/metrics")).text


async def test_a_model_is_chosen_by_a_link() -> None:
    """Without scripts, and within what was searched for; the first one that works is chosen if none was."""
    async with browsing() as browser:
        for name in ("alpha", "beta", "gamma/2"):
            await browser.register(model_name=name, endpoint_url=f"http://{name[0]}.example")
        unproven = {"servers": [{"model_name": "a-new-one", "endpoint_url": "http://new.example"}]}
        assert (await browser.client.post("/admin/import", json=unproven, headers={"x-api-key": ADMIN_KEY})).status_code == 200
        await browser.sign_in()

        async def chosen(path: str) -> str:
            found = re.search(r'<h2 id="use-title">(.*?)</h2>', (await browser.open(path)).text)
            assert found
            return found[1]

        page = unescape((await browser.open("/models?q=a")).text)
        assert 'href="/models?q=a&model=beta#use"' in page
        assert await chosen("/models") == "alpha"
        assert await chosen("/models?q=a&model=beta") == "beta"
        assert await chosen("/models?model=gamma/2") == "gamma/2"
        assert await chosen("/models?q=alp&model=beta") == "alpha"
        assert await chosen("/models?model=nothing") == "alpha"
        assert 'model="beta"' in unescape((await browser.open("/models?model=beta")).text)
        fragment = await browser.open("/models?model=beta", hx_request="true", hx_target="live")
        assert fragment.headers["hx-replace-url"] == "/models?model=beta"
        assert "No model has “zeta” in its name" in (await browser.open("/models?q=zeta")).text


async def test_the_chosen_model_shows_what_was_read_from_its_engines() -> None:
    """The context that is served beside the advertised one, and abilities; the smaller promise of a server counts."""
    async with browsing() as browser:
        server = await browser.register(model_name="qwen", capabilities={"context_length": 4096})
        measure(browser, server, context=8192, trained_context=131072, abilities=Abilities(chat=True, tools=True, vision=False))
        await browser.sign_in()
        page = unescape((await browser.open("/models")).text)
        assert "<span>4,096 tokens served (131,072 advertised)</span>" in page
        assert "<span>can do chat, tools</span>" in page
        assert "4,096" in rows_of(page)[0]
        details = unescape((await browser.open(f"/server/{server}")).text)
        assert "8,192 tokens served (131,072 advertised); routing uses the registered 4,096" in details


async def test_a_model_that_only_embeds_gets_code_that_embeds() -> None:
    """As its engine says."""
    async with browsing() as browser:
        server = await browser.register(model_name="nomic")
        measure(browser, server, abilities=Abilities(chat=False, embeddings=True))
        await browser.sign_in()
        page = unescape((await browser.open("/models")).text)
        assert 'client.embeddings.create(model="nomic", input="Hello!")' in page
        assert "makes embeddings" in page


def test_code_streams_unless_the_model_does_not() -> None:
    """Each language has the line that installs its library, and curl needs none."""
    streamed = snippets_of("http://g/v1", "tiny", needs_key=True)
    assert streamed["Python"].startswith("# pip install openai\n")
    assert streamed["Node"].startswith("// npm install openai\n")
    assert all("stream" in code for code in streamed.values())
    assert "your-client-key" in streamed["curl"]
    plain = snippets_of("http://g/v1", "tiny", needs_key=False, streams=False)
    assert not any("stream" in code for code in plain.values())
    embedding = snippets_of("http://g/v1", "tiny", needs_key=False, embeds=True)
    assert all("embeddings" in code and "stream" not in code for code in embedding.values())
