"""Connections to an SQLite file, its transactions, and what its path and that of its journal name.

WAL with `synchronous=FULL`: what was committed is on disk. Every write is one `BEGIN IMMEDIATE`. No connection checkpoints by itself.
"""

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlite_utils import Database

BUSY_SECONDS = 5.0
"""How long a write waits for another process."""
WAL_TRIES = 50


def journal_of(path: Path) -> Path:
    """Return the path of a database's write-ahead log."""
    return path.with_name(f"{path.name}-wal")


FileId = tuple[int, int]
"""Device and number of a file, which it keeps when it is renamed."""


def file_id(path: Path) -> FileId | None:
    """Return what a path names now; `None` when there is nothing, or it cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def file_ids(path: Path) -> Mapping[Path, FileId]:
    """Return what the paths of an open database and its journal name; a path that names nothing is left out."""
    ids = {beside: file_id(beside) for beside in (path, journal_of(path), path.with_name(f"{path.name}-shm"))}
    return {beside: file for beside, file in ids.items() if file is not None}


def connect(path: Path, mode: str = "rw") -> Database:
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


def use_journal(db: Database) -> None:
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
def transaction(db: Database) -> Iterator[None]:
    """Commit what the block does, or none of it; the lock for writing is taken at once."""
    db.execute("begin immediate")
    try:
        yield
        db.execute("commit")
    except BaseException:
        if db.conn.in_transaction:
            db.execute("rollback")
        raise
