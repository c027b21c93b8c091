"""What is known about a server's health, and how probes and requests change it.

    PROBING        nothing is known yet                    a good probe: HEALTHY
    HEALTHY        in rotation                             a failed probe, class A, strikes: UNHEALTHY; class B after a request: SUSPECT
    SUSPECT        chosen last; probed at once             a good probe or answer: HEALTHY; a failed probe, B for another client: UNHEALTHY
    UNHEALTHY      out; probed after 1, 2, 4 … 60 s        a good probe: HALF_OPEN; failed probes in a row: DEACTIVATED
    HALF_OPEN      gets one request at a time              it passes, or a later probe does: HEALTHY; it fails: UNHEALTHY
    MISCONFIGURED  out; it refuses the gateway             a good probe that lets the gateway in: HALF_OPEN
    DEACTIVATED    taken off; probed after 1, 2, 4 … 15 min   two good probes: HEALTHY; silent for days: ARCHIVED
    ARCHIVED       not probed any more                     a forced good probe, or its owner's update

Rules that hold whatever happens:

1. An event of an older generation changes nothing.
2. Resting only ever grows longer: the later deadline wins. A busy server is not ill. A pause for which the requests of one client are the
   only reason holds for that client; the server may still answer others, until one of them is refused as well.
3. A request strikes a server at most once, and the strikes of one client take no server away from the others: after three in a row from
   one client the server is *doubted* (chosen last) for 30 s, doubling up to 5 min; a failed request of any other client then decides.
4. Every state but ARCHIVED has a next probe: time alone leaves no server stuck.
5. A good probe does not erase strikes of the last 30 s: a server may list its models and still fail to answer.
6. Any answer that proves life (a success, a client error) ends the row of strikes.
7. A refused request (401, 403) says nothing about the server: the gateway confirms it with a request of its own. A server that refuses
   that one is MISCONFIGURED until it lets such a request in; a list of models that is open to everybody proves nothing.
8. A busy server is not dead: while bytes of its answers arrive, a probe's timeout proves nothing; while a running request has time left,
   the timeout only makes the server SUSPECT.
"""

from collections.abc import Mapping
from enum import StrEnum
from math import inf
from typing import Any, Literal

from attrs import evolve, field, frozen

from multiverse_gateway.core.access import CONFIRMING_PATH, refusal_at
from multiverse_gateway.core.activity import Running
from multiverse_gateway.core.failover import Failure, FailureClass

LEAST_SHARE = 0.25
"""Part of its usual traffic that a server gets at the start of its slow start."""

_REFUSED = "the server refused the gateway's requests, and has not let one in since"
_MAX_UNSUPPORTED = 32
_MAX_ANSWERED = 32
_CONFIRM_AFTER = 1.0
_PROBE_CAP = 60.0
_DEACTIVATED_UNIT = 60.0
_DEACTIVATED_CAP = 900.0
_CORRELATED_STEP = 2  # 4 s: when our own network returns, its servers must be back within 10 seconds
_MAX_STEP = 16


class HealthState(StrEnum):
    """Where a server stands."""

    PROBING = "probing"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    UNHEALTHY = "unhealthy"
    HALF_OPEN = "half_open"
    MISCONFIGURED = "misconfigured"
    DEACTIVATED = "deactivated"
    ARCHIVED = "archived"


class AutoDeregister(StrEnum):
    """What happens to a server after too many failed probes in a row. `DELETE` deactivates too; the monitor then removes it."""

    DEACTIVATE = "deactivate"
    DELETE = "delete"
    OFF = "off"


@frozen(kw_only=True)
class HealthPolicy:
    """The figures of the state machine; all but the two counts are seconds.

    `verdict_age` is how long a verdict from before a restart is trusted.
    """

    max_consecutive_failures: int = 3
    strikes: int = 3
    interval: float = 60.0
    timeout: float = 10.0
    resting_default: float = 1.0
    longest_default: float = 10.0
    resting_cap: float = 60.0
    pair_rest: float = 60.0
    unsupported_for: float = 600.0
    slow_start: float = 30.0
    strike_memory: float = 30.0
    doubt: float = 30.0
    longest_doubt: float = 300.0
    archive_after: float = 604800.0
    auto_deregister: AutoDeregister = AutoDeregister.DEACTIVATE
    first_byte_timeout: float = 120.0
    verdict_age: float = 60.0


_HEALTHY = HealthState.HEALTHY
_SUSPECT = HealthState.SUSPECT
_HALF_OPEN = HealthState.HALF_OPEN
_UNHEALTHY = HealthState.UNHEALTHY
_DEACTIVATED = HealthState.DEACTIVATED
_ARCHIVED = HealthState.ARCHIVED
_STATUSES: Mapping[HealthState, Literal["healthy", "unknown"]] = {
    _HEALTHY: "healthy",
    _SUSPECT: "healthy",
    _HALF_OPEN: "healthy",
    HealthState.PROBING: "unknown",
}


Strike = tuple[str, int]
"""The client (key or address) and the gateway's number of a request that failed."""


@frozen(kw_only=True)
class Health:
    """What is known about one generation of a server.

    `consecutive_failures` and `consecutive_successes` count probes. `by_traffic`: requests took it out or made it suspect, and no probe has
    failed since. The three `last_…` instants are epoch seconds. `reason_path` is the API path of the refusal that `reason` describes,
    in the state MISCONFIGURED. From `probe_at` on, everything is local to the process and never stored; its instants are monotonic.
    `resting_as` is the status with which the server asked for its pause, `rested_by` the only client whose requests were answered so
    (`None`: there were several), `rests` how often in a row it did so without saying for how long. `strikes` is the row of failures
    that the server is to blame for, each with its client and the gateway's number of the request, the newest last; `struck_at` is the
    instant of the newest. `suspected_by` is the client whose request the server broke off. The server is chosen last until
    `doubted_until` for strikes of one client (`doubts` counts how often in a row), and until `lacking_until` because it did not have
    the model. `unsupported` holds API paths that the server does not know, each with the instant until which that is remembered; it is
    forgotten when the server goes down. `answered` are the paths that it has answered. `refused_path` is the API path on which the
    server refused the gateway. Timeouts of probes are `excused` by an attempt that runs.
    """

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
    reason_path: str | None = None

    probe_at: float = 0.0
    probe_step: int = 0
    resting_until: float = 0.0
    resting_as: int | None = None
    rested_by: str | None = None
    rests: int = 0
    slow_since: float | None = None
    strikes: tuple[Strike, ...] = ()
    struck_at: float = -inf
    suspected_by: str | None = None
    doubted_until: float = 0.0
    doubts: int = 0
    lacking_until: float = 0.0
    refused_path: str | None = None
    excused: Running | None = None
    unsupported: tuple[tuple[str, float], ...] = ()
    answered: tuple[str, ...] = ()
    is_undisturbed: bool = field(init=False, repr=False)
    """Whether another good answer changes nothing but `answered`; looked up for each request, so it is computed once."""

    @is_undisturbed.default
    def _is_undisturbed(self) -> bool:
        return self.state is HealthState.HEALTHY and self.slow_since is None and not _is_struck(self)

    @property
    def status(self) -> Literal["healthy", "unhealthy", "unknown"]:
        """Return the state in the words of the API: healthy, unhealthy or unknown."""
        return _STATUSES.get(self.state, "unhealthy")

    @property
    def is_active(self) -> bool:
        """Return whether the server counts as one of its model's servers, working or not."""
        return self.state is not _DEACTIVATED and self.state is not _ARCHIVED


_NO_ROW: dict[str, Any] = {"strikes": (), "struck_at": -inf, "suspected_by": None}
_NO_STRIKES: dict[str, Any] = {**_NO_ROW, "doubted_until": 0.0, "doubts": 0, "rests": 0, "lacking_until": 0.0, "excused": None}

SHARED = (
    "generation",
    "consecutive_failures",
    "consecutive_successes",
    "by_traffic",
    "reason",
    "warning",
    "last_checked_at",
    "last_passed_at",
    "last_transition_at",
    "models",
    "reason_path",
)
"""The fields of `Health` that all processes share, besides its state."""


@frozen
class ProbePassed:
    """A probe found the server well.

    `forced`: a person asked for it. `let_in`: the server also let in a request that needs the key, if it wants one.
    """

    generation: int
    warning: str | None = None
    models: tuple[str, ...] = ()
    forced: bool = False
    let_in: bool = False


@frozen
class ProbeFailed:
    """A probe found the server ill. `correlated`: nearly all others failed as well, so the gateway's own network is suspected."""

    generation: int
    reason: str
    unauthorized: bool = False
    correlated: bool = False
    forced: bool = False


@frozen
class ProbeTimedOut:
    """A probe got no answer in time.

    `is_busy`: bytes of other answers of the server arrived meanwhile. `running` is the oldest attempt that runs on the server, if any.
    `correlated` and `forced` as in `ProbeFailed`.
    """

    generation: int
    reason: str
    is_busy: bool = False
    running: Running | None = None
    correlated: bool = False
    forced: bool = False


@frozen
class Refused:
    """The server refused a request of the gateway's own to the API path, sent with the stored key if there is one."""

    generation: int
    reason: str
    path: str


@frozen
class AttemptPassed:
    """A request to the API path was answered in full."""

    generation: int
    path: str = ""


@frozen
class AttemptFailed:
    """A request to the API path failed.

    `client` is the key or address that sent it, `number` the gateway's own number of the request: nothing that a client can choose.
    Without `counts` the server is not blamed; what it said of itself (busy …) still holds.
    """

    generation: int
    client: str
    number: int
    failure: Failure
    path: str
    counts: bool = True


HealthEvent = ProbePassed | ProbeFailed | ProbeTimedOut | Refused | AttemptPassed | AttemptFailed


def fresh(generation: int, *, now: float, wall: float, policy: HealthPolicy | None = None) -> Health:
    """Return the health of a server that was registered and probed well just now; without a policy its next probe is due at once."""
    return Health(
        state=_HEALTHY,
        generation=generation,
        consecutive_successes=1,
        last_checked_at=wall,
        last_passed_at=wall,
        last_transition_at=wall,
        probe_at=now if policy is None else now + _regular(policy, 0.0),
    )


def resume(stored: Health, policy: HealthPolicy, *, now: float, wall: float) -> Health:
    """Return what a stored health is worth after a restart; its probe is due at once.

    A young verdict of HEALTHY stands, an old one must prove itself; any other state stays.
    """
    state = stored.state
    checked_at = -inf if stored.last_checked_at is None else stored.last_checked_at
    is_young = abs(wall - checked_at) <= policy.verdict_age
    if (state is _HEALTHY or state is _SUSPECT) and not is_young:
        state = _HALF_OPEN
    return evolve(
        stored,
        state=state,
        probe_at=inf if state is _ARCHIVED else now,
        probe_step=0,
        resting_until=0.0,
        resting_as=None,
        slow_since=None,
        unsupported=(),
        answered=(),
        refused_path=None,
        **_NO_STRIKES,
    )


def merged(
    current: Health | None, stored: Health | None, policy: HealthPolicy, *, generation: int, is_unsaved: bool, now: float, wall: float
) -> Health:
    """Return the health of a server whose record was read: `current` is what this process knows, `stored` what the store has.

    `is_unsaved`: this process knows more than the store. What belongs to another generation counts for nothing.

    >>> merged(None, None, HealthPolicy(), generation=2, is_unsaved=False, now=5.0, wall=1000.0).probe_at
    5.0
    """
    if current is None or current.generation != generation:
        if stored is None or stored.generation != generation:
            return Health(generation=generation, probe_at=now)
        return resume(stored, policy, now=now, wall=wall)
    if stored is None or is_unsaved or stored.generation != generation:
        return current
    if stored.last_checked_at == current.last_checked_at and stored.state is current.state:
        return current
    return followed(current, stored, policy, now=now, wall=wall)


def followed(current: Health, stored: Health, policy: HealthPolicy, *, now: float, wall: float) -> Health:
    """Return what is known of a server once another process judged it: the stored verdict, with what only this process knows.

    If only the requests of another process failed, this process does not adopt that verdict, because the other one's network may be to
    blame: the server is merely probed at once, should this process be the one that probes. The same holds for what a probe found ill, or
    not quite well. Any other verdict stays valid for the usual time, counted from when it was found: a process that takes over the probing
    continues where the other one stopped. A server that came back starts slowly here, too; if requests of this process failed there just
    now, one of them decides.

    >>> policy = HealthPolicy(interval=60, timeout=10)
    >>> followed(fresh(1, now=0, wall=1000), fresh(1, now=0, wall=1030), policy, now=40, wall=1040).probe_at
    80.0
    """
    is_hearsay = stored.by_traffic and (stored.state is _SUSPECT or stored.state is _UNHEALTHY)
    if is_hearsay and current.status == "healthy":
        return evolve(current, probe_at=now)
    is_struck = current.by_traffic and current.state is not _SUSPECT and now - current.struck_at < policy.strike_memory
    state = _HALF_OPEN if stored.state is _HEALTHY and is_struck else stored.state
    health = evolve(current, state=state, **{name: getattr(stored, name) for name in SHARED})
    if health.status == "healthy":
        health = evolve(health, refused_path=None)
    is_other = stored.state is not current.state
    if is_other and stored.state is _HEALTHY and current.state is not HealthState.PROBING and current.state is not _SUSPECT:
        health = evolve(health, slow_since=now)
    return evolve(health, probe_at=_planned(health, policy, now, wall, is_other=is_other))


def _planned(health: Health, policy: HealthPolicy, now: float, wall: float, *, is_other: bool) -> float:
    """Return when a server is probed next that another process probed last; clocks may differ by any amount."""
    if health.state is _ARCHIVED:
        return inf
    if health.state is _HEALTHY or health.state is HealthState.MISCONFIGURED:
        period = _regular(policy, 0.0)
    elif health.state is _DEACTIVATED:
        period = _DEACTIVATED_UNIT
    else:
        return now if is_other else health.probe_at
    age = wall - (health.last_checked_at or 0.0)
    return now + min(period, max(0.0, period - age))


def is_last(health: Health, now: float) -> bool:
    """Return whether a usable server is chosen only if no better one is ready: it is suspect or doubted, or lacked the model."""
    return health.state is _SUSPECT or last_until(health) > now


def last_until(health: Health) -> float:
    """Return until when a server in rotation is chosen last, a monotonic instant; in the past unless requests held something against it."""
    return max(health.doubted_until, health.lacking_until)


def supports(health: Health, path: str, now: float) -> bool:
    """Return whether the server may support the API path: nothing recent shows that it does not."""
    return not any(name == path and until > now for name, until in health.unsupported)


def share(health: Health, policy: HealthPolicy, now: float) -> float:
    """Return the part of its usual traffic that the server should get: 0.25 to 1, growing during its slow start."""
    if health.state is _HALF_OPEN:
        return LEAST_SHARE
    slow_since = _slow_since(health, policy, now)
    if slow_since is None:
        return 1.0
    return LEAST_SHARE + (1.0 - LEAST_SHARE) * max(0.0, now - slow_since) / policy.slow_start


def _slow_since(health: Health, policy: HealthPolicy, now: float) -> float | None:
    """Return when the slow start began that the server is in, `None` if there is none or it is over."""
    since = health.slow_since
    return None if since is None or now - since >= policy.slow_start else since


def is_settled(health: Health, path: str) -> bool:
    """Return whether another good answer to the API path changes nothing."""
    return health.is_undisturbed and _is_noted(health, path)


def has_answered(health: Health, path: str) -> bool:
    """Return whether the server has answered the API path before, so that a page that says "not found" cannot be its own."""
    return path in health.answered


def _is_noted(health: Health, path: str) -> bool:
    """Return whether there is nothing to remember of an answer: clients choose paths, so there is a limit."""
    return not path or path in health.answered or len(health.answered) >= _MAX_ANSWERED


def _is_struck(health: Health) -> bool:
    """Return whether failed requests left anything that a good answer ends."""
    return bool(health.strikes or health.doubts or health.rests or health.lacking_until)


@frozen
class _At:
    """When and by what luck something happens."""

    now: float
    wall: float
    chance: float


def advance(health: Health, event: HealthEvent, policy: HealthPolicy, *, now: float, wall: float, chance: float) -> Health:
    """Return the health after an event: the same object when nothing changes.

    `now` is monotonic, `wall` epoch seconds; `chance` in [0, 1) is the jitter of whatever is scheduled.

    >>> health = fresh(1, now=0.0, wall=0.0)
    >>> advance(health, AttemptPassed(1), HealthPolicy(), now=1.0, wall=1.0, chance=0.5) is health
    True
    >>> advance(health, ProbeFailed(1, "refused"), HealthPolicy(), now=1.0, wall=1.0, chance=0.5).state
    <HealthState.UNHEALTHY: 'unhealthy'>
    """
    if event.generation != health.generation:
        return health
    if isinstance(event, AttemptPassed):
        return health if is_settled(health, event.path) else _attempt_passed(_noted(health, event.path), policy, now, wall)
    at = _At(now, wall, chance)
    if isinstance(event, AttemptFailed):
        return _attempt_failed(health, event, policy, at)
    if isinstance(event, Refused):
        return _misconfigured(health, event.reason, event.path, policy, at)
    if health.state is _ARCHIVED and not event.forced:
        return health
    if health.state is _DEACTIVATED and policy.auto_deregister is AutoDeregister.DELETE:
        return health  # it is about to be deleted, and no check that passes until then keeps it
    if isinstance(event, ProbePassed):
        return _probe_passed(health, event, policy, at)
    if isinstance(event, ProbeTimedOut):
        return _probe_timed_out(health, event, policy, at)
    return _probe_failed(health, event, policy, at)


# Requests


def _noted(health: Health, path: str) -> Health:
    """Remember that the server answered a path, and that it knows this call after all."""
    unsupported = tuple(entry for entry in health.unsupported if entry[0] != path)
    if unsupported != health.unsupported:
        health = evolve(health, unsupported=unsupported)
    return health if _is_noted(health, path) else evolve(health, answered=(*health.answered, path))


def _attempt_passed(health: Health, policy: HealthPolicy, now: float, wall: float) -> Health:
    if health.state is _HALF_OPEN:
        return _healthy(health, now, wall, is_slow=True, **_NO_STRIKES)
    if health.state is _SUSPECT:
        return _healthy(health, now, wall, **_NO_STRIKES)
    if health.state is _HEALTHY:
        slow_since = _slow_since(health, policy, now)
        if not _is_struck(health) and slow_since == health.slow_since:
            return health
        return evolve(health, slow_since=slow_since, **_NO_STRIKES)
    if health.state is _UNHEALTHY and health.by_traffic and health.probe_at > now:
        return evolve(health, probe_at=now)  # the last resort worked: probe at once
    return health


def _attempt_failed(health: Health, event: AttemptFailed, policy: HealthPolicy, at: _At) -> Health:
    failure = event.failure
    match failure.kind:
        case FailureClass.CONNECT | FailureClass.BROKEN | FailureClass.TIMEOUT | FailureClass.SERVER_ERROR | FailureClass.NONSENSE:
            return _blamed(health, event, policy, at) if event.counts else health
        case FailureClass.BUSY:
            return _resting(health, event, policy, at)
        case FailureClass.NO_MODEL:
            return _without_model(health, policy, at.now)
        case FailureClass.UNSUPPORTED:
            known = _without(health, event.path, policy, at.now)
            is_page = failure.status == 404 and supports(health, event.path, at.now)  # or the page of a tunnel that is offline
            return _probed_at_once(known, at.now) if is_page else known
        case FailureClass.CLIENT_ERROR:
            return _attempt_passed(_noted(health, event.path), policy, at.now, at.wall)
    return health


def _blamed(health: Health, event: AttemptFailed, policy: HealthPolicy, at: _At) -> Health:
    """Judge a server by a failure of its own; what its requests report while it is out of rotation for other reasons changes nothing."""
    if health.status != "healthy":
        return evolve(health, struck_at=at.now, strikes=_row(health, event, policy)) if health.state is _UNHEALTHY else health
    if _is_dead(event.failure):
        return _ejected(health, event.failure, at, health.strikes)
    strikes = _row(health, event, policy)
    if strikes is health.strikes:
        return health
    if _is_proven(health, event, strikes, policy):
        return _ejected(health, event.failure, at, strikes)
    struck = _doubted(evolve(health, strikes=strikes, struck_at=at.now), policy, at)
    if event.failure.kind is FailureClass.BROKEN and health.state is not _HALF_OPEN:
        reason = _reason(event.failure)
        return _moved(struck, _SUSPECT, at.wall, by_traffic=True, reason=reason, suspected_by=event.client, probe_at=at.now)
    return struck


def _is_dead(failure: Failure) -> bool:
    """Return whether a failure cannot be the request's fault: the server was not reached, or hung up before it read any request."""
    return failure.kind is FailureClass.CONNECT or (failure.kind is FailureClass.BROKEN and not failure.after_request)


def _row(health: Health, event: AttemptFailed, policy: HealthPolicy) -> tuple[Strike, ...]:
    """Return the row of strikes with this failure; the same object if its request has struck already, or the failure is no strike."""
    if _is_dead(event.failure) or any(number == event.number for _, number in health.strikes):
        return health.strikes
    return (*health.strikes, (event.client, event.number))[-_enough(policy) :]


def _enough(policy: HealthPolicy) -> int:
    return max(2, policy.strikes)


def _is_proven(health: Health, event: AttemptFailed, strikes: tuple[Strike, ...], policy: HealthPolicy) -> bool:
    """Return whether strikes prove that the server is at fault, and not a request or a client."""
    is_shared = len({client for client, _ in strikes}) > 1
    if health.state is _HALF_OPEN:
        return is_shared or not health.strikes
    if event.failure.kind is FailureClass.BROKEN and health.suspected_by not in (None, event.client):
        return True
    return is_shared and len(strikes) >= _enough(policy)


def _doubted(health: Health, policy: HealthPolicy, at: _At) -> Health:
    """Let a server be chosen last for a while if one client alone has struck it often enough, each time for longer."""
    is_enough = len(health.strikes) >= _enough(policy) or health.state is _HALF_OPEN
    if not is_enough or len({client for client, _ in health.strikes}) > 1 or health.doubted_until > at.now:
        return health
    seconds = min(policy.longest_doubt, policy.doubt * 2.0**health.doubts)
    return evolve(health, doubted_until=at.now + seconds, doubts=_step_after(health.doubts))


def _reason(failure: Failure) -> str:
    return f"requests failed: {failure.reason}"


def _ejected(health: Health, failure: Failure, at: _At, strikes: tuple[Strike, ...]) -> Health:
    is_again = health.state is _HALF_OPEN
    return _moved(
        health,
        _UNHEALTHY,
        at.wall,
        by_traffic=True,
        reason=_reason(failure),
        strikes=strikes,
        struck_at=at.now,
        doubted_until=0.0,
        unsupported=(),
        slow_since=None,
        probe_at=at.now + (_around(_backoff(health.probe_step), at.chance) if is_again else _CONFIRM_AFTER),
        probe_step=_step_after(health.probe_step),
    )


def _resting(health: Health, event: AttemptFailed, policy: HealthPolicy, at: _At) -> Health:
    """Let a busy server rest for as long as it asked; if it did not say, for longer each time in a row, until it answers."""
    failure, rests = event.failure, health.rests
    rested_by = event.client if health.resting_until <= at.now or health.rested_by == event.client else None
    if failure.retry_after:
        seconds = min(policy.resting_cap, failure.retry_after)
    else:
        rests = max(1, rests) if health.resting_until > at.now else _step_after(rests)
        seconds = _around(min(policy.longest_default, policy.resting_default * 2.0 ** (rests - 1)), at.chance)
    until = at.now + seconds
    if until <= health.resting_until:
        return health if rested_by == health.rested_by else evolve(health, rested_by=rested_by)
    return evolve(health, resting_until=until, resting_as=failure.status, rested_by=rested_by, rests=rests)


def _without_model(health: Health, policy: HealthPolicy, now: float) -> Health:
    """Choose the server last for a while and read its list of models again; alone it is still asked, for its own answer says it best."""
    return _probed_at_once(evolve(health, lacking_until=now + policy.pair_rest), now)


def _probed_at_once(health: Health, now: float) -> Health:
    return health if health.state is _ARCHIVED or health.probe_at <= now else evolve(health, probe_at=now)


def _without(health: Health, path: str, policy: HealthPolicy, now: float) -> Health:
    others = tuple((name, until) for name, until in health.unsupported if name != path and until > now)
    return evolve(health, unsupported=(*others, (path, now + policy.unsupported_for))[-_MAX_UNSUPPORTED:])


def is_refused(health: Health) -> str | None:
    """Return the API path on which the server has to let the gateway in before it gets requests again; `None` if it refuses nothing.

    A process that did not see the refusal itself uses the path that is shared with the reason.
    """
    return health.refused_path or (health.reason_path or CONFIRMING_PATH if health.state is HealthState.MISCONFIGURED else None)


def _misconfigured(health: Health, reason: str, path: str, policy: HealthPolicy, at: _At) -> Health:
    """Take a server out that refuses the gateway, at the usual pace of probes: it answers, and only its owner can help."""
    health = evolve(health, refused_path=path)
    if not health.is_active:
        return health
    return _moved(
        health,
        HealthState.MISCONFIGURED,
        at.wall,
        by_traffic=False,
        reason=refusal_at(reason, path),
        reason_path=path,
        slow_since=None,
        probe_at=at.now + _regular(policy, at.chance),
        probe_step=0,
    )


# Probes


def _probe_passed(health: Health, event: ProbePassed, policy: HealthPolicy, at: _At) -> Health:
    health = evolve(
        health,
        consecutive_failures=0,
        consecutive_successes=health.consecutive_successes + 1,
        warning=event.warning,
        models=event.models,
        last_checked_at=at.wall,
        last_passed_at=at.wall,
        probe_at=at.now + _regular(policy, at.chance),
        refused_path=None if event.let_in else is_refused(health),
        excused=None,
    )
    if health.refused_path is not None:
        return _still_refused(health, at)
    struck_until = max(health.struck_at + policy.strike_memory, health.doubted_until) if health.strikes else -inf
    is_struck = at.now < struck_until
    if health.state is _HEALTHY or health.state is _SUSPECT:
        return _healthy(health, at.now, at.wall, slow_since=_slow_since(health, policy, at.now), **({} if is_struck else _NO_ROW))
    if health.state is HealthState.PROBING:
        return _healthy(health, at.now, at.wall, **_NO_ROW)
    if health.state is _DEACTIVATED and not event.forced:
        if health.consecutive_successes < 2:
            return evolve(health, probe_at=at.now + _CONFIRM_AFTER)
        return _healthy(health, at.now, at.wall, is_slow=True, **_NO_ROW)
    if not is_struck and (event.forced or health.state is _HALF_OPEN):
        return _healthy(health, at.now, at.wall, is_slow=True, **_NO_ROW)
    return _moved(health, _HALF_OPEN, at.wall, probe_at=max(at.now + _around(_CONFIRM_AFTER, at.chance), struck_until))


def _still_refused(health: Health, at: _At) -> Health:
    """Keep a server out that passed a probe which does not show whether it lets the gateway in."""
    if health.state is _DEACTIVATED and health.consecutive_successes < 2:
        return evolve(health, probe_at=at.now + _CONFIRM_AFTER)
    reason, path = health.reason, health.reason_path
    if health.state is not HealthState.MISCONFIGURED:
        path = health.refused_path or CONFIRMING_PATH
        reason = refusal_at(_REFUSED, path)
    return _moved(health, HealthState.MISCONFIGURED, at.wall, by_traffic=False, reason=reason, reason_path=path, probe_step=0)


def _probe_timed_out(health: Health, event: ProbeTimedOut, policy: HealthPolicy, at: _At) -> Health:
    """Judge a server that did not answer a probe in time: it may be busy with our requests."""
    if event.is_busy:
        known = evolve(health, excused=None, probe_at=at.now + _pause(health, policy, at.chance))
        return _healthy(known, at.now, at.wall) if health.state is _SUSPECT else known
    excused = _excuse(health.excused, event.running)
    if excused is None or excused.allowed_until <= at.now:
        failed = ProbeFailed(event.generation, event.reason, correlated=event.correlated, forced=event.forced)
        return _probe_failed(health, failed, policy, at)
    wait = min(_pause(health, policy, at.chance), max(excused.allowed_until - at.now, _CONFIRM_AFTER))
    known = evolve(health, excused=excused, probe_at=at.now + wait)
    if health.state is _HEALTHY or health.state is _SUSPECT:
        return _moved(known, _SUSPECT, at.wall, by_traffic=True, reason=event.reason)
    return known


def _excuse(before: Running | None, running: Running | None) -> Running | None:
    """Return the attempt that excuses a timeout: the first one since the last sign of life, whose time may have been extended meanwhile."""
    if running is None or before is None or before.key == running.key:
        return running
    return before


def _pause(health: Health, policy: HealthPolicy, chance: float) -> float:
    """Return the seconds to the next probe after one without a verdict: as long as before."""
    if health.state is _ARCHIVED:
        return inf
    if health.state is _DEACTIVATED:
        return _around(min(_DEACTIVATED_CAP, _DEACTIVATED_UNIT * 2.0**health.probe_step), chance)
    return _around(_backoff(health.probe_step), chance) if health.state is _UNHEALTHY else _regular(policy, chance)


def _probe_failed(health: Health, event: ProbeFailed, policy: HealthPolicy, at: _At) -> Health:
    before = health
    health = evolve(
        health,
        consecutive_failures=health.consecutive_failures + (not event.correlated),
        consecutive_successes=0,
        by_traffic=False,
        reason=event.reason,
        warning=None,
        last_checked_at=at.wall,
        refused_path=is_refused(health),
        excused=None,
        unsupported=(),
    )
    if not health.is_active:
        return _still_inactive(health, event, policy, at)
    if event.unauthorized:
        return _misconfigured(health, event.reason, health.refused_path or CONFIRMING_PATH, policy, at)
    is_last = health.consecutive_failures >= policy.max_consecutive_failures and not event.correlated
    if is_last and policy.auto_deregister is not AutoDeregister.OFF:
        delay = _around(_DEACTIVATED_UNIT, at.chance)
        return _moved(health, _DEACTIVATED, at.wall, slow_since=None, probe_at=at.now + delay, probe_step=1)
    if event.forced and before.state is _UNHEALTHY:
        return health
    step = min(health.probe_step, _CORRELATED_STEP) if event.correlated else health.probe_step
    delay = _around(_backoff(step), at.chance)
    return _moved(health, _UNHEALTHY, at.wall, slow_since=None, probe_at=at.now + delay, probe_step=_step_after(step))


def _still_inactive(health: Health, event: ProbeFailed, policy: HealthPolicy, at: _At) -> Health:
    silent_since = health.last_passed_at if health.last_passed_at is not None else health.last_transition_at
    is_silent = silent_since is not None and at.wall - silent_since >= policy.archive_after and not event.correlated
    if is_silent and health.state is _DEACTIVATED:
        return _moved(health, _ARCHIVED, at.wall, probe_at=inf)
    if event.forced:
        return health
    return evolve(health, probe_at=at.now + _pause(health, policy, at.chance), probe_step=_step_after(health.probe_step))


# Both


def _moved(health: Health, state: HealthState, wall: float, **changes: Any) -> Health:
    if state is not health.state:
        changes["last_transition_at"] = wall
    if state is not HealthState.MISCONFIGURED:
        changes["reason_path"] = None
    return evolve(health, state=state, **changes)


def _healthy(health: Health, now: float, wall: float, *, is_slow: bool = False, **changes: Any) -> Health:
    if is_slow:
        changes["slow_since"] = now
    return _moved(health, _HEALTHY, wall, by_traffic=False, reason=None, probe_step=0, **changes)


def _step_after(step: int) -> int:
    return min(_MAX_STEP, step + 1)


def _backoff(step: int) -> float:
    return min(_PROBE_CAP, 2.0**step)


def _around(seconds: float, chance: float) -> float:
    """Spread by ±20 %."""
    return seconds * (0.8 + 0.4 * chance)


def _regular(policy: HealthPolicy, chance: float) -> float:
    """Return the seconds to the next probe of a server that is well: its verdict is then never older than the interval."""
    return max(policy.interval / 2, (policy.interval - policy.timeout) * (1.0 - 0.1 * chance))
