"""What the JSON endpoints have in common: how they read bodies and queries, and how they write."""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from multiverse_gateway.core.errors import BadRequest
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.web.security import read_body, read_object

Endpoint = Callable[[Request], Awaitable[Response]]


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Write JSON in ASCII, which also takes what is no valid Unicode."""
    body = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(body, status, headers, media_type="application/json")


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


def by_method(**endpoints: Endpoint) -> Endpoint:
    """Make one endpoint of several, so that a 405 lists all methods of the path; the route names the same methods."""

    async def serve(request: Request) -> Response:
        return await endpoints[request.method](request)

    return serve


# Queries


def query_word(request: Request, name: str, words: Iterable[str], default: str) -> str:
    """Return one of some words.

    Raises:
        BadRequest: It is none of them.
    """
    value = request.query_params.get(name, default)
    known = tuple(words)
    if value not in known:
        raise BadRequest(f"{name} must be one of {', '.join(known)}", param=name)
    return value


def query_flag(request: Request, name: str) -> bool:
    """Return a truth, false when it is not given.

    Raises:
        BadRequest: It is neither true nor false.
    """
    return query_word(request, name, ("true", "false", "1", "0"), "false") in ("true", "1")


def query_number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """Return a whole number in a range.

    Raises:
        BadRequest: It is none, or out of the range.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and least <= int(text) <= most):
        raise BadRequest(f"{name} must be a whole number from {least:,} to {most:,}", param=name)
    return int(text)
