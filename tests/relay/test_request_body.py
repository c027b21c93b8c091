"""Bodies of requests without a socket: however they are cut, the pieces are the body, and what follows is left for the next request."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.relay.request_body import WHOLE_BODY, ChunkedBody, MalformedBodyError, PlainBody, begin_chunked

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
NEXT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
UPGRADE = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"

BODIES = st.binary(max_size=300)
CUTS = st.lists(st.integers(min_value=0, max_value=400), max_size=12)
TOKENS = st.sampled_from([b"", b";a", b";a=b", b';a="b c"', b";a=b;c"])
TRAILERS = st.sampled_from([b"", b"x-sum: 1\r\n", b"X-Odd:   value \r\n", b"a: b\r\nc: d\r\n"])


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cut data at these places, those that lie in it."""
    edges = sorted({0, len(data), *(place for place in places if place < len(data))})
    return [data[start:end] for start, end in pairwise(edges)]


@st.composite
def chunked(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Draw a body, and the same in chunks of any size, with extensions and trailers."""
    pieces = draw(st.lists(st.binary(min_size=1, max_size=60), max_size=8))
    lines = [draw(st.sampled_from([b"%x", b"%X", b"000%x"])) % len(piece) + draw(TOKENS) for piece in pieces]
    chunks = [b"%b\r\n%b\r\n" % each for each in zip(lines, pieces, strict=True)]
    return b"".join(pieces), b"".join(chunks) + b"0" + draw(TOKENS) + b"\r\n" + draw(TRAILERS) + b"\r\n"


@given(BODIES, BODIES, CUTS)
def test_a_plain_body_ends_where_it_says(data: bytes, behind: bytes, places: list[int]) -> None:
    """The pieces are the body, and nothing of what follows it is lost."""
    body, taken, rest = PlainBody(len(data)), b"", b""
    assert body.is_whole == (not data)
    for piece in cut(data + behind, places):
        if body.is_whole:
            rest += piece
            continue
        taken += b"".join(body.feed(piece))
        rest += body.rest
        assert (body.received, body.missing) == (len(taken), len(data) - len(taken))
    assert (taken, rest, body.is_whole, body.is_followed) == (data, behind, True, False)


@given(st.integers(min_value=1, max_value=300), st.binary(min_size=1, max_size=600), CUTS)
def test_a_plain_body_that_is_skipped_ends_there_too(length: int, data: bytes, places: list[int]) -> None:
    body, rest = PlainBody(length), b""
    for piece in cut(data, places):
        if body.is_whole:
            rest += piece
        else:
            body.skip(piece)
            rest += body.rest
    assert (body.missing, rest) == (max(0, length - len(data)), data[length:])
    body.close()


@given(chunked(), CUTS)
def test_chunks_are_put_together(both: tuple[bytes, bytes], places: list[int]) -> None:
    """Whatever their sizes and however they are cut: extensions and trailers are dropped, and the end is found exactly."""
    data, coded = both
    body, taken, fed = ChunkedBody(HEAD), b"", 0
    for piece in cut(coded, places):
        assert not body.is_whole, "only the last byte ends it"
        taken += b"".join(body.feed(piece))
        fed += len(piece)
        assert body.received == fed
    assert (taken, body.is_whole, body.is_followed, body.rest) == (data, True, False, b"")


@given(chunked(), st.sampled_from([NEXT, UPGRADE, b"\x00garbage", b"GET", b"0\r\n\r\n", b"\x16\x03\x01"]), CUTS)
def test_what_follows_chunks_spoils_the_connection_but_not_the_request(both: tuple[bytes, bytes], behind: bytes, places: list[int]) -> None:
    """The bytes that end the body hold more: the body is whole, and nothing of the rest belongs to it."""
    data, coded = both
    *pieces, last = cut(coded, places)
    body = ChunkedBody(HEAD)
    taken = b"".join(b"".join(body.feed(piece)) for piece in pieces)
    taken += b"".join(body.feed(last + behind))
    assert (taken, body.is_whole, body.is_followed, body.rest) == (data, True, True, b"")


@given(chunked(), st.sampled_from([b"\r\n", b"\r\n\r\n"]))
def test_empty_lines_behind_chunks_are_nothing(both: tuple[bytes, bytes], behind: bytes) -> None:
    """RFC 9112, 2.2: they may stand before a request, so the connection can serve one."""
    body = ChunkedBody(HEAD)
    assert (b"".join(body.feed(both[1] + behind)), body.is_whole, body.is_followed) == (both[0], True, False)


BAD = [
    b"zz\r\n",
    b"-1\r\n",
    b"+1\r\n{\r\n",
    b" 2\r\n{}\r\n",
    b"2 \r\n{}\r\n",
    b"0x2\r\n{}\r\n",
    b"\r\n2\r\n{}\r\n",
    b"f" * 17 + b"\r\n",
    b"f" * 65536,
    b"2\r\n{}x\r\n",
    b"2\r\n{}2\r\n",
    b"2\n{}\n0\n\n",
    b"2\r\n{}\n0\r\n\r\n",
    b"2;a\n{}\r\n",
    b"2;\x00\r\n{}\r\n",
    b"0\r\nno trailer\r\n\r\n",
    b"0\r\nbad name: 1\r\n\r\n",
    b"0\r\ncontent-length: 7\r\n\r\n",
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("before", [b"", b"3\r\nabc\r\n"])
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_chunks_are_read_strictly(bad: bytes, before: bytes, size: int) -> None:
    """What a proxy in front could read in another way is an error, wherever it is cut; nothing is made of it."""
    body, taken = ChunkedBody(HEAD), b""
    data = before + bad

    def feed_all() -> None:
        nonlocal taken
        for start in range(0, len(data), size):
            taken += b"".join(body.feed(data[start : start + size]))

    with pytest.raises(MalformedBodyError):
        feed_all()
    assert not body.is_whole
    assert taken in (b"", b"abc", b"{", b"{}", b"abc{", b"abc{}")


def test_long_lines_cost_no_memory() -> None:
    """A chunk extension or a trailer of many megabytes is neither refused nor kept: what is received is counted, and bounded elsewhere."""
    body = ChunkedBody(HEAD)
    assert body.feed(b"2;a=") == []
    for _ in range(64):
        assert body.feed(b"x" * 65536) == []
    assert b"".join(body.feed(b"\r\n{}\r\n0\r\nx-long: ")) == b"{}"
    for _ in range(64):
        assert body.feed(b"x" * 65536) == []
    assert body.feed(b"\r\n\r\n") == []
    assert body.is_whole
    assert body.received > 8 << 20


def test_a_chunked_body_that_is_skipped_has_no_end() -> None:
    """It is counted only, even after it could not be read any more."""
    body = ChunkedBody(HEAD)
    body.close()
    body.skip(b"2\r\n{}\r\n0\r\n\r\n")
    assert (body.is_whole, body.received, body.missing) == (False, 12, None)


@pytest.mark.parametrize("data", [b"2\r\n{}\r\n0\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n" + NEXT, b"zz", b"2\r\n"])
def test_a_chunked_body_leaves_no_cycle(data: bytes) -> None:
    """Whether it is whole, malformed or abandoned, it is freed without the garbage collector once it is closed."""
    gc.collect()
    gc.disable()
    try:
        body = ChunkedBody(HEAD)
        if data == b"zz":
            with pytest.raises(MalformedBodyError):
                body.feed(data)
        else:
            body.feed(data)
            if not body.is_whole:
                body.close()
        del body
        assert not [kept for kept in gc.get_objects() if isinstance(kept, ChunkedBody)]
    finally:
        gc.enable()


# Behind a head


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", (b"", False)),
        (b"2\r\n{", (b"{", False)),
        (b"2\r\n{}\r\n0\r\n\r\n", (b"{}", True)),
        (b"2\r\n{}\r\n0\r\n\r\n" + NEXT, None),
        (b"2\r\n{}\r\n0\r\n\r\n" + UPGRADE, None),
        (b"2\r\n{}\r\n0\r\n\r\n\x00", None),
        (b"zz", None),
    ],
)
def test_chunks_begin_behind_their_head(data: bytes, expected: tuple[bytes, bool] | None) -> None:
    """If more than the body follows, or no chunks, the request is in doubt."""
    begun = begin_chunked(HEAD + data, len(HEAD))
    if begun is None:
        assert expected is None
        return
    body, pieces = begun
    assert (b"".join(pieces), body.is_whole) == expected
    assert body.received == len(data)


def test_the_offer_of_another_protocol_before_chunks_is_in_doubt() -> None:
    """Llhttp reads no body behind such a head."""
    head = HEAD.replace(b"host: x", b"host: x\r\nconnection: upgrade\r\nupgrade: h2c")
    assert begin_chunked(head + b"0\r\n\r\n", len(head)) is None


def test_a_plain_body_may_have_begun_with_its_head() -> None:
    body = PlainBody(4, 1)
    assert (body.missing, body.received, body.is_whole) == (3, 1, False)
    assert (body.feed(b"abcd"), body.rest, body.is_whole) == ([b"abc"], b"d", True)


def test_the_shared_whole_body_stays_as_it_is() -> None:
    """It stands for every body that came with its head."""
    WHOLE_BODY.close()
    assert (WHOLE_BODY.is_whole, WHOLE_BODY.missing, WHOLE_BODY.rest, WHOLE_BODY.is_followed) == (True, 0, b"", False)
