"""How the gateway is doing, for machines."""

from __future__ import annotations

from multiverse_gateway.core.engine_facts import Abilities, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.health import ProbeFailed
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.stores.memory import MemoryStore
from support.gateways import Stage, stage


class Failing(MemoryStore):
    """A store that can be switched off."""

    off = False

    async def version(self) -> int:
        if self.off:
            raise StorageUnavailable("The registry cannot be read now")
        return await super().version()


async def test_health_shows_version_database_and_counts() -> None:
    async with stage() as at:
        await at.register()
        at.clock.advance(5)
        body = (await at.client.get("/health")).json()
        assert (body["status"], body["database"], body["servers"], body["uptime_seconds"]) == ("ok", "ok", "healthy", 5.0)
        assert (body["counts"]["total_servers"], body["counts"]["healthy_servers"], body["counts"]["models"]) == (1, 1, 1)
        assert body["version"]


async def test_a_database_that_is_gone_shows_and_stops_no_list() -> None:
    """The last known registry serves on."""
    store = Failing()
    async with stage(store=store) as at:
        await at.register()
        store.off = True
        response = await at.client.get("/health")
        assert (response.status_code, response.json()["status"], response.json()["database"]) == (200, "degraded", "unavailable")
        assert len((await at.client.get("/admin/servers")).json()) == 1
        assert len((await at.client.get("/v1/models")).json()["data"]) == 1
        assert (await at.client.get("/livez")).status_code == 200
        store.off = False


async def ready(at: Stage) -> int:
    return (await at.client.get("/readyz")).status_code


async def test_readiness_ends_with_the_shutdown_and_begins_with_the_table() -> None:
    async with stage() as at:
        assert await ready(at) == 200
        at.gateway.registrations.is_loaded = False
        assert await ready(at) == 503
        at.gateway.registrations.is_loaded = True
        at.gateway.begin_shutdown()
        response = await at.client.get("/readyz")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "gateway_shutting_down")
        assert (await at.client.get("/livez")).status_code == 200


def take_out(gateway: Gateway, server_id: str) -> None:
    for _ in range(3):
        gateway.health_book.report(ServerId(server_id), ProbeFailed(1, "it is off", False))


async def test_models_are_those_with_an_active_server() -> None:
    """FR-API-INF-005: with the numbers of healthy and of all active servers; `created` is a whole number."""
    async with stage() as at:
        first = await at.register(model_name="org/tiny:1")
        second = await at.register(model_name="org/tiny:1", endpoint_url="http://second.example")
        at.gateway.health_book.report(second["registration_id"], ProbeFailed(1, "it is off", False))
        body = (await at.client.get("/v1/models")).json()
        assert body["object"] == "list"
        (item,) = body["data"]
        assert (item["id"], item["object"], item["available_servers"], item["total_servers"]) == ("org/tiny:1", "model", 1, 2)
        assert item["multiverse"] == {"servers_healthy": 1, "servers_total": 2}
        assert type(item["created"]) is int
        for path in ("/v1/models/org/tiny:1", "/v1/models/org%2Ftiny:1"):
            assert (await at.client.get(path)).json() == item
        take_out(at.gateway, first["registration_id"])
        take_out(at.gateway, second["registration_id"])
        assert (await at.client.get("/v1/models")).json()["data"] == []
        assert (await at.client.get("/v1/models/org/tiny:1")).status_code == 404


async def test_an_unknown_model_is_told_with_those_there_are() -> None:
    async with stage() as at:
        await at.register(model_name="llama-3")
        response = await at.client.get("/v1/models/lama-3")
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "llama-3" in error["message"]


async def test_models_show_what_was_measured_of_all_servers_together() -> None:
    """The smaller promise of each counts as the context; the largest measured one, abilities and the trained context stand beside it."""
    async with stage() as at:
        for number, (context, trained, tools) in enumerate([(8192, 131072, None), (4096, None, True), (None, None, False)]):
            record = await at.register(
                model_name="several", endpoint_url=f"http://gpu-{number}.example", capabilities={"context_length": 16384}
            )
            model = ModelFacts(
                name="several", context=context, trained_context=trained, abilities=Abilities(tools=tools, vision=False, chat=True)
            )
            server = at.gateway.table.routes[record["id"]].server
            at.gateway.health_book.note_measured(server, Measured(kind=EngineKind.OLLAMA, version="0.12.5", model=model))
        item = (await at.client.get("/v1/models/several")).json()
        assert item["context_length"] == 4096
        assert item["multiverse"] == {
            "servers_healthy": 3,
            "servers_total": 3,
            "largest_context_length": 8192,
            "trained_context_length": 131072,
            "abilities": {"chat": True, "tools": True, "vision": False},
        }


async def test_models_show_the_context_that_every_server_has() -> None:
    """The smallest of those that are known, of servers that are not taken out; nothing where none is known."""
    async with stage(max_consecutive_failures=1) as at:
        for number, length in enumerate([8192, None, 4096]):
            capabilities = {} if length is None else {"context_length": length}
            await at.register(model_name="several", endpoint_url=f"http://gpu-{number}.example", capabilities=capabilities)
        gone = await at.register(model_name="several", endpoint_url="http://gone.example", capabilities={"context_length": 2048})
        await at.register(model_name="silent")
        at.probe.failing["http://gone.example"] = "no answer"
        await at.client.post(f"/admin/servers/{gone['id']}/health-check")
        listed = {item["id"]: item for item in (await at.client.get("/v1/models")).json()["data"]}
        assert listed["several"]["context_length"] == 4096
        assert "context_length" not in listed["silent"]
        assert (await at.client.get("/v1/models/several")).json() == listed["several"]
        assert (await at.client.get("/v1/models/silent")).json() == listed["silent"]
