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
    HealthState.UNHEALTHY: State("Down", Tone.BAD, "It failed; it gets no requests and comes back by itself once a check passes."),
    HealthState.MISCONFIGURED: State("No access", Tone.BAD, "It answers but refuses the gateway; its owner can fix its key or tunnel."),
    HealthState.DEACTIVATED: State(
        "Taken out", Tone.BAD, "It failed several checks in a row; it is checked less often, and comes back by itself."
    ),
    HealthState.SUSPECT: State(
        "In doubt", Tone.WARN, "It broke off a request or answers late; a check decides, and until then others go first."
    ),
    HealthState.HALF_OPEN: State("Recovering", Tone.WARN, "It answers again and gets one request at a time until it has proven itself."),
    HealthState.PROBING: State("Checking", Tone.IDLE, "It was just registered and waits for its first check."),
    HealthState.HEALTHY: State("Healthy", Tone.GOOD, "It answers its checks and takes requests."),
    HealthState.ARCHIVED: State("Archived", Tone.IDLE, "It was silent for days and is not checked any more; Check now brings it back."),
}
ATTENTION = State(
    "Needs attention", Tone.WARN, "It answers its checks but may not have this model; its owner can correct the name or load the model."
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
        return "Busy: it asked for a pause."
    if health.state is HealthState.SUSPECT and health.reason is not None:
        return sentence(health.reason)
    if health.blame.lacking_until > now:
        return "It did not have the model a moment ago; other servers are chosen first."
    if health.blame.doubted_until > now:
        return "Requests of one client failed here; other servers are chosen first."
    return None if health.warning is None else sentence(health.warning)


def next_check_text(health: Health, now: float) -> str:
    """Return roughly when the next check of a server comes, as the end of a sentence; `now` is the monotonic clock."""
    if health.next_probe.at == float("inf"):
        return "comes only when somebody asks for it"
    wait = health.next_probe.at - now
    return "is due now" if wait <= 1 else f"comes in about {span(wait)}"
