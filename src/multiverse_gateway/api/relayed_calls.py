"""The best-known relayed calls for the OpenAPI document: an example request and response of each.

A server's answer is relayed as it is, so its schema names what every client relies on and leaves the rest open.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

Json = dict[str, Any]

CREATED = 1780000000
MODEL = "llama-3.2:3b"
_TEXT = "Hello! How can I help you?"
_USAGE = {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17}
_TOKENS = {"input_tokens": 9, "output_tokens": 8}


@attrs.frozen(kw_only=True)
class Relayed:
    """A relayed POST call. `stream` is an example of its stream, or `None` if the call has no streams."""

    summary: str
    body: Json
    answer: Json
    schema: Json
    stream: str | None = None


def _event(data: Json, name: str | None = None) -> str:
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data)}\n\n"


def _named_events(events: Sequence[Json]) -> str:
    return "".join(_event(event, event["type"]) for event in events)


def _object(required: Sequence[str], **properties: Json) -> Json:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": True}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


_STRING = {"type": "string"}
_STRING_OR_NULL = {"type": ["string", "null"]}
_INTEGER = {"type": "integer"}
_NUMBER = {"type": "number"}
_ANY_OBJECT = {"type": "object", "additionalProperties": True}
_USED = {"type": ["object", "null"], "description": "token counts, if the server reports them", "additionalProperties": True}
_PROMPT: Json = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]}


def _chat() -> Relayed:
    head = {"id": "chatcmpl-1", "created": CREATED, "model": MODEL}
    chunk = head | {"object": "chat.completion.chunk"}

    def choice(delta: Json, reason: str | None) -> Json:
        return chunk | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    message = {"role": "assistant", "content": _TEXT}
    return Relayed(
        summary="Create a chat completion",
        body=_PROMPT,
        answer=head
        | {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": _USAGE},
        schema=_object(
            ["choices"],
            id=_STRING,
            object=_STRING,
            created=_INTEGER,
            model=_STRING,
            choices=_list(_object([], index=_INTEGER, message=_ANY_OBJECT, finish_reason=_STRING_OR_NULL)),
            usage=_USED,
        ),
        stream=_event(choice({"role": "assistant", "content": "Hello!"}, None)) + _event(choice({}, "stop")) + "data: [DONE]\n\n",
    )


def _completions() -> Relayed:
    head = {"id": "cmpl-1", "object": "text_completion", "created": CREATED, "model": MODEL}

    def choice(text: str, reason: str | None) -> Json:
        return head | {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}

    text = " there was a small server."
    return Relayed(
        summary="Create a completion",
        body={"model": MODEL, "prompt": "Once upon a time"},
        answer=choice(text, "stop") | {"usage": _USAGE},
        schema=_object(
            ["choices"],
            id=_STRING,
            object=_STRING,
            created=_INTEGER,
            model=_STRING,
            choices=_list(_object([], index=_INTEGER, text=_STRING, finish_reason=_STRING_OR_NULL)),
            usage=_USED,
        ),
        stream=_event(choice(text, None)) + _event(choice("", "stop")) + "data: [DONE]\n\n",
    )


def _embeddings() -> Relayed:
    vector = {"object": "embedding", "index": 0, "embedding": [0.25, -0.5, 1.0]}
    return Relayed(
        summary="Create embeddings",
        body={"model": "bge-m3", "input": "a text"},
        answer={"object": "list", "data": [vector], "model": "bge-m3", "usage": {"prompt_tokens": 3, "total_tokens": 3}},
        schema=_object(
            ["data"],
            object=_STRING,
            model=_STRING,
            data=_list(_object([], index=_INTEGER, embedding={"anyOf": [_list(_NUMBER), _STRING], "description": "numbers, or base64"})),
            usage=_USED,
        ),
    )


def _responses() -> Relayed:
    content = [{"type": "output_text", "text": _TEXT, "annotations": []}]
    message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}
    whole = {"id": "resp_1", "object": "response", "created_at": CREATED, "model": MODEL, "status": "completed", "output": [message]}
    started = whole | {"status": "in_progress", "output": []}
    delta = {"type": "response.output_text.delta", "sequence_number": 1, "item_id": "msg_1", "output_index": 0, "content_index": 0}
    return Relayed(
        summary="Create a response (OpenAI Responses API)",
        body={"model": MODEL, "input": "Hello!"},
        answer=whole | {"usage": _TOKENS | {"total_tokens": 17}},
        schema=_object(
            ["output"],
            id=_STRING,
            object=_STRING,
            created_at=_NUMBER,
            model=_STRING,
            status=_STRING,
            output=_list(_ANY_OBJECT),
            usage=_USED,
        ),
        stream=_named_events(
            [
                {"type": "response.created", "sequence_number": 0, "response": started},
                delta | {"delta": _TEXT},
                {"type": "response.completed", "sequence_number": 2, "response": whole},
            ]
        ),
    )


def _messages() -> Relayed:
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": MODEL}
    start: Json = head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _TOKENS | {"output_tokens": 1}}
    return Relayed(
        summary="Create a message (Anthropic Messages API)",
        body=_PROMPT | {"max_tokens": 100},
        answer=head | {"content": [{"type": "text", "text": _TEXT}], "stop_reason": "end_turn", "stop_sequence": None, "usage": _TOKENS},
        schema=_object(
            ["content"],
            id=_STRING,
            type=_STRING,
            role=_STRING,
            model=_STRING,
            content=_list(_ANY_OBJECT),
            stop_reason=_STRING_OR_NULL,
            stop_sequence=_STRING_OR_NULL,
            usage=_USED,
        ),
        stream=_named_events(
            [
                {"type": "message_start", "message": start},
                {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": _TEXT}},
                {"type": "content_block_stop", "index": 0},
                {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 8}},
                {"type": "message_stop"},
            ]
        ),
    )


def _rerank() -> Relayed:
    return Relayed(
        summary="Rerank documents by relevance",
        body={"model": "bge-reranker", "query": "a question", "documents": ["a text", "another text"]},
        answer={
            "model": "bge-reranker",
            "results": [{"index": 1, "relevance_score": 0.93}, {"index": 0, "relevance_score": 0.12}],
            "usage": {"total_tokens": 12},
        },
        schema=_object(["results"], model=_STRING, results=_list(_object([], index=_INTEGER, relevance_score=_NUMBER)), usage=_USED),
    )


RELAYED: Mapping[str, Relayed] = {
    "/v1/chat/completions": _chat(),
    "/v1/completions": _completions(),
    "/v1/embeddings": _embeddings(),
    "/v1/responses": _responses(),
    "/v1/messages": _messages(),
    "/v1/rerank": _rerank(),
}
"""The calls by path; the gateway relays every other path below `/v1` too."""
