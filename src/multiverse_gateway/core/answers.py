"""What an answer holds: whether it is JSON, and the tokens that it reports; of a whole one, and of one that is relayed as it comes."""

from __future__ import annotations

import codecs
import re

import msgspec
from attrs import define, field

from multiverse_gateway.core.sse import Usage, tokens_of

_PIECE = 1 << 16
_JSON = msgspec.json.Decoder(msgspec.Raw)


class _Answer(msgspec.Struct, gc=False):
    usage: Usage | None = None


class _LooseAnswer(msgspec.Struct, gc=False):
    usage: msgspec.Raw = msgspec.Raw(b"null")


_ANSWER = msgspec.json.Decoder(_Answer)
_LOOSE_ANSWER = msgspec.json.Decoder(_LooseAnswer)


def check_json(body: bytes) -> bool:
    """Return whether a body is one whole JSON object or array in UTF-8, however deep or large.

    >>> check_json(b'{"choices": []}'), check_json(b'{"choices": ['), check_json(b"3")
    (True, False, False)
    """
    if body.lstrip(b" \t\r\n")[:1] not in (b"{", b"["):
        return False
    try:
        _JSON.decode(body)
        if not body.isascii():
            _check_utf8(body)
    except (ValueError, RecursionError):
        return False
    return True


def read_answer(body: bytes) -> tuple[int, int] | None:
    """Return the prompt and completion tokens that a JSON answer reports, 0 where it does not; `None` when it is no whole JSON.

    >>> read_answer(b'{"usage": {"prompt_tokens": 7, "completion_tokens": 2}}'), read_answer(b"[]"), read_answer(b"{")
    ((7, 2), (0, 0), None)
    """
    if not body.lstrip(b" \t\r\n").startswith(b"{"):
        return (0, 0) if check_json(body) else None
    try:
        if not body.isascii():
            _check_utf8(body)
        try:
            usage = _ANSWER.decode(body).usage
        except msgspec.ValidationError:
            return tokens_of(_LOOSE_ANSWER.decode(body).usage)
    except (ValueError, RecursionError):
        return None
    return (0, 0) if usage is None else usage.tokens


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
    """What stands for the beginning of a string that is not complete yet."""
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
        ends = self._first.lstrip()[:1] + self._last.rstrip()[-1:]
        return not self.is_broken and not self._depth and not self._carried and ends in (b"{}", b"[]") and not self._decoder.getstate()[0]

    @property
    def tokens(self) -> tuple[int, int]:
        """The prompt and completion tokens that it reports at its beginning or its end, 0 where it does not."""
        found = _USAGE.search(self._last) or _USAGE.search(self._first)
        return (0, 0) if found is None else tokens_of(msgspec.Raw(found[1]))


def _check_utf8(body: bytes) -> None:
    """Raise for text that is not UTF-8, which msgspec does not check; decode in pieces, because 16 MiB at once can take 64 MiB."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(body), _PIECE):
        decoder.decode(body[start : start + _PIECE])
    decoder.decode(b"", True)
