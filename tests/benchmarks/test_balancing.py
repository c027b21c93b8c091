"""The simulator's own arithmetic, and what it says of the balancers."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import attrs
import pytest
from benchmarks.balancing.__main__ import DESKTOP, MIXED, SCENARIOS
from benchmarks.balancing.hosts import Host, Job, Kind, Mood
from benchmarks.balancing.simulation import Outcome, simulate
from benchmarks.clock import Clock

KIND = Kind(first=1.0, token=0.1, slots=2, contention=0.5)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of simulated requests are no news."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Stage:
    """A host whose jobs write down what happens to them, and when."""

    def __init__(self, kind: Kind) -> None:
        self.clock = Clock()
        self.host = Host(kind, random.Random(1), lambda: self.clock.now, self.clock.later)
        self.said: list[tuple[float, str]] = []

    def ask(self, name: str, *, tokens: int = 10, fails: bool = False) -> Job:
        def note(what: str) -> None:
            self.said.append((round(self.clock.now, 6), f"{name} {what}"))

        job = Job(
            tokens=tokens,
            effort=1.0,
            fails=fails,
            began=lambda: note("began"),
            ended=lambda: note("ended"),
            broke=lambda reached: note("was cut" if reached else "found nobody"),
            refused=lambda: note("was refused"),
        )
        self.host.take(job)
        return job

    def run(self, until: float = 1e9) -> None:
        self.clock.later(until, lambda: None)
        self.clock.run(lambda: self.clock.now >= until)


def test_time_goes_on_in_order() -> None:
    """Events happen at their instant; of two at the same one, the first that was asked for."""
    clock, seen = Clock(), []
    for seconds, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        clock.later(seconds, lambda name=name: seen.append((clock.now, name)))  # type: ignore[misc]
    clock.run(lambda: False)
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c")]


def test_a_request_takes_its_time_and_a_crowd_takes_longer() -> None:
    """Alone: 1 s to the first token and 10 times 0.1 s. The second one at work is slower by half."""
    stage = Stage(KIND)
    stage.ask("one")
    stage.ask("two")
    stage.run()
    assert stage.said == [(1.0, "one began"), (1.5, "two began"), (2.0, "one ended"), (3.0, "two ended")]


def test_who_finds_all_slots_taken_waits() -> None:
    """The third one begins when the first one has ended, and the oracle knows that beforehand."""
    stage = Stage(KIND)
    for name in ("one", "two"):
        stage.ask(name)
    assert stage.host.wait() == pytest.approx(2.0 + 1.5)
    stage.ask("three")
    assert stage.host.wait() == pytest.approx(3.0 + 1.5)
    stage.run()
    assert (3.5, "three began") in stage.said


def test_who_leaves_makes_room() -> None:
    """A client that leaves frees its slot at once; nothing is told to it any more."""
    stage = Stage(KIND)
    jobs = [stage.ask(name) for name in ("one", "two", "three", "four")]
    stage.host.drop(jobs[3])
    stage.host.drop(jobs[0])
    stage.run()
    assert stage.said == [(1.5, "two began"), (1.5, "three began"), (3.0, "two ended"), (3.0, "three ended")]


def test_failing_hosts_fail() -> None:
    """A 500 comes at once; a host that is down refuses, and cuts off what ran on it."""
    stage = Stage(attrs.evolve(KIND, mood=Mood.DOWN, well_for=1e-9, ill_for=1e9))
    stage.ask("early")
    stage.ask("failing", fails=True)
    stage.run(1.0)
    stage.ask("late")
    stage.run(2.0)
    assert [what for _, what in stage.said] == ["early was cut", "failing was refused", "late found nobody"]
    assert stage.host.wait() == float("inf")


def test_throughput_is_what_a_full_host_does() -> None:
    """Two at a time, each of which takes (1 + 10 * 0.1) * 1.5 s; less what fails and what the moods take."""
    assert KIND.throughput(10) == pytest.approx(2 / 3)
    assert attrs.evolve(KIND, failing=0.25).throughput(10) == pytest.approx(0.5)
    assert attrs.evolve(KIND, mood=Mood.DOWN, well_for=30, ill_for=10).throughput(10) == pytest.approx(0.5)
    assert attrs.evolve(KIND, mood=Mood.SLOW, well_for=30, ill_for=10, slower=5).throughput(10) == pytest.approx(2 / 3 * 0.8)


def test_percentiles_are_of_those_who_had_an_answer() -> None:
    outcome = Outcome(asked=10, firsts=tuple(float(number) for number in range(1, 9)), good=6)
    assert (outcome.percentile(0.5), outcome.percentile(0.95), outcome.goodput) == (4.0, 8.0, 0.6)
    assert Outcome(asked=1, firsts=(), good=0).percentile(0.5) == float("inf")


def test_a_seed_decides_everything() -> None:
    """The same seed, the same outcome to the last digit; another one, another."""
    runs = [simulate(SCENARIOS["bursty"], balancer="two_choices", busy=0.5, requests=150, seed=seed, gateways=2) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_one_request_alone_sees_the_host_itself() -> None:
    """Nothing is added by the gateway: first tokens arrive after the time that the host needs, with random variation."""
    outcome = simulate([attrs.evolve(DESKTOP, slots=100, contention=0.0)], balancer="round_robin", busy=0.01, requests=200)
    assert outcome.goodput == 1.0
    assert outcome.tries == 1.0
    assert outcome.percentile(0.5) == pytest.approx(DESKTOP.first, rel=0.1)


def test_least_busy_is_near_the_oracle_where_hosts_differ() -> None:
    """And round robin is not: what the page on balancing says."""
    good = {name: simulate(MIXED, balancer=name, busy=0.5, requests=1500).goodput for name in ("round_robin", "least_busy", "oracle")}
    assert good["oracle"] == 1.0
    assert good["least_busy"] > 0.95
    assert good["round_robin"] < 0.6


def test_a_host_that_fails_fast_draws_no_traffic() -> None:
    """Half of its requests fail in 5 ms, while the others are busy: few are sent there first (by running requests alone: 1.13 tries)."""
    outcome = simulate([*(DESKTOP,) * 3, attrs.evolve(DESKTOP, failing=0.5)], balancer="least_busy", busy=0.6, requests=1000)
    assert outcome.goodput > 0.97
    assert outcome.tries < 1.06
