"""How much was used: requests and tokens, by day, model, server, owner and client.

1. No count grows past `MAX_COUNT`: a sum that would, stays there. Servers report what they like, and a sum that no database, JSON parser
   or spreadsheet can hold would stop the counting for all clients.
2. A row that the store refuses never holds up the others (`Outbox`).
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping

from attrs import astuple, define, field, fields, frozen

from multiverse_gateway.core.budget import day_name
from multiverse_gateway.core.servers import ServerId

NO_SERVER = ServerId("")
"""Stands for the server of requests that none answered."""
NO_OWNER = ""
NOBODY = ""
"""Stands for clients without a key."""
OPERATOR = "operator"
"""Stands for a person who is signed in to the pages."""
MAX_COUNT = 2**53 - 1
"""The largest count: JSON parsers and spreadsheets keep it exactly, and two of them still fit into the integers of any database."""
MAX_REFUSALS = 3
"""Rounds in which the store may refuse a row while it accepts others; after that the row is dropped."""
MAX_REFUSALS_IN_A_ROW = 64
"""Batches that the store may refuse one after the other before a round ends: it then fails altogether, and time is not wasted on it."""


def bounded(count: object) -> int:
    """Return a count as a whole number from 0 to `MAX_COUNT`, whatever a database or a plug-in holds in its place.

    >>> bounded(7), bounded(2**63), bounded(-1), bounded(9.3e18), bounded(float("nan")), bounded("many")
    (7, 9007199254740991, 0, 9007199254740991, 0, 0)
    """
    if isinstance(count, float):
        return int(max(0.0, min(count, float(MAX_COUNT)))) if count == count else 0  # NaN is not itself
    return max(0, min(count, MAX_COUNT)) if isinstance(count, int) else 0


@frozen
class UsageKey:
    """What is counted apart. `day` is a date in UTC (ISO 8601), `owner` the server's `student_id`, `client` the id of a client key."""

    day: str
    model: str
    server_id: ServerId = NO_SERVER
    owner: str = NO_OWNER
    client: str = NOBODY


@frozen(kw_only=True)
class Counts:
    """Requests, those of them that failed or that their client canceled, and tokens; sums stop at `MAX_COUNT`.

    Tokens are those that servers reported and, of streams that ended early, those that came. No request is both failed and canceled.
    `canceled` is 0 in rows that were saved before it existed: `failed` included it then.
    """

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    canceled: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Return the sum, in which no count is negative or larger than `MAX_COUNT`.

        >>> Counts(requests=1, failed=1) + Counts(requests=2, prompt_tokens=2**70)
        Counts(requests=3, failed=1, prompt_tokens=9007199254740991, completion_tokens=0, canceled=0)
        """
        return Counts(
            requests=bounded(self.requests + other.requests),
            failed=bounded(self.failed + other.failed),
            prompt_tokens=bounded(self.prompt_tokens + other.prompt_tokens),
            completion_tokens=bounded(self.completion_tokens + other.completion_tokens),
            canceled=bounded(self.canceled + other.canceled),
        )


_COUNTS = tuple(field.name for field in fields(Counts))


@frozen(kw_only=True)
class Usage:
    """The counts of one key."""

    key: UsageKey
    counts: Counts = field(factory=Counts)


def summed(rows: Iterable[Usage], key: Callable[[UsageKey], UsageKey]) -> list[Usage]:
    """Add up the rows whose keys `key` makes equal, in the order of the first of each.

    >>> from attrs import evolve
    >>> rows = [Usage(key=UsageKey("2026-05-01", name), counts=Counts(requests=1)) for name in ("a", "b")]
    >>> [row.counts.requests for row in summed(rows, lambda key: evolve(key, model=""))]
    [2]
    """
    sums: dict[UsageKey, Counts] = {}
    for row in rows:
        group = key(row.key)
        sum_so_far = sums.get(group)
        sums[group] = row.counts if sum_so_far is None else sum_so_far + row.counts
    return [Usage(key=group, counts=counts) for group, counts in sums.items()]


def total_of(rows: Collection[Usage]) -> Counts:
    """Return the sum of all counts.

    >>> total_of([Usage(key=UsageKey("2026-05-01", name), counts=Counts(requests=2)) for name in ("a", "b")]).requests
    4
    """
    return Counts(**{name: bounded(sum([getattr(row.counts, name) for row in rows])) for name in _COUNTS})


def sums_of(rows: Iterable[Usage], *, by: Collection[str], only: Mapping[str, Collection[str]]) -> list[Usage]:
    """Return the sums of the rows that `only` admits, by the parts of the key that `by` names, in their order; other parts are empty.

    >>> rows = [Usage(key=UsageKey("2026-05-01", name, client="k1"), counts=Counts(requests=1)) for name in ("b", "a", "c")]
    >>> [(row.key.model, row.key.client) for row in sums_of(rows, by={"model"}, only={"model": ["a", "b"]})]
    [('a', ''), ('b', '')]
    """
    admitted = (row for row in rows if all(getattr(row.key, name) in values for name, values in only.items()))
    return sorted(summed(admitted, lambda key: parts_of(key, by)), key=lambda usage: astuple(usage.key))


def parts_of(key: UsageKey, by: Collection[str]) -> UsageKey:
    """Return a key of which only the parts that `by` names are kept.

    >>> parts_of(UsageKey("2026-05-01", "tiny", client="k1"), {"client"})
    UsageKey(day='', model='', server_id='', owner='', client='k1')
    """
    return UsageKey(
        key.day if "day" in by else "",
        key.model if "model" in by else "",
        key.server_id if "server_id" in by else NO_SERVER,
        key.owner if "owner" in by else NO_OWNER,
        key.client if "client" in by else NOBODY,
    )


_NOTHING = Counts()


@frozen(kw_only=True)
class UsageGroup:
    """The properties that requests share if they are counted together: everything except durations, tokens and bytes."""

    model: str
    is_known: bool
    """Whether the model was registered; metrics combine all other models."""
    server_id: ServerId
    owner: str
    client: str
    day: int
    status: int
    failed: bool
    canceled: bool
    tries: int
    worked: bool
    """Whether the last attempt did not fail."""

    @property
    def succeeded(self) -> bool:
        """Whether the client got its whole answer."""
        return not (self.failed or self.canceled)


@define(eq=False)
class Tally:
    """The finished requests of a group: seconds until their end and, where there was one, until their first byte, and sums of the rest."""

    group: UsageGroup
    seconds: list[float] = field(factory=list)
    first_byte_seconds: list[float] = field(factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    events: int = 0
    sent_bytes: int = 0
    waited_seconds: float = 0.0


@define(eq=False)
class Ledger:
    """Count what was used since the last `take`.

    >>> ledger = Ledger()
    >>> ledger.count("tiny", "a", "s1", "", day=0, counts=Counts(requests=1, prompt_tokens=7, completion_tokens=2))
    >>> [(row.key.day, row.counts.prompt_tokens) for row in ledger.take()], ledger.take()
    ([('1970-01-01', 7)], [])
    """

    _sums: dict[UsageKey, Counts] = field(factory=dict, init=False)

    def count(self, model: str, server_id: ServerId, owner: str, client: str, *, day: int, counts: Counts) -> None:
        """Add counts; `day` is the number of the day on which the requests arrived, as daily limits count it."""
        self.put(Usage(key=UsageKey(day_name(day), model, server_id, owner, client), counts=counts))

    def put(self, usage: Usage) -> None:
        """Add a row of counts."""
        self._sums[usage.key] = self._sums.get(usage.key, _NOTHING) + usage.counts

    def take(self) -> list[Usage]:
        """Return the rows counted since the last call."""
        sums, self._sums = self._sums, {}
        return [Usage(key=key, counts=counts) for key, counts in sums.items()]


@frozen(kw_only=True)
class Batch:
    """Rows that are saved together, all or none; the store adds a batch of this id only once."""

    id: str
    rows: tuple[Usage, ...]


@define(eq=False)
class Outbox:
    """Decide in which batches the counts of a ledger go to the store. One round is `begin`, then `next` until there is none, then `end`.

    1. A batch whose outcome is unknown (neither `accepted` nor `refused` was called) is sent again, with its own id, before all others.
    2. Nothing of a refused batch was added. Its halves are sent as batches of their own, down to single rows.
    3. A row that was refused by itself goes back to the ledger and travels alone from then on. When the store has refused it in
       `MAX_REFUSALS` rounds in which it accepted other rows, it is dropped; while the store accepts nothing, nothing is dropped.

    >>> ledger = Ledger()
    >>> for name in ("sound", "poisoned"):
    ...     ledger.count(name, NO_SERVER, NO_OWNER, NOBODY, day=0, counts=Counts(requests=1))
    >>> outbox = Outbox(ledger)
    >>> outbox.begin()
    >>> [row.key.model for row in outbox.next("first").rows]
    ['sound', 'poisoned']
    >>> outbox.refused()
    >>> [row.key.model for row in outbox.next("second").rows]
    ['sound']
    """

    _ledger: Ledger
    _groups: deque[tuple[Usage, ...]] = field(factory=deque, init=False)
    """Rows of this round that were not sent yet."""
    _sent: Batch | None = field(default=None, init=False)
    """The batch that was sent last, as long as its outcome is unknown."""
    _held: list[Usage] = field(factory=list, init=False)
    """Rows that were refused by themselves in this round."""
    _refusals: dict[UsageKey, int] = field(factory=dict, init=False)
    """The keys of rows that travel alone, with the rounds in which they were refused while others were accepted."""
    _in_a_row: int = field(default=0, init=False)
    _has_accepted: bool = field(default=False, init=False)

    def begin(self) -> None:
        """Begin a round with everything that the ledger holds."""
        self._in_a_row, self._has_accepted = 0, False
        rows = self._ledger.take()
        together = tuple(row for row in rows if row.key not in self._refusals)
        if together:
            self._groups.append(together)
        self._groups.extend((row,) for row in rows if row.key in self._refusals)

    def next(self, batch_id: str) -> Batch | None:
        """Return the batch to send now, or `None` at the end of the round; `batch_id` names it if it was not sent before."""
        if self._sent is None and self._groups and self._in_a_row < MAX_REFUSALS_IN_A_ROW:
            self._sent = Batch(id=batch_id, rows=self._groups.popleft())
        return self._sent

    def accepted(self) -> None:
        """Note that the store has added the batch that was sent last."""
        for row in self._take_sent():
            self._refusals.pop(row.key, None)
        self._in_a_row, self._has_accepted = 0, True

    def refused(self) -> None:
        """Note that the store refuses the batch that was sent last, and would refuse it again."""
        rows = self._take_sent()
        self._in_a_row += 1
        half = len(rows) // 2
        if half:
            self._groups.extendleft((rows[half:], rows[:half]))
        else:
            self._held.extend(rows)

    def _take_sent(self) -> tuple[Usage, ...]:
        sent, self._sent = self._sent, None
        return () if sent is None else sent.rows

    def end(self) -> list[Usage]:
        """End the round and return the rows that are dropped; what was not sent, and what was refused before that, is kept."""
        for group in self._groups:  # before those that were refused, which could keep them from being sent in the next round too
            for row in group:
                self._ledger.put(row)
        self._groups.clear()
        held, self._held = self._held, []
        dropped = []
        for row in held:
            refusals = self._refusals.pop(row.key, 0) + self._has_accepted
            if refusals >= MAX_REFUSALS:
                dropped.append(row)
            else:
                self._refusals[row.key] = refusals
                self._ledger.put(row)
        return dropped
