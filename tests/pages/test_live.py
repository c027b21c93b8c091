"""Live pages: what a stream sends, what it costs, and who may follow what."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, cast

import anyio
import attrs
import pytest
from starlette.applications import Starlette
from starlette.requests import Request

from multiverse_gateway import registration
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.entry.access import AccessRules
from multiverse_gateway.observability.tail import Tail
from multiverse_gateway.pages import dashboard, live, views
from multiverse_gateway.pages.first_steps import FirstSteps
from multiverse_gateway.pages.live import FollowedLines, FollowedParts, LiveEvent, Parts, Versions, events_between, follow, row_changes
from multiverse_gateway.pages.recent_checks import RecentChecks
from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.sessions import Sessions
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.testing.store import make_server
from support.gateways import Stage, stage
from support.pages import Browser, browsing


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ticks follow each other at once."""
    monkeypatch.setattr(live, "TICK_SECONDS", 0)


def row(name: str, *cells: str, kind: str = "") -> str:
    return f'<tr id="{name}"{kind}>\n  {"".join(f"<td>{cell}</td> " for cell in cells)}\n</tr>\n'


BEFORE = Parts(
    fragments={"a": '<p id="a">1</p>', "b": '<p id="b">1</p>'},
    container="rows",
    rows={"r1": row("r1", "up", "1 ms"), "r2": row("r2", "up", "2 ms")},
)
OTHER_KIND = row("r2", "up", "2 ms", kind=" class=x")


def with_row(**rows: str) -> Parts:
    return attrs.evolve(BEFORE, rows={**BEFORE.rows, **rows})


def test_only_fragments_that_changed_are_sent() -> None:
    after = attrs.evolve(BEFORE, fragments={**BEFORE.fragments, "b": '<p id="b">2</p>'})
    assert events_between(BEFORE, BEFORE) == []
    (event,) = events_between(BEFORE, after)
    assert event == LiveEvent("update", '<template><p id="b" hx-swap-oob="true">2</p></template>', after.digest)
    assert BEFORE.digest != after.digest


def test_only_cells_that_changed_are_sent() -> None:
    (event,) = events_between(BEFORE, with_row(r2=row("r2", "up", "9 ms")))
    assert event.name == "rows"
    assert json.loads(event.data) == {"into": "rows", "cells": {"r2": {"1": "9 ms"}}}


def test_a_cell_with_other_attributes_is_sent_whole() -> None:
    warned = BEFORE.rows["r2"].replace("<td>2 ms", '<td class="slow">2 ms')
    assert row_changes(BEFORE.rows, {**BEFORE.rows, "r2": warned}) == {"cells": {"r2": {1: '<td class="slow">2 ms</td>'}}}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"r2": row("r2", "up", "2 ms"), "r1": row("r1", "up", "1 ms")}, {"order": ["r2", "r1"]}),
        ({"r1": row("r1", "up", "1 ms")}, {"order": ["r1"]}),
        ({**BEFORE.rows, "r3": row("r3", "x")}, {"order": ["r1", "r2", "r3"], "rows": {"r3": row("r3", "x").strip()}}),
        ({**BEFORE.rows, "r2": row("r2", "up")}, {"rows": {"r2": row("r2", "up").strip()}}),
        (
            {**BEFORE.rows, "r2": row("r2", "up", "2 ms", kind=" class=x")},
            {"rows": {"r2": row("r2", "up", "2 ms", kind=" class=x").strip()}},
        ),
    ],
    ids=["moved", "removed", "new", "another number of cells", "another kind of row"],
)
def test_rows_are_sent_whole_only_when_they_must_be(rows: Mapping[str, str], expected: Mapping[str, Any]) -> None:
    assert row_changes(BEFORE.rows, rows) == expected


def test_a_page_of_which_nothing_is_known_gets_everything() -> None:
    update, rows = events_between(None, BEFORE)
    assert update.data.count("<template>") == 2
    assert set(json.loads(rows.data)["rows"]) == {"r1", "r2"}


def test_differences_are_computed_once_for_all_streams() -> None:
    """What is forgotten is sent whole."""
    versions = Versions()
    seen = versions.remember(BEFORE)
    after = with_row(r2=row("r2", "up", "9 ms"))
    versions.remember(after)
    assert versions.events(seen, after) is versions.events(seen, after)
    assert [event.name for event in versions.events(seen, after)] == ["rows"]
    for number in range(2 * live.VERSIONS):
        versions.events(versions.remember(with_row(r2=row("r2", "up", f"{number} s"))), after)
    assert [event.name for event in versions.events(seen, after)] == ["update", "rows"]


async def sent(events: AsyncIterator[bytes]) -> list[bytes]:
    """Return the events of a stream, without comments."""
    pieces = [piece async for piece in events]
    return [event + b"\n\n" for piece in pieces for event in piece.split(b"\n\n") if event and not event.startswith(b":")]


class Silent:
    """A state that never changes."""

    ticks = 1

    async def news(self) -> Sequence[LiveEvent]:
        return ()


@pytest.mark.usefixtures("no_wait")
async def test_a_page_follows_until_its_session_ends() -> None:
    """What it shows already is not sent again; another shape asks for the page again."""
    shown = [
        Parts(shape="empty"),
        Parts(shape="servers", fragments={"a": '<p id="a">1</p>'}),
        Parts(shape="servers", fragments={"a": '<p id="a">2</p>\n'}),
    ]
    left = iter(shown)

    async def read() -> Parts:
        return next(left)

    lasting = iter([True, True, True, False])
    followed = FollowedParts(read, Versions(), shown[0].digest)
    assert await sent(follow(Silent(), [Silent(), followed], lambda: next(lasting))) == [
        f"event: reload\nid: 1 {shown[1].digest}\ndata: now\n\n".encode(),
        f'event: update\nid: 1 {shown[2].digest}\ndata: <template><p id="a" hx-swap-oob="true">2</p></template>\n\n'.encode(),
    ]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (Parts(shape="one|two", fragments={"a": '<p id="a">1</p>'}), []),
        (Parts(shape="one|two", fragments={"a": '<p id="a">2</p>'}), ["update"]),
        (Parts(shape="one", fragments={"a": '<p id="a">1</p>'}), ["reload"]),
        (Parts(shape="gone"), ["reload"]),
    ],
    ids=["same", "other content", "other make", "gone"],
)
async def test_a_page_that_comes_back_is_read_again_when_it_is_of_another_make(parts: Parts, expected: list[str]) -> None:
    """A connection broke and meanwhile a model or a server came or went: pieces would land at the wrong places."""
    before = Parts(shape="one|two", fragments={"a": '<p id="a">1</p>'})

    async def read() -> Parts:
        return parts

    followed = FollowedParts(read, Versions(), before.digest)
    assert [event.name for event in await followed.news()] == expected
    assert await followed.news() == ()


@pytest.mark.usefixtures("no_wait")
async def test_a_long_table_is_read_on_every_second_tick() -> None:
    """A short one on each; a stream that is quiet for long sends a comment."""
    reads = []

    async def read() -> Parts:
        reads.append("read")
        return Parts(rows={str(number): row(str(number), "x") for number in range(live.MANY_ROWS + 1)})

    lasting = iter([*[True] * 6, False])
    await sent(follow(Silent(), [FollowedParts(read, Versions(), "")], lambda: next(lasting)))
    assert len(reads) == 3


async def test_a_quiet_stream_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that neither the browser nor a proxy gives it up."""
    monkeypatch.setattr(live, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(live, "COMMENT_SECONDS", 0.002)
    lasting = iter([*[True] * 6, False])
    pieces = [piece async for piece in follow(Silent(), [], lambda: next(lasting))]
    assert pieces.count(b": still here\n\n") >= 1


async def test_new_lines_go_on_top() -> None:
    """Each once."""
    lines = {1: "<tr>1</tr>", 2: "<tr>2</tr>"}
    followed = FollowedLines(lambda last: [(number, html) for number, html in lines.items() if number > last], 1, "log-rows")
    (event,) = await followed.news()
    assert (event.seen, '<tbody id="log-rows" hx-swap-oob="afterbegin"><tr>2</tr></tbody>' in event.data) == ("2", True)
    assert await followed.news() == ()


async def test_live_pages_share_what_is_seen_in_a_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many follow: the rows are made once, and the registry is left to the monitor. A page that is opened looks itself."""
    monkeypatch.setattr(live, "TICK_SECONDS", 3600)
    made: list[str] = []
    read = anyio.Semaphore(0)
    row_of, chosen, refresh_if_possible = views.row_of, views.chosen, registration.refresh_if_possible
    parts = dashboard.Dashboard._dashboard_parts

    def making(*values: Any, **more: Any) -> views.Row:
        made.append("row")
        return row_of(*values, **more)

    def choosing(*values: Any) -> list[views.Row]:
        made.append("chosen")
        return chosen(*values)

    def reading(*values: Any) -> Parts:
        read.release()
        return parts(*values)

    async def refreshing(*values: Any) -> None:
        made.append("refreshed")
        await refresh_if_possible(*values)

    monkeypatch.setattr(views, "row_of", making)
    monkeypatch.setattr(views, "chosen", choosing)
    monkeypatch.setattr(dashboard.Dashboard, "_dashboard_parts", reading)
    monkeypatch.setattr(dashboard, "refresh_if_possible", refreshing)
    async with browsing() as browser:
        await browser.register()
        await browser.sign_in()
        for _ in range(2):
            await browser.open("/dashboard")
            await read.acquire()
        assert made == ["refreshed", "row", "chosen", "refreshed", "chosen"]
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(browser.open, "/live?of=dashboard")
            for _ in range(3):
                await read.acquire()
            group.cancel_scope.cancel()
        assert made == ["refreshed", "row", "chosen", "refreshed", "chosen"]


class ThreeReads:
    """The tail of the log, which closes the gateway when it is read for the third time; each reading asks for what is new."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._tail = browser.parts.recent_logs._tail
        self.asked: list[int | None] = []

    def select(self, **wanted: Any) -> list[dict[str, object]]:
        self.asked.append(wanted["after"])
        assert self._tail is not None
        found: list[dict[str, object]] = self._tail.select(**wanted)
        if len(self.asked) == 1:
            logging.getLogger("multiverse_gateway.ui").info("something new")
        self._browser.parts.gateway.admission.is_closed = len(self.asked) == 3
        return found


@pytest.mark.usefixtures("no_wait")
async def test_the_live_log_reads_only_what_is_new() -> None:
    """Of the same filter, each line once."""
    async with browsing() as browser:
        await browser.sign_in()
        seen = re.search(r'data-topic="logs\?" data-seen="(\d+)"', (await browser.open("/logs")).text)
        assert seen
        tail = ThreeReads(browser)
        browser.parts.recent_logs.follow(cast(Tail, tail))
        lines = (await browser.open(f"/live?of=logs%3Fseen%3D{seen[1]}")).text
        assert lines.count("something new") == 1
        first, second, third = tail.asked
        assert first == second == int(seen[1])
        assert third is not None
        assert third > int(seen[1])


@pytest.mark.usefixtures("no_wait")
async def test_a_visitor_follows_what_visitors_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other topics of the same browser, such as those of a tab that was signed in once, are refused without ending the stream."""
    lasting = iter([True, True, False])
    monkeypatch.setattr(Renderer, "lasts", lambda *_: lambda: next(lasting))
    async with browsing(public_dashboard=True) as browser:
        await browser.register(metadata={"student_id": "ada"})
        text = (await browser.open("/live?of=logs%3F&of=dashboard&of=nonesuch&of=server%3Fid%3Dx")).text
        assert re.findall(r"event: (\w+)\nid: (\d)", text) == [("out", "0"), ("update", "1"), ("rows", "1"), ("out", "2"), ("out", "3")]
        assert "ada" not in text
        (state,) = re.findall(r"event: state\ndata: (.*)", text)
        assert json.loads(state)["tone"] == "good"


async def test_the_state_of_hidden_tabs_is_asked_for() -> None:
    async with browsing() as browser:
        await browser.register()
        assert (await browser.open("/live/state", hx_request="true")).status_code == 401
        await browser.sign_in()
        state = (await browser.open("/live/state")).json()
        assert (state["tone"], state["title"], 'id="counts"' in state["counts"]) == ("good", "", True)


class Minute:
    """A minute of 200 servers, one check of each as often as `every` says, with what viewers of the dashboard get meanwhile."""

    def __init__(self, here: Stage, app: Starlette, *, every: float, is_down: bool) -> None:
        self._clock = here.clock
        self._every = every
        self._is_down = is_down
        self._gateway = here.gateway
        self._numbers: list[tuple[int, ServerId]] = []
        renderer = Renderer(self._gateway, Sessions(self._gateway), cast(AccessRules, None))
        self._dashboard = dashboard.Dashboard(renderer, RecentChecks(self._gateway), cast(FirstSteps, None))

        request = Request({"type": "http", "method": "GET", "path": "/live", "headers": [], "query_string": b"", "app": app})
        self._visit = Visit(request, is_operator=True, topic={"all": "1"})

    def viewer(self) -> FollowedParts:
        """Return the dashboard with all its rows as another viewer follows it."""
        return cast(FollowedParts, self._dashboard.topics()["dashboard"](self._visit))

    async def furnish(self, servers: int = 200) -> None:
        """Register the servers and let all of them have an outage."""
        store, wall = self._gateway.store, self._gateway.wall()
        for number in range(servers):
            server = make_server(
                f"00000000-0000-4000-8000-{number:012d}", endpoint_url=f"http://lab-{number}.example", model_name=f"model-{number % 61}:7b"
            )
            await store.save_server(attrs.evolve(server, generation=1, registered_at=wall - 1000))
            self._numbers.append((number, server.id))
        await self._gateway.refresh()
        for passed in (True, True, False, not self._is_down):
            self._clock.advance(7200)
            for number, _ in self._numbers:
                self._check(number, passed=passed)

    def _check(self, number: int, *, passed: bool) -> None:
        result = ProbeResult(
            server_id=self._numbers[number][1],
            generation=1,
            passed=passed,
            checked_at=self._gateway.wall(),
            duration=0.01 + (number * 7 + self._gateway.wall()) % 50 / 1000,
            reason=None if passed else "connection refused: is the server running?",
        )
        self._gateway.checks.note_result(result)

    async def run(self, followed: Sequence[FollowedParts], seconds: int = 60) -> list[int]:
        """Let time pass, and return how many bytes each viewer got."""
        sizes = [0] * len(followed)
        for second in range(seconds):
            self._clock.advance(1)
            for number, _ in self._numbers:
                if (second + number) % self._every == 0:
                    self._check(number, passed=not self._is_down)
            if second % 2 == 0:
                self._dashboard._snapshots.clear()
                for place, topic in enumerate(followed):
                    sizes[place] += sum(len(event.encode(0)) for event in await topic.news())
        return sizes


@pytest.mark.parametrize(("every", "is_down"), [(60, False), (3, True)], ids=["healthy after an outage", "all down"])
async def test_a_common_outage_of_200_servers_costs_a_viewer_less_than_20_kb_a_second(
    monkeypatch: pytest.MonkeyPatch, every: float, is_down: bool
) -> None:
    """Finding 5: it was 1.4 MB. Other viewers share the rendering, and most checks render nothing."""
    monkeypatch.setattr(live, "TICK_SECONDS", 3600)  # viewers share a snapshot until the next moment begins
    rendered: list[str] = []
    render = Renderer.render

    def counting(self: Renderer, visit: Visit, template: str, **values: Any) -> str:
        rendered.append(template)
        return render(self, visit, template, **values)

    async with browsing() as browser, stage() as here:
        minute = Minute(here, browser.parts.app, every=every, is_down=is_down)
        await minute.furnish()
        first = minute.viewer()
        await minute.run([first], seconds=20)
        monkeypatch.setattr(Renderer, "render", counting)
        (alone,) = await minute.run([first])
        assert 1000 < alone < 60 * 20_000 / 2
        assert rendered.count("_row.html") <= 2 * 200, "once for its check, once for the minute of its bar"
        others = [minute.viewer() for _ in range(4)]
        for viewer in others:
            await viewer.news()
        rendered.clear()
        sizes = await minute.run([first, *others], seconds=20)
        assert max(sizes) < 20 * 20_000 / 2
        assert rendered.count("_row.html") <= 2 * 200
