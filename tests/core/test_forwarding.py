"""What of a client's headers reaches a server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.forwarding import FORWARDED, MAX_FORWARDED_BYTES, forwarded_lines


def lines(*fields: tuple[bytes, bytes]) -> bytes:
    """Return what headers add to a request."""
    return forwarded_lines(fields, dict(fields))


@pytest.mark.parametrize("name", FORWARDED)
@pytest.mark.parametrize(
    "value",
    [
        b"2023-06-01",
        b"assistants=v2",
        b"prompt-caching-2024-07-31,files-api-2025-04-14",
        b"a , b\t,\tc",
        b"responses=v1, realtime=v1",
        b"x" * MAX_FORWARDED_BYTES,
    ],
)
def test_a_list_of_words_is_passed_on(name: bytes, value: bytes) -> None:
    """As it was written."""
    assert lines((b"host", b"x"), (name, value)) == name + b": " + value + b"\r\n"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b",",
        b"a,,b",
        b"a,",
        b"=",
        b"a=",
        b"a=b=c",
        b"a b",
        b'"a"',
        b"a;b",
        b"a\r\nx-evil: 1",
        b"a\x00",
        b"caf\xc3\xa9",
        b"x" * (MAX_FORWARDED_BYTES + 1),
    ],
)
def test_anything_else_is_left_out(value: bytes) -> None:
    """The request goes on without it; the other headers stay."""
    assert lines((b"anthropic-beta", value), (b"anthropic-version", b"1")) == b"anthropic-version: 1\r\n"


def test_a_header_that_comes_several_times_is_one_list() -> None:
    """In their order, together no longer than one may be; the blanks around a value do not count."""
    assert lines((b"anthropic-beta", b" a "), (b"accept", b"x"), (b"anthropic-beta", b"b,c")) == b"anthropic-beta: a, b,c\r\n"
    half = b"x" * (MAX_FORWARDED_BYTES // 2)
    assert lines((b"openai-beta", half), (b"openai-beta", half)) == b""


def test_no_other_header_is_passed_on() -> None:
    """Keys, cookies and addresses least of all."""
    assert lines((b"authorization", b"Bearer"), (b"cookie", b"a"), (b"x-forwarded-for", b"a"), (b"anthropic-other", b"a")) == b""


@given(st.lists(st.tuples(st.sampled_from([*FORWARDED, b"cookie"]), st.binary(max_size=30) | st.sampled_from([b"a", b"b=1"])), max_size=5))
def test_nothing_gets_out_of_its_line(fields: list[tuple[bytes, bytes]]) -> None:
    """Whatever a client sends, only known names and printable values leave, one line each."""
    for line in lines(*fields).split(b"\r\n")[:-1]:
        name, _, value = line.partition(b": ")
        assert name in FORWARDED
        assert value.isascii()
        assert value.replace(b"\t", b" ").decode().isprintable()
