"""The ASGI door's endpoint: a request to `/v1` that carries a model. Raw ASGI, no Starlette on this path."""

from functools import partial

from multiverse_gateway.entry.asgi_types import REQUEST_ID, Message, Receive, Scope, Send
from multiverse_gateway.entry.framing import declared_length
from multiverse_gateway.entry.headers import path_of
from multiverse_gateway.entry.intake import IncomingRequest, Intake
from multiverse_gateway.entry.request_bodies import ClientGone, read_pieces, run_draining
from multiverse_gateway.relay.asgi import AsgiClient, answer
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import RequestHead
from multiverse_gateway.web.error_middleware import response_of


class Inference:
    """Answer `POST /v1/...` with a server's answer, or with the reason why there is none."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        peer = scope.get("client")
        query = scope.get("query_string", b"")
        head = RequestHead(scope["method"], path_of(scope), query, scope["headers"])
        request = self._intake.request(head, declared_length(head.fields) or 0, peer[0] if peer else None)
        scope[REQUEST_ID] = request.request_id
        settings = self._intake.gateway.settings
        whole = False

        async def reading() -> Message:
            nonlocal whole
            message = await receive()
            whole = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def completing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *request.headers]}
            await send(message)

        client = AsgiClient()
        try:
            exchange = await self._begin(request, reading, client)
            await answer(client, exchange, scope, receive, completing, write_timeout=settings.client_write_timeout_seconds)
        except ClientGone:
            pass
        except Exception as error:
            if client.exchange is not None:
                raise  # the answer has begun
            self._intake.refused(error)
            response = response_of(error, scope)
            if whole:
                await response(scope, receive, completing)
            else:
                await run_draining(response, scope, receive, completing, patience=settings.client_body_timeout_seconds)
        finally:
            self._intake.release_body(request)

    async def _begin(self, request: IncomingRequest, receive: Receive, client: AsgiClient) -> Exchange:
        intake, settings = self._intake, self._intake.gateway.settings
        waiting = intake.admit(request)
        if waiting is not None:
            await waiting
        body = await read_pieces(receive, settings.client_body_timeout_seconds, partial(intake.hold, request))
        return intake.begin(request, body, client)
