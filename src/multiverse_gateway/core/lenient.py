"""Read JSON that is valid, or that every Python client accepts, although the fast parser rejects it.

msgspec rejects half of a surrogate pair in an escape (`"\\ud83d"`), which RFC 8259 allows, and `NaN` and `Infinity`, which Python's `json`
writes and reads. A server is not to blame for either. The text that `legible` returns is only for inspecting an answer; the client gets
the original bytes.
"""

from __future__ import annotations

import codecs
from typing import Any

import msgspec

BOM = b"\xef\xbb\xbf"
"""The byte order mark that some programs write before JSON. It is removed before a text is read, and from a request before it is relayed:
RFC 8259, 8.1 lets parsers ignore it, and many servers do not."""
_PIECE = 1 << 16


def legible(text: bytes) -> bytes:
    """Return JSON that msgspec can decode: surrogates become other characters, `NaN` and infinities become `{}`.

    Names and strings may change in these characters, and nothing else changes: text that is not JSON stays invalid, because braces continue
    neither a number, nor a name, nor an escape. Returns `text` itself if there is nothing to replace. Five passes at the speed of a search,
    because a server chooses the text.

    >>> legible(rb'{"content": "\\ud83d", "logprob": -Infinity}')
    b'{"content": "\\\\u183d", "logprob": {}}'
    """
    if b"\\u" in text:  # only the first digit changes: `\\ud83d`, a backslash and four letters, stays valid, and nothing becomes ASCII
        text = text.replace(b"\\ud", b"\\u1").replace(b"\\uD", b"\\u1")
    return text.replace(b"NaN", b"{}").replace(b"-Infinity", b"{}").replace(b"Infinity", b"{}")


def decode(text: bytes) -> Any:
    """Decode JSON with the fast parser, and what only that rejects with `legible`.

    Raises:
        ValueError: It is not JSON, or not UTF-8.
        RecursionError: It is nested too deeply.

    >>> decode(b'{"choices": [{"text": "\\\\ud83d"}], "score": NaN}')["score"]
    {}
    """
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return msgspec.json.decode(legible(text))


def is_utf8(text: bytes) -> bool:
    """Return whether text is UTF-8, which msgspec does not check; long text is decoded in pieces, because 16 MiB at once can take 64 MiB.

    >>> is_utf8("ä".encode()), is_utf8(b"\\xff"), is_utf8(b"\\xc3")
    (True, False, False)
    """
    if text.isascii():
        return True
    try:
        if len(text) <= _PIECE:
            text.decode()
            return True
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(text), _PIECE):
            decoder.decode(text[start : start + _PIECE])
        decoder.decode(b"", True)
    except UnicodeDecodeError:
        return False
    return True
