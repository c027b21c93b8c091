"""Errors of the application as answers (`entry.refusals`), and the middleware that gives one to whatever leaves it."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from multiverse_gateway.core.envelope import EnvelopeError
from multiverse_gateway.core.errors import (
    BadRequest,
    GatewayError,
    InternalError,
    MethodNotAllowed,
    RequestTooLarge,
    UnknownURL,
)
from multiverse_gateway.core.paths import hint, is_below
from multiverse_gateway.entry.asgi_types import REQUEST_ID, App, Message, Receive, Scope, Send
from multiverse_gateway.entry.error_responses import MISTAKE, refusal_of
from multiverse_gateway.entry.headers import API_HEADERS, path_of, with_defaults

_CLOSE = (b"connection", b"close")


def _of_starlette(error: HTTPException, method: str, path: str) -> tuple[GatewayError, list[tuple[bytes, bytes]]]:
    """Turn what Starlette raised into an error of ours, and the headers that come on top of its own."""
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (error.headers or {}).items()]
    shown = f"{method[:16]} {path[:128]}".encode(errors="replace").decode()
    if error.status_code == 404:
        return UnknownURL(hint(path) or f"There is nothing at {shown}; /docs lists every path"), headers
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return MethodNotAllowed(f"{shown} is not allowed; use {allowed}"), headers
    if error.status_code == 413:
        return RequestTooLarge("The body is too large; send a smaller one"), headers
    if 400 <= error.status_code < 500:
        return BadRequest("The request is not valid; compare it with the documentation at /docs"), headers
    return InternalError(MISTAKE), headers


def response_of(error: Exception, scope: Scope) -> Response:
    """Make the answer for an error; one that leaves its connection unusable closes it (HTTP/1.1 only, RFC 9113 8.2.2)."""
    method, path = scope.get("method", "?"), path_of(scope)
    extra: list[tuple[bytes, bytes]] = []
    if isinstance(error, HTTPException):
        error, extra = _of_starlette(error, method, path)
    refusal = refusal_of(error, method, path, request_id=scope.get(REQUEST_ID), extra=extra)
    response = Response(refusal.body, status_code=refusal.status)
    response.raw_headers.extend(refusal.headers)
    if refusal.closes and str(scope.get("http_version", "1.1")).startswith("1"):
        response.raw_headers.append(_CLOSE)
    return response


async def _answer(request: Request, error: Exception) -> Response:
    return response_of(error, request.scope)


EXCEPTION_HANDLERS: Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    HTTPException: _answer,
    GatewayError: _answer,
    EnvelopeError: _answer,
}
"""For `Starlette(exception_handlers=...)`: what its router and our endpoints raise."""


class Errors:
    """Answer whatever leaves the application, outermost of all middleware: plain ASGI, so that streams stay streams.

    Every answer below `/v1` leaves with `API_HEADERS`, whichever part of the gateway gave it. A mistake of ours is logged with its
    traceback and the request's id, and the client learns only the id. One in mid-answer ends the body: by breaking the connection on
    HTTP/1.1; on HTTP/2, where an exception would leave the stream open, by its end.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = ended = False
        is_api = is_below(path_of(scope), "/v1")

        async def noting(message: Message) -> None:
            nonlocal started, ended
            if message["type"] == "http.response.start":
                started = True
                if is_api:
                    message = {**message, "headers": with_defaults(message.get("headers", ()), API_HEADERS)}
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            response = response_of(error, scope)
            if not started:
                await response(scope, receive, noting)
            elif not ended and not str(scope.get("http_version", "1.1")).startswith("1"):
                with anyio.move_on_after(2):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif not ended:
                raise
