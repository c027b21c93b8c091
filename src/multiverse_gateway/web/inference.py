"""The ASGI door's front: a request to `/v1` that carries a model, from its head to its exchange. Raw ASGI, no Starlette on this path."""

import re

from multiverse_gateway.core.envelope import read_envelope
from multiverse_gateway.core.errors import BadRequest, MethodNotAllowed, Overloaded, ShuttingDown, UnknownURL
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.relay.asgi import AsgiClient, answer
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.web.errors import REQUEST_ID, Receive, Scope, Send, response_of
from multiverse_gateway.web.security import (
    ClientGone,
    Entrance,
    Visitor,
    cors_headers,
    declared_length,
    is_below,
    path_of,
    read_body,
    refuse_length,
    request_id,
    run_draining,
    with_defaults,
)

_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~:@-]+)+")
_QUERY = re.compile(rb"[\x21-\x7e]{0,4096}")
_CONTENT_TYPE = re.compile(rb"[\x20-\x7e]{0,256}")


def check_target(path: str, query: bytes, content_type: bytes) -> None:
    """Let pass only what can stand in the head of the request to a server; `path` is decoded, and may hold anything.

    Raises:
        UnknownURL: The path is none of the API's.
        BadRequest: The query or the content type holds what does not belong there.
    """
    if _PATH.fullmatch(path) is None:
        raise UnknownURL("There is no such call; the path may hold letters, digits and . _ ~ : @ - between its slashes")
    if _QUERY.fullmatch(query) is None:
        raise BadRequest("The query holds characters that must be percent-encoded; encode them, or leave the query out")
    if _CONTENT_TYPE.fullmatch(content_type) is None:
        raise BadRequest("The header Content-Type cannot be used; send application/json")


class Inference:
    """Answer `POST /v1/...` with a server's answer, or with the reason why there is none."""

    def __init__(self, gateway: Gateway, entrance: Entrance) -> None:
        self._gateway = gateway
        self._entrance = entrance
        self._origins = gateway.settings.cors_origins if gateway.settings.enable_cors else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = scope["headers"]
        identity = scope[REQUEST_ID] = request_id(headers)
        extra = [(b"x-request-id", identity.encode()), *cors_headers(headers, self._origins)]

        async def completing(message: object) -> None:
            assert isinstance(message, dict)
            if message["type"] == "http.response.start":
                message = {**message, "headers": with_defaults(message.get("headers", ()), extra)}
            await send(message)

        async def inside(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                arrived = self._gateway.now()
                visitor, body = await self._admit(scope, receive, extra)
                exchange = self._exchange(scope, visitor, body, arrived)
            except ClientGone:
                return
            except Exception as error:  # noqa: BLE001  `response_of` knows ours; anything else is raised again by `Errors`
                await self._refuse(error, scope, receive, send)
                return
            try:
                await answer(
                    exchange.client,  # type: ignore[arg-type]
                    exchange,
                    scope,
                    receive,
                    send,
                    write_timeout=self._gateway.settings.client_write_timeout_seconds,
                )
            finally:
                self._gateway.body_bytes -= len(body)

        await run_draining(inside, scope, receive, completing, patience=self._gateway.settings.client_body_timeout_seconds)

    async def _refuse(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        response = response_of(error, scope)
        if response.status_code == 500:
            raise error
        await response(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, extra: list[tuple[bytes, bytes]]) -> tuple[Visitor, bytes]:
        gateway, settings = self._gateway, self._gateway.settings
        peer = scope.get("client")
        visitor = self._entrance.receive(peer[0] if peer else None, scope["headers"])
        if is_below(path_of(scope), "/v1/models"):
            raise MethodNotAllowed("Use GET for this call.")
        if scope["method"] != "POST":
            raise MethodNotAllowed("Use POST for this call.")
        if gateway.shutting_down or not gateway.loaded:
            raise ShuttingDown("The gateway is not serving now. Send the request again in a moment.", retry_after=5.0)
        quota = await self._entrance.limiter.hit(visitor.client)
        if quota is not None:
            if not quota.allowed:
                raise quota.error()
            extra.extend(quota.headers())
        refused = refuse_length(scope["headers"], settings.max_body_bytes)
        if refused is not None:
            raise refused  # before the budget, which it would exceed: no later moment makes it smaller
        expected = declared_length(scope["headers"]) or 0
        if not gateway.admission.may_start(len(gateway.exchanges)) or gateway.body_bytes + expected > settings.body_budget_bytes:
            raise Overloaded("The gateway has as much to do as it can. Try again in a few seconds.", retry_after=1 + 4 * gateway.chance())
        body = await read_body(receive, settings.max_body_bytes, settings.client_body_timeout_seconds, headers=scope["headers"])
        return visitor, body

    def _exchange(self, scope: Scope, visitor: Visitor, body: bytes, arrived: float) -> Exchange:
        gateway = self._gateway
        path, query = path_of(scope), scope.get("query_string", b"")
        content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"application/json")
        check_target(path, query, content_type)
        envelope = read_envelope(path, content_type.decode("latin-1"), body)
        exchange = Exchange(
            gateway,
            envelope,
            AsgiClient([]),
            body=body,
            content_type=content_type,
            query=query,
            request_id=visitor.request_id,
            arrived=arrived,
        )
        gateway.begin(exchange)
        gateway.body_bytes += len(body)
        return exchange
