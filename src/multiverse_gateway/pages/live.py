"""Pages that follow what happens: server-sent events with those fragments of a page that changed."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import anyio
import attrs
from starlette.responses import StreamingResponse

TICK_SECONDS = 1.0
COMMENT_SECONDS = 15.0
MAX_STREAMS = 200


@attrs.frozen(kw_only=True)
class Parts:
    """What of a page can change: `fragments` by the id of their element, `rows` too, in order, inside the element `container`.

    `shape` tells pages of different make apart: when it changes, the page has to be read again.
    """

    shape: str = ""
    fragments: Mapping[str, str] = attrs.field(factory=dict)
    container: str = ""
    rows: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def digest(self) -> str:
        """What stands for this shape and content in the URL of the stream, so that nothing is sent twice or missed."""
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


def out_of_band(name: str, html: str) -> str:
    """Make a fragment take the place of the element that has its id; a table's row must be wrapped to survive parsing."""
    marked = html.strip().replace(f'id="{name}"', f'id="{name}" hx-swap-oob="true"', 1)
    return f"<template>{marked}</template>"


def into(container: str, html: str, how: str = "innerHTML") -> str:
    """Put rows into the body of a table."""
    return f'<template><tbody id="{container}" hx-swap-oob="{how}">{html}</tbody></template>'


def changes(before: Parts | None, after: Parts) -> str:
    """Return the HTML that makes a page of `before` one of `after`; without `before` everything is sent."""
    earlier: Mapping[str, str] = {} if before is None else before.fragments
    pieces = [out_of_band(name, html) for name, html in after.fragments.items() if earlier.get(name) != html]
    if before is None or list(before.rows) != list(after.rows):
        if after.container:
            pieces.append(into(after.container, "".join(after.rows.values())))
    else:
        pieces += [out_of_band(name, html) for name, html in after.rows.items() if before.rows[name] != html]
    return "".join(pieces)


def event(name: str, data: str) -> bytes:
    """Return one server-sent event as bytes."""
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"event: {name}\n{lines}\n".encode()


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


async def follow(read: Callable[[], Awaitable[Parts]], lasts: Callable[[], bool], seen: str) -> AsyncIterator[bytes]:
    """Send what changes until `lasts` says no; `seen` is the digest of what the page shows already."""
    yield b"retry: 2000\n\n"
    shown: Parts | None = None
    quiet = 0.0
    while lasts():
        parts = await read()
        data = ""
        if not (parts.fits(seen) if shown is None else parts.shape == shown.shape):
            yield event("reload", "now")
        elif shown is not None or parts.digest != seen:
            data = changes(shown, parts)
        shown = parts
        if data:
            quiet = 0.0
            yield event("update", data)
        elif quiet >= COMMENT_SECONDS:
            quiet = 0.0
            yield b": still here\n\n"
        await anyio.sleep(TICK_SECONDS)
        quiet += TICK_SECONDS


async def follow_lines(
    read: Callable[[int], Sequence[tuple[int, str]]], lasts: Callable[[], bool], last: int, container: str
) -> AsyncIterator[bytes]:
    """Send new lines, each with its number, to the top of an element; those after number `last`, oldest first."""
    yield b"retry: 2000\n\n"
    quiet = 0.0
    while lasts():
        lines = read(last)
        if lines:
            last = max(number for number, _ in lines)
            quiet = 0.0
            yield event("update", into(container, "".join(html for _, html in lines), "afterbegin"))
        elif quiet >= COMMENT_SECONDS:
            quiet = 0.0
            yield b": still here\n\n"
        await anyio.sleep(TICK_SECONDS)
        quiet += TICK_SECONDS
