"""What a server's health means for the requests that it gets."""

from __future__ import annotations

from multiverse_gateway.core.health import Health
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.routing import Route, Verdict, verdict
from multiverse_gateway.testing.store import make_server


def is_usable(health: Health, path: str, now: float) -> bool:
    """Return whether requests to the API path may go to a server of this health that runs none."""
    judged = verdict(Route(make_server(), health), Load(), stream=False, path=path, excluded=(), now=now)
    return judged in (Verdict.READY, Verdict.LAST)
