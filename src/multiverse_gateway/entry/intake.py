"""The intake of both doors: what becomes of an inference request between its head and its exchange. Decides only; the doors do the I/O.

1. A request is looked at in the order identity, framing, key, method, size, room, requests at once, minute, day; the first objection is
   the answer, and a refused request uses up nothing of any limit. Minute and day are counted before the body is read. Whether the client
   has too many requests at once matters only if this one would have to wait, which its exchange finds out. So it is the one objection
   that may come after the counting, and then the counting is taken back (`IncomingRequest.take_back`), as for a body that there is no
   room for.
2. Every answer to a request, good or bad, has the headers of its `IncomingRequest`.
3. What is held of a body is counted from its first byte, and given back exactly once, by `release_body`.
"""

import re
from collections.abc import Callable, Coroutine
from functools import lru_cache, partial
from random import getrandbits
from typing import Any

import attrs
from msgspec.structs import replace

from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.errors import (
    BadRequest,
    GatewayError,
    MethodNotAllowed,
    ModelForbidden,
    ShuttingDown,
    UnknownURL,
    is_anthropic,
)
from multiverse_gateway.core.forms import is_form
from multiverse_gateway.core.forwarding import forwarded_lines
from multiverse_gateway.core.lenient import BOM
from multiverse_gateway.core.load import SMALL_BODY_BYTES
from multiverse_gateway.core.paths import hint, is_own
from multiverse_gateway.core.reading import read_envelope
from multiverse_gateway.core.stored import lookup_of
from multiverse_gateway.entry.access import AccessRules
from multiverse_gateway.entry.error_responses import BadFraming, Refusal, refusal_of
from multiverse_gateway.entry.framing import check_request
from multiverse_gateway.entry.headers import API_HEADERS, NO_STORE, cors_headers
from multiverse_gateway.entry.identity import id_headers, is_forwarded, presented_id
from multiverse_gateway.entry.quotas import Quota
from multiverse_gateway.entry.request_bodies import body_deadline, too_large, too_slow
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers, HeadFacts, RequestHead
from multiverse_gateway.relay.ports import Client, ClientRequest

EXPLAIN = b"x-multiverse-explain"
"""Header with which our own pages ask why a server was chosen; the answer is in `x-multiverse-why`."""
PRIORITY = b"x-multiverse-priority"
"""Header of a request: with the value `bulk` it waits in the queue while requests that people wait for take their turns."""
QUEUE = b"x-multiverse-queue"
"""Header of a request: with the value `comments` a stream gets comments with its place while it waits."""
NOBODY_YET = Caller("")
JSON = b"application/json"
MAX_PATH = 512
"""Characters of a path: what is remembered of paths stays small, and no call of the API comes near."""
_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~:@=+-]+)+")
_QUERY = re.compile(rb"[\x21-\x7e]{0,4096}")
_CONTENT_TYPE = re.compile(rb"[\x20-\x7e]{0,256}")


# Saves 0.2 µs per head that is not remembered; `MAX_PATH` bounds what the cache may hold.
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
        raise UnknownURL("There is no such call; between its slashes a path may contain letters, digits and . _ ~ : @ = + -")
    if query and _QUERY.fullmatch(query) is None:
        raise BadRequest("The query contains characters that must be percent-encoded; encode them, or remove the query")
    if content_type != JSON and _CONTENT_TYPE.fullmatch(content_type) is None:
        raise BadRequest("The Content-Type header is not valid; send application/json")


def check_call(path: str) -> None:
    """Let pass only the path of a call by POST that may exist; only the servers know whether they support it.

    Raises:
        MethodNotAllowed: The gateway's own lists are only read.
        UnknownURL: The client's base URL is wrong.
    """
    if is_own(path):
        raise MethodNotAllowed("Use GET for this call.", "GET, HEAD")
    advice = hint(path)
    if advice is not None:
        raise UnknownURL(advice)


def _passes(check: Callable[..., None], *what: object) -> bool:
    """Return whether a check raises nothing. A request that fails it gets the error from the check itself, which makes a new one."""
    try:
        check(*what)
    except GatewayError:
        return False
    return True


@attrs.define(eq=False)
class IncomingRequest(ClientRequest):
    """One request on its way in, and then what its exchange answers; `length` is that of its body, if said.

    That it is one object saves 1 % of a request. `envelope` and `body` are set by `Intake.begin`, once the body has arrived in full.
    """

    envelope: Envelope = attrs.field(init=False)
    body: bytes = attrs.field(init=False)
    head: RequestHead
    length: int
    peer: str | None
    intake: "Intake"
    caller: Caller = NOBODY_YET
    """Who sent it; known once it was admitted, as is `quota`."""
    quota: Quota | None = None
    held: int = 0
    """Bytes of its body that are counted as held."""

    def take_back(self) -> None:
        """Remove the request from its quotas: it is refused for another limit. Called once at most, and harmless if it was not counted."""
        self.intake.take_back(self)

    @property
    def headers(self) -> Headers:
        """What every answer to it gets."""
        quota = [] if self.quota is None else self.quota.headers()
        return [*id_headers(self.head.path, self.request_id), *self.facts.headers, *quota]

    def lines(self) -> bytes:
        """Return the same as HTTP/1.1 writes it. No property: to read one costs half as much again as a call."""
        quota = b"" if self.quota is None else self.quota.lines()
        identity = self.request_id.encode()
        if self.facts.is_anthropic:
            return b"x-request-id: %b\r\nrequest-id: %b\r\n%b%b" % (identity, identity, self.facts.lines, quota)
        return b"x-request-id: %b\r\n%b%b" % (identity, self.facts.lines, quota)


@attrs.frozen
class Intake:
    """The rules of entry of one gateway, asked by both doors."""

    gateway: Gateway
    rules: AccessRules

    def request(self, head: RequestHead, length: int, peer: str | None) -> IncomingRequest:
        """Take note of a request; `peer` is the address at the other end of the connection."""
        facts = head.facts
        if facts is None:
            facts = head.facts = self._read(head)
        identity = facts.request_id or f"{getrandbits(128):032x}"  # `new_id`, written out: a call is 0.2 % of a request
        return IncomingRequest(identity, self.gateway.now(), facts, head, length, peer, self)

    def _read(self, head: RequestHead) -> HeadFacts:
        names, origins = head.names, self.rules.origins
        content_type = names.get(b"content-type", JSON)
        headers = [*API_HEADERS, *cors_headers(names, origins)]
        lookup = lookup_of(head.method, head.path, head.query)
        if lookup is not None:
            headers.append(NO_STORE)
        return HeadFacts(
            is_sound=_passes(check_request, head.method, head.fields, names, origins),
            is_call=_passes(check_call, head.path),
            is_callable=_passes(check_target, head.path, head.query, content_type),
            request_id=presented_id(names),
            headers=headers,
            is_anthropic=is_anthropic(head.path),
            lines=b"".join([b"%b: %b\r\n" % header for header in headers]),
            query=head.query,
            content_type=content_type,
            media=content_type.decode("latin-1"),
            sent_type=content_type if is_form(content_type.decode("latin-1")) else JSON,
            traceparent=names.get(b"traceparent", b"").decode("latin-1") or None,
            forwarded=forwarded_lines(head.fields, names),
            is_forwarded=is_forwarded(names),
            explains=EXPLAIN in names,
            is_bulk=names.get(PRIORITY, b"").strip().lower() == b"bulk",
            wants_comments=names.get(QUEUE, b"").strip().lower() == b"comments",
            lookup=lookup,
        )

    def admit(self, request: IncomingRequest) -> Coroutine[Any, Any, None] | None:
        """Decide whether the body is wanted. Return `None` if it is, or a coroutine that decides when the shared quotas have answered.

        Raises:
            GatewayError: The response to the request, whose body is not read. The coroutine raises it, too.
        """
        self._check(request)
        rules, caller = self.rules, request.caller
        limiter, key = rules.limiter, caller.key
        if limiter.storage is not None and limiter.is_shared:
            return self._admit_later(request)
        quota = limiter.hit_local(caller.quota, caller.limit, None if key is None else key.daily_limit)
        # As `granted` does, which is called only for a refusal: that saves 0.5 % of a request.
        request.quota = quota if quota is None or quota.wait is None else rules.granted(caller, quota)
        return None

    async def _admit_later(self, request: IncomingRequest) -> None:
        rules, caller = self.rules, request.caller
        request.quota = rules.granted(caller, await rules.limiter.hit(caller.quota, caller.limit, caller.daily_limit))
        if not self._has_room(request):
            raise self._no_room(request)  # other requests came in the meantime

    def _check(self, request: IncomingRequest) -> None:
        gateway, head, facts = self.gateway, request.head, request.facts
        request.caller = self.rules.sender_of(
            head.method, request.peer, head.fields, head.names, is_sound=facts.is_sound, is_forwarded=facts.is_forwarded
        )
        if not facts.is_call:
            check_call(head.path)
        if gateway.admission.is_closed or not gateway.registrations.is_loaded:
            raise ShuttingDown("The gateway is not ready. Send the request again in a moment.", retry_after=5.0)
        limit = gateway.settings.max_body_bytes
        if request.length > limit:  # before the budget, which it would exceed: no later moment makes it smaller
            raise too_large(limit)
        if not gateway.admission.has_much_room(len(gateway.exchanges), request.length) and not self._has_room(request):
            raise gateway.overloaded()

    def _has_room(self, request: IncomingRequest) -> bool:
        """Return whether one more request may start, and hold a body of its length; a client that has much leaves room for others."""
        gateway = self.gateway
        may_start = gateway.admission.may_start(len(gateway.exchanges))
        return may_start and self._leaves_room(request) and self._may_hold(request, request.length)

    def _leaves_room(self, request: IncomingRequest) -> bool:
        gateway, caller = self.gateway, request.caller
        live = gateway.room.at_once.live(caller.quota)
        return caller.has_no_limits or gateway.admission.leaves_room(len(gateway.exchanges), live)

    def _may_hold(self, request: IncomingRequest, count: int) -> bool:
        bodies, caller = self.gateway.admission.bodies, request.caller
        return bodies.has_room(count) if caller.has_no_limits else bodies.may_hold(caller.quota, count, request.held)

    def take_back(self, request: IncomingRequest) -> None:
        """Remove the request from its quotas, as `IncomingRequest.take_back` describes."""
        quota, caller, limiter = request.quota, request.caller, self.rules.limiter
        if quota is None:
            return
        request.quota = replace(quota, remaining=min(quota.limit, quota.remaining + 1))
        is_daily = caller.daily_limit is not None
        if quota.is_shared:
            call = partial(limiter.take_back_shared, caller.quota, caller.limit, request.arrived, daily=is_daily)
            self.gateway.housekeeping.in_background(call)
        else:
            limiter.take_back(caller.quota, request.arrived, daily=is_daily)

    def _no_room(self, request: IncomingRequest) -> GatewayError:
        """Return the refusal of a request that there is no room for, though there was when it was counted."""
        self.take_back(request)
        return self.gateway.overloaded()

    def hold(self, request: IncomingRequest, count: int) -> None:
        """Count a piece of the body that is kept.

        Raises:
            RequestTooLarge: With it the body is larger than a body may be.
            Overloaded: With it all bodies together are.
        """
        gateway = self.gateway
        limit = gateway.settings.max_body_bytes
        if request.held + count > limit:
            raise too_large(limit)
        if not self._may_hold(request, count):
            raise self._no_room(request)
        bodies, before = gateway.admission.bodies, request.held
        bodies.held += count
        request.held = held = before + count
        if held > SMALL_BODY_BYTES:
            bodies.count_large(request.caller.quota, count if before > SMALL_BODY_BYTES else held)

    def body_deadline(self, received: int, elapsed: float) -> float:
        """Return the seconds after its beginning by which more of a body must arrive; its last piece arrived after `elapsed` seconds."""
        return body_deadline(received, elapsed, self.gateway.settings.client_body_timeout_seconds)

    def too_slow(self) -> GatewayError:
        """Return the refusal of a body that did not come in time."""
        return too_slow()

    def begin(self, request: IncomingRequest, body: bytes, client: Client) -> Exchange:
        """Make the exchange of a request that arrived in full; the door starts it.

        Raises:
            GatewayError, EnvelopeError: It cannot be sent to any server.
        """
        gateway, facts, path = self.gateway, request.facts, request.head.path
        if request.held:  # others may have come while the body was on its way
            if not gateway.admission.may_start(len(gateway.exchanges)) or not self._leaves_room(request):
                raise self._no_room(request)
            if len(body) > request.held:
                self.hold(request, len(body) - request.held)
        elif len(body) <= request.length:  # it came with the head, for whose `length` there was room just now
            request.held = len(body)
            gateway.admission.bodies.held += request.held
            if request.held > SMALL_BODY_BYTES:
                gateway.admission.bodies.count_large(request.caller.quota, request.held)
        else:
            self.hold(request, len(body))
        if not facts.is_callable:
            check_target(path, request.head.query, facts.content_type)
        if body[:1] == BOM[:1]:
            body = body.removeprefix(BOM)
        envelope = facts.lookup
        if envelope is None:
            envelope = read_envelope(path, facts.media, body)
        caller = request.caller
        key = caller.key
        if key is not None and not envelope.is_lookup and not key.may_use(envelope.model):
            raise ModelForbidden(f"Your key is for other models: {', '.join(key.models[:20])}. Choose one of them.", param="model")
        request.envelope = envelope
        request.body = body
        exchange = Exchange(gateway, request, client)
        gateway.begin(exchange)
        return exchange

    def release_body(self, request: IncomingRequest) -> None:
        """Stop counting the bytes that are held of the body. A second call changes nothing."""
        bodies = self.gateway.admission.bodies
        bodies.held -= request.held
        if request.held > SMALL_BODY_BYTES:
            bodies.count_large(request.caller.quota, -request.held)
        request.held = 0

    def refused(self, error: Exception) -> None:
        """Count a request that ends in an error before there is an exchange."""
        code = getattr(error, "code", None)
        self.gateway.usage_book.meter.refusals[code if isinstance(code, str) else "invalid_request"] += 1

    def refuse(self, request: IncomingRequest, error: Exception) -> Refusal:
        """Return the answer to a request that ends in an error; a mistake of ours is logged."""
        self.refused(error)
        return refusal_of(error, request.head.method, request.head.path, request_id=request.request_id)

    def misread(self, message: str) -> GatewayError:
        """Return the refusal of a request that is not valid HTTP."""
        return BadFraming(message)
