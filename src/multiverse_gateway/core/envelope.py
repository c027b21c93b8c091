"""The envelope of a request: all that the gateway has to know about it. `core.reading` reads it from a body."""

from __future__ import annotations

from attrs import Factory, field, frozen

from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.needs import Needs
from multiverse_gateway.core.servers import ServerId

JSON_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/reranking",
        "/v1/score",
        "/v1/moderations",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
    }
)
RESPONSES = "/v1/responses"
"""Where responses are made. The calls below it (`compact`, `input_tokens`) may continue a stored response, too."""
LOOKUP = f"{RESPONSES}/*"
"""Stands for the path of every call for a stored response wherever the gateway remembers paths."""


class EnvelopeError(Exception):
    """A request that cannot be read: why, and what to send instead; `param` and `code` are those of OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


@frozen
class Envelope:
    """What decides how a request is routed and retried.

    A `stateful` request leaves something behind on its server, or depends on what another one left there: it is retried only if the
    server refused it before doing anything. A call that the gateway does not know is stateful.
    `stream`: the answer has to be a stream of events. A path that has no streams may be asked for one (embeddings, rerank, audio); its
    plain answer is as good. `wants_usage` is `stream_options.include_usage`. `leaves_usage` holds for a stream that could report its
    tokens, if the client does not set `stream_options`.

    `response_id` is that of the stored response that the request needs; `server_id` and `generation` are set once the gateway knows which
    server has it, and then no other server may answer. `is_lookup`: the request asks only for what is stored, or ends it, and makes
    nothing: it carries no model and no body that is read.
    """

    model: str
    stream: bool
    stateful: bool
    wants_usage: bool
    path: str
    dialect: Dialect
    leaves_usage: bool = False
    names_response: bool = False
    """Whether the request carries the id of a stored response, so that "not found" in an answer speaks of that one."""
    written_model: str = field(default=Factory(lambda self: self.model, takes_self=True))
    """The model's name as the body has it; `model` is its key (`core.servers.model_key`)."""
    response_id: str | None = None
    server_id: ServerId | None = None
    generation: int = 0
    method: str = "POST"
    is_lookup: bool = False
    needs: Needs | None = None
    """What the request needs of a server, once it was looked at: only if servers of its model differ in that."""
    answers_json: bool = field(init=False)
    """Whether the answer is JSON, or a stream of events."""
    stores_response: bool = field(init=False)
    """Whether the server keeps what it answers, so that later requests may name it."""

    call: str = field(init=False)
    """The path as it is remembered of servers: one for all look-ups, whose own paths hold ids."""

    @answers_json.default
    def _is_answered_with_json(self) -> bool:
        return self.path in JSON_PATHS or self.is_lookup

    @call.default
    def _is_called(self) -> str:
        return LOOKUP if self.is_lookup else self.path

    @stores_response.default
    def _is_stored(self) -> bool:
        return self.path == RESPONSES and self.stateful
