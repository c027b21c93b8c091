"""What a process counts of the requests that are over."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.fairness import FairQueue
from multiverse_gateway.core.servers import ClientKey
from multiverse_gateway.core.usage import NO_SERVER, Counts
from multiverse_gateway.observability.metrics import OTHER
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.stores.memory import MemoryStore
from multiverse_gateway.testing.store import make_key
from multiverse_gateway.usage_book import UsageBook
from support.answers import chat_event
from support.exchanges import JSON, MODEL, RecordingEngine, server

NOON = 1_779_969_600.0
DAY = "2026-05-28"
ANSWER = b'{"usage":{"prompt_tokens":7,"completion_tokens":2}}'


class Broken(MemoryStore):
    """A store that cannot be written."""

    async def add_usage(self, batch: str, rows: object) -> None:
        """Fail."""
        raise StorageUnavailable("gone")


def book_of(stage: RecordingEngine, store: MemoryStore, keys: Collection[ClientKey] = ()) -> UsageBook:
    """Return a book over the servers of the stage."""
    return UsageBook(store, FairQueue(max_waiting=8), now=stage.now, wall=lambda: NOON, table=lambda: stage.table, keys=lambda: keys)


def ended(stage: RecordingEngine, status: int = 200, *, model: str = MODEL) -> Exchange:
    """Return an exchange that is over."""
    exchange, _ = stage.start(model=model)
    if exchange.search.tried:
        stage.last.answer(status, JSON, ANSWER)
    return exchange


async def test_requests_that_are_alike_are_counted_together() -> None:
    stage, store = RecordingEngine([server("a")]), MemoryStore()
    book = book_of(stage, store)
    for _ in range(3):
        book.count(ended(stage), 1.0, NOON, 0)
    book.count(ended(stage, 400), 1.0, NOON, 0)
    assert book.totals == {"requests": 4, "succeeded": 3, "failed": 1, "left": 0, "attempts": 4}
    await book.flush()
    (usage,) = await store.usage(DAY, DAY)
    assert (usage.key.model, usage.key.server_id) == ("tiny", "a")
    assert (usage.counts.requests, usage.counts.failed, usage.counts.prompt_tokens, usage.counts.completion_tokens) == (4, 1, 21, 6)


@pytest.mark.parametrize("how", ["client_gone", "client_stalled"])
async def test_a_canceled_request_has_not_failed(how: str) -> None:
    """A client that leaves and one that stops reading, before the first byte and after it; the tokens that came are counted."""
    stage, store = RecordingEngine([server("a")]), MemoryStore()
    book = book_of(stage, store)
    for events in (0, 2):
        exchange, _ = stage.start(stream=True)
        if events:
            stage.last.stream(*[chat_event("one", MODEL, {"content": "Hello"})] * events)
        getattr(exchange, how)()
        book.count(exchange, 1.0, NOON, events)
    assert book.totals == {"requests": 2, "succeeded": 0, "failed": 0, "left": 2, "attempts": 2}
    await book.flush()
    (usage,) = await store.usage(DAY, DAY)
    assert usage.counts == Counts(requests=2, failed=0, canceled=2, completion_tokens=2)
    assert (book.meter.models[MODEL].canceled, book.meter.models[MODEL].statuses[499]) == (2, 2)


async def test_a_server_that_answers_499_has_failed() -> None:
    """Its client is still there."""
    stage, store = RecordingEngine([server("a")]), MemoryStore()
    book = book_of(stage, store)
    book.count(ended(stage, 499), 1.0, NOON, 0)
    assert (book.totals["failed"], book.totals["left"]) == (1, 0)


async def test_a_request_counts_on_the_day_on_which_it_came() -> None:
    stage, store = RecordingEngine([server("a")]), MemoryStore()
    book = book_of(stage, store)
    book.count(ended(stage), 43_201.0, NOON, 0)
    await book.flush()
    assert [usage.key.day for usage in await store.usage("2026-05-01", DAY)] == ["2026-05-27"]


async def test_models_that_nobody_registered_are_not_told_apart() -> None:
    """Clients choose names: neither metrics nor the database may grow by them."""
    stage, store = RecordingEngine([server("a")]), MemoryStore()
    book = book_of(stage, store)
    for name in ("one", "two"):
        book.count(ended(stage, model=name), 0.1, NOON, 0)
    await book.flush()
    assert await store.usage(DAY, DAY) == ()
    assert book.totals["failed"] == 2
    assert (book.label("tiny"), book.label("one")) == ("tiny", OTHER)


async def test_what_cannot_be_saved_is_saved_later() -> None:
    stage, store = RecordingEngine([server("a")]), Broken()
    book = book_of(stage, store)
    book.count(ended(stage), 1.0, NOON, 0)
    for _ in range(2):
        with pytest.raises(StorageUnavailable):
            await book.flush()
    book._store = MemoryStore()
    await book.flush()
    (usage,) = await book._store.usage(DAY, DAY)
    assert (usage.counts.requests, usage.key.server_id != NO_SERVER) == (1, True)


async def test_only_keys_with_a_daily_limit_are_looked_up() -> None:
    stage, store = RecordingEngine([server("a")]), MemoryStore()
    other = book_of(stage, store)
    limited, free = make_key("limited", daily_limit=5), make_key("free", daily_limit=None)
    for key in (limited, free):
        exchange = ended(stage)
        exchange.request.caller = Caller(key.id, key.id)
        other.count(exchange, 1.0, NOON, 0)
    await other.flush()
    keys: list[ClientKey] = [limited, free]
    book = book_of(stage, store, keys)
    await book.learn_day()
    assert [book.day_counts.total(key.id, NOON) for key in keys] == [1, 0]
