"""Follow a stream of server-sent events: find where events end, check them, and decide whether the stream is complete.

1. Only complete events are relayed, byte for byte, so that an error event can never be glued onto half an event.
   Events with empty data are heartbeats and are dropped, as is everything before the first data event.
2. Nothing is relayed after the stream's own last event, after an error event, or from the first malformed event on.
   An error event that clients cannot read as an error is not relayed: the gateway sends its own.
3. A stream without its own last event is complete only if every choice has a finish_reason, which is a non-empty string other than
   `"null"`. The gateway never invents one.
4. One call does a bounded amount of work, whatever a server sends: at most `EVENTS_PER_CALL` events, each at most `max_event_bytes`
   long, in `_MAX_LINES` lines. Costs grow with the number of bytes, never with its square.

Source: WHATWG HTML, 9.2 Server-sent events; OpenAI and Anthropic streaming references.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any

import msgspec
from attrs import define, field
from msgspec import DecodeError, Meta, Raw, Struct, ValidationError

from multiverse_gateway.core.lenient import legible

MAX_EVENT_BYTES = 1 << 20
"""Longest event of a chat or text completion in bytes, its line ends and comments included."""

MAX_LARGE_EVENT_BYTES = 16 << 20
"""Longest event of any other stream in bytes: an image or a whole response can be one event."""

DONE_EVENT = b"data: [DONE]\n\n"
"""Last event of a stream of chat or text completions."""

EVENTS_PER_CALL = 64
"""Events that one call of `EventStream.feed` handles; a run of comments and blank lines counts as one."""

MAX_REPORTED_TOKENS = 10_000_000
"""Prompt or completion tokens that are believed of one answer: a larger figure counts as this one, so that no server can overflow a sum."""

_MAX_CHOICES = 4096
_MAX_ODD_CHOICES = 128
_MAX_LINES = 1 << 14
_MAX_SEQUENCE_NUMBER = 1 << 53
_BOM = b"\xef\xbb\xbf"
_EVENT_END = re.compile(rb"\n(?:\n|\r\n?)|\r\r\n?")
_COMMENTS = re.compile(rb"(?:(?::[^\r\n\x80-\xff]*+(?:\r\n?|\n))*+(?:\r\n?|\n))++")
"""Blank lines, and comments that a blank line ends. The possessive quantifiers keep the engine from storing a way back per line."""


class Dialect(Enum):
    """How a stream names its events, reports errors and ends."""

    CHAT = "chat"
    """Chat and text completions: nameless events, `[DONE]` at the end."""
    RESPONSES = "responses"
    """OpenAI Responses: `response.completed`, `.failed` or `.incomplete` at the end."""
    MESSAGES = "messages"
    """Anthropic Messages: `message_stop` at the end."""
    OTHER = "other"
    """Anything else: no last event of its own."""


_CHAT = Dialect.CHAT  # a look-up in an enum costs as much as a call
_DIALECTS = {
    "/v1/chat/completions": Dialect.CHAT,
    "/v1/completions": Dialect.CHAT,
    "/v1/responses": Dialect.RESPONSES,
    "/v1/messages": Dialect.MESSAGES,
}
_LAST = {
    Dialect.RESPONSES: frozenset({"response.completed", "response.failed", "response.incomplete"}),
    Dialect.MESSAGES: frozenset({"message_stop"}),
}


def dialect_of(path: str) -> Dialect:
    """Return the dialect that the API path is answered in.

    >>> dialect_of("/v1/chat/completions")
    <Dialect.CHAT: 'chat'>
    """
    return _DIALECTS.get(path, Dialect.OTHER)


_Tokens = Annotated[int, Meta(ge=0, le=MAX_REPORTED_TOKENS)]


class _Choice(Struct, gc=False):
    index: int = 0
    finish_reason: Any = None


class Usage(Struct, gc=False):
    """The tokens that an answer reports, under OpenAI's names or Anthropic's."""

    prompt_tokens: _Tokens = 0
    completion_tokens: _Tokens = 0
    input_tokens: _Tokens = 0
    output_tokens: _Tokens = 0

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens, 0 where nothing is reported."""
        return self.prompt_tokens or self.input_tokens, self.completion_tokens or self.output_tokens


class _Carrier(Struct, gc=False):
    usage: Usage | None = None


class _Event(Struct):
    choices: list[_Choice] | None = None
    error: Any = None
    usage: Usage | None = None
    type: str | None = None


class _Named(_Event):
    response: _Carrier | None = None
    message: _Carrier | None = None
    sequence_number: Annotated[int, Meta(ge=0, le=_MAX_SEQUENCE_NUMBER)] | None = None


class _Object(Struct, gc=False):
    object: Any = None


_NAMELESS: msgspec.json.Decoder[_Event] = msgspec.json.Decoder(_Event)
_NAMED: msgspec.json.Decoder[_Event] = msgspec.json.Decoder(_Named)
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_OBJECT = msgspec.json.Decoder(_Object)
_FIELDS_OF_USAGE_EVENT = frozenset(
    {"id", "object", "created", "model", "system_fingerprint", "service_tier", "obfuscation", "choices", "usage"},
)


class _OddChoice(Struct, gc=False):
    index: Raw = Raw(b"0")
    finish_reason: Raw = Raw(b"null")


_ODD_CHOICES = msgspec.json.Decoder(list[_OddChoice | list[Raw] | str | int | float | bool | None])


@define(eq=False)
class EventStream:
    """Follow one stream of events from a server; feed it every chunk of the body, in order.

    Synchronous and bounded: one call handles at most `events_per_call` events. While `has_more`, the caller stops reading from the
    server, lets others have their turn and calls `feed(b"")`, so that it holds at most one unfinished event and one chunk. What all
    calls return together does not depend on how the body is cut into chunks.

    >>> stream = EventStream(Dialect.CHAT)
    >>> stream.feed(b': ping\\n\\ndata: {"choices":[{"index":0,"finish_reason":"stop"}]}\\n\\ndata: [DO')
    b': ping\\n\\ndata: {"choices":[{"index":0,"finish_reason":"stop"}]}\\n\\n'
    >>> stream.complete(), stream.needs_done
    (True, True)
    """

    dialect: Dialect
    max_event_bytes: int = field(default=MAX_EVENT_BYTES, kw_only=True)
    events_per_call: int = field(default=EVENTS_PER_CALL, kw_only=True)
    drops_usage: bool = field(default=False, kw_only=True)
    """The client did not ask for token counts: the event that holds nothing else is read, and not relayed."""

    events: int = field(default=0, init=False)
    """Number of data events relayed, the last one included."""
    first_error: bytes | None = field(default=None, init=False)
    """Data of the first event if that is an error, without white space around it; nothing is returned from it on."""
    ended: bool = field(default=False, init=False)
    """The stream's own last event, or an error event, was relayed; what follows is dropped."""
    failed: bool = field(default=False, init=False)
    """The server reported an error after the first event. It was relayed if the stream `ended`; if the stream is `broken` it was not,
    because clients could not read it as an error."""
    broken: str | None = field(default=None, init=False)
    """Why nothing more can be relayed, for people."""
    over_limit: bool = field(default=False, init=False)
    """The stream is `broken` by a limit of the gateway, for which the server is not to blame."""
    carries_more: bool = field(default=False, init=False)
    """With `drops_usage`: the event with the token counts held other fields, too, and was relayed. Do not ask this server again."""
    is_over: bool = field(default=False, init=False)
    """The stream `ended`, is `broken` or began with an error: nothing more is returned."""
    has_more: bool = field(default=False, init=False)
    """Bytes that hold or may hold a whole event are waiting: call `feed(b"")` for the next events, and `finish` only afterwards."""
    next_sequence_number: int = field(default=0, init=False)
    """In a Responses stream: one more than the last `sequence_number` relayed."""
    prompt_tokens: int = field(default=0, init=False)
    completion_tokens: int = field(default=0, init=False)

    _decoder: msgspec.json.Decoder[_Event] = field(init=False)
    _last: frozenset[str] = field(init=False)
    _finished: dict[int, bool] = field(factory=dict, init=False)
    _rest: bytearray = field(factory=bytearray, init=False)
    _at_start_of_event: bool = field(default=True, init=False)
    _begun: bool = field(default=False, init=False)

    @_decoder.default
    def _decoder_of_dialect(self) -> msgspec.json.Decoder[_Event]:
        return _NAMED if self.dialect in (Dialect.RESPONSES, Dialect.MESSAGES) else _NAMELESS

    @_last.default
    def _last_of_dialect(self) -> frozenset[str]:
        return _LAST.get(self.dialect, frozenset())

    @property
    def has_data(self) -> bool:
        """Return whether a well-formed data event was relayed; comments do not count, nor does `first_error`."""
        return self.events > 0

    @property
    def needs_done(self) -> bool:
        """Return whether `DONE_EVENT` is missing if the body ends cleanly here."""
        return self.dialect is _CHAT and not self.ended and self.complete()

    @property
    def unfinished(self) -> int:
        """Number of bytes held: of an event that is not complete yet, or of those that wait while `has_more`."""
        return len(self._rest)

    def complete(self) -> bool:
        """Return whether the stream is whole if its body ends cleanly here; an unfinished event does not count.

        True after an error event that was relayed, too: the client knows, see `failed`.
        """
        if self.is_over:
            return self.ended
        if self.dialect is _CHAT:
            return bool(self._finished) and all(self._finished.values())
        return self.dialect is Dialect.OTHER and self.events > 0 and not self._rest

    def feed(self, chunk: bytes) -> bytes:
        """Return the next complete events, at most `events_per_call`; the rest waits, see `has_more`.

        That is `chunk` itself if it holds nothing but whole events.
        """
        if (
            self._at_start_of_event
            and chunk.startswith(b"data: {")
            and (_is_one_event(chunk) if 13 in chunk else chunk.find(10) == len(chunk) - 2 and chunk.endswith(b"\n"))
            and len(chunk) <= self.max_event_bytes
            and (chunk.isascii() or _is_utf8(chunk))
        ):
            data = chunk[6:-2]
            try:
                event = self._decoder.decode(data)
            except (DecodeError, RecursionError):
                return self._sort(chunk)
            self._begun = True
            choices = event.choices
            if choices and not (event.error or event.type or event.usage or self._last) and len(choices) == 1:
                choice = choices[0]
                if not choice.finish_reason and choice.index in self._finished:  # nothing to take note of
                    self.events += 1
                    return chunk
            return chunk if self._note(event, b"", data) else b""
        return b"" if self.is_over else self._sort(chunk)

    def _sort(self, chunk: bytes) -> bytes:
        rest = self._rest
        if rest:
            searched = 0 if self.has_more else max(0, len(rest) - 3)
            rest += chunk
            find_end = _end if rest.find(b"\r", searched) < 0 else _end_with_returns
            if not self.has_more and find_end(rest, searched) < 0:
                self._keep(b"")
                return b""
            chunk = bytes(rest)
            rest.clear()
        else:
            find_end = _end_with_returns if b"\r" in chunk else _end
        start = begun = 0
        size = len(chunk)
        passed: list[bytes] = []
        for _ in range(self.events_per_call):
            end = self._end_of_comments(chunk, start) if start < size and chunk[start] in b":\n\r" else -1
            if end >= 0:
                if not self.events:
                    passed.append(chunk[begun:start])
                    begun = end
            else:
                end = find_end(chunk, start)
                if end < 0 or (end == size and chunk.endswith(b"\n\r")):  # the LF of that CR is on its way
                    self.has_more = False
                    self._keep(chunk[start:])
                    break
                if not self._admit(chunk[start:end]):
                    passed.append(chunk[begun:start])
                    begun = end
                if self.is_over:
                    return b"".join([*passed, chunk[begun:end]])
            start = end
        else:
            self.has_more = start < size
            rest += chunk[start:]
            self._at_start_of_event = not rest
        return b"".join([*passed, chunk[begun:start]]) if passed else chunk[:start]

    def _end_of_comments(self, chunk: bytes, start: int) -> int:
        """Return where the run of blank lines and complete comments at `start` ends, -1 without one."""
        run = _COMMENTS.match(chunk, start, start + self.max_event_bytes)
        if run is None:
            return -1
        self._begun = True
        return run.end()

    def finish(self) -> bytes:
        """Take the end of the body, and return the event that was only waiting for the LF of its last line end."""
        rest = bytes(self._rest)
        if not rest.endswith(b"\n\r") or _end_with_returns(rest, 0) != len(rest):
            return b""
        self._rest.clear()
        return rest if self._admit(rest) else b""

    def _keep(self, unfinished: bytes) -> None:
        self._rest += unfinished
        self._at_start_of_event = not self._rest
        if len(self._rest) > self.max_event_bytes:
            self._break_at_limit(f"an event longer than {self.max_event_bytes} bytes")

    def _break(self, reason: str) -> bool:
        self.broken = reason
        self._stop()
        self._rest.clear()
        return False

    def _break_at_limit(self, reason: str) -> bool:
        self.over_limit = True
        return self._break(reason)

    def _admit(self, block: bytes) -> bool:
        """Return whether to relay a complete event, its blank line included, after taking note of what it says."""
        if len(block) > self.max_event_bytes:
            return self._break_at_limit(f"an event longer than {self.max_event_bytes} bytes")
        if not block.isascii() and not _is_utf8(block):
            return self._break("an event that is not UTF-8")
        if not self._begun:
            self._begun = True
            block = block.removeprefix(_BOM)
        if len(block) > _MAX_LINES and block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n") > _MAX_LINES:
            return self._break_at_limit(f"an event of more than {_MAX_LINES} lines")
        name, data = _parse(block)
        if data is None:
            return self._note_error(_Event(), b"") if name == b"error" else self.events > 0
        try:
            event = self._decode(data)
            if event is None:
                data = legible(data)
                event = self._decode(data) or self._read_other(name, data.strip())
        except RecursionError:
            return self._break_at_limit("an event whose JSON is nested too deeply")
        return event is not None and self._note(event, name, data)

    def _read_other(self, name: bytes, text: bytes) -> _Event | None:
        """Judge data that is not a JSON object; `None` if the event is not relayed."""
        is_chat = self.dialect is _CHAT
        if name == b"error" or not is_chat:
            return _Event() if name or text else None
        if text == b"[DONE]":
            self._end()
            return _Event()
        if text:
            self._break("an event whose data is neither a JSON object nor [DONE]")
        return None

    def _decode(self, data: bytes) -> _Event | None:
        try:
            return self._decoder.decode(data)
        except ValidationError:
            return _decode_loosely(data)
        except DecodeError:
            return None

    def _note(self, event: _Event, name: bytes, data: bytes) -> bool:
        """Take note of what a data event says, and return whether to relay it."""
        choices = event.choices
        if (
            event.error
            or event.type == "error"
            or name == b"error"
            or (not choices and (not self.events or self.dialect is _CHAT) and _names_error(data))
        ):
            return self._note_error(event, data)
        if self.drops_usage and event.usage is not None and choices == []:
            self._note_usage(event.usage)
            self.carries_more = _carries_more(data)
            if not self.carries_more:
                return False
        self.events += 1
        if choices:
            finished = self._finished
            for choice in choices[:_MAX_CHOICES]:
                if choice.finish_reason or choice.index not in finished:
                    self._note_choice(choice, event, data)
        if event.usage is not None:
            self._note_usage(event.usage)
        if self._last:
            self._note_named(event, name)
        return True

    def _note_error(self, event: _Event, data: bytes) -> bool:
        if not self.events:
            self.first_error = data.strip()
            self._stop()
            return False
        self.failed = True
        if not (event.error or (self.dialect is not _CHAT and (event.type == "error" or _is_object(data)))):
            return self._break("an error in a form that clients cannot read")
        self.events += 1
        self._end()
        return True

    def _note_choice(self, choice: _Choice, event: _Event, data: bytes) -> None:
        reason = choice.finish_reason
        has_finished = type(reason) is str and reason not in ("", "null")
        finished = self._finished
        if has_finished and event.usage is None and not any(finished.values()):
            self._note_timings(data)
        if choice.index in finished or len(finished) < _MAX_CHOICES:
            finished[choice.index] = finished.get(choice.index, False) or has_finished

    def _note_timings(self, data: bytes) -> None:
        """Read the token counts that llama.cpp reports in the last chunk of its own accord."""
        timings = _fields(_fields(Raw(data)).get("timings"))
        prompt, cached, completion = [_tokens(timings[name]) if name in timings else 0 for name in ("prompt_n", "cache_n", "predicted_n")]
        self._note_usage(Usage(min(prompt + cached, MAX_REPORTED_TOKENS), completion))

    def _note_usage(self, usage: Usage) -> None:
        """Keep the latest figures: servers send running totals, and not always both."""
        self.prompt_tokens = usage.prompt_tokens or usage.input_tokens or self.prompt_tokens
        self.completion_tokens = usage.completion_tokens or usage.output_tokens or self.completion_tokens

    def _note_named(self, event: _Event, name: bytes) -> None:
        if isinstance(event, _Named):
            if event.sequence_number is not None:
                self.next_sequence_number = event.sequence_number + 1
            for carrier in (event.response, event.message):
                if carrier is not None and carrier.usage is not None:
                    self._note_usage(carrier.usage)
        if (event.type or name.decode()) in self._last:
            self._end()

    def _end(self) -> None:
        self.ended = True
        self._stop()

    def _stop(self) -> None:
        self.is_over = True
        self.has_more = self._at_start_of_event = False


def _end(buffer: bytes | bytearray, start: int) -> int:
    end = buffer.find(b"\n\n", start)
    return end if end < 0 else end + 2


def _end_with_returns(buffer: bytes | bytearray, start: int) -> int:
    match = _EVENT_END.search(buffer, start)
    return -1 if match is None else match.end()


def _is_one_event(chunk: bytes) -> bool:
    """Return whether a chunk is one line and a blank one, both ended by CR LF."""
    return chunk.find(13) == len(chunk) - 4 and chunk.endswith(b"\r\n\r\n") and chunk.find(10) == len(chunk) - 3


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _parse(block: bytes) -> tuple[bytes, bytes | None]:
    """Read the name and the joined data of an event; without a data line there is no event (HTML, 9.2.6)."""
    name = b""
    values: list[bytes] = []
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for line in block.split(b"\n"):
        if line:
            key, _, value = line.partition(b":")
            if key == b"data":
                values.append(value.removeprefix(b" "))
            elif key == b"event":
                name = value.removeprefix(b" ")
    if len(values) == 1:
        return name, values[0]
    return name, b"\n".join(values) if values else None


def _decode_loosely(data: bytes) -> _Event | None:
    """Read an event whose fields have types that no specification gives them; None if it is no JSON object."""
    try:
        fields = _FIELDS.decode(data)
    except DecodeError:
        return None
    kind = _value(fields.get("type"))
    number = _value(fields.get("sequence_number"))
    return _Named(
        choices=_choices(fields.get("choices")),
        error=_value(fields.get("error")),
        usage=_usage(fields.get("usage")),
        type=kind if isinstance(kind, str) else None,
        response=_Carrier(_usage(_fields(fields.get("response")).get("usage"))),
        message=_Carrier(_usage(_fields(fields.get("message")).get("usage"))),
        sequence_number=number if type(number) is int and 0 <= number <= _MAX_SEQUENCE_NUMBER else None,
    )


def _choices(raw: Raw | None) -> list[_Choice]:
    try:
        items = [] if raw is None else _ODD_CHOICES.decode(raw)
    except DecodeError:
        return []
    return [
        _Choice(index if type(index := _value(item.index)) is int else 0, _value(item.finish_reason))
        for item in items[:_MAX_ODD_CHOICES]
        if isinstance(item, _OddChoice)
    ]


def _usage(usage: Raw | None) -> Usage:
    fields = _fields(usage)
    return Usage(**{key: _tokens(fields[key]) for key in Usage.__struct_fields__ if key in fields})


def tokens_of(usage: Raw) -> tuple[int, int]:
    """Return the prompt and completion tokens that the field `usage` of an answer reports, 0 where it reports none.

    >>> tokens_of(Raw(b'{"prompt_tokens": 7, "completion_tokens": 2.0, "total_tokens": "nine"}'))
    (7, 2)
    """
    return _usage(usage).tokens


def _tokens(raw: Raw) -> int:
    """Return a number of tokens between 0 and `MAX_REPORTED_TOKENS`, 0 for anything that is not a number."""
    try:
        return int(min(max(float(bytes(raw)), 0), MAX_REPORTED_TOKENS))
    except ValueError:
        return 0


def _fields(raw: Raw | None) -> dict[str, Raw]:
    try:
        return {} if raw is None else _FIELDS.decode(raw)
    except DecodeError:
        return {}


def _value(raw: Raw | None) -> Any:
    """Decode a value; True stands for one that is there but cannot be represented, such as an endless number."""
    try:
        return None if raw is None else msgspec.json.decode(raw)
    except DecodeError:
        return True


def _names_error(data: bytes) -> bool:
    """Return whether an event is an error by its `object`, as those of vLLM are."""
    try:
        return bool(_OBJECT.decode(data).object == "error")
    except DecodeError:
        return False


def _is_object(data: bytes) -> bool:
    try:
        _FIELDS.decode(data)
    except DecodeError:
        return False
    return True


def _carries_more(data: bytes) -> bool:
    """Return whether an event with token counts holds anything else; members that are null count as absent."""
    fields = _FIELDS.decode(data)
    return any(name not in _FIELDS_OF_USAGE_EVENT and bytes(value) != b"null" for name, value in fields.items())


def error_event(dialect: Dialect, message: str, code: str, sequence_number: int = 0) -> bytes:
    """Return the event that ends a stream after a failure, in the form that the clients of its dialect read.

    `sequence_number` is that of a Responses stream. Its event has the form of the Responses API and, in the field `error`, that which makes
    OpenAI's libraries raise an exception.

    >>> error_event(Dialect.MESSAGES, "The server was lost.", "upstream_stream_interrupted")
    b'event: error\\ndata: {"type":"error","error":{"type":"api_error","message":"The server was lost."}}\\n\\n'
    """
    if dialect is Dialect.MESSAGES:
        return _write(b"event: error\n", {"type": "error", "error": {"type": "api_error", "message": message}})
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    if dialect is Dialect.RESPONSES:
        fields = {"type": "error", "sequence_number": sequence_number, "code": code, "message": message, "param": None}
        return _write(b"event: error\n", {**fields, "error": {"type": "server_error", "code": code, "message": message, "param": None}})
    return _write(b"", {"error": error})


def _write(name: bytes, data: dict[str, Any]) -> bytes:
    return b"%bdata: %b\n\n" % (name, msgspec.json.encode(data))
