"""The calls for stored responses, for the OpenAPI document. The inference endpoint serves them, not a route."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.api.endpoints import ApiRoute, Call, Endpoint
from multiverse_gateway.api.response_types import DeletedResponse, InputItems, StoredAnswer
from multiverse_gateway.core.errors import (
    BackendBusy,
    DailyLimitReached,
    MethodNotAllowed,
    NoHealthyServer,
    Overloaded,
    ResponseNotFound,
    ShuttingDown,
    StorageUnavailable,
    StreamingUnsupported,
    UpstreamAuthFailed,
    UpstreamBadResponse,
    UpstreamFailed,
    UpstreamTimeout,
)

_JSON = "application/json"
_EVENT_STREAM = "text/event-stream"
PATH = "/v1/responses/{response_id}"
_EVENTS = 'event: response.completed\ndata: {"type":"response.completed","sequence_number":9,"response":{"id":"resp_1"}}\n\n'
_ERRORS = (
    ResponseNotFound,
    StreamingUnsupported,
    DailyLimitReached,
    BackendBusy,
    UpstreamFailed,
    UpstreamAuthFailed,
    UpstreamBadResponse,
    NoHealthyServer,
    Overloaded,
    ShuttingDown,
    StorageUnavailable,
    UpstreamTimeout,
)


def _endpoint(description: str) -> Endpoint:
    async def refuse(request: Request) -> Response:
        raise MethodNotAllowed("Use GET for this call.")  # for HEAD, the only method that comes here

    refuse.__doc__ = description
    return refuse


def _call(description: str, answer: Any, examples: Mapping[str, Any]) -> Call:
    return Call(endpoint=_endpoint(description), answers={200: answer}, examples=examples, errors=_ERRORS)


def stored_routes() -> list[Route]:
    """Make the routes of stored responses."""
    response = {"id": "resp_1", "object": "response", "status": "completed", "output": []}
    deleted = {"id": "resp_1", "object": "response", "deleted": True}
    return [
        ApiRoute(
            PATH,
            name="stored_response",
            GET=_call(
                "Return a stored response, or its events with `stream=true`. The server that created it answers. "
                "Only the key that created it may read it or, without a key, only the same address.",
                (StoredAnswer, _EVENT_STREAM),
                {_JSON: response, _EVENT_STREAM: _EVENTS},
            ),
            DELETE=_call("Delete a stored response on the server that created it.", DeletedResponse, {_JSON: deleted}),
        ),
        ApiRoute(
            f"{PATH}/cancel",
            name="cancel_response",
            POST=_call("Cancel a background response on the server that creates it.", StoredAnswer, {_JSON: response}),
        ),
        ApiRoute(
            f"{PATH}/input_items",
            name="response_input",
            GET=_call(
                "List the input items of a stored response. The server that created it answers.",
                InputItems,
                {_JSON: {"object": "list", "data": []}},
            ),
        ),
    ]
