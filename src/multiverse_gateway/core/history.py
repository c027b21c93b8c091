"""What the last probes of a server say about it, as figures and in words for people."""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import attrs


class CheckResult(Protocol):
    """One probe, as far as it matters here."""

    @property
    def passed(self) -> bool:
        """Return whether the server answered well."""
        ...

    @property
    def checked_at(self) -> float:
        """Return the instant of the probe, in epoch seconds."""
        ...

    @property
    def duration(self) -> float:
        """Return how long the probe took, in seconds."""
        ...


@attrs.frozen(kw_only=True)
class Statistics:
    """Figures over the checks that are kept (the last 100); `None` where there is nothing to count.

    `success_rate` is a fraction, 0 to 1. `mean_response_time` is in seconds, over passed checks. `uptime_percentage` weighs each
    verdict by the time for which it held, 0 to 100.
    """

    checks: int = 0
    success_rate: float | None = None
    mean_response_time: float | None = None
    uptime_percentage: float | None = None


def statistics(checks: Sequence[CheckResult], *, wall: float) -> Statistics:
    """Sum up checks, in any order; `wall` is the present instant in epoch seconds, until which the last verdict holds.

    >>> statistics([], wall=0.0).success_rate is None
    True
    """
    if not checks:
        return Statistics()
    durations = [check.duration for check in checks if check.passed]
    return Statistics(
        checks=len(checks),
        success_rate=round(len(durations) / len(checks), 4),
        mean_response_time=sum(durations) / len(durations) if durations else None,
        uptime_percentage=round(100 * _uptime(sorted(checks, key=lambda check: check.checked_at), wall), 2),
    )


def _uptime(checks: Sequence[CheckResult], wall: float) -> float:
    """Return the part of the time since the first check in which the latest verdict was good; clocks may have jumped."""
    ends = [*(check.checked_at for check in checks[1:]), max(wall, checks[-1].checked_at)]
    spans = [(check.passed, max(0.0, end - check.checked_at)) for check, end in zip(checks, ends, strict=True)]
    total = sum(span for _, span in spans)
    if total <= 0:
        return sum(check.passed for check in checks) / len(checks)
    return sum(span for passed, span in spans if passed) / total


def overall(statuses: Iterable[str]) -> Literal["healthy", "degraded", "unhealthy", "empty"]:
    """Return the state of the whole registry in one word, from each active server's health status.

    >>> overall(["healthy", "unhealthy"])
    'degraded'
    """
    kinds = set(statuses)
    if not kinds:
        return "empty"
    if kinds == {"healthy"}:
        return "healthy"
    return "degraded" if "healthy" in kinds else "unhealthy"
