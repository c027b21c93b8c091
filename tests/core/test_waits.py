"""How evenly clients wait: an index for each model and band over a window of minutes, in bounded memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.fairness import Band, Flow, jain
from multiverse_gateway.core.waits import MAX_CLIENTS, MINUTES, RecentWaits

PLACE = ("llama", Band.INTERACTIVE)
WAITS = st.lists(
    st.tuples(
        st.sampled_from(["llama", "phi"]),
        st.builds(Flow, st.sampled_from("abc"), st.sampled_from(Band)),
        st.floats(0.001, 300.0),
        st.floats(0.0, 120.0),
    ),
    max_size=40,
)


@given(WAITS)
def test_the_index_is_that_of_the_mean_waits_in_the_window(waits: list[tuple[str, Flow, float, float]]) -> None:
    """Equal to an index over a list of all waits, whatever was forgotten on the way."""
    recent, noted, now = RecentWaits(), [], 0.0
    for model, flow, seconds, pause in waits:
        now += pause
        recent.note(model, flow, seconds, now)
        noted.append((model, flow, seconds, now // 60))
    clients: dict[tuple[str, Flow], list[float]] = {}
    for model, flow, seconds, minute in noted:
        if minute > now // 60 - MINUTES:
            clients.setdefault((model, flow), []).append(seconds)
    expected: dict[tuple[str, Band], list[float]] = {}
    for (model, flow), values in clients.items():
        expected.setdefault((model, flow.band), []).append(sum(values) / len(values))
    found = recent.evenness(now)
    assert found.keys() == expected.keys()
    for place, means in expected.items():
        assert found[place] == pytest.approx(jain(means))


def test_a_script_counts_as_one_client() -> None:
    """A thousand waits of one client weigh as much as one wait of another."""
    recent = RecentWaits()
    for _ in range(1000):
        recent.note("llama", Flow("script"), 10.0, now=0.0)
    recent.note("llama", Flow("person"), 10.0, now=0.0)
    assert recent.evenness(0.0) == {PLACE: pytest.approx(1.0)}
    recent.note("llama", Flow("starved"), 1e6, now=0.0)
    assert recent.evenness(0.0)[PLACE] == pytest.approx(1 / 3, rel=1e-3)


def test_bulk_waits_make_no_interactive_client_look_favored() -> None:
    """Bulk requests are meant to wait longer, so they have an index of their own."""
    recent = RecentWaits()
    recent.note("llama", Flow("a"), 1.0, now=0.0)
    recent.note("llama", Flow("a", Band.BULK), 200.0, now=0.0)
    assert recent.evenness(0.0) == {PLACE: 1.0, ("llama", Band.BULK): 1.0}


def test_memory_is_bounded_by_clients_and_minutes() -> None:
    """Neither many addresses nor a long run can fill the memory; known clients are still counted."""
    recent = RecentWaits()
    for minute in range(3 * MINUTES):
        for number in range(MAX_CLIENTS + 10):
            recent.note("llama", Flow(str(number)), 1.0, now=60.0 * minute)
    assert len(recent._minutes) == MINUTES
    assert {len(sums) for sums in recent._minutes.values()} == {MAX_CLIENTS}
    recent.note("llama", Flow("0"), 1000.0, now=60.0 * (3 * MINUTES - 1))
    assert recent.evenness(60.0 * (3 * MINUTES - 1))[PLACE] < 0.5
    assert recent.evenness(60.0 * (4 * MINUTES)) == {}
    assert not recent._minutes
