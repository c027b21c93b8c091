"""The queue itself: the life of each request in it, and the answer to whose turn it is."""

from bisect import insort
from collections.abc import Callable, Collection, Hashable, Mapping
from functools import partial
from math import inf

from attrs import define, field

from multiverse_gateway.core.fairness.books import Account, Books, ModelUse, Ticket, rank
from multiverse_gateway.core.fairness.costs import USUAL_OUTPUT_TOKENS
from multiverse_gateway.core.fairness.flows import BULK, Band, Flow, Pool, Share
from multiverse_gateway.core.fairness.places import Place, QueueCounts, Wait, places_of, queue_counts_of, until_next_end
from multiverse_gateway.core.fairness.turns import first_of, give_turns, merged

MODEL_CHANGE_SECONDS = 30.0
"""How long a request may wait because its model is not the one that ran last in a pool."""
CLOSING_SECONDS = 60.0
"""How long after the last wait for a model its books stay open."""


@define(eq=False, kw_only=True)
class FairQueue:
    """The requests of every model of one process, running and waiting.

    The caller calls `begin` for each attempt and `release` after it, `join` and `leave` around each wait, and `end` once, in any state.
    When a slot is free, it calls `give_turns` or `give_turns_for`; `pick` and `pick_for` tell which request would be the first.

    >>> from multiverse_gateway.core.fairness import Flow, Pool, Ticket
    >>> class Chat:
    ...     needs = None
    ...     def estimated_cost(self) -> float:
    ...         return 900.0
    ...     def actual_cost(self) -> float:
    ...         return 700.0
    >>> queue = FairQueue()
    >>> queue.serve({"lab-1": Pool(("llama",), slots=1)})
    >>> first, second, third = (Ticket("llama", Flow(client), Chat()) for client in ("script", "script", "person"))
    >>> queue.begin(first, 0.0, "lab-1")
    >>> queue.join(second, 1.0)
    >>> queue.join(third, 2.0)
    >>> queue.places("llama", 3.0)[third]
    Place(position=1, waiting=2, about_seconds=None)
    >>> queue.end(first, 4.0)
    >>> queue.pick("llama", 4.0) is third
    True
    """

    max_waiting: int = 256
    """Most waiting requests of one model."""
    uncapped_slots: int | None = None
    """Most running requests of a model with a server without a cap; they are shared out as slots are. `None` for no limit."""
    _models: dict[str, ModelUse] = field(factory=dict, init=False)
    _pools: Mapping[Hashable, Pool] = field(factory=dict, init=False)
    _shared: Collection[Hashable] = field(default=frozenset(), init=False)
    """The pools with several models."""
    _last: dict[Hashable, str] = field(factory=dict, init=False)
    """The model that ran last in each of them."""
    total_waiting: int = field(default=0, init=False)
    """Waiting requests of all models."""
    _turns: int = field(default=0, init=False)

    # What is served

    def serve(self, pools: Mapping[Hashable, Pool]) -> None:
        """Note the pools that are usable now; requests of models that no pool serves keep their places.

        Called after any of them has changed. It costs about a microsecond per pool.
        """
        slots: dict[str, int | None] = {}
        siblings: dict[str, dict[str, None]] = {}
        for pool in pools.values():
            for name in pool.models:
                so_far = slots.get(name, 0)
                its = pool.slots_of(name)
                slots[name] = None if so_far is None or its is None else so_far + its
                siblings.setdefault(name, {}).update(dict.fromkeys(pool.models))
        self._pools = pools
        self._shared = frozenset(pool for pool, usable in pools.items() if len(usable.models) > 1)
        self._last = {pool: model for pool, model in self._last.items() if pool in self._shared}
        self._models = {name: model for name, model in self._models.items() if model.live or name in slots}
        for name in self._models.keys() | slots.keys():
            model = self._model(name)
            model.slots = slots.get(name, 0)
            model.bound = inf
            if model.slots is None and self.uncapped_slots is not None:
                model.slots = model.bound = self.uncapped_slots
            model.siblings = tuple(other for other in siblings.get(name, ()) if other != name)

    def learn(self, name: str, *, seconds: float, output_tokens: float) -> None:
        """Take how long a well-answered request of a model ran, and its output tokens (or means of several): estimates use them."""
        model = self._models.get(name)
        if model is not None:
            model.learn(seconds, output_tokens)

    def _model(self, name: str) -> ModelUse:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = ModelUse()
        return model

    # The life of a request

    def may_begin(self, ticket: Ticket, now: float) -> bool:
        """Return whether a request may take a free slot at once: no request waits for its model, and its flow may hold one more slot."""
        model = self._models.get(ticket.model)
        if model is None:
            return True
        books = model.books
        return (books is None or not books.waiting) and (not model.running or model.used_up(ticket.flow, now) is None)

    def used_up(self, ticket: Ticket, now: float) -> Share | None:
        """Return the share of slots because of which a request may not take a free one, or `None` if it may."""
        model = self._models.get(ticket.model)
        return None if model is None else model.used_up(ticket.flow, now)

    def begin(self, ticket: Ticket, now: float, pool: Hashable = None) -> None:
        """Take a slot of a pool for an attempt of a request, which leaves the queue; its first attempt is charged."""
        model = ticket.use
        if model is None:
            model = self._enter(ticket, now)
        assert not ticket.is_running
        books = model.books
        if books is not None:
            account = books.accounts[ticket.flow]
            if ticket.is_waiting:
                self._stop_waiting(ticket, books, account, now)
            elif not account.waiting and not ticket.has_begun:
                account.counter = max(account.counter, books.clock)
            if not ticket.has_begun:
                self._turns += 1
                books.charge(account, ticket, self._turns)
        ticket.has_begun = ticket.is_running = True
        running, flow = model.running, ticket.flow
        running[flow] = running.get(flow, 0) + 1
        if pool in self._shared:
            self._last[pool] = ticket.model

    def release(self, ticket: Ticket) -> None:
        """Give the slot of an attempt back. The request keeps its charge and its place, until `end`; harmless without a slot."""
        if ticket.is_running:
            model = ticket.use
            assert model is not None
            ticket.is_running = False
            running, flow = model.running, ticket.flow
            left = running[flow] - 1
            if left:
                running[flow] = left
            else:
                del running[flow]

    def join(self, ticket: Ticket, now: float) -> None:
        """Let a request wait: one that has begun before in its old place, any other behind its flow's. Harmless if it waits already."""
        if ticket.is_waiting:
            return
        assert not ticket.is_running
        model = self._model(ticket.model)
        books = model.books
        if books is None:
            books = self._open(model)
        if ticket.use is None:
            self._enter(ticket, now)
        account = books.accounts[ticket.flow]
        if not account.waiting:
            if not books.waiting:
                self._catch_up(model, books)
            account.counter = max(account.counter, books.clock)
            self._turns += 1
            account.turn = self._turns
            books.queued[account.flow] = account
        insort(account.waiting, ticket, key=rank)
        ticket.is_waiting = True
        ticket.joined_at = now
        books.waiting += 1
        self.total_waiting += 1

    def overflow(self, name: str) -> Ticket | None:
        """Return the request that has to leave the queue of a model because too many wait, or `None`. It is still in the queue.

        It is the newest of the flow with the most waiting requests per weight; of equal flows, of the one that has the newest request.
        A request that has begun before is taken only if there is no other. Called after each `join`, once free slots were given away.
        """
        model = self._models.get(name)
        if model is None or model.books is None or model.books.waiting <= self.max_waiting:
            return None
        newest = [(account, account.waiting[-1]) for account in model.books.queued.values()]
        fresh = [(account, ticket) for account, ticket in newest if not ticket.has_begun]
        return max(fresh or newest, key=lambda item: (len(item[0].waiting) / item[0].weight, item[1].number))[1]

    def leave(self, ticket: Ticket, now: float) -> None:
        """Let a request wait no longer; harmless if it does not wait."""
        model = ticket.use
        if ticket.is_waiting and model is not None and model.books is not None:
            self._stop_waiting(ticket, model.books, model.books.accounts[ticket.flow], now)

    def end(self, ticket: Ticket, now: float) -> None:
        """Forget a request that is over, whatever became of it, and correct its charge; harmless if it is not in the books."""
        model = ticket.use
        if model is None:
            return
        if ticket.is_waiting:
            self.leave(ticket, now)
        if ticket.is_running:
            self.release(ticket)
        ticket.use = None
        del model.live[ticket]
        books = model.books
        if books is not None:
            self._settle(ticket, model, books, now)

    def _settle(self, ticket: Ticket, model: ModelUse, books: Books, now: float) -> None:
        account = books.accounts[ticket.flow]
        account.live -= 1
        if ticket.has_begun:
            account.counter += (ticket.request.actual_cost() - ticket.cost) / ticket.weight
        if not model.live or (not books.waiting and now - books.waited_at > CLOSING_SECONDS):
            model.books = None
        elif not account.live:
            books.park(account)

    def _enter(self, ticket: Ticket, now: float) -> ModelUse:
        model = self._models.get(ticket.model) or self._model(ticket.model)
        ticket.use = model
        model.live[ticket] = None
        client, band = ticket.flow
        if client != model.latest_client:
            model.before_at = model.latest_at
            model.latest_client = client
        model.latest_at = now
        if band is not BULK:
            model.interactive_at = now
        if model.books is not None:
            self._turns += 1
            model.books.enter(ticket, self._turns)
        return model

    def _open(self, model: ModelUse) -> Books:
        """Open the books of a model that is short of slots: charge what runs, as if the books had been open when it began."""
        books = model.books = Books()
        for ticket in model.live:
            self._turns += 1
            account = books.enter(ticket, self._turns)
            if ticket.has_begun:
                account.counter = max(account.counter, books.clock)
                books.charge(account, ticket, self._turns)
        return books

    def _stop_waiting(self, ticket: Ticket, books: Books, account: Account, now: float) -> None:
        ticket.is_waiting = False
        ticket.waited_seconds += now - ticket.joined_at
        account.waiting.remove(ticket)
        if not account.waiting:
            del books.queued[account.flow]
        books.waiting -= 1
        books.waited_at = now
        self.total_waiting -= 1

    def _catch_up(self, model: ModelUse, books: Books) -> None:
        """Lift the clock of a model that begins to wait to those of the models it shares pools with: idle models earn no credit."""
        for name in model.siblings:
            sibling = self._models[name].books
            if sibling is not None and sibling.waiting and sibling.clock > books.clock:
                books.move_clock(sibling.clock)

    # Whose turn it is

    def pick(self, name: str, now: float, *, unmet: Collection[Hashable] = ()) -> Ticket | None:
        """Return the request of a model that is next, or `None`; it stays in the queue until it begins.

        `unmet` holds the needs that what is free cannot meet: requests with such needs are passed over and keep their places.
        """
        model = self._models.get(name)
        return None if model is None else first_of(model, now, unmet)[1]

    def pick_for(self, pool: Hashable, now: float, *, unmet: Collection[Hashable] = ()) -> Ticket | None:
        """Return the request that is next over all models of a pool, or `None`. See `pick`."""
        pool_use = self._pools.get(pool)
        if pool_use is None or not self.total_waiting:
            return None
        if len(pool_use.models) == 1:
            return self.pick(pool_use.models[0], now, unmet=unmet)
        firsts = {name: first_of(self._models[name], now, unmet) for name in pool_use.models}
        last = "" if pool_use.is_one_model else self._last.get(pool, "")
        preferred = firsts[last][1] if last in firsts else None
        if preferred is not None and not any(name != last and now - first[2] >= MODEL_CHANGE_SECONDS for name, first in firsts.items()):
            return preferred
        return min(firsts.values(), key=lambda first: first[0])[1]

    def give_turns(self, name: str, now: float, take: Callable[[Ticket], None]) -> None:
        """Offer the free slots of a model to its waiting requests, the next one first, until none of them can use what is free.

        `take` begins the request, ends it, or leaves it where it is: then it keeps its place, and no request with equal needs is asked.
        """
        give_turns(partial(self.pick, name, now), take)

    def is_shared(self, pool: Hashable) -> bool:
        """Return whether several models share the slots of a pool."""
        return pool in self._shared

    def give_turns_for(self, pool: Hashable, now: float, take: Callable[[Ticket], None]) -> None:
        """Offer the free slots of a pool to the waiting requests of all its models. See `give_turns`."""
        give_turns(partial(self.pick_for, pool, now), take)

    # What can be seen of it

    @property
    def anybody_waits(self) -> bool:
        """Whether any request waits for any model."""
        return self.total_waiting > 0

    def waiting(self, name: str) -> int:
        """Return how many requests wait for a model."""
        model = self._models.get(name)
        return 0 if model is None else model.waiting

    def lengths(self) -> dict[str, int]:
        """Return how many requests wait, by model; models without any are left out."""
        return {name: model.waiting for name, model in self._models.items() if model.waiting}

    def lengths_by_band(self) -> dict[tuple[str, Band], int]:
        """Return how many requests wait, by model and band; bands without any are left out."""
        lengths: dict[tuple[str, Band], int] = {}
        for name, model in self._models.items():
            for flow, account in model.queued.items():
                place = name, flow.band
                lengths[place] = lengths.get(place, 0) + len(account.waiting)
        return lengths

    def counts(self, name: str) -> QueueCounts:
        """Return how much a model is used."""
        return queue_counts_of(self._models.get(name) or ModelUse(slots=0))

    def order(self, name: str) -> list[Ticket]:
        """Return the waiting requests of a model in the order in which they would begin if no other request came and all could.

        It costs some microseconds per request. Shares of slots do not count, because no one knows whose slot is free next.
        """
        model = self._models.get(name)
        return [] if model is None or model.books is None else list(merged(model.books, self._turns))

    def places(self, name: str, now: float) -> dict[Ticket, Place]:
        """Return where each waiting request of a model stands, the next one first."""
        model = self._models.get(name)
        return {} if model is None else places_of(model, self.order(name), now)

    def waits_of(self, client: str, now: float) -> list[Wait]:
        """Return the waiting requests of a client in all models, those of one model in the order in which they would begin."""
        flows = [Flow(client, band) for band in Band]
        return [
            Wait(ticket=ticket, place=place, seconds=ticket.waited_seconds + now - ticket.joined_at)
            for name, model in self._models.items()
            if any(flow in model.queued for flow in flows)
            for ticket, place in self.places(name, now).items()
            if ticket.flow.client == client
        ]

    def mean_output_tokens(self, name: str) -> float:
        """Return the output tokens of a model's usual answer."""
        model = self._models.get(name)
        return USUAL_OUTPUT_TOKENS if model is None else model.output_tokens

    def until_next_end(self, name: str, flow: Flow) -> int | None:
        """Return about how many seconds it takes until a running request of a flow ends, as one of `STEPS`; `None` if that is unknown.

        It is when a refused client has a place again, for `Retry-After`. For a flow without running requests, those of all flows count.
        """
        model = self._models.get(name)
        return None if model is None else until_next_end(model, flow)
