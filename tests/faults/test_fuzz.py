"""The parsers keep their promises for any bytes: hypothesis changes what is usual, a little or altogether."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.targets import TARGETS, seeds

WORDS = st.sampled_from(
    [
        b"\r\n",
        b"\n\n",
        b"\r",
        b"\x00",
        b"data: ",
        b": ",
        b'"model"',
        b"[" * 50,
        b"HTTP/1.1 ",
        b"chunked",
        b"0\r\n\r\n",
        b"://",
        b"@",
        b"%",
        b"9" * 30,
    ]
)


@st.composite
def changed(draw: st.DrawFn, name: str) -> bytes:
    """Return a seed with some of it replaced, cut out or repeated."""
    data = bytearray(draw(st.sampled_from(list(seeds(name)))))
    for _ in range(draw(st.integers(0, 4))):
        start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        data[start : start + length] = draw(WORDS | st.binary(max_size=12) | st.just(bytes(data[: length * 4])))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150)
@given(data=st.data())
def test_no_bytes_break_a_promise(name: str, data: st.DataObject) -> None:
    """L06, L11, X04: each target says which."""
    TARGETS[name](data.draw(changed(name) | st.binary(max_size=300)))


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_hold(name: str) -> None:
    """What the fuzzers begin with."""
    for seed in seeds(name):
        TARGETS[name](seed)
