"""Steps that requests and probes have in common: changes of the state, the time of the next probe, the effect of a good answer."""

from math import inf
from typing import Any

from attrs import evolve, frozen

from multiverse_gateway.core.health.policy import HealthPolicy
from multiverse_gateway.core.health.state import Blame, Health, HealthState, NextProbe

CONFIRM_AFTER = 1.0
"""Seconds to a probe that confirms a verdict."""
DEACTIVATED_UNIT = 60.0
"""Seconds to the first probe of a server that was taken off."""

_PROBE_CAP = 60.0
_DEACTIVATED_CAP = 900.0
_MAX_STEP = 16
_NO_BLAME = Blame()


@frozen
class Instant:
    """When something happens: `now` is monotonic, `wall` epoch seconds; `random` in [0, 1) is the jitter of the next probe or pause."""

    now: float
    wall: float
    random: float


def moved(health: Health, state: HealthState, wall: float, **changes: Any) -> Health:
    """Return the health in another state, or in the same one, with other changes."""
    if state is not health.state:
        changes["last_transition_at"] = wall
    if state is not HealthState.MISCONFIGURED:
        changes["reason_path"] = None
    return evolve(health, state=state, **changes)


def healthy(health: Health, now: float, wall: float, *, is_slow: bool = False, **changes: Any) -> Health:
    """Return the health in the state HEALTHY; `is_slow`: it starts slowly from now on."""
    if is_slow:
        changes["slow_since"] = now
    next_probe = probed(health, health.next_probe.at, step=0)
    return moved(health, HealthState.HEALTHY, wall, by_traffic=False, reason=None, next_probe=next_probe, **changes)


def without_strikes(health: Health) -> Health:
    """Return the health with the row of strikes ended; doubts about one client's strikes last as long as before."""
    blame = health.blame
    kept = Blame(doubted_until=blame.doubted_until, doubts=blame.doubts, lacking_until=blame.lacking_until)
    return evolve(health, blame=kept)


def cleared(health: Health) -> Health:
    """Return the health after a good answer: it ends what failed requests held against the server, and excuses no timeout any longer."""
    next_probe = NextProbe(at=health.next_probe.at, step=health.next_probe.step)
    return evolve(health, blame=_NO_BLAME, rest=evolve(health.rest, in_a_row=0), next_probe=next_probe)


def probed(health: Health, at: float, *, step: int | None = None) -> NextProbe:
    """Return the next probe of a server at another instant; without a `step` its pauses grow from where they are."""
    before = health.next_probe
    return NextProbe(at=at, step=before.step if step is None else step, excused=before.excused)


def step_after(step: int) -> int:
    """Return the next step of a pause that doubles; there is a limit."""
    return min(_MAX_STEP, step + 1)


def backoff(step: int) -> float:
    """Return the seconds to the next probe of an unhealthy server."""
    return min(_PROBE_CAP, 2.0**step)


def around(seconds: float, random: float) -> float:
    """Return a time with a jitter of ±20 %."""
    return seconds * (0.8 + 0.4 * random)


def regular(policy: HealthPolicy, random: float) -> float:
    """Return the seconds to the next probe of a server that is well: its verdict is then never older than the interval."""
    return max(policy.interval / 2, (policy.interval - policy.timeout) * (1.0 - 0.1 * random))


def pause(health: Health, policy: HealthPolicy, random: float) -> float:
    """Return the seconds to the next probe after one without a verdict: as long as before."""
    step = health.next_probe.step
    if health.state is HealthState.ARCHIVED:
        return inf
    if health.state is HealthState.DEACTIVATED:
        return around(min(_DEACTIVATED_CAP, DEACTIVATED_UNIT * 2.0**step), random)
    return around(backoff(step), random) if health.state is HealthState.UNHEALTHY else regular(policy, random)
