"""The drawings of a server's recent checks."""

from __future__ import annotations

from typing import Any

import pytest

from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.pages.charts import bar_of, chart_of
from multiverse_gateway.pages.states import Tone
from multiverse_gateway.protocols import ProbeResult


def checks(*passed: bool, duration: float = 0.2, **facts: Any) -> list[ProbeResult]:
    """Return checks, the newest first."""
    return [
        ProbeResult(server_id=ServerId("s"), generation=1, passed=good, checked_at=1000.0 - number, duration=duration, **facts)
        for number, good in enumerate(passed)
    ]


def test_a_bar_ends_with_the_newest_check() -> None:
    """The newest check is the last mark, and a failed one is the tallest."""
    assert bar_of([]).summary == "No checks yet"
    bar = bar_of(checks(False, True, True))
    assert bar.summary == "Last 3 checks: 2 passed, 1 failed"
    assert [mark.tone for mark in bar.marks] == [Tone.GOOD, Tone.GOOD, Tone.BAD]
    assert bar.marks[-1].x + 5 == bar.width
    assert [(mark.y, mark.height) for mark in bar.marks] == [(3, 18), (3, 18), (0, 24)]
    slow = bar_of(checks(True, duration=1.5))
    assert (slow.marks[0].tone, slow.marks[0].message) == (Tone.WARN, "Slow, but well.")


@pytest.mark.parametrize(("duration", "top"), [(0.004, "10 ms"), (0.3, "500 ms"), (1.2, "2 s"), (90.0, "120 s")])
def test_a_chart_has_a_round_scale(duration: float, top: str) -> None:
    """The scale does not jump with every check."""
    chart = chart_of(checks(True, False, duration=duration))
    assert next(words for _, words in chart.ticks) == top
    assert chart.marks[0].height == chart.height
    assert chart.summary == "Response times of the last 2 checks, 1 of them failed."
