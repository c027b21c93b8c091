"""What operators do to a host and all its servers at once: change and remove it. What that means is decided in `core.registry_plans`."""

import logging
from collections.abc import Sequence

import attrs

from multiverse_gateway.core.errors import AlreadyRegistered, ServerNotFound
from multiverse_gateway.core.hosts import Host, HostNotFound, all_hosts
from multiverse_gateway.core.registry_plans import HostChange, HostPlan, plan_host_change
from multiverse_gateway.core.servers import HostId, Server, ServerId, identity
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import ProbeResult, Registry
from multiverse_gateway.registration import probe_for_change, read_engine_soon

_log = logging.getLogger("multiverse_gateway.registry")


def find_host(gateway: Gateway, host_id: str) -> Host:
    """Return a host by its id.

    Raises:
        HostNotFound: There is none with this id.
    """
    host = gateway.table.hosts.get(HostId(host_id))
    if host is None:
        raise _unknown_host()
    return host


def _unknown_host() -> HostNotFound:
    return HostNotFound("There is no host with this id, or it was removed; GET /admin/hosts lists all hosts")


async def change_host(gateway: Gateway, host_id: HostId, change: HostChange) -> None:
    """Change a host with all its servers; a new URL or key is probed first, and so is a host whose servers were all taken out.

    Raises:
        HostNotFound: There is none with this id.
        BadRequest: The address is closed, or another host has this URL and one of the models.
        ModelNotOffered: One of the models is not offered there; nothing changed.
        ProbeRefused: It did not pass its probe; nothing changed.
        StorageUnavailable: It could not be saved.
    """
    probed: tuple[Sequence[Server], dict[ServerId, ProbeResult]] | None = None
    while True:
        async with gateway.registrations.lock:
            plan = _plan(gateway, await gateway.store.load(), host_id, change)
            if not plan.is_change:
                return
            if not plan.needs_probe or (probed is not None and _identities(probed[0]) == _identities(plan.servers)):
                try:
                    await _save(gateway, plan, {} if probed is None else probed[1])
                except (AlreadyRegistered, ServerNotFound):
                    continue  # another process registered or removed one of them since we looked
                return
        probed = plan.servers, await _probe_all(gateway, plan.servers)


def _plan(gateway: Gateway, registry: Registry, host_id: HostId, change: HostChange) -> HostPlan:
    hosts = all_hosts(registry.servers, registry.hosts)
    if host_id not in hosts:
        raise _unknown_host()
    is_active = any(route.health.is_active for route in gateway.table.routes_of(host_id))
    return plan_host_change(registry.servers, hosts.values(), hosts[host_id], change, is_active=is_active, wall=gateway.wall())


def _identities(servers: Sequence[Server]) -> set[tuple[ServerId, tuple[str, str | None, str, str | None]]]:
    return {(server.id, identity(server)) for server in servers}


async def _probe_all(gateway: Gateway, servers: Sequence[Server]) -> dict[ServerId, ProbeResult]:
    """Probe the first server, and judge the others by the same result where the probe can."""
    first = await probe_for_change(gateway, servers[0])
    others = {server.id: await probe_for_change(gateway, server, first) for server in servers[1:]}
    return {servers[0].id: first, **others}


async def _save(gateway: Gateway, plan: HostPlan, results: dict[ServerId, ProbeResult]) -> None:
    await gateway.store.save_host(plan.host, plan.servers)
    proven = [(server, attrs.evolve(results[server.id], generation=server.generation)) for server in plan.servers if server.id in results]
    for server, result in proven:
        await gateway.adopt(server, result)
    for server, result in proven[:1]:
        read_engine_soon(gateway, server, result)  # for all models of the host
    await gateway.refresh()
    fields = {"host": plan.host.id, "url": plan.host.endpoint_url, "servers": len(plan.servers), "limit": plan.host.max_concurrency}
    _log.info("host changed", extra={"fields": fields})


async def remove_host(gateway: Gateway, host_id: HostId) -> None:
    """Remove a host with all its servers, softly; when this returns, no new request goes to them.

    Raises:
        HostNotFound: There is none with this id (any more).
        StorageUnavailable: It could not be removed.
    """
    async with gateway.registrations.lock:
        if not await gateway.store.remove_host(host_id):
            raise _unknown_host()
        registry = gateway.registrations.registry
        kept = tuple(server for server in registry.servers if server.host_id != host_id)
        hosts = tuple(host for host in registry.hosts if host.id != host_id)
        gateway.follow(attrs.evolve(registry, servers=kept, hosts=hosts, health={}))
    _log.info("host removed", extra={"fields": {"host": host_id, "servers": len(registry.servers) - len(kept)}})
