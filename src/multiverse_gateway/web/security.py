"""Who may come in, how much they may bring, how often: functions for both doors, and the middleware for everything but inference.

1. What a rule says stands here once; the inference doors call the same functions.
2. On `/admin` the key is checked before anything else about the request, its path and its body included.
3. Only a key that was verified names a caller; any other is counted by its address, or a new key would be a new quota.
4. A client on this machine has no limits without a key, unless a header shows that a proxy or a tunnel forwarded the request.
"""

import logging
import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import anyio
import attrs
import msgspec
from starlette.middleware.cors import CORSMiddleware

from multiverse_gateway.api.errors import REQUEST_ID, App, BadFraming, Message, Receive, Scope, Send, refusal_of, response_of
from multiverse_gateway.core.budget import DayCounts
from multiverse_gateway.core.errors import (
    AdminKeyRequired,
    CompressedRequest,
    ForeignForm,
    GatewayError,
    InvalidClientKey,
    InvalidJSON,
    LoopDetected,
    RateLimited,
    RequestTimeout,
    RequestTooLarge,
    UnknownURL,
    is_anthropic,
)
from multiverse_gateway.core.lenient import BOM
from multiverse_gateway.core.origins import OriginPolicy
from multiverse_gateway.core.paths import is_below, is_own
from multiverse_gateway.core.pauses import stopped_seconds
from multiverse_gateway.core.servers import ClientKey
from multiverse_gateway.core.stored import lookup_of
from multiverse_gateway.core.usage import NOBODY, OPERATOR
from multiverse_gateway.keys import is_known, key_digest
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.declaration import KEY_PER_MINUTE
from multiverse_gateway.settings.policies import origin_policy
from multiverse_gateway.web.headers import EXPOSED_HEADERS, headers_for, path_of, with_defaults
from multiverse_gateway.web.quotas import LocalWindow, Quota, RateLimiter, rate_limiter

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case, in order, repetitions kept: what ASGI calls `scope["headers"]`."""
Network = IPv4Network | IPv6Network

ADDRESS = "multiverse.address"
"""Where the middleware leaves the caller's address in the scope."""
CALLER = "multiverse.caller"
"""Where the middleware leaves who sent a request to `/v1`."""
OWNER = "multiverse.owner"
"""Where the middleware leaves, in the scope of a call that an owner's token opened, what the owner's probes are counted by."""
HAS_ADMIN_KEY = "multiverse.has_admin_key"
"""What the middleware leaves in the scope of a call to `/admin` that carries the admin key, which a session does not replace everywhere."""
HOP = b"x-multiverse-hop"
MAX_ADMIN_FAILURES = 60
MAX_PROBES = 10

_log = logging.getLogger("multiverse_gateway.api")


# The request's id


_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def presented_id(names: Mapping[bytes, bytes]) -> str | None:
    """Return the caller's own `x-request-id` if it is a safe token."""
    value = names.get(b"x-request-id", b"")
    return value.decode() if _REQUEST_ID.fullmatch(value) else None


def new_id() -> str:
    """Return an id of 128 random bits."""
    return f"{random.getrandbits(128):032x}"


def id_headers(path: str, identity: str) -> list[tuple[bytes, bytes]]:
    """Return the headers that carry a request's id in the answer to a call: Anthropic's clients read `request-id`."""
    value = identity.encode()
    return [(b"x-request-id", value), (b"request-id", value)] if is_anthropic(path) else [(b"x-request-id", value)]


def request_id(headers: Headers) -> str:
    """Return the caller's own `x-request-id` if it is a safe token, else a new one."""
    return presented_id(dict(reversed(headers))) or new_id()


# The caller's address


@lru_cache(maxsize=4096)
def address_key(address: str) -> str:
    """Return what stands for an address when calls are counted: itself, for IPv6 its /64, which one host can use up alone.

    >>> address_key("2001:db8:1:2:3:4:5:6"), address_key("::ffff:192.0.2.7"), address_key("a pipe")
    ('2001:db8:1:2::/64', '192.0.2.7', 'unknown')
    """
    ip = _parse(address)
    if ip is None:
        return "unknown"
    return str(ip) if isinstance(ip, IPv4Address) else str(ip_network((int(ip) >> 64 << 64, 64)))


def _parse(address: str) -> IPv4Address | IPv6Address | None:
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


def client_address(peer: str | None, headers: Headers, trusted: Collection[Network]) -> str:
    """Return the key of the caller's address: the socket's peer, or behind a trusted proxy the last hop that is not trusted.

    A malformed `X-Forwarded-For` counts for nothing. `peer` is `None` on a Unix socket.
    """
    if trusted and peer is not None and _is_trusted(peer, trusted):
        hops = b",".join(value for name, value in headers if name == b"x-forwarded-for").decode("latin-1").split(",")
        for hop in reversed([text.strip() for text in hops]):
            if _parse(hop) is None:
                break
            if not _is_trusted(hop, trusted):
                return address_key(hop)
    return address_key(peer or "")


def is_secure(scope: Scope, trusted: Collection[Network]) -> bool:
    """Return whether the caller's own connection is encrypted: ours is, or a trusted proxy says that its is."""
    peer = scope.get("client")
    if peer and trusted and _is_trusted(peer[0], trusted):
        said = next((value for name, value in scope["headers"] if name == b"x-forwarded-proto"), b"")
        if said:
            return bool(said.split(b",")[-1].strip().lower() == b"https")
    return bool(scope.get("scheme") == "https")


def _is_trusted(address: str, trusted: Collection[Network]) -> bool:
    ip = _parse(address)
    return ip is not None and any(ip in network for network in trusted)


# Keys


def presented_keys(headers: Headers) -> list[bytes]:
    """Return the keys that a request presents, as `Authorization: Bearer` or `X-API-Key`; SDKs send a dummy in one of them."""
    keys = []
    for name, value in headers:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            keys.append(value[7:].strip())
    return keys


def digests(keys: Iterable[str]) -> frozenset[bytes]:
    """Return what is kept of several keys."""
    return frozenset(map(key_digest, keys))


def verified(headers: Headers, known: Collection[bytes]) -> bytes | None:
    """Return the digest of the first presented key that is known, compared in constant time."""
    for key in presented_keys(headers) if known else ():
        found = key_digest(key)
        if is_known(found, known):
            return found
    return None


# Framing and loops


def refuse_bad_framing(headers: Headers) -> GatewayError | None:
    """Return why a request could be read as two different ones, or `None` (RFC 9112, 6.3: request smuggling).

    The connection is closed after the answer.
    """
    hosts = lengths = codings = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            lengths += 1
            if not value.isdigit():
                return BadFraming("The header Content-Length is no number; send the length of the body in bytes")
        elif name == b"transfer-encoding":
            codings += 1
            if value.strip().lower() != b"chunked":
                return BadFraming("The header Transfer-Encoding is not chunked; send the body plain or chunked")
    if hosts > 1:
        return BadFraming("The request names several hosts; send the header Host once")
    if lengths + codings > 1:
        return BadFraming("The request states the length of its body more than once; send either Content-Length or Transfer-Encoding, once")
    return None


_TELLING = frozenset({b"transfer-encoding", b"content-encoding", HOP})
"""Without one of these, and with no name twice, there is nothing to look at more closely."""


_CODING = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,32}")


def refuse_loop(headers: Headers) -> GatewayError | None:
    """Return the refusal of a request that came through a gateway before, or `None`."""
    if HOP in dict(headers):
        return LoopDetected("This request has come through a gateway already; register the model's own server instead of a gateway")
    return None


def asks_for_websocket(method: str, headers: Headers) -> bool:
    """Return whether a request is the beginning of a WebSocket: of HTTP/1.1 (RFC 6455, 4.1) or of HTTP/2 (RFC 8441)."""
    if method != "GET":
        return method == "CONNECT"
    return any(name == b"upgrade" and b"websocket" in value.lower() for name, value in headers)


def no_websocket(path: str) -> UnknownURL:
    """Return the refusal of a WebSocket; the gateway has none."""
    shown = path[:128].encode(errors="replace").decode()
    return UnknownURL(f"There is no WebSocket at {shown}; send the request over plain HTTP, and set `stream` to get the answer in pieces")


def refuse_compression(headers: Headers) -> GatewayError | None:
    """Return the refusal of a body in a content coding, or `None`; decoded, a small body could become a huge one."""
    codings = b",".join(value for name, value in headers if name == b"content-encoding").decode("latin-1").lower().split(",")
    coding = next((found for found in map(str.strip, codings) if found not in ("", "identity")), None)
    if coding is None:
        return None
    shown = coding if _CODING.fullmatch(coding) else "an unknown coding"
    return CompressedRequest(
        f"The request body is compressed ({shown}), and the gateway reads plain JSON only. Switch request compression off in your client; "
        "in Codex, set `enable_request_compression = false` under `[features]` in config.toml."
    )


def check_head(headers: Headers, names: Mapping[bytes, bytes]) -> None:
    """Let pass only a head that can be read in one way and did not come through a gateway before; `names` is a dictionary of it.

    Raises:
        GatewayError: It does not.
    """
    if len(names) == len(headers) and _TELLING.isdisjoint(names) and names.get(b"content-length", b"0").isdigit():
        return
    refused = refuse_bad_framing(headers) or refuse_loop(headers) or refuse_compression(headers)
    if refused is not None:
        try:
            raise refused
        finally:
            del refused  # else this frame and the error keep each other alive, and with them all that was read of the request


def check_site(names: Mapping[bytes, bytes], policy: OriginPolicy) -> None:
    """Let pass only a `POST` that no page of another site can have sent as a form.

    Raises:
        ForeignForm: A page of another site sent it, or may have.
    """
    if policy.is_foreign_form(names):
        raise ForeignForm(
            "This request looks like a form that a web page of another site sent. Send it as application/json; for a web app on another "
            "origin, ask the operator of this gateway to allow it (ENABLE_CORS, CORS_ORIGINS)."
        )


# Both doors


@attrs.frozen
class Caller:
    """Who sent a request: `quota` is what its calls are counted by, `name` what its use is, `key` the client key kept in the store.

    `limit` is in calls per minute, 0 for no limit; `None` stands for the limit of an address. `max_at_once` is how many of its requests may
    run and wait together when another one would have to wait; 0 is no limit.
    """

    quota: str
    name: str = NOBODY
    key: ClientKey | None = None
    limit: int | None = None
    max_at_once: int = 0

    @property
    def daily_limit(self) -> int | None:
        """The requests to models per day that its key is for, where that says so."""
        return None if self.key is None else self.key.daily_limit


@lru_cache(maxsize=1024)
def _stranger(address: str, limit: int | None, max_at_once: int) -> Caller:
    """Return a caller without a key, known by the address: most requests of some networks."""
    return Caller(address, limit=limit, max_at_once=max_at_once)


@lru_cache(maxsize=1024)
def is_loopback(peer: str | None) -> bool:
    """Return whether the other end of a connection is on this machine.

    >>> is_loopback("127.0.0.1"), is_loopback("::ffff:127.0.0.1"), is_loopback("192.0.2.1"), is_loopback(None)
    (True, True, False, False)
    """
    ip = _parse(peer or "")
    return ip is not None and ip.is_loopback


_FORWARDING = frozenset({b"x-forwarded-for", b"forwarded", b"via", b"cf-connecting-ip", b"x-real-ip"})


def is_forwarded(names: Mapping[bytes, bytes]) -> bool:
    """Return whether a proxy or a tunnel has left its mark in the headers: the client is not the other end of the connection then."""
    return not _FORWARDING.isdisjoint(names)


@attrs.define(eq=False)
class ProxyWatch:
    """Notice that requests come through a proxy on this machine that `TRUSTED_PROXIES` does not name: its clients share one limit."""

    remedy: str | None = None
    """What to set; `None` as long as there was no such request."""

    def note(self, peer: str) -> None:
        """Take note of such a request; the first one is logged."""
        if self.remedy is None:
            self.remedy = f"TRUSTED_PROXIES={'::1/128' if peer == '::1' else '127.0.0.1/32'}"
            _log.warning(
                "requests come through a proxy on this machine that is not trusted, so all its clients share one rate limit",
                extra={"fields": {"set": self.remedy}},
            )


def _failures() -> LocalWindow:
    return LocalWindow(MAX_ADMIN_FAILURES)


@attrs.frozen
class Entrance:
    """The rules of entry as the settings have them; made once, asked by both doors, the admin API and the pages.

    `signed_in` tells by method and headers whether a request is one of our own pages', whose session stands for the client key.
    `now` is the monotonic clock of what is counted here.
    """

    limiter: RateLimiter
    key_limit: int = KEY_PER_MINUTE
    trusted: tuple[Network, ...] = ()
    origins: OriginPolicy = attrs.field(factory=OriginPolicy)
    client_digests: frozenset[bytes] = frozenset()
    require_client_key: bool = False
    signed_in: Callable[[str, Headers], bool] | None = None
    stored_keys: Callable[[], Mapping[bytes, ClientKey]] = dict
    wall: Callable[[], float] = time.time
    now: Callable[[], float] = time.monotonic
    key_at_once: int = 0
    """How many requests with one of the settings' keys may run and wait together when another one would have to wait; 0 for no limit."""
    address_at_once: int = 0
    """The same for an address without a key."""
    proxy: ProxyWatch = attrs.field(factory=ProxyWatch, init=False)
    _failures: LocalWindow = attrs.field(factory=_failures, init=False)
    _probes: RateLimiter = attrs.field(init=False)
    _trusts_loopback: bool = attrs.field(init=False)

    @_trusts_loopback.default
    def _find_loopback(self) -> bool:
        return any(ip_address(text) in network for text in ("127.0.0.1", "::1") for network in self.trusted)

    @_probes.default
    def _make_probes(self) -> RateLimiter:
        return RateLimiter(MAX_PROBES, self.limiter.storage, now=self.now)

    @classmethod
    def of(
        cls,
        settings: Settings,
        signed_in: Callable[[str, Headers], bool] | None = None,
        stored_keys: Callable[[], Mapping[bytes, ClientKey]] = dict,
        wall: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
        day_counts: DayCounts | None = None,
    ) -> "Entrance":
        """Make the entrance of a gateway; `day_counts` is what it knows of the use of today.

        Where pages of every site may use the inference API, a session never stands for a key there.
        """
        origins = origin_policy(settings)
        return cls(
            rate_limiter(settings, day_counts or DayCounts(), wall, now),
            settings.key_rate_limit_per_minute,
            tuple(ip_network(text, strict=False) for text in settings.trusted_proxies),
            origins,
            digests(settings.client_api_keys),
            settings.require_client_auth,
            None if origins.allows_any else signed_in,
            stored_keys,
            wall,
            now,
            settings.max_at_once_per_key,
            settings.max_at_once_per_address,
        )

    def is_local(self, peer: str | None, forwarded: bool) -> bool:
        """Return whether a client on this machine sent a request; a proxy on this machine that is not trusted is noted.

        `peer` is the other end of the connection, `forwarded` what `is_forwarded` says of the headers.
        """
        if not is_loopback(peer):
            return False
        if forwarded and not self._trusts_loopback and peer is not None:
            self.proxy.note(peer)
        return not forwarded

    def caller(self, method: str, address: str, headers: Headers, names: Mapping[bytes, bytes], *, is_local: bool = False) -> Caller:
        """Return who sent a request from an address; without a key a client on this machine (`is_local`) has no limits.

        Raises:
            InvalidClientKey: A client key is required, and there is none that works.
        """
        if b"authorization" in names or b"x-api-key" in names:
            found = verified(headers, self.client_digests) if self.client_digests else None
            if found is not None:
                return Caller(found.hex(), f"setting:{found.hex()[:8]}", None, self.key_limit, self.key_at_once)
            stored = self.stored_keys()
            for presented in presented_keys(headers) if stored else ():
                key = stored.get(key_digest(presented))
                if key is not None and key.works(self.wall()):
                    limit = self.key_limit if key.rate_limit is None else key.rate_limit
                    return Caller(key.id, key.id, key, limit, key.max_at_once)
        limits = (0, 0) if is_local else (None, self.address_at_once)
        if b"cookie" in names and self.signed_in is not None and self.signed_in(method, headers):
            return Caller(address, OPERATOR, None, *limits)
        if self.require_client_key:
            raise InvalidClientKey(
                "The API key is missing or wrong; send yours as `Authorization: Bearer KEY` (api_key of the openai library), "
                "or ask the operator of this gateway for one"
            )
        return _stranger(address, *limits)

    def too_many(self, caller: Caller, quota: Quota) -> RateLimited:
        """Return the refusal of a call over the caller's limit: a caller without a key learns that keys have a limit of their own."""
        if caller.name == NOBODY and self._has_keys():
            return quota.error(
                "Too many requests came from your address. Wait, or use a key, which has its own limit: send it as "
                "`Authorization: Bearer KEY` (api_key of the openai library), or ask the operator of this gateway for one"
            )
        return quota.error()

    def _has_keys(self) -> bool:
        wall = self.wall()
        return bool(self.client_digests) or any(key.works(wall) for key in self.stored_keys().values())

    def count_wrong_admin_key(self, address: str) -> None:
        """Count that somebody at an address came without the admin key to where it is needed, whichever way.

        Raises:
            RateLimited: It was too often within a minute.
        """
        quota = self._failures.hit(address, self.now())
        if not quota.allowed:
            raise quota.error("Too many wrong admin keys came from your address; wait, then send the right one")

    async def count_probe(self, caller: str) -> None:
        """Count a probe that somebody asks for: without a limit, probes would show which ports are open on which address.

        Counted are the connection tests and everything on the pages that makes the gateway dial, by the caller's address; checks and
        changes with an owner's token, by that token. Gateways on one `RATE_LIMIT_STORAGE` count together.

        Raises:
            RateLimited: There were enough within a minute.
        """
        quota = await self._probes.hit(f"probe {caller}")
        if quota is not None and not quota.allowed:
            raise quota.error(f"At most {MAX_PROBES} tries per minute are possible; wait {quota.wait_seconds} seconds, then try again")


# Bodies


GRACE = 5.0
"""Seconds for which a body may come as slowly as it likes."""
LEAST_RATE = 16 * 1024
"""Bytes per second that a body must come at on average, after `GRACE`."""
MAX_DRAINED = 64 << 20


class ClientGone(Exception):
    """The caller left before its body was complete; nobody waits for an answer."""


def declared_length(headers: Headers) -> int | None:
    """Return what `Content-Length` says, or `None`."""
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def too_large(limit: int) -> RequestTooLarge:
    """Return the refusal of a body over the limit."""
    return RequestTooLarge(f"The body is larger than {limit:,} bytes; send a smaller one")


def body_deadline(received: int, elapsed: float, pause: float) -> float:
    """Return the seconds after its beginning by which more of a body must arrive.

    The last of the `received` bytes arrived `elapsed` seconds after the beginning; the next may take `pause` seconds, unless the whole
    body would then be slower than `LEAST_RATE`.

    >>> body_deadline(0, 0.0, 30.0), body_deadline(1 << 20, 60.0, 30.0), body_deadline(1 << 20, 10.0, 30.0)
    (5.0, 69.0, 40.0)
    """
    return min(elapsed + pause, GRACE + received / LEAST_RATE)


def too_slow() -> RequestTimeout:
    """Return the refusal of a body that did not come in time."""
    return RequestTimeout(f"The body arrived too slowly; send at least {LEAST_RATE // 1024} KiB per second, without long pauses")


async def read_body(
    receive: Receive,
    limit: int,
    pause: float,
    *,
    headers: Headers = (),
    hold: Callable[[int], None] | None = None,
) -> bytes:
    """Read a request's body, bounded in size and time; `hold` hears the size of each piece and may raise that there is no room.

    Raises:
        RequestTooLarge: It is larger than `limit` bytes, which `headers` may tell before anything is read.
        RequestTimeout: Nothing of it arrives for `pause` seconds, or it arrives too slowly; time in which the process was stopped does not
            count.
        ClientGone: The caller left.
    """
    if (declared_length(headers) or 0) > limit:
        raise too_large(limit)
    begun = arrived = anyio.current_time()
    pieces: list[bytes] = []
    size = 0
    while True:
        deadline = begun + body_deadline(size, arrived - begun, pause)
        message: Message | None = None
        with anyio.CancelScope(deadline=deadline):
            message = await receive()
        now = anyio.current_time()
        if message is None:
            if not stopped_seconds(deadline, now):
                raise too_slow()
            begun += now - arrived  # the process was stopped, and what its sockets hold was not read yet
            arrived = now
            continue
        arrived = now
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise too_large(limit)
        if piece:
            if hold is not None:
                hold(len(piece))
            pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object, whatever a hostile client made of it.

    Raises:
        InvalidJSON: It is not UTF-8, not JSON (NaN is not), nested too deeply, or no object.
    """
    body = body.removeprefix(BOM)
    try:
        body.decode()
        value = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise InvalidJSON("The body is not UTF-8; encode it as UTF-8") from None
    except RecursionError:
        raise InvalidJSON("The body's JSON is nested too deeply; send fewer levels") from None
    except ValueError as error:
        what = f"not valid JSON ({error})" if body.strip() else "empty"
        raise InvalidJSON(f"The body is {what}; send a JSON object") from None
    if not isinstance(value, dict):
        raise InvalidJSON("The body is not a JSON object; send one, such as {}")
    return value


def may_have_body(scope: Scope) -> bool:
    """Return whether something may follow the request's head."""
    names = {name for name, _ in scope["headers"]}
    if str(scope.get("http_version", "1.1")).startswith("1"):
        return b"transfer-encoding" in names or bool(declared_length(scope["headers"]))
    return scope["method"] not in ("GET", "HEAD", "OPTIONS", "TRACE")


async def run_draining(app: App, scope: Scope, receive: Receive, send: Send, *, patience: float) -> None:
    """Run an application that may answer before it has read the body: the rest is read and dropped while the answer is sent.

    Hypercorn needs this: with an unread body in its queue it does not get to sending. Bounded in bytes and time.
    """
    if not may_have_body(scope):
        await app(scope, receive, send)
        return
    lock = anyio.Lock()
    ended = False
    failure: Exception | None = None

    async def reading() -> Message:
        nonlocal ended
        async with lock:
            message = await receive()
            ended = ended or message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

    async def drain() -> None:
        left = MAX_DRAINED
        with anyio.move_on_after(patience):
            while not ended and left > 0:
                left -= len((await reading()).get("body", b""))

    async with anyio.create_task_group() as group:

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and not ended:
                group.start_soon(drain)
            await send(message)

        try:
            await app(scope, reading, sending)
        except Exception as error:  # noqa: BLE001  nothing but cancellation leaves a group; raised below
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # else this frame and the error keep each other alive


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


class Security:
    """The middleware of everything but inference: identity, key, quota, draining, headers, one record. Plain ASGI.

    `admin_digests` is asked at each request, since a key may be made after the application was; `inference` takes the requests that
    servers answer, and has rules of its own: they go past all routing; `signed_in` lets the pages' own session stand for the keys;
    `owner_digest` is the hash of the token that will do for a call about one server.
    """

    def __init__(
        self,
        app: App,
        *,
        entrance: Entrance,
        admin_digests: Callable[[], Collection[bytes]],
        inference: App | None = None,
        signed_in: Callable[[Scope], bool] | None = None,
        owner_digest: Callable[[Scope], str | None] | None = None,
        drain_timeout: float = 30.0,
    ) -> None:
        self._app = app
        self._entrance = entrance
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
        address = scope[ADDRESS] = client_address(peer[0] if peer else None, headers, self._entrance.trusted)
        if is_below(path, "/admin"):
            self._check_admin_key(scope, headers, address)
        if asks_for_websocket(scope["method"], headers):
            raise no_websocket(path)
        names = dict(reversed(headers))
        check_head(headers, names)
        if not is_below(path, "/v1"):
            return []
        if scope["method"] == "POST":
            check_site(names, self._entrance.origins)
        entrance = self._entrance
        is_local = entrance.is_local(peer[0] if peer else None, is_forwarded(names))
        caller = scope[CALLER] = entrance.caller(scope["method"], address, headers, names, is_local=is_local)
        if is_below(path, "/v1/models"):  # clients read the list before each request, and as often as they like
            return []
        quota = await entrance.limiter.hit(caller.quota, caller.limit)
        if quota is None:
            return []
        if not quota.allowed:
            raise entrance.too_many(caller, quota)
        return quota.headers()

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
        self._entrance.count_wrong_admin_key(address)
        raise AdminKeyRequired("The admin key is missing or wrong; send it in the header X-API-Key")


class Cors:
    """Let pages of other origins use the inference API, and nothing else of the gateway."""

    def __init__(self, app: App, *, policy: OriginPolicy) -> None:
        self._app = app
        self._open = CORSMiddleware(
            app,
            allow_origins=sorted(policy.allowed),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
            max_age=600,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, under Starlette's rules where the path is one of the API."""
        app = self._open if scope["type"] == "http" and is_below(path_of(scope), "/v1") else self._app
        await app(scope, receive, send)


def cors_headers(names: Mapping[bytes, bytes], policy: OriginPolicy) -> list[tuple[bytes, bytes]]:
    """Return what lets a page of an allowed origin read the answer: for the door that no middleware stands before."""
    origin = names.get(b"origin")
    if origin is None or not policy.allows(origin):
        return []
    exposed = (b"access-control-expose-headers", ", ".join(EXPOSED_HEADERS).encode())
    if policy.allows_any:
        return [(b"access-control-allow-origin", b"*"), exposed]
    return [(b"access-control-allow-origin", origin), exposed, (b"vary", b"Origin")]
