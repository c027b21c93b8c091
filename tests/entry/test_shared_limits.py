"""Rate limits in a real Redis: several gateways count together, and one that is gone or slow stops nobody."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

import pytest

from multiverse_gateway import Settings
from multiverse_gateway.core.budget import DAY_SECONDS, DayCounts
from multiverse_gateway.core.errors import RateLimited
from multiverse_gateway.entry.access import AccessRules
from multiverse_gateway.entry.quotas import RateLimiter, rate_limiter
from support.services import RedisServer

pytestmark = pytest.mark.e2e

BOUND = 0.1
SLACK = 1.0
"""What a busy machine may take besides."""


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """Return a Redis that the tests of this module hurt and bring back."""
    with RedisServer() as server:
        yield server


Make = Callable[..., RateLimiter]


@pytest.fixture
async def limiter(redis: RedisServer) -> AsyncIterator[Make]:
    """Return a function that makes the limiter of one gateway, impatient to come back."""
    made: list[RateLimiter] = []

    def make(limit: int = 5) -> RateLimiter:
        one = rate_limiter(Settings(rate_limit_per_minute=limit, rate_limit_storage=redis.url), DayCounts())
        one.recovery, one.patience = 0.3, 1.0  # the first call connects, on a busy machine
        made.append(one)
        return one

    yield make
    for one in made:
        await one.aclose()


async def allowed(limiter: RateLimiter, key: str) -> bool:
    """Count a call and tell whether it may come in."""
    quota = await limiter.hit(key)
    assert quota is not None
    return quota.allowed


async def test_gateways_count_together(limiter: Make) -> None:
    """Five calls in a minute, whichever gateway they come to, and the refusal says when to come again."""
    one, other = limiter(), limiter()
    assert [await allowed(one if number % 2 else other, "together") for number in range(7)] == [True] * 5 + [False] * 2
    quota = await one.hit("together")
    assert quota is not None
    assert 0 < (quota.wait or 0) <= 60
    assert await allowed(one, "somebody else")


async def test_a_call_that_is_taken_back_counts_for_nobody(limiter: Make) -> None:
    """A gateway that refuses it afterward gives back its place in the minute and in the day, to all gateways."""
    one, other = limiter(), limiter()
    for _ in range(4):
        for _ in range(2):
            quota = await one.hit("given back", 2, 2)
            assert quota is not None
            assert quota.allowed
        for _ in range(2):
            await one.take_back_shared("given back", 2, one.now(), daily=True)
    quotas = [await gateway.hit("given back", 2, 2) for gateway in (other, one, other)]
    assert [quota.allowed for quota in quotas if quota] == [True, True, False]


async def test_days_are_counted_together_and_forgotten_by_themselves(redis: RedisServer, limiter: Make) -> None:
    """Three calls in a day, whichever gateway they come to; Redis keeps one number of it, until that day is over by every clock."""
    one, other = limiter(), limiter()
    one.wall = other.wall = lambda: 1_780_000_000.0
    quotas = [await (one if number % 2 else other).hit("alice", 0, 3) for number in range(5)]
    assert [(quota.allowed, quota.remaining) for quota in quotas if quota] == [(True, 2), (True, 1), (True, 0), (False, 0), (False, 0)]
    (name,) = redis.ask("KEYS", "*alice*")
    assert "2026-05-28" in name
    assert DAY_SECONDS < redis.ask("TTL", name) <= 2 * DAY_SECONDS


async def test_what_was_counted_may_be_lost(redis: RedisServer, limiter: Make) -> None:
    """P09: FLUSHALL and forgotten scripts: counting starts over and works."""
    one = limiter(1)
    assert [await allowed(one, "lost"), await allowed(one, "lost")] == [True, False]
    redis.ask("FLUSHALL")
    redis.ask("SCRIPT", "FLUSH")
    assert [await allowed(one, "lost"), await allowed(one, "lost")] == [True, False]
    assert one.is_shared


@pytest.mark.parametrize("harm", ["stopped", "killed"])
async def test_no_call_waits_for_redis(redis: RedisServer, limiter: Make, harm: str) -> None:
    """P09: Stopped or gone: one call waits for the bound, the next ones not at all; each gateway counts by itself until it is back."""
    one = limiter()
    assert await allowed(one, harm)
    one.patience = BOUND
    if harm == "stopped":
        redis.pause()
    else:
        redis.kill()
    began = time.monotonic()
    assert [await allowed(one, harm) for _ in range(6)] == [True] * 5 + [False]
    assert time.monotonic() - began < BOUND + SLACK
    if harm == "stopped":
        redis.resume()
    else:
        redis.start()
    one.patience = 1.0

    async def is_back() -> bool:
        await one.hit("somebody else")
        return one.is_shared

    deadline = time.monotonic() + 10
    while not await is_back():
        assert time.monotonic() < deadline
    other = limiter()
    assert [await allowed(one if number % 2 else other, f"{harm} and back") for number in range(7)] == [True] * 5 + [False] * 2


async def test_gateways_count_probes_together(redis: RedisServer) -> None:
    """Ten a minute are ten, however many processes there are; they use up nothing of the requests to models."""
    settings = Settings(rate_limit_per_minute=5, rate_limit_storage=redis.url)
    entrances = [AccessRules.of(settings) for _ in range(3)]
    try:
        passed = 0
        for number in range(30):
            with suppress(RateLimited):
                await entrances[number % 3].count_probe("owner of a server")
                passed += 1
        assert passed == 10
        assert await allowed(entrances[0].limiter, "owner of a server")
    finally:
        for rules in entrances:
            await rules.limiter.aclose()
