"""Which calls fail over: those that leave nothing behind after any failure, the others only if the server did nothing with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from e2e.deployment import Deployment
from support import behaviours
from support.backends import Backend, Behaviour

pytestmark = pytest.mark.e2e

Deploy = Callable[..., Deployment]

GOOD = behaviours.answer(200, b'{"choices":[],"data":[],"results":[],"output":[],"content":[]}')
STATELESS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {}),
    "completions": ("/v1/completions", {"prompt": "x"}),
    "embeddings": ("/v1/embeddings", {"input": "x"}),
    "rerank": ("/v1/rerank", {"query": "x", "documents": ["x"]}),
    "Cohere's rerank": ("/v2/rerank", {"query": "x", "documents": ["x"]}),
    "reranking": ("/v1/reranking", {"query": "x", "documents": ["x"]}),
    "score": ("/v1/score", {"text_1": "x", "text_2": "y"}),
    "moderations": ("/v1/moderations", {"input": "x"}),
    "messages": ("/v1/messages", {"max_tokens": 5}),
    "counting tokens": ("/v1/messages/count_tokens", {}),
    "a response that is not stored": ("/v1/responses", {"input": "x", "store": False}),
    "speech": ("/v1/audio/speech", {"input": "x", "voice": "x"}),
    "an image": ("/v1/images/generations", {"prompt": "x"}),
}
STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "a response": ("/v1/responses", {"input": "x"}),
    "a response in the background": ("/v1/responses", {"input": "x", "store": False, "background": True}),
    "chat that is stored": ("/v1/chat/completions", {"store": True}),
    "an unknown call": ("/v1/unknown", {}),
    "a batch": ("/v1/batches", {}),
}
REFUSALS: dict[str, Behaviour] = {
    "404": behaviours.status(404, message="Not Found"),
    "401": behaviours.unauthorized(),
    "503": behaviours.status(503),
    "no such model": behaviours.model_not_found(),
}
FAILURES: dict[str, Behaviour] = {"500": behaviours.status(500), "closing": behaviours.eof_first()}


def ask_the_failing(deployment: Deployment, path: str, fields: dict[str, Any]) -> httpx2.Response:
    """Ask until the first server got a request, and return the answer to that one."""
    failing = deployment.backends[0]
    for _ in range(4):
        answer = deployment.client.post(path, json={"messages": [], **fields, "model": deployment.model})
        if failing.hits:
            return answer
    raise AssertionError("the first server was never asked")


@pytest.mark.parametrize("failure", ["404", "401", *FAILURES])
@pytest.mark.parametrize(("path", "fields"), STATELESS.values(), ids=STATELESS.keys())
def test_a_stateless_call_fails_over(deploy: Deploy, path: str, fields: dict[str, Any], failure: str) -> None:
    """Whatever one server answers, the client gets the answer of the other one."""
    deployment = deploy(Backend("failing", (REFUSALS | FAILURES)[failure]), Backend("sound", GOOD))
    answer = ask_the_failing(deployment, path, fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-gateway-server-id"] == deployment.ids[1]
    assert answer.headers["x-multiverse-attempts"] == "2"


@pytest.mark.parametrize(
    ("path", "fields"), [call for call in STATELESS.values() if "audio" not in call[0] and "images" not in call[0]], ids=str
)
def test_an_error_with_status_200_is_no_answer(deploy: Deploy, path: str, fields: dict[str, Any]) -> None:
    """LM Studio answers so to every call that it does not have; all of these are answered with JSON by those that have them."""
    deployment = deploy(Backend("failing", behaviours.answer(200, b'{"error":"Unexpected endpoint or method."}')), Backend("sound", GOOD))
    answer = ask_the_failing(deployment, path, fields)
    assert (answer.status_code, answer.headers["x-multiverse-attempts"]) == (200, "2")
    assert "error" not in answer.json()


@pytest.mark.parametrize("failure", REFUSALS)
@pytest.mark.parametrize(("path", "fields"), STATEFUL.values(), ids=STATEFUL.keys())
def test_a_stateful_call_fails_over_if_the_server_did_nothing(deploy: Deploy, path: str, fields: dict[str, Any], failure: str) -> None:
    """A server that refuses has left nothing behind."""
    deployment = deploy(Backend("failing", REFUSALS[failure]), Backend("sound", GOOD))
    answer = ask_the_failing(deployment, path, fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-multiverse-attempts"] == "2"


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("path", "fields"), STATEFUL.values(), ids=STATEFUL.keys())
def test_a_stateful_call_is_never_made_twice(deploy: Deploy, path: str, fields: dict[str, Any], failure: str) -> None:
    """After a server read the request and failed, it may have done the work: one hit in all."""
    deployment = deploy(Backend("failing", FAILURES[failure]), Backend("sound", GOOD))
    answer = ask_the_failing(deployment, path, fields)
    assert answer.status_code == 504
    assert answer.headers["x-multiverse-attempts"] == "1"
    assert deployment.backends[0].hits == 1


@pytest.mark.parametrize("failure", ["401", "404", *FAILURES])
def test_a_transcription_fails_over(deploy: Deploy, failure: str) -> None:
    """A form may be repeated as JSON may."""
    deployment = deploy(Backend("failing", (REFUSALS | FAILURES)[failure]), Backend("sound", GOOD))
    attempts = 0
    while attempts < 4 and not deployment.backends[0].hits:
        attempts += 1
        files = {"file": ("a.wav", b"RIFF", "audio/wav")}
        answer = deployment.client.post("/v1/audio/transcriptions", data={"model": deployment.model}, files=files)
        assert answer.status_code == 200, answer.text
    assert deployment.backends[0].hits == 1
