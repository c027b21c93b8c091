"""The page about usage as values: its address, the order of its rows, the bars of its chart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.usage import Counts, Usage, UsageKey
from multiverse_gateway.core.usage_tables import FILTERS, MAX_DAYS, PARTS, SORTS, UsageView, bars_of, ceiling, most_used, rows_of, view_of

TODAY = "2026-05-28"


def view(**query: str) -> UsageView:
    """Return the view of an address."""
    return view_of(query, today=TODAY)


@pytest.mark.parametrize(
    ("query", "span"),
    [
        ({}, ("2026-04-29", TODAY, "30")),
        ({"range": "today"}, (TODAY, TODAY, "today")),
        ({"range": "7", "since": "2026-01-01"}, ("2026-05-22", TODAY, "7")),
        ({"range": "nonsense"}, ("2026-04-29", TODAY, "30")),
        ({"range": "custom", "since": "2026-05-01", "until": "2026-05-02"}, ("2026-05-01", "2026-05-02", "custom")),
        ({"since": "2026-05-02", "until": "2026-05-01"}, ("2026-05-01", "2026-05-02", "custom")),
        ({"since": "2026-05-01"}, ("2026-05-01", TODAY, "custom")),
        ({"since": "2026-06-01"}, (TODAY, "2026-06-01", "custom")),
        ({"until": "2026-05-01"}, ("2026-04-02", "2026-05-01", "custom")),
        ({"range": "custom"}, ("2026-04-29", TODAY, "30")),
        ({"since": "yesterday", "until": "2026-13-01"}, ("2026-04-29", TODAY, "30")),
        ({"since": "20260501", "until": "2026-W01-1"}, ("2025-11-30", "2025-12-29", "custom")),
    ],
)
def test_an_address_names_days(query: dict[str, str], span: tuple[str, str, str]) -> None:
    """By a range up to today, or by its first and last day; what is no day is ignored."""
    found = view(**query)
    assert (found.since, found.until, found.span) == span


def test_a_span_has_a_limit() -> None:
    """No address makes the page read everything."""
    assert view(since="0001-01-01").days == MAX_DAYS
    assert view(since="0001-01-01", until="0001-01-05").days == 5


ADDRESSES = st.fixed_dictionaries(
    {},
    optional={
        "by": st.sampled_from([*PARTS, "mood"]),
        "range": st.sampled_from(["today", "7", "30", "custom", "x"]),
        "since": st.sampled_from(["2026-05-01", "2026-05-27", "never"]),
        "until": st.sampled_from(["2026-05-09", "2027-01-01", ""]),
        "sort": st.sampled_from([*SORTS, "mood"]),
        "order": st.sampled_from(["asc", "desc", "up"]),
        **dict.fromkeys(FILTERS, st.sampled_from(["", "-", "--", "-x", "alice", "李明 & co"])),
    },
)


@given(ADDRESSES)
def test_an_address_leads_back_to_its_view(query: dict[str, str]) -> None:
    """What the page writes into its links is what it reads from them."""
    found = view_of(query, today=TODAY)
    assert view_of(found.pairs(), today=TODAY) == found


def test_the_usual_view_has_a_bare_address() -> None:
    """Nothing stands in it that goes without saying; a client without a key is told apart from no filter."""
    assert view(by="client", range="30", sort="requests", order="desc", client="").pairs() == {}
    assert (view(client="-").client, view(owner="--none").owner, view().client) == ("", "-none", None)


def test_a_column_sorts_both_ways() -> None:
    """The first time as it is usual: counts from the largest, names from A, days from the newest."""
    assert view().sorted_by("failed").pairs() == {"sort": "failed"}
    assert view().sorted_by("requests").pairs() == {"order": "asc"}
    assert view().sorted_by("name").pairs() == {"sort": "name"}
    assert view().sorted_by("name").sorted_by("name").pairs() == {"sort": "name", "order": "desc"}
    assert view(by="day").sorted_by("name").pairs() == {"by": "day", "order": "asc"}


def test_a_row_leads_to_what_it_consists_of() -> None:
    """The other filters stay; a day becomes the span."""
    assert view(owner="bob", sort="failed").shows("model", client="k1").pairs() == {"by": "model", "client": "k1", "owner": "bob"}
    day = view(by="day", model="tiny").shows("client", day="2026-05-09")
    assert day.pairs() == {"since": "2026-05-09", "until": "2026-05-09", "model": "tiny"}
    assert (day.sort, day.is_descending, day.days) == ("requests", True, 1)
    assert day.shows("day").pairs()["by"] == "day"


def test_a_report_has_the_filters_of_the_page() -> None:
    """By one part, of the same days."""
    selection = view(by="model", client="-", model="tiny", server="s1").selection("day")
    assert (selection.by, selection.client, selection.model, selection.owner, selection.server) == (
        frozenset({"day"}),
        "",
        "tiny",
        None,
        "s1",
    )
    assert (selection.since, selection.until) == ("2026-04-29", TODAY)


SUMS = [
    Usage(key=UsageKey("", "", client=client), counts=Counts(requests=requests, failed=failed, completion_tokens=tokens))
    for client, requests, failed, tokens in [("k1", 5, 0, 1), ("k2", 9, 1, 0), ("k3", 5, 2, 7), ("", 1, 3, 0)]
]
NAMES = {"k1": "zoe", "k2": "Émile", "k3": "zoe", "": "No key"}


@pytest.mark.parametrize(
    ("query", "order"),
    [
        ({}, ["k2", "k1", "k3", ""]),
        ({"order": "asc"}, ["", "k1", "k3", "k2"]),
        ({"sort": "failed"}, ["", "k3", "k2", "k1"]),
        ({"sort": "name"}, ["", "k1", "k3", "k2"]),
        ({"sort": "name", "order": "desc"}, ["k2", "k3", "k1", ""]),
    ],
)
def test_rows_have_the_order_of_the_view(query: dict[str, str], order: list[str]) -> None:
    """Equal counts are sorted by name; equal names have a note that tells them apart."""
    rows = rows_of(SUMS, view(**query), NAMES.__getitem__)
    assert [row.value for row in rows] == order
    assert {row.value: row.note for row in rows} == {"k1": "k1", "k2": "", "k3": "k3", "": ""}


def test_the_top_five_have_the_most_requests() -> None:
    """Of equal ones those with more tokens come first."""
    rows = rows_of(SUMS, view(sort="name"), NAMES.__getitem__)
    assert [row.value for row in most_used(rows, 3)] == ["k2", "k3", "k1"]
    assert len(most_used(rows * 3)) == 5


def days(*pairs: tuple[str, int]) -> list[Usage]:
    """Return sums by day."""
    return [Usage(key=UsageKey(day, ""), counts=Counts(requests=requests)) for day, requests in pairs]


def test_each_day_has_a_bar() -> None:
    """Also one without requests; a long span has bars by month."""
    bars = bars_of(days(("2026-05-23", 3), (TODAY, 4)), view(range="7"))
    assert [(bar.label[-2:], bar.counts.requests) for bar in bars] == [
        ("22", 0), ("23", 3), ("24", 0), ("25", 0), ("26", 0), ("27", 0), ("28", 4),
    ]  # fmt: skip
    long = view(since="2025-12-30", until="2026-04-01")
    assert [(bar.label, bar.counts.requests) for bar in bars_of(days(("2025-12-30", 1), ("2026-02-01", 2), ("2026-02-28", 3)), long)] == [
        ("2025-12", 1), ("2026-01", 0), ("2026-02", 5), ("2026-03", 0), ("2026-04", 0),
    ]  # fmt: skip


@given(st.integers(0, 2**53))
def test_a_scale_ends_at_a_round_number(count: int) -> None:
    """Not far above the largest bar."""
    top = ceiling(count)
    assert count <= top <= max(1, 2.5 * count)
    assert str(top).rstrip("0") in ("1", "2", "5")
