"""How often somebody may call: exact in one process, common where a storage is shared, and never held up by it."""

from __future__ import annotations

import math

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits.aio.storage import MemoryStorage

from multiverse_gateway.web.quotas import LocalWindow, RateLimiter, duration


def test_a_minute_holds_its_limit_and_no_more() -> None:
    window = LocalWindow(3)
    assert [window.hit("a", float(second)).allowed for second in (0, 1, 2, 3)] == [True, True, True, False]
    refused = window.hit("a", 10.0)
    assert (refused.remaining, refused.wait, refused.reset) == (0, 50.0, 52.0)
    assert window.hit("b", 10.0).remaining == 2
    assert window.hit("a", 60.0).allowed
    assert not window.hit("a", 60.5).allowed


@given(st.integers(1, 5), st.lists(st.floats(0, 30), max_size=60))
def test_no_sixty_seconds_hold_more_than_the_limit(limit: int, gaps: list[float]) -> None:
    """However calls are spread; and whoever waits as told is let in."""
    window = LocalWindow(limit)
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

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        if self.hangs:
            self.waiting += 1
            await anyio.sleep_forever()
        return await super().acquire_sliding_window_entry(key, limit, expiry, amount)


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
        "rate limit storage fails, counting in this process",
        "rate limit storage works again",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (0.2, "1s"), (59.5, "1m0s"), (61, "1m1s")])
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_waiting_is_never_endless() -> None:
    assert math.isfinite(LocalWindow(1).hit("a", 0.0).reset)
