"""Canceled requests are counted apart from failed ones, with the tokens that came until then: at both doors, in HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import h2.events
import pytest

from e2e.deployment import Deployment
from support import answers, behaviours
from support.backends import Backend, Exchange
from support.h2_client import H2Client
from support.processes import DOORS
from support.raw_client import RawClient
from support.sockets import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True, scope="module")]

Deploy = Callable[..., Deployment]
STREAMS = {
    "/v1/chat/completions": (1, (0, 3)),
    "/v1/completions": (0, (0, 3)),
    "/v1/responses": (1, (7, 5)),  # as the first event of the scripted server reports
    "/v1/messages": (2, (7, 3)),  # the first event reports the prompt, and one token of output
}
"""By path: events that come before the first token, and the tokens that are counted when three have come."""


def counts(deployment: Deployment) -> tuple[int, int, int]:
    """Return the requests for the deployment's model, and those of them that failed or were canceled."""
    total = deployment.client.get("/admin/usage", params={"model": deployment.model}).json()["total"]
    return total["requests"], total["failed"], total["canceled"]


def tokens(deployment: Deployment) -> tuple[int, int]:
    """Return the prompt and completion tokens that are counted for the deployment's model."""
    total = deployment.client.get("/admin/usage", params={"model": deployment.model}).json()["total"]
    return total["prompt_tokens"], total["completion_tokens"]


def waiting_requests(deployment: Deployment) -> int:
    """Return how many requests wait for the deployment's model."""
    models = deployment.client.get("/v1/queue").json()["data"]
    return sum(model["waiting"] for model in models if model["model"] == deployment.model)


def body_of(deployment: Deployment, path: str) -> dict[str, Any]:
    """Return the body of a request for a stream on a path."""
    more: dict[str, Any] = {"prompt": "Hello", "input": "Hello", "max_tokens": 100}
    return {**deployment.body(stream=True), **more}


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_is_stopped_counts_its_tokens(deploy: Deploy, path: str) -> None:
    """Each event with output is a token; those that only begin an answer are none."""
    before, expected = STREAMS[path]
    deployment = deploy(Backend("patient", behaviours.stall_stream(before + 3)))
    with RawClient(deployment.gateway.port) as client:
        client.request("POST", path, json=body_of(deployment, path))
        for _ in range(before + 3):
            client.read_event()
        client.abort()
    wait_until(lambda: counts(deployment) == (1, 0, 1), what="the request was not counted as canceled")
    assert tokens(deployment) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_canceled_before_its_answer_has_no_tokens(deploy: Deploy, stream: bool) -> None:
    """It is counted at the server that was asked."""
    deployment = deploy(Backend("silent", behaviours.stall()))
    with RawClient(deployment.gateway.port) as client:
        deployment.begin(client, stream=stream)
        wait_until(lambda: deployment.backends[0].hits == 1)
        client.close()
    wait_until(lambda: counts(deployment) == (1, 0, 1), what="the request was not counted as canceled")
    (row,) = deployment.client.get("/admin/usage", params={"model": deployment.model, "by": "server"}).json()["rows"]
    assert (row["server"], row["canceled"], tokens(deployment)) == (deployment.ids[0], 1, (0, 0))


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_canceled_in_the_queue_used_no_server(deploy: Deploy, stream: bool) -> None:
    """The request that runs meanwhile is not counted before its end."""
    gate = behaviours.Gate()
    deployment = deploy(Backend("narrow", gate.held()), max_concurrency=1)
    with RawClient(deployment.gateway.port) as first, RawClient(deployment.gateway.port) as waiting:
        deployment.begin(first)
        wait_until(lambda: deployment.backends[0].hits == 1)
        deployment.begin(waiting, stream=stream)
        wait_until(lambda: waiting_requests(deployment) == 1)
        waiting.abort()
        wait_until(lambda: counts(deployment) == (1, 0, 1), what="the request was not counted as canceled")
        gate.open()
        assert first.read_response().status == 200
    wait_until(lambda: counts(deployment) == (2, 0, 1))
    rows = deployment.client.get("/admin/usage", params={"model": deployment.model, "by": "server"}).json()["rows"]
    assert {row["server"]: row["canceled"] for row in rows} == {"": 1, deployment.ids[0]: 0}


def test_a_stream_of_http2_that_is_reset_is_canceled(deploy: Deploy) -> None:
    """Its tokens count as well."""
    deployment = deploy(Backend("patient", behaviours.stall_stream(3)))
    with H2Client(deployment.gateway.port) as client:
        stream = client.ask("POST", "/v1/chat/completions", json.dumps(deployment.body(stream=True)).encode())
        came = b""
        while b"word1" not in came:
            event = client.read(h2.events.DataReceived, stream)
            assert isinstance(event, h2.events.DataReceived)
            came += event.data
        client.reset(stream)
        wait_until(lambda: counts(deployment) == (1, 0, 1), what="the request was not counted as canceled")
    assert tokens(deployment) == (0, 2)


def test_a_server_that_answers_499_has_not_been_canceled(deploy: Deploy) -> None:
    """The status means a client that left, but this client is still there: the request failed."""
    deployment = deploy(Backend("proxy", behaviours.status(499)))
    assert deployment.ask().status_code == 499
    assert counts(deployment) == (1, 1, 0)


def test_a_client_that_leaves_after_the_last_event_has_its_whole_answer(deploy: Deploy) -> None:
    """It did not have to wait until the server closed its connection."""

    async def lingering(exchange: Exchange) -> None:
        await behaviours.send_events(exchange, answers.chat_events("patient", exchange.model), end=False)
        await exchange.forever()

    deployment = deploy(Backend("lingering", lingering))
    with RawClient(deployment.gateway.port) as client:
        deployment.begin(client, stream=True)
        while b"[DONE]" not in client.read_event():
            pass
        client.close()
    wait_until(lambda: counts(deployment) == (1, 0, 0), what="the request was not counted as answered")


def test_the_metrics_count_canceled_requests(deploy: Deploy) -> None:
    """By model, with the status 499 and the tokens that came."""
    deployment = deploy(Backend("patient", behaviours.stall_stream(3)))
    with RawClient(deployment.gateway.port) as client:
        deployment.begin(client, stream=True)
        for _ in range(3):
            client.read_event()
        client.abort()
    wait_until(lambda: counts(deployment) == (1, 0, 1))
    text = deployment.client.get("/metrics", headers={"x-api-key": ""}).text
    for line in (
        f'multiverse_requests_canceled_total{{model="{deployment.model}"}} 1.0',
        f'multiverse_requests_total{{model="{deployment.model}",status="499"}} 1.0',
        f'multiverse_tokens_total{{kind="completion",model="{deployment.model}"}} 2.0',
    ):
        assert line in text, line
