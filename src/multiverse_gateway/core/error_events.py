"""The event that tells the clients of a stream about an error, in the form that the libraries of its dialect read."""

from __future__ import annotations

from typing import Any

import msgspec

from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.errors import anthropic_type
from multiverse_gateway.core.lenient import decode

_MAX_TEXT = 4096
"""Characters of a text in an error event that stands for a response."""
_OVERLOADED = frozenset({"gateway_shutting_down", "overloaded"})
"""Codes after which Anthropic's clients may try again later: those of 503."""
_EXACT = 1 << 53
"""Integers below this one are exact in JavaScript."""


def error_event(dialect: Dialect, message: str, code: str, sequence_number: int = 0) -> bytes:
    """Return the event that ends a stream after a failure, in the form that the clients of its dialect read.

    `sequence_number` is that of a Responses stream. Its event has the form of the Responses API and, in the field `error`, that which makes
    OpenAI's libraries raise an exception.

    >>> error_event(Dialect.MESSAGES, "The server was lost.", "upstream_stream_interrupted")
    b'event: error\\ndata: {"type":"error","error":{"type":"api_error","message":"The server was lost."}}\\n\\n'
    """
    kind = "overloaded_error" if code in _OVERLOADED else "api_error"
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return _error_event(dialect, error, kind, sequence_number)


def refusal_event(dialect: Dialect, status: int, body: bytes) -> bytes:
    """Return the event that takes the place of an error response in a stream whose head was sent before the error happened.

    `status` and `body` are those of the response, from the gateway or a server, in any form. The event keeps all fields of the error that
    are texts, whole numbers, booleans or null; long texts are cut.

    >>> refusal_event(Dialect.CHAT, 503, b'{"error": {"message": "Every server is busy.", "code": "overloaded"}}')
    b'data: {"error":{"message":"Every server is busy.","type":"server_error","param":null,"code":"overloaded"}}\\n\\n'
    """
    given = _read_error(body)
    fields = given if isinstance(given, dict) else {"message": given}
    messages = (fields.get("message"), fields.get("detail"), f"The request was refused with status {status}.")
    error: dict[str, object] = {
        "message": next(text for text in messages if isinstance(text, str) and text),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": None,
        "code": None,
    }
    error |= {name: value for name, value in fields.items() if name != "message" and _is_plain(value)}
    error = {name: value[:_MAX_TEXT] if isinstance(value, str) else value for name, value in error.items()}
    return _error_event(dialect, error, anthropic_type(status))


def _read_error(body: bytes) -> object:
    """Return what the body of an error response says: the error object, a text, or another value that says nothing."""
    try:
        answer = decode(body)
    except (ValueError, RecursionError):
        text = body[: 4 * _MAX_TEXT].decode(errors="replace").strip()
        return None if text.startswith("<") else text
    return answer.get("error") or answer if isinstance(answer, dict) else answer


def _is_plain(value: object) -> bool:
    """Return whether a value can stand in an error event as it is; integers that other languages cannot read are left out."""
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < _EXACT)


def _error_event(dialect: Dialect, error: dict[str, Any], kind: str, sequence_number: int = 0) -> bytes:
    """Write an error; `kind` is what the Messages API calls it."""
    if dialect is Dialect.MESSAGES:
        return _write(b"event: error\n", {"type": "error", "error": {"type": kind, "message": error["message"]}})
    if dialect is Dialect.RESPONSES:
        fields = {name: error[name] for name in ("code", "message", "param")}
        ours = {"type": "error", "sequence_number": sequence_number, **fields}
        return _write(b"event: error\n", {**ours, "error": {"type": error["type"], **fields, **error}})
    return _write(b"", {"error": error})


def _write(name: bytes, data: dict[str, Any]) -> bytes:
    return b"%bdata: %b\n\n" % (name, msgspec.json.encode(data))
