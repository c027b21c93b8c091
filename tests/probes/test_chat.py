"""The probe that asks for one token."""

from __future__ import annotations

import json

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway import Settings
from multiverse_gateway.probes import chat
from multiverse_gateway.probes.chat import ChatProbe, judge
from multiverse_gateway.testing.probe import Answer, ProbeContract


class TestChatProbe(ProbeContract):
    """It keeps the contract."""

    @pytest.fixture
    def probe(self) -> ChatProbe:
        """Return one."""
        return chat.create(Settings())

    @pytest.fixture
    def good(self) -> Answer:
        """Return the answer of a good server."""

        def answer(request: httpx2.Request) -> httpx2.Response:
            assert (request.method, request.url.path) == ("POST", "/prefix/v1/chat/completions")
            asked = json.loads(request.content)
            assert (asked["model"], asked["max_tokens"], asked["stream"]) == ("tiny", 1, False)
            return httpx2.Response(200, json={"choices": [{"message": {"role": "assistant", "content": "H"}}]})

        return answer


@given(
    st.integers(200, 599),
    st.binary(max_size=200) | st.recursive(st.none() | st.text(), st.lists).map(lambda value: json.dumps(value).encode()),
)
def test_only_choices_pass(status: int, body: bytes) -> None:
    assert judge(status, body).reason is not None
