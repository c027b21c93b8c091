"""What engines say about themselves, from answers as the real ones send them, and from answers that nobody should send."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.engine_facts import (
    UNKNOWN,
    Abilities,
    Answers,
    EngineFacts,
    EngineKind,
    Measured,
    ModelFacts,
    Question,
    kind_of,
    next_questions,
    read_engine,
)
from multiverse_gateway.core.engine_facts.documents import MAX_DOCUMENT, document, entries, member, words
from multiverse_gateway.core.engine_facts.questions import LIST, MAX_ASKED, OLLAMA_TAGS, OLLAMA_VERSION, props, show
from multiverse_gateway.core.servers import MAX_CONCURRENCY, MAX_TOKENS
from support import engine_documents as documents


class Asked:
    """A scripted engine that answers by path, and remembers what it was asked."""

    def __init__(self, states: Mapping[str, Any], targets: Mapping[str, Any] | None = None) -> None:
        """Answer with `states` by path; `targets` go first, by path and query."""
        self.states = {**states, **(targets or {})}
        self.questions: list[Question] = []

    def read(self, *models: str, owned_by: str | None = None, before: EngineFacts | None = None) -> EngineFacts | None:
        """Ask in rounds, as the gateway does."""
        answers: Answers = {}
        while questions := next_questions(answers, models=models, owned_by=owned_by, before=before):
            self.questions += questions
            for question in questions:
                path = question.target.partition("?")[0]
                answers[question] = self.states.get(question.target, self.states.get(path))
        assert len(set(self.questions)) == len(self.questions)
        return read_engine(answers, before=before)

    @property
    def paths(self) -> list[str]:
        """The paths that were asked for, in order."""
        return [question.target.partition("?")[0] for question in self.questions]


def facts(states: Mapping[str, Any], *models: str) -> EngineFacts:
    engine = Asked(states).read(*models)
    assert engine is not None
    return engine


def test_ollama_states_its_models_their_abilities_and_the_context_of_those_that_are_loaded() -> None:
    engine = facts(documents.OLLAMA, "qwen3:8b")
    assert (engine.kind, engine.version, engine.slots) == (EngineKind.OLLAMA, "0.12.5", None)
    assert engine.model("qwen3:8b") == ModelFacts(
        name="qwen3:8b",
        is_loaded=True,
        context=8192,
        trained_context=131072,
        size=5225388164,
        gpu_share=0.8,
        quantization="Q4_K_M",
        digest="500a1f067a9f",
        abilities=Abilities(chat=True, completions=True, embeddings=False, tools=True, vision=False, reasoning=True, json_schema=True),
    )
    embedder = engine.model("nomic-embed-text")
    assert embedder is not None
    assert (embedder.is_loaded, embedder.context, embedder.abilities) == (False, None, UNKNOWN)
    assert engine.of("nomic-embed-text").context is None


def test_ollama_is_asked_about_a_model_once_and_again_when_its_digest_changes() -> None:
    engine = facts(documents.OLLAMA, "qwen3:8b")
    again = Asked(documents.OLLAMA)
    assert again.read("qwen3:8b", before=engine) == engine
    assert again.paths == ["/api/version", "/api/tags", "/api/ps"]
    changed = json.loads(json.dumps(documents.OLLAMA))
    changed["/api/tags"]["models"][0]["digest"] = "new"
    changed["/api/show"] |= {"capabilities": ["embedding"]}
    updated = Asked(changed)
    after = updated.read("qwen3:8b", before=engine)
    assert updated.questions[-1] == show("qwen3:8b")
    assert after is not None
    assert after.of("qwen3").abilities == UNKNOWN
    assert after.of("qwen3:8b").abilities == Abilities(
        chat=False, completions=False, embeddings=True, tools=False, vision=False, reasoning=False, json_schema=False
    )


def test_ollama_that_says_little_is_known_little() -> None:
    few = {
        "/api/version": {"version": "0.4.0"},
        "/api/tags": {"models": [{"name": "tiny", "digest": "d"}, {"size": 5}]},
        "/api/ps": {"models": None},
    }
    assert facts(few, "tiny").models == (ModelFacts(name="tiny", digest="d"),)
    loaded = {
        "/api/ps": {"models": [{"model": "tiny:latest", "size": 0, "size_vram": 1}, {"model": 5}]},
        "/api/show": {"capabilities": ["audio"]},
    }
    [model] = facts({**few, **loaded}, "tiny").models
    assert (model.is_loaded, model.context, model.gpu_share, model.abilities.audio, model.trained_context) == (True, None, None, True, None)
    assert facts({**few, "/api/show": {"capabilities": None}}, "tiny").models == (ModelFacts(name="tiny", digest="d"),)


def test_only_models_that_matter_are_asked_about_and_not_too_many() -> None:
    names = [f"model{number}" for number in range(2 * MAX_ASKED)]
    states = {**documents.OLLAMA, "/api/tags": {"models": [{"model": name} for name in names]}}
    engine = Asked(states)
    engine.read(*names)
    assert engine.paths.count("/api/show") == MAX_ASKED
    engine = Asked(states)
    engine.read("model7")
    assert engine.questions[-1] == show("model7")


def test_llama_cpp_states_slots_context_and_modalities() -> None:
    engine = facts(documents.LLAMA_CPP, "whatever")
    assert (engine.kind, engine.version, engine.slots) == (EngineKind.LLAMA_CPP, "b6900-abcdef12", 4)
    assert engine.of("whatever").model == ModelFacts(
        name="tiny",
        is_loaded=True,
        context=4096,
        trained_context=131072,
        size=512000,
        abilities=Abilities(tools=True, vision=True, audio=False),
    )
    assert engine.of("whatever").context == 4096


def test_a_sleeping_llama_cpp_has_no_context_and_one_without_a_list_goes_by_its_file() -> None:
    sleeping = {**documents.LLAMA_CPP["/props"], "is_sleeping": True, "chat_template_caps": {"supports_tools": False}}
    model = facts({"/props": sleeping}, "tiny").of("tiny").model
    assert model is not None
    assert (model.name, model.is_loaded, model.context, model.abilities.tools) == ("/models/tiny.gguf", False, None, None)
    nameless = facts({"/props": {"total_slots": 1}}, "tiny")
    assert (nameless.models, nameless.of("tiny").model, nameless.of("tiny").abilities, nameless.of("tiny").context) == (
        (),
        None,
        UNKNOWN,
        None,
    )


def test_a_router_is_asked_about_loaded_models_only_and_never_to_load_one() -> None:
    one = {**documents.LLAMA_CPP["/props"], "total_slots": 2}
    engine = Asked(documents.LLAMA_CPP_ROUTER, {props("org/one:Q4_K_M").target: one})
    found = engine.read("org/one:Q4_K_M", "org/two:Q8_0", "org/three:Q8_0")
    assert found is not None
    assert (found.kind, found.version, found.slots) == (EngineKind.LLAMA_CPP, "b6900-abcdef12", 2)
    assert [(model.name, model.is_loaded, model.context) for model in found.models] == [
        ("org/one:Q4_K_M", True, 4096),
        ("org/two:Q8_0", False, None),
        ("org/three:Q8_0", False, None),
    ]
    assert found.model("unlisted") is None
    asked = [question.target for question in engine.questions if question.target.startswith("/props")]
    assert all(target.endswith("&autoload=false") for target in asked)
    assert asked == [props("org/one:Q4_K_M").target]
    first = Asked(documents.LLAMA_CPP_ROUTER)
    first.read("org/two:Q8_0")
    assert first.questions.count(props("org/two:Q8_0")) == 1  # the first question cannot know what is loaded


def test_a_router_whose_properties_are_refused_is_known_by_its_list() -> None:
    engine = Asked({"/v1/models": documents.LLAMA_CPP_ROUTER["/v1/models"]})
    found = engine.read("org/one:Q4_K_M", owned_by="llamacpp")
    assert found is not None
    assert (found.kind, found.slots, found.of("org/one:Q4_K_M").context, len(found.models)) == (EngineKind.LLAMA_CPP, None, None, 3)


def test_vllm_states_contexts_and_an_adapter_has_that_of_its_model() -> None:
    engine = facts(documents.VLLM, "poet")
    assert (engine.kind, engine.version, engine.slots) == (EngineKind.VLLM, "0.11.0", None)
    assert [(model.name, model.is_loaded, model.context) for model in engine.models] == [("meta/llama", True, 16384), ("poet", True, 16384)]
    assert engine.of("unlisted").model is None
    by_list = {"/v1/models": documents.VLLM["/v1/models"]}
    assert Asked(by_list).read("poet", owned_by="vllm") == evolve(engine, version=None)


def test_sglang_states_its_limit_and_what_its_model_understands() -> None:
    engine = facts(documents.SGLANG, "any-name")
    assert (engine.kind, engine.version, engine.slots) == (EngineKind.SGLANG, "0.5.4", 32)
    assert engine.of("any-name").model == ModelFacts(
        name="Qwen/Qwen3-8B",
        is_loaded=True,
        context=40960,
        quantization="fp8",
        abilities=Abilities(chat=True, completions=True, embeddings=False, tools=True, vision=False, audio=False, json_schema=True),
    )


def test_an_sglang_that_embeds_or_says_little() -> None:
    embeds = {
        "/get_model_info": {"model_path": "e5", "is_generation": False},
        "/get_server_info": {"max_running_requests": 8, "reasoning_parser": "x"},
    }
    [model] = facts(embeds, "e5").models
    assert (model.name, model.abilities.embeddings, model.abilities.chat, model.abilities.reasoning) == ("e5", True, False, True)
    nameless = facts({"/server_info": {"max_running_requests": 8, "context_length": 100}}, "e5")
    assert (nameless.slots, nameless.models) == (8, ())
    by_owner = Asked({"/v1/models": documents.SGLANG["/v1/models"]}).read("e5", owned_by="sglang")
    assert by_owner is not None
    assert (by_owner.kind, by_owner.slots, by_owner.of("e5").context) == (EngineKind.SGLANG, None, 40960)


def test_lm_studio_states_what_is_loaded_and_the_older_list_what_it_has() -> None:
    engine = Asked(documents.LM_STUDIO)
    found = engine.read("google/gemma-3-4b")
    assert found is not None
    assert found.kind is EngineKind.LM_STUDIO
    assert found.model("google/gemma-3-4b") == ModelFacts(
        name="google/gemma-3-4b",
        is_loaded=True,
        context=4096,
        trained_context=131072,
        size=3341130752,
        quantization="Q4_K_M",
        abilities=Abilities(chat=True, completions=True, embeddings=False, vision=True, json_schema=True),
    )
    thinker, embedder = found.of("openai/gpt-oss-20b"), found.of("nomic-embed")
    assert (thinker.context, thinker.abilities.tools, thinker.abilities.reasoning, thinker.abilities.vision) == (None, True, True, False)
    assert (embedder.abilities.chat, embedder.abilities.embeddings) == (False, True)
    assert "/api/v0/models" not in engine.paths
    assert Asked(documents.LM_STUDIO).read("nomic-embed", before=found) == found

    older = facts(documents.LM_STUDIO_BEFORE, "qwen3-8b")
    assert [(model.name, model.is_loaded, model.context, model.abilities.vision, model.abilities.tools) for model in older.models] == [
        ("qwen2-vl-7b", False, None, True, None),
        ("qwen3-8b", True, 4096, False, True),
        ("nomic-embed", False, None, False, False),
    ]


def test_a_model_that_lm_studio_has_loaded_twice_promises_the_smaller_context_by_its_key() -> None:
    def loaded(*contexts: int | None) -> EngineFacts:
        instances = [{"id": f"big:{number}", "config": {"context_length": context}} for number, context in enumerate(contexts)]
        return facts({"/api/v1/models": {"models": [{"key": "big", "type": "other", "loaded_instances": instances}]}}, "big")

    assert [loaded(8192, 4096).of(name).context for name in ("big:0", "big:1", "big")] == [8192, 4096, 4096]
    assert loaded(8192, None).of("big").context is None
    assert loaded(8192).of("big").abilities.chat is None


def test_text_generation_inference_and_its_sister_for_embeddings() -> None:
    engine = facts(documents.TGI, "any")
    assert (engine.kind, engine.version, engine.slots, engine.of("any").context) == (EngineKind.TGI, "3.0.0", 128, 4096)
    assert engine.of("any").abilities == Abilities(chat=True, completions=True, vision=True)
    ranks = facts(documents.TEI, "any")
    assert (ranks.kind, ranks.slots, ranks.of("any").context) == (EngineKind.TEI, 512, 512)
    assert ranks.of("any").abilities == Abilities(chat=False, completions=False, embeddings=False, rerank=True)
    assert Asked(documents.TEI).read("any", before=ranks) == ranks
    assert facts({"/info": {"max_concurrent_requests": 2}}, "any") == EngineFacts(kind=EngineKind.TGI, slots=2, answers_any_name=True)


def test_a_server_that_only_lists_models_promises_what_the_list_says() -> None:
    engine = Asked(documents.LISTS_ONLY)
    found = engine.read("tiny")
    assert found == EngineFacts(kind=EngineKind.OTHER, models=(ModelFacts(name="tiny", trained_context=32768), ModelFacts(name="other")))
    assert len(engine.questions) == 8
    assert Asked({}).read("tiny") is None
    assert Asked({"/v1/models": ["tiny"]}).read("tiny") is None
    assert Asked({"/v1/models": ["tiny"]}).read("tiny", owned_by="vllm") is None


def test_a_list_that_was_read_already_is_not_read_again() -> None:
    answers: Answers = {LIST: documents.LLAMA_CPP["/v1/models"]}
    assert next_questions(answers, models=["tiny"]) == (props("tiny"),)
    assert len(next_questions({LIST: None}, models=["tiny"])) == 6


def test_what_was_learned_of_an_engine_narrows_the_questions() -> None:
    for states, paths in (
        (documents.LLAMA_CPP, ["/props", "/v1/models"]),
        (documents.SGLANG, ["/v1/models", "/server_info", "/get_server_info", "/get_model_info"]),
        (documents.TGI, ["/info"]),
        (documents.VLLM, ["/v1/models", "/version"]),
    ):
        before = facts(states, "tiny")
        engine = Asked(states)
        assert engine.read("tiny", before=before) == before
        assert engine.paths == paths


def test_a_library_need_not_be_ollama_s() -> None:
    assert kind_of({LIST: {"data": [{"id": "tiny", "owned_by": "library"}]}}) is EngineKind.OTHER
    assert next_questions({}, models=["tiny"], owned_by="library")[0] == OLLAMA_VERSION


def test_the_first_of_two_entries_of_a_model_counts() -> None:
    twice = EngineFacts(kind=EngineKind.OTHER, models=(ModelFacts(name="a", context=1), ModelFacts(name="a:latest", context=2)))
    assert twice.of("a").context == 1
    assert twice.of("a") == Measured(kind=EngineKind.OTHER, model=ModelFacts(name="a", context=1))


# Documents that nobody should send

NAMES = sorted(
    {
        *("models", "data", "id", "key", "name", "model", "size", "size_vram", "context_length", "digest", "details", "capabilities"),
        *("model_info", "general.architecture", "total_slots", "default_generation_settings", "n_ctx", "modalities", "vision", "meta"),
        *(
            "role",
            "status",
            "value",
            "max_model_len",
            "parent",
            "owned_by",
            "version",
            "max_running_requests",
            "internal_states",
            "n_ctx_train",
        ),
        *(
            "loaded_instances",
            "config",
            "type",
            "state",
            "max_concurrent_requests",
            "model_type",
            "model_id",
            "is_generation",
            "model_path",
        ),
        *("chat_template_caps", "loaded_context_length", "quantization", "max_total_tokens"),
    }
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["router", "loaded", "llamacpp", "vllm", "sglang", "llm", "embedding", "tiny", "completion", ""])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=20,
)
BODIES = VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)
PATHS = ["/v1/models", "/props", "/server_info", "/get_server_info", "/info", "/api/version", "/api/tags", "/api/ps", "/api/show"]
MORE_PATHS = ["/api/v1/models", "/api/v0/models", "/get_model_info", "/version"]
REAL = [
    documents.OLLAMA,
    documents.LLAMA_CPP,
    documents.LLAMA_CPP_ROUTER,
    documents.VLLM,
    documents.SGLANG,
    documents.LM_STUDIO,
    documents.TGI,
]


def texts_of(engine: EngineFacts) -> Iterable[str | None]:
    yield engine.version
    for model in engine.models:
        yield from (model.name, model.quantization, model.digest)


def assert_bounded(engine: EngineFacts) -> None:
    assert engine.slots is None or 1 <= engine.slots <= MAX_CONCURRENCY
    assert len(engine.models) <= 1_000_000
    assert all(text is None or (0 < len(text) <= 256 and text.isprintable()) for text in texts_of(engine))
    for model in engine.models:
        assert model.context is None or (1 <= model.context <= MAX_TOKENS and model.is_loaded is True)
        assert model.trained_context is None or 1 <= model.trained_context <= MAX_TOKENS
        assert model.size is None or 1 <= model.size <= 2**53
        assert model.gpu_share is None or 0 <= model.gpu_share <= 1


@given(st.sampled_from(REAL), st.dictionaries(st.sampled_from([*PATHS, *MORE_PATHS]), BODIES, max_size=6))
def test_whatever_an_engine_answers_it_is_read_or_ignored(real: Mapping[str, Any], bodies: Mapping[str, bytes]) -> None:
    """No exception, no endless questions, and no value out of bounds: real answers with some of them replaced by anything."""
    asked = Asked({**real, **{path: document(200, body) for path, body in bodies.items()}})
    engine = asked.read("tiny", "qwen3:8b")
    assert len(asked.questions) < 20
    if engine is not None:
        assert_bounded(engine)
        again = Asked(asked.states).read("tiny", "qwen3:8b", before=engine)
        assert again is None or again.kind in EngineKind


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"{}"),
        (200, b""),
        (200, b"<html>"),
        (200, b'{"a": "\xff"}'),
        (200, b"[" * 100_000),
        (200, b'{"a":' * 50_000),
        (200, b'"' + b"x" * MAX_DOCUMENT + b'"'),
    ],
)
def test_what_is_no_document_says_nothing(status: int, body: bytes) -> None:
    assert document(status, body) is None


def test_documents_are_read_leniently() -> None:
    assert document(200, b'\xef\xbb\xbf{"a": NaN}') == {"a": {}}
    assert document(200, b"1" + b"0" * 400) is not None
    assert member({"a": 5}, "a", "b") is None
    assert entries({"data": [{"id": "x"}] * 5000}, "data")[999:] == [{"id": "x"}]
    assert entries(5, "data") == []
    assert words({"tools": True}) is None
    assert OLLAMA_TAGS.body is None
