"""Write log records to the console and to a file, in a thread of their own.

Writing never blocks the code that logs. When the thread cannot keep up, records are dropped and counted.
"""

import contextlib
import logging
import math
import os
import queue
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from multiverse_gateway.observability.log_records import ROOT, Entry, Note, next_number
from multiverse_gateway.observability.redaction import Redactor

if sys.platform != "win32":
    import fcntl

QUEUE_LENGTH = 10_000
FILE_BYTES = 10 << 20
OLD_FILES = 5
BATCH_SECONDS = 0.1
CLOSE_SECONDS = 2.0


class LogFile:
    """A log file that only its owner can read, and that is rotated when it is full.

    Several processes can write to the same file, in whole lines, and another program can move it away: the file is always the one that
    has the name now. All methods raise `OSError`.
    """

    def __init__(self, path: Path, *, max_bytes: int = FILE_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._descriptor: int | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._reopen()

    def write(self, lines: Iterable[str]) -> None:
        """Append lines, and rotate the file if it has become too large."""
        if not self._is_current():
            self._reopen()
        room = self._room()
        pending: list[bytes] = []
        for line in lines:
            data = line.encode("utf-8", "backslashreplace") + b"\n"
            if len(data) > room < self._max_bytes:  # an empty file takes a line of any length
                self._append(pending)
                self._rotate()
                room, pending = self._room(), []
            room -= len(data)
            pending.append(data)
        self._append(pending)

    def close(self) -> None:
        """Close the file; the next `write` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, pieces: Iterable[bytes]) -> None:
        """Append all pieces in one write where possible, so that no line of another process comes between them."""
        rest = memoryview(b"".join(pieces))
        while rest and self._descriptor is not None:
            rest = rest[os.write(self._descriptor, rest) :]

    def _is_current(self) -> bool:
        """Return whether the open file is still the one that has the name."""
        try:
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except OSError:
            return False

    def _reopen(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.close()
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # the file may belong to another user
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode) and mode & 0o007:
                os.chmod(self._path, stat.S_IMODE(mode) & ~0o007)

    def _room(self) -> float:
        """Return how many bytes still fit; a device has no limit."""
        assert self._descriptor is not None
        status = os.fstat(self._descriptor)
        return self._max_bytes - status.st_size if stat.S_ISREG(status.st_mode) else math.inf

    def _rotate(self) -> None:
        """Begin a new file, unless another process has just done so: the first process that locks the old file rotates it."""
        assert self._descriptor is not None
        if sys.platform != "win32":
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)  # until the descriptor is closed
        is_current = self._is_current()
        if sys.platform == "win32":
            self.close()  # Windows cannot rename an open file
        if is_current:
            for number in reversed(range(OLD_FILES)):
                older = self._numbered(number)
                if older.exists():
                    older.replace(self._numbered(number + 1))
        self._reopen()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path


class Writer:
    """The thread that writes, and the bounded queue in front of it."""

    def __init__(self, redactor: Redactor, line_of: Callable[[Entry], str], console: TextIO | None, file: LogFile | None) -> None:
        self._redactor = redactor
        self._line_of = line_of
        self._console = console
        self._file = file
        self._queue: deque[Note | Entry] = deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._sleeps = False
        self._closing = threading.Event()
        self._reported = 0
        self.dropped = 0
        """How many records were not written."""
        self._thread = threading.Thread(target=self._run, name="multiverse-log", daemon=True)
        self._thread.start()

    def put(self, record: Note | Entry) -> None:
        """Queue a record from any thread, or drop it if the queue is full."""
        if len(self._queue) >= QUEUE_LENGTH:
            self.dropped += 1
            return
        self._queue.append(record)
        if self._sleeps:
            self._sleeps = False
            self._wake.put(None)

    def close(self) -> None:
        """Write what is queued and stop the thread; wait `CLOSE_SECONDS` at most, because a disk can stall."""
        self._closing.set()
        self._wake.put(None)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive() and self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _run(self) -> None:
        while self._queue or not self._closing.is_set():
            self._sleeps = True
            if not self._queue:  # checked after `_sleeps` is set: a record put in between wakes the thread
                self._wake.get()
            self._sleeps = False
            self._closing.wait(BATCH_SECONDS)  # records of one burst are written together
            self._write([self._line(self._queue.popleft()) for _ in range(len(self._queue))])

    def _line(self, record: Note | Entry) -> str:
        return self._line_of(record if isinstance(record, Entry) else record.entry(self._redactor))

    def _write(self, lines: list[str]) -> None:
        if self.dropped > self._reported:
            lost, self._reported = self.dropped - self._reported, self.dropped
            message = f"{lost} log records were dropped because the disk or the console could not keep up"
            lines.append(self._line(Note(next_number(), time.time(), "WARNING", logging.WARNING, f"{ROOT}.api", message, None)))
        if self._console is not None:
            try:
                self._console.write("".join(f"{line}\n" for line in lines))
                self._console.flush()
            except (OSError, ValueError):
                self._reported += len(lines)  # the console does not work: do not report these losses on it
                self.dropped += len(lines)
        if self._file is not None:
            try:
                self._file.write(lines)
            except (OSError, ValueError):
                self.dropped += len(lines)
