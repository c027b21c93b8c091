"""The forms in which streams of events are answered."""

from __future__ import annotations

from enum import Enum

_LAST_EVENTS = {
    "responses": frozenset({"response.completed", "response.failed", "response.incomplete"}),
    "messages": frozenset({"message_stop"}),
}


class Dialect(Enum):
    """How a stream names its events, reports errors and ends."""

    CHAT = "chat"
    """Chat and text completions: nameless events, `[DONE]` at the end."""
    RESPONSES = "responses"
    """OpenAI Responses: `response.completed`, `.failed` or `.incomplete` at the end."""
    MESSAGES = "messages"
    """Anthropic Messages: `message_stop` at the end."""
    OTHER = "other"
    """Anything else: no last event of its own."""

    is_chat: bool
    last_events: frozenset[str]
    """Names of the events that end a stream; none for one that ends in another way."""

    def __init__(self, value: str) -> None:
        self.is_chat = value == "chat"
        self.last_events = _LAST_EVENTS.get(value, frozenset())


_DIALECTS = {
    "/v1/chat/completions": Dialect.CHAT,
    "/v1/completions": Dialect.CHAT,
    "/v1/responses": Dialect.RESPONSES,
    "/v1/messages": Dialect.MESSAGES,
}


def dialect_of(path: str) -> Dialect:
    """Return the dialect that the API path is answered in.

    >>> dialect_of("/v1/chat/completions")
    <Dialect.CHAT: 'chat'>
    """
    return _DIALECTS.get(path, Dialect.OTHER)
