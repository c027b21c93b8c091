"""Files that appear whole or not at all, and are their owner's alone."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def publish(path: Path, write: Callable[[Path], None]) -> bool:
    """Make a file that is not there yet: `write` fills a draft beside it, which then gets its name; false when somebody was faster.

    Whoever sees the file sees all of it, and after a power cut it is there or not. Its mode is 0600.

    Raises:
        OSError: It cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        is_ours = _name(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
    return is_ours


def replace_file(path: Path, data: bytes) -> None:
    """Write a file anew: whoever reads it sees the old or the new content, also after a power cut. Its mode is 0600.

    Raises:
        OSError: It cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def _name(draft: Path, path: Path) -> bool:
    """Give the draft its name, never replacing a file."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        draft.rename(path)
    return True


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        with _opened(folder) as handle:
            os.fsync(handle)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def keep_private(path: Path) -> None:
    """Take a file away from everybody but its owner, if it is ours."""
    with suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
