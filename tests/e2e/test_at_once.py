"""Limits on requests at once, over real sockets: at both doors, in HTTP/1.1 and HTTP/2, plain and streamed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import attrs
import httpx2
import pytest

from support import behaviours
from support.backends import Backend, Exchange
from support.processes import DOORS, Door, GatewayProcess, door_setting
from support.services import RedisServer
from support.sockets import serving, until

pytestmark = pytest.mark.e2e

CLASS_KEY = "a-key-of-the-settings-000000000001"
KINDS = pytest.mark.parametrize(("http", "stream"), [("1.1", False), ("1.1", True), ("2", False), ("2", True)])


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    """Return a gateway with low limits, behind a proxy on this machine that names its clients."""
    door: Door = request.param
    settings = {
        "CLIENT_API_KEYS": CLASS_KEY,
        "MAX_AT_ONCE_PER_KEY": "3",
        "MAX_AT_ONCE_PER_ADDRESS": "2",
        "TRUSTED_PROXIES": "127.0.0.1/32",
        "RATE_LIMIT_PER_MINUTE": "0",
        **door_setting(door),
    }
    with GatewayProcess(settings) as process:
        yield process


def figure(gateway: GatewayProcess, name: str) -> int:
    """Return the sum of a metric whose samples begin so."""
    lines = gateway.call("GET", "/metrics").text.splitlines()
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(name))


@attrs.define
class Flood:
    """Requests for one model at the same time, each on a connection of its own, and the answers to them."""

    gateway: GatewayProcess
    model: str
    http: str = "1.1"
    answers: list[httpx2.Response] = attrs.Factory(list)

    async def ask(self, headers: dict[str, str], stream: bool = False) -> httpx2.Response:
        """Send a request and keep its answer."""
        body = {"model": self.model, "messages": [], "stream": stream}
        async with connect(self.gateway, self.http) as client:
            answer = await client.post("/v1/chat/completions", json=body, headers=headers)
        self.answers.append(answer)
        return answer

    def waiting(self) -> int:
        """Return how many requests wait for the model."""
        return figure(self.gateway, f'multiverse_requests_waiting{{band="interactive",model="{self.model}"')

    def statuses(self) -> Counter[int]:
        """Return how many answers there are, by status."""
        return Counter(answer.status_code for answer in self.answers)


Busy = Callable[..., tuple[Backend, behaviours.Gate]]


@pytest.fixture
def busy(gateway: GatewayProcess) -> Iterator[Busy]:
    """Return a maker of models with one server, which answers once the gate opens."""
    running = []

    def make(model: str, slots: int = 1) -> tuple[Backend, behaviours.Gate]:
        server, gate = Backend(model, models=(model,)), behaviours.Gate()
        server.behave = gate.held(behaviours.good())
        running.append(serving(server))
        running[-1].__enter__()
        gateway.register(model, server.url, max_concurrency=slots)
        return server, gate

    yield make
    for one in running:
        one.__exit__(None, None, None)


def connect(gateway: GatewayProcess, http: str = "1.1") -> httpx2.AsyncClient:
    """Return a client that speaks one version of HTTP."""
    transport = httpx2.AsyncHTTPTransport(http1=http == "1.1", http2=http == "2", verify=False, trust_env=False)
    return httpx2.AsyncClient(transport=transport, base_url=gateway.url, timeout=30.0)


def key(gateway: GatewayProcess, name: str, **fields: Any) -> tuple[dict[str, str], Callable[[], int]]:
    """Make a client key; return the headers with it, and a function that returns how many requests of its day are used."""
    made = gateway.admin("POST", "/keys", {"name": name, "daily_limit": 10_000, **fields}).json()

    def used() -> int:
        (found,) = [record["used_today"] for record in gateway.admin("GET", "/keys").json() if record["id"] == made["id"]]
        return int(found)

    return {"authorization": f"Bearer {made['key']}"}, used


def error(answer: httpx2.Response) -> tuple[int, str, str]:
    """Return the status, the code and the message of a refusal."""
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["message"]


@KINDS
async def test_a_request_that_would_have_to_wait_is_refused_over_the_limit(
    gateway: GatewayProcess, busy: Busy, http: str, stream: bool
) -> None:
    """The refusal names the limit, and uses up neither the minute nor the day; the client goes on as soon as a place is free."""
    model = f"one-slot-{http}-{stream}"
    server, gate = busy(model)
    mine, used = key(gateway, model, max_at_once=2, rate_limit=4)
    async with anyio.create_task_group() as group:
        flood = Flood(gateway, model, http)
        group.start_soon(flood.ask, mine)
        await until(lambda: server.running == 1)
        group.start_soon(flood.ask, mine)
        await until(lambda: flood.waiting() == 1)
        for _ in range(5):
            refused = await flood.ask(mine, stream)
            status, code, message = error(refused)
            assert (status, code) == (429, "too_many_at_once")
            assert "your key has 2 requests running or waiting; its limit is 2" in message
            assert int(refused.headers["retry-after"]) * 1000 >= int(refused.headers["retry-after-ms"]) >= 1000
            assert refused.headers["x-ratelimit-remaining-requests"] == "2"
        assert used() == 2
        group.start_soon(flood.ask, {})  # others wait as before
        await until(lambda: flood.waiting() == 2)
        gate.open()
    after = Flood(gateway, model, http)
    assert [(await after.ask(mine, stream)).status_code for _ in range(3)] == [200, 200, 429]
    assert error(after.answers[-1])[1] == "rate_limit_exceeded"
    assert (flood.statuses(), used()) == ({200: 3, 429: 5}, 4)
    counts = gateway.admin("GET", f"/usage?client={model}").json()["total"]
    assert counts["requests"] == 4, "a restart would count the refused ones towards the day"


@pytest.mark.parametrize("door", DOORS)
async def test_a_shared_storage_gets_back_what_a_refused_request_took(door: Door) -> None:
    """With Redis, too, a refusal uses up neither the minute nor the day: more refusals than either holds."""
    server, gate = Backend("shared", models=("shared",)), behaviours.Gate()
    server.behave = gate.held(behaviours.good())
    with RedisServer() as redis, serving(server), GatewayProcess({"RATE_LIMIT_STORAGE": redis.url, **door_setting(door)}) as gateway:
        gateway.register("shared", server.url, max_concurrency=1)
        mine, _ = key(gateway, "shared", max_at_once=1, rate_limit=6, daily_limit=6)
        flood = Flood(gateway, "shared")
        async with anyio.create_task_group() as group:
            group.start_soon(flood.ask, mine)
            await until(lambda: server.running == 1)
            for _ in range(12):
                assert error(await flood.ask(mine))[1] == "too_many_at_once"
            gate.open()
        assert (await flood.ask(mine)).status_code == 200


async def test_refusals_are_counted_by_their_code(gateway: GatewayProcess, busy: Busy) -> None:
    """As those for the other limits of a client."""
    server, gate = busy("counted")
    mine, _ = key(gateway, "counted", max_at_once=1)
    name = 'multiverse_refusals_total{code="too_many_at_once"}'
    before = figure(gateway, name)
    async with anyio.create_task_group() as group:
        flood = Flood(gateway, "counted")
        group.start_soon(flood.ask, mine)
        await until(lambda: server.running == 1)
        await flood.ask(mine)
        gate.open()
    assert figure(gateway, name) == before + 1


async def test_free_slots_are_for_every_request(gateway: GatewayProcess, busy: Busy) -> None:
    """A client that is alone may use all of a server; the limit counts them once another request would have to wait."""
    server, gate = busy("roomy", slots=5)
    mine, _ = key(gateway, "roomy", max_at_once=1)
    async with anyio.create_task_group() as group:
        flood = Flood(gateway, "roomy")
        for _ in range(5):
            group.start_soon(flood.ask, mine)
        await until(lambda: server.running == 5)
        assert "has 5 requests running or waiting; its limit is 1" in error(await flood.ask(mine))[2]
        gate.open()
    assert flood.statuses() == {200: 5, 429: 1}


@pytest.mark.parametrize(
    ("headers", "limit", "owner"),
    [
        ({"authorization": f"Bearer {CLASS_KEY}"}, 3, "key"),
        ({"x-forwarded-for": "192.0.2.7"}, 2, "address"),
        ({}, None, "nobody"),
    ],
)
async def test_whose_limit_it_is(gateway: GatewayProcess, busy: Busy, headers: dict[str, str], limit: int | None, owner: str) -> None:
    """Keys of the settings and addresses have those of the settings; a client on this machine has none."""
    server, gate = busy(f"owned-by-{owner}")
    async with anyio.create_task_group() as group:
        flood = Flood(gateway, f"owned-by-{owner}")
        for number in range(limit or 12):
            group.start_soon(flood.ask, headers)
            await until(lambda number=number: server.running + flood.waiting() == number + 1)  # type: ignore[misc]
        if limit is not None:
            assert f"your {owner} has {limit} requests running or waiting; its limit is {limit}" in error(await flood.ask(headers))[2]
        gate.open()
    assert flood.statuses()[200] == (limit or 12)


async def test_a_limit_that_changes_holds_for_the_next_request(gateway: GatewayProcess, busy: Busy) -> None:
    """A key without a limit, like those of older versions, gets one while its requests wait; these keep their places."""
    server, gate = busy("changing")
    mine, _ = key(gateway, "changing", max_at_once=0)
    (key_id,) = [record["id"] for record in gateway.admin("GET", "/keys").json() if record["name"] == "changing"]
    async with anyio.create_task_group() as group:
        flood = Flood(gateway, "changing")
        for number in range(6):
            group.start_soon(flood.ask, mine)
            await until(lambda number=number: server.running + flood.waiting() == number + 1)  # type: ignore[misc]
        gateway.admin("PATCH", f"/keys/{key_id}", {"max_at_once": 4})
        assert error(await flood.ask(mine))[1] == "too_many_at_once"
        gate.open()
    assert flood.statuses() == {200: 6, 429: 1}


async def test_the_waiting_requests_of_a_revoked_key_end(gateway: GatewayProcess, busy: Busy) -> None:
    """Those that run end as usual, and those of other clients keep their places."""
    server, gate = busy("revoked")
    theirs, _ = key(gateway, "the other key", max_at_once=0)
    mine, _ = key(gateway, "revoked", max_at_once=0)
    (key_id,) = [record["id"] for record in gateway.admin("GET", "/keys").json() if record["name"] == "revoked"]
    async with anyio.create_task_group() as group:
        flood = Flood(gateway, "revoked")
        commented = {"x-multiverse-queue": "comments"}
        asked = [(mine, False), (mine, False), (mine, True), ({**mine, **commented}, True), (theirs, False)]
        for number, (headers, stream) in enumerate(asked):
            group.start_soon(flood.ask, headers, stream)
            await until(lambda number=number: server.running + flood.waiting() == number + 1)  # type: ignore[misc]
        await anyio.sleep(1.2)  # until the head of the stream with comments was sent
        assert gateway.admin("DELETE", f"/keys/{key_id}").status_code == 200
        await until(lambda: len(flood.answers) == 3)
        assert flood.statuses() == {401: 2, 200: 1}
        for answer in flood.answers:
            assert '"invalid_api_key"' in answer.text
        assert (server.running, flood.waiting()) == (1, 1)
        gate.open()
    assert flood.statuses() == {401: 2, 200: 3}
    assert server.hits == 2


async def test_nothing_is_left_of_hundreds_of_random_requests(gateway: GatewayProcess, busy: Busy) -> None:
    """Answers, broken and failing servers, failovers, clients that leave: afterward the client has its whole limit, and no more."""
    chance = random.Random(15)
    good = behaviours.good()
    habits = [good] * 20 + [behaviours.status(500), behaviours.status(503), behaviours.cut_stream()]

    async def moody(exchange: Exchange) -> None:
        await anyio.sleep(chance.uniform(0, 0.01))
        await chance.choice(habits)(exchange)

    servers = [Backend(f"moody-{number}", moody, models=("chaos",)) for number in range(3)]
    mine, used = key(gateway, "chaos", max_at_once=8, rate_limit=0)
    seen: Counter[object] = Counter()

    async def one(http: str, patience: float, stream: bool) -> None:
        with anyio.move_on_after(patience) as scope:
            try:
                answer = await Flood(gateway, "chaos", http).ask(mine, stream)
            except httpx2.TransportError:
                seen["broken"] += 1
            else:
                seen[error(answer)[1] if answer.status_code == 429 else answer.status_code] += 1
        seen["left"] += scope.cancelled_caught

    with serving(*servers):
        for server in servers:
            gateway.register("chaos", server.url, max_concurrency=2)
        for number in range(100):
            if number >= 15 and min(seen[200], seen["too_many_at_once"], seen["left"]) > 10:
                break  # when all servers rest at once, few requests are answered for some seconds
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    patience = chance.choice([30.0, 30.0, chance.uniform(0.001, 0.05)])
                    group.start_soon(one, chance.choice(["1.1", "2"]), patience, chance.random() < 0.5)
    assert min(seen[200], seen["too_many_at_once"], seen["left"]) > 10, seen
    await until(lambda: figure(gateway, "multiverse_requests_in_flight") == 0)
    server, gate = busy("after-chaos")
    async with anyio.create_task_group() as group:
        flood = Flood(gateway, "after-chaos")
        for number in range(8):
            group.start_soon(flood.ask, mine)
            await until(lambda number=number: server.running + flood.waiting() == number + 1)  # type: ignore[misc]
        assert error(await flood.ask(mine))[1] == "too_many_at_once"
        gate.open()
    assert flood.statuses() == {200: 8, 429: 1}
    counted = gateway.admin("GET", "/usage?client=chaos").json()["total"]["requests"]
    assert counted <= used() <= counted + seen["left"], "only a client that left before its request was read whole is in one of them alone"
