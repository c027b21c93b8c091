"""What the pages call the states of a server."""

from __future__ import annotations

from math import inf

from attrs import evolve

from multiverse_gateway.core.health import Blame, Health, HealthState, NextProbe, Rest
from multiverse_gateway.pages.states import STATES, next_check_text, reason_of


def test_every_state_has_a_name_and_a_color() -> None:
    """`STATES` names all states, each by another word."""
    assert set(STATES) == set(HealthState)
    assert len({state.word for state in STATES.values()}) == len(STATES)


def test_a_healthy_server_may_have_something_to_say() -> None:
    """It rests, other servers are chosen first for some reason, or it does not list its model."""
    health = Health(state=HealthState.HEALTHY, warning="it lists other models")
    assert reason_of(health, 10.0) == "It lists other models."
    assert reason_of(evolve(health, rest=Rest(until=11.0)), 10.0) == "Busy: the server asked for a pause."
    assert "go first" in (reason_of(evolve(health, blame=Blame(doubted_until=11.0)), 10.0) or "")
    assert "The model was missing" in (reason_of(evolve(health, blame=Blame(lacking_until=11.0)), 10.0) or "")
    assert reason_of(Health(state=HealthState.SUSPECT, reason="it hung up"), 10.0) == "It hung up."
    assert reason_of(Health(state=HealthState.PROBING), 0.0) is None


def test_the_next_check_is_named_roughly() -> None:
    """It is due, comes after about so many minutes, or comes only on request."""
    assert next_check_text(Health(next_probe=NextProbe(at=10.0)), 10.0) == "is due now"
    assert next_check_text(Health(next_probe=NextProbe(at=100.0)), 10.0) == "comes in about 1 min"
    assert next_check_text(Health(next_probe=NextProbe(at=inf)), 10.0) == "runs only on request"
