"""The database file is moved, removed or replaced under a running gateway: no write is acknowledged that would be lost with it."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest

from multiverse_gateway.stores.sqlite import SqliteStore
from multiverse_gateway.testing.store import make_server
from support.backends import Backend
from support.processes import GatewayProcess
from support.sockets import serving, wait_until
from support.workers import children

pytestmark = pytest.mark.e2e
CHAT = "tiny"


@attrs.frozen
class Place:
    """A gateway whose database has a folder of its own, and a server that serves any model."""

    gateway: GatewayProcess
    server: Backend

    @property
    def database(self) -> Path:
        """The database file."""
        return self.gateway.directory / "data" / "multiverse.db"

    def beside(self, suffix: str) -> Path:
        """Return the path of a file that belongs to the database."""
        return self.database.with_name(self.database.name + suffix)

    def register(self, model: str) -> int:
        """Try to register a server, and return the status."""
        return self.gateway.admin("POST", "/register", {"model_name": model, "endpoint_url": self.server.url}).status_code

    def wait_for_workers(self, count: int) -> None:
        """Wait until so many processes serve, each of which knows the model."""
        wait_until(lambda: listeners(self.gateway.port) == count, within=30)
        wait_until(lambda: all(self.gateway.chat(CHAT).status_code == 200 for _ in range(10 * count)), within=10)

    def models(self) -> set[str]:
        """Return the models of the registered servers."""
        return {str(record["model_name"]) for record in self.gateway.admin("GET", "/servers").json()}

    def reason(self) -> str | None:
        """Return what `/health` says about the database."""
        health = self.gateway.call("GET", "/health").json()
        assert (health["status"], health["database"]) in (("ok", "ok"), ("degraded", "unavailable"))
        assert (health["database_reason"] is None) is (health["database"] == "ok")
        reason: str | None = health["database_reason"]
        return reason

    def check_refusals(self) -> None:
        """Check that nothing is saved, that the answers say why, and that inference continues."""
        wait_until(lambda: self.reason() is not None, within=1)
        assert "put the same file back" in str(self.reason())
        [record] = [record for record in self.gateway.admin("GET", "/servers").json() if record["model_name"] == CHAT]
        calls = {
            "POST /register": {"model_name": "lost", "endpoint_url": self.server.url},
            f"PUT /register/{record['id']}": {"weight": 7},
            f"DELETE /register/{record['id']}": None,
            "POST /keys": {"name": "lost"},
            "POST /import": {"servers": [{"model_name": "lost", "endpoint_url": self.server.url}]},
        }
        for call, body in calls.items():
            method, path = call.split()
            answer = self.gateway.admin(method, path, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable"), call
            assert "moved, removed or replaced" in answer.json()["error"]["message"]
            assert str(self.database.parent) not in answer.text, "paths are the operator's alone"
            assert int(answer.headers["retry-after"]) >= 1
        assert [self.gateway.chat(CHAT, stream=stream).status_code for stream in (False, True)] == [200, 200]
        assert self.gateway.call("GET", "/readyz").status_code == 200
        assert self.models() == {CHAT}


def listeners(port: int) -> int:
    """Return how many sockets listen on a port: each worker has one (Linux)."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


@contextmanager
def placed(**settings: str) -> Iterator[Place]:
    """Run a gateway with one server."""
    server = Backend("good", models=(CHAT,))
    with serving(server), GatewayProcess({"DATABASE_URL": "sqlite:///./data/multiverse.db", **settings}) as gateway:
        place = Place(gateway, server)
        assert place.register(CHAT) == 201
        yield place


def moved(place: Place, suffix: str) -> Callable[[], object]:
    """Move a file of the database away, and return how it comes back."""
    path, away = place.beside(suffix), place.beside(f"{suffix}.away")
    path.rename(away)
    return lambda: away.rename(path)


def folder_moved(place: Place) -> Callable[[], object]:
    """Do the same with the folder."""
    folder, away = place.database.parent, place.database.parent.with_name("away")
    folder.rename(away)
    return lambda: away.rename(folder)


def replaced(place: Place) -> Callable[[], object]:
    """Put a copy in the place of the database, as an editor or a synchronising program does."""
    path, kept, copy = place.database, place.beside(".kept"), place.beside(".copy")
    kept.hardlink_to(path)
    shutil.copy(path, copy)
    copy.replace(path)
    return lambda: kept.replace(path)


def test_a_file_that_is_away_takes_no_writes_until_it_is_back() -> None:
    """S11: the file, its journal, the journal's index, its folder, or a copy in its place; when it is put back, no restart is needed."""
    with placed() as place:
        ways: list[Callable[[Place], Callable[[], object]]] = [
            partial(moved, suffix=""),
            partial(moved, suffix="-wal"),
            partial(moved, suffix="-shm"),
            folder_moved,
            replaced,
        ]
        for lose in ways:
            put_back = lose(place)
            place.check_refusals()
            put_back()
            wait_until(lambda: place.reason() is None, within=1)
            assert (
                place.gateway.admin("POST", "/keys", {"name": f"key {len(place.gateway.admin('GET', '/keys').json())}"}).status_code == 201
            )
        log = place.gateway.log_text()
        wait_until(lambda: place.gateway.log_text().count("is back in its place") == 5)
        assert str(place.database.name) in log
        assert place.gateway.stop() == 0
        place.gateway.start()
        assert place.models() == {CHAT}
        assert len(place.gateway.admin("GET", "/keys").json()) == 5


def test_a_removed_file_ends_neither_the_gateway_nor_its_shutdown() -> None:
    """Inference continues, the exit code is 0, and a backup brings back what was saved before."""
    with placed() as place:
        copy = place.gateway.directory / "copy.db"
        with closing(sqlite3.connect(place.database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        place.database.unlink()
        place.check_refusals()
        assert place.gateway.stop() == 0
        copy.rename(place.database)
        place.gateway.start()
        assert place.models() == {CHAT}
        assert place.register("another") == 201


@pytest.mark.skipif(sys.platform != "linux", reason="workers share a port on Linux only")
def test_no_worker_acknowledges_a_write_that_is_lost() -> None:
    """Each of several processes on one file notices it; of all that was acknowledged while the file came and went, all is there."""
    with placed(MULTIVERSE_WORKERS="2") as place:
        place.wait_for_workers(2)
        acknowledged = {CHAT}
        for turn in range(3):
            put_back = moved(place, "")
            names = [f"model-{turn}-{number}" for number in range(6)]
            assert {place.register(name) for name in names} == {503}
            put_back()
            for name in names:
                wait_until(lambda name=name: place.register(name) in (200, 201), within=2)  # type: ignore[misc]
            acknowledged |= set(names)
        wait_until(lambda: place.models() == acknowledged, within=3)
        assert place.gateway.stop() == 0
        place.gateway.start()
        assert place.models() == acknowledged


@pytest.mark.skipif(sys.platform != "linux", reason="workers share a port on Linux only")
def test_a_worker_that_starts_meanwhile_makes_no_database() -> None:
    """Restarted or replacing the others: nothing is lost when the file is put back, and the others serve until then."""
    with placed(MULTIVERSE_WORKERS="2") as place:
        place.wait_for_workers(2)
        put_back = folder_moved(place)
        before = children(place.gateway.pid)
        os.kill(min(before), signal.SIGKILL)
        wait_until(lambda: "was moved or removed; put it back" in place.gateway.log_text(), within=10)
        place.gateway.signal(signal.SIGUSR2)
        wait_until(lambda: "so the old ones continue" in place.gateway.log_text(), within=20)
        assert place.gateway.chat(CHAT).status_code == 200
        assert place.register("lost") == 503
        assert not place.database.exists()
        put_back()
        wait_until(lambda: len(children(place.gateway.pid)) == 2, within=20)
        wait_until(lambda: place.reason() is None and place.register("kept") in (200, 201), within=10)
        assert place.models() == {CHAT, "kept"}


async def test_another_database_that_took_the_place_keeps_its_journal(tmp_path: Path) -> None:
    """A gateway that stops after its folder was moved does not remove the journal of the gateway that works there now."""
    folder, away = tmp_path / "data", tmp_path / "away"
    old = SqliteStore(folder / "multiverse.db")
    await old.open()
    await old.save_server(make_server("old"))
    folder.rename(away)
    new = SqliteStore(folder / "multiverse.db")
    await new.open()
    await new.save_server(make_server("new"))
    await old.aclose()
    await new.save_server(make_server("newer"))
    assert {server.id for server in (await new.load()).servers} == {"new", "newer"}
    await new.aclose()
    for path, ids in ((away, {"old"}), (folder, {"new", "newer"})):
        store = SqliteStore(path / "multiverse.db")
        await store.open()
        assert {server.id for server in (await store.load()).servers} == ids
        await store.aclose()
