"""The SQLite store keeps the contract, and its file survives what happens to files."""

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from multiverse_gateway import GatewayError, Store
from multiverse_gateway.stores import sqlite
from multiverse_gateway.stores.sqlite import SqliteStore
from multiverse_gateway.testing.store import StoreContract, make_server

KEY = "a-marker-key-of-a-server"


class TestSqliteStore(StoreContract):
    """In a file."""

    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[Store]:
        """Yield an empty store."""
        store = SqliteStore(tmp_path / "registry.db")
        await store.open()
        yield store
        await store.aclose()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


async def opened(path: Path, secret: str | None = None) -> SqliteStore:
    store = SqliteStore(path, secret=secret)
    await store.open()
    return store


async def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    """A restart forgets nothing."""
    store = await opened(tmp_path / "registry.db")
    await store.save_server(make_server())
    version = await store.version()
    await store.aclose()
    store = await opened(tmp_path / "registry.db")
    assert (await store.load()).servers == (make_server(),)
    assert await store.version() == version
    await store.aclose()


async def test_files_are_private_and_keys_encrypted(tmp_path: Path) -> None:
    """No other user reads them, and the server's key stands in none of them in clear text."""
    store = await opened(tmp_path / "registry.db")
    await store.save_server(make_server(api_key=KEY))
    files = contents(tmp_path)
    assert list(files) == ["registry.db", "registry.db-shm", "registry.db-wal", "registry.db.key"]
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in files} == {0o600}
    assert not any(KEY.encode() in content for content in files.values())
    await store.aclose()
    assert not any(KEY.encode() in content for content in contents(tmp_path).values())


async def test_a_wrong_secret_is_refused_and_rotation_keeps_keys_readable(tmp_path: Path) -> None:
    """X14: clear words instead of lost keys; the old secret may stand behind the new one."""
    path = tmp_path / "registry.db"
    store = await opened(path, "the old secret of this gateway, long")
    await store.save_server(make_server(api_key=KEY))
    await store.aclose()
    with pytest.raises(GatewayError, match="BACKEND_KEY_SECRET"):
        await opened(path, "another secret of this gateway, long")
    store = await opened(path, "another secret of this gateway, long,the old secret of this gateway, long")
    await store.aclose()


async def test_a_damaged_file_is_left_as_it_is(tmp_path: Path) -> None:
    """The message names the newest backup."""
    path = tmp_path / "registry.db"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    (tmp_path / "registry.db.backup-1").write_bytes(b"")
    before = path.read_bytes()
    with pytest.raises(GatewayError, match=r"damaged.*registry\.db\.backup-1"):
        await opened(path)
    assert path.read_bytes() == before


async def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    """An older gateway does not touch what it does not know."""
    path = tmp_path / "registry.db"
    await (await opened(path)).aclose()
    with sqlite3.connect(path) as connection:
        connection.execute("insert into _sqlite_migrations (migration_set, name, applied_at) values ('multiverse_gateway', 'later', 'x')")
    connection.close()
    with pytest.raises(GatewayError, match="newer version"):
        await opened(path)


async def test_a_locked_file_refuses_writes_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P04: a write answers that it cannot be done, reading goes on, and nothing must be restarted."""
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.05)
    path = tmp_path / "registry.db"
    store = await opened(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin exclusive")
    with pytest.raises(GatewayError) as refusal:
        await store.save_server(make_server())
    assert (refusal.value.status, refusal.value.code) == (503, "storage_unavailable")
    assert (await store.load()).servers == ()
    other.execute("rollback")
    other.close()
    await store.save_server(make_server())
    assert (await store.load()).servers == (make_server(),)
    await store.aclose()


async def test_one_pair_has_one_record(tmp_path: Path) -> None:
    """Two processes that register the same pair at once do not make two of it."""
    first, second = await opened(tmp_path / "registry.db"), await opened(tmp_path / "registry.db")
    await first.save_server(make_server())
    with pytest.raises(GatewayError):
        await second.save_server(make_server("two", endpoint_url=make_server().endpoint_url))
    assert [server.id for server in (await second.load()).servers] == ["one"]
    await first.aclose()
    await second.aclose()


async def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """The start stops with the path in its message."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(GatewayError, match=r"file/registry\.db"):
        await opened(tmp_path / "file" / "registry.db")


WRITER = """
import os, sys, anyio
from pathlib import Path
from multiverse_gateway.stores.sqlite import SqliteStore
from multiverse_gateway.testing.store import make_server

async def write(cycle):
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    number = cycle * 1000000
    while True:
        number += 1
        await store.save_server(make_server(f"s{number}"))
        print("+", f"s{number}", flush=True)
        if number % 3 == 0:
            print("?", f"s{number - 1}", flush=True)
            await store.remove_server(f"s{number - 1}")
            print("-", f"s{number - 1}", flush=True)

for line in sys.stdin:
    child = os.fork()
    if not child:
        anyio.run(write, int(line))
    print("child", child, flush=True)
    os.waitpid(child, 0)
    print("dead", child, flush=True)
"""


@pytest.mark.e2e
def test_no_acknowledged_write_is_lost_by_kill_9(tmp_path: Path) -> None:
    """P01: killed at 60 random moments, the file holds exactly what was acknowledged, give or take the write under way."""
    path = tmp_path / "registry.db"
    moments = random.Random(1)
    present: set[str] = set()
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert nursery.stdin is not None
        for cycle in range(60):
            nursery.stdin.write(f"{cycle}\n")
            nursery.stdin.flush()
            unsure = kill_at_random(nursery, moments.randrange(1, 40), present)
            found = anyio.run(names_in, path)
            assert present - found <= unsure
            assert len(found - present) <= 1
            present = found
        nursery.stdin.close()


def kill_at_random(nursery: subprocess.Popen[str], lines: int, present: set[str]) -> set[str]:
    """Kill the writer after so many lines; note in `present` what it acknowledged, return what it may have removed."""
    assert nursery.stdout is not None
    unsure: set[str] = set()
    child = 0
    for line in nursery.stdout:
        sign, name = line.split()
        lines -= 1
        if sign == "child":
            child = int(name)
        elif sign == "dead":
            break
        elif sign == "+":
            present.add(name)
        elif sign == "?":
            unsure.add(name)
        else:
            present.discard(name)
            unsure.discard(name)
        if lines <= 0 and child:
            os.kill(child, signal.SIGKILL)
            child = 0
    return unsure


async def names_in(path: Path) -> set[str]:
    """Return the ids in the file."""
    store = await opened(path)
    try:
        return {str(server.id) for server in (await store.load()).servers}
    finally:
        await store.aclose()
