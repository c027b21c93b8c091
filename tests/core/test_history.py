"""Figures about the last checks."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.history import overall, statistics


@attrs.frozen
class Checked:
    passed: bool
    checked_at: float
    duration: float = 0.5


def test_nothing_is_claimed_without_checks() -> None:
    figures = statistics([], wall=10.0)
    assert (figures.checks, figures.success_rate, figures.mean_response_time, figures.uptime_percentage) == (0, None, None, None)


def test_uptime_weighs_each_verdict_by_its_time() -> None:
    """Up for 90 s of 100 s is 90 %, in however many checks, whatever their order."""
    checks = [Checked(False, 90.0), Checked(True, 60.0), Checked(True, 0.0, 1.5)]
    figures = statistics(checks, wall=100.0)
    assert figures.uptime_percentage == 90.0
    assert figures.success_rate == pytest.approx(2 / 3, abs=1e-3)
    assert figures.mean_response_time == 1.0


def test_failed_checks_have_no_response_time() -> None:
    figures = statistics([Checked(False, 1.0, 10.0)], wall=1.0)
    assert figures.mean_response_time is None
    assert figures.uptime_percentage == 0.0


@given(st.lists(st.builds(Checked, st.booleans(), st.floats(0, 1e9), st.floats(0, 100)), min_size=1), st.floats(0, 1e9))
def test_figures_stay_in_their_ranges(checks: list[Checked], wall: float) -> None:
    """Even where clocks jump back."""
    figures = statistics(checks, wall=wall)
    assert figures.success_rate is not None
    assert figures.uptime_percentage is not None
    assert 0 <= figures.success_rate <= 1
    assert 0 <= figures.uptime_percentage <= 100
    assert (figures.uptime_percentage == 100) or not all(check.passed for check in checks)


@pytest.mark.parametrize(
    ("statuses", "word"),
    [([], "empty"), (["healthy"], "healthy"), (["healthy", "unknown"], "degraded"), (["unhealthy", "unknown"], "unhealthy")],
)
def test_one_word_for_all(statuses: list[str], word: str) -> None:
    assert overall(statuses) == word
