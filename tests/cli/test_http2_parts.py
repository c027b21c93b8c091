"""The parts of our HTTP/2 that need no socket: the watch over heads of frames, and what waits to be sent on a stream."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.cli.hypercorn_hardening.http2_frames import (
    BLOCK_BYTES,
    CONTINUATION,
    END_HEADERS,
    HEADERS,
    PREFACE_BYTES,
    FrameWatch,
)
from multiverse_gateway.cli.hypercorn_hardening.http2_outbox import LEAST_BYTES, StreamOutbox
from multiverse_gateway.cli.hypercorn_hardening.shared import HELD_BYTES

MAX_FRAME = 16_384
DATA, PING = 0x0, 0x6
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, length: int) -> bytes:
    """Return a frame on stream 1 whose payload is zeros."""
    return length.to_bytes(3, "big") + bytes([kind, flags]) + (1).to_bytes(4, "big") + bytes(length)


def accepts(data: bytes, places: list[int]) -> bool:
    """Return whether a watch lets all of these bytes pass, cut at these places."""
    watch = FrameWatch(MAX_FRAME)
    edges = sorted({0, len(data), *(place for place in places if place < len(data))})
    return all(watch.accepts(data[start:end]) for start, end in pairwise(edges))


KINDS = st.sampled_from([DATA, HEADERS, CONTINUATION, PING])
LENGTHS = st.sampled_from([0, 1, 17, MAX_FRAME - 1, MAX_FRAME, MAX_FRAME + 1])
FRAMES = st.lists(st.tuples(KINDS, st.sampled_from([0, END_HEADERS]), LENGTHS), max_size=8)


@given(FRAMES, st.lists(st.integers(min_value=0, max_value=60_000), max_size=8))
def test_frames_are_watched_however_they_are_cut(frames: list[tuple[int, int, int]], places: list[int]) -> None:
    """Only the length of a frame, and of a head in many frames, matters."""
    block, fits = 0, True
    for kind, flags, length in frames:
        block = block + length if kind in (HEADERS, CONTINUATION) and not flags & END_HEADERS else 0
        fits = fits and length <= MAX_FRAME and block <= BLOCK_BYTES
    data = PREFACE + b"".join(frame(*each) for each in frames)
    assert accepts(data, places) == fits


def test_a_head_in_many_frames_is_bounded() -> None:
    """H2 would keep a MiB of it."""
    assert len(PREFACE) == PREFACE_BYTES
    head = frame(HEADERS, 0, 16_384) + 3 * frame(CONTINUATION, 0, 16_384)
    assert accepts(PREFACE + head, [])
    assert not accepts(PREFACE + head + frame(CONTINUATION, 0, 1), [])


@given(
    st.lists(st.binary(min_size=1, max_size=200), max_size=8), st.lists(st.integers(min_value=0, max_value=300), min_size=20, max_size=20)
)
def test_what_is_sent_on_a_stream_leaves_in_order(pieces: list[bytes], counts: list[int]) -> None:
    """Whatever the windows let through at a time, nothing is lost and nothing is sent twice."""

    async def run() -> None:
        outbox, sent = StreamOutbox(), b""
        for piece in pieces:
            assert await outbox.add(memoryview(piece)) == len(piece)
        outbox.complete()
        for count in counts:
            taken = outbox.take(count)
            assert len(taken) <= count
            sent += taken
        sent += outbox.take(len(outbox))
        assert (sent, len(outbox), outbox.is_over) == (b"".join(pieces), 0, True)

    asyncio.run(run())


async def test_a_full_outbox_holds_its_sender_up_until_something_is_taken() -> None:
    outbox = StreamOutbox()
    assert await outbox.add(memoryview(bytes(HELD_BYTES + 10))) == HELD_BYTES
    waiting = asyncio.ensure_future(outbox.add(memoryview(b"more")))
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.take(2)
    assert await waiting == 2


@pytest.mark.parametrize("what", ["add", "ended"])
async def test_the_end_of_a_stream_lets_no_sender_wait(what: str) -> None:
    outbox = StreamOutbox()
    await outbox.add(memoryview(bytes(HELD_BYTES)))
    waiting = asyncio.ensure_future(outbox.add(memoryview(b"more")) if what == "add" else outbox.ended())
    await asyncio.sleep(0)
    outbox.close()
    assert not await waiting
    assert len(outbox) == 0


async def test_a_client_that_takes_too_little_is_stalled() -> None:
    """It must take `LEAST_BYTES`, or all that there is, before its time is over; time in which we were suspended does not count."""
    outbox = StreamOutbox()
    now = asyncio.get_running_loop().time()
    await outbox.add(memoryview(bytes(2 * LEAST_BYTES)))
    outbox.take(LEAST_BYTES - 1)
    assert not outbox.is_stalled(now, 1000.0)
    assert outbox.is_stalled(now + 1001.0, 1000.0)
    outbox.postpone(100.0)
    assert not outbox.is_stalled(now + 1001.0, 1000.0)
    outbox.take(2 * LEAST_BYTES)
    assert not outbox.is_stalled(now + 9999.0, 1000.0)
