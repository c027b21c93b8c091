"""Read what the gateway must know of the JSON in an event or an answer, and nothing else.

The fields that matter are decoded into structs, which costs little. Where a field has a type or a number that no specification gives
it, the payload is read once more, loosely: the odd field counts as absent, because servers differ and clients cope. Values whose length
a server chooses are kept raw, so that no payload takes many times its length in memory.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import DecodeError, Meta, Raw, Struct, ValidationError

MAX_REPORTED_TOKENS = 10_000_000
"""Prompt or completion tokens that are believed of one answer: a larger figure counts as this one, so that no server can overflow a sum."""

_MAX_VALUE_BYTES = 256
_MAX_NUMBER_BYTES = 400
_MAX_SEQUENCE_NUMBER = 1 << 53
_MAX_ODD_CHOICES = 128
_LONG_BYTES = 1 << 16
_MAX_VALUES = 1 << 13
"""Lists and objects in a long event that are decoded. No server sends as many, and a megabyte of empty ones takes 30 ms."""
_MAX_USAGE_EVENT_BYTES = 1 << 16
_ABSENT = Raw(b"null")

_Tokens = Annotated[int, Meta(ge=0, le=MAX_REPORTED_TOKENS)]
_SequenceNumber = Annotated[int, Meta(ge=0, le=_MAX_SEQUENCE_NUMBER)]


class Choice(Struct, gc=False):
    """One choice in a chunk of a chat or text completion."""

    index: int = 0
    finish_reason: Any = None

    @property
    def has_finished(self) -> bool:
        """Return whether the reason says something: a non-empty string other than `"null"`."""
        reason = self.finish_reason
        return type(reason) is str and reason not in ("", "null")


class TokenCounts(Struct, gc=False):
    """The tokens that an answer reports, under OpenAI's names or Anthropic's."""

    prompt_tokens: _Tokens = 0
    completion_tokens: _Tokens = 0
    input_tokens: _Tokens = 0
    output_tokens: _Tokens = 0

    def tokens(self) -> tuple[int, int]:
        """Return the prompt and completion tokens, 0 where nothing is reported."""
        return self.prompt_tokens or self.input_tokens, self.completion_tokens or self.output_tokens


class Carrier(Struct, gc=False):
    """A response or a message as far as an event tells of it; `value_of` decodes its `id`."""

    usage: TokenCounts | None = None
    id: Raw = _ABSENT


class Chunk(Struct):
    """An event of a chat or text completion; `error` is falsy if it reports none."""

    choices: list[Choice] | None = None
    error: Any = None
    usage: TokenCounts | None = None
    type: str | None = None


class NamedEvent(Struct):
    """An event of any other stream, which may be large; `is_truthy` says whether `error` reports one."""

    type: str | None = None
    sequence_number: _SequenceNumber | None = None
    response: Carrier | None = None
    message: Carrier | None = None
    usage: TokenCounts | None = None
    error: Raw = Raw(b"")


class _OddChoice(Struct, gc=False):
    index: Raw = Raw(b"0")
    finish_reason: Raw = _ABSENT


class _OddEvent(Struct, gc=False):
    choices: Raw = _ABSENT
    error: Raw = _ABSENT
    usage: Raw = _ABSENT
    type: Raw = _ABSENT
    response: Raw = _ABSENT
    message: Raw = _ABSENT
    sequence_number: Raw = _ABSENT


class _OddUsage(Struct, gc=False):
    prompt_tokens: Raw = _ABSENT
    completion_tokens: Raw = _ABSENT
    input_tokens: Raw = _ABSENT
    output_tokens: Raw = _ABSENT


class _OddCarrier(Struct, gc=False):
    usage: Raw = _ABSENT
    id: Raw = _ABSENT


class _Timed(Struct, gc=False):
    timings: Raw = _ABSENT


class _Timings(Struct, gc=False):
    prompt_n: Raw = _ABSENT
    cache_n: Raw = _ABSENT
    predicted_n: Raw = _ABSENT


class _Object(Struct, gc=False):
    object: Raw = _ABSENT


_CHUNK = msgspec.json.Decoder(Chunk)
_NAMED_EVENT = msgspec.json.Decoder(NamedEvent)
_OBJECT = msgspec.json.Decoder(_Object)
_ODD_EVENT = msgspec.json.Decoder(_OddEvent)
_ODD_CHOICES = msgspec.json.Decoder(list[_OddChoice | list[Raw] | str | int | float | bool | None])
_ODD_USAGE = msgspec.json.Decoder(_OddUsage)
_ODD_CARRIER = msgspec.json.Decoder(_OddCarrier)
_TIMED = msgspec.json.Decoder(_Timed)
_TIMINGS = msgspec.json.Decoder(_Timings)
_MEMBERS = msgspec.json.Decoder(dict[str, Raw])
_MEMBERS_OF_USAGE_EVENT = frozenset(
    {"id", "object", "created", "model", "system_fingerprint", "service_tier", "obfuscation", "choices", "usage"}
)


decode_chunk = _CHUNK.decode
"""Decode a chunk whose fields have the types that they should have, or raise."""


def read_chunk(data: bytes) -> Chunk | None:
    """Return what the data of an event of a chat or text completion says; `None` if msgspec does not read it as an object.

    Raises:
        RecursionError: It is nested too deeply.

    >>> read_chunk(b'{"choices": [{"index": 0, "finish_reason": "stop"}]}').choices
    [Choice(index=0, finish_reason='stop')]
    """
    try:
        if not _is_bloated(data):
            return decode_chunk(data)
    except ValidationError:
        pass
    except DecodeError:
        return None
    odd = _odd_event(data)
    return None if odd is None else Chunk(_odd_choices(odd.choices), is_truthy(odd.error), _odd_usage(odd.usage), _text(odd.type))


def read_event(data: bytes) -> NamedEvent | None:
    """Return what the data of an event of any other stream says; `None` if msgspec does not read it as an object.

    Raises:
        RecursionError: It is nested too deeply.
    """
    try:
        return _NAMED_EVENT.decode(data)
    except ValidationError:
        odd = _odd_event(data)
        if odd is None:
            return None
        number = value_of(odd.sequence_number)
        return NamedEvent(
            type=_text(odd.type),
            sequence_number=number if type(number) is int and 0 <= number <= _MAX_SEQUENCE_NUMBER else None,
            response=_carrier(odd.response),
            message=_carrier(odd.message),
            usage=_odd_usage(odd.usage),
            error=odd.error,
        )
    except DecodeError:
        return None


def _odd_event(data: bytes) -> _OddEvent | None:
    try:
        return _ODD_EVENT.decode(data)
    except DecodeError:
        return None


def _carrier(raw: Raw) -> Carrier:
    try:
        odd = _ODD_CARRIER.decode(raw)
    except DecodeError:
        return Carrier()
    return Carrier(_odd_usage(odd.usage), odd.id)


def _is_bloated(data: bytes | Raw) -> bool:
    """Return whether a long text holds so many lists or objects that decoding them would keep other requests waiting."""
    text = bytes(data)
    return len(text) > _LONG_BYTES and text.count(b"{") + text.count(b"[") > _MAX_VALUES


def _odd_choices(raw: Raw) -> list[Choice]:
    """Return the choices of an event with odd types; of a bloated one none, which leaves it to `[DONE]` to say that the stream is whole."""
    if _is_bloated(raw):
        return []
    try:
        items = _ODD_CHOICES.decode(raw)
    except DecodeError:
        return []
    return [
        Choice(index if type(index := value_of(item.index)) is int else 0, value_of(item.finish_reason))
        for item in items[:_MAX_ODD_CHOICES]
        if isinstance(item, _OddChoice)
    ]


def _odd_usage(raw: Raw) -> TokenCounts:
    try:
        odd = _ODD_USAGE.decode(raw)
    except DecodeError:
        return TokenCounts()
    return TokenCounts(_count(odd.prompt_tokens), _count(odd.completion_tokens), _count(odd.input_tokens), _count(odd.output_tokens))


def tokens_of(usage: Raw) -> tuple[int, int]:
    """Return the prompt and completion tokens that the field `usage` of an answer reports, 0 where it reports none.

    >>> tokens_of(Raw(b'{"prompt_tokens": 7, "completion_tokens": 2.0, "total_tokens": "nine"}'))
    (7, 2)
    """
    return _odd_usage(usage).tokens()


def timed_tokens(data: bytes) -> tuple[int, int]:
    """Return the prompt and completion tokens that llama.cpp reports in its last chunk without being asked, 0 where there are none.

    >>> timed_tokens(b'{"timings": {"cache_n": 30, "prompt_n": 7, "predicted_n": 2}}')
    (37, 2)
    """
    try:
        timings = _TIMINGS.decode(_TIMED.decode(data).timings)
    except DecodeError:
        return 0, 0
    return min(_count(timings.prompt_n) + _count(timings.cache_n), MAX_REPORTED_TOKENS), _count(timings.predicted_n)


def _count(raw: Raw) -> int:
    """Return a number of tokens between 0 and `MAX_REPORTED_TOKENS`, 0 for anything that is not a number."""
    try:
        return int(min(max(float(bytes(raw)[:_MAX_NUMBER_BYTES]), 0), MAX_REPORTED_TOKENS))
    except ValueError:
        return 0


def value_of(raw: Raw) -> Any:
    """Decode a short value; True stands for one that is long or cannot be represented: an endless number, text that is not UTF-8."""
    try:
        return msgspec.json.decode(raw) if len(raw) <= _MAX_VALUE_BYTES else True
    except ValueError:
        return True


def _text(raw: Raw) -> str | None:
    value = value_of(raw)
    return value if isinstance(value, str) else None


def is_truthy(value: Any) -> bool:
    """Return whether a value, decoded or `Raw`, is neither null, false nor 0, nor an empty text, list or object."""
    return bool(value_of(value) if value and type(value) is Raw else value)


def names_error(data: bytes) -> bool:
    """Return whether an object calls itself an error by its `object`, as those of vLLM do."""
    return bool(value_of(_OBJECT.decode(data).object) == "error")


def carries_more(data: bytes) -> bool:
    """Return whether an event with token counts holds anything else; members that are null count as absent."""
    if len(data) > _MAX_USAGE_EVENT_BYTES:
        return True
    return any(name not in _MEMBERS_OF_USAGE_EVENT and bytes(value) != b"null" for name, value in _MEMBERS.decode(data).items())
