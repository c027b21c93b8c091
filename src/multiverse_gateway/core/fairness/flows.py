"""Flows of requests, their bands, and the pools of slots that they share."""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from attrs import field, frozen


class Band(StrEnum):
    """How urgent a request is: whether a person waits for its answer."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


class Share(StrEnum):
    """A part of something that is shared, and bounds what may run."""

    CLIENT = "half"
    """What one client may hold in one band."""
    BULK = "a quarter"
    """What all bulk requests together may hold beside interactive ones."""
    MODEL = "half of the gateway"
    """What all requests of one model may take of the requests that the gateway handles at a time, if its servers have no caps."""


class Flow(NamedTuple):
    """The requests of one client in one band. `client` names a key or an address."""

    client: str
    band: Band = Band.INTERACTIVE


BULK, INTERACTIVE = Band.BULK, Band.INTERACTIVE  # a look-up in an enum costs as much as a call


@frozen
class Pool:
    """Slots that one or more models share: a host. `slots` is `None` without a cap; `less` says which models may use fewer of them.

    `is_one_model`: all of its models are names of one, so that a change of model costs nothing.
    """

    models: tuple[str, ...]
    slots: int | None = None
    less: Mapping[str, int] = field(factory=dict, repr=False)
    is_one_model: bool = field(default=False, repr=False)

    def slots_of(self, model: str) -> int | None:
        """Return how many slots a model may use."""
        return self.less.get(model, self.slots)
