"""Copy a whole registry into an empty PostgreSQL database: `multiverse-gateway migrate-store`."""

from collections import Counter
from collections.abc import Mapping, Sequence

import psycopg
import psycopg.sql

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.stores.postgres import KEY_CHECK, PostgresStore
from multiverse_gateway.stores.postgres_database import Cursor, Row
from multiverse_gateway.stores.postgres_statements import all_rows, bump_version, names, places
from multiverse_gateway.stores.vault import Vault


async def fill(store: PostgresStore, tables: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    """Fill an empty registry with all rows of another one, the servers' keys in clear text, and return how many there are of each.

    All or nothing: what was written is read again and compared before it is committed.

    Raises:
        StorageUnavailable: The database cannot be written, holds a registry already, or returned something other than was written.
    """
    try:
        async with store.database.alone() as cursor:
            for table in ("servers", "client_keys", "usage"):
                if await all_rows(cursor, psycopg.sql.SQL("select 1 from {} limit 1").format(psycopg.sql.Identifier(table))):
                    raise StorageUnavailable("There is a registry in this database already: copy into an empty one")
            for table, rows in tables.items():
                await _fill(cursor, table, rows, store.vault)
            await bump_version(cursor)
    except (psycopg.Error, OSError) as error:
        raise StorageUnavailable("The registry could not be copied; nothing was") from error
    return {table: len(rows) for table, rows in tables.items()}


async def _fill(cursor: Cursor, table: str, rows: Sequence[Row], vault: Vault) -> None:
    """Write rows in their order, replace those that the database made itself, and compare what is there then."""
    name = psycopg.sql.Identifier(table)
    if table in ("counters", "secrets"):
        await cursor.execute(psycopg.sql.SQL("delete from {} where name = any(%s)").format(name), [[row["name"] for row in rows]])
    if not rows:
        return
    columns = [column for column in rows[0] if (table, column) != ("results", "id")]
    insert = psycopg.sql.SQL("insert into {} ({}) values ({})").format(name, names(columns), places(columns))
    await cursor.executemany(insert, [_sealed(row, vault) for row in rows])
    stored = await all_rows(cursor, psycopg.sql.SQL("select {} from {}").format(names(columns), name))
    wanted = Counter(repr([row[column] for column in columns]) for row in rows)
    copied = Counter(repr([_unsealed(row, vault)[column] for column in columns]) for row in stored if _is_copied(table, row))
    if wanted != copied:
        raise StorageUnavailable(f"The database gave back other {table} than it was given; nothing was copied")


def _sealed(row: Row, vault: Vault) -> Row:
    return {**row, "api_key": vault.seal(row["api_key"])} if "api_key" in row else row


def _unsealed(row: Row, vault: Vault) -> Row:
    return {**row, "api_key": vault.unseal(row["api_key"])} if "api_key" in row else row


def _is_copied(table: str, row: Row) -> bool:
    """Return whether a row came from the other registry."""
    return table != "secrets" or row["name"] != KEY_CHECK
