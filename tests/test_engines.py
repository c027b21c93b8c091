"""Reading engines over real sockets: what is asked, when it is asked again, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import attrs
import httpx2
import pytest

from multiverse_gateway.core.engine_facts import EngineFacts, EngineKind, Measured
from multiverse_gateway.core.health import Health, HealthPolicy, fresh
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.engines import READ_EVERY, EngineBook, read_engine_of
from multiverse_gateway.health_book import HealthBook
from multiverse_gateway.protocols import ProbeResult, Registry
from multiverse_gateway.stores.memory import MemoryStore
from multiverse_gateway.testing.store import make_server
from support import engine_documents as documents
from support.backends import Backend, Exchange
from support.gateways import Clock

REAL = {
    "ollama": (documents.OLLAMA, "qwen3:8b", EngineKind.OLLAMA, 8192),
    "llama.cpp": (documents.LLAMA_CPP, "tiny", EngineKind.LLAMA_CPP, 4096),
    "vllm": (documents.VLLM, "poet", EngineKind.VLLM, 16384),
    "sglang": (documents.SGLANG, "Qwen/Qwen3-8B", EngineKind.SGLANG, 40960),
    "lm-studio": (documents.LM_STUDIO, "google/gemma-3-4b", EngineKind.LM_STUDIO, 4096),
    "lm-studio before": (documents.LM_STUDIO_BEFORE, "qwen3-8b", EngineKind.LM_STUDIO, 4096),
    "tgi": (documents.TGI, "org/model", EngineKind.TGI, 4096),
    "lists only": (documents.LISTS_ONLY, "tiny", EngineKind.OTHER, None),
}


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient() as client:
        yield client


@attrs.define(slots=False)
class Scene:
    """One engine with servers, and the book that reads it."""

    backend: Backend
    http: httpx2.AsyncClient
    clock: Clock = attrs.Factory(Clock)
    store: MemoryStore = attrs.Factory(MemoryStore)

    def open(self, *models: str) -> None:
        """Register servers of the engine, one for each model, that are well."""
        self.servers = [self.server(f"id{number}", model) for number, model in enumerate(models)]
        self.health = HealthBook(
            HealthPolicy(),
            store=self.store,
            now=lambda: self.clock.monotonic,
            wall=lambda: self.clock.wall,
            random=lambda: 0.5,
            changed=lambda server, before, after: None,
        )
        self.follow()
        self.book = EngineBook(lambda server: self.http, lambda: self.health, now=lambda: self.clock.monotonic, seconds=3.0)

    def server(self, name: str, model: str) -> Server:
        url = self.backend.url
        return make_server(name, model_name=f"our-{name}", upstream_model=model, endpoint_url=url, host_id="the host")

    def follow(self, stored: Mapping[ServerId, Health] | None = None) -> None:
        """Give the book the servers that there are."""
        health = stored or {server.id: fresh(1, now=self.clock.monotonic, wall=self.clock.wall) for server in self.servers}
        self.health.follow(Registry(version=self.health.table.version + 1, servers=tuple(self.servers), health=health))

    async def probed(self, server: Server, *models: str, passed: bool = True) -> int:
        """Report a probe to the book, and return how many questions the engine got."""
        before = len(self.backend.readings) + len(self.backend.probes)
        result = ProbeResult(
            server_id=server.id,
            generation=server.generation,
            passed=passed,
            checked_at=self.clock.wall,
            duration=0.1,
            models=models,
        )
        await self.book.follow(server, result)
        return len(self.backend.readings) + len(self.backend.probes) - before

    def measured(self, server: Server) -> Measured | None:
        return self.health.table.routes[server.id].health.measured


@pytest.fixture
async def scene(http: httpx2.AsyncClient) -> AsyncIterator[Scene]:
    async with Backend("engine") as backend:
        backend.states = documents.OLLAMA
        yield Scene(backend, http)


@pytest.mark.parametrize("name", REAL)
async def test_real_engines_are_read_by_free_requests_with_the_stored_key(name: str, http: httpx2.AsyncClient) -> None:
    states, model, kind, context = REAL[name]
    async with Backend("engine") as backend:
        backend.states = states
        server = make_server("one", model_name="ours", upstream_model=model, endpoint_url=backend.url, api_key="sk-engine")
        engine = await read_engine_of(server, http)
        assert engine is not None
        assert (engine.kind, engine.of(model).context) == (kind, context)
        assert backend.requests == []
        asked = [*backend.readings, *backend.probes]
        assert {reading.header("authorization") for reading in asked} == {"Bearer sk-engine"}
        assert {reading.method for reading in asked if reading.path != "/api/show"} == {"GET"}
        assert all("autoload=false" in reading.target for reading in asked if "model=" in reading.target)
        assert len(asked) <= 11


async def test_an_engine_is_asked_after_a_good_probe_and_again_after_ten_minutes(scene: Scene) -> None:
    scene.open("qwen3:8b", "nomic-embed-text")
    first, second = scene.servers
    assert await scene.probed(first, "qwen3:8b") > 0
    assert await scene.probed(second, "qwen3:8b") == 0  # one host, one engine
    measured, other = scene.measured(first), scene.measured(second)
    assert measured is not None
    assert other is not None
    assert (measured.kind, measured.context, other.model is not None and other.model.is_loaded) == (EngineKind.OLLAMA, 8192, False)
    scene.clock.advance(READ_EVERY - 1)
    assert await scene.probed(first, "qwen3:8b") == 0
    scene.clock.advance(1)
    assert await scene.probed(first, "qwen3:8b") == 3  # a known Ollama whose models are the same
    assert scene.measured(first) == measured


async def test_an_engine_is_asked_at_once_when_its_list_changes_when_it_returns_and_for_a_new_server(scene: Scene) -> None:
    scene.open("qwen3:8b")
    [first] = scene.servers
    await scene.probed(first, "qwen3:8b")
    assert await scene.probed(first, "qwen3:8b", "new") > 0
    assert await scene.probed(first, "qwen3:8b", "new") == 0
    assert await scene.probed(first, passed=False) == 0
    scene.backend.states = documents.LLAMA_CPP
    assert await scene.probed(first, "qwen3:8b", "new") > 0
    measured = scene.measured(first)
    assert measured is not None
    assert measured.kind is EngineKind.LLAMA_CPP
    scene.servers.append(scene.server("late", "tiny"))
    scene.follow()
    assert await scene.probed(scene.servers[1], "qwen3:8b", "new") > 0
    scene.servers = scene.servers[1:]
    scene.follow()
    assert await scene.probed(scene.servers[0], "other") > 0


async def test_an_engine_that_falls_silent_keeps_what_it_said(scene: Scene) -> None:
    scene.open("qwen3:8b")
    [server] = scene.servers
    await scene.probed(server, "qwen3:8b")
    measured = scene.measured(server)
    scene.backend.states = {"/v1/models": None}
    scene.clock.advance(READ_EVERY)
    await scene.probed(server, "qwen3:8b")
    assert scene.measured(server) == measured is not None


async def test_what_was_read_is_saved_and_followed_by_other_processes(scene: Scene) -> None:
    scene.open("qwen3:8b")
    [server] = scene.servers
    await scene.store.open()
    await scene.store.save_server(server)
    await scene.probed(server, "qwen3:8b")
    await scene.health.flush()
    stored = (await scene.store.load()).health
    assert stored[server.id].measured == scene.measured(server)
    version = await scene.store.version()
    await scene.probed(server, "qwen3:8b", "another")
    await scene.health.flush()
    assert await scene.store.version() == version  # nothing new was read
    other = Scene(scene.backend, scene.http)
    other.open("qwen3:8b")
    other.follow(stored)
    assert other.measured(server) == scene.measured(server)
    stale = make_server("id0", model_name="qwen3:8b", generation=2)
    scene.health.note_measured(stale, EngineFacts(kind=EngineKind.TGI).of("x"))
    scene.health.note_measured(make_server("unknown"), EngineFacts(kind=EngineKind.TGI).of("x"))
    assert scene.measured(server) == other.measured(server)


async def hang(exchange: Exchange) -> None:
    """Answer nothing."""
    await exchange.forever()


async def drip(exchange: Exchange) -> None:
    """Send an answer that never ends."""
    await exchange.start_stream(content_type="application/json")
    while True:
        await exchange.chunk(b" " * 65536)


async def compressed(exchange: Exchange) -> None:
    """Answer in a form that was not asked for."""
    await exchange.answer(200, b'{"total_slots": 4}', headers=[("content-encoding", "gzip")])


async def reset(exchange: Exchange) -> None:
    """Drop the connection."""
    exchange.reset()


@pytest.mark.parametrize("behave", [hang, drip, compressed, reset])
async def test_a_hostile_engine_says_nothing(behave: Any, http: httpx2.AsyncClient) -> None:
    async with Backend("engine") as backend:
        backend.states = {"/v1/models": ["nothing"]}
        backend.behave_engine = behave
        server = make_server("one", model_name="tiny", endpoint_url=backend.url)
        assert await read_engine_of(server, http, seconds=0.4) is None
