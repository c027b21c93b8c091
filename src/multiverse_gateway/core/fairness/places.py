"""The view of the queue for people: how much a model is used, and where each waiting request stands."""

from collections.abc import Iterable
from math import inf

from attrs import frozen

from multiverse_gateway.core.fairness.books import ModelUse, Ticket
from multiverse_gateway.core.fairness.flows import Flow

STEPS = (5, 10, 20, 30, 60, 120, 240)
"""The only waiting times that are shown, in seconds: an estimate is off by 40 % in the median, so figures would claim too much."""


@frozen(kw_only=True)
class Place:
    """Where a waiting request stands.

    `position` is 1 for the next one: one more than the requests that would begin before it if no other request came. `about_seconds`
    is one of `STEPS`, or `None` while nothing is known about the model's requests.
    """

    position: int
    waiting: int
    about_seconds: int | None


@frozen(kw_only=True)
class QueueCounts:
    """Counts for one model: its slots (`None` without a cap), its running and waiting requests, and its clients with a waiting request."""

    slots: int | None
    running: int
    waiting: int
    clients_waiting: int


@frozen(kw_only=True)
class Wait:
    """A waiting request, where it stands, and for how many seconds it has waited in all."""

    ticket: Ticket
    place: Place
    seconds: float


def in_steps(seconds: float) -> int:
    """Return the least of `STEPS` that is not below so many seconds, or the last one.

    >>> in_steps(0.3), in_steps(12.0), in_steps(10_000.0)
    (5, 20, 240)
    """
    return next((step for step in STEPS if step >= seconds), STEPS[-1])


def _about(model: ModelUse, position: int, own: int, flow: Flow, now: float) -> int | None:
    """Return the step of the seconds until a request begins that stands at `position` of all, and is the `own`-th of its flow."""
    mean, slots = model.seconds, model.slots
    if mean is None or not slots:
        return None
    seconds = position * mean / slots
    limit = model.limit(flow, slots, now)
    if limit is not None:  # as many of the flow's own requests as are over its share have to end first
        seconds = max(seconds, (own + model.running.get(flow, 0) - limit) * mean / limit)
    return in_steps(seconds)


def queue_counts_of(model: ModelUse) -> QueueCounts:
    """Return how much a model is used."""
    clients = {flow.client for flow in model.queued}
    slots = model.slots if model.bound == inf else None
    return QueueCounts(slots=slots, running=sum(model.running.values()), waiting=model.waiting, clients_waiting=len(clients))


def places_of(model: ModelUse, order: Iterable[Ticket], now: float) -> dict[Ticket, Place]:
    """Return where each waiting request of a model stands, given the order in which they would begin."""
    own: dict[Flow, int] = {}
    places: dict[Ticket, Place] = {}
    for position, ticket in enumerate(order, 1):
        own[ticket.flow] = own.get(ticket.flow, 0) + 1
        seconds = _about(model, position, own[ticket.flow], ticket.flow, now)
        places[ticket] = Place(position=position, waiting=model.waiting, about_seconds=seconds)
    return places


def until_next_end(model: ModelUse, flow: Flow) -> int | None:
    """Return the step of the seconds until a running request of a flow ends; without such requests, those of all flows count."""
    if model.seconds is None:
        return None
    running = model.running.get(flow) or sum(model.running.values())
    return in_steps(model.seconds / max(1, running))
