"""The registry in an SQLite file: the default.

* One connection writes, on one thread at a time off the event loop, and one reads on another: who waits for a lock holds up no reader.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import attrs
from sqlite_utils import Database, Migrations

from multiverse_gateway.core.errors import AlreadyRegistered, ServerNotFound, StorageUnavailable
from multiverse_gateway.core.health import Health
from multiverse_gateway.core.servers import ClientKey, Server, ServerId
from multiverse_gateway.core.stored import StoredResponse
from multiverse_gateway.core.usage import MAX_COUNT, Usage
from multiverse_gateway.holders import is_gone, new_holder
from multiverse_gateway.protocols import ProbeResult, Registry
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.declaration import unusable_value
from multiverse_gateway.stores.copies import InUseError, alone_with, copy_to, is_locked, replace
from multiverse_gateway.stores.errors import refused, unavailable
from multiverse_gateway.stores.files import keep_private, publish
from multiverse_gateway.stores.rows import (
    BATCH_SECONDS,
    HISTORY,
    LONGEST_LEASE,
    MOST_RESPONSES,
    REMOVED,
    USAGE_COUNTS,
    USAGE_KEY,
    Dialect,
    Servers,
    adding_usage,
    bounded_counts,
    health_row,
    healths_of,
    key_of,
    key_row,
    response_of,
    result_of,
    result_row,
    server_of,
    server_row,
    shown,
    usage_of,
    usage_row,
)
from multiverse_gateway.stores.vault import Vault, key_file, open_vault

BUSY_SECONDS = 5.0
"""How long a write waits for another process."""
WAL_TRIES = 50
CHECKPOINT_COMMITS = 500
CHECKPOINT_ROLE = "checkpoint"
CHECKPOINT_SECONDS = 60.0
BACKUPS_LOOKED_AT = 20

MISSING = (
    "The database file was moved, removed or replaced while the gateway was running, so nothing can be saved; inference continues. "
    "The operator has to put the same file back, or to restart the gateway so that it uses the file that is there now."
)

_log = logging.getLogger("multiverse_gateway.registry")

REFUSALS = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError, OverflowError, UnicodeError)
"""What SQLite raises for values that it cannot hold: the same call fails again."""

_Result = TypeVar("_Result")
_Part = TypeVar("_Part")

DIALECT = Dialect(placeholder=":{}", integer="integer", least="min", most="max")
SET = "multiverse_gateway"
KNOWN = frozenset({"registry", "usage_and_keys", "browser_sessions", "daily_limits", "stored_responses", "keys_at_once"})
"""The names of our migrations."""

migrations = Migrations(SET)


@migrations()
def registry(db: Database) -> None:
    """Create the tables."""
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
    """Add the counts of use, the client keys and the owners' tokens."""
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
        {**dict.fromkeys(USAGE_KEY, str), **dict.fromkeys(USAGE_COUNTS, int)},
        pk=USAGE_KEY,
        not_null={*USAGE_KEY, *USAGE_COUNTS},
    )
    db.table("usage_batches").create({"batch": str, "at": float}, pk="batch")


@migrations()
def browser_sessions(db: Database) -> None:
    """Add the browsers' sessions."""
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
        with _transaction(db):
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
        is_missing = any(_file_id(path) != known for path, known in self._files.items())
        if is_missing is not self._is_missing:
            self._is_missing = is_missing
            message = "the database file was moved, removed or replaced" if is_missing else "the database file is back in its place"
            _log.log(logging.ERROR if is_missing else logging.WARNING, message, extra={"fields": {"path": str(self.path)}})
        if is_missing:
            raise StorageUnavailable(MISSING, retry_after=5.0)

    def _checkpoint(self, db: Database) -> None:
        """Move the journal into the file, if no other process does; that it cannot be done now is no failure of the write."""
        with suppress(sqlite3.Error):
            with _transaction(db):
                is_ours = _claimed(db, CHECKPOINT_ROLE, self._holder, CHECKPOINT_SECONDS, self._wall())
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
            self._reader = _connect(self.path)
            self._reader.execute("pragma query_only=on")
            _version(self._reader)  # opens the journal
            self._files = _file_ids(self.path)
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
        """Make the file if there is none. An empty one is not made anew: it may have held something."""
        if self.path.exists():
            return
        journal = _journal(self.path)
        if journal.exists() and journal.stat().st_size:
            raise self._refusal(f"is gone, but not its journal {journal.name}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        publish(self.path, _fill)

    def _connected(self) -> Database:
        db = _connect(self.path)
        try:
            if db.execute("pragma integrity_check(1)").fetchone()[0] != "ok":
                raise self._refusal("is damaged")
            self._migrate(db)
            _use_journal(db)
            for path in (self.path, _journal(self.path), self.path.with_name(f"{self.path.name}-shm")):
                keep_private(path)
        except BaseException:
            db.conn.close()
            raise
        return db

    def _migrate(self, db: Database) -> None:
        applied = {migration.name for migration in migrations.applied(db)}
        if not applied:
            raise self._refusal("is empty or belongs to another program")
        if applied - KNOWN:
            raise StorageUnavailable(
                f"The database {self.path} was written by a newer version of the gateway: update the gateway, or bring back a backup"
            )
        missing = KNOWN - applied
        if missing:
            before = self.path.with_name(f"{self.path.name}.before-{min(missing)}")
            copy_to(self.path, before, contents)  # one that is there already was made before the same step
            with _transaction(db):
                migrations.apply(db)

    def _vault_for(self, db: Database) -> Vault:
        """Make the vault, hold every key against it, and encrypt anew what older secrets encrypted."""
        query = "select id, api_key from servers where api_key is not null"
        sealed = {row["id"]: row["api_key"] for row in db.query(query)}
        vault = open_vault(self.path, self._secret, may_create=not sealed)
        keys = {server_id: vault.unseal(key) for server_id, key in sealed.items()}
        old = {server_id: key for server_id, key in sealed.items() if not vault.is_newest(key)}
        if old:
            with _transaction(db):
                for server_id, before in old.items():
                    db.execute(
                        "update servers set api_key = ? where id = ? and api_key = ?", [vault.seal(keys[server_id]), server_id, before]
                    )
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
        return _version(db)

    async def changed(self, within: float) -> None:
        """Return after so many seconds: the file tells nobody."""
        await anyio.sleep(within)

    async def load(self) -> Registry:
        """Return everything that routing needs, from one read transaction."""
        return await self._read(self._load)

    def _load(self, db: Database) -> Registry:
        query = "select * from servers where removed_at is null order by registered_at, id"
        servers = _known(self._servers).of(db.query(query))
        active = {server.id for server in servers}
        health = {server_id: known for server_id, known in healths_of(db.query("select * from health")) if server_id in active}
        keys = tuple(key_of(row) for row in db.query("select * from client_keys order by created_at, id"))
        sessions = dict(db.execute("select digest, until from sessions").fetchall())
        return Registry(version=_version(db), servers=servers, health=health, keys=keys, sessions=sessions)

    async def removed(self) -> Sequence[Server]:
        """Return the removed servers, newest first; their keys are forgotten."""
        query = "select * from servers where removed_at is not null order by removed_at desc limit ?"
        return await self._read(lambda db: tuple(server_of(row, _known(self._vault)) for row in db.query(query, [REMOVED])))

    async def save_server(self, server: Server) -> None:
        """Insert or replace a server.

        Raises:
            ServerNotFound: It was removed: nothing brings it back, be it a change that began before.
            AlreadyRegistered: Another server has this model and URL.
            StorageUnavailable: It cannot be saved.
        """
        row = server_row(server, _known(self._vault))
        await self._write(lambda db: _save_server(db, row))

    async def remove_server(self, server_id: ServerId) -> bool:
        """Remove a server softly; its key is forgotten."""
        return await self._write(lambda db: _remove_server(db, server_id, self._wall()))

    # Health

    async def save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        """Save health and results of servers that are still there, in one transaction."""
        if changes or results:
            await self._write(lambda db: _save_health(db, changes, results))

    async def history(self, server_id: ServerId, limit: int) -> Sequence[ProbeResult]:
        """Return the last results, newest first; the models they listed are not kept."""
        query = "select * from results where server_id = ? order by id desc limit ?"
        return await self._read(lambda db: tuple(result_of(row) for row in db.query(query, [server_id, limit])))

    # Clients

    async def save_key(self, key: ClientKey) -> None:
        """Insert or replace a client key; a revoked one stays revoked."""
        await self._write(lambda db: _save_key(db, key))

    async def open_session(self, digest: str, until: float) -> None:
        """Let a session count; those that are over are forgotten."""
        await self._write(lambda db: _open_session(db, digest, until, self._wall()))

    async def close_session(self, digest: str) -> bool:
        """Let a session count no more."""
        return await self._write(lambda db: _close_session(db, digest))

    async def add_usage(self, batch: str, rows: Sequence[Usage]) -> None:
        """Add counts, once per batch."""
        await self._write(lambda db: _add_usage(db, batch, rows, self._wall()))

    async def usage(self, since: str, until: str) -> Sequence[Usage]:
        """Return what is kept of these days."""
        query = f"select * from usage where day between ? and ? order by {', '.join(USAGE_KEY)}"  # noqa: S608  our own names
        return await self._read(lambda db: tuple(usage_of(row) for row in db.query(query, [since, until])))

    async def requests_on(self, day: str) -> Mapping[str, int]:
        """Return how many requests each client has sent on a day."""
        sums = f"cast(min({MAX_COUNT}, total({DIALECT.count('requests')})) as integer)"  # a float: the sum of integers would overflow
        query = f"select client, {sums} from usage where day = ? group by client"  # noqa: S608  our own names
        return await self._read(lambda db: dict(db.execute(query, [day]).fetchall()))

    # Stored responses

    async def save_responses(self, responses: Sequence[StoredResponse]) -> None:
        """Keep the places of responses, and delete the expired ones."""
        await self._write(lambda db: _save_responses(db, responses, self._wall()))

    async def find_response(self, key: str) -> StoredResponse | None:
        """Return the place of a response."""
        return await self._read(lambda db: next(map(response_of, db.query("select * from responses where key = ?", [key])), None))

    # For all processes

    async def claim(self, role: str, holder: str, ttl: float) -> bool:
        """Take or renew a lease, by the wall clock that the processes share; who waits for it or only asks writes nothing."""
        known = await self._read(lambda db: _holder_of(db, role, self._wall()))
        if known not in (None, holder):
            return False
        if known is None and ttl <= 0:
            return True
        return await self._write(lambda db: _claimed(db, role, holder, ttl, self._wall()))

    async def secret(self, name: str, proposal: str) -> str:
        """Return what is kept under the name, keeping the proposal when there is nothing yet."""
        return await self._write(lambda db: _kept_secret(db, name, proposal))


# On the threads


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


FileId = tuple[int, int]
"""Device and number of a file, which it keeps when it is renamed."""


def _file_id(path: Path) -> FileId | None:
    """Return what a path names now; `None` when there is nothing, or it cannot be read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _file_ids(path: Path) -> Mapping[Path, FileId]:
    """Return what the paths of an open database and its journal name; a path that names nothing is left out."""
    found = {beside: _file_id(beside) for beside in (path, _journal(path), path.with_name(f"{path.name}-shm"))}
    return {beside: known for beside, known in found.items() if known is not None}


def _known(part: _Part | None) -> _Part:
    assert part is not None
    return part


def _opened(db: Database | None) -> Database:
    if db is None:
        raise StorageUnavailable("The registry is not open; enter the lifespan of the application first.")
    return db


def _connect(path: Path, mode: str = "rw") -> Database:
    """Connect to a file that is there; `rw` falls back to reading where nothing may be written."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("pragma synchronous=full")
        connection.execute("pragma wal_autocheckpoint=0")
        return Database(connection, execute_plugins=False)
    except BaseException:
        connection.close()
        raise


def _fill(path: Path) -> None:
    """Make an empty registry of an empty file."""
    db = _connect(path)
    try:
        _use_journal(db)
        with _transaction(db):
            migrations.apply(db)
    finally:
        db.conn.close()


def _use_journal(db: Database) -> None:
    """Switch WAL on where it is not (a new file, a copy that was brought back); SQLite does not wait for the lock that this needs."""
    if db.journal_mode == "wal":
        return
    for tries_left in reversed(range(WAL_TRIES)):
        try:
            if db.execute("pragma journal_mode=wal").fetchone()[0] == "wal":
                return
            raise OSError("the file system cannot hold a database in WAL mode")
        except sqlite3.OperationalError:
            if not tries_left:
                raise
            time.sleep(BUSY_SECONDS / WAL_TRIES)


@contextmanager
def _transaction(db: Database) -> Iterator[None]:
    db.execute("begin immediate")
    try:
        yield
        db.execute("commit")
    except BaseException:
        if db.conn.in_transaction:
            db.execute("rollback")
        raise


def newest_backup(path: Path) -> Path | None:
    """Return the newest good copy of a database: beside it, named after it (`multiverse.db.backup-1`), or in the folder `backups`."""
    own = {path, key_file(path), _journal(path), path.with_name(f"{path.name}-shm")}
    found = {*path.parent.glob(f"{path.name}.*"), *path.parent.glob(f"{path.stem}-*{path.suffix}"), *(path.parent / "backups").glob("*")}
    ages = sorted(((file.stat().st_mtime, file) for file in found - own if file.is_file()), reverse=True)
    return next((file for _, file in ages[:BACKUPS_LOOKED_AT] if _is_good(file)), None)


def _is_good(path: Path) -> bool:
    try:
        contents(path)
    except StorageUnavailable:
        return False
    return True


@attrs.frozen
class Contents:
    """What a database file holds: `version` grows with each change of its registry."""

    version: int
    servers: int
    is_newer: bool
    """It was written by a newer version of the gateway."""


def contents(path: Path) -> Contents:
    """Open a database file that nobody writes to, such as a copy, check all of it, and say what it holds.

    Raises:
        StorageUnavailable: It is damaged, or no database of ours; the message says which.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            return _contents(Database(connection, execute_plugins=False), path)
    except sqlite3.Error as error:
        raise StorageUnavailable(f"{path} is damaged, or no database") from error


def _contents(db: Database, path: Path) -> Contents:
    if db.execute("pragma integrity_check(1)").fetchone()[0] != "ok":
        raise StorageUnavailable(f"{path} is damaged")
    applied = {migration.name for migration in migrations.applied(db)}
    if not applied:
        raise StorageUnavailable(f"{path} is empty, or belongs to another program")
    servers = db.execute("select count(*) from servers where removed_at is null").fetchone()[0]
    return Contents(_version(db), servers, is_newer=bool(applied - KNOWN))


def back_up(path: Path, target: Path) -> Contents | None:
    """Copy a database while others may write to it, and say what the copy holds; `None` when the target is there already.

    Raises:
        StorageUnavailable: It cannot be read, or the copy not written; the message says which.
    """
    if not path.exists():
        raise StorageUnavailable(f"There is no database {path}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        held: list[Contents] = []
        return held[0] if copy_to(path, target, lambda draft: held.append(contents(draft))) else None
    except sqlite3.Error as error:
        raise StorageUnavailable(f"The database {path} cannot be copied ({error}); is the disk full?") from error
    except OSError as error:
        raise StorageUnavailable(f"The copy {target} cannot be written: {error.strerror}") from error


def bring_back(path: Path, copy: Path, aside: Path, *, force: bool = False) -> Contents:
    """Put a copy in the place of a database, which is kept as `aside`, and say what the copy holds.

    Raises:
        StorageUnavailable: A gateway uses the database, one of the two is newer than this program, or (without `force`) changes made
            after the copy would be lost; the message says which, and nothing was changed.
    """
    wanted = contents(copy)
    if wanted.is_newer:
        raise StorageUnavailable(f"{copy} was written by a newer version of the gateway: update the gateway first")
    try:
        if path.exists() and not force:
            _refuse_newer(path, wanted)
        replace(path, copy, aside, contents)
    except InUseError:
        raise _in_use(path) from None
    except (sqlite3.Error, OSError) as error:
        raise StorageUnavailable(f"{copy} cannot be brought back: {error}") from error
    return wanted


def _refuse_newer(path: Path, copy: Contents) -> None:
    """Refuse to lose changes; a damaged database has none that could be kept."""
    with suppress(sqlite3.DatabaseError), alone_with(path) as connection:
        try:
            present = _contents(Database(connection, execute_plugins=False), path)
        except StorageUnavailable:
            return
        if present.is_newer or present.version > copy.version:
            raise StorageUnavailable(
                f"The database {path} is newer than the copy: {present.servers} servers after {present.version} changes, the copy has "
                f"{copy.servers} after {copy.version}; --force brings the copy back nevertheless, and keeps the database aside"
            )


def _in_use(path: Path) -> StorageUnavailable:
    return StorageUnavailable(f"A gateway is running on {path}: stop it first")


@contextmanager
def unused(path: Path) -> Iterator[Database]:
    """Lend a database that no gateway uses, and that none can use meanwhile.

    Raises:
        StorageUnavailable: A gateway is running on it, or it cannot be read; the message says which.
    """
    try:
        with alone_with(path) as connection:
            yield Database(connection, execute_plugins=False)
    except InUseError:
        raise _in_use(path) from None
    except sqlite3.Error as error:
        raise StorageUnavailable(f"The database {path} cannot be read") from error


def everything(path: Path, secret: str | None, tables: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of these tables of a database that no gateway uses, the servers' keys in clear text.

    Raises:
        StorageUnavailable: A gateway is running on it, or it cannot be read; the message says which.
    """
    with unused(path) as db:
        if {migration.name for migration in migrations.applied(db)} != KNOWN:
            raise StorageUnavailable(f"The database {path} is of another version: start this version of the gateway on it once")
        rows = {table: list(db.query(f"select * from {table} order by rowid")) for table in tables}  # noqa: S608  our own names
    try:
        vault = open_vault(path, secret, may_create=False)
    except OSError as error:
        raise StorageUnavailable(f"{key_file(path)} cannot be read: {error.strerror}") from error
    for row in rows["servers"]:
        row["api_key"] = vault.unseal(row["api_key"])
    if "usage" in rows:
        rows["usage"] = [bounded_counts(row) for row in rows["usage"]]
    return rows


def _version(db: Database) -> int:
    return int(db.execute("select value from counters where name = 'version'").fetchone()[0])


def _grow(db: Database) -> None:
    db.execute("update counters set value = value + 1 where name = 'version'")


def _save_server(db: Database, row: Mapping[str, Any]) -> None:
    if db.execute("select 1 from servers where id = ? and removed_at is not null", [row["id"]]).fetchone():
        raise ServerNotFound("This server was removed meanwhile; register it again")
    query = "select id from servers where model_name = ? and endpoint_url = ? and id <> ? and removed_at is null"
    other = db.execute(query, [row["model_name"], row["endpoint_url"], row["id"]]).fetchone()
    if other is not None:
        raise AlreadyRegistered(other[0])
    db.table("servers").upsert(dict(row), pk="id")
    _grow(db)


def _remove_server(db: Database, server_id: ServerId, wall: float) -> bool:
    statement = "update servers set removed_at = ?, api_key = null, owner_digest = null where id = ? and removed_at is null"
    found = db.execute(statement, [wall, server_id]).rowcount > 0
    if found:
        db.execute("delete from health where server_id = ?", [server_id])
        db.execute(
            "delete from results where server_id in "
            "(select id from servers where removed_at is not null order by removed_at desc limit -1 offset ?)",
            [REMOVED],
        )
        _grow(db)
    return found


def _save_health(db: Database, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
    generations = dict(db.execute("select id, generation from servers where removed_at is null").fetchall())
    before = dict(healths_of(db.query("select * from health")))
    kept = {key: health for key, health in changes.items() if key in generations and health.generation >= generations[key]}
    db.table("health").upsert_all([health_row(key, health) for key, health in kept.items()], pk="server_id")
    if any(shown(before.get(key)) != shown(health) for key, health in kept.items()):
        _grow(db)
    db.table("results").insert_all([result_row(result) for result in results if result.server_id in generations])
    for server_id in {result.server_id for result in results}:
        db.execute(
            "delete from results where server_id = ? and id <= "
            "(select id from results where server_id = ? order by id desc limit 1 offset ?)",
            [server_id, server_id, HISTORY],
        )


def _save_key(db: Database, key: ClientKey) -> None:
    row = key_row(key)
    revoked = db.execute("select revoked_at from client_keys where id = ? and revoked_at is not null", [key.id]).fetchone()
    db.table("client_keys").upsert(row | ({} if revoked is None else {"revoked_at": revoked[0]}), pk="id")
    _grow(db)


def _open_session(db: Database, digest: str, until: float, now: float) -> None:
    db.execute("delete from sessions where until < ?", [now])
    db.table("sessions").upsert({"digest": digest, "until": until}, pk="digest")
    _grow(db)


def _close_session(db: Database, digest: str) -> bool:
    is_closed = db.execute("delete from sessions where digest = ?", [digest]).rowcount > 0
    if is_closed:
        _grow(db)
    return is_closed


def _add_usage(db: Database, batch: str, rows: Sequence[Usage], now: float) -> None:
    db.execute("delete from usage_batches where at < ?", [now - BATCH_SECONDS])
    if db.execute("insert or ignore into usage_batches (batch, at) values (?, ?)", [batch, now]).rowcount == 0:
        return
    statement = adding_usage(DIALECT)
    for row in rows:
        db.execute(statement, usage_row(row))


def _save_responses(db: Database, responses: Sequence[StoredResponse], now: float) -> None:
    db.table("responses").upsert_all([attrs.asdict(response) for response in responses], pk="key")
    db.execute(
        "delete from responses where until < ? or key in (select key from responses order by until desc limit -1 offset ?)",
        [now, MOST_RESPONSES],
    )


def _holder_of(db: Database, role: str, now: float) -> str | None:
    """Return the holder of a lease; `None` if it has expired or its process is dead."""
    row = db.execute("select holder, until from leases where role = ?", [role]).fetchone()
    if row is None or not now < row[1] <= now + LONGEST_LEASE or is_gone(row[0]):
        return None
    return str(row[0])


def _claimed(db: Database, role: str, holder: str, ttl: float, now: float) -> bool:
    if _holder_of(db, role, now) not in (None, holder):
        return False
    db.table("leases").upsert({"role": role, "holder": holder, "until": now + ttl}, pk="role")
    return True


def _kept_secret(db: Database, name: str, proposal: str) -> str:
    db.execute("insert or ignore into secrets (name, value) values (?, ?)", [name, proposal])
    return str(db.execute("select value from secrets where name = ?", [name]).fetchone()[0])


def database_path(database_url: str) -> Path:
    """Return the path that a URL names: three slashes before a relative path, four before an absolute one.

    >>> database_path("sqlite:///./multiverse.db").name, database_path("sqlite:////var/lib/multiverse.db").as_posix()
    ('multiverse.db', '/var/lib/multiverse.db')

    Raises:
        SettingsError: It names none.
    """
    text = database_url.removeprefix("sqlite:///")
    if text in ("", ".", "./", "/", ":memory:"):
        raise unusable_value("database_url", database_url, "it names no file; write sqlite:///./multiverse.db, or memory:// for a trial")
    return Path(text)


def create(settings: Settings) -> SqliteStore:
    """Make a store for the file that `database_url` names."""
    return SqliteStore(database_path(settings.database_url), secret=settings.backend_key_secret)
