"""Files that appear whole or not at all, and are their owner's alone."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Lend an empty file beside `path`, with mode 0600, that the block fills and gives a name; otherwise it is removed.

    After the block the names in the folder are durable.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def publish(path: Path, write: Callable[[Path], None]) -> bool:
    """Make a file that is not there yet: `write` fills a draft, which then gets the name; false when another process was faster.

    No reader ever sees a part of the file, and after a power cut the file is complete or missing. Its mode is 0600.

    Raises:
        OSError: It cannot be written.
    """
    with draft_of(path) as draft:
        write(draft)
        sync_file(draft)
        return _name(draft, path)


def replace_file(path: Path, data: bytes) -> None:
    """Replace the content of a file: readers see the old or the new content, also after a power cut. Its mode is 0600.

    Raises:
        OSError: It cannot be written.
    """
    with draft_of(path) as draft:
        draft.write_bytes(data)
        sync_file(draft)
        draft.replace(path)


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
    """Make a file accessible only to its owner, if this process owns it."""
    with suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
