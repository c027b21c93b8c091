"""What a report about use holds: the rows of some days, filtered and added up by what the report tells apart."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date

import attrs

from multiverse_gateway.core.errors import BadRequest
from multiverse_gateway.core.servers import ServerId, model_key
from multiverse_gateway.core.usage import Counts, Usage, UsageKey, summed

DEFAULT_DAYS = 30
_NOTHING = Counts()
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


def daily_counts(rows: Iterable[Usage], days: Sequence[str], part: Callable[[UsageKey], str]) -> dict[str, list[Counts]]:
    """Return one `Counts` per day, in the order of `days`, for each value of a part of the key; rows of other days are left out.

    >>> rows = [Usage(key=UsageKey("2026-05-02", model, client="k1"), counts=Counts(requests=2)) for model in ("a", "b")]
    >>> [counts.requests for counts in daily_counts(rows, days_between("2026-05-01", "2026-05-03"), lambda key: key.client)["k1"]]
    [0, 4, 0]
    """
    places = {day: place for place, day in enumerate(days)}
    sums: dict[str, list[Counts]] = {}
    for row in rows:
        place = places.get(row.key.day)
        if place is not None:
            counts = sums.setdefault(part(row.key), [_NOTHING] * len(days))
            counts[place] += row.counts
    return sums


def summarize(
    rows: Iterable[Usage], selection: UsageSelection, *, days: tuple[str, str], names: Mapping[str, str], listed: Callable[[str], str]
) -> UsageSummary:
    """Return what a report shows of the counted rows; `listed` returns the name under which a model is listed."""
    by = selection.by

    def without(key: UsageKey) -> UsageKey:
        return UsageKey(
            key.day if "day" in by else "",
            listed(key.model) if "model" in by else "",
            key.server_id if "server" in by else ServerId(""),
            key.owner if "owner" in by else "",
            key.client if "client" in by else "",
        )

    wanted = [usage for usage in rows if _is_wanted(usage.key, selection, names)]
    sums = sorted(summed(wanted, without), key=lambda usage: attrs.astuple(usage.key))
    total = sum((usage.counts for usage in wanted), Counts())
    return UsageSummary(since=days[0], until=days[1], total=total, rows=tuple(sums), by=by, names=names)


def _is_wanted(key: UsageKey, selection: UsageSelection, names: Mapping[str, str]) -> bool:
    return (
        (selection.model is None or model_key(selection.model) == model_key(key.model))
        and selection.server in (None, key.server_id)
        and selection.owner in (None, key.owner)
        and selection.client in (None, key.client, names.get(key.client))
    )
