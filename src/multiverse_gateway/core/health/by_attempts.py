"""Advance the health of a server by requests that succeeded or failed."""

from attrs import evolve

from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.health.events import AttemptFailed
from multiverse_gateway.core.health.listing import after_answer, after_refusal
from multiverse_gateway.core.health.policy import HealthPolicy
from multiverse_gateway.core.health.state import Health, HealthState, Rest, Strike, is_noted, is_struck, slow_start_of, supports
from multiverse_gateway.core.health.transitions import CONFIRM_AFTER, Instant, around, backoff, cleared, healthy, moved, probed, step_after

_MAX_UNSUPPORTED = 32


def attempt_passed(health: Health, path: str, policy: HealthPolicy, at: Instant) -> Health:
    """Return the health after a good answer to the API path."""
    health = _noted(health, path)
    return _alive(_with_warning(health, after_answer(health.warning)), policy, at)


def _alive(health: Health, policy: HealthPolicy, at: Instant) -> Health:
    """Return the health after an answer that proves life."""
    if health.state is HealthState.HALF_OPEN:
        return healthy(cleared(health), at.now, at.wall, is_slow=True)
    if health.state is HealthState.SUSPECT:
        return healthy(cleared(health), at.now, at.wall)
    if health.state is HealthState.HEALTHY:
        slow_since = slow_start_of(health, policy, at.now)
        if not is_struck(health) and slow_since == health.slow_since:
            return health
        return evolve(cleared(health), slow_since=slow_since)
    if health.state is HealthState.UNHEALTHY and health.by_traffic:
        return _probed_at_once(health, at.now)  # the last resort worked
    return health


def attempt_failed(health: Health, event: AttemptFailed, policy: HealthPolicy, at: Instant) -> Health:
    """Return the health after a failed request."""
    failure = event.failure
    match failure.kind:
        case FailureClass.CONNECT | FailureClass.BROKEN | FailureClass.TIMEOUT | FailureClass.SERVER_ERROR | FailureClass.NONSENSE:
            return _blamed(health, event, policy, at) if event.counts else health
        case FailureClass.BUSY:
            return _resting(health, event, policy, at)
        case FailureClass.NO_MODEL:
            return _without_model(health, policy, at.now)
        case FailureClass.UNSUPPORTED:
            after = _without(health, event.path, policy, at.now)
            is_page = failure.status == 404 and supports(health, event.path, at.now)  # or the page of a tunnel that is offline
            return _probed_at_once(after, at.now) if is_page else after
        case FailureClass.CLIENT_ERROR:
            return _alive(_noted(health, event.path), policy, at)
    return health


def _with_warning(health: Health, warning: str | None) -> Health:
    return health if warning == health.warning else evolve(health, warning=warning)


def _noted(health: Health, path: str) -> Health:
    """Remember that the server answered a path, and that it knows this call after all."""
    unsupported = tuple(entry for entry in health.unsupported if entry[0] != path)
    if unsupported != health.unsupported:
        health = evolve(health, unsupported=unsupported)
    return health if is_noted(health, path) else evolve(health, answered=(*health.answered, path))


def _blamed(health: Health, event: AttemptFailed, policy: HealthPolicy, at: Instant) -> Health:
    """Judge a server by a failure of its own; what its requests report while it is out of rotation for other reasons changes nothing."""
    if health.status != "healthy":
        return _struck(health, _row(health, event, policy), at) if health.state is HealthState.UNHEALTHY else health
    if _is_dead(event.failure):
        return _ejected(health, event.failure, at)
    strikes = _row(health, event, policy)
    if strikes is health.blame.strikes:
        return health
    struck = _struck(health, strikes, at)
    if _is_proven(health, event, strikes, policy):
        return _ejected(struck, event.failure, at)
    doubted = _doubted(struck, policy, at)
    if event.failure.kind is FailureClass.BROKEN and health.state is not HealthState.HALF_OPEN:
        return _suspected(doubted, event, at)
    return doubted


def _struck(health: Health, strikes: tuple[Strike, ...], at: Instant) -> Health:
    return evolve(health, blame=evolve(health.blame, strikes=strikes, struck_at=at.now))


def _is_dead(failure: Failure) -> bool:
    """Return whether a failure cannot be the request's fault: the server was not reached, or hung up before it read any request."""
    return failure.kind is FailureClass.CONNECT or (failure.kind is FailureClass.BROKEN and not failure.after_request)


def _row(health: Health, event: AttemptFailed, policy: HealthPolicy) -> tuple[Strike, ...]:
    """Return the row of strikes with this failure; the same object if its request has struck already, or the failure is not a strike."""
    strikes = health.blame.strikes
    if _is_dead(event.failure) or any(number == event.number for _, number in strikes):
        return strikes
    return (*strikes, (event.client, event.number))[-_enough(policy) :]


def _enough(policy: HealthPolicy) -> int:
    return max(2, policy.strikes)


def _is_proven(health: Health, event: AttemptFailed, strikes: tuple[Strike, ...], policy: HealthPolicy) -> bool:
    """Return whether strikes prove that the server is at fault, and not a request or a client; `health` is that before the last one."""
    is_shared = len({client for client, _ in strikes}) > 1
    if health.state is HealthState.HALF_OPEN:
        return is_shared or not health.blame.strikes
    if event.failure.kind is FailureClass.BROKEN and health.blame.suspected_by not in (None, event.client):
        return True
    return is_shared and len(strikes) >= _enough(policy)


def _doubted(health: Health, policy: HealthPolicy, at: Instant) -> Health:
    """Let a server be chosen last for a while if one client alone has struck it often enough, each time for longer."""
    blame = health.blame
    is_enough = len(blame.strikes) >= _enough(policy) or health.state is HealthState.HALF_OPEN
    if not is_enough or len({client for client, _ in blame.strikes}) > 1 or blame.doubted_until > at.now:
        return health
    seconds = min(policy.longest_doubt, policy.doubt * 2.0**blame.doubts)
    return evolve(health, blame=evolve(blame, doubted_until=at.now + seconds, doubts=step_after(blame.doubts)))


def _suspected(health: Health, event: AttemptFailed, at: Instant) -> Health:
    """Suspect a server that broke off a request, and probe it at once."""
    return moved(
        health,
        HealthState.SUSPECT,
        at.wall,
        by_traffic=True,
        reason=_reason(event.failure),
        blame=evolve(health.blame, suspected_by=event.client),
        next_probe=probed(health, at.now),
    )


def _reason(failure: Failure) -> str:
    return f"requests failed: {failure.reason}"


def _ejected(health: Health, failure: Failure, at: Instant) -> Health:
    """Take a server out of rotation, and confirm that by a probe."""
    step = health.next_probe.step
    delay = around(backoff(step), at.random) if health.state is HealthState.HALF_OPEN else CONFIRM_AFTER
    return moved(
        health,
        HealthState.UNHEALTHY,
        at.wall,
        by_traffic=True,
        reason=_reason(failure),
        blame=evolve(health.blame, struck_at=at.now, doubted_until=0.0),
        unsupported=(),
        slow_since=None,
        next_probe=probed(health, at.now + delay, step=step_after(step)),
    )


def _resting(health: Health, event: AttemptFailed, policy: HealthPolicy, at: Instant) -> Health:
    """Let a busy server rest for as long as it asked; if it did not say, for longer each time in a row, until it answers."""
    failure, rest = event.failure, health.rest
    in_a_row = rest.in_a_row
    client = event.client if rest.until <= at.now or rest.client == event.client else None
    if failure.retry_after:
        seconds = min(policy.resting_cap, failure.retry_after)
    else:
        in_a_row = max(1, in_a_row) if rest.until > at.now else step_after(in_a_row)
        seconds = around(min(policy.longest_default, policy.resting_default * 2.0 ** (in_a_row - 1)), at.random)
    until = at.now + seconds
    if until <= rest.until:
        return health if client == rest.client else evolve(health, rest=evolve(rest, client=client))
    return evolve(health, rest=Rest(until=until, status=failure.status, client=client, in_a_row=in_a_row))


def _without_model(health: Health, policy: HealthPolicy, now: float) -> Health:
    """Choose the server last for a while and read its list of models again; alone it is still asked, for its own answer says it best."""
    lacking = evolve(health, blame=evolve(health.blame, lacking_until=now + policy.pair_rest))
    return _probed_at_once(_with_warning(lacking, after_refusal(health.warning)), now)


def _probed_at_once(health: Health, now: float) -> Health:
    is_done = health.state is HealthState.ARCHIVED or health.next_probe.at <= now
    return health if is_done else evolve(health, next_probe=probed(health, now))


def _without(health: Health, path: str, policy: HealthPolicy, now: float) -> Health:
    """Remember for a while that the server does not know the API path."""
    others = tuple((name, until) for name, until in health.unsupported if name != path and until > now)
    return evolve(health, unsupported=(*others, (path, now + policy.unsupported_for))[-_MAX_UNSUPPORTED:])
