"""Log records: as they were given (`Note`), and cleaned so that they can be shown (`Entry`).

Secrets are removed before a text is cut, and control characters are escaped: no text can forge a line or move a terminal's cursor.
"""

import itertools
import json
import logging
import re
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache

import attrs
from msgspec import Struct

from multiverse_gateway.observability.redaction import Redactor

ROOT = "multiverse_gateway"
"""The name of the logger that all our loggers descend from."""
MAX_VALUE = 256
MAX_MESSAGE = 1024
MAX_TRACEBACK = 16_384
MAX_SCANNED = 65_536
MAX_REMEMBERED = 64
REMEMBERED = 4096

next_number = itertools.count(1).__next__
"""Return the number of the next record of this process."""

_PLAIN = frozenset({int, float, bool, type(None)})
_NEEDS_QUOTES = re.compile(r'[\s"=]')
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")


def clean(text: str, redactor: Redactor, limit: int = MAX_VALUE) -> str:
    r"""Return a text fit for a log: without secrets, with control characters escaped, cut to `limit` characters.

    >>> clean("one\ntwo \x1b[31m", Redactor())
    'one\\ntwo \\x1b[31m'
    """
    memo = redactor.cleaned
    cleaned = memo.get(text)
    if cleaned is None:
        cleaned = redactor(text[:MAX_SCANNED])
        if not (cleaned.isascii() and cleaned.isprintable()):
            cleaned = _CONTROL.sub(_escape, cleaned)
        if len(text) <= MAX_REMEMBERED:
            if len(memo) >= REMEMBERED:
                memo.clear()
            memo[text] = cleaned
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + "…"


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


@attrs.frozen(kw_only=True)
class Entry:
    """A record that is safe to show; `number` grows with each record of the process, `time` is in epoch seconds."""

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
        """The time in ISO 8601 with a time zone."""
        second = int(self.time)
        return f"{_second(second)}.{int(1000 * (self.time - second)):03d}+00:00"

    def as_json(self) -> dict[str, object]:
        """Return the record as in the admin API and the JSON format; a field whose name is one of ours gets an underscore."""
        own: dict[str, object] = {"time": self.instant, "level": self.level, "component": self.component, "message": self.message}
        if self.traceback is not None:
            own["traceback"] = self.traceback
        if own.keys().isdisjoint(self.fields):
            return {**own, **self.fields}
        return own | {f"{name}_" if name in own else name: value for name, value in self.fields.items()}

    def as_text(self) -> str:
        """Return the record as in the text format: one line, followed by the lines of the traceback, each behind a bar."""
        fields = "".join(f" {name}={_quoted(value)}" for name, value in self.fields.items() if value is not None)
        line = f"{self.instant} {self.level:<8} {self.component:<8} {self.message}{fields}"
        return line if self.traceback is None else "\n".join([line, *(f"  | {part}" for part in self.traceback.splitlines())])

    def mentions(self, text: str) -> bool:
        """Return whether any part of the record contains the text, which must be in lower case."""
        parts = (self.message, self.traceback or "", *(f"{name}={value}" for name, value in self.fields.items()))
        return any(text in part.lower() for part in parts)


@lru_cache(maxsize=4)
def _second(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _quoted(value: object) -> str:
    if type(value) in _PLAIN:
        return str(value).lower()
    text = str(value)
    return text if text.isalnum() or (text and not _NEEDS_QUOTES.search(text)) else json.dumps(text, ensure_ascii=False)


class Note(Struct, eq=False, gc=False):
    """A record as it was given; `entry` cleans it when it is read.

    A struct of msgspec, because one is made for each request, and any other object takes twice as long to make.
    """

    number: int
    time: float
    level: str
    severity: int
    name: str
    message: str
    fields: object

    def entry(self, redactor: Redactor, traceback: str | None = None) -> Entry:
        """Return the record as an entry without secrets."""
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
        shown = name if isinstance(name, str) and name.isidentifier() else clean(str(name), redactor, 64)
        fields[shown] = value if type(value) in _PLAIN else clean(str(value), redactor)
    return fields


def read_record(record: logging.LogRecord, redactor: Redactor) -> Note | Entry:
    """Convert a record of the standard library; one that refers to live objects (an exception's frames, arguments) is cleaned now."""
    note = Note(
        next_number(), record.created, record.levelname, record.levelno, record.name, _message(record), getattr(record, "fields", None)
    )
    return note.entry(redactor, _traceback(record, redactor)) if record.exc_info or record.args else note


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
