"""What the page of models shows, as values: a row for each model, and more about the one that was chosen."""

import hashlib
from collections.abc import Iterable, Sequence

import attrs

from multiverse_gateway.api.response_types import iso_or_none
from multiverse_gateway.core.promises import promise_of, promised_context
from multiverse_gateway.core.routing import Model
from multiverse_gateway.core.servers import model_key
from multiverse_gateway.core.speeds import Speeds
from multiverse_gateway.pages.engine_words import able, context_words
from multiverse_gateway.pages.states import ATTENTION, Tone
from multiverse_gateway.pages.views import Queue, Row


@attrs.frozen(kw_only=True)
class ModelRow:
    """A model as the page lists it.

    `id` stands for the model in ids of elements. `up` of `total` servers are healthy and do not need attention. `offline_since` is when
    the last of them went down, if none is up. `context` is how many tokens each server has room for, as far as that is known. `speed` is
    in tokens per second.
    """

    id: str
    name: str
    tone: Tone
    word: str
    up: int
    total: int
    offline_since: str | None
    context: int | None
    speed: float | None
    queue: Queue | None

    @property
    def is_offline(self) -> bool:
        """Whether no server can answer requests for the model."""
        return self.tone is Tone.BAD


@attrs.frozen(kw_only=True)
class ChosenModel:
    """The model whose servers and code are shown; `context` and `can_do` are what was read from its engines, in words."""

    row: ModelRow
    servers: tuple[Row, ...]
    streaming: bool
    embeds: bool
    max_tokens: int | None
    context: str | None
    can_do: str


def id_of(model: str) -> str:
    """Return what stands for a model in ids of elements.

    >>> id_of("llama3.2:latest") == id_of("llama3.2"), len(id_of("tiny"))
    (True, 10)
    """
    return hashlib.sha256(model_key(model).encode()).hexdigest()[:10]


def row_of_model(model: Model, rows: Sequence[Row], queue: Queue | None, speeds: Speeds) -> ModelRow:
    """Return the row of a model; `rows` are those of its servers, `queue` that of its waiting requests, `None` if no request waits."""
    statuses = [row.status for row in rows]
    up = statuses.count("healthy")
    tone, word = _state(statuses)
    usable = [route for route in model.routes if route.health.status == "healthy"] or list(model.routes)
    contexts = [promised_context(route.server, route.health.measured) for route in usable]
    known = [speed for route in model.routes if (speed := speeds.of(route.server.id)) is not None]
    return ModelRow(
        id=id_of(model.name),
        name=model.name,
        tone=tone,
        word=word,
        up=up,
        total=len(rows),
        offline_since=_offline_since(model) if tone is Tone.BAD else None,
        context=min((context for context in contexts if context is not None), default=None),
        speed=sum(known) / len(known) if known else None,
        queue=queue,
    )


def _state(statuses: Sequence[str]) -> tuple[Tone, str]:
    """Return the tone of a model and what it means, from the statuses of its servers."""
    if "healthy" in statuses:
        return (Tone.GOOD, "Available") if set(statuses) == {"healthy"} else (Tone.WARN, "Available on some servers")
    if "attention" in statuses:
        return Tone.WARN, ATTENTION.word
    return (Tone.IDLE, "Not checked yet") if "unknown" in statuses else (Tone.BAD, "Offline")


def _offline_since(model: Model) -> str | None:
    return iso_or_none(max((at for route in model.routes if (at := route.health.last_transition_at) is not None), default=None))


def in_order(rows: Iterable[ModelRow]) -> list[ModelRow]:
    """Return the rows by name, those of models that are offline last."""
    return sorted(rows, key=lambda row: (row.is_offline, row.name.casefold(), row.name))


def chosen_model(model: Model, row: ModelRow, servers: Sequence[Row]) -> ChosenModel:
    """Return more about a model."""
    capabilities = [route.server.capabilities for route in model.routes]
    abilities = [route.health.measured.abilities for route in model.routes if route.health.measured is not None]
    promise = promise_of(model)
    return ChosenModel(
        row=row,
        servers=tuple(servers),
        streaming=any(each.streaming for each in capabilities),
        embeds=bool(abilities) and all(each.embeddings is True and each.chat is not True for each in abilities),
        max_tokens=max((each.max_tokens for each in capabilities if each.max_tokens), default=None),
        context=context_words(promise.largest_context_length, promise.trained_context_length),
        can_do=able(promise.abilities),
    )
