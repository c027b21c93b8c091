"""The drawings of a server's recent history."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.timelines import Timeline
from multiverse_gateway.pages.charts import BAR_MINUTES, bar_of, chart_of
from multiverse_gateway.pages.states import Tone
from multiverse_gateway.protocols import ProbeResult

UNTIL = 600_030.0
UP = Timeline(((UNTIL - 3000, True),))


def checks(*passed: bool, duration: float = 0.2, every: float = 60.0, **facts: Any) -> list[ProbeResult]:
    """Return checks, the newest first."""
    return [
        ProbeResult(server_id=ServerId("s"), generation=1, passed=good, checked_at=UNTIL - every * number, duration=duration, **facts)
        for number, good in enumerate(passed)
    ]


def test_a_bar_has_a_mark_per_minute() -> None:
    """Many checks in a short outage take no more room than it lasted."""
    assert bar_of(Timeline(), [], until=UNTIL).summary == "No checks yet"
    outage = Timeline(((UNTIL - 3000, True), (UNTIL - 200, False), (UNTIL - 120, True)))
    found = [attrs.evolve(check, checked_at=check.checked_at - 123) for check in checks(*[False] * 25, every=3.0)]
    bar = bar_of(outage, [*checks(True), *found], until=UNTIL)
    assert bar_of(UP, [], until=UNTIL).tones == "g" * BAR_MINUTES
    assert bar.tones[-5:] == "gbbgg"
    assert bar.summary == "Last 30 minutes: down in 2 minutes"
    assert bar.width == 30 * 7 - 2


def test_a_bar_of_equal_minutes_is_one_line() -> None:
    """Minutes of one tone share a path; runs of another tone begin where these end."""
    assert bar_of(UP, [], until=UNTIL).paths == ((Tone.GOOD, "M0 12h208"),)
    bar = bar_of(Timeline(((UNTIL - 600, True), (UNTIL - 61, False))), checks(duration=1.5), until=UNTIL)
    assert [tone for tone, _ in bar.paths] == [Tone.IDLE, Tone.GOOD, Tone.BAD]
    assert bar.summary == "Last 30 minutes: down in 2 minutes, not known in 19 minutes"
    slow = bar_of(UP, checks(True, duration=1.5), until=UNTIL)
    assert (slow.tones[-1], slow.summary) == ("w", "Last 30 minutes: up, slow or with a warning in 1 minute")
    assert slow.paths == ((Tone.GOOD, "M0 12h201"), (Tone.WARN, "M203 12h5"))


@pytest.mark.parametrize(("duration", "top"), [(0.004, "10 ms"), (0.3, "500 ms"), (1.2, "2 s"), (90.0, "120 s")])
def test_a_chart_has_a_round_scale(duration: float, top: str) -> None:
    """The scale does not jump with every check."""
    chart = chart_of(UP, checks(True, False, duration=duration), until=UNTIL)
    assert next(words for _, words in chart.ticks) == top
    assert chart.marks[0].height == chart.height
    assert chart.summary == "Response times of the last 60 minutes; the server was down in 1 of them."


def test_a_minute_shows_its_worst_check() -> None:
    """A failed check hides the good ones of the same minute; an outage that requests found has a mark without a check."""
    found = [*checks(True, True, every=5.0), *checks(False, every=1.0, reason="it is off")]
    (mark,) = chart_of(UP, found, until=UNTIL).marks
    assert (mark.tone, mark.message) == (Tone.BAD, "It is off.")
    (mark,) = chart_of(Timeline(((UNTIL - 10, False),)), [], until=UNTIL).marks
    assert (mark.tone, mark.message, mark.milliseconds) == (Tone.BAD, "Down.", 0)
