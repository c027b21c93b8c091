"""The page about usage: who used which models on which days, as a table, a chart and CSV; and the summaries of it on other pages."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from urllib.parse import quote_plus, urlencode

import attrs
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.accounts import usage_summary
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.spreadsheets import Cell, csv_of
from multiverse_gateway.core.usage import NOBODY, OPERATOR, Counts, Usage
from multiverse_gateway.core.usage_reports import UsageSelection
from multiverse_gateway.core.usage_tables import (
    COUNTS,
    FILTERS,
    PARTS,
    SORTS,
    UsageBar,
    UsageRow,
    UsageView,
    bars_of,
    ceiling,
    in_address,
    most_used,
    rows_of,
    view_of,
)
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.sign_in import SignIn
from multiverse_gateway.pages.words import count
from multiverse_gateway.registration import refresh_if_possible

CHART_HEIGHT = 160
STEP = 10
"""Distance between the left edges of neighboring bars, in units of the drawing."""
GAP = 2
HEADS: Mapping[str, str] = {
    "requests": "Requests",
    "failed": "Failed",
    "canceled": "Canceled",
    "prompt_tokens": "Prompt tokens",
    "completion_tokens": "Completion tokens",
}
LEADS_TO: Mapping[str, str] = {"client": "model", "model": "client", "owner": "model", "day": "client"}
"""By what the rows are shown that the name of a row leads to."""
BYTE_ORDER_MARK = "\ufeff"
"""Tells spreadsheets that a file is in UTF-8."""


@attrs.frozen(kw_only=True)
class Piece:
    """A part of a bar: requests of one outcome. Lengths are in units of the drawing."""

    tone: str
    y: float
    height: float


@attrs.frozen(kw_only=True)
class ChartBar:
    """A bar of the chart: its left edge, its text, and its pieces from the bottom up."""

    x: int
    words: str
    pieces: tuple[Piece, ...]


@attrs.frozen(kw_only=True)
class UsageChart:
    """Requests per day or month, as an SVG image; days without any have no bar. `ticks` are the labels of its scale from the top down."""

    bars: tuple[ChartBar, ...]
    ticks: tuple[str, ...]
    begins: str
    ends: str
    title: str
    summary: str
    width: int
    height: int = CHART_HEIGHT


class UsagePage:
    """Usage by key, model, owner and day."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._gateway = renderer.gateway

    def routes(self, sign_in: SignIn) -> list[Route]:
        """Return the routes of this page."""
        return [
            Route("/usage", sign_in.operators(self._page), name="ui:usage"),
            Route("/usage/table.csv", sign_in.operators(self._csv), name="ui:usage_csv"),
        ]

    async def _page(self, visit: Visit) -> Response:
        await refresh_if_possible(self._gateway)
        view = view_of(visit.query, today=_today(self._gateway))
        rows, by_day, problem = await self._read(view)
        total = sum((usage.counts for usage in by_day), Counts())
        here = self._renderer.here(visit, "usage", view.pairs())
        response = self._renderer.page(
            visit,
            "usage.html",
            active="usage",
            status=200 if not problem else 503,
            view=view,
            problem=problem,
            rows=rows,
            total=total,
            top=most_used(rows) if view.by != "day" and len(rows) > 1 else [],
            chart=chart_of(bars_of(by_day, view)) if view.days > 1 and total.requests else None,
            heads=HEADS,
            part=PARTS[view.by],
            parts={by: (title, self._here(visit, view.shows(by))) for by, title in PARTS.items()},
            sorts={sort: (self._here(visit, view.sorted_by(sort)), _state(view, sort)) for sort in SORTS},
            link=self._links(visit, view),
            choices={name: self._choices(view, name) for name in ("client", "model", "owner")},
            without_server=self._here(visit, attrs.evolve(view, server=None)) if view.server is not None else None,
            is_filtered=any(getattr(view, name) is not None for name in FILTERS),
            log=self._renderer.here(visit, "logs", {"client": view.client}) if view.client else None,
            csv=self._renderer.here(visit, "usage_csv", view.pairs()),
            today=_today(self._gateway),
        )
        if visit.is_fragment:
            response.headers["hx-replace-url"] = here
        return response

    def _links(self, visit: Visit, view: UsageView) -> Callable[[UsageRow], str]:
        """Return a function that returns where the name of a row leads; all but the value is written once for all rows."""
        by, to = view.by, LEADS_TO[view.by]
        if by == "day":
            return lambda row: self._here(visit, view.shows(to, day=row.value))
        pairs = view.shows(to, **{by: ""}).pairs()
        del pairs[by]
        begin = f"{self._renderer.url(visit.request, 'usage')}?{urlencode([*pairs.items(), (by, '')])}"
        return lambda row: begin + quote_plus(in_address(row.value))

    def _here(self, visit: Visit, view: UsageView) -> str:
        return self._renderer.here(visit, "usage", view.pairs())

    async def _read(self, view: UsageView) -> tuple[list[UsageRow], Sequence[Usage], str]:
        """Return the rows of the table, the sums by day, and why they cannot be read."""
        try:
            by_day = (await usage_summary(self._gateway, view.selection("day"))).rows
            sums = by_day if view.by == "day" else (await usage_summary(self._gateway, view.selection(view.by))).rows
        except StorageUnavailable as error:
            return [], (), error.message
        names = client_names(self._gateway) if view.by == "client" else {}
        return rows_of(sums, view, lambda value: _name(view.by, value, names)), by_day, ""

    async def _csv(self, visit: Visit) -> Response:
        view = view_of(visit.query, today=_today(self._gateway))
        rows, _, problem = await self._read(view)
        if problem:
            raise StorageUnavailable(problem)
        head: list[Cell] = [view.by, *(["key_id"] if view.by == "client" else []), *COUNTS]
        head[0] = "key" if view.by == "client" else view.by
        table = [[row.name, *([row.value] if view.by == "client" else []), *(getattr(row.counts, name) for name in COUNTS)] for row in rows]
        name = f"usage-by-{head[0]}-{view.since}-{view.until}.csv"
        headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
        return Response(BYTE_ORDER_MARK + csv_of([head, *table]), headers=headers, media_type="text/csv")

    def _choices(self, view: UsageView, name: str) -> list[tuple[str, str]]:
        """Return the values that a filter offers, as the address writes them, with their names; the chosen one is among them."""
        gateway, chosen = self._gateway, getattr(view, name)
        names = client_names(gateway) if name == "client" else {}
        if name == "client":
            values = {*names, NOBODY}
        elif name == "model":
            values = {model.name for model in gateway.table.models.values()}
        else:
            values = {route.server.metadata.student_id or "" for route in gateway.table.routes.values()}
        if chosen is not None:
            values.add(chosen)
        shown = sorted(((_name(name, value, names), value) for value in values), key=lambda pair: (pair[1] == "", pair[0].casefold()))
        return [(in_address(value), words) for words, value in shown]


def client_names(gateway: Gateway) -> dict[str, str]:
    """Return the names of client keys by their ids, sorted by name."""
    return {key.id: key.name for key in sorted(gateway.registrations.keys.values(), key=lambda key: (key.name.casefold(), key.id))}


def _name(part: str, value: str, clients: Mapping[str, str]) -> str:
    """Return what a row or a choice is called."""
    if part == "owner":
        return value or "No owner"
    if part != "client":
        return value
    if value.startswith("setting:"):
        return f"Key in CLIENT_API_KEYS ({value.removeprefix('setting:')})"
    return {NOBODY: "No key", OPERATOR: "These pages (operator)"}.get(value) or clients.get(value, value)


def _today(gateway: Gateway) -> str:
    return datetime.fromtimestamp(gateway.wall(), UTC).date().isoformat()


def _state(view: UsageView, sort: str) -> str:
    return "none" if sort != view.sort else "descending" if view.is_descending else "ascending"


def chart_of(bars: Sequence[UsageBar]) -> UsageChart:
    """Return the chart of some days or months."""
    top = ceiling(max(bar.counts.requests for bar in bars))
    busiest = max(bars, key=lambda bar: bar.counts.requests)
    total = sum((bar.counts for bar in bars), Counts())
    unit = "day" if len(bars[0].label) == len("2026-05-01") else "month"
    return UsageChart(
        width=len(bars) * STEP - GAP,
        bars=tuple(_bar(bar, place, top) for place, bar in enumerate(bars) if bar.counts.requests),
        ticks=(f"{top:,}", "0"),
        begins=_date(bars[0].label),
        ends=_date(bars[-1].label),
        title=f"Requests per {unit}",
        summary=f"Requests per {unit}: {outcome(total)} from {_date(bars[0].label)} to {_date(bars[-1].label)}, "
        f"most on {_date(busiest.label)} ({busiest.counts.requests:,}). The table by day has the figures.",
    )


def _bar(bar: UsageBar, place: int, top: int) -> ChartBar:
    counts = bar.counts
    answered = max(0, counts.requests - counts.failed - counts.canceled)
    pieces, y = [], float(CHART_HEIGHT)
    for tone, requests in (("good", answered), ("idle", counts.canceled), ("bad", counts.failed)):
        if requests:
            height = max(1.0, CHART_HEIGHT * requests / top)
            y -= height
            pieces.append(Piece(tone=tone, y=round(y, 1), height=round(height, 1)))
    return ChartBar(x=STEP * place, words=f"{_date(bar.label)}: {outcome(counts)}", pieces=tuple(pieces))


def outcome(counts: Counts) -> str:
    """Return the requests of some counts in words, with those that failed or were canceled.

    >>> outcome(Counts(requests=3, canceled=1)), outcome(Counts(requests=1200))
    ('3 requests (1 canceled)', '1,200 requests')
    """
    others = [f"{number:,} {word}" for number, word in ((counts.failed, "failed"), (counts.canceled, "canceled")) if number]
    return count(counts.requests, "request") + (f" ({', '.join(others)})" if others else "")


def _date(label: str) -> str:
    """Write a day or a month.

    >>> _date("2026-05-01"), _date("2026-05")
    ('1 May 2026', 'May 2026')
    """
    parts = list(map(int, label.split("-")))
    month = date(parts[0], parts[1], 1).strftime("%b %Y")
    return f"{parts[2]} {month}" if len(parts) == 3 else month


@attrs.frozen(kw_only=True)
class UsageSummaryText:
    """The usage of the last 30 days and of today in words; `url` leads to the whole."""

    month: str
    tokens: str
    today: str
    url: str


async def usage_text(renderer: Renderer, visit: Visit, server: str | None = None) -> UsageSummaryText | None:
    """Return the usage of all servers, or of one, in words; `None` if it cannot be read."""
    gateway = renderer.gateway
    today = _today(gateway)
    view = attrs.evolve(view_of({}, today=today), server=server)
    try:
        days = (await usage_summary(gateway, UsageSelection(by=frozenset({"day"}), server=server))).rows
    except StorageUnavailable:
        return None
    total = sum((usage.counts for usage in days), Counts())
    last = next((usage.counts for usage in days if usage.key.day == today), Counts())
    return UsageSummaryText(
        month=outcome(total) if total.requests else "No requests yet",
        tokens=f"{total.prompt_tokens:,} prompt + {total.completion_tokens:,} completion tokens",
        today=outcome(last),
        url=renderer.here(visit, "usage", (view if server is None else view.shows("day")).pairs()),
    )
