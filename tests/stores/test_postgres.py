"""The PostgreSQL store keeps the contract, and what happens to connections and servers loses nothing, on a real server."""

from __future__ import annotations

import contextlib
import sqlite3
from asyncio import gather
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path

import anyio
import attrs
import click.testing
import pytest

from multiverse_gateway import Health, HealthState, Server, Settings, SettingsError, Store
from multiverse_gateway.cli import main
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.holders import new_holder
from multiverse_gateway.stores.sqlite import SqliteStore
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
from support.fault_proxy import FaultProxy
from support.require import require
from support.services import SECRET, PostgresServer

psycopg = require("psycopg", "the store for PostgreSQL")

import multiverse_gateway.stores.postgres as postgres_module  # noqa: E402  needs the extra
from multiverse_gateway.stores import postgres_database  # noqa: E402
from multiverse_gateway.stores.postgres import PostgresStore, create  # noqa: E402

pytestmark = pytest.mark.e2e


class TestPostgresStore(StoreContract, UsageSumStoreContract, ResponseStoreContract):
    """In a schema of a real server."""

    @pytest.fixture
    async def store(self, postgres: PostgresServer) -> AsyncIterator[Store]:
        """Yield an empty store."""
        store = PostgresStore(postgres.database(), secret=SECRET)
        await store.open()
        yield store
        await store.aclose()


@contextlib.asynccontextmanager
async def opened(url: str, secret: str = SECRET) -> AsyncIterator[PostgresStore]:
    """Lend an open store."""
    store = PostgresStore(url, secret=secret)
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


async def test_gateways_that_start_at_once_make_one_set_of_tables(postgres: PostgresServer) -> None:
    """On an empty database, six of them: each can write, and all read the same."""
    url = postgres.database()
    async with contextlib.AsyncExitStack() as stack:
        stores = [PostgresStore(url, secret=SECRET) for _ in range(6)]
        async with anyio.create_task_group() as group:
            for store in stores:
                group.start_soon(store.open)
        for number, store in enumerate(stores):
            stack.push_async_callback(store.aclose)
            await store.save_server(make_server(f"s{number}"))
        assert {len((await store.load()).servers) for store in stores} == {6}


async def test_a_change_is_told_at_once(postgres: PostgresServer) -> None:
    """A call that waits for one wakes up when it is committed, and what happens between two waits is not missed."""
    url = postgres.database()
    async with opened(url) as one, opened(url) as other:
        await other.changed(1)
        async with anyio.create_task_group() as group:
            with anyio.fail_after(5):
                group.start_soon(one.save_server, make_server())
                await other.changed(60)
        await one.remove_server(make_server().id)
        with anyio.fail_after(5):
            await other.changed(60)


async def test_a_lost_listener_is_replaced(postgres: PostgresServer) -> None:
    """The wait in which it is lost ends in time, asking for the version finds what was missed, and the next changes are told again."""
    url = postgres.database()
    async with opened(url) as one, opened(url) as other:
        await other.changed(1)
        before = await other.version()
        assert other.database._listener is not None
        postgres.execute(f"select pg_terminate_backend({other.database._listener.info.backend_pid})")
        await one.save_server(make_server())
        with anyio.fail_after(5):
            await other.changed(0.2)
        assert await other.version() > before
        with anyio.fail_after(5):
            await other.changed(60)
            async with anyio.create_task_group() as group:
                group.start_soon(one.remove_server, make_server().id)
                await other.changed(60)


async def test_a_wrong_secret_is_refused_and_rotation_keeps_keys_readable(postgres: PostgresServer) -> None:
    """Even before there is a key to read; the newest secret seals, and the old one may go after one start."""
    url, new = postgres.database(), "another secret of all gateways and for tests only"
    async with opened(url):
        pass
    with pytest.raises(StorageUnavailable, match="BACKEND_KEY_SECRET"):
        await PostgresStore(url, secret=new).open()
    async with opened(url) as store:
        await store.save_server(make_server(api_key="a-marker-key"))
    schema = url.rpartition("%3D")[2]
    assert not [row for row in postgres.execute(f"select api_key from {schema}.servers") if "marker" in row[0]]
    async with opened(url, f"{new},{SECRET}"):
        pass
    async with opened(url, new) as store:
        assert [server.api_key for server in (await store.load()).servers] == ["a-marker-key"]


async def test_a_newer_database_is_refused(postgres: PostgresServer) -> None:
    url = postgres.database()
    async with opened(url):
        pass
    postgres.execute(f"insert into {url.rpartition('%3D')[2]}.migrations (name) values ('later')")
    with pytest.raises(StorageUnavailable, match="newer version"):
        await PostgresStore(url, secret=SECRET).open()


async def test_an_older_database_keeps_its_keys_and_learns_what_is_new(postgres: PostgresServer) -> None:
    """Keys without limits have none, and can get some; places of stored responses and canceled requests are kept from now on."""
    url = postgres.database()
    schema = url.rpartition("%3D")[2]
    plain = make_key("bob", daily_limit=None, max_at_once=0, is_bulk=False, hint=None, blocked_at=None)
    server = make_server(opened_address=None, upstream_model=None)
    async with opened(url) as store:
        await store.save_key(plain)
        await store.save_server(server)
        await store.add_usage("first", [make_usage("2026-05-01")])
    postgres.execute(
        f"alter table {schema}.servers drop column opened_address, drop column upstream_model, drop column host_id",
        f"alter table {schema}.usage drop column canceled",
        f"alter table {schema}.client_keys drop column daily_limit, drop column max_at_once, drop column is_bulk, "
        "drop column hint, drop column blocked_at",
        f"drop table {schema}.responses, {schema}.wall_links, {schema}.hosts, {schema}.aliases",
        f"delete from {schema}.migrations where name <> 'registry'",
    )
    async with opened(url) as store:
        registry = await store.load()
        (host,) = registry.hosts
        assert (registry.keys, registry.servers) == ((plain,), (attrs.evolve(server, host_id=host.id),))
        assert (host.endpoint_url, host.api_key, host.max_concurrency) == (server.endpoint_url, server.api_key, 3)
        await store.save_server(make_server())
        assert (await store.load()).servers == (make_server(),)
        await store.save_key(make_key())
        assert set((await store.load()).keys) == {plain, make_key()}
        await store.save_responses([make_response()])
        assert await store.find_response(make_response().key) == make_response()
        (usage,) = await store.usage("2026-05-01", "2026-05-01")
        assert (usage.counts.requests, usage.counts.canceled) == (1, 0)
        await store.add_usage("second", [make_usage("2026-05-01")])
        assert [row.counts.canceled for row in await store.usage("2026-05-01", "2026-05-01")] == [2]


async def test_the_oldest_stored_responses_are_dropped(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """When there are too many: what clients make is bounded."""
    monkeypatch.setattr(postgres_module, "MOST_RESPONSES", 3)
    async with opened(postgres.database()) as store:
        await store.save_responses([make_response(str(number), until=1e10 + number) for number in (4, 1, 3, 2)])
        assert [number for number in range(1, 5) if await store.find_response(str(number)) is None] == [1]


async def test_a_gateway_reads_on_while_a_newer_one_adds_to_the_tables(postgres: PostgresServer) -> None:
    """Gateways are updated one after the other: what is new is left alone, and kept."""
    url = postgres.database()
    schema = url.rpartition("%3D")[2]
    async with opened(url) as store:
        await store.save_server(make_server())
        await store.save_key(make_key())
        for _ in range(30):  # over each of its connections as often as it takes for a driver to prepare a query
            await store.load()
        postgres.execute(*(f"alter table {schema}.{table} add column mood text default 'new'" for table in ("servers", "client_keys")))
        await saved(store, make_server(weight=9))
        registry = await store.load()
        assert (registry.servers, registry.keys) == ((make_server(weight=9),), (make_key(),))
    assert postgres.execute(f"select mood from {schema}.servers") == [("new",)]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://postgres@127.0.0.1:1/postgres", "does not answer"),
        ("postgresql://postgres@127.0.0.1:{port}/nothing", "no such database"),
        ("postgresql://nobody-here@127.0.0.1:{port}/postgres", "no such database or user"),
    ],
)
async def test_why_it_cannot_be_opened_is_said(postgres: PostgresServer, url: str, words: str) -> None:
    with pytest.raises(StorageUnavailable, match=words):
        await PostgresStore(url.format(port=postgres.port), secret=SECRET).open()


async def test_an_encoding_without_every_letter_is_refused(postgres: PostgresServer) -> None:
    postgres.execute("create database latin encoding latin1 template template0")
    with pytest.raises(StorageUnavailable, match="UTF8"):
        await PostgresStore(postgres.url("latin"), secret=SECRET).open()


def test_without_a_secret_nothing_starts() -> None:
    """There is no file that could hold one."""
    with pytest.raises(SettingsError, match="BACKEND_KEY_SECRET is missing"):
        create(Settings(database_url="postgresql://db.example/multiverse"))
    with pytest.raises(SettingsError, match="DATABASE_URL"):
        create(Settings(database_url="postgresql://db.example/multiverse?nonsense=1", backend_key_secret=SECRET))


async def test_nothing_works_before_it_is_opened() -> None:
    with pytest.raises(StorageUnavailable, match="lifespan"):
        await PostgresStore("postgresql://db.example/multiverse", secret=SECRET).load()


# Bad connections


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stores give up soon."""
    monkeypatch.setattr(postgres_database, "PATIENCE", 2.0)
    monkeypatch.setattr(postgres_database, "PAUSE", 0.2)


async def test_a_write_cut_off_anywhere_can_be_repeated(postgres: PostgresServer, impatient: None) -> None:
    """P08: Whatever the moment, the second try succeeds and there is one record; some of the first were done without anybody knowing."""
    schema = postgres.schema()
    unknown = 0
    with FaultProxy(postgres.port) as proxy:
        async with opened(postgres.url(schema=schema, port=proxy.port)) as store:
            await store.save_server(make_server("first"))
            begun = proxy.to_client.passed
            await store.save_server(make_server("second"))
            answered = proxy.to_client.passed - begun
            everywhere = range(1, answered + 1, max(1, answered // 40))
            nearly_done = range(2 * answered, 0, -1)  # what others are told on their connections counts as well, and comes when it comes
            for number, bytes_left in enumerate(chain(everywhere, nearly_done)):
                if number >= len(everywhere) and unknown:
                    break
                name = f"s{number}"
                proxy.to_client.cut_in = bytes_left
                try:
                    await store.save_server(make_server(name))
                except StorageUnavailable:
                    unknown += len(postgres.execute(f"select 1 from {schema}.servers where id = '{name}'"))
                proxy.heal()
                await saved(store, make_server(name))
                servers = [str(server.id) for server in (await store.load()).servers]
                assert servers.count(name) == 1
    assert unknown


async def saved(store: Store, server: Server) -> None:
    """Save a server, as soon as the store can."""
    with anyio.fail_after(20):
        while True:
            try:
                return await store.save_server(server)
            except StorageUnavailable:
                await anyio.sleep(0.05)


async def test_a_silent_database_is_waited_for_once(postgres: PostgresServer, impatient: None) -> None:
    """P08: A waiting call gets an answer within the bound, those behind it at once; when it speaks again all works, unopened."""
    with FaultProxy(postgres.port) as proxy:
        async with opened(postgres.database(port=proxy.port)) as store:
            await store.save_server(make_server())
            proxy.blackhole()
            began = anyio.current_time()
            with pytest.raises(StorageUnavailable):
                await store.save_server(make_server("two"))
            assert 1 < anyio.current_time() - began < 4
            began = anyio.current_time()
            for _ in range(50):
                with contextlib.suppress(StorageUnavailable):
                    await store.version()
            await store.changed(0.1)
            assert anyio.current_time() - began < 8
            proxy.heal()
            await saved(store, make_server("three"))
            assert {"one", "three"} <= {str(server.id) for server in (await store.load()).servers}


async def test_a_frozen_gateway_holds_up_no_other(postgres: PostgresServer, impatient: None) -> None:
    """It stopped in the middle of a write: the database ends that."""
    url = postgres.database()
    async with opened(url) as store:
        frozen = await store.database.connect()
        await frozen.execute("begin")
        await frozen.execute("select value from counters where name = 'version' for update")
        began = anyio.current_time()
        await saved(store, make_server())
        assert anyio.current_time() - began < 10
        with pytest.raises(psycopg.Error):
            await frozen.execute("commit")
        await frozen.close()


async def test_the_lease_of_a_dead_process_of_this_machine_is_free(postgres: PostgresServer) -> None:
    """At once; asking takes nothing, and one process gets it when several want it."""
    head, _, start = new_holder().rpartition("/")
    dead = f"{head}/{int(start) - 1}"
    async with opened(postgres.database()) as store:
        assert await store.claim("probe", dead, 60.0)
        assert await store.claim("probe", "us", 0.0)
        claims = await gather(*(store.claim("probe", new_holder(), 60.0) for _ in range(4)))
        assert sorted(claims) == [False] * 3 + [True]
        assert not await store.claim("probe", "us", 0.0)


# From SQLite


async def filled(path: Path) -> SqliteStore:
    """Return an open store in a file, with something of everything."""
    store = SqliteStore(path)
    await store.open()
    await store.save_server(make_server(api_key="a-marker-key"))
    await store.save_server(make_server("two", generation=3))
    await store.save_server(make_server("gone"))
    await store.save_health(
        {make_server().id: Health(state=HealthState.HEALTHY, last_checked_at=5.0, models=("tiny",))},
        [make_result("one", number, passed=number % 2 == 0) for number in range(130)],
    )
    await store.remove_server(make_server("gone").id)
    await store.save_key(make_key())
    await store.add_usage("first", [make_usage("2026-05-01"), make_usage("2026-05-02", client="")])
    await store.secret("admin_key_sha256", "ab" * 32)
    await store.save_responses([make_response(), make_response("b" * 64)])
    return store


def break_sums(path: Path) -> None:
    """Put into a database what older versions and other programs may have left there."""
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as db, db:
        for model, held in (("overflowed", 1.8e19), ("negative", -1), ("no number", "many")):
            db.execute("update usage set prompt_tokens = ? where model = ?", [held, model])


async def contents(store: SqliteStore | PostgresStore) -> list[object]:
    """Return what a store holds."""
    registry = await store.load()
    return [
        registry.servers,
        registry.health,
        registry.keys,
        await store.removed(),
        [await store.history(server.id, 200) for server in registry.servers],
        await store.usage("2026-01-01", "2026-12-31"),
        await store.secret("admin_key_sha256", "another"),
        [await store.find_response(letter * 64) for letter in "abc"],
    ]


def migrate(source: Path, target: str) -> click.testing.Result:
    """Run the command."""
    environment = {"MULTIVERSE_BACKEND_KEY_SECRET": SECRET, "MULTIVERSE_DATABASE_URL": target}
    return click.testing.CliRunner().invoke(main, ["migrate-store", f"sqlite:///{source.as_posix()}", target], env=environment)


async def test_a_registry_moves_from_sqlite(postgres: PostgresServer, tmp_path: Path) -> None:
    """All of it, the keys under the new secret; not while a gateway runs, and not over another registry."""
    path, url = tmp_path / "registry.db", postgres.database()
    store = await filled(path)
    broken = [make_usage("2026-05-03", model=held) for held in ("overflowed", "negative", "no number")]
    await store.add_usage("broken", broken)
    await anyio.to_thread.run_sync(break_sums, path)
    before = await contents(store)
    refused = await anyio.to_thread.run_sync(migrate, path, url)
    assert (refused.exit_code, "stop it first" in refused.output) == (1, True), refused.output
    await store.aclose()
    done = await anyio.to_thread.run_sync(migrate, path, url)
    assert done.exit_code == 0, done.output
    assert "3 servers" in done.output
    async with opened(url) as moved:
        assert await contents(moved) == before
        await moved.save_health({}, [make_result("one", 500)])
        assert [result.checked_at for result in await moved.history(make_server().id, 2)] == [500.0, 129.0]
    again = await anyio.to_thread.run_sync(migrate, path, url)
    assert (again.exit_code, "already" in again.output) == (1, True), again.output
    store = SqliteStore(path)
    await store.open()
    assert await contents(store) == before
    await store.aclose()


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("postgresql://a/b", "sqlite:///x.db", "in this order"),
        ("sqlite:///nothing-here.db", "postgresql://a/b", "no database"),
    ],
)
def test_what_cannot_be_moved_is_said(source: str, target: str, words: str) -> None:
    result = click.testing.CliRunner().invoke(main, ["migrate-store", source, target], env={"MULTIVERSE_BACKEND_KEY_SECRET": SECRET})
    assert result.exit_code in (1, 2)
    assert words in result.output
