"""Read an answer: whether it is JSON, which tokens it reports, and whether it is an error that the server sent with status 200.

Most answers are read whole; `PassingJson` checks those that are relayed as they come.
"""

from __future__ import annotations

import codecs
import re

import msgspec
from attrs import define, field
from msgspec import DecodeError, Raw, Struct

from multiverse_gateway.core.lenient import BOM, is_utf8, legible
from multiverse_gateway.core.payloads import TokenCounts, is_truthy, tokens_of, value_of

_SPACE = b" \t\r\n"
_ABSENT = Raw(b"null")
_DIGITS = 3
"""Digits of a status."""


class Answer(Struct, frozen=True, gc=False):
    """What the gateway reads of a whole answer: the tokens that it reports, and whether it reports an error instead."""

    tokens: tuple[int, int] = (0, 0)
    """Prompt and completion tokens, 0 where none are reported."""
    reports_error: bool = False


class _Fields(Struct, gc=False):
    usage: TokenCounts | None = None
    error: Raw = Raw(b"")
    object: str | None = None
    type: str | None = None


class _OddFields(Struct, gc=False):
    usage: Raw = _ABSENT
    error: Raw = _ABSENT
    object: Raw = _ABSENT
    type: Raw = _ABSENT


class _Contents(Struct, gc=False):
    choices: Raw = _ABSENT
    data: Raw = _ABSENT
    output: Raw = _ABSENT
    content: Raw = _ABSENT
    results: Raw = _ABSENT


class _Coded(Struct, gc=False):
    error: Raw = _ABSENT
    code: Raw = _ABSENT


_JSON = msgspec.json.Decoder(Raw)
_decode_fields = msgspec.json.Decoder(_Fields).decode
_ODD_FIELDS = msgspec.json.Decoder(_OddFields)
_CONTENTS = msgspec.json.Decoder(_Contents)
_CODED = msgspec.json.Decoder(_Coded)
_NO_TOKENS = Answer()
_ERROR = Answer(reports_error=True)


def check_json(body: bytes) -> bool:
    """Return whether a body is one whole JSON object or array in UTF-8, however deep or large.

    A byte order mark before it is accepted (RFC 8259, 8.1), and so is what Python's `json` reads beyond the standard; see `legible`.

    >>> check_json(b'{"choices": []}'), check_json(b'{"choices": ['), check_json(b"3")
    (True, False, False)
    """
    text = body.removeprefix(BOM)
    if text.lstrip(_SPACE)[:1] not in (b"{", b"["):
        return False
    try:
        try:
            _JSON.decode(text)
        except DecodeError:
            _JSON.decode(legible(text))
    except (ValueError, RecursionError):
        return False
    return is_utf8(text)


def read_answer(body: bytes) -> Answer | None:
    """Return what a JSON answer reports; `None` if it is not a complete JSON object or array.

    An answer reports an error if it has a truthy `error`, or `object` or `type` is `"error"`, and none of `choices`, `data`, `output`,
    `content` and `results`. Members that are null count as absent.

    >>> read_answer(b'{"usage": {"prompt_tokens": 7, "completion_tokens": 2}}')
    Answer(tokens=(7, 2), reports_error=False)
    >>> read_answer(b'{"error": "Unexpected endpoint"}').reports_error, read_answer(b"[]"), read_answer(b"{")
    (True, Answer(tokens=(0, 0), reports_error=False), None)
    """
    text = body
    try:
        fields = _decode_fields(text)
    except (ValueError, RecursionError):
        text = legible(body.removeprefix(BOM))
        odd = _read_odd_fields(text)
        if odd is None:
            return _NO_TOKENS if check_json(body) else None
        fields = odd
    if not body.isascii() and not is_utf8(body):
        return None
    is_error = (fields.error and is_truthy(fields.error)) or fields.object == "error" or fields.type == "error"
    if is_error and not _has_contents(text):
        return _ERROR
    return _NO_TOKENS if fields.usage is None else Answer(fields.usage.tokens())


def _read_odd_fields(text: bytes) -> _Fields | None:
    """Decode fields with types or numbers that no specification gives them; `None` if the text is not an object."""
    try:
        odd = _ODD_FIELDS.decode(text)
    except (ValueError, RecursionError):
        return None
    is_error = "error" in (value_of(odd.object), value_of(odd.type))
    return _Fields(TokenCounts(*tokens_of(odd.usage)), odd.error, "error" if is_error else None)


def _has_contents(text: bytes) -> bool:
    contents = _CONTENTS.decode(text)
    return any(getattr(contents, name) != _ABSENT for name in _Contents.__struct_fields__)


def reported_status(report: bytes) -> int | None:
    """Return the status that an error names by a numeric `code`, or a string of digits, from 400 to 599.

    >>> reported_status(b'{"error": {"code": 404}}'), reported_status(b'{"object": "error", "code": "503"}'), reported_status(b"oops")
    (404, 503, None)
    """
    try:
        text = legible(report.removeprefix(BOM))
        outer = _CODED.decode(text)
    except (DecodeError, RecursionError):
        return None
    try:
        inner = _CODED.decode(outer.error)
    except DecodeError:
        inner = outer
    return _status(value_of(inner.code)) or _status(value_of(outer.code))


def _status(code: object) -> int | None:
    if isinstance(code, str) and len(code) == _DIGITS and code.isascii() and code.isdigit():
        code = int(code)
    return int(code) if isinstance(code, int | float) and 400 <= code < 600 else None


_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BEGUN_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+', re.DOTALL)
_USAGE = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]|\{[^{}]*\})*\})')
_ENDS = 2048
"""Bytes of the beginning and of the end of an answer in which its `usage` is looked for."""


@define(eq=False)
class PassingJson:
    """Check JSON that is relayed while it comes, because it is too large to be held.

    Only its structure is checked: strings, brackets and UTF-8. That tells a whole answer from one that was cut.

    >>> passing = PassingJson()
    >>> for piece in (b'{"data": [{"embedding": [0.5, ', b'1]}], "usage": {"prompt_tokens": 7}}'):
    ...     passing.feed(piece)
    >>> passing.is_whole, passing.tokens
    (True, (7, 0))
    """

    is_broken: bool = field(default=False, init=False)
    """Whether it cannot become JSON any more."""
    _depth: int = field(default=0, init=False)
    _carried: bytes = field(default=b"", init=False)
    """Stands for the beginning of a string that is not complete yet."""
    _first: bytes = field(default=b"", init=False)
    _last: bytes = field(default=b"", init=False)
    _decoder: codecs.IncrementalDecoder = field(factory=codecs.getincrementaldecoder("utf-8"), init=False)

    def feed(self, piece: bytes) -> None:
        """Check a piece of the body, in order."""
        try:
            self._decoder.decode(piece)
        except UnicodeDecodeError:
            self.is_broken = True
        outside = _STRING.sub(b"", self._carried + piece)
        begun = _BEGUN_STRING.search(outside)
        self._carried = b""
        if begun is not None:
            self._carried = b'"\\' if begun.end() < len(outside) else b'"'
            outside = outside[: begun.start()]
        self._depth += outside.count(b"[") + outside.count(b"{") - outside.count(b"]") - outside.count(b"}")
        if len(self._first) < _ENDS:
            self._first += piece[:_ENDS]
        self._last = (self._last + piece)[-_ENDS:]

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole object or array, if it ends here."""
        ends = self._first.removeprefix(BOM).lstrip()[:1] + self._last.rstrip()[-1:]
        return not self.is_broken and not self._depth and not self._carried and ends in (b"{}", b"[]") and not self._decoder.getstate()[0]

    @property
    def tokens(self) -> tuple[int, int]:
        """The prompt and completion tokens that it reports at its beginning or its end, 0 where it does not."""
        usage = _USAGE.search(self._last) or _USAGE.search(self._first)
        return (0, 0) if usage is None else tokens_of(Raw(usage[1]))
