"""What the benchmark of the fair queue says, on a short run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import attrs
import pytest
from benchmarks.balancing.fairness import (
    FAIR,
    FLOOD,
    GREEDY,
    OLD,
    SHARES,
    SLOTS,
    Habit,
    Person,
    Rules,
    largest_gap,
    light,
    percentile,
    prices,
    run,
)

from multiverse_gateway.core.fairness import jain


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of simulated requests are no news."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@attrs.frozen
class Figures:
    """What became of the people's requests, and of the slots: parts, and seconds."""

    refused: float
    wait: float
    longest: float
    """The longest answer of any client."""
    busy: float
    """How busy the slots were while any request waited."""


def measure(rules: Rules, script: Habit | None, *, minutes: float) -> Figures:
    """Let a class use a model, beside a script or not."""
    gateway, clients = run(rules, light(20) | ({"script": script} if script else {}), seed=1, minutes=minutes)
    people = [client for client in clients if client.name != "script"]
    waits = [wait for person in people for wait in person.waits]
    refused = sum(person.refused for person in people)
    return Figures(
        refused / (refused + len(waits)),
        percentile(waits, 0.95),
        max(client.longest for client in clients),
        gateway.used_while_waiting / gateway.waiting_seconds / SLOTS,
    )


def test_a_script_locks_a_class_out_of_a_first_come_queue() -> None:
    """Nearly all of the people's requests are refused by the old queue."""
    assert measure(OLD, FLOOD, minutes=2).refused > 0.9


def test_a_script_costs_people_no_more_than_one_long_answer() -> None:
    """The fair queue refuses none of their requests, and p95 of their waits is at most one answer longer than without the script."""
    alone, beside = measure(SHARES, None, minutes=6), measure(SHARES, FLOOD, minutes=6)
    assert (alone.refused, beside.refused) == (0.0, 0.0)
    assert alone.wait < beside.wait <= alone.wait + beside.longest


def test_slots_are_busy_while_requests_wait() -> None:
    """Fair order leaves no slot free; what one client may hold at most costs a few percent."""
    assert measure(FAIR, FLOOD, minutes=2).busy == pytest.approx(1.0)
    assert measure(SHARES, FLOOD, minutes=6).busy >= 0.95


@pytest.mark.parametrize("has_shares", [False, True])
def test_greedy_clients_get_equal_shares(has_shares: bool) -> None:
    """Six clients with requests of very different sizes are served alike, up to what runs; afterward the books agree."""
    gateway, people = run(Rules(timeout=1e5, shares=has_shares), GREEDY, seed=1, minutes=15)
    assert jain(person.served for person in people) >= 0.99
    assert 0 < largest_gap(people) < 2 * 4 * 16_000
    queue = gateway.room.queue
    assert queue.counts("model").running == gateway.load.total == 4
    assert queue.waiting("model") + 4 == gateway.room.at_once.total
    assert sum(habit.loops for habit in GREEDY.values()) - gateway.room.at_once.total <= 1, "one may be about to send its next request"


def test_every_price_has_a_name() -> None:
    """The prices are measured, not judged."""
    assert all(math.isfinite(price) and name for name, price in prices())


def test_the_gap_is_that_of_the_worst_interval() -> None:
    """A client that catches up has not made the interval before it fair."""
    people = [Person(name, light(1)["person 0"], None, None) for name in "ab"]  # type: ignore[arg-type]
    people[0].totals = [(1.0, 10.0), (2.0, 20.0)]
    people[1].totals = [(3.0, 20.0), (4.0, 50.0)]
    assert largest_gap(people) == 50.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
