"""One record per event, as text or JSON, to the console, a file and a tail in memory.

1. Logging never blocks: a thread writes (`writer`), and records that it cannot keep up with are dropped and counted.
2. No secret reaches an output, and no text can forge a line (`redaction`, `records`).
3. Loggers are called `multiverse_gateway.<component>`; facts go into `extra={"fields": {...}}`, not into the message.

Several gateways can live in one process. Each configures logging for itself and gets a tail of its own; only the first one writes.

    logs = configure(settings)
    logging.getLogger("multiverse_gateway.registry").info("server registered", extra={"fields": {"model": "tiny"}})
    logs.close()
"""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TextIO

import attrs
import msgspec

from multiverse_gateway.observability.log_records import ROOT, Entry, Note, next_number, read_record
from multiverse_gateway.observability.redaction import Redactor
from multiverse_gateway.observability.tail import Tail
from multiverse_gateway.observability.writer import LogFile, Writer
from multiverse_gateway.settings import Settings

_OURS = logging.getLogger(ROOT)


class RecordHandler(logging.Handler):
    """Accept records on any thread, at the cost of two appends."""

    def __init__(self, redactor: Redactor, tail: Tail, writer: Writer | None) -> None:
        super().__init__()
        self.redactor = redactor
        self._records = tail.records
        self.writer = writer

    def createLock(self) -> None:  # noqa: N802  the standard library's name
        """Create no lock: appending to a deque needs none."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Accept a record without taking a lock."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Accept a record of the standard library."""
        self.take(read_record(record, self.redactor))

    def take(self, record: Note | Entry) -> None:
        """Append a record to the tail and queue it for the writer."""
        self._records.append(record)
        if self.writer is not None:
            self.writer.put(record)


_handlers: list[RecordHandler] = []
"""The handlers of all logs that are configured in this process, as they are among those of `_OURS`."""


def redact(secret: str | None) -> None:
    """Keep a secret, such as a server's key, out of every log that is configured in this process."""
    if secret:
        for handler in _handlers.copy():
            handler.redactor.add(secret)


def note(logger: logging.Logger, message: str, fields: Mapping[str, object], wall: float) -> None:
    """Log at level INFO at the instant `wall`, in a fraction of the time of `Logger.info`, whose record only our handlers would use.

    The caller has already checked the level, because it would build `fields` in vain otherwise. It must not change `fields` after that.
    """
    if logging.root.handlers or logger.handlers or logger.filters or _OURS.handlers != _handlers:
        logger.info(message, extra={"fields": fields})  # an application that embeds the gateway has handlers or filters of its own
        return
    record = Note(next_number(), wall, "INFO", logging.INFO, logger.name, message, fields)
    for handler in _handlers:
        handler.take(record)


@attrs.frozen
class Logs:
    """What `configure` has set up."""

    tail: Tail
    _handler: RecordHandler
    _level_before: int

    @property
    def dropped(self) -> int:
        """The number of records that were not written, because the writer could not keep up or the disk is full."""
        return 0 if self._handler.writer is None else self._handler.writer.dropped

    def close(self) -> None:
        """Write what is queued, for two seconds at most, and stop logging; idempotent."""
        if self._handler not in _handlers:
            return
        _handlers.remove(self._handler)
        _OURS.removeHandler(self._handler)
        _OURS.setLevel(self._level_before)
        if self._handler.writer is not None:
            self._handler.writer.close()


def configure(settings: Settings, *, outputs: bool = True, console: TextIO | None = None) -> Logs:
    """Start to log as the settings say; `console` is standard error by default.

    Without `outputs` only the tail is kept: that is for an application with logging of its own. If something in this process has
    configured the console and the file before, it keeps them, and this log has only a tail.

    Raises:
        OSError: The log file cannot be opened.
    """
    redactor = Redactor()
    for secret in (*_secrets(settings), *(secret for handler in _handlers for secret in handler.redactor.secrets())):
        redactor.add(secret)
        redact(secret)  # an earlier handler also formats our records
    tail = Tail(redactor)
    writer = None
    if outputs and all(handler.writer is None for handler in _handlers):
        file = LogFile(Path(settings.log_file)) if settings.log_file else None
        writer = Writer(redactor, _LINES[settings.log_format], console or sys.stderr, file)
    handler = RecordHandler(redactor, tail, writer)
    logs = Logs(tail, handler, _OURS.level)
    _handlers.append(handler)
    _OURS.addHandler(handler)
    _OURS.setLevel(settings.log_level)
    return logs


def _as_json_line(entry: Entry) -> str:
    return msgspec.json.encode(entry.as_json()).decode()


_LINES: Mapping[str, Callable[[Entry], str]] = {"text": Entry.as_text, "json": _as_json_line}


def _secrets(settings: Settings) -> Iterable[str]:
    given = (settings.admin_api_key, *settings.client_api_keys, *(settings.backend_key_secret or "").split(","))
    return (secret for secret in given if secret)
