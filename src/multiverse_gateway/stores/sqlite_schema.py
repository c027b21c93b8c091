"""The tables of the registry in SQLite, and the steps that lead to them from every older version."""

from pathlib import Path

import attrs
from sqlite_utils import Database, Migrations

from multiverse_gateway.stores.rows import USAGE_KEY
from multiverse_gateway.stores.sqlite_connection import connect, transaction, use_journal

SET = "multiverse_gateway"
KNOWN = frozenset(
    {
        "registry",
        "usage_and_keys",
        "browser_sessions",
        "daily_limits",
        "stored_responses",
        "keys_at_once",
        "wall_links",
        "canceled_requests",
        "usage_by_its_key",
        "key_hints_and_blocks",
        "opened_addresses",
        "hosts",
    }
)
"""The names of our migrations."""

_FIRST_COUNTS = ("requests", "failed", "prompt_tokens", "completion_tokens")

migrations = Migrations(SET)


@migrations()
def registry(db: Database) -> None:
    """Create the tables of the registry."""
    db.table("servers").create(
        {
            "id": str,
            "model_name": str,
            "endpoint_url": str,
            "api_key": str,
            "capabilities": str,
            "metadata": str,
            "max_concurrency": int,
            "weight": int,
            "generation": int,
            "registered_at": float,
            "created_at": float,
            "updated_at": float,
            "removed_at": float,
        },
        pk="id",
    )
    db.execute("create unique index servers_by_pair on servers (model_name, endpoint_url) where removed_at is null")
    db.table("health").create({"server_id": str, "state": str, "facts": str}, pk="server_id")
    db.table("results").create(
        {
            "id": int,
            "server_id": str,
            "generation": int,
            "passed": int,
            "checked_at": float,
            "duration": float,
            "reason": str,
            "warning": str,
            "unauthorized": int,
        },
        pk="id",
    )
    db.table("results").create_index(["server_id", "id"])
    db.table("leases").create({"role": str, "holder": str, "until": float}, pk="role")
    db.table("secrets").create({"name": str, "value": str}, pk="name")
    db.table("counters").create({"name": str, "value": int}, pk="name")
    db.table("counters").insert({"name": "version", "value": 1})


@migrations()
def usage_and_keys(db: Database) -> None:
    """Add the usage counts, the client keys and the owners' tokens."""
    db.table("servers").add_column("owner_digest", str)
    db.table("client_keys").create(
        {
            "id": str,
            "name": str,
            "digest": str,
            "created_at": float,
            "expires_at": float,
            "revoked_at": float,
            "rate_limit": int,
            "models": str,
        },
        pk="id",
    )
    db.table("usage").create(
        {**dict.fromkeys(USAGE_KEY, str), **dict.fromkeys(_FIRST_COUNTS, int)},
        pk=USAGE_KEY,
        not_null={*USAGE_KEY, *_FIRST_COUNTS},
    )
    db.table("usage_batches").create({"batch": str, "at": float}, pk="batch")


@migrations()
def browser_sessions(db: Database) -> None:
    """Add the table of the browsers' sessions."""
    db.table("sessions").create({"digest": str, "until": float}, pk="digest")


@migrations()
def daily_limits(db: Database) -> None:
    """Add the daily limits of client keys."""
    db.table("client_keys").add_column("daily_limit", int)


@migrations()
def stored_responses(db: Database) -> None:
    """Add the places of stored responses."""
    db.table("responses").create({"key": str, "server_id": str, "generation": int, "until": float}, pk="key")
    db.table("responses").create_index(["until"])


@migrations()
def keys_at_once(db: Database) -> None:
    """Add the limits on a key's requests at once, and keys for bulk requests; keys that exist have no limit and are not for bulk."""
    db.table("client_keys").add_column("max_at_once", int, not_null_default=0)
    db.table("client_keys").add_column("is_bulk", int, not_null_default=0)


@migrations()
def wall_links(db: Database) -> None:
    """Add the links to the wall view."""
    db.table("wall_links").create({"id": str, "name": str, "digest": str, "created_at": float}, pk="id")


@migrations()
def canceled_requests(db: Database) -> None:
    """Count canceled requests apart from failed ones; those of earlier days stay among the failed ones."""
    db.table("usage").add_column("canceled", int, not_null_default=0)


@migrations()
def usage_by_its_key(db: Database) -> None:
    """Keep the usage counts in the order of their key: sums over many rows take half the time, and the file is smaller."""
    names = [column.name for column in db.table("usage").columns]
    columns = ", ".join(f"{name} {'text' if name in USAGE_KEY else 'integer'} not null" for name in names if name != "canceled")
    db.execute(
        f"create table usage_by_key ({columns}, canceled integer not null default 0, primary key ({', '.join(USAGE_KEY)})) without rowid"
    )
    db.execute(f"insert into usage_by_key ({', '.join(names)}) select {', '.join(names)} from usage")  # noqa: S608  our own names
    db.execute("drop table usage")
    db.execute("alter table usage_by_key rename to usage")


@migrations()
def key_hints_and_blocks(db: Database) -> None:
    """Add by what a key is recognized, and when it was blocked; keys that exist have neither."""
    db.table("client_keys").add_column("hint", str)
    db.table("client_keys").add_column("blocked_at", float)


@migrations()
def opened_addresses(db: Database) -> None:
    """Add the loopback address that the operator opened for a server; servers that exist have none."""
    db.table("servers").add_column("opened_address", str)


@migrations()
def hosts(db: Database) -> None:
    """Add the hosts, the names of models at their engines, and the aliases; the store groups the servers by host when it is opened."""
    db.table("servers").add_column("upstream_model", str)
    db.table("servers").add_column("host_id", str)
    db.table("hosts").create(
        {
            "id": str,
            "endpoint_url": str,
            "api_key": str,
            "owner": str,
            "max_concurrency": int,
            "offers": str,
            "created_at": float,
            "updated_at": float,
        },
        pk="id",
    )
    db.table("aliases").create({"name": str, "models": str, "created_at": float, "updated_at": float}, pk="name")


@attrs.frozen
class SchemaState:
    """How far a database has come: `missing` are our steps that it has not taken."""

    missing: frozenset[str]
    is_ours: bool
    """Some step was taken; otherwise the database is empty, or another program's."""
    is_newer: bool
    """A newer version of the gateway took a step that this one does not know."""

    @property
    def is_current(self) -> bool:
        """Return whether its tables are those of this version."""
        return not self.missing and not self.is_newer


def state_of(db: Database) -> SchemaState:
    """Return how far a database has come."""
    applied = frozenset(migration.name for migration in migrations.applied(db))
    return SchemaState(is_ours=bool(applied), is_newer=bool(applied - KNOWN), missing=KNOWN - applied)


def fill(path: Path) -> None:
    """Make an empty registry of an empty file."""
    db = connect(path)
    try:
        use_journal(db)
        with transaction(db):
            migrations.apply(db)
    finally:
        db.conn.close()
