"""What a request needs of a server decides where it goes, when it waits, and when it is refused."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest

from multiverse_gateway.core.engine_facts import Abilities, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.explaining import judged
from multiverse_gateway.core.health import HealthState
from multiverse_gateway.core.routing import Verdict
from multiverse_gateway.relay.ports import Phase
from support.exchanges import MODEL, RecordingClient, RecordingEngine, envelope, server

PICTURE = json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]}]}).encode()


def text(characters: int) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x" * characters}]}).encode()


def stage_of(*facts: tuple[int | None, bool | None], cap: int | None = None) -> RecordingEngine:
    """Return a gateway with the servers a, b, c …, each with its context and whether it sees."""
    names = [chr(ord("a") + number) for number in range(len(facts))]
    stage = RecordingEngine([server(name, cap=cap, registered_at=number) for number, name in enumerate(names)])
    for name, (context, sees) in zip(names, facts, strict=True):
        model = ModelFacts(name=MODEL, is_loaded=True, context=context, abilities=Abilities(vision=sees))
        stage.set_health(name, measured=Measured(kind=EngineKind.OLLAMA, model=model))
    return stage


def code(client: RecordingClient) -> Any:
    return json.loads(client.data)["error"]["code"]


def test_a_picture_goes_to_a_server_that_sees_and_waits_for_it() -> None:
    stage = stage_of((None, False), (None, True), cap=1)
    first, _ = stage.start(body=PICTURE)
    second, client = stage.start(body=PICTURE)
    third, _ = stage.start(body=text(5))
    assert stage.tried() == ["b", "a"]
    assert [exchange.phase for exchange in (first, second, third)] == [Phase.TRYING, Phase.QUEUED, Phase.TRYING]
    stage.of(third)[0].answer()
    assert second.phase is Phase.QUEUED
    stage.of(first)[0].answer()
    assert stage.tried() == ["b", "a", "b"]
    stage.last.answer()
    assert client.status == 200
    stage.check()


def test_a_picture_is_refused_while_no_server_that_sees_works_and_anybody_may_refuse_it_if_none_can() -> None:
    stage = stage_of((None, False), (None, True))
    stage.set_health("b", state=HealthState.UNHEALTHY)
    _, client = stage.start(body=PICTURE)
    assert (client.status, code(client), stage.tried()) == (503, "no_healthy_server", [])
    blind = stage_of((None, False), (None, False))
    blind.start(body=PICTURE)
    assert blind.tried() == ["a"]


def test_a_long_text_goes_where_there_is_room() -> None:
    stage = stage_of((1000, None), (8000, None), (4000, None))
    exchange, _ = stage.start(body=text(10_000))
    stage.start(body=text(20_000))
    stage.start(body=text(100_000))
    assert stage.tried()[1:] == ["b", "b"]
    assert stage.tried()[0] in "bc"
    assert exchange.request.envelope.needs is not None
    judgments = judged(stage.table.models[MODEL], stage.load, exchange.request.envelope, excluded=frozenset(), now=stage.clock)
    assert [verdict for _, verdict in judgments] == [Verdict.UNSUITED, Verdict.READY, Verdict.READY]


def test_a_text_that_fits_nowhere_is_refused_in_words_that_libraries_know() -> None:
    stage = stage_of((1000, None), (2000, None))
    _, client = stage.start(body=text(70_000))
    error = json.loads(client.data)["error"]
    assert (client.status, error["code"], error["type"], error["param"]) == (
        400,
        "context_length_exceeded",
        "invalid_request_error",
        "messages",
    )
    assert error["message"].startswith("This model's maximum context length is 2000 tokens. However, ")
    assert stage.tried() == []
    stage.check()
    unsure = stage_of((1000, None), (None, None))
    unsure.start(body=text(70_000))
    assert unsure.tried() == ["b"]


@pytest.mark.parametrize(("tokens", "header"), [(1000, b"1"), (20_000, None)])
def test_an_answer_to_a_text_that_was_cut_says_so(tokens: int, header: bytes | None) -> None:
    stage = stage_of((1000, None))
    _, client = stage.start(body=text(30_000))
    stage.last.answer(body=json.dumps({"choices": [], "usage": {"prompt_tokens": tokens, "completion_tokens": 5}}).encode())
    assert (client.status, client.headers.get(b"x-multiverse-truncated")) == (200, header)
    assert stage.health_book.cut_texts == ({} if header is None else {"a": 1})
    stage.check()


def test_a_server_that_left_meanwhile_has_cut_nothing() -> None:
    stage = stage_of((1000, None))
    _, client = stage.start(body=text(30_000))
    stage.remove("a")
    stage.last.answer(body=b'{"choices": [], "usage": {"prompt_tokens": 1000}}')
    assert (client.status, client.headers.get(b"x-multiverse-truncated")) == (200, None)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/responses"])
def test_a_refusal_names_the_field_of_the_call(path: str) -> None:
    field = "prompt" if path == "/v1/completions" else "input"
    stage = stage_of((1000, None))
    asked = attrs.evolve(envelope(), path=path)
    _, client = stage.start(asked=asked, body=json.dumps({field: "x" * 40_000}).encode())
    assert (client.status, json.loads(client.data)["error"]["param"]) == (400, field)
