"""Whether a server that refuses to chat has no chat at all, as servers of embeddings, rankings and speech do."""

import re

from multiverse_gateway.core.refusals import lacks_model

MAX_MESSAGE_BYTES = 4096
"""Bytes of a refusal that are looked at."""

_NO_CHAT = re.compile(
    rb"(?:\bnot|n't)\b.{0,40}\bsupport\w*\b.{0,40}\b(?:chat|completions?|generat\w*)"
    rb"|\b(?:chat|completions?|generat\w*)\b.{0,60}\bnot\b.{0,20}\bsupport"
    rb"|\bembedding model\b|\bchat[ _]template\b",
    re.IGNORECASE | re.DOTALL,
)


def lacks_chat(status: int, body: bytes) -> bool:
    """Return whether the refusal of a chat completion says that the server, or its model, has no chat.

    A server that does not know the model is another matter, and so is one that refuses the key, is busy or fails.

    >>> lacks_chat(400, b'{"error": {"message": "nomic-embed-text does not support chat"}}'), lacks_chat(404, b'{"detail": "Not Found"}')
    (True, True)
    >>> lacks_chat(404, b'{"error": {"message": "model not found", "code": "model_not_found"}}'), lacks_chat(401, b"")
    (False, False)
    """
    if lacks_model(body, b""):
        return False
    return status in (404, 405, 501) or (status in (400, 422, 500) and _NO_CHAT.search(body, 0, MAX_MESSAGE_BYTES) is not None)
