"""What a whole answer holds: whether it is JSON, and the tokens that it reports."""

from __future__ import annotations

import codecs

import msgspec

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


def _check_utf8(body: bytes) -> None:
    """Raise for text that is not UTF-8, which msgspec does not check; decode in pieces, because 16 MiB at once can take 64 MiB."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(body), _PIECE):
        decoder.decode(body[start : start + _PIECE])
    decoder.decode(b"", True)
