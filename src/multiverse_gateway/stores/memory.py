"""A registry that lives as long as its process: for tests and trials."""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import Any

import anyio
import attrs

from multiverse_gateway.core.aliases import Alias
from multiverse_gateway.core.errors import AlreadyRegistered
from multiverse_gateway.core.health import Health
from multiverse_gateway.core.hosts import Host
from multiverse_gateway.core.servers import ClientKey, HostId, Server, ServerId, WallLink
from multiverse_gateway.core.stored import StoredResponse
from multiverse_gateway.core.usage import Counts, Usage, UsageKey, bounded, sums_of
from multiverse_gateway.protocols import ProbeResult, Registry, RegistryStore
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.rows import BATCH_SECONDS, HISTORY, MOST_RESPONSES, REMOVED, is_news, kept, still_revoked
from multiverse_gateway.stores.store_errors import removed_meanwhile


class MemorySessions:
    """The sessions of one process; `_version` grows with them."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._version = 0
        self._sessions: dict[str, float] = {}

    async def open_session(self, digest: str, until: float) -> None:
        """Save a session, and forget those that have expired."""
        now = self._wall()
        self._sessions = {name: end for name, end in self._sessions.items() if end > now} | {digest: until}
        self._version += 1

    async def close_session(self, digest: str) -> bool:
        """End a session; harmless if it is not known."""
        if self._sessions.pop(digest, None) is None:
            return False
        self._version += 1
        return True


class MemoryWallLinks:
    """The links to the wall view of one process; `_version` grows with them."""

    def __init__(self) -> None:
        self._version = 0
        self._wall_links: dict[str, WallLink] = {}

    async def save_wall_link(self, link: WallLink) -> None:
        """Insert a link to the wall view."""
        self._wall_links[link.id] = link
        self._version += 1

    async def remove_wall_link(self, link_id: str) -> bool:
        """Remove a link to the wall view, and return whether there was one."""
        if self._wall_links.pop(link_id, None) is None:
            return False
        self._version += 1
        return True


class MemoryHosts:
    """The hosts and aliases of one process; `_version` grows with them. `registry` keeps the servers."""

    def __init__(self, registry: RegistryStore) -> None:
        self._registry = registry
        self._version = 0
        self._hosts: dict[HostId, Host] = {}
        self._aliases: dict[str, Alias] = {}

    async def save_host(self, host: Host, servers: Sequence[Server] = ()) -> None:
        """Insert or replace a host and servers of it; none is saved if one is rejected, unless another process registers it meanwhile."""
        kept = (await self._registry.load()).servers if servers else ()
        for server in servers:
            for other in kept:
                if (other.model_name, other.endpoint_url) == (server.model_name, server.endpoint_url) and other.id != server.id:
                    raise AlreadyRegistered(other.id)
        for server in servers:
            await self._registry.save_server(server)
        self._hosts[host.id] = host
        self._version += 1

    async def remove_host(self, host_id: HostId) -> bool:
        """Remove a host and its servers, and return whether there was anything to remove."""
        owned = [server.id for server in (await self._registry.load()).servers if server.host_id == host_id]
        removed = [await self._registry.remove_server(server_id) for server_id in owned]
        if self._hosts.pop(host_id, None) is None:
            return any(removed)
        self._version += 1
        return True

    async def save_alias(self, alias: Alias) -> None:
        """Insert or replace an alias."""
        self._aliases[alias.name] = alias
        self._version += 1

    async def remove_alias(self, name: str) -> bool:
        """Remove an alias, and return whether there was one."""
        if self._aliases.pop(name, None) is None:
            return False
        self._version += 1
        return True


class MemoryUsage:
    """The usage counts of one process."""

    def __init__(self) -> None:
        self._usage: dict[UsageKey, Counts] = {}
        self._batches: dict[str, float] = {}

    async def add_usage(self, batch: str, rows: Sequence[Usage]) -> None:
        """Add counts, once per batch."""
        now = anyio.current_time()
        self._batches = {name: at for name, at in self._batches.items() if now < at + BATCH_SECONDS}
        if batch in self._batches:
            return
        self._batches[batch] = now
        for row in rows:
            self._usage[row.key] = self._usage.get(row.key, Counts()) + row.counts

    async def usage(self, since: str, until: str) -> Sequence[Usage]:
        """Return what is kept of these days."""
        rows = [Usage(key=key, counts=counts) for key, counts in self._usage.items() if since <= key.day <= until]
        return tuple(sorted(rows, key=lambda usage: attrs.astuple(usage.key)))

    async def sum_usage(self, since: str, until: str, *, by: Collection[str], only: Mapping[str, Collection[str]]) -> Sequence[Usage]:
        """Return the sums of what is kept of these days."""
        return tuple(sums_of(await self.usage(since, until), by=by, only=only))

    async def requests_on(self, day: str) -> Mapping[str, int]:
        """Return how many requests each client has sent on a day."""
        sums: Counter[str] = Counter()
        for key, counts in self._usage.items():
            if key.day == day:
                sums[key.client] = bounded(sums[key.client] + counts.requests)
        return sums


class MemoryStore(MemorySessions, MemoryWallLinks, MemoryHosts, MemoryUsage):
    """Keep everything in dictionaries; the model that the other stores are held against."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        MemorySessions.__init__(self, wall)
        MemoryWallLinks.__init__(self)
        MemoryHosts.__init__(self, self)
        MemoryUsage.__init__(self)
        self._servers: dict[ServerId, Server] = {}
        self._removed: deque[Server] = deque(maxlen=REMOVED)
        self._health: dict[ServerId, Health] = {}
        self._history: dict[ServerId, deque[ProbeResult]] = {}
        self._leases: dict[str, tuple[str, float]] = {}
        self._secrets: dict[str, str] = {}
        self._keys: dict[str, ClientKey] = {}
        self._responses: dict[str, StoredResponse] = {}

    async def open(self) -> None:
        """Do nothing: there is nothing to open."""

    async def version(self) -> int:
        """Return the number of changes so far."""
        return self._version

    async def changed(self, within: float) -> None:
        """Return after so many seconds: no other process changes it."""
        await anyio.sleep(within)

    async def load(self) -> Registry:
        """Return the whole registry with its version."""
        return Registry(
            version=self._version,
            servers=tuple(self._servers.values()),
            health=dict(self._health),
            keys=tuple(self._keys.values()),
            sessions=dict(self._sessions),
            wall_links=tuple(self._wall_links.values()),
            hosts=tuple(self._hosts.values()),
            aliases=tuple(self._aliases.values()),
        )

    async def save_server(self, server: Server) -> None:
        """Insert or replace a server; a removed one stays removed.

        Raises:
            ServerNotFound: It was removed.
            AlreadyRegistered: Another one has its model and URL.
        """
        self._servers = self._with(self._servers, server)
        self._version += 1

    def _with(self, servers: Mapping[ServerId, Server], server: Server) -> dict[ServerId, Server]:
        if any(removed.id == server.id for removed in self._removed):
            raise removed_meanwhile()
        for other in servers.values():
            if (other.model_name, other.endpoint_url) == (server.model_name, server.endpoint_url) and other.id != server.id:
                raise AlreadyRegistered(other.id)
        return {**servers, server.id: server}

    async def save_host(self, host: Host, servers: Sequence[Server] = ()) -> None:
        """Insert or replace a host and servers of it, all or none."""
        self._servers = reduce(self._with, servers, self._servers)
        await super().save_host(host)

    async def remove_server(self, server_id: ServerId) -> bool:
        """Mark a server as removed, so that its id stays known."""
        server = self._servers.pop(server_id, None)
        if server is None:
            return False
        self._health.pop(server_id, None)
        self._removed.appendleft(attrs.evolve(server, api_key=None, owner_digest=None))
        named = {server.host_id for server in self._servers.values()}
        self._hosts = {host.id: host for host in self._hosts.values() if host.offers or host.id in named}
        self._version += 1
        return True

    async def removed(self) -> Sequence[Server]:
        """Return the removed servers, newest first; their keys are forgotten."""
        return tuple(self._removed)

    async def save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        """Save health and results of servers that are still there."""
        saved = kept(changes, {server.id: server.generation for server in self._servers.values()})
        if is_news(self._health, saved):
            self._version += 1
        self._health |= saved
        for result in results:
            if result.server_id in self._servers:
                self._history.setdefault(result.server_id, deque(maxlen=HISTORY)).appendleft(attrs.evolve(result, models=()))

    async def history(self, server_id: ServerId, limit: int) -> Sequence[ProbeResult]:
        """Return the last results, newest first; the models they listed are not kept."""
        return tuple(self._history.get(server_id, ()))[:limit]

    async def save_key(self, key: ClientKey) -> None:
        """Insert or replace a client key; a revoked one stays revoked."""
        before = self._keys.get(key.id)
        self._keys[key.id] = still_revoked(key, None if before is None else before.revoked_at)
        self._version += 1

    async def save_responses(self, responses: Sequence[StoredResponse]) -> None:
        """Keep the places of responses, and delete the expired ones."""
        now = self._wall()
        self._responses |= {response.key: response for response in responses}
        newest = sorted(self._responses.values(), key=lambda response: response.until)[-MOST_RESPONSES:]
        self._responses = {response.key: response for response in newest if response.until >= now}

    async def find_response(self, key: str) -> StoredResponse | None:
        """Return the place of a response."""
        return self._responses.get(key)

    async def claim(self, role: str, holder: str, ttl: float) -> bool:
        """Take or renew a lease."""
        now = anyio.current_time()
        other, until = self._leases.get(role, (holder, 0.0))
        if other != holder and until > now:
            return False
        self._leases[role] = (holder, now + ttl)
        return True

    async def secret(self, name: str, proposal: str) -> str:
        """Return what is kept under the name."""
        return self._secrets.setdefault(name, proposal)

    async def aclose(self) -> None:
        """Do nothing: what was kept goes with the process."""


class _Beside:
    """A store that lacks a part, and that part of this process: `part` names the attributes of a `Registry` that it fills."""

    _version: int

    def __init__(self, store: RegistryStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def part(self) -> dict[str, Any]:
        """Return what this process keeps."""
        return {}

    async def version(self) -> int:
        """Return a number that grows with the store's own and with the part."""
        return await self._store.version() + self._version

    async def load(self) -> Registry:
        """Return what the store keeps, with the part."""
        version, part = self._version, self.part()
        registry = await self._store.load()
        return attrs.evolve(registry, version=registry.version + version, **part)


class WithUsage(MemoryUsage):
    """A store that counts no use, and the counts of this process."""

    def __init__(self, store: RegistryStore) -> None:
        super().__init__()
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class WithUsageSums:
    """A store that keeps usage counts and does not sum them: they are summed here."""

    def __init__(self, store: RegistryStore) -> None:
        self._store: Any = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def sum_usage(self, since: str, until: str, *, by: Collection[str], only: Mapping[str, Collection[str]]) -> Sequence[Usage]:
        """Return the sums of what the store keeps of these days."""
        return tuple(sums_of(await self._store.usage(since, until), by=by, only=only))


class WithSessions(_Beside, MemorySessions):
    """A store that keeps no sessions, and those of this process, which are part of its registry."""

    def __init__(self, store: RegistryStore) -> None:
        MemorySessions.__init__(self)
        _Beside.__init__(self, store)

    def part(self) -> dict[str, Any]:
        """Return the sessions that are kept here."""
        return {"sessions": dict(self._sessions)}


class WithWallLinks(_Beside, MemoryWallLinks):
    """A store that keeps no links to the wall view, and those of this process, which are part of its registry."""

    def __init__(self, store: RegistryStore) -> None:
        MemoryWallLinks.__init__(self)
        _Beside.__init__(self, store)

    def part(self) -> dict[str, Any]:
        """Return the links that are kept here."""
        return {"wall_links": tuple(self._wall_links.values())}


class WithHosts(_Beside, MemoryHosts):
    """A store that keeps no hosts, and the hosts and aliases of this process, which are part of its registry."""

    def __init__(self, store: RegistryStore) -> None:
        MemoryHosts.__init__(self, store)
        _Beside.__init__(self, store)

    async def remove_server(self, server_id: ServerId) -> bool:
        """Remove a server, and forget its host if that offers nothing else."""
        is_removed = await self._store.remove_server(server_id)
        named = {server.host_id for server in (await self._store.load()).servers}
        self._hosts = {host.id: host for host in self._hosts.values() if host.offers or host.id in named}
        return is_removed

    def part(self) -> dict[str, Any]:
        """Return the hosts and aliases that are kept here."""
        return {"hosts": tuple(self._hosts.values()), "aliases": tuple(self._aliases.values())}


def create(settings: Settings) -> MemoryStore:
    """Return a new store of this kind; the entry point of the plug-in."""
    return MemoryStore()
