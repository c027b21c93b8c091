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
from multiverse_gateway.testing.probe import Answer, ProbeContract, check


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
    finding = judge(status, body)
    assert finding.reason is not None
    assert not finding.let_in


NO_CHAT = [
    (404, b'{"detail": "Not Found"}'),
    (405, b""),
    (501, b'{"error": {"message": "This server does not support completions. Start it without `--embeddings`"}}'),
    (400, b'{"error": {"message": "\\"nomic-embed-text\\" does not support chat"}}'),
    (400, b'{"error": {"message": "The model does not support Chat Completions API"}}'),
    (400, b'{"error": {"message": "default chat template is no longer allowed, so you must provide a chat template"}}'),
]


@pytest.mark.parametrize(("status", "body"), NO_CHAT)
async def test_a_server_without_chat_is_left_alone(status: int, body: bytes) -> None:
    """Outside case 21: its list of models decides; nothing is held against it."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            return httpx2.Response(status, content=body)
        return httpx2.Response(200, json={"data": [{"id": "tiny"}]})

    result = await check(chat.create(Settings()), answer)
    assert (result.passed, result.lacks_chat, result.let_in, result.warning, result.models) == (True, True, True, None, ("tiny",))


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b'{"error": {"message": "model \'tiny\' not found", "code": "model_not_found"}}'),
        (400, b'{"error": {"message": "bad request"}}'),
        (500, b"CUDA out of memory"),
        (503, b"loading"),
    ],
)
async def test_a_server_that_should_chat_and_does_not_fails(status: int, body: bytes) -> None:
    """Whatever its list of models says."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            return httpx2.Response(status, content=body)
        return httpx2.Response(200, json={"data": [{"id": "tiny"}]})

    assert not (await check(chat.create(Settings()), answer)).passed


@pytest.mark.parametrize("text", [rb'"\ud83d"', b'"H", "logprob": -Infinity'])
def test_one_token_may_be_half_a_character(text: bytes) -> None:
    """Its answer is valid JSON, or what Python's libraries read: the server is not to blame."""
    assert judge(200, b'{"choices": [{"text": %b}]}' % text).reason is None
