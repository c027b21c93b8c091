"""What a request needs of a server, and which servers it may go to then."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.aliases import Alias
from multiverse_gateway.core.engine_facts import Abilities, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.health import Health, HealthState
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.needs import (
    MAX_VALUES,
    MOST_CHARACTERS,
    Bounds,
    Needs,
    bounds_of,
    can,
    context_of,
    is_too_long,
    needs_of,
    was_cut,
)
from multiverse_gateway.core.routing import Model, build_table, candidates
from multiverse_gateway.core.servers import Capabilities, Server, ServerId

CHAT = "/v1/chat/completions"
ALL = Bounds(differing=frozenset({"chat", "completions", "embeddings", "rerank", "tools", "vision", "audio"}))
LONG = Bounds(least_context=100, largest_context=1000)


def server(name: str, *, declared: int | None = None, cap: int | None = None) -> Server:
    return Server(
        id=ServerId(name),
        model_name="llama",
        endpoint_url=f"http://{name}",
        capabilities=Capabilities(context_length=declared),
        max_concurrency=cap,
        registered_at=float(ord(name[0])),
        created_at=0,
        updated_at=0,
    )


def measured(context: int | None = None, **abilities: bool) -> Measured:
    is_loaded = None if context is None else True
    model = ModelFacts(name="llama", is_loaded=is_loaded, context=context, abilities=Abilities(**abilities))
    return Measured(kind=EngineKind.OLLAMA, model=model)


def model_of(*facts: Measured | None, states: str = "", declared: int | None = None) -> Model:
    """Return a model with the servers a, b, c …; `states` has an "x" for each that is unhealthy, and a "-" for one that was taken out."""
    kinds = {"x": HealthState.UNHEALTHY, "-": HealthState.DEACTIVATED}
    servers = [server(chr(ord("a") + number), declared=declared) for number in range(len(facts))]
    states = states.ljust(len(facts))
    health = {
        each.id: Health(state=kinds.get(state, HealthState.HEALTHY), measured=fact)
        for each, fact, state in zip(servers, facts, states, strict=True)
    }
    return build_table(1, servers, health).models["llama"]


def suited(model: Model, *abilities: str, characters: int = 0, excluded: str = "") -> str:
    found = model.suited(Needs(frozenset(abilities), characters), frozenset(map(ServerId, excluded)))
    return "".join(route.server.id for route in found.routes)


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def picture(kind: str) -> bytes:
    return body(messages=[{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": kind, kind: {}}]}])


# What a request needs


@pytest.mark.parametrize(
    ("path", "sent", "abilities"),
    [
        (CHAT, body(messages=[]), {"chat"}),
        ("/v1/messages", body(messages=[]), {"chat"}),
        ("/v1/completions", body(prompt="x"), {"completions"}),
        ("/v1/embeddings", body(input="x"), {"embeddings"}),
        ("/v1/rerank", body(query="x"), {"rerank"}),
        ("/v1/audio/speech", body(input="x"), set()),
        (CHAT, body(messages=[], tools=[{"type": "function"}]), {"chat", "tools"}),
        (CHAT, body(messages=[], tools=[]), {"chat"}),
        (CHAT, body(messages=[{"role": "user", "content": 'say "tools"'}]), {"chat"}),
        (CHAT, body(messages=[{"role": "user", "content": [{"type": "tools"}]}]), {"chat"}),
        (CHAT, picture("image_url"), {"chat", "vision"}),
        ("/v1/messages", picture("image"), {"chat", "vision"}),
        ("/v1/responses", body(input=[{"content": [{"type": "input_image"}]}]), {"vision"}),
        (CHAT, picture("input_audio"), {"chat", "audio"}),
        (CHAT, body(messages=[{"role": "user", "content": "image"}], tools=[{"type": "image"}]), {"chat", "tools"}),
        (CHAT, body(messages=[{"type": ["image"]}, {"type": "image_of"}]), {"chat"}),
        (CHAT, b'{"tools": [', {"chat"}),
        (CHAT, b'["tools"]', {"chat"}),
        (CHAT, b'{"tools": ' + b"[" * 100_000, {"chat"}),
        (CHAT, b'{"tools": [0' + b",0" * MAX_VALUES + b"]}", {"chat"}),
    ],
)
def test_a_path_and_a_body_need_abilities(path: str, sent: bytes, abilities: set[str]) -> None:
    assert needs_of(ALL, path, sent) == Needs(frozenset(abilities))


def test_only_abilities_in_which_servers_differ_are_looked_for() -> None:
    sent = picture("image_url")
    assert needs_of(Bounds(differing=frozenset({"tools"})), CHAT, sent) == Needs()
    assert needs_of(Bounds(differing=frozenset({"vision"})), CHAT, sent) == Needs(frozenset({"vision"}))


@pytest.mark.parametrize(
    ("path", "fields", "characters"),
    [
        (CHAT, {"messages": [{"role": "", "content": "x" * 5000}]}, 5000),
        (CHAT, {"messages": [{"role": "", "content": "ä" * 5000}], "max_tokens": 10**9, "metadata": {"a": "y" * 9999}}, 5000),
        (CHAT, {"messages": [{"content": [{"type": "", "text": "x" * 3000}]}], "tools": [{"description": "y" * 3000}]}, 6000),
        (CHAT, {"messages": [{"content": [{"image_url": {"url": "data:image/png;base64," + "A" * 9000}}]}]}, 0),
        (CHAT, {"messages": [{"content": [{"input_audio": {"data": "A" * 9000, "format": ""}}]}]}, 0),
        (CHAT, {"messages": [{"content": [{"file": {"file_data": "A" * 9000}}]}]}, 0),
        ("/v1/messages", {"system": "s" * 2048, "messages": [{"content": [{"source": {"type": "", "data": "A" * 9000}}]}]}, 2048),
        (CHAT, {"messages": [{"content": [{"data": [{"text": "x" * 2048}]}]}]}, 2048),
        ("/v1/completions", {"prompt": "x" * 5000}, 5000),
        ("/v1/completions", {"prompt": ["x" * 2048, "y" * 3072]}, 3072),
        ("/v1/completions", {"prompt": [1] * 2000}, 0),
        ("/v1/embeddings", {"input": ["x" * 2048] * 500}, 2048),
        ("/v1/embeddings", {"input": []}, 0),
        ("/v1/responses", {"input": [{"content": "x" * 2048}, {"content": "x" * 2048}], "instructions": "z" * 9999}, 4096),
        ("/v1/rerank", {"input": "x" * 5000}, 0),
    ],
)
def test_text_counts_and_encoded_bytes_do_not(path: str, fields: dict[str, Any], characters: int) -> None:
    assert needs_of(LONG, path, body(**fields, padding=" " * 300)) == Needs(characters=characters - characters % 1024)


def test_the_images_of_a_large_body_are_not_decoded_and_a_text_that_begins_like_one_is_read() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
    text = {"type": "text", "text": "x" * 4096}
    both = Bounds(differing=frozenset({"vision"}), least_context=100)
    assert needs_of(both, CHAT, body(messages=[{"content": [image, text]}])) == Needs(frozenset({"vision"}), 4096)
    quoted = {"type": "text", "text": 'data: "quoted" ' + "x" * 400_000}
    assert needs_of(both, CHAT, body(messages=[{"content": [image, text, quoted]}])) == Needs(frozenset({"vision"}), 4096)


def test_a_body_that_is_small_is_not_counted() -> None:
    assert LONG.most_bytes == 300
    assert Bounds(differing=frozenset({"chat"}), least_context=5).most_bytes == -1
    assert needs_of(Bounds(least_context=10_000), CHAT, body(messages=[{"content": "x" * 29_000}])) == Needs()


@given(st.sampled_from([CHAT, "/v1/embeddings", "/v1/responses"]), st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_whatever_a_body_is_it_can_be_looked_at(path: str, sent: bytes) -> None:
    both = Bounds(differing=ALL.differing, least_context=1, largest_context=1)
    for text in (sent, b'{"messages": ["image", "tools", ' + sent + b"]}", b'{"tools": "' + sent + b'"}'):
        needs = needs_of(both, path, text)
        assert 0 <= needs.characters <= len(text)


# What servers can do


def test_a_context_counts_while_it_is_measured_and_the_smaller_promise_counts() -> None:
    assert context_of(server("a"), None) is None
    assert context_of(server("a", declared=512), None) is None
    assert context_of(server("a", declared=512), measured()) is None
    assert context_of(server("a"), measured(4096)) == 4096
    assert context_of(server("a", declared=512), measured(4096)) == 512
    assert context_of(server("a", declared=8192), measured(4096)) == 4096
    assert context_of(server("a"), Measured(kind=EngineKind.OTHER)) is None


def test_what_is_unknown_counts_as_able() -> None:
    assert can(None, ["vision"])
    assert can(measured(), ["vision"])
    assert can(measured(vision=True), ["vision", "tools"])
    assert not can(measured(vision=True, tools=False), ["vision", "tools"])
    assert can(Measured(kind=EngineKind.OTHER), ["chat"])


def test_nothing_is_looked_at_where_nothing_is_measured_or_all_are_the_same_without_a_context() -> None:
    plain = server("a")
    assert bounds_of([]) is None
    assert bounds_of([(plain, None), (plain, None)]) is None
    assert bounds_of([(plain, measured(vision=False)), (plain, measured(vision=False))]) is None
    assert bounds_of([(plain, measured(vision=False)), (plain, None)]) == Bounds(differing=frozenset({"vision"}))
    assert bounds_of([(plain, measured(100)), (plain, measured(200))]) == Bounds(least_context=100, largest_context=200)
    assert bounds_of([(plain, measured(100)), (plain, measured())]) == Bounds(least_context=100)


def test_only_certainty_refuses() -> None:
    assert not is_too_long(LONG, Needs(characters=MOST_CHARACTERS * 1000))
    assert is_too_long(LONG, Needs(characters=MOST_CHARACTERS * 1000 + 1))
    assert not is_too_long(Bounds(least_context=100), Needs(characters=10**9))


@pytest.mark.parametrize(
    ("characters", "context", "tokens", "cut"),
    [
        (80_000, 4096, 4096, True),
        (80_000, 4096, 1024, True),
        (80_000, 4096, 1023, False),  # such a number may leave out what the server had read before
        (80_000, 4096, 10_000, False),
        (12_000, 4096, 1200, False),  # it fits
        (80_000, None, 4096, False),
        (80_000, 4096, 0, False),
    ],
)
def test_a_server_that_counts_far_too_few_tokens_has_cut_the_text(characters: int, context: int | None, tokens: int, cut: bool) -> None:
    assert was_cut(Needs(characters=characters), context, tokens) is cut


# Which servers get it


def test_a_request_goes_only_to_servers_that_can_serve_it() -> None:
    model = model_of(measured(vision=False), measured(vision=True), None)
    assert suited(model, "vision") == "bc"
    assert suited(model) == "abc"
    assert suited(model, "vision", excluded="b") == "bc"
    assert suited(model_of(measured(vision=False), measured(vision=True), states=" x"), "vision") == "b"  # it waits for b, or is refused


def test_if_no_server_can_every_server_may_say_so() -> None:
    assert suited(model_of(measured(vision=False), measured(vision=False)), "vision") == "ab"
    assert suited(model_of(measured(vision=False), measured(vision=True), states=" -"), "vision") == "ab"


def test_a_long_text_prefers_a_server_with_room_and_else_the_one_with_most() -> None:
    model = model_of(measured(1000), measured(4000), measured(8000))
    assert suited(model, characters=2000) == "abc"
    assert suited(model, characters=9000) == "bc"
    assert suited(model, characters=20_000) == "c"
    assert suited(model, characters=200_000) == "c"
    assert suited(model, characters=9000, excluded="bc") == "a"
    assert suited(model, characters=200_000, excluded="c") == "b"
    assert suited(model, characters=9000, excluded="abc") == "abc"
    assert suited(model_of(measured(1000), measured(4000), states=" x"), characters=9000) == "a"
    assert suited(model_of(measured(1000), None), characters=9000) == "b"
    assert suited(model_of(measured(4000), measured(4000), declared=100), characters=9000) == "ab"


def test_the_servers_of_all_models_of_an_alias_count_together() -> None:
    """The order of an alias decides among the models that can serve a request; one that cannot is passed over."""
    facts = {"a": measured(1000, vision=False), "b": measured(8000, vision=True), "c": measured(4000, vision=True)}
    servers = [attrs.evolve(server(name), model_name=f"model-{name}") for name in facts]
    health = {ServerId(name): Health(state=HealthState.HEALTHY, measured=fact) for name, fact in facts.items()}
    alias = Alias(name="any", models=("model-a", "model-b", "model-c"), created_at=0, updated_at=0)
    model = build_table(1, servers, health, aliases=[alias]).aliases["any"]

    def first(*abilities: str, characters: int = 0) -> str:
        narrowed = model.suited(Needs(frozenset(abilities), characters))
        found = candidates(narrowed, Load(), stream=False, path=CHAT, excluded=(), now=5.0)
        return "".join(each.id for each in found.ready)

    assert (first(), first("vision"), first(characters=9000), first(characters=20_000), first(characters=200_000)) == (
        "a",
        "b",
        "b",
        "b",
        "b",
    )
    assert [tier.name for tier in model.suited(Needs(frozenset({"vision"}))).tiers] == ["model-b", "model-c"]


def test_needs_narrow_the_candidates_and_the_usual_request_is_answered_in_advance() -> None:
    model = model_of(measured(1000), measured(8000))
    usual = candidates(model, Load(), stream=False, path=CHAT, excluded=(), now=5.0)
    assert usual is candidates(model, Load(), stream=False, path=CHAT, excluded=(), now=5.0)
    assert usual.bounds == model.bounds == Bounds(least_context=1000, largest_context=8000)
    found = candidates(model.suited(Needs(characters=9000)), Load(), stream=False, path=CHAT, excluded=(), now=5.0)
    assert [each.id for each in found.ready] == ["b"]
    assert model_of(None, None).bounds is None
