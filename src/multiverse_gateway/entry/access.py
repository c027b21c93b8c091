"""Who may come in and how often: the rules of entry as the settings have them, for both doors, the admin API and the pages.

1. Only a key that was verified names a caller; any other is counted by its address, or a new key would be a new quota.
2. A client on this machine has no limits without a key, unless a header shows that a proxy or a tunnel forwarded the request.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_address, ip_network

import attrs

from multiverse_gateway.admin_key import key_digest
from multiverse_gateway.core.budget import DayCounts
from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.errors import (
    InvalidClientKey,
    KeyBlocked,
    RateLimited,
)
from multiverse_gateway.core.origins import OriginPolicy
from multiverse_gateway.core.servers import ClientKey, KeyState
from multiverse_gateway.core.usage import NOBODY, OPERATOR
from multiverse_gateway.entry.framing import check_request
from multiverse_gateway.entry.identity import Headers, Network, address_key, client_address, digests, is_loopback, presented_keys, verified
from multiverse_gateway.entry.quotas import LocalWindow, Quota, RateLimiter, rate_limiter
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.declaration import KEY_PER_MINUTE
from multiverse_gateway.settings.policies import origin_policy

MAX_ADMIN_FAILURES = 60
MAX_PROBES = 10
_log = logging.getLogger("multiverse_gateway.api")


# Saves 0.3 µs per request without a key. The value is frozen, so requests may share it.
@lru_cache(maxsize=1024)
def _stranger(address: str, limit: int | None, max_at_once: int) -> Caller:
    """Return a caller without a key, known by the address: most requests of some networks."""
    return Caller(address, limit=limit, max_at_once=max_at_once)


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
                "requests arrive through an untrusted proxy on this machine, so all its clients share one rate limit",
                extra={"fields": {"set": self.remedy}},
            )


def _failures() -> LocalWindow:
    return LocalWindow(MAX_ADMIN_FAILURES)


@attrs.frozen
class AccessRules:
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
    ) -> "AccessRules":
        """Make the access rules of a gateway; `day_counts` is what it knows of the use of today.

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

    def sender_of(
        self, method: str, peer: str | None, headers: Headers, names: Mapping[bytes, bytes], *, is_sound: bool, is_forwarded: bool
    ) -> Caller:
        """Return who sent a request to the inference API. Its head is checked before its key, at every door.

        `peer` is the other end of the connection. `is_sound` says that `check_request` is known to pass, `is_forwarded` is what the
        function of that name returns for the headers.

        Raises:
            GatewayError: The head is not accepted (`check_request`).
            InvalidClientKey: A client key is required, and there is none that works.
            KeyBlocked: There is none that works, and one that is blocked.
        """
        if not is_sound:
            check_request(method, headers, names, self.origins)
        # Both conditions save a call, 0.2 % of a request: most gateways trust no proxy, and most clients are on another machine.
        address = client_address(peer, headers, self.trusted) if self.trusted else address_key(peer or "")
        return self.caller(method, address, headers, names, is_local=is_loopback(peer) and self.is_local(peer, is_forwarded))

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
            KeyBlocked: There is none that works, and one that is blocked.
        """
        if b"authorization" in names or b"x-api-key" in names:
            setting_digest = verified(headers, self.client_digests) if self.client_digests else None
            if setting_digest is not None:
                return Caller(setting_digest.hex(), f"setting:{setting_digest.hex()[:8]}", None, self.key_limit, self.key_at_once)
            stored = self.stored_keys()
            for presented in presented_keys(headers) if stored else ():
                key = stored.get(key_digest(presented))
                if key is not None and key.works(self.wall()):
                    limit = self.key_limit if key.rate_limit is None else key.rate_limit
                    return Caller(key.id, key.id, key, limit, key.max_at_once)
            self._refuse_blocked(headers, stored)
        limits = (0, 0) if is_local else (None, self.address_at_once)
        if b"cookie" in names and self.signed_in is not None and self.signed_in(method, headers):
            return Caller(address, OPERATOR, None, *limits)
        if self.require_client_key:
            raise InvalidClientKey(
                "The API key is missing or wrong; send your key as `Authorization: Bearer KEY` (api_key of the openai library), "
                "or ask the operator of this gateway for one"
            )
        return _stranger(address, *limits)

    def _refuse_blocked(self, headers: Headers, stored: Mapping[bytes, ClientKey]) -> None:
        """Refuse a request without a key that works if one of its keys is blocked, whether keys are required or not."""
        for presented in presented_keys(headers) if stored else ():
            key = stored.get(key_digest(presented))
            if key is not None and key.state(self.wall()) is KeyState.BLOCKED:
                raise KeyBlocked

    def granted(self, caller: Caller, quota: Quota | None) -> Quota | None:
        """Return the quota that a call was counted toward; `None` if the caller has no limit.

        Raises:
            RateLimited: The call is over a limit of the caller.
        """
        if quota is not None and not quota.allowed:
            raise self.too_many(caller, quota)
        return quota

    def too_many(self, caller: Caller, quota: Quota) -> RateLimited:
        """Return the refusal of a call over the caller's limit: a caller without a key learns that keys have a limit of their own."""
        if caller.name == NOBODY and self._has_keys():
            return quota.error(
                f"Rate limit of your address reached ({quota.limit:,} requests per minute).",
                f" Try again in {quota.wait_seconds} s, or send a client key, which has a limit of its own, as `Authorization: Bearer KEY` "
                "(api_key of the openai library). The operator of this gateway can give you one.",
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
            raise quota.error("Your address sent too many wrong admin keys.", f" Try again in {quota.wait_seconds} s with the right one.")

    async def count_probe(self, caller: str) -> None:
        """Count a probe that somebody asks for: without a limit, probes would show which ports are open on which address.

        Counted are the connection tests and everything on the pages that makes the gateway dial, by the caller's address; checks and
        changes with an owner's token, by that token. Gateways on one `RATE_LIMIT_STORAGE` count together.

        Raises:
            RateLimited: There were enough within a minute.
        """
        quota = await self._probes.hit(f"probe {caller}")
        if quota is not None and not quota.allowed:
            raise quota.error(f"Too many checks were requested: at most {MAX_PROBES} per minute.", f" Try again in {quota.wait_seconds} s.")
