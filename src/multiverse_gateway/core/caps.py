"""How many requests a server may get at once when its registration does not say: what its engine states, read from cheap GET requests.

1. A server without a cap never makes a request wait in the gateway, so nothing can share it fairly. Most hosts do not know the number, and
   most engines do.
2. Every path in `paths_for` is free: it generates no token, and loads no model. llama.cpp's router loads the model that `/props?model=`
   names unless `autoload=false` is added; `/slots` wakes a sleeping llama.cpp, and `/props` does not.
3. Proxies and other programs answer on some of these paths, too, so an answer counts only if it looks exactly like the engine's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import attrs

from multiverse_gateway.core.lenient import decode
from multiverse_gateway.core.servers import MAX_CONCURRENCY, Server, model_key

MODELS_PATH = "/v1/models"
_PROPS, _VERSION, _SERVER_INFO, _OLD_SERVER_INFO, _INFO = "/props", "/api/version", "/server_info", "/get_server_info", "/info"


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


def paths_for(owned_by: str | None) -> tuple[str, ...]:
    """Return the paths to read, the ones that decide first; `owned_by` is what the list of models says, `None` if it was not read.

    >>> paths_for("llamacpp"), paths_for("vllm")
    (('/props',), ())
    """
    paths = _PATHS_BY_OWNER.get(owned_by or "", (_PROPS, _SERVER_INFO, _OLD_SERVER_INFO, _INFO, _VERSION))
    return (*paths, MODELS_PATH) if owned_by is None else paths


_PATHS_BY_OWNER: Mapping[str, tuple[str, ...]] = {
    "llamacpp": (_PROPS,),
    "sglang": (_SERVER_INFO, _OLD_SERVER_INFO),
    "library": (_VERSION,),
    "vllm": (),
}
"""By `owned_by`: `library` is Ollama's word for the models of its own library."""


def target_of(path: str, model: str) -> str:
    """Return the path with its query; llama.cpp's router needs the model's name in it.

    >>> target_of("/props", "a/b:c"), target_of("/info", "a/b:c")
    ('/props?model=a%2Fb%3Ac&autoload=false', '/info')
    """
    return f"{path}?model={quote(model, safe='')}&autoload=false" if path == _PROPS else path


def stated_by(path: str, status: int, body: bytes) -> Stated | None:
    """Return what the answer to a path in `paths_for` states, or `None` if no engine that we know answers like that.

    >>> stated_by("/props", 200, b'{"total_slots": 4}')
    Stated(limit=4, fact='llama.cpp states 4 slots')
    >>> stated_by("/api/version", 200, b'{"error": "Unexpected endpoint or method. (GET /api/version)"}') is None
    True
    """
    if status != 200:
        return None
    try:
        answer = decode(body)
    except (ValueError, RecursionError):
        return None
    return _READERS[path](answer) if isinstance(answer, dict) else None


def chosen(stated_by_path: Mapping[str, Stated], owned_by: str | None) -> Stated:
    """Return what a server states, from what the answers to `paths_for(owned_by)` stated, by path.

    >>> chosen({}, "vllm") is VLLM, chosen({}, None) is UNSTATED
    (True, True)
    """
    return next((stated_by_path[path] for path in paths_for(owned_by) if path in stated_by_path), VLLM if owned_by == "vllm" else UNSTATED)


def _number(value: object) -> int | None:
    """Return a count of requests, at most the largest cap that there is; `None` for anything else."""
    return min(value, MAX_CONCURRENCY) if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def _llama_cpp(answer: dict[str, Any]) -> Stated | None:
    slots = _number(answer.get("total_slots"))
    return None if slots is None else Stated(slots, f"llama.cpp states {slots} {'slot' if slots == 1 else 'slots'}")


def _sglang(answer: dict[str, Any]) -> Stated | None:
    """Read the number that SGLang was started with, or what its schedulers made of the memory that they have."""
    limit = _number(answer.get("max_running_requests"))
    if limit is None:
        states = answer.get("internal_states")
        numbers = [
            _number(state.get("effective_max_running_requests_per_dp", state.get("max_running_requests")))
            for state in (states if isinstance(states, list) else ())
            if isinstance(state, dict)
        ]
        limit = _number(sum(number for number in numbers if number is not None))
    return None if limit is None else Stated(limit, f"SGLang states that it runs at most {limit} at once")


def _tgi(answer: dict[str, Any]) -> Stated | None:
    limit = _number(answer.get("max_concurrent_requests"))
    return None if limit is None else Stated(limit, f"TGI states that it takes at most {limit} at once")


def _ollama(answer: dict[str, Any]) -> Stated | None:
    """Recognize Ollama, which answers its version and nothing else; llama-swap and Open WebUI add more on the same path."""
    return OLLAMA if set(answer) == {"version"} and isinstance(answer["version"], str) else None


def _vllm(answer: dict[str, Any]) -> Stated | None:
    """Recognize vLLM by its list of models."""
    models = answer.get("data")
    return VLLM if isinstance(models, list) and owner_of(models, "") == "vllm" else None


_READERS: Mapping[str, Callable[[dict[str, Any]], Stated | None]] = {
    _PROPS: _llama_cpp,
    _SERVER_INFO: _sglang,
    _OLD_SERVER_INFO: _sglang,
    _INFO: _tgi,
    _VERSION: _ollama,
    MODELS_PATH: _vllm,
}
