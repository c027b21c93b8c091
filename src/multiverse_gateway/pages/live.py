"""Live pages: what changes on the pages that a browser shows travels in one stream of server-sent events.

1. A page that changes by itself has a *topic*: a name and a query, such as `dashboard?q=lab`. A browser asks for all topics that its
   visible tabs show in one request, because over HTTP/1.1 it opens only six connections to a host.
2. A page is described by `Parts`. The page and each event carry the digest of the parts that they lead to, so a browser that connects
   again gets what changed since, or everything if these parts are forgotten.
3. All streams share the parts and the differences between them: thirty viewers of one page cost the rendering of one.
4. Only what differs is sent: fragments as HTML that HTMX puts into place, rows of a table cell by cell.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import anyio
import attrs
from starlette.responses import StreamingResponse

TICK_SECONDS = 1.0
COMMENT_SECONDS = 15.0
MAX_STREAMS = 200
MAX_TOPICS = 32
MANY_ROWS = 50
"""A table with more rows is updated on every second tick only."""
VERSIONS = 64
"""Parts that are remembered, of all pages together."""


@attrs.frozen(kw_only=True, eq=False)
class Parts:
    """What of a page can change: `fragments` by the id of their element, `rows` too, in order, inside the element `container`.

    `shape` tells pages of different make apart: when it changes, the page has to be read again.
    """

    shape: str = ""
    fragments: Mapping[str, str] = attrs.field(factory=dict)
    container: str = ""
    rows: Mapping[str, str] = attrs.field(factory=dict)

    @cached_property
    def digest(self) -> str:
        """What stands for this shape and content, so that nothing is sent twice or missed."""
        content = hashlib.sha256()
        for name, html in (*self.fragments.items(), *self.rows.items()):
            content.update(f"{name}\0{html}\0".encode())
        return f"{self._mark}{content.hexdigest()[:16]}"

    @property
    def _mark(self) -> str:
        return f"{hashlib.sha256(self.shape.encode()).hexdigest()[:16]}-"

    def fits(self, seen: str) -> bool:
        """Return whether a page with this digest, or one that shows nothing, can be updated without reading it again."""
        return not seen or seen.startswith(self._mark)


@attrs.frozen
class LiveEvent:
    """A server-sent event; `seen` is what the page shows once it has the event, empty for an event of no page."""

    name: str
    data: str
    seen: str = ""

    def encode(self, number: int | None = None) -> bytes:
        """Return the event as bytes, marked as one of the topic with this number."""
        lines = "".join(f"data: {line}\n" for line in self.data.splitlines() or [""])
        mark = "" if number is None else f"id: {number} {self.seen}\n"
        return f"event: {self.name}\n{mark}{lines}\n".encode()


# Differences


def out_of_band(name: str, html: str) -> str:
    """Make a fragment take the place of the element that has its id; a table's row must be wrapped to survive parsing."""
    marked = html.strip().replace(f'id="{name}"', f'id="{name}" hx-swap-oob="true"', 1)
    return f"<template>{marked}</template>"


def on_top(container: str, html: str) -> str:
    """Put rows on top of the body of a table."""
    return f'<template><tbody id="{container}" hx-swap-oob="afterbegin">{html}</tbody></template>'


_CELL = re.compile(r"(?=<t[dh][\s>])")


def cells_of(row: str) -> list[str]:
    """Split the HTML of a table's row into its opening tag and its cells.

    >>> cells_of('<tr id="a"><td>1</td> <td>2</td></tr>')
    ['<tr id="a">', '<td>1</td>', '<td>2</td>']
    """
    return [piece.strip() for piece in _CELL.split(row.strip().removesuffix("</tr>"))]


_OPENING = re.compile(r"<t[dh][^>]*>")


def _new_content(was: str, now: str) -> str | None:
    """Return what is inside a cell if only that changed, or the whole cell, or `None` if nothing changed."""
    if was == now:
        return None
    opening = _OPENING.match(now)
    if opening is None or not was.startswith(opening[0]):
        return now
    return now[opening.end() :].removesuffix("</td>").removesuffix("</th>")


def row_changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    """Return what makes the rows of a table those of `after`: new rows, cells by their place in a row, and the order if it changed.

    Of a cell the content is sent, or all of it if its attributes changed: that begins with `<td` or `<th`.
    """
    rows: dict[str, str] = {}
    cells: dict[str, dict[int, str]] = {}
    for name, html in after.items():
        old = before.get(name)
        if old == html:
            continue
        was, now = cells_of(old or ""), cells_of(html)
        if len(was) == len(now) and was[0] == now[0]:
            contents = enumerate(map(_new_content, was[1:], now[1:]))
            cells[name] = {place: content for place, content in contents if content is not None}
        else:
            rows[name] = html.strip()
    order = [] if list(before) == list(after) else list(after)
    found: dict[str, Any] = {"order": order, "rows": rows, "cells": cells}
    return {name: value for name, value in found.items() if value}


def events_between(before: Parts | None, after: Parts) -> list[LiveEvent]:
    """Return the events that make a page of `before` one of `after`; without `before` everything is sent."""
    earlier: Mapping[str, str] = {} if before is None else before.fragments
    html = "".join(out_of_band(name, html) for name, html in after.fragments.items() if earlier.get(name) != html)
    events = [LiveEvent("update", html, after.digest)] if html else []
    rows = row_changes({} if before is None else before.rows, after.rows)
    if rows:
        events.append(LiveEvent("rows", json.dumps({"into": after.container, **rows}, ensure_ascii=False), after.digest))
    return events


@attrs.define(eq=False)
class Versions:
    """The parts that pages showed a short time ago, and the differences between them, each computed once for all streams."""

    _parts: OrderedDict[str, Parts] = attrs.field(factory=OrderedDict, init=False)
    _events: OrderedDict[tuple[str, str], list[LiveEvent]] = attrs.field(factory=OrderedDict, init=False)

    def remember(self, parts: Parts) -> str:
        """Keep parts for streams that begin or continue with them, and return their digest."""
        self._parts[parts.digest] = parts
        self._parts.move_to_end(parts.digest)
        if len(self._parts) > VERSIONS:
            self._parts.popitem(last=False)
        return parts.digest

    def events(self, seen: str, parts: Parts) -> list[LiveEvent]:
        """Return the events that make a page with the digest `seen` one of `parts`."""
        key = (seen, parts.digest)
        if key not in self._events:
            before = self._parts.get(seen)
            self._events[key] = events_between(before, parts) if parts.fits(seen) else [LiveEvent("reload", "now", parts.digest)]
            if len(self._events) > VERSIONS:
                self._events.popitem(last=False)
        return self._events[key]


# Topics


class Followed(Protocol):
    """A topic as one stream follows it."""

    @property
    def ticks(self) -> int:
        """After how many ticks it is read again."""
        ...

    async def news(self) -> Sequence[LiveEvent]:
        """Return what happened since the last call, or since what the page shows."""
        ...


@attrs.define(eq=False)
class FollowedParts:
    """A page of parts; `seen` is the digest of those that the browser shows."""

    read: Callable[[], Awaitable[Parts]]
    versions: Versions
    seen: str
    ticks: int = attrs.field(default=1, init=False)
    _shown: Parts | None = attrs.field(default=None, init=False)

    async def news(self) -> Sequence[LiveEvent]:
        """Return what changed on the page."""
        parts = await self.read()
        if parts is self._shown:
            return ()
        self._shown = parts
        self.ticks = 2 if len(parts.rows) > MANY_ROWS else 1
        before, self.seen = self.seen, self.versions.remember(parts)
        return () if before == self.seen else self.versions.events(before, parts)


@attrs.define(eq=False)
class FollowedLines:
    """Numbered lines that come on top of the element `container`; `last` is the number of the newest that the browser shows."""

    read: Callable[[int], Sequence[tuple[int, str]]]
    last: int
    container: str
    ticks: int = attrs.field(default=1, init=False)

    async def news(self) -> Sequence[LiveEvent]:
        """Return the new lines, newest first."""
        lines = self.read(self.last)
        if not lines:
            return ()
        self.last = max(number for number, _ in lines)
        return (LiveEvent("update", on_top(self.container, "".join(html for _, html in lines)), str(self.last)),)


@attrs.define(eq=False)
class FollowedState:
    """The state of all servers in a few words, which every page shows in its head, its title and its icon."""

    read: Callable[[], str]
    ticks: int = attrs.field(default=1, init=False)
    _told: str = attrs.field(default="", init=False)

    async def news(self) -> Sequence[LiveEvent]:
        """Return the state if it changed."""
        state = self.read()
        if state == self._told:
            return ()
        self._told = state
        return (LiveEvent("state", state),)


@attrs.define(eq=False)
class RefusedTopic:
    """A topic that the browser may not see, at least not any more."""

    ticks: int = attrs.field(default=1, init=False)
    _is_told: bool = attrs.field(default=False, init=False)

    async def news(self) -> Sequence[LiveEvent]:
        """Return that the page needs a sign-in, once."""
        if self._is_told:
            return ()
        self._is_told = True
        return (LiveEvent("out", "sign in"),)


async def follow(state: Followed, topics: Sequence[Followed], lasts: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Send the news of all topics, by their numbers, and the state, until `lasts` says no."""
    yield b": open\n\n"
    quiet, tick = 0.0, 0
    due = [0] * len(topics)
    while lasts():
        pieces = [event.encode() for event in await state.news()]
        for number, topic in enumerate(topics):
            if tick >= due[number]:
                pieces += [event.encode(number) for event in await topic.news()]
                due[number] = tick + topic.ticks
        if not pieces and quiet >= COMMENT_SECONDS:
            pieces = [b": still here\n\n"]
        if pieces:
            quiet = 0.0
            yield b"".join(pieces)
        await anyio.sleep(TICK_SECONDS)
        quiet += TICK_SECONDS
        tick += 1


@attrs.define(eq=False)
class Streams:
    """The open streams of a process, counted."""

    open: int = 0

    @property
    def are_full(self) -> bool:
        """Return whether one more would be too many; pages ask from time to time then."""
        return self.open >= MAX_STREAMS

    def response(self, events: AsyncIterator[bytes]) -> StreamingResponse:
        """Return a response that streams server-sent events."""
        return StreamingResponse(self._counted(events), media_type="text/event-stream", headers=_HEADERS)

    async def _counted(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self.open += 1
        try:
            async for piece in events:
                yield piece
        finally:
            self.open -= 1


_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
