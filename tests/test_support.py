"""The tests' own tools do what they say: misbehaving servers, fault proxy, raw client, child processes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from support import answers
from support import behaviours as act
from support.backends import Backend, Behaviour, Exchange, Outcome
from support.fault_proxy import FaultProxy
from support.processes import GatewayProcess, LlamaServer, NotStartedError, WebChild
from support.raw_client import AsyncRawClient, EndedError, RawClient, Response
from support.require import require
from support.sockets import BlackHole, LoopServer, free_port, serving, until, wait_until

pytestmark = pytest.mark.e2e

PLAIN = {"model": "test-model", "messages": [{"role": "user", "content": "Hello"}]}
STREAMED = {**PLAIN, "stream": True}
CHAT = "/v1/chat/completions"


@pytest.fixture
def backend() -> Iterator[Backend]:
    """Run one good backend on a thread."""
    with Backend("alice") as running:
        yield running


def ask(backend: Backend | FaultProxy, body: Any = PLAIN, *, path: str = CHAT, timeout: float = 5.0) -> Response:
    """Send one request on a connection of its own and return what came."""
    with RawClient(backend.port, timeout=timeout) as client:
        return client.fetch("POST", path, json=body)


def test_good_backend_answers_plainly(backend: Backend) -> None:
    """A backend answers well by default, names itself and records what it got."""
    answer = ask(backend)
    assert answer.status == 200
    assert answer.json["choices"][0]["message"]["content"].startswith("alice ")
    assert answer.body == bytes(backend.last.payload)
    assert backend.last.json == PLAIN
    assert backend.last.header("Content-Type") == "application/json"
    wait_until(lambda: backend.completed == 1)
    assert (backend.hits, backend.connections, backend.aborted) == (1, 1, 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages", CHAT])
def test_good_backend_streams(backend: Backend, path: str) -> None:
    """Every streaming path yields well-formed events and a proper end."""
    answer = ask(backend, STREAMED, path=path)
    assert answer.complete
    assert answer.rest == b""
    assert b"".join(answer.events) == answer.body == bytes(backend.last.payload)
    assert answer.data


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank"])
def test_good_backend_knows_other_paths(backend: Backend, path: str) -> None:
    """Every plain path yields JSON; unknown ones are 404."""
    assert ask(backend, path=path).json
    assert ask(backend, path="/v1/unknown").status == 404


def test_model_list_is_scripted_apart(backend: Backend) -> None:
    """Requests for the model list have their own script and are counted apart."""
    backend.behave = act.status(500)
    assert httpx2.get(f"{backend.url}/v1/models", trust_env=False).json()["data"][0]["id"] == "test-model"
    backend.behave_models = [act.html_page(), act.list_models]
    assert "html" in httpx2.get(f"{backend.url}/v1/models", trust_env=False).headers["content-type"]
    assert httpx2.get(f"{backend.url}/v1/models", trust_env=False).status_code == 200
    assert (backend.hits, len(backend.probes)) == (0, 3)


def test_script_is_consumed_and_its_last_step_stays(backend: Backend) -> None:
    """A list gives one behavior to each request; the last one serves all that follow; it can be replaced at any time."""
    backend.behave = [act.status(429, retry_after=3), act.status(503), act.good()]
    assert [ask(backend).status for _ in range(4)] == [429, 503, 200, 200]
    assert backend.hits == 4
    backend.behave = act.status(400)
    assert ask(backend).status == 400


def test_connection_is_kept_alive(backend: Backend) -> None:
    """One connection serves several requests, chunked request bodies included."""
    with RawClient(backend.port) as client:
        assert client.fetch("POST", CHAT, json=PLAIN, chunked=True).status == 200
        assert client.fetch("POST", CHAT, json=STREAMED).complete
        assert client.fetch("GET", "/v1/models").status == 200
    assert backend.connections == 1
    assert backend.requests[0].json == PLAIN


COMPLETE_ANSWERS: dict[str, tuple[Behaviour, int, bytes]] = {
    "429": (act.status(429, retry_after=7), 429, b'"error"'),
    "openai 404": (act.model_not_found("openai"), 404, b"model_not_found"),
    "ollama 404": (act.model_not_found("ollama"), 404, b"not found, try pulling it first"),
    "vllm 404": (act.model_not_found("vllm"), 404, b"does not exist"),
    "context": (act.context_too_long(), 400, b"context_length_exceeded"),
    "loading": (act.loading(), 503, b"Loading model"),
    "401": (act.unauthorized(), 401, b"invalid_api_key"),
    "302": (act.redirect("http://elsewhere.example/"), 302, b""),
    "html": (act.html_page(), 200, b"<html>"),
    "interstitial": (act.ngrok_interstitial(), 200, b"ERR_NGROK_6024"),
    "offline": (act.ngrok_offline(), 404, b"ERR_NGROK_3200"),
    "530": (act.cloudflared_530(), 530, b"1033"),
    "content type": (act.wrong_content_type(), 200, b"choices"),
    "broken json": (act.broken_json(), 200, b"mess"),
    "999": (act.odd_status(), 999, b"odd"),
    "malicious": (act.malicious_headers(), 200, b"choices"),
    "many headers": (act.many_headers(), 200, b"{}"),
    "big header": (act.big_header(), 200, b"{}"),
    "split header": (act.split_header(), 200, b"choices"),
    "pieces": (act.in_pieces(act.good()), 200, b"choices"),
}


@pytest.mark.parametrize("name", COMPLETE_ANSWERS)
def test_complete_answers(backend: Backend, name: str) -> None:
    """These behaviors send a complete answer with this status and content."""
    behaviour, status, content = COMPLETE_ANSWERS[name]
    backend.behave = behaviour
    answer = ask(backend)
    assert (answer.status, answer.complete) == (status, True)
    assert content in answer.body


def test_headers_of_special_answers(backend: Backend) -> None:
    """Retry-After, Location, tunnel marks, forged and oversized headers are sent as told."""

    def one(behaviour: Behaviour) -> Response:
        backend.behave = behaviour
        return ask(backend)

    assert one(act.status(503, retry_after="soon")).header("retry-after") == "soon"
    assert one(act.redirect("/x", code=307)).header("location") == "/x"
    assert one(act.ngrok_offline()).header("ngrok-error-code") == "ERR_NGROK_3200"
    assert one(act.ngrok_offline(with_header=False)).header("ngrok-error-code") is None
    assert one(act.malicious_headers()).header("set-cookie") is not None
    assert len(one(act.many_headers()).headers) > 20_000
    assert len(one(act.big_header()).raw_head) > 1024 * 1024
    assert b"x-split: a\rset-cookie" in one(act.split_header()).raw_head


BROKEN_FIRST: dict[str, tuple[Behaviour, str]] = {
    "reset": (act.reset_first(), "reset"),
    "eof": (act.eof_first(), "eof"),
    "partial head": (act.partial_head(), "eof"),
}


@pytest.mark.parametrize("name", BROKEN_FIRST)
def test_connection_broken_before_the_head(backend: Backend, name: str) -> None:
    """The connection ends by RST or FIN before any head."""
    backend.behave, how = BROKEN_FIRST[name]
    with RawClient(backend.port) as client:
        client.request("POST", CHAT, json=PLAIN)
        with pytest.raises(EndedError):
            client.read_head()
        assert client.response.ended_by == how
    wait_until(lambda: backend.completed == 1 and backend.open_connections == 0)


def test_garbage(backend: Backend) -> None:
    """Bytes that are not HTTP arrive as they are."""
    backend.behave = act.garbage()
    with RawClient(backend.port) as client:
        client.send(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        backend_bytes = bytearray()
        while data := client.socket.recv(1000):
            backend_bytes += data
    assert b"SSH-2.0" in backend_bytes


def test_stall_ends_when_the_client_leaves(backend: Backend) -> None:
    """A stalled request is aborted, with its time, as soon as the client closes by FIN or RST."""
    backend.behave = act.stall()
    for leave in ("close", "abort"):
        backend.forget()
        client = RawClient(backend.port, timeout=0.05)
        client.request("POST", CHAT, json=PLAIN)
        wait_until(lambda: backend.running == 1)
        with pytest.raises(TimeoutError):
            client.read_head()
        left_at = time.monotonic()
        getattr(client, leave)()
        wait_until(lambda: backend.aborted == 1 and backend.running == 0)
        ended_at = backend.last.ended_at
        assert ended_at is not None
        assert 0 <= ended_at - left_at < 0.5
    assert backend.last.outcome is Outcome.ABORTED


def test_truncated_body(backend: Backend) -> None:
    """A body shorter than announced ends by FIN, RST or silence."""
    backend.behave = [act.truncated_body(), act.truncated_body(end="reset"), act.head_only()]
    first, second = ask(backend), ask(backend)
    assert (first.complete, first.ended_by, second.ended_by) == (False, "eof", "reset")
    assert 0 < len(first.body) < int(first.header("content-length") or 0)
    with pytest.raises(TimeoutError):
        ask(backend, timeout=0.05)


BROKEN_STREAMS: dict[str, tuple[Behaviour, int, str | None, bool]] = {
    # behaviour, complete events, how the connection ended, whether the body ended properly
    "cut": (act.cut_stream(3), 3, "eof", False),
    "cut in an event": (act.cut_stream(2, half_event=True), 2, "eof", False),
    "reset": (act.reset_stream(3), 3, "reset", False),
    "clean end": (act.clean_end(3), 3, None, True),
    "no done": (act.no_done(), 7, None, True),
    "no done, cut": (act.no_done(end="close"), 7, "eof", False),
    "error first": (act.error_event(), 1, None, True),
    "error later": (act.error_event(3), 4, None, True),
    "not json": (act.not_json_event(2), 6, None, True),
}


@pytest.mark.parametrize("name", BROKEN_STREAMS)
def test_broken_streams(backend: Backend, name: str) -> None:
    """These streams break after so many events, in this way."""
    behaviour, events, ended_by, complete = BROKEN_STREAMS[name]
    backend.behave = behaviour
    answer = ask(backend, STREAMED)
    assert (len(answer.events), answer.ended_by, answer.complete) == (events, ended_by, complete)
    assert b"[DONE]" not in answer.body or name == "not json"
    assert bool(answer.rest) == (name == "cut in an event")


def test_stream_with_two_choices_one_finished(backend: Backend) -> None:
    """One choice of two has a finish_reason, and there is no `[DONE]`."""
    backend.behave = act.two_choices_one_finished()
    answer = ask(backend, STREAMED)
    finished = {(choice["index"], choice["finish_reason"]) for event in answer.data for choice in event["choices"]}
    assert finished == {(0, None), (1, None), (0, "stop")}


def test_json_where_a_stream_was_asked_for(backend: Backend) -> None:
    """A JSON body answers the request for a stream."""
    backend.behave = act.json_for_stream()
    answer = ask(backend, STREAMED)
    assert answer.header("content-type") == "application/json"
    assert answer.json["object"] == "chat.completion"


@pytest.mark.parametrize("behaviour", [act.stall_stream(2), act.stays_open_after_done()])
def test_streams_that_fall_silent(backend: Backend, behaviour: Behaviour) -> None:
    """Some events come, then nothing, and the connection stays."""
    backend.behave = behaviour
    with RawClient(backend.port, timeout=0.1) as client:
        client.request("POST", CHAT, json=STREAMED)
        assert client.read_event().startswith(b"data: {")
        assert client.read_event().startswith(b"data: {")
        with pytest.raises(TimeoutError):
            client.read_response()
    wait_until(lambda: backend.aborted == 1)


def test_stream_interval_and_slow_first_byte(backend: Backend) -> None:
    """Events are spread in time, and the first byte waits."""
    backend.behave = act.after(0.1, act.good(events=3, interval=0.03))
    begun = time.monotonic()
    answer = ask(backend, STREAMED)
    assert answer.head_at - begun >= 0.1
    assert answer.pieces[-1].at - answer.pieces[0].at >= 0.09
    assert answer.data[-1] == "[DONE]"


def test_usage_comes_when_asked_for(backend: Backend) -> None:
    """A last event without choices has the usage, only when asked for."""
    asked = ask(backend, {**STREAMED, "stream_options": {"include_usage": True}})
    assert asked.data[-2]["usage"] == answers.USAGE
    assert asked.data[-2]["choices"] == []
    assert all("usage" not in event for event in ask(backend, STREAMED).data[:-1])


def test_stream_in_pieces_is_the_same_stream(backend: Backend) -> None:
    """However the bytes are cut, the body is the same."""
    whole = ask(backend, STREAMED).body
    for seed in range(3):
        backend.behave = act.in_pieces(act.good(), seed=seed)
        assert ask(backend, STREAMED).body == whole


@pytest.mark.parametrize(
    "behaviour", [act.endless_stream(), act.endless_line(), act.endless_body(), act.endless_continue(), act.comments_only(0.001)]
)
def test_endless_answers(backend: Backend, behaviour: Behaviour) -> None:
    """They go on until the client leaves, and stop while it does not read."""
    backend.behave = behaviour
    with RawClient(backend.port) as client:
        client.request("POST", CHAT, json=STREAMED)
        wait_until(lambda: len(client.raw) > 500 or not client.read_more())
        assert not client.response.complete
        assert client.response.ended_by is None
        client.abort()
    wait_until(lambda: backend.aborted == 1 and backend.open_connections == 0)


def test_sending_waits_for_a_client_that_does_not_read(backend: Backend) -> None:
    """An endless stream to a stalled client stays small in memory."""
    backend.behave = act.endless_stream()
    with RawClient(backend.port, receive_buffer=4096) as client:
        client.request("POST", CHAT, json=STREAMED)
        wait_until(lambda: backend.hits == 1 and backend.last.sent > 0)

        def has_stopped() -> bool:
            before = backend.last.sent
            time.sleep(0.1)
            return backend.last.sent == before

        wait_until(has_stopped)
    wait_until(lambda: backend.aborted == 1)


def test_one_long_event(backend: Backend) -> None:
    """An event of a given size ends properly."""
    backend.behave = act.endless_line(total=300_000, after=1)
    answer = ask(backend, STREAMED)
    assert [len(event) > 300_000 for event in answer.events] == [False, True, False]


def test_gzip_bomb() -> None:
    """The bomb is a valid gzip file, small, of the announced size."""
    packed = act.gzip_of_spaces(8 * act.MEBIBYTE)
    assert len(packed) < 20_000
    assert gzip.decompress(packed) == b" " * (8 * act.MEBIBYTE)
    with Backend(behave=act.gzip_bomb(4 * act.MEBIBYTE)) as backend:
        assert ask(backend).header("content-encoding") == "gzip"


def test_huge_model_list(backend: Backend) -> None:
    """The model list can be made as large as one likes and stays valid."""
    backend.behave_models = act.huge_model_list(200_000)
    assert len(httpx2.get(f"{backend.url}/v1/models", trust_env=False).json()["data"]) > 1000


def test_choosing_behaviours(backend: Backend) -> None:
    """A behavior may depend on mode, model, path and chance."""
    backend.behave = act.when_streamed(act.status(500), act.for_model("other", act.status(404), act.for_path("/rerank", act.status(501))))
    assert ask(backend, STREAMED).status == 500
    assert ask(backend).status == 200
    assert ask(backend, {**PLAIN, "model": "other"}).status == 404
    assert ask(backend, path="/v1/rerank").status == 501
    backend.behave = act.randomly(0.5, act.status(500), seed=1)
    assert {ask(backend).status for _ in range(20)} == {200, 500}


def test_gate_holds_requests_and_counts_concurrency(backend: Backend) -> None:
    """Requests wait at a gate, and the largest number at once is counted."""
    gate = act.Gate()
    backend.behave = gate.held()
    clients = [RawClient(backend.port) for _ in range(5)]
    for client in clients:
        client.request("POST", CHAT, json=PLAIN)
    wait_until(lambda: backend.running == 5)
    gate.open()
    assert [client.read_response().status for client in clients] == [200] * 5
    wait_until(lambda: backend.running == 0)
    assert (backend.most_running, backend.completed) == (5, 5)
    for client in clients:
        client.close()


def test_refused_and_accepted_again_on_the_same_port(backend: Backend) -> None:
    """A backend can refuse connections, crash with open ones, and come back on its port."""
    with RawClient(backend.port) as open_one:
        assert open_one.fetch("POST", CHAT, json=PLAIN).status == 200
        backend.refuse()
        with pytest.raises(ConnectionRefusedError):
            RawClient(backend.port)
        assert open_one.fetch("POST", CHAT, json=PLAIN).status == 200
        backend.behave = act.stall()
        open_one.request("POST", CHAT, json=PLAIN)
        wait_until(lambda: backend.running == 1)
        backend.crash()
        assert open_one.read_response().ended_by == "reset"
    backend.accept()
    backend.behave = act.good()
    assert ask(backend).status == 200
    backend.forget()
    assert (backend.hits, backend.connections) == (0, 0)


def test_connections_ended_on_accept(backend: Backend) -> None:
    """A connection can be reset or closed before anything was sent."""
    backend.on_accept = "close"
    with RawClient(backend.port) as client:
        assert client.read_response().ended_by == "eof"
    backend.on_accept = "reset"
    with contextlib.suppress(ConnectionResetError), RawClient(backend.port) as client:  # it may come before connecting is over
        assert client.read_response().ended_by == "reset"
    wait_until(lambda: backend.connections == 2 and backend.open_connections == 0)


def test_mistake_in_a_behaviour_fails_the_test() -> None:
    """An exception in a behavior is raised when the backend is left."""

    async def wrong(exchange: Exchange) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Backend(behave=wrong) as backend:
        assert ask(backend).ended_by == "reset"


def test_many_backends_on_one_thread() -> None:
    """Dozens of backends share one thread."""
    backends = [Backend(f"number{number}") for number in range(30)]
    with serving(*backends):
        assert [ask(backend).json["system_fingerprint"] for backend in backends] == [backend.name for backend in backends]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems answer a full queue differently")
def test_black_hole() -> None:
    """Connecting to a black hole hangs."""
    with BlackHole() as hole, pytest.raises(TimeoutError):
        RawClient(hole.port, timeout=0.2)


async def test_backend_on_the_loop_of_the_test() -> None:
    """The same backend runs on the test's own loop, with an asynchronous client."""
    async with Backend("bob", act.good(interval=0.01)) as backend:
        async with httpx2.AsyncClient(trust_env=False) as client:
            answer = await client.post(f"{backend.url}{CHAT}", json=PLAIN)
            assert answer.json()["system_fingerprint"] == "bob"
        async with AsyncRawClient(backend.port) as raw:
            assert (await raw.fetch("POST", CHAT, json=STREAMED)).data[-1] == "[DONE]"
        backend.behave = act.stall_stream(1)
        async with AsyncRawClient(backend.port) as raw:
            await raw.request("POST", CHAT, json=STREAMED)
            assert (await raw.read_event()).startswith(b"data:")
            raw.abort()
        await until(lambda: backend.aborted == 1)
        backend.refuse()
        with pytest.raises(ConnectionRefusedError):
            await AsyncRawClient(backend.port).connect()


async def test_hundred_concurrent_streams() -> None:
    """A backend serves many streams at once, each complete."""
    gate = act.Gate()
    async with Backend(behave=gate.held(act.good(events=10, interval=0.005))) as backend:

        async def one() -> Response:
            async with AsyncRawClient(backend.port) as client:
                return await client.fetch("POST", CHAT, json=STREAMED)

        async def all_are_there() -> None:
            await until(lambda: backend.running == 100)
            gate.open()

        *responses, _ = await asyncio.gather(*[one() for _ in range(100)], all_are_there())
        assert all(answer is not None and answer.complete and answer.data[-1] == "[DONE]" for answer in responses)


def test_proxy_passes_through(backend: Backend) -> None:
    """Without faults the proxy changes nothing."""
    with FaultProxy(backend.port) as proxy:
        assert ask(proxy, STREAMED).body == bytes(backend.last.payload)
        assert proxy.connections == 1
        wait_until(lambda: proxy.open_connections == 0)


def test_proxy_delays_and_limits(backend: Backend) -> None:
    """Delay and rate can be measured."""
    with FaultProxy(backend.port) as proxy:
        proxy.delay(0.1)
        begun = time.monotonic()
        assert ask(proxy).status == 200
        assert time.monotonic() - begun >= 0.2
        proxy.heal()
        proxy.to_client.rate = 5_000.0
        backend.behave = act.answer(200, b"x" * 1000)
        begun = time.monotonic()
        assert ask(proxy).complete
        assert time.monotonic() - begun >= 0.15


def test_proxy_blackhole_holds_back_until_healed(backend: Backend) -> None:
    """In a black hole nothing arrives and nothing closes; afterward all arrives."""
    with FaultProxy(backend.port) as proxy, RawClient(proxy.port, timeout=0.2) as client:
        assert client.fetch("POST", CHAT, json=PLAIN).status == 200
        proxy.blackhole()
        client.request("POST", CHAT, json=PLAIN)
        with pytest.raises(TimeoutError):
            client.read_head()
        assert backend.hits == 1
        proxy.heal()
        assert client.read_response().status == 200


def test_proxy_drops(backend: Backend) -> None:
    """Lost bytes are lost for good."""
    with FaultProxy(backend.port) as proxy, RawClient(proxy.port, timeout=0.1) as client:
        proxy.drop()
        client.request("POST", CHAT, json=PLAIN)
        with pytest.raises(TimeoutError):
            client.read_head()
        proxy.heal()
        with pytest.raises(TimeoutError):
            client.read_head()
        assert backend.hits == 0


def test_proxy_resets_half_closes_and_refuses(backend: Backend) -> None:
    """Open connections can be reset or half-closed now, and new ones refused."""
    backend.behave = act.stall_stream(1)
    with FaultProxy(backend.port) as proxy:
        with RawClient(proxy.port) as client:
            client.request("POST", CHAT, json=STREAMED)
            client.read_event()
            proxy.reset()
            assert client.read_response().ended_by == "reset"
        wait_until(lambda: backend.aborted == 1)
        with RawClient(proxy.port) as client:
            client.request("POST", CHAT, json=STREAMED)
            client.read_event()
            proxy.half_close("client")
            assert client.read_response().ended_by == "eof"
            assert backend.running == 1
        wait_until(lambda: backend.running == 0)
        proxy.cut()
        with pytest.raises(ConnectionRefusedError):
            RawClient(proxy.port)
        proxy.heal()
        backend.behave = act.good()
        assert ask(proxy).status == 200


def test_proxy_cuts_after_so_many_bytes(backend: Backend) -> None:
    """A connection is reset at an exact byte."""
    with FaultProxy(backend.port) as proxy:
        proxy.to_client.cut_after = 300
        with RawClient(proxy.port) as client:
            client.request("POST", CHAT, json=STREAMED)
            assert client.read_response().ended_by == "reset"
            assert len(client.raw) == 300


def test_proxy_before_nothing() -> None:
    """A proxy whose target is closed resets its clients."""
    with FaultProxy(free_port()) as proxy:
        with contextlib.suppress(ConnectionResetError):  # it may come before connecting is over
            assert ask(proxy).ended_by == "reset"
        wait_until(lambda: proxy.connections == 1 and proxy.open_connections == 0)


def test_half_closed_client_still_reads() -> None:
    """A client may send FIN and go on reading; the backends take that for leaving."""
    with Backend(behave=act.after(0.05, act.good())) as backend, RawClient(backend.port) as client:
        client.request("POST", CHAT, json=PLAIN)
        client.half_close()
        assert client.read_response().ended_by == "eof"
        wait_until(lambda: backend.aborted == 1)


def test_child_that_does_not_start_tells_why(tmp_path: Path) -> None:
    """A child that ends, or is not ready in time, raises with what it wrote, and is gone."""
    ends = WebChild([sys.executable, "-c", "print('no luck'); raise SystemExit(3)"], port=free_port(), log=tmp_path / "ends.log")
    with pytest.raises(NotStartedError, match=r"(?s)code 3.*no luck"):
        ends.start()
    hangs = WebChild([sys.executable, "-c", "import time; time.sleep(60)"], port=free_port(), log=tmp_path / "hangs.log", ready_within=0.2)
    with pytest.raises(NotStartedError, match="not ready"):
        hangs.start()
    assert not hangs.is_running


def test_gateway_settings_come_from_the_test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our defaults may be overridden with or without the prefix, or left out, and nothing leaks in from outside."""
    monkeypatch.setenv("ADMIN_API_KEY", "of the developer")
    monkeypatch.setenv("MULTIVERSE_LOG_LEVEL", "ERROR")
    gateway = GatewayProcess({"MULTIVERSE_RATE_LIMIT_PER_MINUTE": "5", "ALLOW_PRIVATE_NETWORKS": None}, cwd=tmp_path)
    assert gateway.env is not None
    ours = {name: value for name, value in gateway.env.items() if "API_KEY" in name or "LIMIT" in name or "PRIVATE" in name}
    assert ours == {"ADMIN_API_KEY": gateway.admin_key, "MULTIVERSE_RATE_LIMIT_PER_MINUTE": "5"}
    assert "MULTIVERSE_LOG_LEVEL" not in gateway.env
    assert gateway.database == tmp_path / "multiverse.db"


FAKE_GATEWAY = """
import http.server, json, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {"path": self.path, "key": self.headers["X-API-Key"]})
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(201, {"registration_id": "one"})
    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""


def test_gateway_process_starts_stops_and_restarts() -> None:
    """A process is started, asked, killed, started again on its port, terminated; its directory is removed."""
    with GatewayProcess(command=("-c", FAKE_GATEWAY)) as gateway:
        assert gateway.admin("GET", "/servers").json() == {"path": "/admin/servers", "key": gateway.admin_key}
        assert gateway.admin("GET", "/admin/stats", key="").json() == {"path": "/admin/stats", "key": None}
        assert gateway.register("tiny", "http://127.0.0.1:1") == "one"
        first = gateway.pid
        gateway.kill()
        assert not gateway.is_running
        gateway.start()
        assert gateway.pid != first
        assert gateway.stop() == -15
        assert "GET /readyz" in gateway.log_text()
        directory = gateway.directory
    assert not directory.exists()


def test_real_llama_server() -> None:
    """A real llama.cpp server answers, streams, freezes, dies and comes back on its port."""
    for package in ("xllamacpp", "gguf"):
        require(package, "it makes and serves a real model")
    with LlamaServer("tiny") as llama:
        with openai.OpenAI(base_url=f"{llama.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            messages: Any = [{"role": "user", "content": "Hello"}]
            answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
            assert answer.choices[0].message.content
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 8
            chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, stream=True))
            assert chunks[-1].choices[0].finish_reason == "length"
        llama.pause()
        with RawClient(llama.port, timeout=0.2) as raw, pytest.raises(TimeoutError):
            raw.fetch("GET", "/v1/models")
        llama.resume()
        wait_until(llama.is_ready)
        llama.kill()
        with pytest.raises(ConnectionRefusedError):
            RawClient(llama.port)
        llama.start()
        with RawClient(llama.port) as raw:
            assert json.loads(raw.fetch("GET", "/v1/models").body)["data"][0]["id"] == "tiny"
    assert not llama.is_running


class Closing(LoopServer):
    """A server that closes what it accepts."""

    async def connected(self, connection: socket.socket) -> None:
        connection.close()

    async def hang_up(self) -> None:
        pass


async def test_no_connection_is_forgotten_while_a_server_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever in its accepting that happens: a socket that nobody closes would fail the test that runs when it is collected."""
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: lost.append(unraisable.exc_value))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for number in range(40):
            async with Closing() as server:
                await asyncio.sleep(0)
                client = socket.create_connection((server.host, server.port))
                for _ in range(number % 4):
                    await asyncio.sleep(0)
            client.close()
            await asyncio.sleep(0)
            gc.collect()
    assert not lost
