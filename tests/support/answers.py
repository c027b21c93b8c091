"""Bodies and events of well-behaved OpenAI-compatible (and Anthropic-compatible) servers, as bytes.

Everything is deterministic: the same arguments give the same bytes, so tests can compare what arrived with what was meant.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

CREATED = 1_700_000_000
DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def packed(value: Any) -> bytes:
    """Return `value` as compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def event(data: Any, *, name: str | None = None) -> bytes:
    """Return one complete server-sent event whose data is `data` as JSON."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return b"%sdata: %s\n\n" % (head, packed(data))


def error_body(message: str = "it broke", *, kind: str = "server_error", code: str | None = None, param: str | None = None) -> bytes:
    """Return an error in OpenAI's form."""
    return packed({"error": {"message": message, "type": kind, "param": param, "code": code}})


def model_list(models: Iterable[str], *, owner: str = "test") -> bytes:
    """Return the answer to GET /v1/models."""
    entries = [{"id": model, "object": "model", "created": CREATED, "owned_by": owner} for model in models]
    return packed({"object": "list", "data": entries})


def model_not_found(style: str, model: str) -> bytes:
    """Return the 404 body that `style` (openai, ollama or vllm) sends for a model it does not have."""
    bodies: Mapping[str, Any] = {
        "openai": {
            "error": {
                "message": f"The model `{model}` does not exist or you do not have access to it.",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        },
        "ollama": {
            "error": {"message": f'model "{model}" not found, try pulling it first', "type": "api_error", "param": None, "code": None}
        },
        "ollama-native": {"error": f"model '{model}' not found"},
        "vllm": {"object": "error", "message": f"The model `{model}` does not exist.", "type": "NotFoundError", "param": None, "code": 404},
    }
    return packed(bodies[style])


def words(speaker: str, count: int) -> list[str]:
    """Return `count` tokens of text that name the speaker."""
    return [f"{speaker} ", *(f"word{number} " for number in range(1, count))][:count]


def body(path: str, *, speaker: str, model: str, text: str | None = None) -> bytes | None:
    """Return the plain answer to a POST on `path`, or None when no such path is known."""
    said = "".join(words(speaker, 5)) if text is None else text
    if path.endswith("/chat/completions"):
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        answer: dict[str, Any] = {"id": f"chatcmpl-{speaker}", "object": "chat.completion", "created": CREATED, "model": model}
        return packed(answer | {"system_fingerprint": speaker, "choices": [choice], "usage": USAGE})
    if path.endswith("/completions"):
        choice = {"index": 0, "text": said, "logprobs": None, "finish_reason": "stop"}
        answer = {"id": f"cmpl-{speaker}", "object": "text_completion", "created": CREATED, "model": model}
        return packed(answer | {"choices": [choice], "usage": USAGE})
    if path.endswith("/embeddings"):
        vector = {"object": "embedding", "index": 0, "embedding": [0.25, -0.5, 1.0]}
        return packed({"object": "list", "data": [vector], "model": model, "usage": {"prompt_tokens": 7, "total_tokens": 7}})
    if path.endswith("/rerank"):
        return packed({"id": f"rerank-{speaker}", "model": model, "results": [{"index": 0, "relevance_score": 0.5}]})
    if path.endswith("/responses"):
        return packed(response_object(speaker, model, said))
    if path.endswith("/messages"):
        return packed(
            {"id": f"msg_{speaker}", "type": "message", "role": "assistant", "model": model}
            | {"content": [{"type": "text", "text": said}], "stop_reason": "end_turn", "stop_sequence": None}
            | {"usage": {"input_tokens": 7, "output_tokens": 5}}
        )
    return None


def response_object(speaker: str, model: str, text: str, *, status: str = "completed") -> dict[str, Any]:
    """Return an object of OpenAI's Responses API."""
    content = [{"type": "output_text", "text": text, "annotations": []}]
    message = {"type": "message", "id": f"msg_{speaker}", "role": "assistant", "status": status, "content": content}
    head = {"id": f"resp_{speaker}", "object": "response", "created_at": CREATED, "model": model, "status": status}
    usage = {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12}
    return head | {"output": [message], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": usage}


def chat_event(speaker: str, model: str, delta: Mapping[str, Any], *, finish: str | None = None, choice: int = 0) -> bytes:
    """Return one event of a chat stream."""
    head: dict[str, Any] = {"id": f"chatcmpl-{speaker}", "object": "chat.completion.chunk", "created": CREATED, "model": model}
    choices = [{"index": choice, "delta": dict(delta), "logprobs": None, "finish_reason": finish}]
    return event(head | {"system_fingerprint": speaker, "choices": choices})


def chat_events(
    speaker: str, model: str, *, count: int = 5, usage: bool = False, done: bool = True, finished: int | None = None, choices: int = 1
) -> list[bytes]:
    """Return the events of a chat stream: a role, `count` tokens and a finish per choice, then usage and `[DONE]`.

    `finished` is the number of choices that get a finish_reason (all of them by default).
    """
    events = []
    for choice in range(choices):
        events.append(chat_event(speaker, model, {"role": "assistant", "content": ""}, choice=choice))
    for word in words(speaker, count):
        events += [chat_event(speaker, model, {"content": word}, choice=choice) for choice in range(choices)]
    for choice in range(choices if finished is None else finished):
        events.append(chat_event(speaker, model, {}, finish="stop", choice=choice))
    if usage:
        head = {"id": f"chatcmpl-{speaker}", "object": "chat.completion.chunk", "created": CREATED, "model": model}
        events.append(event(head | {"choices": [], "usage": USAGE}))
    return [*events, DONE] if done else events


def text_events(
    speaker: str, model: str, *, count: int = 5, usage: bool = False, done: bool = True, finished: int | None = None
) -> list[bytes]:
    """Return the events of a text completion's stream."""
    head = {"id": f"cmpl-{speaker}", "object": "text_completion", "created": CREATED, "model": model}

    def one(text: str, finish: str | None) -> bytes:
        return event(head | {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]})

    events = [one(word, None) for word in words(speaker, count)]
    if finished is None or finished > 0:
        events.append(one("", "stop"))
    if usage:
        events.append(event(head | {"choices": [], "usage": USAGE}))
    return [*events, DONE] if done else events


def responses_events(speaker: str, model: str, *, count: int = 5, done: bool = True) -> list[bytes]:
    """Return the events of a Responses API stream; `done` adds the last one, `response.completed`."""
    text = words(speaker, count)
    started = response_object(speaker, model, "", status="in_progress")
    kinds: list[dict[str, Any]] = [{"type": "response.created", "response": started}]
    place = {"item_id": f"msg_{speaker}", "output_index": 0, "content_index": 0}
    kinds += [{"type": "response.output_text.delta", "delta": word, **place} for word in text]
    kinds.append({"type": "response.output_text.done", "text": "".join(text), **place})
    if done:
        kinds.append({"type": "response.completed", "response": response_object(speaker, model, "".join(text))})
    return [event(kind | {"sequence_number": number}, name=kind["type"]) for number, kind in enumerate(kinds)]


def messages_events(speaker: str, model: str, *, count: int = 5, done: bool = True) -> list[bytes]:
    """Return the events of an Anthropic Messages stream; `done` adds the last one, `message_stop`."""
    message = {"id": f"msg_{speaker}", "type": "message", "role": "assistant", "model": model, "content": []}
    start = message | {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 7, "output_tokens": 1}}
    kinds: list[dict[str, Any]] = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    ]
    kinds += [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}} for word in words(speaker, count)]
    kinds.append({"type": "content_block_stop", "index": 0})
    kinds.append({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": count}})
    if done:
        kinds.append({"type": "message_stop"})
    return [event(kind, name=kind["type"]) for kind in kinds]


def events(path: str, *, speaker: str, model: str, count: int = 5, usage: bool = False, done: bool = True) -> list[bytes] | None:
    """Return the events of a good stream on `path`, or None when no such path streams."""
    if path.endswith("/chat/completions"):
        return chat_events(speaker, model, count=count, usage=usage, done=done)
    if path.endswith("/completions"):
        return text_events(speaker, model, count=count, usage=usage, done=done)
    if path.endswith("/responses"):
        return responses_events(speaker, model, count=count, done=done)
    if path.endswith("/messages"):
        return messages_events(speaker, model, count=count, done=done)
    return None
