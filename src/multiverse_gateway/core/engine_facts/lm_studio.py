"""Read LM Studio: `/api/v1/models` (0.4 and later) or `/api/v0/models`.

Both list what is on the disk and say what is loaded. To ask for a model by a request would load it; to read the lists does not.
"""

from collections.abc import Mapping
from typing import Any

from attrs import evolve

from multiverse_gateway.core.engine_facts.documents import entries, member, size, text, tokens, truth, words
from multiverse_gateway.core.engine_facts.facts import Abilities, EngineFacts, EngineKind, ModelFacts
from multiverse_gateway.core.engine_facts.questions import LM_STUDIO_MODELS, LM_STUDIO_OLD_MODELS, Answers, Question


def is_lm_studio(answers: Answers) -> bool:
    """Return whether LM Studio answered."""
    return bool(_listed(answers) or _listed_before(answers))


def follow_up(answers: Answers) -> tuple[Question, ...]:
    """Return what to ask next: the older list, if there is no newer one."""
    return () if _listed(answers) or LM_STUDIO_OLD_MODELS in answers else (LM_STUDIO_OLD_MODELS,)


def read(answers: Answers) -> EngineFacts:
    """Return what LM Studio says. A loaded model has a name of its own, which may differ from that on the disk."""
    models = [facts for name, entry in _listed(answers) for facts in _models(name, entry)]
    if not models:
        models = [_model_before(name, entry) for name, entry in _listed_before(answers)]
    return EngineFacts(kind=EngineKind.LM_STUDIO, models=tuple(models))


def _listed(answers: Answers) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (name, entry)
        for entry in entries(answers.get(LM_STUDIO_MODELS), "models")
        if (name := text(entry.get("key"))) is not None and isinstance(entry.get("loaded_instances"), list)
    ]


def _listed_before(answers: Answers) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (name, entry)
        for entry in entries(answers.get(LM_STUDIO_OLD_MODELS), "data")
        if (name := text(entry.get("id"))) is not None and text(entry.get("state")) is not None
    ]


def _models(key: str, entry: Mapping[str, Any]) -> list[ModelFacts]:
    capabilities = entry.get("capabilities")
    abilities = _abilities(
        entry.get("type"),
        vision=truth(member(capabilities, "vision")),
        tools=member(capabilities, "trained_for_tool_use") is True,
        reasoning=isinstance(member(capabilities, "reasoning"), dict),
    )
    model = ModelFacts(
        name=key,
        is_loaded=False,
        trained_context=tokens(entry.get("max_context_length")),
        size=size(entry.get("size_bytes")),
        quantization=text(member(entry, "quantization", "name")),
        abilities=abilities,
    )
    instances = entries(entry, "loaded_instances")
    contexts = {text(instance.get("id")) or key: tokens(member(instance, "config", "context_length")) for instance in instances}
    if contexts and key not in contexts:  # a request by the key goes to any of them
        known = [context for context in contexts.values() if context is not None]
        contexts[key] = min(known) if len(known) == len(contexts) else None
    loaded = [evolve(model, name=name, is_loaded=True, context=context) for name, context in contexts.items()]
    return loaded or [model]


def _model_before(name: str, entry: Mapping[str, Any]) -> ModelFacts:
    kind, is_loaded = entry.get("type"), entry.get("state") == "loaded"
    tools = "tool_use" in (words(entry.get("capabilities")) or ())
    return ModelFacts(
        name=name,
        is_loaded=is_loaded,
        context=tokens(entry.get("loaded_context_length")) if is_loaded else None,
        trained_context=tokens(entry.get("max_context_length")),
        quantization=text(entry.get("quantization")),
        abilities=_abilities(kind, vision=kind == "vlm" if kind in ("llm", "vlm") else None, tools=tools, reasoning=False),
    )


def _abilities(kind: object, *, vision: bool | None, tools: bool, reasoning: bool) -> Abilities:
    if kind in ("embedding", "embeddings"):
        return Abilities(chat=False, completions=False, embeddings=True, tools=False, vision=False)
    generates = True if kind in ("llm", "vlm") else None
    return Abilities(
        chat=generates,
        completions=generates,
        embeddings=False if generates else None,
        tools=True if tools else None,  # a model that was not trained for them gets a generic template
        vision=vision,
        reasoning=True if reasoning else None,
        json_schema=generates,
    )
