"""Hosts: one engine on one computer each, with the models that it offers. The model of a host that is routed to is a `Server`."""

from collections.abc import Iterable, Mapping, Sequence

import attrs

from multiverse_gateway.core.errors import NotFound
from multiverse_gateway.core.servers import HostId, Server, ServerId

ALL = "*"
"""The pattern of an offer that every model matches."""


@attrs.frozen(kw_only=True)
class Host:
    """One engine on one computer: where it is reached, who owns it, and how much it can do at a time.

    `endpoint_url` is the canonical root, without `/v1`; `api_key` is the engine's own key in clear text, and never appears in `repr`, logs
    or answers. `owner` is what the owner is called (`Metadata.student_id`). `max_concurrency` bounds the requests that run on all its
    servers together, `None` for any number. `offers` are the patterns of the models that it offers (`*` stands for any text); without any
    it offers the models that were registered by name. Instants are epoch seconds.
    """

    id: HostId
    endpoint_url: str
    api_key: str | None = attrs.field(default=None, repr=False)
    owner: str | None = None
    max_concurrency: int | None = None
    offers: tuple[str, ...] = ()
    created_at: float
    updated_at: float


def shows_cap(host: Host, servers: Sequence[Server]) -> bool:
    """Return whether the servers of a host show its cap: without it, the host would get the same one from them."""
    return host_of(servers, host.id).max_concurrency == host.max_concurrency


def with_caps(hosts: Mapping[HostId, Host], caps: Mapping[HostId, int | None], *, wall: float) -> list[Host]:
    """Return the hosts whose cap differs from the wanted one, with that."""
    changed = [hosts[host_id] for host_id, cap in caps.items() if hosts[host_id].max_concurrency != cap]
    return [attrs.evolve(host, max_concurrency=caps[host.id], updated_at=wall) for host in changed]


class HostNotFound(NotFound):
    """There is no host with this id, or it has no servers any more."""

    code = "host_not_found"


HostIdentity = tuple[str | None, str, str | None]
"""Owner, URL and key: servers that have all three in common belong to one host."""


def host_identity(server: Server) -> HostIdentity:
    """Return what a server has in common with the others of its host."""
    return server.metadata.student_id, server.endpoint_url, server.api_key


def host_of(servers: Sequence[Server], host_id: HostId) -> Host:
    """Return a host that was not stored, as its servers show it; its cap is the largest of theirs.

    >>> server = Server(id="a", model_name="m", endpoint_url="http://a", max_concurrency=2, registered_at=1, created_at=1, updated_at=1)
    >>> host_of([server, attrs.evolve(server, max_concurrency=4)], "host").max_concurrency
    4
    >>> host_of([server, attrs.evolve(server, max_concurrency=None)], "host").max_concurrency is None
    True
    """
    owner, endpoint_url, api_key = host_identity(servers[0])
    caps = [server.max_concurrency for server in servers]
    return Host(
        id=host_id,
        endpoint_url=endpoint_url,
        api_key=api_key,
        owner=owner,
        max_concurrency=None if None in caps else max(cap for cap in caps if cap is not None),
        created_at=min(server.created_at for server in servers),
        updated_at=max(server.updated_at for server in servers),
    )


def grouped(servers: Iterable[Server]) -> list[list[Server]]:
    """Return servers by host, those with one `host_identity` together, in the order of the first of each.

    >>> make = lambda name, url: Server(id=name, model_name=name, endpoint_url=url, registered_at=0, created_at=0, updated_at=0)
    >>> [[server.id for server in group] for group in grouped([make("a", "http://x"), make("b", "http://y"), make("c", "http://x")])]
    [['a', 'c'], ['b']]
    """
    groups: dict[HostIdentity, list[Server]] = {}
    for server in servers:
        groups.setdefault(host_identity(server), []).append(server)
    return list(groups.values())


def all_hosts(servers: Iterable[Server], stored: Iterable[Host]) -> dict[HostId, Host]:
    """Return every host by id: those that are stored and offer anything, and those of servers whose host is not stored."""
    known = {host.id: host for host in stored}
    by_host: dict[HostId, list[Server]] = {}
    for server in servers:
        by_host.setdefault(server.host_id, []).append(server)
    hosts = {host_id: known.get(host_id) or host_of(group, host_id) for host_id, group in by_host.items()}
    return hosts | {host.id: host for host in known.values() if host.offers}


@attrs.define
class HostIndex:
    """The hosts of a registry with their servers, found by what they have in common; it follows what is placed in it."""

    hosts: dict[HostId, Host]
    _ids: dict[HostIdentity, HostId]
    _servers: dict[HostId, set[ServerId]]

    @classmethod
    def of(cls, servers: Iterable[Server], hosts: Mapping[HostId, Host]) -> "HostIndex":
        """Return the index of servers and all their hosts (`all_hosts`); of two hosts that have everything in common the first counts."""
        ids: dict[HostIdentity, HostId] = {}
        for host in hosts.values():
            ids.setdefault(_identity(host), host.id)
        members: dict[HostId, set[ServerId]] = {}
        for server in servers:
            members.setdefault(server.host_id, set()).add(server.id)
        return cls(dict(hosts), ids, members)

    def place(self, server: Server, *, before: Server | None, states_cap: bool, new_id: HostId, wall: float) -> tuple[Server, Host]:
        """Return a server that is about to be saved, with its host, and that host as it will be.

        A host with its owner, URL and key takes it up. If there is none, and the server has been the only one of its host (`before`), the
        host changes with it; otherwise it gets a new one, `new_id`. The cap of a host with one server changes with that server's. That of
        a larger one grows with a registration that states a larger cap (`states_cap`), and never shrinks with one.
        """
        host_id = self._ids.get(host_identity(server))
        if host_id is None and before is not None and not self._others(before.host_id, server):
            host_id = before.host_id
        known = None if host_id is None else self.hosts.get(host_id)
        if known is None:
            server = attrs.evolve(server, host_id=new_id)
            host = host_of([server], new_id)
        else:
            is_alone = not known.offers and not self._others(known.id, server)
            changes_cap = before is None or before.max_concurrency != server.max_concurrency
            takes_cap = (is_alone and changes_cap) or (states_cap and _is_more(server.max_concurrency, known.max_concurrency))
            server = attrs.evolve(server, host_id=known.id)
            host = _with_server(known, server, server.max_concurrency if takes_cap else known.max_concurrency, wall)
        self._follow(before, server, known, host)
        return server, host

    def _others(self, host_id: HostId, server: Server) -> set[ServerId]:
        return self._servers.get(host_id, set()) - {server.id}

    def _follow(self, before: Server | None, server: Server, known: Host | None, host: Host) -> None:
        if before is not None:
            self._servers.get(before.host_id, set()).discard(server.id)
        self._servers.setdefault(host.id, set()).add(server.id)
        if known is not None and self._ids.get(_identity(known)) == known.id:
            del self._ids[_identity(known)]
        self._ids.setdefault(_identity(host), host.id)
        self.hosts[host.id] = host


def _identity(host: Host) -> HostIdentity:
    return host.owner, host.endpoint_url, host.api_key


def _with_server(host: Host, server: Server, cap: int | None, wall: float) -> Host:
    owner, endpoint_url, api_key = host_identity(server)
    changed = attrs.evolve(host, owner=owner, endpoint_url=endpoint_url, api_key=api_key, max_concurrency=cap)
    return host if changed == host else attrs.evolve(changed, updated_at=wall)


def _is_more(cap: int | None, than: int | None) -> bool:
    return than is not None and (cap is None or cap > than)
