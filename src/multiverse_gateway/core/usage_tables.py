"""The page about usage as values: what its address means, which rows it shows in which order, and the bars of its chart."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import date

import attrs

from multiverse_gateway.core.usage import Counts, Usage
from multiverse_gateway.core.usage_reports import UsageSelection, days_between

RANGES: Mapping[str, int] = {"today": 1, "7": 7, "30": 30}
"""Days up to today, by the name of a range; any other span is `custom`."""
USUAL_RANGE = "30"
PARTS: Mapping[str, str] = {"client": "Key", "model": "Model", "owner": "Owner", "day": "Day"}
"""What each row of the table may stand for."""
FILTERS = ("client", "model", "owner", "server")
COUNTS = ("requests", "failed", "canceled", "prompt_tokens", "completion_tokens")
"""The columns of counts, in the order in which they are shown."""
SORTS = ("name", *COUNTS)
MAX_BARS = 92
"""Most bars of a chart; a longer span has one bar per month."""
MAX_DAYS = 3660
"""Longest span that the page shows, in days."""
NONE = "-"
"""Stands in an address for requests without a key and servers without an owner; before a value that begins with it stands another one."""


@attrs.frozen(kw_only=True)
class UsageView:
    """What the page shows: rows by one of `PARTS`, of the days from `since` to `until`, of what the filters admit.

    A filter that is `None` admits everything. `sort` is one of `SORTS`; `is_descending` says which way.
    """

    since: str
    until: str
    span: str = USUAL_RANGE
    by: str = "client"
    client: str | None = None
    model: str | None = None
    owner: str | None = None
    server: str | None = None
    sort: str = "requests"
    is_descending: bool = True

    @property
    def days(self) -> int:
        """The length of the span in days."""
        return date.fromisoformat(self.until).toordinal() - date.fromisoformat(self.since).toordinal() + 1

    @property
    def usual_order(self) -> bool:
        """Whether the column is sorted descending unless something else is asked for: counts are, names are not, and days are."""
        return self.sort != "name" or self.by == "day"

    def selection(self, by: str) -> UsageSelection:
        """Return the rows of a part that the view covers, as reports name them."""
        return UsageSelection(
            since=self.since,
            until=self.until,
            by=frozenset({by}),
            client=self.client,
            model=self.model,
            owner=self.owner,
            server=self.server,
        )

    def pairs(self) -> dict[str, str]:
        """Return what the address of the page holds: everything that is not as usual.

        >>> view_of({"range": "7", "client": "-"}, today="2026-05-09").pairs()
        {'range': '7', 'client': '-'}
        """
        pairs: dict[str, str] = {}
        if self.by != "client":
            pairs["by"] = self.by
        if self.span == "custom":
            pairs |= {"since": self.since, "until": self.until}
        elif self.span != USUAL_RANGE:
            pairs["range"] = self.span
        for name in FILTERS:
            value = getattr(self, name)
            if value is not None:
                pairs[name] = in_address(value)
        if self.sort != _usual_sort(self.by):
            pairs["sort"] = self.sort
        if self.is_descending != self.usual_order:
            pairs["order"] = "desc" if self.is_descending else "asc"
        return pairs

    def shows(self, by: str, **only: str) -> "UsageView":
        """Return the view of other rows: those by `by`, with these filters too, sorted as usual.

        >>> view = view_of({}, today="2026-05-09").shows("model", client="k1")
        >>> view.pairs()
        {'by': 'model', 'client': 'k1'}
        """
        if "day" in only:
            only |= {"since": only["day"], "until": only.pop("day"), "span": "custom"}
        view = attrs.evolve(self, by=by, sort=_usual_sort(by), **only)  # type: ignore[arg-type]  # names of fields that hold texts
        return attrs.evolve(view, is_descending=view.usual_order)

    def sorted_by(self, sort: str) -> "UsageView":
        """Return the view sorted by a column; by the present one in the other direction."""
        if sort == self.sort:
            return attrs.evolve(self, is_descending=not self.is_descending)
        view = attrs.evolve(self, sort=sort)
        return attrs.evolve(view, is_descending=view.usual_order)


def view_of(query: Mapping[str, str], *, today: str) -> UsageView:
    """Read the address of the page; what is not valid in it is ignored, and days in the wrong order are swapped.

    >>> view = view_of({"since": "2026-05-09", "until": "2026-05-01", "sort": "mood"}, today="2026-05-10")
    >>> view.since, view.until, view.span, view.sort
    ('2026-05-01', '2026-05-09', 'custom', 'requests')
    """
    by = query.get("by", "") if query.get("by") in PARTS else "client"
    since, until, span = _span_of(query, today)
    filters = {name: _read(query[name]) for name in FILTERS if query.get(name)}
    sort = query.get("sort", "") if query.get("sort") in SORTS else _usual_sort(by)
    view = UsageView(since=since, until=until, span=span, by=by, sort=sort, **filters)  # type: ignore[arg-type]
    order = query.get("order")
    return attrs.evolve(view, is_descending=order == "desc" if order in ("asc", "desc") else view.usual_order)


def _span_of(query: Mapping[str, str], today: str) -> tuple[str, str, str]:
    named = query.get("range", "")
    since, until = _day(query.get("since")), _day(query.get("until"))
    if named not in RANGES and (since or until):
        first, last = sorted((since or _days_before(until or today, RANGES[USUAL_RANGE]), until or today))
        return max(first, _days_before(last, MAX_DAYS)), last, "custom"
    span = named if named in RANGES else USUAL_RANGE
    return _days_before(today, RANGES[span]), today, span


def _days_before(last: str, days: int) -> str:
    """Return the first of so many days, of which `last` is the last one; no day is before year 1."""
    return date.fromordinal(max(1, date.fromisoformat(last).toordinal() - days + 1)).isoformat()


def _day(text: str | None) -> str | None:
    with suppress(ValueError):
        if text and len(text) == 10:
            return date.fromisoformat(text).isoformat()
    return None


def _usual_sort(by: str) -> str:
    return "name" if by == "day" else "requests"


def in_address(value: str) -> str:
    """Return a value of a filter as the address of the page holds it, which is never empty.

    >>> in_address(""), in_address("alice"), in_address("-")
    ('-', 'alice', '--')
    """
    return NONE + value if value.startswith(NONE) or not value else value


def _read(text: str) -> str:
    return text.removeprefix(NONE)[:200]


# Rows


@attrs.frozen(kw_only=True)
class UsageRow:
    """A row of the table: `value` is what it stands for, `name` what it is called, `note` what tells equal names apart."""

    value: str
    name: str
    counts: Counts
    note: str = ""


def rows_of(sums: Sequence[Usage], view: UsageView, name_of: Callable[[str], str]) -> list[UsageRow]:
    """Return the rows of the table in the order of the view; equal names get the beginning of their value as a note."""
    values = [getattr(usage.key, view.by) for usage in sums]
    names = [name_of(value) for value in values]
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    rows = [
        UsageRow(value=value, name=name, counts=usage.counts, note=value[:8] if seen[name] > 1 else "")
        for value, name, usage in zip(values, names, sums, strict=True)
    ]
    rows.sort(key=lambda row: (row.name.casefold(), row.value))
    if view.sort == "name":
        return rows[::-1] if view.is_descending else rows
    return sorted(rows, key=lambda row: int(getattr(row.counts, view.sort)), reverse=view.is_descending)


def most_used(rows: Collection[UsageRow], count: int = 5) -> list[UsageRow]:
    """Return the rows with the most requests, those with more tokens first where requests are equal."""
    return sorted(rows, key=lambda row: (row.counts.requests, row.counts.prompt_tokens + row.counts.completion_tokens), reverse=True)[
        :count
    ]


# The chart


@attrs.frozen(kw_only=True)
class UsageBar:
    """A bar of the chart: a day or a month, by the beginning of its date."""

    label: str
    counts: Counts


def bars_of(by_day: Sequence[Usage], view: UsageView) -> list[UsageBar]:
    """Return a bar for each day of the span, empty ones too, or for each month of a long one."""
    width = len("2026-05-01") if view.days <= MAX_BARS else len("2026-05")
    sums = {day[:width]: Counts() for day in days_between(view.since, view.until)}
    for usage in by_day:
        label = usage.key.day[:width]
        sums[label] += usage.counts
    return [UsageBar(label=label, counts=counts) for label, counts in sums.items()]


def ceiling(count: int) -> int:
    """Return the next round number: 1, 2 or 5 with zeros, and at least 1.

    >>> [ceiling(count) for count in (0, 3, 10, 4001)]
    [1, 5, 10, 5000]
    """
    size = 1
    while size * 10 < count:
        size *= 10
    return next(size * step for step in (1, 2, 5, 10) if size * step >= count)
