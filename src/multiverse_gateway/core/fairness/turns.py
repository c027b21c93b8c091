"""Whose turn it is: the rules 1, 4 and 5 over the waiting requests of one model."""

from collections.abc import Callable, Collection, Hashable, Iterator
from heapq import heappop, heappush
from math import inf

from attrs import define

from multiverse_gateway.core.fairness.books import Account, Books, ModelUse, Ticket
from multiverse_gateway.core.fairness.costs import MAX_COST

Key = tuple[float, int]
"""The counter of a flow, and the number of its last turn: the least one is next."""


def first_of(model: ModelUse, now: float, unmet: Collection[Hashable]) -> tuple[Key, Ticket | None, float]:
    """Return the key of the request that is next, the request, and when the oldest of those that may go first joined."""
    least, turn, oldest = inf, 0, inf
    first: Ticket | None = None
    books = model.books
    if books is None or model.is_full:
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


def _head(account: Account, unmet: Collection[Hashable]) -> Ticket | None:
    return next((ticket for ticket in account.waiting if ticket.request.needs not in unmet), None)


def give_turns(pick: Callable[..., Ticket | None], take: Callable[[Ticket], None]) -> None:
    """Offer free slots to the request that `pick` returns, until it returns none; a need that could not be met is not offered again."""
    unmet: set[Hashable] = set()
    while (ticket := pick(unmet=unmet)) is not None:
        take(ticket)
        if ticket.is_waiting:
            unmet.add(ticket.request.needs)


@define(eq=False)
class _Line:
    """The waiting requests of one flow while `merged` begins them in thought."""

    head: Ticket
    rest: Iterator[Ticket]
    counter: float
    turn: int


def merged(books: Books, turn: int) -> Iterator[Ticket]:
    """Begin all waiting requests of a model in thought, as `first_of` would choose them; `turn` is the number of the last turn so far."""
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
