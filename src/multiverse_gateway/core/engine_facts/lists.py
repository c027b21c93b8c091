"""Read the engines that run one set of models until they end: vLLM, SGLang, TGI and TEI, and any server that only lists its models."""

from collections.abc import Mapping
from typing import Any

from multiverse_gateway.core.engine_facts.documents import entries, member, slots, text, tokens, truth
from multiverse_gateway.core.engine_facts.facts import UNKNOWN, Abilities, EngineFacts, EngineKind, ModelFacts
from multiverse_gateway.core.engine_facts.questions import INFO, LIST, SGLANG_MODEL, SGLANG_OLD_SERVER, SGLANG_SERVER, VLLM_VERSION, Answers


def owner(answers: Answers) -> str | None:
    """Return who owns the first model of the list; engines write their own name there."""
    return next((text(entry.get("owned_by")) for entry in entries(answers.get(LIST), "data")), None)


def _listed(answers: Answers) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, entry) for entry in entries(answers.get(LIST), "data") if (name := text(entry.get("id"))) is not None]


# vLLM


def read_vllm(answers: Answers) -> EngineFacts:
    """Return what vLLM says; an adapter (LoRA) has the context of the model that it belongs to.

    vLLM does not say how many requests it runs at once, nor what kind of model it has.
    """
    listed = _listed(answers)
    contexts = {name: tokens(entry.get("max_model_len")) for name, entry in listed}
    models = []
    for name, entry in listed:
        context = contexts[name] or contexts.get(text(entry.get("parent")) or "")
        models.append(ModelFacts(name=name, is_loaded=True, context=context))
    version = text(member(answers.get(VLLM_VERSION), "version"))
    return EngineFacts(kind=EngineKind.VLLM, version=version, models=tuple(models))


# SGLang


def is_sglang(answers: Answers) -> bool:
    """Return whether SGLang stated how many requests it runs at once."""
    return _sglang_slots(_sglang_server(answers)) is not None


def _sglang_server(answers: Answers) -> object:
    new = answers.get(SGLANG_SERVER)
    return new if isinstance(new, dict) and _sglang_slots(new) is not None else answers.get(SGLANG_OLD_SERVER) or new


def _sglang_slots(server: object) -> int | None:
    """Return the number that SGLang was started with, or what its schedulers made of the memory that they have."""
    limit = slots(member(server, "max_running_requests"))
    if limit is not None:
        return limit
    states = entries(server, "internal_states")
    numbers = [slots(state.get("effective_max_running_requests_per_dp", state.get("max_running_requests"))) or 0 for state in states]
    return slots(sum(numbers))


def read_sglang(answers: Answers) -> EngineFacts:
    """Return what SGLang says about itself and the one model that it runs."""
    server, model = _sglang_server(answers), answers.get(SGLANG_MODEL)
    generates = truth(member(model, "is_generation"))
    named = text(member(server, "served_model_name")) or text(member(model, "model_path"))
    name, entry = next(iter(_listed(answers)), (named, {}))
    context = tokens(entry.get("max_model_len")) or tokens(member(server, "context_length"))
    facts = (
        None
        if name is None
        else ModelFacts(
            name=name,
            is_loaded=True,
            context=context,
            quantization=text(member(server, "quantization")),
            abilities=Abilities(
                chat=generates,
                completions=generates,
                embeddings=None if generates is None else not generates,
                vision=truth(member(model, "has_image_understanding")),
                audio=truth(member(model, "has_audio_understanding")),
                tools=True if text(member(server, "tool_call_parser")) else None,
                reasoning=True if text(member(server, "reasoning_parser")) else None,
                json_schema=generates,
            ),
        )
    )
    return EngineFacts(
        kind=EngineKind.SGLANG,
        version=text(member(server, "version")),
        slots=_sglang_slots(server),
        models=() if facts is None else (facts,),
        answers_any_name=True,
    )


# Text Generation Inference and Text Embeddings Inference


def is_inference_server(answers: Answers) -> bool:
    """Return whether one of the two answered: both state how many requests they take."""
    return slots(member(answers.get(INFO), "max_concurrent_requests")) is not None


def read_inference_server(answers: Answers) -> EngineFacts:
    """Return what TGI or TEI says about itself and the one model that it runs; only TEI says what kind of model it is."""
    info = answers.get(INFO)
    model_type = member(info, "model_type")
    kind = EngineKind.TEI if isinstance(model_type, dict) else EngineKind.TGI
    if isinstance(model_type, dict):
        context = tokens(member(info, "max_input_length"))
        abilities = Abilities(chat=False, completions=False, embeddings="embedding" in model_type, rerank="reranker" in model_type)
    else:
        context = tokens(member(info, "max_total_tokens"))
        task = text(member(info, "model_pipeline_tag"))
        abilities = Abilities(chat=True, completions=True, vision=True) if task == "image-text-to-text" else UNKNOWN
    name = text(member(info, "model_id"))
    model = (
        None
        if name is None
        else ModelFacts(name=name, is_loaded=True, context=context, digest=text(member(info, "model_sha")), abilities=abilities)
    )
    return EngineFacts(
        kind=kind,
        version=text(member(info, "version")),
        slots=slots(member(info, "max_concurrent_requests")),
        models=() if model is None else (model,),
        answers_any_name=True,
    )


# Any other


def read_other(answers: Answers) -> EngineFacts:
    """Return what a list of models says; a number of tokens in it is a promise, not what is allocated."""
    models = [
        ModelFacts(
            name=name,
            trained_context=next((number for field in _ADVERTISED if (number := tokens(member(entry, *field))) is not None), None),
        )
        for name, entry in _listed(answers)
    ]
    return EngineFacts(kind=EngineKind.OTHER, models=tuple(models))


_ADVERTISED = (("max_model_len",), ("context_length",), ("context_window",), ("meta", "n_ctx_train"))
"""Where lists of models have a context."""
