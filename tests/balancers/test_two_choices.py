"""Power of two choices: the cheaper one of two random servers."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway import Settings
from multiverse_gateway.balancers import two_choices
from multiverse_gateway.balancers.two_choices import TwoChoices
from multiverse_gateway.testing.balancer import BalancerContract, FixedLoad, make_request, make_servers


class TestTwoChoices(BalancerContract):
    """It keeps the contract."""

    @pytest.fixture
    def balancer(self) -> TwoChoices:
        """Return a fresh one."""
        return two_choices.create(Settings())


def picked(load: FixedLoad, *, servers: int = 2, weights: tuple[int, ...] = (), count: int = 200) -> Counter[str]:
    """Return how often each server is picked."""
    balancer, everybody = TwoChoices(random.Random(7)), make_servers(servers, weights=weights)
    return Counter(balancer.pick(everybody, load, make_request()).id for _ in range(count))


def test_of_two_the_cheaper_one_is_picked() -> None:
    """Latency, running requests, weight and slow start all count."""
    assert picked(FixedLoad(latencies={"a": 0.1, "b": 0.2})) == {"a": 200}
    assert picked(FixedLoad({"a": 2}, {"a": 0.1, "b": 0.2})) == {"b": 200}
    assert picked(FixedLoad({"a": 1, "b": 1}), weights=(1, 2)) == {"b": 200}
    assert picked(FixedLoad(shares={"a": 0.25})) == {"b": 200}


def test_a_server_that_fails_fast_is_avoided() -> None:
    """Its failures count as 30 s, whatever little else runs there."""
    assert picked(FixedLoad({"b": 5}, {"a": 30.0, "b": 0.5})) == {"b": 200}


def test_an_unknown_server_is_tried_and_not_flooded() -> None:
    assert set(picked(FixedLoad(latencies={"a": 0.001}))) == {"a", "b"}
    assert picked(FixedLoad({"b": 3}, {"a": 30.0})) == {"a": 200}


def test_the_worst_of_many_gets_nothing() -> None:
    assert "c" not in picked(FixedLoad(latencies={"a": 1.0, "b": 1.0, "c": 2.0, "d": 1.0}), servers=4)


@given(st.integers(2, 8), st.integers())
def test_two_different_servers_are_drawn(count: int, seed: int) -> None:
    """Each is drawn as often as any other."""
    balancer, servers = TwoChoices(random.Random(seed)), make_servers(count)
    costs = FixedLoad(dict.fromkeys("abcdefgh"[:-1], 0) | {servers[-1].id: 100})
    assert balancer.pick(servers, costs, make_request()) is not servers[-1]


def test_equal_servers_get_equal_parts() -> None:
    counted = picked(FixedLoad(), servers=4, count=4000)
    assert all(900 < counted[name] < 1100 for name in "abcd")
