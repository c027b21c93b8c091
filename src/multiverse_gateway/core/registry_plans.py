"""What a registration, a change or an import makes of the registered servers.

1. Servers are the same if they have the same URL and the same model, in any spelling of its name (`model_key`). There is never a second
   one: registering it again updates the first, and a change that would make another server's pair is rejected.
2. A new name, URL or key begins a new generation; results that belong to an older one do not count.
3. A key that an import does not name stays. An owner's token stays if the server is registered again.
4. The loopback address that was opened for a server is closed when its URL changes; no registration, change or import opens one.

Nothing here is saved: the caller holds the lock, passes what the store holds, and saves the plan.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import attrs

from multiverse_gateway.core.caps import Cap, Stated, cap_of
from multiverse_gateway.core.errors import AlreadyRegistered, InvalidField
from multiverse_gateway.core.hosts import Host
from multiverse_gateway.core.servers import Capabilities, HostId, Metadata, Server, ServerId, identity, model_key

DESCRIBED = ("model_name", "endpoint_url", "api_key", "capabilities", "metadata", "max_concurrency", "weight", "upstream_model")
"""The attributes of a server that its host states; the others are the gateway's."""


class Description(Protocol):
    """A server as its host states it: a registration, or a server that is registered."""

    @property
    def model_name(self) -> str:
        """Return the name of its model."""
        ...

    @property
    def endpoint_url(self) -> str:
        """Return the canonical URL of the wanted server."""
        ...

    @property
    def api_key(self) -> str | None:
        """Return its own key in clear text."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """Return what it can do."""
        ...

    @property
    def metadata(self) -> Metadata:
        """Return the texts about its host."""
        ...

    @property
    def max_concurrency(self) -> int | None:
        """Return how many requests it gets at once, `None` for any number."""
        ...

    @property
    def upstream_model(self) -> str | None:
        """Return what its engine calls the model, `None` for the same name."""
        ...

    @property
    def weight(self) -> int:
        """Return its share of the traffic with the balancer `weighted`."""
        ...


def described(description: Description) -> dict[str, Any]:
    """Return the attributes of a server that its host states, by name."""
    return {name: getattr(description, name) for name in DESCRIBED}


def new_server(
    description: Description,
    *,
    server_id: ServerId,
    wall: float,
    registered_at: float | None = None,
    owner_digest: str | None = None,
    opened_address: str | None = None,
) -> Server:
    """Return a server of the first generation; `registered_at` is `wall` by default, and never later than that."""
    since = wall if registered_at is None else min(registered_at, wall)
    return Server(
        id=server_id,
        registered_at=since,
        created_at=since,
        updated_at=wall,
        owner_digest=owner_digest,
        opened_address=opened_address,
        **described(description),
    )


def pair_of(description: Description) -> tuple[str, str]:
    """Return what two registrations of one server have in common."""
    return model_key(description.model_name), description.endpoint_url


def with_same_pair(servers: Iterable[Server], wanted: Description) -> Server | None:
    """Return the registered server that a description is about, if there is one."""
    pair = pair_of(wanted)
    return next((server for server in servers if pair_of(server) == pair), None)


@attrs.frozen(kw_only=True)
class RegistrationPlan:
    """The server to save, whether it is a new one, and how many requests it gets at once and why."""

    server: Server
    is_new: bool
    cap: Cap


def plan_registration(servers: Iterable[Server], wanted: Server, *, stated: Stated | None) -> RegistrationPlan:
    """Return what a registration makes of the servers; `wanted` is the server that it makes if there is none of its pair.

    An existing server gets all that the registration states, and keeps its id and the token of its owner. `stated` is what its engine
    states about requests at once, `None` if the registration says something about them itself.
    """
    existing = with_same_pair(servers, wanted)
    cap = cap_of(stated, wanted=wanted.max_concurrency, existing=existing)
    if existing is None:
        return RegistrationPlan(server=attrs.evolve(wanted, max_concurrency=cap.limit), is_new=True, cap=cap)
    server = attrs.evolve(
        existing,
        **described(wanted) | {"max_concurrency": cap.limit},
        generation=_next_generation(existing, wanted),
        updated_at=wanted.updated_at,
        owner_digest=existing.owner_digest or wanted.owner_digest,
        opened_address=existing.opened_address or wanted.opened_address,
    )
    return RegistrationPlan(server=server, is_new=False, cap=cap)


@attrs.frozen(kw_only=True)
class ChangePlan:
    """The server as it will be, whether a probe must pass before that, and whether there is anything to save."""

    server: Server
    needs_probe: bool
    is_change: bool


def plan_change(servers: Iterable[Server], current: Server, wanted: Server, *, is_active: bool, wall: float) -> ChangePlan:
    """Return what a change of `current` to `wanted` means; a server that was taken out (not `is_active`) is probed in any case.

    Raises:
        AlreadyRegistered: Another server has the wanted URL and model.
    """
    other = with_same_pair(servers, wanted)
    if other is not None and other.id != current.id:
        raise AlreadyRegistered(other.id)
    needs_probe = identity(wanted) != identity(current) or not is_active
    opened_address = _still_opened(current, wanted)
    server = attrs.evolve(wanted, generation=_next_generation(current, wanted), updated_at=wall, opened_address=opened_address)
    return ChangePlan(server=server, needs_probe=needs_probe, is_change=needs_probe or wanted != current)


@attrs.frozen(kw_only=True)
class Change:
    """What a partial body names, by attribute of `Server`, `Capabilities` and `Metadata`; the rest stays."""

    fields: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    capabilities: Mapping[str, Any] = attrs.field(factory=dict)
    metadata: Mapping[str, Any] = attrs.field(factory=dict)

    def apply(self, server: Server) -> Server:
        """Return the server as it will be, its generation and times untouched."""
        return attrs.evolve(
            server,
            **self.fields,
            capabilities=attrs.evolve(server.capabilities, **self.capabilities),
            metadata=attrs.evolve(server.metadata, **self.metadata),
        )


@attrs.frozen(kw_only=True)
class HostChange:
    """What a partial body names, by attribute of `Host`; the rest stays."""

    fields: Mapping[str, Any] = attrs.field(factory=dict, repr=False)


@attrs.frozen(kw_only=True)
class HostPlan:
    """A host and its servers as they will be, whether a probe must pass before that, and whether there is anything to save."""

    host: Host
    servers: tuple[Server, ...]
    needs_probe: bool
    is_change: bool


def plan_host_change(
    servers: Sequence[Server], hosts: Iterable[Host], host: Host, change: HostChange, *, is_active: bool, wall: float
) -> HostPlan:
    """Return what a change of a host means for it and its servers; one whose servers were all taken out is probed (not `is_active`).

    Servers with the cap of the host get its new one; those with another one keep that.

    Raises:
        AlreadyRegistered: Another host has a server with the wanted URL and the same model.
        InvalidField: Another host has the wanted owner, URL and key.
    """
    wanted = attrs.evolve(host, **change.fields)
    if _reached(wanted) != _reached(host) and any(_reached(other) == _reached(wanted) for other in hosts if other.id != host.id):
        raise InvalidField("endpoint_url", " is that of another host with this owner and key; change or remove that one")
    others = [server for server in servers if server.host_id != host.id]
    known = [server for server in servers if server.host_id == host.id]
    changed = tuple(_with_host_change(server, host, wanted, wall) for server in known)
    for server in changed:
        other = with_same_pair(others, server)
        if other is not None:
            raise AlreadyRegistered(other.id)
    is_other = any(identity(server) != identity(before) for server, before in zip(changed, known, strict=True))
    needs_probe = bool(known) and (is_other or not is_active)
    is_change = needs_probe or wanted != host or any(server not in known for server in changed)
    return HostPlan(host=attrs.evolve(wanted, updated_at=wall), servers=changed, needs_probe=needs_probe, is_change=is_change)


def _reached(host: Host) -> tuple[str | None, str, str | None]:
    return host.owner, host.endpoint_url, host.api_key


def _with_host_change(server: Server, host: Host, wanted: Host, wall: float) -> Server:
    after = attrs.evolve(
        server,
        endpoint_url=wanted.endpoint_url,
        api_key=wanted.api_key,
        metadata=attrs.evolve(server.metadata, student_id=wanted.owner),
        max_concurrency=wanted.max_concurrency if server.max_concurrency == host.max_concurrency else server.max_concurrency,
    )
    if after == server:
        return server
    generation, opened_address = _next_generation(server, after), _still_opened(server, after)
    return attrs.evolve(after, generation=generation, opened_address=opened_address, updated_at=wall)


@attrs.frozen(kw_only=True)
class Imported:
    """One server of an import; `id` and `registered_at` if they were given, and whether it names a key at all."""

    registration: Description
    id: ServerId | None = None
    registered_at: float | None = None
    has_key: bool = False


@attrs.frozen(kw_only=True)
class ImportedHost:
    """The cap of one host of an import, `None` for none; its `servers` are positions in the list of imported servers."""

    servers: tuple[int, ...]
    max_concurrency: int | None


@attrs.frozen(kw_only=True)
class ImportedRegistry:
    """Everything that an import states; `aliases` are names with their models."""

    servers: tuple[Imported, ...]
    hosts: tuple[ImportedHost, ...] = ()
    aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()


def imported_caps(servers: Iterable[Server], wanted: ImportedRegistry) -> dict[HostId, int | None]:
    """Return the caps that an import states, by host; `servers` are those that are registered once its servers are."""
    hosts = {pair_of(server): server.host_id for server in servers}
    return {hosts[pair_of(wanted.servers[number].registration)]: host.max_concurrency for host in wanted.hosts for number in host.servers}


@attrs.frozen(kw_only=True)
class ImportPlan:
    """The servers to save, in this order, and how many of the imported ones are new, changed and as they were.

    `aliases` is how many aliases are new or changed, `None` if the import states none.
    """

    saves: tuple[Server, ...]
    created: int
    updated: int
    unchanged: int
    aliases: int | None = None


def plan_import(
    servers: Iterable[Server], removed: Collection[ServerId], items: Sequence[Imported], *, wall: float, new_id: Callable[[], ServerId]
) -> ImportPlan:
    """Return what an import makes of the servers: one is found by its pair, or else by its id.

    A new server keeps the id it had where it was exported, unless a server with this id was removed here (`removed`): then it gets a
    new one, because a removed server never comes back.
    """
    registered: dict[ServerId, Server] = {server.id: server for server in servers}
    ids = {pair_of(server): server.id for server in registered.values()}
    saves: list[Server] = []
    created = 0
    for item in items:
        current = _found(registered, ids, item)
        if current is None:
            server_id = item.id if item.id is not None and item.id not in removed else new_id()
            server = new_server(item.registration, server_id=server_id, wall=wall, registered_at=item.registered_at)
            created += 1
        else:
            server = _merged(current, item)
            if server == current:
                continue
            server = attrs.evolve(server, updated_at=wall)
            ids.pop(pair_of(current), None)  # absent if two servers shared a pair, as versions that compared whole names allowed
        registered[server.id] = server
        ids[pair_of(server)] = server.id
        saves.append(server)
    return ImportPlan(saves=tuple(saves), created=created, updated=len(saves) - created, unchanged=len(items) - len(saves))


def opened_for(servers: Iterable[Server], item: Imported) -> str | None:
    """Return the loopback address that is open for the server which an imported item keeps at its URL, if there is one."""
    wanted = item.registration
    kept = (server for server in servers if server.endpoint_url == wanted.endpoint_url)
    return next((server.opened_address for server in kept if server.id == item.id or pair_of(server) == pair_of(wanted)), None)


def _found(registered: Mapping[ServerId, Server], ids: Mapping[tuple[str, str], ServerId], item: Imported) -> Server | None:
    server_id = ids.get(pair_of(item.registration), item.id)
    return None if server_id is None else registered.get(server_id)


def _merged(current: Server, item: Imported) -> Server:
    stated = described(item.registration)
    if not item.has_key:
        stated["api_key"] = current.api_key
    server = attrs.evolve(current, **stated)
    return attrs.evolve(server, generation=_next_generation(current, server), opened_address=_still_opened(current, server))


def _still_opened(current: Server, wanted: Server) -> str | None:
    return current.opened_address if wanted.endpoint_url == current.endpoint_url else None


def _next_generation(current: Server, wanted: Server) -> int:
    return current.generation + (identity(wanted) != identity(current))
