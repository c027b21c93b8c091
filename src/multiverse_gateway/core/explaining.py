"""Why a request went to a server: what each server was judged as, and what the balancer compared.

For `x-multiverse-explain`, and for the log at its most detailed level.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.routing import Model, Route, Verdict, verdict
from multiverse_gateway.core.servers import Server, ServerId

MAX_EXPLAINED: Final = 20
"""Servers that an explanation mentions; it has to fit into a header."""
MAX_LOGGED: Final = 8
"""Servers that a line of the log mentions."""


def judged(
    model: Model | None, load: Load, envelope: Envelope, *, excluded: Collection[ServerId], now: float
) -> list[tuple[Route, Verdict]]:
    """Return what each server of a model is judged as for a request; of a request for one server only that one."""
    if model is None:
        return []
    suited = model if envelope.needs is None else model.suited(envelope.needs, excluded)
    return [
        (
            route,
            verdict(route, load, stream=envelope.stream, path=envelope.path, excluded=excluded, now=now)
            if route in suited.routes
            else Verdict.UNSUITED,
        )
        for route in model.routes
        if envelope.server_id in (None, route.server.id)
    ]


def compared(servers: Sequence[tuple[Route, Verdict]]) -> Sequence[Server]:
    """Return the servers among which the balancer chooses: the ready ones, or the last ones if no server is ready."""
    ready = [route.server for route, outcome in servers if outcome is Verdict.READY]
    return ready or [route.server for route, outcome in servers if outcome is Verdict.LAST]


def described(servers: Sequence[tuple[Route, Verdict]], load: Load, scores: Mapping[ServerId, float]) -> list[Mapping[str, object]]:
    """Return what is shown of each server; `scores` are the figures of the balancer, if it has any."""
    return [
        {
            "server": route.server.id,
            "verdict": str(outcome),
            "state": route.health.state.value,
            "in_flight": load.in_flight(route.server.id),
            "latency": _rounded(load.latency(route.server.id)),
            "share": load.traffic_share(route.server.id),
            "weight": route.server.weight,
            "score": _rounded(scores.get(route.server.id)),
        }
        for route, outcome in servers[:MAX_EXPLAINED]
    ]


def as_line(choices: Sequence[Mapping[str, Any]]) -> str:
    """Write down why servers were chosen, short enough for a line of the log.

    >>> candidate = {"server": "4f1c33a2-77", "verdict": "ready", "score": 0.5}
    >>> as_line([{"server": "4f1c33a2-77", "balancer": "least-busy", "candidates": [candidate]}])
    '4f1c33a2 by least-busy of: 4f1c33a2 ready (0.5)'
    """
    lines = []
    for choice in choices:
        others = ", ".join(
            f"{candidate['server'][:8]} {candidate['verdict']}" + ("" if candidate["score"] is None else f" ({candidate['score']:g})")
            for candidate in choice["candidates"][:MAX_LOGGED]
        )
        lines.append(f"{choice['server'][:8]} by {choice['balancer']} of: {others}")
    return "; ".join(lines)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
