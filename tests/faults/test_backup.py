"""Copies of the database: made while others write, brought back only where nothing is lost; the secret of the keys renewed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner, Result

from multiverse_gateway.cli import main
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.stores.sqlite import SqliteStore
from multiverse_gateway.stores.sqlite_copies import contents
from multiverse_gateway.stores.vault import key_file
from support.processes import SOURCES, environment

WRITES = 60


def server(number: int, key: str | None = None) -> Server:
    """Return a server."""
    return Server(
        id=ServerId(f"00000000-0000-4000-8000-{number:012}"),
        model_name="tiny",
        endpoint_url=f"http://gpu-{number}.example",
        api_key=key,
        registered_at=float(number),
        created_at=0.0,
        updated_at=0.0,
    )


def save(path: Path, *servers: Server) -> None:
    """Write servers into a database, making it if there is none."""

    async def run() -> None:
        store = SqliteStore(path)
        await store.open()
        for item in servers:
            await store.save_server(item)
        await store.aclose()

    anyio.run(run)


def numbers(path: Path) -> list[int]:
    """Return the numbers of the servers that a database holds, after checking it."""
    contents(path)
    with sqlite3.connect(path) as db:
        found = [int(row[0][-12:]) for row in db.execute("select id from servers order by id")]
    db.close()
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty directory, without the developer's settings."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - environment({}).keys():
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def database(folder: Path) -> Path:
    """Return the default database, with one server."""
    path = folder / "multiverse.db"
    save(path, server(1, "sk-of-server-one"))
    return path


def call(*arguments: str, **env: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, list(arguments), env=env or None)


def test_a_copy_under_writing_is_some_moment(folder: Path, database: Path) -> None:
    """P06: each copy holds the first n servers for some n, opens, and is its owner's alone; restored, it is that again."""

    def write() -> None:
        save(database, *(server(number) for number in range(2, WRITES)))

    writer = threading.Thread(target=write)
    writer.start()
    copies = []
    while writer.is_alive():
        result = call("backup", "--json")
        assert result.exit_code == 0, result.output
        copies.append(Path(json.loads(result.output)["file"]))
    writer.join()
    assert len(copies) >= 3
    held = [numbers(copy) for copy in copies]
    assert all(found == list(range(1, len(found) + 1)) for found in held)
    assert held == sorted(held)
    assert {copy.stat().st_mode & 0o777 for copy in copies} == {0o600}
    assert sorted(copies[0].parent.iterdir()) == sorted(copies), "nothing but the copies is left"

    result = call("restore", str(copies[0]), "--force")
    assert result.exit_code == 0, result.output
    assert numbers(database) == held[0]
    save(database, server(99))
    assert numbers(database) == [*held[0], 99]


def test_a_copy_is_not_written_over(database: Path) -> None:
    """What is there stays."""
    assert call("backup", "copy.db").exit_code == 0
    before = Path("copy.db").read_bytes()
    result = call("backup", "copy.db")
    assert (result.exit_code, "exists already" in result.output) == (1, True)
    assert Path("copy.db").read_bytes() == before
    assert "multiverse.db.key" in call("backup", "other.db").output


def test_only_sqlite_can_be_copied() -> None:
    """The others are told what to use; what is not there is not made."""
    assert call("backup", MULTIVERSE_DATABASE_URL="memory://").exit_code == 2
    assert call("backup", MULTIVERSE_DATABASE_URL="sqlite:///.").exit_code == 2
    assert call("backup").exit_code == 1
    assert not Path("multiverse.db").exists()


def test_a_folder_that_cannot_be_written(database: Path) -> None:
    """Is said; nothing is left behind."""
    Path("taken").write_text("a file")
    result = call("backup", "taken/copy.db")
    assert result.exit_code == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_what_is_no_copy_is_not_brought_back(database: Path, content: bytes) -> None:
    """P06: the database is left as it is."""
    Path("copy.db").write_bytes(content)
    result = call("restore", "copy.db", "--force")
    assert result.exit_code == 1
    assert numbers(database) == [1]


def test_a_damaged_copy_is_not_brought_back(database: Path) -> None:
    """P06: every page is looked at."""
    save(database, *(server(number) for number in range(2, 40)))
    assert call("backup", "copy.db").exit_code == 0
    data = bytearray(Path("copy.db").read_bytes())
    data[4096 * 2 :] = b"\xff" * (len(data) - 4096 * 2)
    Path("copy.db").write_bytes(data)
    result = call("restore", "copy.db", "--force")
    assert (result.exit_code, "damaged" in result.output) == (1, True)
    assert len(numbers(database)) == 39


def test_changes_are_not_lost_unasked(database: Path) -> None:
    """P06: a database that is newer than the copy is replaced only by --force, and kept aside even then."""
    assert call("backup", "copy.db").exit_code == 0
    save(database, server(2))
    result = call("restore", "copy.db")
    assert (result.exit_code, "newer than the copy" in result.output) == (1, True)
    assert numbers(database) == [1, 2]
    result = call("restore", "copy.db", "--force", "--json")
    assert result.exit_code == 0, result.output
    assert numbers(database) == [1]
    assert numbers(Path(json.loads(result.output)["kept"])) == [1, 2]
    assert database.stat().st_mode & 0o777 == 0o600


def test_a_restored_database_serves_with_its_keys(database: Path) -> None:
    """P06: the secret beside it still opens them."""
    assert call("backup", "copy.db").exit_code == 0
    database.unlink()
    result = call("restore", "copy.db")
    assert (result.exit_code, "The previous database" in result.output) == (0, False)
    assert key_of_first(database) == "sk-of-server-one"


def test_a_journal_whose_database_is_gone_is_not_read_into_the_copy(database: Path) -> None:
    """P06: after a crash the journal may be all that is left; what is restored is the copy alone, and the journal is kept aside."""
    assert call("backup", "copy.db").exit_code == 0
    journal = database.with_name("multiverse.db-wal")

    async def crash() -> bytes:
        store = SqliteStore(database)
        await store.open()
        await store.save_server(server(2))
        left = journal.read_bytes()
        await store.aclose()
        return left

    left = anyio.run(crash)
    database.unlink()
    journal.write_bytes(left)
    assert call("restore", "copy.db").exit_code == 0
    save(database)
    assert numbers(database) == [1]
    assert [path.read_bytes() for path in database.parent.glob("multiverse.db.replaced-*-wal")] == [left]


def test_a_running_gateway_is_not_robbed_of_its_database(database: Path) -> None:
    """P06: restore and rotate-key refuse while a process has it open, even if it is idle."""
    assert call("backup", "copy.db").exit_code == 0

    async def run() -> None:
        store = SqliteStore(database)
        await store.open()
        try:
            for command in (["restore", "copy.db"], ["restore", "copy.db", "--force"], ["rotate-key"]):
                result = await anyio.to_thread.run_sync(lambda command=command: call(*command))  # type: ignore[misc]
                assert (result.exit_code, "is running" in result.output) == (1, True)
            assert [item.api_key for item in (await store.load()).servers] == ["sk-of-server-one"]
        finally:
            await store.aclose()

    anyio.run(run)


def test_a_damaged_database_is_replaced_and_kept(database: Path) -> None:
    """P06: nothing in it can be counted, so nothing forbids it."""
    assert call("backup", "copy.db").exit_code == 0
    data = bytearray(database.read_bytes())
    data[:4096] = b"\xff" * 4096
    database.write_bytes(data)
    result = call("restore", "copy.db", "--json")
    assert result.exit_code == 0, result.output
    assert numbers(database) == [1]
    assert Path(json.loads(result.output)["kept"]).read_bytes() == bytes(data)


def test_a_newer_schema_is_not_brought_back(database: Path) -> None:
    """Neither is a database of a newer gateway replaced unasked."""
    assert call("backup", "copy.db").exit_code == 0
    for path, words in ((database, "newer than the copy"), (Path("copy.db"), "update the gateway")):
        with sqlite3.connect(path) as db:
            db.execute("insert into _sqlite_migrations (migration_set, name, applied_at) values ('multiverse_gateway', 'future', '')")
        db.close()
        result = call("restore", "copy.db")
        assert (result.exit_code, words in result.output) == (1, True), result.output


def key_of_first(path: Path, secret: str | None = None) -> str | None:
    """Return the decrypted key of the first server."""

    async def run() -> str | None:
        store = SqliteStore(path, secret=secret)
        await store.open()
        try:
            return (await store.load()).servers[0].api_key
        finally:
            await store.aclose()

    return anyio.run(run)


def test_the_secret_is_renewed(database: Path) -> None:
    """X14: afterward the new secret alone opens all keys, and the old one none."""
    old = key_file(database).read_text()
    result = call("rotate-key")
    assert result.exit_code == 0, result.output
    new = key_file(database).read_text()
    assert new != old
    assert old not in new
    assert key_file(database).stat().st_mode & 0o777 == 0o600
    assert key_of_first(database) == "sk-of-server-one"
    key_file(database).write_text(old)
    with pytest.raises(GatewayError, match="another secret"):
        key_of_first(database)


def test_the_secret_of_a_damaged_database_is_left_alone(database: Path) -> None:
    """With a word about it, and no traceback."""
    old = key_file(database).read_text()
    database.write_bytes(b"no database" * 1000)
    result = call("rotate-key")
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert "cannot be read" in result.output
    assert key_file(database).read_text() == old


def test_a_rotation_that_is_cut_off_loses_nothing(database: Path) -> None:
    """X14: with both secrets in the file, every start goes on from where it ended."""
    old = key_file(database).read_text()
    key_file(database).write_text("x" * 44 + "\n" + old)
    assert key_of_first(database) == "sk-of-server-one"
    key_file(database).write_text("x" * 44)
    assert key_of_first(database) == "sk-of-server-one"


def test_a_secret_of_the_settings_is_renewed_there(database: Path) -> None:
    """X14: the command says how; the first of two encrypts."""
    assert call("rotate-key", MULTIVERSE_BACKEND_KEY_SECRET="s" * 32).exit_code == 2
    assert key_of_first(database, secret="s" * 32) == "sk-of-server-one"
    assert key_of_first(database, secret=f"{'t' * 32},{'s' * 32}") == "sk-of-server-one"
    key_file(database).unlink()
    assert key_of_first(database, secret="t" * 32) == "sk-of-server-one"
    assert call("rotate-key").exit_code == 1


MIGRATION = """
import sys, time
from pathlib import Path
from multiverse_gateway.stores import sqlite, sqlite_schema

@sqlite_schema.migrations()
def second(db):
    db.execute("create table one (x)")
    db.execute("insert into one values (1)")
    print("half", flush=True)
    if sys.argv[2] == "hang":
        time.sleep(60)
    db.execute("create table two (x)")

sqlite_schema.KNOWN = sqlite_schema.KNOWN | {"second"}
store = sqlite.SqliteStore(Path(sys.argv[1]))
import anyio
anyio.run(store.open)
"""


def migrate(database: Path, how: str) -> subprocess.Popen[str]:
    """Start a process that opens the database with a schema one step newer."""
    command = [sys.executable, "-c", MIGRATION, str(database), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(SOURCES)})


def test_a_migration_that_is_killed_did_not_happen(database: Path) -> None:
    """P07: killed between the copy and the end of the step, the file has the old schema; the next start goes on; the copy is good."""
    with migrate(database, "hang") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    with sqlite3.connect(database) as db:
        tables = {row[0] for row in db.execute("select name from sqlite_master where type = 'table'")}
    db.close()
    assert tables.isdisjoint({"one", "two"})
    before = database.with_name("multiverse.db.before-second")
    assert numbers(before) == [1]
    assert before.stat().st_mode & 0o777 == 0o600
    assert key_of_first(database) == "sk-of-server-one"

    with migrate(database, "now") as process:
        assert process.wait(20) == 0
    with sqlite3.connect(database) as db:
        assert db.execute("select count(*) from one").fetchone() == (1,)
        assert db.execute("select count(*) from two").fetchone() == (0,)
    db.close()
    assert numbers(before) == [1]
