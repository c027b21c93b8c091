"""What was read from the engine of a server, as the API shows it."""

from typing import Annotated, Literal

import attrs
from msgspec import Meta

from multiverse_gateway.core.engine_facts import Abilities, Measured, ModelFacts


@attrs.frozen(kw_only=True)
class MeasuredFacts:
    """What was read from the engine of a server; `null` is what it does not say."""

    engine: Literal["ollama", "llama.cpp", "vllm", "sglang", "lm-studio", "tgi", "tei", "other"]
    engine_version: str | None
    slots: Annotated[int | None, Meta(description="how many requests the engine says that it answers at once")]
    loaded: Annotated[bool | None, Meta(description="whether the model is in memory")]
    context_length: Annotated[int | None, Meta(description="tokens that one request has room for, while the model is loaded")]
    trained_context_length: Annotated[int | None, Meta(description="tokens that the model was made for")]
    size_bytes: int | None
    gpu_share: Annotated[float | None, Meta(description="part of the loaded model that is in the memory of a GPU, from 0 to 1")]
    quantization: str | None
    digest: str | None
    abilities: Abilities
    truncated_texts: Annotated[
        int, Meta(description="long texts of which the server has probably read only a part, as far as this process knows")
    ]


def measured_facts(measured: Measured | None, *, truncated_texts: int) -> MeasuredFacts | None:
    """Return what was read from an engine, as the API shows it; `None` before that."""
    if measured is None:
        return None
    model = measured.model or ModelFacts(name="")
    return MeasuredFacts(
        engine=measured.kind.value,
        engine_version=measured.version,
        slots=measured.slots,
        loaded=model.is_loaded,
        context_length=model.context,
        trained_context_length=model.trained_context,
        size_bytes=model.size,
        gpu_share=model.gpu_share,
        quantization=model.quantization,
        digest=model.digest,
        abilities=model.abilities,
        truncated_texts=truncated_texts,
    )
