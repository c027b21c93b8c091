"""Several workers on one machine and one SQLite file behave as one gateway."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2
import pytest

from multiverse_gateway.core.probing import LEASE_SECONDS
from multiverse_gateway.monitor import FOLLOW_SECONDS
from support.backends import Backend, Exchange, answer_well, list_models
from support.processes import ADMIN_KEY, GatewayProcess
from support.raw_client import RawClient
from support.sockets import wait_until
from support.workers import children, holder

pytestmark = pytest.mark.e2e

WORKERS = 3
QUESTION = {"model": "shared", "messages": [{"role": "user", "content": "hello"}]}
KEY = [("x-api-key", ADMIN_KEY)]
ONE_USE = httpx2.Limits(max_keepalive_connections=0)
"""A connection for each request."""
SEEN_WITHIN = 1.0
"""What the documentation promises: a change is seen by every worker after so many seconds."""
SLACK = 5.0
"""What two busy cores may take besides."""


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """Start one gateway of several workers."""
    with GatewayProcess({"HEALTH_CHECK_INTERVAL_SECONDS": "1"}, args=("--workers", str(WORKERS))) as started:
        wait_until(lambda: len(children(started.pid)) == WORKERS)
        yield started


@pytest.fixture
def workers(gateway: GatewayProcess) -> Iterator[list[RawClient]]:
    """Return a connection to each of the workers: the kernel chooses one for each connection, so many may be opened."""
    found: dict[int, RawClient] = {}
    with ExitStack() as stack:

        def all_found() -> bool:
            client = stack.enter_context(RawClient(gateway.port, timeout=30))
            client.fetch("POST", "/v1/chat/completions", json=QUESTION)
            pid = holder(children(gateway.pid), (client.host, client.port), client.socket.getsockname())
            if pid is not None:
                found.setdefault(pid, client)
            return found.keys() == children(gateway.pid) and len(found) == WORKERS

        wait_until(all_found, within=30, what="no connection to every worker")
        yield list(found.values())


def ask(workers: list[RawClient]) -> list[int]:
    """Ask the model at each worker."""
    return [client.fetch("POST", "/v1/chat/completions", json=QUESTION).status for client in workers]


def states(workers: list[RawClient], server: str) -> set[str]:
    """Return what the workers say of a server's health."""
    return {client.fetch("GET", f"/admin/servers/{server}", headers=KEY).json["state"] for client in workers}


def test_what_one_worker_learns_all_know(workers: list[RawClient]) -> None:
    """What is registered with one is served by all within a second, and what one removes is gone from all; so are verdicts."""
    assert 2 * FOLLOW_SECONDS <= SEEN_WITHIN  # a verdict waits until it is saved, and until it is read
    first, second, _ = workers
    within = SEEN_WITHIN + SLACK
    with Backend("one", models=("shared",)) as backend:
        assert ask(workers) == [404] * WORKERS
        made = first.fetch("POST", "/admin/register", json={"model_name": "shared", "endpoint_url": backend.url}, headers=KEY)
        assert made.status == 201, made.body
        server = made.json["registration_id"]
        wait_until(lambda: ask(workers) == [200] * WORKERS, within=within)
        backend.refuse()
        wait_until(lambda: states(workers, server) <= {"unhealthy", "deactivated"}, within=within)
        backend.accept()
        wait_until(lambda: ask(workers) == [200] * WORKERS, within=60)
        assert second.fetch("DELETE", f"/admin/register/{server}", headers=KEY).status == 200
        wait_until(lambda: ask(workers) == [404] * WORKERS, within=within)
        hits = backend.hits
        assert ask(workers) == [404] * WORKERS
        assert backend.hits == hits


class Probed(Backend):
    """A server that knows which worker sent each probe."""

    def __init__(self, gateway: GatewayProcess) -> None:
        """Prepare."""
        super().__init__("probed", models=("probed",), behave_models=self.note)
        self.gateway = gateway
        self.probers: list[int | None] = []

    async def note(self, exchange: Exchange) -> None:
        """Note who has the other end while it waits for the answer."""
        self.probers.append(holder(children(self.gateway.pid), exchange.peer, (self.host, self.port)))
        await list_models(exchange)

    def only_prober(self, probes: int = 6) -> int | None:
        """Return the worker that sent the last probes, if it was one and the same."""
        last = self.probers[-probes:]
        return last[0] if len(last) == probes and len(set(last)) == 1 else None


def test_one_worker_probes_and_another_takes_over(gateway: GatewayProcess) -> None:
    """Killed, the prober is replaced when its lease is over; requests are answered meanwhile."""
    with Probed(gateway) as backend:
        server = gateway.register("probed", backend.url)
        wait_until(backend.only_prober, within=30)
        prober = backend.only_prober()
        assert prober is not None
        os.kill(prober, signal.SIGKILL)
        del backend.probers[:]
        wait_until(backend.only_prober, within=LEASE_SECONDS + 30)
        assert backend.only_prober() in children(gateway.pid) - {prober}
        assert gateway.chat("probed").status_code == 200
        assert gateway.admin("DELETE", f"/register/{server}").status_code == 200


class Single(Probed):
    """A server that handles one connection at a time: all others wait in its queue."""

    def __init__(self, gateway: GatewayProcess) -> None:
        """Prepare."""
        super().__init__(gateway)
        self.lock = asyncio.Lock()
        self.may_end = threading.Event()
        self.behave = self.answer

    async def note(self, exchange: Exchange) -> None:
        """Answer a probe when everybody before is served."""
        async with self.lock:
            await super().note(exchange)

    async def answer(self, exchange: Exchange) -> None:
        """Answer a request when the test says so."""
        async with self.lock:
            while not self.may_end.is_set():  # noqa: ASYNC110  it belongs to the thread of the test
                await asyncio.sleep(0.02)
            await answer_well(exchange)


def test_a_server_that_is_busy_with_requests_of_another_worker_is_not_dead() -> None:
    """Outside case 9: whichever worker a request came to, the one that probes knows of it."""
    often = {"HEALTH_CHECK_INTERVAL_SECONDS": "1", "HEALTH_CHECK_TIMEOUT_SECONDS": "1"}
    question = {"model": "probed", "messages": []}
    with GatewayProcess(often, args=("--workers", "2")) as gateway, Single(gateway) as backend, ExitStack() as stack:
        server = gateway.register("probed", backend.url)
        wait_until(lambda: backend.only_prober(3), within=30)
        prober = backend.only_prober(3)

        def another() -> RawClient | None:
            client = stack.enter_context(RawClient(gateway.port, timeout=30))
            client.fetch("GET", "/v1/models")
            pid = holder(children(gateway.pid), (client.host, client.port), client.socket.getsockname())
            return None if pid in (None, prober) else client

        client = next(found for found in iter(another, "") if found is not None)
        client.request("POST", "/v1/chat/completions", json=question)
        wait_until(lambda: backend.running == 1)
        probes = len(backend.probes)
        wait_until(lambda: len(backend.probes) >= probes + 4, within=30)
        record = gateway.server(server)
        assert (record["state"] in ("healthy", "suspect"), record["consecutive_failures"]) == (True, 0), record
        backend.may_end.set()
        assert client.read_response().status == 200
        wait_until(lambda: gateway.server(server)["state"] == "healthy", within=10)


def pages(gateway: GatewayProcess, cookie: str) -> set[int]:
    """Ask for a page on new connections until every worker has most likely answered."""
    with httpx2.Client(limits=ONE_USE, headers={"cookie": cookie}) as client:
        return {client.get(f"{gateway.url}/settings").status_code for _ in range(20)}


def test_who_signs_in_at_one_worker_is_signed_in_at_all() -> None:
    """At once; and out of all within a second of leaving."""
    with GatewayProcess({}, args=("--workers", "3")) as gateway, httpx2.Client(base_url=gateway.url) as browser:
        form = browser.get("/login").text
        token = form.split('name="form_token" value="')[1].split('"')[0]
        answer = browser.post("/login", data={"form_token": token, "key": gateway.admin_key}, headers={"origin": gateway.url})
        assert answer.status_code == 303, answer.text
        cookie = f"mvg_session={browser.cookies['mvg_session']}"
        assert pages(gateway, cookie) == {200}
        csrf = browser.get("/session").json()["token"]
        assert browser.post("/logout", data={"csrf": csrf}, headers={"origin": gateway.url}).status_code == 303
        wait_until(lambda: pages(gateway, cookie) == {401}, within=10)
