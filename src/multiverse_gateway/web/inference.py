"""The ASGI door's front: a request to `/v1` that carries a model, from its head to its exchange. Raw ASGI, no Starlette on this path."""

from multiverse_gateway.core.envelope import read_envelope
from multiverse_gateway.core.errors import MethodNotAllowed, Overloaded, ShuttingDown
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
    path_of,
    read_body,
    request_id,
    run_draining,
    with_defaults,
)


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
                visitor, body = await self._admit(scope, receive, extra)
                exchange = self._exchange(scope, visitor, body)
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
        if scope["method"] != "POST":
            raise MethodNotAllowed("Use POST for this call.")
        if gateway.shutting_down or not gateway.loaded:
            raise ShuttingDown("The gateway is not serving now. Send the request again in a moment.", retry_after=5.0)
        quota = await self._entrance.limiter.hit(visitor.client)
        if quota is not None:
            if not quota.allowed:
                raise quota.error()
            extra.extend(quota.headers())
        expected = declared_length(scope["headers"]) or 0
        if not gateway.admission.may_start(len(gateway.exchanges)) or gateway.body_bytes + expected > settings.body_budget_bytes:
            raise Overloaded("The gateway has as much to do as it can. Try again in a few seconds.", retry_after=1 + 4 * gateway.chance())
        body = await read_body(receive, settings.max_body_bytes, settings.client_body_timeout_seconds, headers=scope["headers"])
        return visitor, body

    def _exchange(self, scope: Scope, visitor: Visitor, body: bytes) -> Exchange:
        gateway = self._gateway
        arrived = gateway.now()
        content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"application/json")
        envelope = read_envelope(path_of(scope), content_type.decode("latin-1"), body)
        exchange = Exchange(
            gateway,
            envelope,
            AsgiClient([]),
            body=body,
            content_type=content_type,
            query=scope.get("query_string", b""),
            request_id=visitor.request_id,
            arrived=arrived,
        )
        gateway.begin(exchange)
        gateway.body_bytes += len(body)
        return exchange
