"""Least busy: the fewest running requests for weight and latency."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given

from multiverse_gateway import Settings
from multiverse_gateway.balancers import least_busy
from multiverse_gateway.balancers.cost import costs
from multiverse_gateway.balancers.least_busy import LeastBusy
from multiverse_gateway.testing.balancer import IDLE, BalancerContract, FixedLoad, loads, make_request, make_servers


class TestLeastBusy(BalancerContract):
    """It keeps the contract."""

    @pytest.fixture
    def balancer(self) -> LeastBusy:
        """Return a fresh one."""
        return least_busy.create(Settings())


@given(loads)
def test_nobody_is_cheaper_than_the_picked_one(load: FixedLoad) -> None:
    servers = make_servers(8, weights=[1, 2, 3, 100, 1, 1, 7, 1])
    found = {server.id: cost for server, cost in zip(servers, costs(servers, load), strict=True)}
    assert found[LeastBusy().pick(servers, load, make_request()).id] == min(found.values())


def test_latency_counts_by_its_root() -> None:
    """Four times as slow is worth two running requests to one; below 10 ms nobody is slower than another."""
    servers = make_servers(2)
    assert costs(servers, FixedLoad({"a": 1, "b": 3}, {"a": 0.4, "b": 0.1})) == pytest.approx([2 * 0.4**0.5, 4 * 0.1**0.5])
    assert costs(servers, FixedLoad(latencies={"a": 0.001, "b": 0.01})) == [0.1, 0.1]


def test_failing_fast_is_not_being_idle() -> None:
    """A server whose requests fail at once runs none, and yet others are preferred: its failures count as 30 s."""
    servers = make_servers(2)
    assert LeastBusy().pick(servers, FixedLoad({"b": 5}, {"a": 30.0, "b": 0.5}), make_request()).id == "b"


def test_an_unknown_server_is_tried_and_not_flooded() -> None:
    """It counts as being as fast as the fastest."""
    servers = make_servers(3)
    assert LeastBusy().pick(servers, FixedLoad({"b": 1, "c": 1}, {"b": 0.5, "c": 2.0}), make_request()).id == "a"
    assert LeastBusy().pick(servers, FixedLoad({"a": 2, "b": 1, "c": 1}, {"b": 0.5, "c": 2.0}), make_request()).id == "b"


def test_equals_take_turns() -> None:
    balancer, servers = LeastBusy(), make_servers(3)
    load = FixedLoad({"b": 1})
    assert "".join(balancer.pick(servers, load, make_request()).id for _ in range(4)) == "acac"
    assert Counter(balancer.pick(servers, IDLE, make_request()).id for _ in range(30)) == {"a": 10, "b": 10, "c": 10}


def test_weight_and_slow_start_count() -> None:
    """Six of ten is busier than two of four; a server that starts slowly counts as smaller."""
    servers = make_servers(2, weights=[4, 10])
    assert LeastBusy().pick(servers, FixedLoad({"a": 1, "b": 5}), make_request()).id == "a"
    assert LeastBusy().pick(servers, FixedLoad({"a": 1, "b": 5}, shares={"a": 0.25}), make_request()).id == "b"
