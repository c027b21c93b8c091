"""When servers were up: timelines, uptimes, minutes."""

from __future__ import annotations

import tracemalloc

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.health import Health, HealthState, fresh
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.timelines import (
    DAY,
    MAX_CHANGES,
    UNWATCHED_SECONDS,
    WEEK,
    Timeline,
    Timelines,
    Uptime,
    measured_until,
    minutes,
    noted,
    uptime,
    uptimes,
    with_checks,
)

ONE = ServerId("one")
WALL = 1_780_000_000.0


@attrs.frozen
class Checked:
    passed: bool
    checked_at: float


def health(state: HealthState, *, since: float | None = None, checked: float | None = None) -> Health:
    return Health(state=state, last_transition_at=since, last_checked_at=checked)


def test_an_outage_of_80_seconds_in_a_day_is_an_uptime_of_more_than_99_percent() -> None:
    """However many checks found it: only time counts."""
    timeline = noted(noted(noted(Timeline(), 0.0, True), 50_000.0, False), 50_080.0, True)
    measured = uptime(timeline, until=DAY, seconds=DAY)
    assert measured.share == pytest.approx(1 - 80 / DAY)
    assert [up for _, up in minutes(timeline, until=50_200.0, count=5)] == [True, False, False, True, True]


def test_old_changes_are_dropped() -> None:
    """What held at the beginning of the last 7 days stays; a server that changes all the time keeps its newest changes."""
    timeline = noted(noted(Timeline(((0.0, True), (10.0, False))), 20.0, True), 20.0 + WEEK, False)
    assert timeline.changes[0] == (20.0, True) or timeline.changes[0] == (10.0, False)
    assert noted(timeline, 100.0 + WEEK, True).changes[0] == (20.0, True)
    flapping = Timeline()
    for number in range(3 * MAX_CHANGES):
        flapping = noted(flapping, float(number), number % 2 == 0)
    assert len(flapping.changes) == MAX_CHANGES
    assert uptime(flapping, until=3.0 * MAX_CHANGES, seconds=DAY).since == 2.0 * MAX_CHANGES


def test_a_clock_that_jumps_back_makes_no_negative_times() -> None:
    timeline = noted(noted(Timeline(), 100.0, True), 50.0, False)
    assert timeline.changes == ((100.0, True), (100.0, False))
    assert uptime(timeline, until=90.0, seconds=DAY) == Uptime()


def test_nothing_is_claimed_about_time_that_is_not_known() -> None:
    assert uptime(Timeline(), until=100.0, seconds=DAY) == Uptime()
    assert minutes(Timeline(), until=100.0, count=2) == [(0.0, None), (60.0, None)]
    timeline = noted(noted(noted(Timeline(), 0.0, False), 60.0, None), 240.0, True)
    assert uptime(timeline, until=300.0, seconds=DAY) == Uptime(share=0.5, since=0.0)


def test_a_timeline_begins_with_what_the_store_knows() -> None:
    """A restart forgets nothing that the last change and the kept checks say; the time of the restart is not counted if it was long."""
    timelines = Timelines()
    timelines.note(ONE, health(HealthState.HEALTHY, since=WALL - 5000, checked=WALL - 30), WALL)
    timelines.learn(ONE, [Checked(True, WALL - 4990), Checked(False, WALL - 5010), Checked(False, WALL - 5100)])
    assert timelines.of(ONE).changes == ((WALL - 5100, False), (WALL - 5000, True))
    known = timelines.of(ONE)
    timelines.learn(ONE, [Checked(False, WALL - 4000)])
    timelines.learn(ServerId("stranger"), [Checked(False, WALL - 4000)])
    assert timelines.of(ONE) is known

    off = UNWATCHED_SECONDS + 60
    timelines.note(ServerId("two"), health(HealthState.HALF_OPEN, since=WALL - 9000, checked=WALL - off), WALL)
    timelines.note(ServerId("two"), health(HealthState.HALF_OPEN, since=WALL - 9000, checked=WALL - off), WALL + 1)
    assert timelines.of(ServerId("two")).changes[-1] == (WALL - off, None)
    timelines.note(ServerId("two"), health(HealthState.HEALTHY, since=WALL + 2, checked=WALL + 2), WALL + 2)
    assert timelines.of(ServerId("two")).changes[-1] == (WALL + 2, True)

    timelines.note(ServerId("new"), Health(), WALL)
    assert timelines.of(ServerId("new")) == Timeline()
    timelines.note(ServerId("odd"), health(HealthState.UNHEALTHY), WALL)
    assert timelines.of(ServerId("odd")).changes == ((WALL, False),)
    timelines.forget(ONE)
    assert timelines.of(ONE) == Timeline()
    assert with_checks(Timeline(), []) == Timeline()


def test_figures_end_at_the_last_check() -> None:
    """They do not change from second to second; those of a server that is not checked any more end now, in steps of 10 minutes."""
    timeline = Timeline(((WALL - 1000, True), (WALL - 100, False)))
    assert uptimes(timeline, WALL - 10, WALL) == uptimes(timeline, WALL - 10, WALL + 30)
    assert measured_until(timeline, WALL - 200, WALL) == WALL - 100
    assert measured_until(timeline, None, WALL + DAY) % 600 == 0
    measured = uptimes(timeline, WALL - 10, WALL)
    assert (measured.day_since, measured.week_since) == (WALL - 1000, WALL - 1000)
    whole = uptimes(Timeline(((WALL - 2 * WEEK, True),)), WALL, WALL)
    assert (whole.day_since, whole.week_since, whole.week.share) == (None, None, 1.0)
    assert uptimes(Timeline(), None, WALL).day_since is None


@given(st.lists(st.tuples(st.floats(0, 1e6), st.sampled_from([True, False, None]))), st.floats(0, 1e6))
def test_shares_stay_in_their_range(changes: list[tuple[float, bool | None]], until: float) -> None:
    """Whatever happened, a share is from 0 to 1, and minutes agree with it."""
    timeline = Timeline()
    for at, is_up in changes:
        timeline = noted(timeline, at, is_up)
    measured = uptime(timeline, until=until, seconds=DAY)
    assert measured.share is None or 0 <= measured.share <= 1
    states = [state for _, state in minutes(timeline, until=until, count=30)]
    if measured.share == 1.0:
        assert False not in states
    assert len(states) == 30


def test_1000_servers_fit_into_a_few_megabytes() -> None:
    """Each with 20 changes in the last days."""
    timelines = Timelines()
    tracemalloc.start()
    for number in range(1000):
        for step in range(20):
            state = HealthState.HEALTHY if step % 2 else HealthState.UNHEALTHY
            timelines.note(ServerId(str(number)), attrs.evolve(fresh(1, now=0.0, wall=WALL), state=state), WALL + 60.5 * step)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 4_000_000
