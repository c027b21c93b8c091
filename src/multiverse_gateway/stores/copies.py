"""Copies of a database, made and brought back while others may be writing.

1. SQLite itself copies, from one read transaction: the copy is what was committed at one moment, whatever is written meanwhile.
2. A copy is opened and checked before it gets its name; its mode is 0600. It is one file, without a journal beside it.
3. What a copy replaces is kept aside. At every moment there is a whole database under the name: the old one or the new one.
"""

import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from multiverse_gateway.stores.files import publish, sync_folder

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
    """Connect for reading; a journal of transactions that nobody moved into the file yet is read too."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={'rw' if os.access(path, os.W_OK) else 'ro'}", uri=True)


def replace(path: Path, copy: Path, aside: Path, check: Callable[[Path], object]) -> None:
    """Put a copy in the place of a database that nobody uses; what was there is kept under the name `aside`.

    Raises:
        InUseError: Another program has it open; nothing was changed.
        sqlite3.Error: The copy cannot be read.
        OSError: Something cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        _copy(copy, draft)
        check(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            with suppress(sqlite3.DatabaseError), alone_with(path) as db:
                db.execute("pragma journal_mode=delete")
            _keep(path, aside)
        _keep_journal(path, aside)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


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
def alone_with(path: Path) -> Iterator[sqlite3.Connection]:
    """Lend a connection to a database that nobody else has open.

    Raises:
        InUseError: Somebody has.
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
