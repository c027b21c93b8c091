"""Where an event of a stream ends, whether it is well formed, and whether the stream is complete.

1. Only complete events leave, byte for byte. Half an event never does, so nothing can be glued onto it.
2. Nothing leaves after the stream's own last event, after an error event, or from the first malformed event on.
3. A stream without its own last event is complete only if every choice it began has a finish_reason. None is invented.
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

MAX_EVENT_BYTES = 1 << 20
"""Longest relayed event in bytes, its line ends and comments included."""

DONE_EVENT = b"data: [DONE]\n\n"
"""Last event of a stream of chat or text completions."""

EVENTS_PER_CALL = 64
"""Events that one call of `EventStream.feed` handles; a run of comments and blank lines counts as one."""

MAX_REPORTED_TOKENS = 10_000_000
"""Prompt or completion tokens that are believed of one answer: a larger figure counts as this one, so that no server can overflow a sum."""

_MAX_CHOICES = 4096
_MAX_ODD_CHOICES = 128
_MAX_LINES = 1 << 14
_BOM = b"\xef\xbb\xbf"
_EVENT_END = re.compile(rb"\n(?:\n|\r\n?)|\r\r\n?")
_COMMENTS = re.compile(rb"(?:(?::[^\r\n\x80-\xff]*+(?:\r\n?|\n))*+(?:\r\n?|\n))++")
"""Blank lines, and comments that a blank line ends. The possessive quantifiers keep the engine from storing a way back per line."""


class Dialect(Enum):
    """Tell how a stream names its events, reports errors and ends."""

    CHAT = "chat"
    """Chat and text completions: nameless events, `[DONE]` at the end."""
    RESPONSES = "responses"
    """OpenAI Responses: `response.completed`, `.failed` or `.incomplete` at the end."""
    MESSAGES = "messages"
    """Anthropic Messages: `message_stop` at the end."""
    OTHER = "other"
    """Anything else: no end of its own."""


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


_NAMELESS: msgspec.json.Decoder[_Event] = msgspec.json.Decoder(_Event)
_NAMED: msgspec.json.Decoder[_Event] = msgspec.json.Decoder(_Named)
_OBJECT = msgspec.json.Decoder(dict[str, Raw])


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
    """The event that only tells the tokens is read, not passed on: the client did not ask for it."""

    events: int = field(default=0, init=False)
    """Number of data events relayed, the last one included."""
    first_error: bytes | None = field(default=None, init=False)
    """Payload of the first data event, without white space around it, if that was an error; nothing is returned from it on."""
    ended: bool = field(default=False, init=False)
    """The stream's own last event, or an error event in the middle, was relayed; what follows is dropped."""
    failed: bool = field(default=False, init=False)
    """The stream ended with its own error event."""
    broken: str | None = field(default=None, init=False)
    """Why nothing more can be relayed, in words."""
    is_over: bool = field(default=False, init=False)
    """It `ended`, is `broken` or began with an error: nothing more is returned."""
    has_more: bool = field(default=False, init=False)
    """Bytes that hold or may hold a whole event are waiting: call `feed(b"")` for the next events, and `finish` only afterwards."""
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
        """Tell whether a well-formed data event was relayed; comments do not count, nor does `first_error`."""
        return self.events > 0

    @property
    def needs_done(self) -> bool:
        """Tell whether `DONE_EVENT` is missing if the body ends cleanly here."""
        return self.dialect is Dialect.CHAT and not self.ended and self.complete()

    @property
    def unfinished(self) -> int:
        """Bytes that are held: those of an event that is not complete yet, or those that wait while `has_more`."""
        return len(self._rest)

    def complete(self) -> bool:
        """Tell whether the stream is whole if its body ends cleanly here; half an event is as good as none.

        True after an error event in the middle, too: the client has been told, see `failed`.
        """
        if self.is_over:
            return self.ended
        if self.dialect is Dialect.CHAT:
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
                if choice.finish_reason is None and choice.index in self._finished:  # which says nothing new
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
            if end < 0:
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
        """Take the end of the body: return the event that only waited for the LF of its last line end."""
        rest = bytes(self._rest)
        if not rest.endswith(b"\n\r") or _end_with_returns(rest, 0) != len(rest):
            return b""
        self._rest.clear()
        return rest if self._admit(rest) else b""

    def _keep(self, unfinished: bytes) -> None:
        self._rest += unfinished
        self._at_start_of_event = not self._rest
        if len(self._rest) > self.max_event_bytes:
            self._break(f"an event longer than {self.max_event_bytes} bytes")

    def _break(self, reason: str) -> bool:
        self.broken = reason
        self.is_over = True
        self.has_more = False
        self._rest.clear()
        self._at_start_of_event = False
        return False

    def _admit(self, block: bytes) -> bool:
        """Judge one complete event, its blank line included; True lets it pass."""
        if len(block) > self.max_event_bytes:
            return self._break(f"an event longer than {self.max_event_bytes} bytes")
        if not block.isascii() and not _is_utf8(block):
            return self._break("an event that is not UTF-8")
        if not self._begun:
            self._begun = True
            block = block.removeprefix(_BOM)
        if len(block) > _MAX_LINES and block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n") > _MAX_LINES:
            return self._break(f"an event of more than {_MAX_LINES} lines")
        name, data = _parse(block)
        if data is None:
            return True
        try:
            event = self._decode(data)
        except RecursionError:
            return self._break("an event whose JSON is nested too deeply")
        if event is None:
            event = _Event()
            if self.dialect is Dialect.CHAT and name != b"error":
                if data.strip() != b"[DONE]":
                    return self._break("an event whose data is neither a JSON object nor [DONE]")
                self._end()
        return self._note(event, name, data)

    def _decode(self, data: bytes) -> _Event | None:
        try:
            return self._decoder.decode(data)
        except ValidationError:
            return _decode_loosely(data)
        except DecodeError:
            return None

    def _note(self, event: _Event, name: bytes, data: bytes) -> bool:
        """Remember what a data event says; False if it must not be relayed."""
        if event.error or event.type == "error" or name == b"error":
            if not self.events:
                self.first_error = data.strip()
                self.is_over = True
                self.has_more = False
                self._at_start_of_event = False
                return False
            self.failed = True
            self._end()
        elif self.drops_usage and event.usage is not None and event.choices == []:
            self._note_usage(event.usage)
            return False
        self.events += 1
        if event.choices:
            finished = self._finished
            for choice in event.choices[:_MAX_CHOICES]:
                if choice.finish_reason is not None or choice.index not in finished:
                    self._note_choice(choice)
        if event.usage is not None:
            self._note_usage(event.usage)
        if self._last:
            self._note_named(event, name)
        return True

    def _note_choice(self, choice: _Choice) -> None:
        if choice.index in self._finished or len(self._finished) < _MAX_CHOICES:
            self._finished[choice.index] = choice.finish_reason is not None

    def _note_usage(self, usage: Usage) -> None:
        """Keep the latest figures; servers send running totals, and not always both."""
        self.prompt_tokens = usage.prompt_tokens or usage.input_tokens or self.prompt_tokens
        self.completion_tokens = usage.completion_tokens or usage.output_tokens or self.completion_tokens

    def _note_named(self, event: _Event, name: bytes) -> None:
        if isinstance(event, _Named):
            for carrier in (event.response, event.message):
                if carrier is not None and carrier.usage is not None:
                    self._note_usage(carrier.usage)
        if (event.type or name.decode()) in self._last:
            self._end()

    def _end(self) -> None:
        self.ended = self.is_over = True
        self.has_more = False
        self._at_start_of_event = False


def _end(buffer: bytes | bytearray, start: int) -> int:
    end = buffer.find(b"\n\n", start)
    return end if end < 0 else end + 2


def _end_with_returns(buffer: bytes | bytearray, start: int) -> int:
    match = _EVENT_END.search(buffer, start)
    return -1 if match is None else match.end()


def _is_one_event(chunk: bytes) -> bool:
    """Tell whether a chunk is one line and a blank one, both ended by CR LF."""
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
        fields = _OBJECT.decode(data)
    except DecodeError:
        return None
    kind = _value(fields.get("type"))
    return _Named(
        choices=_choices(fields.get("choices")),
        error=_value(fields.get("error")),
        usage=_usage(fields.get("usage")),
        type=kind if isinstance(kind, str) else None,
        response=_Carrier(_usage(_fields(fields.get("response")).get("usage"))),
        message=_Carrier(_usage(_fields(fields.get("message")).get("usage"))),
    )


def _choices(raw: Raw | None) -> list[_Choice]:
    try:
        items = [] if raw is None else _ODD_CHOICES.decode(raw)
    except DecodeError:
        return []
    return [
        _Choice(index if isinstance(index := _value(item.index), int) else 0, _value(item.finish_reason))
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
        return {} if raw is None else _OBJECT.decode(raw)
    except DecodeError:
        return {}


def _value(raw: Raw | None) -> Any:
    """Decode a value; True stands for one that is there but cannot be represented, such as an endless number."""
    try:
        return None if raw is None else msgspec.json.decode(raw)
    except DecodeError:
        return True


def error_event(dialect: Dialect, message: str, code: str) -> bytes:
    """Write the event that ends a stream after a failure, in the form the dialect's clients know.

    >>> error_event(Dialect.MESSAGES, "The server was lost.", "upstream_stream_interrupted")
    b'event: error\\ndata: {"type":"error","error":{"type":"api_error","message":"The server was lost."}}\\n\\n'
    """
    if dialect is Dialect.MESSAGES:
        return _write(b"event: error\n", {"type": "error", "error": {"type": "api_error", "message": message}})
    if dialect is Dialect.RESPONSES:
        return _write(b"event: error\n", {"type": "error", "code": code, "message": message, "param": None})
    return _write(b"", {"error": {"message": message, "type": "server_error", "param": None, "code": code}})


def _write(name: bytes, data: dict[str, Any]) -> bytes:
    return b"%bdata: %b\n\n" % (name, msgspec.json.encode(data))
