"""A server's health as a state machine: every change is `advance(health, event, policy)`, nothing else.

    PROBING ──pass──> HEALTHY ──failed probe, class A/B, 3 strikes──> UNHEALTHY ──pass──> HALF_OPEN ──answer or pass──> HEALTHY
    any ──3 failed probes──> DEACTIVATED ──2 passes──> HEALTHY;  silent for 7 days ──> ARCHIVED;  401/403 ──> MISCONFIGURED

* Every event carries the generation it belongs to; events of another generation change nothing.
* A pause asked for by the server (429, 503) is no sickness: it rests, and of two pauses the later end holds.
* One request gives a server at most one strike, and no server falls by the strikes of a single request.
* Instants are monotonic seconds, but for `last_*_at`, which are epoch seconds and only shown.
"""

import math
from enum import StrEnum

import attrs

from multiverse_gateway.core.failover import Failure, FailureClass


class HealthState(StrEnum):
    """Where a server stands."""

    PROBING = "probing"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    HALF_OPEN = "half_open"
    MISCONFIGURED = "misconfigured"
    DEACTIVATED = "deactivated"
    ARCHIVED = "archived"


class AutoDeregister(StrEnum):
    """What happens to a server after too many failed probes."""

    DEACTIVATE = "deactivate"
    DELETE = "delete"
    OFF = "off"


@attrs.frozen(kw_only=True)
class HealthPolicy:
    """The figures of the state machine, in seconds and counts."""

    max_consecutive_failures: int = 3
    strikes: int = 3
    interval: float = 60.0
    timeout: float = 10.0
    resting_default: float = 5.0
    resting_cap: float = 60.0
    pair_rest: float = 60.0
    unsupported_for: float = 600.0
    slow_start: float = 30.0
    strike_memory: float = 30.0
    archive_after: float = 604800.0
    auto_deregister: AutoDeregister = AutoDeregister.DEACTIVATE
    first_byte_timeout: float = 120.0


@attrs.frozen(kw_only=True)
class Health:
    """What is known of one server; the second half is this process's own and never stored."""

    state: HealthState = HealthState.PROBING
    generation: int = 1
    consecutive_failures: int = 0
    consecutive_successes: int = 0
    by_traffic: bool = False
    reason: str | None = None
    warning: str | None = None
    last_checked_at: float | None = None
    last_passed_at: float | None = None
    last_transition_at: float | None = None
    models: tuple[str, ...] = ()

    probe_at: float = 0.0
    probe_step: int = 0
    resting_until: float = 0.0
    slow_since: float | None = None
    strikes: tuple[str, ...] = ()
    struck_at: float = -math.inf
    unsupported: tuple[tuple[str, float], ...] = ()

    @property
    def status(self) -> str:
        """Return `healthy`, `unhealthy` or `unknown`: the plan's three words."""
        return _STATUS[self.state]

    @property
    def is_active(self) -> bool:
        """Tell whether the server counts as offered."""
        return self.state not in (HealthState.DEACTIVATED, HealthState.ARCHIVED)


_STATUS = {
    HealthState.PROBING: "unknown",
    HealthState.HEALTHY: "healthy",
    HealthState.HALF_OPEN: "healthy",
    HealthState.UNHEALTHY: "unhealthy",
    HealthState.MISCONFIGURED: "unhealthy",
    HealthState.DEACTIVATED: "unhealthy",
    HealthState.ARCHIVED: "unhealthy",
}


@attrs.frozen(kw_only=True)
class ProbePassed:
    """A probe found the server working; `forced` when a person asked for it."""

    generation: int
    warning: str | None = None
    models: tuple[str, ...] = ()
    forced: bool = False


@attrs.frozen(kw_only=True)
class ProbeFailed:
    """A probe failed; `correlated` when nearly all servers failed at once, which speaks against our own network."""

    generation: int
    reason: str
    unauthorized: bool = False
    correlated: bool = False
    forced: bool = False


@attrs.frozen(kw_only=True)
class AttemptPassed:
    """A request was answered in full."""

    generation: int
    request_id: str


@attrs.frozen(kw_only=True)
class AttemptFailed:
    """A request to `path` failed; `counts` is false when it shall not count against the server."""

    generation: int
    request_id: str
    failure: Failure
    path: str
    counts: bool = True


HealthEvent = ProbePassed | ProbeFailed | AttemptPassed | AttemptFailed

_BACKOFF_CAP = 60.0
_DEACTIVATED_STEPS = (60.0, 120.0, 240.0, 480.0, 900.0)


def fresh(generation: int, *, now: float, wall: float) -> Health:
    """Return the health of a server that was registered and has just passed its probe."""
    return Health(
        state=HealthState.HEALTHY,
        generation=generation,
        consecutive_successes=1,
        last_checked_at=wall,
        last_passed_at=wall,
        last_transition_at=wall,
        probe_at=now + 30.0,
    )


def resume(stored: Health, policy: HealthPolicy, *, now: float, wall: float) -> Health:
    """Return what a stored verdict is worth after a restart: a good one of the last 60 s is used, an older one half-open."""
    trusted = stored.last_checked_at is not None and 0 <= wall - stored.last_checked_at <= 60.0
    state = stored.state
    if state is HealthState.HEALTHY and not trusted:
        state = HealthState.HALF_OPEN
    return attrs.evolve(
        stored, state=state, probe_at=now, probe_step=0, resting_until=0.0, slow_since=None, strikes=(), struck_at=-math.inf, unsupported=()
    )


def is_usable(health: Health, path: str, now: float) -> bool:
    """Tell whether a request to `path` may go to the server now; a half-open one takes one at a time."""
    if health.state is not HealthState.HEALTHY and health.state is not HealthState.HALF_OPEN:
        return False
    if health.resting_until > now:
        return False
    return not health.unsupported or all(name != path or until <= now for name, until in health.unsupported)


def share(health: Health, policy: HealthPolicy, now: float) -> float:
    """Return the part of its usual traffic that the server gets: 0.25 at the beginning of its slow start, 1 after it."""
    if health.slow_since is None:
        return 1.0
    return min(1.0, 0.25 + 0.75 * max(0.0, now - health.slow_since) / policy.slow_start)


def advance(health: Health, event: HealthEvent, policy: HealthPolicy, *, now: float, wall: float, chance: float) -> Health:
    """Return the health after an event: the same object when nothing changed. `chance` in [0, 1) spreads the next probe."""
    if event.generation != health.generation:
        return health
    if isinstance(event, AttemptPassed):
        return _attempt_passed(health, now, wall)
    if isinstance(event, AttemptFailed):
        return _attempt_failed(health, event, policy, now, wall, chance)
    if isinstance(event, ProbePassed):
        return _probe_passed(health, event, policy, now, wall, chance)
    return _probe_failed(health, event, policy, now, wall, chance)


def _to(health: Health, state: HealthState, wall: float) -> Health:
    return health if health.state is state else attrs.evolve(health, state=state, last_transition_at=wall)


def _spread(seconds: float, chance: float) -> float:
    return seconds * (0.8 + 0.4 * chance)


def _regular(policy: HealthPolicy, chance: float) -> float:
    wait = (policy.interval - policy.timeout) * (1 - 0.1 * chance)
    return max(wait, policy.interval / 2)


def _recovered(health: Health, now: float, wall: float) -> Health:
    return attrs.evolve(
        _to(health, HealthState.HEALTHY, wall), by_traffic=False, reason=None, strikes=(), struck_at=-math.inf, slow_since=now, probe_step=0
    )


def _attempt_passed(health: Health, now: float, wall: float) -> Health:
    if health.state is HealthState.HALF_OPEN:
        return _recovered(health, now, wall)
    if health.strikes and health.state is HealthState.HEALTHY:
        return attrs.evolve(health, strikes=(), struck_at=-math.inf)
    return health


def _eject(health: Health, reason: str, now: float, wall: float) -> Health:
    step = health.probe_step + 1 if health.state is HealthState.HALF_OPEN else 0
    return attrs.evolve(
        _to(health, HealthState.UNHEALTHY, wall),
        by_traffic=True,
        reason=reason,
        struck_at=now,
        consecutive_successes=0,
        probe_step=step,
        probe_at=now + min(_BACKOFF_CAP, 2.0**step),
        slow_since=None,
    )


def _attempt_failed(health: Health, event: AttemptFailed, policy: HealthPolicy, now: float, wall: float, chance: float) -> Health:
    failure = event.failure
    kind = failure.kind
    if kind is FailureClass.CLIENT_ERROR:
        return _recovered(health, now, wall) if health.state is HealthState.HALF_OPEN else health
    if kind is FailureClass.BUSY:
        asked = failure.retry_after if failure.retry_after is not None else _spread(policy.resting_default, chance)
        until = max(health.resting_until, now + min(policy.resting_cap, asked))
        return attrs.evolve(health, resting_until=until)
    if kind is FailureClass.NO_MODEL:
        return attrs.evolve(health, resting_until=max(health.resting_until, now + policy.pair_rest), reason=failure.reason, probe_at=now)
    if kind is FailureClass.UNSUPPORTED:
        others = tuple(pair for pair in health.unsupported if pair[0] != event.path and pair[1] > now)
        return attrs.evolve(health, unsupported=(*others, (event.path, now + policy.unsupported_for)))
    if kind is FailureClass.AUTH:
        return attrs.evolve(_to(health, HealthState.MISCONFIGURED, wall), reason=failure.reason, slow_since=None)
    if not event.counts or kind in (FailureClass.TRANSIENT, FailureClass.LOCAL):
        return health
    if health.state not in (HealthState.HEALTHY, HealthState.HALF_OPEN):
        return attrs.evolve(health, struck_at=now)
    if kind in (FailureClass.CONNECT, FailureClass.BROKEN) or health.state is HealthState.HALF_OPEN:
        return _eject(health, failure.reason, now, wall)
    strikes = (*health.strikes, event.request_id) if event.request_id not in health.strikes else health.strikes
    struck = attrs.evolve(health, strikes=strikes, struck_at=now)
    if len(strikes) >= policy.strikes and len(strikes) >= 2:
        return _eject(struck, failure.reason, now, wall)
    return struck


def _probe_passed(health: Health, event: ProbePassed, policy: HealthPolicy, now: float, wall: float, chance: float) -> Health:
    known = attrs.evolve(
        health,
        consecutive_failures=0,
        consecutive_successes=health.consecutive_successes + 1,
        warning=event.warning,
        models=event.models,
        last_checked_at=wall,
        last_passed_at=wall,
        probe_at=now + _regular(policy, chance),
    )
    struck_lately = now - health.struck_at < policy.strike_memory
    match health.state:
        case HealthState.HEALTHY:
            return known
        case HealthState.PROBING:
            return attrs.evolve(_to(known, HealthState.HEALTHY, wall), reason=None, probe_step=0)
        case HealthState.DEACTIVATED if known.consecutive_successes < 2 and not event.forced:
            return attrs.evolve(known, probe_at=now + 1.0)
        case HealthState.UNHEALTHY if not event.forced:
            return _to(known, HealthState.HALF_OPEN, wall)
    if struck_lately and (event.forced or health.state is HealthState.HALF_OPEN):
        return _to(known, HealthState.HALF_OPEN, wall)
    return _recovered(known, now, wall)


def _probe_failed(health: Health, event: ProbeFailed, policy: HealthPolicy, now: float, wall: float, chance: float) -> Health:
    failures = health.consecutive_failures + (0 if event.correlated else 1)
    known = attrs.evolve(
        health,
        consecutive_failures=failures,
        consecutive_successes=0,
        reason=event.reason,
        last_checked_at=wall,
        by_traffic=False,
        slow_since=None,
        probe_step=health.probe_step + 1,
    )
    if health.state is HealthState.ARCHIVED:
        return known
    if health.state is HealthState.DEACTIVATED:
        if health.last_passed_at is not None and wall - health.last_passed_at > policy.archive_after:
            return attrs.evolve(_to(known, HealthState.ARCHIVED, wall), probe_at=math.inf)
        step = _DEACTIVATED_STEPS[min(known.probe_step - 1, len(_DEACTIVATED_STEPS) - 1)]
        return attrs.evolve(known, probe_at=now + _spread(step, chance))
    if event.unauthorized:
        return attrs.evolve(_to(known, HealthState.MISCONFIGURED, wall), probe_at=now + _regular(policy, chance))
    if failures >= policy.max_consecutive_failures and not event.correlated and policy.auto_deregister is not AutoDeregister.OFF:
        return attrs.evolve(_to(known, HealthState.DEACTIVATED, wall), probe_step=0, probe_at=now + _spread(_DEACTIVATED_STEPS[0], chance))
    wait = min(_BACKOFF_CAP, 2.0 ** min(health.probe_step, 6))
    return attrs.evolve(_to(known, HealthState.UNHEALTHY, wall), probe_at=now + _spread(wait, chance))
