"""The monitor: what is due is probed by one process, others are never delayed, and our own network is not taken for theirs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import anyio
import attrs
import pytest

from multiverse_gateway import Health, HealthState, ProbeResult, Registry, Server, ServerId
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.health import NextProbe
from multiverse_gateway.core.probing import LEASE_ROLE, MAX_PARALLEL, shard_count
from multiverse_gateway.core.routing import build_table
from multiverse_gateway.monitor import Monitor, _steadily, watch
from multiverse_gateway.protocols import Client
from multiverse_gateway.stores.memory import MemoryStore
from multiverse_gateway.testing.store import make_server
from support.gateways import Stage, stage


def urls(count: int) -> list[str]:
    """Return the endpoints of `count` servers."""
    return [f"http://s{number}.example" for number in range(count)]


async def one_round(monitor: Monitor) -> None:
    """Start what is due now and wait until it ended."""
    async with anyio.create_task_group() as group:
        monitor.start(group)


async def leader(scene: Stage, *, servers: int = 0) -> Monitor:
    """Return a monitor that leads, after registering servers."""
    for url in urls(servers):
        await scene.register(endpoint_url=url)
    scene.probe.checked.clear()
    monitor = Monitor(scene.gateway)
    await monitor.lead()
    return monitor


def health_of(scene: Stage, url: str) -> Health:
    """Return the health of the server at the URL."""
    [found] = [route.health for route in scene.gateway.table.routes.values() if route.server.endpoint_url == url]
    return found


def skip_to_next_probe(scene: Stage, *only: str) -> None:
    """Let time pass until a server (one of these) is due."""
    found = [route.health.next_probe.at for route in scene.gateway.table.routes.values() if not only or route.server.endpoint_url in only]
    scene.clock.advance(max(0.0, min(found) - scene.clock.monotonic))


# Probing


async def test_only_what_is_due_is_probed() -> None:
    """A registered server was probed just now; before a minute is over it is probed again."""
    async with stage() as scene:
        monitor = await leader(scene, servers=2)
        await one_round(monitor)
        scene.probe.checked.clear()
        await one_round(monitor)
        assert scene.probe.checked == []
        scene.clock.advance(60)
        await one_round(monitor)
        assert len(scene.probe.checked) == 2


async def test_results_are_noted_and_saved() -> None:
    """TC-HEALTH-002, 003: a failure counts, and history has it after the next flush."""
    async with stage() as scene:
        monitor = await leader(scene, servers=1)
        [url] = urls(1)
        scene.probe.failing[url] = "no answer"
        scene.clock.advance(60)
        await one_round(monitor)
        assert (health_of(scene, url).state, health_of(scene, url).consecutive_failures) == (HealthState.UNHEALTHY, 1)
        await scene.gateway.health_book.flush()
        registry = await scene.gateway.store.load()
        [server] = registry.servers
        assert registry.health[server.id].reason == "no answer"
        assert (await scene.gateway.store.history(server.id, 1))[0].reason == "no answer"


async def test_a_server_that_alone_fails_is_taken_off_after_three_probes() -> None:
    """TC-HEALTH-004: the others, asked in time, prove that it is the server."""
    async with stage() as scene:
        monitor = await leader(scene, servers=5)
        bad = urls(5)[0]
        scene.probe.failing[bad] = "no answer"
        scene.clock.advance(60)
        for _ in range(4):
            await one_round(monitor)
            await one_round(monitor)  # the early probes of the others
            skip_to_next_probe(scene, bad)
        assert health_of(scene, bad).state is HealthState.DEACTIVATED
        assert sum(server.endpoint_url == bad for server in scene.probe.checked) <= 5
        assert all(health_of(scene, url).state is HealthState.HEALTHY for url in urls(5)[1:])


async def test_when_all_fail_none_is_taken_off(caplog: pytest.LogCaptureFixture) -> None:
    """Told once, as an error; they are unhealthy, and come back when the network does. X: the first ones to fail count no more."""
    async with stage() as scene:
        monitor = await leader(scene, servers=5)
        for url in urls(5):
            scene.probe.failing[url] = "no answer"
        scene.clock.advance(60)
        with caplog.at_level(logging.ERROR, "multiverse_gateway.health"):
            for _ in range(40):
                await one_round(monitor)
                skip_to_next_probe(scene)
        assert {health_of(scene, url).state for url in urls(5)} == {HealthState.UNHEALTHY}
        assert len([record for record in caplog.records if "own network" in record.message]) == 1
        scene.probe.failing.clear()
        for _ in range(20):
            await one_round(monitor)
            skip_to_next_probe(scene)
        assert {health_of(scene, url).state for url in urls(5)} == {HealthState.HEALTHY}


async def test_servers_probed_one_after_another_are_not_taken_off_either() -> None:
    """The probes are spread: when the network breaks, the first server could fail three times before the second is asked at all."""
    async with stage() as scene:
        monitor = await leader(scene, servers=5)
        for number, url in enumerate(urls(5)):
            scene.probe.failing[url] = "no answer"
            [(server_id, old)] = [(key, entry) for key, entry in scene.gateway.table.routes.items() if entry.server.endpoint_url == url]
            later = attrs.evolve(old.health, next_probe=NextProbe(at=scene.clock.monotonic + 10.0 * number))
            table = scene.gateway.table
            scene.gateway.health_book.table = build_table(
                table.version,
                [entry.server for entry in table.routes.values()],
                {key: later if key == server_id else entry.health for key, entry in table.routes.items()},
            )
        for _ in range(60):
            await one_round(monitor)
            skip_to_next_probe(scene)
        assert {health_of(scene, url).state for url in urls(5)} == {HealthState.UNHEALTHY}


@attrs.define(eq=False)
class Hanging:
    """A probe that hangs on some servers until the test lets it go on."""

    hung: set[str]
    began: dict[str, anyio.Event]
    gate: anyio.Event = attrs.field(factory=anyio.Event)
    running: int = 0
    most: int = 0

    async def check(self, server: Server, http: Client) -> ProbeResult:
        self.running += 1
        self.most = max(self.most, self.running)
        self.began[server.endpoint_url].set()
        if server.endpoint_url in self.hung:
            await self.gate.wait()
        self.running -= 1
        return ProbeResult(server_id=server.id, generation=server.generation, passed=True, checked_at=1.0, duration=0.1)


async def test_a_slow_probe_delays_no_other() -> None:
    """While one hangs, the others are probed again and again."""
    async with stage(health_check_timeout_seconds=100) as scene:
        monitor = await leader(scene, servers=3)
        slow, *quick = urls(3)
        scene.gateway.checks.probe = probe = Hanging({slow}, {url: anyio.Event() for url in urls(3)})
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    scene.clock.advance(60)
                    monitor.start(group)
                    for url in quick:
                        await probe.began[url].wait()
                        probe.began[url] = anyio.Event()
                    await anyio.wait_all_tasks_blocked()
                    assert all(health_of(scene, url).last_checked_at == scene.clock.wall for url in quick)
                probe.gate.set()


async def test_no_more_than_twenty_run_at_once() -> None:
    """And a waiting server is probed as soon as a place is free, long before the next tick."""
    async with stage() as scene:
        monitor = await leader(scene, servers=50)
        scene.clock.advance(60)
        scene.gateway.checks.probe = probe = Hanging(set(urls(50)), {url: anyio.Event() for url in urls(50)})
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                group.start_soon(monitor.probe)
                await anyio.wait_all_tasks_blocked()
                assert probe.running == MAX_PARALLEL
                probe.gate.set()
                for event in probe.began.values():
                    await event.wait()
                group.cancel_scope.cancel()
        assert probe.most == MAX_PARALLEL


async def test_a_removed_server_stays_removed() -> None:
    """Semantics 4: a probe in flight brings nothing back."""
    async with stage() as scene:
        monitor = await leader(scene, servers=1)
        scene.clock.advance(60)
        scene.probe.gate = anyio.Event()
        scene.probe.arrived = anyio.Event()
        async with anyio.create_task_group() as group:
            monitor.start(group)
            await scene.probe.arrived.wait()
            [server_id] = scene.gateway.table.routes
            await scene.gateway.dismiss(server_id)
            scene.probe.gate.set()
        await scene.gateway.health_book.flush()
        registry = await scene.gateway.store.load()
        assert (registry.servers, registry.health, scene.gateway.table.routes) == ((), {}, {})


async def test_a_probe_that_raises_is_told_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async with stage() as scene:
        monitor = await leader(scene, servers=1)

        async def broken(server: Server) -> ProbeResult:
            raise RuntimeError("a fault of our own")

        scene.gateway.checks.check = broken  # type: ignore[method-assign]
        scene.clock.advance(60)
        await one_round(monitor)
        assert "could not be probed" in caplog.text
        assert len(monitor.next()) == 1


# The lease


async def test_one_process_probes() -> None:
    """The other one does when the first one releases its lease."""
    store = MemoryStore()
    async with stage(store=store) as first, stage(store=store) as second:
        one, other = await leader(first), await leader(second)
        assert (one.leads, other.leads) == (True, False)
        await first.register()
        await second.gateway.refresh()
        second.clock.advance(1000)
        await one_round(other)
        assert second.probe.checked == []
        await one.release()
        await other.lead()
        await one_round(other)
        assert [server.endpoint_url for server in second.probe.checked] == ["http://gpu.example:8000"]


async def test_what_another_process_found_ill_is_probed_at_once() -> None:
    """Its requests failed there: the process that probes confirms it, long before the server's turn."""
    store = MemoryStore()
    async with stage(store=store) as first, stage(store=store) as second:
        monitor = await leader(first, servers=1)
        await one_round(monitor)
        first.probe.checked.clear()
        await second.gateway.refresh()
        [server_id] = second.gateway.table.routes
        second.gateway.checks.note_result(
            ProbeResult(server_id=server_id, generation=1, passed=False, checked_at=1.0, duration=0.1, reason="no answer")
        )
        await second.gateway.health_book.flush()
        await first.gateway.refresh()
        await one_round(monitor)
        assert [server.id for server in first.probe.checked] == [server_id]


async def with_many(store: MemoryStore, count: int) -> None:
    """Save so many healthy servers."""
    for number in range(count):
        server = make_server(f"s{number}")
        await store.save_server(server)
        await store.save_health({server.id: Health(state=HealthState.HEALTHY, last_checked_at=1.0)}, [])


def shares(*monitors: Monitor) -> list[set[ServerId]]:
    """Return the servers that each would probe now, were there no limit."""
    return [set(monitor._own_routes()) if monitor.leads else set() for monitor in monitors]


async def test_many_servers_are_divided_among_the_holders_of_leases() -> None:
    """Each is probed by one process; when one is gone the others take its servers over, and a newcomer gets a part."""
    store = MemoryStore()
    await with_many(store, 250)
    assert shard_count(250) == 3
    async with stage(store=store) as first, stage(store=store) as second, stage(store=store) as third, stage(store=store) as fourth:
        monitors = [Monitor(scene.gateway) for scene in (first, second, third, fourth)]
        everybody = set(first.gateway.table.routes)

        async def settle() -> list[set[ServerId]]:
            for _ in range(2):
                for monitor in monitors:
                    await monitor.lead()
            return shares(*monitors)

        *parts, idle = await settle()
        assert (set.union(*parts), sum(map(len, parts)), idle) == (everybody, 250, set())
        assert min(map(len, parts)) > 50
        await monitors[1].release()
        monitors.pop(1)
        parts = await settle()
        assert (set.union(*parts), sum(map(len, parts))) == (everybody, 250)
        await monitors.pop(0).release()
        assert all(await settle())
        for server in list(everybody)[:200]:
            await store.remove_server(server)
        for scene in (third, fourth):
            await scene.gateway.refresh()
        assert sorted(map(len, await settle())) == [0, 50]


async def test_who_takes_over_goes_on_where_the_other_was() -> None:
    """What was just probed is not probed again at once."""
    store = MemoryStore()
    async with stage(store=store) as first, stage(store=store) as second:
        one, other = await leader(first, servers=3), await leader(second)
        await second.gateway.refresh()
        for _ in range(3):
            for scene in (first, second):
                scene.clock.advance(50)
            await one_round(one)
        await first.gateway.health_book.flush()
        assert len(first.probe.checked) == 9
        await one.release()
        await other.lead()
        await one_round(other)
        assert (other.leads, second.probe.checked) == (True, [])
        second.clock.advance(50)
        await one_round(other)
        assert len(second.probe.checked) == 3


async def test_a_process_whose_network_is_down_lets_another_probe() -> None:
    """It gives its lease up for a moment. The servers it took out are back at once; alone it probes on and takes the lease again."""
    store = MemoryStore()
    async with stage(store=store) as first, stage(store=store) as second:
        one, other = await leader(first, servers=4), Monitor(second.gateway)
        await second.gateway.refresh()
        first.probe.failing.update(dict.fromkeys(urls(4), "no route"))
        for scene in (first, second):
            scene.clock.advance(60)
        await one_round(one)
        await first.gateway.health_book.flush()
        await second.gateway.refresh()
        assert {route.health.state for route in second.gateway.table.routes.values()} == {HealthState.UNHEALTHY}
        await one.lead()
        await other.lead()
        await one.lead()
        assert (one.leads, other.leads) == (False, True)
        for _ in range(2):
            await one_round(other)
            second.clock.advance(2)
        assert {route.health.status for route in second.gateway.table.routes.values()} == {"healthy"}
        await other.release()
        await one.lead()
        assert one.leads, "there is nobody else"
        assert await store.claim(LEASE_ROLE, "another", 0.0), "the lease is free all the same"
        first.clock.advance(4)
        await one.lead()
        assert one.leads


class Unreachable(MemoryStore):
    """A store that fails as long as the test wants."""

    fails = False

    async def claim(self, role: str, holder: str, ttl: float) -> bool:
        if self.fails:
            raise StorageUnavailable("not now")
        return await super().claim(role, holder, ttl)


async def test_without_a_store_every_process_probes() -> None:
    store = Unreachable()
    async with stage(store=store) as scene:
        await store.claim(LEASE_ROLE, "somebody else", 60.0)
        monitor = await leader(scene)
        led = [monitor.leads]
        store.fails = True
        with pytest.raises(StorageUnavailable):
            await monitor.lead()
        led.append(monitor.leads)
        await monitor.release()
        led.append(monitor.leads)
        assert led == [False, True, False]


async def test_trouble_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """And its end, once; no kind of trouble ends the loop."""
    outcomes: list[Exception | None] = [None, StorageUnavailable("no"), StorageUnavailable("no"), ValueError(), None, None]
    done = anyio.Event()

    async def step() -> None:
        outcome = outcomes.pop(0)
        if not outcomes:
            done.set()
            await anyio.sleep_forever()
        if outcome is not None:
            raise outcome

    with caplog.at_level(logging.INFO, "multiverse_gateway.health"):
        async with anyio.create_task_group() as group:
            group.start_soon(_steadily, step, 0.0, "the trouble")
            await done.wait()
            group.cancel_scope.cancel()
    assert [record.message for record in caplog.records] == ["the trouble", "no longer the case: the trouble"]


# All together


async def test_servers_that_fail_too_often_are_deleted_where_that_is_wanted() -> None:
    """AUTO_DEREGISTER=delete: by the process that probes."""
    async with stage(auto_deregister="delete", max_consecutive_failures=1) as scene:
        monitor = await leader(scene, servers=2)
        bad, good = urls(2)
        scene.probe.failing[bad] = "no answer"
        scene.clock.advance(60)
        await one_round(monitor)
        scene.gateway.health_book.doomed.clear()  # as in a process that only reads that the server was taken out
        await Monitor(scene.gateway).clear()
        assert len(scene.gateway.table.routes) == 2
        await monitor.clear()
        assert [route.server.endpoint_url for route in scene.gateway.table.routes.values()] == [good]
        assert [server.endpoint_url for server in await scene.gateway.store.removed()] == [bad]


async def test_a_check_that_passes_saves_no_server_from_deletion() -> None:
    """AUTO_DEREGISTER=delete: not a forced check, nor what another process has found meanwhile; registering it again does."""
    async with stage(auto_deregister="delete", max_consecutive_failures=1) as scene:
        await leader(scene, servers=3)
        first, second, third = urls(3)
        ids = {route.server.endpoint_url: route.server.id for route in scene.gateway.table.routes.values()}
        for url, server_id in ids.items():
            scene.probe.failing[url] = "no answer"
            answer = (await scene.client.post(f"/admin/servers/{server_id}/health-check")).json()
            assert (answer["passed"], answer["state"]) == (False, "deactivated")
        scene.probe.failing.clear()
        answer = (await scene.client.post(f"/admin/servers/{ids[first]}/health-check")).json()
        assert (answer["passed"], answer["state"]) == (True, "deactivated")
        await scene.gateway.health_book.flush()
        elsewhere = Health(state=HealthState.HEALTHY, last_checked_at=scene.clock.wall + 1)
        await scene.gateway.store.save_health({ids[second]: elsewhere}, [])
        await scene.gateway.refresh(anyway=True)
        assert health_of(scene, second).state is HealthState.HEALTHY
        await scene.register(endpoint_url=third)
        await Monitor(scene.gateway).clear()
        assert [route.server.endpoint_url for route in scene.gateway.table.routes.values()] == [third]
        assert not scene.gateway.health_book.doomed
        assert (await scene.client.post(f"/admin/servers/{ids[first]}/health-check")).status_code == 404


class Noting(MemoryStore):
    """A store that tells when it was written and read."""

    def __init__(self) -> None:
        super().__init__()
        self.saved = anyio.Event()
        self.loaded = anyio.Event()

    async def save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        await super().save_health(changes, results)
        if any(not result.passed for result in results):
            self.saved.set()

    async def load(self) -> Registry:
        self.loaded.set()
        return await super().load()


async def test_everything_runs_by_itself() -> None:
    """Due servers are probed, results saved, other processes' changes followed, and the lease is given back at the end."""
    store = Noting()
    async with stage(store=store, auto_deregister="delete") as scene, anyio.create_task_group() as group:
        await scene.register()
        scene.probe.failing["http://gpu.example:8000"] = "no answer"
        scene.clock.advance(60)
        group.start_soon(watch, scene.gateway)
        with anyio.fail_after(5):
            await store.saved.wait()
            store.loaded = anyio.Event()
            await store.save_server(make_server("from elsewhere"))
            await store.loaded.wait()
        await anyio.wait_all_tasks_blocked()
        assert "from elsewhere" in scene.gateway.table.routes
        assert await store.claim(LEASE_ROLE, "another process", 60.0) is False
        group.cancel_scope.cancel()
    assert await store.claim(LEASE_ROLE, "another process", 60.0) is True
