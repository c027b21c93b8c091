"""What a report about use holds: the rows of some days, filtered and added up by what the report tells apart."""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date

import attrs

from multiverse_gateway.core.errors import BadRequest
from multiverse_gateway.core.servers import spellings
from multiverse_gateway.core.usage import Counts, Usage, summed, total_of

DEFAULT_DAYS = 30
PARTS = ("day", "model", "server", "owner", "client")
"""The parts of a `UsageKey` that a report can tell apart."""


@attrs.frozen(kw_only=True)
class UsageSelection:
    """Which days a report covers, whose use it counts, and which of `PARTS` it tells apart.

    Days are dates in UTC, both included; `None` as a filter selects everything. `client` is the id or the name of a client key.
    """

    since: str | None = None
    until: str | None = None
    by: frozenset[str] = frozenset(PARTS)
    model: str | None = None
    server: str | None = None
    owner: str | None = None
    client: str | None = None


@attrs.frozen(kw_only=True)
class UsageSummary:
    """The use in a span of days; the parts of a row's key that `by` does not name are empty. `names` are those of client keys, by id."""

    since: str = ""
    until: str = ""
    total: Counts = attrs.field(factory=Counts)
    rows: tuple[Usage, ...] = ()
    by: frozenset[str] = frozenset(PARTS)
    names: Mapping[str, str] = attrs.field(factory=dict)


def days_of(selection: UsageSelection, today: str) -> tuple[str, str]:
    """Return the first and the last day of a report: by default the `DEFAULT_DAYS` up to the last one, which is today by default.

    Raises:
        BadRequest: The span ends before it begins.
    """
    until = selection.until or today
    first = date.fromisoformat(until).toordinal() - DEFAULT_DAYS + 1
    since = selection.since or date.fromordinal(max(1, first)).isoformat()
    if since > until:
        raise BadRequest("since is later than until; swap them", param="since")
    return since, until


def days_between(since: str, until: str) -> list[str]:
    """Return the days from `since` to `until`, both included, as dates in ISO 8601.

    >>> days_between("2026-02-27", "2026-03-01")
    ['2026-02-27', '2026-02-28', '2026-03-01']
    """
    first, last = date.fromisoformat(since).toordinal(), date.fromisoformat(until).toordinal()
    return [date.fromordinal(day).isoformat() for day in range(first, last + 1)]


def admitted(selection: UsageSelection, names: Mapping[str, str]) -> dict[str, Collection[str]]:
    """Return the values that a selection admits, by part of the key; `names` are those of client keys, by id.

    >>> admitted(UsageSelection(model="tiny", client="anna"), {"k1": "anna", "k2": "bob"})
    {'model': ['tiny', 'tiny:latest'], 'client': ['anna', 'k1']}
    """
    only: dict[str, Collection[str]] = {}
    if selection.model is not None:
        only["model"] = spellings(selection.model)
    if selection.server is not None:
        only["server_id"] = [selection.server]
    if selection.owner is not None:
        only["owner"] = [selection.owner]
    if selection.client is not None:
        only["client"] = [selection.client, *(key for key, name in names.items() if name == selection.client)]
    return {part: [value for value in values if "\0" not in value] for part, values in only.items()}  # no database has a text with NUL


def columns_of(by: Collection[str]) -> list[str]:
    """Return the fields of `UsageKey` that hold these parts.

    >>> columns_of({"day", "server"})
    ['day', 'server_id']
    """
    return ["server_id" if part == "server" else part for part in PARTS if part in by]


def summarize(
    rows: Sequence[Usage], selection: UsageSelection, *, days: tuple[str, str], names: Mapping[str, str], listed: Callable[[str], str]
) -> UsageSummary:
    """Return what a report shows of sums by the parts of `selection.by`; `listed` returns the name under which a model is listed."""
    sums = [_renamed(usage, listed) for usage in rows]
    if any(renamed is not usage for renamed, usage in zip(sums, rows, strict=True)):  # else they are added up and sorted already
        sums = sorted(summed(sums, lambda key: key), key=lambda usage: attrs.astuple(usage.key))
    return UsageSummary(since=days[0], until=days[1], total=total_of(sums), rows=tuple(sums), by=selection.by, names=names)


def _renamed(usage: Usage, listed: Callable[[str], str]) -> Usage:
    """Return the usage of a model under the name by which it is listed: the same object if that is the name that it has."""
    model = usage.key.model
    name = listed(model) if model else model
    return usage if name == model else Usage(key=attrs.evolve(usage.key, model=name), counts=usage.counts)
