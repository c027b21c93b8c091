"""The recent history of a server as the pages draw it: the bar of a row, the chart of response times, the list of events.

Bars and charts have one mark per minute, so equal lengths are equal times, however often a server was checked.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import attrs

from multiverse_gateway.api.response_types import iso
from multiverse_gateway.core.routing import Route
from multiverse_gateway.core.timelines import MINUTE, Timeline, minutes
from multiverse_gateway.pages.states import STATES, Tone, next_check_text
from multiverse_gateway.pages.words import count, sentence, span
from multiverse_gateway.protocols import ProbeResult

BAR_MINUTES = 30
CHART_MINUTES = 60
CHART_CHECKS = 100
"""Checks that are read of each server: all that the store keeps."""
BAR_HEIGHT = 24
CHART_HEIGHT = 160
STEP = 7
"""Distance between the left edges of neighboring marks; all lengths are in units of the drawing."""
GAP = 2
SLOW_SECONDS = 1.0
LETTERS: Mapping[Tone, str] = {Tone.GOOD: "g", Tone.WARN: "w", Tone.BAD: "b", Tone.IDLE: "i"}
"""How a bar names the tone of a minute for the scripts that show it."""


@attrs.frozen(kw_only=True)
class Minute:
    """One minute of a server: when it begins, how the server was, and the checks that ended in it, newest first."""

    begins: float
    tone: Tone
    checks: tuple[ProbeResult, ...] = ()


@attrs.frozen(kw_only=True)
class Bar:
    """The last minutes of a server, oldest first.

    `paths` are lines by tone, which the style sheet cuts into minutes; `tones` has one letter per minute. `begins` is the first minute's
    beginning.
    """

    paths: tuple[tuple[Tone, str], ...]
    tones: str
    begins: str
    summary: str
    height: int = BAR_HEIGHT

    @property
    def width(self) -> int:
        """The width of the whole bar."""
        return len(self.tones) * STEP - GAP


@attrs.frozen(kw_only=True)
class Mark:
    """One minute of a chart; `x` and `y` are those of its upper left corner."""

    x: int
    y: int
    height: int
    tone: Tone
    at: str
    milliseconds: int
    message: str


@attrs.frozen(kw_only=True)
class Chart:
    """The slowest response of each minute, oldest first; `ticks` are heights with their labels, from the top down."""

    marks: tuple[Mark, ...]
    ticks: tuple[tuple[int, str], ...]
    begins: str
    ends: str
    width: int = CHART_MINUTES * STEP
    height: int = CHART_HEIGHT
    summary: str = ""


def tone_of(check: ProbeResult) -> Tone:
    """Return how good a check was."""
    if not check.passed:
        return Tone.BAD
    return Tone.WARN if check.warning or check.duration >= SLOW_SECONDS else Tone.GOOD


def check_message(check: ProbeResult) -> str:
    """Return a sentence about what a check found."""
    return sentence(check.reason or check.warning or ("OK, but slow" if check.duration >= SLOW_SECONDS else "OK"))


def minutes_of(timeline: Timeline, checks: Sequence[ProbeResult], *, until: float, places: int) -> tuple[Minute, ...]:
    """Return the last minutes before `until`, oldest first, each as bad as the worst that is known of it; `checks` are newest first."""
    by_minute: dict[float, list[ProbeResult]] = {}
    for check in checks:
        by_minute.setdefault(check.checked_at // MINUTE, []).append(check)
    known = minutes(timeline, until=until, count=places)
    return tuple(_minute(begins, is_up, by_minute.get(begins // MINUTE, ())) for begins, is_up in known)


def _minute(begins: float, is_up: bool | None, checks: Sequence[ProbeResult]) -> Minute:
    tones = {tone_of(check) for check in checks}
    if is_up is not None:
        tones.add(Tone.GOOD if is_up else Tone.BAD)
    worst = next((tone for tone in (Tone.BAD, Tone.WARN, Tone.GOOD) if tone in tones), Tone.IDLE)
    return Minute(begins=begins, tone=worst, checks=tuple(checks))


def bar_of(timeline: Timeline, checks: Sequence[ProbeResult], *, until: float) -> Bar:
    """Return the bar of the last 30 minutes before `until`; `checks` are sorted newest first."""
    shown = minutes_of(timeline, checks, until=until, places=BAR_MINUTES)
    lines: dict[Tone, list[str]] = {}
    x = 0
    for tone, run in groupby(minute.tone for minute in shown):
        places = len(list(run))
        lines.setdefault(tone, []).append(f"M{x} {BAR_HEIGHT // 2}h{places * STEP - GAP}")
        x += places * STEP
    return Bar(
        paths=tuple((tone, "".join(pieces)) for tone, pieces in lines.items()),
        tones="".join(LETTERS[minute.tone] for minute in shown),
        begins=iso(shown[0].begins),
        summary=_summary(shown),
    )


def _summary(shown: Sequence[Minute]) -> str:
    tones = [minute.tone for minute in shown]
    bad, idle = tones.count(Tone.BAD), tones.count(Tone.IDLE)
    if idle == len(tones):
        return "No checks yet"
    facts = [f"down in {count(bad, 'minute')}" if bad else "up"]
    if tones.count(Tone.WARN):
        facts.append(f"slow or with a warning in {count(tones.count(Tone.WARN), 'minute')}")
    if idle:
        facts.append(f"not known in {count(idle, 'minute')}")
    return f"Last {count(len(tones), 'minute')}: {', '.join(facts)}"


def chart_of(timeline: Timeline, checks: Sequence[ProbeResult], *, until: float) -> Chart:
    """Return the chart of the last hour before `until`; `checks` are sorted newest first."""
    shown = minutes_of(timeline, checks, until=until, places=CHART_MINUTES)
    top = _ceiling(max((check.duration for minute in shown for check in minute.checks if check.passed), default=0.1))
    failed = sum(minute.tone is Tone.BAD for minute in shown)
    return Chart(
        marks=tuple(_mark(minute, place, top) for place, minute in enumerate(shown) if minute.checks or minute.tone is Tone.BAD),
        ticks=tuple((round(CHART_HEIGHT * (1 - part)), _milliseconds(top * part)) for part in (1.0, 0.5, 0.0)),
        begins=iso(shown[0].begins),
        ends=iso(shown[-1].begins + MINUTE),
        summary=f"Response times of the last {count(CHART_MINUTES, 'minute')}; the server was down in {failed} of them.",
    )


def _mark(minute: Minute, place: int, top: float) -> Mark:
    """Return the mark of a minute: its slowest response, in full height if the server was down."""
    worst = max(minute.checks, key=lambda check: (not check.passed, check.duration), default=None)
    seconds = 0.0 if worst is None else worst.duration
    part = 1.0 if minute.tone is Tone.BAD else min(1.0, seconds / top)
    height = max(4, round(CHART_HEIGHT * part))
    return Mark(
        x=STEP * place,
        y=CHART_HEIGHT - height,
        height=height,
        tone=minute.tone,
        at=iso(minute.begins if worst is None else worst.checked_at),
        milliseconds=round(1000 * seconds),
        message="Down." if worst is None or (worst.passed and minute.tone is Tone.BAD) else check_message(worst),
    )


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
        message = f"Answers again after {lasted}; {count(len(outage.failed), 'check')} had failed."
        yield _event(outage.end.checked_at, Tone.GOOD, "Back up", message)


def _last_new(failed: Sequence[ProbeResult]) -> ProbeResult:
    """Return the first check of an outage with the reason that its last check has."""
    place = len(failed) - 1
    while place and failed[place - 1].reason == failed[place].reason:
        place -= 1
    return failed[place]


def _event(at: float, tone: Tone, title: str, message: str) -> Event:
    return Event(at=iso(at), tone=tone, title=title, message=message)
