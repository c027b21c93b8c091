"""Least busy: the fewest running requests for the weight."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given

from multiverse_gateway import Settings
from multiverse_gateway.balancers import least_busy
from multiverse_gateway.balancers.least_busy import LeastBusy
from multiverse_gateway.testing.balancer import IDLE, BalancerContract, FixedLoad, loads, make_request, make_servers


class TestLeastBusy(BalancerContract):
    """It keeps the contract."""

    @pytest.fixture
    def balancer(self) -> LeastBusy:
        """Return a fresh one."""
        return least_busy.create(Settings())


@given(loads)
def test_nobody_is_less_busy_than_the_picked_one(load: FixedLoad) -> None:
    servers = make_servers(8, weights=[1, 2, 3, 100, 1, 1, 7, 1])
    busy = {server.id: load.in_flight(server.id) / (server.weight * load.share(server.id)) for server in servers}
    assert busy[LeastBusy().pick(servers, load, make_request()).id] == min(busy.values())


def test_equals_take_turns() -> None:
    balancer, servers = LeastBusy(), make_servers(3)
    load = FixedLoad({"b": 1})
    assert "".join(balancer.pick(servers, load, make_request()).id for _ in range(4)) == "acac"
    assert Counter(balancer.pick(servers, IDLE, make_request()).id for _ in range(30)) == {"a": 10, "b": 10, "c": 10}


def test_weight_and_slow_start_count() -> None:
    """Three of ten is busier than one of four; a server that starts slowly counts as smaller."""
    servers = make_servers(2, weights=[4, 10])
    assert LeastBusy().pick(servers, FixedLoad({"a": 1, "b": 3}), make_request()).id == "a"
    assert LeastBusy().pick(servers, FixedLoad({"a": 1, "b": 3}, shares={"a": 0.25}), make_request()).id == "b"
