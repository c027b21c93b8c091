"""What servers do to a stream once it has begun: the rows S of the fault matrix."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import httpx2
import openai
import pytest

from e2e.deployment import FIRST_BYTE_SECONDS, IDLE_SECONDS, STREAM_BYTES, STREAM_SECONDS, Deployment, error_of
from support import answers, behaviours
from support.backends import Backend, Outcome
from support.processes import DOORS, GatewayProcess
from support.raw_client import RawClient, Response
from support.sockets import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True, scope="module")]

Deploy = Callable[..., Deployment]
INTERRUPTED = "upstream_stream_interrupted"


def stream_of(deployment: Deployment, **fields: object) -> Response:
    """Ask for a stream on a raw connection and read all that comes of it."""
    with RawClient(deployment.gateway.port, timeout=15.0) as client:
        deployment.begin(client, stream=True, **fields)
        return client.read_response()


def check_interrupted(answer: Response, events: int | None, code: str = INTERRUPTED) -> None:
    """Check that so many whole events, one error and nothing else arrived, and that the body has no proper end."""
    assert answer.status == 200
    assert answer.rest == b""
    assert answer.data[-1]["error"]["code"] == code
    assert answer.data[-1]["error"].keys() == {"message", "type", "param", "code"}
    assert all("error" not in data for data in answer.data[:-1])
    assert events is None or len(answer.data) == events + 1
    assert answer.ended_by is not None
    assert not answer.complete


def listen(client: openai.OpenAI, model: str, said: list[str]) -> None:
    """Add what the model says to `said` as it comes."""
    for chunk in client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello"}], stream=True):
        said.append(chunk.choices[0].delta.content or "")


@pytest.mark.parametrize("http", ["1.1", "2"])
@pytest.mark.parametrize("fault", [behaviours.cut_stream(3), behaviours.reset_stream(3)], ids=["cut", "reset"])
def test_the_sdk_learns_of_a_stream_that_broke(deploy: Deploy, gateway: GatewayProcess, fault: behaviours.Behaviour, http: str) -> None:
    """S01, S02: the text so far is kept, APIError has our code, and nobody tried again."""
    deployment = deploy(Backend("dying", fault), Backend("spare", fault))
    deployment.keep_down()
    said: list[str] = []
    transport = httpx2.HTTPTransport(http1=http == "1.1", http2=http == "2", verify=False, trust_env=False)
    client = openai.OpenAI(base_url=gateway.base_url, api_key="anything", http_client=httpx2.Client(transport=transport))
    with client, pytest.raises(openai.APIError) as caught:
        listen(client, deployment.model, said)
    assert caught.value.code == INTERRUPTED
    assert "".join(said).split()[1:] == ["word1"]
    assert deployment.backends[0].hits + deployment.backends[1].hits == 1
    wait_until(lambda: "unhealthy" in (deployment.state(0), deployment.state(1)), within=5)


@pytest.mark.parametrize(
    "fault",
    [
        behaviours.cut_stream(3),
        behaviours.cut_stream(3, half_event=True),
        behaviours.reset_stream(3, half_event=True),
        behaviours.clean_end(3),
    ],
    ids=["cut", "cut in an event", "reset in an event", "clean end"],
)
def test_a_broken_stream_has_an_error_and_no_end(deploy: Deploy, fault: behaviours.Behaviour) -> None:
    """S01, S02: whole events, one error event, no [DONE], and the body is cut."""
    deployment = deploy(Backend("dying", fault))
    answer = stream_of(deployment)
    check_interrupted(answer, 3)
    assert b"".join(answer.events[:-1]) == b"".join(answers.chat_events("dying", deployment.model)[:3])
    deployment.wait_for_quiet()


@pytest.mark.parametrize("end", ["end", "close"])
def test_a_finished_stream_without_done_gets_it(deploy: Deploy, end: str) -> None:
    """S04: complete, since every choice has its finish_reason; nothing else is added."""
    deployment = deploy(Backend("terse", behaviours.no_done(end="close" if end == "close" else "end")))
    answer = stream_of(deployment)
    if end == "close":  # no last chunk: the body itself is broken
        assert answer.body.startswith(bytes(deployment.backends[0].last.payload))
        return
    assert answer.complete
    assert answer.body == bytes(deployment.backends[0].last.payload) + answers.DONE
    assert deployment.state() == "healthy"


def test_a_stream_that_falls_silent_is_ended(deploy: Deploy) -> None:
    """S06: a server that is silent for the idle timeout is probed. It fails, so the stream ends with an error, and both sides close."""
    deployment = deploy(Backend("silent", behaviours.stall_stream(2)))
    deployment.keep_down()
    silent = deployment.backends[0]
    with ExitStack() as opened:
        clients = [opened.enter_context(RawClient(deployment.gateway.port)) for _ in range(3)]
        for client in clients:
            deployment.begin(client, stream=True)
        got = [client.read_response() for client in clients]
    for answer in got:
        check_interrupted(answer, 2)
    assert IDLE_SECONDS - 0.1 <= got[0].pieces[-1].at - got[0].pieces[0].at <= IDLE_SECONDS + 0.5
    wait_until(lambda: silent.aborted == 3, within=1)
    assert deployment.state() == "unhealthy"
    deployment.wait_for_quiet()


@pytest.mark.parametrize("named", [False, True])
def test_a_stream_that_begins_with_an_error(deploy: Deploy, named: bool) -> None:
    """S08: counts as a server error, so another server answers."""
    deployment = deploy(Backend("sick", behaviours.error_event(named=named)), Backend("good"))
    answer = deployment.ask_until_tried(deployment.backends[0], stream=True)
    assert answer.content == bytes(deployment.backends[1].last.payload)
    assert answer.headers["x-multiverse-attempts"] == "2"


def test_a_stream_that_begins_with_an_error_alone(deploy: Deploy) -> None:
    """S08: 504 with a proper body."""
    answer = deploy(Backend("sick", behaviours.error_event())).ask(stream=True)
    assert answer.status_code == 504
    assert error_of(answer)["code"] == "upstream_timeout"


@pytest.mark.parametrize("end", ["end", "close"])
def test_an_error_in_mid_stream_is_relayed_once(deploy: Deploy, end: str) -> None:
    """S08: the server's own error event, and then the end."""
    deployment = deploy(Backend("sick", behaviours.error_event(2, end="close" if end == "close" else "end")))
    answer = stream_of(deployment)
    assert answer.body == bytes(deployment.backends[0].last.payload)
    assert [list(data) for data in answer.data if "error" in data] == [["error"]]
    assert answers.DONE not in answer.body


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"type":"error","message":"CUDA out of memory"}\n\n',
        b'data: {"object":"error","message":"CUDA out of memory","code":500}\n\n',
        b'event: error\ndata: {"message":"CUDA out of memory"}\n\n',
        b"event: error\ndata: CUDA out of memory\n\n",
        b"event: error\ndata: [1]\n\n",
        b"event: error\n\n",
    ],
)
@pytest.mark.parametrize("rest", [[], [answers.chat_event("sick", "m", {}, finish="stop"), answers.DONE]], ids=["end", "more"])
def test_the_sdk_raises_for_an_error_of_any_form(deploy: Deploy, gateway: GatewayProcess, error: bytes, rest: list[bytes]) -> None:
    """S08: it would take half an answer for a whole one, or fail to parse it; so it gets our own error event and no [DONE]."""
    words = [answers.chat_event("sick", "m", {"content": word}) for word in ("one ", "two ")]
    deployment = deploy(Backend("sick", behaviours.stream([*words, error, *rest])))
    check_interrupted(stream_of(deployment), 2)
    said: list[str] = []
    transport = httpx2.HTTPTransport(verify=False, trust_env=False)
    client = openai.OpenAI(base_url=gateway.base_url, api_key="anything", http_client=httpx2.Client(transport=transport))
    with client, pytest.raises(openai.APIError) as caught:
        listen(client, deployment.model, said)
    assert (caught.value.code, said) == (INTERRUPTED, ["one ", "two "])


@pytest.mark.parametrize("reason", ['""', "null", "false", '"null"', "0"])
def test_a_finish_reason_that_says_nothing_finishes_nothing(deploy: Deploy, reason: str) -> None:
    """S04: half an answer does not look whole because each of its chunks has an empty finish_reason."""
    word = b'data: {"choices":[{"index":0,"delta":{"content":"one "},"finish_reason":%b}]}\n\n' % reason.encode()
    deployment = deploy(Backend("sick", behaviours.stream([word, word])))
    answer = stream_of(deployment)
    check_interrupted(answer, 2)
    assert answers.DONE not in answer.body


def test_the_sdk_learns_of_a_responses_stream_that_broke(deploy: Deploy, gateway: GatewayProcess) -> None:
    """S01: the error event continues the sequence, and the library raises an exception for it."""
    events = answers.responses_events("sick", "m")[:2]
    deployment = deploy(Backend("sick", behaviours.stream(events, end="close")))
    transport = httpx2.HTTPTransport(verify=False, trust_env=False)
    client = openai.OpenAI(base_url=gateway.base_url, api_key="anything", http_client=httpx2.Client(transport=transport))
    seen: list[str] = []
    with client, pytest.raises(openai.APIError) as caught:
        seen += [event.type for event in client.responses.create(model=deployment.model, input="Hello", stream=True)]
    assert caught.value.code == INTERRUPTED
    with RawClient(gateway.port, timeout=15.0) as raw:
        raw.request("POST", "/v1/responses", json={"model": deployment.model, "input": "Hello", "stream": True})
        last = raw.read_response().data[-1]
    assert (last["type"], last["sequence_number"], last["error"]["code"]) == ("error", len(events), INTERRUPTED)


@pytest.mark.parametrize(
    "text", [rb'"\ud83d"', rb'"\ude00\ud83d"', b'"a","logprobs":{"content":[{"logprob":-Infinity}]}', b'"a","score":NaN']
)
def test_json_that_clients_read_is_relayed(deploy: Deploy, text: bytes) -> None:
    """Half of a surrogate pair is valid JSON, and Python's libraries read NaN: nobody is blamed."""
    word = b'data: {"choices":[{"index":0,"delta":{"content":%b},"finish_reason":null}]}\n\n' % text
    events = [word, word, answers.chat_event("odd", "m", {}, finish="stop"), answers.DONE]
    deployment = deploy(Backend("odd", behaviours.stream(events)))
    answer = stream_of(deployment)
    assert (answer.complete, answer.body) == (True, b"".join(events))
    assert deployment.state() == "healthy"


def test_heartbeats_and_early_comments_are_dropped(deploy: Deploy) -> None:
    """S14: events with empty data anywhere, and comments before the first event."""
    word, last = answers.chat_event("one", "m", {"content": "one"}), answers.chat_event("one", "m", {}, finish="stop")
    events = [b": ping\n\n", b"data:\n\n", word, b": ping\n\n", b"data: \n\n", last, answers.DONE]
    deployment = deploy(Backend("beating", behaviours.stream(events)))
    answer = stream_of(deployment)
    assert (answer.complete, answer.body) == (True, word + b": ping\n\n" + last + answers.DONE)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_an_event_without_end_is_cut(deploy: Deploy, gateway: GatewayProcess) -> None:
    """S10: at 1 MiB, with an error event that names the limit, and memory stays flat; the server is not to blame."""
    deployment = deploy(Backend("endless", behaviours.endless_line(total=64 << 20, after=1)))
    before = gateway.memory_bytes()
    answer = stream_of(deployment)
    check_interrupted(answer, 1, code="stream_limit_reached")
    assert "MAX_EVENT_BYTES" in answer.data[-1]["error"]["message"]
    wait_until(lambda: deployment.backends[0].last.outcome is Outcome.ABORTED, within=1)
    assert gateway.memory_bytes() - before < 16 << 20
    assert deployment.state() == "healthy"
    deployment.wait_for_quiet()


def test_a_first_event_without_end_is_refused(deploy: Deploy) -> None:
    """S10: another server would send as much, so nobody else is asked; the server is not to blame."""
    deployment = deploy(Backend("endless", behaviours.endless_line()), Backend("spare", behaviours.endless_line()))
    answer = deployment.ask(stream=True)
    assert (answer.status_code, error_of(answer)["code"], answer.headers["x-should-retry"]) == (502, "answer_too_large", "false")
    assert "MAX_EVENT_BYTES" in error_of(answer)["message"]
    assert deployment.backends[0].hits + deployment.backends[1].hits == 1
    assert (deployment.state(0), deployment.state(1)) == ("healthy", "healthy")


def test_an_endless_stream_ends_at_the_byte_limit(deploy: Deploy) -> None:
    """S11: an error event, and the connection to the server is closed; the server is not to blame."""
    deployment = deploy(Backend("endless", behaviours.endless_stream()))
    answer = stream_of(deployment)
    check_interrupted(answer, None, code="stream_limit_reached")
    assert STREAM_BYTES / 2 <= len(answer.body) <= STREAM_BYTES + (1 << 20)
    wait_until(lambda: deployment.backends[0].last.outcome is Outcome.ABORTED, within=1)
    assert deployment.state() == "healthy"
    deployment.wait_for_quiet()


def test_an_endless_stream_ends_at_the_time_limit(deploy: Deploy) -> None:
    """S11: however slowly it comes."""
    deployment = deploy(Backend("endless", behaviours.endless_stream(interval=0.1)))
    answer = stream_of(deployment)
    check_interrupted(answer, None, code="stream_limit_reached")
    assert STREAM_SECONDS - 0.5 <= answer.pieces[-1].at - answer.pieces[0].at <= STREAM_SECONDS + 0.5
    wait_until(lambda: deployment.backends[0].last.outcome is Outcome.ABORTED, within=1)
    assert deployment.state() == "healthy"


def test_one_of_two_choices_is_not_all(deploy: Deploy) -> None:
    """S12: a stream is complete when every choice is."""
    check_interrupted(stream_of(deploy(Backend("half", behaviours.two_choices_one_finished()))), None)


def test_comments_are_no_events(deploy: Deploy) -> None:
    """S14: the first-byte timeout comes all the same, and another server answers."""
    deployment = deploy(Backend("ping", behaviours.comments_only(interval=0.25)), Backend("good"))
    begun = time.monotonic()
    answer = deployment.ask_until_tried(deployment.backends[0], stream=True)
    assert answer.content == bytes(deployment.backends[1].last.payload)
    assert FIRST_BYTE_SECONDS - 0.1 <= time.monotonic() - begun <= FIRST_BYTE_SECONDS + 1.0


def test_an_event_that_is_not_json_breaks_the_stream(deploy: Deploy) -> None:
    """It never reaches the client, and nothing after it."""
    check_interrupted(stream_of(deploy(Backend("confused", behaviours.not_json_event(2)))), 2)


def test_nothing_follows_done(deploy: Deploy) -> None:
    """The answer ends there, though the server keeps its own open."""
    deployment = deploy(Backend("chatty", behaviours.stays_open_after_done(more=b"data: more\n\n")))
    answer = stream_of(deployment)
    assert answer.complete
    assert answer.body == b"".join(answers.chat_events("chatty", deployment.model))
    deployment.wait_for_quiet()
