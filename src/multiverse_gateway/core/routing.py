"""Which servers may serve a request: a frozen table, read by every request and swapped as a whole."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs

from multiverse_gateway.core.health import Health, HealthState, is_usable
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.servers import Server, ServerId


@attrs.frozen
class Route:
    """A server and what is known of its health."""

    server: Server
    health: Health


@attrs.frozen
class Model:
    """A model and its servers in the order of their registration."""

    name: str
    routes: tuple[Route, ...]


@attrs.frozen
class RoutingTable:
    """Everything that routing needs, as of one version of the registry."""

    version: int
    models: Mapping[str, Model]
    routes: Mapping[ServerId, Route]


@attrs.frozen(kw_only=True)
class Candidates:
    """Who could serve a request now.

    `full` tells that a usable server is at its cap, `returns_in` the seconds until the first one may come back, `last_resort` a server
    that fell by traffic only and may be tried when there is nobody else.
    """

    ready: Sequence[Server]
    full: bool = False
    streaming_unsupported: bool = False
    returns_in: float | None = None
    last_resort: Server | None = None


def build_table(version: int, servers: Iterable[Server], health: Mapping[ServerId, Health]) -> RoutingTable:
    """Build the table; a server without health is one that was never probed."""
    routes: dict[ServerId, Route] = {}
    models: dict[str, list[Route]] = {}
    for server in sorted(servers, key=lambda server: (server.registered_at, server.id)):
        route = Route(server, health.get(server.id) or Health(generation=server.generation))
        routes[server.id] = route
        models.setdefault(server.model_name, []).append(route)
    return RoutingTable(version, {name: Model(name, tuple(of_model)) for name, of_model in models.items()}, routes)


def with_health(table: RoutingTable, server_id: ServerId, health: Health) -> RoutingTable:
    """Return the table with one server's health replaced."""
    before = table.routes[server_id]
    after = Route(before.server, health)
    model = table.models[before.server.model_name]
    changed = Model(model.name, tuple(after if route is before else route for route in model.routes))
    return RoutingTable(table.version, {**table.models, model.name: changed}, {**table.routes, server_id: after})


def candidates(model: Model, load: Load, *, stream: bool, path: str, excluded: Collection[ServerId], now: float) -> Candidates:
    """Sort a model's servers for one request at the monotonic instant `now`."""
    ready: list[Server] = []
    full = False
    for route in model.routes:
        server, health = route.server, route.health
        if server.id in excluded or (stream and not server.capabilities.streaming) or not is_usable(health, path, now):
            continue
        cap = 1 if health.state is HealthState.HALF_OPEN else server.max_concurrency
        if cap is not None and load.in_flight(server.id) >= cap:
            full = True
        else:
            ready.append(server)
    if ready or full:
        return Candidates(ready=ready, full=full)
    return _nobody(model, load, stream=stream, excluded=excluded, now=now)


def _nobody(model: Model, load: Load, *, stream: bool, excluded: Collection[ServerId], now: float) -> Candidates:
    left = [route for route in model.routes if not stream or route.server.capabilities.streaming]
    returns = [instant - now for route in left if (instant := _returns_at(route.health, now)) < math.inf]
    fallen = [
        route
        for route in left
        if route.health.state is HealthState.UNHEALTHY and route.health.by_traffic and route.server.id not in excluded
    ]
    idle = all(load.in_flight(route.server.id) == 0 for route in fallen)
    oldest = min(fallen, key=lambda route: route.health.struck_at, default=None) if idle else None
    return Candidates(
        ready=(),
        streaming_unsupported=stream and not left,
        returns_in=max(0.0, min(returns)) if returns else None,
        last_resort=None if oldest is None else oldest.server,
    )


def _returns_at(health: Health, now: float) -> float:
    return health.resting_until if health.resting_until > now else health.probe_at


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that somebody may have meant."""
    return difflib.get_close_matches(name, list(names), n=5, cutoff=0.5)
