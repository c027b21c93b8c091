"""The SQLite store keeps the contract, and its file survives what happens to files."""

import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import attrs
import msgspec
import pytest
from sqlite_utils import Database

from multiverse_gateway import GatewayError, Health, HealthState, ServerId, Settings, SettingsError, Store, WallLink
from multiverse_gateway.core.engine_facts import EngineKind, Measured
from multiverse_gateway.core.errors import StorageRefused
from multiverse_gateway.core.servers import Metadata
from multiverse_gateway.core.usage import MAX_COUNT
from multiverse_gateway.stores import sqlite, sqlite_connection, sqlite_copies, sqlite_schema, sqlite_statements
from multiverse_gateway.stores.rows import health_row, healths_of, key_row, result_row, server_row, usage_row
from multiverse_gateway.stores.sqlite import SqliteStore
from multiverse_gateway.stores.vault import key_file, open_vault
from multiverse_gateway.testing.store import (
    ResponseStoreContract,
    StoreContract,
    UsageSumStoreContract,
    make_key,
    make_response,
    make_result,
    make_server,
    make_usage,
)

KEY = "a-marker-key-of-a-server"


class TestSqliteStore(StoreContract, UsageSumStoreContract, ResponseStoreContract):
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


OLD, NEW = "the old secret of this gateway - long", "another secret of this gateway - long"


async def test_a_wrong_secret_is_refused_and_rotation_keeps_keys_readable(tmp_path: Path) -> None:
    """X14: clear words instead of lost keys; the old secret stands behind the new one for one start, then it may go."""
    path = tmp_path / "registry.db"
    store = await opened(path, OLD)
    await store.save_server(make_server(api_key=KEY))
    await store.aclose()
    with pytest.raises(GatewayError, match="BACKEND_KEY_SECRET"):
        await opened(path, NEW)
    await (await opened(path, f"{NEW},{OLD}")).aclose()
    store = await opened(path, NEW)
    assert [server.api_key for server in (await store.load()).servers] == [KEY]
    await store.aclose()


async def test_a_setting_takes_over_from_the_key_file(tmp_path: Path) -> None:
    """What the file's secret encrypted is encrypted again; the file may go then."""
    path = tmp_path / "registry.db"
    store = await opened(path)
    await store.save_server(make_server(api_key=KEY))
    await store.aclose()
    await (await opened(path, NEW)).aclose()
    key_file(path).unlink()
    store = await opened(path, NEW)
    assert [server.api_key for server in (await store.load()).servers] == [KEY]
    await store.aclose()


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00"])
async def test_a_lost_key_file_is_not_replaced(tmp_path: Path, content: bytes | None) -> None:
    """A new one would only hide that the keys are lost."""
    path = tmp_path / "registry.db"
    store = await opened(path)
    await store.save_server(make_server(api_key=KEY))
    await store.aclose()
    key_file(path).unlink()
    if content is not None:
        key_file(path).write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(GatewayError, match=r"registry\.db\.key"):
        await opened(path)
    assert contents(tmp_path) == before


async def test_a_damaged_file_is_left_as_it_is(tmp_path: Path) -> None:
    """The message names the newest backup that is good."""
    path, good = tmp_path / "registry.db", tmp_path / "registry.db.backup-1"
    await (await opened(path)).aclose()
    path.rename(good)
    os.utime(good, (1, 1))
    (tmp_path / "registry.db.backup-2").write_bytes(b"")
    (tmp_path / "registry.db.backup-3").write_bytes(b"no database" * 100)
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    before = contents(tmp_path)
    with pytest.raises(GatewayError, match=r"registry\.db is damaged.*registry\.db\.backup-1"):
        await opened(path)
    assert contents(tmp_path) == before
    good.unlink()
    with pytest.raises(GatewayError, match="no good backup"):
        await opened(path)


async def test_damage_in_the_middle_is_found(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    store = await opened(path)
    for number in range(100):
        await store.save_server(make_server(f"s{number}"))
    await store.aclose()
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 6000] = b"\xa5" * 6000
    path.write_bytes(content)
    with pytest.raises(GatewayError, match="damaged"):
        await opened(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["empty", "foreign", "journal only"])
async def test_nothing_is_made_in_place_of_what_was_lost(tmp_path: Path, name: str) -> None:
    """A file cut to nothing, another program's, or only the journal left: the person who starts the gateway must know."""
    path = tmp_path / "registry.db"
    if name == "journal only":
        (tmp_path / "registry.db-wal").write_bytes(b"left over")
    else:
        path.write_bytes(b"")
    if name == "foreign":
        with sqlite3.connect(path) as connection:
            connection.execute("create table servers (id)")
        connection.close()
    before = contents(tmp_path)
    with pytest.raises(GatewayError, match="left as it is: bring back a backup"):
        await opened(path)
    assert contents(tmp_path) == before


async def test_a_copy_that_was_brought_back_is_used(tmp_path: Path) -> None:
    """Whatever journal it was made with."""
    path, copy = tmp_path / "registry.db", tmp_path / "copy.db"
    store = await opened(path)
    await store.save_server(make_server())
    connection = sqlite3.connect(path)
    connection.execute("vacuum into ?", [str(copy)])
    connection.close()
    await store.aclose()
    copy.replace(path)
    store = await opened(path)
    assert (await store.load()).servers == (make_server(),)
    await store.save_server(make_server("two"))
    assert (tmp_path / "registry.db-wal").exists()
    await store.aclose()


async def test_files_that_others_could_read_become_private(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    await (await opened(path)).aclose()
    path.chmod(0o644)
    key_file(path).chmod(0o640)
    await (await opened(path)).aclose()
    assert {stat.S_IMODE(file.stat().st_mode) for file in (path, key_file(path))} == {0o600}


async def test_the_oldest_stored_responses_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When there are too many: what clients make is bounded."""
    monkeypatch.setattr(sqlite_statements, "MOST_RESPONSES", 3)
    store = await opened(tmp_path / "registry.db")
    await store.save_responses([make_response(str(number), until=1e10 + number) for number in (4, 1, 3, 2)])
    assert [number for number in range(1, 5) if await store.find_response(str(number)) is None] == [1]
    await store.aclose()


async def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    """An older gateway does not touch what it does not know."""
    path = tmp_path / "registry.db"
    await (await opened(path)).aclose()
    with sqlite3.connect(path) as connection:
        connection.execute("insert into _sqlite_migrations (migration_set, name, applied_at) values ('multiverse_gateway', 'later', 'x')")
    connection.close()
    with pytest.raises(GatewayError, match="newer version"):
        await opened(path)


def make_old(path: Path, next_step: str) -> None:
    """Make a database as the gateway did before it knew a step, with servers of which one was removed, health and checks."""
    connection = sqlite3.connect(path, isolation_level=None)
    db = Database(connection)
    sqlite_schema.migrations.apply(db, stop_before=next_step)
    vault = open_vault(path, None, may_create=True)
    columns = db.table("servers").columns_dict
    for name, removed_at in (("one", None), ("two", None), ("gone", 9.0)):
        row = {**server_row(make_server(name, api_key=KEY, opened_address=None, upstream_model=None), vault), "removed_at": removed_at}
        db.table("servers").insert({column: value for column, value in row.items() if column in columns})
    db.table("health").insert(health_row(ServerId("one"), Health(state=HealthState.HEALTHY, last_checked_at=5.0, models=("tiny",))))
    db.table("results").insert_all(result_row(make_result("one", number)) for number in range(3))
    db.table("secrets").insert({"name": "admin_key_sha256", "value": "ab" * 32})
    connection.close()


STEPS = [migration.name for migration in sqlite_schema.migrations._migrations]


@pytest.mark.parametrize("next_step", STEPS[1:])
async def test_an_old_file_keeps_everything_and_learns_what_is_new(tmp_path: Path, next_step: str) -> None:
    """Each server, its key, health and checks; keys and usage counts work, and a copy of how it was stands beside it."""
    path = tmp_path / "registry.db"
    make_old(path, next_step)
    owner = make_server().owner_digest if next_step != "usage_and_keys" else None
    olds = [make_server(name, api_key=KEY, owner_digest=owner, opened_address=None, upstream_model=None) for name in ("one", "two")]
    store = await opened(path)
    registry = await store.load()
    hosts = {host.endpoint_url: host for host in registry.hosts}
    servers = tuple(attrs.evolve(old, host_id=hosts[old.endpoint_url].id) for old in olds)
    assert registry.servers == servers
    assert [(host.api_key, host.max_concurrency) for host in hosts.values()] == [(KEY, 3)] * 2
    assert registry.health == {"one": Health(state=HealthState.HEALTHY, last_checked_at=5.0, models=("tiny",))}
    assert [server.id for server in await store.removed()] == ["gone"]
    assert [result.checked_at for result in await store.history(ServerId("one"), 9)] == [2.0, 1.0, 0.0]
    assert await store.secret("admin_key_sha256", "another") == "ab" * 32
    changed = attrs.evolve(servers[0], owner_digest="cd" * 32, opened_address="127.0.0.1:11434")
    await store.save_server(changed)
    await store.save_key(make_key())
    await store.add_usage("first", [make_usage("2026-05-01")])
    await store.open_session("ef" * 32, 1e10)
    await store.save_responses([make_response()])
    link = WallLink(id="one", name="Hall", digest="ab" * 32, created_at=1.0)
    await store.save_wall_link(link)
    await store.aclose()
    store = await opened(path)
    assert await store.find_response(make_response().key) == make_response()
    registry = await store.load()
    assert registry.servers == (changed, servers[1])
    assert (registry.keys, registry.sessions, registry.wall_links) == ((make_key(),), {"ef" * 32: 1e10}, (link,))
    assert list(await store.usage("2026-05-01", "2026-05-01")) == [make_usage("2026-05-01")]
    await store.aclose()
    before = sqlite_copies.newest_backup(path)
    assert before is not None
    assert (before.name, sqlite_copies.contents(before).servers) == (f"registry.db.before-{min(STEPS[STEPS.index(next_step) :])}", 2)


async def test_servers_of_an_older_version_are_grouped_by_host(tmp_path: Path) -> None:
    """Those of one owner, URL and key belong together, also those that an older version registers later; the largest cap is the host's."""
    path = tmp_path / "registry.db"
    store = await opened(path)
    facts: list[dict[str, Any]] = [{}, {"max_concurrency": 5}, {"api_key": None}, {"metadata": Metadata(student_id="other")}]
    for number, fact in enumerate(facts):
        await store.save_server(make_server(str(number), model_name=f"m{number}", endpoint_url="http://lab:1", **fact))
    await store.aclose()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("update servers set host_id = null")
    store = await opened(path)
    registry = await store.load()
    groups = {tuple(s.id for s in registry.servers if s.host_id == host.id): host.max_concurrency for host in registry.hosts}
    assert groups == {("0", "1"): 5, ("2",): 3, ("3",): 3}
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("update servers set host_id = null where id = '0'")
    assert (await store.load()).servers[0].host_id == "0", "until this gateway starts again: an older one saved it meanwhile"
    await store.aclose()


async def test_keys_of_an_older_file_have_no_limit_at_once(tmp_path: Path) -> None:
    """They are not for bulk either; both can be set."""
    path = tmp_path / "registry.db"
    make_old(path, "keys_at_once")
    old = make_key(max_at_once=0, is_bulk=False, hint=None, blocked_at=None)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        table = Database(connection).table("client_keys")
        table.insert({name: value for name, value in key_row(old).items() if name in table.columns_dict})
    store = await opened(path)
    assert (await store.load()).keys == (old,)
    await store.save_key(make_key())
    assert (await store.load()).keys == (make_key(),)
    await store.aclose()


async def test_usage_of_an_older_file_has_no_canceled_requests(tmp_path: Path) -> None:
    """Its rows are kept as they are; new counts are added to them."""
    path = tmp_path / "registry.db"
    make_old(path, "canceled_requests")
    old = attrs.evolve(make_usage("2026-05-01"), counts=attrs.evolve(make_usage("2026-05-01").counts, canceled=0))
    row = usage_row(old)
    del row["canceled"]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        Database(connection).table("usage").insert_all([row, {**row, "day": "2026-04-30", "failed": "many"}])
    store = await opened(path)
    assert list(await store.usage("2026-05-01", "2026-05-01")) == [old]
    (broken,) = await store.usage("2026-04-30", "2026-04-30")
    assert (broken.counts.requests, broken.counts.failed) == (1, 0)
    await store.add_usage("first", [make_usage("2026-05-01")])
    (usage,) = await store.usage("2026-05-01", "2026-05-01")
    assert (usage.counts.requests, usage.counts.failed, usage.counts.canceled) == (2, 2, 2)
    await store.aclose()


async def test_a_locked_file_refuses_writes_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P04: a write answers that it cannot be done, reading goes on, and nothing must be restarted."""
    monkeypatch.setattr(sqlite_connection, "BUSY_SECONDS", 0.05)
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


async def test_a_file_that_is_locked_at_the_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not called damaged; the next start works."""
    monkeypatch.setattr(sqlite_connection, "BUSY_SECONDS", 0.05)
    path = tmp_path / "registry.db"
    await (await opened(path)).aclose()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("pragma journal_mode=delete")
    other.execute("begin immediate")
    with pytest.raises(GatewayError, match="locked by another program"):
        await opened(path)
    other.execute("rollback")
    other.close()
    await (await opened(path)).aclose()


async def test_who_waits_for_a_lock_holds_up_no_reader(tmp_path: Path) -> None:
    """P04: routing and pages read on while a write waits."""
    path = tmp_path / "registry.db"
    store = await opened(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    with anyio.fail_after(4):
        async with anyio.create_task_group() as group:
            group.start_soon(store.save_server, make_server())
            await anyio.wait_all_tasks_blocked()
            assert (await store.load()).servers == ()
            assert not await store.history(make_server().id, 1)
            other.execute("rollback")
    assert (await store.load()).servers == (make_server(),)
    other.close()
    await store.aclose()


async def test_the_journal_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is moved into the file now and then, by one of the processes."""
    monkeypatch.setattr(sqlite, "CHECKPOINT_COMMITS", 20)
    stores = [await opened(tmp_path / "registry.db") for _ in range(2)]
    for number in range(300):
        await stores[number % 2].save_server(make_server(weight=number % 100 + 1))
    assert (tmp_path / "registry.db-wal").stat().st_size < 1_000_000
    for store in stores:
        await store.aclose()
    assert not (tmp_path / "registry.db-wal").exists()


async def test_a_lease_survives_a_clock_that_was_set_back(tmp_path: Path) -> None:
    """A lease that would end in years is none; one that ended is free."""
    clock = [5_000_000_000.0]
    store = SqliteStore(tmp_path / "registry.db", wall=lambda: clock[0])
    await store.open()
    assert await store.claim("probe", "first", 5.0)
    clock[0] -= 4_000_000_000
    assert await store.claim("probe", "second", 5.0)
    clock[0] += 4.0
    assert not await store.claim("probe", "first", 5.0)
    clock[0] += 2.0
    assert await store.claim("probe", "first", 5.0)
    await store.aclose()


def test_older_versions_can_read_a_suspect_server() -> None:
    """They do not know the state, and leave out a row with a state or a fact that they do not know: they read a healthy server."""
    row = health_row(ServerId("one"), Health(state=HealthState.SUSPECT, by_traffic=True, reason="it broke off a request"))
    assert row["state"] == "healthy"
    assert msgspec.json.decode(str(row["facts"]))["by_traffic"] == True  # noqa: E712  a number, which is as good as true
    assert msgspec.json.decode(str(row["facts"])).keys() == {
        "generation",
        "consecutive_failures",
        "consecutive_successes",
        "by_traffic",
        "reason",
        "warning",
        "last_checked_at",
        "last_passed_at",
        "last_transition_at",
        "models",
    }


def test_what_an_engine_says_stands_under_a_name_that_older_versions_ignore_and_may_have_any_form() -> None:
    """A newer version may know more engines: its reading is left out, and the health of the server is not."""
    health = Health(state=HealthState.HEALTHY, measured=Measured(kind=EngineKind.TGI, slots=2))
    row = health_row(ServerId("one"), health)
    assert list(healths_of([row])) == [(ServerId("one"), health)]
    facts = msgspec.json.decode(str(row["facts"]))
    assert facts.pop("answered")["kind"] == "tgi"
    for form in ({"kind": "from the future"}, ["/v1/embeddings"], 5):
        newer = {**row, "facts": msgspec.json.encode({**facts, "answered": form}).decode()}
        assert list(healths_of([newer])) == [(ServerId("one"), attrs.evolve(health, measured=None))]


def test_the_path_of_a_refusal_is_shared_and_read_from_rows_of_older_versions() -> None:
    """Older versions wrote the path at the end of the reason only; they ignore the fact that names it now."""
    refused = Health(state=HealthState.MISCONFIGURED, reason="in any words", reason_path="/v1/embeddings")
    ((_, read),) = healths_of([health_row(ServerId("one"), refused)])
    assert read == refused
    older = health_row(ServerId("one"), Health(state=HealthState.MISCONFIGURED, reason="no (POST /v1/rerank)"))
    ((_, read),) = healths_of([older])
    assert read.reason_path == "/v1/rerank"
    ((_, read),) = healths_of([health_row(ServerId("one"), Health(state=HealthState.MISCONFIGURED, reason="no"))])
    assert read.reason_path is None
    ((_, read),) = healths_of([health_row(ServerId("one"), Health(state=HealthState.UNHEALTHY, reason="no (POST /v1/rerank)"))])
    assert read.reason_path is None


async def test_health_of_an_unknown_kind_is_left_out(tmp_path: Path) -> None:
    """A later version wrote it: its server starts unproven."""
    path = tmp_path / "registry.db"
    store = await opened(path)
    await store.save_server(make_server())
    await store.save_health({make_server().id: Health(state=HealthState.HEALTHY)}, [])
    with sqlite3.connect(path) as connection:
        connection.execute("update health set state = 'enlightened'")
    connection.close()
    assert not (await store.load()).health
    await store.aclose()


async def test_nothing_works_before_it_is_opened(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "registry.db")
    for call in (store.version, store.load, store.removed):
        with pytest.raises(GatewayError, match="lifespan"):
            await call()
    assert contents(tmp_path) == {}
    await store.aclose()


@pytest.mark.parametrize("url", ["sqlite:///", "sqlite:///:memory:"])
def test_a_url_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="memory://"):
        sqlite.create(Settings(database_url=url))


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


READER = """
import os, sys, anyio
from pathlib import Path
from multiverse_gateway import GatewayError
from multiverse_gateway.stores.sqlite import SqliteStore
from multiverse_gateway.testing.store import make_server

async def main():
    if os.geteuid() == 0:  # root may write everywhere
        os.setgid(65534)
        os.setuid(65534)
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    print(len((await store.load()).servers))
    try:
        await store.save_server(make_server("two"))
    except GatewayError as error:
        print(error.status, error.code)
    await store.aclose()

anyio.run(main)
"""


@pytest.mark.e2e
def test_what_cannot_be_written_can_still_be_read() -> None:
    """The disk became read-only: the gateway starts with what it knows, writes answer 503."""
    folder = Path(tempfile.mkdtemp())

    async def fill() -> SqliteStore:
        store = await opened(folder / "registry.db")
        await store.save_server(make_server())
        return store

    try:
        store = anyio.run(fill)
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
        child = subprocess.run([sys.executable, "-c", READER, str(folder / "registry.db")], capture_output=True, text=True)
        assert child.stdout.split() == ["1", "503", "storage_unavailable"], child.stderr
        anyio.run(store.aclose)
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


STARTER = """
import sys, anyio
from pathlib import Path
from multiverse_gateway.stores.sqlite import SqliteStore
from multiverse_gateway.testing.store import make_server

async def main(name):
    store = SqliteStore(Path(sys.argv[1]))
    sys.stdin.readline()
    await store.open()
    print(await store.secret("key", name), flush=True)
    await store.save_server(make_server(name))
    sys.stdin.readline()
    await store.load()
    await store.aclose()

anyio.run(main, sys.argv[2])
"""


@pytest.mark.e2e
def test_processes_that_start_together_share_one_file(tmp_path: Path) -> None:
    """One of them makes the file and the secret; each can read what the others wrote."""
    path = tmp_path / "new folder" / "registry.db"
    names = [f"s{number}" for number in range(5)]
    children = [
        subprocess.Popen([sys.executable, "-c", STARTER, str(path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    kept = set()
    for step in range(2):
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in children if step == 0 else ():
            assert child.stdout is not None
            kept.add(child.stdout.readline())
    for child in children:
        child.communicate(timeout=60)
    assert {child.returncode for child in children} == {0}
    assert len(kept) == 1
    assert anyio.run(names_in, path) == set(names)
    assert sorted(contents(path.parent)) == ["registry.db", "registry.db.key"]


async def test_stores_that_are_opened_at_once_make_one_file(tmp_path: Path) -> None:
    """The same in threads, again and again: the slower one takes what the faster one made."""
    for attempt in range(15):
        path = tmp_path / str(attempt) / "registry.db"
        stores = [SqliteStore(path) for _ in range(6)]
        async with anyio.create_task_group() as group:
            for store in stores:
                group.start_soon(store.open)
        for number, store in enumerate(stores):
            await store.save_server(make_server(f"s{number}"))
        for store in stores:
            assert len((await store.load()).servers) == len(stores)
            await store.aclose()
        assert sorted(contents(path.parent)) == ["registry.db", "registry.db.key"]


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


@pytest.mark.parametrize("held", [2**63 - 1, 9.3e18, -5, "many", b"\x00\xff"])
async def test_broken_sums_of_older_versions_are_read_and_added_to(tmp_path: Path, held: object) -> None:
    """A sum that overflowed became a float in SQLite; nothing that stands in such a column stops the counting or the reading."""
    path = tmp_path / "registry.db"
    store = await opened(path)
    await store.add_usage("first", [make_usage("2026-05-01")])
    await store.aclose()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("update usage set requests = ?, prompt_tokens = ?", [held, held])
    store = await opened(path)
    largest = isinstance(held, float | int) and held > 0
    (usage,) = await store.usage("2026-05-01", "2026-05-01")
    assert usage.counts.prompt_tokens == (MAX_COUNT if largest else 0)
    (total,) = await store.sum_usage("2026-05-01", "2026-05-01", by=["client"], only={})
    assert total.counts == usage.counts
    await store.add_usage("second", [make_usage("2026-05-01")])
    (usage,) = await store.usage("2026-05-01", "2026-05-01")
    assert (usage.counts.requests, usage.counts.prompt_tokens) == ((MAX_COUNT, MAX_COUNT) if largest else (1, 10))
    assert await store.requests_on("2026-05-01") == {"id of alice": usage.counts.requests}
    await store.aclose()


async def test_a_value_that_the_database_cannot_hold_is_refused(tmp_path: Path) -> None:
    """As `StorageRefused`, which says that the same call would fail again; nothing of the batch was added."""
    store = await opened(tmp_path / "registry.db")
    for poisoned in (make_usage("2026-05-01", model="\ud800"), make_usage("2026-05-01", model=object())):  # type: ignore[arg-type]
        with pytest.raises(StorageRefused):
            await store.add_usage("first", [make_usage("2026-05-01"), poisoned])
    await store.save_server(make_server())
    with pytest.raises(StorageRefused):
        await store.save_health({}, [attrs.evolve(make_result("one"), generation=2**70)])
    assert not await store.usage("2026-05-01", "2026-05-01")
    await store.aclose()
