"""Health of the connection to a host concerns all its models; what concerns one model stays with that model."""

from __future__ import annotations

from typing import Any

import anyio
import attrs
import pytest

from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.health import AttemptFailed, HealthState
from multiverse_gateway.core.routing import with_health
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.monitor import Monitor
from multiverse_gateway.probes.models import ModelsProbe
from multiverse_gateway.server_checks import ServerChecks
from support.backends import Backend
from support.gateways import Stage, stage
from support.sockets import serving

MODELS = ("tiny", "small", "large")


async def hosted(scene: Stage, url: str, *models: str, **facts: Any) -> list[ServerId]:
    """Register models of one host, and return the ids of their servers."""
    return [
        ServerId((await scene.register(model_name=name, endpoint_url=url, max_concurrency=None, **facts))["registration_id"])
        for name in models
    ]


async def probe_all(scene: Stage) -> None:
    """Probe what is due in a minute, until nothing is."""
    scene.clock.advance(75)
    monitor = Monitor(scene.gateway)
    await monitor.lead()
    for _ in range(3):
        async with anyio.create_task_group() as group:
            monitor.start(group)


async def test_a_host_is_asked_once_for_all_its_models() -> None:
    """One GET /v1/models for two servers; each learns what the list says about its own model, by its name at the engine."""
    engine = Backend("lab", models=("tiny", "org/small"))
    with serving(engine):
        async with stage(probe=ModelsProbe(), allow_private_networks="127.0.0.0/8") as scene:
            ids = await hosted(scene, engine.url, "tiny", "small")
            await scene.client.put(f"/admin/register/{ids[1]}", json={"upstream_model": "org/small"})
            before = len(engine.probes)
            engine.models = ("tiny",)
            await probe_all(scene)
            assert len(engine.probes) == before + 1
            routes = scene.gateway.table.routes
            assert {routes[key].health.last_checked_at for key in ids} == {scene.clock.wall}
            assert [routes[key].health.warning is None for key in ids] == [True, False], "the list lacks one of them now"


async def test_a_probe_that_asks_about_a_model_is_made_for_each_of_them() -> None:
    """A plug-in of an older version, or the chat probe, says nothing about other models; the host gets one probe at a time."""
    async with stage() as scene:
        ids = await hosted(scene, "http://lab.example", *MODELS)
        scene.probe.checked.clear()
        scene.clock.advance(75)
        monitor = Monitor(scene.gateway)
        await monitor.lead()
        for number in range(1, 4):
            async with anyio.create_task_group() as group:
                monitor.start(group)
            assert len(scene.probe.checked) == number
        assert {server.id for server in scene.probe.checked} == set(ids)


@pytest.mark.parametrize(
    ("failure", "fields"),
    [
        (Failure(FailureClass.CONNECT, "the connection was refused"), ("state", HealthState.UNHEALTHY)),
        (Failure(FailureClass.BUSY, "busy", status=503, retry_after=20), ("rests", True)),
        (Failure(FailureClass.BROKEN, "broke off", after_request=True), None),
        (Failure(FailureClass.NO_MODEL, "no such model", status=404), None),
    ],
)
async def test_what_concerns_the_connection_concerns_every_model(failure: Failure, fields: tuple[str, object] | None) -> None:
    """A request that could not reach the host takes all its models out; one that broke off says nothing about the others."""
    async with stage() as scene:
        ids = await hosted(scene, "http://lab.example", *MODELS)
        (other,) = await hosted(scene, "http://other.example", "tiny")
        book = scene.gateway.health_book
        event = AttemptFailed(generation=1, client="a", number=1, failure=failure, path="/v1/chat/completions")
        before = {key: route.health for key, route in scene.gateway.table.routes.items()}
        book.report(ids[0], event)
        after = {key: route.health for key, route in scene.gateway.table.routes.items()}
        assert after[other] is before[other]
        for key in ids[1:]:
            if fields is None:
                assert after[key] is before[key]
            else:
                found = {"state": after[key].state, "rests": after[key].rest.until > scene.clock.monotonic}
                assert found[fields[0]] == fields[1]
        if fields is not None:
            stale = attrs.evolve(event, generation=7)
            book.report(ids[0], stale)
            assert {key: route.health for key, route in scene.gateway.table.routes.items()} == after, "an older generation's outcome"


async def test_the_probe_of_another_model_shows_nothing_to_a_server_that_has_to_prove_its_access() -> None:
    """A server that refused the gateway is probed itself: the list needs no key where the chat needs one."""
    async with stage() as scene:
        checks = ServerChecks(scene.gateway, ModelsProbe(), timeout=5.0)
        ids = await hosted(scene, "http://lab.example", "tiny", "small")
        routes = scene.gateway.table.routes
        result = await scene.probe.check(routes[ids[0]].server, scene.gateway.network.client_for(routes[ids[0]].server))
        assert checks.result_for(routes[ids[1]].server, result) is not None
        book = scene.gateway.health_book
        event = AttemptFailed(generation=1, client="a", number=1, failure=Failure(FailureClass.CONNECT, "x"), path="/v1/x")
        book.report(ids[1], event)
        doubted = attrs.evolve(book.table.routes[ids[1]].health, state=HealthState.PROBING)
        book.table = with_health(book.table, ids[1], doubted)
        assert checks.result_for(routes[ids[1]].server, result) is None
        failed = attrs.evolve(result, passed=False, reason="off")
        found = checks.result_for(routes[ids[1]].server, failed)
        assert found is not None
        assert (found.server_id, found.passed, found.reason) == (ids[1], False, "off")


async def test_a_server_that_an_older_version_moved_answers_for_itself() -> None:
    """Two gateways of different versions on one database: the older one changes a server's address, and leaves it with its host."""
    async with stage() as scene:
        ids = await hosted(scene, "http://lab.example", "tiny", "small")
        moved = attrs.evolve(scene.gateway.table.routes[ids[1]].server, endpoint_url="http://moved.example", generation=2)
        await scene.gateway.adopt(moved, attrs.evolve(await scene.probe.check(moved, scene.gateway.network.http)))
        failure = Failure(FailureClass.CONNECT, "the connection was refused")
        scene.gateway.health_book.report(
            ids[0], AttemptFailed(generation=1, client="a", number=1, failure=failure, path="/v1/chat/completions")
        )
        states = [scene.gateway.table.routes[key].health.state for key in ids]
        assert states == [HealthState.UNHEALTHY, HealthState.HEALTHY]
