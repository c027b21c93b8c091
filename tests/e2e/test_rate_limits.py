"""Limits per minute: of keys and of addresses, what does not count, and what a refusal says. On both doors, counted here and in Redis."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import httpx2
import pytest

from support.backends import Backend
from support.pages import value_of
from support.processes import DOORS, Door, GatewayProcess, door_setting
from support.services import RedisServer
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

ADDRESS_LIMIT, KEY_LIMIT = 3, 5
_numbers = itertools.count(1)
FORWARDING = {
    "x-forwarded-for": "198.51.100.1",
    "forwarded": "for=198.51.100.1",
    "via": "1.1 proxy",
    "cf-connecting-ip": "198.51.100.1",
    "x-real-ip": "198.51.100.1",
}


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """Return a Redis."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """Return a model server."""
    with serving(server := Backend("good", models=("tiny",))):
        yield server


@pytest.fixture(scope="module", params=[(door, storage) for door in DOORS for storage in ("memory", "redis")], ids="-".join)
def gateway(request: pytest.FixtureRequest, redis: RedisServer, backend: Backend) -> Iterator[GatewayProcess]:
    """Return a gateway with low limits that trusts one proxy, which is not on the address that tests come from."""
    door: Door
    door, storage = request.param
    url = redis.url if storage == "redis" else "memory://"
    limits = {"RATE_LIMIT_PER_MINUTE": str(ADDRESS_LIMIT), "KEY_RATE_LIMIT_PER_MINUTE": str(KEY_LIMIT), "RATE_LIMIT_STORAGE": url}
    with GatewayProcess({**limits, "TRUSTED_PROXIES": "127.0.0.2/32", **door_setting(door)}) as process:
        process.register("tiny", backend.url)
        yield process


class Caller:
    """A client of a gateway, with an address of its own behind the trusted proxy if it is named."""

    def __init__(
        self, gateway: GatewayProcess, address: str | None = None, headers: Mapping[str, str] | None = None, *, http2: bool = False
    ) -> None:
        peer = "127.0.0.1" if address is None else "127.0.0.2"
        transport = httpx2.HTTPTransport(http1=not http2, http2=http2, verify=False, trust_env=False, local_address=peer)
        forwarded = {} if address is None else {"x-forwarded-for": address}
        self.client = httpx2.Client(transport=transport, base_url=gateway.url, headers={**forwarded, **(headers or {})}, timeout=30)

    def ask(self) -> httpx2.Response:
        """Ask for a chat completion."""
        return self.client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})

    def statuses(self, count: int) -> list[int]:
        """Ask so many times."""
        with self.client:
            return [self.ask().status_code for _ in range(count)]


def allowed(count: int, more: int = 2) -> list[int]:
    """Return the statuses when so many requests are allowed, and more are sent."""
    return [200] * count + [429] * more


def new_address() -> str:
    """Return an address that nobody has called from: Redis outlives a gateway."""
    number = next(_numbers)
    return f"198.51.{number // 250}.{number % 250}"


def bearer(key: str) -> dict[str, str]:
    """Return the header of a key."""
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("key", [None, "sk-none"])
def test_this_machine_has_no_limit(gateway: GatewayProcess, http2: bool, key: str | None) -> None:
    """Without a key, or with one that nobody knows, as SDKs send: nothing is counted, and no header speaks of a quota."""
    caller = Caller(gateway, headers=None if key is None else bearer(key), http2=http2)
    answers = [caller.ask() for _ in range(ADDRESS_LIMIT + KEY_LIMIT)]
    caller.client.close()
    assert {answer.status_code for answer in answers} == {200}
    assert not [name for answer in answers for name in answer.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize("http2", [False, True])
def test_an_address_and_a_key_have_limits_of_their_own(gateway: GatewayProcess, http2: bool) -> None:
    """Each address, each key wherever it comes from, and a key with its own limit.

    On a machine so busy that Redis takes longer than 100 ms the gateway counts by itself for five seconds; then it is tried again.
    """

    def make(**fields: int) -> str:
        made = gateway.admin("POST", "/keys", {"name": f"key {next(_numbers)}", **fields})
        return str(made.json()["key"])

    def of_addresses() -> list[list[int]]:
        return [Caller(gateway, new_address(), headers, http2=http2).statuses(ADDRESS_LIMIT + 2) for headers in ({}, bearer("wrong"))]

    def of_a_key() -> list[list[int]]:
        key = make()
        there = Caller(gateway, new_address(), bearer(key), http2=http2).statuses(KEY_LIMIT)
        return [there, Caller(gateway, headers={"x-api-key": key}, http2=http2).statuses(2)]

    def of_a_key_with_a_limit() -> list[int]:
        return Caller(gateway, headers=bearer(make(rate_limit=1)), http2=http2).statuses(3)

    wait_until(lambda: of_addresses() == [allowed(ADDRESS_LIMIT)] * 2, within=60)
    wait_until(lambda: of_a_key() == [allowed(KEY_LIMIT, 0), allowed(0)], within=60)
    wait_until(lambda: of_a_key_with_a_limit() == allowed(1), within=60)


def test_model_lists_do_not_count(gateway: GatewayProcess) -> None:
    """Neither do they use up the quota, nor are they refused when it is used up."""

    def statuses() -> list[int]:
        caller = Caller(gateway, new_address())
        with caller.client as client:
            for path in ("/v1/models", "/v1/models/tiny", "/models"):
                assert {client.get(path).status_code for _ in range(ADDRESS_LIMIT + 2)} == {200}
            found = [caller.ask().status_code for _ in range(ADDRESS_LIMIT + 2)]
            assert client.get("/v1/models").status_code == client.head("/v1/models").status_code == 200
            return found

    wait_until(lambda: statuses() == allowed(ADDRESS_LIMIT), within=60)


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("name", FORWARDING)
def test_a_proxy_on_this_machine_is_no_client_of_it(gateway: GatewayProcess, name: str, http2: bool) -> None:
    """Whichever header shows it, all its clients share the limit of its address; the log says once what to set, and so do the pages."""
    statuses = Caller(gateway, headers={name: FORWARDING[name]}, http2=http2).statuses(2 * ADDRESS_LIMIT + 1)
    assert 429 in statuses
    wait_until(lambda: gateway.log_text().count("requests arrive through an untrusted proxy on this machine") == 1)
    with httpx2.Client(base_url=gateway.url, trust_env=False, follow_redirects=True, headers={"accept": "text/html"}) as browser:
        sent = {"form_token": value_of(browser.get("/login"), "form_token"), "key": gateway.admin_key}
        assert browser.post("/login", data=sent, headers={"origin": gateway.url}).status_code == 200
        for path in ("/settings", "/dashboard"):
            assert "MULTIVERSE_TRUSTED_PROXIES=127.0.0.1/32" in browser.get(path).text


@pytest.mark.parametrize("door", DOORS)
def test_a_refusal_speaks_of_keys_where_there_are_some(door: Door, backend: Backend) -> None:
    """To callers without one; a revoked key is none."""
    with GatewayProcess({"RATE_LIMIT_PER_MINUTE": "1", "TRUSTED_PROXIES": "127.0.0.2/32", **door_setting(door)}) as gateway:
        gateway.register("tiny", backend.url)

        def refusal(headers: Mapping[str, str] | None = None) -> str:
            caller = Caller(gateway, new_address(), headers)
            with caller.client:
                assert caller.ask().status_code == 200
                answer = caller.ask()
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            return str(answer.json()["error"]["message"])

        assert "key" not in refusal()
        made = gateway.admin("POST", "/keys", {"name": "alice"}).json()
        assert "send a client key" in refusal()
        assert "key" not in refusal(bearer(made["key"])), "the limit of an address holds for keys, too, where only that is set"
        assert gateway.admin("DELETE", f"/keys/{made['id']}").status_code == 200
        assert "key" not in refusal()


def test_a_trusted_proxy_on_this_machine_tells_its_clients_apart(backend: Backend) -> None:
    """Each has the limit of its own address, and there is nothing to warn of."""
    with GatewayProcess({"RATE_LIMIT_PER_MINUTE": "2", "TRUSTED_PROXIES": "127.0.0.0/8"}) as gateway:
        gateway.register("tiny", backend.url)
        for number in range(3):
            assert Caller(gateway, headers={"x-forwarded-for": f"198.51.100.{number}"}).statuses(3) == allowed(2, 1)
        assert "that is not trusted" not in gateway.log_text()
