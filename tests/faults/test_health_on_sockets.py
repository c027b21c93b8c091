"""What becomes of servers that fail, on real sockets, with a clock that the test moves on: minutes pass in no time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import attrs
import httpx2
from starlette.applications import Starlette

from multiverse_gateway.app import create_app, lifespan
from multiverse_gateway.core.health import HealthState
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.memory import MemoryStore
from support import behaviours
from support.backends import Backend
from support.fault_proxy import FaultProxy
from support.gateways import ADMIN_KEY
from support.sockets import LoopServer, until

CHAT = "/v1/chat/completions"
KEY = {"x-api-key": ADMIN_KEY}


@attrs.define(eq=False)
class Clock:
    """The monotonic clock, and what the test let pass besides."""

    passed: float = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.passed

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.passed += seconds


@attrs.define(eq=False)
class Watched:
    """A whole gateway in this process, its monitor included, with a clock that the test moves on."""

    app: Starlette
    gateway: Gateway
    client: httpx2.AsyncClient
    clock: Clock

    async def register(self, backend: LoopServer, model: str = "tiny", **fields: Any) -> ServerId:
        body = {"model_name": model, "endpoint_url": backend.url, **fields}
        answer = await self.client.post("/admin/register", json=body, headers=KEY)
        assert answer.status_code == 201, answer.text
        return ServerId(answer.json()["registration_id"])

    async def ask(self, model: str = "tiny", *, address: str = "127.0.0.1") -> httpx2.Response:
        """Ask as the client at an address."""
        transport = httpx2.ASGITransport(self.app, client=(address, 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway", timeout=20) as client:
            return await client.post(CHAT, json={"model": model, "messages": []})

    async def models(self) -> list[str]:
        return [model["id"] for model in (await self.client.get("/v1/models")).json()["data"]]

    def state(self, server: ServerId) -> str:
        return self.gateway.table.routes[server].health.state.value

    async def reaches(self, server: ServerId, state: HealthState, *, step: float = 1.0, most: float = 120.0) -> float:
        """Let time pass in steps, with a moment of real time for the probes, and return the seconds until a server is in a state."""
        began = self.clock()
        while self.state(server) != state.value:
            assert self.clock() - began <= most, f"{self.state(server)} and not {state.value} after {most} s"
            self.clock.advance(step)
            await anyio.sleep(0.3)
        return self.clock() - began


@asynccontextmanager
async def watched(*backends: LoopServer, **settings: Any) -> AsyncIterator[Watched]:
    """Run it with its backends; probes have a third of a second of real time."""
    clock = Clock()
    usual = {"health_check_timeout_seconds": 0.3, "connect_timeout_seconds": 0.3, "first_byte_timeout_seconds": 2.0}
    given = {"admin_api_key": ADMIN_KEY, "rate_limit_per_minute": 0, "allow_private_networks": "true", **usual, **settings}
    app = create_app(Settings(**given), store=MemoryStore(), now=clock)
    async with AsyncExitStack() as running:
        for backend in backends:
            await running.enter_async_context(backend)
        await running.enter_async_context(lifespan(app))
        transport = httpx2.ASGITransport(app)
        client = await running.enter_async_context(httpx2.AsyncClient(transport=transport, base_url="http://gateway", timeout=20))
        yield Watched(app, app.state.gateway, client, clock)


async def test_a_stopped_server_is_taken_off_and_comes_back_by_itself() -> None:
    """H01: three failed probes: off, its record kept and its model not listed; started again it is back within a step of its probes."""
    backend = Backend("mortal", models=("tiny",))
    async with watched(backend) as there:
        server = await there.register(backend)
        assert await there.models() == ["tiny"]
        backend.crash()
        assert await there.reaches(server, HealthState.UNHEALTHY, step=20) <= 65
        assert await there.reaches(server, HealthState.DEACTIVATED, step=2) <= 20
        assert await there.models() == []
        record = (await there.client.get(f"/admin/servers/{server}", headers=KEY)).json()
        assert (record["state"], record["model_name"]) == ("deactivated", "tiny")
        assert (await there.ask()).status_code == 503
        backend.accept()
        assert await there.reaches(server, HealthState.HEALTHY, step=5) <= 100
        assert await there.models() == ["tiny"]
        assert (await there.ask()).status_code == 200


async def test_the_gateways_own_network_is_gone() -> None:
    """H07: with all servers silent at once, for five minutes, nobody is taken off; ten seconds after the network's return all is well."""
    backend = Backend("good", models=("tiny",))
    proxies = [FaultProxy(backend.port) for _ in range(4)]
    async with watched(backend, *proxies) as there:
        servers = [await there.register(proxy) for proxy in proxies]
        for proxy in proxies:
            proxy.blackhole()
        for server in servers:
            await there.reaches(server, HealthState.UNHEALTHY, step=20)
        for _ in range(8):
            there.clock.advance(40)
            await anyio.sleep(0.4)
            assert {there.state(server) for server in servers} == {"unhealthy"}
        for proxy in proxies:
            proxy.heal()
        healed = there.clock()
        for server in servers:
            await there.reaches(server, HealthState.HEALTHY, most=15)
        assert there.clock() - healed < 10
        assert (await there.ask()).status_code == 200


async def test_a_list_of_models_does_not_make_up_for_answers() -> None:
    """H04: who lists its models and fails to answer is taken out by requests, and no probe brings it back: one request decides."""
    backend = Backend("pretender", models=("tiny",))
    async with watched(backend) as there:
        server = await there.register(backend)
        backend.behave = behaviours.status(500)
        for number in range(3):
            assert (await there.ask(address=f"10.0.0.{number}")).status_code == 504
        assert there.state(server) == "unhealthy"
        probes = len(backend.probes)
        await there.reaches(server, HealthState.HALF_OPEN, step=1)
        for _ in range(5):
            there.clock.advance(4)
            await anyio.sleep(0.3)
            assert there.state(server) == "half_open"
        assert len(backend.probes) > probes
        assert (await there.ask()).status_code == 504
        assert there.state(server) == "unhealthy"
        backend.behave = behaviours.good()
        await there.reaches(server, HealthState.HALF_OPEN, step=1)
        assert (await there.ask()).status_code == 200
        assert there.state(server) == "healthy"
        assert there.gateway.load.share(server) < 0.5, "it starts slowly"


async def test_fifty_hung_servers_do_not_hold_up_a_good_one() -> None:
    """H08: all are found out within two rounds of probes, and the good one is looked at in time."""
    hung, good = Backend("hung", models=("tiny",)), Backend("good", models=("good",))
    async with watched(hung, good) as there:
        hung.behave_models = behaviours.stall()
        server = await there.register(good, "good")
        servers = [{"model_name": f"m{number}", "endpoint_url": hung.url} for number in range(50)]
        assert (await there.client.post("/admin/import", json={"servers": servers}, headers=KEY)).status_code == 200
        others = [found for found in there.gateway.table.routes if found != server]
        await until(lambda: {there.state(other) for other in others} == {"unhealthy"}, within=10)
        probes = len(good.probes)
        there.clock.advance(60)
        await until(lambda: len(good.probes) > probes, within=5)
        assert there.state(server) == "healthy"


async def test_a_list_of_models_that_changes_makes_the_pair_rest() -> None:
    """H10: the model is gone from the server: one failed request, no second one for a minute; the probe warns, and the server is well."""
    one, two = Backend("one", models=("tiny",)), Backend("two", models=("tiny",))
    async with watched(one, two) as there:
        server = await there.register(one)
        await there.register(two)
        one.models = ("other",)
        one.behave = behaviours.model_not_found("vllm")
        assert [(await there.ask()).status_code for _ in range(6)] == [200] * 6
        assert one.hits == 1
        await until(lambda: there.gateway.table.routes[server].health.warning is not None)
        assert there.state(server) == "healthy"


async def test_the_last_resort_is_asked_one_at_a_time() -> None:
    """H11: all were found ill by requests only: never two requests at once; the others hear 503, soon, and when to come back."""
    one, two = Backend("one", models=("tiny",)), Backend("two", models=("tiny",))
    async with watched(one, two) as there:
        servers = [await there.register(one), await there.register(two)]
        one.behave = two.behave = behaviours.reset_first()
        for number in range(2):
            assert (await there.ask(address=f"10.0.0.{number}")).status_code == 504
        assert {there.state(server) for server in servers} == {"unhealthy"}
        gate = behaviours.Gate()
        one.behave = two.behave = gate.held(behaviours.good())
        answers: list[int] = []

        async def ask() -> None:
            answer = await there.ask()
            answers.append(answer.status_code)
            if answer.status_code == 503:
                assert 1 <= int(answer.headers["retry-after"]) <= 60

        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(ask)
            await until(lambda: one.running + two.running == 1)
            await until(lambda: len(answers) == 9)
            assert Counter(answers) == {503: 9}
            assert one.running + two.running == 1
            gate.open()
        assert Counter(answers) == {503: 9, 200: 1}


async def test_who_failed_a_probe_is_not_tried() -> None:
    """H11: 503 at once, and nothing reaches the server."""
    backend = Backend("ill", models=("tiny",))
    async with watched(backend) as there:
        server = await there.register(backend)
        backend.behave_models = behaviours.status(500)
        await there.reaches(server, HealthState.UNHEALTHY, step=20)
        answer = await there.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_healthy_server")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert backend.hits == 0


async def test_many_return_at_once_under_load() -> None:
    """H12: twenty servers that were down for five minutes: each gets one request until it has proved itself, no cap is exceeded."""
    backends = [Backend(f"number {number}", models=("tiny",)) for number in range(20)]
    async with watched(*backends, queue_timeout_seconds=30) as there:
        servers = [await there.register(backend, max_concurrency=3) for backend in backends]
        for backend in backends:
            backend.crash()
        for _ in range(6):
            there.clock.advance(60)
            await anyio.sleep(0.3)
        assert {there.state(server) for server in servers} == {"unhealthy"}, "so many at once: it is rather our own network"
        for backend in backends:
            backend.accept()
            backend.behave = behaviours.after(0.02, behaviours.good())
            backend.most_running = 0
        there.clock.advance(10)
        await until(lambda: sum(there.state(server) == "half_open" for server in servers) >= 10)
        answers: Counter[int] = Counter()

        async def caller() -> None:
            for _ in range(5):
                answers[(await there.ask()).status_code] += 1

        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(caller)
        assert max(backend.most_running for backend in backends) <= 3
        assert answers[200] >= 150
        assert set(answers) <= {200, 503}
        assert all(there.gateway.load.share(server) < 0.5 for server in servers if there.state(server) == "healthy")
        assert there.gateway.load.total == 0
