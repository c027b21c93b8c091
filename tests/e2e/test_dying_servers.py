"""Real servers that are killed and stopped under load, and the gateway itself killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import openai
import pytest

from support.backends import Backend
from support.processes import GatewayProcess, LlamaServer
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

MODEL = "tiny"


@attrs.define
class Callers:
    """Threads that ask without pause, each with the client as a user makes it, but without its own retries."""

    url: str
    stop: threading.Event = attrs.field(factory=threading.Event)
    answered: list[int] = attrs.field(factory=list)
    failures: list[Exception] = attrs.field(factory=list)

    def ask(self, number: int) -> None:
        """Ask until told to stop, every other thread for streams."""
        with openai.OpenAI(base_url=self.url, api_key="anything", max_retries=0, timeout=20.0) as client:
            while not self.stop.is_set():
                try:
                    said = client.chat.completions.create(
                        model=MODEL, messages=[{"role": "user", "content": f"hello {number}"}], max_tokens=8
                    )
                    assert said.choices[0].message.content is not None
                    self.answered.append(number)
                except Exception as error:
                    self.failures.append(error)


@contextmanager
def callers(gateway: GatewayProcess, size: int) -> Iterator[Callers]:
    """Run callers; at the end each of them has got its answer."""
    made = Callers(gateway.base_url)
    threads = [threading.Thread(target=made.ask, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made.stop.set()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert made.failures == []


def test_a_server_is_killed_under_load(needs_llama: None) -> None:
    """TC-INF-004: twenty threads, and every request is answered while one of two servers is killed and comes back."""
    with LlamaServer(MODEL) as one, LlamaServer(MODEL) as two, GatewayProcess() as gateway:
        killed, _ = gateway.register(MODEL, one.url), gateway.register(MODEL, two.url)
        with callers(gateway, 20) as asking:
            wait_until(lambda: len(set(asking.answered)) == 20, within=30)
            one.kill()
            wait_until(lambda: gateway.server(killed)["health_status"] == "unhealthy", within=5)
            before = len(asking.answered)
            wait_until(lambda: len(asking.answered) >= before + 60, within=30)
            one.start()
            wait_until(lambda: gateway.server(killed)["health_status"] == "healthy", within=20)
            before = len(asking.answered)
            wait_until(lambda: len(asking.answered) >= before + 60, within=30)
        assert gateway.admin("GET", "/stats").json()["in_flight"] == 0


def test_a_server_hangs_under_load(needs_llama: None) -> None:
    """H03: a server that is stopped (SIGSTOP) is found out, and every request is answered meanwhile."""
    env = {"FIRST_BYTE_TIMEOUT_SECONDS": "2", "HEALTH_CHECK_INTERVAL_SECONDS": "4", "HEALTH_CHECK_TIMEOUT_SECONDS": "2"}
    with LlamaServer(MODEL) as one, LlamaServer(MODEL) as two, GatewayProcess(env) as gateway:
        hung, _ = gateway.register(MODEL, one.url), gateway.register(MODEL, two.url)
        with callers(gateway, 6) as asking:
            wait_until(lambda: len(set(asking.answered)) == 6, within=30)
            one.pause()
            wait_until(lambda: gateway.server(hung)["health_status"] == "unhealthy", within=8)
            before = len(asking.answered)
            wait_until(lambda: len(asking.answered) >= before + 30, within=30)
            one.resume()
            gateway.admin("POST", f"/servers/{hung}/health-check")
            wait_until(lambda: gateway.server(hung)["health_status"] == "healthy", within=10)
        assert gateway.admin("GET", "/stats").json()["in_flight"] == 0


def test_the_gateway_is_killed(tmp_path: Path) -> None:
    """TC-HEALTH-005, NFR-REL-003: after kill -9 all acknowledged registrations are there, served at once, and checked again."""
    backends = [Backend(f"number {number}") for number in range(5)]
    with serving(*backends), GatewayProcess({"HEALTH_CHECK_INTERVAL_SECONDS": "1"}, cwd=tmp_path) as gateway:
        ids = [gateway.register(f"model-{number}", backend.url, api_key="sk-kept") for number, backend in enumerate(backends)]
        gone = ids.pop()
        assert gateway.admin("DELETE", f"/register/{gone}").status_code == 200
        before = {record["id"]: record for record in gateway.admin("GET", "/servers").json()}
        assert set(before) == set(ids)
        gateway.kill()
        gateway.start()
        after = {record["id"]: record for record in gateway.admin("GET", "/servers").json()}
        for name in ("model_name", "endpoint_url", "has_api_key", "registered_at", "active"):
            assert {key: record[name] for key, record in after.items()} == {key: record[name] for key, record in before.items()}
        answer = gateway.chat("model-0")
        assert answer.status_code == 200
        assert backends[0].last.header("authorization") == "Bearer sk-kept"
        probes = [len(backend.probes) for backend in backends[:4]]
        wait_until(lambda: all(len(backend.probes) > old for backend, old in zip(backends[:4], probes, strict=True)), within=12)
        records = {record["id"]: record for record in gateway.admin("GET", "/servers").json()}
        assert {record["health_status"] for record in records.values()} == {"healthy"}
        wait_until(lambda: gateway.server(ids[0])["last_checked_at"] > before[ids[0]]["last_checked_at"])
