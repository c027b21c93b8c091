"""What the calls of a store do to the tables in SQLite, each inside a transaction of its caller."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from sqlite_utils import Database

from multiverse_gateway.core.aliases import Alias
from multiverse_gateway.core.errors import AlreadyRegistered
from multiverse_gateway.core.health import Health
from multiverse_gateway.core.servers import ClientKey, HostId, ServerId, WallLink
from multiverse_gateway.core.stored import StoredResponse
from multiverse_gateway.core.usage import Usage
from multiverse_gateway.holders import is_gone
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.stores.rows import (
    BATCH_SECONDS,
    FORGET_HOSTS,
    HISTORY,
    LONGEST_LEASE,
    MOST_RESPONSES,
    REMOVED,
    SqlDialect,
    adding_usage,
    alias_row,
    first_hosts,
    health_row,
    healths_of,
    host_row,
    is_news,
    kept,
    key_row,
    result_row,
    still_revoked,
    usage_row,
)
from multiverse_gateway.stores.store_errors import removed_meanwhile
from multiverse_gateway.stores.vault import Vault

DIALECT = SqlDialect(placeholder=":{}", mark="?", integer="integer", least="min", most="max", sum="total({})")


# The version


def version_of(db: Database) -> int:
    """Return the number of changes of the registry so far."""
    return int(db.execute("select value from counters where name = 'version'").fetchone()[0])


def bump_version(db: Database) -> None:
    """Count a change of the registry: other processes read it again."""
    db.execute("update counters set value = value + 1 where name = 'version'")


# The registry


def save_server(db: Database, row: Mapping[str, Any]) -> None:
    """Insert or replace a server.

    Raises:
        ServerNotFound: It was removed.
        AlreadyRegistered: Another server has this model and URL.
    """
    if db.execute("select 1 from servers where id = ? and removed_at is not null", [row["id"]]).fetchone():
        raise removed_meanwhile()
    query = "select id from servers where model_name = ? and endpoint_url = ? and id <> ? and removed_at is null"
    other = db.execute(query, [row["model_name"], row["endpoint_url"], row["id"]]).fetchone()
    if other is not None:
        raise AlreadyRegistered(other[0])
    db.table("servers").upsert(dict(row), pk="id")
    bump_version(db)


def remove_server(db: Database, server_id: ServerId, wall: float) -> bool:
    """Remove a server softly, and return whether it was there; forget the results of those that are listed no more."""
    statement = "update servers set removed_at = ?, api_key = null, owner_digest = null where id = ? and removed_at is null"
    is_removed = db.execute(statement, [wall, server_id]).rowcount > 0
    if is_removed:
        db.execute("delete from health where server_id = ?", [server_id])
        db.execute(FORGET_HOSTS)
        db.execute(
            "delete from results where server_id in "
            "(select id from servers where removed_at is not null order by removed_at desc limit -1 offset ?)",
            [REMOVED],
        )
        bump_version(db)
    return is_removed


def save_host(db: Database, row: Mapping[str, Any], servers: Sequence[Mapping[str, Any]]) -> None:
    """Insert or replace a host and servers of it.

    Raises:
        ServerNotFound: One of them was removed.
        AlreadyRegistered: Another server has the model and URL of one of them.
    """
    for server in servers:
        save_server(db, server)
    db.table("hosts").upsert(dict(row), pk="id")
    bump_version(db)


def remove_host(db: Database, host_id: HostId, wall: float) -> bool:
    """Remove a host and its servers, and return whether there was anything to remove."""
    owned = db.execute("select id from servers where coalesce(host_id, id) = ? and removed_at is null", [host_id]).fetchall()
    removed = [remove_server(db, server_id, wall) for (server_id,) in owned]
    is_removed = db.execute("delete from hosts where id = ?", [host_id]).rowcount > 0
    if is_removed:
        bump_version(db)
    return is_removed or any(removed)


def has_ungrouped(db: Database) -> bool:
    """Return whether an older version registered servers since the registry was opened last."""
    return db.execute("select 1 from servers where host_id is null and removed_at is null limit 1").fetchone() is not None


def group_by_host(db: Database, vault: Vault) -> None:
    """Give the servers that an older version registered their hosts."""
    for host, server_ids in first_hosts(
        db.query("select * from servers where host_id is null and removed_at is null order by registered_at, id"), vault
    ):
        db.table("hosts").insert(host_row(host, vault))
        db.conn.executemany("update servers set host_id = ? where id = ?", [(host.id, server_id) for server_id in server_ids])
        bump_version(db)


def save_alias(db: Database, alias: Alias) -> None:
    """Insert or replace an alias."""
    db.table("aliases").upsert(alias_row(alias), pk="name")
    bump_version(db)


def remove_alias(db: Database, name: str) -> bool:
    """Remove an alias, and return whether there was one."""
    is_removed = db.execute("delete from aliases where name = ?", [name]).rowcount > 0
    if is_removed:
        bump_version(db)
    return is_removed


def save_health(db: Database, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
    """Save health and results of servers that are still there."""
    generations = dict(db.execute("select id, generation from servers where removed_at is null").fetchall())
    before = dict(healths_of(db.query("select * from health")))
    saved = kept(changes, generations)
    db.table("health").upsert_all([health_row(key, health) for key, health in saved.items()], pk="server_id")
    if is_news(before, saved):
        bump_version(db)
    db.table("results").insert_all([result_row(result) for result in results if result.server_id in generations])
    for server_id in {result.server_id for result in results}:
        db.execute(
            "delete from results where server_id = ? and id <= "
            "(select id from results where server_id = ? order by id desc limit 1 offset ?)",
            [server_id, server_id, HISTORY],
        )


# Clients


def save_key(db: Database, key: ClientKey) -> None:
    """Insert or replace a client key."""
    before = db.execute("select revoked_at from client_keys where id = ?", [key.id]).fetchone()
    db.table("client_keys").upsert(key_row(still_revoked(key, None if before is None else before[0])), pk="id")
    bump_version(db)


def open_session(db: Database, digest: str, until: float, now: float) -> None:
    """Save a session, and forget those that have expired."""
    db.execute("delete from sessions where until < ?", [now])
    db.table("sessions").upsert({"digest": digest, "until": until}, pk="digest")
    bump_version(db)


def close_session(db: Database, digest: str) -> bool:
    """End a session, and return whether there was one."""
    is_closed = db.execute("delete from sessions where digest = ?", [digest]).rowcount > 0
    if is_closed:
        bump_version(db)
    return is_closed


def save_wall_link(db: Database, link: WallLink) -> None:
    """Insert a link to the wall view."""
    db.table("wall_links").upsert(attrs.asdict(link), pk="id")
    bump_version(db)


def remove_wall_link(db: Database, link_id: str) -> bool:
    """Remove a link to the wall view, and return whether there was one."""
    is_removed = db.execute("delete from wall_links where id = ?", [link_id]).rowcount > 0
    if is_removed:
        bump_version(db)
    return is_removed


def add_usage(db: Database, batch: str, rows: Sequence[Usage], now: float) -> None:
    """Add counts, unless the batch was added before."""
    db.execute("delete from usage_batches where at < ?", [now - BATCH_SECONDS])
    if db.execute("insert or ignore into usage_batches (batch, at) values (?, ?)", [batch, now]).rowcount == 0:
        return
    statement = adding_usage(DIALECT)
    for row in rows:
        db.execute(statement, usage_row(row))


# Stored responses


def save_responses(db: Database, responses: Sequence[StoredResponse], now: float) -> None:
    """Insert or replace places of responses, and delete the expired and the oldest ones."""
    db.table("responses").upsert_all([attrs.asdict(response) for response in responses], pk="key")
    db.execute(
        "delete from responses where until < ? or key in (select key from responses order by until desc limit -1 offset ?)",
        [now, MOST_RESPONSES],
    )


# For all processes


def holder_of(db: Database, role: str, now: float) -> str | None:
    """Return the holder of a lease; `None` if it has expired or its process is dead."""
    row = db.execute("select holder, until from leases where role = ?", [role]).fetchone()
    if row is None or not now < row[1] <= now + LONGEST_LEASE or is_gone(row[0]):
        return None
    return str(row[0])


def claimed(db: Database, role: str, holder: str, ttl: float, now: float) -> bool:
    """Take or renew a lease, and return whether it could be had."""
    if holder_of(db, role, now) not in (None, holder):
        return False
    db.table("leases").upsert({"role": role, "holder": holder, "until": now + ttl}, pk="role")
    return True


def kept_secret(db: Database, name: str, proposal: str) -> str:
    """Return the value under a name, after keeping the proposal if there is none."""
    db.execute("insert or ignore into secrets (name, value) values (?, ?)", [name, proposal])
    return str(db.execute("select value from secrets where name = ?", [name]).fetchone()[0])
