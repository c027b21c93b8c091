"""Weighted: turns in proportion, smoothly."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway import Settings
from multiverse_gateway.balancers import weighted
from multiverse_gateway.balancers.weighted import MAX_MODELS, Weighted
from multiverse_gateway.testing.balancer import IDLE, BalancerContract, FixedLoad, make_request, make_servers


class TestWeighted(BalancerContract):
    """It keeps the contract."""

    @pytest.fixture
    def balancer(self) -> Weighted:
        """Return a fresh one."""
        return weighted.create(Settings())


def test_turns_are_spread() -> None:
    """The example of nginx: 5, 1, 1 gives no row of five."""
    balancer, servers = Weighted(), make_servers(3, weights=[5, 1, 1])
    assert "".join(balancer.pick(servers, IDLE, make_request()).id for _ in range(14)) == "aabacaa" * 2


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(1, 3))
def test_turns_are_in_proportion(weights: list[int], circles: int) -> None:
    """In as many picks as the sum of the weights each server has exactly its weight."""
    balancer, servers = Weighted(), make_servers(len(weights), weights=weights)
    picked = Counter(balancer.pick(servers, IDLE, make_request()).id for _ in range(circles * sum(weights)))
    assert picked == {server.id: circles * server.weight for server in servers}


def test_a_slow_start_takes_its_share() -> None:
    balancer, servers = Weighted(), make_servers(2, weights=[1, 4])
    picked = Counter(balancer.pick(servers, FixedLoad(shares={"b": 0.25}), make_request()).id for _ in range(100))
    assert picked == {"a": 50, "b": 50}


def test_memory_is_bounded() -> None:
    balancer, servers = Weighted(), make_servers(3000)
    for number in range(2900):
        balancer.pick(servers[number : number + 2], IDLE, make_request())
    assert len(balancer._models["tiny"]) < 50
    for number in range(MAX_MODELS + 10):
        balancer.pick(servers[:2], IDLE, make_request(str(number)))
    assert len(balancer._models) <= MAX_MODELS
