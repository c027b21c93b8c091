"""Which servers there are, and which of them could take a request now.

The table is a value: it is never changed, only replaced as a whole, so every reader sees the state of one moment.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from math import inf
from typing import Protocol

from attrs import define, evolve, field, frozen

from multiverse_gateway.core.aliases import Alias, by_key, models_of
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.fairness import Pool
from multiverse_gateway.core.health import Health, HealthState, is_last, last_until, supports
from multiverse_gateway.core.hosts import Host, all_hosts
from multiverse_gateway.core.needs import Bounds, Needs, bounds_of, can, context_of, fits
from multiverse_gateway.core.servers import HostId, Server, ServerId, model_key

_MAX_COMPARED = 500
_MAX_NAME = 128


class Slots(Protocol):
    """What routing must know of the load."""

    def in_flight(self, server_id: ServerId) -> int:
        """Return the number of attempts that run on the server now."""
        ...

    def host_in_flight(self, host_id: HostId) -> int:
        """Return the number of attempts that run on all servers of the host now."""
        ...


@define(kw_only=True)
class Candidates:
    """The servers that could take a request now.

    `ready` keeps the order of registration; suspect and doubted servers are among them only if no better server is ready. `full`: a
    usable server has as many requests as it may have, so waiting helps. `streaming_unsupported`: a stream is asked for, and no server of
    the model streams. `returns_in` is in seconds: the earliest end of a pause, or the earliest probe. `last_resort` is a server that only
    requests found unhealthy, offered to one request at a time when no other server is left; `last_resort_taken`: that one request runs,
    so waiting a moment helps. `busy`: the servers that work asked for a pause; the status (429, 503) of the one that returns first.
    `resting`: those of them that asked one client only, each with that client. `bounds`: what is to be looked at in the request first.
    Nothing changes it; to freeze it would cost half a microsecond per request.
    """

    ready: Sequence[Server] = ()
    full: bool = False
    streaming_unsupported: bool = False
    returns_in: float | None = None
    last_resort: Server | None = None
    last_resort_taken: bool = False
    busy: int | None = None
    resting: Sequence[tuple[Server, str]] = ()
    bounds: Bounds | None = None

    def ready_for(self, client: str) -> Sequence[Server]:
        """Return the servers that may be asked for a client (key or address) now.

        Where no other server is ready, those are among them that asked another client for a pause: that client's requests may be all that
        the server refuses, and must not take it away from all clients.
        """
        if self.ready or self.full or not self.resting:
            return self.ready
        return [server for server, other in self.resting if other != client]


@frozen
class Route:
    """A server and its health. `host_cap` bounds the requests that run on all servers of its host together."""

    server: Server
    health: Health
    host_cap: int | None = None


@frozen
class Model:
    """A model and its servers, in the order of registration; `name` is for people and lists, and `model_key(name)` is its key.

    The answer of `candidates` for the usual request is made with the model, once per change of any server's health and not once per
    request: with four servers a request then takes a twentieth of the time. It holds from `_everybody_from` on, the end of the last pause.
    `bounds` is what is to be looked at in a request, `None` if nothing is. An alias is a model with `tiers`, the models that it stands for
    in their order, and the servers of all of them.
    """

    name: str
    routes: tuple[Route, ...]
    tiers: tuple["Model", ...] = ()
    bounds: Bounds | None = field(init=False, eq=False, repr=False)
    _everybody: Candidates | None = field(init=False, eq=False, repr=False)
    _everybody_from: float = field(init=False, eq=False, repr=False)

    @bounds.default
    def _find_bounds(self) -> Bounds | None:
        return bounds_of([(route.server, route.health.measured) for route in self.routes if route.health.is_active])

    @_everybody.default
    def _find_everybody(self) -> Candidates | None:
        """Answer `candidates` in advance for the usual case: all are well, without a cap, and stream."""
        if not self.tiers and all(_is_plain(route) for route in self.routes):
            return Candidates(ready=tuple(route.server for route in self.routes), bounds=self.bounds)
        return None

    @_everybody_from.default
    def _find_everybody_from(self) -> float:
        pauses = [max(route.health.rest.until, last_until(route.health)) for route in self.routes]
        return max([*pauses, *(until for route in self.routes for _, until in route.health.unsupported)], default=-inf)

    def everybody(self, now: float) -> Candidates | None:
        """Return all servers if every one of them can take any request now."""
        return self._everybody if now >= self._everybody_from else None

    def suited(self, needs: Needs, excluded: Collection[ServerId] = ()) -> "Model":
        """Return the model with only those servers that can do what a request needs, itself if no server can.

        Of those, only the servers in rotation whose context has room for the text, or the ones with the largest context if none has room;
        the servers that were tried already (`excluded`) do not count for that. For an alias, the servers of all its models count together.
        """
        able = tuple(route for route in self.routes if can(route.health.measured, needs.abilities))
        routes = able if any(route.health.is_active for route in able) else self.routes
        if needs.characters:
            routes = _roomy(routes, needs, excluded)
        if routes == self.routes:
            return self
        ids = {route.server.id for route in routes}
        tiers = [Model(tier.name, tuple(route for route in tier.routes if route.server.id in ids)) for tier in self.tiers]
        return Model(self.name, routes, tuple(tier for tier in tiers if tier.routes))


def _roomy(routes: tuple[Route, ...], needs: Needs, excluded: Collection[ServerId]) -> tuple[Route, ...]:
    """Return the servers in rotation that have room for a text, or the most room; all servers if none is in rotation."""
    usable = {
        route.server.id: context_of(route.server, route.health.measured)
        for route in routes
        if route.health.status == "healthy" and route.server.id not in excluded
    }
    roomy = {server_id for server_id, context in usable.items() if fits(needs, context)}
    if usable and not roomy:
        largest = max(context for context in usable.values() if context is not None)
        roomy = {server_id for server_id, context in usable.items() if context == largest}
    return tuple(route for route in routes if route.server.id in roomy) or routes


def _is_plain(route: Route) -> bool:
    server = route.server
    has_cap = server.max_concurrency is not None or route.host_cap is not None
    return route.health.state is HealthState.HEALTHY and not has_cap and server.capabilities.streaming


@frozen
class RoutingTable:
    """Everything that routing knows, at one moment: models by `model_key`. `version` is that of the registry it was made from."""

    version: int
    models: Mapping[str, Model]
    routes: Mapping[ServerId, Route]
    hosts: Mapping[HostId, Host] = field(factory=dict)
    _ids: Mapping[HostId, Sequence[ServerId]] = field(factory=dict)
    aliases: Mapping[str, Model] = field(factory=dict)

    def find(self, key: str) -> Model | None:
        """Return the alias or the model with a key; an alias hides a model of the same name."""
        return self.aliases.get(key) or self.models.get(key)

    def routes_of(self, host_id: HostId) -> list[Route]:
        """Return the routes of a host's servers, in the order of registration."""
        return [self.routes[server_id] for server_id in self._ids.get(host_id, ())]


def pools_of(table: RoutingTable) -> dict[Hashable, Pool]:
    """Return the slots of the hosts that have a server in rotation, by host; a half-open server has one.

    >>> from multiverse_gateway.core.health import fresh
    >>> server = Server(id="a", model_name="llama", endpoint_url="http://a", max_concurrency=4, registered_at=0, created_at=0, updated_at=0)
    >>> pools_of(build_table(1, [server], {"a": fresh(1, now=0, wall=0)}))
    {'a': Pool(models=('llama',), slots=4)}
    """
    by_host: dict[HostId, list[Route]] = {}
    for route in table.routes.values():
        if route.health.status == "healthy":
            by_host.setdefault(route.server.host_id, []).append(route)
    names: dict[ServerId, list[str]] = {}
    for key, alias in table.aliases.items():
        for route in alias.routes:
            names.setdefault(route.server.id, []).append(key)
    return {host_id: _pool_of(routes, names) for host_id, routes in by_host.items()}


def _pool_of(routes: Sequence[Route], aliases: Mapping[ServerId, Sequence[str]]) -> Pool:
    """Return the slots that the servers of one host share: its cap, or what their own caps leave of it."""
    caps = {model_key(route.server.model_name): _cap(route) for route in routes}
    own = None if None in caps.values() else sum(cap for cap in caps.values() if cap is not None)
    slots = min((cap for cap in (own, routes[0].host_cap) if cap is not None), default=None)
    for route in routes:
        for alias in aliases.get(route.server.id, ()):
            caps[alias] = _more(caps.get(alias, 0), _cap(route))
    less = {model: cap for model, cap in caps.items() if cap is not None and (slots is None or cap < slots)}
    return Pool(tuple(caps), slots, less if len(caps) > 1 else {}, is_one_model=len(routes) == 1)


def _more(cap: int | None, other: int | None) -> int | None:
    return None if cap is None or other is None else cap + other


def listed_name(table: RoutingTable, name: str) -> str:
    """Return the name by which a model or an alias is listed, however it is written; the same name for one that is not known.

    >>> server = Server(id="a", model_name="llama:latest", endpoint_url="http://a", registered_at=0, created_at=0, updated_at=0)
    >>> listed_name(build_table(1, [server], {}), "llama"), listed_name(build_table(1, [], {}), "llama")
    ('llama:latest', 'llama')
    """
    model = table.find(model_key(name))
    return name if model is None else model.name


def build_table(
    version: int,
    servers: Iterable[Server],
    health: Mapping[ServerId, Health],
    hosts: Iterable[Host] = (),
    aliases: Iterable[Alias] = (),
) -> RoutingTable:
    """Make the table of these servers; one whose health is missing, or of another generation, starts unproven.

    `hosts` are those that were saved, `aliases` those that were defined.

    >>> server = Server(id="a", model_name="llama", endpoint_url="http://a", registered_at=0, created_at=0, updated_at=0)
    >>> table = build_table(1, [server], {})
    >>> table.models["llama"].routes[0].health.state
    <HealthState.PROBING: 'probing'>
    """
    routes: dict[ServerId, Route] = {}
    models: dict[str, list[Route]] = {}
    servers = sorted(servers, key=lambda server: (server.registered_at, server.id))
    known_hosts = all_hosts(servers, hosts)
    ids: dict[HostId, list[ServerId]] = {}
    for server in servers:
        known_health = health.get(server.id)
        if known_health is None or known_health.generation != server.generation:
            known_health = Health(generation=server.generation)
        route = routes[server.id] = Route(server, known_health, known_hosts[server.host_id].max_concurrency)
        models.setdefault(model_key(server.model_name), []).append(route)
        ids.setdefault(server.host_id, []).append(server.id)
    by_name = {key: Model(_name(key, group), tuple(group)) for key, group in models.items()}
    known_aliases = by_key(aliases)
    stand_for = {
        key: _alias_model(alias.name, [by_name[member] for member in models_of(key, known_aliases) if member in by_name])
        for key, alias in known_aliases.items()
    }
    return RoutingTable(version, by_name, routes, known_hosts, ids, stand_for)


def _alias_model(name: str, tiers: Sequence[Model]) -> Model:
    return Model(name, tuple(route for tier in tiers for route in tier.routes), tuple(tiers))


def _name(key: str, routes: Iterable[Route]) -> str:
    """Return the name that all servers of a model are registered with, or its key if they differ."""
    names = {route.server.model_name for route in routes}
    return names.pop() if len(names) == 1 else key


def with_health(table: RoutingTable, server_id: ServerId, health: Health) -> RoutingTable:
    """Return the table with a server's health replaced; the same table when the server is not in it."""
    old = table.routes.get(server_id)
    if old is None:
        return table
    new = Route(old.server, health, old.host_cap)
    key = model_key(old.server.model_name)
    model = table.models[key]
    changed = Model(model.name, tuple(new if route is old else route for route in model.routes))
    aliases = {
        name: _alias_model(alias.name, tiers) if any(tier is changed for tier in tiers) else alias
        for name, alias in table.aliases.items()
        for tiers in [[changed if tier is model else tier for tier in alias.tiers]]
    }
    return evolve(table, models={**table.models, key: changed}, routes={**table.routes, server_id: new}, aliases=aliases)


def candidates(model: Model, load: Slots, *, stream: bool, path: str, excluded: Collection[ServerId], now: float) -> Candidates:
    """Return the servers that could take a request to the API path now; `excluded` were tried already, `now` is monotonic.

    A server that is known not to support the path is offered only when no other is usable: its own answer then says so best.
    """
    if not excluded:
        everybody = model.everybody(now)
        if everybody is not None:
            return everybody
    if model.tiers:
        return _first_tier(model, load, stream, path, excluded, now)
    return _sort_out(model, load, stream, path, excluded, now)


def _first_tier(model: Model, load: Slots, stream: bool, path: str, excluded: Collection[ServerId], now: float) -> Candidates:
    """Return the servers of the first model of an alias that has a free slot, or else of the first that has a usable server."""
    all_found = [candidates(tier, load, stream=stream, path=path, excluded=excluded, now=now) for tier in model.tiers]
    found = next((found for found in all_found if found.ready), None) or next((found for found in all_found if found.full), None)
    if found is None:
        found = next((found for found in all_found if found.last_resort or found.last_resort_taken), None)
    return _sort_out(model, load, stream, path, excluded, now) if found is None else evolve(found, bounds=model.bounds)


class _NoLoad:
    """The load as a request sees it that needs no slot."""

    def in_flight(self, server_id: ServerId) -> int:
        """Return 0: without counts no server is busier than another."""
        return 0

    def host_in_flight(self, host_id: HostId) -> int:
        """Return 0: without counts no host is busier than another."""
        return 0


_NO_LOAD = _NoLoad()


def server_at(server: Server, model: Model | None) -> Server | None:
    """Return the server of a model that is the same as another one, or runs at the same URL: it has the same stored responses."""
    servers = [] if model is None else [route.server for route in model.routes]
    if any(other.id == server.id for other in servers):
        return server
    return next((other for other in servers if other.endpoint_url == server.endpoint_url), None)


def candidates_at(model: Model, load: Slots, envelope: Envelope, *, excluded: Collection[ServerId], now: float) -> Candidates | None:
    """Return whether the server that a request is bound to could take it now; `None` when that server is gone or was changed.

    A request for what is stored needs no slot: it takes a moment, and has to be able to end one that holds the only slot.
    """
    bound = (envelope.server_id, envelope.generation)
    routes = tuple(route for route in model.routes if (route.server.id, route.server.generation) == bound)
    if not routes:
        return None
    slots = _NO_LOAD if envelope.is_lookup else load
    return candidates(Model(model.name, routes), slots, stream=envelope.stream, path=envelope.path, excluded=excluded, now=now)


class Verdict(StrEnum):
    """Whether a server could take a request now, or why not."""

    READY = "ready"
    LAST = "ready, but chosen last"
    TRIED = "tried already"
    NO_STREAMS = "does not stream"
    ILL = "not healthy"
    RESTING = "asked for a pause"
    FULL = "is at its concurrency limit"
    UNSUPPORTED = "does not support this call"
    UNSUITED = "cannot do what the request needs, or has too little context"


_READY, _LAST, _TRIED, _NO_STREAMS, _ILL, _RESTING, _FULL, _UNSUPPORTED, _ = Verdict  # a look-up in an enum costs as much as a call
_HALF_OPEN = HealthState.HALF_OPEN


def verdict(route: Route, load: Slots, *, stream: bool, path: str, excluded: Collection[ServerId], now: float) -> Verdict:
    """Return whether one server can be chosen now, and how willingly."""
    server, health = route.server, route.health
    if server.id in excluded:
        return _TRIED
    if stream and not server.capabilities.streaming:
        return _NO_STREAMS
    if health.status != "healthy":
        return _ILL
    if health.rest.until > now:
        return _RESTING
    if not has_slot(route, load):
        return _FULL
    if health.unsupported and not supports(health, path, now):
        return _UNSUPPORTED
    return _LAST if is_last(health, now) else _READY


def _sort_out(model: Model, load: Slots, stream: bool, path: str, excluded: Collection[ServerId], now: float) -> Candidates:
    ready: list[Server] = []
    last: list[Server] = []
    reluctant: list[Server] = []
    suspects: list[Route] = []
    full = False
    resting: list[Route] = []
    returns_at = inf
    for route in model.routes:
        health = route.health
        outcome = verdict(route, load, stream=stream, path=path, excluded=excluded, now=now)
        if outcome is _READY:
            ready.append(route.server)
        elif outcome is _LAST:
            last.append(route.server)
        elif outcome is _ILL:
            returns_at = min(returns_at, health.next_probe.at)
            if health.state is HealthState.UNHEALTHY and health.by_traffic and health.rest.until <= now:
                suspects.append(route)
        elif outcome is _RESTING:
            returns_at = min(returns_at, health.rest.until)
            resting.append(route)
        elif outcome is _FULL:
            full = full or supports(health, path, now)
        elif outcome is _UNSUPPORTED:
            reluctant.append(route.server)
    ready = ready or last
    if not ready and not full and not resting:
        ready = reluctant
    if ready:
        return Candidates(ready=tuple(ready), full=full, bounds=model.bounds)
    last_resort = None if full else _last_resort(model, suspects, load)
    return Candidates(
        full=full,
        busy=None if full else _asked_by([route.health for route in resting]),
        resting=tuple(
            (route.server, route.health.rest.client) for route in resting if route.health.rest.client is not None and has_slot(route, load)
        ),
        streaming_unsupported=stream and _streams_nowhere(model),
        returns_in=None if returns_at == inf else max(0.0, returns_at - now),
        last_resort=last_resort,
        last_resort_taken=bool(suspects) and last_resort is None and not full,
        bounds=model.bounds,
    )


def _asked_by(resting: Sequence[Health]) -> int | None:
    """Return the status with which the server that returns first asked for its pause."""
    return min(resting, key=lambda health: health.rest.until).rest.status if resting else None


def _cap(route: Route) -> int | None:
    """Return how many requests a server may have now."""
    return 1 if route.health.state is _HALF_OPEN else route.server.max_concurrency


def has_slot(route: Route, load: Slots) -> bool:
    """Return whether a server and its host may have one more request now."""
    cap, server = _cap(route), route.server
    if cap is not None and load.in_flight(server.id) >= cap:
        return False
    return route.host_cap is None or load.host_in_flight(server.host_id) < route.host_cap


def _last_resort(model: Model, suspects: Sequence[Route], load: Slots) -> Server | None:
    """Return the least recently failed suspect, unless a request of any client runs on an unhealthy server of the model."""
    unhealthy = (route.server.id for route in model.routes if route.health.state is HealthState.UNHEALTHY)
    if not suspects or any(load.in_flight(server_id) for server_id in unhealthy):
        return None
    return min(suspects, key=lambda route: route.health.blame.struck_at).server


def _streams_nowhere(model: Model) -> bool:
    streaming = [route.server.capabilities.streaming for route in model.routes if route.health.is_active]
    return bool(streaming) and not any(streaming)


def close_names(name: str, names: Collection[str]) -> list[str]:
    """Return at most three names that a client that wrote `name` may have meant, the closest first.

    >>> close_names("Lama3", ["llama3", "phi-4"])
    ['llama3']
    """
    lowered: dict[str, str] = {}
    for candidate in list(names)[:_MAX_COMPARED]:
        lowered.setdefault(candidate.lower(), candidate)
    return [lowered[close] for close in get_close_matches(name[:_MAX_NAME].lower(), lowered, n=3, cutoff=0.6)]
