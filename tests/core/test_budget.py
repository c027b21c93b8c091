"""Requests of a day by client key: exact in one process, and never more than were sent, whatever a common storage does."""

from __future__ import annotations

import attrs
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


@attrs.define
class Site:
    """Gateways that count a key's calls, the storage that they share, and what the database keeps of it."""

    gateways: list[DayCounts]
    limit: int
    storage: int = 0
    is_there: bool = True
    sent: int = 0
    allowed: int = 0
    wall: float = MORNING

    def call(self, gateway: DayCounts) -> bool:
        """Do what the limiter does for a call."""
        self.sent += 1
        if gateway.total("key", self.wall) >= self.limit:
            return False
        used = gateway.count("key", self.wall)
        if self.is_there:
            self.storage += 1
            gateway.learn({"key": self.storage}, day_of(self.wall), self.wall)
            used = max(used, self.storage)
        else:
            gateway.take_back("key", day_of(self.wall))
            used = gateway.count("key", self.wall)
        self.allowed += used <= self.limit
        return used <= self.limit

    def learn(self, gateway: DayCounts) -> None:
        """Let a gateway read what was kept."""
        gateway.learn({"key": self.allowed}, day_of(self.wall), self.wall)

    def do(self, what: str, number: int) -> None:
        """Let something happen."""
        number %= len(self.gateways)
        gateway = self.gateways[number]
        if what == "call":
            could = self.allowed < self.limit
            assert self.call(gateway) <= (could or len(self.gateways) > 1)
        elif what == "learn":
            self.learn(gateway)
            assert self.allowed < self.limit or not self.call(gateway)
        elif what == "restart":
            self.gateways[number] = DayCounts()
            self.learn(self.gateways[number])
        elif what == "outage":
            self.is_there = not self.is_there
        elif what == "forget":
            self.storage = 0
        else:
            self.wall += DAY_SECONDS
            self.storage = self.sent = self.allowed = 0
        for known in self.gateways:
            assert known.total("key", self.wall) <= self.sent


def steps(*others: str) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Return histories that are mostly calls."""
    return st.lists(st.tuples(st.sampled_from(["call", "call", "call", *others]), st.integers(0, 2)), max_size=60)


@given(st.integers(1, 8), st.integers(1, 3), steps("learn", "restart", "tomorrow"))
def test_gateways_that_share_a_storage_allow_the_limit_and_no_more(limit: int, gateways: int, history: list[tuple[str, int]]) -> None:
    site = Site([DayCounts() for _ in range(gateways)], limit)
    for step in history:
        site.do(*step)
        assert site.allowed == min(limit, site.sent)


@given(st.integers(1, 8), steps("learn", "restart", "outage", "forget", "tomorrow"))
def test_one_gateway_is_exact_whatever_the_storage_does(limit: int, history: list[tuple[str, int]]) -> None:
    """It is gone, returns with less or with nothing; the gateway restarts and finds what was kept."""
    site = Site([DayCounts()], limit)
    for step in history:
        site.do(*step)
        assert site.allowed == min(limit, site.sent)


@given(st.integers(1, 8), st.integers(2, 3), steps("learn", "restart", "outage", "forget", "tomorrow"))
def test_without_the_storage_each_gateway_allows_the_limit_at_most(limit: int, gateways: int, history: list[tuple[str, int]]) -> None:
    """And none of them more, once it has learnt what all did; nobody is refused before the limit is reached."""
    site = Site([DayCounts() for _ in range(gateways)], limit)
    for step in history:
        site.do(*step)
        assert min(limit, site.sent) <= site.allowed <= limit * gateways
