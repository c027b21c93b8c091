"""Aliases: names that stand for models, the first of which that can serve a request does.

1. An alias may stand for other aliases, too; what it comes to is a list of models. An alias that would lead to itself is rejected.
2. An alias hides a model of the same name. Only in its own list does its name stand for that model.
"""

from collections.abc import Iterable, Mapping, Sequence

import attrs

from multiverse_gateway.core.errors import InvalidField, NotFound
from multiverse_gateway.core.servers import model_key

MAX_ALIASES = 1000
MAX_MODELS = 32
"""Models in the list of one alias."""


@attrs.frozen(kw_only=True)
class Alias:
    """A name that stands for models in an order of preference. Instants are epoch seconds."""

    name: str
    models: tuple[str, ...]
    created_at: float
    updated_at: float


class AliasNotFound(NotFound):
    """There is no alias with this name."""

    code = "alias_not_found"


def by_key(aliases: Iterable[Alias]) -> dict[str, Alias]:
    """Return aliases by the key of their name (`model_key`)."""
    return {model_key(alias.name): alias for alias in aliases}


def plan_alias(name: str, models: Sequence[str], known: Iterable[Alias], *, wall: float) -> Alias:
    """Return the alias to save; `known` are those that there are.

    Raises:
        InvalidField: It would stand for nothing or lead to itself, or there are too many.
    """
    if not models:
        raise InvalidField("models", " must name at least one model")
    aliases = by_key(known)
    if model_key(name) not in aliases and len(aliases) >= MAX_ALIASES:
        raise InvalidField("name", f": there are {MAX_ALIASES:,} aliases, the most that there may be; remove one first")
    alias = _alias(name, models, aliases.get(model_key(name)), wall)
    _refuse_loop(aliases | {model_key(name): alias}, model_key(name), "models")
    return alias


def plan_import_of_aliases(wanted: Sequence[tuple[str, Sequence[str]]], known: Iterable[Alias], *, wall: float) -> tuple[Alias, ...]:
    """Return the aliases to save for an import of names with their models; an alias that stays as it was is left out.

    Raises:
        InvalidField: One would stand for nothing or lead to itself once all are saved, or there would be too many.
    """
    before = by_key(known)
    after = dict(before)
    for number, (name, models) in enumerate(wanted):
        if not models:
            raise InvalidField(f"aliases[{number}].models", " must name at least one model")
        after[model_key(name)] = _alias(name, models, after.get(model_key(name)), wall)
    if len(after) > max(MAX_ALIASES, len(before)):
        raise InvalidField("aliases", f" would make {len(after):,} aliases; there may be {MAX_ALIASES:,} at most")
    for number, (name, _) in enumerate(wanted):
        _refuse_loop(after, model_key(name), f"aliases[{number}].models")
    return tuple(alias for key, alias in after.items() if key not in before or alias.models != before[key].models)


def _alias(name: str, models: Sequence[str], before: Alias | None, wall: float) -> Alias:
    return Alias(
        name=name if before is None else before.name,
        models=tuple(dict.fromkeys(models)),
        created_at=wall if before is None else before.created_at,
        updated_at=wall,
    )


def _refuse_loop(aliases: Mapping[str, Alias], key: str, field: str) -> None:
    loop = _loop(key, aliases)
    if loop is not None:
        raise InvalidField(field, f" must not lead back to the alias itself, as {' → '.join(loop)} does; leave one of them out")


def _loop(start: str, aliases: Mapping[str, Alias]) -> list[str] | None:
    """Return the names on a way from an alias back to itself, `None` if there is none."""
    pending = [[start, key] for key in _keys(aliases[start]) if key != start]
    while pending:
        way = pending.pop()
        if way[-1] == start:
            return way
        if way[-1] in aliases and way[-1] not in way[:-1]:
            pending.extend([*way, key] for key in _keys(aliases[way[-1]]) if key != way[-1])
    return None


def _keys(alias: Alias) -> list[str]:
    return [model_key(model) for model in alias.models]


def models_of(key: str, aliases: Mapping[str, Alias]) -> tuple[str, ...]:
    """Return the keys of the models that an alias comes to, in order, each once; harmless if two processes saved a loop at once.

    >>> make = lambda name, *models: Alias(name=name, models=models, created_at=0.0, updated_at=0.0)
    >>> models_of("best", by_key([make("best", "qwen3:8b", "small"), make("small", "phi-4", "small:latest")]))
    ('qwen3:8b', 'phi-4', 'small')
    """
    found: dict[str, None] = {}
    seen: set[str] = set()

    def add(name: str) -> None:
        seen.add(name)
        for member in _keys(aliases[name]):
            if member == name or member not in aliases:
                found.setdefault(member)
            elif member not in seen:
                add(member)

    add(key)
    return tuple(found)
