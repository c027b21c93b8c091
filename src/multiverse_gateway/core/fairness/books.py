"""The memory of the queue: requests, accounts of flows, the books of a model, and the use of a model."""

from collections.abc import Hashable, Mapping
from heapq import heappop, heappush
from math import ceil, inf
from typing import Protocol

from attrs import define, field

from multiverse_gateway.core.fairness.costs import USUAL_OUTPUT_TOKENS
from multiverse_gateway.core.fairness.flows import BULK, INTERACTIVE, Flow, Share

OTHERS_SECONDS = 120.0
"""How long a model counts as used by a client after its last request."""
_MEAN_OF = 16
"""Requests that a running mean remembers."""


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
    `waited_seconds` are those in the queue, up to the last time that it left it. `use` is that of its model while the request is in the
    books.
    """

    __slots__ = (
        "cost",
        "flow",
        "has_begun",
        "is_running",
        "is_waiting",
        "joined_at",
        "model",
        "number",
        "request",
        "use",
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
        self.use: ModelUse | None = None


def rank(ticket: Ticket) -> tuple[bool, int]:
    """Return the order within a flow: requests that fail over first, then in order of arrival."""
    return not ticket.has_begun, ticket.number


@define(eq=False)
class Account:
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
class Books:
    """The accounts of one model, kept from the first request that waits until a while after the last one."""

    clock: float = 0.0
    waiting: int = 0
    waited_at: float = 0.0
    """When the last request left the queue."""
    accounts: dict[Flow, Account] = field(factory=dict)
    queued: dict[Flow, Account] = field(factory=dict)
    """The accounts with a waiting request."""
    parked: list[tuple[float, int, Account]] = field(factory=list)
    """A heap of accounts whose counter the clock had not passed when they lost their last request; an entry may be out of date."""

    def enter(self, ticket: Ticket, number: int) -> Account:
        """Number and estimate a request, and count it in the account of its flow."""
        ticket.number = number
        ticket.cost = ticket.request.estimated_cost()
        account = self.accounts.get(ticket.flow)
        if account is None:
            account = self.accounts[ticket.flow] = Account(ticket.flow, ticket.flow.band is BULK)
        account.weight = ticket.weight
        account.live += 1
        return account

    def charge(self, account: Account, ticket: Ticket, turn: int) -> None:
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

    def park(self, account: Account) -> None:
        """Keep the account of a flow without requests until the clock has passed its counter."""
        if account.counter <= self.clock:
            self._forget(account)
        elif account.parked_at != account.counter:
            account.parked_at = account.counter
            heappush(self.parked, (account.counter, id(account), account))

    def _forget(self, account: Account) -> None:
        if not account.live and account.counter <= self.clock and self.accounts.get(account.flow) is account:
            del self.accounts[account.flow]


@define(eq=False)
class ModelUse:
    """What is known of one model. While no request waits, that is what runs and when clients came; the books are closed."""

    slots: int | None = None
    bound: float = inf
    """Most requests that run at a time; servers' own caps do not count."""
    siblings: tuple[str, ...] = ()
    """Other models that share a pool with this one."""
    live: dict[Ticket, None] = field(factory=dict)
    running: dict[Flow, int] = field(factory=dict)
    books: Books | None = None
    latest_client: str = ""
    latest_at: float = -inf
    before_at: float = -inf
    """When any client other than `latest_client` came last."""
    interactive_at: float = -inf
    seconds: float | None = None
    """The mean of the seconds that a request runs."""
    output_tokens: float = USUAL_OUTPUT_TOKENS
    samples: int = 0

    def learn(self, seconds: float, output_tokens: float) -> None:
        """Take the duration and the output tokens of a well-answered request into the means."""
        self.samples = min(self.samples + 1, _MEAN_OF)
        before = seconds if self.seconds is None else self.seconds
        self.seconds = before + (seconds - before) / self.samples
        self.output_tokens += (output_tokens - self.output_tokens) / self.samples

    @property
    def waiting(self) -> int:
        """Return how many requests wait."""
        return 0 if self.books is None else self.books.waiting

    @property
    def queued(self) -> Mapping[Flow, Account]:
        """Return the accounts with a waiting request."""
        return {} if self.books is None else self.books.queued

    def used_up(self, flow: Flow, now: float) -> Share | None:
        """Return the share of slots because of which a flow may not hold one more, or `None` if it may."""
        if len(self.live) >= self.bound and self.is_full:  # the first half saves a call per request
            return Share.MODEL
        if flow.band is BULK and self.is_bulk_at_limit(now):
            return Share.BULK
        running = self.running.get(flow)
        if not running or not self.slots or 2 * running < self.slots or self._is_alone(flow.client, now):
            return None
        return Share.CLIENT

    @property
    def is_full(self) -> bool:
        """Whether as many requests run as the gateway handles for one model whose servers have no caps."""
        return len(self.live) >= self.bound and sum(self.running.values()) >= self.bound

    def is_bulk_at_limit(self, now: float) -> bool:
        """Return whether bulk requests hold as many slots as they may beside interactive ones."""
        if not self.slots or not self._is_interactive(now):
            return False
        return sum(running for flow, running in self.running.items() if flow.band is BULK) >= _quarter(self.slots)

    def limit(self, flow: Flow, slots: int, now: float) -> int | None:
        """Return how many of the slots a flow may hold; for bulk beside interactive requests, how many all bulk ones may together."""
        if flow.band is BULK and self._is_interactive(now):
            return _quarter(slots)
        return None if self._is_alone(flow.client, now) else _half(slots)

    def _is_interactive(self, now: float) -> bool:
        if now - self.interactive_at <= OTHERS_SECONDS:
            return True
        return any(ticket.flow.band is INTERACTIVE for ticket in self.live)

    def _is_alone(self, client: str, now: float) -> bool:
        others_at = self.before_at if client == self.latest_client else self.latest_at
        if now - others_at <= OTHERS_SECONDS:
            return False
        return all(ticket.flow.client == client for ticket in self.live)


def _half(slots: int) -> int:
    return max(1, ceil(slots / 2))


def _quarter(slots: int) -> int:
    return max(1, ceil(slots / 4))
