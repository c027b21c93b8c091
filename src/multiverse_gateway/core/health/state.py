"""The health of a server as one frozen value, and the questions that it answers.

The fields of `SharedHealth` are shared between all processes and stored; those of `Health` itself are local to the process.
"""

import warnings
from collections.abc import Mapping
from enum import StrEnum
from math import inf
from operator import attrgetter
from typing import Any, Literal

from attrs import field, frozen

from multiverse_gateway.core.activity import Running
from multiverse_gateway.core.engine_facts import Measured
from multiverse_gateway.core.health.listing import has_answered_unlisted, is_doubtful
from multiverse_gateway.core.health.policy import HealthPolicy
from multiverse_gateway.core.server_access import CONFIRMING_PATH

LEAST_SHARE = 0.25
"""Part of its usual traffic that a server gets at the start of its slow start."""

_MAX_ANSWERED = 32


class HealthState(StrEnum):
    """The states of a server; the rules of `core.health` say what leads from one to another."""

    PROBING = "probing"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    UNHEALTHY = "unhealthy"
    HALF_OPEN = "half_open"
    MISCONFIGURED = "misconfigured"
    DEACTIVATED = "deactivated"
    ARCHIVED = "archived"


_HEALTHY = HealthState.HEALTHY
_SUSPECT = HealthState.SUSPECT
_HALF_OPEN = HealthState.HALF_OPEN
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
class Rest:
    """The last pause that a server asked for, by 429 or 503.

    `until` is a monotonic instant, `status` the status with which the server asked. `client` is the only client whose requests were
    answered so, `None` if there were several. `in_a_row` counts the pauses since the last good answer for which the server did not say how
    long they should be: each one is longer than the one before.
    """

    until: float = 0.0
    status: int | None = None
    client: str | None = None
    in_a_row: int = 0


@frozen(kw_only=True)
class Blame:
    """The failed requests that count against a server until a good answer clears it; all instants are monotonic.

    `strikes` is the row of failures for which the server is to blame, the newest last, and `struck_at` the instant of the newest.
    `suspected_by` is the client whose request the server broke off. The server is chosen last until `doubted_until` for strikes of one
    client (`doubts` counts how often in a row), and until `lacking_until` because it did not have the model.
    """

    strikes: tuple[Strike, ...] = ()
    struck_at: float = -inf
    suspected_by: str | None = None
    doubted_until: float = 0.0
    doubts: int = 0
    lacking_until: float = 0.0


@frozen(kw_only=True)
class NextProbe:
    """When a server is probed next: at the monotonic instant `at`, infinite for never.

    `step` counts the failed probes that made the pauses longer. `excused` is the running attempt that excuses timeouts of probes.
    """

    at: float = 0.0
    step: int = 0
    excused: Running | None = None


_NO_REST = Rest()
_NO_BLAME = Blame()
_NOW = NextProbe()


@frozen(kw_only=True)
class SharedHealth:
    """What all processes know of one generation of a server: it is stored.

    `consecutive_failures` and `consecutive_successes` count probes. `by_traffic`: requests took it out or made it suspect, and no probe has
    failed since. The three `last_…` instants are epoch seconds. `reason_path` is the API path of the refusal that `reason` describes,
    in the state MISCONFIGURED. `measured` is what the server's engine says about itself and the model.
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
    measured: Measured | None = None


@frozen(kw_only=True)
class Health(SharedHealth):
    """What is known about one generation of a server, with what only this process knows of it.

    The fields of this class are never stored; their instants are monotonic. `slow_since` is when the slow start of the server began.
    `unsupported` holds API paths that the server does not know, each with the instant until which that is
    remembered; it is forgotten when the server goes down. `answered` are the paths that it has answered. `refused_path` is the API path on
    which the server refused the gateway.
    """

    next_probe: NextProbe = _NOW
    rest: Rest = _NO_REST
    blame: Blame = _NO_BLAME
    slow_since: float | None = None
    refused_path: str | None = None
    unsupported: tuple[tuple[str, float], ...] = ()
    answered: tuple[str, ...] = ()
    is_undisturbed: bool = field(init=False, repr=False)
    """Whether another good answer changes nothing but `answered`; looked up for each request, so it is computed once."""

    @is_undisturbed.default
    def _is_undisturbed(self) -> bool:
        return self.state is HealthState.HEALTHY and self.slow_since is None and not is_struck(self) and not is_doubtful(self.warning)

    @property
    def status(self) -> Literal["healthy", "unhealthy", "unknown"]:
        """Return the state in the words of the API: healthy, unhealthy or unknown."""
        return _STATUSES.get(self.state, "unhealthy")

    @property
    def is_active(self) -> bool:
        """Return whether the server counts as one of its model's servers, working or not."""
        return self.state is not _DEACTIVATED and self.state is not _ARCHIVED


_RENAMED = {
    "probe_at": "next_probe.at",
    "probe_step": "next_probe.step",
    "excused": "next_probe.excused",
    "resting_until": "rest.until",
    "resting_as": "rest.status",
    "rested_by": "rest.client",
    "rests": "rest.in_a_row",
    "strikes": "blame.strikes",
    "struck_at": "blame.struck_at",
    "suspected_by": "blame.suspected_by",
    "doubted_until": "blame.doubted_until",
    "doubts": "blame.doubts",
    "lacking_until": "blame.lacking_until",
}


def _renamed(name: str, place: str) -> property:
    """Return the old name of a fact, for one release."""

    def read(health: Health) -> Any:
        warnings.warn(f"Health.{name} is deprecated; use Health.{place}", DeprecationWarning, stacklevel=2)
        return attrgetter(place)(health)

    return property(read)


for _name, _place in _RENAMED.items():
    setattr(Health, _name, _renamed(_name, _place))

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
"""The fields of `SharedHealth` that a verdict consists of, besides the state. What was read from the engine is kept apart."""


def is_last(health: Health, now: float) -> bool:
    """Return whether a usable server is chosen only if no better one is ready: it is suspect or doubted, or lacked the model."""
    return health.state is _SUSPECT or last_until(health) > now


def last_until(health: Health) -> float:
    """Return until when a server in rotation is chosen last, a monotonic instant; in the past unless requests held something against it."""
    return max(health.blame.doubted_until, health.blame.lacking_until)


def needs_attention(health: Health, now: float) -> bool:
    """Return whether a server takes requests but may not have its model: it does not list it, or a request was told so just now.

    >>> from multiverse_gateway.core.health.listing import UNLISTED
    >>> needs_attention(Health(state=HealthState.HEALTHY, warning=UNLISTED), 0.0), needs_attention(Health(warning=UNLISTED), 0.0)
    (True, False)
    """
    if health.status != "healthy":
        return False
    has_warning = health.warning is not None and not has_answered_unlisted(health.warning)
    return has_warning or health.blame.lacking_until > now


def supports(health: Health, path: str, now: float) -> bool:
    """Return whether the server may support the API path: nothing recent shows that it does not."""
    return not any(name == path and until > now for name, until in health.unsupported)


def traffic_share(health: Health, policy: HealthPolicy, now: float) -> float:
    """Return the part of its usual traffic that the server should get: 0.25 to 1, growing during its slow start."""
    if health.state is _HALF_OPEN:
        return LEAST_SHARE
    slow_since = slow_start_of(health, policy, now)
    if slow_since is None:
        return 1.0
    return LEAST_SHARE + (1.0 - LEAST_SHARE) * max(0.0, now - slow_since) / policy.slow_start


def slow_start_of(health: Health, policy: HealthPolicy, now: float) -> float | None:
    """Return when the slow start began that the server is in, `None` if there is none or it is over."""
    since = health.slow_since
    return None if since is None or now - since >= policy.slow_start else since


def is_settled(health: Health, path: str) -> bool:
    """Return whether another good answer to the API path changes nothing."""
    return health.is_undisturbed and is_noted(health, path)


def has_answered(health: Health, path: str) -> bool:
    """Return whether the server has answered the API path before, so that a page that says "not found" cannot be its own."""
    return path in health.answered


def is_noted(health: Health, path: str) -> bool:
    """Return whether there is nothing to remember of an answer: clients choose paths, so there is a limit."""
    return not path or path in health.answered or len(health.answered) >= _MAX_ANSWERED


def is_struck(health: Health) -> bool:
    """Return whether failed requests left anything that a good answer ends."""
    blame = health.blame
    return bool(blame.strikes or blame.doubts or blame.lacking_until or health.rest.in_a_row)


def is_refused(health: Health) -> str | None:
    """Return the API path on which the server has to let the gateway in before it gets requests again; `None` if it refuses nothing.

    A process that did not see the refusal itself uses the path that is shared with the reason.
    """
    return health.refused_path or (health.reason_path or CONFIRMING_PATH if health.state is HealthState.MISCONFIGURED else None)
