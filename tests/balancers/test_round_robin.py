"""Round robin: exact turns, whichever servers come and go."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway import Settings
from multiverse_gateway.balancers import round_robin
from multiverse_gateway.balancers.round_robin import MAX_MODELS, RoundRobin
from multiverse_gateway.testing.balancer import IDLE, BalancerContract, FixedLoad, make_request, make_servers


class TestRoundRobin(BalancerContract):
    """It keeps the contract."""

    @pytest.fixture
    def balancer(self) -> RoundRobin:
        """Return a fresh one."""
        return round_robin.create(Settings())


def turns(balancer: RoundRobin, names: str, count: int, load: FixedLoad | None = None, model: str = "tiny") -> str:
    """Return who is picked `count` times in a row while the servers named are there."""
    servers = tuple(server for server in make_servers(26) if server.id in names)
    return "".join(balancer.pick(servers, load or IDLE, make_request(model)).id for _ in range(count))


def test_servers_take_turns_in_the_order_of_registration() -> None:
    """TC-INF-007."""
    assert turns(RoundRobin(), "abc", 7) == "abcabca"


def test_models_have_turns_of_their_own() -> None:
    balancer = RoundRobin()
    assert turns(balancer, "ab", 1, model="one") == "a"
    assert turns(balancer, "ab", 1, model="other") == "a"
    assert turns(balancer, "ab", 1, model="one") == "b"


def test_who_is_left_out_now_and_then_is_not_passed_over() -> None:
    """Sets that alternate (streams, retries) starve nobody: a plain pointer would never reach b here."""
    balancer = RoundRobin()
    picked = "".join(turns(balancer, names, 1) for names in ["abc", "ac"] * 30)
    assert picked.count("b") == 15


def test_who_comes_back_or_is_new_gets_one_turn_for_it() -> None:
    balancer = RoundRobin()
    assert turns(balancer, "abc", 3) == "abc"
    assert turns(balancer, "ac", 10) == "acacacacac"
    assert turns(balancer, "abc", 6) == "bacbac"
    assert turns(balancer, "abcd", 5) == "dbacd"


@given(st.integers(1, 9), st.integers(0, 60))
def test_turns_are_exact(count: int, picks: int) -> None:
    """No two servers ever differ by more than one turn."""
    names = "abcdefghi"[:count]
    counted = Counter(turns(RoundRobin(), names, picks))
    assert max(counted[name] for name in names) - min(counted[name] for name in names) <= 1


@given(st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), max_size=80))
def test_the_longest_waiting_one_is_picked(sets: list[set[str]]) -> None:
    """The model of it all: of those who are there, nobody had the last turn longer ago."""
    balancer = RoundRobin()
    last = dict.fromkeys("abcdef", -1)
    for moment, names in enumerate(sets):
        picked = turns(balancer, "".join(names), 1)
        assert picked in names
        assert last[picked] == min(last[name] for name in names)
        last[picked] = moment


def test_a_slow_start_takes_its_share_of_the_turns() -> None:
    """A quarter of them, spread evenly, and all of them when everybody starts."""
    assert Counter(turns(RoundRobin(), "ab", 100, FixedLoad(shares={"b": 0.25}))) == {"a": 80, "b": 20}
    assert Counter(turns(RoundRobin(), "ab", 100, FixedLoad(shares={"a": 0.25, "b": 0.25}))) == {"a": 50, "b": 50}


def test_memory_is_bounded() -> None:
    """Neither models nor servers of the past are kept for ever."""
    balancer = RoundRobin()
    servers = make_servers(3000)
    for number in range(2900):
        balancer.pick(servers[number : number + 2], FixedLoad(shares={servers[number].id: 0.5}), make_request())
    [remembered] = balancer._models.values()
    assert len(remembered.last) < 50
    assert len(remembered.credit) < 50
    for number in range(MAX_MODELS + 10):
        balancer.pick(servers[:2], IDLE, make_request(str(number)))
    assert len(balancer._models) <= MAX_MODELS
