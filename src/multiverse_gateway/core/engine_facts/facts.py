"""What an engine says about itself and its models, as one frozen value."""

from enum import StrEnum

from attrs import field, frozen

from multiverse_gateway.core.servers import model_key


class EngineKind(StrEnum):
    """The engines whose documents the gateway can read. `OTHER` is any server that only lists its models."""

    OLLAMA = "ollama"
    LLAMA_CPP = "llama.cpp"
    VLLM = "vllm"
    SGLANG = "sglang"
    LM_STUDIO = "lm-studio"
    TGI = "tgi"
    TEI = "tei"
    OTHER = "other"


@frozen(kw_only=True)
class Abilities:
    """What a model can do: true, false, or `None` if the engine does not say.

    `vision` and `audio` are about the input of chats. `json_schema` means that answers can be bound to a JSON schema.
    """

    chat: bool | None = None
    completions: bool | None = None
    embeddings: bool | None = None
    rerank: bool | None = None
    tools: bool | None = None
    vision: bool | None = None
    audio: bool | None = None
    reasoning: bool | None = None
    json_schema: bool | None = None


UNKNOWN = Abilities()


@frozen(kw_only=True)
class ModelFacts:
    """What an engine says about one of its models; `None` is what it does not say.

    `context` is how many tokens one request really has room for: it is known only while the model is loaded. `trained_context` is what
    the model was made for, and what catalogs advertise. `size` is in bytes. `gpu_share` is the part of the loaded model that is in
    the memory of a GPU, from 0 to 1.
    """

    name: str
    is_loaded: bool | None = None
    context: int | None = None
    trained_context: int | None = None
    size: int | None = None
    gpu_share: float | None = None
    quantization: str | None = None
    digest: str | None = None
    abilities: Abilities = UNKNOWN


@frozen(kw_only=True)
class Measured:
    """What the gateway has read about one server: its engine, and the model that the server is registered for.

    `slots` is how many requests the engine says that it answers at once. `model` is `None` if the engine says nothing about the model.
    """

    kind: EngineKind
    version: str | None = None
    slots: int | None = None
    model: ModelFacts | None = None

    @property
    def context(self) -> int | None:
        """Return the context of the model while it is loaded, in tokens."""
        return None if self.model is None else self.model.context

    @property
    def abilities(self) -> Abilities:
        """Return what the model can do."""
        return UNKNOWN if self.model is None else self.model.abilities


@frozen(kw_only=True)
class EngineFacts:
    """What an engine says about itself and about each of its models.

    An engine that `answers_any_name` has one model, and does not look at the name in a request.
    """

    kind: EngineKind
    version: str | None = None
    slots: int | None = None
    models: tuple[ModelFacts, ...] = ()
    answers_any_name: bool = False
    _by_key: dict[str, ModelFacts] = field(init=False, eq=False, repr=False)

    @_by_key.default
    def _index(self) -> dict[str, ModelFacts]:
        return {model_key(model.name): model for model in reversed(self.models)}

    def model(self, name: str) -> ModelFacts | None:
        """Return what the engine says about a model, in any spelling of its name.

        >>> EngineFacts(kind=EngineKind.OLLAMA, models=(ModelFacts(name="tiny:latest", context=4096),)).model("tiny").context
        4096
        """
        found = self._by_key.get(model_key(name))
        if found is None and self.answers_any_name and len(self.models) == 1:
            return self.models[0]
        return found

    def of(self, name: str) -> Measured:
        """Return what is known about a server of this engine that is registered for a model."""
        return Measured(kind=self.kind, version=self.version, slots=self.slots, model=self.model(name))
