"""What the pages call the states of a server's health.

`STATES` is the only place that says what a state is called and which tone (color) it has; the style sheet knows the tones.
"""

from collections.abc import Mapping
from enum import StrEnum

import attrs

from multiverse_gateway.core.health import Health, HealthState, needs_attention
from multiverse_gateway.pages.words import sentence, span


class Tone(StrEnum):
    """How good a piece of news is. Each tone is a color; a text always says the same."""

    GOOD = "good"
    WARN = "warn"
    BAD = "bad"
    IDLE = "idle"


@attrs.frozen
class State:
    """The name of a state of health, its tone, and its meaning in a sentence."""

    word: str
    tone: Tone
    meaning: str


STATES: Mapping[HealthState, State] = {
    HealthState.UNHEALTHY: State("Down", Tone.BAD, "The last check or request failed. It gets no requests until a check passes."),
    HealthState.MISCONFIGURED: State("No access", Tone.BAD, "The server refuses the gateway. Its owner must update the key or the tunnel."),
    HealthState.DEACTIVATED: State(
        "Offline", Tone.BAD, "Several checks in a row failed. We retry less often and bring it back automatically."
    ),
    HealthState.SUSPECT: State("In doubt", Tone.WARN, "A request broke off or was slow. Other servers go first until the next check."),
    HealthState.HALF_OPEN: State("Recovering", Tone.WARN, "Answers again. Gets one request at a time until several succeed."),
    HealthState.PROBING: State("Checking", Tone.IDLE, "Just registered. Waiting for its first check."),
    HealthState.HEALTHY: State("Healthy", Tone.GOOD, "Passes its checks. Requests are being routed to it."),
    HealthState.ARCHIVED: State("Archived", Tone.IDLE, "Offline for days and no longer checked. “Check now” brings it back."),
}
ATTENTION = State(
    "Needs attention", Tone.WARN, "Passes its checks but may not have this model. Its owner can correct the name or load the model."
)
"""The state of a server in rotation that may not have its model."""
ORDER = tuple(place for state in STATES.values() for place in ((ATTENTION, state) if state is STATES[HealthState.SUSPECT] else (state,)))
"""Sorting by status follows this order."""


def state_of(health: Health, now: float) -> State:
    """Return what the pages call the state of a server now; `now` is the monotonic clock."""
    return ATTENTION if needs_attention(health, now) else STATES[health.state]


def reason_of(health: Health, now: float) -> str | None:
    """Return a sentence about why a server is down or what limits a healthy one; `None` if there is nothing to report."""
    if health.status != "healthy":
        return None if health.reason is None else sentence(health.reason)
    if health.rest.until > now:
        return "Busy: the server asked for a pause."
    if health.state is HealthState.SUSPECT and health.reason is not None:
        return sentence(health.reason)
    if health.blame.lacking_until > now:
        return "The model was missing a moment ago. Other servers go first."
    if health.blame.doubted_until > now:
        return "Requests of one client failed here. Other servers go first."
    return None if health.warning is None else sentence(health.warning)


def next_check_text(health: Health, now: float) -> str:
    """Return roughly when the next check of a server comes, as the end of a sentence; `now` is the monotonic clock."""
    if health.next_probe.at == float("inf"):
        return "runs only on request"
    wait = health.next_probe.at - now
    return "is due now" if wait <= 1 else f"comes in about {span(wait)}"
