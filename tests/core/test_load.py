"""Slots, latencies, retry budgets and queues of one process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from multiverse_gateway.core.load import FAILURE_FACTOR, MIN_RETRIES, SMALL_BODY_BYTES, Admission, BodyBudget, Load, retry_seconds
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.protocols import LoadView
from multiverse_gateway.testing.balancer import FixedLoad

A, B = ServerId("a"), ServerId("b")
SERVERS = st.sampled_from([A, B, ServerId("c")])
MODELS = {A: "llama", B: "llama", ServerId("c"): "phi"}


def finish(load: Load, server: ServerId = A, *, seconds: float | None = None, failed: bool = False) -> None:
    load.finished(server, MODELS[server], seconds=seconds, failed=failed, first_byte_timeout=120.0)


def test_a_slot_is_taken_and_given_back() -> None:
    """An attempt counts for its server, its model and the whole, while it lives."""
    load = Load()
    load.started(A, "llama")
    load.started(A, "llama")
    load.started(B, "llama")
    assert (load.in_flight(A), load.in_flight(B), load.model_in_flight("llama"), load.total) == (2, 1, 3, 3)
    for server in (A, B, A):
        finish(load, server)
    assert (load.in_flight(A), load.in_flight(B), load.model_in_flight("llama"), load.total) == (0, 0, 0, 0)


def test_a_slot_is_not_given_back_twice() -> None:
    """Giving back what was not taken is a bug and says so; nothing was counted."""
    load = Load()
    with pytest.raises(KeyError):
        finish(load)
    with pytest.raises(KeyError):
        load.retry_finished("llama")
    assert load.total == 0


def test_latency_is_a_moving_average() -> None:
    """The first latency counts whole, each later one by a quarter; what says nothing changes nothing."""
    load = Load()
    assert load.latency(A) is None
    for seconds, expected in ((None, None), (1.0, 1.0), (2.0, 1.25), (None, 1.25)):
        load.started(A, "llama")
        finish(load, seconds=seconds)
        assert load.latency(A) == expected


def test_failing_fast_is_slow() -> None:
    """A failure counts as a quarter of the first-byte timeout, however fast it came (H12: a dead server draws no traffic)."""
    load = Load()
    load.started(A, "llama")
    finish(load, seconds=0.001, failed=True)
    assert load.latency(A) == 120.0 * FAILURE_FACTOR == 30.0


def test_a_latency_that_nobody_measures_fades() -> None:
    """By half at each turn without a measurement, so that a server that was slow once is tried again."""
    load = Load()
    load.started(A, "llama")
    finish(load, seconds=8.0)
    seen = []
    for _ in range(4):
        load.decay()
        seen.append(load.latency(A))
    assert seen == [8.0, 4.0, 2.0, 1.0]
    load.started(A, "llama")
    finish(load, seconds=1.0)
    load.decay()
    assert load.latency(A) == 1.0


@given(st.lists(st.tuples(st.floats(0, 1000), st.booleans()), min_size=1))
def test_the_average_lies_between_what_was_measured(outcomes: list[tuple[float, bool]]) -> None:
    """A moving average never leaves the range of its samples."""
    load = Load()
    for seconds, failed in outcomes:
        load.started(A, "llama")
        finish(load, seconds=seconds, failed=failed)
    samples = [30.0 if failed else seconds for seconds, failed in outcomes]
    latency = load.latency(A)
    assert latency is not None
    assert min(samples) - 1e-9 <= latency <= max(samples) + 1e-9


def test_shares_are_what_was_set() -> None:
    """A server gets its whole share unless a smaller one was set."""
    load = Load()
    assert load.traffic_share(A) == 1.0
    load.set_traffic_share(A, 0.25)
    assert (load.traffic_share(A), load.traffic_share(B)) == (0.25, 1.0)
    load.set_traffic_share(A, 1.0)
    assert load.traffic_share(A) == 1.0
    load.set_traffic_share(A, 1.0)
    assert load.traffic_share(A) == 1.0


@pytest.mark.parametrize("load", [Load(), FixedLoad()])
def test_the_old_name_of_the_traffic_share_still_works(load: LoadView) -> None:
    """A balancer written for an earlier release gets the same value, and a warning at its own line."""
    with pytest.warns(DeprecationWarning, match=r"use LoadView\.traffic_share") as warned:
        assert load.share(A) == load.traffic_share(A) == 1.0
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize(("running", "most"), [(0, 3), (10, 3), (15, 3), (16, 4), (50, 10), (100, 20)])
def test_retries_have_a_budget(running: int, most: int) -> None:
    """At most three retries of a model run at once, or a fifth of its attempts when that is more; other models do not matter."""
    load = Load()
    for _ in range(running):
        load.started(A, "llama")
    for _ in range(100):
        load.started(ServerId("c"), "phi")
    made = 0
    while load.retry_budget_left("llama"):
        load.retry_started("llama")
        made += 1
    assert made == load.retries_in_flight("llama") == most
    load.retry_finished("llama")
    assert load.retry_budget_left("llama")
    assert load.retries_in_flight("phi") == 0


def test_a_removed_server_is_forgotten_when_its_last_attempt_ends() -> None:
    """Its slots live as long as its attempts; nothing of it stays behind."""
    load = Load()
    load.started(A, "llama")
    load.started(A, "llama")
    load.started(B, "llama")
    finish(load, seconds=1.0)
    load.set_traffic_share(A, 0.5)
    load.forget(A)
    assert (load.in_flight(A), load.latency(A), load.traffic_share(A)) == (1, None, 1.0)
    finish(load, B, seconds=2.0)
    finish(load, A, seconds=3.0)
    assert (load.in_flight(A), load.latency(A), load.latency(B)) == (0, None, 2.0)
    load.forget(B)
    load.forget(ServerId("never seen"))
    assert load.latency(B) is None
    load.started(A, "llama")
    finish(load, A, seconds=4.0)
    assert load.latency(A) == 4.0


class Slots(RuleBasedStateMachine):
    """L08, D05: whatever order attempts begin, retry and end in, the slots are those of the live attempts."""

    def __init__(self) -> None:
        super().__init__()
        self.load = Load()
        self.live: list[tuple[ServerId, bool]] = []

    @rule(server=SERVERS, is_retry=st.booleans())
    def start(self, server: ServerId, is_retry: bool) -> None:
        """Begin an attempt, as a retry if the budget has room."""
        model = MODELS[server]
        is_retry = is_retry and self.load.retry_budget_left(model)
        self.load.started(server, model)
        if is_retry:
            self.load.retry_started(model)
        self.live.append((server, is_retry))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), seconds=st.none() | st.floats(0, 300), failed=st.booleans())
    def finish(self, data: st.DataObject, seconds: float | None, failed: bool) -> None:
        """End any of the live attempts."""
        server, is_retry = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        finish(self.load, server, seconds=seconds, failed=failed)
        if is_retry:
            self.load.retry_finished(MODELS[server])

    @rule(server=SERVERS)
    def forget(self, server: ServerId) -> None:
        """Remove a server, attempts running or not."""
        self.load.forget(server)

    @invariant()
    def slots_are_live_attempts(self) -> None:
        """The sum of slots is the number of live attempts, seen from each side."""
        servers = [server for server, _ in self.live]
        assert self.load.total == len(servers) == sum(self.load.in_flight(server) for server in MODELS)
        for server, model in MODELS.items():
            assert self.load.in_flight(server) == servers.count(server)
            assert self.load.model_in_flight(model) == sum(MODELS[other] == model for other in servers)
            retries = [other for other, is_retry in self.live if is_retry and MODELS[other] == model]
            assert self.load.retries_in_flight(model) == len(retries)


TestSlots = Slots.TestCase


@given(st.integers(0, 3), st.integers(0, 3))
def test_the_whole_process_has_a_limit(most: int, total: int) -> None:
    """No more attempts start than the process may have."""
    assert Admission(max_in_flight=most).may_start(total) is (total < most)


def test_the_least_budget_is_that_of_the_semantics() -> None:
    """Three retries are always free: a model with few requests can fail over, too."""
    assert MIN_RETRIES == 3


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_clients_without_room_return_at_different_times(random: float) -> None:
    """Within 1 to 5 seconds."""
    assert 1.0 <= retry_seconds(random) <= 5.0


def test_a_client_holds_a_quarter_of_the_memory_for_bodies_once_half_is_taken() -> None:
    """Or a single body of any size; small ones count toward the whole alone, and what was counted is given back."""
    budget = BodyBudget(1_000_000)
    assert budget.may_hold("script", 500_000)
    budget.held = 500_000
    budget.count_large("script", 300_000)
    budget.count_large("script", 200_000)
    assert not budget.may_hold("script", 70_000)
    assert budget.may_hold("script", SMALL_BODY_BYTES)
    assert budget.may_hold("person", 400_000), "a single body"
    assert not budget.may_hold("person", 500_001), "no room at all"
    budget.count_large("script", -400_000)
    assert budget.may_hold("script", 150_000), "a quarter in all"
    assert not budget.may_hold("script", 150_001)
    assert budget.may_hold("script", 300_000, own=100_000), "all that it has is this body"
    assert not budget.may_hold("script", 150_000, own=10_000), "what it has are other bodies"
    budget.count_large("script", -100_000)
    assert budget.may_hold("script", 400_000)
