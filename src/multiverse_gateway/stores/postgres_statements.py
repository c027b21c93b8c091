"""Statements that several calls of the store in PostgreSQL have in common, each inside a transaction of its caller."""

from collections.abc import Iterable, Sequence
from typing import LiteralString

import psycopg.sql

from multiverse_gateway.core.errors import AlreadyRegistered
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.stores.postgres_database import CHANNEL, Cursor, Row
from multiverse_gateway.stores.rows import FORGET_HOSTS, HISTORY, REMOVED, RESULT_COLUMNS, first_hosts, host_row, result_row
from multiverse_gateway.stores.store_errors import removed_meanwhile
from multiverse_gateway.stores.vault import Vault


async def all_rows(cursor: Cursor, query: LiteralString | psycopg.sql.Composed, values: Sequence[object] = ()) -> list[Row]:
    """Run a query and return all its rows."""
    await cursor.execute(query, values, prepare=False)  # what is prepared fails once when a newer gateway adds a column
    return await cursor.fetchall()


async def version_of(cursor: Cursor) -> int:
    """Return the number of changes of the registry so far."""
    return int((await all_rows(cursor, "select value from counters where name = 'version'"))[0]["value"])


async def clock(cursor: Cursor) -> float:
    """Return the time by the database's clock."""
    return float((await all_rows(cursor, "select extract(epoch from clock_timestamp())::float8 as now"))[0]["now"])


async def bump_version(cursor: Cursor) -> None:
    """Count a change of the registry, and notify the other processes when it is committed."""
    await cursor.execute("update counters set value = value + 1 where name = 'version'")
    await cursor.execute("select pg_notify(%s, '')", [CHANNEL])


async def kept_secret(cursor: Cursor, name: str, proposal: str) -> str:
    """Return the value under a name, after keeping the proposal if there is none."""
    await cursor.execute("insert into secrets (name, value) values (%s, %s) on conflict do nothing", [name, proposal])
    return str((await all_rows(cursor, "select value from secrets where name = %s", [name]))[0]["value"])


async def save_server(cursor: Cursor, row: Row) -> None:
    """Insert or replace a server.

    Raises:
        ServerNotFound: It was removed.
        AlreadyRegistered: Another server has its model and URL.
    """
    if await all_rows(cursor, "select 1 from servers where id = %s and removed_at is not null", [row["id"]]):
        raise removed_meanwhile()
    query: LiteralString = "select id from servers where model_name = %s and endpoint_url = %s and id <> %s and removed_at is null"
    others = await all_rows(cursor, query, [row["model_name"], row["endpoint_url"], row["id"]])
    if others:
        raise AlreadyRegistered(others[0]["id"])
    await cursor.execute(upsert("servers", row, "id"), row)


async def remove_servers(cursor: Cursor, server_ids: Sequence[str]) -> bool:
    """Remove servers softly, and return whether any was there; forget the results of those that are listed no more."""
    await cursor.execute(
        "update servers set removed_at = extract(epoch from clock_timestamp()), api_key = null, owner_digest = null "
        "where id = any(%s) and removed_at is null",
        [list(server_ids)],
    )
    if not cursor.rowcount:
        return False
    await cursor.execute("delete from health where server_id = any(%s)", [list(server_ids)])
    await cursor.execute(FORGET_HOSTS)
    await cursor.execute(
        "delete from results where server_id in (select id from servers where removed_at is not null order by removed_at desc offset %s)",
        [REMOVED],
    )
    return True


async def group_by_host(cursor: Cursor, vault: Vault) -> None:
    """Give the servers that an older version registered their hosts."""
    rows = await all_rows(cursor, "select * from servers where host_id is null and removed_at is null order by registered_at, id")
    for host, server_ids in first_hosts(rows, vault):
        row = host_row(host, vault)
        await cursor.execute(upsert("hosts", row, "id"), row)
        await cursor.execute("update servers set host_id = %s where id = any(%s)", [host.id, server_ids])
        await bump_version(cursor)


async def save_results(cursor: Cursor, results: Sequence[ProbeResult]) -> None:
    """Insert results of probes, and delete those beyond the last 100 of each server."""
    if not results:
        return
    insert = psycopg.sql.SQL("insert into results ({}) values ({})").format(names(RESULT_COLUMNS), places(RESULT_COLUMNS))
    await cursor.executemany(insert, [result_row(result) for result in results])
    await cursor.execute(
        "delete from results where id in (select id from (select id, row_number() over (partition by server_id order by id desc) as age "
        "from results where server_id = any(%s)) as ages where age > %s)",
        [sorted({result.server_id for result in results}), HISTORY],
    )


def names(columns: Iterable[str]) -> psycopg.sql.Composed:
    """Return identifiers with commas between them."""
    return psycopg.sql.SQL(", ").join(map(psycopg.sql.Identifier, columns))


def places(columns: Iterable[str]) -> psycopg.sql.Composed:
    """Return placeholders with commas between them."""
    return psycopg.sql.SQL(", ").join(map(psycopg.sql.Placeholder, columns))


def upsert(table: str, row: Iterable[str], key: str) -> psycopg.sql.Composed:
    """Return the statement that inserts a row or replaces the one with the same key."""
    others = [psycopg.sql.Identifier(name) for name in row if name != key]
    return psycopg.sql.SQL("insert into {} ({}) values ({}) on conflict ({}) do update set {}").format(
        psycopg.sql.Identifier(table),
        names(row),
        places(row),
        psycopg.sql.Identifier(key),
        psycopg.sql.SQL(", ").join(psycopg.sql.SQL("{0} = excluded.{0}").format(name) for name in others),
    )
