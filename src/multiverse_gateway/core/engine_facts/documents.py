"""Read single values from documents that a stranger's server wrote: wrong types are ignored, and everything has a limit."""

from collections.abc import Mapping, Sequence
from typing import Any

from multiverse_gateway.core.lenient import BOM, decode, is_utf8
from multiverse_gateway.core.servers import MAX_CONCURRENCY, MAX_TOKENS

MAX_DOCUMENT = 1 << 20
"""Bytes of a document; a larger one is not read."""
MAX_ENTRIES = 1000
"""Models of a list that are read."""
MAX_TEXT = 256
MAX_SIZE = 1 << 53


def document(status: int, body: bytes) -> object:
    """Return the JSON of an answer with status 200, and `None` for any other answer.

    >>> document(200, b'{"version": "0.12.5"}'), document(404, b"{}"), document(200, b"<html>")
    ({'version': '0.12.5'}, None, None)
    """
    if status != 200 or len(body) > MAX_DOCUMENT or not is_utf8(body):
        return None
    try:
        return decode(body.removeprefix(BOM))
    except (ValueError, RecursionError):
        return None


def member(value: object, *path: str) -> object:
    """Return what stands at a path of names, `None` if a part of it is missing.

    >>> member({"details": {"family": "llama"}}, "details", "family")
    'llama'
    """
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def entries(value: object, name: str) -> Sequence[Mapping[str, Any]]:
    """Return the objects in a list, at most `MAX_ENTRIES` of them.

    >>> entries({"data": [{"id": "tiny"}, 5, None]}, "data")
    [{'id': 'tiny'}]
    """
    listed = member(value, name)
    return [entry for entry in listed[:MAX_ENTRIES] if isinstance(entry, dict)] if isinstance(listed, list) else []


def text(value: object) -> str | None:
    """Return a short text on one line, `None` for anything else.

    >>> text("Q4_K_M"), text("two\\nlines"), text(""), text(5)
    ('Q4_K_M', None, None, None)
    """
    return value if isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable() else None


def words(value: object) -> frozenset[str] | None:
    """Return the texts in a list, `None` for anything else.

    >>> words(["tools", 5, "tools"]), words("tools")
    (frozenset({'tools'}), None)
    """
    return frozenset([word for word in map(text, value[:MAX_ENTRIES]) if word is not None]) if isinstance(value, list) else None


def truth(value: object) -> bool | None:
    """Return a boolean, `None` for anything else."""
    return value if isinstance(value, bool) else None


def whole(value: object, most: int) -> int | None:
    """Return a whole number from 1, at most `most`; `None` for anything else.

    >>> whole(4, 10), whole(1000, 10), whole(0, 10), whole(True, 10), whole("4", 10)
    (4, 10, None, None, None)
    """
    return min(value, most) if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def tokens(value: object) -> int | None:
    """Return a number of tokens."""
    return whole(value, MAX_TOKENS)


def slots(value: object) -> int | None:
    """Return a number of requests, at most the largest cap that there is."""
    return whole(value, MAX_CONCURRENCY)


def size(value: object) -> int | None:
    """Return a number of bytes."""
    return whole(value, MAX_SIZE)
