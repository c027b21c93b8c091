"""A server that does not list its model: when it needs attention, and what settles that."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.health import (
    AttemptFailed,
    AttemptPassed,
    Blame,
    Health,
    HealthEvent,
    HealthPolicy,
    HealthState,
    ProbePassed,
    advance,
    fresh,
    is_settled,
    merged,
    needs_attention,
)
from multiverse_gateway.core.health.listing import ANSWERS_UNLISTED, EMPTY_LIST, UNLISTED
from multiverse_gateway.core.routing import build_table
from multiverse_gateway.core.totals import totals_of
from multiverse_gateway.testing.store import make_server

CHAT = "/v1/chat/completions"
POLICY = HealthPolicy()


def health(**changes: Any) -> Health:
    return attrs.evolve(fresh(1, now=0.0, wall=1000.0), answered=(CHAT,), **changes)


def after(before: Health, *events: HealthEvent) -> Health:
    for event in events:
        before = advance(before, event, POLICY, now=10.0, wall=1010.0, random=0.5)
    return before


def failed(kind: FailureClass) -> AttemptFailed:
    return AttemptFailed(1, "client", 1, Failure(kind, "words", status=404), CHAT)


@pytest.mark.parametrize("warning", [UNLISTED, EMPTY_LIST])
def test_a_server_whose_list_lacks_the_model_needs_attention_until_it_answers(warning: str) -> None:
    """An answer outweighs the list, until the server itself says that it has no such model."""
    doubtful = after(health(), ProbePassed(1, warning))
    assert needs_attention(doubtful, 10.0)
    assert not doubtful.is_undisturbed, "the next good answer has to be noted"
    answered = after(doubtful, AttemptPassed(1, CHAT))
    assert (answered.warning, needs_attention(answered, 10.0)) == (ANSWERS_UNLISTED, False)
    assert is_settled(answered, CHAT), "another one changes nothing"
    assert after(answered, ProbePassed(1, warning)).warning == ANSWERS_UNLISTED
    refused = after(answered, failed(FailureClass.NO_MODEL), ProbePassed(1, warning))
    assert (refused.warning, needs_attention(refused, 10.0)) == (warning, True)
    assert after(answered, ProbePassed(1, None)).warning is None


def test_a_client_error_proves_nothing_about_the_model() -> None:
    """It proves only that the server lives."""
    doubtful = health(warning=UNLISTED)
    assert after(doubtful, failed(FailureClass.CLIENT_ERROR)).warning == UNLISTED


def test_a_listed_model_that_a_request_did_not_find_needs_attention_for_a_while() -> None:
    """As long as the server is chosen last for it."""
    lacking = after(health(), failed(FailureClass.NO_MODEL))
    assert needs_attention(lacking, 10.0)
    assert not needs_attention(lacking, 10.0 + POLICY.pair_rest)
    assert not needs_attention(attrs.evolve(lacking, state=HealthState.UNHEALTHY), 10.0), "it is down, which is worse"


def test_other_processes_learn_that_the_model_answers() -> None:
    """Although no check has ended meanwhile."""
    here, stored = health(warning=UNLISTED), health(warning=ANSWERS_UNLISTED)
    told = merged(here, stored, POLICY, generation=1, is_unsaved=False, now=10.0, wall=1010.0)
    assert told.warning == ANSWERS_UNLISTED
    assert merged(here, here, POLICY, generation=1, is_unsaved=False, now=10.0, wall=1010.0) is here


def test_totals_count_what_needs_attention_among_the_healthy() -> None:
    """With its own number."""
    one, two = make_server("one"), make_server("two")
    table = build_table(1, [one, two], {one.id: health(warning=UNLISTED), two.id: health(blame=Blame(lacking_until=20.0))})
    totals = totals_of(table, 10.0)
    assert (totals.healthy, totals.attention) == (2, 2)
    assert totals_of(table, 30.0).attention == 1
