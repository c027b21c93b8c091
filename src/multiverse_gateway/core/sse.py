"""Follow a stream of server-sent events: find where events end, check them, and decide whether the stream is complete.

1. Only complete events are relayed, byte for byte, so that an error event can never be glued onto half an event.
   Events with empty data are heartbeats and are dropped, as are a byte order mark and everything else before the first data event.
2. Nothing is relayed after the stream's own last event, after an error event, or from the first malformed event on.
   An error event that clients cannot read as an error is not relayed: the gateway sends its own.
3. A stream without its own last event is complete only if every choice has a finish_reason, which is a non-empty string other than
   `"null"`. The gateway never invents one.
4. One call does a bounded amount of work, whatever a server sends: at most `EVENTS_PER_CALL` events, each at most `max_event_bytes`
   long, in `_MAX_LINES` lines. Costs grow with the number of bytes, never with its square.

How events are found. An event ends with a blank line; a line ends with LF, CR LF or CR. The parser does not take a chunk apart into lines:
it looks for the ends of events, checks each event as a whole, and returns slices of the chunk. An incomplete event stays in `_rest` until
the next chunk. A CR at the end of a chunk may be half a line end, so an event that ends with one waits for the next byte, or for `finish`.

There are two ways through `feed`, and they must agree. Nearly every chunk of a chat is exactly one event of one line, and takes the short
way: one search for its end and one JSON decoding, in a third of the time. Everything else takes the long way, `_sort`. A condition
of the short way may be stricter than the rules, never looser, because a chunk that it does not take is judged by them in `_sort`.

Source: WHATWG HTML, 9.2 Server-sent events; OpenAI and Anthropic streaming references.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import msgspec
from attrs import define, field, frozen

from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.lenient import BOM, is_utf8, legible
from multiverse_gateway.core.payloads import (
    Carrier,
    Choice,
    Chunk,
    NamedEvent,
    TokenCounts,
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
_EVENT_END = re.compile(rb"\n(?:\n|\r\n?)|\r\r\n?")
_OUTPUT = re.compile(rb'"(?:content|text|reasoning_content|reasoning|refusal|name|arguments)"\s*:\s*"[^"]')
"""A piece of text or of a tool call, in an event of a chat or text completion."""
_DELTAS = (".delta", "block_delta")
"""How the types of events end that hold such a piece, in a stream of a response or a message."""
_COMMENTS = re.compile(rb"(?:(?::[^\r\n\x80-\xff]*+(?:\r\n?|\n))*+(?:\r\n?|\n))++")
"""Blank lines, and comments that a blank line ends. The possessive quantifiers keep the engine from storing a way back per line."""


@frozen
class _Break:
    """Why a stream is broken, and whether a limit of the gateway is the reason."""

    reason: str
    is_limit: bool


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
    silent_events: int = field(default=0, init=False)
    """Those of `events` without output: they begin or finish a choice, report tokens or an error. Any other event of a chat has some."""
    first_error: bytes | None = field(default=None, init=False)
    """Data of the first event if that is an error, without white space around it; nothing is returned from it on."""
    ended: bool = field(default=False, init=False)
    """The stream's own last event, or an error event, was relayed; what follows is dropped."""
    failed: bool = field(default=False, init=False)
    """The server reported an error after the first event. It was relayed if the stream `ended`; if the stream is `broken` it was not,
    because clients could not read it as an error."""
    carries_more: bool = field(default=False, init=False)
    """With `drops_usage`: the event with the token counts held other fields, too, and was relayed. Do not ask this server again."""
    is_over: bool = field(default=False, init=False)
    """The stream `ended`, is `broken` or began with an error: nothing more is returned."""
    has_more: bool = field(default=False, init=False)
    """Bytes that hold or may hold a whole event are waiting: call `feed(b"")` for the next events, and `finish` only after that."""
    next_sequence_number: int = field(default=0, init=False)
    """In a Responses stream: one more than the last `sequence_number` relayed."""
    reported_tokens: tuple[int, int] = field(default=(0, 0), init=False)
    """Prompt and completion tokens, 0 where the server has not reported them yet."""

    _broken: _Break | None = field(default=None, init=False)
    _finished: dict[int, bool] = field(factory=dict, init=False)
    _rest: bytearray = field(factory=bytearray, init=False)
    _is_fast: bool = field(init=False)
    """The next chunk may take the short way: this is a chat, nothing waits, and the stream is not over. Saves two tests per chunk; whatever
    changes `_rest` or ends the stream must set it."""
    _begun: bool = field(default=False, init=False)
    """So much has arrived that no byte order mark can follow."""

    @_is_fast.default
    def _is_fast_of_dialect(self) -> bool:
        return self.dialect.is_chat

    @property
    def has_data(self) -> bool:
        """Return whether a well-formed data event was relayed; comments do not count, nor does `first_error`."""
        return self.events > 0

    @property
    def counted_tokens(self) -> int:
        """Number of events with output that were relayed, 0 in a dialect without tokens. Most servers send one token per event."""
        return 0 if self.dialect is Dialect.OTHER else self.events - self.silent_events

    @property
    def broken(self) -> str | None:
        """Return for people why nothing more can be relayed; `None` while there is no reason."""
        return None if self._broken is None else self._broken.reason

    @property
    def over_limit(self) -> bool:
        """Return whether the stream is `broken` by a limit of the gateway, for which the server is not to blame."""
        return self._broken is not None and self._broken.is_limit

    @property
    def needs_done(self) -> bool:
        """Return whether `DONE_EVENT` is missing if the body ends cleanly here."""
        return self.dialect.is_chat and not self.ended and self.complete()

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
        if self.dialect.is_chat:
            return bool(self._finished) and all(self._finished.values())
        return self.dialect is Dialect.OTHER and self.events > 0 and not self._rest

    def feed(self, chunk: bytes) -> bytes:
        """Return the next complete events, at most `events_per_call`; the rest waits, see `has_more`.

        That is `chunk` itself if it holds nothing but whole events.
        """
        if (
            self._is_fast
            and chunk.startswith(b"data: {")  # so the event has no name, and its data may be an object
            # The first LF is the last byte but one: one line and a blank one. `13 in chunk` asks for a CR, which ends lines, too.
            and (_is_one_event(chunk) if 13 in chunk else chunk.find(10) == len(chunk) - 2 and chunk.endswith(b"\n"))
            and len(chunk) <= self.max_event_bytes
            and (chunk.isascii() or is_utf8(chunk))  # `isascii` first: it takes a quarter of the time of decoding
        ):
            data = chunk[6:-2]  # the white space that CR LF leaves at the end is white space of JSON
            try:
                event = decode_chunk(data)
            except (msgspec.DecodeError, RecursionError):
                return self._sort(chunk)  # odd data, perhaps still an event: the long way decides
            self._begun = True
            choices = event.choices
            # Most events add a word to a choice that is known and not finished. `_note` would find nothing in them: saves the call.
            if choices and not (event.error or event.type or event.usage) and len(choices) == 1:
                choice = choices[0]
                if not choice.finish_reason and choice.index in self._finished:
                    self.events += 1
                    return chunk
            return chunk if self._note(event, b"", data) else b""
        return b"" if self.is_over else self._sort(chunk)

    def _sort(self, chunk: bytes) -> bytes:
        """Do what `feed` promises for any chunk: cut it into events, and return those to relay, joined.

        Before the call, `_rest` may hold the beginning of an event or, while `has_more`, whole events. `begun` is where the run
        of events to relay began that is not in `passed` yet: a chunk without anything to drop is returned as one slice.
        """
        if not self._begun:
            chunk = self._without_bom(chunk)
        rest = self._rest
        if rest:
            # Bytes that were searched are not searched again, so that an event that arrives byte by byte costs no more than its length.
            # The end of the event may have begun in the last three of them.
            searched = 0 if self.has_more else max(0, len(rest) - 3)
            rest += chunk
            find_end = _end if rest.find(b"\r", searched) < 0 else _end_with_returns  # `_end` takes a quarter of the time
            first_end = find_end(rest, searched)
            if first_end < 0 and not self.has_more:
                self._keep(b"")
                return b""
            chunk = bytes(rest)  # one copy per chunk; slices of it are cheap, and a buffer must not change while it is sliced
            rest.clear()
        else:
            find_end = _end_with_returns if b"\r" in chunk else _end
            first_end = -1
        start = begun = 0
        size = len(chunk)
        passed: list[bytes] = []
        for _ in range(self.events_per_call):
            # Comments are skipped in runs: a server may send thousands of them, and each would count as an event.
            end = self._end_of_comments(chunk, start) if start < size and chunk[start] in b":\n\r" else -1
            if end >= 0:
                if not self.events:
                    passed.append(chunk[begun:start])
                    begun = end
            else:
                end = find_end(chunk, start) if first_end <= start else first_end  # the first end is known already if `rest` was searched
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
            self._is_fast = self.dialect.is_chat and not rest
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
        self._is_fast = self.dialect.is_chat and not self._rest
        if len(self._rest) > self.max_event_bytes:
            self._break_at_limit(f"an event longer than {self.max_event_bytes} bytes")

    def _break(self, reason: str, *, is_limit: bool = False) -> bool:
        """Relay nothing from here on, and return false."""
        self._broken = _Break(reason, is_limit)
        self._stop()
        self._rest.clear()
        return False

    def _break_at_limit(self, reason: str) -> bool:
        return self._break(reason, is_limit=True)

    def _admit(self, block: bytes) -> bool:
        """Return whether to relay a complete event, its blank line included, after taking note of what it says."""
        if len(block) > self.max_event_bytes:
            return self._break_at_limit(f"an event longer than {self.max_event_bytes} bytes")
        if not block.isascii() and not is_utf8(block):
            return self._break("an event that is not UTF-8")
        if len(block) > _MAX_LINES and _count_lines(block) > _MAX_LINES:  # a short event cannot have that many: no counting
            return self._break_at_limit(f"an event of more than {_MAX_LINES} lines")
        name, data = _parse(block)
        if data is None:
            return self._note_error(b"", is_readable=False) if name == b"error" else self.events > 0
        try:
            if self.dialect.is_chat:
                # The end is not JSON: to try to read it costs 7 % of a short stream. Data is mended only if it has to be: that is a copy.
                chunk = None if data == b"[DONE]" else read_chunk(data) or read_chunk(data := legible(data))
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
        is_usual = bool(choices)
        if choices:
            finished = self._finished
            for choice in choices[:_MAX_CHOICES]:
                if choice.finish_reason or choice.index not in finished:  # else nothing is new: saves a call per choice
                    is_usual = False
                    self._note_choice(choice, chunk, data)
        if not is_usual and not _OUTPUT.search(data, data.find(b'"choices"') + 1):  # the search costs twice as much from the beginning
            self.silent_events += 1
        if chunk.usage is not None:
            self._note_usage(chunk.usage)
        return True

    def _note_named(self, event: NamedEvent, name: bytes, data: bytes) -> bool:
        """Take note of what an event of any other stream says, and return whether to relay it."""
        has_error = bool(event.error) and is_truthy(event.error)
        if has_error or event.type == "error" or name == b"error" or (not self.events and names_error(data)):
            return self._note_error(data, is_readable=self._is_readable(name, has_error or event.type == "error"))
        self.events += 1
        kind = event.type or name.decode()
        if not kind.endswith(_DELTAS):
            self.silent_events += 1
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
        if kind in self.dialect.last_events:
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
        if not text and (self.dialect.is_chat or not name):
            return False
        if self.dialect.is_chat and text != b"[DONE]":
            return self._break("an event whose data is neither a JSON object nor [DONE]")
        last_events = self.dialect.last_events
        is_last = self.dialect.is_chat or name.decode() in last_events
        if last_events and not is_last and text.startswith(b"[DONE]"):  # `openai` would take the answer for complete
            return False
        self.events += 1
        self.silent_events += 1
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
        self.silent_events += 1
        self._end()
        return True

    def _note_choice(self, choice: Choice, chunk: Chunk, data: bytes) -> None:
        finished = self._finished
        if choice.has_finished and chunk.usage is None and not any(finished.values()):
            self._note_usage(TokenCounts(*timed_tokens(data)))
        if choice.index in finished or len(finished) < _MAX_CHOICES:
            finished[choice.index] = finished.get(choice.index, False) or choice.has_finished

    def _note_usage(self, usage: TokenCounts) -> None:
        """Keep the latest figures: servers send running totals, and not always both."""
        prompt_tokens, completion_tokens = usage.tokens()
        self.reported_tokens = prompt_tokens or self.reported_tokens[0], completion_tokens or self.reported_tokens[1]

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
    if b"\r" in block:  # rare: two copies are saved
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
