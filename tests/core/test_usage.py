"""Usage counts: sums that stop, and an outbox in which no row holds up another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.usage import (
    MAX_COUNT,
    MAX_REFUSALS,
    MAX_REFUSALS_IN_A_ROW,
    NO_OWNER,
    NO_SERVER,
    NOBODY,
    Batch,
    Counts,
    Ledger,
    Outbox,
    Usage,
    bounded,
)

COUNTS = st.integers(-(2**70), 2**70)


@given(COUNTS, COUNTS)
def test_a_sum_is_a_count(one: int, other: int) -> None:
    """From 0 to the largest, whatever was added up."""
    total = Counts(prompt_tokens=one) + Counts(prompt_tokens=other)
    assert total.prompt_tokens == min(MAX_COUNT, max(0, one + other))


@given(st.floats() | st.integers() | st.text() | st.none() | st.binary())
def test_whatever_stands_for_a_count_is_read_as_one(value: object) -> None:
    assert 0 <= bounded(value) <= MAX_COUNT


class Way:
    """An outbox on its way to a store that refuses what the test says."""

    def __init__(self, refuses: Callable[[Usage], bool]) -> None:
        self.ledger = Ledger()
        self.outbox = Outbox(self.ledger)
        self.refuses = refuses
        self.batches: dict[str, Batch] = {}
        self.tries = 0
        self._ids = (f"batch {number}" for number in count())

    def count(self, *models: str) -> None:
        """Count a request to each of these models."""
        for model in models:
            self.ledger.count(model, NO_SERVER, NO_OWNER, NOBODY, day=0, counts=Counts(requests=1))

    def sent(self) -> Iterator[Batch]:
        """Yield what is sent in one round."""
        self.outbox.begin()
        while (batch := self.outbox.next(next(self._ids))) is not None:
            self.tries += 1
            yield batch

    def round(self) -> list[str]:
        """Send everything; return the models of the rows that are dropped."""
        for batch in self.sent():
            if any(map(self.refuses, batch.rows)):
                self.outbox.refused()
            else:
                self.batches[batch.id] = batch
                self.outbox.accepted()
        return [usage.key.model for usage in self.outbox.end()]

    def saved(self, model: str) -> int:
        """Return the requests to a model that the store has."""
        return sum(row.counts.requests for batch in self.batches.values() for row in batch.rows if row.key.model == model)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_every_sound_row_is_saved_in_the_first_rounds(poisoned: list[bool]) -> None:
    """Once, wherever the refused ones stand; those are dropped after some rounds, and only if the store took others."""
    way = Way(lambda usage: usage.key.model.startswith("poisoned"))
    names = [f"poisoned {number}" if bad else f"sound {number}" for number, bad in enumerate(poisoned)]
    dropped = []
    for _ in range(MAX_REFUSALS):
        way.count(*names)
        dropped += way.round()
    assert {name: way.saved(name) for name in names if name.startswith("sound")} == {
        name: MAX_REFUSALS for name in names if name.startswith("sound")
    }
    assert dropped == ([name for name in names if name.startswith("poisoned")] if not all(poisoned) else [])


def test_nothing_is_dropped_while_the_store_accepts_nothing() -> None:
    """It is out of order then, in its own way; all is saved once when it works again, and little time is spent until then."""
    broken = True
    way = Way(lambda usage: broken)
    names = [f"model {number}" for number in range(500)]
    for _ in range(10):
        way.count(*names)
        assert way.round() == []
    assert way.tries <= 10 * MAX_REFUSALS_IN_A_ROW
    broken = False
    assert way.round() == []
    assert {way.saved(name) for name in names} == {10}


def test_a_row_that_is_accepted_again_is_forgiven() -> None:
    """Refused rounds count in a row only."""
    refused = {"one"}
    way = Way(lambda usage: usage.key.model in refused)
    for number in range(4 * MAX_REFUSALS):
        way.count("one", "two")
        refused = {"one"} if number % MAX_REFUSALS else set()
        assert way.round() == []
    refused = set()
    way.round()
    assert way.saved("one") == way.saved("two") == 4 * MAX_REFUSALS


def test_a_batch_of_unknown_outcome_is_sent_again_as_it_was() -> None:
    """With its id, before anything else; what was not sent and what came since is saved after it."""
    way = Way(lambda usage: False)
    way.count("one", "two")
    first = next(way.sent())
    assert way.outbox.end() == []
    way.count("one", "three")
    again = next(way.sent())
    assert again is first
    assert way.outbox.end() == []
    way.round()
    assert [way.saved(name) for name in ("one", "two", "three")] == [2, 1, 1]


def test_an_outage_between_rows_loses_none() -> None:
    """The halves of a refused batch that were not sent yet are kept."""
    way = Way(lambda usage: usage.key.model == "poisoned")
    way.count("one", "poisoned", "two", "three")
    for number, batch in enumerate(way.sent()):
        if number == 0:
            way.outbox.refused()
        else:
            assert len(batch.rows) == 2
            break
    way.outbox.end()
    way.round()
    assert [way.saved(name) for name in ("one", "two", "three", "poisoned")] == [1, 1, 1, 0]


def test_an_outcome_that_nobody_asked_for_changes_nothing() -> None:
    way = Way(lambda usage: False)
    way.outbox.accepted()
    way.outbox.refused()
    assert way.round() == []
