"""What becomes of servers that fail, on real sockets, with a clock that the test moves on: minutes pass in no time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import anyio
import attrs
import httpx2
import pytest
from starlette.applications import Starlette

from multiverse_gateway.app import create_app, lifespan
from multiverse_gateway.core.activity import busy_role
from multiverse_gateway.core.health import HealthState
from multiverse_gateway.core.probing import LEASE_ROLE
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.memory import MemoryStore
from support import answers, behaviours
from support.answers import model_list
from support.backends import Backend, Behaviour, Exchange, answer_well, list_models, reject_nothing
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
        """Register a server; a busy machine may need more than one probe's time for that."""
        body = {"model_name": model, "endpoint_url": backend.url, **fields}
        answer = await self.client.post("/admin/register", json=body, headers=KEY)
        for _ in range(4):
            if answer.status_code == 503:
                answer = await self.client.post("/admin/register", json=body, headers=KEY)
        assert answer.status_code == 201, answer.text
        return ServerId(answer.json()["registration_id"])

    async def ask(
        self, model: str = "tiny", *, address: str = "127.0.0.1", path: str = CHAT, content: str = "Hello", stream: bool = False
    ) -> httpx2.Response:
        """Ask as the client at an address."""
        transport = httpx2.ASGITransport(self.app, client=(address, 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway", timeout=20) as client:
            messages = [{"role": "user", "content": content}]
            return await client.post(path, json={"model": model, "messages": messages, "input": content, "stream": stream})

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
async def watched(*backends: LoopServer, store: MemoryStore | None = None, **settings: Any) -> AsyncIterator[Watched]:
    """Run it with its backends; probes have a third of a second of real time."""
    clock = Clock()
    usual = {"health_check_timeout_seconds": 0.3, "connect_timeout_seconds": 0.3, "first_byte_timeout_seconds": 2.0}
    given = {"admin_api_key": ADMIN_KEY, "rate_limit_per_minute": 0, "allow_private_networks": "true", **usual, **settings}
    app = create_app(Settings(**given), store=MemoryStore() if store is None else store, now=clock)
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
        assert there.gateway.load.traffic_share(server) < 0.5, "it starts slowly"


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
        assert all(there.gateway.load.traffic_share(server) < 0.5 for server in servers if there.state(server) == "healthy")
        assert there.gateway.load.total == 0


# Refusals


def firewall(exchange: Exchange) -> Behaviour:
    """Return the page of a firewall for one prompt, and a good answer for all others."""
    return behaviours.html_page(403) if b"forbidden" in exchange.request.body else answer_well


async def behind_a_firewall(exchange: Exchange) -> None:
    await firewall(exchange)(exchange)


async def test_a_refused_prompt_takes_no_model_away() -> None:
    """Outside case 38: two servers whose firewall refuses one prompt: everybody else is served, and no state changes."""
    backends = Backend("one", behind_a_firewall, models=("tiny",)), Backend("two", behind_a_firewall, models=("tiny",))
    async with watched(*backends, health_check_timeout_seconds=3.0) as there:
        servers = [await there.register(backend) for backend in backends]
        asked = sum(len(backend.accesses) for backend in backends)
        for _ in range(4):
            assert (await there.ask(content="forbidden")).status_code == 502
            assert (await there.ask(content="hi")).status_code == 200
        await until(lambda: sum(len(backend.accesses) for backend in backends) > asked)
        for _ in range(3):
            there.clock.advance(10)
            assert (await there.ask(content="forbidden")).status_code == 502
            await anyio.sleep(0.3)
        assert sum(len(backend.accesses) for backend in backends) - asked <= 2, "once a minute"
        assert [there.state(server) for server in servers] == ["healthy"] * 2
        assert all(access.body == b"{}" and access.path == CHAT for backend in backends for access in backend.accesses)


@pytest.mark.parametrize(("path", "confirmed_by"), [(CHAT, CHAT), ("/v1/embeddings", "/v1/embeddings"), ("/v1/audio/speech", CHAT)])
@pytest.mark.parametrize("key", [None, "a-key"])
async def test_a_refused_key_takes_a_server_out_until_it_is_let_in(path: str, confirmed_by: str, key: str | None) -> None:
    """Outside case 15: the list of models stays open to everybody, and no probe of it brings the server back: no user pays for it again."""
    backend = Backend("locked", models=("tiny",))
    async with watched(backend, health_check_timeout_seconds=3.0) as there:
        server = await there.register(backend, **({} if key is None else {"api_key": key}))
        backend.behave = backend.behave_access = behaviours.unauthorized()
        asked = len(backend.accesses)
        answer = await there.ask(path=path)
        assert answer.status_code == 502
        assert ("key that the gateway stores" in answer.json()["error"]["message"]) == (key is not None)
        await until(lambda: there.state(server) == "misconfigured")
        access = backend.accesses[asked]
        assert (access.path, access.header("authorization")) == (confirmed_by, None if key is None else f"Bearer {key}")
        reason = (await there.client.get(f"/admin/servers/{server}", headers=KEY)).json()["reason"]
        assert ("stored key" in reason) == (key is not None)
        hits = backend.hits
        for _ in range(4):
            asked = len(backend.accesses)
            there.clock.advance(60)
            await until(lambda asked=asked: len(backend.accesses) > asked)  # type: ignore[misc]
            assert (await there.ask(path=path)).status_code == 503
            check = await there.client.post(f"/admin/servers/{server}/health-check", headers=KEY)
            assert (check.json()["passed"], there.state(server)) == (False, "misconfigured")
        assert backend.hits == hits
        backend.behave = answer_well
        backend.behave_access = reject_nothing
        there.clock.advance(60)
        await until(lambda: there.state(server) in ("half_open", "healthy"))
        assert (await there.ask()).status_code == 200


@pytest.mark.parametrize(
    ("refusal", "words"), [(behaviours.status(401), "requires a key"), (behaviours.answer(403, b"", content_type=None), "Host header")]
)
async def test_a_server_whose_chat_asks_for_a_key_is_not_registered(refusal: Behaviour, words: str) -> None:
    """Outside cases 15 and 20: its list of models is open; the words name the remedy, and no stored key where there is none."""
    backend = Backend("locked", models=("tiny",), behave_access=refusal)
    async with watched(backend, health_check_timeout_seconds=3.0) as there:
        body = {"model_name": "tiny", "endpoint_url": backend.url}
        refused = await there.client.post("/admin/register", json=body, headers=KEY)
        assert refused.status_code == 503
        assert words in refused.json()["error"]["message"]
        assert "stored" not in refused.json()["error"]["message"]
        tried = await there.client.post("/admin/test-connection", json=body, headers=KEY)
        assert [step["ok"] for step in tried.json()["steps"]] == [True, True, False]
        assert not there.gateway.table.routes
        assert (await there.client.post("/admin/import", json={"servers": [body]}, headers=KEY)).status_code == 200
        (server,) = there.gateway.table.routes
        await until(lambda: there.state(server) == "misconfigured")
        backend.behave_access = reject_nothing
        update = await there.client.put(f"/admin/register/{server}", json={"api_key": "the-key"}, headers=KEY)
        assert (update.status_code, there.state(server)) == (200, "healthy"), "a new key begins anew"
        assert backend.accesses[-1].header("authorization") == "Bearer the-key"


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/completions"])
async def test_a_tunnels_page_is_not_the_servers(path: str) -> None:
    """Outside case 16: the tunnel says "not found" for a moment: the server gets this call again as soon as it is back."""
    one, two = Backend("one", models=("tiny",)), Backend("two", models=("tiny",))
    async with watched(one, two, health_check_timeout_seconds=3.0) as there:
        server = await there.register(one)
        await there.register(two)
        while not one.hits:
            assert (await there.ask(path=path)).status_code == 200
        one.behave = one.behave_models = one.behave_access = behaviours.html_page(404)
        hits = one.hits
        while one.hits == hits:
            assert (await there.ask(path=path)).status_code == 200
        await until(lambda: there.state(server) == "unhealthy")
        one.behave, one.behave_models, one.behave_access = answer_well, list_models, reject_nothing
        await there.reaches(server, HealthState.HALF_OPEN)
        hits = one.hits
        for _ in range(4):
            assert (await there.ask(path=path)).status_code == 200
        assert one.hits > hits


async def test_a_call_that_a_server_never_knew_is_left_to_others() -> None:
    """The same page, from a server that has not answered the call before: it does not know it."""
    one, two = Backend("one", behaviours.html_page(404), models=("tiny",)), Backend("two", models=("tiny",))
    async with watched(one, two, health_check_timeout_seconds=3.0) as there:
        server = await there.register(one)
        await there.register(two)
        assert [(await there.ask()).status_code for _ in range(6)] == [200] * 6
        assert (one.hits, there.state(server)) == (1, "healthy")


# Busy


class OneAtATime:
    """A server that handles one connection at a time, as some small ones do: all others wait in its queue."""

    def __init__(self, behaviour: Callable[[threading.Event], Behaviour]) -> None:
        self.goes_on = threading.Event()
        """Set by the test when the answer may end."""
        self._lock = asyncio.Lock()
        self.backend = Backend("single", self._alone(behaviour(self.goes_on)), models=("tiny",), behave_models=self._alone(list_models))

    def _alone(self, then: Behaviour) -> Behaviour:
        async def behave(exchange: Exchange) -> None:
            async with self._lock:
                await then(exchange)

        return behave

    async def sees_probes(self, count: int) -> None:
        """Wait until so many more probes have come."""
        before = len(self.backend.probes)
        await until(lambda: len(self.backend.probes) >= before + count, within=20)


def drip(goes_on: threading.Event) -> Behaviour:
    """Stream events without pause until the test ends it."""

    async def behave(exchange: Exchange) -> None:
        events = answers.events(CHAT, speaker="single", model=exchange.model, count=3)
        assert events is not None
        await exchange.start_stream()
        await exchange.chunk(events[0])
        while not goes_on.is_set():
            await exchange.chunk(events[1])
            await asyncio.sleep(0.05)
        for event in events[2:]:
            await exchange.chunk(event)
        await exchange.end()

    return behave


def late(goes_on: threading.Event) -> Behaviour:
    """Send nothing until the test says so, then a whole answer."""

    async def behave(exchange: Exchange) -> None:
        while not goes_on.is_set():  # noqa: ASYNC110  it belongs to the thread of the test
            await asyncio.sleep(0.05)
        await answer_well(exchange)

    return behave


OFTEN: dict[str, Any] = {"health_check_interval_seconds": 1, "first_byte_timeout_seconds": 20.0}


async def test_a_server_that_streams_is_not_dead() -> None:
    """Outside case 9: it handles one connection at a time and streams for longer than three probes: it stays as it was."""
    single = OneAtATime(drip)
    async with watched(single.backend, **OFTEN) as there, anyio.create_task_group() as group:
        server = await there.register(single.backend)
        given: list[httpx2.Response] = []

        async def ask() -> None:
            given.append(await there.ask(stream=True))

        group.start_soon(ask)
        await until(lambda: single.backend.running == 1)
        for _ in range(4):
            await single.sees_probes(1)
            assert there.state(server) == "healthy"
        assert await there.models() == ["tiny"]
        single.goes_on.set()
        await until(lambda: bool(given))
        assert given[0].text.endswith("data: [DONE]\n\n")
        health = there.gateway.table.routes[server].health
        await until(lambda: (there.gateway.table.routes[server].health.last_checked_at or 0) > (health.last_checked_at or 0))
        assert (there.state(server), there.gateway.table.routes[server].health.consecutive_failures) == ("healthy", 0)
        history = (await there.client.get(f"/admin/servers/{server}/history", headers=KEY)).json()
        assert all(check["passed"] for check in history)


async def test_a_server_that_is_silent_over_a_prompt_is_suspect_and_not_dead() -> None:
    """The same, but no byte comes: the server is chosen last until its answer is there, and nothing counts against it."""
    single = OneAtATime(late)
    async with watched(single.backend, **OFTEN) as there, anyio.create_task_group() as group:
        server = await there.register(single.backend)
        given: list[httpx2.Response] = []

        async def ask() -> None:
            given.append(await there.ask())

        group.start_soon(ask)
        await until(lambda: there.state(server) == "suspect", within=20)
        await single.sees_probes(3)
        assert (there.state(server), there.gateway.table.routes[server].health.consecutive_failures) == ("suspect", 0)
        single.goes_on.set()
        await until(lambda: there.state(server) == "healthy")
        await until(lambda: bool(given))
        assert given[0].status_code == 200


async def test_a_server_that_hangs_is_dead_when_its_request_has_had_its_time() -> None:
    """Probes count from then on, however many requests run on it."""
    backend = Backend("hung", behaviours.stall(), models=("tiny",))
    async with watched(backend, health_check_interval_seconds=1, first_byte_timeout_seconds=1.0, request_timeout_seconds=3.0) as there:
        server = await there.register(backend)
        backend.behave_models = behaviours.stall()
        async with anyio.create_task_group() as group:
            group.start_soon(there.ask)
            await until(lambda: there.state(server) == "suspect", within=20)
            await until(lambda: there.state(server) in ("unhealthy", "deactivated"), within=20)
        assert there.gateway.table.routes[server].health.consecutive_failures >= 1


async def test_a_server_is_excused_while_another_process_waits_for_it() -> None:
    """The process that probes asks the store when it has no request of its own on the server."""
    backend = Backend("busy", models=("tiny",))
    async with watched(backend, health_check_interval_seconds=1) as there:
        server = await there.register(backend)
        store, role = there.gateway.store, busy_role(backend.url)
        assert await store.claim(role, "another process", 60.0)
        backend.behave_models = behaviours.stall()
        await until(lambda: there.state(server) == "suspect", within=20)
        probes = len(backend.probes)
        await until(lambda: len(backend.probes) >= probes + 3, within=20)
        assert there.gateway.table.routes[server].health.consecutive_failures == 0
        assert await store.claim(role, "another process", 0.0)
        await until(lambda: there.gateway.table.routes[server].health.consecutive_failures > 0, within=20)


async def test_a_process_that_does_not_probe_says_where_its_requests_run() -> None:
    """As long as they do; then the lease expires by itself."""
    goes_on = threading.Event()
    backend = Backend("busy", behaviours.held_stream(goes_on), models=("tiny",))
    store = MemoryStore()
    assert await store.claim(LEASE_ROLE, "another process", 60.0)
    async with watched(backend, store=store) as there, anyio.create_task_group() as group:
        await there.register(backend)

        async def is_held() -> bool:
            return not await store.claim(busy_role(backend.url), "somebody", 0.0)

        assert not await is_held()
        group.start_soon(lambda: there.ask(stream=True))
        while not await is_held():  # noqa: ASYNC110  the store says it to who asks
            await anyio.sleep(0.05)
        goes_on.set()
        while await is_held():  # noqa: ASYNC110
            await anyio.sleep(0.05)


class KeepsAlive(BaseHTTPRequestHandler):
    """A model server made with Python's own, which handles one connection at a time and keeps it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(model_list(("tiny",)))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(b'{"choices": [{"message": {"role": "assistant", "content": "Hi"}}]}')

    def answer(self, body: bytes) -> None:
        """Answer with JSON."""
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing."""


@contextmanager
def single_connection() -> Iterator[str]:
    """Run such a server on a thread and give its root URL."""
    with HTTPServer(("127.0.0.1", 0), KeepsAlive) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_a_connection_that_the_gateway_keeps_does_not_make_a_server_dead() -> None:
    """Outside case 9: the server waits for a request on it and answers no probe: the connection is closed, and the server probed again."""
    async with watched(health_check_interval_seconds=1) as there:
        with single_connection() as url:
            body = {"model_name": "tiny", "endpoint_url": url}
            made = await there.client.post("/admin/register", json=body, headers=KEY)
            server = ServerId(made.json()["registration_id"])
            for _ in range(2):
                assert (await there.ask()).status_code == 200
                checked = there.gateway.table.routes[server].health.last_checked_at or 0
                await until(lambda checked=checked: (there.gateway.table.routes[server].health.last_checked_at or 0) > checked)  # type: ignore[misc]
                assert (there.state(server), there.gateway.table.routes[server].health.consecutive_failures) == ("healthy", 0)
            assert (await there.client.delete(f"/admin/register/{server}", headers=KEY)).status_code == 200
