"""How much was used: requests and tokens, by day, model, server, owner and client."""

from collections.abc import Callable, Iterable

from attrs import define, field, frozen

from multiverse_gateway.core.budget import day_name
from multiverse_gateway.core.servers import ServerId

NO_SERVER = ServerId("")
"""Stands for the server of requests that none answered."""
NO_OWNER = ""
NOBODY = ""
"""Stands for clients without a key."""
OPERATOR = "operator"
"""Stands for whoever is signed in to the pages."""


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
    """Requests, those of them that were not answered well, and the tokens that servers reported."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Return the sum.

        >>> Counts(requests=1, failed=1) + Counts(requests=2, prompt_tokens=7)
        Counts(requests=3, failed=1, prompt_tokens=7, completion_tokens=0)
        """
        return Counts(
            requests=self.requests + other.requests,
            failed=self.failed + other.failed,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


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
        found = key(row.key)
        known = sums.get(found)
        sums[found] = row.counts if known is None else known + row.counts
    return [Usage(key=found, counts=counts) for found, counts in sums.items()]


_NOTHING = Counts()


@frozen(kw_only=True)
class Alike:
    """What requests that are counted together have in common: all but how long they took and how much they carried."""

    model: str
    is_known: bool
    """Whether the model was registered: others are not told apart in metrics."""
    server_id: ServerId
    owner: str
    client: str
    day: int
    status: int
    failed: bool
    tries: int
    worked: bool
    """Whether the last try did not fail."""


@define(eq=False)
class Tally:
    """Requests that are over and alike: seconds until their end and to their first byte, where they had one, and sums of the rest."""

    alike: Alike
    seconds: list[float] = field(factory=list)
    first_byte_seconds: list[float] = field(factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    events: int = 0
    sent_bytes: int = 0


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
        """Add what was used; `day` is the number of the day on which it was asked for, as daily limits count it."""
        key = UsageKey(day_name(day), model, server_id, owner, client)
        self._sums[key] = self._sums.get(key, _NOTHING) + counts

    def __len__(self) -> int:
        return len(self._sums)

    def take(self) -> list[Usage]:
        """Return what was counted, and begin anew."""
        sums, self._sums = self._sums, {}
        return [Usage(key=key, counts=counts) for key, counts in sums.items()]
