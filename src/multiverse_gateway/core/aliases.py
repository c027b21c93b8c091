"""Aliases: names that stand for models, the first of which that can serve a request does."""

import attrs


@attrs.frozen(kw_only=True)
class Alias:
    """A name that stands for models in an order of preference. Instants are epoch seconds."""

    name: str
    models: tuple[str, ...]
    created_at: float
    updated_at: float
