"""What a server's engine says about itself, read from documents that are free: none generates a token, and none loads a model.

1. `next_questions` says what to ask, in rounds; the answers to one round decide the next. A known engine is asked only what it knows.
2. `read_engine` makes one value of the answers. Whatever a stranger's server writes is read or ignored, and never raises.
3. Proxies and other programs answer on some of these paths, too, so an answer counts only if it looks exactly like the engine's.
4. Nothing is guessed from a version or a name: what an engine does not say is unknown (`None`).
"""

from collections.abc import Collection

from multiverse_gateway.core.engine_facts import lists, llama_cpp, lm_studio, ollama
from multiverse_gateway.core.engine_facts.facts import UNKNOWN, Abilities, EngineFacts, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.engine_facts.questions import (
    INFO,
    LIST,
    LM_STUDIO_MODELS,
    OLLAMA_VERSION,
    SGLANG_MODEL,
    SGLANG_OLD_SERVER,
    SGLANG_SERVER,
    VLLM_VERSION,
    Answers,
    Question,
    props,
)

__all__ = [
    "UNKNOWN",
    "Abilities",
    "Answers",
    "EngineFacts",
    "EngineKind",
    "Measured",
    "ModelFacts",
    "Question",
    "kind_of",
    "next_questions",
    "read_engine",
]

_OWNERS = {
    "vllm": EngineKind.VLLM,
    "sglang": EngineKind.SGLANG,
    llama_cpp.OWNER: EngineKind.LLAMA_CPP,
    "library": EngineKind.OLLAMA,
}
"""What stands as `owned_by` in the list of models; `library` is Ollama's word for the models of its own library."""


def next_questions(
    answers: Answers, *, models: Collection[str], owned_by: str | None = None, before: EngineFacts | None = None
) -> tuple[Question, ...]:
    """Return what to ask an engine after these answers; an empty tuple ends the reading.

    At first there are no answers, or only the list of models.

    Args:
        answers: What was answered so far.
        models: The names of the models that matter.
        owned_by: What the list of models says about its owner, if it was read elsewhere.
        before: What an earlier reading of the same engine found.

    >>> [question.target for question in next_questions({}, models=["tiny"], owned_by="vllm")]
    ['/v1/models', '/version']
    """
    if answers.keys() <= {LIST}:
        expected = _expected(owned_by or lists.owner(answers), before)
        return tuple(question for question in _first(expected, models) if question not in answers)
    kind = kind_of(answers)
    if kind is EngineKind.OLLAMA:
        missing = tuple(question for question in ollama.FIRST if question not in answers)
        return missing or ollama.follow_up(answers, models, before)
    if kind is EngineKind.LLAMA_CPP:
        missing = tuple(question for question in (LIST,) if question not in answers)
        return missing or llama_cpp.follow_up(answers, models)
    if kind is EngineKind.SGLANG:
        return tuple(question for question in (LIST, SGLANG_MODEL) if question not in answers)
    if kind is EngineKind.VLLM:
        return tuple(question for question in (VLLM_VERSION,) if question not in answers)
    return lm_studio.follow_up(answers) if LM_STUDIO_MODELS in answers else ()


def _expected(owned_by: str | None, before: EngineFacts | None) -> EngineKind | None:
    if before is not None and before.kind is not EngineKind.OTHER:
        return before.kind
    return _OWNERS.get(owned_by or "")


def _first(kind: EngineKind | None, models: Collection[str]) -> tuple[Question, ...]:
    if kind is EngineKind.OLLAMA:
        return ollama.FIRST
    if kind is EngineKind.LLAMA_CPP:
        return llama_cpp.first(models)
    if kind is EngineKind.VLLM:
        return (LIST, VLLM_VERSION)
    if kind is EngineKind.SGLANG:
        return (LIST, SGLANG_SERVER, SGLANG_OLD_SERVER, SGLANG_MODEL)
    if kind is EngineKind.LM_STUDIO:
        return (LM_STUDIO_MODELS,)
    if kind is EngineKind.TGI or kind is EngineKind.TEI:
        return (INFO,)
    return (LIST, props(min(models, default="")), SGLANG_SERVER, SGLANG_OLD_SERVER, INFO, OLLAMA_VERSION, LM_STUDIO_MODELS)


def kind_of(answers: Answers) -> EngineKind | None:
    """Return which engine answered, `None` if none did.

    >>> from multiverse_gateway.core.engine_facts.questions import OLLAMA_VERSION
    >>> kind_of({OLLAMA_VERSION: {"version": "0.12.5"}}), kind_of({OLLAMA_VERSION: {"version": "1", "commit": "c"}})
    (<EngineKind.OLLAMA: 'ollama'>, None)
    """
    if llama_cpp.is_llama_cpp(answers):
        return EngineKind.LLAMA_CPP
    if lists.is_sglang(answers):
        return EngineKind.SGLANG
    if lists.is_inference_server(answers):
        return lists.read_inference_server(answers).kind
    if ollama.is_ollama(answers):
        return EngineKind.OLLAMA
    if lm_studio.is_lm_studio(answers):
        return EngineKind.LM_STUDIO
    owner = lists.owner(answers)
    kind = _OWNERS.get(owner or "")
    if kind is not None and kind is not EngineKind.OLLAMA:  # anybody may own a library
        return kind
    return EngineKind.OTHER if isinstance(answers.get(LIST), dict) else None


def read_engine(answers: Answers, *, before: EngineFacts | None = None) -> EngineFacts | None:
    """Return what an engine says, `None` if no answer is of use.

    >>> read_engine({LIST: {"data": [{"id": "tiny", "owned_by": "vllm", "max_model_len": 8192}]}}).model("tiny").context
    8192
    """
    kind = kind_of(answers)
    if kind is EngineKind.OLLAMA:
        return ollama.read(answers, before)
    if kind is EngineKind.LLAMA_CPP:
        return llama_cpp.read(answers)
    if kind is EngineKind.SGLANG:
        return lists.read_sglang(answers)
    if kind is EngineKind.VLLM:
        return lists.read_vllm(answers)
    if kind is EngineKind.LM_STUDIO:
        return lm_studio.read(answers)
    if kind is EngineKind.TGI or kind is EngineKind.TEI:
        return lists.read_inference_server(answers)
    return None if kind is None else lists.read_other(answers)
