"""Follow a stream of server-sent events: find where events end, check them, and decide whether the stream is complete.

1. Only complete events are relayed, byte for byte, so that an error event can never be glued onto half an event.
   Events with empty data are heartbeats and are dropped, as are a byte order mark and everything else before the first data event.
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
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

import msgspec
from attrs import define, field

from multiverse_gateway.core.errors import anthropic_type
from multiverse_gateway.core.lenient import BOM, decode, is_utf8, legible
from multiverse_gateway.core.payloads import (
    Carrier,
    Choice,
    Chunk,
    NamedEvent,
    Usage,
    carries_more,
    decode_chunk,
    is_truthy,
    names_error,
    read_chunk,
    read_event,
    timed_tokens,
    value_of,
)

MAX_EVENT_BYTES = 1 << 20
"""Longest event of a chat or text completion in bytes, its line ends and comments included."""

DONE_EVENT = b"data: [DONE]\n\n"
"""Last event of a stream of chat or text completions."""

EVENTS_PER_CALL = 64
"""Events that one call of `EventStream.feed` handles; a run of comments and blank lines counts as one."""

_MAX_CHOICES = 4096
_MAX_LINES = 1 << 14
_LONG = 1 << 14
_MAX_TEXT = 4096
"""Characters of a text in an error event that stands for a response."""
_OVERLOADED = frozenset({"gateway_shutting_down", "overloaded"})
"""Codes after which Anthropic's clients may try again later: those of 503."""
_EXACT = 1 << 53
"""Integers below this one are exact in JavaScript."""
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


@define(eq=False)
class EventStream:
    """Follow one stream of events from a server; feed it every chunk of the body, in order.

    Synchronous and bounded: one call handles at most `events_per_call` events. While `has_more`, the caller stops reading from the
    server, lets others have their turn and calls `feed(b"")`, so that it holds at most one unfinished event and one chunk. What all
    calls return together does not depend on how the body is cut into chunks.

    >>> stream = EventStream(Dialect.CHAT)
    >>> stream.feed(b': ping\\n\\ndata: {"choices":[{"index":0,"finish_reason":"stop"}]}\\n\\ndata: [DO')
    b'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\\n\\n'
    >>> stream.complete(), stream.needs_done
    (True, True)
    """

    dialect: Dialect
    max_event_bytes: int = field(default=MAX_EVENT_BYTES, kw_only=True)
    events_per_call: int = field(default=EVENTS_PER_CALL, kw_only=True)
    drops_usage: bool = field(default=False, kw_only=True)
    """The client did not ask for token counts: the event that holds nothing else is read, and not relayed."""
    on_response: Callable[[object], None] | None = field(default=None, kw_only=True)
    """Called once, with the `id` of the response that a Responses stream tells of; forgotten then, so that no cycle is left."""

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

    _is_chat: bool = field(init=False)
    _last: frozenset[str] = field(init=False)
    _finished: dict[int, bool] = field(factory=dict, init=False)
    _rest: bytearray = field(factory=bytearray, init=False)
    _is_fast: bool = field(init=False)
    """The next chunk may be one event of a chat, the usual case: nothing waits, and the stream is not over."""
    _begun: bool = field(default=False, init=False)
    """So much has arrived that no byte order mark can follow."""

    @_is_chat.default
    def _is_chat_of_dialect(self) -> bool:
        return self.dialect is Dialect.CHAT

    @_is_fast.default
    def _is_fast_of_dialect(self) -> bool:
        return self._is_chat

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
        return self._is_chat and not self.ended and self.complete()

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
        if self._is_chat:
            return bool(self._finished) and all(self._finished.values())
        return self.dialect is Dialect.OTHER and self.events > 0 and not self._rest

    def feed(self, chunk: bytes) -> bytes:
        """Return the next complete events, at most `events_per_call`; the rest waits, see `has_more`.

        That is `chunk` itself if it holds nothing but whole events.
        """
        if (
            self._is_fast
            and chunk.startswith(b"data: {")
            and (_is_one_event(chunk) if 13 in chunk else chunk.find(10) == len(chunk) - 2 and chunk.endswith(b"\n"))
            and len(chunk) <= self.max_event_bytes
            and (chunk.isascii() or is_utf8(chunk))
        ):
            data = chunk[6:-2]
            try:
                event = decode_chunk(data)
            except (msgspec.DecodeError, RecursionError):
                return self._sort(chunk)
            self._begun = True
            choices = event.choices
            if choices and not (event.error or event.type or event.usage) and len(choices) == 1:
                choice = choices[0]
                if not choice.finish_reason and choice.index in self._finished:  # nothing to take note of
                    self.events += 1
                    return chunk
            return chunk if self._note(event, b"", data) else b""
        return b"" if self.is_over else self._sort(chunk)

    def _sort(self, chunk: bytes) -> bytes:
        if not self._begun:
            chunk = self._without_bom(chunk)
        rest = self._rest
        if rest:
            searched = 0 if self.has_more else max(0, len(rest) - 3)
            rest += chunk
            find_end = _end if rest.find(b"\r", searched) < 0 else _end_with_returns
            found = find_end(rest, searched)
            if found < 0 and not self.has_more:
                self._keep(b"")
                return b""
            chunk = bytes(rest)
            rest.clear()
        else:
            find_end = _end_with_returns if b"\r" in chunk else _end
            found = -1
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
                end = find_end(chunk, start) if found <= start else found
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
            self._is_fast = self._is_chat and not rest
        return b"".join([*passed, chunk[begun:start]]) if passed else chunk[:start]

    def _end_of_comments(self, chunk: bytes, start: int) -> int:
        """Return where the run of blank lines and complete comments at `start` ends, -1 without one."""
        run = _COMMENTS.match(chunk, start, start + self.max_event_bytes)
        return -1 if run is None else run.end()

    def _without_bom(self, chunk: bytes) -> bytes:
        """Return the beginning of the stream without a byte order mark, which `openai` would take for a part of the first field's name."""
        beginning = bytes(self._rest) + chunk
        self._rest.clear()
        self._begun = len(beginning) >= len(BOM) or not BOM.startswith(beginning)
        return beginning.removeprefix(BOM)

    def finish(self) -> bytes:
        """Take the end of the body, and return the event that was only waiting for the LF of its last line end."""
        rest = bytes(self._rest)
        if not rest.endswith(b"\n\r") or _end_with_returns(rest, 0) != len(rest):
            return b""
        self._rest.clear()
        return rest if self._admit(rest) else b""

    def _keep(self, unfinished: bytes) -> None:
        self._rest += unfinished
        self._is_fast = self._is_chat and not self._rest
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
        if not block.isascii() and not is_utf8(block):
            return self._break("an event that is not UTF-8")
        if len(block) > _MAX_LINES and _count_lines(block) > _MAX_LINES:
            return self._break_at_limit(f"an event of more than {_MAX_LINES} lines")
        name, data = _parse(block)
        if data is None:
            return self._note_error(b"", is_readable=False) if name == b"error" else self.events > 0
        try:
            if self._is_chat:
                chunk = read_chunk(data) or read_chunk(data := legible(data))
                if chunk is not None:
                    return self._note(chunk, name, data)
            else:
                event = read_event(data) or read_event(data := legible(data))
                if event is not None:
                    return self._note_named(event, name, data)
        except RecursionError:
            return self._break_at_limit("an event whose JSON is nested too deeply")
        return self._note_other(name, data.strip())

    def _note(self, chunk: Chunk, name: bytes, data: bytes) -> bool:
        """Take note of what an event of a chat says, and return whether to relay it."""
        choices = chunk.choices
        if chunk.error or chunk.type == "error" or name == b"error" or (not choices and names_error(data)):
            return self._note_error(data, is_readable=bool(chunk.error))
        if self.drops_usage and chunk.usage is not None and choices == []:
            self._note_usage(chunk.usage)
            self.carries_more = carries_more(data)
            if not self.carries_more:
                return False
        self.events += 1
        if choices:
            finished = self._finished
            for choice in choices[:_MAX_CHOICES]:
                if choice.finish_reason or choice.index not in finished:
                    self._note_choice(choice, chunk, data)
        if chunk.usage is not None:
            self._note_usage(chunk.usage)
        return True

    def _note_named(self, event: NamedEvent, name: bytes, data: bytes) -> bool:
        """Take note of what an event of any other stream says, and return whether to relay it."""
        has_error = bool(event.error) and is_truthy(event.error)
        if has_error or event.type == "error" or name == b"error" or (not self.events and names_error(data)):
            return self._note_error(data, is_readable=self._is_readable(name, has_error or event.type == "error"))
        self.events += 1
        if event.sequence_number is not None:
            self.next_sequence_number = event.sequence_number + 1
        if event.usage is not None:
            self._note_usage(event.usage)
        if event.response is not None:
            if self.on_response is not None:
                self._tell_response(self.on_response, event.response)
            if event.response.usage is not None:
                self._note_usage(event.response.usage)
        if event.message is not None and event.message.usage is not None:
            self._note_usage(event.message.usage)
        if (event.type or name.decode()) in self._last:
            self._end()
        return True

    def _tell_response(self, on_response: Callable[[object], None], response: Carrier) -> None:
        value = value_of(response.id)
        if value is not None:
            self.on_response = None
            on_response(value)

    def _is_readable(self, name: bytes, has_form: bool) -> bool:
        """Return whether clients raise an exception for an error event: `anthropic` goes by the name, `openai` by the fields."""
        if self.dialect is Dialect.MESSAGES:
            return name == b"error"
        return has_form or self.dialect is Dialect.OTHER

    def _note_other(self, name: bytes, text: bytes) -> bool:
        """Judge an event whose data, stripped, is not a JSON object, and return whether to relay it."""
        if name == b"error":
            return self._note_error(text, is_readable=False)
        if not text and (self._is_chat or not name):
            return False
        if self._is_chat and text != b"[DONE]":
            return self._break("an event whose data is neither a JSON object nor [DONE]")
        is_last = self._is_chat or name.decode() in self._last
        if self._last and not is_last and text.startswith(b"[DONE]"):  # `openai` would take the answer for complete
            return False
        self.events += 1
        if is_last:
            self._end()
        return True

    def _note_error(self, data: bytes, *, is_readable: bool) -> bool:
        if not self.events:
            self.first_error = data.strip()
            self._stop()
            return False
        self.failed = True
        if not is_readable:
            return self._break("an error in a form that clients cannot read")
        self.events += 1
        self._end()
        return True

    def _note_choice(self, choice: Choice, chunk: Chunk, data: bytes) -> None:
        finished = self._finished
        if choice.has_finished and chunk.usage is None and not any(finished.values()):
            self._note_usage(Usage(*timed_tokens(data)))
        if choice.index in finished or len(finished) < _MAX_CHOICES:
            finished[choice.index] = finished.get(choice.index, False) or choice.has_finished

    def _note_usage(self, usage: Usage) -> None:
        """Keep the latest figures: servers send running totals, and not always both."""
        self.prompt_tokens = usage.prompt_tokens or usage.input_tokens or self.prompt_tokens
        self.completion_tokens = usage.completion_tokens or usage.output_tokens or self.completion_tokens

    def _end(self) -> None:
        self.ended = True
        self._stop()

    def _stop(self) -> None:
        self.is_over = True
        self.has_more = self._is_fast = False


def _end(buffer: bytes | bytearray, start: int) -> int:
    end = buffer.find(b"\n\n", start)
    return end if end < 0 else end + 2


def _end_with_returns(buffer: bytes | bytearray, start: int) -> int:
    match = _EVENT_END.search(buffer, start)
    return -1 if match is None else match.end()


def _is_one_event(chunk: bytes) -> bool:
    """Return whether a chunk is one line and a blank one, both ended by CR LF."""
    return chunk.find(13) == len(chunk) - 4 and chunk.endswith(b"\r\n\r\n") and chunk.find(10) == len(chunk) - 3


def _parse(block: bytes) -> tuple[bytes, bytes | None]:
    """Read the name and the joined data of an event; without a data line there is no event (HTML, 9.2.6)."""
    name = b""
    values: list[bytes] = []
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if len(block) > _LONG:
        lines: Iterable[bytes] = _lines_of_long(block, values)
    else:
        lines = block.split(b"\n")
    for line in lines:
        if line:
            key, _, value = line.partition(b":")
            if key == b"data":
                values.append(value.removeprefix(b" "))
            elif key == b"event":
                name = value.removeprefix(b" ")
    if len(values) == 1:
        return name, values[0]
    return name, b"\n".join(values) if values else None


def _lines_of_long(block: bytes, values: list[bytes]) -> Iterator[bytes]:
    """Return the lines one by one, but for long ones of data: their values are added at once, which saves two copies of each."""
    start = 0
    while (end := block.find(b"\n", start)) >= 0:
        if end - start > _LONG and block.startswith(b"data:", start):
            values.append(block[start + 6 - (block[start + 5] != 32) : end])
        else:
            yield block[start:end]
        start = end + 1


def _count_lines(block: bytes) -> int:
    ends = block.count(b"\n") + block.count(b"\r")
    return ends if ends <= _MAX_LINES else ends - block.count(b"\r\n")


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
    found = _read_error(body)
    fields = found if isinstance(found, dict) else {"message": found}
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
