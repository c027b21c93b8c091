"""Find the server for the next attempt of one request: choose one, wait for a slot, decide on retries.

1. A free slot goes to the request whose turn it is. A request that may not take it waits in the queue, as long as its band may wait; all
   its waits together may take as long as one.
2. The last failure decides whether another attempt follows (`core.failover`). Servers that failed are excluded.
3. A retry uses a part of the model's retry budget from the moment that it is decided until its attempt is over. Without budget it
   waits for some. A retry on the same server goes there only if no other one can take it; after that it takes its turn.
4. If there is no server, the client gets the last failure, or the reason why there is none.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Protocol

import attrs

from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.failover import FailedAttempt, GiveUp, Retry, after_failure, final_error
from multiverse_gateway.core.fairness import Band, FairQueue, Share, Ticket, actual_cost, estimated_cost
from multiverse_gateway.core.load import Load, retry_seconds
from multiverse_gateway.core.needs import Bounds, is_too_long, needs_of
from multiverse_gateway.core.patience import requested_tokens
from multiverse_gateway.core.routing import Candidates
from multiverse_gateway.core.servers import Server, ServerId, model_key
from multiverse_gateway.relay.client_response import attempt_headers, model_headers, wait_headers
from multiverse_gateway.relay.exchange_errors import (
    context_exceeded,
    no_slot,
    no_usable_server,
    streaming_unsupported,
    too_many_at_once,
    unknown_model,
)
from multiverse_gateway.relay.ports import ClientRequest, Phase
from multiverse_gateway.relay.resources import Journey, Resources
from multiverse_gateway.relay.waiting import LOOK_SECONDS, bulk_flow_of, flow_of

LAST_RESORT_SECONDS = 0.05
"""How long a request waits for the one that tries the last resort: a rejected client gets its response within 100 ms."""

_NO_SERVERS: frozenset[ServerId] = frozenset()  # made once, not for each request


class Seeker(Journey, Protocol):
    """The exchange that looks for a server."""

    @property
    def engine(self) -> Resources:
        """The gateway, as its exchanges see it."""

    @property
    def usage(self) -> tuple[int, int]:
        """Prompt and completion tokens as the server reported them."""

    @property
    def events(self) -> int:
        """Number of data events relayed."""

    def begin_attempt(self, server: Server, now: float) -> None:
        """Send the request to this server."""

    def refuse(self, error: GatewayError) -> None:
        """End the request with an error."""

    def give_up(self, verdict: GiveUp) -> None:
        """End with what is left of the failed attempts."""


@attrs.define(eq=False)
class PendingRetry:
    """A retry that was decided on, and the share of the model's retry budget that it uses."""

    load: Load
    model: str
    server: Server | None
    """The server that failed, if it is to be tried again."""
    budget_by: float
    """Until when it may wait for budget."""
    is_reserved: bool = False

    def reserve(self) -> None:
        """Use a share of the budget."""
        self.is_reserved = True
        self.load.retry_started(self.model)

    def release(self) -> None:
        """Give the share back, if there is one."""
        if self.is_reserved:
            self.is_reserved = False
            self.load.retry_finished(self.model)


class ServerSearch(Ticket):
    """The way of one request to a server, as often as it needs one. It is also the request's ticket in the fair queue.

    `tried` counts the attempts that were made, and `failures` holds those that failed. `usage_refused_by` is the server that
    rejected the field that asks for token counts; after that no server is asked for them. `retry` is the retry that was decided on, until
    it begins.
    """

    __slots__ = (
        "_exchange",
        "_is_picky",
        "excluded",
        "failures",
        "response",
        "retry",
        "tried",
        "usage_refused_by",
    )

    def __init__(self, exchange: Seeker) -> None:
        request = exchange.request
        caller = request.caller
        is_bulk = request.facts.is_bulk or (caller.key is not None and caller.is_bulk)  # the first half saves a look at most callers
        Ticket.__init__(self, request.envelope.model, bulk_flow_of(caller.quota) if is_bulk else flow_of(caller.quota), self)
        self.response = exchange.response
        self._exchange = exchange
        self._is_picky = False
        self.tried = 0
        self.failures: tuple[FailedAttempt, ...] = ()
        self.excluded = _NO_SERVERS
        self.usage_refused_by: Server | None = None
        self.retry: PendingRetry | None = None

    @property
    def client_request(self) -> ClientRequest:
        """The client's request, until the exchange is over."""
        return self._exchange.request

    @property
    def _resources(self) -> Resources:
        return self._exchange.engine

    @property
    def _queue(self) -> FairQueue:
        return self._resources.room.queue

    @property
    def ticket(self) -> Ticket:
        """Return itself: the ticket of the request."""
        return self

    @property
    def waits_for_budget(self) -> bool:
        """Whether a retry waits until the model's budget lets it begin."""
        return self.retry is not None and not self.retry.is_reserved

    # Choosing

    def choose(self) -> None:
        """Begin an attempt, wait for a slot, or give up."""
        exchange = self._exchange
        request, resources = exchange.request, exchange.engine
        queue = resources.room.queue
        envelope, now = request.envelope, resources.now()
        found = resources.candidates(envelope, self.excluded, now)
        if found is None:
            self._give_up(unknown_model(envelope, resources.model_names()))
        elif found.bounds is not None and len(request.body) > found.bounds.most_bytes and envelope.needs is None:
            self._look_at_needs(found.bounds)
        elif ready := found.ready or found.ready_for(request.caller.quota):
            if queue.may_begin(self, now) or self._may_pass():
                exchange.begin_attempt(ready[0] if len(ready) == 1 else resources.pick(ready, envelope), now)
            else:
                self._wait_for_slot(found, now, inf, self._no_slot)
        elif found.full:
            self._wait_for_slot(found, now, inf, self._no_slot)
        elif found.last_resort is not None and (queue.may_begin(self, now) or self._may_pass()):
            exchange.begin_attempt(found.last_resort, now)
        elif found.last_resort is not None or found.last_resort_taken:
            self._wait_for_slot(found, now, LAST_RESORT_SECONDS, partial(no_usable_server, envelope, found))
        elif found.streaming_unsupported:
            self._give_up(streaming_unsupported(envelope))
        else:
            self._give_up(no_usable_server(envelope, found))

    def _look_at_needs(self, bounds: Bounds) -> None:
        """Find out what the request needs of a server, in which the servers of its model differ; refuse it if no server has room for it."""
        envelope = self.client_request.envelope
        needs = needs_of(bounds, envelope.path, self.client_request.body)
        self.client_request.envelope = attrs.evolve(envelope, needs=needs)
        if is_too_long(bounds, needs):
            self._give_up(context_exceeded(envelope, bounds, needs))
        else:
            self.choose()

    def choose_at(self, server: Server) -> None:
        """Choose the server that has the stored response, and no other."""
        envelope = self.client_request.envelope
        self.model = envelope.model or model_key(server.model_name)
        self.client_request.envelope = attrs.evolve(envelope, model=self.model, server_id=server.id, generation=server.generation)
        self.choose()

    def has_substitute(self, server: Server, now: float) -> bool:
        """Return whether another server could take the request over from the one that is tried."""
        found = self._resources.candidates(self.client_request.envelope, self.excluded | {server.id}, now)
        return found is not None and bool(found.ready or found.full)

    def _may_pass(self) -> bool:
        """Return whether the request may take what is free though others wait, or though its client is over its share of the slots.

        It may if it is its turn, if it needs no slot, or if it cannot wait and the gateway handles another request of its model.
        """
        room = self._resources.room
        if self.client_request.envelope.is_lookup or room.has_turn(self):
            return True
        if self._queue.used_up(self, self._resources.now()) is Share.MODEL:
            return False
        return not room.has_places or self.waited_seconds >= self._queue_timeout

    def _give_up(self, error: GatewayError) -> None:
        self._queue.leave(self, self._resources.now())
        if self.failures:
            self._exchange.give_up(final_error(self.failures))
        else:
            self._exchange.refuse(error)

    # Waiting for a slot

    def _wait_for_slot(self, found: Candidates, now: float, patience: float, refusal: Callable[[], GatewayError]) -> None:
        """Wait in the queue until that takes too long, or the queue does not move for the seconds of `patience`, or it is full."""
        exchange, room = self._exchange, self._resources.room
        exchange.phase = Phase.QUEUED
        self._is_picky = bool(found.resting) and not (found.ready or found.full)
        joined_at = self.joined_at if self.is_waiting else now
        moved_at = max(joined_at, room.moved_at(self.client_request.envelope.model))
        until = min(joined_at + self._queue_timeout - self.waited_seconds, moved_at + patience)
        exchange.due = min(until, now + LOOK_SECONDS)
        if now >= until or not room.join(self, now):
            self._give_up(refusal())

    @property
    def _queue_timeout(self) -> float:
        limits = self._resources.limits
        return limits.bulk_queue_timeout if self.flow.band is Band.BULK else limits.queue_timeout

    def turn(self) -> None:
        """Try again: a slot of the model may be free. Stays in the queue if there is none; without effect if the request does not wait."""
        if self.is_waiting:
            self.choose()

    def drop(self) -> None:
        """Leave the queue: too many requests wait, and no client has more of them there."""
        self._give_up(self._no_slot())

    def end_waiting(self, error: GatewayError) -> None:
        """End with an error if the request waits, as when its client's key was blocked or revoked, or has expired."""
        if self.is_waiting:
            self._give_up(error)

    def turn_away(self) -> None:
        """End: the request would have to wait, and its client has reached its limit. It uses up none of the client's other limits."""
        request = self.client_request
        request.take_back()
        live, seconds = self._resources.room.at_once.live(request.caller.quota) - 1, self._until_next_end()
        self._exchange.refuse(too_many_at_once(request, self._share_in_the_way(), live=live, seconds=seconds))

    def _no_slot(self) -> GatewayError:
        """Return the refusal of a request that waited too long, or for which there is no place; it says when a slot is likely."""
        seconds, others = self._until_next_end(), self._queue.waiting(self.model) - self.is_waiting
        return no_slot(self.model, self._share_in_the_way(), waiting=others, seconds=seconds)

    def _until_next_end(self) -> float:
        """Return about how many seconds it takes until the client has a place again."""
        return self._queue.until_next_end(self.client_request.envelope.model, self.flow) or retry_seconds(self._resources.random())

    def _share_in_the_way(self) -> Share | None:
        """Return the share of slots that keeps the request from a free one; `None` if no slot is free."""
        now = self._resources.now()
        share = self._queue.used_up(self, now)
        found = None if share is None else self._resources.candidates(self.client_request.envelope, self.excluded, now)
        return share if found is not None and found.ready_for(self.client_request.caller.quota) else None

    # What the fair queue asks

    @property
    def needs(self) -> tuple[object, ...]:
        """What the request needs of a server: of two requests with equal needs both can use what is free, or none can."""
        envelope = self.client_request.envelope
        source = self.client_request.caller.quota if self._is_picky else None  # only servers that rest for another client are left
        return self.model, envelope.stream, envelope.path, envelope.server_id, envelope.needs, self.excluded, source

    @property
    def _generates(self) -> bool:
        return self.client_request.envelope.dialect is not Dialect.OTHER

    def estimated_cost(self) -> float:
        """Return the weighted tokens that the request is expected to use."""
        body, mean = self.client_request.body, self._queue.mean_output_tokens(self.client_request.envelope.model)
        tokens = requested_tokens(body) if self._generates else None
        return estimated_cost(len(body), max_tokens=tokens, mean_output_tokens=mean, generates=self._generates)

    def actual_cost(self) -> float:
        """Return the weighted tokens that the request has used; nothing if no server answered it."""
        if not self.response.is_committed:
            return 0.0
        exchange, prompt, answer = self._exchange, len(self.client_request.body), self.response.sent_bytes
        return actual_cost(prompt, answer, usage=exchange.usage, events=exchange.events, generates=self._generates)

    # Retries

    def after_failure(self, server: Server) -> None:
        """Decide what follows the last of `failures`, an attempt on this server."""
        resources, envelope = self._resources, self.client_request.envelope
        self.excluded = frozenset([failed.server_id for failed in self.failures])
        now = resources.now()
        resources.notice_pause(now)
        verdict = after_failure(
            self.failures,
            others=self._others(now),
            policy=resources.limits.retry_policy,
            remaining=self._exchange.deadline - now,
            stateful=envelope.stateful,
            budget_left=resources.load.retry_budget_left(envelope.model),
            random=resources.random(),
            repeated=self.usage_refused_by is not None,
        )
        if isinstance(verdict, Retry):
            self._wait_to_retry(verdict, server, now)
        else:
            self._exchange.give_up(verdict)

    def is_replay_at(self, server: Server) -> bool:
        """Return whether an attempt at a server repeats one whose kept connection ended unanswered."""
        last = self.failures[-1]
        return last.failure.is_stale and last.server_id == server.id

    def forget_body(self) -> None:
        """Drop the body of the last failure: another attempt decides what the client gets."""
        if self.failures:
            self.failures = (*self.failures[:-1], self.failures[-1].without_body())

    def _others(self, now: float) -> int:
        """Return how many servers could be tried next, counting all full ones as one."""
        found = self._resources.candidates(self.client_request.envelope, self.excluded, now)
        if found is None:
            return 0
        return (
            len(found.ready_for(self.client_request.caller.quota)) + found.full + (found.last_resort is not None or found.last_resort_taken)
        )

    def _wait_to_retry(self, verdict: Retry, server: Server, now: float) -> None:
        exchange, resources = self._exchange, self._resources
        exchange.phase = Phase.BACKOFF
        exchange.due = min(exchange.deadline, now + verdict.delay)
        budget_by = now + min(resources.limits.retry_policy.budget_wait, (exchange.deadline - now) / 2)
        again = server if verdict.same_server else None
        self.retry = PendingRetry(resources.load, self.client_request.envelope.model, again, budget_by)
        if not verdict.waits:
            self.retry.reserve()
        if verdict.delay <= 0:
            self.begin_retry()

    def begin_retry(self) -> None:
        """Begin the retry that was decided on, if its model's budget lets it."""
        resources, retry = self._resources, self.retry
        assert retry is not None
        now = resources.now()
        if not retry.is_reserved:
            if not resources.load.retry_budget_left(retry.model):
                self._wait_for_budget(retry, now)
                return
            retry.reserve()
        server = retry.server
        if server is not None and (self.failures[-1].failure.is_stale or self._is_alone(now)):
            if resources.has_slot(server) and self._queue.used_up(self, now) is None:
                self._exchange.begin_attempt(server, now)
                return
            self.excluded -= {server.id}  # the request waits for its second attempt there in the place that it had
        self.choose()

    def _wait_for_budget(self, retry: PendingRetry, now: float) -> None:
        exchange, resources = self._exchange, self._resources
        if now >= retry.budget_by:
            resources.budget_refused()
            exchange.give_up(final_error(self.failures))
        else:
            exchange.due = min(exchange.deadline, now + resources.limits.retry_policy.budget_delay)

    def _is_alone(self, now: float) -> bool:
        """Return whether no server can serve the request but those that failed."""
        found = self._resources.candidates(self.client_request.envelope, self.excluded, now)
        return found is not None and not found.ready and not found.full

    # The process and the end

    def headers(self, server: Server | None) -> Sequence[tuple[bytes, bytes]]:
        """Return the headers that say how a response came about; `server` is that of the last attempt."""
        headers: Sequence[tuple[bytes, bytes]] = attempt_headers(self.tried, None if server is None else server.id)
        envelope = self._exchange.request.envelope
        if server is not None and server.model_name != envelope.written_model:
            headers = [*headers, *model_headers(envelope.model, server.model_name)]
        return [*headers, *wait_headers(self.waited_seconds)] if self.waited_seconds else headers

    def postpone(self, seconds: float) -> None:
        """Move the deadlines: the process was stopped for so long."""
        if self.is_waiting:
            self.joined_at += seconds
        elif self.retry is not None:
            self.retry.budget_by += seconds

    def let_go(self) -> None:
        """Hold the exchange and itself no longer: they are over, and would be cycles, which only the garbage collector frees."""
        del self.request, self._exchange
