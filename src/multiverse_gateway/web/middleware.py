"""The middleware of everything but inference: identity, key, quota, draining, headers, one record per request; and CORS.

On `/admin` the key is checked before anything else about the request, its path and its body included.
"""

import logging
from collections.abc import Callable, Collection

import anyio
from starlette.middleware.cors import CORSMiddleware

from multiverse_gateway.core.errors import (
    AdminKeyRequired,
    GatewayError,
)
from multiverse_gateway.core.origins import OriginPolicy
from multiverse_gateway.core.paths import is_below, is_own
from multiverse_gateway.core.stored import lookup_of
from multiverse_gateway.entry.access import AccessRules
from multiverse_gateway.entry.asgi_types import REQUEST_ID, App, Message, Receive, Scope, Send
from multiverse_gateway.entry.error_responses import refusal_of
from multiverse_gateway.entry.framing import asks_for_websocket, check_head, no_websocket
from multiverse_gateway.entry.headers import cors_headers, headers_for, path_of, with_defaults
from multiverse_gateway.entry.identity import Headers, client_address, id_headers, is_forwarded, presented_keys, request_id, verified
from multiverse_gateway.entry.request_bodies import ClientGone, run_draining
from multiverse_gateway.web.error_middleware import response_of

ADDRESS = "multiverse.address"
"""Where the middleware leaves the caller's address in the scope."""
CALLER = "multiverse.caller"
"""Where the middleware leaves who sent a request to `/v1`."""
OWNER = "multiverse.owner"
"""Where the middleware leaves, in the scope of a call that an owner's token opened, what the owner's probes are counted by."""
HAS_ADMIN_KEY = "multiverse.has_admin_key"
"""What the middleware leaves in the scope of a call to `/admin` that carries the admin key, which a session does not replace everywhere."""
_log = logging.getLogger("multiverse_gateway.api")


def is_inference(scope: Scope) -> bool:
    """Return whether a server answers a request: one that carries a model, or asks for a response that a server has stored."""
    path, method = path_of(scope), scope["method"]
    if method == "POST":
        return is_below(path, "/v1") and not is_own(path)
    return lookup_of(method, path, b"") is not None and not asks_for_websocket(method, scope["headers"])


async def _refuse_websocket(scope: Scope, send: Send) -> None:
    """Answer a WebSocket of a server that makes a scope of its own for it: with 404 where the server lets us choose the answer."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close"})
        return
    path = path_of(scope)
    refusal = refusal_of(no_websocket(path), "GET", path, request_id=None)
    await send({"type": "websocket.http.response.start", "status": refusal.status, "headers": refusal.headers})
    await send({"type": "websocket.http.response.body", "body": refusal.body})


class AccessMiddleware:
    """The middleware of everything but inference: identity, key, quota, draining, headers, one record. Plain ASGI.

    `admin_digests` is asked at each request, since a key may be made after the application was; `inference` takes the requests that
    servers answer, and has rules of its own: they go past all routing; `signed_in` lets the pages' own session stand for the keys;
    `owner_digest` is the hash of the token that will do for a call about one server.
    """

    def __init__(
        self,
        app: App,
        *,
        rules: AccessRules,
        admin_digests: Callable[[], Collection[bytes]],
        inference: App | None = None,
        signed_in: Callable[[Scope], bool] | None = None,
        owner_digest: Callable[[Scope], str | None] | None = None,
        drain_timeout: float = 30.0,
    ) -> None:
        self._app = app
        self._rules = rules
        self._admin_digests = admin_digests
        self._inference = inference
        self._signed_in = signed_in
        self._owner_digest = owner_digest
        self._drain_timeout = drain_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for a request that may come in, or answer it here."""
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._inference is not None and is_inference(scope):
            await self._inference(scope, receive, send)
            return
        headers: Headers = scope["headers"]
        identity = scope[REQUEST_ID] = request_id(headers)
        path = path_of(scope)
        extra = [*id_headers(path, identity), *headers_for(path)]
        started = anyio.current_time()
        status = 0

        async def completing(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": with_defaults(message.get("headers", ()), extra)}
            await send(message)

        async def inside(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                extra.extend(await self._admit(scope, path))
            except GatewayError as error:
                await response_of(error, scope)(scope, receive, send)
            else:
                await self._app(scope, receive, send)

        try:
            await run_draining(inside, scope, receive, completing, patience=self._drain_timeout)
        except ClientGone:
            status = 499
        finally:
            level = logging.INFO if is_below(path, "/admin") else logging.DEBUG
            if _log.isEnabledFor(level):
                fields = {
                    "request_id": identity,
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "duration_ms": round(1000 * (anyio.current_time() - started), 1),
                }
                _log.log(level, "request", extra={"fields": fields})

    async def _admit(self, scope: Scope, path: str) -> list[tuple[bytes, bytes]]:
        """Return the headers that the answer gets, or raise why there is none."""
        headers: Headers = scope["headers"]
        peer = scope.get("client")
        address = scope[ADDRESS] = client_address(peer[0] if peer else None, headers, self._rules.trusted)
        if is_below(path, "/admin"):
            self._check_admin_key(scope, headers, address)
        if asks_for_websocket(scope["method"], headers):
            raise no_websocket(path)
        names = dict(reversed(headers))
        if not is_below(path, "/v1"):
            check_head(headers, names)
            return []
        rules = self._rules
        caller = scope[CALLER] = rules.sender_of(
            scope["method"], peer[0] if peer else None, headers, names, is_sound=False, is_forwarded=is_forwarded(names)
        )
        if is_below(path, "/v1/models"):  # clients read the list before each request, and as often as they like
            return []
        quota = rules.granted(caller, await rules.limiter.hit(caller.quota, caller.limit))
        return [] if quota is None else quota.headers()

    def _check_admin_key(self, scope: Scope, headers: Headers, address: str) -> None:
        if verified(headers, self._admin_digests()) is not None:
            scope[HAS_ADMIN_KEY] = True
            return
        if self._signed_in is not None and self._signed_in(scope):
            return
        if self._owner_digest is not None and presented_keys(headers):
            owner = self._owner_digest(scope)
            if owner is not None and verified(headers, (bytes.fromhex(owner),)) is not None:
                scope[OWNER] = f"owner {owner}"
                return
        self._rules.count_wrong_admin_key(address)
        raise AdminKeyRequired("The admin key is missing or wrong; send it in the header X-API-Key")


class Cors:
    """Let pages of other origins use the inference API, and nothing else of the gateway.

    Starlette answers the preflight requests; `cors_headers` decides what the other responses get, as it does at the direct door.
    """

    def __init__(self, app: App, *, policy: OriginPolicy) -> None:
        self._app = app
        self._policy = policy
        self._preflights = CORSMiddleware(
            app, allow_origins=sorted(policy.allowed), allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"], max_age=600
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight request, or run the application and complete the headers of its response."""
        if scope["type"] != "http" or not is_below(path_of(scope), "/v1"):
            await self._app(scope, receive, send)
            return
        names = dict(reversed(scope["headers"]))
        if scope["method"] == "OPTIONS" and b"origin" in names and b"access-control-request-method" in names:
            await self._preflights(scope, receive, send)
            return
        extra = cors_headers(names, self._policy)

        async def completing(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = list(message.get("headers", ()))
                message = {**message, "headers": present + [header for header in extra if header not in present]}
            await send(message)

        await self._app(scope, receive, completing if extra else send)
