"""Decide how long a server may take until the first byte of its answer: longer for a long prompt, and for an answer that comes whole.

Slow computers read a prompt at some hundred tokens a second, and a plain answer begins when its last token is known. The plain timeout
is enough for most requests; only when it passes is the body looked at.
"""

from typing import Any

import msgspec

BYTES_PER_TIMEOUT = 24_000
"""Bytes of text for which a server gets its time once more."""
TOKENS_PER_TIMEOUT = 1000
"""Tokens of a plain answer for which a server gets its time once more."""
USUAL_TOKENS = 512
"""Tokens that a plain answer is expected to have at most where the request sets no limit, or a higher one."""
MAX_READ_BYTES = 1 << 18
"""Size of the bodies whose JSON is read. Decoding a larger one could take seconds, so all of it but its images counts as text."""
MAX_IMAGES = 256
"""Images and files that are left out of a large body."""

_TEXTS = ("messages", "prompt", "input", "system", "tools")
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def first_byte_allowance(timeout: float, body: bytes, *, stream: bool) -> float:
    """Return the seconds that a server may take until its first byte; `timeout` is `FIRST_BYTE_TIMEOUT_SECONDS`.

    >>> first_byte_allowance(120.0, b'{"prompt": "Hello", "max_tokens": 250}', stream=False)
    150.025
    """
    body = without_images(body)
    if len(body) > MAX_READ_BYTES:
        is_json = body.lstrip()[:1] == b"{"
        return timeout * (1 + is_json * len(body) / BYTES_PER_TIMEOUT + (not stream) * USUAL_TOKENS / TOKENS_PER_TIMEOUT)
    fields = _fields(body)
    text = sum(_length(fields.get(name)) for name in _TEXTS)
    tokens = 0 if stream else _most_tokens(fields)
    return timeout * (1 + text / BYTES_PER_TIMEOUT + tokens / TOKENS_PER_TIMEOUT)


def without_images(body: bytes) -> bytes:
    """Return a large body without the `data:` URLs in it, and any other as it is."""
    if len(body) <= MAX_READ_BYTES:
        return body
    first, *others = body.split(b'"data:', MAX_IMAGES)
    return b'""'.join([first, *(other.partition(b'"')[2] for other in others)])


def _fields(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object; a form has none that count."""
    try:
        fields = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _most_tokens(fields: dict[str, Any]) -> int:
    limit = _limit(fields)
    return USUAL_TOKENS if limit is None else max(0, min(USUAL_TOKENS, limit))


def requested_tokens(body: bytes) -> int | None:
    """Return the most tokens that a request allows its answer to have, or `None` if it sets no limit or is too large to be read for it.

    >>> requested_tokens(b'{"prompt": "Hello", "max_tokens": 250}'), requested_tokens(b'{"prompt": "Hello"}')
    (250, None)
    """
    return _limit(_fields(body)) if len(body) <= MAX_READ_BYTES else None


def _limit(fields: dict[str, Any]) -> int | None:
    return min((fields[name] for name in _LIMITS if type(fields.get(name)) is int), default=None)


def _length(value: Any) -> int:
    """Return the bytes of all text in a value; images and files that stand in it as `data:` URLs do not count as text."""
    length, pending = 0, [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            length += 0 if value.startswith("data:") else len(value.encode())
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
    return length
