"""One request's journey, rule by rule, and then in any order."""

from __future__ import annotations

import gc
import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.failover import Failure, FailureClass, RetryPolicy
from multiverse_gateway.core.health import HealthState, NextProbe, Rest, fresh
from multiverse_gateway.core.routing import Candidates, build_table, pools_of, with_health
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.sse import DONE_EVENT, EVENTS_PER_CALL
from multiverse_gateway.core.stored import lookup_of, response_not_found
from multiverse_gateway.core.usage import NOBODY, OPERATOR
from multiverse_gateway.relay.attempt import Attempt
from multiverse_gateway.relay.body_readers import EMBEDDINGS, MAX_ERROR_BYTES
from multiverse_gateway.relay.event_reader import NOISE_BYTES, NOISE_SECONDS
from multiverse_gateway.relay.exchange import DRAINING_SECONDS, Exchange
from multiverse_gateway.relay.exchange_errors import key_ended, no_slot, no_usable_server
from multiverse_gateway.relay.ports import UNCOUNTED_BYTES, Limits, Phase
from multiverse_gateway.relay.requests import Requests
from multiverse_gateway.relay.server_search import ServerSearch
from multiverse_gateway.relay.waiting import LOOK_SECONDS
from multiverse_gateway.testing.store import make_key
from support.answers import chat_event, error_body, messages_events, model_not_found, responses_events
from support.exchanges import (
    EVENTS,
    JSON,
    MODEL,
    SPEECH,
    ChargedRequest,
    RecordingCharge,
    RecordingClient,
    RecordingEngine,
    RecordingSending,
    envelope,
    server,
)

ONE = chat_event("one", MODEL, {"content": "Hello"})
TWO = chat_event("one", MODEL, {"content": " you"})
LAST = chat_event("one", MODEL, {}, finish="stop")
PING = b": ping\n\n"
ERROR = b'data: {"error":{"message":"out of memory"}}\n\n'
A, B, C, D, E, F, G, H, TRANSIENT, _, K, L = FailureClass


def engine(*names: str, **fields: Any) -> RecordingEngine:
    return RecordingEngine([server(name, registered_at=number) for number, name in enumerate(names)], **fields)


def code(client: RecordingClient) -> str:
    code = json.loads(client.data)["error"]["code"]
    assert isinstance(code, str)
    return code


def trailing_error(client: RecordingClient, relayed: bytes) -> dict[str, Any]:
    """Return the error object of the event after what was relayed; there is nothing else."""
    assert client.data.startswith(relayed)
    event = client.data[len(relayed) :]
    assert event.startswith(b"data: ")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    error = json.loads(event[6:])["error"]
    assert isinstance(error, dict)
    return error


# Good answers


def test_a_plain_answer_is_relayed_whole() -> None:
    """Nothing reaches the client before the body is known to be JSON; then head, body and end come at once."""
    stage = engine("a")
    exchange, client = stage.start()
    stage.last.head()
    stage.last.body(b'{"an', b'swer":1}')
    assert client.is_silent
    stage.clock += 2
    stage.last.end()
    assert (client.status, client.data, client.ended) == (200, b'{"answer":1}', True)
    assert client.headers == {
        b"content-type": b"application/json",
        b"x-multiverse-attempts": b"1",
        b"x-gateway-server-id": b"a",
        b"x-multiverse-server": b"a",
    }
    assert stage.praised() == ["a"]
    assert exchange.attempt is not None
    assert (exchange.attempt.first_byte_seconds, stage.load.latency(stage.servers[0].id)) == (2, 2)
    assert (exchange.response.status, exchange.response.error_code, exchange.events, exchange.usage) == (200, None, 0, (0, 0))
    stage.check()


def test_a_running_attempt_shows_whether_its_server_lives() -> None:
    """The head counts as a byte; another attempt starts over."""
    stage = engine("a", "b")
    exchange, _ = stage.begin()
    assert exchange.attempt is None
    exchange.start()
    first = stage.last.attempt
    assert (first.is_running, first.began, first.received) == (True, stage.clock, 0)
    stage.last.head(500)
    assert first.received == 1
    stage.last.body(b"oh")
    assert first.received == 3
    stage.last.end()
    stage.wait(1)
    second = stage.last.attempt
    assert (stage.tried(), first.is_running, second.began, second.received) == (["a", "b"], False, stage.clock, 0)
    assert exchange.running is second
    stage.last.answer()
    assert (second.is_running, [each for each in stage.exchanges if each.running is not None]) == (False, [])


def test_an_answer_without_content_type_is_called_json() -> None:
    """A head may leave it out or empty; the body was checked."""
    for headers in ({}, {b"content-type": b""}):
        stage = engine("a")
        _, client = stage.start()
        stage.last.answer(200, headers)
        assert client.headers[b"content-type"] == b"application/json"


@pytest.mark.parametrize(
    ("headers", "relayed"),
    [
        ({}, b"application/octet-stream"),
        ({b"content-type": b""}, b"application/octet-stream"),
        ({b"content-type": b"audio/wav"}, b"audio/wav"),
        ({b"content-type": b"image/svg+xml"}, b"text/plain; charset=utf-8"),
        ({b"content-type": b"application/pdf"}, b"application/octet-stream"),
    ],
)
@pytest.mark.parametrize("status", [200, 400])
def test_a_raw_answer_has_a_type_that_is_harmless_in_a_browser(status: int, headers: dict[bytes, bytes], relayed: bytes) -> None:
    """Whatever the status; an answer without a type is not taken for JSON where it may be a sound."""
    stage = engine("a")
    _, client = stage.start(path=SPEECH, stateful=True)
    stage.last.answer(status, headers, b"<svg/>")
    assert (client.status, client.data, client.headers[b"content-type"]) == (status, b"<svg/>", relayed)
    stage.check()


def test_a_stream_is_committed_by_its_first_data_event() -> None:
    """Comments before it are dropped, and those after it are relayed (S14)."""
    stage = engine("a")
    exchange, client = stage.start(stream=True)
    stage.last.stream(PING, ONE[:9])
    assert client.is_silent
    stage.last.body(ONE[9:])
    assert (client.status, client.data) == (200, ONE)
    assert client.headers[b"content-type"] == b"text/event-stream"
    assert (client.headers[b"cache-control"], client.headers[b"x-accel-buffering"]) == (b"no-store", b"no")
    stage.last.body(PING, LAST, DONE_EVENT)
    assert (client.data, client.ended) == (ONE + PING + LAST + DONE_EVENT, True)
    assert exchange.events == 3
    stage.check()


def test_the_name_of_the_event_stream_type_has_no_case() -> None:
    """`Text/Event-Stream; charset=UTF-8` is one."""
    stage = engine("a")
    _, client = stage.start(stream=True)
    stage.last.head(200, {b"content-type": b"Text/Event-Stream; charset=UTF-8"})
    stage.last.body(ONE)
    assert (client.status, client.data) == (200, ONE)


def test_usage_is_what_the_stream_told() -> None:
    stage = engine("a")
    exchange, _ = stage.start(stream=True)
    stage.last.stream(b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}\n\n')
    assert exchange.usage == (7, 5)


def test_half_an_event_is_never_relayed() -> None:
    """The error event of a broken stream stands on its own (S01)."""
    stage = engine("a")
    _, client = stage.start(stream=True)
    stage.last.stream(ONE, TWO[:-1])
    assert client.data == ONE
    stage.last.fail(B)
    assert trailing_error(client, ONE)["code"] == "upstream_stream_interrupted"
    assert client.was_cut
    assert stage.blamed() == [("a", B)]
    assert len(stage.sendings) == 1
    stage.check()


def test_done_is_added_when_every_choice_has_finished() -> None:
    """A clean end with a finish_reason but without [DONE] is whole (S04)."""
    stage = engine("a")
    _, client = stage.start(stream=True)
    stage.last.stream(ONE, LAST)
    stage.last.end()
    assert (client.data, client.ended) == (ONE + LAST + DONE_EVENT, True)
    assert stage.praised() == ["a"]
    stage.check()


def test_a_clean_end_in_the_middle_is_an_interruption() -> None:
    """No finish_reason is invented (S12)."""
    stage = engine("a", "b")
    _, client = stage.start(stream=True)
    stage.last.stream(ONE)
    stage.last.end()
    assert trailing_error(client, ONE) == {
        "message": "The server stopped in the middle of its answer. The part that arrived is incomplete; send the request again.",
        "type": "server_error",
        "param": None,
        "code": "upstream_stream_interrupted",
    }
    assert client.was_cut
    assert (stage.tried(), stage.blamed()) == (["a"], [("a", B)])
    stage.check()


@pytest.mark.parametrize(
    ("path", "events"),
    [("/v1/responses", responses_events("one", MODEL)), ("/v1/messages", messages_events("one", MODEL))],
)
def test_named_streams_end_with_their_own_last_event(path: str, events: list[bytes]) -> None:
    """No [DONE] is added; without their last event they are interrupted, in their own words."""
    stage = engine("a")
    _, client = stage.start(stream=True, path=path, stateful=True)
    stage.last.stream(*events)
    assert (client.data, client.ended) == (b"".join(events), True)
    _, client = stage.start(stream=True, path=path, stateful=True)
    stage.last.stream(*events[:-1])
    stage.last.end()
    assert client.data.startswith(b"".join(events[:-1]) + b"event: error\n")
    assert client.was_cut


def test_what_follows_done_is_dropped() -> None:
    """The response ends at once; the connection may take a second to end, too, and is then closed."""
    stage = engine("a")
    exchange, client = stage.start(stream=True)
    stage.last.stream(ONE + DONE_EVENT + TWO)
    assert (client.data, client.ended, exchange.phase) == (ONE + DONE_EVENT, True, Phase.DRAINING)
    stage.check()
    stage.last.body(TWO, b"\n\n")
    stage.last.end()
    assert (client.data, exchange.phase) == (ONE + DONE_EVENT, Phase.OVER)
    stage.check()


@pytest.mark.parametrize("ending", ["end", "failure", "time", "client", "shutdown"])
def test_draining_ends(ending: str) -> None:
    """However the rest of a connection goes, nobody is told any more and nobody is blamed."""
    stage = engine("a")
    exchange, client = stage.start(stream=True)
    stage.last.stream(ONE, DONE_EVENT)
    before = client.data
    if ending == "end":
        stage.last.end()
    elif ending == "failure":
        stage.last.fail(B)
    else:
        if ending == "client":
            exchange.client_gone()
        elif ending == "shutdown":
            exchange.interrupt()
        assert exchange.phase is Phase.DRAINING
        stage.wait(DRAINING_SECONDS)
        assert stage.last.aborted
    assert (exchange.phase, exchange.response.status, exchange.response.error_code) == (Phase.OVER, 200, None)
    assert (client.data, stage.blamed(), stage.praised()) == (before, [], ["a"])
    stage.check()


def test_draining_is_short_for_a_clogged_client_too() -> None:
    """The end of a stream is read at once, and what the client has yet to read prolongs nothing."""
    stage = engine("a")
    exchange, client = stage.start(stream=True)
    stage.last.stream(ONE)
    exchange.client_clogged()
    was_paused = stage.last.paused
    stage.last.body(DONE_EVENT)
    assert (was_paused, stage.last.paused) == (True, False)
    exchange.client_drained()
    stage.wait(DRAINING_SECONDS)
    assert (exchange.phase, client.ended) == (Phase.OVER, True)
    stage.check()


def test_raw_answers_are_committed_by_their_first_byte() -> None:
    """Audio and the like go through as they come, of any type."""
    stage = engine("a")
    exchange, client = stage.start(path=SPEECH, stateful=True)
    stage.last.head(200, {b"content-type": b"audio/mpeg"})
    assert client.is_silent
    stage.last.body(b"ID3")
    assert (client.status, client.data, client.headers[b"content-type"]) == (200, b"ID3", b"audio/mpeg")
    assert b"cache-control" not in client.headers
    stage.last.body(b"...")
    stage.last.end()
    assert (client.data, client.ended, exchange.phase) == (b"ID3...", True, Phase.OVER)
    stage.check()


def test_an_empty_raw_answer_is_one() -> None:
    stage = engine("a")
    _, client = stage.start(path=SPEECH, stateful=True)
    stage.last.answer(200, {b"content-type": b"audio/mpeg"}, b"")
    assert (client.status, client.data, client.ended) == (200, b"", True)
    stage.check()


def test_a_raw_answer_that_breaks_is_cut_without_words() -> None:
    """An error event would be noise in a sound."""
    stage = engine("a", "b")
    _, client = stage.start(path=SPEECH, stateful=True)
    stage.last.head(200, {b"content-type": b"audio/mpeg"})
    stage.last.body(b"ID3")
    stage.last.fail(B)
    assert (client.data, client.was_cut, stage.tried()) == (b"ID3", True, ["a"])
    stage.check()


def test_events_on_other_paths_are_relayed_as_events() -> None:
    """They have no end of their own: a clean end is whole."""
    stage = engine("a")
    _, client = stage.start(stream=True, path=SPEECH, stateful=True)
    stage.last.stream(b"data: one\n\n")
    stage.last.end()
    assert (client.data, client.ended) == (b"data: one\n\n", True)


# Failures before the commit point


def answered(status: int, body: bytes = b"{}", **headers: bytes) -> Callable[[RecordingSending], None]:
    fields = JSON | {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return lambda sending: sending.answer(status, fields, body)


def broken(kind: FailureClass) -> Callable[[RecordingSending], None]:
    return lambda sending: sending.fail(kind)


FAILURES: list[tuple[FailureClass, Callable[[RecordingSending], None], int, str | None]] = [
    (A, broken(A), 504, "upstream_timeout"),
    (B, broken(B), 504, "upstream_timeout"),
    (B, answered(404, b"ERR_NGROK_3200", content_type=b"text/html"), 504, "upstream_timeout"),
    (B, answered(200, ngrok_error_code=b"ERR_NGROK_3200"), 504, "upstream_timeout"),
    (C, broken(C), 504, "upstream_timeout"),
    (D, answered(500), 504, "upstream_timeout"),
    (D, answered(502), 504, "upstream_timeout"),
    (E, answered(503, retry_after=b"3"), 503, "no_healthy_server"),
    (E, answered(429, retry_after=b"3"), 429, "upstream_busy"),
    (E, answered(529, retry_after=b"3"), 529, "upstream_overloaded"),
    (F, answered(404, model_not_found("openai", MODEL)), 404, "model_not_found"),
    (G, answered(404, b'{"detail":"Not Found"}'), 404, None),
    (G, answered(501, b'{"detail":"no"}'), 501, None),
    (H, answered(401), 502, "upstream_auth_failed"),
    (TRANSIENT, answered(408), 504, "upstream_timeout"),
    (K, answered(302, location=b"http://inside"), 502, "upstream_bad_response"),
    (K, answered(200, b"{", content_type=b"application/json"), 502, "upstream_bad_response"),
    (K, answered(200, b"<p>", content_type=b"text/html"), 502, "upstream_bad_response"),
    (K, answered(200, b"{}", content_encoding=b"gzip"), 502, "upstream_bad_response"),
]


@pytest.mark.parametrize(("kind", "fail", "status", "reason"), FAILURES, ids=lambda value: getattr(value, "value", None))
def test_another_server_answers_instead(
    kind: FailureClass, fail: Callable[[RecordingSending], None], status: int, reason: str | None
) -> None:
    """Each class but J and L is retried elsewhere; the client sees the other server's answer (F01, F04, F06, F10, F13-F19)."""
    stage = engine("a", "b")
    exchange, client = stage.start()
    fail(stage.last)
    stage.check()
    if kind is not E:
        assert exchange.phase is Phase.BACKOFF
        stage.wait(0.1)
    stage.last.answer()
    assert (client.status, client.headers[b"x-multiverse-attempts"], client.headers[b"x-gateway-server-id"]) == (200, b"2", b"b")
    assert (stage.tried(), stage.blamed(), stage.praised()) == (["a", "b"], [("a", kind)], ["b"])
    stage.check()


@pytest.mark.parametrize(("kind", "fail", "status", "reason"), FAILURES, ids=lambda value: getattr(value, "value", None))
def test_the_last_failure_decides_what_the_client_sees(
    kind: FailureClass, fail: Callable[[RecordingSending], None], status: int, reason: str | None
) -> None:
    """Three attempts on three servers, never a fourth; 502 and 504 tell clients not to repeat (F07)."""
    stage = engine("a", "b", "c", "d")
    _, client = stage.start()
    tried = ["a", "b"] if kind is H else ["a", "b", "c"]  # two servers that refuse are no accident
    for _ in tried:
        fail(stage.last)
        stage.wait(0.1)
    assert (stage.tried(), client.status, client.ended) == (tried, status, True)
    assert client.headers[b"x-multiverse-attempts"] == b"%d" % len(tried)
    assert client.headers.get(b"x-should-retry") == (b"false" if status in (502, 504) or kind is FailureClass.NO_MODEL else None)
    if reason is not None:
        assert code(client) == reason
    if kind is E:
        assert client.headers[b"retry-after"] == b"3"
    stage.check()


@pytest.mark.parametrize("status", [400, 402, 409, 413, 415, 422, 451])
def test_the_clients_own_mistakes_are_relayed_unchanged(status: int) -> None:
    """Never retried, no server blamed; status and body are the server's, and its content type as far as it is harmless (F08)."""
    stage = engine("a", "b")
    exchange, client = stage.start()
    body = error_body("too long", code="context_length_exceeded")
    stage.last.answer(status, {b"content-type": b"application/problem+json", b"set-cookie": b"a=b", b"retry-after": b"2"}, body)
    assert (client.status, client.data, client.ended) == (status, body, True)
    assert (client.headers[b"content-type"], client.headers[b"retry-after"]) == (b"application/json", b"2")
    assert b"set-cookie" not in client.headers
    assert stage.tried() == ["a"]
    assert stage.health("a").state is HealthState.HEALTHY
    assert stage.load.latency(stage.servers[0].id) is None
    assert (exchange.response.status, exchange.response.error_code) == (status, "relayed")
    stage.check()


def test_a_mistakes_empty_body_is_relayed_too() -> None:
    stage = engine("a")
    _, client = stage.start()
    stage.last.answer(400, JSON, b"")
    assert (client.status, client.data, client.ended) == (400, b"", True)


def test_a_large_explanation_of_a_mistake_is_relayed_whole() -> None:
    """A 422 may quote the prompt; half of it would be no JSON."""
    stage = engine("a", "b")
    _, client = stage.start()
    body = error_body("x" * 3 * MAX_ERROR_BYTES)
    stage.last.head(422)
    stage.last.body(body[:MAX_ERROR_BYTES], body[MAX_ERROR_BYTES:])
    stage.last.end()
    assert (client.status, client.data, stage.tried()) == (422, body, ["a"])


def test_an_endless_explanation_is_an_answer_over_the_limit() -> None:
    stage = engine("a", "b", limits=Limits(max_response_bytes=100))
    _, client = stage.start()
    stage.last.head(400)
    stage.last.body(b"x" * 60, b"x" * 60)
    assert (code(client), stage.tried(), stage.blamed()) == ("answer_too_large", ["a"], [])
    stage.check()


def test_the_rest_of_a_large_server_error_is_not_waited_for() -> None:
    """Its first 64 KiB say enough."""
    stage = engine("a", "b")
    stage.start()
    stage.last.head(500)
    stage.last.body(b"x" * MAX_ERROR_BYTES)
    assert not stage.last.aborted
    stage.last.body(b"x")
    assert (stage.blamed(), stage.sendings[0].aborted) == ([("a", D)], True)
    stage.check()


def test_an_answer_over_the_limit_is_refused_and_blames_nobody() -> None:
    """Another server's answer would be as large; the client learns the figure, the setting and what helps (L10)."""
    stage = engine("a", "b", limits=Limits(max_response_bytes=10))
    _, client = stage.start()
    stage.last.head()
    stage.last.body(b"[1,2,3,4,5,6,7]")
    assert (client.status, stage.tried(), stage.blamed(), stage.last.aborted) == (502, ["a"], [], True)
    error = json.loads(client.data)["error"]
    assert error["code"] == "answer_too_large"
    assert all(word in error["message"] for word in ("10 bytes", "MULTIVERSE_MAX_RESPONSE_BYTES", "max_tokens"))
    assert client.headers[b"x-should-retry"] == b"false"
    stage.check()


@pytest.mark.parametrize("pieces", [(b"{}",), (b'{"choices":', b"[]}"), (b"{" + b" " * MAX_ERROR_BYTES,)])
def test_a_json_answer_to_a_stream_is_nonsense(pieces: tuple[bytes, ...]) -> None:
    """The SDK would read it as an empty answer (F21). No more of it is read than an error has."""
    stage = engine("a")
    _, client = stage.start(stream=True)
    stage.last.head(200, JSON)
    stage.last.body(*pieces)
    if not stage.last.aborted:
        assert client.is_silent
        stage.last.end()
    assert (client.status, code(client), stage.blamed()) == (502, "upstream_bad_response", [("a", K)])
    stage.check()


REPORTS: list[tuple[bytes, FailureClass]] = [
    (b'{"error":{"message":"out of memory"}}', D),
    (b'{"error":"Unexpected endpoint"}', G),
    (b'{"error":{"message":"model not found","code":404}}', F),
    (b'{"error":{"message":"slow down","code":"429"}}', E),
    (b'{"error":{"message":"bad key","code":401}}', H),
]


@pytest.mark.parametrize("how", ["plain", "streamed", "first event"])
@pytest.mark.parametrize(("report", "kind"), REPORTS)
def test_an_error_with_status_200_moves_the_request(report: bytes, kind: FailureClass, how: str) -> None:
    """It is a failure, not an answer: of its own class, and another server answers."""
    stage = engine("a", "b")
    stream = how != "plain"
    _, client = stage.start(stream=stream)
    if how == "first event":
        stage.last.stream(b"data: " + report + b"\n\n")
    else:
        stage.last.answer(200, JSON, report)
    assert (client.status, stage.blamed()) == (None, [("a", kind)])
    stage.wait(0.1)
    if stream:
        stage.last.stream(ONE, LAST, DONE_EVENT)
    else:
        stage.last.answer(200, JSON, b"{}")
    assert (client.status, stage.tried(), stage.praised()) == (200, ["a", "b"], ["b"])
    stage.check()


@pytest.mark.parametrize("how", ["plain", "streamed", "first event"])
def test_a_clients_error_with_status_200_is_sent_with_its_own_status(how: str) -> None:
    """The client's libraries raise the exception of that status; nobody is blamed and no other server is asked."""
    stage = engine("a", "b")
    report = b'{"object":"error","message":"context too long","code":400}'
    _, client = stage.start(stream=how != "plain")
    if how == "first event":
        stage.last.stream(b"data: " + report + b"\n\n")
    else:
        stage.last.answer(200, JSON, report)
    assert (client.status, client.data, client.headers[b"content-type"]) == (400, report, b"application/json")
    assert stage.tried() == ["a"]
    stage.check()


@pytest.mark.parametrize(("pieces", "kind"), [((PING, ERROR), D), ((b"data: half", b" of it\n\n"), K), ((PING,), B)])
def test_a_stream_that_begins_badly_is_retried(pieces: tuple[bytes, ...], kind: FailureClass) -> None:
    """An error as the first event counts as 500, a broken one as nonsense, none at all as a broken answer (S08)."""
    stage = engine("a", "b")
    _, client = stage.start(stream=True)
    stage.last.stream(*pieces)
    stage.last.end()
    assert (client.status, stage.blamed()) == (None, [("a", kind)])
    stage.wait(0.1)
    stage.last.stream(ONE, LAST, DONE_EVENT)
    assert client.data == ONE + LAST + DONE_EVENT
    stage.check()


def test_good_events_before_a_bad_one_are_relayed() -> None:
    """One chunk may hold both: the commit comes first, then the break."""
    stage = engine("a", "b")
    _, client = stage.start(stream=True)
    stage.last.stream(ONE + b"data: oops\n\n" + TWO)
    assert trailing_error(client, ONE)["code"] == "upstream_stream_interrupted"
    assert (client.was_cut, stage.tried(), stage.blamed(), stage.last.aborted) == (True, ["a"], [("a", K)], True)
    stage.check()


def test_an_error_event_in_the_middle_ends_the_stream() -> None:
    """It is relayed once and ends the response; the server is struck, not praised (S08)."""
    stage = engine("a", "b")
    exchange, client = stage.start(stream=True)
    stage.last.stream(ONE, ERROR, TWO)
    assert (client.data, client.ended) == (ONE + ERROR, True)
    assert (stage.tried(), stage.blamed(), stage.praised()) == (["a"], [("a", D)], [])
    assert exchange.response.error_code == "upstream_error"
    stage.check()


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"type":"error","message":"CUDA out of memory"}\n\n',
        b'data: {"object":"error","message":"CUDA out of memory","code":500}\n\n',
        b'event: error\ndata: {"message":"CUDA out of memory"}\n\n',
        b"event: error\ndata: CUDA out of memory\n\n",
        b"event: error\n\n",
    ],
)
def test_an_error_that_libraries_cannot_read_is_replaced_by_our_own(error: bytes) -> None:
    """The client learns that the answer is incomplete, and the server is struck (S08)."""
    for finish in (False, True):
        stage = engine("a", "b")
        _, client = stage.start(stream=True)
        relayed = ONE + LAST if finish else ONE
        stage.last.stream(relayed + error + TWO + DONE_EVENT)
        assert trailing_error(client, relayed)["code"] == "upstream_stream_interrupted"
        assert "reported an error" in trailing_error(client, relayed)["message"]
        assert (client.was_cut, stage.last.aborted, stage.tried(), stage.blamed()) == (True, True, ["a"], [("a", D)])
        stage.check()


def test_a_broken_responses_stream_goes_on_counting() -> None:
    """Its error event has the next sequence number, and the form of both APIs."""
    stage = engine("a", "b")
    _, client = stage.start(stream=True, path="/v1/responses")
    relayed = b'event: response.created\ndata: {"type":"response.created","sequence_number":4}\n\n'
    stage.last.stream(relayed, b'event: response.output_text.delta\ndata: {"sequence_number":5}')
    stage.last.fail(B)
    name, data = client.data.removeprefix(relayed).removesuffix(b"\n\n").split(b"\n")
    error = json.loads(data.removeprefix(b"data: "))
    assert (name, error["type"], error["sequence_number"], error["code"]) == (b"event: error", "error", 5, "upstream_stream_interrupted")
    assert error["error"] == {"type": "server_error", "code": error["code"], "message": error["message"], "param": None}
    stage.check()


def test_comments_before_the_first_event_are_not_kept() -> None:
    """A server that only pings fills no memory."""
    stage = engine("a")
    _, client = stage.start(stream=True)
    stage.last.stream(*[b":" + b"x" * 1000 + b"\n\n"] * 100, PING, ONE)
    assert client.data == ONE


@pytest.mark.parametrize("flood", [b"x\n\n", b": ping\n\n", b"\n", b"data:\n\n"])
def test_a_stream_without_any_event_is_given_up_at_the_limit_of_streams(flood: bytes) -> None:
    """Whatever its server sends instead of events, in one piece or in many; no more of it is held."""
    stage = engine("a", "b", limits=Limits(max_stream_bytes=10_000))
    _, client = stage.start(stream=True)
    stage.last.head(200, EVENTS)
    for _ in range(11):
        stage.last.body(flood * (1000 // len(flood)))
    stage.last.body(b"x" * 1000)
    assert (stage.sendings[0].aborted, stage.blamed()) == (True, [("a", K)])
    stage.wait(0.1)
    stage.last.head(200, EVENTS)
    stage.last.body(flood * (20_000 // len(flood)))
    assert (client.status, code(client), stage.blamed()) == (502, "upstream_bad_response", [("a", K), ("b", K)])
    stage.check()


def test_an_attempt_after_another_starts_afresh() -> None:
    """Nothing of the first attempt's answer remains."""
    stage = engine("a", "b")
    _, client = stage.start(stream=True)
    stage.last.stream(PING * 3)
    stage.last.fail(B)
    stage.wait(0.1)
    stage.last.answer(400, JSON, b"{}")
    assert (client.status, client.data) == (400, b"{}")


# Retries


def test_a_timeout_is_retried_while_enough_time_remains() -> None:
    """While another server could take over, a server gets half of what is left; its attempt is closed before the next begins (F03)."""
    stage = engine("a", "b", limits=Limits(request_timeout=20, first_byte_timeout=14))
    _, client = stage.start()
    stage.wait(9.9)
    assert stage.blamed() == []
    stage.wait(0.1)
    assert stage.checks.asked
    stage.wait(0)
    assert (stage.sendings[0].aborted, stage.blamed()) == (True, [("a", C)])
    stage.wait(0.1)
    assert stage.tried() == ["a", "b"]
    stage.wait(9.9)
    assert (client.status, code(client)) == (504, "upstream_timeout")
    assert stage.blamed() == [("a", C)]
    stage.check()


def test_a_timeout_late_in_the_day_is_final() -> None:
    stage = engine("a", "b", limits=Limits(request_timeout=9, first_byte_timeout=4))
    _, client = stage.start()
    stage.wait(4)
    stage.wait(0.5)
    assert (client.status, stage.tried()) == (504, ["a"])
    assert "no first byte within 4 s (FIRST_BYTE_TIMEOUT_SECONDS)" in json.loads(client.data)["error"]["message"]
    stage.check()


def test_no_pause_outlasts_the_deadline() -> None:
    stage = engine("a", "b", limits=Limits(request_timeout=20, first_byte_timeout=20))
    _, client = stage.start()
    stage.wait(19.97)
    stage.last.fail(B)
    assert (client.status, stage.tried()) == (504, ["a"])


def test_the_deadline_ends_a_pause() -> None:
    """A sweep that comes late finds no time left."""
    stage = engine("a", "b", limits=Limits(request_timeout=20, first_byte_timeout=20))
    _, client = stage.start()
    stage.wait(19)
    stage.last.fail(B)
    stage.wait(1)
    assert (client.status, stage.tried()) == (504, ["a"])
    stage.check()


def test_the_only_server_is_asked_twice_if_it_refuses() -> None:
    """After 250 ms, once, and for a refused connection only."""
    stage = engine("a")
    exchange, client = stage.start()
    stage.last.fail(A)
    assert exchange.due == stage.clock + 0.25
    stage.wait(0.25)
    assert stage.tried() == ["a", "a"]
    stage.last.fail(A)
    assert (client.status, client.headers[b"x-multiverse-attempts"]) == (504, b"2")
    stage.check()
    stage = engine("a")
    _, client = stage.start()
    stage.last.fail(B)
    assert (client.status, stage.tried()) == (504, ["a"])


def test_another_server_that_appeared_meanwhile_is_preferred() -> None:
    stage = engine("a", "b")
    stage.set_health("b", rest=Rest(until=stage.clock + 0.1))
    _, client = stage.start()
    stage.last.fail(A)
    stage.wait(0.25)
    assert stage.tried() == ["a", "b"]
    stage.last.answer()
    assert client.status == 200


def test_a_second_try_on_the_same_server_respects_its_cap() -> None:
    """Others may have taken its slots during the pause: then it waits for one, before those that came later (L08)."""
    stage = RecordingEngine([server("a", cap=1)])
    exchange, client = stage.start()
    stage.last.fail(A)
    stage.set_health("a", state=HealthState.HEALTHY)
    stage.start()
    later, _ = stage.start()
    stage.wait(0.25)
    assert (exchange.phase, stage.tried()) == (Phase.QUEUED, ["a", "a"])
    stage.last.answer()
    assert (stage.last.exchange, later.phase) == (exchange, Phase.QUEUED)
    stage.last.answer()
    assert (client.status, client.headers[b"x-multiverse-attempts"]) == (200, b"2")
    stage.check()


def test_a_second_try_on_a_server_that_is_half_open_waits_for_the_request_that_tests_it() -> None:
    """Whatever its cap is, such a server takes one request at a time."""
    stage = RecordingEngine([server("a", cap=4)])
    exchange, _ = stage.start()
    stage.last.fail(A)
    stage.set_health("a", state=HealthState.HALF_OPEN)
    stage.start()
    stage.wait(0.25)
    assert (exchange.phase, stage.tried()) == (Phase.QUEUED, ["a", "a"])
    stage.last.answer()
    assert stage.last.exchange is exchange
    stage.check()


def test_a_request_is_tried_twice_on_a_server_and_never_again() -> None:
    """Also if it waited for the second attempt there, and another server came meanwhile."""
    stage = RecordingEngine([server("a", cap=1), server("b", registered_at=1)])
    stage.set_health("b", rest=Rest(until=stage.clock + 1))
    exchange, client = stage.start()
    stage.last.fail(A)
    stage.set_health("a", state=HealthState.HEALTHY)
    stage.start()
    stage.wait(0.25)
    assert exchange.phase is Phase.QUEUED
    stage.wait(1)
    assert stage.last.server.id == "b"
    stage.sendings[1].answer()
    stage.last.fail(B)
    stage.wait(0.1)
    assert (client.status, stage.tried()) == (504, ["a", "a", "b"])
    stage.check()


def test_a_removed_server_is_not_tried_again() -> None:
    """Its owner's DELETE is final: what waits for its second try learns that the model is gone, by its first failure."""
    stage = engine("a")
    _, client = stage.start()
    stage.last.fail(A)
    stage.remove("a")
    stage.wait(0.25)
    assert (client.status, stage.tried()) == (504, ["a"])
    stage.check()


def test_a_removed_server_is_not_tried_again_though_its_model_stays() -> None:
    """A sibling that rests keeps the model alive, not the removed server."""
    stage = engine("a", "b")
    stage.set_health("b", rest=Rest(until=stage.clock + 60))
    _, client = stage.start()
    stage.last.fail(A)
    stage.remove("a")
    stage.wait(0.25)
    assert (client.status, stage.tried()) == (504, ["a"])
    stage.check()


def test_a_changed_server_is_not_tried_as_it_was() -> None:
    """Its owner gave it another address or key meanwhile: the old ones are of no use any more."""
    stage = engine("a")
    _, client = stage.start()
    stage.last.fail(A)
    stage.change("a")
    stage.wait(0.25)
    assert (client.status, stage.tried()) == (504, ["a"])
    stage.check()


@pytest.mark.parametrize(("status", "code"), [(429, "upstream_busy"), (503, "no_healthy_server")])
def test_no_server_is_asked_while_all_rest_for_everybody(status: int, code: str) -> None:
    """F10, F13, S4: two clients were refused; the third gets the same answer at once, until the earliest return."""
    stage = engine("a", "b")
    for _ in range(2):
        stage.start()
        for retry_after in (b"7", b"3"):
            stage.last.answer(status, {b"content-type": b"application/json", b"retry-after": retry_after})
    _, client = stage.start()
    assert (client.status, json.loads(client.data)["error"]["code"], client.headers[b"retry-after"]) == (status, code, b"3")
    assert stage.tried() == ["a", "b", "a", "b"]
    stage.wait(3)
    stage.start()
    assert stage.tried() == ["a", "b", "a", "b", "b"]
    stage.check()


def test_a_model_that_vanishes_is_not_retried() -> None:
    stage = engine("a")
    _, client = stage.start()
    stage.remove("a")
    stage.last.fail(B)
    assert client.status == 504
    stage.check()


@pytest.mark.parametrize(("kind", "tried"), [(A, ["a", "b"]), (B, ["a"]), (C, ["a"])])
def test_stateful_requests_are_repeated_only_if_they_reached_nobody(kind: FailureClass, tried: list[str]) -> None:
    stage = engine("a", "b")
    stage.start(stateful=True)
    stage.last.fail(kind)
    stage.wait(0.1)
    assert stage.tried() == tried
    stage.check()


def test_local_failures_blame_nobody_and_end_the_request() -> None:
    stage = engine("a", "b")
    _, client = stage.start()
    stage.last.fail(L)
    assert (client.status, code(client), stage.tried()) == (503, "overloaded", ["a"])
    assert stage.load.latency(stage.servers[0].id) is None
    assert stage.health("a").state is HealthState.HEALTHY


def test_local_failures_in_a_stream_do_not_slow_a_server_down() -> None:
    stage = engine("a")
    _, client = stage.start(stream=True)
    stage.clock += 1
    stage.last.stream(ONE)
    stage.last.fail(L)
    assert client.was_cut
    assert stage.load.latency(stage.servers[0].id) == 1


def test_the_retry_budget_holds_for_retries_that_pause() -> None:
    """Of many requests that fail at once only as many are retried at a time as the budget allows; the others wait their turn."""
    stage = engine("a", "b")
    clients = [stage.start()[1] for _ in range(10)]
    for sending in list(stage.sendings):
        sending.answer(500)
    assert [client.status for client in clients] == [None] * 10
    assert stage.load.retries_in_flight(MODEL) == 3
    answered = 10
    for _ in range(4):
        stage.wait(0.25)
        assert stage.load.retries_in_flight(MODEL) <= 3
        for sending in stage.sendings[answered:]:
            sending.answer()
        answered = len(stage.sendings)
    assert [client.status for client in clients] == [200] * 10
    stage.check()


def test_a_retry_does_not_wait_for_the_budget_for_ever() -> None:
    """As long as for a slot, then it fails with what there is."""
    stage = engine("a", "b")
    clients = [stage.start()[1] for _ in range(5)]
    for sending in list(stage.sendings):
        sending.answer(500)
    assert [exchange.search.waits_for_budget for exchange in stage.exchanges] == [False] * 3 + [True] * 2
    stage.wait(0.25)
    stage.wait(10)
    assert [client.status for client in clients] == [None] * 3 + [504] * 2
    stage.check()


def test_what_ran_on_a_dead_server_moves_at_once() -> None:
    """F01: twenty requests lose their server; all of them are answered by the other."""
    stage = engine("a", "b")
    clients = [stage.start()[1] for _ in range(20)]
    for sending in list(stage.sendings):
        if sending.server.id == "a":
            sending.fail(B)
    stage.wait(0.1)
    for sending in stage.sendings:
        if sending.is_live:
            sending.answer()
    assert [client.status for client in clients] == [200] * 20
    stage.check()


@pytest.mark.parametrize("ending", ["client", "shutdown", "deadline"])
def test_a_retry_that_never_began_is_given_back(ending: str) -> None:
    stage = engine("a", "b")
    exchange, _ = stage.start()
    stage.last.fail(B)
    assert stage.load.retries_in_flight(MODEL) == 1
    end_by(ending, stage, exchange)
    assert stage.load.retries_in_flight(MODEL) == 0
    stage.check()


def test_no_retry_at_all_if_the_policy_says_so() -> None:
    stage = engine("a", "b", limits=Limits(retry_policy=RetryPolicy(max_retries=0)))
    _, client = stage.start()
    stage.last.fail(A)
    assert (client.status, stage.tried()) == (504, ["a"])


# Choosing


def test_an_unknown_model_is_told_with_close_names() -> None:
    stage = engine("a")
    exchange, client = stage.start(model="tyni")
    assert (client.status, code(client), exchange.phase) == (404, "model_not_found", Phase.OVER)
    assert b"Models: tiny." in client.data
    assert b"x-gateway-server-id" not in client.headers
    _, client = engine().start()
    assert b"register a server at /register" in client.data


def test_no_usable_server_is_told_with_the_time_of_the_next_probe() -> None:
    """H11: at once, with Retry-After between 1 and 60 s."""
    stage = engine("a")
    stage.set_health("a", state=HealthState.UNHEALTHY, next_probe=NextProbe(at=stage.clock + 7.2))
    _, client = stage.start()
    assert (client.status, code(client), client.headers[b"retry-after"]) == (503, "no_healthy_server", b"8")
    stage.set_health("a", state=HealthState.ARCHIVED, next_probe=NextProbe(at=float("inf")))
    _, client = stage.start()
    assert client.headers[b"retry-after"] == b"60"
    stage.check()


def suspects(*names: str) -> RecordingEngine:
    stage = engine(*names)
    for name in names:
        stage.set_health(name, state=HealthState.UNHEALTHY, by_traffic=True, next_probe=NextProbe(at=stage.clock + 5))
    return stage


def test_the_last_resort_takes_one_request_at_a_time() -> None:
    """H11: the next waits a moment for what becomes of it, and is refused before 100 ms are over."""
    stage = suspects("a")
    _, first = stage.start()
    _, second = stage.start()
    assert (first.status, second.status, stage.tried()) == (None, None, ["a"])
    stage.wait(0.05)
    assert (second.status, code(second), second.headers[b"retry-after"]) == (503, "no_healthy_server", b"5")
    stage.last.answer()
    assert first.status == 200
    stage.check()


def test_who_waits_for_the_last_resort_is_next() -> None:
    """H11: one after the other, as long as it works."""
    stage = suspects("a")
    clients = [stage.start()[1] for _ in range(3)]
    for _ in range(3):
        stage.check()
        stage.last.answer()
    assert [client.status for client in clients] == [200] * 3
    assert stage.tried() == ["a"] * 3


def test_who_waits_for_the_last_resort_stays_while_the_queue_moves() -> None:
    """H11: requests that fail or pass there one after the other keep those behind them waiting, ten seconds at most."""
    stage = suspects("a")
    clients = [stage.start()[1] for _ in range(30)]
    for _ in range(20):
        stage.wait(0.04)
        stage.last.fail(B)
    assert [client.status for client in clients[:20]] == [504] * 20
    assert all(client.is_silent for client in clients[20:])
    stage.wait(0.05)
    assert [client.status for client in clients[21:]] == [503] * 9
    stage.check()


def test_the_last_resort_is_tried_again_elsewhere() -> None:
    """H11, class B: a failure there is retried on the next of those that only requests found ill, not on one whose probe failed."""
    stage = suspects("a", "b", "c")
    stage.set_health("c", by_traffic=False)
    _, client = stage.start()
    stage.last.fail(B)
    stage.wait(0.1)
    assert stage.tried() == ["a", "b"]
    stage.last.fail(B)
    stage.wait(0.1)
    assert (client.status, stage.tried()) == (504, ["a", "b"])
    stage.check()


def test_waiting_for_a_slot_is_not_cut_short_by_a_wait_for_the_last_resort() -> None:
    """Section 7: whose server turns out to work, and to be full, has ten seconds since it joined the queue."""
    stage = suspects("a")
    stage.limits = Limits(queue_timeout=10)
    stage.start()
    _, second = stage.start()
    stage.set_health("a", state=HealthState.HALF_OPEN)
    stage.wait(0.05)
    assert second.is_silent
    stage.wait(9.9)
    assert second.is_silent
    stage.wait(0.25)
    assert (second.status, code(second)) == (503, "overloaded")
    stage.check()


def test_a_stream_that_nobody_can_send_is_the_clients_mistake() -> None:
    stage = RecordingEngine([server("a", streaming=False)])
    _, client = stage.start(stream=True)
    assert (client.status, code(client)) == (400, "streaming_unsupported")


# The queue


def queueing(**fields: Any) -> RecordingEngine:
    return RecordingEngine([server("a", cap=1)], **fields)


def test_waiting_requests_get_their_turn_in_order() -> None:
    stage = queueing()
    clients = [stage.start()[1] for _ in range(3)]
    assert [exchange.phase for exchange in stage.exchanges] == [Phase.TRYING, Phase.QUEUED, Phase.QUEUED]
    for _ in range(3):
        stage.check()
        stage.last.answer()
    assert [client.status for client in clients] == [200] * 3
    assert [sending.exchange for sending in stage.sendings] == stage.exchanges
    stage.check()


def test_a_slot_freed_by_a_leaving_client_is_passed_on() -> None:
    stage = queueing()
    exchange, _ = stage.start()
    stage.start()
    leave(exchange)
    assert stage.last.exchange is stage.exchanges[1]
    stage.check()


def test_waiting_is_bounded_by_number_and_time() -> None:
    """Both refusals are 503 with Retry-After of 1 to 5 s (L07)."""
    stage = queueing(max_queue=1, limits=Limits(queue_timeout=10))
    stage.start()
    _, waiting = stage.start()
    _, refused = stage.start()
    assert (refused.status, code(refused), refused.headers[b"retry-after"]) == (503, "overloaded", b"3")
    for _ in range(9):
        stage.wait(1)
    assert waiting.is_silent
    stage.wait(1)
    assert (waiting.status, code(waiting)) == (503, "overloaded")
    assert stage.room.queue.waiting(MODEL) == 0
    stage.check()


def test_without_time_to_wait_nobody_waits() -> None:
    stage = queueing(limits=Limits(queue_timeout=0))
    stage.start()
    _, client = stage.start()
    assert client.status == 503
    assert stage.room.queue.waiting(MODEL) == 0


def test_waiting_does_not_use_up_the_deadline() -> None:
    """It has a limit of its own; a request that gets its slot has all of its time."""
    stage = queueing(limits=Limits(request_timeout=20, first_byte_timeout=20))
    stage.start()
    exchange, client = stage.start()
    stage.wait(15)
    stage.sendings[0].answer()
    assert (exchange.phase, exchange.deadline) == (Phase.TRYING, stage.clock + 20)
    stage.wait(15)
    stage.last.answer()
    assert (client.status, client.headers[b"x-multiverse-queued-ms"]) == (200, b"15000")
    stage.check()


def test_a_bulk_request_waits_for_longer() -> None:
    """Nobody sits in front of it."""
    stage = queueing(limits=Limits(queue_timeout=10, bulk_queue_timeout=30))
    stage.start()
    _, client = stage.start(is_bulk=True)
    stage.wait(29)
    assert client.is_silent
    stage.wait(1)
    assert (client.status, code(client)) == (503, "overloaded")
    stage.check()


def test_the_request_of_a_light_client_goes_before_those_of_a_script() -> None:
    """And too many waiting requests cost the script its newest one."""
    stage = queueing(max_queue=3)
    script = [stage.start(source="script") for _ in range(4)]
    person, _ = stage.start(source="person")
    assert (script[3][1].status, code(script[3][1]), person.phase) == (503, "overloaded", Phase.QUEUED)
    stage.last.answer()
    assert (person.phase, script[1][0].phase) == (Phase.TRYING, Phase.QUEUED)
    stage.check()


def test_one_offer_asks_one_of_many_requests_that_need_the_same() -> None:
    """What cannot use a free slot is not asked again under another client's name, so that many clients cost no more than one."""
    stage = queueing()
    waiting = [stage.start(source=f"client {number}")[0] for number in range(31)][1:]
    looked_at = [exchange.due for exchange in waiting]
    stage.clock += 0.1
    stage.room.offer(MODEL, stage.clock)
    assert sum(exchange.due != due for exchange, due in zip(waiting, looked_at, strict=True)) == 1


def test_an_exchange_that_is_over_is_freed_without_the_garbage_collector() -> None:
    """Whether it was served, waited or was refused, its parts let go of it, and the reader of its answer of the attempt."""
    stage = queueing(max_queue=1)
    exchanges = [stage.start(stream=stream)[0] for stream in (False, True, False)]
    stage.last.answer()
    stage.last.stream(ONE, LAST, DONE_EVENT)
    stage.last.end()
    assert [exchange.phase for exchange in exchanges] == [Phase.OVER] * 3
    for exchange in exchanges:
        attempt = exchange.attempt
        parts = [exchange.search, exchange.response, *([] if attempt is None else [attempt, attempt.reader])]
        wholes = [exchange, exchange.search, *([] if attempt is None else [attempt])]
        found = [(type(part), type(whole)) for part in parts for whole in wholes if whole in gc.get_referents(part)]
        assert set(found) <= {(Attempt, ServerSearch)}, "a cycle"


def test_nobody_begins_to_wait_in_a_process_that_is_to_end() -> None:
    stage = queueing()
    stage.start()
    stage.room.is_closed = True
    _, client = stage.start()
    assert (client.status, code(client)) == (503, "overloaded")
    stage.check()


def test_a_turn_that_comes_too_early_keeps_waiting() -> None:
    stage = queueing()
    stage.start()
    exchange, client = stage.start()
    stage.slot_freed(MODEL)
    assert (exchange.phase, client.status, stage.room.queue.waiting(MODEL)) == (Phase.QUEUED, None, 1)
    leave(exchange)
    exchange.search.turn()
    stage.check()


@pytest.mark.parametrize(("seconds", "header"), [(0.0, None), (0.0005, None), (0.25, b"250")])
def test_a_request_that_passed_through_the_queue_did_not_wait(seconds: float, header: bytes | None) -> None:
    """Less than a millisecond is no wait, whatever becomes of the request."""
    stage = queueing()
    stage.start()
    exchange, client = stage.start()
    stage.clock += seconds
    exchange.interrupt()
    assert (client.status, client.headers.get(b"x-multiverse-queued-ms")) == (503, header)
    stage.check()


def test_a_slot_that_nobody_freed_is_found() -> None:
    """A server may return from its pause: no attempt ends then, so a waiting request looks now and then."""
    stage = RecordingEngine([server("a", cap=1), server("b")])
    stage.set_health("b", rest=Rest(until=stage.clock + 0.1))
    stage.start()
    _, client = stage.start()
    stage.wait(0.05)
    assert stage.tried() == ["a"]
    stage.wait(LOOK_SECONDS)
    assert stage.tried() == ["a", "b"]
    assert stage.room.queue.waiting(MODEL) == 0
    stage.last.answer()
    assert client.status == 200
    stage.check()


def test_a_slot_that_the_first_cannot_use_goes_to_the_next() -> None:
    """A stream waits for a server that streams; the other server's slot is not lost on it."""
    stage = RecordingEngine([server("plain", cap=1, streaming=False), server("streams", cap=1)])
    stage.start()
    stage.start()
    _, stream = stage.start(stream=True)
    _, plain = stage.start()
    stage.sendings[0].answer()
    stage.wait(LOOK_SECONDS)
    assert stage.last.exchange.response.client is plain
    assert stream.is_silent
    stage.check()


def test_looking_keeps_the_place_in_the_queue() -> None:
    stage = queueing()
    stage.start()
    second, _ = stage.start()
    stage.wait(0.1)
    stage.start()
    stage.wait(LOOK_SECONDS - 0.1)
    stage.sendings[0].answer()
    assert stage.last.exchange is second


def test_a_failed_request_waits_for_a_server_that_is_full() -> None:
    """A server at its cap is usable: the retry queues for it."""
    stage = RecordingEngine([server("a"), server("b", cap=1, registered_at=1)])
    stage.set_health("a", rest=Rest(until=stage.clock + 1))
    _, first = stage.start()
    stage.set_health("a", rest=Rest(until=0.0))
    exchange, second = stage.start()
    assert stage.tried() == ["b", "a"]
    stage.last.answer(500)
    stage.wait(0.1)
    assert (exchange.phase, second.status) == (Phase.QUEUED, None)
    stage.sendings[0].answer()
    stage.last.answer()
    assert (first.status, second.status, stage.tried()) == (200, 200, ["b", "a", "b"])
    stage.check()


def test_a_retry_may_wait_as_long_as_any_other() -> None:
    """The time in the queue counts from when it joined; if it was in vain, the failure before it is told."""
    stage = RecordingEngine([server("a"), server("b", cap=1, registered_at=1)], limits=Limits(queue_timeout=10))
    stage.set_health("a", rest=Rest(until=stage.clock + 1))
    stage.start()
    stage.set_health("a", rest=Rest(until=0.0))
    exchange, client = stage.start()
    stage.wait(30)
    stage.last.answer(500)
    stage.wait(0.1)
    assert exchange.phase is Phase.QUEUED
    stage.wait(9)
    assert client.is_silent
    stage.wait(1)
    assert (client.status, code(client)) == (504, "upstream_timeout")
    stage.check()


def test_a_turn_may_find_that_nobody_is_left() -> None:
    stage = queueing()
    stage.start()
    _, client = stage.start()
    stage.set_health("a", state=HealthState.UNHEALTHY, next_probe=NextProbe(at=stage.clock + 5))
    stage.slot_freed(MODEL)
    assert (client.status, code(client)) == (503, "no_healthy_server")
    stage.check()


def test_a_request_waits_no_longer_than_the_queue_timeout_in_all() -> None:
    """One that fails over keeps its place, its charge and the time that it has waited."""
    stage = RecordingEngine([server("a", cap=1), server("b", cap=1, registered_at=1)], limits=Limits(queue_timeout=10))
    stage.start()
    stage.start()
    exchange, client = stage.start()
    stage.wait(6)
    stage.sendings[0].answer()
    assert (exchange.phase, exchange.search.waited_seconds) == (Phase.TRYING, 6)
    cost = exchange.search.cost
    stage.wait(20)
    stage.last.answer(500)
    stage.wait(0.1)
    assert (exchange.phase, exchange.search.cost, cost > 0) == (Phase.QUEUED, cost, True)
    stage.wait(3.9)
    assert client.is_silent
    stage.wait(0.25)
    assert (client.status, code(client)) == (504, "upstream_timeout")
    assert client.headers[b"x-multiverse-queued-ms"] == b"10150"
    stage.check()


def test_a_newcomer_does_not_take_the_last_resort_before_a_request_that_waits() -> None:
    """A request that waited for a full server is next when another one is all that is left."""
    stage = RecordingEngine([server("a", cap=1), server("b", registered_at=1)])
    stage.set_health("b", state=HealthState.UNHEALTHY, by_traffic=True, next_probe=NextProbe(at=stage.clock + 5))
    stage.start()
    waiting, _ = stage.start()
    stage.remove("a")
    newcomer, _ = stage.start()
    assert (stage.last.exchange, stage.last.server.id, newcomer.phase) == (waiting, "b", Phase.QUEUED)
    stage.check()


@pytest.mark.parametrize(
    ("facts", "refusal"),
    [
        ({"revoked_at": 5.0}, (401, "invalid_api_key")),
        ({"blocked_at": 5.0}, (403, "key_blocked")),
        ({"expires_at": 5.0, "blocked_at": None}, (401, "invalid_api_key")),
    ],
)
def test_a_request_whose_key_ends_does_not_wait_any_longer(facts: dict[str, Any], refusal: tuple[int, str]) -> None:
    """One that runs goes on."""
    stage = RecordingEngine([server("a", cap=1)])
    running, _ = stage.start()
    waiting, client = stage.start()
    for exchange in (running, waiting):
        exchange.search.end_waiting(key_ended(make_key(id="a", **facts)))
    assert (running.phase, waiting.phase) == (Phase.TRYING, Phase.OVER)
    assert (client.status, code(client)) == refusal
    stage.check()


# Shares of slots


def shared(**fields: Any) -> RecordingEngine:
    """Return a model of four slots that another client has just used, so that one client may hold two of them."""
    stage = RecordingEngine([server("a", cap=4)], **fields)
    stage.start(source="person")
    stage.last.answer()
    return stage


def test_the_refusal_of_a_client_over_its_share_says_so() -> None:
    """Slots are free then, so it does not say that every server is busy."""
    stage = shared(max_queue=1)
    refused = [stage.start(source="script")[1] for _ in range(4)][3]
    assert (refused.status, code(refused), refused.headers[b"retry-after"]) == (503, "overloaded", b"3")
    assert refused.headers[b"x-multiverse-queue-length"] == b"1", "the rejected request does not count"
    assert (
        b"Your requests hold half of the slots of the model 'tiny', the limit of one client while others use it, "
        b"and 1 other request waits. Try again in 3 s, or send fewer requests at once."
    ) in refused.data
    for _ in range(2):
        stage.start(source="person")
    _, refused = stage.start(source="script")
    assert b"Every server of the model 'tiny' is busy, and 1 other request waits." in refused.data
    stage.check()


def test_the_refusal_of_a_bulk_request_over_its_share_says_so() -> None:
    stage = shared(max_queue=1)
    refused = [stage.start(source=f"script {number}", is_bulk=True)[1] for number in range(3)][2]
    assert (
        b"Bulk requests hold a quarter of the slots of the model 'tiny', their limit while interactive requests use it, "
        b"and 1 other request waits. Try again in 3 s, or send fewer requests at once."
    ) in refused.data


@pytest.mark.parametrize("is_bulk", [False, True])
@pytest.mark.parametrize("reason", ["no places", "no time", "shutdown"])
def test_where_no_request_can_wait_there_are_no_shares(reason: str, is_bulk: bool) -> None:
    """A share makes a request wait; one that cannot wait takes the slot that is free, and is rejected only if there is none."""
    limits = Limits(queue_timeout=0, bulk_queue_timeout=0) if reason == "no time" else Limits()
    stage = shared(max_queue=0 if reason == "no places" else 32, limits=limits)
    stage.room.is_closed = reason == "shutdown"
    clients = [stage.start(source="script", is_bulk=is_bulk)[1] for _ in range(5)]
    assert [client.status for client in clients] == [None, None, None, None, 503]
    assert b"Every server of the model 'tiny' is busy" in clients[4].data
    stage.check()


@pytest.mark.parametrize("reason", ["no places", "no time", "shutdown"])
def test_no_request_passes_what_the_gateway_handles_for_a_model(reason: str) -> None:
    """Not even one that cannot wait: without caps that is all that leaves something for other models."""
    limits = Limits(queue_timeout=0) if reason == "no time" else Limits()
    stage = RecordingEngine([server("a")], max_queue=0 if reason == "no places" else 32, uncapped_slots=2, limits=limits)
    stage.room.is_closed = reason == "shutdown"
    clients = [stage.start(source=f"client {number}")[1] for number in range(3)]
    assert [client.status for client in clients] == [None, None, 503]
    assert b"Requests to the model 'tiny' take up half of what the gateway handles at a time" in clients[2].data
    stage.last.answer()
    assert stage.start(source="another")[1].status is None
    stage.check()


def test_a_waiting_request_begins_when_its_model_has_room_in_the_gateway() -> None:
    stage = RecordingEngine([server("a")], uncapped_slots=1)
    stage.start(source="first")
    waiting, _ = stage.start(source="second")
    phases = [waiting.phase]
    stage.last.answer()
    assert [*phases, waiting.phase] == [Phase.QUEUED, Phase.TRYING]
    stage.check()


def test_a_request_that_cannot_wait_passes_those_that_are_over_their_share() -> None:
    """Bulk requests have time of their own: one that waits does not make a person's request fail while slots are free."""
    stage = shared(limits=Limits(queue_timeout=0, bulk_queue_timeout=30))
    bulk = [stage.start(source="script", is_bulk=True)[0] for _ in range(2)][1]
    person, _ = stage.start(source="person")
    assert (bulk.phase, person.phase) == (Phase.QUEUED, Phase.TRYING)
    stage.check()


def test_without_a_server_in_rotation_there_are_no_shares() -> None:
    """Half of nothing is no share: what the last resort can take is not left to others that do not come."""
    stage = shared()
    stage.start(source="script")
    stage.set_health("a", state=HealthState.UNHEALTHY, by_traffic=True, next_probe=NextProbe(at=stage.clock + 5))
    assert stage.room.queue.counts(MODEL).slots == 0
    assert stage.room.queue.used_up(stage.begin(source="script")[0].search, stage.clock) is None
    assert stage.room.queue.used_up(stage.begin(source="script", is_bulk=True)[0].search, stage.clock) is None


def test_a_retry_on_the_same_server_keeps_to_the_share() -> None:
    """The slot that it had went to the client's next request: the retry waits in its place for another one, and is charged once."""
    stage = shared()
    script = [stage.start(source="script")[0] for _ in range(3)]
    cost = script[0].search.cost
    stage.sendings[-2].fail(A)
    stage.set_health("a", state=HealthState.HEALTHY)
    stage.slot_freed(MODEL)
    assert (script[0].phase, script[2].phase) == (Phase.BACKOFF, Phase.TRYING)
    later, _ = stage.start(source="script")
    stage.wait(0.25)
    assert (script[0].phase, stage.room.queue.order(MODEL)) == (Phase.QUEUED, [script[0].search, later.search])
    stage.last.answer()
    assert (stage.last.exchange, later.phase) == (script[0], Phase.QUEUED)
    assert (script[0].search.cost, cost > 0) == (cost, True)
    stage.check()


# Time


def test_a_tick_that_is_not_due_does_nothing() -> None:
    """One exchange's tick may give another its turn: that other's own tick, decided before, finds a fresh attempt."""
    stage = queueing(limits=Limits(first_byte_timeout=5, queue_timeout=5))
    first, _ = stage.start()
    second, client = stage.start()
    stage.wait(4)
    second.due = stage.clock + 1
    second.deadline = second.search.joined_at = stage.clock + 100
    stage.wait(1)
    stage.find(alive=False)
    assert stage.blamed() == [("a", C)]
    assert (second.phase, client.status) == (Phase.TRYING, None)
    assert first.phase is Phase.OVER
    stage.check()


def test_ticks_before_the_start_and_after_the_end_do_nothing() -> None:
    stage = engine("a")
    exchange, client = stage.begin()
    exchange.due = stage.clock
    exchange.tick(stage.clock)
    assert exchange.phase is Phase.CHOOSING
    exchange.start()
    stage.last.answer()
    stage.clock += 1000
    exchange.tick(stage.clock)
    assert client.status == 200
    stage.check()


def test_comments_do_not_put_off_the_first_event() -> None:
    """S14: a server that only pings is given up on."""
    stage = engine("a", limits=Limits(first_byte_timeout=10, idle_timeout=5))
    _, client = stage.start(stream=True)
    stage.last.stream(PING)
    for _ in range(9):
        stage.wait(1)
        stage.last.body(PING)
    assert client.is_silent
    stage.wait(1)
    stage.find(alive=False)
    assert (client.status, stage.blamed()) == (504, [("a", C)])
    stage.check()


def test_a_plain_answer_may_take_longer_than_its_first_byte() -> None:
    """Bytes that arrive are life: then the idle time and the request's deadline hold."""
    stage = engine("a", "b", limits=Limits(first_byte_timeout=10, idle_timeout=5, request_timeout=60))
    _, client = stage.start()
    stage.last.head()
    stage.last.body(b"[")
    for _ in range(5):
        stage.wait(4)
        stage.last.body(b" ")
    stage.last.body(b"]")
    stage.last.end()
    assert client.status == 200
    stage.start()
    stage.last.head()
    stage.last.body(b"[")
    stage.wait(5)
    stage.find(alive=False)
    assert stage.blamed() == [("a", C)]


def test_a_stream_of_a_server_that_fails_a_probe_is_broken_off() -> None:
    """S06: idle time after the last byte the server is probed; it is struck as by a timeout."""
    stage = engine("a", limits=Limits(idle_timeout=5))
    _, client = stage.start(stream=True)
    stage.last.stream(ONE)
    stage.wait(4)
    stage.last.body(PING)
    stage.wait(4)
    assert not client.is_finished
    stage.wait(1)
    assert not client.is_finished
    stage.find(alive=False)
    assert trailing_error(client, ONE + PING)["code"] == "upstream_stream_interrupted"
    assert (client.was_cut, stage.last.aborted, stage.blamed()) == (True, True, [("a", C)])
    stage.check()


def test_a_stalled_raw_answer_is_cut() -> None:
    stage = engine("a", limits=Limits(idle_timeout=5))
    _, client = stage.start(path=SPEECH)
    stage.last.head()
    stage.last.body(b"x")
    stage.wait(4)
    stage.last.body(b"x")
    stage.wait(5)
    stage.find(alive=False)
    assert (client.was_cut, client.data, stage.blamed()) == (True, b"xx", [("a", C)])


@pytest.mark.parametrize("path", ["/v1/chat/completions", SPEECH, "plain"])
def test_a_server_that_passes_a_probe_may_be_silent_for_longer(path: str) -> None:
    """It may be busy with a long prompt; five times the idle time without a byte is the end, and the words say so."""
    stage = engine("a", limits=Limits(idle_timeout=5))
    _, client = stage.start(path="/v1/chat/completions" if path == "plain" else path, stream=path == "/v1/chat/completions")
    stage.last.head(200, JSON if path == "plain" else EVENTS)
    stage.last.body(b"[" if path == "plain" else ONE)
    for _ in range(2):
        stage.wait(5)
        stage.find(alive=True)
        stage.wait(19)
        stage.last.body(b" " if path == "plain" else TWO)
    stage.wait(5)
    stage.wait(19)
    assert stage.blamed() == []
    stage.wait(1)
    assert client.is_finished
    stage.find(alive=False)
    assert stage.blamed() == [("a", C)]
    if path != SPEECH:
        assert b"no data for 25 s (IDLE_TIMEOUT_SECONDS)" in client.data
    stage.check()


def test_data_that_come_while_a_probe_runs_are_proof_of_life() -> None:
    stage = engine("a", limits=Limits(idle_timeout=5))
    _, client = stage.start(stream=True)
    stage.last.stream(ONE)
    stage.wait(5)
    stage.last.body(TWO)
    stage.find(alive=False)
    assert not client.is_finished
    assert stage.blamed() == []
    stage.check()


def test_the_only_server_gets_all_the_time_there_is() -> None:
    """Without a substitute only the deadline counts; a failed probe ends it at once."""
    stage = engine("a", limits=Limits(request_timeout=300, first_byte_timeout=60))
    _, client = stage.start()
    stage.wait(60)
    stage.find(alive=True)
    stage.wait(230)
    assert client.is_silent
    stage.last.answer()
    assert client.status == 200
    _, client = stage.start()
    stage.wait(60)
    stage.find(alive=False)
    assert (client.status, stage.blamed()) == (504, [("a", C)])
    assert "failed a probe" in json.loads(client.data)["error"]["message"]
    stage.check()


def test_a_slow_server_gets_more_time_for_a_long_prompt() -> None:
    """Class C: the first byte of a plain answer with 512 tokens may take half as long again; then another server is asked."""
    stage = engine("a", "b", limits=Limits(request_timeout=1000, first_byte_timeout=100))
    stage.start()
    stage.wait(100)
    stage.find(alive=True)
    stage.wait(51)
    assert stage.blamed() == []
    stage.wait(0.3)
    assert stage.blamed() == [("a", C)]
    stage.check()


def test_a_probe_of_an_attempt_that_is_over_changes_nothing() -> None:
    stage = engine("a", "b", limits=Limits(first_byte_timeout=10))
    exchange, client = stage.start()
    stage.wait(10)
    stage.last.fail(B)
    stage.find(alive=False)
    stage.wait(0.1)
    assert (stage.tried(), exchange.phase, client.is_silent) == (["a", "b"], Phase.TRYING, True)
    stage.check()


# Large embeddings


def embeddings(size: int) -> bytes:
    return b'{"data": [{"embedding": [' + b"0.5, " * (size // 5) + b'1]}], "usage": {"prompt_tokens": 7}}'


def test_large_embeddings_are_relayed_as_they_come() -> None:
    """Held up to a mebibyte, so that another server may still answer; beyond it checked as they pass."""
    stage = engine("a")
    exchange, client = stage.start(path=EMBEDDINGS)
    body = embeddings(3 << 20)
    stage.last.head()
    stage.last.body(body[: 1 << 20])
    assert client.is_silent
    stage.last.body(body[1 << 20 : 2 << 20])
    assert (client.data, exchange.response.held) == (body[: 2 << 20], 0)
    stage.last.body(body[2 << 20 :])
    stage.last.end()
    assert (client.data, client.ended, client.length, exchange.usage) == (body, True, None, (7, 0))
    assert stage.praised() == ["a"]
    stage.check()


@pytest.mark.parametrize("fault", ["end", "text", "limit"])
def test_large_embeddings_that_are_not_whole_are_cut(fault: str) -> None:
    """The client can tell, and only a fault of the server's own is a strike."""
    stage = engine("a", limits=Limits(max_embeddings_bytes=2 << 20))
    exchange, client = stage.start(path=EMBEDDINGS)
    stage.last.head()
    stage.last.body(embeddings(4 << 20)[: (2 << 20) - 10])
    if fault == "end":
        stage.last.end()
    else:
        stage.last.body(b"\xff" if fault == "text" else b"0" * 11)
    assert client.was_cut
    assert stage.blamed() == {"end": [("a", B)], "text": [("a", K)], "limit": []}[fault]
    assert exchange.response.error_code == ("stream_limit_reached" if fault == "limit" else "upstream_stream_interrupted")
    stage.check()


def test_small_embeddings_are_held_and_retried() -> None:
    stage = engine("a", "b")
    _, client = stage.start(path=EMBEDDINGS)
    stage.last.head()
    stage.last.body(embeddings(1000)[:-5])
    stage.last.end()
    stage.wait(0.1)
    stage.last.answer(body=embeddings(1000))
    assert (client.status, client.data, stage.tried()) == (200, embeddings(1000), ["a", "b"])
    stage.check()


@pytest.mark.parametrize("stream", [True, False])
def test_an_endless_answer_is_stopped_by_size(stream: bool) -> None:
    """S11: our own limit blames nobody."""
    stage = engine("a", limits=Limits(max_stream_bytes=2 * len(ONE)))
    exchange, client = stage.start(stream=stream, path="/v1/chat/completions" if stream else SPEECH)
    stage.last.head(200, EVENTS if stream else {b"content-type": b"audio/mpeg"})
    stage.last.body(ONE, ONE)
    assert not client.is_finished
    stage.last.body(ONE)
    assert (client.was_cut, stage.last.aborted, stage.blamed()) == (True, True, [])
    assert exchange.response.error_code == "stream_limit_reached"
    if stream:
        assert trailing_error(client, ONE * 3)["code"] == "stream_limit_reached"
    else:
        assert client.data == ONE * 3
    stage.check()


def test_an_endless_stream_is_stopped_by_time() -> None:
    """S11: an hour from the commit on."""
    stage = engine("a", limits=Limits(max_stream_seconds=100, idle_timeout=60))
    _, client = stage.start(stream=True)
    stage.last.stream(ONE)
    stage.wait(50)
    stage.last.body(ONE)
    stage.wait(50)
    assert trailing_error(client, ONE * 2)["code"] == "stream_limit_reached"
    assert (client.was_cut, stage.blamed()) == (True, [])
    stage.check()


@pytest.mark.parametrize(
    ("path", "setting"), [("/v1/chat/completions", "MULTIVERSE_MAX_EVENT_BYTES"), ("/v1/responses", "MULTIVERSE_MAX_LARGE_EVENT_BYTES")]
)
def test_an_event_over_the_limit_is_nobodys_fault(path: str, setting: str) -> None:
    """S10: there is no other attempt, because another server would send as much, and no strike; the message names limit and setting."""
    stage = engine("a", "b", limits=Limits(max_event_bytes=1000, max_large_event_bytes=1000))
    exchange, client = stage.start(stream=True, path=path)
    stage.last.stream(b"data: " + b"x" * 600, b"x" * 600)
    assert (client.status, code(client), exchange.response.error_code) == (502, "answer_too_large", "answer_too_large")
    assert client.headers[b"x-should-retry"] == b"false"
    message = json.loads(client.data)["error"]["message"]
    assert "1000 bytes" in message
    assert f"with {setting}." in message
    assert (stage.tried(), stage.blamed()) == (["a"], [])
    stage.check()
    exchange, client = stage.start(stream=True, path=path)
    stage.last.stream(ONE, b"data: " + b"x" * 600, b"x" * 600)
    assert setting.encode() in client.data.removeprefix(ONE)
    assert (client.was_cut, exchange.response.error_code, stage.blamed()) == (True, "stream_limit_reached", [])
    stage.check()


def test_events_outside_of_chats_may_be_larger() -> None:
    """An image or a whole response is one event."""
    stage = engine("a", limits=Limits(max_event_bytes=1000))
    large = b'data: {"type":"response.completed","response":{"text":"' + b"x" * 100_000 + b'"}}\n\n'
    for path, relayed in (("/v1/responses", True), ("/v1/images/generations", True), ("/v1/completions", False)):
        _, client = stage.start(stream=True, path=path)
        stage.last.stream(large[:50_000], large[50_000:])
        assert (client.data == large) is relayed


# The client


def leave(exchange: Exchange) -> None:
    assert isinstance(exchange.response.client, RecordingClient)
    exchange.response.client.gone = True
    exchange.client_gone()


def end_by(ending: str, stage: RecordingEngine, exchange: Exchange) -> None:
    if ending == "client":
        leave(exchange)
    elif ending == "shutdown":
        exchange.interrupt()
    else:
        stage.wait(exchange.deadline - stage.clock)


def in_phase(phase: Phase, *, stream: bool = True) -> tuple[RecordingEngine, Exchange, RecordingClient]:
    """Bring an exchange into a phase."""
    stage = RecordingEngine([server("a", cap=1), server("b", cap=1)] if phase is Phase.BACKOFF else [server("a", cap=1)])
    if phase is Phase.CHOOSING:
        return stage, *stage.begin(stream=stream)
    if phase is Phase.QUEUED:
        stage.start()
    exchange, client = stage.start(stream=stream)
    if phase is Phase.BACKOFF:
        stage.last.fail(B)
    elif phase is Phase.RELAYING:
        stage.last.stream(ONE)
    elif phase is Phase.DRAINING:
        stage.last.stream(ONE, DONE_EVENT)
    elif phase is Phase.OVER:
        stage.last.answer(400)
    assert exchange.phase is phase
    return stage, exchange, client


@pytest.mark.parametrize("how", ["client_gone", "client_stalled"])
@pytest.mark.parametrize("phase", [Phase.CHOOSING, Phase.QUEUED, Phase.TRYING, Phase.BACKOFF, Phase.RELAYING])
def test_a_client_that_leaves_frees_everything_at_once(phase: Phase, how: str) -> None:
    """D01, D02: connection closed, slot and place in the queue given back, nobody blamed, 499 noted."""
    stage, exchange, client = in_phase(phase)
    blamed = stage.blamed()
    client.gone = True
    getattr(exchange, how)()
    assert (exchange.phase, exchange.response.status, exchange.response.error_code) == (Phase.OVER, 499, how)
    assert not [sending for sending in stage.of(exchange) if sending.is_live]
    assert stage.room.queue.waiting(MODEL) == 0
    assert stage.blamed() == blamed
    stage.check()
    exchange.client_gone()
    exchange.start()
    exchange.search.turn()
    stage.clock += 1000
    exchange.tick(stage.clock)
    stage.check()


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.OVER])
def test_a_client_that_leaves_after_the_end_changes_nothing(phase: Phase) -> None:
    stage, exchange, _ = in_phase(phase)
    before = exchange.response.status
    leave(exchange)
    assert (exchange.phase, exchange.response.status) == (phase, before)
    stage.check()


@pytest.mark.parametrize("phase", list(Phase))
def test_a_clogged_client_pauses_reading_while_relaying_only(phase: Phase) -> None:
    """In every other phase there is nothing to pause, and nothing to go on with."""
    stage, exchange, _ = in_phase(phase)
    due = exchange.due
    exchange.client_clogged()
    exchange.client_clogged()
    paused = [sending for sending in stage.of(exchange) if sending.paused]
    assert bool(paused) == (phase is Phase.RELAYING)
    exchange.client_drained()
    exchange.client_drained()
    assert exchange.due == due
    assert not [sending for sending in stage.of(exchange) if sending.paused]
    stage.check()


def test_a_server_is_not_idle_while_the_client_is_clogged() -> None:
    """What was read already still goes out; idle time starts over when reading resumes."""
    stage = engine("a", limits=Limits(idle_timeout=5))
    exchange, client = stage.start(stream=True)
    stage.last.stream(ONE)
    exchange.client_clogged()
    stage.last.body(TWO)
    stage.wait(30)
    assert not client.is_finished
    exchange.client_drained()
    stage.wait(4)
    assert not client.is_finished
    stage.wait(1)
    stage.find(alive=False)
    assert (client.was_cut, stage.blamed()) == (True, [("a", C)])
    stage.check()


def test_the_stream_limit_holds_for_clogged_clients() -> None:
    stage = engine("a", limits=Limits(max_stream_seconds=100))
    exchange, client = stage.start(stream=True)
    stage.last.stream(ONE)
    exchange.client_clogged()
    stage.wait(100)
    assert client.was_cut
    stage.check()


def test_a_large_plain_answer_may_clog_its_client() -> None:
    """It is over by then; that the client has read it prolongs nothing."""
    stage = engine("a")
    exchange, client = stage.start(RecordingClient(high_water=10))
    stage.last.answer(body=b'{"a":"long answer"}')
    exchange.client_drained()
    assert (client.ended, exchange.phase) == (True, Phase.OVER)
    stage.check()


# Shutdown


@pytest.mark.parametrize("phase", [Phase.CHOOSING, Phase.QUEUED, Phase.TRYING, Phase.BACKOFF])
def test_shutdown_before_the_head_is_a_refusal(phase: Phase) -> None:
    """503 with Retry-After; an exchange that is refused before its start is not started any more (G02)."""
    stage, exchange, client = in_phase(phase)
    exchange.interrupt()
    assert (client.status, code(client), client.headers[b"retry-after"]) == (503, "gateway_shutting_down", b"5")
    assert (client.ended, stage.room.queue.waiting(MODEL)) == (True, 0)
    exchange.start()
    exchange.interrupt()
    stage.check()


def test_shutdown_tells_a_stream_why_it_ends() -> None:
    """G01: the error event, no [DONE], nobody blamed."""
    stage, exchange, client = in_phase(Phase.RELAYING)
    exchange.interrupt()
    assert trailing_error(client, ONE)["code"] == "gateway_shutting_down"
    assert (client.was_cut, stage.last.aborted, stage.blamed(), exchange.response.error_code) == (True, True, [], "gateway_shutting_down")
    stage.check()


def test_shutdown_cuts_a_raw_answer() -> None:
    stage = engine("a")
    exchange, client = stage.start(path=SPEECH)
    stage.last.head()
    stage.last.body(b"x")
    exchange.interrupt()
    assert (client.data, client.was_cut) == (b"x", True)


def test_starting_twice_is_starting_once() -> None:
    stage = engine("a")
    exchange, _ = stage.start()
    exchange.start()
    assert len(stage.sendings) == 1
    stage.check()


# Any order, any segmentation

STREAMS = [
    PING + ONE + TWO + LAST + DONE_EVENT,
    ONE + TWO + LAST,
    ONE + PING + TWO[:-1],
    ONE + ERROR + TWO,
    PING + ERROR + ONE,
    ONE + b"data: oops\n\n" + TWO,
    b"data: oops\n\n" + ONE,
    (ONE + LAST + DONE_EVENT).replace(b"\n", b"\r\n"),
    PING,
    b"",
]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges) if start < end]


def outcome(data: bytes, pieces: list[bytes]) -> tuple[object, ...]:
    stage = engine("a", limits=Limits(retry_policy=RetryPolicy(max_retries=0)))
    exchange, client = stage.start(stream=True)
    stage.last.stream(*pieces)
    stage.last.end()
    stage.check()
    return (
        client.status,
        client.data,
        client.ended,
        client.was_cut,
        stage.blamed(),
        stage.praised(),
        exchange.response.error_code,
        exchange.events,
    )


def test_a_stream_may_end_before_the_line_feed_of_its_last_line() -> None:
    """S04: its last event is whole, and so is the stream; an error there is told as any other."""
    data = (ONE + LAST + DONE_EVENT).replace(b"\n", b"\r\n")[:-1]
    for pieces in ([data], [data[:-1], data[-1:]]):
        stage = engine("a")
        _, client = stage.start(stream=True)
        stage.last.stream(*pieces)
        stage.last.end()
        assert (client.data, client.ended) == (data, True)
        stage.check()
    stage = engine("a")
    _, client = stage.start(stream=True)
    stage.last.stream(ERROR.replace(b"\n", b"\r\n")[:-1])
    stage.last.end()
    assert client.is_silent or client.status == 504
    assert stage.blamed() == [("a", D)]
    stage.check()


@given(st.sampled_from(STREAMS), st.lists(st.integers(0, 10_000), max_size=12))
def test_segmentation_changes_nothing(data: bytes, places: list[int]) -> None:
    """However a stream is cut into pieces, client and health machine hear the same."""
    assert outcome(data, cut(data, places)) == outcome(data, [data])


ANSWERS = [
    (200, JSON, b'{"ok":true}'),
    (200, JSON, b"{"),
    (200, EVENTS, b""),
    (200, {b"content-type": b"text/html"}, b"<p>"),
    (302, JSON, b""),
    (400, JSON, b"{}"),
    (401, JSON, b"{}"),
    (404, JSON, b"{}"),
    (404, JSON, model_not_found("vllm", MODEL)),
    (408, JSON, b"{}"),
    (429, JSON | {b"retry-after": b"1"}, b"{}"),
    (500, JSON, b"{}"),
    (503, JSON, b"{}"),
]
PATHS = ["/v1/chat/completions", SPEECH]
exchanges = st.integers(0, 30)


class Traffic(RuleBasedStateMachine):
    """Several exchanges on a few servers with caps; whatever happens in whatever order, the rules at the top of exchange.py hold."""

    @initialize(
        caps=st.lists(st.sampled_from([None, 1, 2]), min_size=1, max_size=3),
        plain=st.booleans(),
        random_number=st.sampled_from([0.0, 0.5, 0.99]),
    )
    def prepare(self, caps: list[int | None], plain: bool, random_number: float) -> None:
        self.stage = RecordingEngine(
            [server(f"s{number}", cap=cap, streaming=not (plain and number == 0), registered_at=number) for number, cap in enumerate(caps)],
            limits=Limits(
                request_timeout=20,
                first_byte_timeout=4,
                idle_timeout=3,
                queue_timeout=5,
                max_response_bytes=2000,
                max_event_bytes=1000,
                max_stream_bytes=4000,
                max_stream_seconds=15,
            ),
            max_queue=4,
            random_number=random_number,
        )
        self.headed: set[int] = set()
        self.sent: dict[int, list[bytes]] = {}
        self.committed: dict[int, int] = {}

    def pick(self, number: int) -> Exchange:
        running = [exchange for exchange in self.stage.exchanges if exchange.phase is not Phase.OVER] or self.stage.exchanges
        return running[number % len(running)]

    def live(self, number: int) -> RecordingSending | None:
        live = [sending for sending in self.stage.sendings if sending.is_live]
        return live[number % len(live)] if live else None

    def has_exchanges(self) -> bool:
        return bool(self.stage.exchanges)

    def has_attempts(self) -> bool:
        return any(sending.is_live for sending in self.stage.sendings)

    @rule(
        stream=st.booleans(),
        path=st.sampled_from(PATHS),
        stateful=st.booleans(),
        high_water=st.sampled_from([None, 0, 300]),
        comments=st.booleans(),
        source=st.sampled_from(["", "", "one", "another"]),
        max_at_once=st.integers(0, 3),
        is_bulk=st.booleans(),
    )
    def start(
        self,
        stream: bool,
        path: str,
        stateful: bool,
        high_water: int | None,
        comments: bool,
        source: str,
        max_at_once: int,
        is_bulk: bool,
    ) -> None:
        stream = stream and path != SPEECH  # as the front reads it
        client, charge = RecordingClient(high_water=high_water), RecordingCharge()
        fields = {"stream": stream, "path": path, "stateful": stateful, "wants_comments": comments}
        self.stage.start(client, source=source, max_at_once=max_at_once, is_bulk=is_bulk, charge=charge, **fields)

    @rule(stream=st.booleans())
    def begin(self, stream: bool) -> None:
        self.stage.begin(stream=stream)

    @precondition(has_exchanges)
    @rule(number=exchanges)
    def start_begun(self, number: int) -> None:
        self.pick(number).start()

    @precondition(has_attempts)
    @rule(number=exchanges, answer=st.sampled_from(ANSWERS))
    def answer(self, number: int, answer: tuple[int, dict[bytes, bytes], bytes]) -> None:
        sending = self.live(number)
        if sending is not None and id(sending) not in self.headed:
            self.headed.add(id(sending))
            sending.answer(*answer)

    @precondition(has_attempts)
    @rule(number=exchanges, data=st.sampled_from(STREAMS), places=st.lists(st.integers(0, 10_000), max_size=4))
    def stream(self, number: int, data: bytes, places: list[int]) -> None:
        sending = self.live(number)
        if sending is not None and id(sending) not in self.headed:
            self.headed.add(id(sending))
            self.sent[id(sending)] = cut(data, places)
            sending.head(200, EVENTS)

    @precondition(has_attempts)
    @rule(number=exchanges, data=st.sampled_from([b"[", b" " * 900, b"1]"]), status=st.sampled_from([200, 400, 500]))
    def plain(self, number: int, data: bytes, status: int) -> None:
        sending = self.live(number)
        if sending is not None and id(sending) not in self.headed:
            self.headed.add(id(sending))
            self.sent[id(sending)] = [data] * 6
            sending.head(status, JSON)

    @precondition(has_attempts)
    @rule(number=exchanges, count=st.integers(1, 6))
    def body(self, number: int, count: int) -> None:
        sending = self.live(number)
        pieces = self.sent.get(id(sending))
        if sending is not None and pieces:
            sending.body(*pieces[:count])
            del pieces[:count]

    @precondition(has_attempts)
    @rule(number=exchanges)
    def end(self, number: int) -> None:
        sending = self.live(number)
        if sending is not None and id(sending) in self.headed:
            sending.end()

    @precondition(has_attempts)
    @rule(number=exchanges, kind=st.sampled_from([A, B, K, L]))
    def fail(self, number: int, kind: FailureClass) -> None:
        sending = self.live(number)
        if sending is not None:
            sending.fail(kind)

    @precondition(has_exchanges)
    @rule(number=exchanges, how=st.sampled_from(["client_gone", "client_stalled"]))
    def client_leaves(self, number: int, how: str) -> None:
        exchange = self.pick(number)
        assert isinstance(exchange.response.client, RecordingClient)
        exchange.response.client.gone = True
        getattr(exchange, how)()

    @precondition(has_exchanges)
    @rule(number=exchanges, say=st.sampled_from(["client_clogged", "client_drained"]))
    def say(self, number: int, say: str) -> None:
        getattr(self.pick(number), say)()

    @precondition(has_exchanges)
    @rule(number=exchanges)
    def give_turn(self, number: int) -> None:
        self.pick(number).search.turn()

    @precondition(has_exchanges)
    @rule(number=exchanges)
    def tick(self, number: int) -> None:
        self.pick(number).tick(self.stage.clock)

    @precondition(has_exchanges)
    @rule(number=exchanges)
    def interrupt(self, number: int) -> None:
        self.pick(number).interrupt()

    @rule()
    def free(self) -> None:
        self.stage.slot_freed(MODEL)

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0, 5.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.stage.wait(seconds)

    @rule(number=st.integers(0, 2), state=st.sampled_from([HealthState.HEALTHY, HealthState.HALF_OPEN, HealthState.UNHEALTHY]))
    def change_health(self, number: int, state: HealthState) -> None:
        name = f"s{number % len(self.stage.servers)}"
        if name in self.stage.table.routes:
            self.stage.set_health(name, state=state, by_traffic=True, rest=Rest(until=0.0), unsupported=())

    @rule(number=st.integers(0, 2))
    def remove(self, number: int) -> None:
        self.stage.remove(f"s{number % len(self.stage.servers)}")

    def happened(self) -> tuple[int, ...]:
        """Return how much was reported, ended and sent."""
        book = self.stage.health_book
        return len(book.reports), len(book.good), len(self.stage.over), len(self.stage.sendings)

    @rule()
    def nobody_waits_while_a_slot_is_free(self) -> None:
        """Within `LOOK_SECONDS`, unless its client's share of slots is used up; checked when a round of ticks has ended no attempt."""
        rounds = 0
        while True:
            before = self.happened()
            self.stage.wait(LOOK_SECONDS)
            if before == self.happened():
                break
            rounds += 1
            assert rounds < 1000
        for exchange in self.stage.exchanges:
            if exchange.phase is Phase.QUEUED and self.stage.room.queue.used_up(exchange.search, self.stage.clock) is None:
                found = self.stage.candidates(exchange.request.envelope, frozenset(), self.stage.clock)
                assert found is not None
                assert {server.id for server in found.ready} <= {attempt.server_id for attempt in exchange.search.failures}

    @invariant()
    def holds(self) -> None:
        stage = self.stage
        stage.check()
        assert stage.room.queue.waiting(MODEL) == sum(exchange.phase is Phase.QUEUED for exchange in stage.exchanges)
        for number, exchange in enumerate(stage.exchanges):
            client = exchange.response.client
            assert isinstance(client, RecordingClient)
            tried = [sending.server.id for sending in stage.of(exchange)]
            assert len(tried) == exchange.search.tried <= 3
            again = len(tried) > 1 and tried[0] == tried[1]
            assert len(set(tried)) == len(tried) - again, "a server tried twice"
            assert not again or exchange.search.failures[0].failure.kind is A
            if client.relayed:
                assert self.committed.setdefault(number, len(tried)) == len(tried), "a retry after the first event"
                if client.headers[b"content-type"] == EVENTS[b"content-type"]:
                    assert client.data.endswith((b"\n\n", b"\r\n\r\n", b"\r\n\r")), "half an event"
                assert exchange.phase not in (Phase.QUEUED, Phase.TRYING, Phase.BACKOFF)

    def teardown(self) -> None:
        """Whatever is left ends, and leaves nothing behind."""
        if not hasattr(self, "stage"):
            return
        for exchange in self.stage.exchanges:
            exchange.interrupt()
        self.stage.wait(DRAINING_SECONDS)
        self.holds()
        assert len(self.stage.over) == len(self.stage.exchanges)
        assert self.stage.load.total == 0


TestTraffic = Traffic.TestCase


# At once


def limited(stage: RecordingEngine, source: str = "script", limit: int = 2, **fields: Any) -> tuple[Exchange, RecordingClient]:
    """Start an exchange of a client that has a limit."""
    return stage.start(source=source, max_at_once=limit, charge=RecordingCharge(), **fields)


def test_a_request_over_its_clients_limit_is_refused_only_if_it_would_have_to_wait() -> None:
    """Free slots are for every request; other clients wait as before, and a place that is given back can be used again."""
    stage = RecordingEngine([server("a", cap=3)])
    stage.start(source="person")
    stage.last.answer()
    script = [limited(stage, limit=1)[0] for _ in range(2)]
    assert [exchange.phase for exchange in script] == [Phase.TRYING] * 2
    _, refused = limited(stage, limit=2)  # over its half of the slots, one of which is free
    assert (refused.status, code(refused)) == (429, "too_many_at_once")
    waiting, _ = stage.start(source="script")
    assert waiting.phase is Phase.QUEUED
    person, _ = limited(stage, "person", limit=1)
    assert person.phase is Phase.TRYING
    leave(waiting)
    leave(script[0])
    assert limited(stage, limit=2)[0].phase is Phase.TRYING
    stage.check()


def test_a_refusal_for_the_limit_at_once_says_whose_it_is_and_when_to_come_again() -> None:
    """And it takes back what was counted before."""
    stage = queueing()
    for _ in range(2):
        limited(stage, caller="the id of a key")
    exchange, refused = limited(stage, caller="the id of a key")
    message = json.loads(refused.data)["error"]["message"]
    assert "your key has 2 requests running or waiting; its limit is 2" in message
    assert (refused.headers[b"retry-after"], refused.headers[b"retry-after-ms"]) == (b"3", b"3000")
    assert cast(ChargedRequest, exchange.request).charge == RecordingCharge(1)
    for name in (NOBODY, OPERATOR):
        _, refused = limited(stage, caller=name)
        assert "your address has 2" in json.loads(refused.data)["error"]["message"]
    _, refused = stage.start(source="script", max_at_once=1)
    assert code(refused) == "too_many_at_once", "also without a charge"
    stage.check()


def test_a_request_that_waits_or_fails_over_is_never_turned_away() -> None:
    """It was let in: it keeps its place, whatever else its client sends."""
    stage = RecordingEngine([server("a", cap=1), server("b", cap=1)])
    first, _ = limited(stage, limit=1)
    second, _ = limited(stage, limit=1)
    assert (first.phase, second.phase) == (Phase.TRYING, Phase.TRYING)
    stage.of(first)[0].fail(B)
    stage.wait(1)
    assert (first.phase, first.search.tried) == (Phase.QUEUED, 1)
    stage.of(second)[0].answer()
    assert (first.phase, first.search.tried) == (Phase.TRYING, 2)
    stage.check()


def test_a_request_that_takes_what_others_cannot_use_does_not_wait() -> None:
    """A stream waits for the server that streams; a plain request of a client at its limit gets the other one."""
    stage = RecordingEngine([server("plain", cap=2, streaming=False), server("any", cap=1)])
    limited(stage, limit=1, stream=True)
    waiting, _ = stage.start(source="person", stream=True)
    assert waiting.phase is Phase.QUEUED
    assert limited(stage, limit=1)[0].phase is Phase.TRYING
    stage.check()


def test_a_request_for_a_stored_response_is_turned_away_once_its_server_is_known() -> None:
    """Only its own server can answer it, and that one is busy, though another one is free. A look-up needs no slot."""
    stage = RecordingEngine([server("a", cap=1), server("b", cap=1)])
    stage.start()
    assert stage.tried() == ["a"]
    bound, refused = limited(stage, limit=1, path=RESPONSES, stateful=True, response_id="resp_1")
    other, client = limited(stage, limit=1, path=RESPONSES, stateful=True, response_id="resp_2")
    bound.located(stage.servers[0])
    assert (refused.status, code(refused)) == (429, "too_many_at_once")
    other.located(stage.servers[1])
    assert other.phase is Phase.TRYING
    look, _ = limited(stage, limit=1, asked=look_up("POST", "/cancel"))
    look.located(stage.servers[0])
    assert (look.phase, client.status) == (Phase.TRYING, None)


def test_a_request_that_is_turned_away_drops_no_other_one() -> None:
    """Though the queue is full: the limit comes before the choice of the request that has to go."""
    stage = queueing(max_queue=1)
    limited(stage, limit=1)
    person, _ = stage.start(source="person")
    _, refused = limited(stage, limit=1)
    assert (code(refused), person.phase) == ("too_many_at_once", Phase.QUEUED)
    stage.check()


def test_ten_thousand_random_events_leave_nothing_behind() -> None:
    """Whatever clients and servers do: answers, failures and failovers, cancels, refusals, deadlines. The counts are right at any time."""
    chance = random.Random(15)
    stage = RecordingEngine(
        [server(name, cap=cap) for name, cap in (("a", 1), ("b", 2), ("c", 2))],
        limits=Limits(request_timeout=20, first_byte_timeout=4, queue_timeout=5),
        max_queue=8,
    )
    healthy = [(route.server.id, route.health) for route in stage.table.routes.values()]
    ends: Counter[str | int | None] = Counter()
    for _ in range(10_000):
        live = [sending for sending in stage.sendings if sending.is_live]
        alive = [exchange for exchange in stage.exchanges if exchange.phase is not Phase.OVER]
        match chance.randrange(8):
            case 0 | 1 | 2:
                limited(stage, chance.choice(["script", "script", "person", "other"]), limit=3, is_bulk=chance.random() < 0.2)
            case 3 if live:
                chance.choice(live).answer()
            case 4 if live:
                chance.choice(live).answer(*chance.choice(ANSWERS))
            case 5 if live:
                chance.choice(live).fail(chance.choice([A, B, K]))
            case 6 if alive:
                leave(chance.choice(alive))
            case 7:
                stage.wait(chance.random())
                stage.table = with_health(stage.table, *chance.choice(healthy))
        stage.check()
        if len(stage.over) >= 20:
            ends.update(exchange.response.error_code or exchange.response.status for exchange in stage.over)
            stage.forget_the_dead()
    for exchange in list(stage.exchanges):
        leave(exchange)
    ends.update(exchange.response.error_code or exchange.response.status for exchange in stage.over)
    stage.check()
    assert not stage.room.at_once.total
    assert not stage.load.total
    counts = stage.room.queue.counts(MODEL)
    assert (counts.running, counts.waiting, counts.clients_waiting) == (0, 0, 0)
    assert min(ends[end] for end in (200, "too_many_at_once", "client_gone", "relayed")) > 100, ends


# Tokens


def asking(engine: RecordingEngine) -> RecordingEngine:
    engine.requests = Requests()
    return engine


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_our_own_question_is_asked_without_it(status: int) -> None:
    """The client said nothing of it: the same server gets the request as it was, as the same attempt, and is not blamed."""
    engine = asking(RecordingEngine([server("a"), server("b")]))
    exchange, client = engine.start(stream=True)
    engine.last.head(status, JSON)
    engine.last.body(b'{"error": {"message": "unknown field stream_options"}}')
    engine.last.end()
    assert (engine.tried(), client.is_silent, exchange.search.tried, engine.blamed()) == (["a", "a"], True, 1, [])
    engine.last.head(status, JSON)
    engine.last.body(b'{"error": {"message": "stream_options again"}}')
    engine.last.end()
    assert (client.status, client.ended, engine.tried()) == (status, True, ["a", "a"])
    assert engine.load.total == 0


REFUSAL = b'{"error": {"message": "unknown field stream_options"}}'


def refuse(sending: RecordingSending) -> None:
    """Answer as a server that does not know our question."""
    sending.answer(400, JSON, REFUSAL)


def test_a_large_refusal_of_our_own_question_is_not_held() -> None:
    """It is gone when the server is asked again; no attempt has failed so far."""
    stage = asking(RecordingEngine([server("a")]))
    exchange, client = stage.start(stream=True)
    stage.last.head(400, JSON)
    stage.last.body(b'{"error": {"message": "unknown field stream_options"}}' + b" " * 2 * UNCOUNTED_BYTES)
    assert exchange.response.held > 0
    stage.last.end()
    assert (exchange.response.held, stage.tried()) == (0, ["a", "a"])
    stage.last.stream(ONE)
    assert client.status == 200
    stage.check()


def test_a_refusal_is_remembered_only_of_a_server_that_takes_the_rest() -> None:
    """One that repeats what it was sent, our question too, refuses what the client wrote."""
    stage = asking(RecordingEngine([server("a")]))
    stage.start(stream=True)
    refuse(stage.last)
    refuse(stage.last)
    assert stage.usage_refusers == []
    stage.start(stream=True)
    refuse(stage.last)
    stage.last.stream(ONE)
    assert stage.usage_refusers == ["a"]
    stage.check()


@pytest.mark.parametrize("how", ["answer", "first event"])
@pytest.mark.parametrize(
    "error", [b'{"error":{"message":"extra fields are not permitted","code":400}}', b'{"error":"unexpected argument"}']
)
def test_a_server_may_refuse_our_own_question_with_status_200(how: str, error: bytes) -> None:
    """It is the same refusal: made again without the question, and nobody is blamed."""
    stage = asking(engine("a", "b"))
    exchange, client = stage.start(stream=True)
    if how == "answer":
        stage.last.answer(200, JSON, error)
    else:
        stage.last.stream(b"data: " + error + b"\n\n")
    assert (stage.tried(), client.is_silent, exchange.search.tried, stage.blamed()) == (["a", "a"], True, 1, [])
    stage.last.stream(ONE, LAST, DONE_EVENT)
    assert (client.data, stage.usage_refusers) == (ONE + LAST + DONE_EVENT, ["a"])
    stage.check()


@pytest.mark.parametrize("more", [b"", b',"timings":null', b',"timings":{"predicted_n":2}'])
def test_a_server_that_answers_our_question_with_more_is_not_asked_again(more: bytes) -> None:
    """What it says beside the token counts reaches the client, as it would have without the question."""
    stage = asking(engine("a"))
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}' + more + b"}\n\n"
    exchange, client = stage.start(stream=True)
    stage.last.stream(ONE, LAST, usage, DONE_EVENT)
    carries_more = b"predicted_n" in more
    assert client.data == ONE + LAST + (usage if carries_more else b"") + DONE_EVENT
    assert (exchange.usage, stage.usage_refusers) == ((7, 2), ["a"] if carries_more else [])
    stage.check()


@pytest.mark.parametrize("leave", [RecordingEngine.remove, RecordingEngine.change])
def test_a_server_that_left_is_not_asked_again_without_our_question(leave: Callable[[RecordingEngine, str], None]) -> None:
    """Its owner's DELETE or PUT is final: the old address gets nothing more; who is there now gets the request as it was written."""
    stage = asking(RecordingEngine([server("a"), server("b")]))
    _, client = stage.start(stream=True)
    old = stage.last.server
    leave(stage, "a")
    refuse(stage.last)
    assert len(stage.sendings) == 2
    assert stage.last.server is not old
    assert not stage.last.attempt.asks_usage
    stage.last.stream(ONE)
    assert client.status == 200
    assert stage.usage_refusers == [], "nothing is known of the new one"
    stage.check()


def test_a_retry_without_our_question_is_still_a_retry() -> None:
    """The budget of its model counts it until it ends."""
    stage = asking(RecordingEngine([server("a"), server("b")]))
    stage.start(stream=True)
    stage.last.fail(D)
    stage.wait(1)
    before = stage.load.retries_in_flight(MODEL)
    assert before == 1
    refuse(stage.last)
    assert stage.load.retries_in_flight(MODEL) == before
    stage.last.stream(ONE)
    stage.check()


@pytest.mark.parametrize("status", [400, 415, 422, 500, 501])
def test_a_server_that_refuses_in_any_words_is_asked_without_our_question(status: int) -> None:
    """Nobody is blamed before that; what it answers then counts."""
    engine = asking(RecordingEngine([server("a")]))
    _, client = engine.start(stream=True)
    engine.last.answer(status, body=b'{"error": {"message": "Extra fields are not permitted"}}')
    assert (engine.tried(), client.is_silent, engine.blamed()) == (["a", "a"], True, [])
    engine.last.answer(status, body=b'{"error": {"message": "too long"}}')
    assert len(engine.blamed()) == 1
    assert not client.is_silent


@pytest.mark.parametrize("status", [401, 404, 405, 408, 413, 429, 503])
def test_any_other_refusal_is_what_it_is(status: int) -> None:
    engine = asking(RecordingEngine([server("a")]))
    _, client = engine.start(stream=True)
    engine.last.answer(status, body=b'{"error": {"message": "no"}}')
    assert (engine.tried(), client.is_silent) == (["a"], False)


def test_a_server_that_answered_our_question_once_is_believed() -> None:
    """Its later refusals are about the request."""
    engine = asking(RecordingEngine([server("a")]))
    engine.start(stream=True)
    engine.last.stream(ONE, LAST, DONE_EVENT)
    engine.last.end()
    _, client = engine.start(stream=True)
    engine.last.answer(400, body=b'{"error": {"message": "too long"}}')
    assert (engine.tried(), client.status) == (["a", "a"], 400)


def test_the_tokens_of_an_answer_are_told_and_those_of_a_failure_are_not() -> None:
    engine = asking(RecordingEngine([server("a"), server("b")]))
    exchange, client = engine.start(stream=True)
    engine.last.head(200, EVENTS)
    engine.last.body(b'data: {"choices": [], "usage": {"prompt_tokens": 70, "completion_tokens": 20}}\n\n')
    assert exchange.usage == (0, 0)
    engine.last.fail(FailureClass.BROKEN)
    engine.wait(1)
    engine.last.head(200, EVENTS)
    engine.last.body(b'data: {"choices": [{"index": 0, "finish_reason": "stop"}]}\n\n')
    engine.last.body(b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\ndata: [DONE]\n\n')
    assert (exchange.usage, b"usage" in client.data) == ((7, 2), False)

    plain, _ = engine.start()
    engine.last.head(200, JSON)
    engine.last.body(b'{"usage": {"prompt_tokens": 5, "completion_tokens": 3}}')
    engine.last.end()
    assert plain.usage == (5, 3)


def test_the_tokens_of_a_stream_that_ends_early_are_counted() -> None:
    """Those that came, however it ended; a larger report of the server wins, and an answer that is no stream has none."""
    for end in ("canceled", "broken"):
        engine = RecordingEngine([server("a")])
        exchange, _ = engine.start(stream=True)
        engine.last.stream(ONE, ONE)
        assert exchange.usage == (0, 0)
        leave(exchange) if end == "canceled" else engine.last.fail(FailureClass.BROKEN)
        assert (exchange.usage, exchange.response.is_canceled) == ((0, 2), end == "canceled")

    engine = RecordingEngine([server("a")])
    reporting, _ = engine.start(stream=True)
    engine.last.stream(ONE.replace(b'"choices"', b'"usage":{"prompt_tokens":7,"completion_tokens":9},"choices"'))
    leave(reporting)
    assert reporting.usage == (7, 9)

    engine = RecordingEngine([server("a")])
    plain, _ = engine.start(path="/v1/embeddings")
    engine.last.head(200, JSON)
    engine.last.body(b'{"data": [' + b"0.5," * 500_000)
    leave(plain)
    assert (plain.response.is_committed, plain.usage, plain.response.is_canceled) == (True, (0, 0), True)


# Why


def test_who_asks_learns_why() -> None:
    """In a header of the answer, one reason for each attempt; what only the log wants is not shown."""
    engine = RecordingEngine([server("a"), server("b")])
    for shows in (True, False):
        exchange, client = engine.begin(explains=shows)
        exchange.choice_trace = []
        exchange.start()
        engine.last.fail(FailureClass.CONNECT)
        engine.wait(1)
        engine.last.head(200, JSON)
        engine.last.body(b"{}")
        engine.last.end()
        assert exchange.choice_trace == [{"server": name} for name in engine.tried()[-2:]]
        assert (b"x-multiverse-why" in client.headers) is shows


def test_a_raw_answer_waits_for_its_client_as_long_as_a_stream_may_last() -> None:
    """Not for the time that a server may be silent: it is not read."""
    stage = engine("a", limits=Limits(idle_timeout=60, max_stream_seconds=1000))
    exchange, client = stage.start(RecordingClient(high_water=1), path=SPEECH)
    stage.last.head(200, {b"content-type": b"audio/mpeg"})
    stage.last.body(b"xx", b"xx")
    assert (stage.last.paused, exchange.due) == (True, exchange.deadline)
    stage.wait(500)
    assert not client.is_finished
    exchange.client_drained()
    assert (stage.last.paused, exchange.due) == (False, stage.clock + 60)
    stage.check()


def test_a_raw_answer_of_which_only_the_head_came_has_the_time_of_a_first_byte() -> None:
    """A head alone is no part of the answer: the server gets what a long prompt may take, not what a silence may."""
    stage = engine("a", limits=Limits(first_byte_timeout=10, idle_timeout=1))
    exchange, client = stage.start(path=SPEECH)
    stage.last.head(200, {b"content-type": b"audio/mpeg"})
    stage.wait(10)
    assert (len(stage.checks.asked), exchange.due, client.is_silent) == (1, exchange.deadline, True)
    stage.check()


# A kept connection that died unanswered


def stale(stage: RecordingEngine) -> None:
    """End the newest attempt as the wire ends one on a connection that the server had closed."""
    stage.last.over = True
    stage.last.attempt.failed(Failure(B, "stale", is_stale=True))


def test_a_request_whose_kept_connection_died_goes_to_the_same_server_on_a_new_one() -> None:
    """It counts as an attempt, blames nobody, and is the only second attempt on one server (S5)."""
    stage = engine("a", "b")
    exchange, client = stage.start()
    assert not stage.last.attempt.is_replay
    stale(stage)
    stage.check()
    assert (stage.tried(), stage.last.attempt.is_replay, exchange.search.tried) == (["a", "a"], True, 2)
    assert stage.health("a") == fresh(1, now=1000.0, wall=1000.0, policy=stage.health_book.policy)
    stage.last.answer()
    assert (client.status, client.headers[b"x-multiverse-attempts"], client.headers[b"x-gateway-server-id"]) == (200, b"2", b"a")
    assert stage.load.latency(stage.servers[0].id) == 0
    stage.check()


def test_a_request_that_kills_servers_gets_three_attempts_in_all() -> None:
    """S5: whatever connections it went out on."""
    stage = engine("a", "b", "c")
    _, client = stage.start()
    stale(stage)
    stage.last.fail(B)
    stage.wait(0.1)
    assert (stage.tried(), stage.last.attempt.is_replay) == (["a", "a", "b"], False)
    stale(stage)
    assert (client.status, stage.tried()) == (504, ["a", "a", "b"])
    assert client.headers[b"x-multiverse-attempts"] == b"3"
    stage.check()


def test_a_stateful_request_is_not_sent_again_after_its_connection_died() -> None:
    """Nobody knows whether the server had begun."""
    stage = engine("a", "b")
    _, client = stage.start(stateful=True)
    stale(stage)
    assert (client.status, stage.tried()) == (504, ["a"])
    stage.check()


@pytest.mark.parametrize("change", [RecordingEngine.remove, RecordingEngine.change])
def test_a_server_that_left_gets_no_replay(change: Callable[[RecordingEngine, str], None]) -> None:
    stage = engine("a", "b")
    stage.start()
    change(stage, "a")
    stale(stage)
    assert stage.tried() == ["a", "b"]
    stage.check()


def test_a_replay_respects_the_cap() -> None:
    """The slot went to the request that waited for it."""
    stage = RecordingEngine([server("a", cap=1), server("b")])
    stage.start()
    stage.load.started(stage.servers[0].id, MODEL)
    stale(stage)
    assert stage.tried() == ["a", "b"]


# Turns


def is_paused(stage: RecordingEngine) -> bool:
    return stage.last.paused


FLOOD = b"data: {}\n\n" * 3 * EVENTS_PER_CALL


@pytest.mark.parametrize("ending", ["end", "fail", "more"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_flood_of_events_is_handled_in_turns(ending: str, begun: bool) -> None:
    """At most 64 events at a time (S7); the server is read again when all are handled, and its end is taken then."""
    stage = engine("a")
    exchange, client = stage.start(stream=True)
    stage.last.stream(*([ONE] if begun else []))
    stage.last.body(FLOOD + LAST)
    assert exchange.events == EVENTS_PER_CALL + begun
    assert is_paused(stage)
    if ending == "end":
        stage.last.end()
    elif ending == "fail":
        stage.last.fail(B)
    for turn in (2, 3):
        stage.turn()
        assert (exchange.events, exchange.phase) == (turn * EVENTS_PER_CALL + begun, Phase.RELAYING)
    stage.turn()
    assert client.data.startswith((ONE if begun else b"") + FLOOD + LAST)
    if ending == "more":
        assert not is_paused(stage)
        stage.last.body(DONE_EVENT)
    assert (client.ended, client.was_cut) == ((False, True) if ending == "fail" else (True, False))
    assert exchange.events == 3 * EVENTS_PER_CALL + begun + 1 + (ending == "more")
    stage.turn()


def test_blank_events_before_the_first_event_take_turns_too() -> None:
    """And a failure after them is retried, as if they had come one by one."""
    stage = engine("a", "b")
    _, client = stage.start(stream=True)
    stage.last.stream(b"event: x\n\n" * 3 * EVENTS_PER_CALL)
    assert is_paused(stage)
    stage.last.fail(B)
    for _ in range(3):
        stage.turn()
    stage.wait(0.1)
    stage.last.stream(ONE, LAST, DONE_EVENT)
    assert (stage.tried(), client.data) == (["a", "b"], ONE + LAST + DONE_EVENT)


@pytest.mark.parametrize("how", ["leave", "shutdown", "clogged"])
def test_turns_end_with_their_request(how: str) -> None:
    """A client that is gone or does not read gets no further events."""
    stage = engine("a")
    exchange, client = stage.start(stream=True)
    stage.last.stream(ONE, FLOOD)
    if how == "leave":
        leave(exchange)
    elif how == "shutdown":
        exchange.interrupt()
    else:
        exchange.client_clogged()
    sent = client.data
    stage.turn()
    assert client.data == sent
    if how == "clogged":
        exchange.client_drained()
        for _ in range(3):
            stage.turn()
        assert client.data == ONE + FLOOD
        assert not is_paused(stage)
    stage.check()


def test_a_client_may_be_clogged_by_the_last_turn() -> None:
    """Then the server is read again only when the client has read."""
    stage = engine("a")
    exchange, client = stage.start(RecordingClient(high_water=len(ONE + FLOOD) - 20), stream=True)
    stage.last.stream(ONE, FLOOD)
    for _ in range(2):
        stage.turn()
    assert client.data == ONE + FLOOD
    assert is_paused(stage)
    exchange.client_drained()
    assert not is_paused(stage)
    stage.check()


@pytest.mark.parametrize("noise", [b"\n\n", b"\r\r", b": x\n\n"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_server_that_sends_noise_is_read_less_often(noise: bytes, begun: bool) -> None:
    """S7: blank lines and comments as fast as they come take nobody's time; an event after them is relayed at once."""
    stage = engine("a")
    _, client = stage.start(stream=True)
    stage.last.stream(*([ONE] if begun else []))
    flood = noise * (NOISE_BYTES // len(noise) + 1)
    for _ in range(2):
        stage.last.body(flood)
        while stage.calls:
            stage.turn()
    assert is_paused(stage)
    stage.wait(NOISE_SECONDS)
    assert not is_paused(stage)
    stage.last.body(TWO)
    assert client.data.endswith(TWO)
    assert not is_paused(stage)
    stage.check()


@pytest.mark.parametrize("how", ["leave", "clogged", "end"])
def test_a_pause_for_noise_ends_with_its_request(how: str) -> None:
    """The server is read again only where somebody reads its answer."""
    stage = engine("a")
    exchange, _ = stage.start(stream=True)
    stage.last.stream(ONE)
    for _ in range(2):
        stage.last.body(b": x\n\n" * NOISE_BYTES)
    if how == "leave":
        leave(exchange)
    elif how == "clogged":
        exchange.client_clogged()
    else:
        stage.last.end()
    stage.wait(NOISE_SECONDS)
    assert how == "end" or is_paused(stage)
    stage.check()


# The budget of all answers


BIG = b'{"text":"' + b"x" * (3 * UNCOUNTED_BYTES) + b'"}'


def test_a_large_answer_counts_until_its_client_has_it() -> None:
    """S6: held while it comes, and while the door could not write it yet; small ones are not counted."""
    stage = engine("a")
    exchange, client = stage.start(RecordingClient(is_slow=True))
    stage.last.head()
    stage.last.body(BIG[:UNCOUNTED_BYTES])
    assert exchange.response.held == 0
    stage.last.body(BIG[UNCOUNTED_BYTES:])
    stage.last.end()
    assert (client.data, exchange.phase, exchange.response.held, stage.answer_bytes) == (BIG, Phase.OVER, len(BIG), len(BIG))
    stage.check()
    exchange.taken()
    exchange.taken()
    assert stage.answer_bytes == 0
    stage.check()


def test_an_answer_beyond_the_budget_is_refused_and_blames_nobody() -> None:
    """The client may come again; the other answers stay."""
    stage = engine("a", "b", answer_budget=len(BIG) + 10)
    _, first = stage.start(RecordingClient(is_slow=True))
    stage.last.answer(body=BIG)
    exchange, second = stage.start()
    stage.last.head()
    stage.last.body(BIG)
    assert (first.data, second.status, code(second)) == (BIG, 503, "overloaded")
    assert b"retry-after" in second.headers
    assert (stage.blamed(), exchange.response.held, stage.answer_bytes) == ([], 0, len(BIG))
    stage.check()


@pytest.mark.parametrize("how", ["client", "shutdown", "failure", "nonsense", "answer"])
def test_whatever_ends_a_large_answer_gives_its_bytes_back(how: str) -> None:
    stage = engine("a", "b")
    exchange, client = stage.start()
    stage.last.head()
    stage.last.body(BIG)
    assert stage.answer_bytes == len(BIG)
    if how == "client":
        leave(exchange)
        client.gone = True
    elif how == "shutdown":
        exchange.interrupt()
    elif how == "answer":
        stage.last.end()
    else:
        if how == "failure":
            stage.last.fail(B)
        else:
            stage.last.body(b"{")
            stage.last.end()
        stage.wait(0.1)
        assert (stage.tried(), stage.answer_bytes) == (["a", "b"], 0)
        stage.last.answer()
    assert stage.answer_bytes == 0
    stage.check()


def test_a_large_refusal_counts_until_another_attempt_replaces_it() -> None:
    """Only the last one can reach the client."""
    stage = engine("a", "b")
    exchange, client = stage.start()
    body = error_body("x" * 2 * UNCOUNTED_BYTES)
    stage.last.answer(404, body=body)
    assert stage.answer_bytes == len(body)
    stage.wait(0.1)
    assert (stage.answer_bytes, exchange.search.failures[0].failure.body) == (0, b"")
    stage.last.answer(404, body=body)
    assert (client.data, stage.answer_bytes) == (body, 0)
    stage.check()


def test_an_unfinished_event_counts_once_it_is_large() -> None:
    """A thousand streams with an event that does not end may hold no more than all answers."""
    stage = engine("a", answer_budget=200_000)
    exchange, client = stage.start(stream=True)
    stage.last.stream(ONE, b'data: {"choices":[],"x":"' + b"x" * 100_000)
    assert stage.answer_bytes > 100_000
    stage.last.body(b'"}\n\n')
    assert stage.answer_bytes == 0
    stage.last.body(b'data: {"choices":[],"x":"' + b"x" * 60_000)
    stage.last.body(b"x" * 60_000)
    stage.last.body(b"x" * 90_000)
    assert client.was_cut
    assert exchange.response.error_code == "overloaded"
    assert (stage.answer_bytes, stage.blamed()) == (0, [])
    stage.check()


# A pause of the process


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.TRYING, Phase.BACKOFF, Phase.RELAYING])
def test_a_pause_of_the_process_moves_every_deadline(phase: Phase) -> None:
    """S9: what lies in the sockets is read before anything times out."""
    stage, exchange, client = in_phase(phase)
    due, deadline = exchange.due, exchange.deadline
    stage.clock += 5.0
    exchange.postpone(5.0)
    assert (exchange.due, exchange.deadline) == (due + 5.0, deadline + 5.0)
    stage.wait(0.0)
    assert exchange.phase is phase
    stage.wait(10_000.0)
    assert exchange.phase is not phase
    assert client.is_finished or phase is not Phase.RELAYING


def test_a_server_that_is_lost_during_a_pause_is_replaced() -> None:
    """The pause was longer than the request's deadline, and nothing was swept yet."""
    stage = engine("a", "b")
    exchange, client = stage.start()
    stage.clock += 10_000.0
    stage.stopped = 10_000.0
    stage.last.fail(FailureClass.CONNECT)
    stage.wait(1.0)
    assert (exchange.phase, client.is_silent, len(exchange.search.failures)) == (Phase.TRYING, True, 1)


def test_a_wait_for_the_retry_budget_is_moved_too() -> None:
    stage = engine("a", "b")
    for _ in range(3):
        stage.load.retry_started(MODEL)
    exchange, client = stage.start()
    stage.last.answer(500)
    stage.clock += 100.0
    exchange.postpone(100.0)
    stage.wait(0.25)
    assert exchange.phase is Phase.BACKOFF
    assert client.is_silent


# Stored responses


RESPONSES = "/v1/responses"


def look_up(method: str = "GET", rest: str = "", query: bytes = b"") -> Envelope:
    found = lookup_of(method, f"{RESPONSES}/resp_1{rest}", query)
    assert found is not None
    return found


@pytest.mark.parametrize("fields", [{"path": RESPONSES, "stateful": True, "response_id": "resp_1"}, {"asked": look_up()}], ids=str)
def test_a_request_for_a_stored_response_goes_to_the_server_that_has_it(fields: dict[str, Any]) -> None:
    """Nothing is sent before the gateway knows which that is, and no other server is tried when it fails."""
    stage = engine("a", "b")
    exchange, client = stage.start(**fields)
    assert (stage.responses.locating, stage.tried(), exchange.phase) == ([exchange], [], Phase.CHOOSING)
    exchange.located(stage.servers[1])
    assert stage.tried() == ["b"]
    stage.last.answer(503)
    assert (client.status, code(client), stage.tried()) == (503, "no_healthy_server", ["b"])
    stage.check()


def test_a_cancel_waits_for_nobody() -> None:
    """A look-up needs no slot: it goes on though its client holds one, others are about, and requests wait."""
    stage = queueing()
    stage.room.queue.serve(pools_of(stage.table))
    stage.start(source="other")
    for _ in range(2):
        exchange, _ = stage.start(asked=look_up("POST", "/cancel"), source="one")
        exchange.located(stage.servers[0])
        assert exchange.phase is Phase.TRYING
    stage.start(source="one")
    assert stage.room.queue.lengths() == {MODEL: 1}
    exchange, client = stage.start(asked=look_up("POST", "/cancel"), source="one")
    exchange.located(stage.servers[0])
    stage.last.answer()
    assert client.status == 200
    assert stage.room.queue.lengths() == {MODEL: 1}


@pytest.mark.parametrize("status", [400, 404])
def test_the_servers_own_refusal_of_a_response_is_relayed(status: int) -> None:
    stage = engine("a", "b")
    exchange, client = stage.start(asked=look_up())
    exchange.located(stage.servers[0])
    stage.last.answer(status, body=error_body("gone"))
    assert (client.status, client.data, stage.tried()) == (status, error_body("gone"), ["a"])
    assert [kind for _, kind in stage.blamed()] == [FailureClass.CLIENT_ERROR]
    stage.check()


def test_an_unknown_response_is_refused() -> None:
    """With the gateway's own error, which clients do not repeat."""
    stage = engine("a")
    exchange, client = stage.start(asked=look_up())
    exchange.not_located(response_not_found())
    assert (client.status, code(client), client.headers[b"x-should-retry"]) == (404, "response_not_found", b"false")
    assert not stage.tried()
    stage.check()


def test_a_client_that_left_meanwhile_is_forgotten() -> None:
    """What the look-up finds is of no use any more."""
    for found in (True, False):
        stage = engine("a")
        exchange, client = stage.start(asked=look_up())
        client.gone = True
        exchange.client_gone()
        if found:
            exchange.located(stage.servers[0])
        else:
            exchange.not_located(response_not_found())
        assert (client.is_silent, stage.tried(), exchange.response.status) == (True, [], 499)
        stage.check()


def test_looking_for_a_response_ends_with_the_deadline() -> None:
    stage = engine("a")
    _, client = stage.start(asked=look_up())
    stage.wait(300)
    assert (client.status, code(client)) == (504, "upstream_timeout")


@pytest.mark.parametrize("change", [RecordingEngine.remove, RecordingEngine.change])
def test_a_server_that_leaves_before_its_turn_takes_the_response_with_it(change: Callable[[RecordingEngine, str], None]) -> None:
    """A request that waits for its slot gets the same answer as for an unknown response."""
    stage = RecordingEngine([server("a", cap=1), server("b", cap=1)])
    stage.start()
    exchange, client = stage.start(path=RESPONSES, stateful=True, response_id="resp_1")
    exchange.located(stage.servers[0])
    assert exchange.phase is Phase.QUEUED
    change(stage, "a")
    exchange.search.turn()
    assert (client.status, code(client)) == (404, "response_not_found")


def test_a_request_that_waits_for_its_own_server_holds_up_no_other() -> None:
    """Another server's slot is of no use to it."""
    stage = RecordingEngine([server("a", cap=1), server("b", cap=1)])
    stage.start()
    stage.start()
    busy = stage.sendings[1]
    bound, _ = stage.start(path=RESPONSES, stateful=True, response_id="resp_1")
    bound.located(stage.servers[0])
    other, _ = stage.start()
    assert (bound.phase, other.phase) == (Phase.QUEUED, Phase.QUEUED)
    busy.answer()
    assert (bound.phase, other.phase, stage.tried()) == (Phase.QUEUED, Phase.TRYING, ["a", "b", "b"])


def test_a_look_up_needs_no_slot() -> None:
    """It can end the request that has the only one."""
    stage = RecordingEngine([server("a")])
    stage.table = build_table(1, [server("a", cap=1)], {ServerId("a"): stage.health("a")})
    stage.start()
    exchange, _ = stage.start(asked=look_up("POST", "/cancel"))
    exchange.located(stage.table.routes[ServerId("a")].server)
    assert stage.tried() == ["a", "a"]


@pytest.mark.parametrize("state", [HealthState.UNHEALTHY, HealthState.DEACTIVATED])
def test_a_server_that_is_down_has_its_responses_still(state: HealthState) -> None:
    """503 with the time to wait: the client asks again, and no other server is asked."""
    stage = engine("a", "b")
    stage.set_health("a", state=state, next_probe=NextProbe(at=1007.0))
    exchange, client = stage.start(asked=look_up())
    exchange.located(stage.servers[0])
    assert (client.status, code(client), client.headers[b"retry-after"]) == (503, "no_healthy_server", b"7")
    assert b"stored response" in client.data
    assert not stage.tried()


def test_a_look_up_tells_nothing_about_speed_or_use() -> None:
    """Its tokens were counted when the response was made, and it takes no time that could be compared."""
    stage = engine("a")
    exchange, client = stage.start(asked=look_up())
    exchange.located(stage.servers[0])
    stage.clock += 3
    stage.last.answer(body=b'{"id":"resp_1","usage":{"input_tokens":7,"output_tokens":5}}')
    assert (client.status, exchange.usage, stage.load.latency(ServerId("a"))) == (200, (0, 0), None)
    assert not stage.responses.stored
    exchange, _ = stage.start(asked=look_up())
    exchange.located(stage.servers[0])
    stage.last.answer(405)
    assert not [path for path, _ in stage.health("a").unsupported if "resp_1" in path]


def test_a_look_up_may_be_streamed() -> None:
    """With one `cache-control`, which the front adds to every look-up."""
    stage = engine("a")
    exchange, client = stage.start(asked=look_up(query=b"stream=true"))
    exchange.located(stage.servers[0])
    stage.last.stream(*responses_events("a", MODEL))
    assert client.ended
    assert b"cache-control" not in client.headers


@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_the_id_of_a_response_is_remembered_before_the_client_can_use_it(stateful: bool, stream: bool) -> None:
    """Unless the response is not stored. A stream tells its id once, with its first event."""
    stage = engine("a")
    _, client = stage.start(path=RESPONSES, stateful=stateful, stream=stream)
    if stream:
        events = responses_events("a", MODEL)
        stage.last.stream(events[0])
        assert stage.responses.stored == [("a", "resp_a")] * stateful
        stage.last.body(*events[1:])
    else:
        stage.last.answer(body=b'{"id":"resp_a"}')
    assert client.ended
    assert stage.responses.stored == [("a", "resp_a")] * stateful


@pytest.mark.parametrize("body", [b"{}", b'{"id":7}', b'{"id":""}', b'{"id":"%b"}' % (b"x" * 2000), b"[]"])
def test_an_answer_without_a_usable_id_is_relayed_all_the_same(body: bytes) -> None:
    stage = engine("a")
    _, client = stage.start(path=RESPONSES, stateful=True)
    stage.last.answer(body=body)
    assert (client.status, client.data, stage.responses.stored) == (200, body, [])


# Comments while a stream waits


def commented(stage: RecordingEngine, **fields: Any) -> tuple[Exchange, RecordingClient]:
    """Start a stream whose client wants to be told where it stands."""
    return stage.start(stream=True, wants_comments=True, **fields)


def place(position: int, waiting: int, about: int | None = None) -> bytes:
    return b': queue {"position":%d,"waiting":%d,"about_seconds":%b}\n' % (position, waiting, b"null" if about is None else b"%d" % about)


FIRST_TRY = b': prefill {"attempt":1}\n'
SECOND_TRY = b': prefill {"attempt":2}\n'


def refusal(client: RecordingClient) -> dict[str, Any]:
    """Return the error that ended a stream of nothing but comments; the connection stays usable, because nothing is missing."""
    assert (client.status, client.was_cut, client.data) == (200, False, b"".join(client.comments) + client.relayed)
    assert client.relayed.startswith(b"data: ")
    assert client.relayed.endswith(b"}\n\n")
    error = json.loads(client.relayed[6:])["error"]
    assert isinstance(error, dict)
    return error


def test_a_waiting_stream_tells_its_place() -> None:
    """After a second, at each change, and then again within 15 s; the answer follows, after what the head could not say."""
    stage = queueing()
    stage.start()
    stage.start()
    exchange, client = commented(stage)
    stage.wait(0.75)
    assert client.is_silent
    stage.wait(0.25)
    assert (client.status, client.data) == (200, place(2, 2))
    assert client.headers == {b"content-type": b"text/event-stream", b"cache-control": b"no-store", b"x-accel-buffering": b"no"}
    stage.wait_on(13)
    stage.check()
    assert client.comments == [place(2, 2)]
    stage.wait_on(2)
    assert client.comments == [place(2, 2)] * 2
    stage.sendings[0].answer()
    stage.wait_on(1)
    assert client.comments[2:] == [place(1, 1)]
    stage.last.answer()
    assert exchange.phase is Phase.TRYING
    stage.wait_on(1)
    assert client.comments[3:] == [FIRST_TRY]
    stage.last.stream(ONE, LAST, DONE_EVENT)
    told = json.loads(client.comments[4].removeprefix(b": headers "))
    assert told == {"x-multiverse-attempts": "1", "x-gateway-server-id": "a", "x-multiverse-server": "a", "x-multiverse-queued-ms": "17000"}
    assert (client.relayed, client.ended) == (ONE + LAST + DONE_EVENT, True)
    assert client.data.endswith(client.comments[4] + client.relayed), "no comment after the first event"
    stage.wait_on(20)
    assert (exchange.response.status, exchange.response.error_code, exchange.events, len(client.comments)) == (200, None, 3, 5)
    stage.check()


def test_changes_are_told_once_a_second() -> None:
    """Positions that nobody saw are left out."""
    stage = queueing()
    for _ in range(4):
        stage.start()
    _, client = commented(stage)
    stage.wait_on(1)
    for _ in range(3):
        stage.last.answer()
        stage.wait(0.25)
    assert client.comments == [place(4, 4)]
    stage.wait(0.25)
    assert client.comments == [place(4, 4), place(1, 1)]


def test_a_waiting_stream_tells_about_how_long_it_takes() -> None:
    stage = queueing()
    stage.room.queue.serve(pools_of(stage.table))
    stage.start()
    stage.room.queue.learn(MODEL, seconds=12.0, output_tokens=100.0)
    _, client = commented(stage)
    stage.wait_on(1)
    assert client.comments == [place(1, 1, 20)]


def test_a_stream_that_begins_within_a_second_has_no_comments() -> None:
    """The head is that of any other stream."""
    stage = engine("a")
    _, client = commented(stage)
    stage.wait_on(0.75)
    stage.last.stream(ONE, LAST, DONE_EVENT)
    assert (client.data, client.headers[b"x-multiverse-attempts"]) == (ONE + LAST + DONE_EVENT, b"1")


def test_a_slow_prefill_is_commented() -> None:
    """Semantics 6: a server's own comments before its first event are dropped, and the gateway's take their place."""
    stage = engine("a")
    _, client = commented(stage)
    stage.last.stream(PING)
    stage.wait_on(1)
    assert client.comments == [FIRST_TRY]
    stage.last.body(PING)
    stage.wait_on(31)
    assert client.comments == [FIRST_TRY] * 3
    stage.last.body(ONE, TWO, PING, LAST, DONE_EVENT)
    assert client.relayed == ONE + TWO + PING + LAST + DONE_EVENT


@pytest.mark.parametrize("wants_comments", [True, False])
def test_nothing_changes_for_other_requests(wants_comments: bool) -> None:
    """A plain answer has no comments, whatever its client asks for; a stream has them only if it does."""
    stage = queueing()
    stage.start()
    _, client = stage.start(stream=not wants_comments, wants_comments=wants_comments)
    stage.wait_on(20)
    assert client.is_silent
    stage.sendings[0].answer()
    stage.wait_on(20)
    assert client.is_silent


def test_failover_goes_on_after_a_comment() -> None:
    """The commit point is the first event: another server takes over, also after a server that refuses the added field."""
    stage = asking(engine("a", "b"))
    exchange, client = commented(stage)
    stage.wait_on(2)
    refuse(stage.last)
    stage.last.head(500)
    stage.last.end()
    stage.wait_on(1)
    assert client.comments == [FIRST_TRY, SECOND_TRY]
    assert exchange.phase is Phase.TRYING
    stage.last.stream(ONE, LAST, DONE_EVENT)
    assert json.loads(client.comments[2].removeprefix(b": headers "))["x-multiverse-attempts"] == "2"
    assert (client.relayed, client.status, exchange.response.status) == (ONE + LAST + DONE_EVENT, 200, 200)
    stage.check()


def test_a_refusal_after_a_comment_is_an_event() -> None:
    """The queue's timeout, no usable server, a server's own refusal, every attempt failed, the deadline, a shutdown: without `[DONE]`."""
    stage = queueing(limits=Limits(queue_timeout=10))
    stage.start()
    exchange, client = commented(stage)
    stage.wait_on(10)
    error = refusal(client)
    assert (error["code"], error["type"], error["param"]) == ("overloaded", "service_unavailable_error", None)
    assert (exchange.response.status, exchange.response.error_code, exchange.search.actual_cost()) == (200, "overloaded", 0.0)
    stage.check()

    stage = queueing()
    stage.start()
    _, client = commented(stage)
    stage.wait_on(1)
    stage.remove("a")
    stage.wait_on(1)
    assert (refusal(client)["code"], refusal(client)["param"]) == ("model_not_found", "model")
    stage.check()

    stage = engine("a")
    exchange, client = commented(stage)
    stage.wait_on(1)
    stage.last.answer(400, body=b'{"error":{"message":"too long","type":"invalid_request_error","n_ctx":4096}}')
    assert refusal(client) == {"message": "too long", "type": "invalid_request_error", "param": None, "code": None, "n_ctx": 4096}
    assert (exchange.response.status, exchange.response.error_code) == (200, "relayed")
    stage.check()

    stage = engine("a")
    _, client = commented(stage)
    stage.wait_on(1)
    stage.last.fail(B)
    assert refusal(client)["code"] == "upstream_timeout"
    stage.check()

    stage = engine("a", limits=Limits(request_timeout=20))
    _, client = commented(stage)
    stage.wait_on(20)
    assert refusal(client)["code"] == "upstream_timeout"
    stage.check()

    for stage in (queueing(), engine("a")):
        stage.start()
        exchange, client = commented(stage)
        stage.wait_on(2)
        exchange.interrupt()
        assert refusal(client)["code"] == "gateway_shutting_down"
        stage.check()


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_refusal_has_the_form_of_its_dialect(path: str) -> None:
    stage = engine("a")
    exchange, client = commented(stage, path=path)
    stage.wait_on(1)
    exchange.interrupt()
    name, data = client.relayed.split(b"\n", 1)
    event = json.loads(data[6:])
    assert (name, event["type"]) == (b"event: error", "error")
    assert event["error"]["message"] == "The gateway is shutting down. Send the request again in a moment."


def test_a_request_that_is_dropped_is_told_in_its_stream() -> None:
    stage = queueing(max_queue=2)
    stage.start(source="script")
    stage.start(source="script")
    _, client = commented(stage, source="script")
    stage.wait_on(1)
    stage.start(source="person")
    assert refusal(client)["code"] == "overloaded"
    stage.check()


@pytest.mark.parametrize("waits", [True, False])
def test_a_client_that_leaves_gets_no_further_comment(waits: bool) -> None:
    stage = queueing() if waits else engine("a")
    stage.start()
    exchange, client = commented(stage)
    stage.wait_on(1)
    leave(exchange)
    before = client.comments
    stage.wait_on(20)
    assert (client.comments, exchange.response.status, exchange.response.error_code) == (before, 499, "client_gone")
    stage.check()


def test_comments_wait_for_a_client_that_does_not_read() -> None:
    """Nothing is buffered for it; its server is read only once it has taken the comments."""
    stage = queueing()
    stage.start()
    exchange, client = commented(stage)
    stage.wait_on(1)
    exchange.client_clogged()
    stage.wait_on(40)
    assert len(client.comments) == 1
    exchange.client_drained()
    stage.wait_on(0.25)
    assert len(client.comments) == 2
    exchange.client_clogged()
    stage.sendings[0].answer()
    stage.last.stream(ONE)
    assert (stage.last.paused, exchange.due) == (True, exchange.deadline)
    stage.wait(500)
    exchange.client_drained()
    assert not stage.last.paused
    stage.last.body(LAST, DONE_EVENT)
    assert (client.relayed, client.ended) == (ONE + LAST + DONE_EVENT, True)
    stage.check()


def test_a_stored_response_that_is_looked_up_has_no_place_yet() -> None:
    """While its server is being found there is nothing to tell; after that there is."""
    stage = engine("a")
    asked = lookup_of("GET", "/v1/responses/resp_1", b"stream=true")
    assert asked is not None
    exchange, client = commented(stage, asked=asked)
    stage.wait_on(2)
    assert client.is_silent
    exchange.located(stage.servers[0])
    stage.wait_on(1)
    assert (client.comments, client.headers) == (
        [FIRST_TRY],
        {b"content-type": b"text/event-stream", b"x-accel-buffering": b"no"},
    )


@pytest.mark.parametrize("seconds", [1.0, 1.2, 2.5, 7.4, 59.01])
def test_no_error_asks_a_client_to_return_before_its_retry_after(seconds: float) -> None:
    """What people read and what libraries read is the same whole number."""
    chat = envelope()
    bound = attrs.evolve(chat, server_id=ServerId("a"))
    refusals = [
        no_slot("tiny", None, waiting=1, seconds=seconds),
        no_usable_server(chat, Candidates(returns_in=seconds)),
        no_usable_server(bound, Candidates(returns_in=seconds)),
        *(no_usable_server(chat, Candidates(returns_in=seconds, busy=status)) for status in (429, 503, 529)),
    ]
    for refusal in refusals:
        assert f"in {dict(refusal.headers())[b'retry-after'].decode()} s" in refusal.message
