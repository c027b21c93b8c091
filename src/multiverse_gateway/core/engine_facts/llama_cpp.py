"""Read llama.cpp: `/props` (slots, context of one slot, what it can see and hear) and its list of models, which also has a router's states.

A router runs a server of its own for each model that is loaded; a model that is not loaded is never asked about. The list calls every
model a completion model, so it proves nothing about chat or embeddings. A model whose template has no tools gets a generic one.
"""

from collections.abc import Collection, Mapping
from typing import Any

from multiverse_gateway.core.engine_facts.documents import entries, member, size, slots, text, tokens, truth
from multiverse_gateway.core.engine_facts.facts import Abilities, EngineFacts, EngineKind, ModelFacts
from multiverse_gateway.core.engine_facts.questions import LIST, MAX_ASKED, PROPS, Answers, Question, props
from multiverse_gateway.core.servers import is_among

OWNER = "llamacpp"


def is_llama_cpp(answers: Answers) -> bool:
    """Return whether llama.cpp answered, a server of its own or a router."""
    return any(slots(member(answer, "total_slots")) is not None or _is_router_props(answer) for answer in _props(answers))


def _props(answers: Answers) -> list[object]:
    return [answer for question, answer in answers.items() if question.target.partition("?")[0] == PROPS]


def _is_router_props(answer: object) -> bool:
    return member(answer, "role") == "router"


def _is_router(answers: Answers) -> bool:
    """Return whether the engine is a router: it says so, or it lists the states of its models."""
    listed = entries(answers.get(LIST), "data")
    return any(map(_is_router_props, _props(answers))) or any(member(entry, "status", "value") is not None for entry in listed)


def first(models: Collection[str]) -> tuple[Question, ...]:
    """Return what to ask first."""
    return (props(min(models, default="")), LIST)


def follow_up(answers: Answers, models: Collection[str]) -> tuple[Question, ...]:
    """Return what to ask next: a router about each of `models` that is loaded."""
    if not _is_router(answers):
        return ()
    loaded = [name for name, entry in _listed(answers) if _is_loaded(entry) and is_among(name, models)]
    return tuple(question for question in map(props, loaded[:MAX_ASKED]) if question not in answers)


def read(answers: Answers) -> EngineFacts:
    """Return what llama.cpp, or its router, says about itself and its models."""
    if _is_router(answers):
        return _read_router(answers)
    answer = next((answer for answer in _props(answers) if slots(member(answer, "total_slots")) is not None), None)
    named = text(member(answer, "model_alias")) or text(member(answer, "model_path"))
    name, entry = next(iter(_listed(answers)), (named, {}))
    return EngineFacts(
        kind=EngineKind.LLAMA_CPP,
        version=text(member(answer, "build_info")),
        slots=slots(member(answer, "total_slots")),
        models=() if name is None else (_model(name, entry, answer, is_loaded=True),),
        answers_any_name=True,
    )


def _read_router(answers: Answers) -> EngineFacts:
    models, versions, numbers = [], [], []
    for name, entry in _listed(answers):
        is_loaded = _is_loaded(entry)
        answer = answers.get(props(name)) if is_loaded else None
        versions.append(text(member(answer, "build_info")))
        numbers.append(slots(member(answer, "total_slots")))
        models.append(_model(name, entry, answer, is_loaded=is_loaded))
    own = [text(member(answer, "build_info")) for answer in _props(answers)]
    known = [number for number in numbers if number is not None]
    return EngineFacts(
        kind=EngineKind.LLAMA_CPP,
        version=next((version for version in (*own, *versions) if version is not None), None),
        slots=min(known, default=None),
        models=tuple(models),
    )


def _listed(answers: Answers) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, entry) for entry in entries(answers.get(LIST), "data") if (name := text(entry.get("id"))) is not None]


def _is_loaded(entry: Mapping[str, Any]) -> bool:
    return member(entry, "status", "value") == "loaded"


def _model(name: str, entry: Mapping[str, Any], answer: object, *, is_loaded: bool) -> ModelFacts:
    is_awake = is_loaded and member(answer, "is_sleeping") is not True
    context = tokens(member(answer, "default_generation_settings", "n_ctx"))
    return ModelFacts(
        name=name,
        is_loaded=is_awake,
        context=context if is_awake else None,
        trained_context=tokens(member(entry, "meta", "n_ctx_train")),
        size=size(member(entry, "meta", "size")),
        abilities=Abilities(
            tools=True if member(answer, "chat_template_caps", "supports_tools") is True else None,
            vision=truth(member(answer, "modalities", "vision")),
            audio=truth(member(answer, "modalities", "audio")),
        ),
    )
