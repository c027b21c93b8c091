"""Which refusals of a chat completion say that there is no chat."""

from __future__ import annotations

import pytest

from multiverse_gateway.core.abilities import lacks_chat


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b""),
        (404, b'{"detail": "Not Found"}'),
        (405, b""),
        (501, b'{"error": {"message": "This server does not support completions. Start it without `--embeddings`"}}'),
        (400, b'{"error": {"message": "\\"nomic-embed-text\\" does not support chat"}}'),
        (400, b'{"error": {"message": "\\"nomic-embed-text\\" does not support generate"}}'),
        (400, b'{"object": "error", "message": "The model does not support Chat Completions API", "code": 400}'),
        (400, b'{"error": "Chat completions are not supported by this model"}'),
        (400, b'{"error": "cannot chat with an embedding model"}'),
        (422, b'{"error": "you must provide a chat template"}'),
        (500, b'{"error": "this model doesn\'t support chat"}'),
    ],
)
def test_servers_without_chat(status: int, body: bytes) -> None:
    """llama.cpp, Ollama, vLLM and others in their own words."""
    assert lacks_chat(status, body)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b""),
        (400, b'{"error": {"message": "max_tokens is too large"}}'),
        (401, b"this model does not support chat without a key"),
        (404, b'{"error": {"message": "The model `tiny` does not exist", "code": "model_not_found"}}'),
        (429, b""),
        (500, b"CUDA out of memory"),
        (503, b"loading"),
    ],
)
def test_servers_that_should_chat(status: int, body: bytes) -> None:
    """Another fault is not excused."""
    assert not lacks_chat(status, body)
