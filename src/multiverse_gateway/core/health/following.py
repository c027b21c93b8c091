"""Health that this process did not see come about: of a new server, from before a restart, or found by another process."""

from math import inf

from attrs import evolve

from multiverse_gateway.core.health.policy import HealthPolicy
from multiverse_gateway.core.health.state import SHARED, Blame, Health, HealthState, NextProbe, Rest
from multiverse_gateway.core.health.transitions import DEACTIVATED_UNIT, probed, regular


def fresh(generation: int, *, now: float, wall: float, policy: HealthPolicy | None = None) -> Health:
    """Return the health of a server that was registered and probed well just now; without a policy its next probe is due at once."""
    return Health(
        state=HealthState.HEALTHY,
        generation=generation,
        consecutive_successes=1,
        last_checked_at=wall,
        last_passed_at=wall,
        last_transition_at=wall,
        next_probe=NextProbe(at=now if policy is None else now + regular(policy, 0.0)),
    )


def resume(stored: Health, policy: HealthPolicy, *, now: float, wall: float) -> Health:
    """Return what a stored health is worth after a restart; its probe is due at once.

    A young verdict of HEALTHY stands, an old one must prove itself; any other state stays.
    """
    state = stored.state
    checked_at = -inf if stored.last_checked_at is None else stored.last_checked_at
    is_young = abs(wall - checked_at) <= policy.verdict_age
    if (state is HealthState.HEALTHY or state is HealthState.SUSPECT) and not is_young:
        state = HealthState.HALF_OPEN
    return evolve(
        stored,
        state=state,
        next_probe=NextProbe(at=inf if state is HealthState.ARCHIVED else now),
        rest=Rest(),
        blame=Blame(),
        slow_since=None,
        unsupported=(),
        answered=(),
        refused_path=None,
    )


def merged(
    current: Health | None, stored: Health | None, policy: HealthPolicy, *, generation: int, is_unsaved: bool, now: float, wall: float
) -> Health:
    """Return the health of a server whose record was read: `current` is what this process knows, `stored` what the store has.

    `is_unsaved`: this process knows more than the store. What belongs to another generation counts for nothing.

    >>> merged(None, None, HealthPolicy(), generation=2, is_unsaved=False, now=5.0, wall=1000.0).next_probe.at
    5.0
    """
    if current is None or current.generation != generation:
        if stored is None or stored.generation != generation:
            return Health(generation=generation, next_probe=NextProbe(at=now))
        return resume(stored, policy, now=now, wall=wall)
    if stored is None or is_unsaved or stored.generation != generation:
        return current
    current = _measured(current, stored)
    if (stored.last_checked_at, stored.state, stored.warning) == (current.last_checked_at, current.state, current.warning):
        return current
    return followed(current, stored, policy, now=now, wall=wall)


def _measured(current: Health, stored: Health) -> Health:
    """Return a health with what another process has read from the engine; a process of an older version has read nothing."""
    return current if stored.measured is None or stored.measured == current.measured else evolve(current, measured=stored.measured)


def followed(current: Health, stored: Health, policy: HealthPolicy, *, now: float, wall: float) -> Health:
    """Return what is known of a server once another process judged it: the stored verdict, with what only this process knows.

    If only the requests of another process failed, this process does not adopt that verdict, because the other one's network may be to
    blame: the server is merely probed at once, should this process be the one that probes. The same holds for an unhealthy or
    suspect verdict of a probe. Any other verdict stays valid for the usual time, counted from when it was found: a process that takes over
    the probing continues where the other one stopped. A server that came back starts slowly here, too; if requests of
    this process failed there just now, one of them decides.

    >>> policy = HealthPolicy(interval=60, timeout=10)
    >>> followed(fresh(1, now=0, wall=1000), fresh(1, now=0, wall=1030), policy, now=40, wall=1040).next_probe.at
    80.0
    """
    is_hearsay = stored.by_traffic and (stored.state is HealthState.SUSPECT or stored.state is HealthState.UNHEALTHY)
    if is_hearsay and current.status == "healthy":
        return evolve(current, next_probe=probed(current, now))
    is_struck = current.by_traffic and current.state is not HealthState.SUSPECT and now - current.blame.struck_at < policy.strike_memory
    state = HealthState.HALF_OPEN if stored.state is HealthState.HEALTHY and is_struck else stored.state
    health = evolve(current, state=state, **{name: getattr(stored, name) for name in SHARED})
    if health.status == "healthy":
        health = evolve(health, refused_path=None)
    is_other = stored.state is not current.state
    was_out = current.state is not HealthState.PROBING and current.state is not HealthState.SUSPECT
    if is_other and was_out and stored.state is HealthState.HEALTHY:
        health = evolve(health, slow_since=now)
    return evolve(health, next_probe=probed(health, _planned(health, policy, now, wall, is_other=is_other)))


def _planned(health: Health, policy: HealthPolicy, now: float, wall: float, *, is_other: bool) -> float:
    """Return when a server is probed next that another process probed last; clocks may differ by any amount."""
    if health.state is HealthState.ARCHIVED:
        return inf
    if health.state is HealthState.HEALTHY or health.state is HealthState.MISCONFIGURED:
        period = regular(policy, 0.0)
    elif health.state is HealthState.DEACTIVATED:
        period = DEACTIVATED_UNIT
    else:
        return now if is_other else health.next_probe.at
    age = wall - (health.last_checked_at or 0.0)
    return now + min(period, max(0.0, period - age))
