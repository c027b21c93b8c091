"""Copies of an SQLite database, made and restored while others may be writing: what an operator does, and what a migration keeps.

1. SQLite itself copies, from one read transaction: the copy is what was committed at one moment, whatever is written meanwhile.
2. A copy is opened and checked before it gets its name; its mode is 0600. It is one file, without a journal beside it.
3. What a copy replaces is kept aside. At every moment there is a whole database under the name: the old one or the new one.
"""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
from sqlite_utils import Database

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.stores.files import draft_of, publish, sync_file
from multiverse_gateway.stores.rows import bounded_counts
from multiverse_gateway.stores.sqlite_connection import journal_of
from multiverse_gateway.stores.sqlite_schema import state_of
from multiverse_gateway.stores.sqlite_statements import version_of
from multiverse_gateway.stores.vault import key_file, open_vault

BACKUPS_LOOKED_AT = 20
LOCK_SECONDS = 1.0
"""How long a database that is to be replaced may be in use: what only looks at it is gone by then."""


class InUseError(Exception):
    """Another program has the database open."""


def copy_to(source: Path, target: Path, check: Callable[[Path], object]) -> bool:
    """Copy a database to a file that is not there yet; false when there is one. `check` raises what is wrong with the copy.

    Raises:
        sqlite3.Error: The source cannot be read.
        OSError: The copy cannot be written.
    """

    def write(draft: Path) -> None:
        _copy(source, draft)
        check(draft)

    return publish(target, write)


def _copy(source: Path, target: Path) -> None:
    with closing(_reading(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
        new.execute("pragma journal_mode=delete")


def _reading(path: Path) -> sqlite3.Connection:
    """Connect for reading; transactions that are still in the journal are read too."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={'rw' if os.access(path, os.W_OK) else 'ro'}", uri=True)


def replace(path: Path, copy: Path, aside: Path, check: Callable[[Path], object]) -> None:
    """Put a copy in the place of a database that is not in use; what was there is kept under the name `aside`.

    Raises:
        InUseError: Another program has it open; nothing was changed.
        sqlite3.Error: The copy cannot be read.
        OSError: Something cannot be written.
    """
    with draft_of(path) as draft:
        _copy(copy, draft)
        check(draft)
        sync_file(draft)
        if path.exists():
            with suppress(sqlite3.DatabaseError), exclusive_connection(path) as db:
                db.execute("pragma journal_mode=delete")
            _keep(path, aside)
        _keep_journal(path, aside)
        os.replace(draft, path)


def _keep(path: Path, aside: Path) -> None:
    """Give a file a second name."""
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        shutil.copy2(path, aside)


def _keep_journal(path: Path, aside: Path) -> None:
    """Rename a journal that is still there, also one whose database is gone: SQLite would read it as that of the copy."""
    for suffix in ("-wal", "-shm"):
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.replace(aside.with_name(aside.name + suffix))


def is_locked(error: sqlite3.Error) -> bool:
    """Return whether SQLite reports that another connection holds a lock; extended codes have more bits above the lowest eight."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextmanager
def exclusive_connection(path: Path) -> Iterator[sqlite3.Connection]:
    """Lend a connection to a database that no other program has open.

    Raises:
        InUseError: Another program has.
        sqlite3.DatabaseError: It is damaged.
    """
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_SECONDS, isolation_level=None)) as db:
        try:
            db.execute("pragma locking_mode=exclusive")
            db.execute("begin exclusive")
            db.execute("commit")
        except sqlite3.OperationalError as error:
            if is_locked(error):
                raise InUseError from None
            raise
        yield db


# What an operator does


def newest_backup(path: Path) -> Path | None:
    """Return the newest good copy of a database: beside it, named after it (`multiverse.db.backup-1`), or in the folder `backups`."""
    own = {path, key_file(path), journal_of(path), path.with_name(f"{path.name}-shm")}
    files = {*path.parent.glob(f"{path.name}.*"), *path.parent.glob(f"{path.stem}-*{path.suffix}"), *(path.parent / "backups").glob("*")}
    ages = sorted(((file.stat().st_mtime, file) for file in files - own if file.is_file()), reverse=True)
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
    """Open a database file that is not being written, such as a copy, check all of it, and return what it holds.

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
    state = state_of(db)
    if not state.is_ours:
        raise StorageUnavailable(f"{path} is empty, or belongs to another program")
    servers = db.execute("select count(*) from servers where removed_at is null").fetchone()[0]
    return Contents(version_of(db), servers, is_newer=state.is_newer)


def back_up(path: Path, target: Path) -> Contents | None:
    """Copy a database while others may write to it, and return what the copy holds; `None` when the target is there already.

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


def restore(path: Path, copy: Path, aside: Path, *, force: bool = False) -> Contents:
    """Put a copy in the place of a database, which is kept as `aside`, and return what the copy holds.

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
    with suppress(sqlite3.DatabaseError), exclusive_connection(path) as connection:
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
def exclusive_access(path: Path) -> Iterator[Database]:
    """Lend a database that no gateway uses, and that none can use meanwhile.

    Raises:
        StorageUnavailable: A gateway is running on it, or it cannot be read; the message says which.
    """
    try:
        with exclusive_connection(path) as connection:
            yield Database(connection, execute_plugins=False)
    except InUseError:
        raise _in_use(path) from None
    except sqlite3.Error as error:
        raise StorageUnavailable(f"The database {path} cannot be read") from error


def _order_of(table: str) -> str:
    """Return how the rows of a table are read in the order in which they were written; usage counts have the order of their key."""
    return "" if table == "usage" else " order by rowid"


def dump_tables(path: Path, secret: str | None, tables: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of these tables of a database that no gateway uses, the servers' keys in clear text.

    Raises:
        StorageUnavailable: A gateway is running on it, or it cannot be read; the message says which.
    """
    with exclusive_access(path) as db:
        if not state_of(db).is_current:
            raise StorageUnavailable(f"The database {path} is of another version: start this version of the gateway on it once")
        rows = {table: list(db.query(f"select * from {table}{_order_of(table)}")) for table in tables}  # noqa: S608  our own names
    try:
        vault = open_vault(path, secret, may_create=False)
    except OSError as error:
        raise StorageUnavailable(f"{key_file(path)} cannot be read: {error.strerror}") from error
    for row in (row for table in rows.values() for row in table if "api_key" in row):
        row["api_key"] = vault.unseal(row["api_key"])
    if "usage" in rows:
        rows["usage"] = [bounded_counts(row) for row in rows["usage"]]
    return rows
