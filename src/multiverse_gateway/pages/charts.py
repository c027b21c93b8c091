"""The recent checks of a server as the pages draw them: the bar of a row, the chart of response times, the list of events."""

from collections.abc import Callable, Iterator, Sequence

import attrs

from multiverse_gateway.api.response_types import iso
from multiverse_gateway.core.routing import Route
from multiverse_gateway.pages.states import STATES, Tone, next_check_text
from multiverse_gateway.pages.words import count, sentence, span
from multiverse_gateway.protocols import ProbeResult

BAR_CHECKS = 30
CHART_CHECKS = 100
BAR_HEIGHT = 24
CHART_HEIGHT = 160
STEP = 7
"""Distance between the left edges of neighboring marks; all lengths are in units of the drawing."""
GAP = 2
SLOW_SECONDS = 1.0


@attrs.frozen(kw_only=True)
class Mark:
    """One check, as a bar or a chart draws it; `x` and `y` are those of its upper left corner."""

    x: int
    y: int
    height: int
    tone: Tone
    at: str
    milliseconds: int
    message: str


@attrs.frozen(kw_only=True)
class Bar:
    """The last checks of a server, oldest first."""

    marks: tuple[Mark, ...]
    summary: str
    places: int = BAR_CHECKS
    height: int = BAR_HEIGHT

    @property
    def width(self) -> int:
        """The width of the whole bar."""
        return self.places * STEP - GAP


@attrs.frozen(kw_only=True)
class Chart:
    """Response times of the last checks, oldest first; `ticks` are heights with their labels, from the top down."""

    marks: tuple[Mark, ...]
    ticks: tuple[tuple[int, str], ...]
    begins: str | None
    ends: str | None
    width: int = CHART_CHECKS * STEP
    height: int = CHART_HEIGHT
    summary: str = ""


def tone_of(check: ProbeResult) -> Tone:
    """Return how good a check was."""
    if not check.passed:
        return Tone.BAD
    return Tone.WARN if check.warning or check.duration >= SLOW_SECONDS else Tone.GOOD


def check_message(check: ProbeResult) -> str:
    """Return a sentence about what a check found."""
    return sentence(check.reason or check.warning or ("slow, but well" if check.duration >= SLOW_SECONDS else "well"))


def bar_of(checks: Sequence[ProbeResult]) -> Bar:
    """Return the bar of the newest checks; `checks` are sorted newest first."""
    shown = checks[:BAR_CHECKS]
    if not shown:
        return Bar(marks=(), summary="No checks yet")
    failed = _failed(shown)
    summary = f"Last {count(len(shown), 'check')}: {len(shown) - failed} passed, {failed} failed"
    return Bar(marks=_marks(shown, BAR_CHECKS, _place_in_bar), summary=summary)


def _place_in_bar(check: ProbeResult) -> tuple[int, int]:
    return (3, BAR_HEIGHT - 6) if check.passed else (0, BAR_HEIGHT)


def chart_of(checks: Sequence[ProbeResult]) -> Chart:
    """Return the chart of the newest checks; `checks` are sorted newest first."""
    shown = checks[:CHART_CHECKS]
    top = _ceiling(max((check.duration for check in shown if check.passed), default=0.1))

    def place(check: ProbeResult) -> tuple[int, int]:
        part = min(1.0, check.duration / top) if check.passed else 1.0
        height = max(4, round(CHART_HEIGHT * part))
        return CHART_HEIGHT - height, height

    return Chart(
        marks=_marks(shown, CHART_CHECKS, place),
        ticks=tuple((round(CHART_HEIGHT * (1 - part)), _milliseconds(top * part)) for part in (1.0, 0.5, 0.0)),
        begins=iso(shown[-1].checked_at) if shown else None,
        ends=iso(shown[0].checked_at) if shown else None,
        summary=f"Response times of the last {count(len(shown), 'check')}, {_failed(shown)} of them failed.",
    )


def _failed(checks: Sequence[ProbeResult]) -> int:
    return sum(not check.passed for check in checks)


def _marks(checks: Sequence[ProbeResult], places: int, place: Callable[[ProbeResult], tuple[int, int]]) -> tuple[Mark, ...]:
    """Return the marks of checks sorted newest first, the newest at the right edge; `place` returns `y` and the height of one."""
    marks = []
    for number, check in enumerate(reversed(checks), start=places - len(checks)):
        y, height = place(check)
        marks.append(
            Mark(
                x=STEP * number,
                y=y,
                height=height,
                tone=tone_of(check),
                at=iso(check.checked_at),
                milliseconds=round(1000 * check.duration),
                message=check_message(check),
            )
        )
    return tuple(marks)


def _ceiling(seconds: float) -> float:
    """Return the next round number, so that the scale does not jump with every check."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60):
        if seconds <= step:
            return step
    return 120.0


def _milliseconds(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 or seconds == 0 else f"{1000 * seconds:g} ms"


# Events


@attrs.frozen(kw_only=True)
class Event:
    """Something that happened to a server, as a title and a sentence."""

    at: str
    tone: Tone
    title: str
    message: str


def events_of(route: Route, checks: Sequence[ProbeResult], *, now: float = 0.0, limit: int = 20) -> list[Event]:
    """Return what happened to a server, newest first: when it went down and why, when it came back and after how long.

    `checks` are sorted newest first; `now` is the monotonic clock that says when the next check is due.
    """
    server, health = route.server, route.health
    events = [_event(server.registered_at, Tone.IDLE, "Registered", f"As {server.model_name}.")]
    for outage in _outages(checks[::-1]):
        events += _story(outage, route, now)
    moved, newest = health.last_transition_at, checks[0].checked_at if checks else 0.0
    if moved is not None and moved > newest + 0.5:
        state = STATES[health.state]
        events.append(_event(moved, state.tone, f"Marked {state.word.lower()}", sentence(health.reason or state.meaning)))
    return sorted(events, key=lambda event: event.at, reverse=True)[:limit]


@attrs.frozen
class _Outage:
    """Failed checks in a row, oldest first, and the check that passed after them, if there is one."""

    failed: tuple[ProbeResult, ...]
    end: ProbeResult | None


def _outages(checks: Sequence[ProbeResult]) -> Iterator[_Outage]:
    """Yield the outages in checks that are sorted oldest first."""
    failed: list[ProbeResult] = []
    for check in checks:
        if not check.passed:
            failed.append(check)
        elif failed:
            yield _Outage(tuple(failed), check)
            failed = []
    if failed:
        yield _Outage(tuple(failed), None)


def _story(outage: _Outage, route: Route, now: float) -> Iterator[Event]:
    """Yield the events of one outage: its beginning, each new reason, its end."""
    first, reason = outage.failed[0], None
    for check in outage.failed:
        if check.reason != reason:
            message = check_message(check)
            if outage.end is None and check is _last_new(outage.failed):
                message += f" {count(len(outage.failed), 'check')} failed so far; the next one {next_check_text(route.health, now)}."
            yield _event(check.checked_at, Tone.BAD, "Marked down" if check is first else "Still down", message)
        reason = check.reason
    if outage.end is not None:
        lasted = span(outage.end.checked_at - first.checked_at)
        message = f"It answers again after {lasted}; {count(len(outage.failed), 'check')} had failed."
        yield _event(outage.end.checked_at, Tone.GOOD, "Came back", message)


def _last_new(failed: Sequence[ProbeResult]) -> ProbeResult:
    """Return the first check of an outage with the reason that its last check has."""
    place = len(failed) - 1
    while place and failed[place - 1].reason == failed[place].reason:
        place -= 1
    return failed[place]


def _event(at: float, tone: Tone, title: str, message: str) -> Event:
    return Event(at=iso(at), tone=tone, title=title, message=message)
