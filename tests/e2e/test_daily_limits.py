"""Daily limits of client keys, with real gateways: one that restarts, workers, and two on one Redis that is hurt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import attrs
import httpx2
import pytest

from multiverse_gateway.core.budget import until_next_day
from support import behaviours
from support.backends import Backend
from support.processes import DOORS, Door, GatewayProcess, door_setting
from support.raw_client import RawClient
from support.services import RedisServer
from support.sockets import wait_until

pytestmark = pytest.mark.e2e

MODEL = "counted"
KNOWN_WITHIN = 10.0
"""What the documentation promises: gateways hear of each other's counts by the database after so many seconds."""
SLACK = 5.0
"""What two busy cores may take besides."""


@pytest.fixture(autouse=True)
def one_day() -> None:
    """Let no test begin so late that it ends tomorrow."""
    wait_until(lambda: until_next_day(time.time()) > 120, within=130)


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """Return a server of the model."""
    with Backend(MODEL, models=(MODEL,)) as served:
        yield served


@attrs.frozen
class Holder:
    """Somebody with a key."""

    key: str
    id: str

    def ask(self, gateway: GatewayProcess, *, stream: bool = False) -> httpx2.Response:
        """Ask the model, on a connection of its own."""
        body = {"model": MODEL, "messages": [], "stream": stream}
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx2.post(f"{gateway.base_url}/chat/completions", json=body, headers=headers, trust_env=False, timeout=30)

    def models(self, gateway: GatewayProcess) -> httpx2.Response:
        """Ask for the models, on a connection of its own."""
        return httpx2.get(f"{gateway.base_url}/models", headers={"authorization": f"Bearer {self.key}"}, trust_env=False)

    def statuses(self, *gateways: GatewayProcess) -> list[int]:
        """Ask gateways in turn."""
        return [self.ask(gateway).status_code for gateway in gateways]

    def used(self, gateway: GatewayProcess) -> int:
        """Return what a gateway knows of the use of today."""
        (record,) = [record for record in gateway.admin("GET", "/keys").json() if record["id"] == self.id]
        found: int = record["used_today"]
        return found


def holder(gateway: GatewayProcess, name: str, **facts: Any) -> Holder:
    """Make a key for three requests a day."""
    made = gateway.admin("POST", "/keys", {"name": name, "daily_limit": 3, **facts})
    assert made.status_code == 201, made.text
    return Holder(made.json()["key"], made.json()["id"])


@pytest.mark.parametrize("door", DOORS)
def test_three_requests_are_three_requests(backend: Backend, door: Door) -> None:
    """The fourth is refused until midnight, at both doors; looking at the models costs nothing, and others are not affected."""
    with GatewayProcess(door_setting(door)) as gateway:
        gateway.register(MODEL, backend.url)
        alice, bob = holder(gateway, "alice"), holder(gateway, "bob", rate_limit=2)
        hits = backend.hits
        answers = [alice.ask(gateway, stream=number == 1) for number in range(3)]
        assert [(answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) for answer in answers] == [
            (200, "2"), (200, "1"), (200, "0"),
        ]  # fmt: skip
        refused = alice.ask(gateway)
        left = until_next_day(time.time())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "daily_limit_exceeded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert left <= int(refused.headers["retry-after"]) < left + 60
        assert refused.headers["x-should-retry"] == "false"
        assert (refused.headers["x-ratelimit-limit-requests"], refused.headers["x-ratelimit-remaining-requests"]) == ("3", "0")
        assert backend.hits == hits + 3
        assert (alice.models(gateway).status_code, alice.used(gateway)) == (200, 3)
        told = [bob.ask(gateway) for _ in range(3)]
        assert [answer.status_code for answer in told] == [200, 200, 429]
        assert told[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert bob.used(gateway) == 2


def test_a_restart_forgets_nothing_that_was_saved(backend: Backend) -> None:
    """An orderly one nothing at all; one by `kill -9` what was not saved yet, at most five seconds."""
    with GatewayProcess() as gateway:
        gateway.register(MODEL, backend.url)
        alice, bob = holder(gateway, "alice"), holder(gateway, "bob")
        assert alice.statuses(*[gateway] * 4) == [200, 200, 200, 429]
        assert bob.statuses(gateway) == [200]
        gateway.terminate()
        assert gateway.wait() == 0
        gateway.start()
        assert (alice.used(gateway), bob.used(gateway)) == (3, 1)
        wait_until(lambda: bob.ask(gateway).status_code == 200, within=SLACK)
        assert alice.statuses(gateway) == [429]
        gateway.admin("GET", "/usage")  # saves what was counted
        gateway.restart()
        assert (alice.used(gateway), bob.used(gateway)) == (3, 2)
        assert bob.statuses(*[gateway] * 2) == [200, 429]


def test_a_canceled_request_counts_toward_the_day() -> None:
    """It was admitted; also after a restart, which reads the saved counts."""
    with Backend(MODEL, behaviours.stall_stream(2), models=(MODEL,)) as patient, GatewayProcess() as gateway:
        gateway.register(MODEL, patient.url)
        alice = holder(gateway, "alice")
        for _ in range(3):
            with RawClient(gateway.port) as client:
                headers = [("authorization", f"Bearer {alice.key}")]
                client.request("POST", "/v1/chat/completions", json={"model": MODEL, "messages": [], "stream": True}, headers=headers)
                client.read_event()
                client.abort()
        assert alice.statuses(gateway) == [429]
        wait_until(lambda: gateway.admin("GET", "/usage").json()["total"]["canceled"] == 3, within=SLACK)
        gateway.restart()
        assert (alice.used(gateway), alice.statuses(gateway)) == (3, [429])


def test_workers_hear_of_each_other(backend: Backend) -> None:
    """Without a common storage each lets in what is left by its own count, and by what all have saved."""
    with GatewayProcess({"REQUIRE_CLIENT_AUTH": "true"}, args=("--workers", "2")) as gateway:
        gateway.register(MODEL, backend.url)
        alice = holder(gateway, "alice")
        wait_until(lambda: {alice.models(gateway).status_code for _ in range(20)} == {200}, within=SLACK)
        hits = backend.hits
        wait_until(lambda: set(alice.statuses(*[gateway] * 8)) == {429}, within=KNOWN_WITHIN + SLACK)
        assert 3 <= backend.hits - hits <= 6
        wait_until(lambda: {alice.used(gateway) for _ in range(8)} == {3}, within=KNOWN_WITHIN + SLACK)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """Return a Redis that the tests of this module hurt and bring back."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def pair(redis: RedisServer, backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[GatewayProcess]]:
    """Return two gateways on one file and one Redis."""
    path = tmp_path_factory.mktemp("pair") / "registry.db"
    settings = {"DATABASE_URL": f"sqlite:///{path}", "RATE_LIMIT_STORAGE": redis.url}
    with GatewayProcess(settings) as one, GatewayProcess(settings) as other:
        one.register(MODEL, backend.url)
        yield [one, other]


def everywhere(pair: list[GatewayProcess], name: str) -> Holder:
    """Make a key and wait until both gateways know it."""
    made = holder(pair[0], name)
    wait_until(lambda: any(record["id"] == made.id for record in pair[1].admin("GET", "/keys").json()), within=SLACK)
    return made


def test_two_gateways_count_together(pair: list[GatewayProcess]) -> None:
    """Three requests a day, whichever they come to.

    On a machine so busy that Redis takes longer than 100 ms they count by themselves for five seconds: then somebody else tries.
    """
    names = (f"together-{number}" for number in range(1000))

    def statuses() -> list[int]:
        return everywhere(pair, next(names)).statuses(*pair, *pair, *pair)

    wait_until(lambda: statuses() == [200] * 3 + [429] * 3, within=60)


def test_no_request_waits_for_redis_and_the_day_goes_on(pair: list[GatewayProcess], redis: RedisServer) -> None:
    """Stopped: each lets in what is left of what it knows, and what is used up stays so; back, without a restart, nothing is forgotten."""
    one, other = pair
    spent, fresh = everywhere(pair, "spent"), everywhere(pair, "fresh")
    assert spent.statuses(one, one, one, one) == [200] * 3 + [429]
    assert fresh.statuses(one) == [200]
    redis.pause()
    try:
        took = []
        for wanted in (200, 200, 429):
            began = time.monotonic()
            assert fresh.statuses(one) == [wanted]
            took.append(time.monotonic() - began)
        assert spent.statuses(one) == [429]
        assert max(took) < SLACK  # a request that waits for Redis takes until it is back
    finally:
        redis.resume()
    wait_until(lambda: fresh.used(other) == 3 == spent.used(other), within=KNOWN_WITHIN + SLACK)
    assert [*fresh.statuses(one, other), *spent.statuses(one, other)] == [429] * 4


def test_what_redis_forgets_the_database_knows(pair: list[GatewayProcess], redis: RedisServer) -> None:
    """Requests that one gateway let in count at the other, though Redis lost them all."""
    one, other = pair
    alice = everywhere(pair, "forgotten")
    assert alice.statuses(one, one) == [200, 200]
    redis.ask("FLUSHALL")
    wait_until(lambda: alice.used(other) == 2, within=KNOWN_WITHIN + SLACK)
    assert alice.statuses(other, other) == [200, 429]
