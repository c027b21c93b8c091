"""The front of both doors: what becomes of an inference request between its head and its exchange. Decides only; the doors do the I/O.

1. A request is looked at in the order identity, framing, key, method, size, room, quota; the first objection is the answer.
   So what there is no room for uses up nobody's quota, and waits for none.
2. Every answer to a request, good or bad, has the headers of its `Visit`.
3. What is held of a body is counted from its first byte, and given back exactly once, by `leave`.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

import attrs

from multiverse_gateway.core.envelope import read_envelope
from multiverse_gateway.core.errors import BadRequest, GatewayError, MethodNotAllowed, ModelForbidden, ShuttingDown, UnknownURL
from multiverse_gateway.core.usage import OPERATOR
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.relay.exchange import Client, Exchange
from multiverse_gateway.web.errors import BadFraming, Refusal, refusal_of
from multiverse_gateway.web.quotas import Quota
from multiverse_gateway.web.security import (
    Caller,
    Entrance,
    Headers,
    body_deadline,
    cors_headers,
    is_below,
    request_id,
    too_large,
    too_slow,
)

EXPLAIN = b"x-multiverse-explain"
"""Header with which our own pages ask why a server was chosen; the answer is in `x-multiverse-why`."""
NOBODY_YET = Caller("")
JSON = b"application/json"
MAX_PATH = 512
"""Characters of a path: what is remembered of paths stays small, and no call of the API comes near."""
_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~:@-]+)+")
_QUERY = re.compile(rb"[\x21-\x7e]{0,4096}")
_CONTENT_TYPE = re.compile(rb"[\x20-\x7e]{0,256}")


@lru_cache(maxsize=256)
def _is_path(path: str) -> bool:
    return _PATH.fullmatch(path) is not None


def check_target(path: str, query: bytes, content_type: bytes) -> None:
    """Let pass only what can stand in the head of the request to a server; `path` is decoded, and may hold anything.

    Raises:
        UnknownURL: The path is none of the API's.
        BadRequest: The query or the content type holds what does not belong there.
    """
    if len(path) > MAX_PATH or not _is_path(path):
        raise UnknownURL("There is no such call; the path may hold letters, digits and . _ ~ : @ - between its slashes")
    if query and _QUERY.fullmatch(query) is None:
        raise BadRequest("The query holds characters that must be percent-encoded; encode them, or leave the query out")
    if content_type != JSON and _CONTENT_TYPE.fullmatch(content_type) is None:
        raise BadRequest("The header Content-Type cannot be used; send application/json")


@attrs.define(eq=False)
class Visit:
    """One request on its way in; `arrived` is monotonic, `headers` is what every answer to it gets."""

    method: str
    path: str
    query: bytes
    fields: Headers
    names: Mapping[bytes, bytes]
    """The same as a dictionary; of a name that comes twice the first counts."""
    peer: str | None
    arrived: float
    request_id: str
    headers: list[tuple[bytes, bytes]]
    caller: Caller = NOBODY_YET
    """Who sent it; known once it was admitted."""
    held: int = 0
    """Bytes of its body that are counted as held."""


@attrs.frozen
class Front:
    """The rules of entry of one gateway, asked by both doors."""

    gateway: Gateway
    entrance: Entrance

    @property
    def must_wait(self) -> bool:
        """Tell whether `admit` has to be awaited now, because quotas are counted elsewhere."""
        return self.entrance.limiter.is_shared

    def visit(self, method: str, path: str, query: bytes, fields: Headers, peer: str | None) -> Visit:
        """Take note of a request's head; `peer` is the address at the other end of the connection."""
        settings = self.gateway.settings
        names = dict(reversed(fields))
        identity = request_id(fields)
        headers = [(b"x-request-id", identity.encode())]
        if settings.enable_cors:
            headers += cors_headers(fields, settings.cors_origins)
        return Visit(method, path, query, fields, names, peer, self.gateway.now(), identity, headers)

    def admit_now(self, visit: Visit) -> None:
        """Decide whether the body is wanted; only where not `must_wait`.

        Raises:
            GatewayError: The answer, given without reading the body.
        """
        self._check(visit)
        self._charge(visit, self.entrance.limiter.hit_local(visit.caller.quota, visit.caller.limit, visit.caller.daily_limit))

    async def admit(self, visit: Visit) -> None:
        """Do the same, wherever the quotas are counted."""
        self._check(visit)
        self._charge(visit, await self.entrance.limiter.hit(visit.caller.quota, visit.caller.limit, visit.caller.daily_limit))

    def _check(self, visit: Visit) -> None:
        visit.caller = self.entrance.receive(visit.peer, visit.fields, visit.names)
        if is_below(visit.path, "/v1/models"):
            raise MethodNotAllowed("Use GET for this call.")
        if self.gateway.shutting_down or not self.gateway.loaded:
            raise ShuttingDown("The gateway is not serving now. Send the request again in a moment.", retry_after=5.0)
        limit, expected = self.gateway.settings.max_body_bytes, int(visit.names.get(b"content-length", b"0"))
        if expected > limit:  # before the budget, which it would exceed: no later moment makes it smaller
            raise too_large(limit)
        self._check_load()
        if not self.gateway.has_room(expected):
            raise self.gateway.overloaded()

    def _charge(self, visit: Visit, quota: Quota | None) -> None:
        if quota is not None:
            if not quota.allowed:
                raise quota.error()
            visit.headers.extend(quota.headers())

    def _check_load(self) -> None:
        if not self.gateway.admission.may_start(len(self.gateway.exchanges)):
            raise self.gateway.overloaded()

    def hold(self, visit: Visit, count: int) -> None:
        """Count a piece of the body that is kept.

        Raises:
            RequestTooLarge: With it the body is larger than a body may be.
            Overloaded: With it all bodies together are.
        """
        limit = self.gateway.settings.max_body_bytes
        if visit.held + count > limit:
            raise too_large(limit)
        self.gateway.hold_body(count)
        visit.held += count

    def body_deadline(self, received: int) -> float:
        """Return the seconds after its beginning by which more of a body must have come."""
        return body_deadline(received, self.gateway.settings.client_body_timeout_seconds)

    def too_slow(self) -> GatewayError:
        """Return the refusal of a body that did not come in time."""
        return too_slow()

    def begin(self, visit: Visit, body: bytes, client: Client) -> Exchange:
        """Make the exchange of a request that arrived in full; the door starts it.

        Raises:
            GatewayError, EnvelopeError: It cannot be sent to any server.
        """
        self._check_load()  # once more: others may have come while the body was on its way
        content_type = visit.names.get(b"content-type", JSON)
        check_target(visit.path, visit.query, content_type)
        envelope = read_envelope(visit.path, content_type.decode("latin-1"), body)
        key = visit.caller.key
        if key is not None and not key.may_use(envelope.model):
            raise ModelForbidden(f"Your key is for other models: {', '.join(key.models[:20])}. Choose one of them.", param="model")
        exchange = Exchange(
            self.gateway,
            envelope,
            client,
            body=body,
            content_type=content_type,
            query=visit.query,
            request_id=visit.request_id,
            arrived=visit.arrived,
            caller=visit.caller.name,
        )
        if self.gateway.observe is not None:
            exchange.traceparent = visit.names.get(b"traceparent", b"").decode("latin-1") or None
        if visit.caller.name == OPERATOR and EXPLAIN in visit.names:
            exchange.why, exchange.shows_why = [], True
        self.gateway.begin(exchange)
        return exchange

    def leave(self, visit: Visit) -> None:
        """Give back what was held for a request; harmless when it was."""
        self.gateway.drop_body(visit.held)
        visit.held = 0

    def refused(self, error: Exception) -> None:
        """Count a request that ends in an error before there is an exchange."""
        code = getattr(error, "code", None)
        self.gateway.meter.refusals[code if isinstance(code, str) else "invalid_request"] += 1

    def refuse(self, visit: Visit, error: Exception) -> Refusal:
        """Return the answer to a request that ends in an error; a mistake of ours is logged."""
        self.refused(error)
        return refusal_of(error, visit.method, visit.path, request_id=visit.request_id)

    def misread(self, message: str) -> GatewayError:
        """Return the refusal of what is no proper HTTP."""
        return BadFraming(message)
