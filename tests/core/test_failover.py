"""What an answer means, whether another attempt follows, and what the client sees."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from attrs import evolve
from hypothesis import example, given
from hypothesis import strategies as st

from multiverse_gateway.core.errors import (
    BackendBusy,
    BackendOverloaded,
    GatewayError,
    NoHealthyServer,
    Overloaded,
    UpstreamAuthFailed,
    UpstreamBadResponse,
    UpstreamTimeout,
)
from multiverse_gateway.core.failover import (
    FailedAttempt,
    Failure,
    FailureClass,
    GiveUp,
    Retry,
    RetryPolicy,
    after_failure,
    classify,
    classify_report,
    final_error,
    parse_retry_after,
)
from multiverse_gateway.core.servers import ServerId
from support.answers import model_not_found

JSON = b"application/json"
KINDS = st.sampled_from(list(FailureClass))
RELAYED = {FailureClass.NO_MODEL, FailureClass.UNSUPPORTED, FailureClass.CLIENT_ERROR}
FINAL = {FailureClass.CLIENT_ERROR, FailureClass.LOCAL}


def judge(
    status: int,
    body: bytes | None = b"",
    *,
    stream: bool = False,
    checks_json: bool = True,
    **headers: bytes,
) -> Failure | None:
    named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return classify(status, named, body, stream=stream, checks_json=checks_json, now_wall=1_000_000.0)


def kind_of(failure: Failure | None) -> FailureClass | None:
    return None if failure is None else failure.kind


def failed(*kinds: FailureClass, status: int | None = None, retry_after: float | None = None, body: bytes = b"{}") -> list[FailedAttempt]:
    return [
        FailedAttempt(ServerId(f"server-{number}"), Failure(kind, "words", status, retry_after=retry_after, body=body))
        for number, kind in enumerate(kinds)
    ]


def decide(
    attempts: Sequence[FailedAttempt],
    *,
    others: int = 3,
    policy: RetryPolicy = RetryPolicy(),  # noqa: B008  # a value
    remaining: float = 300.0,
    stateful: bool = False,
    budget_left: bool = True,
    random: float = 0.5,
) -> Retry | GiveUp:
    return after_failure(
        attempts, others=others, policy=policy, remaining=remaining, stateful=stateful, budget_left=budget_left, random=random
    )


# What an answer means


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (500, "D"), (502, "D"), (504, "D"), (507, "D"), (521, "D"), (599, "D"),
        (503, "E"), (429, "E"), (529, "E"),
        (404, "G"), (405, "G"), (501, "G"),
        (401, "H"), (403, "H"),
        (408, "I"), (425, "I"),
        (400, "J"), (402, "J"), (409, "J"), (413, "J"), (415, "J"), (422, "J"), (451, "J"), (499, "J"),
        (100, "K"), (101, "K"), (199, "K"), (204, "K"), (206, "K"), (301, "K"), (304, "K"), (307, "K"), (505, "K"), (600, "K"), (999, "K"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("checks_json", [False, True])
def test_each_status_has_its_class(status: int, kind: str, stream: bool, checks_json: bool) -> None:
    """The table of semantics.md, F06, F08, F10, F13, F17; X05: a status of 999 is nonsense."""
    failure = judge(status, b'{"error": {"message": "no"}}', stream=stream, checks_json=checks_json, content_type=JSON)
    assert failure is not None
    assert failure.kind == kind
    assert failure.status == status
    assert failure.reason


@pytest.mark.parametrize(
    ("status", "content_type", "stream", "checks_json", "good"),
    [
        (200, b"application/json", False, True, True),
        (200, b"application/json; charset=utf-8", False, True, True),
        (200, b"Application/JSON", False, True, True),
        (200, b"application/problem+json", False, True, True),
        (200, b"", False, True, True),  # its body is checked
        (200, b"text/plain", False, True, False),
        (200, b"text/event-stream", False, True, False),
        (200, b"text/html", False, True, False),
        (201, b"application/json", False, True, False),
        (200, b"text/event-stream", True, True, True),
        (200, b"text/event-stream; charset=utf-8", True, True, True),
        (200, b"application/json", True, True, False),
        (200, b"", True, True, False),
        (200, b"text/html", True, True, False),
        (200, b"audio/mpeg", False, False, True),
        (200, b"audio/mpeg", True, False, True),
        (201, b"application/json", False, False, True),
        (202, b"application/json", False, False, True),
        (203, b"application/json", False, False, False),
        (200, b"application/json", True, False, False),
        (200, b"text/event-stream", True, False, True),
        (200, b"text/html; charset=utf-8", False, False, False),
        (200, b"application/xhtml+xml", False, False, False),
    ],
)
def test_a_good_head_fits_the_question(status: int, content_type: bytes, stream: bool, checks_json: bool, good: bool) -> None:
    """F16, F21: a web page, or JSON where a stream was asked for, is nonsense."""
    failure = judge(status, None, stream=stream, checks_json=checks_json, content_type=content_type)
    assert kind_of(failure) is (None if good else FailureClass.NONSENSE)


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"deflate", b"zstd", b"identity, gzip", b"GZIP"])
@pytest.mark.parametrize("status", [200, 400, 404, 405, 422])
def test_a_compressed_answer_is_nonsense(status: int, encoding: bytes) -> None:
    """L10: what was compressed unasked is neither read nor relayed."""
    assert kind_of(judge(status, b"\x1f\x8b", content_type=JSON, content_encoding=encoding)) is FailureClass.NONSENSE


@pytest.mark.parametrize(("status", "kind"), [(500, "D"), (429, "E"), (503, "E"), (401, "H"), (408, "I")])
def test_a_compressed_failure_is_still_that_failure(status: int, kind: str) -> None:
    """Where only the status matters, the body's encoding does not."""
    assert kind_of(judge(status, b"\x1f\x8b", content_encoding=b"gzip")) == kind


@pytest.mark.parametrize("encoding", [b"", b"identity", b" Identity "])
def test_identity_is_no_compression(encoding: bytes) -> None:
    """A server may say that it did not compress."""
    assert judge(200, None, content_type=JSON, content_encoding=encoding) is None


@pytest.mark.parametrize("status", [200, 404, 429, 500, 502, 503, 400, 401])
def test_an_offline_tunnel_is_a_dead_server(status: int) -> None:
    """F16 and class B: the pages of tunnels say that nobody is behind them, whatever their status."""
    page = b"<!DOCTYPE html><html>ngrok gateway error <noscript>ERR_NGROK_3200</noscript>"
    assert kind_of(judge(status, None if status == 200 else b"", ngrok_error_code=b"ERR_NGROK_3200")) is FailureClass.BROKEN
    assert kind_of(judge(status, page, content_type=b"text/html")) is FailureClass.BROKEN
    assert kind_of(judge(status, b"error code: 1033", content_type=b"text/plain; charset=UTF-8")) is FailureClass.BROKEN
    assert kind_of(judge(530, b"")) is FailureClass.BROKEN


def test_talk_about_tunnels_is_no_tunnel() -> None:
    """A server's own JSON error that quotes a prompt stays what it is."""
    body = b'{"error": {"message": "too long: what does ERR_NGROK_3200 or error code: 1033 mean?"}}'
    assert kind_of(judge(400, body, content_type=JSON)) is FailureClass.CLIENT_ERROR


@pytest.mark.parametrize(
    "body",
    [
        *(model_not_found(style, "qwen/qwen3:0.6b") for style in ("openai", "ollama", "ollama-native", "vllm")),
        b'{"error":"model \'llama3\' not found, try pulling it first"}',
        b'{"object":"error","message":"The model `x` does not exist.","type":"NotFoundError","param":null,"code":404}',
        b'{"error":{"message":"no","code":"model_not_found"}}',
        b'{"detail":"Model not found"}',
    ],
)
def test_a_missing_model_is_recognized(body: bytes) -> None:
    """F14: OpenAI, Ollama and vLLM say it in their own ways; the body is kept for the client."""
    failure = judge(404, body, content_type=JSON)
    assert failure is not None
    assert failure.kind is FailureClass.NO_MODEL
    assert failure.body == body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"404 page not found",
        b'{"detail":"Not Found"}',
        b'{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}',
        b"The requested URL /v1/model/x was not found on this server",
        b'{"error":"remodel not found"}',
        b" " * 5000 + b"model x not found",
    ],
)
def test_a_missing_endpoint_is_no_missing_model(body: bytes) -> None:
    """Class G: the server knows the model, not the path."""
    assert kind_of(judge(404, body)) is FailureClass.UNSUPPORTED


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_missing_model_is_missing_under_each_of_its_statuses(status: int) -> None:
    """Class F of semantics.md: servers answer 400 and 422 for it as well as 404; under 405 the words mean nothing."""
    body = model_not_found("openai", "llama")
    assert kind_of(judge(status, body, content_type=JSON)) is FailureClass.NO_MODEL
    assert kind_of(judge(405, body, content_type=JSON)) is FailureClass.UNSUPPORTED


@pytest.mark.parametrize("status", [400, 404])
def test_a_stored_response_that_is_not_found_is_the_clients_matter(status: int) -> None:
    """A request that carries the id of a response gets the server's answer, which says nothing about the model."""
    body = b'{"error": {"message": "Response with id \'resp_ model m\' not found"}}'
    failure = classify(
        status, {}, body, stream=False, checks_json=True, now_wall=0.0, request=b'{"previous_response_id": "x"}', names_response=True
    )
    assert kind_of(failure) is FailureClass.CLIENT_ERROR


def test_words_of_the_request_say_nothing_about_the_server() -> None:
    """S4: a server that repeats a part of the request is not a server without the model."""
    body = b'{"error": {"message": "tool \'my model x\' not found"}}'
    request = b'{"model": "m", "tools": [{"function": {"name": "my model x"}}]}'
    failure = classify(404, {}, body, stream=False, checks_json=True, now_wall=0.0, request=request)
    assert kind_of(failure) is FailureClass.UNSUPPORTED


@pytest.mark.parametrize(
    ("sent", "relayed"),
    [
        (b"application/json; charset=utf-8", b"application/json; charset=utf-8"),
        (b"application/problem+json", b"application/json"),
        (b"text/plain", b"text/plain"),
        (b"", b"application/json"),
        (b"text/html", b"text/plain; charset=utf-8"),
        (b"*/*", b"application/octet-stream"),
        (b"text/plain; a\r\nset-cookie: b", b"text/plain"),
    ],
)
def test_a_client_error_is_relayed_as_it_is(sent: bytes, relayed: bytes) -> None:
    """F08, X05: the body stays, and so does a content type that is harmless in a browser."""
    failure = judge(400, b'{"error": 1}', content_type=sent, retry_after=b"7")
    assert failure is not None
    assert (failure.status, failure.body, failure.content_type, failure.retry_after) == (400, b'{"error": 1}', relayed, 7.0)


def test_a_client_error_without_a_content_type_is_json_only_where_answers_are() -> None:
    """On other paths it may be anything, so a browser gets bytes."""
    failure = judge(400, b"RIFF", checks_json=False)
    assert failure is not None
    assert failure.content_type == b"application/octet-stream"


@given(
    st.integers(0, 2000),
    st.dictionaries(
        st.sampled_from([b"content-type", b"content-encoding", b"retry-after", b"ngrok-error-code", b"location"]), st.binary(max_size=80)
    ),
    st.none() | st.binary(max_size=300),
    st.booleans(),
    st.booleans(),
)
def test_nothing_a_server_says_raises(status: int, headers: dict[bytes, bytes], body: bytes | None, stream: bool, checks: bool) -> None:
    """Any answer has a class; only a 2xx can be good, and the words hold nothing that the server sent."""
    failure = classify(status, headers, body, stream=stream, checks_json=checks, now_wall=0.0)
    if failure is None:
        assert status in (200, 201, 202)
    else:
        assert failure.reason.isprintable()
        assert len(failure.reason) < 100


# Errors with status 200


def report(words: object, code: object = None, **more: object) -> bytes:
    return json.dumps({"error": {"message": words, "code": code}, **more}).encode()


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (report("no memory"), "D", None),
        (report("no memory", 500), "D", 500),
        (report("no memory", "502"), "D", 502),
        (report("no memory", 1001), "D", None),
        (report("slow down", 429), "E", 429),
        (report("loading", "503"), "E", 503),
        (report("overloaded", 529), "E", 529),
        (report("model 'tiny' not found", 404), "F", 404),
        (report("model not found", 400), "F", 400),
        (report("model 'tiny' not found"), "F", 404),
        (report("no", "model_not_found"), "F", 404),
        (report("no such path", 404), "G", 404),
        (report("not implemented", 501), "G", 501),
        (report("Unexpected endpoint"), "G", 404),
        (b'{"error":"Unexpected endpoint or method. (POST /v1/chat/completions)"}', "G", 404),
        (report("bad key", 401), "H", 401),
        (report("bad key", "403"), "H", 403),
        (report("too early", 425), "I", 425),
        (report("context too long", 400), "J", 400),
        (report("too large", 413), "J", 413),
        (b'{"object":"error","message":"context too long","code":400}', "J", 400),
        (report("?", 505), "K", 505),
        (b"no memory", "D", None),
        (b"", "D", None),
    ],
)
def test_an_error_with_a_good_status_has_the_class_of_its_code_or_words(body: bytes, kind: str, status: int | None) -> None:
    """Semantics 1: numeric code first, then what the words say, else a server error."""
    failure = classify_report(body, {b"retry-after": b"7"}, now_wall=0.0, request=b'{"model":"tiny"}')
    assert (failure.kind, failure.status, failure.body, failure.retry_after) == (kind, status, body, 7.0)
    assert failure.content_type == (JSON if body.startswith(b"{") else b"text/plain; charset=utf-8")
    assert failure.reason.isprintable()


def test_an_error_about_a_stored_response_is_the_clients() -> None:
    """The request names a response: "not found" is about that one."""
    missing = report("model response resp_1 not found")
    assert classify_report(missing, {}, now_wall=0.0, names_response=True).kind is FailureClass.CLIENT_ERROR
    assert classify_report(report("Unexpected endpoint"), {}, now_wall=0.0, names_response=True).kind is FailureClass.UNSUPPORTED
    assert classify_report(missing, {}, now_wall=0.0, request=b'{"input":"model response resp_1 not found"}').kind == "D"


# Retry-After


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None), (b"", None), (b"3", 3.0), (b" 3 ", 3.0), (b"0", 0.0), (b"2.5", 2.5), (b"1000000000", 1e9),
        (b"-1", None), (b"+1", None), (b"soon", None), (b"3s", None), (b"nan", None), (b"inf", None), (b"1e3", None),
        (b"\xd9\xa3", None), (b"\xff", None), (b"9" * 400, None), (b"x" * 100_000, None),
        (b"Mon, 12 Jan 1970 13:47:10 GMT", 30.0), (b"Mon, 12 Jan 1970 13:47:10 -0000", 30.0),
        (b"Mon, 12 Jan 1970 13:46:40 GMT", None), (b"Thu, 01 Jan 1970 00:00:00 GMT", None),
        (b"Mon, 99 Jan 1970 99:99:99 GMT", None), (b"Mon, 12 Jan 99999 00:00:00 GMT", None), (b", ,", None),
    ],
)  # fmt: skip
def test_retry_after_is_read_or_left(value: bytes | None, seconds: float | None) -> None:
    """F12: a number, a date, or nothing; garbage, the past and the absurd never crash."""
    assert parse_retry_after(value, 1_000_000.0) == seconds


@given(st.binary(max_size=70) | st.text(alphabet="0123456789 .,:-+GMTJanFebMon", max_size=40).map(str.encode), st.floats(0, 4e9))
@example(b"Fri, 31 Dec 9999 23:59:59 -2359", 0.0)
def test_no_retry_after_raises(value: bytes, wall: float) -> None:
    """Any bytes give a number that is not negative, or nothing."""
    seconds = parse_retry_after(value, wall)
    assert seconds is None or 0 <= seconds < 1e18 + 1


# Retry or give up


@pytest.mark.parametrize("kind", [kind for kind in FailureClass if kind not in FINAL])
def test_a_failure_is_retried_elsewhere(kind: FailureClass) -> None:
    """F04, F06, F10, F13, F14, F17: another server is tried, a busy one's neighbor at once, else after up to 100 ms."""
    assert decide(failed(kind)) == Retry(0.0 if kind is FailureClass.BUSY else 0.05)
    assert decide(failed(kind), random=0.0) == Retry(0.0)


@pytest.mark.parametrize("kind", sorted(FINAL))
def test_what_no_server_can_mend_is_not_retried(kind: FailureClass) -> None:
    """F08: a client's mistake costs one attempt; nor is anything tried after the client left."""
    assert decide(failed(kind)) == GiveUpLike(failed(kind))


class GiveUpLike:
    """Equal to giving up after these attempts (errors compare by their content here)."""

    def __init__(self, attempts: Sequence[FailedAttempt]) -> None:
        self.expected = final_error(attempts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GiveUp) or other.relay != self.expected.relay:
            return False
        mine, theirs = self.expected.error, other.error
        if mine is None or theirs is None:
            return mine is theirs
        return (type(mine), mine.message, mine.retry_after) == (type(theirs), theirs.message, theirs.retry_after)


def test_there_are_three_attempts() -> None:
    """F07: one attempt and two retries, however many servers there are."""
    kind = FailureClass.SERVER_ERROR
    assert isinstance(decide(failed(kind)), Retry)
    assert isinstance(decide(failed(kind, kind)), Retry)
    assert decide(failed(kind, kind, kind)) == GiveUpLike(failed(kind, kind, kind))
    assert isinstance(decide(failed(kind), policy=RetryPolicy(max_retries=0)), GiveUp)
    assert isinstance(decide(failed(FailureClass.CONNECT), others=0, policy=RetryPolicy(max_retries=0)), GiveUp)


@pytest.mark.parametrize("kind", list(FailureClass))
def test_the_only_server_is_dialled_once_more(kind: FailureClass) -> None:
    """F01: without another server only a failed connection is tried again, once, after 250 ms."""
    expected = Retry(0.25, same_server=True) if kind is FailureClass.CONNECT else GiveUpLike(failed(kind))
    assert decide(failed(kind), others=0) == expected
    assert isinstance(decide(failed(kind, kind), others=0), GiveUp)


@pytest.mark.parametrize("kind", list(FailureClass))
def test_a_stateful_request_is_retried_only_if_no_server_has_done_anything(kind: FailureClass) -> None:
    """What may have left something behind on a server is not sent to another; a refusal left nothing behind."""
    assert isinstance(decide(failed(kind), stateful=True), Retry) is (kind.value in "AEFGHI")


def test_a_refusal_is_retried_once_and_only_if_it_is_json() -> None:
    """Class H: the page of a firewall is about the request, and two servers that refuse are no accident."""
    auth = FailureClass.AUTH
    assert isinstance(decide(failed(auth, status=403)), Retry)
    assert isinstance(decide(failed(FailureClass.SERVER_ERROR, auth, status=403)), Retry)
    assert isinstance(decide(failed(auth, auth, status=403)), GiveUp)
    assert isinstance(decide(failed(auth, status=403, body=b"<html>no</html>")), GiveUp)


def test_a_refusal_speaks_of_a_stored_key_only_where_there_is_one() -> None:
    """The words for the user name what the gateway knows."""
    (attempt,) = failed(FailureClass.AUTH, status=403)
    assert "key that the gateway stores" in error_of([evolve(attempt, has_key=True)]).message
    message = error_of([attempt]).message
    assert "stores" not in message
    assert "status 403" in message
    assert "Host header" in message


@pytest.mark.parametrize("others", [0, 3])
def test_a_request_whose_kept_connection_died_unanswered_goes_to_the_same_server_again(others: int) -> None:
    """RFC 9112, 9.3.1: the server may have closed it before the request came. A stateful request is not repeated."""
    stale = [FailedAttempt(ServerId("a"), Failure(FailureClass.BROKEN, "words", is_stale=True))]
    assert decide(stale, others=others) == Retry(0.0, same_server=True)
    assert decide(stale, others=others, budget_left=False) == Retry(0.0, same_server=True)
    assert isinstance(decide(stale, others=others, stateful=True), GiveUp)
    assert isinstance(decide([*failed(FailureClass.BROKEN, FailureClass.BROKEN), *stale]), GiveUp)


@pytest.mark.parametrize("kind", [FailureClass.TIMEOUT, FailureClass.SERVER_ERROR, FailureClass.BUSY, FailureClass.NONSENSE])
def test_a_retry_over_the_budget_waits_for_it(kind: FailureClass) -> None:
    """Servers that stay in rotation are not stormed, and no request is lost while another server is there."""
    assert decide(failed(kind), budget_left=False) == Retry(0.25, waits=True)
    assert isinstance(decide(failed(kind), budget_left=False, remaining=0.2), GiveUp)


@pytest.mark.parametrize("kind", [FailureClass.CONNECT, FailureClass.BROKEN])
def test_a_server_that_died_needs_no_budget(kind: FailureClass) -> None:
    """It is taken out at once, so what ran on it moves once, all of it."""
    verdict = decide(failed(kind), budget_left=False)
    assert isinstance(verdict, Retry)
    assert not verdict.waits


@pytest.mark.parametrize(
    ("kind", "others", "remaining", "retried"),
    [
        (FailureClass.TIMEOUT, 1, 5.0, True),
        (FailureClass.TIMEOUT, 1, 4.9, False),
        (FailureClass.SERVER_ERROR, 1, 0.06, True),
        (FailureClass.SERVER_ERROR, 1, 0.05, False),
        (FailureClass.BUSY, 1, 0.01, True),
        (FailureClass.BUSY, 1, 0.0, False),
        (FailureClass.CONNECT, 0, 0.3, True),
        (FailureClass.CONNECT, 0, 0.25, False),
    ],
)
def test_no_retry_sleeps_past_the_deadline(kind: FailureClass, others: int, remaining: float, retried: bool) -> None:
    """F03: after a timeout five seconds must be left, else just more than the pause."""
    assert isinstance(decide(failed(kind), others=others, remaining=remaining), Retry) is retried


@given(
    st.lists(KINDS, min_size=1, max_size=6),
    st.integers(0, 5),
    st.floats(-10, 400),
    st.booleans(),
    st.booleans(),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 4),
)
def test_decisions_keep_their_promises(
    kinds: list[FailureClass], others: int, remaining: float, stateful: bool, budget_left: bool, random: float, most: int
) -> None:
    """Whatever happened: never more than 1 + max_retries attempts, never past the deadline, never without a way to answer."""
    attempts = failed(*kinds)
    verdict = decide(
        attempts,
        others=others,
        remaining=remaining,
        stateful=stateful,
        budget_left=budget_left,
        random=random,
        policy=RetryPolicy(max_retries=most),
    )
    if isinstance(verdict, Retry):
        assert len(kinds) <= most
        assert verdict.waits == (not budget_left and kinds[-1] not in (FailureClass.CONNECT, FailureClass.BROKEN))
        assert 0 <= verdict.delay < remaining
        assert kinds[-1] not in FINAL
        assert verdict.same_server == (others == 0)
        assert kinds[-1] is FailureClass.CONNECT or not verdict.same_server
        assert not stateful or kinds[-1].value in "AEFGHI"
    else:
        assert (verdict.error is None) != (verdict.relay is None)
        assert (verdict.relay is not None) == (kinds[-1] in RELAYED)


# What the client sees


def error_of(attempts: Sequence[FailedAttempt]) -> GatewayError:
    verdict = final_error(attempts)
    assert verdict.relay is None
    assert verdict.error is not None
    return verdict.error


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (FailureClass.CONNECT, UpstreamTimeout),
        (FailureClass.BROKEN, UpstreamTimeout),
        (FailureClass.TIMEOUT, UpstreamTimeout),
        (FailureClass.SERVER_ERROR, UpstreamTimeout),
        (FailureClass.TRANSIENT, UpstreamTimeout),
        (FailureClass.AUTH, UpstreamAuthFailed),
        (FailureClass.NONSENSE, UpstreamBadResponse),
        (FailureClass.LOCAL, Overloaded),
    ],
)
def test_each_class_has_its_final_error(kind: FailureClass, error: type[GatewayError]) -> None:
    """F07, F17, F21: 504, 502 or 503, never a backend's 401; each says what to do next."""
    found = error_of(failed(kind))
    assert type(found) is error
    assert any(hint in found.message for hint in ("Try again", "Ask the server's owner", "Send it again"))
    assert ((b"x-should-retry", b"false") in found.headers()) is (found.status in (502, 504))


def test_the_last_attempt_decides() -> None:
    """What came first is not forgotten, but the last word is the last server's."""
    assert type(error_of(failed(FailureClass.AUTH, FailureClass.SERVER_ERROR))) is UpstreamTimeout
    assert type(error_of(failed(FailureClass.SERVER_ERROR, FailureClass.AUTH))) is UpstreamAuthFailed


@pytest.mark.parametrize("kind", sorted(RELAYED))
def test_some_answers_are_relayed(kind: FailureClass) -> None:
    """F08, F14: the last server's own status and body reach the client."""
    last = Failure(kind, "words", 404, body=b'{"error": "no"}', content_type=b"application/json")
    assert final_error([*failed(FailureClass.CONNECT), FailedAttempt(ServerId("z"), last)]) == GiveUp(relay=last)


def test_a_504_lists_what_happened() -> None:
    """F07: statuses, or words where there was no status; no addresses, no names of servers."""
    attempts = [
        FailedAttempt(ServerId("secret-1"), Failure(FailureClass.SERVER_ERROR, "answered with status 500", 500)),
        FailedAttempt(ServerId("secret-2"), Failure(FailureClass.CONNECT, "the connection was refused")),
    ]
    message = error_of(attempts).message
    assert message.startswith("The model did not answer (2 attempts: status 500, the connection was refused).")
    assert "secret" not in message
    assert error_of(attempts[:1]).message.startswith("The model did not answer (1 attempt: status 500).")


@pytest.mark.parametrize(("status", "error"), [(429, BackendBusy), (503, NoHealthyServer), (529, BackendOverloaded)])
@pytest.mark.parametrize(
    ("waits", "wait"), [([3.0], 3.0), ([None], 1.0), ([0.0], 1.0), ([1e9], 60.0), ([30.0, 2.0, 40.0], 2.0), ([0.2], 0.2)]
)
def test_busy_servers_say_when_to_come_back(status: int, error: type[GatewayError], waits: list[float | None], wait: float) -> None:
    """F10, F12, F13: 429, 503 and 529 stay what they are, with the earliest return of all servers that asked for a pause."""
    attempts = [FailedAttempt(ServerId("x"), Failure(FailureClass.BUSY, "busy", status, retry_after=each)) for each in waits]
    found = error_of([*failed(FailureClass.CONNECT, retry_after=1.0), *attempts])
    assert type(found) is error
    assert found.retry_after == wait
    assert (b"retry-after", str(max(1, round(wait))).encode()) in found.headers()
    assert f"again in {max(1.0, wait):.0f} s" in found.message
    assert (b"x-should-retry", b"false") not in found.headers()


def test_a_page_that_may_be_the_servers_own_is_no_proof() -> None:
    """A server may repeat the words of a request, so only a header or status of a tunnel takes it out at once; else a probe decides."""
    page = {b"content-type": b"text/html"}
    sure = classify(404, {**page, b"ngrok-error-code": b"ERR_NGROK_3200"}, b"", stream=False, checks_json=True, now_wall=0.0)
    assert sure is not None
    assert (sure.kind, sure.after_request) == (FailureClass.BROKEN, False)
    echo = classify(422, {b"content-type": b"text/plain"}, b"unknown role ERR_NGROK_1", stream=False, checks_json=True, now_wall=0.0)
    assert echo is not None
    assert (echo.kind, echo.after_request) == (FailureClass.BROKEN, True)


@pytest.mark.parametrize(("body", "kind"), [(b"<html>", FailureClass.BROKEN), (b'{"detail": "Not Found"}', FailureClass.UNSUPPORTED)])
def test_a_server_that_has_answered_a_call_knows_it(body: bytes, kind: FailureClass) -> None:
    """Outside case 16: a 404 without JSON is the page of its tunnel then."""

    def found(answered_before: bool) -> FailureClass | None:
        failure = classify(404, {}, body, stream=False, checks_json=True, now_wall=0.0, answered_before=answered_before)
        return None if failure is None else failure.kind

    assert (found(True), found(False)) == (kind, FailureClass.UNSUPPORTED)
