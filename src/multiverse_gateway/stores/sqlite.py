"""The registry in an SQLite file: the default.

* One connection writes, on one thread at a time off the event loop, and one reads on another: a write that waits delays no reader.
* WAL with `synchronous=FULL`: what was acknowledged is on disk. Every write is one `BEGIN IMMEDIATE`.
* Of all processes on the file one checkpoints at a time, by a lease (SQLite's WAL-reset bug, before 3.51.3).
* A file that is moved, removed or replaced under a running gateway takes no writes: they would be lost with it. The path has to name the
  file that was opened, before and after each write; so has that of the journal.
* Errors of SQLite become `StorageUnavailable` here and nowhere else. A file that is broken, empty, foreign or newer is refused, never
  replaced; a new one appears whole or not at all.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
from sqlite_utils import Database

from multiverse_gateway.core.aliases import Alias
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.health import Health
from multiverse_gateway.core.hosts import Host
from multiverse_gateway.core.servers import ClientKey, HostId, Server, ServerId, WallLink
from multiverse_gateway.core.stored import StoredResponse
from multiverse_gateway.core.usage import MAX_COUNT, Usage
from multiverse_gateway.holders import new_holder
from multiverse_gateway.protocols import ProbeResult, Registry
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.declaration import unusable_value
from multiverse_gateway.stores import sqlite_statements as statements
from multiverse_gateway.stores.files import keep_private, publish
from multiverse_gateway.stores.rows import (
    REMOVED,
    USAGE_KEY,
    Servers,
    alias_of_row,
    healths_of,
    host_of_row,
    host_row,
    key_of,
    response_of,
    result_of,
    server_of,
    server_row,
    summing_usage,
    usage_of,
    wall_link_of,
)
from multiverse_gateway.stores.sqlite_connection import FileId, connect, file_id, file_ids, journal_of, transaction, use_journal
from multiverse_gateway.stores.sqlite_copies import contents, copy_to, is_locked, newest_backup
from multiverse_gateway.stores.sqlite_schema import fill, migrations, state_of
from multiverse_gateway.stores.store_errors import refused, unavailable
from multiverse_gateway.stores.vault import Vault, open_vault

CHECKPOINT_COMMITS = 500
CHECKPOINT_ROLE = "checkpoint"
CHECKPOINT_SECONDS = 60.0

MISSING = (
    "The database file was moved, removed or replaced while the gateway was running, so nothing can be saved; inference continues. "
    "The operator has to put the same file back, or to restart the gateway so that it uses the file that is there now."
)

_log = logging.getLogger("multiverse_gateway.registry")

REFUSALS = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError, OverflowError, UnicodeError)
"""What SQLite raises for values that it cannot hold: the same call fails again."""

_Result = TypeVar("_Result")
_Part = TypeVar("_Part")


class SqliteStore:
    """Keep the registry in one file; see the rules at the top.

    Several processes of one machine may share the file. Nothing is opened before `open()`. `wall` is the clock that they share.
    """

    def __init__(self, path: Path, *, secret: str | None = None, wall: Callable[[], float] = time.time) -> None:
        self.path = path
        self._secret = secret
        self._wall = wall
        self._holder = new_holder()
        self._writer: Database | None = None
        self._reader: Database | None = None
        self._vault: Vault | None = None
        self._servers: Servers | None = None
        self._files: Mapping[Path, FileId] = {}
        """What the paths of the database and its journal named when it was opened."""
        self._is_missing = False
        self._commits = 0
        self._writing = anyio.CapacityLimiter(1)
        self._reading = anyio.CapacityLimiter(1)

    # Running on the threads

    async def _write(self, work: Callable[[Database], _Result]) -> _Result:
        """Do something in one transaction; it is durable when this returns."""
        return await self._run(lambda: self._committed(work), self._writing)

    async def _read(self, work: Callable[[Database], _Result]) -> _Result:
        """Read something from one snapshot."""
        return await self._run(lambda: self._snapshot(work), self._reading)

    async def _run(self, work: Callable[[], _Result], thread: anyio.CapacityLimiter) -> _Result:
        try:
            return await anyio.to_thread.run_sync(work, limiter=thread)
        except REFUSALS as error:
            raise refused() from error
        except (sqlite3.Error, OSError) as error:
            raise unavailable() from error

    def _committed(self, work: Callable[[Database], _Result]) -> _Result:
        db = _opened(self._writer)
        self._require_files()
        with transaction(db):
            result = work(db)
        self._require_files()  # moved meanwhile, the write may be lost: it is not acknowledged, and can be repeated
        self._commits += 1
        if self._commits % CHECKPOINT_COMMITS == 0:
            self._checkpoint(db)
        return result

    def _require_files(self) -> None:
        """Check that the paths still name the files that were opened.

        Raises:
            StorageUnavailable: The database or its journal was moved, removed or replaced.
        """
        is_missing = any(file_id(path) != file for path, file in self._files.items())
        if is_missing is not self._is_missing:
            self._is_missing = is_missing
            message = "the database file was moved, removed or replaced" if is_missing else "the database file is back in its place"
            _log.log(logging.ERROR if is_missing else logging.WARNING, message, extra={"fields": {"path": str(self.path)}})
        if is_missing:
            raise StorageUnavailable(MISSING, retry_after=5.0)

    def _checkpoint(self, db: Database) -> None:
        """Move the journal into the file, if no other process does; if that is not possible now, the write still succeeds."""
        with suppress(sqlite3.Error):
            with transaction(db):
                is_ours = statements.claimed(db, CHECKPOINT_ROLE, self._holder, CHECKPOINT_SECONDS, self._wall())
            if is_ours:
                db.execute("pragma wal_checkpoint(passive)").fetchall()

    def _snapshot(self, work: Callable[[Database], _Result]) -> _Result:
        db = _opened(self._reader)
        db.execute("begin")
        try:
            return work(db)
        finally:
            db.execute("rollback")

    # Opening and closing

    async def open(self) -> None:
        """Create or migrate the file and check it.

        Raises:
            StorageUnavailable: It cannot be opened, is damaged, is of a newer version, or its keys cannot be decrypted; the message says
                which and what to do.
        """
        await anyio.to_thread.run_sync(self._open, limiter=self._writing)

    def _open(self) -> None:
        try:
            self._create()
            self._writer = self._connected()
            self._vault = self._vault_for(self._writer)
            self._servers = Servers(self._vault)
            self._reader = connect(self.path)
            self._reader.execute("pragma query_only=on")
            statements.version_of(self._reader)  # opens the journal
            self._files = file_ids(self.path)
            self._is_missing = False
        except BaseException as error:
            self._close()
            if isinstance(error, StorageUnavailable):
                raise
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                raise self._refusal("is damaged") from error
            if isinstance(error, sqlite3.OperationalError) and is_locked(error):
                raise StorageUnavailable(f"The database {self.path} is locked by another program: end that one first") from error
            if isinstance(error, sqlite3.Error | OSError):
                raise StorageUnavailable(
                    f"The database {self.path} cannot be opened: check that its folder exists and can be written, and the disk"
                ) from error
            raise

    def _refusal(self, trouble: str) -> StorageUnavailable:
        backup = newest_backup(self.path)
        remedy = "there is no good backup beside it" if backup is None else f"the newest good one is {backup}"
        return StorageUnavailable(f"The database {self.path} {trouble}, and was left as it is: bring back a backup; {remedy}")

    def _create(self) -> None:
        """Make the file if there is none. An empty one is never replaced: it may have held something."""
        if self.path.exists():
            return
        journal = journal_of(self.path)
        if journal.exists() and journal.stat().st_size:
            raise self._refusal(f"is gone, but not its journal {journal.name}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        publish(self.path, fill)

    def _connected(self) -> Database:
        db = connect(self.path)
        try:
            if db.execute("pragma integrity_check(1)").fetchone()[0] != "ok":
                raise self._refusal("is damaged")
            self._migrate(db)
            use_journal(db)
            for path in (self.path, journal_of(self.path), self.path.with_name(f"{self.path.name}-shm")):
                keep_private(path)
        except BaseException:
            db.conn.close()
            raise
        return db

    def _migrate(self, db: Database) -> None:
        state = state_of(db)
        if not state.is_ours:
            raise self._refusal("is empty or belongs to another program")
        if state.is_newer:
            raise StorageUnavailable(
                f"The database {self.path} was written by a newer version of the gateway: update the gateway, or bring back a backup"
            )
        if state.missing:
            before = self.path.with_name(f"{self.path.name}.before-{min(state.missing)}")
            copy_to(self.path, before, contents)  # one that is there already was made before the same step
            with transaction(db):
                migrations.apply(db)

    def _vault_for(self, db: Database) -> Vault:
        """Make the vault, decrypt every key with it, encrypt again what older secrets encrypted, and group servers by host."""
        sealed = [
            (table, row["id"], row["api_key"])
            for table in ("servers", "hosts")
            for row in db.query(f"select id, api_key from {table} where api_key is not null")  # noqa: S608  our own names
        ]
        vault = open_vault(self.path, self._secret, may_create=not sealed)
        old = [(table, row_id, key, vault.unseal(key)) for table, row_id, key in sealed if not vault.is_newest(key)]
        if old or statements.has_ungrouped(db):
            with transaction(db):
                for table, row_id, before, key in old:
                    update = f"update {table} set api_key = ? where id = ? and api_key = ?"  # noqa: S608  our own names
                    db.execute(update, [vault.seal(key), row_id, before])
                statements.group_by_host(db, vault)
        return vault

    async def aclose(self) -> None:
        """Close; the last process to close moves the journal into the file, if that is still in its place."""
        await self._run(self._close, self._writing)

    def _close(self) -> None:
        connections, self._reader, self._writer = (self._reader, self._writer), None, None
        for db in connections:
            if db is not None:
                db.conn.close()

    # The registry

    async def version(self) -> int:
        """Return the number of changes so far, by anyone; this is also how a missing file is noticed."""
        return await self._read(self._checked_version)

    def _checked_version(self, db: Database) -> int:
        self._require_files()
        return statements.version_of(db)

    async def changed(self, within: float) -> None:
        """Return after so many seconds: a file does not announce changes."""
        await anyio.sleep(within)

    async def load(self) -> Registry:
        """Return everything that routing needs, from one read transaction."""
        return await self._read(self._load)

    def _load(self, db: Database) -> Registry:
        query = "select * from servers where removed_at is null order by registered_at, id"
        servers = _known(self._servers).of(db.query(query))
        active = {server.id for server in servers}
        health = {server_id: record for server_id, record in healths_of(db.query("select * from health")) if server_id in active}
        keys = tuple(key_of(row) for row in db.query("select * from client_keys order by created_at, id"))
        sessions = dict(db.execute("select digest, until from sessions").fetchall())
        links = tuple(wall_link_of(row) for row in db.query("select * from wall_links order by created_at, id"))
        vault = _known(self._vault)
        return Registry(
            version=statements.version_of(db),
            servers=servers,
            health=health,
            keys=keys,
            sessions=sessions,
            wall_links=links,
            hosts=tuple(host_of_row(row, vault) for row in db.query("select * from hosts order by created_at, id")),
            aliases=tuple(alias_of_row(row) for row in db.query("select * from aliases order by created_at, name")),
        )

    async def removed(self) -> Sequence[Server]:
        """Return the removed servers, newest first; their keys are forgotten."""
        query = "select * from servers where removed_at is not null order by removed_at desc limit ?"
        return await self._read(lambda db: tuple(server_of(row, _known(self._vault)) for row in db.query(query, [REMOVED])))

    async def save_server(self, server: Server) -> None:
        """Insert or replace a server.

        Raises:
            ServerNotFound: It was removed: nothing brings it back, not even a change that began before.
            AlreadyRegistered: Another server has this model and URL.
            StorageUnavailable: It cannot be saved.
        """
        row = server_row(server, _known(self._vault))
        await self._write(lambda db: statements.save_server(db, row))

    async def remove_server(self, server_id: ServerId) -> bool:
        """Remove a server softly; its key is forgotten."""
        return await self._write(lambda db: statements.remove_server(db, server_id, self._wall()))

    async def save_host(self, host: Host, servers: Sequence[Server] = ()) -> None:
        """Insert or replace a host and servers of it, in one transaction.

        Raises:
            ServerNotFound: One of them was removed.
            AlreadyRegistered: Another server has the model and URL of one of them.
            StorageUnavailable: They cannot be saved.
        """
        vault = _known(self._vault)
        row, rows = host_row(host, vault), [server_row(server, vault) for server in servers]
        await self._write(lambda db: statements.save_host(db, row, rows))

    async def remove_host(self, host_id: HostId) -> bool:
        """Remove a host and its servers; their keys are forgotten."""
        return await self._write(lambda db: statements.remove_host(db, host_id, self._wall()))

    async def save_alias(self, alias: Alias) -> None:
        """Insert or replace an alias."""
        await self._write(lambda db: statements.save_alias(db, alias))

    async def remove_alias(self, name: str) -> bool:
        """Remove an alias; harmless if it is not known."""
        return await self._write(lambda db: statements.remove_alias(db, name))

    # Health

    async def save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        """Save health and results of servers that are still there, in one transaction."""
        if changes or results:
            await self._write(lambda db: statements.save_health(db, changes, results))

    async def history(self, server_id: ServerId, limit: int) -> Sequence[ProbeResult]:
        """Return the last results, newest first; the models they listed are not kept."""
        query = "select * from results where server_id = ? order by id desc limit ?"
        return await self._read(lambda db: tuple(result_of(row) for row in db.query(query, [server_id, limit])))

    # Clients

    async def save_key(self, key: ClientKey) -> None:
        """Insert or replace a client key; a revoked one stays revoked."""
        await self._write(lambda db: statements.save_key(db, key))

    async def open_session(self, digest: str, until: float) -> None:
        """Save a session, and forget those that have expired."""
        await self._write(lambda db: statements.open_session(db, digest, until, self._wall()))

    async def close_session(self, digest: str) -> bool:
        """End a session; harmless if it is not known."""
        return await self._write(lambda db: statements.close_session(db, digest))

    async def save_wall_link(self, link: WallLink) -> None:
        """Insert a link to the wall view."""
        await self._write(lambda db: statements.save_wall_link(db, link))

    async def remove_wall_link(self, link_id: str) -> bool:
        """Remove a link to the wall view; harmless if it is not known."""
        return await self._write(lambda db: statements.remove_wall_link(db, link_id))

    async def add_usage(self, batch: str, rows: Sequence[Usage]) -> None:
        """Add counts, once per batch."""
        await self._write(lambda db: statements.add_usage(db, batch, rows, self._wall()))

    async def usage(self, since: str, until: str) -> Sequence[Usage]:
        """Return what is kept of these days."""
        query = f"select * from usage where day between ? and ? order by {', '.join(USAGE_KEY)}"  # noqa: S608  our own names
        return await self._read(lambda db: tuple(usage_of(row) for row in db.query(query, [since, until])))

    async def sum_usage(self, since: str, until: str, *, by: Collection[str], only: Mapping[str, Collection[str]]) -> Sequence[Usage]:
        """Return the sums of what is kept of these days."""
        statement, values = summing_usage(statements.DIALECT, by, only)
        return await self._read(lambda db: tuple(usage_of(row) for row in db.query(statement, [since, until, *values])))

    async def requests_on(self, day: str) -> Mapping[str, int]:
        """Return how many requests each client has sent on a day."""
        total = f"total({statements.DIALECT.count('requests')})"  # a float: the sum of integers would overflow
        sums = f"cast(min({MAX_COUNT}, {total}) as integer)"
        query = f"select client, {sums} from usage where day = ? group by client"  # noqa: S608  our own names
        return await self._read(lambda db: dict(db.execute(query, [day]).fetchall()))

    # Stored responses

    async def save_responses(self, responses: Sequence[StoredResponse]) -> None:
        """Keep the places of responses, and delete the expired ones."""
        await self._write(lambda db: statements.save_responses(db, responses, self._wall()))

    async def find_response(self, key: str) -> StoredResponse | None:
        """Return the place of a response."""
        return await self._read(lambda db: next(map(response_of, db.query("select * from responses where key = ?", [key])), None))

    # For all processes

    async def claim(self, role: str, holder: str, ttl: float) -> bool:
        """Take or renew a lease, by the wall clock that the processes share; a call that fails or only asks writes nothing."""
        current = await self._read(lambda db: statements.holder_of(db, role, self._wall()))
        if current not in (None, holder):
            return False
        if current is None and ttl <= 0:
            return True
        return await self._write(lambda db: statements.claimed(db, role, holder, ttl, self._wall()))

    async def secret(self, name: str, proposal: str) -> str:
        """Return what is kept under the name, keeping the proposal when there is nothing yet."""
        return await self._write(lambda db: statements.kept_secret(db, name, proposal))


def _known(part: _Part | None) -> _Part:
    assert part is not None
    return part


def _opened(db: Database | None) -> Database:
    if db is None:
        raise StorageUnavailable("The registry is not open; enter the lifespan of the application first.")
    return db


def database_path(database_url: str) -> Path:
    """Return the path that a URL names: three slashes before a relative path, four before an absolute one.

    >>> database_path("sqlite:///./multiverse.db").name, database_path("sqlite:////var/lib/multiverse.db").as_posix()
    ('multiverse.db', '/var/lib/multiverse.db')

    Raises:
        SettingsError: It names none.
    """
    text = database_url.removeprefix("sqlite:///")
    if text in ("", ".", "./", "/", ":memory:"):
        raise unusable_value("database_url", database_url, "it has no file name; write sqlite:///./multiverse.db, or memory:// for a trial")
    return Path(text)


def create(settings: Settings) -> SqliteStore:
    """Make a store for the file that `database_url` names."""
    return SqliteStore(database_path(settings.database_url), secret=settings.backend_key_secret)
