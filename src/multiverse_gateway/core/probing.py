"""Which process probes a server, when, and what a failed probe proves.

1. One process probes up to `SERVERS_PER_SHARD` servers: the one that holds the lease. More servers are divided into shards, each with a
   lease of its own. A server belongs to the shard that ranks highest for it (rendezvous hashing), so that only the servers of a shard
   that is taken up or given up change hands. All servers of a host belong to one shard.
2. A host is probed once for all its models, as far as the probe can tell (`protocols.HostProbe`), and never twice at a time.
3. When nearly all hosts fail at once, the network of the process that probes is the likelier cause. Then no server is counted out.
4. A server is counted out only after enough others have been reached since it began to fail. Those whose latest probe is older are
   probed early, so that this can be decided in time.

All instants are monotonic seconds.
"""

from collections.abc import Collection, Iterable, Mapping
from hashlib import blake2b
from math import inf

import attrs

from multiverse_gateway.core.routing import Route
from multiverse_gateway.core.servers import HostId, Server, ServerId

LEASE_SECONDS = 5.0
LEASE_ROLE = "probe"
SERVERS_PER_SHARD = 100
"""If all of them hang, one process still finishes a probe of each of them every minute."""
MAX_SHARDS = 16
MAX_PARALLEL = 20
"""How many probes one process runs at once."""
MIN_CORRELATED = 3
CORRELATED_SHARE = 0.8


# Turns


def due(routes: Iterable[Route], now: float) -> list[Server]:
    """Return the servers whose next probe is due, the one that has been due longest first."""
    waiting = [route for route in routes if route.health.next_probe.at <= now]
    return [route.server for route in sorted(waiting, key=lambda route: route.health.next_probe.at)]


def next_probes(routes: Mapping[ServerId, Route], *, early: Collection[ServerId], running: Collection[HostId], now: float) -> list[Server]:
    """Return the servers to probe now: those that are due, then those of `early`, one of each host that is not being probed (`running`).

    Together with the running probes they are at most `MAX_PARALLEL`.
    """
    servers = [*due(routes.values(), now), *(routes[server_id].server for server_id in early)]
    first_of: dict[HostId, Server] = {}
    for server in servers:
        if server.host_id not in running:
            first_of.setdefault(server.host_id, server)
    return list(first_of.values())[: MAX_PARALLEL - len(running)]


def one_per_host(routes: Mapping[ServerId, Route]) -> dict[ServerId, Route]:
    """Return the first active server of each host, or its first one: whether a host can be reached says nothing twice."""
    found: dict[HostId, Route] = {}
    for route in routes.values():
        other = found.get(route.server.host_id)
        if other is None or (route.health.is_active and not other.health.is_active):
            found[route.server.host_id] = route
    return {route.server.id: route for route in found.values()}


# What failures prove


def is_correlated(failed: int, watched: int) -> bool:
    """Return whether so many of the servers failed that our own network is the likelier cause.

    >>> is_correlated(3, 3), is_correlated(2, 2), is_correlated(4, 6)
    (True, False, False)
    """
    return failed >= MIN_CORRELATED and failed >= CORRELATED_SHARE * watched


@attrs.frozen
class LastProbe:
    """When the latest probe of a server began, and whether the server was reached.

    `failing_since` is when the first probe of the present row of failures began, `None` if the latest one reached the server.
    """

    began: float
    reached: bool
    failing_since: float | None = None


@attrs.frozen
class Doubt:
    """Whether a failed probe may be due to our own network, and the servers to probe early so that the next failure can be judged."""

    is_correlated: bool
    early: frozenset[ServerId] = frozenset()


@attrs.define(eq=False)
class FailurePattern:
    """The latest probes of all servers, which tell a broken server from a broken network of our own."""

    _probes: dict[ServerId, LastProbe] = attrs.field(factory=dict)

    def note(self, server_id: ServerId, began: float, *, reached: bool) -> None:
        """Record the outcome of a probe that began at this instant; a server that refuses its key was reached."""
        before = self._probes.get(server_id)
        since = before.failing_since if before is not None and before.failing_since is not None else began
        self._probes[server_id] = LastProbe(began, reached, None if reached else since)

    def keep(self, registered: Mapping[ServerId, object]) -> None:
        """Forget the servers that are not among these."""
        self._probes = {server_id: probe for server_id, probe in self._probes.items() if server_id in registered}

    def is_widespread(self, routes: Mapping[ServerId, Route]) -> bool:
        """Return whether nearly all active servers failed their latest probe."""
        active = _active(routes)
        failing = [server_id for server_id in active if server_id in self._probes and not self._probes[server_id].reached]
        return is_correlated(len(failing), len(active))

    def is_proven(self, server_id: ServerId, routes: Mapping[ServerId, Route]) -> bool:
        """Return whether enough others have been reached since the server began to fail, so that the server must be the cause."""
        active = _active(routes)
        return not is_correlated(len(active) - len(active - self.outdated(server_id, routes) - self._failing()), len(active))

    def outdated(self, server_id: ServerId, routes: Mapping[ServerId, Route]) -> set[ServerId]:
        """Return the other active servers whose latest probe began before the server began to fail."""
        probe = self._probes.get(server_id)
        since = inf if probe is None or probe.failing_since is None else probe.failing_since
        return {
            other for other in _active(routes) if other != server_id and (other not in self._probes or self._probes[other].began < since)
        }

    def doubt(self, route: Route, routes: Mapping[ServerId, Route], *, max_failures: int) -> Doubt:
        """Judge a failed probe, before it is counted, while failures are not widespread.

        Nothing is in doubt as long as two more failures leave the server in. With one failure to go, the others are probed early; the
        last one does not count until they have proved that the server is the cause.
        """
        remaining = max_failures - route.health.consecutive_failures
        if not route.health.is_active or remaining > 2 or self.is_proven(route.server.id, routes):
            return Doubt(is_correlated=False)
        return Doubt(is_correlated=remaining <= 1, early=frozenset(self.outdated(route.server.id, routes)))

    def _failing(self) -> set[ServerId]:
        return {server_id for server_id, probe in self._probes.items() if not probe.reached}


def _active(routes: Mapping[ServerId, Route]) -> set[ServerId]:
    return {server_id for server_id, route in routes.items() if route.health.is_active}


# Shards


def shard_count(servers: int) -> int:
    """Return how many processes may share the probing of so many servers.

    >>> shard_count(0), shard_count(100), shard_count(101), shard_count(1_000_000)
    (1, 1, 2, 16)
    """
    return min(MAX_SHARDS, max(1, -(-servers // SERVERS_PER_SHARD)))


def claim_period(count: int) -> float:
    """Return after how many seconds a process renews its lease or looks for a free one, where there are so many shards.

    The lease of a process that was killed on the same machine is free at once, so the only lease is looked for more often. Each of several
    leases is claimed by every process without one, which with many gateways is most of the load on their database.

    >>> claim_period(1), claim_period(2) < LEASE_SECONDS / 2
    (1.0, True)
    """
    return 1.0 if count == 1 else LEASE_SECONDS / 3


def shard_of(host_id: HostId, held: Collection[int]) -> int:
    """Return the shard that the servers of a host belong to, of those that are held by a process."""
    return max(held, key=lambda shard: blake2b(f"{shard} {host_id}".encode(), digest_size=8).digest())


def lease_role(shard: int) -> str:
    """Return the name of a shard's lease.

    >>> lease_role(0), lease_role(1)
    ('probe', 'probe-1')
    """
    return LEASE_ROLE if shard == 0 else f"{LEASE_ROLE}-{shard}"
