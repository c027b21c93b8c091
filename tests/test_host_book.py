"""A change and the removal of a host, with all its servers at once."""

from __future__ import annotations

from typing import Any

import anyio
import httpx2
import pytest

from multiverse_gateway.api.host_routes import host_routes
from multiverse_gateway.core.errors import ProbeRefused
from multiverse_gateway.core.health import HealthState
from multiverse_gateway.core.hosts import HostNotFound
from multiverse_gateway.core.registry_plans import HostChange
from multiverse_gateway.core.servers import HostId
from multiverse_gateway.host_book import change_host, find_host, remove_host
from multiverse_gateway.registration import remove
from support.gateways import ADMIN_KEY, Stage, application, stage

NEW = "http://new.example:8000"


async def registered(at: Stage, *names: str) -> HostId:
    """Register models of one host, and return its id."""
    hosts = {(await at.register(model_name=name))["host_id"] for name in names}
    (host_id,) = hosts
    return HostId(host_id)


def move(**fields: Any) -> HostChange:
    """Return a change to the new URL."""
    return HostChange(fields={"endpoint_url": NEW, **fields})


async def test_nothing_changes_unless_the_host_passes_its_probe() -> None:
    async with stage() as at:
        host_id = await registered(at, "tiny", "large")
        before = at.gateway.table.hosts[host_id], [route.server for route in at.gateway.table.routes_of(host_id)]
        at.probe.failing[NEW] = "no answer"
        with pytest.raises(ProbeRefused, match="no answer"):
            await change_host(at.gateway, host_id, move(max_concurrency=3))
        assert (at.gateway.table.hosts[host_id], [route.server for route in at.gateway.table.routes_of(host_id)]) == before


async def test_a_host_that_moved_is_healthy_and_its_limit_needs_no_probe() -> None:
    async with stage() as at:
        host_id = await registered(at, "tiny", "large")
        await change_host(at.gateway, host_id, move(api_key="sk-new"))
        routes = at.gateway.table.routes_of(host_id)
        assert [(route.server.endpoint_url, route.server.generation, route.health.state) for route in routes] == [
            (NEW, 2, HealthState.HEALTHY)
        ] * 2
        probes = len(at.probe.checked)
        await change_host(at.gateway, host_id, HostChange(fields={"max_concurrency": 3}))
        changed = find_host(at.gateway, host_id)
        assert (changed.max_concurrency, changed.api_key) == (3, "sk-new")
        at.clock.advance(5)
        await change_host(at.gateway, host_id, HostChange(fields={"max_concurrency": 3}))
        assert find_host(at.gateway, host_id) == changed
        assert len(at.probe.checked) == probes


async def test_a_server_that_is_removed_during_the_probe_stays_removed() -> None:
    async with stage() as at:
        host_id = await registered(at, "tiny", "large")
        first, second = at.gateway.table.routes_of(host_id)
        at.probe.arrived, at.probe.gate = anyio.Event(), anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(change_host, at.gateway, host_id, move())
            await at.probe.arrived.wait()
            await remove(at.gateway, second.server.id)
            at.probe.gate.set()
        assert [(route.server.id, route.server.endpoint_url) for route in at.gateway.table.routes_of(host_id)] == [(first.server.id, NEW)]


async def test_a_removed_host_is_gone_with_its_servers() -> None:
    async with stage() as at:
        host_id = await registered(at, "tiny", "large")
        other = HostId((await at.register(endpoint_url=NEW))["host_id"])
        await remove_host(at.gateway, host_id)
        assert {route.server.host_id for route in at.gateway.table.routes.values()} == set(at.gateway.table.hosts) == {other}
        for call in (remove_host(at.gateway, host_id), change_host(at.gateway, host_id, move())):
            with pytest.raises(HostNotFound):
                await call
        with pytest.raises(HostNotFound):
            find_host(at.gateway, host_id)


async def test_hosts_over_the_api() -> None:
    """Listed the oldest first, with the state of each model; a change names its fields, and `null` clears one."""
    async with stage() as at:
        host_id = await registered(at, "tiny", "large")
        at.clock.advance(5)
        other = (await at.register(endpoint_url=NEW, metadata={"student_id": "ada"}))["host_id"]
        app = application(at.gateway, extra=[*host_routes(at.gateway)])
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway", headers={"x-api-key": ADMIN_KEY}) as client:
            hosts = (await client.get("/admin/hosts")).json()
            assert [(host["id"], host["owner"], len(host["servers"])) for host in hosts] == [(host_id, None, 2), (other, "ada", 1)]
            path = f"/admin/hosts/{other}"
            assert (await client.get(path)).json() == hosts[1]
            changed = (await client.put(path, json={"owner": None, "max_concurrency": 2})).json()
            assert (changed["owner"], changed["max_concurrency"], changed["servers"][0]["max_concurrency"]) == (None, 2, 2)
            cleared = await client.put(path, json={"endpoint_url": None})
            assert (cleared.status_code, cleared.json()["error"]["param"]) == (400, "endpoint_url")
            assert (await client.delete(path)).json()["registration_ids"] == [server["registration_id"] for server in hosts[1]["servers"]]
            assert (await client.get(path)).status_code == 404
