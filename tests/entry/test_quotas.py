"""How often somebody may call: exact in one process, common where a storage is shared, and never held up by it."""

from __future__ import annotations

import math

import anyio
import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits.aio.storage import MemoryStorage

from multiverse_gateway.core.budget import DAY_SECONDS, DayCounts, day_of
from multiverse_gateway.core.errors import DailyLimitReached
from multiverse_gateway.entry.quotas import DayQuota, LocalWindow, Quota, RateLimiter, duration, tighter


def test_a_minute_holds_its_limit_and_no_more() -> None:
    window = LocalWindow(3)
    assert [window.hit("a", float(second)).allowed for second in (0, 1, 2, 3)] == [True, True, True, False]
    refused = window.hit("a", 10.0)
    assert (refused.remaining, refused.wait, refused.reset) == (0, 50.0, 52.0)
    assert window.hit("b", 10.0).remaining == 2
    assert window.hit("a", 60.0).allowed
    assert not window.hit("a", 60.5).allowed


def test_whole_seconds_to_wait_are_never_too_few() -> None:
    """What a message names and what `Retry-After` says are the same, and a client that waits so long is let in."""
    quota = Quota(limit=1, remaining=0, reset=2.2, wait=2.2)
    assert quota.wait_seconds == 3
    assert "Try again in 3 s" in quota.error().message
    assert (b"retry-after", b"3") in quota.error().headers()


@pytest.mark.parametrize("exact", [600, 0])
@given(limit=st.integers(1, 5), gaps=st.lists(st.one_of(st.floats(0, 0.1), st.floats(0, 30)), max_size=60))
def test_no_sixty_seconds_hold_more_than_the_limit(limit: int, gaps: list[float], exact: int) -> None:
    """However calls are spread; and a client that waits as told is let in."""
    window = LocalWindow(limit, exact=exact)
    now, allowed = 0.0, []
    for gap in gaps:
        now += gap
        quota = window.hit("key", now)
        if quota.allowed:
            allowed.append(now)
        else:
            assert quota.wait is not None
            assert 0 < quota.wait <= 60
    for start in allowed:
        assert sum(start <= instant < start + 60 for instant in allowed) <= limit


@given(st.integers(1, 10**9), st.integers(0, 10**9), st.floats(0, 100_000))
def test_headers_and_lines_say_the_same(limit: int, remaining: int, reset: float) -> None:
    """Each door has its own."""
    quota = Quota(limit=limit, remaining=remaining, reset=reset)
    assert quota.lines() == b"".join(b"%b: %b\r\n" % header for header in quota.headers())


def test_memory_for_one_caller_is_bounded() -> None:
    """A limit of a million a minute takes no more than one of some hundreds; a call leaves a tenth of a second late at most."""
    window = LocalWindow(1_000_000)
    for number in range(12_000):
        counted = 1_000_000 - window.hit("a", number / 100).remaining
        assert min(number + 1, 6000) <= counted <= 6010
    assert len(window._calls["a"].instants) <= 601


def test_memory_for_callers_is_bounded() -> None:
    window = LocalWindow(1, max_keys=10)
    for number in range(100):
        window.hit(str(number), 0.0)
    assert len(window._calls) == 10
    assert not window.hit("99", 1.0).allowed


async def test_no_limit_counts_nothing() -> None:
    limiter = RateLimiter(0)
    assert await limiter.hit("a") is None
    assert limiter.hit_local("a") is None
    assert not limiter.is_shared


async def test_a_shared_storage_counts_for_all() -> None:
    storage = MemoryStorage()
    one, other = RateLimiter(2, storage), RateLimiter(2, storage)
    quotas = [await limiter.hit("a") for limiter in (one, other, one)]
    assert [quota.allowed for quota in quotas if quota] == [True, True, False]
    assert quotas[2] is not None
    assert 0 < (quotas[2].wait or 0) <= 60


class Broken(MemoryStorage):
    calls = 0

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        self.calls += 1
        raise ConnectionError("redis is gone")


class Hanging(MemoryStorage):
    hangs = True
    waiting = 0

    async def _hang(self) -> None:
        if self.hangs:
            self.waiting += 1
            await anyio.sleep_forever()

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        await self._hang()
        return await super().acquire_sliding_window_entry(key, limit, expiry, amount)

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        await self._hang()
        return await super().incr(key, expiry, amount)


async def test_a_broken_storage_is_replaced_by_local_counts_and_tried_again_later() -> None:
    now = 0.0
    storage = Broken()
    limiter = RateLimiter(1, storage, now=lambda: now)
    first, second = await limiter.hit("a"), await limiter.hit("a")
    assert (first is not None and first.allowed, second is not None and second.allowed, storage.calls) == (True, False, 1)
    now = 5.0
    await limiter.hit("b")
    assert storage.calls == 2


async def test_a_hanging_storage_costs_one_call_its_patience() -> None:
    limiter = RateLimiter(1, Hanging(), patience=0.01)
    quota = await limiter.hit("a")
    assert quota is not None
    assert quota.allowed
    assert not limiter.is_shared


async def test_one_call_tries_a_broken_storage_again_and_the_others_do_not_wait_for_it(caplog: pytest.LogCaptureFixture) -> None:
    """Its failing is told once, and its return."""
    now = 0.0
    storage = Hanging()
    limiter = RateLimiter(9, storage, now=lambda: now, patience=0.01)
    await limiter.hit("a")
    now = 6.0
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(limiter.hit, "a")
    assert storage.waiting == 2
    now, storage.hangs = 12.0, False
    await limiter.hit("a")
    assert limiter.is_shared
    assert [record.message for record in caplog.records] == [
        "rate limit storage is not available; this process counts for itself",
        "rate limit storage is available again",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.2, "1s"), (59.5, "1m0s"), (61, "1m1s"), (3600, "1h0m0s"), (86_399.5, "24h0m0s")]
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_waiting_is_never_endless() -> None:
    assert math.isfinite(LocalWindow(1).hit("a", 0.0).reset)


# Days

NOON = 20_000.5 * DAY_SECONDS


def shown(quota: Quota | None) -> dict[bytes, bytes]:
    """Return what the caller is told, refused or not."""
    assert quota is not None
    return dict(quota.headers() if quota.allowed else quota.error().headers())


async def used(limiter: RateLimiter, *, limit: int | None = None, daily: int = 3, calls: int = 1) -> list[bool]:
    """Send calls with alice's key, and tell which were let in."""
    quotas = [await limiter.hit("alice", limit, daily) for _ in range(calls)]
    return [quota is not None and quota.allowed for quota in quotas]


async def test_a_day_holds_its_limit_and_the_refusal_says_when_the_next_one_begins() -> None:
    wall = NOON
    limiter = RateLimiter(0, wall=lambda: wall)
    assert await used(limiter, calls=4) == [True, True, True, False]
    refused = await limiter.hit("alice", None, 3)
    assert refused is not None
    error = refused.error()
    assert isinstance(error, DailyLimitReached)
    assert (error.status, error.code, error.retry_after) == (429, "daily_limit_exceeded", DAY_SECONDS / 2)
    assert "3 requests" in error.message
    assert shown(refused) == {
        b"retry-after": b"43200",
        b"retry-after-ms": b"43200000",
        b"x-should-retry": b"false",
        b"x-ratelimit-limit-requests": b"3",
        b"x-ratelimit-remaining-requests": b"0",
        b"x-ratelimit-reset-requests": b"12h0m0s",
    }
    wall += DAY_SECONDS / 2 - 1
    assert await used(limiter) == [False]
    wall += 1
    assert await used(limiter, calls=4) == [True, True, True, False]


async def test_keys_without_a_daily_limit_are_not_counted_by_day() -> None:
    counts = DayCounts()
    limiter = RateLimiter(5, MemoryStorage(), day_counts=counts, wall=lambda: NOON)
    await limiter.hit("bob")
    limiter.hit_local("bob")
    assert not counts._totals


@pytest.mark.parametrize(
    ("limit", "daily", "remaining"),
    [(10, 3, [(3, 2), (3, 1), (3, 0)]), (3, 10, [(3, 2), (3, 1), (3, 0)]), (3, 3, [(3, 2), (3, 1), (3, 0)]), (0, 9, [(9, 8), (9, 7)])],
)
async def test_the_tighter_window_is_told(limit: int, daily: int, remaining: list[tuple[int, int]]) -> None:
    """Where both end together it is the day, which lasts longer."""
    for storage in (None, MemoryStorage()):
        limiter = RateLimiter(60, storage, wall=lambda: NOON)
        quotas = [await limiter.hit("alice", limit, daily) for _ in remaining]
        assert [(quota.limit, quota.remaining) for quota in quotas if quota] == remaining
        assert shown(quotas[-1])[b"x-ratelimit-reset-requests"] == (b"1m0s" if 0 < limit < daily else b"12h0m0s")


def test_who_is_refused_is_told_by_whom() -> None:
    minute, day = Quota(limit=9, remaining=0, reset=60.0), DayQuota.of(2, 3, NOON)
    assert (day.allowed, tighter(minute, day), tighter(None, day)) == (False, day, day)


async def test_a_call_over_the_limit_of_the_minute_does_not_count_for_the_day() -> None:
    for storage in (None, MemoryStorage()):
        now = 0.0
        limiter = RateLimiter(0, storage, now=lambda: now, wall=lambda: NOON)  # noqa: B023  used in this round
        assert await used(limiter, limit=2, calls=9) == [True, True] + [False] * 7
        assert limiter.day_counts.total("alice", NOON) == 2
        assert await used(limiter, limit=0, calls=2) == [True, False]


@pytest.mark.parametrize("exact", [600, 0])
@given(calls=st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=40))
def test_calls_that_are_taken_back_were_never_counted(exact: int, calls: list[tuple[float, bool]]) -> None:
    """A window with them is at any time as one without them; calls that are counted together differ by less than 0.1 s."""
    with_them, without = LocalWindow(5, exact=exact), LocalWindow(5, exact=exact)
    now = 0.0
    for gap, is_taken_back in calls:
        now += gap
        if is_taken_back:
            if with_them.hit("a", now).allowed:
                with_them.take_back("a", now, now)
        else:
            found, expected = with_them.hit("a", now), without.hit("a", now)
            assert (found.remaining, found.allowed) == (expected.remaining, expected.allowed)
            assert (found.wait or 0.0) == pytest.approx(expected.wait or 0.0, abs=0.0 if exact else 0.1)


def test_a_call_is_taken_back_by_when_it_came() -> None:
    """Later calls of the same client stay; of a call that is a minute old, or of an unknown client, nothing is left to take back."""
    window = LocalWindow(2)
    window.hit("a", 0.5)
    window.hit("a", 30.0)
    window.take_back("a", 0.0, 40.0)
    assert [window.hit("a", now).allowed for now in (59.0, 60.0, 89.0, 90.0)] == [True, False, False, True]
    window.take_back("a", 30.0, 91.0)
    assert not window.hit("a", 91.0).allowed
    window.take_back("a", 91.0, 91.0)
    window.take_back("b", 91.0, 91.0)
    assert not window.hit("a", 91.0).allowed


async def test_a_call_that_is_taken_back_uses_up_neither_the_minute_nor_the_day() -> None:
    """Here or in the shared storage, and with either limit alone."""
    for storage in (None, MemoryStorage()):
        for name, limit, daily in (("alice", 1, 1), ("bob", 1, None), ("carol", 0, 1)):
            limiter = RateLimiter(0, storage, now=lambda: 100.0, wall=lambda: NOON)
            for _ in range(3):
                quota = await limiter.hit(name, limit, daily)
                assert quota is not None
                assert (quota.allowed, quota.is_shared) == (True, storage is not None)
                if storage is None:
                    limiter.take_back(name, 100.0, daily=daily is not None)
                else:
                    await limiter.take_back_shared(name, limit, 100.0, daily=daily is not None)
            quotas = [await limiter.hit(name, limit, daily) for _ in range(2)]
            assert [quota.allowed for quota in quotas if quota] == [True, False]


async def test_a_call_of_yesterday_is_not_taken_back_today() -> None:
    """Its day is over."""
    limiter = RateLimiter(0, now=lambda: 100.0, wall=lambda: float(DAY_SECONDS))
    assert await used(limiter, daily=1) == [True]
    limiter.take_back("alice", 99.0, daily=True)
    assert await used(limiter, daily=1) == [False]


async def test_a_storage_that_fails_keeps_the_count_of_a_call_that_is_taken_back() -> None:
    """Nobody waits for it, and nothing fails."""
    storage = Hanging()
    limiter = RateLimiter(9, storage, recovery=0.01)
    await limiter.take_back_shared("alice", None, limiter.now(), daily=True)
    assert storage.waiting


async def test_a_day_that_others_have_used_up_costs_no_place_in_the_minute() -> None:
    """The first call that this gateway refuses for the day is not counted either."""
    storage = MemoryStorage()
    one, other = (RateLimiter(0, storage, wall=lambda: NOON) for _ in range(2))
    await used(one, daily=1, limit=9)
    kept = dict(storage.storage)
    assert await used(other, daily=1, limit=9) == [False]
    assert dict(storage.storage) == kept


async def test_a_day_that_is_used_up_costs_no_question() -> None:
    """Neither a place in the minute nor a call of the storage."""
    storage = MemoryStorage()
    limiter = RateLimiter(0, storage, wall=lambda: NOON)
    await used(limiter, daily=1, limit=9)
    kept = dict(storage.storage)
    assert await used(limiter, daily=1, limit=9, calls=20) == [False] * 20
    assert dict(storage.storage) == kept


async def test_a_shared_storage_counts_days_for_all() -> None:
    """By the day's name: it ends for all at midnight, not a day after the first call."""
    wall = NOON
    storage = MemoryStorage()
    one, other = RateLimiter(0, storage, wall=lambda: wall), RateLimiter(0, storage, wall=lambda: wall)
    quotas = [await limiter.hit("alice", None, 3) for limiter in (one, other, one, other, one)]
    assert [quota.remaining for quota in quotas if quota] == [2, 1, 0, 0, 0]
    assert [quota.allowed for quota in quotas if quota] == [True, True, True, False, False]
    wall += DAY_SECONDS / 2
    assert (await used(one), await used(other, calls=3)) == ([True], [True, True, False])


async def test_without_the_storage_a_day_goes_on_where_it_was() -> None:
    """Counts heard of others are kept, the call that waited in vain counts once, and those of the outage are not forgotten after it."""
    now = 0.0
    storage = Hanging()
    storage.hangs = False
    one, other = (RateLimiter(0, storage, now=lambda: now, wall=lambda: NOON, patience=0.05) for _ in range(2))
    assert (await used(other, daily=5, calls=2), await used(one, daily=5)) == ([True, True], [True])
    storage.hangs = True
    assert await used(one, daily=5) == [True]
    assert (one.is_shared, storage.waiting, one.day_counts.total("alice", NOON)) == (False, 1, 4)
    storage.hangs, now = False, 10.0
    assert await used(one, daily=5, calls=2) == [True, False]


class Counter(MemoryStorage):
    """A storage that counts and does nothing else, and may be gone; or there, with answers that come too late."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.is_there = self.answers = True

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        self.count += amount if self.is_there else 0
        if not (self.is_there and self.answers):
            raise TimeoutError
        return self.count


@attrs.define
class Site:
    """Gateways that count a key's calls, the storage that they share, and what the database keeps of it."""

    gateways: int
    limit: int
    storage: Counter = attrs.field(factory=Counter)
    sent: int = 0
    allowed: int = 0
    wall: float = NOON
    now: float = 0.0
    limiters: list[RateLimiter] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.limiters = [self.started() for _ in range(self.gateways)]

    def started(self) -> RateLimiter:
        """Start a gateway, which learns what was kept."""
        limiter = RateLimiter(0, self.storage, now=lambda: self.now, wall=lambda: self.wall)
        self.learn(limiter)
        return limiter

    def learn(self, limiter: RateLimiter) -> None:
        """Let a gateway read what was kept."""
        limiter.day_counts.learn({"key": self.allowed}, day_of(self.wall), self.wall)

    async def call(self, limiter: RateLimiter) -> bool:
        """Send a request; each one tries the storage."""
        self.sent += 1
        self.now += limiter.recovery
        quota = await limiter.hit("key", None, self.limit)
        assert quota is not None
        self.allowed += quota.allowed
        return quota.allowed

    async def do(self, what: str, number: int) -> None:
        """Let something happen."""
        number %= self.gateways
        if what == "call":
            await self.call(self.limiters[number])
        elif what == "learn":
            self.learn(self.limiters[number])
            assert self.allowed < self.limit or not await self.call(self.limiters[number])
        elif what == "restart":
            self.limiters[number] = self.started()
        elif what == "outage":
            self.storage.is_there = not self.storage.is_there
        elif what == "late":
            self.storage.answers = not self.storage.answers
        elif what == "forget":
            self.storage.count = 0
        else:
            self.wall += DAY_SECONDS
            self.storage.count = self.sent = self.allowed = 0
        for known in self.limiters:
            assert known.day_counts.total("key", self.wall) <= self.sent


def steps(*others: str) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Return histories that are mostly calls."""
    return st.lists(st.tuples(st.sampled_from(["call", "call", "call", *others]), st.integers(0, 2)), max_size=60)


@given(st.integers(1, 8), st.integers(1, 3), steps("learn", "restart", "tomorrow"))
async def test_gateways_that_share_a_storage_allow_the_limit_and_no_more(limit: int, gateways: int, history: list[tuple[str, int]]) -> None:
    site = Site(gateways, limit)
    for step in history:
        await site.do(*step)
        assert site.allowed == min(limit, site.sent)


@given(st.integers(1, 8), steps("learn", "restart", "outage", "late", "forget", "tomorrow"))
async def test_one_gateway_is_exact_whatever_the_storage_does(limit: int, history: list[tuple[str, int]]) -> None:
    """It is gone, returns with less or with nothing; the gateway restarts and finds what was kept."""
    site = Site(1, limit)
    for step in history:
        await site.do(*step)
        assert site.allowed == min(limit, site.sent)


@given(st.integers(1, 8), st.integers(2, 3), steps("learn", "restart", "outage", "late", "forget", "tomorrow"))
async def test_without_the_storage_each_gateway_allows_the_limit_at_most(limit: int, gateways: int, history: list[tuple[str, int]]) -> None:
    """And none of them more, once it has learned what all did; nobody is refused before the limit is reached."""
    site = Site(gateways, limit)
    for step in history:
        await site.do(*step)
        assert min(limit, site.sent) <= site.allowed <= limit * gateways


def test_the_error_names_the_limit_and_when_to_try_again() -> None:
    quota = Quota(limit=1200, remaining=0, reset=60.0, wait=2.1)
    assert quota.error().message == "Rate limit reached (1,200 requests per minute). Try again in 3 s."
    assert quota.error("Wait.").message == "Wait."
