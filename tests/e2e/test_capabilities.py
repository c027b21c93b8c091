"""Routing by what engines say about themselves, with real processes: what is read, and where requests go because of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2
import pytest

from support import behaviours
from support import engine_documents as documents
from support.backends import Backend, Exchange
from support.processes import DOORS, GatewayProcess, LlamaServer, door_setting
from support.sockets import wait_until

pytestmark = pytest.mark.e2e

MODEL = "qwen3:8b"
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}]


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    with GatewayProcess({"RATE_LIMIT_PER_MINUTE": "0", **door_setting(request.param)}) as running:
        yield running


def ollama(context: int, *capabilities: str) -> Mapping[str, Any]:
    """Return the documents of an Ollama that has loaded the model with this context."""
    states: dict[str, Any] = json.loads(json.dumps(documents.OLLAMA))
    states["/api/ps"]["models"][0]["context_length"] = context
    states["/api/show"]["capabilities"] = ["completion", *capabilities]
    return states


def measured(gateway: GatewayProcess, server_id: str) -> dict[str, Any]:
    """Return what was read from a server's engine, as soon as it was."""
    wait_until(lambda: gateway.server(server_id)["measured"] is not None, within=10)
    facts = gateway.server(server_id)["measured"]
    assert isinstance(facts, dict)
    return facts


def post(gateway: GatewayProcess, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{gateway.url}{path}", json={"model": MODEL, **body}, timeout=20.0, trust_env=False)


@pytest.fixture
def servers(gateway: GatewayProcess) -> Iterator[tuple[Backend, Backend]]:
    """Run a small server that sees and embeds nothing, and a large one that sees and takes tools."""
    with Backend("small", behaviours.good(), models=(MODEL,)) as small, Backend("large", behaviours.good(), models=(MODEL,)) as large:
        small.owned_by = large.owned_by = "library"
        small.states, large.states = ollama(1000), ollama(8000, "vision", "tools", "embedding")
        ids = [gateway.register(MODEL, backend.url, max_concurrency=8) for backend in (small, large)]
        assert [measured(gateway, server_id)["context_length"] for server_id in ids] == [1000, 8000]
        yield small, large
        for server_id in ids:
            gateway.admin("DELETE", f"/admin/register/{server_id}")


def test_requests_go_only_where_they_can_be_served(gateway: GatewayProcess, servers: tuple[Backend, Backend]) -> None:
    """Pictures, tools, embeddings and long texts; everything else goes to both, and no reading counts as a request."""
    small, large = servers
    assert (small.hits, large.hits) == (0, 0)
    for _ in range(2):
        assert post(gateway, "/v1/chat/completions", messages=PICTURE).status_code == 200
        assert post(gateway, "/v1/chat/completions", messages=[], tools=[{"type": "function"}], stream=True).status_code == 200
        assert post(gateway, "/v1/embeddings", input="x").status_code == 200
        assert post(gateway, "/v1/chat/completions", messages=[{"role": "user", "content": "x" * 9000}]).status_code == 200
    assert (small.hits, large.hits) == (0, 8)
    for _ in range(4):
        assert post(gateway, "/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}]).status_code == 200
    assert small.hits == 2
    item = httpx2.get(f"{gateway.url}/v1/models/{MODEL}", trust_env=False).json()
    assert (item["context_length"], item["multiverse"]["largest_context_length"]) == (1000, 8000)
    assert item["multiverse"]["abilities"]["vision"] is True


def test_a_text_that_fits_nowhere_is_refused_at_once(gateway: GatewayProcess, servers: tuple[Backend, Backend]) -> None:
    text = "x" * (8000 * 32 + 2000)
    refused = post(gateway, "/v1/chat/completions", messages=[{"role": "user", "content": text}], max_tokens=10)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 8000 tokens" in refused.json()["error"]["message"]
    assert [backend.hits for backend in servers] == [0, 0]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + text}}
    assert post(gateway, "/v1/chat/completions", messages=[{"role": "user", "content": [picture]}]).status_code == 200


async def cuts(exchange: Exchange) -> None:
    """Answer as Ollama does that read only the end of a long prompt."""
    usage = {"prompt_tokens": 8000, "completion_tokens": 1, "total_tokens": 8001}
    answer = {"object": "chat.completion", "choices": [{"index": 0, "message": {"role": "assistant", "content": "?"}}], "usage": usage}
    await exchange.answer(200, json.dumps(answer).encode())


def test_an_answer_to_a_text_that_was_cut_says_so(gateway: GatewayProcess, servers: tuple[Backend, Backend]) -> None:
    servers[1].behave = cuts
    cut = post(gateway, "/v1/chat/completions", messages=[{"role": "user", "content": "x" * 100_000}])
    assert (cut.status_code, cut.headers["x-multiverse-truncated"]) == (200, "1")
    whole = post(gateway, "/v1/chat/completions", messages=PICTURE)
    assert "x-multiverse-truncated" not in whole.headers


def test_an_engine_is_read_again_when_its_server_is_changed_and_forgotten_by_no_registration(gateway: GatewayProcess) -> None:
    """A new URL is another engine; the same registration again keeps what was read until the next reading."""
    with Backend("one", models=(MODEL,)) as one, Backend("two", models=(MODEL,)) as two:
        one.owned_by, one.states = "library", ollama(1000)
        two.owned_by, two.states = "llamacpp", documents.LLAMA_CPP
        server_id = gateway.register(MODEL, one.url, max_concurrency=8)
        assert measured(gateway, server_id)["engine"] == "ollama"
        again = gateway.admin("POST", "/admin/register", {"model_name": MODEL, "endpoint_url": one.url, "max_concurrency": 4})
        assert again.json()["measured"]["engine"] == "ollama"
        changed = gateway.admin("PUT", f"/admin/register/{server_id}", {"endpoint_url": two.url})
        assert changed.status_code == 200, changed.text
        wait_until(lambda: (gateway.server(server_id)["measured"] or {}).get("engine") == "llama.cpp", within=10)
        gateway.admin("DELETE", f"/admin/register/{server_id}")


def test_a_real_llama_server_is_read(gateway: GatewayProcess, needs_llama: None) -> None:
    with LlamaServer("test-model") as llama:
        server_id = gateway.register("test-model", llama.url, max_concurrency=2)
        facts = measured(gateway, server_id)
        assert (facts["engine"], facts["slots"], facts["loaded"]) == ("llama.cpp", 4, True)
        assert 0 < facts["context_length"] <= 2048
        assert facts["trained_context_length"] > 0
        assert facts["abilities"]["vision"] is False
        gateway.admin("DELETE", f"/admin/register/{server_id}")
