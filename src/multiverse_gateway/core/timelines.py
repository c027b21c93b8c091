"""When servers were up and down: the changes of the last 7 days, kept in memory, and what share of a span of time a server was up.

1. A timeline follows a server's health status, so it also knows outages that requests found between two checks.
2. It begins with what the store knows: the last change of the status, and the checks before it. Time in which the gateway did not look
   at a server counts neither as up nor as down.
3. Figures end at the last check (`measured_until`): they change when a check ends or the status changes, not with every second.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

from attrs import define, field, frozen

from multiverse_gateway.core.health import Health
from multiverse_gateway.core.servers import ServerId

DAY = 86_400.0
WEEK = 7 * DAY
MINUTE = 60.0
MAX_CHANGES = 200
"""Changes kept of one server; a server that changed more often has a shorter timeline."""
UNWATCHED_SECONDS = 1800.0
"""Time since the last check from which on the gateway does not claim to know how a server was."""

Change = tuple[float, bool | None]
"""An instant in epoch seconds, and whether the server is up from then on; `None` if that is not known."""


class DatedCheck(Protocol):
    """A check, as far as it matters here."""

    @property
    def passed(self) -> bool:
        """Return whether the server answered well."""
        ...

    @property
    def checked_at(self) -> float:
        """Return the instant of the check, in epoch seconds."""
        ...


@frozen
class Timeline:
    """When a server changed between up, down and not known, oldest first; two changes in a row never say the same."""

    changes: tuple[Change, ...] = ()


@frozen(kw_only=True)
class Uptime:
    """The share of a span of time in which a server was up, from 0 to 1, and since when that is known.

    Time that is not known counts neither way; both are `None` if nothing is known.
    """

    share: float | None = None
    since: float | None = None


def noted(timeline: Timeline, at: float, is_up: bool | None) -> Timeline:
    """Return the timeline with a change; the same one if it changes nothing. What is older than 7 days is dropped.

    >>> noted(noted(Timeline(), 10.0, True), 20.0, True)
    Timeline(changes=((10.0, True),))
    """
    changes = timeline.changes
    if (changes[-1][1] if changes else None) is is_up:
        return timeline
    if changes:
        at = max(at, changes[-1][0])  # a clock may have jumped back
    ends = [*(begins for begins, _ in changes), at][1:]
    kept = (change for change, end in zip(changes, ends, strict=True) if end > at - WEEK)
    return Timeline((*kept, (at, is_up))[-MAX_CHANGES:])


def with_checks(timeline: Timeline, checks: Sequence[DatedCheck]) -> Timeline:
    """Return the timeline with what checks from before its beginning found; `checks` are sorted newest first.

    >>> from attrs import make_class
    >>> Found = make_class("Found", ["checked_at", "passed"])
    >>> with_checks(Timeline(((30.0, True),)), [Found(40.0, True), Found(20.0, False), Found(10.0, True)])
    Timeline(changes=((10.0, True), (20.0, False), (30.0, True)))
    """
    begins = timeline.changes[0][0] if timeline.changes else None
    if not checks or (begins is not None and checks[-1].checked_at >= begins):
        return timeline
    earlier = sorted((check.checked_at, check.passed) for check in checks if begins is None or check.checked_at < begins)
    changes: list[Change] = [next(group) for _, group in groupby([*earlier, *timeline.changes], key=lambda change: change[1])]
    return Timeline(tuple(changes[-MAX_CHANGES:]))


def spans(timeline: Timeline, since: float, until: float) -> Iterator[tuple[float, float, bool]]:
    """Yield when a server was up (true) or down between two instants, as beginnings and ends; unknown time is left out."""
    changes = timeline.changes
    ends = [*(change[0] for change in changes[1:]), until]
    for (begin, is_up), end in zip(changes, ends, strict=True) if changes else ():
        first, last = max(begin, since), min(end, until)
        if is_up is not None and first < last:
            yield first, last, is_up


def uptime(timeline: Timeline, *, until: float, seconds: float) -> Uptime:
    """Return the share of the last `seconds` before `until` in which a server was up.

    >>> uptime(Timeline(((0.0, True), (75.0, False))), until=100.0, seconds=50.0)
    Uptime(share=0.5, since=50.0)
    """
    known = list(spans(timeline, until - seconds, until))
    total = sum(end - begin for begin, end, _ in known)
    if not known or total <= 0:
        return Uptime()
    return Uptime(share=sum(end - begin for begin, end, is_up in known if is_up) / total, since=known[0][0])


def minutes(timeline: Timeline, *, until: float, count: int) -> list[tuple[float, bool | None]]:
    """Return the last minutes, that of `until` included, oldest first: when each begins, and whether the server was up in all of it.

    Time that is not known is left out of account, and a minute of nothing else is `None`.

    >>> minutes(Timeline(((30.0, True), (130.0, False))), until=150.0, count=4)
    [(-60.0, None), (0.0, True), (60.0, True), (120.0, False)]
    """
    first = until - until % MINUTE - (count - 1) * MINUTE
    states: list[bool | None] = [None] * count
    for begin, end, is_up in spans(timeline, first, until):
        for place in range(int((begin - first) // MINUTE), min(count, -int(-(end - first) // MINUTE))):
            states[place] = is_up and states[place] is not False
    return [(first + place * MINUTE, state) for place, state in enumerate(states)]


def measured_until(timeline: Timeline, last_checked_at: float | None, wall: float) -> float:
    """Return the instant at which the figures of a server end: its last check or change; or the present, if it is not checked any more.

    >>> measured_until(Timeline(((10.0, True),)), 70.0, 100.0), measured_until(Timeline(), None, 100_000.0)
    (70.0, 99600.0)
    """
    at = max(last_checked_at or 0.0, timeline.changes[-1][0] if timeline.changes else 0.0)
    return at if wall - at < UNWATCHED_SECONDS else wall - wall % 600.0


@frozen(kw_only=True)
class Uptimes:
    """The uptime of a server in the last 24 hours and the last 7 days, both ending at `until`, in epoch seconds."""

    day: Uptime
    week: Uptime
    until: float

    @property
    def day_since(self) -> float | None:
        """Return since when the uptime of the day is known if that is not the whole day, or else `None`."""
        return _late(self.day, self.until - DAY)

    @property
    def week_since(self) -> float | None:
        """Return since when the uptime of the week is known if that is not the whole week, or else `None`."""
        return _late(self.week, self.until - WEEK)


def _late(measured: Uptime, begins: float) -> float | None:
    return measured.since if measured.since is not None and measured.since > begins + MINUTE else None


def uptimes(timeline: Timeline, last_checked_at: float | None, wall: float) -> Uptimes:
    """Return both uptimes of a server; they change when a check ends or the status changes.

    >>> uptimes(Timeline(((0.0, True),)), 90.0, 100.0).day
    Uptime(share=1.0, since=0.0)
    """
    until = measured_until(timeline, last_checked_at, wall)
    return Uptimes(day=uptime(timeline, until=until, seconds=DAY), week=uptime(timeline, until=until, seconds=WEEK), until=until)


def begun(health: Health, wall: float) -> Timeline:
    """Return the timeline of a server that this process sees for the first time, from what is stored of its health."""
    is_up, since, checked_at = _is_up(health), health.last_transition_at, health.last_checked_at
    if is_up is None:
        return Timeline()
    timeline = Timeline(((min(wall, wall if since is None else since), is_up),))
    is_stale = checked_at is not None and wall - checked_at > UNWATCHED_SECONDS
    return noted(timeline, checked_at, None) if is_stale and checked_at is not None else timeline


def continued(timeline: Timeline, health: Health, wall: float) -> Timeline:
    """Return the timeline after something happened to a server; unknown time ends with the next check."""
    changes = timeline.changes
    is_unwatched = bool(changes) and changes[-1][1] is None and (health.last_checked_at or 0.0) <= changes[-1][0]
    return timeline if is_unwatched else noted(timeline, wall, _is_up(health))


def _is_up(health: Health) -> bool | None:
    return {"healthy": True, "unhealthy": False}.get(health.status)


@define(eq=False)
class Timelines:
    """The timelines of all servers that this process knows. With 1,000 servers that changed 20 times each they take about 2 MB."""

    _timelines: dict[ServerId, Timeline] = field(factory=dict)

    def of(self, server_id: ServerId) -> Timeline:
        """Return the timeline of a server; an empty one if the server is not known."""
        return self._timelines.get(server_id, Timeline())

    def note(self, server_id: ServerId, health: Health, wall: float) -> None:
        """Note how a server is at this instant."""
        timeline = self._timelines.get(server_id)
        self._timelines[server_id] = begun(health, wall) if timeline is None else continued(timeline, health, wall)

    def learn(self, server_id: ServerId, checks: Sequence[DatedCheck]) -> None:
        """Add what stored checks say about the time before the first change that is known; `checks` are sorted newest first."""
        timeline = self._timelines.get(server_id)
        if timeline is not None:
            self._timelines[server_id] = with_checks(timeline, checks)

    def forget(self, server_id: ServerId) -> None:
        """Drop the timeline of a server that left."""
        self._timelines.pop(server_id, None)
