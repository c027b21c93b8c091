"""Decide which waiting request gets a free slot, so that every client gets its share of a model's servers.

Theory of operation. A *flow* is all that one client (a key or an address) asks of one model in one band. Each flow has a *counter*: the
weighted tokens of the requests that it has begun, divided by its weight. A model has a *clock*: the largest counter that a flow had when
one of its requests began. This is start-time fair queueing (Goyal, 1996) over the tokens of VTC (Sheng, 2024).

1. The flow with the least counter is next. A counter below the clock counts as the clock. Of equal flows the one that has gone longest
   without a turn is next. Within a flow, requests keep their order.
2. A flow that begins to wait is lifted to the clock: time without requests earns no credit. A counter is kept until the clock has passed
   it, or the model is idle: a short pause makes nothing cheaper.
3. A request is charged an estimate when it begins, once. When it ends, the charge becomes what was used. A request that fails over keeps
   its charge and its place.
4. If the flow of a request has no counter above the clock, every other flow begins at most one request before it, whatever requests
   cost. With n flows, S slots and T seconds of the longest request it waits (n - 1) * T / S + T seconds at most.
5. While other clients use a model, a flow holds at most half of its slots, and all bulk requests together hold at most a quarter.
   Such a share makes a request wait: where no request may wait, or no server is in rotation, there are no shares.
6. If too many requests wait, the newest one of the flow with the most waiting requests per weight is dropped.
7. A server, or a host with several models, is a *pool*. A free slot goes to the first request over all models of its pool. The model that
   ran there last goes first until a request for another one has waited `MODEL_CHANGE_SECONDS`: a change of model reloads the engine.
8. Counters and clock are in the *books* of a model. They are opened by the first request that has to wait, which charges what runs
   then, and closed a while after the last one. So a model that has slots for all requests costs a microsecond per request, and no
   request is estimated in vain.
9. Nothing remains of a flow once it has no request and the clock has passed its counter, and of no flow of an idle model. A model only
   remembers which client came last, for rule 5.

Instants are monotonic seconds. Nothing here does I/O.
"""

from bisect import insort
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from enum import StrEnum
from functools import partial
from heapq import heappop, heappush
from math import ceil, inf
from typing import NamedTuple, Protocol

from attrs import define, field, frozen

BYTES_PER_TOKEN = 4
"""Bytes of a body for which one token is expected."""
MAX_PROMPT_TOKENS = 8192
"""Most prompt tokens that are expected of a body: images make a body large, not a prompt."""
MAX_OUTPUT_TOKENS = 2048
"""Most output tokens that are expected of a request, whatever its `max_tokens`."""
USUAL_OUTPUT_TOKENS = 256
"""Output tokens that are expected of a model before any of its requests has ended."""
OUTPUT_WEIGHT = 2
"""What an output token costs, in prompt tokens."""
MAX_COST = MAX_PROMPT_TOKENS + OUTPUT_WEIGHT * MAX_OUTPUT_TOKENS
"""Largest estimate of a completion."""
OTHERS_SECONDS = 120.0
"""How long a model counts as used by a client after its last request."""
MODEL_CHANGE_SECONDS = 30.0
"""How long a request may wait because its model is not the one that ran last in a pool."""
STEPS = (5, 10, 20, 30, 60, 120, 240)
"""The only waiting times that are shown, in seconds: an estimate is off by 40 % in the median, so figures would claim too much."""
CLOSING_SECONDS = 60.0
"""How long after the last wait for a model its books stay open."""
_MEAN_OF = 16
"""Requests that a running mean remembers."""


class Band(StrEnum):
    """How urgent a request is: whether a person waits for its answer."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


class Share(StrEnum):
    """A part of a model's slots that other clients' requests bound."""

    CLIENT = "half"
    """What one client may hold in one band."""
    BULK = "a quarter"
    """What all bulk requests together may hold beside interactive ones."""


class Flow(NamedTuple):
    """The requests of one client in one band. `client` names a key or an address."""

    client: str
    band: Band = Band.INTERACTIVE


_BULK, _INTERACTIVE = Band.BULK, Band.INTERACTIVE  # a look-up in an enum costs as much as a call


@frozen
class Pool:
    """Slots that one or more models share: a server, or a host. `slots` is `None` without a cap."""

    models: tuple[str, ...]
    slots: int | None = None


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
class Crowd:
    """The use of one model: its slots (`None` without a cap), running and waiting requests, and clients with a waiting request."""

    slots: int | None
    running: int
    waiting: int
    clients_waiting: int


def estimated_cost(body_bytes: int, *, max_tokens: int | None, mean_output_tokens: float, generates: bool = True) -> float:
    """Return what a request is charged when it begins, in weighted tokens.

    `mean_output_tokens` stands in for a `max_tokens` that the request does not have. A request that generates nothing (embeddings,
    rerank) costs its prompt, however long that is.

    >>> estimated_cost(400, max_tokens=50, mean_output_tokens=256.0)
    200.0
    """
    prompt = _estimated_prompt(body_bytes, generates)
    if not generates:
        return prompt
    output = mean_output_tokens if max_tokens is None else max(0, max_tokens)
    return prompt + OUTPUT_WEIGHT * min(output, MAX_OUTPUT_TOKENS)


def _estimated_prompt(body_bytes: int, generates: bool) -> float:
    tokens = body_bytes / BYTES_PER_TOKEN
    return min(tokens, MAX_PROMPT_TOKENS) if generates else tokens


def actual_cost(body_bytes: int, sent_bytes: int, *, usage: tuple[int, int] = (0, 0), events: int = 0, generates: bool = True) -> float:
    """Return what a request has cost, once a server has answered it: the whole prompt, and all output that was relayed.

    `usage` holds the prompt and completion tokens that the server reported, 0 where it did not; it is believed up to one token per byte,
    so that no server can bill a client for more than passed through. Without a report an event counts as a token, or 4 bytes do.

    >>> actual_cost(400, 900, usage=(90, 20)), actual_cost(400, 900, events=20), actual_cost(400, 900, usage=(10**9, 10**9))
    (130.0, 140.0, 2200.0)
    """
    prompt_tokens, output_tokens = usage
    prompt = min(prompt_tokens, body_bytes) if prompt_tokens > 0 else _estimated_prompt(body_bytes, generates)
    if not generates:
        return float(prompt)
    output = output_tokens if output_tokens > 0 else events or sent_bytes / BYTES_PER_TOKEN
    return float(prompt + OUTPUT_WEIGHT * min(output, sent_bytes))


class Request(Protocol):
    """What the queue asks of a request, and only while a model is short of slots."""

    @property
    def needs(self) -> Hashable:
        """What the request needs of a server: of two requests of a model with equal needs, both can use what is free, or none can."""
        ...

    def estimated_cost(self) -> float:
        """Return the weighted tokens that the request is expected to use (`estimated_cost`). Asked once."""
        ...

    def actual_cost(self) -> float:
        """Return the weighted tokens that the request, which is over, has used: 0 if no server answered it (`actual_cost`)."""
        ...


class Ticket:
    """One request in the books of the queue, from its first `begin` or `join` to its `end`.

    `number` is the order of arrival and `cost` the estimate that the request was charged, once the books of its model are open.
    `waited_seconds` are those in the queue, up to the last time that it left it.
    """

    __slots__ = (
        "_model",
        "cost",
        "flow",
        "has_begun",
        "is_running",
        "is_waiting",
        "joined_at",
        "model",
        "number",
        "request",
        "waited_seconds",
        "weight",
    )

    def __init__(self, model: str, flow: Flow, request: Request, weight: float = 1.0) -> None:
        self.model = model
        self.flow = flow
        self.request = request
        self.weight = weight
        self.number = 0
        self.cost = 0.0
        self.has_begun = self.is_running = self.is_waiting = False
        self.joined_at = self.waited_seconds = 0.0
        self._model: _Model | None = None


def _rank(ticket: Ticket) -> tuple[bool, int]:
    """Return the order within a flow: requests that fail over first, then in order of arrival."""
    return not ticket.has_begun, ticket.number


@define(eq=False)
class _Account:
    """What the books hold of one flow. `turn` is the number of its last turn; of equal flows the least one is next."""

    flow: Flow
    is_bulk: bool
    counter: float = 0.0
    weight: float = 1.0
    turn: int = 0
    live: int = 0
    parked_at: float | None = None
    """The counter in its last entry among the parked accounts."""
    waiting: list[Ticket] = field(factory=list)


@define(eq=False)
class _Books:
    """The accounts of one model, kept from the first request that waits until a while after the last one."""

    clock: float = 0.0
    waiting: int = 0
    waited_at: float = 0.0
    """When the last request left the queue."""
    accounts: dict[Flow, _Account] = field(factory=dict)
    queued: dict[Flow, _Account] = field(factory=dict)
    """The accounts with a waiting request."""
    parked: list[tuple[float, int, _Account]] = field(factory=list)
    """A heap of accounts whose counter the clock had not passed when they lost their last request; an entry may be out of date."""

    def enter(self, ticket: Ticket, number: int) -> _Account:
        """Number and estimate a request, and count it in the account of its flow."""
        ticket.number = number
        ticket.cost = ticket.request.estimated_cost()
        account = self.accounts.get(ticket.flow)
        if account is None:
            account = self.accounts[ticket.flow] = _Account(ticket.flow, ticket.flow.band is _BULK)
        account.weight = ticket.weight
        account.live += 1
        return account

    def charge(self, account: _Account, ticket: Ticket, turn: int) -> None:
        """Charge a request that begins, and move the clock."""
        counter = account.counter
        account.counter = counter + ticket.cost / ticket.weight
        account.turn = turn
        if counter > self.clock:
            self.move_clock(counter)

    def move_clock(self, clock: float) -> None:
        """Move the clock, and forget the flows that it passes."""
        self.clock = clock
        parked = self.parked
        while parked and parked[0][0] <= clock:
            self._forget(heappop(parked)[2])

    def park(self, account: _Account) -> None:
        """Keep the account of a flow without requests until the clock has passed its counter."""
        if account.counter <= self.clock:
            self._forget(account)
        elif account.parked_at != account.counter:
            account.parked_at = account.counter
            heappush(self.parked, (account.counter, id(account), account))

    def _forget(self, account: _Account) -> None:
        if not account.live and account.counter <= self.clock and self.accounts.get(account.flow) is account:
            del self.accounts[account.flow]


@define(eq=False)
class _Model:
    """What is known of one model. While no request waits, that is what runs and when clients came; the books are closed."""

    slots: int | None = None
    siblings: tuple[str, ...] = ()
    """Other models that share a pool with this one."""
    live: dict[Ticket, None] = field(factory=dict)
    running: dict[Flow, int] = field(factory=dict)
    books: _Books | None = None
    latest_client: str = ""
    latest_at: float = -inf
    before_at: float = -inf
    """When any client other than `latest_client` came last."""
    interactive_at: float = -inf
    seconds: float | None = None
    """The mean of the seconds that a request runs."""
    output_tokens: float = USUAL_OUTPUT_TOKENS
    samples: int = 0

    @property
    def waiting(self) -> int:
        """Return how many requests wait."""
        return 0 if self.books is None else self.books.waiting

    def used_up(self, flow: Flow, now: float) -> Share | None:
        """Return the share of slots because of which a flow may not hold one more, or `None` if it may."""
        if flow.band is _BULK and self.is_bulk_at_limit(now):
            return Share.BULK
        running = self.running.get(flow)
        if not running or not self.slots or running < _half(self.slots) or self._is_alone(flow.client, now):
            return None
        return Share.CLIENT

    def is_bulk_at_limit(self, now: float) -> bool:
        """Return whether bulk requests hold as many slots as they may beside interactive ones."""
        if not self.slots or not self._is_interactive(now):
            return False
        return sum(running for flow, running in self.running.items() if flow.band is _BULK) >= _quarter(self.slots)

    def limit(self, flow: Flow, slots: int, now: float) -> int | None:
        """Return how many of the slots a flow may hold; for bulk beside interactive requests, how many all bulk ones may together."""
        if flow.band is _BULK and self._is_interactive(now):
            return _quarter(slots)
        return None if self._is_alone(flow.client, now) else _half(slots)

    def _is_interactive(self, now: float) -> bool:
        if now - self.interactive_at <= OTHERS_SECONDS:
            return True
        return any(ticket.flow.band is _INTERACTIVE for ticket in self.live)

    def _is_alone(self, client: str, now: float) -> bool:
        others_at = self.before_at if client == self.latest_client else self.latest_at
        if now - others_at <= OTHERS_SECONDS:
            return False
        return all(ticket.flow.client == client for ticket in self.live)


def _half(slots: int) -> int:
    return max(1, ceil(slots / 2))


def _quarter(slots: int) -> int:
    return max(1, ceil(slots / 4))


@frozen(kw_only=True)
class Wait:
    """A waiting request, where it stands, and for how many seconds it has waited in all."""

    ticket: Ticket
    place: Place
    seconds: float


_Key = tuple[float, int]


@define(eq=False, kw_only=True)
class FairQueue:
    """The requests of every model of one process, running and waiting.

    The caller calls `begin` for each attempt and `release` after it, `join` and `leave` around each wait, and `end` once, in any state.
    When a slot is free, it calls `give_turns` or `give_turns_for`; `pick` and `pick_for` tell which request would be the first.

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
    _models: dict[str, _Model] = field(factory=dict, init=False)
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
                known = slots.get(name, 0)
                slots[name] = None if known is None or pool.slots is None else known + pool.slots
                siblings.setdefault(name, {}).update(dict.fromkeys(pool.models))
        self._pools = pools
        self._shared = frozenset(pool for pool, known in pools.items() if len(known.models) > 1)
        self._last = {pool: model for pool, model in self._last.items() if pool in self._shared}
        self._models = {name: model for name, model in self._models.items() if model.live or name in slots}
        for name in self._models.keys() | slots.keys():
            model = self._model(name)
            model.slots = slots.get(name, 0)
            model.siblings = tuple(other for other in siblings.get(name, ()) if other != name)

    def learn(self, name: str, *, seconds: float, output_tokens: float) -> None:
        """Take how long a well-answered request of a model ran, and its output tokens (or means of several): estimates use them."""
        model = self._models.get(name)
        if model is None:
            return
        model.samples = min(model.samples + 1, _MEAN_OF)
        before = seconds if model.seconds is None else model.seconds
        model.seconds = before + (seconds - before) / model.samples
        model.output_tokens += (output_tokens - model.output_tokens) / model.samples

    def _model(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = _Model()
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
        model = ticket._model
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
            model = ticket._model
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
        if ticket._model is None:
            self._enter(ticket, now)
        account = books.accounts[ticket.flow]
        if not account.waiting:
            if not books.waiting:
                self._catch_up(model, books)
            account.counter = max(account.counter, books.clock)
            self._turns += 1
            account.turn = self._turns
            books.queued[account.flow] = account
        insort(account.waiting, ticket, key=_rank)
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
        return max(fresh or newest, key=lambda found: (len(found[0].waiting) / found[0].weight, found[1].number))[1]

    def leave(self, ticket: Ticket, now: float) -> None:
        """Let a request wait no longer; harmless if it does not wait."""
        model = ticket._model
        if ticket.is_waiting and model is not None and model.books is not None:
            self._stop_waiting(ticket, model.books, model.books.accounts[ticket.flow], now)

    def end(self, ticket: Ticket, now: float) -> None:
        """Forget a request that is over, whatever became of it, and correct its charge; harmless if it is not in the books."""
        model = ticket._model
        if model is None:
            return
        if ticket.is_waiting:
            self.leave(ticket, now)
        if ticket.is_running:
            self.release(ticket)
        ticket._model = None
        del model.live[ticket]
        books = model.books
        if books is not None:
            self._settle(ticket, model, books, now)

    def _settle(self, ticket: Ticket, model: _Model, books: _Books, now: float) -> None:
        account = books.accounts[ticket.flow]
        account.live -= 1
        if ticket.has_begun:
            account.counter += (ticket.request.actual_cost() - ticket.cost) / ticket.weight
        if not model.live or (not books.waiting and now - books.waited_at > CLOSING_SECONDS):
            model.books = None
        elif not account.live:
            books.park(account)

    def _enter(self, ticket: Ticket, now: float) -> _Model:
        model = self._models.get(ticket.model) or self._model(ticket.model)
        ticket._model = model
        model.live[ticket] = None
        client, band = ticket.flow
        if client != model.latest_client:
            model.before_at = model.latest_at
            model.latest_client = client
        model.latest_at = now
        if band is not _BULK:
            model.interactive_at = now
        if model.books is not None:
            self._turns += 1
            model.books.enter(ticket, self._turns)
        return model

    def _open(self, model: _Model) -> _Books:
        """Open the books of a model that is short of slots: charge what runs, as if the books had been open when it began."""
        books = model.books = _Books()
        for ticket in model.live:
            self._turns += 1
            account = books.enter(ticket, self._turns)
            if ticket.has_begun:
                account.counter = max(account.counter, books.clock)
                books.charge(account, ticket, self._turns)
        return books

    def _stop_waiting(self, ticket: Ticket, books: _Books, account: _Account, now: float) -> None:
        ticket.is_waiting = False
        ticket.waited_seconds += now - ticket.joined_at
        account.waiting.remove(ticket)
        if not account.waiting:
            del books.queued[account.flow]
        books.waiting -= 1
        books.waited_at = now
        self.total_waiting -= 1

    def _catch_up(self, model: _Model, books: _Books) -> None:
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
        return None if model is None else _first(model, now, unmet)[1]

    def pick_for(self, pool: Hashable, now: float, *, unmet: Collection[Hashable] = ()) -> Ticket | None:
        """Return the request that is next over all models of a pool, or `None`. See `pick`."""
        known = self._pools.get(pool)
        if known is None or not self.total_waiting:
            return None
        if len(known.models) == 1:
            return self.pick(known.models[0], now, unmet=unmet)
        firsts = {name: _first(self._models[name], now, unmet) for name in known.models}
        last = self._last.get(pool, "")
        preferred = firsts[last][1] if last in firsts else None
        if preferred is not None and not any(name != last and now - first[2] >= MODEL_CHANGE_SECONDS for name, first in firsts.items()):
            return preferred
        return min(firsts.values(), key=lambda first: first[0])[1]

    def give_turns(self, name: str, now: float, take: Callable[[Ticket], None]) -> None:
        """Offer the free slots of a model to its waiting requests, the next one first, until none of them can use what is free.

        `take` begins the request, ends it, or leaves it where it is: then it keeps its place, and no request with equal needs is asked.
        """
        _give_turns(partial(self.pick, name, now), take)

    def give_turns_for(self, pool: Hashable, now: float, take: Callable[[Ticket], None]) -> None:
        """Offer the free slots of a pool to the waiting requests of all its models. See `give_turns`."""
        _give_turns(partial(self.pick_for, pool, now), take)

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
            for flow, account in _queued(model).items():
                place = name, flow.band
                lengths[place] = lengths.get(place, 0) + len(account.waiting)
        return lengths

    def crowd(self, name: str) -> Crowd:
        """Return how much a model is used."""
        model = self._models.get(name) or _Model(slots=0)
        clients = {flow.client for flow in _queued(model)}
        return Crowd(slots=model.slots, running=sum(model.running.values()), waiting=model.waiting, clients_waiting=len(clients))

    def order(self, name: str) -> list[Ticket]:
        """Return the waiting requests of a model in the order in which they would begin if no other request came and all could.

        It costs some microseconds per request. Shares of slots do not count, because no one knows whose slot is free next.
        """
        model = self._models.get(name)
        return [] if model is None or model.books is None else list(_merged(model.books, self._turns))

    def places(self, name: str, now: float) -> dict[Ticket, Place]:
        """Return where each waiting request of a model stands, the next one first."""
        model = self._models.get(name)
        if model is None:
            return {}
        own: dict[Flow, int] = {}
        places: dict[Ticket, Place] = {}
        for position, ticket in enumerate(self.order(name), 1):
            own[ticket.flow] = own.get(ticket.flow, 0) + 1
            seconds = _about(model, position, own[ticket.flow], ticket.flow, now)
            places[ticket] = Place(position=position, waiting=model.waiting, about_seconds=seconds)
        return places

    def waits_of(self, client: str, now: float) -> list[Wait]:
        """Return the waiting requests of a client in all models, those of one model in the order in which they would begin."""
        flows = [Flow(client, band) for band in Band]
        return [
            Wait(ticket=ticket, place=place, seconds=ticket.waited_seconds + now - ticket.joined_at)
            for name, model in self._models.items()
            if any(flow in _queued(model) for flow in flows)
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
        if model is None or model.seconds is None:
            return None
        running = model.running.get(flow) or sum(model.running.values())
        return in_steps(model.seconds / max(1, running))


def _give_turns(pick: Callable[..., Ticket | None], take: Callable[[Ticket], None]) -> None:
    unmet: set[Hashable] = set()
    while (ticket := pick(unmet=unmet)) is not None:
        take(ticket)
        if ticket.is_waiting:
            unmet.add(ticket.request.needs)


def _first(model: _Model, now: float, unmet: Collection[Hashable]) -> tuple[_Key, Ticket | None, float]:
    """Return the key of the request that is next, the request, and when the oldest of those that may go first joined."""
    least, turn, oldest = inf, 0, inf
    first: Ticket | None = None
    books = model.books
    if books is None:
        return (least, turn), None, oldest
    clock = books.clock
    at_limit = {flow for flow in model.running if model.used_up(flow, now)}  # few flows run: saves asking for each one that waits
    is_bulk_at_limit = model.is_bulk_at_limit(now)
    for flow, account in books.queued.items():
        head = _head(account, unmet) if unmet else account.waiting[0]
        if head is None or (at_limit and flow in at_limit) or (account.is_bulk and is_bulk_at_limit):
            account.counter = max(account.counter, clock - MAX_COST / account.weight)  # a flow that may not go now saves up no more
            continue
        if head.has_begun:
            counter, its_turn = clock, head.number
        else:
            counter, its_turn = account.counter, account.turn
            if counter < clock:
                counter = clock
        if counter < least or (counter == least and its_turn < turn):
            first, least, turn = head, counter, its_turn
        if head.joined_at < oldest:
            oldest = head.joined_at
    return (least, turn), first, oldest


def _head(account: _Account, unmet: Collection[Hashable]) -> Ticket | None:
    return next((ticket for ticket in account.waiting if ticket.request.needs not in unmet), None)


def _queued(model: _Model) -> Mapping[Flow, _Account]:
    return {} if model.books is None else model.books.queued


def _about(model: _Model, position: int, own: int, flow: Flow, now: float) -> int | None:
    """Return the step of the seconds until a request begins that stands at `position` of all, and is the `own`-th of its flow."""
    mean, slots = model.seconds, model.slots
    if mean is None or not slots:
        return None
    seconds = position * mean / slots
    limit = model.limit(flow, slots, now)
    if limit is not None:  # as many of the flow's own requests as are over its share have to end first
        seconds = max(seconds, (own + model.running.get(flow, 0) - limit) * mean / limit)
    return in_steps(seconds)


@define(eq=False)
class _Line:
    """The waiting requests of one flow while `_merged` begins them in thought."""

    head: Ticket
    rest: Iterator[Ticket]
    counter: float
    turn: int


def _merged(books: _Books, turn: int) -> Iterator[Ticket]:
    """Begin all waiting requests of a model in thought, as `_first` would choose them; `turn` is the number of the last turn so far."""
    clock = books.clock
    behind: list[tuple[int, _Line]] = []
    """Lines that count as being at the clock, by turn."""
    ahead: list[tuple[float, int, _Line]] = []
    """Lines whose counters are above the clock."""

    def put(line: _Line) -> None:
        if line.head.has_begun:
            heappush(behind, (line.head.number, line))
        elif line.counter <= clock:
            heappush(behind, (line.turn, line))
        else:
            heappush(ahead, (line.counter, line.turn, line))

    for account in books.queued.values():
        put(_Line(account.waiting[0], iter(account.waiting[1:]), account.counter, account.turn))
    while behind or ahead:
        if not behind:
            clock = ahead[0][0]
        while ahead and ahead[0][0] <= clock:
            _, its_turn, line = heappop(ahead)
            heappush(behind, (its_turn, line))
        line = heappop(behind)[1]
        ticket = line.head
        yield ticket
        if not ticket.has_begun:
            turn += 1
            line.counter, line.turn = line.counter + ticket.cost / ticket.weight, turn
        following = next(line.rest, None)
        if following is not None:
            line.head = following
            put(line)


def in_steps(seconds: float) -> int:
    """Return the least of `STEPS` that is not below so many seconds, or the last one.

    >>> in_steps(0.3), in_steps(12.0), in_steps(10_000.0)
    (5, 20, 240)
    """
    return next((step for step in STEPS if step >= seconds), STEPS[-1])


@define(eq=False)
class AtOnce:
    """Count the requests of each client that run or wait, in all models together; a client without any is not kept.

    The caller calls `take` when a request begins and `give_back` at its one exit. A limit holds for waiting only: while servers are
    free, a client may use as many of them as it likes.

    >>> at_once = AtOnce()
    >>> for _ in range(3):
    ...     at_once.take("key-1")
    >>> at_once.may_wait("key-1", 3), at_once.may_wait("key-1", 2), at_once.may_wait("key-1", 0)
    (True, False, True)
    """

    _live: dict[str, int] = field(factory=dict, init=False)

    def take(self, client: str) -> None:
        """Count a request."""
        live = self._live
        live[client] = live.get(client, 0) + 1

    def give_back(self, client: str) -> None:
        """Count a request no more.

        Raises:
            KeyError: None is counted for this client.
        """
        live = self._live
        left = live[client] - 1
        if left:
            live[client] = left
        else:
            del live[client]

    def live(self, client: str) -> int:
        """Return how many requests of a client run or wait."""
        return self._live.get(client, 0)

    def may_wait(self, client: str, limit: int) -> bool:
        """Return whether a request that is counted already may wait; a limit of 0 means no limit."""
        return not limit or self.live(client) <= limit

    @property
    def total(self) -> int:
        """The requests of all clients."""
        return sum(self._live.values())

    @property
    def clients(self) -> Collection[str]:
        """The clients with at least one request."""
        return self._live.keys()


def jain(values: Iterable[float]) -> float:
    """Return Jain's index of fairness: 1 if all values are equal, 1/n if one has everything; 1 for no values, or only zeros.

    >>> jain([3.0, 3.0]), jain([6.0, 0.0])
    (1.0, 0.5)
    """
    known = list(values)
    squares = sum(value * value for value in known)
    return 1.0 if not squares else sum(known) ** 2 / (len(known) * squares)
