"""The tables of the page on failure say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from multiverse_gateway.core.failover import FailedAttempt, Failure, FailureClass, GiveUp, Retry, RetryPolicy, after_failure, final_error
from multiverse_gateway.core.health import (
    AttemptFailed,
    AttemptPassed,
    Health,
    HealthEvent,
    HealthPolicy,
    HealthState,
    ProbeFailed,
    ProbePassed,
    advance,
)
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.relay.ports import Phase

PAGE = (Path(__file__).parents[2] / "docs" / "explanation" / "failure.md").read_text(encoding="utf-8")


def table(first: str) -> list[list[str]]:
    """Return the rows of the table whose first column is called so."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    (start,) = [number for number, row in enumerate(rows) if row[0] == first]
    found = []
    for row in rows[start + 2 :]:
        if len(row) != len(rows[start]):
            break
        found.append(row)
    return found


CLASSES = {row[0]: row for row in table("class")}
EVENTS: list[HealthEvent] = [
    ProbePassed(1),
    ProbeFailed(1, "no answer"),
    AttemptPassed(1),
    AttemptFailed(1, "one", 1, Failure(FailureClass.CONNECT, "refused"), "/v1/chat/completions"),
]


def test_every_class_is_there() -> None:
    """A to L."""
    assert list(CLASSES) == [kind.value for kind in FailureClass]


@pytest.mark.parametrize("kind", FailureClass)
def test_the_page_says_who_is_retried_and_what_is_seen(kind: FailureClass) -> None:
    """Each class: another server or not, at once or not, and status and code of the last word."""
    row = CLASSES[kind.value]
    statuses = [429, 503, 529] if kind is FailureClass.BUSY else [500]
    for status in statuses:
        attempts = [FailedAttempt(ServerId("a"), Failure(kind, "a reason", status=status, body=b"{}"))]

        def decide(remaining: float = 60.0, attempts: list[FailedAttempt] = attempts) -> Retry | GiveUp:
            return after_failure(
                attempts, others=1, policy=RetryPolicy(), remaining=remaining, stateful=False, budget_left=True, random=0.5
            )

        verdict = decide()
        assert isinstance(verdict, Retry) == row[2].startswith("yes")
        assert (isinstance(verdict, Retry) and verdict.delay == 0) == ("at once" in row[2])
        assert isinstance(decide(4.0), GiveUp) == (row[2] == "no" or "5 s" in row[2])
        last = final_error(attempts)
        if last.error is None:
            assert row[4] == "its answer, unchanged"
        else:
            assert f"{last.error.status} `{last.error.code}`" in row[4]


@pytest.mark.parametrize("row", table("state"), ids=lambda row: row[0])
def test_the_page_says_how_a_server_changes(row: list[str]) -> None:
    """Each state, after each of four events."""
    state = HealthState(row[0].strip("`"))
    for event, cell in zip(EVENTS, row[2:], strict=True):
        after = advance(Health(state=state), event, HealthPolicy(), now=100.0, wall=100.0, random=0.5)
        assert f"`{after.state.value}`" == cell, event


def test_every_state_and_phase_is_there() -> None:
    """And no other."""
    assert [row[0] for row in table("state")] == [f"`{state.value}`" for state in HealthState]
    assert [row[0] for row in table("phase")] == [f"`{phase.value}`" for phase in Phase]


def test_the_figures_are_the_defaults() -> None:
    """Three failed probes, three strikes, a quarter of the share."""
    policy = HealthPolicy()
    assert (policy.max_consecutive_failures, policy.strikes, policy.slow_start, policy.strike_memory) == (3, 3, 30.0, 30.0)
    assert (policy.resting_default, policy.longest_default, policy.resting_cap) == (1.0, 10.0, 60.0)
    assert (policy.pair_rest, policy.unsupported_for, policy.doubt, policy.longest_doubt) == (60.0, 600.0, 30.0, 300.0)
    assert RetryPolicy().max_retries == 2
    assert re.search(r"250 ms", PAGE)
