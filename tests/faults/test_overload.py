"""More work than there are hands: caps hold, requests are served in order, refusals come immediately, memory stays."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

import anyio
import attrs
import httpx2
import pytest

from multiverse_gateway.app import create_app, lifespan
from multiverse_gateway.core.load import LagDetector
from multiverse_gateway.relay import server_search, waiting
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.memory import MemoryStore
from support import behaviours
from support.backends import Backend
from support.gateways import stage
from support.processes import DOORS, Door, GatewayProcess, door_setting
from support.raw_client import RawClient
from support.sockets import serving, until, wait_until

ADMIN_KEY = "an-admin-key-for-tests"
CHAT = "/v1/chat/completions"


@attrs.define(eq=False)
class Bench:
    """A whole gateway in this process, with real servers."""

    app: Any
    client: httpx2.AsyncClient

    async def register(self, *backends: Backend, **fields: Any) -> None:
        for backend in backends:
            body = {"model_name": "tiny", "endpoint_url": backend.url, **fields}
            answer = await self.client.post("/admin/register", json=body, headers={"x-api-key": ADMIN_KEY})
            assert answer.status_code == 201, answer.text

    async def ask(self) -> httpx2.Response:
        return await self.client.post(CHAT, json={"model": "tiny", "messages": []})


@contextlib.asynccontextmanager
async def bench(**settings: Any) -> Any:
    """Run it."""
    given = Settings(**{"admin_api_key": ADMIN_KEY, "rate_limit_per_minute": 0, "allow_private_networks": "true", **settings})
    app = create_app(given, store=MemoryStore())
    async with lifespan(app), httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway", timeout=20) as client:
        yield Bench(app, client)


async def test_who_waits_longest_is_served_first_though_it_could_not_use_the_last_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """L07: a slot on a server that failed for the first waiter goes to the second at once, and the first keeps its place."""
    for module in (server_search, waiting):
        monkeypatch.setattr(module, "LOOK_SECONDS", 60)  # nobody looks for itself
    one, two = Backend("one", models=("tiny",)), Backend("two", models=("tiny",))
    gates = [behaviours.Gate() for _ in range(4)]
    async with one, two, bench() as there, anyio.create_task_group() as group:
        await there.register(one, two, max_concurrency=1)
        one.behave = two.behave = [gates[0].held(behaviours.good()), behaviours.good()]
        group.start_soon(there.ask)
        await until(lambda: one.hits + two.hits == 1)
        busy, other = (one, two) if one.hits else (two, one)
        busy.behave = gates[3].held(behaviours.good())
        other.behave = [behaviours.status(500), gates[1].held(behaviours.good()), gates[2].held(behaviours.good())]
        queue = there.app.state.gateway.room.queue
        group.start_soon(there.ask)  # fails on the other one, and then waits for the busy one
        await until(lambda: queue.waiting("tiny") == 1)
        group.start_soon(there.ask)  # takes the other one
        await until(lambda: other.hits == 2)
        group.start_soon(there.ask)  # waits behind
        await until(lambda: queue.waiting("tiny") == 2)
        first, second = queue.order("tiny")
        gates[1].open()
        await until(lambda: other.hits == 3)
        assert queue.order("tiny") == [first]
        group.start_soon(there.ask)
        await until(lambda: queue.waiting("tiny") == 2)
        gates[0].open()
        await until(lambda: busy.hits == 2)
        assert first not in queue.order("tiny")
        assert second not in queue.order("tiny")
        for gate in gates:
            gate.open()


async def test_caps_hold_while_servers_fail() -> None:
    """L08: 1,500 requests by 60 callers on four servers that fail at random: no cap is ever exceeded, and no slot is left."""
    chance = random.Random(8)
    faults = [behaviours.status(500), behaviours.reset_first(), behaviours.status(429, retry_after=1), behaviours.truncated_body()]

    def moody(number: int) -> behaviours.Behaviour:
        return behaviours.randomly(0.2, faults[number], seed=number)

    backends = [Backend(f"number {number}", moody(number), models=("tiny",)) for number in range(4)]
    async with contextlib.AsyncExitStack() as running:
        for backend in backends:
            await running.enter_async_context(backend)
        there = await running.enter_async_context(bench(queue_timeout_seconds=1))
        await there.register(*backends, max_concurrency=3)
        statuses: Counter[int] = Counter()

        async def caller() -> None:
            for _ in range(25):
                with anyio.move_on_after(0.001 if chance.random() < 0.1 else 20):
                    statuses[(await there.ask()).status_code] += 1

        async with anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(caller)
        load = there.app.state.gateway.load
        await until(lambda: load.total == 0)
        assert [load.in_flight(server) for server in there.app.state.gateway.table.routes] == [0] * 4
        assert load.retries_in_flight("tiny") == 0
        assert there.app.state.gateway.room.queue.waiting("tiny") == 0
        assert max(backend.most_running for backend in backends) <= 3
        assert set(statuses) <= {200, 429, 503, 504}


def test_strain_is_lateness_that_lasts() -> None:
    """Section 7: late by more than half a second for five seconds; one good moment ends it."""
    detector = LagDetector()
    assert not detector.note(9.0, 10.0)
    assert not detector.note(0.51, 14.9)
    assert detector.note(0.51, 15.0)
    assert detector.note(2.0, 17.0)
    assert not detector.note(0.5, 17.1)
    assert not detector.note(0.6, 30.0)


async def test_a_process_that_cannot_keep_up_refuses_new_work() -> None:
    """Section 7: inference is refused with 503 and Retry-After while the loop is late; health and admin go on; then all is well."""
    async with stage() as there:
        admission = there.gateway.admission
        for _ in range(12):
            there.clock.advance(0.6)
            await anyio.sleep(0.06)
        await until(lambda: admission.shedding or there.clock.advance(0.6), within=2)  # type: ignore[func-returns-value]
        assert not admission.may_start(0)
        assert (await there.client.get("/livez")).status_code == 200
        assert (await there.client.get("/admin/servers")).status_code == 200
        await until(lambda: not admission.shedding)
        assert admission.may_start(0)


@pytest.mark.e2e
def test_a_full_queue_refuses_at_once() -> None:
    """L07: one server with one slot and a hundred callers: never two at the server, 32 wait, all others hear 503 meanwhile."""
    server = Backend("slow", behaviours.after(0.02, behaviours.good()), models=("tiny",))
    gate = behaviours.Gate()
    with serving(server), GatewayProcess({"MULTIVERSE_MAX_QUEUE": "32"}) as gateway:
        gateway.register("tiny", server.url, max_concurrency=1)
        server.behave = [gate.held(behaviours.good()), behaviours.good()]
        answers: list[httpx2.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(gateway.chat("tiny"))) for _ in range(100)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answers) == 67, within=10)
        assert {answer.status_code for answer in answers} == {503}
        for answer in answers:
            assert answer.json()["error"]["code"] == "overloaded"
            assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert server.most_running == 1
        gate.open()
        for thread in threads:
            thread.join(20)
        assert Counter(answer.status_code for answer in answers) == {503: 67, 200: 33}
        assert server.most_running == 1


@pytest.mark.e2e
def test_bodies_on_their_way_count() -> None:
    """Section 10: all bodies together have a budget, those that are still coming included; who leaves or is refused gives its part back."""
    server = Backend("good", models=("tiny",))
    settings = {"MULTIVERSE_BODY_BUDGET_BYTES": str(2 << 20), "MULTIVERSE_CLIENT_BODY_TIMEOUT_SECONDS": "20"}
    part = b'{"model": "tiny", "messages": [], "user": "' + b"x" * (1_200_000)
    started = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(part), part)
    with serving(server), GatewayProcess(settings) as gateway:
        gateway.register("tiny", server.url)

        def is_refused(declared: int) -> bool:
            with RawClient(gateway.port) as client:
                client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n{}" % declared)
                client.half_close()
                return b" 503 " in client.read_to_end()[:13]

        for leave in (RawClient.abort, RawClient.close):
            assert not is_refused(900_000)
            with RawClient(gateway.port) as first, RawClient(gateway.port) as second:
                first.send(started)
                wait_until(lambda: is_refused(900_000), what="a body that does not fit is refused before it is read")
                second.send(started)
                refused = second.read_response()
                assert (refused.status, refused.json["error"]["code"]) == (503, "overloaded")
                assert 1 <= int(refused.header("retry-after") or 0) <= 5
                assert gateway.chat("tiny").status_code == 200, "small ones still fit"
                leave(first)
            wait_until(lambda: gateway.chat("tiny", user="x" * 1_500_000).status_code == 200)
    assert not [request for request in server.requests if len(request.body) > 1_600_000]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.e2e
def test_requests_that_arrive_by_and_by_count_when_they_are_whole(door: Door) -> None:
    """Section 7: who was let in while nothing ran, and sends the body when all the others do, is not let past the limit."""
    server = Backend("slow", models=("tiny",))
    gate = behaviours.Gate()
    body = b'{"model": "tiny", "messages": []}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
    with serving(server), GatewayProcess({"MULTIVERSE_MAX_IN_FLIGHT": "3", **door_setting(door)}) as gateway, ExitStack() as stack:
        gateway.register("tiny", server.url, max_concurrency=8)
        server.behave = gate.held(behaviours.good())
        clients = [stack.enter_context(RawClient(gateway.port)) for _ in range(8)]
        for client in clients:
            client.send(head)
        for client in clients:
            while not client.response.informational:
                assert client.read_more()
        for client in clients:
            client.send(body)
        wait_until(lambda: server.running == 3)
        gate.open()
        answers = Counter(client.read_response().status for client in clients)
        assert answers == {200: 3, 503: 5}
        assert server.most_running == 3


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.e2e
def test_stalled_readers_cost_little_and_hold_up_nobody(door: Door) -> None:
    """L01: 60 clients that read nothing of an endless stream: little memory each, others as fast as ever, cut off when their time is up."""
    count = 60
    event = b'data: {"object":"chat.completion.chunk","choices":[],"filler":"' + b"x" * 900 + b'"}\n\n'
    flowing = behaviours.when_streamed(behaviours.stream([event * 60] * 400, end="stall"), behaviours.good())
    server = Backend("endless", flowing, models=("tiny",))
    with serving(server), GatewayProcess({"MULTIVERSE_CLIENT_WRITE_TIMEOUT_SECONDS": "5", **door_setting(door)}) as gateway:
        gateway.register("tiny", server.url)
        gateway.chat("tiny")
        before, sockets = gateway.memory_bytes(), gateway.open_sockets()
        clients = [RawClient(gateway.port, receive_buffer=4096) for _ in range(count)]
        for client in clients:
            client.request("POST", CHAT, json={"model": "tiny", "messages": [], "stream": True})
        wait_until(lambda: server.running == count, within=10)
        time.sleep(1)
        each = (gateway.memory_bytes() - before) / count
        assert each < 600 << 10, each  # what is in flight is held by us and by the server below
        for _ in range(10):
            assert gateway.chat("tiny", timeout=5).status_code == 200
        wait_until(lambda: server.running == 0, within=30, what="the servers are freed when the clients' time is up")
        wait_until(lambda: gateway.open_sockets() <= sockets + 1, within=30, what="and so are the sockets")
        for client in clients:
            client.close()
