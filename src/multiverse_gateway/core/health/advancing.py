"""Advance the health of a server by an event."""

from multiverse_gateway.core.health.by_attempts import attempt_failed, attempt_passed
from multiverse_gateway.core.health.by_probes import misconfigured, probe_failed, probe_passed, probe_timed_out
from multiverse_gateway.core.health.events import (
    AttemptFailed,
    AttemptPassed,
    HealthEvent,
    ProbePassed,
    ProbeTimedOut,
    Refused,
)
from multiverse_gateway.core.health.policy import AutoDeregister, HealthPolicy
from multiverse_gateway.core.health.state import Health, HealthState, is_settled
from multiverse_gateway.core.health.transitions import Instant


def advance(health: Health, event: HealthEvent, policy: HealthPolicy, *, now: float, wall: float, random: float) -> Health:
    """Return the health after an event: the same object when nothing changes.

    `now` is monotonic, `wall` epoch seconds; `random` in [0, 1) is the jitter of whatever is scheduled.

    >>> from multiverse_gateway.core.health import ProbeFailed, fresh
    >>> health = fresh(1, now=0.0, wall=0.0)
    >>> advance(health, AttemptPassed(1), HealthPolicy(), now=1.0, wall=1.0, random=0.5) is health
    True
    >>> advance(health, ProbeFailed(1, "refused"), HealthPolicy(), now=1.0, wall=1.0, random=0.5).state
    <HealthState.UNHEALTHY: 'unhealthy'>
    """
    if event.generation != health.generation:
        return health
    if isinstance(event, AttemptPassed):
        return health if is_settled(health, event.path) else attempt_passed(health, event.path, policy, Instant(now, wall, random))
    at = Instant(now, wall, random)
    if isinstance(event, AttemptFailed):
        return attempt_failed(health, event, policy, at)
    if isinstance(event, Refused):
        return misconfigured(health, event.reason, event.path, policy, at)
    if health.state is HealthState.ARCHIVED and not event.forced:
        return health
    if health.state is HealthState.DEACTIVATED and policy.auto_deregister is AutoDeregister.DELETE:
        return health  # it is about to be deleted, and no check that passes until then keeps it
    if isinstance(event, ProbePassed):
        return probe_passed(health, event, policy, at)
    if isinstance(event, ProbeTimedOut):
        return probe_timed_out(health, event, policy, at)
    return probe_failed(health, event, policy, at)
