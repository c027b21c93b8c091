"""Masked tokens, and what clients accept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.encodings import accepts_gzip
from multiverse_gateway.pages.masking import masked, unmasked

TOKENS = st.binary(min_size=32, max_size=32).map(bytes.hex)


@given(TOKENS)
def test_a_mask_hides_a_token_and_comes_off(token: str) -> None:
    """Two masks of one token have nothing in common, and the token is not in them."""
    first, second = masked(token), masked(token)
    assert unmasked(first) == unmasked(second) == token
    assert first != second
    assert token not in first


@given(st.text(max_size=100))
def test_any_text_can_be_unmasked(text: str) -> None:
    assert isinstance(unmasked(text), str)


@pytest.mark.parametrize("text", ["", "guessed", "é" * 88, "A" * 87, "A" * 40 + "==", "ab" * 31])
def test_what_is_no_masked_token_stays(text: str) -> None:
    assert unmasked(text) == text


@pytest.mark.parametrize(
    ("header", "expected"),
    [("gzip, deflate, br", True), ("x-gzip", True), ("*;q=0.1", True), ("gzip; q=0", False), ("gzip;q=x", False), ("deflate", False)],
)
def test_a_client_says_whether_it_accepts_gzip(header: str, expected: bool) -> None:
    assert accepts_gzip(header) is expected
