"""What the gateway has to know about a request; it relays the original bytes of the body.

1. The server must read the same `model` and `stream` as the gateway did: a body that has either twice is rejected, and so
   is a form that two parsers could read differently. Go's JSON parser ignores case (Unicode simple folding), and the last of several
   such names counts: a body in which `Model` or `\u017ftream` stands at the top level is rejected, too. The same holds for
   `previous_response_id` where responses are made: the gateway checks whose response it is.
2. A body may be hostile: too deep, not UTF-8, not JSON, its numbers endless. Each of these raises an `EnvelopeError`, never another
   exception, and costs little more time and memory than a proper body of the same size.

A body is parsed once if the gateway knows all its names, as it knows the names of the usual parameters: none of those folds to `model` or
`stream`. Only a body with an unknown name is parsed again, by a decoder that knows every other spelling of the two. Both decoders look at
the top level only, so a prompt or a tool may contain any name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Annotated, Any, NoReturn, cast

import msgspec
from attrs import Factory, evolve, field, frozen
from msgspec import Meta, Raw, Struct, ValidationError

from multiverse_gateway.core.dialects import Dialect, dialect_of
from multiverse_gateway.core.lenient import is_utf8
from multiverse_gateway.core.paths import is_below
from multiverse_gateway.core.servers import ServerId, model_key

MAX_MODEL_LENGTH = 256
"""Longest model name, in characters."""
MAX_FORM_PARTS = 256
"""Most fields and files in one form."""

JSON_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/reranking",
        "/v1/score",
        "/v1/moderations",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
    }
)
RESPONSES = "/v1/responses"
"""Where responses are made. The calls below it (`compact`, `input_tokens`) may continue a stored response, too."""
LOOKUP = f"{RESPONSES}/*"
"""Stands for the path of every call for a stored response wherever the gateway remembers paths."""
_LARGE = 1 << 18
"""From this size on, the types of `model` and `stream` are checked before their values are made: a list of 7 million lists is 400 MB."""
_MOST_COLONS = 1_000_000
"""A body with unknown names and more colons is rejected: reading its names could take longer than 100 ms."""
_TELLS_USAGE = frozenset({"/v1/chat/completions", "/v1/completions"})
_USAGE_FIELD = b'"stream_options":{"include_usage":true},'
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


class EnvelopeError(Exception):
    """A request that cannot be read: why, and what to send instead; `param` and `code` are those of OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


@frozen
class Envelope:
    """What decides how a request is routed and retried.

    A `stateful` request leaves something behind on its server, or depends on what another one left there: it is retried only if the
    server refused it before doing anything. A call that the gateway does not know is stateful.
    `stream`: the answer has to be a stream of events. A path that has no streams may be asked for one (embeddings, rerank, audio); its
    plain answer is as good. `wants_usage` is `stream_options.include_usage`. `leaves_usage` holds for a stream that could report its
    tokens, if the client does not set `stream_options`.

    `response_id` is that of the stored response that the request needs; `server_id` and `generation` are set once the gateway knows which
    server has it, and then no other server may answer. `is_lookup`: the request asks only for what is stored, or ends it, and makes
    nothing: it carries no model and no body that is read.
    """

    model: str
    stream: bool
    stateful: bool
    wants_usage: bool
    path: str
    dialect: Dialect
    leaves_usage: bool = False
    names_response: bool = False
    """Whether the request carries the id of a stored response, so that "not found" in an answer speaks of that one."""
    written_model: str = field(default=Factory(lambda self: self.model, takes_self=True))
    """The model's name as the body has it; `model` is its key (`core.servers.model_key`)."""
    response_id: str | None = None
    server_id: ServerId | None = None
    generation: int = 0
    method: str = "POST"
    is_lookup: bool = False
    answers_json: bool = field(init=False)
    """Whether the answer is JSON, or a stream of events."""
    stores_response: bool = field(init=False)
    """Whether the server keeps what it answers, so that later requests may name it."""

    call: str = field(init=False)
    """The path as it is remembered of servers: one for all look-ups, whose own paths hold ids."""

    @answers_json.default
    def _is_answered_with_json(self) -> bool:
        return self.path in JSON_PATHS or self.is_lookup

    @call.default
    def _is_called(self) -> str:
        return LOOKUP if self.is_lookup else self.path

    @stores_response.default
    def _is_stored(self) -> bool:
        return self.path == RESPONSES and self.stateful


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


def is_form(content_type: str) -> bool:
    """Return whether a body of this type is read as a form; every other body is read as JSON, and servers must be told so.

    >>> is_form("Multipart/form-data; boundary=x"), is_form("application/x-www-form-urlencoded")
    (True, False)
    """
    return content_type[:10].lower() == "multipart/"


def read_envelope(path: str, content_type: str, body: bytes) -> Envelope:
    """Read the envelope of a request to the API path: of a form if `content_type` is multipart, else of a JSON object.

    >>> read_envelope("/v1/embeddings", "application/json", b'{"model": "bge-m3", "input": "hello"}').model
    'bge-m3'

    Raises:
        EnvelopeError: The request has no readable model, or could be read in more than one way.
    """
    if content_type != "application/json" and is_form(content_type):
        form = _read_form(content_type, body)
        return _envelope(path, _model(_text(body, form, "model")), _stream(_truth(_text(body, form, "stream"))), says_usage=True)
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
    model, stream, options = _model(values.get(_Model)), _stream(values.get(_Stream)), fields.stream_options
    says_usage = options is not _ABSENT
    wants_usage = says_usage and _includes_usage(bytes(options))
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
    found: list[Any] = []

    def note(kind: type, value: Any) -> object:
        found.append(value)
        return _MARKS[kind]

    msgspec.json.decode(body, type=_Continuations, dec_hook=note)
    if len(found) > 1:
        raise EnvelopeError("The body names previous_response_id twice; send it once", "previous_response_id")
    return found[0] or None


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
        raise EnvelopeError("The body has too many fields. Send fewer, or none that the API does not have.", code="invalid_json")
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


def asking_for_usage(body: bytes) -> bytes:
    """Return the body of a request, a JSON object with a field at least, that also asks for the tokens of its stream.

    >>> asking_for_usage(b' {"model": "m", "stream": true}')
    b' {"stream_options":{"include_usage":true},"model": "m", "stream": true}'
    """
    place = body.index(b"{") + 1
    return b"".join((memoryview(body)[:place], _USAGE_FIELD, memoryview(body)[place:]))


def with_model(body: bytes, content_type: str, model: str) -> bytes:
    """Return the body of a request that `read_envelope` accepts with another name of its model; all other bytes stay as they are.

    >>> with_model(b'{"messages": [], "model" : "llama3.2"}', "application/json", "llama3.2:latest")
    b'{"messages": [], "model" : "llama3.2:latest"}'
    """
    if is_form(content_type):
        place, value = _read_form(content_type, body)["model"], model.encode()
    else:
        place, value = _place_of_model(body), msgspec.json.encode(model)
    return b"".join((memoryview(body)[: place.start], value, memoryview(body)[place.stop :]))


class _Named(Struct, gc=False):
    model: Raw


def _place_of_model(body: bytes) -> slice:
    """Return where a JSON object has the value of its top-level field `model`.

    msgspec does not report positions, but what it returns as `Raw` is a view of the text that it read. So the value is found by
    overwriting halves of a copy and looking whether the view changes; this takes less time than parsing the text a second time.
    """
    text = bytearray(body)
    value = memoryview(msgspec.json.decode(text, type=_Named).model)
    first, last = 0, len(text) - len(value)
    while first < last:
        middle = (first + last) // 2
        text[first : middle + 1] = bytes(middle + 1 - first)
        if value[0]:  # a quotation mark, and not overwritten: the value begins later
            first = middle + 1
        else:
            text[first : middle + 1] = body[first : middle + 1]
            last = middle
    return slice(first, first + len(value))


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
        message = "The body's JSON is nested too deeply; send fewer levels"
    elif not body.strip():
        message = "The body is empty; send a JSON object with the field model"
    elif not isinstance(error, ValidationError):
        message = f"The body is not valid JSON ({error}); send a JSON object"
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


def _text(body: bytes, form: dict[str, slice], name: str) -> str | None:
    try:
        return body[form[name]].decode() if name in form else None
    except UnicodeDecodeError:
        raise EnvelopeError(f"The field {name} is not UTF-8; encode it as UTF-8", name) from None


def _truth(text: str | None) -> bool | str | None:
    return None if text is None else _TRUTH.get(text.lower(), text)


def _read_form(content_type: str, body: bytes) -> dict[str, slice]:
    """Return where a form has the values of its fields `model` and `stream`, as far as it has them (RFC 7578)."""
    delimiter = b"\r\n--" + _boundary(content_type)
    fields: dict[str, slice] = {}
    if not body.startswith((delimiter, delimiter[2:])):
        raise EnvelopeError("The form does not begin with its boundary; send multipart/form-data as clients build it")
    at = len(delimiter) if body.startswith(delimiter) else len(delimiter) - 2
    for _ in range(MAX_FORM_PARTS):
        if body.startswith(b"--", at):
            if body[at + 2 :].strip():
                raise EnvelopeError("The form continues after its closing boundary; send one form only")
            return fields
        head_end = body.find(b"\r\n\r\n", at, at + _MAX_PART_HEAD)
        end = body.find(delimiter, head_end + 4)
        if not body.startswith(b"\r\n", at) or head_end < 0 or end < 0:
            raise EnvelopeError("The form is cut off or malformed; send multipart/form-data as clients build it")
        name = _part_name(body[at + 2 : head_end])
        if name in fields:
            raise EnvelopeError(f"The form names {name} twice; send it once", name)
        if name in _FIELDS:
            fields[name] = slice(head_end + 4, end)
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
