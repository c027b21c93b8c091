"""What shows that a server lives although it does not answer a probe."""

from __future__ import annotations

from multiverse_gateway.core.activity import Activity, Running, busy_role, held_seconds, hold_seconds


def test_bytes_and_answers_show_life() -> None:
    """Of an attempt that ran before, of a new one, or of one that is over; a new attempt without bytes shows nothing."""
    before = Activity(answers=3, received={(7, 1): 100}, oldest=Running((7, 1), 50.0))
    assert Activity(answers=3, received={(7, 1): 101}).shows_life_since(before)
    assert Activity(answers=3, received={(7, 1): 100, (8, 1): 1}).shows_life_since(before)
    assert Activity(answers=4).shows_life_since(before)
    assert not before.shows_life_since(before)
    assert not Activity(answers=3, received={(7, 2): 0, (8, 1): 0}).shows_life_since(before)


def test_other_processes_know_in_time() -> None:
    """A process says where its requests run before a probe can time out, and is believed until it has had two more chances to."""
    for timeout in (0.1, 1.0, 10.0, 120.0):
        assert hold_seconds(timeout) + timeout / 2 < timeout
        assert held_seconds(timeout) == 3 * hold_seconds(timeout) <= 15.0
    assert busy_role("http://a") != busy_role("http://b")
