"""What was read from engines, in words for the pages."""

from collections.abc import Sequence

from attrs import asdict

from multiverse_gateway.core.engine_facts import Abilities, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.servers import Server
from multiverse_gateway.pages.words import count

ENGINES = {
    EngineKind.OLLAMA: "Ollama",
    EngineKind.LLAMA_CPP: "llama.cpp",
    EngineKind.VLLM: "vLLM",
    EngineKind.SGLANG: "SGLang",
    EngineKind.LM_STUDIO: "LM Studio",
    EngineKind.TGI: "Text Generation Inference",
    EngineKind.TEI: "Text Embeddings Inference",
    EngineKind.OTHER: "not known",
}
_ABILITIES = {
    "chat": "chat",
    "completions": "completions",
    "embeddings": "embeddings",
    "rerank": "reranking",
    "tools": "tools",
    "vision": "images",
    "audio": "audio",
    "reasoning": "reasoning",
    "json_schema": "JSON schema",
}


def engine_facts(server: Server, measured: Measured | None, *, cut_texts: int = 0) -> Sequence[tuple[str, str]]:
    """Return what is shown of a server's engine and model: pairs of a label and a text; empty before anything was read.

    `cut_texts` is how many long texts the server has read only in part.
    """
    if measured is None:
        return ()
    engine = " ".join(filter(None, [ENGINES[measured.kind], measured.version]))
    facts = [("Engine", engine), ("Engine's slots", None if measured.slots is None else count(measured.slots, "request") + " at once")]
    if measured.model is not None:
        facts += _model_facts(server, measured.model)
    if cut_texts:
        facts.append(("Cut texts", f"{count(cut_texts, 'long text')} since the gateway started; a larger context would prevent that"))
    return [(label, text) for label, text in facts if text]


def _model_facts(server: Server, model: ModelFacts) -> list[tuple[str, str | None]]:
    return [
        ("Model in memory", _loaded(model)),
        ("Measured context", context_words(model.context, model.trained_context, declared=server.capabilities.context_length)),
        ("Size", ", ".join(filter(None, [None if model.size is None else f"{model.size / 1e9:.1f} GB", model.quantization]))),
        ("Can do", able(model.abilities)),
        ("Cannot do", able(model.abilities, answer=False)),
        ("Digest", model.digest),
    ]


def _loaded(model: ModelFacts) -> str | None:
    if model.is_loaded is None:
        return None
    if not model.is_loaded:
        return "not loaded; the next request loads it"
    return "loaded" if model.gpu_share is None else f"loaded, {round(100 * model.gpu_share)} % on the GPU"


def context_words(served: int | None, trained: int | None, *, declared: int | None = None) -> str | None:
    """Return a context in words, `None` if nothing is known of it; `declared` is what the registration states.

    >>> context_words(8192, 131072), context_words(None, 131072), context_words(8192, 8192)
    ('8,192 tokens served (131,072 advertised)', '131,072 tokens advertised', '8,192 tokens served')
    >>> context_words(8192, None, declared=4096)
    '8,192 tokens served; routing uses the registered 4,096'
    """
    if served is None:
        return None if trained is None else f"{count(trained, 'token')} advertised"
    more = f" ({trained:,} advertised)" if trained is not None and trained != served else ""
    limit = f"; routing uses the registered {declared:,}" if declared is not None and declared < served else ""
    return f"{count(served, 'token')} served{more}{limit}"


def able(abilities: Abilities, *, answer: bool = True) -> str:
    """Return the abilities that a model has, or with another `answer` those that it lacks, in words.

    >>> able(Abilities(chat=True, vision=False)), able(Abilities(chat=True, vision=False), answer=False)
    ('chat', 'images')
    """
    return ", ".join(_ABILITIES[name] for name, known in asdict(abilities).items() if known is answer)
