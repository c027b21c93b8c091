"""A store that misbehaves: sums of any size, rows that it refuses, errors of every kind. Nothing ends for it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import anyio
import httpx2
import pytest

from multiverse_gateway import Health, ProbeResult, ServerId, Usage
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.usage import MAX_COUNT, NO_SERVER, Counts
from multiverse_gateway.monitor import watch
from multiverse_gateway.stores.memory import MemoryStore
from support import answers, behaviours
from support.backends import Backend
from support.gateways import stage
from support.pages import value_of
from support.processes import GatewayProcess
from support.sockets import serving, wait_until

TOKENS = 2**53


def used(gateway: GatewayProcess) -> dict[str, int]:
    """Return the total of what was used."""
    report = gateway.admin("GET", "/usage")
    assert report.status_code == 200, report.text
    total: dict[str, int] = report.json()["total"]
    return total


@contextmanager
def database(gateway: GatewayProcess) -> Iterator[sqlite3.Connection]:
    """Lend a connection to the gateway's database; what was done is committed at the end."""
    with closing(sqlite3.connect(gateway.database, timeout=10)) as db, db:
        yield db


def boastful() -> Backend:
    """Return a server that reports more tokens than there are."""
    answer = {"choices": [], "usage": {"prompt_tokens": TOKENS, "completion_tokens": 2**64, "total_tokens": 2**65}}
    return Backend("boastful", behaviours.answer(200, answers.packed(answer)), models=("tiny",))


@pytest.mark.e2e
def test_a_server_that_reports_absurd_counts_ends_nothing() -> None:
    """S8: counting, the report, its CSV, the dashboard and the metrics go on, also where sums overflowed before; the exit code is 0."""
    with serving(server := boastful()), GatewayProcess() as gateway:
        gateway.register("tiny", server.url)
        assert gateway.chat("tiny").status_code == 200
        wait_until(lambda: used(gateway)["requests"] == 1)
        for held in (2**63 - 1, 9.3e18):
            with database(gateway) as db:
                db.execute("update usage set prompt_tokens = ?, completion_tokens = ?", [held, held])
            before = used(gateway)
            assert (before["prompt_tokens"], before["completion_tokens"]) == (MAX_COUNT, MAX_COUNT)
            assert gateway.chat("tiny").status_code == 200
            wait_until(lambda before=before: used(gateway)["requests"] == before["requests"] + 1)  # type: ignore[misc]
            assert used(gateway)["completion_tokens"] == MAX_COUNT
        assert str(MAX_COUNT) in gateway.admin("GET", "/usage?format=csv").text
        assert gateway.call("GET", "/metrics").status_code == 200
        with httpx2.Client(base_url=gateway.url, trust_env=False, follow_redirects=True, headers={"accept": "text/html"}) as browser:
            token = value_of(browser.get("/login"), "form_token")
            sent = {"form_token": token, "key": gateway.admin_key}
            assert browser.post("/login", data=sent, headers={"origin": gateway.url}).status_code == 200
            page = browser.get("/dashboard")
            assert page.status_code == 200
            assert f"{MAX_COUNT:,}" in page.text
        assert gateway.stop() == 0
        gateway.start()
        assert used(gateway)["prompt_tokens"] == MAX_COUNT


@pytest.mark.e2e
def test_a_row_that_the_database_refuses_holds_up_no_other() -> None:
    """The others are saved at once, the refused one is dropped after some rounds with a line in the log, and the exit code is 0."""
    servers = [Backend(name, models=(name,)) for name in ("sound", "poisoned")]
    with serving(*servers), GatewayProcess() as gateway:
        for server in servers:
            gateway.register(server.name, server.url)
        with database(gateway) as db:
            db.execute("create trigger refuse before insert on usage when new.model = 'poisoned' begin select raise(abort, 'never'); end")
        for number in range(1, 5):
            for server in servers:
                assert gateway.chat(server.name).status_code == 200
            wait_until(lambda number=number: used(gateway)["requests"] == number)  # type: ignore[misc]
        wait_until(lambda: "usage counts are dropped" in gateway.log_text())
        assert "never" not in gateway.log_text()
        assert gateway.stop() == 0


class TypeErrors(MemoryStore):
    """A plug-in of which every call that is named raises what no store should raise."""

    def __init__(self, wall: Callable[[], float]) -> None:
        super().__init__(wall)
        self.failing: set[str] = set()
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or name in ("failing", "calls") or not callable(found):
            return found

        async def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name in self.failing:
                raise TypeError("a secret of the store")
            return await found(*arguments)

        return call


EVERYTHING = {"version", "changed", "load", "save_health", "add_usage", "requests_on", "usage", "history", "removed", "claim", "aclose"} | {
    "save_responses",
    "find_response",
}


async def until(done: Callable[[], bool]) -> None:
    """Wait until something is so."""
    with anyio.fail_after(20):
        while not done():  # noqa: ASYNC110  # the store of a plug-in sets no events
            await anyio.sleep(0.01)


async def test_a_plug_in_that_raises_anything_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """S8: the monitor goes on and saves everything when the store works again; calls answer 503, and the gateway closes without error."""
    store = TypeErrors(wall=lambda: 1_780_000_000.0)
    async with stage(store=store) as at:
        server = await at.register()
        async with anyio.create_task_group() as group:
            group.start_soon(watch, at.gateway)
            await until(lambda: "claim" in store.calls and "changed" in store.calls)
            store.failing = set(EVERYTHING)
            at.gateway.usage_book._ledger.count("tiny", NO_SERVER, "", "", day=20_000, counts=Counts(requests=1))
            store.calls.clear()
            await until(lambda: {"version", "changed"} <= set(store.calls))
            for path in ("/admin/usage", "/admin/servers?include_inactive=true", f"/admin/servers/{server['id']}/history"):
                answer = await at.client.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable"), path
            assert (await at.client.get("/health")).json()["database"] == "unavailable"
            with pytest.raises(StorageUnavailable):
                await at.gateway.usage_book.flush()
            store.failing = set()
            await at.gateway.usage_book.flush()
            assert [usage.counts.requests for usage in await store.usage("2000-01-01", "2100-01-01")] == [1]
            store.calls.clear()
            await until(lambda: {"version", "changed"} <= set(store.calls))
            group.cancel_scope.cancel()
        store.failing = set(EVERYTHING)
    assert "a secret of the store" not in caplog.text


class Picky(MemoryStore):
    """A store that refuses what is about one server, after some of it was written."""

    refused = ServerId("")
    error: type[Exception] = OverflowError

    async def save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        """Save, unless the refused server is among them."""
        if self.refused in {*changes, *(result.server_id for result in results)}:
            raise self.error
        await super().save_health(changes, results)

    async def add_usage(self, batch: str, rows: Sequence[Usage]) -> None:
        """Add, unless the refused server is among them."""
        if self.refused in {row.key.server_id for row in rows}:
            raise self.error
        await super().add_usage(batch, rows)


@pytest.mark.parametrize("error", [OverflowError, TypeError, ValueError, KeyError, RuntimeError, sqlite3.DataError, AssertionError])
async def test_one_server_that_the_store_refuses_costs_no_other_its_health(error: type[Exception]) -> None:
    """Whatever it raises: the checks and counts of the other server are saved, and those of the refused one are given up."""
    store = Picky()
    store.error = error
    async with stage(store=store) as at:
        first, second = [await at.register(endpoint_url=f"http://gpu-{number}.example") for number in range(2)]
        store.refused = ServerId(first["id"])
        for _ in range(4):
            for server in list(at.gateway.table.routes.values()):
                await at.gateway.checks.check_now(server.server)
                at.gateway.usage_book._ledger.count("tiny", server.server.id, "", "", day=20_000, counts=Counts(requests=1))
            await at.gateway.health_book.flush()
            await at.gateway.usage_book.flush()
        assert len(await store.history(ServerId(second["id"]), 10)) == 5
        assert [(row.key.server_id, row.counts.requests) for row in await store.usage("2000-01-01", "2100-01-01")] == [(second["id"], 4)]
