"""Heads that are remembered: nothing but the number of the one `Content-Length` may differ."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multiverse_gateway.relay.heads import MAX_KNOWN, MAX_KNOWN_BYTES, Heads

LINE = b"POST /v1/chat/completions HTTP/1.1"
HOST = b"Host: here"


def head(*lines: bytes, line: bytes = LINE) -> bytes:
    return b"\r\n".join([line, *lines, b"", b""])


def read(heads: Heads, data: bytes) -> tuple[Any, ...] | None:
    """Return all that a head says, but for the number in its fields, which may be another one's."""
    found = heads.read(data, data.find(b"\r\n\r\n") + 4)
    if found is None:
        return None
    known, length = found
    fields = [(name, b"" if name == b"content-length" else value) for name, value in known.fields]
    assert dict(reversed(known.fields)) == known.names
    return known.method, known.path, known.query, fields, known.keeps, length


NUMBERS = st.sampled_from(
    [b"0", b"2", b"17", b"017", b"", b"-1", b"+1", b"1 ", b"1_0", b"0x1", b"9" * 18, b"9" * 19, b"9" * 5000, b"1, 1", b"\xd9\xa3"]
)
NAMES = st.sampled_from(
    [b"Content-Length", b"content-length", b"CONTENT-LENGTH", b"X-Strength", b"Wavelength", b"X-Content-Length", b"length"]
)
LINES = st.one_of(
    st.builds(lambda name, number: name + b": " + number, NAMES, NUMBERS),
    st.builds(lambda name, number: name + b":" + number, NAMES, NUMBERS),
    st.sampled_from(
        [
            HOST,
            b"Connection: close",
            b"Transfer-Encoding: chunked",
            b"Upgrade: h2c",
            b"Expect: 100-continue",
            b"X-Note: content-length: 5",
            b"X-Note: a",
            b" folded: 3",
            b"\tcontent-length: 3",
        ]
    ),
)
USUAL = st.builds(
    lambda before, name, number, after: head(HOST, *before, name + number, *after),
    st.lists(st.sampled_from([b"X-Strength: 5", b"X-Strength: 6", b"Accept: */*", b"X-Note: content-length: 5"]), max_size=1),
    st.sampled_from(
        [b"Content-Length: ", b"content-length: ", b"CONTENT-LENGTH: ", b"Content-Length:", b"Content-Length:  ", b"X-Length: "]
    ),
    NUMBERS,
    st.lists(st.sampled_from([b"X-Strength: 5", b"X-Strength: 6", b"Wavelength: 7", b" 8"]), max_size=1),
)
REQUEST_LINES = st.sampled_from(
    [LINE, LINE + b" ", b"POST /v1/a%20b HTTP/1.1", b"POST /v1/x?length: 3 HTTP/1.1", b"POST /v1/x HTTP/1.0", b"GET /v1/x HTTP/1.1"]
)
HEADS = st.builds(lambda line, lines: head(HOST, *lines, line=line), REQUEST_LINES, st.lists(LINES, max_size=4))


@settings(max_examples=300)
@given(st.lists(st.one_of(HEADS, USUAL), min_size=1, max_size=12))
def test_what_is_remembered_is_what_would_be_read(datas: list[bytes]) -> None:
    """Whatever came before: a head says the same to who knows it and to who never saw it."""
    knowing = Heads()
    for data in [*datas, *datas]:
        assert read(knowing, data) == read(Heads(), data)


def test_only_the_number_differs() -> None:
    """The usual case: the same object, another length."""
    heads = Heads()
    data = head(HOST, b"Content-Length: 5")
    first = heads.read(data, len(data))
    data = head(HOST, b"Content-Length: 1234")
    second = heads.read(data, len(data))
    assert first is not None
    assert second is not None
    assert first[0] is second[0]
    assert (first[1], second[1]) == (5, 1234)


@pytest.mark.parametrize("name", [b"Content-Length: ", b"CONTENT-LENGTH: ", b"Content-Length:", b"content-lEngth: ", b"Content-Length:\t"])
def test_a_length_is_read_however_it_is_written(name: bytes) -> None:
    """At the first time and at the second."""
    heads = Heads()
    for number in (2, 2, 17, 17):
        data = head(HOST, name + b"%d" % number)
        found = heads.read(data, len(data))
        assert found is not None
        assert found[1] == number


@pytest.mark.parametrize("line", [b"X-Strength: 5", b"X-Note: content-length: 5"])
def test_the_number_of_another_header_is_never_taken_for_the_length(line: bytes) -> None:
    """Nor forgotten as if it did not matter."""
    heads = Heads()
    for value in (b"5", b"7"):
        data = head(HOST, line.replace(b"5", value), b"Content-Length: 3")
        found = heads.read(data, len(data))
        assert found is not None
        assert found[1] == 3
        assert [text for name, text in found[0].fields if name.startswith(b"x-")] == [line.partition(b": ")[2].replace(b"5", value)]


def test_what_clients_make_up_takes_no_memory_without_end() -> None:
    """A head of their own each time, and long ones."""
    heads = Heads()
    for number in range(3 * MAX_KNOWN):
        assert read(heads, head(HOST, b"X-Number: %d" % number)) is not None
        assert len(heads._known) <= MAX_KNOWN
    before = len(heads._known)
    assert read(heads, head(HOST, b"X-Long: " + b"x" * MAX_KNOWN_BYTES)) is not None
    assert len(heads._known) == before


@pytest.mark.parametrize(
    ("root", "target", "path"),
    [
        ("", b"/v1/x", "/v1/x"),
        ("/ai", b"/ai/v1/x", "/v1/x"),
        ("/ai", b"/v1/x", "/v1/x"),
        ("/ai", b"/ai/chat/completions?a=b", "/v1/chat/completions"),
        ("/ai", b"http://host/ai/v1/x", "/v1/x"),
        ("/ai", b"/ai/admin/x", None),
        ("/ai", b"/ai/ai/v1/x", None),
        ("", b"/ai/v1/x", None),
    ],
)
def test_the_root_of_a_proxy_is_no_part_of_the_path(root: str, target: bytes, path: str | None) -> None:
    """So that the door serves such requests itself, whether the proxy takes it off or not."""
    data = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n" % target
    read = Heads(root).read(data, len(data))
    assert (None if read is None else read[0].path) == path
