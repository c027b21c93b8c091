"""Which process probes a server, when, and what a failed probe proves."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway import Health, HealthState, ServerId
from multiverse_gateway.core.health import NextProbe
from multiverse_gateway.core.probing import MAX_PARALLEL, Doubt, FailurePattern, due, is_correlated, next_probes, one_per_host, shard_of
from multiverse_gateway.core.routing import Route
from multiverse_gateway.core.servers import HostId
from multiverse_gateway.testing.store import make_server


def route(name: str, probe_at: float = 0.0, state: HealthState = HealthState.HEALTHY) -> Route:
    """Return a route whose next probe is due at this instant."""
    return Route(make_server(name), Health(state=state, next_probe=NextProbe(at=probe_at)))


def routes(count: int, state: HealthState = HealthState.HEALTHY) -> dict[ServerId, Route]:
    """Return routes to servers s0, s1, …"""
    return {ServerId(f"s{number}"): route(f"s{number}", state=state) for number in range(count)}


# Turns


@given(st.lists(st.floats(0, 100) | st.just(math.inf)), st.floats(0, 100))
def test_what_is_due_comes_in_order(instants: list[float], now: float) -> None:
    """The one that has been due longest comes first; a server that is never probed does not come."""
    found = due([route(str(number), instant) for number, instant in enumerate(instants)], now)
    assert [instants[int(server.id)] for server in found] == sorted(instant for instant in instants if instant <= now)


def test_early_probes_follow_those_that_are_due() -> None:
    """None is probed twice at once, and no more than the limit run."""
    known = routes(30) | {ServerId("later"): route("later", probe_at=10.0)}
    early = {ServerId("later"), ServerId("s0")}
    assert next_probes({}, early=(), running=(), now=5.0) == []
    chosen = next_probes({key: known[key] for key in sorted(early)}, early=early, running=(), now=5.0)
    assert [server.id for server in chosen] == ["s0", "later"]
    chosen = next_probes(known, early=early, running={HostId("host of s0"), HostId("host of s1")}, now=5.0)
    assert [server.id for server in chosen] == [f"s{number}" for number in range(2, MAX_PARALLEL)]


def test_one_server_of_a_host_is_probed_at_a_time() -> None:
    """The one that has been due longest; an inactive one does not stand for its host while another one is active."""
    facts = {"a": (2.0, HealthState.ARCHIVED), "b": (1.0, HealthState.HEALTHY), "c": (3.0, HealthState.HEALTHY)}
    known = {
        ServerId(name): Route(make_server(name, host_id="lab"), Health(state=state, next_probe=NextProbe(at=at)))
        for name, (at, state) in facts.items()
    }
    assert [server.id for server in next_probes(known, early=known, running=(), now=5.0)] == ["b"]
    assert next_probes(known, early=known, running={HostId("lab")}, now=5.0) == []
    assert list(one_per_host(known)) == ["b"]


# What failures prove


def test_three_and_four_fifths_are_correlated() -> None:
    assert [is_correlated(failed, 10) for failed in (7, 8, 10)] == [False, True, True]
    assert not is_correlated(2, 2)
    assert is_correlated(3, 3)


def test_a_server_that_refuses_its_key_or_is_taken_off_says_nothing_of_the_network() -> None:
    pattern = FailurePattern()
    known = routes(3) | {ServerId("gone"): route("gone", state=HealthState.DEACTIVATED)}
    for name in ("s0", "s1", "gone"):
        pattern.note(ServerId(name), 5.0, reached=False)
    pattern.note(ServerId("s2"), 5.0, reached=True)
    assert not pattern.is_widespread(known)
    pattern.note(ServerId("s2"), 6.0, reached=False)
    assert pattern.is_widespread(known)


def test_old_verdicts_prove_nothing() -> None:
    """A server that was well before this one began to fail may be unreachable since."""
    pattern, known = FailurePattern(), routes(4)
    for name in known:
        pattern.note(name, 1.0, reached=True)
    pattern.note(ServerId("s0"), 10.0, reached=False)
    assert not pattern.is_proven(ServerId("s0"), known)
    assert pattern.outdated(ServerId("s0"), known) == {"s1", "s2", "s3"}
    pattern.note(ServerId("s1"), 11.0, reached=True)
    assert pattern.is_proven(ServerId("s0"), known)
    pattern.note(ServerId("s0"), 12.0, reached=False)
    assert pattern.outdated(ServerId("s0"), known) == {"s2", "s3"}
    pattern.keep(routes(1))
    assert not pattern.is_proven(ServerId("s0"), known)


def test_two_servers_prove_each_other() -> None:
    """There is no guard with fewer than three."""
    pattern = FailurePattern()
    pattern.note(ServerId("s0"), 1.0, reached=False)
    assert pattern.is_proven(ServerId("s0"), routes(2))


def test_a_failure_is_in_doubt_only_where_it_would_take_the_server_out() -> None:
    """With one more failure to go the others are probed; the last one counts when enough of them were reached since."""
    pattern, known = FailurePattern(), routes(4)
    for name in known:
        pattern.note(name, 1.0, reached=True)
    pattern.note(ServerId("s0"), 10.0, reached=False)

    def doubt(failures: int, state: HealthState = HealthState.UNHEALTHY) -> Doubt:
        failing = Route(make_server("s0"), Health(state=state, consecutive_failures=failures))
        return pattern.doubt(failing, known, max_failures=3)

    others = frozenset(known) - {"s0"}
    assert [doubt(failures) for failures in range(3)] == [Doubt(False), Doubt(False, others), Doubt(True, others)]
    assert doubt(3, HealthState.DEACTIVATED) == Doubt(False)
    pattern.note(ServerId("s1"), 11.0, reached=True)
    assert doubt(2) == Doubt(False)


# Shards


@given(servers=st.integers(0, 60), taken=st.sets(st.integers(0, 15), min_size=1))
def test_each_server_has_one_shard(servers: int, taken: set[int]) -> None:
    """And when a shard is given up, only its servers move."""
    names = [HostId(f"s{number}") for number in range(servers)]
    before = {name: shard_of(name, taken) for name in names}
    assert set(before.values()) <= taken
    left = taken - {min(taken)}
    if left:
        after = {name: shard_of(name, left) for name in names}
        assert {name for name in names if after[name] != before[name]} == {name for name in names if before[name] == min(taken)}


def test_shards_are_of_similar_size() -> None:
    """A thousand servers in three shards: none has more than twice its part."""
    counts = Counter(shard_of(HostId(f"s{number}"), {0, 1, 2}) for number in range(1000))
    assert max(counts.values()) < 2 * 1000 / 3 < sum(counts.values())
    assert len(counts) == 3
