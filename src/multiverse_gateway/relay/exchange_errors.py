"""The errors that exchanges end with, in words. Every sentence a client reads of them is written here, or in `core.failover`."""

from collections.abc import Sequence
from math import ceil

from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.errors import (
    AnswerTooLarge,
    GatewayError,
    InvalidClientKey,
    KeyBlocked,
    ModelNotFound,
    NoHealthyServer,
    Overloaded,
    ShuttingDown,
    StreamingUnsupported,
    TooManyAtOnce,
    UpstreamTimeout,
)
from multiverse_gateway.core.failover import Failure, FailureClass, busy_error
from multiverse_gateway.core.fairness import Share
from multiverse_gateway.core.needs import MOST_CHARACTERS, Bounds, ContextLengthExceeded, Needs
from multiverse_gateway.core.routing import Candidates, close_names
from multiverse_gateway.core.servers import ClientKey
from multiverse_gateway.core.sse import EventStream
from multiverse_gateway.core.stored import response_not_found
from multiverse_gateway.core.usage import NOBODY, OPERATOR
from multiverse_gateway.relay.ports import ClientRequest, Limits

REPORTED_ERROR = Failure(FailureClass.SERVER_ERROR, "the stream ended with an error")
STOPPING = "The gateway is shutting down. Send the request again in a moment."
NO_ROOM_FOR_EVENT = "The gateway has no memory left for an event of this size. Send the request again later."


# Without a server


def unknown_model(envelope: Envelope, names: Sequence[str]) -> GatewayError:
    """Return the refusal of a model that is not one of `names`, or of a stored response whose server is gone."""
    if envelope.server_id is not None:  # removed or changed since it was located
        return response_not_found()
    close = close_names(envelope.model, names)
    shown = ", ".join(close or names[:20]) or "none yet; register a server at /register"
    return ModelNotFound(f"There is no model {envelope.model!r} here. Models: {shown}.", param="model")


def no_usable_server(envelope: Envelope, found: Candidates) -> GatewayError:
    """Return the refusal of a request that no server can take now."""
    wait = min(60.0, max(1.0, found.returns_in if found.returns_in is not None else 60.0))
    if found.busy is not None:
        return busy_error(found.busy, wait)
    if envelope.server_id is not None:
        return NoHealthyServer(
            f"The server that has the stored response is offline, and no other server has it. Try again in {ceil(wait)} s.",
            retry_after=wait,
        )
    return NoHealthyServer(
        f"The model {envelope.model!r} is offline: none of its servers is up. Try again in {ceil(wait)} s, or choose another model.",
        param="model",
        retry_after=wait,
    )


def streaming_unsupported(envelope: Envelope) -> GatewayError:
    """Return the refusal of a stream that no server of the model offers."""
    return StreamingUnsupported(
        f"No server of the model {envelope.model!r} supports streaming. Send the request with stream=false.", param="stream"
    )


def context_exceeded(envelope: Envelope, bounds: Bounds, needs: Needs) -> GatewayError:
    """Return the refusal of a text that no server of the model has room for, in OpenAI's words."""
    least = needs.characters // MOST_CHARACTERS
    return ContextLengthExceeded(
        f"This model's maximum context length is {bounds.largest_context} tokens. However, your request has {needs.characters} characters "
        f"of text, which are at least {least} tokens. Please reduce the length of the messages.",
        param=_TEXT_FIELDS.get(envelope.path, "messages"),
    )


_TEXT_FIELDS = {"/v1/completions": "prompt", "/v1/embeddings": "input", "/v1/responses": "input"}


def _why_no_slot(model: str, share: Share | None) -> str:
    """Return the first half of a sentence: what keeps the request from being served now, a share of the slots or nothing but load."""
    if share is None:
        return f"Every server of the model {model!r} is busy"
    if share is Share.MODEL:
        return f"Requests to the model {model!r} take up half of what the gateway handles at a time, the limit of a model without caps"
    if share is Share.BULK:
        return f"Bulk requests hold {share} of the slots of the model {model!r}, their limit while interactive requests use it"
    return f"Your requests hold {share} of the slots of the model {model!r}, the limit of one client while others use it"


def no_slot(model: str, share: Share | None, *, waiting: int, seconds: float) -> GatewayError:
    """Return the refusal of a request that waited too long, or for which there is no place.

    `waiting` is the number of other requests in the queue; a slot is likely after so many seconds.
    """
    return Overloaded(
        f"{_why_no_slot(model, share)}, and {'1 other request waits' if waiting == 1 else f'{waiting} other requests wait'}. "
        f"Try again in {ceil(seconds)} s, or send fewer requests at once.",
        retry_after=seconds,
        queue_length=waiting,
    )


def too_many_at_once(request: ClientRequest, share: Share | None, *, live: int, seconds: float) -> GatewayError:
    """Return the refusal of a request that would have to wait though its client has `live` other requests, the most it may have."""
    owner = "address" if request.caller.name in (NOBODY, OPERATOR) else "key"
    requests = "1 request" if live == 1 else f"{live:,} requests"
    return TooManyAtOnce(
        f"{_why_no_slot(request.envelope.model, share)}, and your {owner} has {requests} running or waiting; "
        f"its limit is {request.caller.max_at_once:,}. Try again in {ceil(seconds)} s, or send fewer requests at once.",
        retry_after=seconds,
    )


def key_ended(key: ClientKey) -> GatewayError:
    """Return the refusal of a request whose client key was blocked or revoked, or has expired, while it waited."""
    if key.revoked_at is not None:
        return InvalidClientKey("The API key was revoked while the request waited. Ask the operator of this gateway for another one.")
    if key.blocked_at is not None:
        return KeyBlocked()
    return InvalidClientKey("The API key expired while the request waited. Ask the operator of this gateway for another one.")


# With a server, before the commit point


def no_answer_in_time(limits: Limits) -> GatewayError:
    """Return the error of a request whose time is up."""
    return UpstreamTimeout(
        f"There was no answer within {limits.request_timeout:g} seconds (REQUEST_TIMEOUT_SECONDS). "
        "Ask for less (for example a smaller max_tokens), stream the answer, or try again later."
    )


def stopping() -> GatewayError:
    """Return the error of a request that the end of the gateway interrupts."""
    return ShuttingDown(STOPPING, retry_after=5.0)


def no_room_for_answer(seconds: float) -> GatewayError:
    """Return the refusal of an answer that the budget of all answers has no room for."""
    return Overloaded(
        "The gateway has no memory left for an answer of this size. Send the request again in a few seconds.", retry_after=seconds
    )


def answer_too_large(limits: Limits) -> GatewayError:
    """Return the refusal of an answer that is larger than any may be: another server's would be as large."""
    return AnswerTooLarge(
        f"The answer is larger than {limits.max_response_bytes:,} bytes, the limit of this gateway (MULTIVERSE_MAX_RESPONSE_BYTES). "
        "Ask for less, for example with a smaller max_tokens or fewer inputs, or ask the operator to raise the limit."
    )


def event_too_large(events: EventStream) -> GatewayError:
    """Return the refusal of a stream whose first event is over a limit."""
    return AnswerTooLarge(_over_limit(events))


# After the commit point


def _over_limit(events: EventStream) -> str:
    setting = "MULTIVERSE_MAX_EVENT_BYTES" if events.dialect is Dialect.CHAT else "MULTIVERSE_MAX_LARGE_EVENT_BYTES"
    return (
        f"The server sent {events.broken}, and the gateway does not relay it. Ask for less at once, for example fewer choices or a "
        f"smaller image. The operator sets the limit in bytes with {setting}."
    )


def limit_reached(limits: Limits, received: int, events: EventStream | None) -> str:
    """Return why the gateway stops relaying an answer, of which so many bytes arrived."""
    if events is not None and events.over_limit:
        return _over_limit(events)
    if received > limits.max_stream_bytes:
        return f"The answer exceeds {limits.max_stream_bytes:,} bytes, the limit of this gateway (MULTIVERSE_MAX_STREAM_BYTES)."
    return f"The answer takes longer than {limits.max_stream_seconds:g} s, the limit of this gateway (MULTIVERSE_MAX_STREAM_SECONDS)."


def interrupted(failure: Failure) -> str:
    """Return what a client reads whose answer a server did not finish."""
    happened = "reported an error" if failure is REPORTED_ERROR else "stopped"
    why = f": {failure.reason}" if failure.kind is FailureClass.TIMEOUT else ""
    return f"The server {happened} in the middle of its answer{why}. The part that arrived is incomplete; send the request again."
