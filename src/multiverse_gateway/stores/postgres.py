"""The registry in PostgreSQL: for several gateways, on one machine or many.

1. The database is the judge: of time (leases run by its clock), of order (writes of the registry wait for each other at the row of the
   version, so a process that sees a version sees every change before it), and of what exists (one record per model and URL).
2. Nothing waits longer than `PATIENCE` seconds for it, and a gateway that freezes during a write delays the others no longer than that.
3. NOTIFY announces a change when it is committed; a process that missed it finds the change by asking for the version.
4. A lost connection is `StorageUnavailable`, here and nowhere else; a later call connects again. A write whose answer was lost may have
   been done: it can be repeated, and changes nothing then.
5. The servers' keys are sealed with a secret that is not in the database: all gateways have it from the same setting.
"""

import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import LiteralString

import anyio
import anyio.to_thread
import attrs
import psycopg.sql

from multiverse_gateway.core.aliases import Alias
from multiverse_gateway.core.health import Health
from multiverse_gateway.core.hosts import Host
from multiverse_gateway.core.servers import ClientKey, HostId, Server, ServerId, WallLink
from multiverse_gateway.core.stored import StoredResponse
from multiverse_gateway.core.usage import MAX_COUNT, Usage
from multiverse_gateway.holders import is_gone
from multiverse_gateway.protocols import ProbeResult, Registry
from multiverse_gateway.settings import Settings, SettingsError
from multiverse_gateway.stores.postgres_database import Cursor, PostgresDatabase, Row, conninfo
from multiverse_gateway.stores.postgres_schema import migrate, refuse_encoding
from multiverse_gateway.stores.postgres_statements import (
    all_rows,
    bump_version,
    clock,
    group_by_host,
    kept_secret,
    remove_servers,
    save_results,
    save_server,
    upsert,
    version_of,
)
from multiverse_gateway.stores.rows import (
    BATCH_SECONDS,
    LONGEST_LEASE,
    MOST_RESPONSES,
    REMOVED,
    USAGE_KEY,
    Servers,
    SqlDialect,
    adding_usage,
    alias_of_row,
    alias_row,
    health_row,
    healths_of,
    host_of_row,
    host_row,
    is_news,
    kept,
    key_of,
    key_row,
    response_of,
    result_of,
    server_of,
    server_row,
    still_revoked,
    summing_usage,
    usage_of,
    usage_row,
    wall_link_of,
)
from multiverse_gateway.stores.vault import Vault

KEY_CHECK = "backend_key_check"
"""The name of a secret that is sealed like the servers' keys, so that another secret is noticed even where there are none."""
DIALECT = SqlDialect(
    placeholder="%({})s", mark="%s", integer="bigint", least="least", most="greatest", sum="least(sum({}), 9007199254740991)::bigint"
)


class PostgresStore:
    """Keep the registry in a PostgreSQL database; see the rules at the top.

    `secret` seals the servers' keys; several with commas, the newest first. Nothing is opened before `open()`. `now` is monotonic.
    """

    def __init__(self, url: str, *, secret: str, now: Callable[[], float] = time.monotonic) -> None:
        self.database = PostgresDatabase(url, now=now)
        self.vault = Vault(secret.split(","))
        self._servers = Servers(self.vault)

    # Opening and closing

    async def open(self) -> None:
        """Connect, create or migrate the tables, and check the secret against the keys.

        Raises:
            StorageUnavailable: The database cannot be used, is of a newer version, or its keys were sealed with another secret; the
                message says which and what to do.
        """
        await self.database.open(self._prepare)

    async def _prepare(self, cursor: Cursor) -> None:
        await refuse_encoding(cursor)
        await migrate(cursor)
        await self._check_keys(cursor)
        await group_by_host(cursor, self.vault)

    async def _check_keys(self, cursor: Cursor) -> None:
        """Reject a secret other than the one that the keys were sealed with, and seal again what an older one of ours sealed."""
        check = await kept_secret(cursor, KEY_CHECK, self.vault.seal("") or "")
        self.vault.unseal(check)
        if not self.vault.is_newest(check):
            await cursor.execute("update secrets set value = %s where name = %s", [self.vault.seal(""), KEY_CHECK])
        for table in map(psycopg.sql.Identifier, ("servers", "hosts")):
            query = psycopg.sql.SQL("select id, api_key from {} where api_key is not null").format(table)
            update = psycopg.sql.SQL("update {} set api_key = %s where id = %s").format(table)
            for row in await all_rows(cursor, query):
                key = self.vault.unseal(row["api_key"])
                if not self.vault.is_newest(row["api_key"]):
                    await cursor.execute(update, [self.vault.seal(key), row["id"]])

    async def aclose(self) -> None:
        """Close all connections to the database."""
        await self.database.aclose()

    # The registry

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[Cursor]:
        """Lend a cursor for changing the registry: every other process's changes come before or after these."""
        async with self.database.asking() as cursor:
            await cursor.execute("select value from counters where name = 'version' for update")
            yield cursor

    async def _rows(self, query: LiteralString, values: Sequence[object] = ()) -> list[Row]:
        async with self.database.asking() as cursor:
            return await all_rows(cursor, query, values)

    async def version(self) -> int:
        """Return the number of changes so far, by anyone."""
        async with self.database.asking() as cursor:
            return await version_of(cursor)

    async def changed(self, within: float) -> None:
        """Return when another process has changed the registry, or after so many seconds."""
        await self.database.changed(within)

    async def load(self) -> Registry:
        """Return everything that routing needs, from one snapshot."""
        async with self.database.asking() as cursor:
            await cursor.execute("set transaction isolation level repeatable read, read only")
            version = await version_of(cursor)
            servers = await all_rows(cursor, "select * from servers where removed_at is null order by registered_at, id")
            health = await all_rows(cursor, "select * from health")
            keys = await all_rows(cursor, "select * from client_keys order by created_at, id")
            sessions = await all_rows(cursor, "select * from sessions")
            links = await all_rows(cursor, "select * from wall_links order by created_at, id")
            hosts = await all_rows(cursor, "select * from hosts order by created_at, id")
            aliases = await all_rows(cursor, "select * from aliases order by created_at, name")
        registry = await anyio.to_thread.run_sync(self._registry, version, servers, health, keys)
        return attrs.evolve(
            registry,
            sessions={row["digest"]: row["until"] for row in sessions},
            wall_links=tuple(map(wall_link_of, links)),
            hosts=tuple(host_of_row(row, self.vault) for row in hosts),
            aliases=tuple(map(alias_of_row, aliases)),
        )

    def _registry(self, version: int, servers: list[Row], health: list[Row], keys: list[Row]) -> Registry:
        active = {row["id"] for row in servers}
        return Registry(
            version=version,
            servers=self._servers.of(servers),
            health={server_id: record for server_id, record in healths_of(health) if server_id in active},
            keys=tuple(map(key_of, keys)),
        )

    async def removed(self) -> Sequence[Server]:
        """Return the removed servers, newest first; their keys are forgotten."""
        query: LiteralString = "select * from servers where removed_at is not null order by removed_at desc, id limit %s"
        return tuple(server_of(row, self.vault) for row in await self._rows(query, [REMOVED]))

    async def save_server(self, server: Server) -> None:
        """Insert or replace a server.

        Raises:
            ServerNotFound: It was removed: nothing brings it back, not even a change that began before.
            AlreadyRegistered: Another server has this model and URL.
            StorageUnavailable: It cannot be saved, or it is not known whether it was; saving it again is safe.
        """
        async with self._changing() as cursor:
            await save_server(cursor, server_row(server, self.vault))
            await bump_version(cursor)

    async def remove_server(self, server_id: ServerId) -> bool:
        """Remove a server softly; its key and its owner's token are forgotten."""
        async with self._changing() as cursor:
            is_removed = await remove_servers(cursor, [server_id])
            if is_removed:
                await bump_version(cursor)
        return is_removed

    async def save_host(self, host: Host, servers: Sequence[Server] = ()) -> None:
        """Insert or replace a host and servers of it, in one transaction.

        Raises:
            ServerNotFound: One of them was removed.
            AlreadyRegistered: Another server has the model and URL of one of them.
            StorageUnavailable: They cannot be saved, or it is not known whether they were; saving them again is safe.
        """
        row = host_row(host, self.vault)
        async with self._changing() as cursor:
            for server in servers:
                await save_server(cursor, server_row(server, self.vault))
            await cursor.execute(upsert("hosts", row, "id"), row)
            await bump_version(cursor)

    async def remove_host(self, host_id: HostId) -> bool:
        """Remove a host and its servers; their keys are forgotten."""
        async with self._changing() as cursor:
            query: LiteralString = "select id from servers where coalesce(host_id, id) = %s and removed_at is null"
            owned = [row["id"] for row in await all_rows(cursor, query, [host_id])]
            are_removed = await remove_servers(cursor, owned)
            await cursor.execute("delete from hosts where id = %s", [host_id])
            is_removed = cursor.rowcount > 0 or are_removed
            if is_removed:
                await bump_version(cursor)
        return is_removed

    async def save_alias(self, alias: Alias) -> None:
        """Insert or replace an alias."""
        row = alias_row(alias)
        async with self._changing() as cursor:
            await cursor.execute(upsert("aliases", row, "name"), row)
            await bump_version(cursor)

    async def remove_alias(self, name: str) -> bool:
        """Remove an alias; harmless if it is not known."""
        async with self._changing() as cursor:
            await cursor.execute("delete from aliases where name = %s", [name])
            is_removed = cursor.rowcount > 0
            if is_removed:
                await bump_version(cursor)
        return is_removed

    # Health

    async def save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        """Save health and results of servers that are still there, in one transaction."""
        if not changes and not results:
            return
        async with self._changing() as cursor:
            named = sorted({*changes, *(result.server_id for result in results)})
            there = await all_rows(cursor, "select id, generation from servers where removed_at is null and id = any(%s)", [named])
            generations = {row["id"]: row["generation"] for row in there}
            before = dict(healths_of(await all_rows(cursor, "select * from health where server_id = any(%s)", [list(changes)])))
            saved = kept(changes, generations)
            if saved:
                rows = [health_row(key, health) for key, health in saved.items()]
                await cursor.executemany(upsert("health", rows[0], "server_id"), rows)
            if is_news(before, saved):
                await bump_version(cursor)
            await save_results(cursor, [result for result in results if result.server_id in generations])

    async def history(self, server_id: ServerId, limit: int) -> Sequence[ProbeResult]:
        """Return the last results, newest first; the models they listed are not kept."""
        query: LiteralString = "select * from results where server_id = %s order by id desc limit %s"
        return tuple(map(result_of, await self._rows(query, [server_id, limit])))

    # Clients

    async def save_key(self, key: ClientKey) -> None:
        """Insert or replace a client key; a revoked one stays revoked."""
        async with self._changing() as cursor:
            before = await all_rows(cursor, "select revoked_at from client_keys where id = %s", [key.id])
            row = key_row(still_revoked(key, before[0]["revoked_at"] if before else None))
            await cursor.execute(upsert("client_keys", row, "id"), row)
            await bump_version(cursor)

    async def open_session(self, digest: str, until: float) -> None:
        """Save a browser's session, and forget those that have expired."""
        row = {"digest": digest, "until": until}
        async with self._changing() as cursor:
            await cursor.execute("delete from sessions where until < %s", [await clock(cursor)])
            await cursor.execute(upsert("sessions", row, "digest"), row)
            await bump_version(cursor)

    async def close_session(self, digest: str) -> bool:
        """End a browser's session; harmless if it is not known."""
        async with self._changing() as cursor:
            await cursor.execute("delete from sessions where digest = %s", [digest])
            closed = cursor.rowcount > 0
            if closed:
                await bump_version(cursor)
        return closed

    async def save_wall_link(self, link: WallLink) -> None:
        """Insert a link to the wall view."""
        row = attrs.asdict(link)
        async with self._changing() as cursor:
            await cursor.execute(upsert("wall_links", row, "id"), row)
            await bump_version(cursor)

    async def remove_wall_link(self, link_id: str) -> bool:
        """Remove a link to the wall view; harmless if it is not known."""
        async with self._changing() as cursor:
            await cursor.execute("delete from wall_links where id = %s", [link_id])
            is_removed = cursor.rowcount > 0
            if is_removed:
                await bump_version(cursor)
        return is_removed

    async def add_usage(self, batch: str, rows: Sequence[Usage]) -> None:
        """Add counts, once per batch; two gateways that count the same do it in the same order, or each would wait for the other."""
        async with self.database.asking() as cursor:
            now = await clock(cursor)
            await cursor.execute(
                "delete from usage_batches where batch in (select batch from usage_batches where at < %s for update skip locked)",
                [now - BATCH_SECONDS],
            )
            await cursor.execute("insert into usage_batches (batch, at) values (%s, %s) on conflict do nothing", [batch, now])
            if cursor.rowcount:
                sums = sorted(map(usage_row, rows), key=lambda row: [row[name] for name in USAGE_KEY])
                await cursor.executemany(adding_usage(DIALECT), sums)

    async def usage(self, since: str, until: str) -> Sequence[Usage]:
        """Return what is kept of these days."""
        query: LiteralString = "select * from usage where day between %s and %s order by day, model, server_id, owner, client"
        return tuple(map(usage_of, await self._rows(query, [since, until])))

    async def sum_usage(self, since: str, until: str, *, by: Collection[str], only: Mapping[str, Collection[str]]) -> Sequence[Usage]:
        """Return the sums of what is kept of these days."""
        statement, values = summing_usage(DIALECT, by, only)
        return tuple(map(usage_of, await self._rows(statement, [since, until, *values])))

    async def requests_on(self, day: str) -> Mapping[str, int]:
        """Return how many requests each client has sent on a day."""
        query: LiteralString = "select client, least(sum(requests), %s)::bigint as requests from usage where day = %s group by client"
        return {row["client"]: row["requests"] for row in await self._rows(query, [MAX_COUNT, day])}

    # Stored responses

    async def save_responses(self, responses: Sequence[StoredResponse]) -> None:
        """Keep the places of responses, in one order for all gateways; delete the expired ones, unless another gateway is deleting them."""
        rows = sorted(map(attrs.asdict, responses), key=lambda row: str(row["key"]))
        async with self.database.asking() as cursor:
            if rows:
                await cursor.executemany(upsert("responses", rows[0], "key"), rows)
            await cursor.execute(
                "delete from responses where key in (select key from responses where until < %s for update skip locked)",
                [await clock(cursor)],
            )
            await cursor.execute(
                "delete from responses where key in (select key from responses order by until desc offset %s for update skip locked)",
                [MOST_RESPONSES],
            )

    async def find_response(self, key: str) -> StoredResponse | None:
        """Return the place of a response."""
        rows = await self._rows("select * from responses where key = %s", [key])
        return response_of(rows[0]) if rows else None

    # For all processes

    async def claim(self, role: str, holder: str, ttl: float) -> bool:
        """Take or renew a lease, by the database's clock; a call that only asks writes nothing."""
        async with self.database.asking() as cursor:
            now = await clock(cursor)
            held = "select holder from leases where role = %s and until > %s and until <= %s"
            (current,) = [row["holder"] for row in await all_rows(cursor, held, [role, now, now + LONGEST_LEASE])] or [None]
            dead = current if current is not None and is_gone(current) else None
            if current not in (None, dead, holder):
                return False
            if ttl <= 0 and current != holder:
                return True
            await cursor.execute(
                "insert into leases (role, holder, until) values (%(role)s, %(holder)s, %(until)s) on conflict (role) do update "
                "set holder = excluded.holder, until = excluded.until where leases.holder = excluded.holder "
                "or leases.holder = %(dead)s or leases.until <= %(now)s or leases.until > %(latest)s",
                {"role": role, "holder": holder, "until": now + ttl, "dead": dead, "now": now, "latest": now + LONGEST_LEASE},
            )
            return cursor.rowcount > 0

    async def secret(self, name: str, proposal: str) -> str:
        """Return what is kept under the name, keeping the proposal when there is nothing yet."""
        async with self.database.asking() as cursor:
            return await kept_secret(cursor, name, proposal)


def create(settings: Settings) -> PostgresStore:
    """Make a store for the database that `database_url` names.

    Raises:
        SettingsError: The URL cannot be used, or there is no secret for the servers' keys.
    """
    conninfo(settings.database_url)
    if settings.backend_key_secret is None:
        raise SettingsError(
            "MULTIVERSE_BACKEND_KEY_SECRET is missing: with PostgreSQL there is no file beside the database that could hold the secret "
            "of the servers' keys; create one with `openssl rand -base64 32` and give the same to every gateway"
        )
    return PostgresStore(settings.database_url, secret=settings.backend_key_secret)
