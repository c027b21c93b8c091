"""Read Ollama: `/api/version`, `/api/tags` (its models), `/api/ps` (those that are loaded), and `/api/show` for a model's abilities.

Ollama says neither how many requests it answers at once nor how many it queues. `/api/ps` has the context that is really allocated, by
default far less than the model was made for; `/api/show` has the latter.
"""

from collections.abc import Collection, Mapping
from typing import Any

from attrs import evolve

from multiverse_gateway.core.engine_facts.documents import entries, member, size, text, tokens, words
from multiverse_gateway.core.engine_facts.facts import UNKNOWN, Abilities, EngineFacts, EngineKind, ModelFacts
from multiverse_gateway.core.engine_facts.questions import (
    MAX_ASKED,
    OLLAMA_LOADED,
    OLLAMA_TAGS,
    OLLAMA_VERSION,
    Answers,
    Question,
    show,
)
from multiverse_gateway.core.servers import model_key

FIRST = (OLLAMA_VERSION, OLLAMA_TAGS, OLLAMA_LOADED)


def is_ollama(answers: Answers) -> bool:
    """Return whether Ollama answered: it states its version and nothing else, where llama-swap and Open WebUI add more."""
    version = answers.get(OLLAMA_VERSION)
    return isinstance(version, dict) and set(version) == {"version"} and isinstance(version["version"], str)


def follow_up(answers: Answers, models: Collection[str], before: EngineFacts | None) -> tuple[Question, ...]:
    """Return what to ask next: each of `models` that is new since `before`, or has another digest."""
    wanted = {model_key(name) for name in models}
    asked = [show(model.name) for model in _listed(answers) if model_key(model.name) in wanted and _earlier(model, before) is None]
    return tuple(question for question in dict.fromkeys(asked[:MAX_ASKED]) if question not in answers)


def read(answers: Answers, before: EngineFacts | None) -> EngineFacts:
    """Return what Ollama says; what `/api/show` said about a model holds as long as its digest stays."""
    loaded = {model_key(name): entry for entry in entries(answers.get(OLLAMA_LOADED), "models") if (name := _name(entry)) is not None}
    knows_loaded = isinstance(member(answers.get(OLLAMA_LOADED), "models"), list)
    models = []
    for model in _listed(answers):
        shown = answers.get(show(model.name))
        earlier = _earlier(model, before)
        if shown is not None:
            model = evolve(model, abilities=_abilities(shown), trained_context=_trained_context(shown))
        elif earlier is not None:
            model = evolve(model, abilities=earlier.abilities, trained_context=earlier.trained_context)
        models.append(_as_loaded(model, loaded.get(model_key(model.name))) if knows_loaded else model)
    version = text(member(answers.get(OLLAMA_VERSION), "version"))
    return EngineFacts(kind=EngineKind.OLLAMA, version=version, models=tuple(models))


def _name(entry: Mapping[str, Any]) -> str | None:
    return text(entry.get("model")) or text(entry.get("name"))


def _listed(answers: Answers) -> list[ModelFacts]:
    return [
        ModelFacts(
            name=name,
            size=size(entry.get("size")),
            digest=text(entry.get("digest")),
            quantization=text(member(entry, "details", "quantization_level")),
        )
        for entry in entries(answers.get(OLLAMA_TAGS), "models")
        if (name := _name(entry)) is not None
    ]


def _earlier(model: ModelFacts, before: EngineFacts | None) -> ModelFacts | None:
    """Return what was known of a model, if it was asked about and is still the same."""
    known = None if before is None else before.model(model.name)
    if known is None or model.digest is None or known.digest != model.digest or known.abilities == UNKNOWN:
        return None
    return known


def _as_loaded(model: ModelFacts, entry: Mapping[str, Any] | None) -> ModelFacts:
    if entry is None:
        return evolve(model, is_loaded=False)
    total, on_gpu = size(entry.get("size")), entry.get("size_vram")
    share = min(1.0, on_gpu / total) if total is not None and isinstance(on_gpu, int) and on_gpu >= 0 else None
    return evolve(model, is_loaded=True, context=tokens(entry.get("context_length")), gpu_share=share)


def _abilities(shown: object) -> Abilities:
    capabilities = words(member(shown, "capabilities"))
    if capabilities is None:
        return UNKNOWN
    generates = "completion" in capabilities
    return Abilities(
        chat=generates,
        completions=generates,
        embeddings="embedding" in capabilities,
        tools="tools" in capabilities,
        vision="vision" in capabilities,
        audio=True if "audio" in capabilities else None,
        reasoning="thinking" in capabilities,
        json_schema=generates,
    )


def _trained_context(shown: object) -> int | None:
    architecture = text(member(shown, "model_info", "general.architecture"))
    return None if architecture is None else tokens(member(shown, "model_info", f"{architecture}.context_length"))
