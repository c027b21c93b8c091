"""The registry in an SQLite file: the default.

* One connection, used by one thread at a time off the event loop; it alone writes and checkpoints (SQLite's WAL-reset bug).
* WAL with `synchronous=FULL`: what was acknowledged is on disk. Every write is one `BEGIN IMMEDIATE`.
* Errors of SQLite become `StorageUnavailable` here and nowhere else; a broken or newer file is refused, never replaced.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import attrs
import cattrs
import msgspec
from sqlite_utils import Database, Migrations

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.health import Health, HealthState
from multiverse_gateway.core.servers import Capabilities, Metadata, Server, ServerId
from multiverse_gateway.protocols import ProbeResult, Registry
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.vault import Vault, secret_beside

HISTORY = 100
REMOVED = 1000
BUSY_SECONDS = 5.0
OPENING_TRIES = 50

SHARED = (
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
)
"""The fields of `Health` that are kept, besides its state; the others are a process's own."""

_Result = TypeVar("_Result")
_RESULT_COLUMNS = ("server_id", "generation", "passed", "checked_at", "duration", "reason", "warning", "unauthorized")

migrations = Migrations("multiverse_gateway")


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


class SqliteStore:
    """Keep the registry in one file; see the rules at the top.

    Several processes of one machine may share the file. Nothing is opened before `open()`.
    """

    def __init__(self, path: Path, *, secret: str | None = None) -> None:
        self.path = path
        self._secret = secret
        self._db: Database | None = None
        self._vault: Vault | None = None
        self._thread = anyio.CapacityLimiter(1)

    # Running on the thread

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._thread)
        except (sqlite3.Error, OSError) as error:
            raise StorageUnavailable(
                "The registry cannot be read or written now; inference goes on. Try again later; the operator finds more in the log.",
                retry_after=5.0,
            ) from error

    @property
    def _open_db(self) -> Database:
        if self._db is None:
            raise StorageUnavailable("The registry is not open; enter the lifespan of the application first.")
        return self._db

    @contextmanager
    def _transaction(self) -> Iterator[Database]:
        db = self._open_db
        db.execute("begin immediate")
        try:
            yield db
            db.execute("commit")
        except BaseException:
            if db.conn.in_transaction:
                db.execute("rollback")
            raise

    # Opening and closing

    async def open(self) -> None:
        """Create or migrate the file and check it.

        Raises:
            StorageUnavailable: It cannot be opened, is damaged, is of a newer version, or its keys cannot be decrypted; the message says
                which and what to do.
        """
        await anyio.to_thread.run_sync(self._open, limiter=self._thread)

    def _open(self) -> None:
        try:
            self._create_file()
            db = self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise self._unopenable() from error
            raise self._damaged() from error
        except OSError as error:
            raise self._unopenable() from error
        self._db = db
        self._vault = Vault(self._secret or secret_beside(self.path))
        try:
            for row in db.query("select api_key from servers where api_key is not null"):
                self._vault.unseal(row["api_key"])
        except BaseException:
            self._close()
            raise

    def _unopenable(self) -> StorageUnavailable:
        return StorageUnavailable(f"The database {self.path} cannot be opened: check its folder, its permissions and the disk")

    def _damaged(self) -> StorageUnavailable:
        backups = sorted(self.path.parent.glob(f"{self.path.name}.backup*"), key=lambda path: path.stat().st_mtime)
        remedy = f"the newest backup is {backups[-1]}" if backups else "no backup stands beside it"
        return StorageUnavailable(f"The database {self.path} is damaged and was left as it is: bring back a backup; {remedy}")

    def _create_file(self) -> None:
        if self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _connect(self) -> Database:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            db = Database(connection, execute_plugins=False)
            connection.execute("pragma journal_mode=wal")
            connection.execute("pragma synchronous=full")
            if connection.execute("pragma quick_check").fetchone()[0] != "ok":
                raise self._damaged()
            self._migrate(db)
        except BaseException:
            connection.close()
            raise
        return db

    def _migrate(self, db: Database) -> None:
        known = {"registry"}
        for tries_left in reversed(range(OPENING_TRIES)):
            try:
                newer = {migration.name for migration in migrations.applied(db)} - known
                if newer:
                    raise StorageUnavailable(
                        f"The database {self.path} is of a newer version of the gateway: update the gateway, or bring back a backup"
                    )
                migrations.apply(db)
            except (sqlite3.OperationalError, sqlite3.IntegrityError):
                if not tries_left:
                    raise
                time.sleep(0.1)
            else:
                return

    async def aclose(self) -> None:
        """Checkpoint and close."""
        await self._run(self._close)

    def _close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            try:
                db.execute("pragma wal_checkpoint(truncate)")
            finally:
                db.conn.close()

    # The registry

    async def version(self) -> int:
        """Return the number of changes so far, by anyone."""
        return await self._run(self._version)

    def _version(self) -> int:
        return int(self._open_db.execute("select value from counters where name = 'version'").fetchone()[0])

    async def load(self) -> Registry:
        """Return everything that routing needs, from one read transaction."""
        return await self._run(self._load)

    def _load(self) -> Registry:
        db = self._open_db
        db.execute("begin")
        try:
            servers = tuple(self._server(row) for row in db.query("select * from servers where removed_at is null order by registered_at"))
            active = {server.id for server in servers}
            health = {ServerId(row["server_id"]): _health(row) for row in db.query("select * from health") if row["server_id"] in active}
            return Registry(version=self._version(), servers=servers, health=health)
        finally:
            db.execute("rollback")

    async def removed(self) -> Sequence[Server]:
        """Return the removed servers, newest first."""
        query = "select * from servers where removed_at is not null order by removed_at desc limit ?"
        return await self._run(lambda: tuple(self._server(row) for row in self._open_db.query(query, [REMOVED])))

    async def save_server(self, server: Server) -> None:
        """Insert or replace a server."""
        await self._run(lambda: self._save_server(server))

    def _save_server(self, server: Server) -> None:
        row = {**attrs.asdict(server, recurse=False), "removed_at": None}
        row["api_key"] = self._sealed(server.api_key)
        row["capabilities"] = _json(attrs.asdict(server.capabilities))
        row["metadata"] = _json(attrs.asdict(server.metadata))
        with self._transaction() as db:
            db.table("servers").upsert(row, pk="id")
            _grow(db)

    async def remove_server(self, server_id: ServerId) -> bool:
        """Remove a server softly."""
        return await self._run(lambda: self._remove_server(server_id))

    def _remove_server(self, server_id: ServerId) -> bool:
        with self._transaction() as db:
            found = db.execute("update servers set removed_at = ? where id = ? and removed_at is null", [time.time(), server_id]).rowcount
            if found:
                db.execute("delete from health where server_id = ?", [server_id])
                _grow(db)
        return bool(found)

    # Health

    async def save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        """Save health and results of servers that are still there, in one transaction."""
        if changes or results:
            await self._run(lambda: self._save_health(changes, results))

    def _save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        with self._transaction() as db:
            generations = dict(db.execute("select id, generation from servers where removed_at is null").fetchall())
            before = {row["server_id"]: _health(row) for row in db.query("select * from health")}
            kept = {key: health for key, health in changes.items() if health.generation >= generations.get(key, health.generation + 1)}
            db.table("health").upsert_all(({"server_id": key, **_health_row(health)} for key, health in kept.items()), pk="server_id")
            if any(_shown(before.get(key)) != _shown(health) for key, health in kept.items()):
                _grow(db)
            db.table("results").insert_all(_result_row(result) for result in results if result.server_id in generations)
            for server_id in {result.server_id for result in results}:
                db.execute(
                    "delete from results where server_id = ? and id <= "
                    "(select id from results where server_id = ? order by id desc limit 1 offset ?)",
                    [server_id, server_id, HISTORY],
                )

    async def history(self, server_id: ServerId, limit: int) -> Sequence[ProbeResult]:
        """Return the last results, newest first; the models they listed are not kept."""
        query = "select * from results where server_id = ? order by id desc limit ?"
        return await self._run(lambda: tuple(_result(row) for row in self._open_db.query(query, [server_id, limit])))

    # For all processes

    async def claim(self, role: str, holder: str, ttl: float) -> bool:
        """Take or renew a lease, by the wall clock that the processes share."""
        return await self._run(lambda: self._claim(role, holder, ttl))

    def _claim(self, role: str, holder: str, ttl: float) -> bool:
        now = time.time()
        with self._transaction() as db:
            row = db.execute("select holder, until from leases where role = ?", [role]).fetchone()
            if row is not None and row[0] != holder and now < row[1] <= now + 10 * ttl:
                return False
            db.table("leases").upsert({"role": role, "holder": holder, "until": now + ttl}, pk="role")
        return True

    async def secret(self, name: str, proposal: str) -> str:
        """Return what is kept under the name, keeping the proposal when there is nothing yet."""
        return await self._run(lambda: self._secret_value(name, proposal))

    def _secret_value(self, name: str, proposal: str) -> str:
        with self._transaction() as db:
            db.execute("insert or ignore into secrets (name, value) values (?, ?)", [name, proposal])
            return str(db.execute("select value from secrets where name = ?", [name]).fetchone()[0])

    # Rows

    def _sealed(self, key: str | None) -> str | None:
        assert self._vault is not None
        return self._vault.seal(key)

    def _server(self, row: Mapping[str, Any]) -> Server:
        assert self._vault is not None
        facts = {name: value for name, value in row.items() if name != "removed_at"}
        facts["api_key"] = self._vault.unseal(row["api_key"])
        facts["capabilities"] = cattrs.structure(msgspec.json.decode(row["capabilities"]), Capabilities)
        facts["metadata"] = cattrs.structure(msgspec.json.decode(row["metadata"]), Metadata)
        return Server(**facts)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _grow(db: Database) -> None:
    db.execute("update counters set value = value + 1 where name = 'version'")


def _shown(health: Health | None) -> tuple[object, ...] | None:
    return None if health is None else (health.state, health.reason, health.warning, health.generation)


def _health_row(health: Health) -> dict[str, str]:
    return {"state": health.state.value, "facts": _json({name: getattr(health, name) for name in SHARED})}


def _health(row: Mapping[str, Any]) -> Health:
    facts = msgspec.json.decode(row["facts"])
    return Health(state=HealthState(row["state"]), **{**facts, "models": tuple(facts["models"])})


def _result_row(result: ProbeResult) -> dict[str, object]:
    return {name: getattr(result, name) for name in _RESULT_COLUMNS}


def _result(row: Mapping[str, Any]) -> ProbeResult:
    facts = {name: row[name] for name in _RESULT_COLUMNS}
    return ProbeResult(**{**facts, "passed": bool(row["passed"]), "unauthorized": bool(row["unauthorized"])})


def create(settings: Settings) -> SqliteStore:
    """Make a store for the file that `database_url` names."""
    return SqliteStore(Path(settings.database_url.removeprefix("sqlite:///")), secret=settings.backend_key_secret)
