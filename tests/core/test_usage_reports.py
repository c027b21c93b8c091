"""Reports about use: which days, whose use, and what they tell apart."""

from __future__ import annotations

from typing import Any

import pytest

from multiverse_gateway.core.errors import BadRequest
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.usage import Counts, Usage, UsageKey, sums_of
from multiverse_gateway.core.usage_reports import UsageSelection, UsageSummary, admitted, columns_of, days_of, summarize

ROWS = [
    Usage(key=UsageKey(day, model, ServerId(server), owner, client), counts=Counts(requests=requests))
    for day, model, server, owner, client, requests in [
        ("2026-05-02", "tiny", "s1", "alice", "k1", 1),
        ("2026-05-01", "tiny:latest", "s2", "bob", "k2", 2),
        ("2026-05-01", "large", "s2", "bob", "", 4),
    ]
]


def report(**selection: Any) -> UsageSummary:
    """Return the report about `ROWS`."""
    days, names, chosen = ("2026-05-01", "2026-05-02"), {"k1": "anna"}, UsageSelection(**selection)
    rows = sums_of(ROWS, by=columns_of(chosen.by), only=admitted(chosen, names))
    return summarize(rows, chosen, days=days, names=names, listed=lambda model: model.removesuffix(":latest"))


@pytest.mark.parametrize(
    ("since", "until", "days"),
    [
        (None, None, ("2026-04-10", "2026-05-09")),
        ("2026-05-09", None, ("2026-05-09", "2026-05-09")),
        (None, "2026-01-30", ("2026-01-01", "2026-01-30")),
        (None, "0001-01-02", ("0001-01-01", "0001-01-02")),
    ],
)
def test_a_report_covers_30_days_by_default(since: str | None, until: str | None, days: tuple[str, str]) -> None:
    """The last day is today unless the query names another one; there are no days before the first year."""
    assert days_of(UsageSelection(since=since, until=until), "2026-05-09") == days


def test_a_span_of_days_has_an_order() -> None:
    """A span that ends before it begins is an error in `since`."""
    with pytest.raises(BadRequest) as error:
        days_of(UsageSelection(since="2026-05-10"), "2026-05-09")
    assert error.value.param == "since"


def test_rows_that_a_report_does_not_tell_apart_are_added_up() -> None:
    """They are sorted by what remains of their keys, and models have the names under which they are listed."""
    assert [(row.key.day, row.counts.requests) for row in report(by=frozenset({"day"})).rows] == [("2026-05-01", 6), ("2026-05-02", 1)]
    assert [(row.key.model, row.counts.requests) for row in report(by=frozenset({"model"})).rows] == [("large", 4), ("tiny", 3)]
    assert len(report().rows) == 3
    assert report().total.requests == 7


@pytest.mark.parametrize(
    ("selection", "requests"),
    [
        ({"model": "tiny"}, 3),
        ({"server": "s2"}, 6),
        ({"owner": "alice"}, 1),
        ({"client": "anna"}, 1),
        ({"client": "k2"}, 2),
        ({"client": ""}, 4),
        ({"owner": "bob", "model": "large"}, 4),
        ({"owner": "alice", "model": "large"}, 0),
        ({"model": "tiny\0"}, 0),
    ],
)
def test_a_report_counts_what_is_selected(selection: dict[str, str], requests: int) -> None:
    """A client is selected by the id or by the name of its key, a model in any spelling of its name."""
    assert report(**selection).total.requests == requests
