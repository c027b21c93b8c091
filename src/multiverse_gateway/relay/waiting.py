"""The exchanges that wait for a slot of their model: the fair queue decides who is next, and this room tells them.

An exchange calls `join` while it has to wait; when it begins, ends or leaves, it tells the queue itself. The gateway calls `look` while
anything is due. A free slot is offered to the waiting exchanges in the queue's order; one that cannot use it keeps its place. Everything
runs on one event loop, and any of these calls may come while another one is on its way.
"""

from collections.abc import Hashable
from functools import lru_cache
from typing import Protocol, cast

from multiverse_gateway.core.fairness import AtOnce, Band, FairQueue, Flow, Ticket
from multiverse_gateway.relay.ports import ClientRequest

LOOK_SECONDS = 0.25
"""How often free slots are offered, and waiting exchanges look at the servers, though no attempt ended: a server can return from its pause,
and the share of slots that a client may hold can grow."""


class Waiter(Protocol):
    """An exchange that looks for a server, as the room sees it: `ticket.request` is one."""

    @property
    def client_request(self) -> ClientRequest:
        """The client's request, while the exchange lives."""

    @property
    def ticket(self) -> Ticket:
        """The ticket of its request."""

    def turn(self) -> None:
        """Try to use a slot that is free."""

    def drop(self) -> None:
        """End: too many requests wait, and this one is the first that has to go."""

    def turn_away(self) -> None:
        """End: it would have to wait, and more exchanges of its source live than may."""


@lru_cache(maxsize=4096)
def flow_of(client: str) -> Flow:
    """Return the flow of a client's interactive requests; few of them differ."""
    return Flow(client)


@lru_cache(maxsize=4096)
def bulk_flow_of(client: str) -> Flow:
    """Return the flow of a client's bulk requests."""
    return Flow(client, Band.BULK)


class WaitingRoom:
    """The waiting exchanges of one process; `queue` holds what is known of them, and of those that run."""

    def __init__(self, max_waiting: int, uncapped_slots: int | None = None) -> None:
        self.queue = FairQueue(max_waiting=max_waiting, uncapped_slots=uncapped_slots)
        self.at_once = AtOnce()
        """The exchanges that live, by their `source`."""
        self._turn: Waiter | None = None
        """The exchange to which a free slot is offered at the moment."""
        self._moved_at: dict[str, float] = {}
        """When a slot of a model was given back last, for the models that exchanges wait for."""
        self._looks_at = 0.0
        self.is_closed = False
        """Whether no request may wait any more, because the process is shutting down."""

    @property
    def has_places(self) -> bool:
        """Whether exchanges may wait at all."""
        return not self.is_closed and self.queue.max_waiting > 0

    def has_turn(self, waiter: Waiter) -> bool:
        """Return whether a free slot is offered to this exchange at the moment."""
        return waiter is self._turn

    def join(self, waiter: Waiter, now: float) -> bool:
        """Wait, or stay in the same place; false if the exchange itself is the one for which there is no room.

        What is free is offered first, so the exchange may have begun when this returns. One that would have to wait is turned away if its
        source has too many, before it takes the place of another one; not if it has begun before and fails over.
        """
        ticket = waiter.ticket
        if ticket.is_waiting or self.is_closed:
            return not self.is_closed
        self.queue.join(ticket, now)
        if waiter is not self._turn:
            self.offer(ticket.model, now)
        if self._has_too_many(waiter):
            waiter.turn_away()
            return True
        dropped = self.queue.overflow(ticket.model)
        if dropped is None:
            return True
        if dropped is not ticket:
            cast(Waiter, dropped.request).drop()
        return dropped is not ticket

    def _has_too_many(self, waiter: Waiter) -> bool:
        """Return whether an exchange waits for the first time though its source has more exchanges than may live then."""
        ticket, request = waiter.ticket, waiter.client_request
        return ticket.is_waiting and not ticket.has_begun and not self.at_once.may_wait(request.caller.quota, request.caller.max_at_once)

    def slot_freed(self, model: str, now: float, pool: Hashable = None) -> None:
        """Offer a slot of a model that was given back; those that wait for it learn that the queue moves.

        `pool` is the host whose slot it was: all its models share it.
        """
        self._moved_at[model] = now
        if self.queue.is_shared(pool):
            self.queue.give_turns_for(pool, now, self._give_turn)
        self.offer(model, now)

    def offer(self, model: str, now: float) -> None:
        """Offer what is free of a model to the exchanges that wait for it, in the queue's order."""
        self.queue.give_turns(model, now, self._give_turn)

    def look(self, now: float) -> None:
        """Offer what is free of every model that exchanges wait for, every `LOOK_SECONDS`."""
        if not self.queue.anybody_waits:
            self._moved_at.clear()
        elif now >= self._looks_at:
            self._looks_at = now + LOOK_SECONDS
            for model in self.queue.lengths():
                self.offer(model, now)

    def moved_at(self, model: str) -> float:
        """Return when a slot of a model was given back last; 0 if none was since anybody waits."""
        return self._moved_at.get(model, 0.0)

    def _give_turn(self, ticket: Ticket) -> None:
        before, self._turn = self._turn, cast(Waiter, ticket.request)
        try:
            self._turn.turn()
        finally:
            self._turn = before
