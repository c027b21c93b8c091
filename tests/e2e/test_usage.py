"""Usage counts: equal to what the answers themselves said, whatever breaks on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from e2e.deployment import IMPATIENT, Deployment, operator
from support import answers, behaviours
from support.backends import Backend, Exchange, answer_well
from support.processes import GatewayProcess, LlamaServer
from support.require import require
from support.sockets import wait_until

pytestmark = pytest.mark.e2e

Deploy = Callable[..., Deployment]
TOKENS = (answers.USAGE["prompt_tokens"], answers.USAGE["completion_tokens"])


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """Return a gateway that asks for the tokens of streams, as it usually does."""
    with GatewayProcess({**IMPATIENT, "MULTIVERSE_COUNT_STREAM_TOKENS": "true"}) as process:
        yield process


@pytest.fixture(scope="module")
def operating(gateway: GatewayProcess) -> Iterator[httpx2.Client]:
    """Return a client of that gateway that has the admin key."""
    with operator(gateway) as made:
        yield made


def counted(deployment: Deployment, by: str = "model") -> dict[str, Any]:
    """Return the only row of the deployment's model."""
    rows = deployment.client.get("/admin/usage", params={"by": by, "model": deployment.model}).json()["rows"]
    assert len(rows) == 1, rows
    row: dict[str, Any] = rows[0]
    return row


def totals(deployment: Deployment) -> tuple[int, int, int, int]:
    row = counted(deployment)
    return row["requests"], row["failed"], row["prompt_tokens"], row["completion_tokens"]


def test_the_counts_are_those_of_the_answers(deploy: Deploy) -> None:
    """Plain and streamed, asked for or not, over failovers and streams that die in the middle."""
    cuts, breaks = behaviours.cut_stream(3), behaviours.reset_stream(2)
    deployment = deploy(
        Backend("good"),
        Backend("resets", behaviours.reset_first()),
        Backend("cuts", behaviours.when_streamed(cuts, answer_well)),
        Backend("breaks", behaviours.when_streamed(breaks, answer_well)),
    )
    requests = failed = prompt = completion = 0
    for number in range(60):
        streams, asks = number % 3 != 0, number % 4 == 0
        options = {"stream_options": {"include_usage": True}} if streams and asks else {}
        text = ""
        with (
            suppress(httpx2.RemoteProtocolError),  # a stream died; what came is in `text`
            deployment.client.stream("POST", "/v1/chat/completions", json=deployment.body(stream=streams, **options)) as answer,
        ):
            assert answer.status_code == 200
            for piece in answer.iter_text():
                text += piece
        requests += 1
        if "upstream_stream_interrupted" in text:
            failed += 1
            completion += text.count('"content":"') - text.count('"content":""')
        elif streams:
            assert text.endswith("data: [DONE]\n\n")
            assert ('"usage"' in text) is asks
            prompt, completion = prompt + TOKENS[0], completion + TOKENS[1]
        else:
            usage = json.loads(text)["usage"]
            prompt, completion = prompt + usage["prompt_tokens"], completion + usage["completion_tokens"]
    assert 0 < failed < requests
    assert totals(deployment) == (requests, failed, prompt, completion)
    by_server = deployment.client.get("/admin/usage", params={"by": "server,owner", "model": deployment.model}).json()
    assert by_server["total"] == {
        "requests": requests,
        "failed": failed,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "canceled": 0,
    }
    assert {row["server"] for row in by_server["rows"]} <= {*deployment.ids, ""}


def test_a_server_that_knows_no_stream_options_serves_nevertheless(deploy: Deploy) -> None:
    """Asked once in vain, it is asked for tokens no more; the client sees nothing of it, and a client that asks itself learns why."""

    async def strict(exchange: Exchange) -> None:
        if exchange.request.asked("stream_options") is not None:
            await exchange.answer(422, answers.error_body("extra fields not permitted: stream_options", kind="invalid_request_error"))
        else:
            await answer_well(exchange)

    backend = Backend("strict", strict)
    deployment = deploy(backend)
    for _ in range(2):
        answer = deployment.ask(stream=True)
        assert (answer.status_code, answer.text.endswith("data: [DONE]\n\n")) == (200, True)
        assert answer.headers["x-multiverse-attempts"] == "1"
    assert [request.asked("stream_options") is not None for request in backend.requests] == [True, False, False]
    assert deployment.ask(stream=True, stream_options={"include_usage": True}).status_code == 422
    assert deployment.state() == "healthy"
    assert totals(deployment) == (3, 1, 0, 0)


def test_what_a_server_says_beside_the_token_counts_is_not_lost(deploy: Deploy) -> None:
    """Like llama.cpp: `timings` stand in the event with the counts if they are asked for, and else in the last chunk, for us to read."""
    timings = {"cache_n": 4, "prompt_n": TOKENS[0] - 4, "predicted_n": TOKENS[1], "predicted_per_second": 21.5}

    async def timed(exchange: Exchange) -> None:
        asked = exchange.request.asked("stream_options") is not None
        word = answers.chat_event("timed", exchange.model, {"content": "one"})
        last = answers.chat_event("timed", exchange.model, {}, finish="stop")
        told = b', "timings": %b}\n\n' % json.dumps(timings).encode()
        counts = b'data: {"choices": [], "usage": %b' % json.dumps(answers.USAGE).encode()
        ending = [last, counts + told] if asked else [last.removesuffix(b"}\n\n") + told]
        await behaviours.stream([word, *ending, answers.DONE])(exchange)

    backend = Backend("timed", timed)
    deployment = deploy(backend)
    for number in range(3):
        answer = deployment.ask(stream=True)
        assert answer.text.count('"predicted_per_second": 21.5') == 1
        assert answer.text.endswith("data: [DONE]\n\n")
        assert ('"usage"' in answer.text) is (number == 0)
    assert [request.asked("stream_options") is not None for request in backend.requests] == [True, False, False]
    assert totals(deployment) == (3, 0, 3 * TOKENS[0], 3 * TOKENS[1])


def test_a_real_llama_server_keeps_its_timings_and_its_counts(gateway: GatewayProcess, operating: httpx2.Client) -> None:
    """Of each stream, asked for the counts or not."""
    for package in ("xllamacpp", "gguf"):
        require(package, "it makes and serves a real model")
    with LlamaServer("timed-llama") as llama:
        answer = operating.post("/admin/register", json={"model_name": "timed-llama", "endpoint_url": llama.url})
        assert answer.status_code == 201, answer.text
        body = {"model": "timed-llama", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        usage = operating.post("/v1/chat/completions", json=body).json()["usage"]
        for _ in range(2):
            text = operating.post("/v1/chat/completions", json={**body, "stream": True}).text
            assert text.count('"timings"') == 1
            assert text.endswith("data: [DONE]\n\n")
        rows = operating.get("/admin/usage", params={"by": "model", "model": "timed-llama"}).json()["rows"]
        operating.delete(f"/admin/register/{answer.json()['registration_id']}")
    assert [(row["prompt_tokens"], row["completion_tokens"]) for row in rows] == [(3 * usage["prompt_tokens"], 3 * 8)]


def test_use_is_counted_by_key_and_owner(deploy: Deploy) -> None:
    """By the name of the key that was sent."""
    deployment = deploy(Backend("good"), metadata={"student_id": "s1"})
    made = deployment.client.post("/admin/keys", json={"name": deployment.model, "models": [deployment.model]}).json()
    headers = {"x-api-key": "", "authorization": f"Bearer {made['key']}"}
    for _ in range(2):
        assert deployment.client.post("/v1/chat/completions", json=deployment.body(), headers=headers).status_code == 200
    refused = deployment.client.post("/v1/chat/completions", json={**deployment.body(), "model": "another"}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    row = counted(deployment, "client,owner")
    assert (row["client"], row["client_id"], row["owner"], row["requests"]) == (deployment.model, made["id"], "s1", 2)
    assert deployment.client.delete(f"/admin/keys/{made['id']}").status_code == 200


def test_the_figures_for_prometheus(deploy: Deploy) -> None:
    """Of this model: requests, attempts, time to the first byte, tokens, states; an unknown model has no label of its own."""
    deployment = deploy(Backend("down", behaviours.reset_first()), Backend("good"))
    deployment.keep_down()
    for _ in range(4):
        assert deployment.ask().status_code == 200
    deployment.client.post("/v1/chat/completions", json={**deployment.body(), "model": "nobody-has-this"})
    wait_until(lambda: deployment.state(0) == "unhealthy", within=5)
    text = deployment.client.get("/metrics", headers={"x-api-key": ""}).text
    for line in (
        f'multiverse_requests_total{{model="{deployment.model}",status="200"}} 4.0',
        f'multiverse_tokens_total{{kind="prompt",model="{deployment.model}"}} {4.0 * TOKENS[0]}',
        f'multiverse_first_byte_seconds_count{{model="{deployment.model}"}} 4.0',
        f'multiverse_attempts_total{{outcome="ok",server="{deployment.ids[1]}"}} 4.0',
        f'multiverse_attempts_total{{outcome="broken",server="{deployment.ids[0]}"}}',
        f'multiverse_server_state{{model="{deployment.model}",server="{deployment.ids[1]}",state="healthy"}} 1.0',
        f'multiverse_server_state{{model="{deployment.model}",server="{deployment.ids[0]}",state="unhealthy"}} 1.0',
        'multiverse_requests_total{model="other",status="404"}',
        "multiverse_probe_seconds_count",
        "process_resident_memory_bytes",
    ):
        assert line in text, line
    assert int(float(text.split("\nmultiverse_tasks ")[1].split()[0])) > 0
    assert "nobody-has-this" not in text
