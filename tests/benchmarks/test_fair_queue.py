"""What the benchmark of the fair queue says, on a short run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from benchmarks.balancing.fairness import FLOOD, GREEDY, OLD, SHARES, Person, Rules, largest_gap, light, percentile, prices, run

from multiverse_gateway.core.fairness import jain


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of simulated requests are no news."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def people_beside_a_script(rules: Rules) -> tuple[float, float]:
    """Return the part of the people's requests that was refused, and their p95 wait."""
    _, people = run(rules, light(20) | {"script": FLOOD}, seed=1, minutes=3)
    waits = [wait for person in people if person.name != "script" for wait in person.waits]
    refused = sum(person.refused for person in people if person.name != "script")
    return refused / (refused + len(waits)), percentile(waits, 0.95)


def test_a_script_locks_a_class_out_of_a_first_come_queue_only() -> None:
    """Most of the people's requests are refused by the old queue; the fair one refuses none, and they wait for less than a minute."""
    refused, _ = people_beside_a_script(OLD)
    assert refused > 0.9
    refused, wait = people_beside_a_script(SHARES)
    assert refused == 0.0
    assert wait < 30.0


def test_greedy_clients_get_equal_shares() -> None:
    """Six clients with requests of very different sizes are served alike, up to what runs; afterwards the books agree."""
    gateway, people = run(Rules(timeout=1e5), GREEDY, seed=1, minutes=30)
    assert jain(person.served for person in people) > 0.98
    assert 0 < largest_gap(people) < 2 * 4 * 16_000
    queue = gateway.room.queue
    assert queue.crowd("model").running == gateway.load.total == 4
    assert queue.waiting("model") + 4 == gateway.at_once.total == sum(habit.loops for habit in GREEDY.values())


def test_every_price_has_a_name() -> None:
    """The prices are measured, not judged."""
    assert all(price > 0 and name for name, price in prices())


def test_the_gap_is_that_of_the_worst_interval() -> None:
    """A client that catches up has not made the interval before it fair."""
    people = [Person(name, light(1)["person 0"], None, None) for name in "ab"]  # type: ignore[arg-type]
    people[0].totals = [(1.0, 10.0), (2.0, 20.0)]
    people[1].totals = [(3.0, 20.0), (4.0, 50.0)]
    assert largest_gap(people) == 50.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
