"""Where an event ends, whether it is well formed, and whether the stream is complete."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Raw

from multiverse_gateway.core.dialects import Dialect, dialect_of
from multiverse_gateway.core.error_events import error_event, refusal_event
from multiverse_gateway.core.lenient import BOM
from multiverse_gateway.core.payloads import MAX_REPORTED_TOKENS, tokens_of
from multiverse_gateway.core.sse import (
    DONE_EVENT,
    EVENTS_PER_CALL,
    MAX_EVENT_BYTES,
    EventStream,
)
from support import answers
from support.memory import peak_of_memory

DIALECTS = list(Dialect)


def chunk(content: str = "hello", *, index: int = 0, finish: object = None, **more: object) -> bytes:
    choice = {"index": index, "delta": {"content": content}, "finish_reason": finish}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice], **more})


def event(data: object, name: str = "", end: str = "\n") -> bytes:
    lines = [f"event: {name}"] if name else []
    lines.append(f"data: {json.dumps(data, ensure_ascii=False)}")
    return (end.join(lines) + end * 2).encode()


def fed(*pieces: bytes, dialect: Dialect = Dialect.CHAT, **options: Any) -> tuple[EventStream, bytes]:
    stream = EventStream(dialect, **options)
    return stream, b"".join([*[part for piece in pieces for part in parts(stream, piece)], stream.finish()])


def parts(stream: EventStream, piece: bytes) -> Iterator[bytes]:
    """Return what each call gives until everything of the piece has been handled, as the gateway does."""
    yield stream.feed(piece)
    while stream.has_more:
        yield stream.feed(b"")


def outcome(stream: EventStream) -> dict[str, object]:
    names = ("events", "has_data", "first_error", "ended", "failed", "broken", "needs_done", "reported_tokens", "counted_tokens")
    return {name: getattr(stream, name) for name in names} | {"complete": stream.complete()}


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/chat/completions", Dialect.CHAT),
        ("/v1/completions", Dialect.CHAT),
        ("/v1/responses", Dialect.RESPONSES),
        ("/v1/messages", Dialect.MESSAGES),
        ("/v1/audio/speech", Dialect.OTHER),
        ("/v1/chat/completions/", Dialect.OTHER),
    ],
)
def test_the_dialect_follows_from_the_path(path: str, dialect: Dialect) -> None:
    """Each API path is answered in one dialect."""
    assert dialect_of(path) is dialect


@pytest.mark.parametrize(
    "whole",
    [
        chunk(),
        chunk("grüße 你好 😀"),
        event({"choices": []}, end="\r\n"),
        event({"choices": []}, end="\r"),
        b"data:{}\n\n",
        chunk() + chunk() + chunk(finish="stop"),
        b": ping\ndata: {}\n\n",
        chunk() + b": ping\r\n\r\n" + chunk(),
        event({"choices": []}, "message"),
        b'data: {\ndata:  "choices": [],\ndata: "x": 1}\n\n',
        b'id: 7\nretry: 10\ndata: {"b": 1.0, "a": 1e2}\nunknown\n\n',
    ],
)
def test_whole_events_pass_as_the_very_same_bytes(whole: bytes) -> None:
    """A chunk of whole events is returned itself, not copied, whatever its line ends, field order and comments."""
    stream = EventStream(Dialect.CHAT)
    assert stream.feed(whole) is whole
    assert stream.broken is None


def test_half_an_event_is_kept_back() -> None:
    """Only complete events leave; the rest waits for its end."""
    stream = EventStream(Dialect.CHAT)
    first, second = chunk("one"), chunk("two")
    assert stream.feed(first + second[:-1]) == first
    assert stream.feed(b"") == b""
    assert stream.events == 1
    assert stream.feed(second[-1:] + first[:9]) == second
    assert stream.feed(first[9:]) == first


def test_half_an_event_is_discarded_at_the_end() -> None:
    """A stream cut in the middle of an event is not complete, and nothing of the half was relayed (S01)."""
    stream, out = fed(chunk() + chunk()[:30])
    assert out == chunk()
    assert not stream.complete()


def test_a_carriage_return_may_be_parted_from_its_line_feed() -> None:
    """Where lines end with CR LF an event waits for its LF, the last one too; a lone CR ends it, and a LF that follows goes on at once."""
    stream = EventStream(Dialect.CHAT)
    whole = event({}, end="\r\n")
    assert stream.feed(whole[:-1]) == b""
    assert stream.feed(b"\n") == whole
    assert stream.feed(whole[:-1]) == b""
    assert stream.feed(b"\n" + whole) == whole * 2
    lone = event({}, end="\r")
    assert stream.feed(lone) == lone
    assert stream.feed(b"\n" + lone) == b"\n" + lone
    assert stream.feed(b": x") == b""
    assert stream.feed(b"\n") == b""
    assert stream.feed(b"\n") == b": x\n\n"
    assert stream.events == 5
    assert stream.feed(b": x\r\n\r") + stream.feed(b"\n\n\r") == b": x\r\n\r\n\n\r"
    assert stream.feed(b"data: [DONE]\r\n\r") == b""
    assert not stream.ended
    assert stream.feed(b"\n") == b"data: [DONE]\r\n\r\n"
    assert stream.ended


def test_a_body_may_end_with_a_carriage_return() -> None:
    """The event is complete: it was only waited for its LF. What is broken or unfinished stays behind."""
    stream, out = fed(b"data: {}\r\n\r\ndata: [DONE]\r\n\r")
    assert (out, stream.ended) == (b"data: {}\r\n\r\ndata: [DONE]\r\n\r", True)
    assert stream.finish() == b""
    assert fed(b"data: {}\r\n\r\ndata: oops\r\n\r")[1] == b"data: {}\r\n\r\n"
    assert fed(b"data: {}\r\n")[1] == fed(b"data: {}\r")[1] == b""


def test_comments_before_the_first_event_are_dropped() -> None:
    """So are blank lines and blocks without data: they commit nothing, and some clients stumble over them (S14)."""
    early = (b": ping\n\n", b"\n\n", b": ping\r\n\r\n", b"event: x\n\n", b"retry: 7\n\n", BOM + b": ping\n\n")
    for piece in early:
        stream, out = fed(piece, piece)
        assert (out, stream.has_data, stream.events, stream.complete()) == (b"", False, 0, False)
        assert fed(piece + chunk() + piece + chunk())[1] == chunk() + piece + chunk()
        assert fed(piece, chunk(), piece, chunk())[1] == chunk() + piece + chunk()
    assert fed(b": ping\ndata: {}\n\n")[1] == b": ping\ndata: {}\n\n"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("blank", [b"data\n\n", b"data:\n\n", b"data: \r\n\r\n", b"data:   \n\n", b"data:\ndata:\n\n", b"id: 7\ndata:\r\r"])
def test_an_event_with_empty_data_is_a_heartbeat(dialect: Dialect, blank: bytes) -> None:
    """It is dropped wherever it stands: clients would try to parse it."""
    stream, out = fed(blank + chunk() + blank * 2 + chunk(finish="stop") + blank, blank, dialect=dialect)
    assert (out, stream.events, stream.broken) == (chunk() + chunk(finish="stop"), 2, None)
    stream, out = fed(b"event: ping\n" + blank, b"event: ping\n" + blank + chunk(), dialect=dialect)
    assert (out == chunk()) is (dialect is Dialect.CHAT)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_byte_order_mark_at_the_start_is_not_relayed(dialect: Dialect) -> None:
    """It may arrive in any number of pieces; `openai` would lose the first event to it. Anywhere else it belongs to the event."""
    whole = BOM + chunk() + chunk(finish="stop")
    for cut in range(6):
        stream, out = fed(whole[:cut], whole[cut:], dialect=dialect)
        assert (out, stream.events) == (chunk() + chunk(finish="stop"), 2)
    assert fed(*(bytes([byte]) for byte in whole), dialect=dialect)[1] == whole.removeprefix(BOM)
    assert fed(chunk(), BOM + chunk())[0].events == 1
    assert fed(b": x\n\n", BOM + chunk())[0].events == 0
    assert fed(BOM + BOM + chunk())[0].events == fed(BOM, BOM + chunk())[0].events == 0
    assert fed(BOM + b": x\n\n", chunk())[0].events == 1


@pytest.mark.parametrize(
    ("dialect", "event", "is_relayed"),
    [
        (Dialect.RESPONSES, b'event: error\ndata: {"message": "x"}\n\n', False),
        (Dialect.RESPONSES, b'event: error\ndata: {"error": null}\n\n', False),
        (Dialect.RESPONSES, b'data: {"error": "x"}\n\n', True),
        (Dialect.RESPONSES, b'data: {"type": "error", "message": "x"}\n\n', True),
        (Dialect.MESSAGES, b'data: {"error": {"message": "x"}}\n\n', False),
        (Dialect.MESSAGES, b'data: {"type": "error", "error": {"type": "api_error", "message": "x"}}\n\n', False),
        (Dialect.MESSAGES, b'event: message_delta\ndata: {"type": "error"}\n\n', False),
        (Dialect.MESSAGES, b'event: error\ndata: {"message": "x"}\n\n', True),
        (Dialect.OTHER, b'event: error\ndata: {"message": "x"}\n\n', True),
    ],
)
def test_an_error_that_clients_of_the_dialect_would_not_raise_is_not_relayed(dialect: Dialect, event: bytes, is_relayed: bool) -> None:
    """`openai` raises for a field `error`, and `anthropic` for an event called `error`; both pass over anything else."""
    stream, out = fed(chunk(), event, dialect=dialect)
    assert stream.failed
    assert (out, stream.ended, stream.broken is None) == (chunk() + event * is_relayed, is_relayed, is_relayed)


@pytest.mark.parametrize("dialect", [Dialect.RESPONSES, Dialect.MESSAGES])
def test_done_does_not_end_a_stream_with_a_last_event_of_its_own(dialect: Dialect) -> None:
    """It is dropped: `openai` stops reading there, and would take half an answer for a whole one."""
    for done in (DONE_EVENT, b"event: message\ndata: [DONE]\n\n", b"data:  [DONE] \n\n"):
        stream, out = fed(chunk(), done, dialect=dialect)
        assert (out, stream.events, stream.complete()) == (chunk(), 1, False)
        stream, out = fed(done, dialect=dialect)
        assert (out, stream.has_data, stream.complete()) == (b"", False, False)
    assert fed(chunk(), DONE_EVENT, dialect=Dialect.OTHER)[1] == chunk() + DONE_EVENT


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_done_ends_a_chat(end: str) -> None:
    """The stream ends with [DONE]; bytes after it are dropped."""
    done = f"data: [DONE]{end}{end}".encode()
    stream, out = fed(chunk() + done + chunk(), chunk(), b"\n")
    assert out == chunk() + done
    assert (stream.ended, stream.failed, stream.complete(), stream.needs_done, stream.events) == (True, False, True, False, 2)


def test_a_finished_chat_without_done_needs_one() -> None:
    """A clean end after a finish_reason is complete; the gateway adds [DONE] (S04)."""
    stream, out = fed(chunk() + chunk(finish="stop") + b"data: [DO")
    assert out == chunk() + chunk(finish="stop")
    assert (stream.ended, stream.complete(), stream.needs_done) == (False, True, True)
    assert stream.feed(b"NE]\n\n") == DONE_EVENT
    assert (stream.ended, stream.complete(), stream.needs_done) == (True, True, False)


def test_an_unfinished_chat_is_not_complete() -> None:
    """A clean end without finish_reason is a broken stream, as is one without any choice (S01)."""
    for pieces in ([], [chunk()], [event({"choices": []})], [event({})]):
        stream, _ = fed(*pieces)
        assert (stream.complete(), stream.needs_done) == (False, False)


def test_every_choice_must_finish() -> None:
    """Two choices and one finish_reason are not complete (S12)."""
    stream, _ = fed(chunk(index=0) + chunk(index=1) + chunk(index=0, finish="stop"))
    assert not stream.complete()
    stream.feed(chunk(index=1, finish="length"))
    assert stream.complete()
    stream.feed(chunk(index=0) + chunk(index=1, finish="") + chunk(index=0, finish="null"))
    assert stream.complete()


def test_a_flood_of_choices_is_not_remembered() -> None:
    """A hostile server cannot fill the memory with choices."""
    flood = [event({"choices": [{"index": start + index} for index in range(5_000)]}) for start in (0, 5_000)]
    stream, _ = fed(*flood, event({"choices": [{"index": 0, "finish_reason": "stop"}]}))
    assert len(stream._finished) == 4096
    assert not stream.complete()


@pytest.mark.parametrize("value", [b"[],", b"{},", b'{"index":1},', b'{"index":null},'])
@pytest.mark.parametrize("name", [b"choices", b"error", b"other"])
def test_an_event_of_tiny_values_is_not_decoded(value: bytes, name: bytes) -> None:
    """S7: a server cannot keep all others waiting with events that take long to decode; they are relayed, and the stream goes on."""
    event = b'data: {"choices":[],"%b":[%b0]}\n\n' % (name, value * (900_000 // len(value)))
    stream, out = fed(chunk())
    with peak_of_memory() as peak:
        for start in range(0, len(event), 65_536):  # as the wire reads
            out += stream.feed(event[start : start + 65_536])
    assert out == chunk() + event
    assert peak() < 6 * len(event)
    assert stream.failed == (name == b"error")
    if not stream.failed:
        assert stream.feed(chunk(finish="stop") + DONE_EVENT)
        assert stream.complete()


@pytest.mark.parametrize("name", ["completed", "failed", "incomplete"])
@pytest.mark.parametrize("typed", [True, False])
def test_a_response_ends_with_its_own_last_event(name: str, typed: bool) -> None:
    """A Responses stream is complete once its last event was seen, by its type or by its name; [DONE] is none (S04)."""
    last = f"response.{name}"
    final = event({"type": last, "response": {"usage": {"input_tokens": 3, "output_tokens": 5}}} if typed else {"response": {}}, last)
    stream, _ = fed(
        event({"type": "response.created", "response": {"usage": None}}, "response.created"), DONE_EVENT, dialect=Dialect.RESPONSES
    )
    assert (stream.ended, stream.complete(), stream.needs_done) == (False, False, False)
    assert stream.feed(final + DONE_EVENT) == final
    assert (stream.ended, stream.complete(), stream.failed, stream.needs_done) == (True, True, False, False)
    assert stream.reported_tokens == ((3, 5) if typed else (0, 0))


def test_a_nameless_response_event_is_known_by_its_type() -> None:
    """Some servers leave the `event:` line out."""
    final = event({"type": "response.completed"})
    stream, out = fed(final, final, dialect=Dialect.RESPONSES)
    assert out == final
    assert stream.ended


def test_messages_end_with_message_stop() -> None:
    """A Messages stream is complete after message_stop; its usage comes in two parts."""
    start = event({"type": "message_start", "message": {"usage": {"input_tokens": 25, "output_tokens": 1}}}, "message_start")
    delta = event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}}, "message_delta")
    stop = event({"type": "message_stop"}, "message_stop")
    stream, _ = fed(start, delta, dialect=Dialect.MESSAGES)
    assert not stream.complete()
    assert stream.feed(stop + b": more\n\n") == stop
    assert stream.complete()
    assert (stream.reported_tokens, stream.events) == ((25, 15), 3)


def test_any_other_stream_is_complete_between_events() -> None:
    """Without an end of its own a stream is complete when an event was seen and none is half done."""
    stream = EventStream(Dialect.OTHER)
    assert not stream.complete()
    stream.feed(b": ping\n\n")
    assert not stream.complete()
    stream.feed(b"data: audio\n\n")
    assert (stream.complete(), stream.needs_done, stream.ended, stream.unfinished) == (True, False, False, 0)
    stream.feed(b"\r\n")
    assert stream.complete()
    stream.feed(b"data: au")
    assert (stream.complete(), stream.unfinished) == (False, 8)
    assert fed(DONE_EVENT, DONE_EVENT, dialect=Dialect.OTHER)[1] == DONE_EVENT * 2


READABLE_ERRORS = [
    event({"error": {"message": "no memory", "code": 500}}),
    event({"error": {"message": "no memory"}}, end="\r\n"),
    event({"error": {"message": "no memory"}}, "error"),
    event({"error": "no memory"}),
    event({"error": True, "type": "error"}),
    event({"error": {"message": "no memory"}, "object": "error", "choices": []}),
    event({"error": {"message": "no memory"}, "choices": None, "usage": "x"}),
    b'data: {"error":{"message":"\\ud83d"}}\n\n',
    b'data: {"error":{"message":"no memory","free":NaN}}\n\n',
]
"""OpenAI's libraries raise an exception for these, whatever the name of the event."""

TYPED_ERRORS = [
    event({"type": "error", "message": "no memory"}),
    event({"type": "error", "message": "no memory", "error": None}),
    event({"type": "error", "message": "no memory", "choices": 7}),
    event({"type": "error", "message": "no memory", "choices": [{"index": 0}]}),
    event({"message": "no memory"}, "error"),
    event({}, "error"),
    b'event: error\ndata: {"message":"\\ud83d"}\n\n',
]
UNREADABLE_ERRORS = [
    b"event: error\ndata: no memory\n\n",
    b"event: error\ndata: [DONE]\n\n",
    b"event: error\r\ndata: [1]\r\n\r\n",
    b'event: error\ndata: "no memory"\n\n',
    b"event: error\ndata: {\n\n",
    b"event: error\ndata:\n\n",
    b"data\nevent:error\n\n",
    b"event: error\n\n",
    b"event: error\r\r",
]
OBJECT_ERRORS = [
    event({"object": "error", "message": "no memory", "type": "InternalServerError", "param": None, "code": 500}),
    event({"object": "error", "choices": []}),
    event({"object": "error", "choices": 7}),
    b'data: {"object":"error","message":"\\ud83d"}\n\n',
]
"""vLLM reports errors so."""


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("error", READABLE_ERRORS + TYPED_ERRORS + UNREADABLE_ERRORS + OBJECT_ERRORS)
def test_a_first_event_that_is_an_error_is_not_relayed(dialect: Dialect, error: bytes) -> None:
    """An error in place of the first event is handed over for a retry on another server (S08)."""
    stream, out = fed(b": ping\n\n", error + chunk(), chunk(), dialect=dialect)
    assert out == b""
    assert stream.first_error is not None
    assert (stream.has_data, stream.ended, stream.failed, stream.complete(), stream.needs_done) == (False,) * 5


def test_the_data_of_a_first_error_is_known() -> None:
    """Its class depends on it."""
    assert fed(event({"object": "error", "code": 404}))[0].first_error == b'{"object": "error", "code": 404}'
    assert fed(b"event: error\ndata:  no memory \n\n")[0].first_error == b"no memory"
    assert fed(b"event: error\n\n")[0].first_error == b""


def assert_relayed(error: bytes, dialect: Dialect) -> None:
    stream, out = fed(chunk(), error + chunk() + DONE_EVENT, chunk(), dialect=dialect)
    assert out == chunk() + error
    assert (stream.ended, stream.failed, stream.complete(), stream.needs_done, stream.first_error) == (True, True, True, False, None)
    assert (stream.events, stream.broken) == (2, None)


def assert_held_back(error: bytes, dialect: Dialect) -> None:
    for first in (chunk(), chunk(finish="stop")):
        stream, out = fed(first, error + chunk() + DONE_EVENT, chunk(), dialect=dialect)
        assert out == first
        assert (stream.ended, stream.failed, stream.complete(), stream.needs_done, stream.first_error) == (False, True, False, False, None)
        assert (stream.broken, stream.over_limit) == ("an error in a form that clients cannot read", False)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("error", READABLE_ERRORS)
def test_an_error_in_the_middle_is_relayed_once_and_ends_the_stream(dialect: Dialect, error: bytes) -> None:
    """The server reports the error to the client, and nothing follows it (S08); Anthropic's libraries go by the name of the event."""
    judge = assert_held_back if dialect is Dialect.MESSAGES and not error.startswith(b"event: error") else assert_relayed
    judge(error, dialect)


@pytest.mark.parametrize("error", TYPED_ERRORS + UNREADABLE_ERRORS + OBJECT_ERRORS)
def test_an_error_in_any_other_form_breaks_a_chat(error: bytes) -> None:
    """OpenAI's libraries would take it for a part of the answer, or fail to parse it: the gateway sends its own error event instead."""
    assert_held_back(error, Dialect.CHAT)


@pytest.mark.parametrize("dialect", [Dialect.RESPONSES, Dialect.MESSAGES, Dialect.OTHER])
def test_named_error_events_are_relayed_where_events_have_names(dialect: Dialect) -> None:
    """Clients read them in the form of their own API; any other, and an error whose data is not an object, is replaced there, too."""
    for error in TYPED_ERRORS:
        is_raised = {Dialect.RESPONSES: b'"type": "error"' in error, Dialect.MESSAGES: error.startswith(b"event: error")}
        (assert_relayed if is_raised.get(dialect, True) else assert_held_back)(error, dialect)
    for error in UNREADABLE_ERRORS:
        assert_held_back(error, dialect)
    stream, out = fed(chunk(), OBJECT_ERRORS[0], dialect=dialect)
    assert (out, stream.failed) == (chunk() + OBJECT_ERRORS[0], False)


@pytest.mark.parametrize("error", [None, False, "", {}])
def test_an_empty_error_is_none(error: object) -> None:
    """Some servers put `error: null` into every chunk."""
    stream, out = fed(chunk(error=error))
    assert out == chunk(error=error)
    assert stream.first_error is None


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"data: hello\n\n", "neither"),
        (b"data: [1]\n\n", "neither"),
        (b"data: null\n\n", "neither"),
        (b'data: "[DONE]"\n\n', "neither"),
        (b"data: {\n\n", "neither"),
        (b'data: {"a":1}x\n\n', "neither"),
        (b'data: {"a":1}{"a":1}\n\n', "neither"),
        (b'data: {"a":nan}\n\n', "neither"),
        (b'data: {"a":-NaN}\n\n', "neither"),
        (b'data: {"a":"\\ud83"}\n\n', "neither"),
        (b'data: {"a":1NaN}\n\n', "neither"),
        (b'data: {"choices":7,"a":}\n\n', "neither"),
        (b'data: {"a":1,\rdata: "b":}\n\n', "neither"),
        (b'data: {"a":1}\ndata: {"a":1}\n\n', "neither"),
        (b'data: {"a":\n1}\n\n', "neither"),
        (b'data: {"a":\r1}\n\n', "neither"),
        (b'data: {"a":"\xff"}\n\n', "UTF-8"),
        (b'data: {"\xc3":"a"}\n\n', "UTF-8"),
        (b": \xff\n\n", "UTF-8"),
        (b'data: {"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n", "deep"),
        (b'data: {"choices":7,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n", "deep"),
        (b'data: {"a":' * 20_000 + b"\n\n", "neither"),
    ],
)
def test_a_malformed_event_breaks_a_chat(bad: bytes, reason: str) -> None:
    """The events before it are relayed, it and what follows are not, in one chunk or in many."""
    for pieces in ([chunk() + bad + chunk()], [chunk(), bad, chunk()], [chunk(finish="stop"), bad[:9], bad[9:]]):
        stream, out = fed(*pieces)
        assert out == pieces[0][: len(out)]
        assert out in (chunk(), chunk(finish="stop"))
        assert stream.broken is not None
        assert reason in stream.broken
        assert (stream.complete(), stream.needs_done) == (False, False)


def test_data_that_is_no_json_is_relayed_outside_of_chats() -> None:
    """Only chat and text completions promise JSON in every event."""
    for dialect in (Dialect.RESPONSES, Dialect.MESSAGES, Dialect.OTHER):
        stream, out = fed(b"data: hello\n\n", dialect=dialect)
        assert out == b"data: hello\n\n"
        assert (stream.broken, stream.has_data) == (None, True)


def test_an_event_that_is_too_long_breaks_the_stream() -> None:
    """An event over the limit is cut whether it comes at once, in pieces or without an end; the memory stays flat (S10)."""
    longest = b"data: {" + b" " * (MAX_EVENT_BYTES - 10) + b"}\n\n"
    assert len(longest) == MAX_EVENT_BYTES
    for pieces in ([longest], [longest[:7], longest[7:]]):
        assert fed(*pieces)[0].broken is None
    for pieces in ([longest[:7] + b" " + longest[7:]], [chunk() + b"data: {" + longest], [b"x" * 65536] * 17):
        stream, out = fed(*pieces)
        assert (stream.broken, stream.over_limit) == ("an event longer than 1048576 bytes", True)
        assert len(stream._rest) == 0
        assert out in (b"", chunk())
        assert stream.feed(chunk()) == b""


def test_the_limit_of_an_event_is_settable() -> None:
    """The limit counts the bytes of one event, its line ends included."""
    assert fed(chunk(), max_event_bytes=len(chunk()))[0].broken is None
    assert fed(chunk(), max_event_bytes=len(chunk()) - 1)[0].broken is not None


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": None},
        {"choices": 7},
        {"choices": {"0": 1}},
        {"choices": [None, 7, "x", []]},
        {"choices": [{"index": None}]},
        {"choices": [{"index": "0", "finish_reason": 7}]},
        {"choices": [{"index": 0.5}], "usage": [1]},
        {"choices": [{}], "usage": 7, "type": 7, "message": "text", "response": []},
        {"usage": {"prompt_tokens": None, "completion_tokens": "7"}},
        {"usage": {"prompt_tokens": -1, "completion_tokens": "9" * 400}},
        {"usage": {"prompt_tokens": True, "completion_tokens": {}}},
        {"usage": None, "error": None, "type": None},
    ],
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_odd_types_do_not_break_a_stream(odd: dict[str, Any], dialect: Dialect) -> None:
    """Servers differ; only what is no JSON object is malformed."""
    stream, out = fed(event(odd), dialect=dialect)
    assert out == event(odd)
    assert (stream.broken, stream.first_error, stream.reported_tokens) == (None, None, (0, 0))


def test_numbers_that_cannot_be_represented_do_not_break_a_stream() -> None:
    """A number without end is skipped wherever it stands (L06)."""
    endless = "9" * 10_000
    for body in (f'{{"x":{endless}}}', f'{{"choices":[{{"index":{endless}}}]}}', f'{{"usage":{{"prompt_tokens":{endless}}}}}'):
        assert fed(f"data: {body}\n\n".encode())[0].broken is None
    assert fed(f'data: {{"error":{endless}}}\n\n'.encode())[0].first_error is not None


@pytest.mark.parametrize("more", [{}, {"usage": 7}])
def test_a_finish_reason_is_a_string_that_says_something(more: dict[str, Any]) -> None:
    """An empty string, `"null"` and anything but a string say nothing, so that half an answer never looks whole (S04)."""
    nothing: tuple[object, ...] = (None, "", "null", False, True, 0, 7, 0.5, [], ["stop"], {}, {"reason": "stop"})
    for reason in nothing:
        stream, _ = fed(chunk(finish=reason, **more), chunk(finish=reason, **more))
        assert (stream.complete(), stream.needs_done) == (False, False)
        assert fed(chunk(finish=reason, **more), chunk(finish="stop", **more))[0].complete()
        assert fed(chunk(finish="stop", **more), chunk(finish=reason, **more))[0].complete()
        assert not fed(chunk(finish="stop", **more), chunk(index=1, finish=reason, **more))[0].complete()
    for reason in ("stop", "length", "tool_calls", "content_filter", "eos", "NULL", " "):
        assert fed(chunk(finish=reason, **more))[0].complete()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "odd",
    [
        rb'data: {"choices":[{"index":0,"delta":{"content":"\ud83d"},"finish_reason":null}]}',
        rb'data: {"choices":[{"index":0,"delta":{"content":"\uDE00\uD83D \\ud83d"},"finish_reason":null}]}',
        rb'data: {"choices":[{"index":0,"finish_reason":null,"logprobs":{"content":[{"logprob":-Infinity,"top":[NaN,Infinity]}]}}]}',
        rb'data: {"id":"\ud800","choices":[{"index":0,"finish_reason":null}],"usage":null}',
    ],
)
def test_json_that_only_the_fast_parser_rejects_is_relayed(odd: bytes, dialect: Dialect) -> None:
    """Half of a surrogate pair is valid JSON (RFC 8259), and Python's `json` reads NaN: a server is not to blame for either."""
    for whole in (odd + b"\n\n", odd + b"\r\n\r\n", (odd + b"\n\n") * 3):
        stream, out = fed(chunk() + whole, whole, chunk(finish="stop"), dialect=dialect)
        assert out == chunk() + whole * 2 + chunk(finish="stop")
        assert (stream.broken, stream.failed, stream.needs_done) == (None, False, dialect is Dialect.CHAT)
    assert fed(odd.replace(b"null", b'"stop"') + b"\n\n")[0].needs_done


@pytest.mark.parametrize(
    ("usages", "expected"),
    [
        ([{"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}], (3, 4)),
        ([{"prompt_tokens": 3, "completion_tokens": 1}, None, {"prompt_tokens": 3, "completion_tokens": 2}], (3, 2)),
        ([{"prompt_tokens": 3.0, "completion_tokens": 4.0}], (3, 4)),
        ([{"prompt_tokens": 3, "completion_tokens": None}], (3, 0)),
        ([{"input_tokens": 3, "output_tokens": 4}], (3, 4)),
        ([{"prompt_tokens": 10_000_000, "completion_tokens": 10_000_001}], (10_000_000, 10_000_000)),
        ([{"prompt_tokens": 2**53, "completion_tokens": 10**400}], (10_000_000, 10_000_000)),
        ([{"prompt_tokens": -5, "completion_tokens": 1e300}], (0, 10_000_000)),
        ([{"prompt_tokens": 2.7, "completion_tokens": "12"}], (2, 0)),
        ([{"prompt_tokens": -0.5, "completion_tokens": True}], (0, 0)),
    ],
)
def test_the_latest_usage_is_kept(usages: list[dict[str, Any] | None], expected: tuple[int, int]) -> None:
    """Usage may come in the last event or as a running total in each."""
    stream, _ = fed(*[chunk(usage=usage) for usage in usages])
    assert stream.reported_tokens == expected


@pytest.mark.parametrize("carrier", ["response", "message"])
@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"input_tokens": 7, "output_tokens": 2}, (7, 2)),
        ({"input_tokens": 2**53, "output_tokens": 10**400}, (10_000_000, 10_000_000)),
        ({"input_tokens": -1, "output_tokens": "12"}, (0, 0)),
        ([], (0, 0)),
    ],
)
def test_the_usage_of_named_events_is_capped_as_well(carrier: str, usage: object, expected: tuple[int, int]) -> None:
    """It stands in the response or the message that an event carries (S8)."""
    for dialect in (Dialect.RESPONSES, Dialect.MESSAGES):
        last = event({"type": "x", carrier: {"usage": usage}, "sequence_number": 3}, "x")
        stream, out = fed(last, dialect=dialect)
        assert (out, stream.reported_tokens, stream.next_sequence_number) == (last, expected, 4)


@pytest.mark.parametrize(
    ("path", "begin"),
    [("/v1/chat/completions", 1), ("/v1/completions", 0), ("/v1/responses", 1), ("/v1/messages", 2), ("/v1/audio/speech", None)],
)
def test_the_tokens_that_came_are_counted(path: str, begin: int | None) -> None:
    """One for each event with output, whether events come one by one or all at once; a dialect without tokens has none."""
    sent = answers.events(path, speaker="one", model="tiny", done=False) or [event({"type": "speech.audio.delta", "audio": "AAAA"})] * 5
    for count in range(len(sent) + 1):
        one_by_one, _ = fed(*sent[:count], dialect=dialect_of(path))
        at_once, _ = fed(b"".join(sent[:count]), dialect=dialect_of(path))
        expected = 0 if begin is None else min(5, max(0, count - begin))
        assert one_by_one.counted_tokens == at_once.counted_tokens == expected


@pytest.mark.parametrize(
    ("data", "counted"),
    [
        ({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None}]}, 1),  # Ollama
        ({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]}, 0),
        ({"choices": [{"index": 0, "delta": {"role": "assistant", "reasoning_content": "Hm"}}]}, 1),
        ({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"name": "add", "arguments": ""}}]}}]}, 1),
        ({"choices": [{"index": 0, "text": "Hi", "finish_reason": "length"}]}, 1),
        ({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}, 0),
        ({"choices": [], "usage": {"prompt_tokens": 3}}, 0),
    ],
)
def test_an_event_that_begins_or_ends_an_answer_may_have_output(data: dict[str, object], counted: int) -> None:
    """Or only a role, a finish reason, or token counts."""
    assert fed(event(data))[0].counted_tokens == counted


@pytest.mark.parametrize("dialect", DIALECTS)
def test_our_error_event_is_read_as_an_error(dialect: Dialect) -> None:
    """What the gateway writes at the end of a stream is an error in the eyes of its own parser (S01)."""
    ours = error_event(dialect, 'lost "it"\n', "upstream_stream_interrupted")
    stream, out = fed(chunk(), ours, dialect=dialect)
    assert out == chunk() + ours
    assert stream.failed


@pytest.mark.parametrize(
    ("body", "status", "message", "fields"),
    [
        (b'{"error": {"message": "no", "code": "overloaded", "n_ctx": 4096}}', 503, "no", {"code": "overloaded", "n_ctx": 4096}),
        (b'{"error": "no such template"}', 400, "no such template", {"type": "invalid_request_error", "code": None}),
        (b'{"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}', 400, "too long", {"code": 400}),
        (b'{"detail": "bad field"}', 422, "bad field", {"type": "invalid_request_error"}),
        (b'{"error": {"message": "", "values": [1], "large": 9007199254740993}}', 500, "The request was refused with status 500.", {}),
        (b'"in a string"', 400, "in a string", {}),
        (b"[1]", 409, "The request was refused with status 409.", {}),
        (b"in plain words", 402, "in plain words", {}),
        (b"<html>bad gateway</html>", 451, "The request was refused with status 451.", {}),
        (b"", 400, "The request was refused with status 400.", {}),
        (b"[" * 100_000, 400, "[" * 4096, {}),
    ],
)
def test_a_refusal_becomes_an_event(body: bytes, status: int, message: str, fields: dict[str, object]) -> None:
    """Whatever a server's refusal looks like, clients of each dialect find a message, and OpenAI's an object `error` that they raise."""
    event = refusal_event(Dialect.CHAT, status, body)
    assert event.startswith(b"data: ")
    assert event.endswith(b"}\n\n")
    error = json.loads(event[6:])["error"]
    assert error["message"] == message
    assert {"message", "type", "param", "code"} <= error.keys()
    assert not {"values", "large"} & error.keys()
    assert {name: error[name] for name in fields} == fields
    name, data = refusal_event(Dialect.RESPONSES, status, body).split(b"\n", 1)
    assert (name, json.loads(data[6:])["message"], json.loads(data[6:])["error"]["message"]) == (b"event: error", message, message)
    name, data = refusal_event(Dialect.MESSAGES, status, body).split(b"\n", 1)
    assert (name, json.loads(data[6:])["error"]["message"]) == (b"event: error", message)


def test_a_refusal_for_anthropics_clients_has_their_types() -> None:
    """They choose by it whether to try again."""
    event = refusal_event(Dialect.MESSAGES, 503, b'{"error": {"message": "busy"}}')
    assert json.loads(event.split(b"data: ")[1])["error"] == {"type": "overloaded_error", "message": "busy"}


def test_error_events_have_the_form_of_their_dialect() -> None:
    """OpenAI's and Anthropic's clients find message and code where they look for them (S01)."""
    chat = b'data: {"error":{"message":"lost","type":"server_error","param":null,"code":"x"}}\n\n'
    assert error_event(Dialect.CHAT, "lost", "x") == error_event(Dialect.OTHER, "lost", "x", 7) == chat
    assert error_event(Dialect.RESPONSES, "lost", "x", 7) == (
        b'event: error\ndata: {"type":"error","sequence_number":7,"code":"x","message":"lost","param":null,'
        b'"error":{"type":"server_error","code":"x","message":"lost","param":null}}\n\n'
    )
    assert error_event(Dialect.MESSAGES, "lost", "x", 7) == (
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"lost"}}\n\n'
    )
    for code in ("gateway_shutting_down", "overloaded"):
        assert b'"type":"overloaded_error"' in error_event(Dialect.MESSAGES, "later", code)


def test_the_next_sequence_number_follows_the_last_one_relayed() -> None:
    """The error event of a broken Responses stream carries it; only relayed events count."""
    one = event({"type": "response.created", "sequence_number": 4}, "response.created")
    stream, _ = fed(one, dialect=Dialect.RESPONSES)
    assert stream.next_sequence_number == 5
    odds: tuple[object, ...] = ("7", 7.5, None, True, [], -1, 1 << 62, -1 << 70)
    for odd in odds:
        stream.feed(event({"type": "x", "sequence_number": odd}))
        assert stream.next_sequence_number == 5
    stream.feed(event({"type": "x", "sequence_number": 6, "usage": "odd"}) + b'data: {"sequence_number": 9}'[:9])
    assert stream.next_sequence_number == 7
    assert EventStream(Dialect.RESPONSES).next_sequence_number == 0


# Bounded work


READ = 65536
"""Bytes that the gateway reads at once."""


@pytest.mark.parametrize(
    "unit",
    [
        b"data: {}\n\n",
        b"data:{}\n\n",
        b"data:{}\r\r",
        b"data: {}\r\n\r\n",
        b"event: x\n\n",
        b"x\n\n",
        b"id: 1\r\r",
        b": ping\n\ndata: {}\n\n",
        b'data: {"choices":[{},{},7]}\n\n',
        b'data: {"choices":[{"index":0,"finish_reason":null}],"usage":{"prompt_tokens":1e300}}\n\n',
    ],
)
def test_one_call_handles_a_limited_number_of_events(unit: bytes) -> None:
    """Events with and without data count, so that one busy stream cannot keep the others waiting; nothing is lost (S7)."""
    body = unit * (READ // len(unit))
    stream = EventStream(Dialect.CHAT)
    stream.feed(chunk())
    pieces = list(parts(stream, body))
    assert max(map(len, pieces)) <= EVENTS_PER_CALL * len(unit)
    assert len(pieces) >= READ // len(unit) // EVENTS_PER_CALL
    assert b"".join(pieces) == body
    assert not stream.has_more


@pytest.mark.parametrize(
    "unit", [b"\n", b"\r", b"\r\n", b"\n\r", b":\n\n", b": ping\r\n\r\n", b":\r\r", b":a\n:b\n\n\n", b":\n" * 9 + b"\r"]
)
def test_a_run_of_comments_and_blank_lines_counts_as_one_event(unit: bytes) -> None:
    """It takes one search, however many there are, and the events after it follow in the same call (S7)."""
    body = unit * (READ // len(unit))
    stream = EventStream(Dialect.CHAT)
    stream.feed(chunk())
    assert stream.feed(body + chunk()) == body + chunk()
    assert (stream.events, stream.has_more) == (2, False)


def test_what_waits_is_bounded_by_what_was_read() -> None:
    """While events are waiting nothing is read from the server, and what waits shrinks with every call (S7)."""
    stream = EventStream(Dialect.CHAT)
    stream.feed(b"data: {}\n\n" * 1000 + b"data: {")
    waiting = len(stream._rest)
    while stream.has_more:
        assert waiting <= 10_007
        stream.feed(b"")
        assert len(stream._rest) < waiting
        waiting = len(stream._rest)
    assert waiting == 7
    assert stream.feed(b"}\n\n") == b"data: {}\n\n"
    assert stream.events == 1001


@pytest.mark.parametrize("last", [DONE_EVENT, b"data: nonsense\n\n", event({"error": "no memory"})])
def test_nothing_waits_behind_the_end_of_a_stream(last: bytes) -> None:
    """A stream that ended, broke or told an error has no more to give (S7)."""
    stream = EventStream(Dialect.CHAT)
    out = b"".join(parts(stream, b"data: {}\n\n" * 100 + last + b"data: {}\n\n" * 100))
    assert (out.startswith(b"data: {}\n\n" * 100), stream.has_more, stream.is_over, stream.feed(b"")) == (True, False, True, b"")
    first = EventStream(Dialect.CHAT)
    out = b"".join(parts(first, b"x\n\n" * 100 + event({"error": "no memory"}) + b"x\n\n" * 100))
    assert (first.first_error is not None, first.has_more, first.feed(b"")) == (True, False, b"")


@pytest.mark.parametrize("line", [b"data:", b"data", b"data: x", b"event: x", b":", b"x"])
@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_an_event_of_very_many_lines_breaks_the_stream(line: bytes, end: bytes) -> None:
    """16,384 lines are read, more are not: each costs time, and no server needs them."""
    many = b"data: x" + end + (line + end) * 16_382 + end
    stream, out = fed(many, dialect=Dialect.OTHER)
    assert (stream.broken, out) == (None, many)
    stream, out = fed(line + end + many, dialect=Dialect.OTHER)
    assert (stream.broken, out, stream.over_limit) == ("an event of more than 16384 lines", b"", True)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("space", [b"", b" "])
def test_long_lines_of_data_are_read_like_short_ones(space: bytes, end: bytes) -> None:
    """They take another way, on which they are copied less often."""
    for length in (1, 16_377, 16_378, 16_379, 16_380, 100_000):
        lines = [b"id: 7", b"data:" + space + b"x" * length, b"event: error", b"data", b"data:" + space + b"y" * length, b""]
        stream, _ = fed(end.join(lines) + end, dialect=Dialect.RESPONSES)
        assert stream.first_error == b"x" * length + b"\n\n" + b"y" * length


def test_a_large_event_is_not_copied_many_times() -> None:
    """What is held of an event is counted once, so handling it may take no more than about as much again."""
    event = b'event: x\ndata: {"type":"x","b64_json":"' + b"A" * (4 << 20) + b'"}\n\n'
    stream = EventStream(Dialect.RESPONSES, max_event_bytes=16 << 20)
    stream.feed(event[:-1])
    tracemalloc.start()
    try:
        before = stream.unfinished
        assert len(stream.feed(event[-1:])) == len(event)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * before


def test_only_the_first_odd_choices_of_an_event_are_looked_at() -> None:
    """Choices of types that no specification gives them take more time each: 128 of them are looked at, as many as OpenAI allows."""
    choices: list[object] = [None, "x", 7, [], True, 0.5, *[{"index": index, "finish_reason": "stop"} for index in range(1000)]]
    stream, _ = fed(event({"choices": choices}))
    assert len(stream._finished) == 122
    endless = b'data: {"choices":[{"index":0,"finish_reason":"stop"},' + b"9" * 1000 + b"]}\n\n"
    assert fed(endless)[0].complete()


ENDS = st.sampled_from(["\n", "\r\n", "\r"])
LINES = st.sampled_from(
    [
        'data: {"choices":[{"index":0}]}',
        'data:{"choices":[{"index":1,"finish_reason":"stop"}]}',
        'data: {"choices":[{"index":0,"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}',
        'data: {"choices":',
        'data: [{"index":2}]}',
        'data: {"type":"response.completed"}',
        "data: [DONE]",
        'data: {"error":{}, "x":"ä😀"}',
        'data: {"error":1}',
        "data",
        ": ping",
        "event: message_stop",
        "event: error",
        "id: 7",
        "",
        "",
        "",
        "\ufeff",
    ]
)
EVENT_TEXTS = st.lists(st.tuples(LINES, ENDS).map("".join)).map("".join)
CHATS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([None, None, "stop"]), ENDS).map(
        lambda drawn: event({"choices": [{"index": drawn[0], "finish_reason": drawn[1]}], "x": "ä"}, end=drawn[2])
    )
).map(b"".join)
BODIES = st.one_of(EVENT_TEXTS.map(str.encode), CHATS, st.binary(), st.tuples(CHATS, st.binary()).map(b"".join))


def cut(body: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(body), *[place % (len(body) + 1) for place in cuts]})
    return [body[start:end] for start, end in pairwise(edges)]


@given(
    BODIES,
    st.lists(st.integers(0, 400)),
    st.sampled_from(DIALECTS),
    st.sampled_from([40, MAX_EVENT_BYTES]),
    st.sampled_from([1, 2, 3, EVENTS_PER_CALL]),
)
@example(b"data: [DONE]\r\n\r\n", [15], Dialect.CHAT, MAX_EVENT_BYTES, 1)
@example(b": a\r\r\ndata: {}\r\n\r\n", [5], Dialect.CHAT, MAX_EVENT_BYTES, 1)
@example(b": a\n\rdata: {}\n\n\n", [5], Dialect.CHAT, MAX_EVENT_BYTES, 1)
@example(b": a\n\n" * 80 + b"data: {}\r\n\r\n" * 80, [5, 99], Dialect.CHAT, MAX_EVENT_BYTES, EVENTS_PER_CALL)
@example(b": a\n\r" * 20, [], Dialect.CHAT, 40, 1)
def test_neither_cuts_between_chunks_nor_events_per_call_matter(
    body: bytes, cuts: list[int], dialect: Dialect, limit: int, events_per_call: int
) -> None:
    """Any segmentation gives the same bytes and the same verdict; what leaves is what came, less the events that are dropped."""
    whole, expected = fed(body, dialect=dialect, max_event_bytes=limit, events_per_call=len(body) + 1)
    stream, out = fed(*cut(body, cuts), dialect=dialect, max_event_bytes=limit, events_per_call=events_per_call)
    single, single_out = fed(*[body[at : at + 1] for at in range(len(body))], dialect=dialect, max_event_bytes=limit)
    assert is_part_of(expected, body)
    if limit == MAX_EVENT_BYTES:  # below it, the line feed of a lone CR LF pair may count for the event or not
        assert outcome(stream) == outcome(single) == outcome(whole)
        for other in (out, single_out):
            assert other == expected or (whole.ended and expected.endswith(b"\r\r\n") and other + b"\n" == expected)
    assert is_part_of(out, body)
    assert is_part_of(single_out, body)


def is_part_of(part: bytes, whole: bytes) -> bool:
    """Return whether nothing was added and the order is the same."""
    rest = iter(whole)
    return all(byte in rest for byte in part)


@given(EVENT_TEXTS)
def test_what_leaves_are_the_events_of_the_standard(text: str) -> None:
    """A parser written line by line from the standard finds the same events in what came and in what left."""
    stream, out = fed(text.encode(), dialect=Dialect.OTHER)
    expected = [(name, data) for name, data in standard_events(text) if name or data.strip()]
    if stream.is_over:
        assert expected[: stream.events] == standard_events(out.decode())
    else:
        assert expected == standard_events(out.decode())
        assert stream.events == len(expected)


def standard_events(text: str) -> list[tuple[str, str]]:
    """Parse a whole stream as in HTML 9.2.6."""
    events: list[tuple[str, str]] = []
    name, data = "", ""
    *lines, _ = re.split("\r\n|\n|\r", text.removeprefix("\ufeff"))
    for line in lines:
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                events.append((name, data.removesuffix("\n")))
            name, data = "", ""
        elif key == "data":
            data += value + "\n"
        elif key == "event":
            name = value
    return events


# Tokens that the client did not ask for


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
WORD = event({"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]})


@given(st.lists(st.sampled_from([WORD, USAGE, b": ping\n\n"]), max_size=6), st.sampled_from([b"", b"data: [DONE]\n\n"]), st.data())
def test_an_event_of_tokens_only_is_read_and_taken_out(events: list[bytes], last: bytes, data: st.DataObject) -> None:
    """However the stream is cut; everything else passes byte for byte, and it counts for nothing else."""
    whole = b"".join([*events, last])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    pieces = [whole[start:end] for start, end in pairwise([0, *cuts, len(whole)])]
    stream, passed = fed(*pieces, drops_usage=True)
    relayed = whole.replace(USAGE, b"")
    while relayed.startswith(b": ping\n\n"):
        relayed = relayed.removeprefix(b": ping\n\n")
    assert (passed, stream.carries_more) == (relayed, False)
    assert stream.reported_tokens == ((7, 2) if USAGE in events else (0, 0))
    assert stream.events == events.count(WORD) + bool(last)
    kept, all_of_it = fed(*pieces)
    assert (all_of_it.replace(b": ping\n\n", b""), stream.complete()) == (whole.replace(b": ping\n\n", b""), kept.complete())


@pytest.mark.parametrize(
    "kept",
    [
        {"choices": [{"index": 0, "finish_reason": None}], "usage": {"prompt_tokens": 7}},
        {"choices": []},
        {"usage": {"prompt_tokens": 7}},
        {"choices": [], "usage": None},
    ],
)
def test_an_event_that_says_more_is_passed_on(kept: dict[str, object]) -> None:
    assert fed(event(kept), drops_usage=True)[1] == event(kept)


@pytest.mark.parametrize(
    "more",
    [
        {"timings": {"prompt_n": 7, "predicted_per_second": 21.5}},
        {"x_groq": {"id": "req_1"}},
        {"kv_transfer_params": {}},
        {"usage": {"prompt_tokens": "7"}, "timings": 0},
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_event_of_tokens_that_carries_more_is_relayed(more: dict[str, object], end: str) -> None:
    """llama.cpp puts `timings` into it: the client gets them, and the gateway stops asking this server for token counts."""
    usage = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}, **more}, end=end)
    stream, passed = fed(WORD, usage + DONE_EVENT, drops_usage=True)
    assert (passed, stream.carries_more, stream.complete()) == (WORD + usage + DONE_EVENT, True, True)
    assert not fed(WORD, usage)[0].carries_more


def test_members_that_are_null_carry_nothing() -> None:
    """Servers such as vLLM write some of its fields into every chunk."""
    known = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "system_fingerprint": None, "service_tier": "x"}
    usage = event({**known, "choices": [], "usage": {"prompt_tokens": 7, "cost": 0.1}, "prompt_logprobs": None, "error": None})
    stream, passed = fed(WORD, usage, drops_usage=True)
    assert (passed, stream.carries_more, stream.reported_tokens[0]) == (WORD, False, 7)
    unread = b'data: {"choices":[],"usage":{"prompt_tokens":7},"note":"\\ud83d"}\n\n'
    assert fed(WORD, unread, drops_usage=True)[0].carries_more
    padded = b'data: {"choices":[],"usage":{"prompt_tokens":7}' + b" " * 70_000 + b"}\n\n"
    assert fed(WORD, padded, drops_usage=True)[0].carries_more, "nobody looks through that"


@pytest.mark.parametrize(
    ("timings", "expected"),
    [
        ({"prompt_n": 7, "prompt_ms": 1.5, "predicted_n": 2, "predicted_ms": 9.5}, (7, 2)),
        ({"cache_n": 30, "prompt_n": 7, "predicted_n": 2}, (37, 2)),
        ({"cache_n": 9_999_999, "prompt_n": 9_999_999, "predicted_n": 9_999_999}, (10_000_000, 9_999_999)),
        ({"prompt_n": 2**53, "predicted_n": 2}, (10_000_000, 2)),
        ({"prompt_n": -1, "predicted_n": 2.5}, (0, 2)),
        ({"prompt_n": "7"}, (0, 0)),
        ({}, (0, 0)),
        ([], (0, 0)),
        (None, (0, 0)),
    ],
)
def test_tokens_are_read_from_what_llama_cpp_reports_of_its_own_accord(timings: object, expected: tuple[int, int]) -> None:
    """Its last chunk has `timings` if nobody asked for the token counts; those of `usage` are believed first."""
    stream, _ = fed(chunk(), chunk(finish="stop", timings=timings))
    assert stream.reported_tokens == expected
    stream, _ = fed(chunk(), chunk(timings=timings), chunk(finish="stop"))
    assert stream.reported_tokens == (0, 0)
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    for events in ([chunk(finish="stop", timings=timings, usage=usage)], [chunk(finish="stop", timings=timings), event({"usage": usage})]):
        stream, _ = fed(chunk(), *events)
        assert stream.reported_tokens == (3, 4)


def test_an_error_is_never_taken_out() -> None:
    """Whatever else it says."""
    error = event({"choices": [], "usage": {"prompt_tokens": 7}, "error": {"message": "gone"}})
    stream, passed = fed(WORD + error + WORD, drops_usage=True)
    assert (passed, stream.failed) == (WORD + error, True)
    broken, passed = fed(WORD + USAGE + b"data: nonsense\n\n", drops_usage=True)
    assert (passed, broken.broken is not None) == (WORD, True)


@given(st.binary() | st.sampled_from([b"[]", b"null", b"3", b'{"prompt_tokens": -1}', b'{"prompt_tokens": 1e300, "output_tokens": 3}']))
def test_tokens_are_numbers_or_nothing(usage: bytes) -> None:
    """More than `MAX_REPORTED_TOKENS` counts as that many, so that no answer can overflow a sum."""
    assert all(0 <= tokens <= MAX_REPORTED_TOKENS for tokens in tokens_of(Raw(usage)))


# Stored responses


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([{"response": {"id": "resp_1"}}, {"response": {"id": "resp_2"}}], ["resp_1"]),
        ([{"x": 1}, {"response": {"id": None}}, {"response": {}}, {"response": {"id": "resp_2"}}], ["resp_2"]),
        ([{"response": {"id": "resp_1", "usage": "odd"}}], ["resp_1"]),
        ([{"response": {"id": 7, "usage": None}}], [7]),
        ([{"response": "odd", "message": 7}], []),
        ([{"message": {"id": "msg_1"}}], []),
    ],
)
def test_a_stream_tells_the_id_of_its_response_once(events: list[dict[str, Any]], expected: list[object]) -> None:
    """At the first event that has one, whatever else is in it."""
    told: list[object] = []
    stream = EventStream(Dialect.RESPONSES, on_response=told.append)
    for event in events:
        stream.feed(b"event: x\ndata: %b\n\n" % json.dumps(event).encode())
    assert told == expected
    assert (stream.on_response is None) == bool(expected)
