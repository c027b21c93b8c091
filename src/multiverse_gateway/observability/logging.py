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
BATCH_SECONDS = 0.02
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
_PLAIN = (int, float, type(None))
_ODD = re.compile(r'[\s"=]')
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")


@attrs.define
class Redactor:
    """Take keys out of texts: those it was told, and what looks like one."""

    _known: set[str] = attrs.field(factory=set, repr=False)
    _compiled: tuple[int, re.Pattern[str]] | None = attrs.field(default=None, init=False, repr=False)
    """How many secrets the pattern knows, and the pattern: made at the first text after the last secret, for a start learns thousands."""
    _memo: dict[str, str] = attrs.field(factory=dict, init=False, repr=False)
    """Short texts and what became of them: nearly all that is logged was logged before."""

    def add(self, secret: str) -> None:
        """Learn a secret, also as JSON and `repr` write it; one shorter than six characters would black out words, and is left."""
        if len(secret) >= MIN_SECRET_LENGTH and secret not in self._known:
            self._known.add(secret)
            self._memo = {}  # what a thread adds to the old one now is not read again

    def _pattern(self) -> re.Pattern[str]:
        secrets = list(self._known)
        if self._compiled is not None and self._compiled[0] == len(secrets):
            return self._compiled[1]
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
        memo = self._memo
        known = memo.get(text)
        if known is None:
            known = self._redacted(text)
            if len(text) <= MAX_REMEMBERED:
                if len(memo) >= REMEMBERED:
                    memo.clear()
                memo[text] = known
        return known

    def _redacted(self, text: str) -> str:
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
        for handler in logging.getLogger(ROOT).handlers:
            if isinstance(handler, _Door):
                handler.redactor.add(secret)


_BLANK = vars(logging.LogRecord("", logging.INFO, "", 0, "", (), None))


def note(logger: logging.Logger, message: str, fields: Mapping[str, object]) -> None:
    """Log at level INFO, in a tenth of the time that `Logger.info` takes, which looks for its caller, thread and process.

    Not asked is whether the level is wanted: `fields` would be made in vain, so the caller has asked.
    """
    record = logging.LogRecord.__new__(logging.LogRecord)
    created = time.time()
    vars(record).update(_BLANK, name=logger.name, msg=message, created=created, msecs=created % 1 * 1000, fields=fields)
    logger.handle(record)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def clean(text: str, redactor: Callable[[str], str], limit: int = MAX_VALUE) -> str:
    r"""Return a text fit for a log: without secrets, control characters escaped, cut at `limit`.

    >>> clean("one\ntwo \x1b[31m", Redactor())
    'one\\ntwo \\x1b[31m'
    """
    text = redactor(text[:MAX_SCANNED])
    if not (text.isascii() and text.isprintable()):
        text = _CONTROL.sub(_escape, text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


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
        second, fraction = divmod(self.time, 1)
        return f"{_second(int(second))}.{int(1000 * fraction):03d}+00:00"

    def as_json(self) -> dict[str, object]:
        """Return it as the admin API and the JSON format have it; no field can stand in for one of ours."""
        own: dict[str, object] = {"time": self.instant, "level": self.level, "component": self.component, "message": self.message}
        if self.traceback is not None:
            own["traceback"] = self.traceback
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
    if isinstance(value, int | float):
        return str(value).lower()
    text = str(value)
    return text if text and not _ODD.search(text) else json.dumps(text, ensure_ascii=False)


def entry_of(record: logging.LogRecord, number: int, redactor: Callable[[str], str]) -> Entry:
    """Read a record of the standard library."""
    given = getattr(record, "fields", None)
    fields: dict[str, object] = {}
    for name, value in given.items() if isinstance(given, Mapping) else ():
        known = str(name)
        fields[known if known.isidentifier() else clean(known, redactor, 64)] = _value(value, redactor)
    component = record.name.removeprefix(f"{ROOT}.").partition(".")[0]
    return Entry(
        number=number,
        time=record.created,
        level=record.levelname,
        severity=record.levelno,
        component=clean(component, redactor, 32),
        message=clean(_message(record), redactor, MAX_MESSAGE),
        fields=fields,
        traceback=_traceback(record, redactor),
    )


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):
        return str(record.msg)


def _value(value: object, redactor: Callable[[str], str]) -> object:
    return value if isinstance(value, _PLAIN) else clean(str(value), redactor)


def _traceback(record: logging.LogRecord, redactor: Callable[[str], str]) -> str | None:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return None
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(clean(line, redactor, 1024) for line in lines)[-MAX_TRACEBACK:]


class Tail:
    """The last records, for the logs page; kept raw and read only when somebody looks."""

    def __init__(self, redactor: Redactor, length: int = TAIL_LENGTH) -> None:
        self._redactor = redactor
        self._records: deque[tuple[int, logging.LogRecord | Entry]] = deque(maxlen=length)

    def append(self, number: int, record: logging.LogRecord | Entry) -> None:
        """Keep a record; the oldest makes room."""
        self._records.append((number, record))

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
        for number, record in reversed(list(self._records)):
            if (after is not None and number <= after) or len(found) >= limit:
                break
            severity = record.severity if isinstance(record, Entry) else record.levelno
            if severity < least:
                continue
            entry = self._entry(number, record)
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

    def _entry(self, number: int, record: logging.LogRecord | Entry) -> Entry:
        return record if isinstance(record, Entry) else entry_of(record, number, self._redactor)


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
        self.tail = tail
        self.writer = writer
        self._numbers = itertools.count(1)

    def createLock(self) -> None:  # noqa: N802  the standard library's name
        """Have no lock: appending to a deque and putting into a queue need none."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Take a record in without a lock."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record and hand it to the writer.

        What refers to live objects (an exception's frames, arguments) is read now; plain records later and elsewhere.
        """
        number = next(self._numbers)
        item = entry_of(record, number, self.redactor) if record.exc_info or record.args else record
        self.tail.append(number, item)
        if self.writer is not None:
            self.writer.put(number, item)


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
        self._queue: queue.SimpleQueue[tuple[int, logging.LogRecord | Entry] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._reported = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="multiverse-log", daemon=True)
        self._thread.start()

    def put(self, number: int, record: logging.LogRecord | Entry) -> None:
        """Queue a record, or drop it."""
        if self._queue.qsize() >= QUEUE_LENGTH:
            self.dropped += 1
        else:
            self._queue.put((number, record))

    def close(self) -> None:
        """Write what is queued and end; a disk that stalls is not waited for."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive() and self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _run(self) -> None:
        open_still = True
        while open_still:
            batch = [self._queue.get()]
            self._closing.wait(BATCH_SECONDS)  # a burst is written at once
            while not self._queue.empty():
                batch.append(self._queue.get())
            open_still = None not in batch
            self._write([self._line(*item) for item in batch if item is not None])

    def _line(self, number: int, record: logging.LogRecord | Entry) -> str:
        return self._line_of(record if isinstance(record, Entry) else entry_of(record, number, self._redactor))

    def _write(self, lines: list[str]) -> None:
        if self.dropped > self._reported:
            lost, self._reported = self.dropped - self._reported, self.dropped
            record = logging.makeLogRecord({"name": f"{ROOT}.api", "levelname": "WARNING", "levelno": logging.WARNING})
            record.msg = f"{lost} log records were dropped: the disk or the console does not keep up"
            lines.append(self._line(0, record))
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
        logger = logging.getLogger(ROOT)
        if self._door not in logger.handlers:
            return
        logger.removeHandler(self._door)
        logger.setLevel(self._before)
        if self._door.writer is not None:
            self._door.writer.close()


def configure(settings: Settings, *, outputs: bool = True, console: TextIO | None = None) -> Logs:
    """Begin to log as the settings say; `console` is standard error by default.

    Without `outputs` only the tail is kept: for an application that has its own logging. The console and the file are also left to
    whoever configured them first in this process.

    Raises:
        OSError: The log file cannot be opened.
    """
    logger = logging.getLogger(ROOT)
    doors = [handler for handler in logger.handlers if isinstance(handler, _Door)]
    redactor = Redactor()
    for secret in (*_secrets(settings), *(secret for door in doors for secret in door.redactor.known())):
        redactor.add(secret)
    tail = Tail(redactor)
    writer = None
    if outputs and all(door.writer is None for door in doors):
        file = _File(Path(settings.log_file)) if settings.log_file else None
        writer = _Writer(redactor, _LINES[settings.log_format], console or sys.stderr, file)
    door = _Door(redactor, tail, writer)
    logs = Logs(tail, door, logger.level)
    logger.addHandler(door)
    logger.setLevel(settings.log_level)
    return logs


def _as_json_line(entry: Entry) -> str:
    return msgspec.json.encode(entry.as_json()).decode()


_LINES: Mapping[str, Callable[[Entry], str]] = {"text": Entry.as_text, "json": _as_json_line}


def _secrets(settings: Settings) -> Iterable[str]:
    given: tuple[Any, ...] = (settings.admin_api_key, *settings.client_api_keys, *(settings.backend_key_secret or "").split(","))
    return (secret for secret in given if secret)
