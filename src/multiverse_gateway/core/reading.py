"""Read the envelope of a request from its body; the gateway relays the original bytes.

1. The server must read the same `model` and `stream` as the gateway did: a body that has either twice is rejected, and so
   is a form that two parsers could read differently. Go's JSON parser ignores case (Unicode simple folding), and the last of several
   such names counts: a body in which `Model` or `\u017ftream` stands at the top level is rejected, too. The same holds for
   `previous_response_id` where responses are made: the gateway checks whose response it is.
2. A body may be hostile: too deep, not UTF-8, not JSON, its numbers endless. Each of these raises an `EnvelopeError`, never another
   exception, and costs little more time and memory than a proper body of the same size.

A body is parsed once if the gateway knows all its names, as it knows the names of the usual parameters: none of those folds to `model` or
`stream`. Only a body with an unknown name is parsed again, by a decoder that knows every other spelling of the two. Both decoders look at
the top level only, so a prompt or a tool may contain any name.

Two things save time. Few envelopes differ, so each one is made once and then looked up, in a quarter of the time. And msgspec makes
values of `model`, `stream` and `previous_response_id` only; it keeps the other fields that count as views of the bytes (`Raw`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Annotated, Any, NoReturn, cast

import msgspec
from attrs import evolve
from msgspec import Meta, Raw, Struct, ValidationError

from multiverse_gateway.core.dialects import Dialect, dialect_of
from multiverse_gateway.core.envelope import RESPONSES, Envelope, EnvelopeError
from multiverse_gateway.core.forms import is_form, read_form, text_of, truth_of
from multiverse_gateway.core.lenient import is_utf8
from multiverse_gateway.core.paths import is_below
from multiverse_gateway.core.servers import model_key

MAX_MODEL_LENGTH = 256
"""Longest model name, in characters."""
_LARGE = 1 << 18
"""From this size on, the types of `model` and `stream` are checked before their values are made: a list of 7 million lists is 400 MB."""
_MOST_COLONS = 1_000_000
"""A body with unknown names and more colons is rejected: reading its names could take longer than 100 ms."""
_TELLS_USAGE = frozenset({"/v1/chat/completions", "/v1/completions"})
_STATELESS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/reranking",
        "/v1/score",
        "/v1/moderations",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/images/generations",
    }
)
_STATELESS_BELOW = "/v1/audio/"


class _Model:
    """Stands for the value of `model`; msgspec passes each occurrence to the hook."""


class _Stream:
    """Stands for the value of `stream`."""


class _ResponseId:
    """Stands for the value of `previous_response_id`."""


_MARKS: dict[type, Any] = {_Model: _Model(), _Stream: _Stream(), _ResponseId: _ResponseId()}
_TWICE = object()
_ABSENT = Raw(b"")


class _Body(Struct, gc=False):
    model: _Model = _MARKS[_Model]  # not optional: a null must reach the hook, too
    stream: _Stream = _MARKS[_Stream]
    stream_options: Raw = _ABSENT
    store: Raw = _ABSENT
    background: Raw = _ABSENT
    previous_response_id: Raw = _ABSENT
    conversation: Raw = _ABSENT


class _Types(Struct, gc=False):
    model: str | None = None
    stream: bool | None = None


class _Continuation(Struct, gc=False):
    previous_response_id: str | None = None


class _Continuations(Struct, gc=False):
    previous_response_id: _ResponseId = _MARKS[_ResponseId]


_PREVIOUS = "previous_response_id"
_USUAL_OPTIONS = frozenset({b'{"include_usage":true}', b'{"include_usage": true}'})


class _StreamOptions(Struct, gc=False):
    include_usage: Raw = _ABSENT


_KNOWN_NAMES = (  # noqa: SIM905  a list of 40 lines otherwise
    "messages model "
    "background chat_template_kwargs conversation encoding_format frequency_penalty include input instructions logprobs "
    "max_completion_tokens max_output_tokens max_tokens metadata min_p n parallel_tool_calls presence_penalty previous_response_id prompt "
    "query documents reasoning reasoning_effort repetition_penalty response_format seed stop stop_sequences store stream stream_options "
    "system temperature text thinking tool_choice tools top_k top_n top_p user"
).split()
"""The usual parameters of OpenAI, Anthropic and vLLM, nearly in the order in which OpenAI's libraries write them: msgspec looks for a name
behind the one before it, and each name that is missing in a body costs 3 ns. A parameter that is missing here costs 2 µs, nothing else."""


def _spellings(name: str) -> list[str]:
    """Return every other spelling that folds to a name of lower-case letters (Go's `strings.EqualFold`; U+212A would be that of k)."""
    letters = [(letter, letter.upper(), "\u017f") if letter == "s" else (letter, letter.upper()) for letter in name]
    return [spelling for spelling in map("".join, product(*letters)) if spelling != name]


_Unfit = Annotated[str, Meta(min_length=1, max_length=0)]
"""A type without values: any value of such a field is a `ValidationError`."""
_ODD_NAMES = {f"odd_{number}": name for number, name in enumerate(_spellings("model") + _spellings("stream"))}
_OWN = {field.name: field for field in msgspec.structs.fields(_Body)}
_UsualBody = cast(
    type[_Body],
    msgspec.defstruct(
        "_UsualBody",
        [(name, _OWN[name].type, _OWN[name].default) if name in _OWN else (name, Raw, _ABSENT) for name in _KNOWN_NAMES],
        gc=False,
        forbid_unknown_fields=True,
    ),
)
_AnyBody = cast(
    type[_Body], msgspec.defstruct("_AnyBody", [(name, _Unfit, "") for name in _ODD_NAMES], bases=(_Body,), gc=False, rename=_ODD_NAMES)
)
_FIELD = re.compile(r"at `\$\.(\w+)`$")


def read_envelope(path: str, content_type: str, body: bytes) -> Envelope:
    """Read the envelope of a request to the API path: of a form if `content_type` is multipart, else of a JSON object.

    >>> read_envelope("/v1/embeddings", "application/json", b'{"model": "bge-m3", "input": "hello"}').model
    'bge-m3'

    Raises:
        EnvelopeError: The request has no readable model, or could be read in more than one way.
    """
    if content_type != "application/json" and is_form(content_type):
        form = read_form(content_type, body)
        return _envelope(path, _model(text_of(body, form, "model")), _stream(truth_of(text_of(body, form, "stream"))), says_usage=True)
    values: dict[type, Any] = {}

    def note(kind: type, value: Any) -> object:
        values[kind] = _TWICE if kind in values else value
        return _MARKS[kind]

    try:
        if not body.isascii() and not is_utf8(body):
            raise EnvelopeError("The body is not UTF-8; encode it as UTF-8", code="invalid_json")
        if len(body) > _LARGE:
            _check_types(body)
        try:
            fields = msgspec.json.decode(body, type=_UsualBody, dec_hook=note)
        except ValidationError:
            values.clear()
            fields = _decode_any(body, note)
            if is_below(path, RESPONSES):
                _refuse_odd_continuation(body)
    except (ValueError, RecursionError) as error:
        _refuse(body, error)
    model, stream = values.get(_Model), values.get(_Stream)
    if type(model) is not str or not 0 < len(model) <= MAX_MODEL_LENGTH:  # as `_model` asks: nearly all are sound, and it saves a call
        model = _model(model)
    stream = False if stream is None else stream if stream is True or stream is False else _stream(stream)
    says_usage = fields.stream_options is not _ABSENT
    wants_usage = says_usage and _includes_usage(bytes(fields.stream_options))
    if fields.store is fields.background is fields.previous_response_id is fields.conversation:  # nearly always: all are absent
        return _envelope(path, model, stream, path == RESPONSES, wants_usage, says_usage)
    names_response = bytes(fields.previous_response_id) not in _NO
    envelope = _envelope(path, model, stream, _is_stateful(path, fields), wants_usage, says_usage, names_response)
    if fields.previous_response_id is not _ABSENT and is_below(path, RESPONSES):
        return evolve(envelope, response_id=_response_id(body))
    return envelope


def _response_id(body: bytes) -> str | None:
    """Return the response that a body continues, `None` for an empty one.

    Raises:
        EnvelopeError: It is not a string, or the body has it twice.
    """
    try:
        msgspec.json.decode(body, type=_Continuation)
    except ValidationError:
        raise EnvelopeError("The field previous_response_id is not a string; send the id of a response", "previous_response_id") from None
    ids: list[Any] = []

    def note(kind: type, value: Any) -> object:
        ids.append(value)
        return _MARKS[kind]

    msgspec.json.decode(body, type=_Continuations, dec_hook=note)
    if len(ids) > 1:
        raise EnvelopeError("The body names previous_response_id twice; send it once", "previous_response_id")
    return ids[0] or None


_NO = frozenset({b"", b"null", b"false"})


def _is_stateful(path: str, fields: _Body) -> bool:
    """Return whether a JSON request leaves something on its server, or needs what is there; a response is stored unless it says not to."""
    if path == RESPONSES and bytes(fields.store) != b"false":
        return True
    return any(bytes(value) not in _NO for value in (fields.store, fields.background, fields.previous_response_id, fields.conversation))


def _decode_any(body: bytes, note: Callable[[type, Any], object]) -> _Body:
    """Decode a body with names that are not known.

    Raises:
        EnvelopeError: A name could be read as `model` or `stream`, or there are too many names to look at.
        ValueError: The body cannot be decoded.
    """
    if len(body) > _MOST_COLONS and body.count(b":") > _MOST_COLONS:
        raise EnvelopeError("The body has too many fields. Send fewer fields, and only those of the API.", code="invalid_json")
    try:
        return msgspec.json.decode(body, type=_AnyBody, dec_hook=note)
    except ValidationError as error:
        _refuse_field(error)
        raise


def _refuse_odd_continuation(body: bytes) -> None:
    """Refuse a name that some servers read as `previous_response_id`."""
    for name in msgspec.json.decode(body, type=dict[str, Raw]):
        if name != _PREVIOUS and len(name) == len(_PREVIOUS) and name.casefold() == _PREVIOUS:
            raise EnvelopeError(f"The body has a field `{name}`, which some servers read as `{_PREVIOUS}`. Use that spelling.", _PREVIOUS)


def _check_types(body: bytes) -> None:
    """Reject a large body whose `model` or `stream` is of the wrong type, without making a value of it."""
    try:
        msgspec.json.decode(body, type=_Types)
    except ValidationError as error:
        _refuse_field(error)
        raise


def _refuse_field(error: ValidationError) -> None:
    """Raise what is wrong with the top-level field that msgspec names in its message, if it names one."""
    field = _FIELD.search(str(error))
    if field is None:
        return
    written = field[1]
    if written == "model":
        _model(0)
    if written == "stream":
        _stream(0)
    name = "model" if len(written) == len("model") else "stream"
    raise EnvelopeError(
        f"The body has a field `{written}`, which some servers read as `{name}`. Spell it `{name}`, and send it once.", name
    )


def _includes_usage(options: bytes) -> bool:
    if options in _USUAL_OPTIONS:
        return True
    try:
        return bytes(msgspec.json.decode(options, type=_StreamOptions).include_usage) == b"true"
    except (ValueError, RecursionError):
        return False


@lru_cache(maxsize=1024)
def _envelope(
    path: str,
    model: str,
    stream: bool,
    keeps: bool = False,
    wants_usage: bool = False,
    says_usage: bool = False,
    names_response: bool = False,
) -> Envelope:
    """Make an envelope; few of them differ, and to find one costs a quarter of making it."""
    dialect = dialect_of(path)
    stream = stream and dialect is not Dialect.OTHER
    leaves_usage = stream and not says_usage and path in _TELLS_USAGE
    stateful = keeps or not (path in _STATELESS or path == RESPONSES or path.startswith(_STATELESS_BELOW))
    return Envelope(model_key(model), stream, stateful, wants_usage, path, dialect, leaves_usage, names_response, model)


def _model(value: Any) -> str:
    if isinstance(value, str) and 0 < len(value) <= MAX_MODEL_LENGTH:
        return value
    if value is _TWICE:
        raise EnvelopeError("The body names model twice; send it once", "model")
    if value is None or value == "":
        raise EnvelopeError("The body names no model; add the field model with a name that GET /v1/models lists", "model")
    if isinstance(value, str):
        raise EnvelopeError(f"The model's name is too long; send at most {MAX_MODEL_LENGTH} characters", "model")
    raise EnvelopeError("The field model is not a string; send the model's name", "model")


def _stream(value: Any) -> bool:
    if value is None or value is True or value is False:
        return value is True
    if value is _TWICE:
        raise EnvelopeError("The body names stream twice; send it once", "stream")
    raise EnvelopeError("The field stream is not a boolean; send true or false", "stream")


def _refuse(body: bytes, error: ValueError | RecursionError) -> NoReturn:
    if isinstance(error, RecursionError):
        message = "The body's JSON is nested too deeply; use fewer levels"
    elif not body.strip():
        message = "The body is empty; send a JSON object with the field model"
    elif not isinstance(error, ValidationError):
        message = f"The body is not valid JSON ({error}); send a JSON object"
    else:
        message = "The body is not a JSON object; send an object with the field model"
    raise EnvelopeError(message, code="invalid_json") from error
