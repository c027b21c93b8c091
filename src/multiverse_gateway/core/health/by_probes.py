"""Advance the health of a server by probes that passed, failed or timed out, and by refusals of the gateway's own requests."""

from math import inf

from attrs import evolve

from multiverse_gateway.core.activity import Running
from multiverse_gateway.core.health.events import ProbeFailed, ProbePassed, ProbeTimedOut
from multiverse_gateway.core.health.listing import after_probe
from multiverse_gateway.core.health.policy import AutoDeregister, HealthPolicy
from multiverse_gateway.core.health.state import Health, HealthState, NextProbe, is_refused, slow_start_of
from multiverse_gateway.core.health.transitions import (
    CONFIRM_AFTER,
    DEACTIVATED_UNIT,
    Instant,
    around,
    backoff,
    healthy,
    moved,
    pause,
    probed,
    regular,
    step_after,
    without_strikes,
)
from multiverse_gateway.core.server_access import CONFIRMING_PATH, refusal_at

_REFUSED = "the server rejected the gateway's requests, and has not accepted one since"
_CORRELATED_STEP = 2  # 4 s: when our own network returns, its servers must be back within 10 seconds


def misconfigured(health: Health, reason: str, path: str, policy: HealthPolicy, at: Instant) -> Health:
    """Take a server out that refuses the gateway, at the usual pace of probes: it answers, and only its owner can help."""
    health = evolve(health, refused_path=path)
    if not health.is_active:
        return health
    return moved(
        health,
        HealthState.MISCONFIGURED,
        at.wall,
        by_traffic=False,
        reason=refusal_at(reason, path),
        reason_path=path,
        slow_since=None,
        next_probe=probed(health, at.now + regular(policy, at.random), step=0),
    )


def probe_passed(health: Health, event: ProbePassed, policy: HealthPolicy, at: Instant) -> Health:
    """Return the health after a good probe."""
    health = evolve(
        health,
        consecutive_failures=0,
        consecutive_successes=health.consecutive_successes + 1,
        warning=after_probe(health.warning, event.warning),
        models=event.models,
        last_checked_at=at.wall,
        last_passed_at=at.wall,
        next_probe=NextProbe(at=at.now + regular(policy, at.random), step=health.next_probe.step),
        refused_path=None if event.let_in else is_refused(health),
    )
    if health.refused_path is not None:
        return _still_refused(health, at)
    blame = health.blame
    struck_until = max(blame.struck_at + policy.strike_memory, blame.doubted_until) if blame.strikes else -inf
    is_struck = at.now < struck_until
    if health.state is HealthState.HEALTHY or health.state is HealthState.SUSPECT:
        before = health if is_struck else without_strikes(health)
        return healthy(before, at.now, at.wall, slow_since=slow_start_of(health, policy, at.now))
    if health.state is HealthState.PROBING:
        return healthy(without_strikes(health), at.now, at.wall)
    if health.state is HealthState.DEACTIVATED and not event.forced:
        if health.consecutive_successes < 2:
            return _confirmed(health, at)
        return healthy(without_strikes(health), at.now, at.wall, is_slow=True)
    if not is_struck and (event.forced or health.state is HealthState.HALF_OPEN):
        return healthy(without_strikes(health), at.now, at.wall, is_slow=True)
    next_probe = probed(health, max(at.now + around(CONFIRM_AFTER, at.random), struck_until))
    return moved(health, HealthState.HALF_OPEN, at.wall, next_probe=next_probe)


def _confirmed(health: Health, at: Instant) -> Health:
    """Probe a deactivated server once more: one good probe does not bring it back."""
    return evolve(health, next_probe=probed(health, at.now + CONFIRM_AFTER))


def _still_refused(health: Health, at: Instant) -> Health:
    """Keep a server out that passed a probe which does not show whether it lets the gateway in."""
    if health.state is HealthState.DEACTIVATED and health.consecutive_successes < 2:
        return _confirmed(health, at)
    reason, path = health.reason, health.reason_path
    if health.state is not HealthState.MISCONFIGURED:
        path = health.refused_path or CONFIRMING_PATH
        reason = refusal_at(_REFUSED, path)
    return moved(
        health,
        HealthState.MISCONFIGURED,
        at.wall,
        by_traffic=False,
        reason=reason,
        reason_path=path,
        next_probe=probed(health, health.next_probe.at, step=0),
    )


def probe_timed_out(health: Health, event: ProbeTimedOut, policy: HealthPolicy, at: Instant) -> Health:
    """Judge a server that did not answer a probe in time: it may be busy with our requests."""
    step = health.next_probe.step
    if event.is_busy:
        after = evolve(health, next_probe=NextProbe(at=at.now + pause(health, policy, at.random), step=step))
        return healthy(after, at.now, at.wall) if health.state is HealthState.SUSPECT else after
    excused = _excuse(health.next_probe.excused, event.running)
    if excused is None or excused.allowed_until <= at.now:
        failed = ProbeFailed(event.generation, event.reason, correlated=event.correlated, forced=event.forced)
        return probe_failed(health, failed, policy, at)
    wait = min(pause(health, policy, at.random), max(excused.allowed_until - at.now, CONFIRM_AFTER))
    after = evolve(health, next_probe=NextProbe(at=at.now + wait, step=step, excused=excused))
    if health.state is HealthState.HEALTHY or health.state is HealthState.SUSPECT:
        return moved(after, HealthState.SUSPECT, at.wall, by_traffic=True, reason=event.reason)
    return after


def _excuse(before: Running | None, running: Running | None) -> Running | None:
    """Return the attempt that excuses a timeout: the first one since the last sign of life, whose time may have been extended meanwhile."""
    if running is None or before is None or before.key == running.key:
        return running
    return before


def probe_failed(health: Health, event: ProbeFailed, policy: HealthPolicy, at: Instant) -> Health:
    """Return the health after a failed probe."""
    before = health
    health = evolve(
        health,
        consecutive_failures=health.consecutive_failures + (not event.correlated),
        consecutive_successes=0,
        by_traffic=False,
        reason=event.reason,
        warning=None,
        last_checked_at=at.wall,
        next_probe=NextProbe(at=health.next_probe.at, step=health.next_probe.step),
        refused_path=is_refused(health),
        unsupported=(),
    )
    if not health.is_active:
        return _still_inactive(health, event, policy, at)
    if event.unauthorized:
        return misconfigured(health, event.reason, health.refused_path or CONFIRMING_PATH, policy, at)
    is_last = health.consecutive_failures >= policy.max_consecutive_failures and not event.correlated
    if is_last and policy.auto_deregister is not AutoDeregister.OFF:
        next_probe = probed(health, at.now + around(DEACTIVATED_UNIT, at.random), step=1)
        return moved(health, HealthState.DEACTIVATED, at.wall, slow_since=None, next_probe=next_probe)
    if event.forced and before.state is HealthState.UNHEALTHY:
        return health
    step = min(health.next_probe.step, _CORRELATED_STEP) if event.correlated else health.next_probe.step
    next_probe = probed(health, at.now + around(backoff(step), at.random), step=step_after(step))
    return moved(health, HealthState.UNHEALTHY, at.wall, slow_since=None, next_probe=next_probe)


def _still_inactive(health: Health, event: ProbeFailed, policy: HealthPolicy, at: Instant) -> Health:
    """Return the health of a deactivated or archived server that is still silent; after days of silence it is archived."""
    silent_since = health.last_passed_at if health.last_passed_at is not None else health.last_transition_at
    is_silent = silent_since is not None and at.wall - silent_since >= policy.archive_after and not event.correlated
    if is_silent and health.state is HealthState.DEACTIVATED:
        return moved(health, HealthState.ARCHIVED, at.wall, next_probe=probed(health, inf))
    if event.forced:
        return health
    next_probe = probed(health, at.now + pause(health, policy, at.random), step=step_after(health.next_probe.step))
    return evolve(health, next_probe=next_probe)
