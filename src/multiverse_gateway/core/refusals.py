"""Read what a server's refusal means: whether the server says that it does not have the model.

Only the server's own words count. A refusal that repeats words of the request (the name of a tool, the id of a response, a prompt)
says nothing about the server, or one client's request could take a model away from all clients.
"""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

MAX_MESSAGE_LENGTH = 2048
"""Characters of a refusal that are looked at: an error message is shorter."""
MAX_REFUSAL_BYTES = 1 << 16
"""Size of the refusals whose JSON is read; a larger one is not an error message. Decoded, tiny values take many times their length in time
and memory, and a server chooses how many there are."""
MAX_REQUEST_BYTES = 1 << 18
"""Size of the requests whose JSON is read; of a larger one only the text around each `model` is compared."""
MAX_VALUES = 10_000
"""Strings of a request that are compared with a refusal."""
MAX_FORM_BYTES = 1 << 16
"""Part of a form that is looked at; its files follow or precede the few short fields."""

_UNEXPECTED_ENDPOINT = b"unexpected endpoint"
_ANY_CASE_MODEL = re.compile(rb"model", re.IGNORECASE)
_LACKS = re.compile(
    r"model_not_found|\binvalid model name\b|\bfailed to load (?:the )?model\b|\bno such model\b|\bunknown model(?! ?\w)"
    r"|\bno models? (?:is |are )?(?:currently )?loaded\b"
    r"|(?<![/\w])model\b.{0,200}?\b(?:not found|does not exist|doesn't exist|not (?:currently )?loaded|unloaded|failed to load)\b",
    re.DOTALL | re.IGNORECASE,
)
_CONTEXT = re.compile(r"context[ _](?:length|window|size)", re.IGNORECASE)
_SPACE = re.compile(r"\s+")
_IN_QUOTES = {name: re.compile(f"[\"'`] ?{name} ?[\"'`]") for name in ("model", "the model", "a model", "this model")}
"""Values that may stand in the server's own sentence, where they are in no quotes."""
_FRAGMENT = 8
"""Characters on either side of a match that are searched for in the request."""
_PIECE = 64
"""Bytes on either side of a `model` in a large request that are compared."""
_MAX_PIECES = 1000


def lacks_model(refusal: bytes, request: bytes) -> bool:
    """Return whether a refusal says that the server does not have the model; `request` is the body that was refused.

    >>> lacks_model(b'{"error": "model \\'llama3\\' not found"}', b'{"model": "llama3"}')
    True
    >>> lacks_model(b'{"error": "tool \\'my model\\' not found"}', b'{"model": "llama3", "tools": ["my model"]}')
    False
    """
    if len(refusal) > MAX_REFUSAL_BYTES or _ANY_CASE_MODEL.search(refusal) is None:
        return False
    code, message = _read(refusal)
    if code == "model_not_found":
        return True
    message = _plain(message)
    if _LACKS.search(message) is None or _CONTEXT.search(message):
        return False
    values = [_plain(value) for value in _values_of(request)]
    return _says_it_itself(message, [value for value in values if "model" in value])


def lacks_endpoint(refusal: bytes, request: bytes) -> bool:
    """Return whether a refusal says that the server does not have the endpoint, as LM Studio does with status 200.

    >>> lacks_endpoint(b'{"error": "Unexpected endpoint or method. (POST /v1/rerank)"}', b'{"model": "llama3"}')
    True
    """
    return _UNEXPECTED_ENDPOINT in refusal[:MAX_MESSAGE_LENGTH].lower() and _UNEXPECTED_ENDPOINT not in request.lower()


def _says_it_itself(message: str, values: list[str]) -> bool:
    for value in values:
        message = _IN_QUOTES[value].sub("\0", message) if value in _IN_QUOTES else message.replace(value, "\0")
    return any(not _is_repeated(message, match.start(), values) for match in _LACKS.finditer(message))


def _is_repeated(message: str, at: int, values: list[str]) -> bool:
    """Return whether the words around a match stand in the request, as they do where a server repeats a part of a value."""
    before, after = message[max(0, at - _FRAGMENT) : at + 5], message[at : at + 5 + _FRAGMENT]
    if at < _FRAGMENT:
        before = f"\n{before}"  # the beginning of the message, which no value holds
    return any(before in value or after in value for value in values)


def _plain(text: str) -> str:
    return _SPACE.sub(" ", text).strip().lower()


def _read(refusal: bytes) -> tuple[object, str]:
    """Return the code and the words of a refusal in any of the usual forms; words without JSON count as they are."""
    try:
        body = msgspec.json.decode(refusal)
    except (ValueError, RecursionError):
        return None, refusal[:MAX_MESSAGE_LENGTH].decode(errors="replace")
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return None, str(error)[:MAX_MESSAGE_LENGTH]
    messages = [str(error[name]) for name in ("message", "error", "detail") if error.get(name)]
    return error.get("code"), " ".join(messages)[:MAX_MESSAGE_LENGTH]


def _values_of(request: bytes) -> Iterator[str]:
    """Return the strings that a request holds, but for the name of the model: of a form the lines, of a large request pieces."""
    if len(request) > MAX_REQUEST_BYTES:
        yield from _pieces_of(request)
        return
    try:
        fields = msgspec.json.decode(request)
    except (ValueError, RecursionError):
        yield from request[:MAX_FORM_BYTES].decode(errors="replace").splitlines()[:MAX_VALUES]
        return
    pending: list[Any] = [value for name, value in fields.items() if name != "model"] if isinstance(fields, dict) else [fields]
    for _ in range(MAX_VALUES):
        if not pending:
            return
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value


def _pieces_of(request: bytes) -> Iterator[str]:
    """Return the text around each `model` in a request, at most `_MAX_PIECES` pieces."""
    text = request.lower()
    at = -1
    for _ in range(_MAX_PIECES):
        at = text.find(b"model", at + 1)
        if at < 0:
            return
        yield text[max(0, at - _PIECE) : at + _PIECE].decode(errors="replace")
