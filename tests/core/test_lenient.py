"""What msgspec rejects and clients accept becomes legible, and what is not JSON stays invalid."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from multiverse_gateway.core.lenient import legible

PIECES = st.sampled_from(
    [
        *("{", "}", "[", "]", ",", ":", '"', "-", "0", "1", "e", ".", "a", "ä", " ", '"a"', '"k":', "nul", "null"),
        *("\\", "\\\\", "\\u", "\\ud83d", "\\uDE00", "\\ud8", "d83d", "u0041", "NaN", "Infinity", "-Infinity"),
    ]
)
NUMBERS = st.integers(-(1 << 63), 1 << 63) | st.floats()
SCALARS: st.SearchStrategy[Any] = st.none() | st.booleans() | NUMBERS | st.text() | st.lists(PIECES).map("".join)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=10
)


def shape(value: object) -> object:
    """Return what is left of a value when its texts and numbers are taken away."""
    if isinstance(value, list):
        return [shape(item) for item in value]
    return {len(value): [shape(item) for item in value.values()]} if isinstance(value, dict) and value else None


@given(VALUES, st.text(alphabet="\ud83d\udc00\ude00a"))
def test_whatever_python_writes_becomes_legible(value: object, surrogates: str) -> None:
    """Lone surrogates, NaN and infinities included; objects, arrays and their members stay."""
    written = json.dumps([value, {"text": surrogates}]).encode()
    assert shape(msgspec.json.decode(legible(written))) == shape(json.loads(written))


@given(st.lists(PIECES).map("".join))
@example(r'"\NaN"')
@example(r'"\Infinity"')
@example(r'"\-Infinity"')
@example(r'"\uNaN0"')
@example("1NaN")
@example("1Infinity")
@example("-NaN")
@example("{NaN:1}")
def test_what_is_not_json_stays_invalid(text: str) -> None:
    """If the legible text is JSON, then a lenient reader takes the original as well."""
    try:
        msgspec.json.decode(legible(text.encode()))
    except ValueError:
        return
    json.loads(text)


@pytest.mark.parametrize("text", [b"", b"{}", b'{"a": "\\u00e4"}', "ä".encode()])
def test_what_is_legible_is_not_copied(text: bytes) -> None:
    """The usual text costs a few searches."""
    assert legible(text) is text
