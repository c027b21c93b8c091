"""How probes and requests move a server between its states."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from multiverse_gateway.core.activity import Running
from multiverse_gateway.core.engine_facts import EngineKind, Measured
from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.health import (
    AttemptFailed,
    AttemptPassed,
    AutoDeregister,
    Blame,
    Health,
    HealthEvent,
    HealthPolicy,
    HealthState,
    NextProbe,
    ProbeFailed,
    ProbePassed,
    ProbeTimedOut,
    Refused,
    Rest,
    advance,
    followed,
    fresh,
    has_answered,
    is_last,
    is_refused,
    is_settled,
    merged,
    resume,
    supports,
    traffic_share,
)
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.routing import build_table, candidates, with_health
from multiverse_gateway.core.servers import Server, ServerId
from support.health import is_usable

CHAT = "/v1/chat/completions"
POLICY = HealthPolicy()
WALL = 1_700_000_000.0
STRIKES = [FailureClass.TIMEOUT, FailureClass.SERVER_ERROR, FailureClass.NONSENSE]
DEADLY = [FailureClass.CONNECT, FailureClass.BROKEN]
BLAMED = [*DEADLY, *STRIKES]
ANY_STATE = pytest.mark.parametrize("state", list(HealthState))


def after(
    health: Health,
    *events: HealthEvent,
    now: float = 100.0,
    policy: HealthPolicy = POLICY,
    random: float = 0.5,
) -> Health:
    for event in events:
        health = advance(health, event, policy, now=now, wall=WALL + now, random=random)
    return health


def passed(*, forced: bool = False) -> ProbePassed:
    return ProbePassed(1, forced=forced)


def failed(*, unauthorized: bool = False, correlated: bool = False, forced: bool = False) -> ProbeFailed:
    return ProbeFailed(1, "the probe failed", unauthorized=unauthorized, correlated=correlated, forced=forced)


def answered() -> AttemptPassed:
    return AttemptPassed(1)


def broke(
    kind: FailureClass,
    client: str = "r",
    number: int | None = None,
    *,
    retry_after: float | None = None,
    counts: bool = True,
    after_request: bool = False,
) -> AttemptFailed:
    """Return a failure; without a number it is the client's only request."""
    failure = Failure(kind, "words", retry_after=retry_after, after_request=after_request)
    return AttemptFailed(1, client, number if number is not None else int.from_bytes(client.encode()), failure, CHAT, counts)


def strikers(health: Health) -> str:
    """Return the clients of the row of strikes."""
    return "".join(client for client, _ in health.blame.strikes)


def well(**changes: Any) -> Health:
    return attrs.evolve(fresh(1, now=0.0, wall=WALL), **{"answered": (CHAT,), **changes})


def struck_out(now: float = 100.0) -> Health:
    """Return a server that three requests found ill."""
    return after(well(), *(broke(FailureClass.SERVER_ERROR, request) for request in "abc"), now=now)


def half_open(now: float = 100.0) -> Health:
    """Return a server that refused a connection and then passed a probe."""
    return after(after(well(), broke(FailureClass.CONNECT), now=now - 1), passed(), now=now)


def deactivated(now: float = 100.0) -> Health:
    return after(well(), failed(), failed(), failed(), now=now)


# The words of the API


@pytest.mark.parametrize(
    ("state", "status", "active"),
    [
        (HealthState.PROBING, "unknown", True),
        (HealthState.HEALTHY, "healthy", True),
        (HealthState.SUSPECT, "healthy", True),
        (HealthState.HALF_OPEN, "healthy", True),
        (HealthState.UNHEALTHY, "unhealthy", True),
        (HealthState.MISCONFIGURED, "unhealthy", True),
        (HealthState.DEACTIVATED, "unhealthy", False),
        (HealthState.ARCHIVED, "unhealthy", False),
    ],
)
def test_each_state_has_a_status(state: HealthState, status: str, active: bool) -> None:
    """People see three words and whether the server still counts; the stored value is the state's name."""
    health = Health(state=state)
    assert (health.status, health.is_active, state.value) == (status, active, state.name.lower())


# Generations


@ANY_STATE
@pytest.mark.parametrize("generation", [1, 3])
def test_events_of_another_generation_are_dropped(state: HealthState, generation: int) -> None:
    """What happened to the old address or key says nothing about the new one."""
    health = Health(state=state, generation=2, next_probe=NextProbe(at=1e9), by_traffic=True)
    events: list[HealthEvent] = [
        ProbePassed(generation, forced=True),
        ProbeFailed(generation, "no"),
        AttemptPassed(generation),
        ProbeTimedOut(generation, "no", forced=True),
        Refused(generation, "no", CHAT),
        *(AttemptFailed(generation, "r", 1, Failure(kind, "no"), CHAT) for kind in FailureClass),
    ]
    for event in events:
        assert after(health, event) is health


# Requests


def test_success_on_a_clean_server_changes_nothing() -> None:
    """The path of every good request: the same object comes back."""
    health = well()
    assert after(health, answered()) is health


@pytest.mark.parametrize("kind", DEADLY)
def test_a_dead_connection_takes_a_server_out(kind: FailureClass) -> None:
    """F01, F02, F04: at once, with a confirming probe after a second."""
    health = after(well(), broke(kind))
    assert health.state is HealthState.UNHEALTHY
    assert health.by_traffic
    assert health.next_probe.at == 101.0
    assert health.consecutive_failures == 0
    assert health.reason == "requests failed: words"
    assert health.last_transition_at == WALL + 100.0


@pytest.mark.parametrize("kind", STRIKES)
def test_three_strikes_take_a_server_out(kind: FailureClass) -> None:
    """F03, F06, F19: one bad answer, or two, leave a server in rotation; the third in a row does not."""
    health = well()
    for request in "ab":
        health = after(health, broke(kind, request))
        assert health.state is HealthState.HEALTHY
        assert is_usable(health, CHAT, 100.0)
    health = after(health, broke(kind, "c"))
    assert health.state is HealthState.UNHEALTHY
    assert (health.by_traffic, health.next_probe.at, strikers(health)) == (True, 101.0, "abc")


def test_a_success_between_strikes_forgives() -> None:
    """Only failures in a row count."""
    health = after(well(), broke(FailureClass.TIMEOUT, "a"), broke(FailureClass.TIMEOUT, "b"), answered())
    assert (health.blame.strikes, health.blame.struck_at) == ((), -inf)
    assert after(health, broke(FailureClass.TIMEOUT, "d"), broke(FailureClass.TIMEOUT, "e")).state is HealthState.HEALTHY


@pytest.mark.parametrize("needed", [1, 2, 3, 5])
def test_one_request_alone_takes_no_server_out(needed: int) -> None:
    """A poison prompt strikes each server once, whatever the number of strikes is set to."""
    policy = HealthPolicy(strikes=needed)
    health = after(well(), broke(FailureClass.SERVER_ERROR, "poison"), policy=policy)
    assert after(health, *[broke(FailureClass.NONSENSE, "poison")] * 10, policy=policy) is health
    assert (health.state, health.blame.doubted_until) == (HealthState.HEALTHY, 0.0)
    more = [broke(FailureClass.SERVER_ERROR, f"other-{number}") for number in range(max(2, needed) - 1)]
    assert after(health, *more, policy=policy).state is HealthState.UNHEALTHY


@ANY_STATE
@pytest.mark.parametrize("kind", [FailureClass.TRANSIENT, FailureClass.LOCAL])
def test_some_failures_blame_nobody(state: HealthState, kind: FailureClass) -> None:
    """D01, classes I and L: the client left, or the server was too early: no effect."""
    health = Health(state=state)
    assert after(health, broke(kind)) is health


def test_a_client_error_is_proof_of_life() -> None:
    """F08, outside case 11: a hundred bad requests leave a server healthy, lift a half-open one, and end the row of strikes."""
    health = well()
    assert after(health, *(broke(FailureClass.CLIENT_ERROR, str(number)) for number in range(100))) is health
    invalid = [broke(FailureClass.CLIENT_ERROR, "z", number) for number in range(5)]
    fails = [broke(FailureClass.SERVER_ERROR, client) for client in "abc"]
    health = after(well(), fails[0], *invalid, fails[1], *invalid, fails[2])
    assert (health.state, strikers(health)) == (HealthState.HEALTHY, "c")


def test_leaving_half_open_clears_the_row() -> None:
    """Outside case 11: half-open, one client error, one failure: the strikes from before do not count any more."""
    half = after(struck_out(now=10.0), passed(), now=20.0)
    lifted = after(half, broke(FailureClass.CLIENT_ERROR), now=20.0)
    assert (lifted.state, lifted.slow_since, lifted.blame.strikes) == (HealthState.HEALTHY, 20.0, ())
    assert after(lifted, broke(FailureClass.SERVER_ERROR), now=20.0).state is HealthState.HEALTHY


# One client alone


def by(client: str, count: int, *, since: int = 0, kind: FailureClass = FailureClass.SERVER_ERROR) -> list[AttemptFailed]:
    """Return failures of different requests of one client."""
    return [broke(kind, client, since + number) for number in range(count)]


@pytest.mark.parametrize("kind", STRIKES)
def test_one_client_only_makes_a_server_doubted(kind: FailureClass) -> None:
    """S12: three strikes of one client: the server is chosen last for 30 s; it stays healthy, and a failure of anybody else decides."""
    health = after(well(), *by("a", 2, kind=kind))
    assert not is_last(health, 100.0)
    health = after(health, *by("a", 50, since=2, kind=kind))
    assert (health.state, health.blame.doubted_until) == (HealthState.HEALTHY, 130.0)
    assert is_usable(health, CHAT, 100.0)
    assert is_last(health, 129.9)
    assert not is_last(health, 130.0)
    assert after(health, passed(), now=129.0).blame.doubted_until == 130.0, "a probe does not end it"
    out = after(health, broke(kind, "b"))
    assert (out.state, out.by_traffic, out.blame.doubted_until) == (HealthState.UNHEALTHY, True, 0.0)


def test_doubt_doubles_up_to_five_minutes() -> None:
    """Each time in a row it lasts longer, until an answer arrives."""
    health, now, lasted = well(), 100.0, []
    for turn in range(6):
        health = after(health, *by("a", 3, since=10 * turn), now=now)
        lasted.append(health.blame.doubted_until - now)
        now = health.blame.doubted_until + 60.0
        health = after(health, passed(), now=now)
        assert health.blame.strikes == ()
    assert lasted == [30.0, 60.0, 120.0, 240.0, 300.0, 300.0]
    health = after(health, answered(), now=now)
    assert (health.blame.doubted_until, health.blame.doubts) == (0.0, 0)
    assert after(health, *by("a", 3, since=90), now=now).blame.doubted_until == now + 30.0


@pytest.mark.parametrize("answer", [answered(), broke(FailureClass.CLIENT_ERROR)])
def test_an_answer_ends_doubt(answer: HealthEvent) -> None:
    """What answers is alive, and the next failure begins a new row."""
    health = after(well(), *by("a", 3), answer)
    assert health == well()
    assert not is_last(health, 100.0)


def test_half_open_one_client_closes_a_server_once() -> None:
    """A failure of a half-open server closes it again, but the same client's next one only makes it doubted; another client's closes it."""
    health = after(half_open(), *by("a", 1))
    assert health.state is HealthState.UNHEALTHY
    health = after(after(health, passed()), *by("a", 1, since=1))
    assert (health.state, health.blame.doubted_until) == (HealthState.HALF_OPEN, 130.0)
    assert after(health, broke(FailureClass.TIMEOUT, "b")).state is HealthState.UNHEALTHY
    assert after(health, passed(), now=129.0).state is HealthState.HALF_OPEN
    assert after(health, passed(), now=130.0).state is HealthState.HEALTHY
    assert after(health, answered()).state is HealthState.HEALTHY


# Broken off after a request was read


def test_a_request_that_was_broken_off_makes_a_server_suspect() -> None:
    """S5, class B: the request may have killed it: it is probed at once and chosen last until then."""
    health = after(well(), broke(FailureClass.BROKEN, "a", after_request=True))
    assert (health.state, health.next_probe.at, health.by_traffic) == (HealthState.SUSPECT, 100.0, True)
    assert is_usable(health, CHAT, 100.0)
    assert is_last(health, 1e9)
    assert after(health, failed()).state is HealthState.UNHEALTHY
    assert after(health, answered()) == well(last_transition_at=WALL + 100.0, next_probe=NextProbe(at=100.0))
    again = after(health, broke(FailureClass.BROKEN, "a", 2, after_request=True))
    assert again.state is HealthState.SUSPECT
    assert after(health, broke(FailureClass.CONNECT, "a")).state is HealthState.UNHEALTHY
    assert after(health, broke(FailureClass.BROKEN, "a")).state is HealthState.UNHEALTHY, "it hung up without any request"


def test_a_second_client_whose_request_is_broken_off_takes_a_server_out() -> None:
    """Before the probe or after it: a good probe does not erase what requests met within 30 s."""
    health = after(well(), broke(FailureClass.BROKEN, "a", after_request=True))
    second = broke(FailureClass.BROKEN, "b", after_request=True)
    assert after(health, second).state is HealthState.UNHEALTHY
    cleared = after(health, passed(), now=101.0)
    assert (cleared.state, cleared.reason, cleared.by_traffic) == (HealthState.HEALTHY, None, False)
    assert after(cleared, second, now=102.0).state is HealthState.UNHEALTHY
    assert after(after(health, passed(), now=131.0), second, now=132.0).state is HealthState.SUSPECT
    assert after(cleared, answered(), second, now=102.0).state is HealthState.SUSPECT


def test_requests_of_one_client_that_are_broken_off_count_as_strikes() -> None:
    """After the third the server is doubted, too."""
    health = well()
    for number in range(3):
        health = after(health, broke(FailureClass.BROKEN, "a", number, after_request=True), passed())
    assert (health.state, health.blame.doubted_until) == (HealthState.HEALTHY, 130.0)


@pytest.mark.parametrize("kind", BLAMED)
@pytest.mark.parametrize("make", [well, half_open, struck_out])
def test_what_does_not_count_blames_nobody(kind: FailureClass, make: Callable[[], Health]) -> None:
    """A failure that is reported without counting changes no state."""
    health = make()
    assert after(health, broke(kind, counts=False)) is health


@pytest.mark.parametrize("state", [HealthState.PROBING, HealthState.MISCONFIGURED, HealthState.DEACTIVATED, HealthState.ARCHIVED])
@pytest.mark.parametrize("kind", BLAMED)
def test_late_failures_do_not_move_a_server_that_is_out(state: HealthState, kind: FailureClass) -> None:
    """Requests that began before the server was taken out end after it."""
    health = Health(state=state)
    assert after(health, broke(kind)) is health
    assert after(health, answered()) is health


@pytest.mark.parametrize("kind", BLAMED)
def test_failures_while_out_are_remembered(kind: FailureClass) -> None:
    """H11: who failed as the last resort was the most recent to fail; the probe is not put off."""
    health = struck_out(now=100.0)
    later = after(health, broke(kind, "z"), now=120.0)
    assert (later.state, later.by_traffic, later.blame.struck_at) == (HealthState.UNHEALTHY, True, 120.0)
    assert later.next_probe.at == health.next_probe.at


def test_a_success_as_the_last_resort_asks_for_a_probe() -> None:
    """H11: a server that works again is looked at immediately; only a probe lets it in."""
    health = after(well(), broke(FailureClass.CONNECT), now=100.0)
    hurried = after(health, answered(), now=100.5)
    assert (hurried.state, hurried.next_probe.at) == (HealthState.UNHEALTHY, 100.5)
    assert after(hurried, answered(), now=100.5) is hurried
    known_dead = after(well(), failed())
    assert after(known_dead, answered()) is known_dead


# Busy, missing, unsupported, refused


def test_a_busy_server_rests() -> None:
    """F10, F13: it is healthy, and back after what it asked for."""
    health = after(well(), broke(FailureClass.BUSY, retry_after=3.0))
    assert (health.state, health.rest.until, health.blame.strikes) == (HealthState.HEALTHY, 103.0, ())
    assert not is_usable(health, CHAT, 102.9)
    assert is_usable(health, CHAT, 103.0)


def test_resting_keeps_the_later_deadline() -> None:
    """F11: thirty seconds, then one second: thirty."""
    health = after(well(), broke(FailureClass.BUSY, retry_after=30.0))
    assert after(health, broke(FailureClass.BUSY, retry_after=1.0)) is health
    assert after(health, broke(FailureClass.BUSY, retry_after=31.0)).rest.until == 131.0


def test_a_pause_for_one_client_is_for_all_once_another_is_refused() -> None:
    """S4: one client's requests may be all that the server refuses, and its pause ends before the next one begins."""
    one = broke(FailureClass.BUSY, retry_after=3.0)
    other = attrs.evolve(one, client="another")
    health = after(well(), one, one)
    assert health.rest.client == one.client
    assert after(health, other).rest.client is None
    assert after(health, attrs.evolve(other, failure=Failure(FailureClass.BUSY, "busy", retry_after=30.0)), one).rest.client is None
    assert after(after(health, other), other, now=103.0).rest.client == "another"


@pytest.mark.parametrize(
    ("retry_after", "random", "rest"), [(None, 0.0, 0.8), (None, 0.5, 1.0), (0.0, 0.5, 1.0), (1e9, 0.5, 60.0), (inf, 0.5, 60.0)]
)
def test_rest_has_a_default_and_a_cap(retry_after: float | None, random: float, rest: float) -> None:
    """F12: nothing said means 1 s ± 20 %, too much means 60 s."""
    assert after(well(), broke(FailureClass.BUSY, retry_after=retry_after), random=random).rest.until == pytest.approx(100.0 + rest)


def test_a_rest_without_an_end_grows_until_the_server_answers() -> None:
    """Outside case 45: 1, 2, 4, 8, 10 s in a row; refusals during one rest count once, and an answer starts over."""
    health, now, rests = well(), 100.0, []
    for _ in range(6):
        health = after(health, *[broke(FailureClass.BUSY)] * 3, now=now)
        rests.append(health.rest.until - now)
        now = health.rest.until
    assert rests == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    health = after(health, broke(FailureClass.BUSY, retry_after=3.0), now=now)
    assert health.rest.until == now + 3.0
    health = after(health, answered(), broke(FailureClass.BUSY), now=now + 3.0)
    assert health.rest.until == now + 4.0


def test_a_missing_model_rests_its_pair() -> None:
    """F14, H10: others are chosen first for a minute and the list of models is read again at once; the server stays healthy."""
    health = after(well(next_probe=NextProbe(at=150.0)), broke(FailureClass.NO_MODEL))
    assert (health.state, health.blame.lacking_until, health.next_probe.at) == (HealthState.HEALTHY, 160.0, 100.0)
    assert is_usable(health, CHAT, 100.0)
    assert is_last(health, 159.9)
    assert after(health, passed()).blame.lacking_until == 160.0
    assert after(health, answered()).blame.lacking_until == 0.0
    assert after(health, broke(FailureClass.NO_MODEL), now=120.0).blame.lacking_until == 180.0
    due = after(well(next_probe=NextProbe(at=90.0)), broke(FailureClass.NO_MODEL))
    assert due.next_probe.at == 90.0
    assert after(Health(state=HealthState.ARCHIVED, next_probe=NextProbe(at=inf)), broke(FailureClass.NO_MODEL)).next_probe.at == inf


def test_an_unsupported_endpoint_is_remembered() -> None:
    """Class G: ten minutes long, for this path only."""
    health = after(well(), broke(FailureClass.UNSUPPORTED))
    assert health.state is HealthState.HEALTHY
    assert not is_usable(health, CHAT, 699.9)
    assert not supports(health, CHAT, 699.9)
    assert is_usable(health, CHAT, 700.0)
    assert is_usable(health, "/v1/embeddings", 100.0)
    again = after(health, broke(FailureClass.UNSUPPORTED), now=200.0)
    assert again.unsupported == ((CHAT, 800.0),)
    page = AttemptFailed(1, "r", 1, Failure(FailureClass.UNSUPPORTED, "no", 404), CHAT)
    found = after(well(next_probe=NextProbe(at=150.0)), page)
    assert found.next_probe.at == 100.0, "it may be the page of a tunnel that is offline"
    assert after(attrs.evolve(found, next_probe=NextProbe(at=150.0)), page).next_probe.at == 150.0
    assert after(well(next_probe=NextProbe(at=150.0)), broke(FailureClass.UNSUPPORTED)).next_probe.at == 150.0
    other = AttemptFailed(1, "r", 1, Failure(FailureClass.UNSUPPORTED, "no"), "/v1/rerank")
    assert len(after(again, other, now=200.0).unsupported) == 2
    assert len(after(again, other, now=900.0).unsupported) == 1


@pytest.mark.parametrize("event", [broke(FailureClass.CONNECT), failed()])
def test_what_a_server_does_not_know_is_forgotten_when_it_goes_down(event: HealthEvent) -> None:
    """Outside case 16: it may come back as another one."""
    health = after(well(), broke(FailureClass.UNSUPPORTED), event)
    assert supports(health, CHAT, 100.0)


def test_an_answer_shows_that_a_call_is_known() -> None:
    """A page that says otherwise is its tunnel's from then on."""
    health = after(well(answered=()), broke(FailureClass.UNSUPPORTED), AttemptPassed(1, CHAT))
    assert supports(health, CHAT, 100.0)
    assert has_answered(health, CHAT)
    assert not has_answered(health, "/v1/embeddings")
    assert is_settled(health, CHAT)
    assert not is_settled(health, "/v1/embeddings")
    rejected = AttemptFailed(1, "r", 1, Failure(FailureClass.CLIENT_ERROR, "no"), "/v1/embeddings")
    assert has_answered(after(health, rejected), "/v1/embeddings")
    assert is_settled(after(health, rejected), "/v1/embeddings")


def test_what_is_remembered_is_bounded() -> None:
    """A client that tries a thousand paths does not fill the memory, and costs nothing after a few."""
    health = well()
    for number in range(1000):
        health = after(health, AttemptPassed(1, f"/v1/{number}"))
    assert len(health.answered) == 32
    assert is_settled(health, "/v1/9999")
    for number in range(1000):
        health = after(health, AttemptFailed(1, "r", 1, Failure(FailureClass.UNSUPPORTED, "no"), f"/v1/{number}"))
    assert len(health.unsupported) == 32
    assert not supports(health, "/v1/999", 100.0)


def refused(path: str = CHAT) -> Refused:
    return Refused(1, "words", path)


def let_in(*, forced: bool = False) -> ProbePassed:
    return ProbePassed(1, forced=forced, let_in=True)


@ANY_STATE
def test_a_refused_prompt_changes_nothing(state: HealthState) -> None:
    """Outside case 38: a firewall may refuse the words of one request; only a request of the gateway's own counts."""
    health = Health(state=state)
    assert after(health, broke(FailureClass.AUTH)) is health


@pytest.mark.parametrize("make", [well, half_open, struck_out])
def test_a_refused_key_needs_its_owner(make: Callable[[], Health]) -> None:
    """F17: misconfigured, with a reason; looked at again at the usual pace, until the server lets a request in."""
    health = after(make(), refused())
    assert (health.state, health.reason, health.by_traffic) == (HealthState.MISCONFIGURED, "words", False)
    assert health.next_probe.at == pytest.approx(100.0 + 50.0 * 0.95)
    assert health.next_probe.step == 0
    assert is_refused(health) == CHAT
    assert not is_usable(health, CHAT, 100.0)
    mended = after(health, let_in())
    assert mended.state is HealthState.HALF_OPEN
    assert after(mended, answered()).state is HealthState.HEALTHY


@pytest.mark.parametrize("forced", [False, True])
def test_an_open_list_of_models_does_not_end_a_refusal(forced: bool) -> None:
    """Outside case 15: the list needs no key and chat does: passed probes prove nothing, not even after the server was down."""
    health = after(well(), refused("/v1/embeddings"), *[passed(forced=forced)] * 5)
    assert (health.state, is_refused(health)) == (HealthState.MISCONFIGURED, "/v1/embeddings")
    assert health.reason == "words (POST /v1/embeddings)"
    assert health.next_probe.at == pytest.approx(100.0 + 50.0 * 0.95)
    down = after(health, failed())
    assert (down.state, down.reason, is_refused(down)) == (HealthState.UNHEALTHY, "the probe failed", "/v1/embeddings")
    back = after(down, passed(forced=forced))
    assert (back.state, is_refused(back)) == (HealthState.MISCONFIGURED, "/v1/embeddings")
    assert "accepted one" in (back.reason or "")
    assert after(down, let_in()).state is HealthState.HALF_OPEN
    off = after(health, failed(), failed(), failed())
    assert off.state is HealthState.DEACTIVATED
    assert after(off, passed()).state is HealthState.DEACTIVATED
    assert after(off, passed(), passed()).state is HealthState.MISCONFIGURED
    assert after(off, let_in(), let_in()).state is HealthState.HEALTHY


def test_a_refusal_that_another_process_found_is_confirmed_in_the_same_way() -> None:
    """By the call that the reason is about, or else by chat; a server that another process found healthy is refused no more."""
    stored = Health(state=HealthState.MISCONFIGURED, reason="in any words", reason_path="/v1/rerank")
    assert is_refused(followed(well(), stored, POLICY, now=100.0, wall=WALL)) == "/v1/rerank"
    again = after(resume(stored, POLICY, now=100.0, wall=WALL), failed(unauthorized=True))
    assert (is_refused(again), again.reason) == ("/v1/rerank", "the probe failed (POST /v1/rerank)")
    assert is_refused(after(again, failed())) == "/v1/rerank"
    known = followed(well(), Health(state=HealthState.MISCONFIGURED), POLICY, now=100.0, wall=WALL)
    assert is_refused(known) == CHAT
    assert after(known, passed()).state is HealthState.MISCONFIGURED
    assert after(known, failed(), passed()).state is HealthState.MISCONFIGURED
    here = after(well(), refused("/v1/embeddings"))
    assert is_refused(followed(here, Health(state=HealthState.MISCONFIGURED), POLICY, now=100.0, wall=WALL)) == "/v1/embeddings"
    assert is_refused(followed(here, Health(state=HealthState.HEALTHY), POLICY, now=100.0, wall=WALL)) is None


@pytest.mark.parametrize("state", [HealthState.DEACTIVATED, HealthState.ARCHIVED])
def test_a_refused_key_does_not_bring_a_server_back(state: HealthState) -> None:
    """A late 401 does not make an inactive server active."""
    assert after(Health(state=state), refused()).state is state


def test_an_unauthorized_probe_is_a_wrong_key() -> None:
    """F17: as often as it happens, the server stays on the list for its owner to see."""
    health = after(well(), failed(unauthorized=True))
    assert (health.state, health.consecutive_failures, health.by_traffic) == (HealthState.MISCONFIGURED, 1, False)
    assert after(health, *[failed(unauthorized=True)] * 10).state is HealthState.MISCONFIGURED
    assert after(struck_out(), failed(unauthorized=True)).state is HealthState.MISCONFIGURED
    assert after(health, failed()).state is HealthState.UNHEALTHY
    assert after(deactivated(), failed(unauthorized=True)).state is HealthState.DEACTIVATED


# Busy is not dead


def slow(*, is_busy: bool = False, allowed_until: float | None = None, number: int = 1, forced: bool = False) -> ProbeTimedOut:
    running = None if allowed_until is None else Running((number, 1), allowed_until)
    return ProbeTimedOut(1, "no answer in time", is_busy, running, forced=forced)


@ANY_STATE
def test_bytes_that_arrive_are_proof_of_life(state: HealthState) -> None:
    """Outside case 9: a probe's timeout is then neither passed nor failed, however often."""
    health = Health(state=state, consecutive_failures=2, next_probe=NextProbe(excused=Running((1, 1), 110.0)), last_checked_at=WALL)
    later = after(health, *[slow(is_busy=True, forced=True)] * 5)
    assert later.state is (HealthState.HEALTHY if state is HealthState.SUSPECT else state)
    assert (later.consecutive_failures, later.last_checked_at, later.next_probe.excused) == (2, WALL, None)
    assert later.next_probe.at > 100.0


def test_a_running_request_excuses_timeouts_until_its_time_is_over() -> None:
    """The server is suspect meanwhile: chosen last; afterward the timeout counts as failed."""
    health = after(well(), slow(allowed_until=200.0))
    assert (health.state, health.consecutive_failures) == (HealthState.SUSPECT, 0)
    assert health.reason == "no answer in time"
    assert 101.0 <= health.next_probe.at <= 200.0
    assert is_last(health, 100.0)
    health = after(health, slow(allowed_until=300.0, number=2), now=150.0)
    assert (health.state, health.next_probe.at) == (HealthState.SUSPECT, 197.5)
    assert after(health, slow(allowed_until=300.0, number=2), now=199.0).next_probe.at == 200.0
    extended = after(health, slow(allowed_until=300.0), now=199.0)
    assert after(extended, slow(allowed_until=300.0), now=299.0).state is HealthState.SUSPECT, "its time was extended"
    failing = after(health, slow(allowed_until=300.0, number=2), now=200.0)
    assert (failing.state, failing.consecutive_failures, failing.by_traffic) == (HealthState.UNHEALTHY, 1, False)
    assert after(health, slow(), now=151.0).state is HealthState.UNHEALTHY, "nothing runs on it any more"
    assert after(health, failed(), now=151.0).state is HealthState.UNHEALTHY, "refused is refused"
    assert after(health, passed(), now=151.0).state is HealthState.HEALTHY
    answering = after(health, answered(), slow(allowed_until=300.0, number=2), now=199.0)
    assert after(answering, slow(allowed_until=300.0, number=2), now=299.0).state is HealthState.SUSPECT, "an answer begins a new time"


@pytest.mark.parametrize("state", [HealthState.PROBING, HealthState.HALF_OPEN, HealthState.UNHEALTHY, HealthState.DEACTIVATED])
def test_a_running_request_excuses_in_every_state(state: HealthState) -> None:
    """No state changes, and nothing is counted."""
    health = after(Health(state=state), slow(allowed_until=200.0))
    assert (health.state, health.consecutive_failures) == (state, 0)
    assert after(health, slow(allowed_until=200.0), now=200.0).consecutive_failures == 1


# Probes


def test_a_good_probe_keeps_a_server_well() -> None:
    """TC-HEALTH-001: it notes when, what was listed and what was odd, and nothing else."""
    health = after(well(), ProbePassed(1, warning="the model is not listed", models=("x", "y")))
    assert health == well(
        consecutive_successes=2,
        last_checked_at=WALL + 100.0,
        last_passed_at=WALL + 100.0,
        warning="the model is not listed",
        models=("x", "y"),
        next_probe=NextProbe(at=health.next_probe.at),
    )
    assert after(health, passed()).warning is None


@pytest.mark.parametrize(
    ("interval", "timeout", "random", "wait"),
    [(60, 10, 0.0, 50.0), (60, 10, 0.5, 47.5), (60, 10, 0.999999, 45.0), (10, 10, 0.0, 5.0), (1, 10, 0.5, 0.5), (300, 10, 0.0, 290.0)],
)
def test_a_verdict_never_grows_older_than_the_interval(interval: float, timeout: float, random: float, wait: float) -> None:
    """H03, H08: the next probe begins a timeout before the interval is over, up to a tenth sooner, never before its half."""
    policy = HealthPolicy(interval=interval, timeout=timeout)
    health = after(well(), passed(), policy=policy, random=random)
    assert health.next_probe.at - 100.0 == pytest.approx(wait, abs=1e-4)


def test_a_failed_probe_takes_a_server_out() -> None:
    """TC-HEALTH-002: at once; the next probe comes after a second ± 20 %."""
    health = after(well(), failed())
    assert (health.state, health.consecutive_failures, health.consecutive_successes) == (HealthState.UNHEALTHY, 1, 0)
    assert (health.by_traffic, health.reason, health.next_probe.at) == (False, "the probe failed", 101.0)
    assert (health.last_checked_at, health.last_passed_at) == (WALL + 100.0, WALL)
    assert after(Health(), failed()).state is HealthState.UNHEALTHY


def test_a_failed_probe_ends_the_last_resort() -> None:
    """H11: who failed a probe is not tried."""
    assert struck_out().by_traffic
    assert not after(struck_out(), failed()).by_traffic


@pytest.mark.parametrize("random", [0.0, 0.5, 0.999999])
def test_probes_of_the_ill_come_ever_later(random: float) -> None:
    """1, 2, 4 … 60 s, each ± 20 %."""
    policy = HealthPolicy(auto_deregister=AutoDeregister.OFF)
    health, waits = well(), []
    for _ in range(40):
        health = after(health, failed(), policy=policy, random=random)
        waits.append((health.next_probe.at - 100.0) / (0.8 + 0.4 * random))
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32] + [60] * 34)
    assert health.state is HealthState.UNHEALTHY
    assert health.consecutive_failures == 40


@pytest.mark.parametrize("how", list(AutoDeregister))
@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("forced", [False, True])
def test_failed_probes_in_a_row_take_a_server_off(how: AutoDeregister, most: int, forced: bool) -> None:
    """H01, TC-HEALTH-003, TC-HEALTH-004: counted, forced ones too; the last deactivates unless that is switched off."""
    policy = HealthPolicy(max_consecutive_failures=most, auto_deregister=how)
    health = after(well(), *[failed(forced=forced)] * (most - 1), policy=policy)
    assert health.is_active
    assert health.consecutive_failures == most - 1
    health = after(health, failed(forced=forced), policy=policy)
    assert health.is_active is (how is AutoDeregister.OFF)
    assert health.consecutive_failures == most


def test_only_failures_in_a_row_count() -> None:
    """A good probe in between restarts the count."""
    health = after(well(), failed(), failed(), passed(), failed(), failed())
    assert (health.state, health.consecutive_failures) == (HealthState.UNHEALTHY, 2)


def test_a_deactivated_server_is_still_probed() -> None:
    """H01: after 1, 2, 4, 8, 15 minutes, and then every 15."""
    health = deactivated()
    waits = [health.next_probe.at - 100.0]
    for _ in range(6):
        health = after(health, failed())
        waits.append(health.next_probe.at - 100.0)
    assert waits == pytest.approx([60, 120, 240, 480, 900, 900, 900])
    assert health.state is HealthState.DEACTIVATED


def test_two_good_probes_bring_a_deactivated_server_back() -> None:
    """H01, H12: the second comes after a second; it starts slowly."""
    health = after(deactivated(), passed())
    assert (health.state, health.next_probe.at) == (HealthState.DEACTIVATED, 101.0)
    health = after(health, passed(), now=101.0)
    assert (health.state, health.slow_since, health.reason, health.next_probe.step) == (HealthState.HEALTHY, 101.0, None, 0)
    assert after(deactivated(), passed(), failed(), passed()).state is HealthState.DEACTIVATED


def test_looking_often_does_not_put_the_next_probe_off() -> None:
    """Somebody who presses "check now" while the server is down does not slow its return."""
    down = after(well(), failed())
    assert after(down, failed(forced=True), now=100.5).next_probe.at == down.next_probe.at
    off = deactivated()
    assert after(off, *[failed(forced=True)] * 5, now=110.0).next_probe.at == off.next_probe.at
    assert after(well(next_probe=NextProbe(at=150.0)), failed(forced=True)).next_probe.at == 101.0


def test_our_own_network_deactivates_nobody() -> None:
    """H07: while all fail together nobody is counted toward deactivation, and each is looked at again within five seconds."""
    health = well()
    for _ in range(50):
        health = after(health, failed(correlated=True), random=0.999999)
        assert health.state is HealthState.UNHEALTHY
        assert health.next_probe.at - 100.0 < 5.0
    assert health.consecutive_failures == 0
    long_down = after(well(), *[failed()] * 5, policy=HealthPolicy(max_consecutive_failures=9))
    assert after(long_down, failed(correlated=True)).next_probe.at - 100.0 < 5.0
    assert after(well(), failed(), failed(), failed(correlated=True)).state is HealthState.UNHEALTHY
    assert after(deactivated(), failed(correlated=True)).consecutive_failures == 3


# Half open


def test_the_first_good_probe_opens_half() -> None:
    """One request decides, or the next probe, a second later."""
    health = half_open()
    assert (health.state, health.next_probe.at) == (HealthState.HALF_OPEN, 101.0)
    assert is_usable(health, CHAT, 100.0)
    assert after(after(well(), failed()), passed()).state is HealthState.HALF_OPEN


def test_a_good_request_opens_whole() -> None:
    """It starts slowly and everything held against it is forgotten."""
    health = after(after(struck_out(), passed()), answered())
    assert (health.state, health.slow_since, health.blame.strikes, health.blame.struck_at) == (HealthState.HEALTHY, 100.0, (), -inf)
    assert (health.reason, health.by_traffic, health.next_probe.step) == (None, False, 0)


def test_without_requests_another_good_probe_opens_whole() -> None:
    """Nobody needs to be the guinea pig when no request struck the server."""
    health = after(half_open(), passed(), now=101.0)
    assert (health.state, health.slow_since) == (HealthState.HEALTHY, 101.0)


@pytest.mark.parametrize("kind", BLAMED)
def test_a_failed_request_closes_again(kind: FailureClass) -> None:
    """Each failure goes one step further: 1 s, 2 s, 4 s …"""
    health = half_open()
    for number, wait in enumerate((2, 4, 8, 16, 32, 60, 60)):
        health = after(health, broke(kind, str(number)))
        assert (health.state, health.by_traffic) == (HealthState.UNHEALTHY, True)
        assert health.next_probe.at - 100.0 == pytest.approx(wait)
        health = after(health, passed())
        assert health.state is HealthState.HALF_OPEN


def test_a_failed_probe_closes_again() -> None:
    """A half-open server that fails a probe goes on where it was."""
    health = after(half_open(), failed())
    assert (health.state, health.next_probe.at) == (HealthState.UNHEALTHY, 102.0)


def test_probes_alone_do_not_clear_strikes() -> None:
    """H04: a server that lists its models but fails to answer is let in half, and whole only after 30 s without a strike."""
    health = struck_out(now=100.0)
    health = after(health, passed(), now=101.0)
    assert (health.state, health.next_probe.at) == (HealthState.HALF_OPEN, 130.0)
    for now in (102.0, 110.0, 129.9):
        health = after(health, passed(), now=now)
        assert health.state is HealthState.HALF_OPEN
        assert strikers(health) == "abc"
    health = after(health, passed(), now=130.0)
    assert (health.state, health.blame.strikes) == (HealthState.HEALTHY, ())


def test_a_good_probe_clears_old_strikes() -> None:
    """Two strikes of this morning do not count in the evening."""
    health = after(well(), broke(FailureClass.TIMEOUT, "a"), broke(FailureClass.TIMEOUT, "b"))
    assert strikers(after(health, passed(), now=129.9)) == "ab"
    assert after(health, passed(), now=130.0).blame.strikes == ()


@ANY_STATE
def test_a_forced_good_probe_lifts_any_state(state: HealthState) -> None:
    """FR-API-REG: "check now" makes a server healthy that is well; half only if requests struck it a moment ago."""
    health = after(Health(state=state, next_probe=NextProbe(at=inf), reason="down"), let_in(forced=True))
    assert (health.state, health.reason) == (HealthState.HEALTHY, None)
    assert health.next_probe.at < 200.0
    struck = after(Health(state=state, blame=Blame(strikes=(("a", 1),), struck_at=90.0)), let_in(forced=True))
    trusted = state in (HealthState.HEALTHY, HealthState.SUSPECT, HealthState.PROBING)
    assert struck.state is (HealthState.HEALTHY if trusted else HealthState.HALF_OPEN)


def test_a_refused_connection_is_no_strike() -> None:
    """After a restart of the server "check now" makes it whole at once."""
    health = after(well(), broke(FailureClass.CONNECT))
    assert after(health, passed(forced=True)).state is HealthState.HEALTHY


# Archive


def test_a_week_of_silence_archives() -> None:
    """Counted from the last good probe, or from when it was taken off; nothing probes it any more."""
    week = POLICY.archive_after
    health = deactivated()
    assert health.last_passed_at == WALL
    assert after(health, failed(), now=week - 1).state is HealthState.DEACTIVATED
    assert after(health, failed(correlated=True), now=week).state is HealthState.DEACTIVATED
    archived = after(health, failed(), now=week)
    assert (archived.state, archived.next_probe.at, archived.last_transition_at) == (HealthState.ARCHIVED, inf, WALL + week)
    assert after(archived, passed(), now=week) is archived
    assert after(archived, failed(), now=week) is archived
    assert after(archived, failed(forced=True), now=week).next_probe.at == inf
    never = after(Health(), failed(), failed(), failed())
    assert never.last_passed_at is None
    assert after(never, failed(), now=99.0 + week).state is HealthState.DEACTIVATED
    assert after(never, failed(), now=100.0 + week).state is HealthState.ARCHIVED
    unknown = Health(state=HealthState.DEACTIVATED)
    assert after(unknown, failed(), now=week).state is HealthState.DEACTIVATED


# Slow start


@pytest.mark.parametrize(("age", "expected"), [(-1.0, 0.25), (0.0, 0.25), (10.0, 0.5), (20.0, 0.75), (30.0, 1.0), (1e6, 1.0)])
def test_the_share_grows_during_the_slow_start(age: float, expected: float) -> None:
    """H12: from a quarter to all within 30 s."""
    assert traffic_share(well(slow_since=100.0), POLICY, 100.0 + age) == pytest.approx(expected)


def test_shares_outside_of_the_slow_start() -> None:
    """A server that is well has its whole share, a half-open one the least; a slow start of no length is none."""
    assert traffic_share(well(), POLICY, 100.0) == 1.0
    assert traffic_share(half_open(), POLICY, 100.0) == 0.25
    assert traffic_share(well(slow_since=100.0), HealthPolicy(slow_start=0.0), 100.0) == 1.0


def test_the_slow_start_ends() -> None:
    """The first success or probe after it makes the server clean; until then nothing changes."""
    health = well(slow_since=100.0)
    assert after(health, answered(), now=129.0) is health
    assert after(health, passed(), now=129.0).slow_since == 100.0
    assert after(health, answered(), now=130.0).slow_since is None
    assert after(health, passed(), now=130.0).slow_since is None
    struck = after(health, broke(FailureClass.TIMEOUT), answered(), now=110.0)
    assert (struck.slow_since, struck.blame.strikes) == (100.0, ())


# Beginnings


def test_a_new_server_is_healthy_at_once() -> None:
    """It was probed before it was accepted; with a policy its next probe comes at the usual pace."""
    health = fresh(7, now=100.0, wall=WALL)
    assert (health.state, health.generation, health.status) == (HealthState.HEALTHY, 7, "healthy")
    assert (health.last_checked_at, health.last_passed_at, health.last_transition_at) == (WALL, WALL, WALL)
    assert health.next_probe.at == 100.0
    assert traffic_share(health, POLICY, 100.0) == 1.0
    assert fresh(1, now=100.0, wall=WALL, policy=POLICY).next_probe.at == 150.0
    assert after(Health(), passed()).state is HealthState.HEALTHY


@pytest.mark.parametrize(
    ("state", "age", "resumed"),
    [
        ("healthy", 0.0, "healthy"),
        ("healthy", 60.0, "healthy"),
        ("healthy", 60.1, "half_open"),
        ("healthy", -3600.0, "half_open"),
        ("healthy", None, "half_open"),
        ("suspect", 1.0, "suspect"),
        ("suspect", 90.0, "half_open"),
        ("half_open", 0.0, "half_open"),
        ("unhealthy", 0.0, "unhealthy"),
        ("unhealthy", 1e6, "unhealthy"),
        ("probing", None, "probing"),
        ("misconfigured", 5.0, "misconfigured"),
        ("deactivated", 5.0, "deactivated"),
        ("archived", 5.0, "archived"),
    ],
)
def test_after_a_restart(state: str, age: float | None, resumed: str) -> None:
    """TC-HEALTH-005, H09: a young verdict stands, an old one must prove itself, and everything is probed soon."""
    stored = Health(
        state=HealthState(state),
        generation=4,
        consecutive_failures=2,
        by_traffic=True,
        last_checked_at=None if age is None else WALL - age,
        next_probe=NextProbe(at=1e9, step=9),
        rest=Rest(until=1e9),
        slow_since=1e9,
        blame=Blame(strikes=(("a", 1),), struck_at=1e9, suspected_by="a", doubted_until=1e9, doubts=4),
        unsupported=((CHAT, 1e9),),
    )
    health = resume(stored, POLICY, now=5.0, wall=WALL)
    assert health.state == resumed
    assert health.next_probe.at == (inf if state == "archived" else 5.0)
    assert (health.generation, health.consecutive_failures, health.by_traffic) == (4, 2, True)
    local = ("rest", "slow_since", "blame", "unsupported")
    assert [getattr(health, name) for name in local] == [getattr(Health(), name) for name in local]
    assert (health.next_probe.step, health.next_probe.excused) == (0, None)


# Everything at once

KINDS = st.sampled_from(list(FailureClass))
CLIENTS = st.sampled_from("xyz")
NUMBERS = st.integers(0, 9)
RUNNING = st.none() | st.builds(Running, st.tuples(st.integers(1, 3), st.just(1)), st.floats(0, 4000))
EVENTS: st.SearchStrategy[HealthEvent] = st.one_of(
    st.builds(ProbePassed, st.just(1), forced=st.booleans(), let_in=st.booleans()),
    st.builds(ProbeTimedOut, st.just(1), st.just("no"), st.booleans(), RUNNING, st.booleans(), st.booleans()),
    st.builds(Refused, st.just(1), st.just("no"), st.sampled_from([CHAT, "/v1/embeddings"])),
    st.builds(ProbeFailed, st.just(1), st.just("no"), unauthorized=st.booleans(), correlated=st.booleans(), forced=st.booleans()),
    st.builds(AttemptPassed, st.just(1), st.sampled_from(["", CHAT, "/v1/embeddings"])),
    st.builds(
        AttemptFailed,
        st.just(1),
        CLIENTS,
        NUMBERS,
        st.builds(Failure, KINDS, st.just("no"), retry_after=st.none() | st.floats(0, 1e9), after_request=st.booleans()),
        st.sampled_from([CHAT, "/v1/embeddings"]),
        st.booleans(),
    ),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 100), st.floats(0, 1, exclude_max=True)), max_size=30))
def test_any_history_heals(history: list[tuple[HealthEvent, float, float]]) -> None:
    """No server is stuck: after any history two good probes of a server that is not archived, each when due, make it usable."""
    health, now = fresh(1, now=0.0, wall=WALL), 0.0
    for event, seconds, random in history:
        now += seconds
        health = advance(health, event, POLICY, now=now, wall=WALL + now, random=random)
    if health.state is HealthState.ARCHIVED:
        return
    for _ in range(2):
        assert health.next_probe.at - now <= 900 * 1.2 + 1e-6
        now = max(now, health.next_probe.at)
        health = after(health, let_in(), now=now)
    assert health.status == "healthy"
    assert is_usable(health, "/v1/audio/speech", max(now, health.rest.until))
    assert health.rest.until - now <= 60.0 + 1e-6
    now = max(now, health.next_probe.at)
    assert after(health, passed(), now=now).state is HealthState.HEALTHY


class Servers(RuleBasedStateMachine):
    """One model on three servers, requests and probes in any order, time that passes, updates in between."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.load = Load()
        servers = [self.make(name, 1) for name in "abc"]
        self.table = build_table(1, servers, {server.id: fresh(1, now=0.0, wall=WALL) for server in servers})
        self.live: list[tuple[Server, str, int]] = []
        self.requests = 0
        self.struck: dict[ServerId, list[str]] = {server.id: [] for server in servers}

    @staticmethod
    def make(name: str, generation: int) -> Server:
        """Return a server, the first with a cap."""
        return Server(
            id=ServerId(name),
            model_name="llama",
            endpoint_url=f"http://{name}",
            max_concurrency=2 if name == "a" else None,
            generation=generation,
            registered_at=ord(name),
            created_at=0.0,
            updated_at=0.0,
        )

    def health(self, name: str) -> Health:
        return self.table.routes[ServerId(name)].health

    def report(self, server_id: ServerId, event: HealthEvent, random: float = 0.5) -> None:
        """Do what the gateway does, and hold each step to the rules."""
        before = self.table.routes[server_id].health
        health = advance(before, event, POLICY, now=self.now, wall=WALL + self.now, random=random)
        self.table = with_health(self.table, server_id, health)
        if event.generation != before.generation:
            assert health is before
            return
        assert health.generation == before.generation
        assert health.rest.until >= before.rest.until
        assert (health.last_transition_at != before.last_transition_at) <= (health.state is not before.state)
        if isinstance(event, AttemptPassed):
            self.struck[server_id].clear()
        elif isinstance(event, AttemptFailed):
            if event.failure.kind is FailureClass.CLIENT_ERROR:
                self.struck[server_id].clear()
            elif event.failure.kind in STRIKES:
                self.struck[server_id].append(event.client)
                if before.state is HealthState.HEALTHY and health.state is HealthState.UNHEALTHY:
                    assert len(self.struck[server_id]) >= 3
                    assert len(set(self.struck[server_id])) >= 2
        if before.state is HealthState.DEACTIVATED and health.state is HealthState.HEALTHY:
            assert isinstance(event, ProbePassed)
            assert event.forced or before.consecutive_successes >= 1

    @rule(seconds=st.floats(0, 120))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    @rule(data=st.data(), client=CLIENTS, again=st.booleans(), excluded=st.sets(st.sampled_from("abc"), max_size=2))
    def request(self, data: st.DataObject, client: str, again: bool, excluded: set[str]) -> None:
        """Start an attempt where routing allows it; some are further attempts of the same request."""
        found = candidates(
            self.table.models["llama"], self.load, stream=False, path=CHAT, excluded={ServerId(name) for name in excluded}, now=self.now
        )
        if found.ready:
            server = data.draw(st.sampled_from(found.ready))
            health = self.health(server.id)
            assert health.state in (HealthState.HEALTHY, HealthState.SUSPECT, HealthState.HALF_OPEN)
            assert health.rest.until <= self.now
            assert len({is_last(self.health(each.id), self.now) for each in found.ready}) == 1
            if health.state is HealthState.HALF_OPEN:
                assert self.load.in_flight(server.id) == 0
            if server.max_concurrency is not None:
                assert self.load.in_flight(server.id) < server.max_concurrency
        elif found.last_resort is not None:
            server = found.last_resort
            assert self.health(server.id).by_traffic
            assert not any(self.health(running.id).state is HealthState.UNHEALTHY for running, _, _ in self.live)
        else:
            return
        assert server.id not in excluded
        self.requests += not again
        self.load.started(server.id, "llama")
        self.live.append((server, client, self.requests))

    @precondition(lambda self: self.live)
    @rule(
        data=st.data(),
        kind=st.none() | KINDS,
        retry_after=st.none() | st.floats(0, 100),
        after_request=st.booleans(),
        random=st.floats(0, 1, exclude_max=True),
    )
    def finish(self, data: st.DataObject, kind: FailureClass | None, retry_after: float | None, after_request: bool, random: float) -> None:
        """End a live attempt, well or in any other way; it may be of an older generation by now."""
        server, client, number = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.load.finished(server.id, "llama", seconds=0.1, failed=kind is not None, first_byte_timeout=120.0)
        if kind is None:
            self.report(server.id, AttemptPassed(server.generation), random)
        else:
            failure = Failure(kind, "words", retry_after=retry_after, after_request=after_request)
            self.report(server.id, AttemptFailed(server.generation, client, number, failure, CHAT), random)

    @rule(
        name=st.sampled_from("abc"),
        passes=st.booleans(),
        forced=st.booleans(),
        unauthorized=st.booleans(),
        correlated=st.booleans(),
        let_in=st.booleans(),
        stale=st.booleans(),
        random=st.floats(0, 1, exclude_max=True),
    )
    def probe(
        self, name: str, passes: bool, forced: bool, unauthorized: bool, correlated: bool, let_in: bool, stale: bool, random: float
    ) -> None:
        """Report a probe; stale ones began before the last update."""
        generation = self.health(name).generation - stale
        if passes:
            self.report(ServerId(name), ProbePassed(generation, forced=forced, let_in=let_in), random)
        else:
            event = ProbeFailed(generation, "no", unauthorized=unauthorized, correlated=correlated, forced=forced)
            self.report(ServerId(name), event, random)

    @rule(
        name=st.sampled_from("abc"),
        is_busy=st.booleans(),
        number=st.none() | st.integers(1, 3),
        seconds=st.floats(0, 600),
        correlated=st.booleans(),
        random=st.floats(0, 1, exclude_max=True),
    )
    def time_out(self, name: str, is_busy: bool, number: int | None, seconds: float, correlated: bool, random: float) -> None:
        """Report a probe that got no answer in time."""
        before = self.health(name)
        running = None if number is None else Running((number, 1), self.now + seconds)
        self.report(ServerId(name), ProbeTimedOut(before.generation, "no", is_busy, running, correlated), random)
        if is_busy:
            assert self.health(name).consecutive_failures == before.consecutive_failures
            assert self.health(name).is_active == before.is_active

    @rule(name=st.sampled_from("abc"), path=st.sampled_from([CHAT, "/v1/embeddings"]))
    def refuse(self, name: str, path: str) -> None:
        """Report that the gateway's own request was refused."""
        self.report(ServerId(name), Refused(self.health(name).generation, "no", path))
        assert self.health(name).status != "healthy"

    @rule(name=st.sampled_from("abc"))
    def update(self, name: str) -> None:
        """Give the server a new address: a new generation, of which nothing is known."""
        server_id = ServerId(name)
        routes = self.table.routes
        server = self.make(name, routes[server_id].server.generation + 1)
        servers = [server if route.server.id == server_id else route.server for route in routes.values()]
        health = {other: route.health for other, route in routes.items()}
        self.table = build_table(self.table.version + 1, servers, health)
        self.struck[server_id].clear()
        assert self.health(name).state is HealthState.PROBING

    @rule(name=st.sampled_from("abc"))
    def restart(self, name: str) -> None:
        """Remember only what is stored."""
        self.table = with_health(self.table, ServerId(name), resume(self.health(name), POLICY, now=self.now, wall=WALL + self.now))
        self.struck[ServerId(name)].clear()

    @invariant()
    def slots_are_live_attempts(self) -> None:
        """The sum of slots is the number of live attempts."""
        assert self.load.total == len(self.live) == sum(self.load.in_flight(server_id) for server_id in self.table.routes)

    @invariant()
    def nobody_is_stuck(self) -> None:
        """Every server that is not archived has a next probe, and nothing lasts longer than it may."""
        for route in self.table.routes.values():
            health = route.health
            if health.state is HealthState.ARCHIVED:
                assert health.next_probe.at == inf
            else:
                assert health.next_probe.at - self.now <= 900 * 1.2 + 1e-6
            assert health.rest.until - self.now <= 60.0 + 1e-6
            assert len(health.blame.strikes) <= POLICY.strikes
            assert len(set(health.blame.strikes)) == len(health.blame.strikes)
            assert 0.25 <= traffic_share(health, POLICY, self.now) <= 1.0
            assert health.blame.doubted_until - self.now <= POLICY.longest_doubt + 1e-6
            if health.by_traffic:
                assert health.state in (HealthState.SUSPECT, HealthState.UNHEALTHY, HealthState.HALF_OPEN)

    @invariant()
    def the_two_sides_of_the_table_agree(self) -> None:
        """A server's health is the same by its id and by its model."""
        routes = self.table.models["llama"].routes
        assert [route.server.id for route in routes] == ["a", "b", "c"]
        assert all(self.table.routes[route.server.id] is route for route in routes)


TestServers = Servers.TestCase


_ITS_OWN = {FailureClass.CONNECT, FailureClass.BUSY}
FROM_A_REQUEST = [kind for kind in FailureClass if kind not in _ITS_OWN]
"""What the requests of a client can make a sound server answer; the others are what it says of itself, or not an answer at all."""


class OneClient(RuleBasedStateMachine):
    """A sound server: it passes every probe and answers everybody, but for one client, whose requests can end in any way."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.number = 100.0, 0
        self.health = well()

    def take(self, event: HealthEvent, random: float = 0.5) -> None:
        """Advance."""
        self.number += 1
        self.health = advance(self.health, event, POLICY, now=self.now, wall=WALL + self.now, random=random)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 29.9, 30.0, 61.0, 400.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    @rule(kind=st.sampled_from(FROM_A_REQUEST), counts=st.booleans(), path=st.sampled_from([CHAT, "/v1/embeddings"]), again=st.booleans())
    def attack(self, kind: FailureClass, counts: bool, path: str, again: bool) -> None:
        """Fail a request of the client, or another attempt of its last one."""
        number = self.number - again
        self.take(AttemptFailed(1, "attacker", number, Failure(kind, "no", after_request=True), path, counts))

    @rule()
    def satisfy(self) -> None:
        """Answer the client."""
        self.take(AttemptPassed(1))

    @rule(random=st.floats(0, 1, exclude_max=True), forced=st.booleans())
    def probe(self, random: float, forced: bool) -> None:
        """Pass a probe."""
        self.take(ProbePassed(1, forced=forced), random)

    @invariant()
    def others_are_served(self) -> None:
        """Whatever the client does, anybody else gets through to the server."""
        server = Servers.make("b", 1)
        table = build_table(1, [server], {server.id: self.health})
        for path in (CHAT, "/v1/embeddings"):
            found = candidates(table.models["llama"], Load(), stream=False, path=path, excluded=(), now=self.now)
            assert found.ready == (server,)
        assert self.health.status == "healthy"


TestOneClient = OneClient.TestCase


# What another process found


@pytest.mark.parametrize(
    ("state", "found", "age", "in_seconds"),
    [
        (HealthState.HEALTHY, HealthState.HEALTHY, 0.0, 50.0),
        (HealthState.HEALTHY, HealthState.HEALTHY, 30.0, 20.0),
        (HealthState.HEALTHY, HealthState.HEALTHY, 4000.0, 0.0),
        (HealthState.HEALTHY, HealthState.HEALTHY, -4000.0, 50.0),
        (HealthState.HEALTHY, HealthState.MISCONFIGURED, 30.0, 20.0),
        (HealthState.HEALTHY, HealthState.UNHEALTHY, 0.0, 0.0),
        (HealthState.UNHEALTHY, HealthState.UNHEALTHY, 0.0, 7.0),
        (HealthState.UNHEALTHY, HealthState.HALF_OPEN, 0.0, 0.0),
        (HealthState.UNHEALTHY, HealthState.DEACTIVATED, 45.0, 15.0),
        (HealthState.DEACTIVATED, HealthState.ARCHIVED, 0.0, inf),
    ],
)
def test_the_verdict_of_another_process_is_as_good_as_ones_own(
    state: HealthState, found: HealthState, age: float, in_seconds: float
) -> None:
    """Its next probe is planned from when it was found, whatever the clocks; what is ill wants one at once; local knowledge stays."""
    current = Health(state=state, next_probe=NextProbe(at=107.0), rest=Rest(until=120.0), blame=Blame(strikes=(("a", 1),)), models=("old",))
    stored = Health(state=found, last_checked_at=1000.0 - age, reason="words", models=("new",))
    known = followed(current, stored, HealthPolicy(interval=60, timeout=10), now=100.0, wall=1000.0)
    assert (known.state, known.reason, known.models, known.last_checked_at) == (found, "words", ("new",), 1000.0 - age)
    assert (known.next_probe.at, known.rest.until, known.blame.strikes) == (100.0 + in_seconds, 120.0, (("a", 1),))


@pytest.mark.parametrize(("state", "is_slow"), [(HealthState.UNHEALTHY, True), (HealthState.PROBING, False), (HealthState.HEALTHY, False)])
def test_a_server_that_came_back_elsewhere_starts_slowly_here(state: HealthState, is_slow: bool) -> None:
    known = followed(Health(state=state), Health(state=HealthState.HEALTHY), HealthPolicy(), now=5.0, wall=1000.0)
    assert (known.slow_since == 5.0) is is_slow


@pytest.mark.parametrize("state", [HealthState.HEALTHY, HealthState.HALF_OPEN, HealthState.UNHEALTHY])
def test_what_requests_of_another_process_found_only_asks_for_a_probe(state: HealthState) -> None:
    """Its own network may be to blame: nobody else stops using the server for it."""
    current = Health(state=state, next_probe=NextProbe(at=150.0), reason="ours")
    stored = Health(state=HealthState.UNHEALTHY, by_traffic=True, reason="theirs")
    known = followed(current, stored, HealthPolicy(), now=100.0, wall=1000.0)
    if state is HealthState.UNHEALTHY:
        assert known == attrs.evolve(current, by_traffic=True, reason="theirs")
    else:
        assert known == attrs.evolve(current, next_probe=NextProbe(at=100.0))


@pytest.mark.parametrize(("struck_at", "state"), [(95.0, HealthState.HALF_OPEN), (5.0, HealthState.HEALTHY)])
def test_a_probe_elsewhere_does_not_wipe_off_what_ones_own_requests_found(struck_at: float, state: HealthState) -> None:
    """One more request decides."""
    current = Health(state=HealthState.UNHEALTHY, by_traffic=True, blame=Blame(struck_at=struck_at))
    known = followed(current, Health(state=HealthState.HEALTHY), HealthPolicy(), now=100.0, wall=1000.0)
    assert known.state is state


@pytest.mark.parametrize("forced", [False, True])
def test_no_check_saves_a_server_that_is_to_be_deleted(forced: bool) -> None:
    """Under AUTO_DEREGISTER=delete what is deactivated stays so, until it is gone."""
    policy = HealthPolicy(auto_deregister=AutoDeregister.DELETE)
    health = deactivated()
    assert after(health, passed(forced=forced), passed(forced=forced), failed(forced=forced), policy=policy) is health


def test_what_is_known_of_another_generation_counts_for_nothing() -> None:
    """A server that is new here, or was changed, starts with what the store has of this generation, else unproven."""
    unproven = Health(generation=2, next_probe=NextProbe(at=5.0))
    stored = Health(state=HealthState.UNHEALTHY, generation=2, reason="theirs")
    for current in (None, well()):
        assert read(current, None) == read(current, attrs.evolve(stored, generation=1)) == unproven
        assert read(current, stored) == resume(stored, POLICY, now=5.0, wall=WALL)


def test_a_record_is_followed_only_if_it_says_something_new() -> None:
    """What this process knows stands until the store has a newer verdict of the same generation, and everything here is saved."""
    current = well(generation=2)
    news = Health(state=HealthState.MISCONFIGURED, generation=2, last_checked_at=WALL + 1, reason="theirs")
    assert read(current, None) is current
    assert read(current, news, is_unsaved=True) is current
    assert read(current, attrs.evolve(news, generation=1)) is current
    assert read(current, attrs.evolve(current, models=("other",))) is current
    assert read(current, news) == followed(current, news, POLICY, now=5.0, wall=WALL)


def test_what_another_process_read_from_the_engine_is_taken_over_and_never_lost_to_a_process_that_reads_nothing() -> None:
    measured, newer = Measured(kind=EngineKind.VLLM), Measured(kind=EngineKind.OLLAMA)
    current = attrs.evolve(well(generation=2), measured=measured)
    assert read(current, attrs.evolve(current, measured=newer)).measured == newer
    assert read(current, attrs.evolve(current, measured=newer), is_unsaved=True) is current
    news = Health(state=HealthState.MISCONFIGURED, generation=2, last_checked_at=WALL + 1, reason="theirs")
    assert read(current, news).measured == measured
    assert read(current, attrs.evolve(news, measured=newer)).measured == newer


def read(current: Health | None, stored: Health | None, *, is_unsaved: bool = False) -> Health:
    return merged(current, stored, POLICY, generation=2, is_unsaved=is_unsaved, now=5.0, wall=WALL)


# Old names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("probe_at", 7.0),
        ("probe_step", 2),
        ("excused", Running((1, 1), 9.0)),
        ("resting_until", 8.0),
        ("resting_as", 429),
        ("rested_by", "a"),
        ("rests", 3),
        ("strikes", (("a", 1),)),
        ("struck_at", 6.0),
        ("suspected_by", "b"),
        ("doubted_until", 5.0),
        ("doubts", 1),
        ("lacking_until", 4.0),
    ],
)
def test_facts_that_were_grouped_keep_their_old_names_for_a_release(name: str, value: object) -> None:
    """The old name of each fact is readable, and says what it is called now."""
    health = Health(
        next_probe=NextProbe(at=7.0, step=2, excused=Running((1, 1), 9.0)),
        rest=Rest(until=8.0, status=429, client="a", in_a_row=3),
        blame=Blame(strikes=(("a", 1),), struck_at=6.0, suspected_by="b", doubted_until=5.0, doubts=1, lacking_until=4.0),
    )
    with pytest.warns(DeprecationWarning, match=f"Health.{name} is deprecated; use Health."):
        assert getattr(health, name) == value
