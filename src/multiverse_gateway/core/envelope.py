"""What the gateway has to know of a request; the body's bytes go on unchanged.

1. The server must read the same `model` and `stream` as the gateway did: a body that says either twice is refused, and so
   is a form that two parsers could read differently.
2. A body may be hostile: too deep, not UTF-8, not JSON, its numbers endless. Each is an `EnvelopeError`, never another.
"""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from typing import Any, NoReturn

import msgspec
from attrs import field, frozen
from msgspec import Struct, ValidationError

from multiverse_gateway.core.sse import Dialect, dialect_of

MAX_MODEL_LENGTH = 256
"""Longest model name, in characters."""
MAX_FORM_PARTS = 256
"""Most fields and files in one form."""

JSON_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/reranking", "/v1/responses", "/v1/messages"}
)
_PIECE = 1 << 16
_TELLS_USAGE = frozenset({"/v1/chat/completions", "/v1/completions"})
_USAGE_FIELD = b'"stream_options":{"include_usage":true},'
_REPEATABLE = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v2/rerank"})


class EnvelopeError(Exception):
    """Say why a request cannot be read, and what to send instead; `param` and `code` are those of OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


@frozen
class Envelope:
    """Hold what decides the way of a request.

    A `stateful` request leaves something behind on the server: it is repeated only if it never reached one.
    `wants_usage` is `stream_options.include_usage`; `leaves_usage`: a stream that could tell the tokens, and the client did not say
    whether it should.
    """

    model: str
    stream: bool
    stateful: bool
    wants_usage: bool
    path: str
    dialect: Dialect
    leaves_usage: bool = False
    answers_json: bool = field(init=False)
    """Whether the answer is JSON, or a stream of events."""

    @answers_json.default
    def _is_answered_with_json(self) -> bool:
        return self.path in JSON_PATHS


class _Model:
    """Stand where a body says `model`; msgspec reports each time to the hook."""


class _Stream:
    """Stand where a body says `stream`."""


_MARKS: dict[type, Any] = {_Model: _Model(), _Stream: _Stream()}
_TWICE = object()


class _Body(Struct, gc=False):
    model: _Model = _MARKS[_Model]  # not optional: a null must reach the hook, too
    stream: _Stream = _MARKS[_Stream]
    store: Any = None
    stream_options: Any = msgspec.UNSET


def read_envelope(path: str, content_type: str, body: bytes) -> Envelope:
    """Read the envelope of a request to the API path: of a form if `content_type` is multipart, else of a JSON object.

    >>> read_envelope("/v1/embeddings", "application/json", b'{"model": "bge-m3", "input": "hello"}').model
    'bge-m3'

    Raises:
        EnvelopeError: The request has no readable model, or could be read in more than one way.
    """
    if content_type != "application/json" and content_type[:10].lower() == "multipart/":
        form = _read_form(content_type, body)
        return _envelope(path, _model(_text(form, "model")), _stream(_truth(_text(form, "stream"))), says_usage=True)
    said: dict[type, Any] = {}

    def note(kind: type, value: Any) -> object:
        said[kind] = _TWICE if kind in said else value
        return _MARKS[kind]

    try:
        if not body.isascii():
            _check_utf8(body)
        fields = msgspec.json.decode(body, type=_Body, dec_hook=note)
    except (ValueError, RecursionError) as error:
        _refuse(body, error)
    options = fields.stream_options
    return _envelope(
        path,
        _model(said.get(_Model)),
        _stream(said.get(_Stream)),
        fields.store is not None and bool(fields.store),
        isinstance(options, dict) and options.get("include_usage") is True,
        options is not msgspec.UNSET,
    )


def asking_for_usage(body: bytes) -> bytes:
    """Return the body of a request, a JSON object with a field at least, that also asks for the tokens of its stream.

    >>> asking_for_usage(b' {"model": "m", "stream": true}')
    b' {"stream_options":{"include_usage":true},"model": "m", "stream": true}'
    """
    place = body.index(b"{") + 1
    return b"".join((memoryview(body)[:place], _USAGE_FIELD, memoryview(body)[place:]))


@lru_cache(maxsize=1024)
def _envelope(path: str, model: str, stream: bool, stored: bool = False, wants_usage: bool = False, says_usage: bool = False) -> Envelope:
    """Make an envelope; few of them differ, and to find one costs a quarter of making it."""
    leaves_usage = stream and not says_usage and path in _TELLS_USAGE
    return Envelope(model, stream, stored or path not in _REPEATABLE, wants_usage, path, dialect_of(path), leaves_usage)


def _model(value: Any) -> str:
    if isinstance(value, str) and 0 < len(value) <= MAX_MODEL_LENGTH:
        return value
    if value is _TWICE:
        raise EnvelopeError("The body names model twice; send it once", "model")
    if value is None or value == "":
        raise EnvelopeError("The body names no model; add the field model, one of GET /v1/models", "model")
    if isinstance(value, str):
        raise EnvelopeError(f"The model's name is too long; send at most {MAX_MODEL_LENGTH} characters", "model")
    raise EnvelopeError("The field model is not a string; send the model's name", "model")


def _stream(value: Any) -> bool:
    if value is None or value is True or value is False:
        return value is True
    if value is _TWICE:
        raise EnvelopeError("The body names stream twice; send it once", "stream")
    raise EnvelopeError("The field stream is not a boolean; send true or false", "stream")


def _check_utf8(body: bytes) -> None:
    """Find what msgspec overlooks in strings that it skips; in pieces, lest 20 MiB of body become 80 of text."""
    if len(body) <= _PIECE:
        body.decode()
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(body), _PIECE):
        decoder.decode(body[start : start + _PIECE])
    decoder.decode(b"", True)


def _refuse(body: bytes, error: ValueError | RecursionError) -> NoReturn:
    if isinstance(error, RecursionError):
        message = "The body's JSON is nested too deeply; send fewer levels"
    elif isinstance(error, UnicodeDecodeError):
        message = "The body is not UTF-8; encode it as UTF-8"
    elif not body.strip():
        message = "The body is empty; send a JSON object with the field model"
    elif not isinstance(error, ValidationError):
        message = f"The body is not valid JSON ({error}); send a JSON object"
    elif body.lstrip().startswith(b"{"):
        message = "The body contains a number that is too large; send a smaller one"
    else:
        message = "The body is not a JSON object; send an object with the field model"
    raise EnvelopeError(message, code="invalid_json") from error


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'[ \t]*;[ \t]*({_TOKEN})=(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))[ \t]*')
_HEADER = re.compile(rf"({_TOKEN}):[ \t]*([^\r\n\0]*)")
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_FIELDS = frozenset({"model", "stream"})
_TRUTH = {"true": True, "1": True, "false": False, "0": False, "": False}
_MAX_PART_HEAD = 8192


def _text(form: dict[str, bytes], name: str) -> str | None:
    try:
        return form[name].decode() if name in form else None
    except UnicodeDecodeError:
        raise EnvelopeError(f"The field {name} is not UTF-8; encode it as UTF-8", name) from None


def _truth(text: str | None) -> bool | str | None:
    return None if text is None else _TRUTH.get(text.lower(), text)


def _read_form(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the fields `model` and `stream` of a form, as far as it has them (RFC 7578)."""
    delimiter = b"\r\n--" + _boundary(content_type)
    fields: dict[str, bytes] = {}
    if not body.startswith((delimiter, delimiter[2:])):
        raise EnvelopeError("The form does not begin with its boundary; send multipart/form-data as clients build it")
    at = len(delimiter) if body.startswith(delimiter) else len(delimiter) - 2
    for _ in range(MAX_FORM_PARTS):
        if body.startswith(b"--", at):
            if body[at + 2 :].strip():
                raise EnvelopeError("The form goes on after its end; send one form only")
            return fields
        head_end = body.find(b"\r\n\r\n", at, at + _MAX_PART_HEAD)
        end = body.find(delimiter, head_end + 4)
        if not body.startswith(b"\r\n", at) or head_end < 0 or end < 0:
            raise EnvelopeError("The form is cut off or malformed; send multipart/form-data as clients build it")
        name = _part_name(body[at + 2 : head_end])
        if name in fields:
            raise EnvelopeError(f"The form names {name} twice; send it once", name)
        if name in _FIELDS:
            fields[name] = body[head_end + 4 : end]
        at = end + len(delimiter)
    raise EnvelopeError(f"The form has too many parts; send at most {MAX_FORM_PARTS - 1}")


def _boundary(content_type: str) -> bytes:
    kind, parameters = _parameters(content_type)
    boundary = parameters.get("boundary", "")
    if kind != "multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
        raise EnvelopeError("The Content-Type cannot be read; send multipart/form-data with its boundary, or application/json")
    if parameters.get("charset", "utf-8").lower() != "utf-8":
        raise EnvelopeError("The form is not UTF-8; encode it as UTF-8")
    return boundary.encode()


def _part_name(head: bytes) -> str:
    try:
        headers = [_header(line) for line in head.decode().split("\r\n")]
    except UnicodeDecodeError:
        raise EnvelopeError("A part of the form has a head that is not UTF-8; encode it as UTF-8") from None
    dispositions = [value for key, value in headers if key == "content-disposition"]
    encodings = {value.lower() for key, value in headers if key == "content-transfer-encoding"}
    if len(dispositions) != 1 or encodings - {"7bit", "8bit", "binary"}:
        raise EnvelopeError("A part of the form has no plain Content-Disposition; send multipart/form-data as clients build it")
    kind, parameters = _parameters(dispositions[0])
    name = parameters.get("name", "")
    if kind != "form-data" or not name or "\\" in name or "name*" in parameters:
        raise EnvelopeError("A part of the form has no plain name; send multipart/form-data as clients build it")
    if name in _FIELDS and not parameters.keys().isdisjoint({"filename", "filename*"}):
        raise EnvelopeError(f"The field {name} is sent as a file; send it as plain text", name)
    return name


def _header(line: str) -> tuple[str, str]:
    match = _HEADER.fullmatch(line)
    if match is None:
        raise EnvelopeError("A part of the form has a malformed head; send multipart/form-data as clients build it")
    return match[1].lower(), match[2].rstrip(" \t")


def _parameters(value: str) -> tuple[str, dict[str, str]]:
    """Split a header value into its first word and its parameters, names in lower case; no parameters if one is malformed."""
    kind, semicolon, _ = value.partition(";")
    parameters: dict[str, str] = {}
    at = len(kind) if semicolon else len(value)
    while at < len(value):
        match = _PARAMETER.match(value, at)
        if match is None or match[1].lower() in parameters:
            return kind, {}
        parameters[match[1].lower()] = match[3] if match[2] is None else match[2]
        at = match.end()
    return kind.strip().lower(), parameters
