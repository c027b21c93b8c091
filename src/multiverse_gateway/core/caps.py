"""How many requests a server may get at once when its registration does not say: what its engine states (`core.engine_facts`).

A server without a cap never makes a request wait in the gateway, so nothing can share it fairly. Most hosts do not know the number, and
most engines do.
"""

from collections.abc import Sequence
from typing import Any

import attrs

from multiverse_gateway.core.engine_facts import EngineFacts, EngineKind
from multiverse_gateway.core.servers import Server, model_key


@attrs.frozen
class Stated:
    """What an engine states about itself: `limit` is `None` if it states no number, and `fact` is a clause for people without a period."""

    limit: int | None
    fact: str


@attrs.frozen
class Cap:
    """How many requests a server may get at once, `None` for any number, and why, in a sentence for people."""

    limit: int | None
    reason: str


VLLM = Stated(None, "vLLM does not state how many requests it answers at once")
OLLAMA = Stated(1, "Ollama does not state how many requests it answers at once, and by default it answers one")
UNSTATED = Stated(None, "The server does not state how many requests it answers at once")


def cap_of(stated: Stated | None, *, wanted: int | None, existing: Server | None) -> Cap:
    """Return the cap of a server that is being registered.

    Args:
        stated: What its engine states, or `None` if the registration names a cap or names that there is none.
        wanted: The cap that the registration names; it counts only without `stated`.
        existing: The server as it was registered before, whose cap stays unless the registration names another.

    >>> cap_of(Stated(4, "llama.cpp states 4 slots"), wanted=None, existing=None)
    Cap(limit=4, reason='llama.cpp states 4 slots, so it gets at most 4 requests at once.')
    >>> cap_of(None, wanted=None, existing=None)
    Cap(limit=None, reason='The registration asks for no limit.')
    """
    if stated is None:
        reason = "The registration asks for no limit." if wanted is None else f"The registration sets the limit to {wanted}."
        return Cap(wanted, reason)
    if existing is None:
        return Cap(stated.limit, f"{stated.fact}, so {_consequence(stated.limit)}.")
    if existing.max_concurrency is not None:
        return Cap(existing.max_concurrency, f"It keeps its limit of {existing.max_concurrency}; the registration sets no other one.")
    offer = "" if stated.limit is None else f" {stated.fact}: set max_concurrency to {stated.limit} to use that."
    return Cap(None, f"It was registered without a limit before, and keeps none.{offer}")


def _consequence(limit: int | None) -> str:
    if limit is None:
        return "there is no limit"
    return f"it gets at most {limit} {'request' if limit == 1 else 'requests'} at once"


def owner_of(entries: Sequence[object], model: str) -> str:
    """Return what a list of models says about who serves `model` (`owned_by`); of a list without it, what the first entry says.

    Most engines write their own name there. Returns an empty string if there is nothing to return.

    >>> owner_of([{"id": "tiny", "owned_by": "vllm"}], "tiny")
    'vllm'
    """
    described: list[dict[str, Any]] = [entry for entry in entries if isinstance(entry, dict)]
    named = [entry for entry in described if isinstance(entry.get("id"), str) and model_key(entry["id"]) == model_key(model)]
    owner = next((entry.get("owned_by") for entry in (*named, *described)), None)
    return owner[:64] if isinstance(owner, str) else ""


def stated_by(engine: EngineFacts | None) -> Stated:
    """Return how many requests an engine says that it answers at once; `None` stands for an engine that says nothing.

    >>> stated_by(EngineFacts(kind=EngineKind.LLAMA_CPP, slots=4))
    Stated(limit=4, fact='llama.cpp states 4 slots')
    >>> stated_by(EngineFacts(kind=EngineKind.VLLM)) is VLLM, stated_by(None) is UNSTATED
    (True, True)
    """
    kind, slots = (None, None) if engine is None else (engine.kind, engine.slots)
    if kind is EngineKind.OLLAMA:
        return OLLAMA
    if kind is EngineKind.VLLM:
        return VLLM
    if kind is None or slots is None:
        return UNSTATED
    if kind is EngineKind.LLAMA_CPP:
        return Stated(slots, f"llama.cpp states {slots} {'slot' if slots == 1 else 'slots'}")
    if kind is EngineKind.SGLANG:
        return Stated(slots, f"SGLang states that it runs at most {slots} at once")
    return Stated(slots, f"{kind.upper()} states that it takes at most {slots} at once")
