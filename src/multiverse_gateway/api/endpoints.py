"""What the JSON endpoints share: their descriptions, and how they read bodies and write responses."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import attrs
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.entry.asgi_types import Scope
from multiverse_gateway.entry.request_bodies import read_body, read_object
from multiverse_gateway.gateway import Gateway

Endpoint = Callable[[Request], Awaitable[Response]]


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response in ASCII, which can represent invalid Unicode too; `content` may contain records."""
    body = json.dumps(content, allow_nan=False, separators=(",", ":"), default=_members)
    return Response(body, status, headers, media_type="application/json")


def _members(record: Any) -> dict[str, Any]:
    """Return the fields of a record by name, without those that are unset."""
    return attrs.asdict(record, filter=lambda _, value: value is not UNSET)


async def body_of(request: Request, gateway: Gateway) -> dict[str, Any]:
    """Read the JSON object that a request carries.

    Raises:
        GatewayError: It is too large, too slow, or none.
    """
    settings = gateway.settings
    body = await read_body(
        request.receive, settings.max_admin_body_bytes, settings.client_body_timeout_seconds, headers=request.scope["headers"]
    )
    return read_object(body)


@attrs.frozen(kw_only=True)
class Call:
    """One method of a path with its documentation, apart from the docstring of its endpoint.

    `answers` are the types of what it answers with, by status; a text is a media type, several stand in a tuple. `query` and `body` are
    those of what it takes; `examples` of answers, by media type, are needed where the type does not say what an answer looks like;
    `errors` the refusals that are its own: what any call of its kind is refused with is known. `for_owners`:
    the token of the server's owner will do.
    """

    endpoint: Endpoint
    answers: Mapping[int, Any]
    query: type | None = None
    body: type | None = None
    examples: Mapping[str, Any] = attrs.field(factory=dict)
    errors: tuple[type[GatewayError], ...] = ()
    for_owners: bool = False


def owned(routes: Sequence[BaseRoute], scope: Scope) -> str | None:
    """Return the id of the server that a call is about, if an owner token authorizes the call."""
    for route in routes:
        if isinstance(route, ApiRoute):
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                return child_scope["path_params"].get("server_id") if route.calls[method].for_owners else None
    return None


class ApiRoute(Route):
    """A path with its documented calls; a 405 response lists all methods of the path."""

    def __init__(self, path: str, *, name: str | None = None, **calls: Call) -> None:
        self.calls = calls

        async def serve(request: Request) -> Response:
            return await calls["GET" if request.method == "HEAD" else request.method].endpoint(request)

        super().__init__(path, serve, methods=list(calls), name=name or path)
