"""One record per event, as text or JSON, to the console, a file and a tail in memory.

1. Writing never blocks who logs: a thread writes, and when it cannot keep up, records are dropped and counted.
2. Secrets are taken out before anything is cut or written; control characters cannot forge lines or move a terminal's cursor.
3. Loggers are called `multiverse_gateway.<component>`; facts go into `extra={"fields": {...}}`, not into the message.

    logs = configure(settings)
    logging.getLogger("multiverse_gateway.registry").info("server registered", extra={"fields": {"model": "tiny"}})
    logs.close()
"""

import contextlib
import itertools
import json
import logging
import math
import os
import queue
import re
import stat
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import attrs
import msgspec

from multiverse_gateway.settings import Settings

if sys.platform != "win32":
    import fcntl

ROOT = "multiverse_gateway"
MASK = "[secret]"
MAX_VALUE = 256
MAX_MESSAGE = 1024
MAX_TRACEBACK = 16_384
MAX_SCANNED = 65_536
TAIL_LENGTH = 2_000
QUEUE_LENGTH = 10_000
FILE_BYTES = 10 << 20
OLD_FILES = 5
BATCH_SECONDS = 0.1
CLOSE_SECONDS = 2.0
MIN_SECRET_LENGTH = 6
MAX_REMEMBERED = 64
REMEMBERED = 4096

_SHAPES = re.compile(
    r"(?P<bearer>(?i:bearer)\s+)[^\s\"',;]+"
    r"|(?P<header>(?i:x-api-key)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+"
    r"|(?P<user>://[^/\s:@]*:)[^/\s@]+(?=@)"
    r"|\bsk-[A-Za-z0-9_-]{6,}"
    r"|\bmvg-[a-z]+-[A-Za-z0-9_-]{16,}"
)
_PLAIN = frozenset({int, float, bool, type(None)})
_ODD = re.compile(r'[\s"=]')
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")


@attrs.define
class Redactor:
    """Take keys out of texts: those it was told, and what looks like one."""

    _known: set[str] = attrs.field(factory=set, repr=False)
    _compiled: tuple[int, re.Pattern[str]] | None = attrs.field(default=None, init=False, repr=False)
    """How many secrets the pattern knows, and the pattern: made at the first text after the last secret, for a start learns thousands."""
    cleaned: dict[str, str] = attrs.field(factory=dict, init=False, repr=False)
    """Short texts and what `clean` made of them: nearly all that is logged was logged before."""

    def add(self, secret: str) -> None:
        """Learn a secret, also as JSON and `repr` write it; one shorter than six characters would black out words, and is left."""
        if len(secret) >= MIN_SECRET_LENGTH and secret not in self._known:
            self._known.add(secret)
            self.cleaned = {}  # what a thread adds to the old one now is not read again

    def _pattern(self) -> re.Pattern[str]:
        compiled = self._compiled  # read once: another thread may put an older one there
        if compiled is not None and compiled[0] == len(self._known):
            return compiled[1]
        secrets = list(self._known)
        forms = {form for secret in secrets for form in (secret, *_quotings(secret))}
        longest_first = sorted(forms, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._compiled = len(secrets), pattern
        return pattern

    def known(self) -> Iterable[str]:
        """Return what it was told."""
        return list(self._known)

    def __call__(self, text: str) -> str:
        """Return the text without secrets."""
        if self._known:
            text = self._pattern().sub(MASK, text)
        if text.isalnum():  # each shape has a blank, a colon or a dash
            return text
        return _SHAPES.sub(lambda match: (match["bearer"] or match["header"] or match["user"] or "") + MASK, text)


def _quotings(secret: str) -> Iterable[str]:
    """Return a secret as it stands in JSON, in JSON within JSON, and in `repr`."""
    once = json.dumps(secret)[1:-1]
    return once, json.dumps(once)[1:-1], repr(secret)[1:-1]


def redact(secret: str | None) -> None:
    """Keep a secret, such as a server's key, out of every log that is configured in this process."""
    if secret:
        for door in _doors:
            door.redactor.add(secret)


_OURS = logging.getLogger(ROOT)
_doors: list["_Door"] = []
"""The doors of all logs that are configured in this process; replaced, never changed."""
_numbers = itertools.count(1)


def note(logger: logging.Logger, message: str, fields: Mapping[str, object], wall: float) -> None:
    """Log at level INFO at the instant `wall`, in a fraction of the time that `Logger.info` takes: what is left out matters to others only.

    Not asked is whether the level is wanted: `fields` would be made in vain, so the caller has asked. They must not change any more.
    """
    if logging.root.handlers or logger.handlers or logger.filters or _OURS.handlers != _doors:
        logger.info(message, extra={"fields": fields})
        return
    written = Note(next(_numbers), wall, "INFO", logging.INFO, logger.name, message, fields)
    for door in _doors:
        door.take(written)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def clean(text: str, redactor: Redactor, limit: int = MAX_VALUE) -> str:
    r"""Return a text fit for a log: without secrets, control characters escaped, cut at `limit`.

    >>> clean("one\ntwo \x1b[31m", Redactor())
    'one\\ntwo \\x1b[31m'
    """
    memo = redactor.cleaned
    known = memo.get(text)
    if known is None:
        known = redactor(text[:MAX_SCANNED])
        if not (known.isascii() and known.isprintable()):
            known = _CONTROL.sub(_escape, known)
        if len(text) <= MAX_REMEMBERED:
            if len(memo) >= REMEMBERED:
                memo.clear()
            memo[text] = known
    return known if len(known) <= limit else known[: limit - 1] + "…"


@attrs.frozen(kw_only=True)
class Entry:
    """One record as it may be shown: cleaned; `number` grows with each, `time` is epoch seconds."""

    number: int
    time: float
    level: str
    severity: int
    component: str
    message: str
    fields: Mapping[str, object]
    traceback: str | None = None

    @property
    def instant(self) -> str:
        """The time in ISO 8601 with zone."""
        second = int(self.time)
        return f"{_second(second)}.{int(1000 * (self.time - second)):03d}+00:00"

    def as_json(self) -> dict[str, object]:
        """Return it as the admin API and the JSON format have it; no field can stand in for one of ours."""
        own: dict[str, object] = {"time": self.instant, "level": self.level, "component": self.component, "message": self.message}
        if self.traceback is not None:
            own["traceback"] = self.traceback
        if own.keys().isdisjoint(self.fields):
            return {**own, **self.fields}
        return own | {f"{name}_" if name in own else name: value for name, value in self.fields.items()}

    def as_text(self) -> str:
        """Return it as the text format has it: one line, and the lines of the traceback behind a bar."""
        words = "".join(f" {name}={_quoted(value)}" for name, value in self.fields.items() if value is not None)
        line = f"{self.instant} {self.level:<8} {self.component:<8} {self.message}{words}"
        return line if self.traceback is None else "\n".join([line, *(f"  | {part}" for part in self.traceback.splitlines())])

    def mentions(self, text: str) -> bool:
        """Tell whether the text, in lower case, stands anywhere in it."""
        parts = (self.message, self.traceback or "", *(f"{name}={value}" for name, value in self.fields.items()))
        return any(text in part.lower() for part in parts)


@lru_cache(maxsize=4)
def _second(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _quoted(value: object) -> str:
    if type(value) in _PLAIN:
        return str(value).lower()
    text = str(value)
    return text if text.isalnum() or (text and not _ODD.search(text)) else json.dumps(text, ensure_ascii=False)


class Note:
    """One record as it was given: to be cleaned before anybody sees it."""

    __slots__ = ("fields", "level", "message", "name", "number", "severity", "time")

    def __init__(self, number: int, time: float, level: str, severity: int, name: str, message: str, fields: object) -> None:
        self.number = number
        self.time = time
        self.level = level
        self.severity = severity
        self.name = name
        self.message = message
        self.fields = fields

    def entry(self, redactor: Redactor, traceback: str | None = None) -> Entry:
        """Return it cleaned."""
        given = self.fields
        return Entry(
            number=self.number,
            time=self.time,
            level=self.level,
            severity=self.severity,
            component=clean(_component(self.name), redactor, 32),
            message=clean(self.message, redactor, MAX_MESSAGE),
            fields=_fields(given, redactor) if isinstance(given, Mapping) else {},
            traceback=traceback,
        )


@lru_cache(maxsize=64)
def _component(name: str) -> str:
    return name.removeprefix(f"{ROOT}.").partition(".")[0]


def _fields(given: Mapping[object, object], redactor: Redactor) -> dict[str, object]:
    fields = {}
    for name, value in given.items():
        known = name if isinstance(name, str) and name.isidentifier() else clean(str(name), redactor, 64)
        fields[known] = value if type(value) in _PLAIN else clean(str(value), redactor)
    return fields


def read_record(record: logging.LogRecord, redactor: Redactor) -> Note | Entry:
    """Read a record of the standard library; what refers to live objects (an exception's frames, arguments) is cleaned now."""
    given = getattr(record, "fields", None)
    read = Note(next(_numbers), record.created, record.levelname, record.levelno, record.name, _message(record), given)
    return read.entry(redactor, _traceback(record, redactor)) if record.exc_info or record.args else read


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):
        return str(record.msg)


def _traceback(record: logging.LogRecord, redactor: Redactor) -> str | None:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return None
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(clean(line, redactor, 1024) for line in lines)[-MAX_TRACEBACK:]


class Tail:
    """The last records, for the logs page; kept raw and read only when somebody looks."""

    def __init__(self, redactor: Redactor, length: int = TAIL_LENGTH) -> None:
        self._redactor = redactor
        self.records: deque[Note | Entry] = deque(maxlen=length)
        """As they were given, the latest last."""

    def entries(
        self,
        *,
        level: str | None = None,
        component: str | None = None,
        text: str | None = None,
        since: float | None = None,
        after: int | None = None,
        limit: int = 200,
    ) -> list[Entry]:
        """Return the newest records first.

        `level` is the least one, `text` is looked for in all parts without regard to case, `since` is epoch seconds, and `after` is
        the number of the last entry that the caller has seen.

        Raises:
            ValueError: There is no such level.
        """
        least = 0 if level is None else level_number(level)
        wanted = None if text is None else text.lower()
        found: list[Entry] = []
        for record in reversed(list(self.records)):
            if (after is not None and record.number <= after) or len(found) >= limit:
                break
            if record.severity < least:
                continue
            entry = record if isinstance(record, Entry) else record.entry(self._redactor)
            if since is not None and entry.time < since:
                continue
            if component not in (None, entry.component) or (wanted is not None and not entry.mentions(wanted)):
                continue
            found.append(entry)
        return found

    def select(
        self,
        *,
        level: str | None,
        component: str | None,
        text: str | None,
        since: float | None,
        limit: int,
        after: int | None = None,
    ) -> list[dict[str, object]]:
        """Return what `entries` does, as the admin API shows it."""
        found = self.entries(level=level, component=component, text=text, since=since, after=after, limit=limit)
        return [{"number": entry.number, **entry.as_json()} for entry in found]


def level_number(level: str) -> int:
    """Return the number of a level by its name.

    Raises:
        ValueError: There is no such level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError("level must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL")
    return number


class _Door(logging.Handler):
    """Take records in on any thread, at the price of two appends."""

    def __init__(self, redactor: Redactor, tail: Tail, writer: "_Writer | None") -> None:
        super().__init__()
        self.redactor = redactor
        self._records = tail.records
        self.writer = writer

    def createLock(self) -> None:  # noqa: N802  the standard library's name
        """Have no lock: appending to a deque and putting into a queue need none."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Take a record in without a lock."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Take in a record of the standard library."""
        self.take(read_record(record, self.redactor))

    def take(self, record: Note | Entry) -> None:
        """Keep a record and hand it to the writer."""
        self._records.append(record)
        if self.writer is not None:
            self.writer.put(record)


class _File:
    """A file that only its owner may read, and that gives way to a new one when it is full.

    Several processes may write to it, whole lines each, and others may move it away: the name is what counts. Methods raise `OSError`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._reopen()

    def write(self, lines: Iterable[str]) -> None:
        """Append lines."""
        if not self._is_current():
            self._reopen()
        room = self._room()
        waiting: list[bytes] = []
        for line in lines:
            data = line.encode("utf-8", "backslashreplace") + b"\n"
            if len(data) > room < FILE_BYTES:  # an empty file takes a line of any length
                self._append(waiting)
                self._rotate()
                room, waiting = self._room(), []
            room -= len(data)
            waiting.append(data)
        self._append(waiting)

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, pieces: Iterable[bytes]) -> None:
        """Write at once, so that no line of another process comes between."""
        left = memoryview(b"".join(pieces))
        while left and self._descriptor is not None:
            left = left[os.write(self._descriptor, left) :]

    def _is_current(self) -> bool:
        """Tell whether the open file still has the name."""
        try:
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except OSError:
            return False

    def _reopen(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.close()
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # somebody else's file
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode) and mode & 0o007:
                os.chmod(self._path, stat.S_IMODE(mode) & ~0o007)

    def _room(self) -> float:
        """Return the bytes that still fit; a device takes everything."""
        assert self._descriptor is not None
        status = os.fstat(self._descriptor)
        return FILE_BYTES - status.st_size if stat.S_ISREG(status.st_mode) else math.inf

    def _rotate(self) -> None:
        """Give way to a new file, unless another process has just done so: of those that lock the old one the first does it."""
        assert self._descriptor is not None
        if sys.platform != "win32":
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)  # until it is closed
        is_ours = self._is_current()
        if sys.platform == "win32":
            self.close()  # Windows renames no open file
        if is_ours:
            for number in reversed(range(OLD_FILES)):
                older = self._old(number)
                if older.exists():
                    older.replace(self._old(number + 1))
        self._reopen()

    def _old(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path


class _Writer:
    """The thread that writes, and the bounded queue before it."""

    def __init__(self, redactor: Redactor, line_of: Callable[[Entry], str], console: TextIO | None, file: _File | None) -> None:
        self._redactor = redactor
        self._line_of = line_of
        self._console = console
        self._file = file
        self._queue: deque[Note | Entry] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._sleeps = False
        self._closing = threading.Event()
        self._reported = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="multiverse-log", daemon=True)
        self._thread.start()

    def put(self, record: Note | Entry) -> None:
        """Queue a record, or drop it."""
        if len(self._queue) >= QUEUE_LENGTH:
            self.dropped += 1
            return
        self._queue.append(record)
        if self._sleeps:
            self._sleeps = False
            self._bell.put(None)

    def close(self) -> None:
        """Write what is queued and end; a disk that stalls is not waited for."""
        self._closing.set()
        self._bell.put(None)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive() and self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _run(self) -> None:
        while self._queue or not self._closing.is_set():
            self._sleeps = True
            if not self._queue:  # asked after the word that we sleep, so that nobody forgets to ring
                self._bell.get()
            self._sleeps = False
            self._closing.wait(BATCH_SECONDS)  # a burst is written at once
            self._write([self._line(self._queue.popleft()) for _ in range(len(self._queue))])

    def _line(self, record: Note | Entry) -> str:
        return self._line_of(record if isinstance(record, Entry) else record.entry(self._redactor))

    def _write(self, lines: list[str]) -> None:
        if self.dropped > self._reported:
            lost, self._reported = self.dropped - self._reported, self.dropped
            words = f"{lost} log records were dropped: the disk or the console does not keep up"
            lines.append(self._line(Note(next(_numbers), time.time(), "WARNING", logging.WARNING, f"{ROOT}.api", words, None)))
        if self._console is not None:
            try:
                self._console.write("".join(f"{line}\n" for line in lines))
                self._console.flush()
            except (OSError, ValueError):
                self._reported += len(lines)  # nobody reads it: no use to say so there
                self.dropped += len(lines)
        if self._file is not None:
            try:
                self._file.write(lines)
            except (OSError, ValueError):
                self.dropped += len(lines)


@attrs.frozen
class Logs:
    """What `configure` set up."""

    tail: Tail
    _door: _Door
    _before: int

    @property
    def dropped(self) -> int:
        """The number of records that were not written, because the writer could not keep up or the disk is full."""
        return 0 if self._door.writer is None else self._door.writer.dropped

    def redact(self, secret: str) -> None:
        """Keep a secret out of the log."""
        self._door.redactor.add(secret)

    def close(self) -> None:
        """Write what is queued, for two seconds at most, and log nothing more; idempotent."""
        global _doors
        if self._door not in _doors:
            return
        _doors = [door for door in _doors if door is not self._door]
        _OURS.removeHandler(self._door)
        _OURS.setLevel(self._before)
        if self._door.writer is not None:
            self._door.writer.close()


def configure(settings: Settings, *, outputs: bool = True, console: TextIO | None = None) -> Logs:
    """Begin to log as the settings say; `console` is standard error by default.

    Without `outputs` only the tail is kept: for an application that has its own logging. The console and the file are also left to
    whoever configured them first in this process.

    Raises:
        OSError: The log file cannot be opened.
    """
    global _doors
    redactor = Redactor()
    for secret in (*_secrets(settings), *(secret for door in _doors for secret in door.redactor.known())):
        redactor.add(secret)
        redact(secret)  # who was there first writes our records, too
    tail = Tail(redactor)
    writer = None
    if outputs and all(door.writer is None for door in _doors):
        file = _File(Path(settings.log_file)) if settings.log_file else None
        writer = _Writer(redactor, _LINES[settings.log_format], console or sys.stderr, file)
    door = _Door(redactor, tail, writer)
    logs = Logs(tail, door, _OURS.level)
    _doors = [*_doors, door]
    _OURS.addHandler(door)
    _OURS.setLevel(settings.log_level)
    return logs


def _as_json_line(entry: Entry) -> str:
    return msgspec.json.encode(entry.as_json()).decode()


_LINES: Mapping[str, Callable[[Entry], str]] = {"text": Entry.as_text, "json": _as_json_line}


def _secrets(settings: Settings) -> Iterable[str]:
    given: tuple[Any, ...] = (settings.admin_api_key, *settings.client_api_keys, *(settings.backend_key_secret or "").split(","))
    return (secret for secret in given if secret)
