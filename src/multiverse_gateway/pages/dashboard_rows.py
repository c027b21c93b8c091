"""The rows of the dashboard, each made and rendered only when what it shows changes.

With 200 servers that are all down, several hundred checks end within two seconds. Most of them change nothing but the time of the last
check and the uptime, so these are put into HTML that was rendered before.
"""

from collections.abc import Sequence
from itertools import takewhile

import attrs

from multiverse_gateway.api.response_types import iso
from multiverse_gateway.core.routing import Route
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.timelines import MINUTE, Timeline, measured_until
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.pages import views
from multiverse_gateway.pages.charts import Bar, bar_of, tone_of
from multiverse_gateway.pages.live import MANY_ROWS
from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.states import reason_of, state_of
from multiverse_gateway.pages.words import percent
from multiverse_gateway.protocols import ProbeResult

COARSE_SECONDS = 5.0
"""In a long list the time of the last check is rounded down to this, which is what the pages' "10 s ago" shows of it."""
_CHECKED_AT, _UPTIME = "\0", "\1"
"""Stand in a rendered row for the time of the last check and the uptime."""


@attrs.frozen(eq=False)
class _MadeBar:
    """A bar, and what it was made of; `minute` is the last one that it shows."""

    timeline: Timeline
    minute: float
    checks: Sequence[ProbeResult]
    bar: Bar

    def still_holds(self, timeline: Timeline, minute: float, checks: Sequence[ProbeResult]) -> bool:
        """Return whether the bar is that of newer checks as well: they are of the same minute and tone as the newest one before."""
        if timeline is not self.timeline or minute != self.minute:
            return False
        if not self.checks or not checks:
            return not self.checks and not checks
        newest = self.checks[0]
        new = takewhile(lambda check: check is not newest, checks)
        return checks is self.checks or {(_minute(check), tone_of(check)) for check in new} <= {(_minute(newest), tone_of(newest))}


def _minute(check: ProbeResult) -> float:
    return check.checked_at // MINUTE


class DashboardRows:
    """What was made and rendered for the servers' rows last."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._gateway: Gateway = renderer.gateway
        self._bars: dict[ServerId, _MadeBar] = {}
        self._made: dict[tuple[ServerId, bool], tuple[tuple[object, ...], views.Row]] = {}
        self._html: dict[tuple[str, bool, str], tuple[views.Row, str]] = {}

    def rows(self, histories: dict[ServerId, Sequence[ProbeResult]], *, public: bool) -> list[views.Row]:
        """Return the rows of all servers; `histories` are their checks, newest first."""
        routes = self._gateway.table.routes
        for kept in (self._bars, self._made, self._html):
            if len(kept) > 4 * len(routes) + 100:
                kept.clear()
        return [self._row(route, histories.get(server_id, ()), public=public) for server_id, route in routes.items()]

    def _row(self, route: Route, checks: Sequence[ProbeResult], *, public: bool) -> views.Row:
        """Return the row of a server, the same object while nothing changed."""
        gateway, server_id = self._gateway, route.server.id
        why, state = None if public else reason_of(route.health, gateway.now()), state_of(route.health, gateway.now())
        timeline = gateway.health_book.timelines.of(server_id)
        until = measured_until(timeline, route.health.last_checked_at, gateway.wall())
        made_of = (route.server, route.health, checks, gateway.load.in_flight(server_id), why, state, timeline, until)
        before = self._made.get((server_id, public))
        if before is not None and all(old is new or old == new for old, new in zip(before[0], made_of, strict=True)):
            return before[1]
        row = views.row_of(gateway, route, checks, public=public, bar=self._bar(server_id, timeline, until, checks))
        if route.health.last_checked_at is not None and len(gateway.table.routes) > MANY_ROWS:
            row = attrs.evolve(row, checked_at=iso(COARSE_SECONDS * (route.health.last_checked_at // COARSE_SECONDS)))
        self._made[server_id, public] = (made_of, row)
        return row

    def _bar(self, server_id: ServerId, timeline: Timeline, until: float, checks: Sequence[ProbeResult]) -> Bar:
        made = self._bars.get(server_id)
        if made is None or not made.still_holds(timeline, until // MINUTE, checks):
            made = _MadeBar(timeline, until // MINUTE, checks, bar_of(timeline, checks, until=until))
        self._bars[server_id] = attrs.evolve(made, checks=checks)
        return made.bar

    def html(self, visit: Visit, row: views.Row) -> str:
        """Return the HTML of a row, rendered again only if more than its uptime and the time of its last check changed."""
        key = (row.id, visit.is_operator, str(visit.request.scope.get("root_path", "")))
        plain = attrs.evolve(row, checked_at=_CHECKED_AT if row.checked_at else None, uptime=None)
        cached = self._html.get(key)
        if cached is None or cached[0] != plain:
            cached = self._html[key] = (plain, self._renderer.render(visit, "_row.html", row=plain, uptime=_UPTIME))
        uptime = "\N{EN DASH}" if row.uptime is None else percent(row.uptime)
        return cached[1].replace(_CHECKED_AT, row.checked_at or "").replace(_UPTIME, uptime)
