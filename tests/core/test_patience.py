"""How long a server may take until its first byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.patience import first_byte_allowance
from support.memory import peak_of_memory


def allowance(fields: Any, *, stream: bool = False) -> float:
    return first_byte_allowance(100.0, json.dumps(fields).encode(), stream=stream)


@pytest.mark.parametrize(
    ("fields", "stream", "seconds"),
    [
        ({}, True, 100.0),
        ({}, False, 151.2),
        ({"max_tokens": 100}, False, 110.0),
        ({"max_completion_tokens": 100}, False, 110.0),
        ({"max_output_tokens": 100}, False, 110.0),
        ({"max_tokens": 100_000}, False, 151.2),
        ({"max_tokens": -5}, False, 100.0),
        ({"max_tokens": True}, False, 151.2),
        ({"max_tokens": None}, False, 151.2),
        ({"max_tokens": 100}, True, 100.0),
        ({"prompt": "x" * 24_000}, True, 200.0),
        ({"messages": [{"role": "", "content": [{"type": "", "text": "x" * 12_000}]}], "system": "x" * 12_000}, True, 200.0),
        ({"input": ["x" * 24_000], "tools": [{"name": "x" * 24_000}]}, True, 300.0),
        ({"messages": [{"image_url": {"url": "data:image/png;base64," + "x" * 24_000}}]}, True, 100.0),
        ({"metadata": "x" * 24_000}, True, 100.0),
        ([], True, 100.0),
    ],
)
def test_it_grows_with_the_prompt_and_with_a_plain_answer(fields: Any, stream: bool, seconds: float) -> None:
    """Semantics 2, class C: text counts, pictures do not; of a plain answer at most 512 tokens do."""
    assert allowance(fields, stream=stream) == pytest.approx(seconds)


@given(st.binary(max_size=200), st.booleans())
def test_it_is_never_shorter_than_the_timeout(body: bytes, stream: bool) -> None:
    """Whatever the body is: a form has no fields that count."""
    assert first_byte_allowance(100.0, body, stream=stream) >= 100.0


IMAGE = {"image_url": {"url": "data:image/png;base64," + "x" * 300_000}}


@pytest.mark.parametrize(
    ("messages", "seconds"),
    [
        ([{"content": "x" * 12_000}, IMAGE, IMAGE, {"content": "x" * 12_000}], 200.0),
        ([{"content": "x" * 600_000}], 2600.0),
    ],
)
def test_a_large_body_counts_as_text_but_for_its_images(messages: list[Any], seconds: float) -> None:
    """A prompt with pictures is not long, and a text of this size gets all the time there is, without being decoded."""
    assert allowance({"messages": messages}, stream=True) == pytest.approx(seconds, rel=0.01)
    assert allowance({"messages": messages}) == pytest.approx(seconds + 51.2, rel=0.01)


def test_a_large_form_is_no_text() -> None:
    """As a small one is none."""
    assert first_byte_allowance(100.0, b"--x\r\n" + b"x" * 300_000, stream=True) == 100.0


def test_a_body_of_tiny_values_is_not_decoded() -> None:
    """S7: a client cannot stop the gateway with a body that takes seconds, and many times its size, to decode."""
    body = b'{"messages": [' + b"[]," * 350_000 + b"[]]}"
    with peak_of_memory() as peak:
        assert first_byte_allowance(100.0, body, stream=True) > 1000.0
    assert peak() < 3 * len(body)
