"""Requests of a day by client key; how gateways count them together is in `tests/entry/test_quotas.py`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.budget import DAY_SECONDS, DayCounts, day_name, day_of, until_next_day

DAY = 20_000
MORNING = float(DAY * DAY_SECONDS)


@given(st.floats(0, 253_402_300_799))
def test_a_day_ends_where_the_next_one_begins(wall: float) -> None:
    left = until_next_day(wall)
    assert 0 < left <= DAY_SECONDS
    assert day_of(wall + left) == day_of(wall) + 1
    assert len(day_name(day_of(wall))) == 10


@pytest.mark.parametrize(("limit", "calls"), [(3, 5), (5, 3)])
def test_keys_are_counted_apart_and_each_day_anew(limit: int, calls: int) -> None:
    counts = DayCounts()
    for day in range(3):
        wall = MORNING + day * DAY_SECONDS
        assert [counts.count("alice", wall) for _ in range(calls)] == list(range(1, calls + 1))
        assert (counts.total("alice", wall), counts.total("bob", wall)) == (calls, 0)
    assert len(counts._totals) == 1


def test_what_comes_too_late_is_of_yesterday() -> None:
    """An answer of the storage, a failure, what was kept: after midnight none changes the new day."""
    counts = DayCounts()
    counts.count("alice", MORNING)
    tomorrow = MORNING + DAY_SECONDS
    counts.learn({"alice": 7}, DAY, tomorrow)
    assert counts.total("alice", tomorrow) == 0
    counts.count("alice", tomorrow)
    counts.take_back("alice", DAY)
    assert counts.total("alice", tomorrow) == 1
    counts.take_back("alice", DAY + 1)
    counts.take_back("alice", DAY + 1)
    assert counts.total("alice", tomorrow) == 0


def test_nothing_learnt_makes_less_of_what_is_known() -> None:
    counts = DayCounts()
    counts.learn({"alice": 7, "bob": 1}, DAY, MORNING)
    counts.learn({"alice": 3}, DAY, MORNING)
    assert (counts.count("alice", MORNING), counts.total("bob", MORNING)) == (8, 1)
