"""How often somebody may call: counted in this process, or in a storage that several gateways share."""

import logging
import math
import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import anyio
import attrs
import msgspec

from multiverse_gateway.core.budget import DAY_SECONDS, DayCounts, day_name, day_of, until_next_day
from multiverse_gateway.core.errors import DailyLimitReached, RateLimited
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.declaration import unusable

if TYPE_CHECKING:
    from limits.aio.storage import Storage

WINDOW = 60.0
EXACT = 600
"""Up to this limit each call of the last minute is known by itself, above it those of the same tenth of a second together."""

_NAMES = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
_LINES = b"%b: %%d\r\n%b: %%d\r\n%b: %%b\r\n" % _NAMES

_log = logging.getLogger("multiverse_gateway.api")


class Quota(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a caller has left; `reset` is the seconds until all of it is there again, `wait` those until the next call may come.

    A struct of msgspec, because one is made for each request, and a frozen attrs class takes four times as long to make.
    """

    limit: int
    remaining: int
    reset: float
    wait: float | None = None
    is_shared: bool = False
    """Whether the call was counted in a storage that several gateways share."""

    @property
    def allowed(self) -> bool:
        """Return whether this call was within the limit."""
        return self.wait is None

    @property
    def wait_seconds(self) -> int:
        """Return `wait` in whole seconds, as messages and `Retry-After` give it: at least 1, and never too early."""
        return max(1, math.ceil(self.wait or 0))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's headers about it, on every answer."""
        return list(zip(_NAMES, (b"%d" % self.limit, b"%d" % self.remaining, self._reset()), strict=True))

    def lines(self) -> bytes:
        """Return the same as HTTP/1.1 writes it."""
        return _LINES % (self.limit, self.remaining, self._reset())

    def _reset(self) -> bytes:
        return _A_MINUTE if self.reset == WINDOW else duration(self.reset).encode()

    def error(self, problem: str = "", remedy: str = "") -> RateLimited:
        """Return the error for a call over the limit; `problem` and `remedy` replace the usual text."""
        if not problem:
            problem = f"Rate limit reached ({self.limit:,} requests per minute)."
            remedy = f" Try again in {self.wait_seconds} s."
        return TooMany(problem, remedy=remedy, quota=self)


class DayQuota(Quota, frozen=True, kw_only=True, gc=False):
    """What a client key has left of its day (UTC)."""

    @classmethod
    def of(cls, limit: int, used: int, wall: float, *, is_shared: bool = False) -> "DayQuota":
        """Judge a call that is the `used`th of its day; `wall` is epoch seconds."""
        left = until_next_day(wall)
        wait = None if used <= limit else left
        return cls(limit=limit, remaining=max(0, limit - used), reset=left, wait=wait, is_shared=is_shared)

    def error(self, problem: str = "", remedy: str = "") -> RateLimited:
        """Return the error for a call over the limit; `problem` and `remedy` replace the usual text."""
        if not problem:
            problem = f"Daily limit of your key reached ({self.limit:,} requests)."
            remedy = " It resets at 00:00 UTC; the operator of this gateway can raise it."
        return DayUsedUp(problem, remedy=remedy, quota=self)


def tighter(minute: Quota | None, day: DayQuota) -> Quota:
    """Return the one of two quotas that ends first, which is what the caller is told."""
    return day if minute is None or not day.allowed or day.remaining <= minute.remaining else minute


class TooMany(RateLimited):
    """A `RateLimited` that tells how the quota stands."""

    def __init__(self, problem: str, *, remedy: str = "", quota: Quota) -> None:
        super().__init__(problem, remedy=remedy, retry_after=quota.wait)
        self.quota = quota

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the error's headers and the quota's."""
        wait = (b"retry-after-ms", b"%d" % max(1, math.ceil(1000 * (self.quota.wait or 0))))
        return [*super().headers(), wait, *self.quota.headers()]


class DayUsedUp(TooMany, DailyLimitReached):
    """A `DailyLimitReached` that tells how the quota stands."""


def duration(seconds: float) -> str:
    """Write a duration as OpenAI's headers do.

    >>> duration(0.2), duration(360), duration(86_400)
    ('1s', '6m0s', '24h0m0s')
    """
    return _written(max(0, math.ceil(seconds)))


# Saves 0.2 µs per header of a limit; most are of a whole number of seconds up to a minute.
@lru_cache(maxsize=256)
def _written(seconds: int) -> str:
    minutes, hours = seconds // 60, seconds // 3600
    parts = ([f"{hours}h"] if hours else []) + ([f"{minutes % 60}m"] if minutes else [])
    return "".join([*parts, f"{seconds % 60}s"])


_A_MINUTE = duration(WINDOW).encode()


@attrs.define(eq=False)
class _Calls:
    """Calls of one caller within a minute: the instants of the last ones of those that are counted together, and how many these are."""

    total: int = 0
    instants: deque[float] = attrs.field(factory=deque)
    counts: deque[int] = attrs.field(factory=deque)

    def forget(self, now: float) -> None:
        """Drop what is a minute old, so that a wait is never 0."""
        instants = self.instants
        while instants and instants[0] + WINDOW <= now:
            instants.popleft()
            self.total -= self.counts.popleft()

    def take_back(self, since: float) -> None:
        """Count a call no more: the first one that was counted at this instant or later."""
        index = bisect_left(self.instants, since)
        if index < len(self.instants):
            self.total -= 1
            self.counts[index] -= 1
            if not self.counts[index]:
                del self.instants[index], self.counts[index]


@attrs.define
class LocalWindow:
    """Count calls of the last minute in this process: no await, no task (`limits` costs 65 µs per call and starts one).

    Any minute holds the limit and no more. The keys of the callers heard of last are kept; calls over the limit are not counted.
    """

    limit: int
    max_keys: int = 10_000
    exact: int = EXACT
    _calls: OrderedDict[str, _Calls] = attrs.field(factory=OrderedDict, init=False)

    def hit(self, key: str, now: float, limit: int | None = None) -> Quota:
        """Count a call at the monotonic instant `now`, if it is within the limit, or within that of the key."""
        limit = self.limit if limit is None else limit
        calls = self._calls.get(key)
        if calls is None:
            calls = self._calls[key] = _Calls()
            if len(self._calls) > self.max_keys:
                self._calls.popitem(last=False)
        else:
            self._calls.move_to_end(key)
            if calls.instants and calls.instants[0] + WINDOW <= now:
                calls.forget(now)
        if calls.total >= limit:
            first, last = calls.instants[0], calls.instants[-1]
            return Quota(limit=limit, remaining=0, reset=min(WINDOW, last + WINDOW - now), wait=min(WINDOW, first + WINDOW - now))
        calls.total += 1
        instants = calls.instants
        if limit <= self.exact or not instants or int(10 * instants[-1]) != int(10 * now):
            instants.append(now)
            calls.counts.append(1)
        else:
            instants[-1] = now
            calls.counts[-1] += 1
        return Quota(limit=limit, remaining=limit - calls.total, reset=WINDOW)

    def take_back(self, key: str, since: float, now: float) -> None:
        """Count a call no more that was counted just after the monotonic instant `since`, unless that is a minute ago."""
        calls = self._calls.get(key)
        if calls is not None and since + WINDOW > now:
            calls.take_back(since)


@attrs.define
class RateLimiter:
    """Count calls per caller and minute, and per client key and day where it has a daily limit: here, or in a storage that several
    gateways share.

    A storage that fails or takes longer than `patience` is left alone for `recovery` seconds, in which this process counts by itself;
    then one call tries it again. It counts by its own clock, whatever those of the gateways say, and a little coarser than we do: what
    is left of the minute before counts by its share. Days end by our own `wall` clock; `day_counts` is what is known of today.

    Both limits are looked at before either is counted, so a refused call uses up nothing. A day that is known to be used up is refused
    without asking anybody.
    """

    limit: int
    storage: "Storage | None" = None
    now: Callable[[], float] = time.monotonic
    patience: float = 0.1
    recovery: float = 5.0
    day_counts: DayCounts = attrs.field(factory=DayCounts)
    wall: Callable[[], float] = time.time
    _local: LocalWindow = attrs.field(init=False)
    _broken_until: float = attrs.field(default=-math.inf, init=False)

    @_local.default
    def _make_local(self) -> LocalWindow:
        return LocalWindow(self.limit)

    def hit_local(self, key: str, limit: int | None = None, daily: int | None = None) -> Quota | None:
        """Count a call without waiting; `None` when there is no limit. Only meant for where `is_shared` is false."""
        limit = self.limit if limit is None else limit
        spent = None if daily is None else self._spent(key, daily)
        if spent is not None:
            return spent
        minute = self._local.hit(key, self.now(), limit) if limit else None
        if daily is None or (minute is not None and not minute.allowed):
            return minute
        wall = self.wall()
        return tighter(minute, DayQuota.of(daily, self.day_counts.count(key, wall), wall))

    def take_back(self, key: str, since: float, *, daily: bool) -> None:
        """Count a call no more that this process counted just after the monotonic instant `since`; `daily`: toward a day, too."""
        now = self.now()
        self._local.take_back(key, since, now)
        if daily:
            self.day_counts.take_back(key, day_of(self.wall() - (now - since)))

    async def take_back_shared(self, key: str, limit: int | None, since: float, *, daily: bool) -> None:
        """Do the same for a call that the shared storage counted; a call that fails keeps the count. No request waits for it."""
        from limits import RateLimitItemPerMinute
        from limits.aio.strategies import SlidingWindowCounterRateLimiter

        storage, limit = self.storage, self.limit if limit is None else limit
        assert storage is not None
        day = day_of(self.wall() - (self.now() - since))
        if daily:
            self.day_counts.take_back(key, day)
        with suppress(Exception), anyio.move_on_after(self.recovery):  # each storage fails in its own way
            if limit and since + WINDOW > self.now():
                await SlidingWindowCounterRateLimiter(storage).hit(RateLimitItemPerMinute(limit), key, cost=-1)
            if daily:
                await storage.incr(_day_key(key, day), 2 * DAY_SECONDS, -1)

    def _spent(self, key: str, daily: int) -> DayQuota | None:
        """Return the refusal of a key whose day is used up."""
        wall = self.wall()
        used = self.day_counts.total(key, wall)
        return DayQuota.of(daily, used + 1, wall) if used >= daily else None

    @property
    def is_shared(self) -> bool:
        """Return whether `hit` has to be awaited, because the calls are counted elsewhere (and that works)."""
        return self.storage is not None and self.now() >= self._broken_until

    async def hit(self, key: str, limit: int | None = None, daily: int | None = None) -> Quota | None:
        """Count a call, by the limits of its key if that has any; `None` when there is no limit."""
        limit = self.limit if limit is None else limit
        if not self.is_shared or self.storage is None or not (limit or daily):
            return self.hit_local(key, limit, daily)
        spent = None if daily is None else self._spent(key, daily)
        if spent is not None:
            return spent
        was_broken = self._broken_until > -math.inf
        if was_broken:
            self._broken_until = self.now() + self.recovery  # others count here while this call tries
        try:
            with anyio.fail_after(self.patience):
                quota = await self._hit_shared(self.storage, key, limit, daily)
        except Exception as error:  # noqa: BLE001  each storage fails in its own way, and none may stop the gateway
            if self._broken_until == -math.inf:
                _log.warning(
                    "rate limit storage is not available; this process counts for itself", extra={"fields": {"error": type(error).__name__}}
                )
            self._broken_until = self.now() + self.recovery
            return self.hit_local(key, limit, daily)
        if was_broken:
            self._broken_until = -math.inf
            _log.warning("rate limit storage is available again")
        return quota

    async def aclose(self) -> None:
        """Close the connections to the storage, if it has any."""
        bridge = getattr(self.storage, "bridge", None)
        if bridge is not None:
            with anyio.move_on_after(1, shield=True):
                await bridge.get_connection().aclose()

    async def _hit_shared(self, storage: "Storage", key: str, limit: int, daily: int | None) -> Quota | None:
        if daily is not None and limit:
            spent = await self._spent_elsewhere(storage, key, daily)
            if spent is not None:
                return spent
        minute = await self._hit_minute(storage, key, limit) if limit else None
        if daily is None or (minute is not None and not minute.allowed):
            return minute
        return tighter(minute, await self._hit_day(storage, key, daily))

    async def _spent_elsewhere(self, storage: "Storage", key: str, daily: int) -> DayQuota | None:
        """Return the refusal of a key whose day is used up by what all gateways have counted."""
        wall = self.wall()
        day = day_of(wall)
        self.day_counts.learn({key: await storage.get(_day_key(key, day))}, day, wall)
        return self._spent(key, daily)

    async def _hit_minute(self, storage: "Storage", key: str, limit: int) -> Quota:
        from limits import RateLimitItemPerMinute
        from limits.aio.strategies import SlidingWindowCounterRateLimiter

        limiter = SlidingWindowCounterRateLimiter(storage)
        item = RateLimitItemPerMinute(limit)
        allowed = await limiter.hit(item, key)
        stats = await limiter.get_window_stats(item, key)
        soonest = min(WINDOW, max(0.001, stats.reset_time - time.time()))
        if not allowed:
            return Quota(limit=limit, remaining=0, reset=WINDOW, wait=soonest)
        return Quota(limit=limit, remaining=max(0, stats.remaining), reset=WINDOW, is_shared=True)

    async def _hit_day(self, storage: "Storage", key: str, limit: int) -> DayQuota:
        """Count a call under the name of its day, which is kept until the day is over on every gateway's clock."""
        wall = self.wall()
        day = day_of(wall)
        here = self.day_counts.count(key, wall)
        try:
            there = await storage.incr(_day_key(key, day), 2 * DAY_SECONDS)
        except BaseException:
            self.day_counts.take_back(key, day)
            raise
        self.day_counts.learn({key: there}, day, self.wall())
        return DayQuota.of(limit, max(here, there), wall, is_shared=True)


def _day_key(key: str, day: int) -> str:
    """Return the name under which a shared storage counts the calls of a key on a day."""
    return f"LIMITER/{key}/{day_name(day)}"


def rate_limiter(
    settings: Settings, day_counts: DayCounts, wall: Callable[[], float] = time.time, now: Callable[[], float] = time.monotonic
) -> RateLimiter:
    """Make the limiter that the settings ask for.

    Raises:
        SettingsError: The storage needs a package that is not installed, or its URL cannot be read.
    """
    url = settings.rate_limit_storage
    if url.startswith("memory:"):
        return RateLimiter(settings.rate_limit_per_minute, now=now, day_counts=day_counts, wall=wall)
    from limits.aio.storage import Storage  # 2 MB and a tenth of the start, for those who count elsewhere
    from limits.errors import ConfigurationError
    from limits.storage import storage_from_string

    options: dict[str, Any] = {"max_connections": 4096}  # a call each has one, and more calls than the usual 100 may be made at once
    if not url.startswith("valkey"):
        options["implementation"] = "redispy"
    try:
        storage = storage_from_string(f"async+{url}", **options)
    except (ConfigurationError, ValueError):
        module, package = ("valkey", "valkey") if url.startswith("valkey") else ("redis", "multiverse-gateway[redis]")
        is_installed = find_spec(module) is not None
        remedy = "write redis://host:6379/0, including the port" if is_installed else f"it needs a package: pip install '{package}'"
        raise unusable(settings, "rate_limit_storage", remedy) from None
    assert isinstance(storage, Storage)
    return RateLimiter(settings.rate_limit_per_minute, storage, now=now, day_counts=day_counts, wall=wall)
