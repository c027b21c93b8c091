"""The admin API over HTTP, as hosts and operators use it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

import pytest

from multiverse_gateway import Settings
from multiverse_gateway.core.engine_facts import Abilities, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.hosts import Host
from multiverse_gateway.core.servers import Server
from multiverse_gateway.observability.tail import Tail
from multiverse_gateway.probes.models import create as models_probe
from multiverse_gateway.stores.memory import MemoryStore
from support.gateways import BODY, Stage, stage

NOBODY = "00000000-0000-4000-8000-000000000000"
BODIED = [
    ("POST", "/admin/register"),
    ("PUT", "/admin/register/{id}"),
    ("POST", "/admin/test-connection"),
    ("POST", "/admin/import"),
]
NAMED = [
    ("PUT", "/admin/register/{id}"),
    ("DELETE", "/admin/register/{id}"),
    ("GET", "/admin/servers/{id}"),
    ("GET", "/admin/servers/{id}/history"),
    ("POST", "/admin/servers/{id}/health-check"),
]


async def test_registering_answers_with_the_record() -> None:
    """TC-REG-001: 201 first, 200 again, and the key never comes back."""
    async with stage() as at:
        body = {**BODY, "api_key": "sk-backend", "metadata": {"student_id": "s1"}}
        first = await at.client.post("/admin/register", json=body)
        again = await at.client.post("/admin/register", json=body)
        assert (first.status_code, again.status_code) == (201, 200)
        record = first.json()
        assert again.json()["registration_id"] == record["registration_id"] == record["id"]
        assert (record["status"], record["health_status"], record["state"], record["has_api_key"]) == (
            "registered",
            "healthy",
            "healthy",
            True,
        )
        assert (record["capabilities"]["streaming"], record["metadata"]["student_id"], record["active"]) == (True, "s1", True)
        assert "sk-backend" not in first.text + again.text + (await at.client.get("/admin/export")).text
        for name in ("registered_at", "created_at", "updated_at", "last_checked_at", "last_transition_at"):
            assert datetime.fromisoformat(record[name]).tzinfo is not None, name


async def test_a_failed_probe_is_503_with_its_reason() -> None:
    async with stage() as at:
        at.probe.failing[BODY["endpoint_url"]] = "nobody listens there"
        response = await at.client.post("/admin/register", json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "probe_failed")
        assert "nobody listens there" in response.json()["error"]["message"]
        assert (await at.client.get("/admin/servers")).json() == []


@pytest.mark.parametrize(("method", "path"), BODIED)
@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b'{"model_name": NaN}', 400, "invalid_json"),
        (b'{"model_name": ' + b"[" * 100_000, 400, "invalid_json"),
        (b'{"x": 1}', 400, None),
        (b'{"\xc3\xa9": 1}', 400, None),
        (b'{"model_name": 5, "endpoint_url": 5, "servers": 5}', 400, None),
        (b'{"pad": "' + b"x" * 5000 + b'"}', 413, "request_too_large"),
    ],
)
async def test_no_body_does_harm(method: str, path: str, content: bytes, status: int, code: str | None) -> None:
    """TC-ERR-002: each is told what is wrong, and nothing changes."""
    limit = 200_000 if len(content) > 50_000 else 4096
    async with stage(max_admin_body_bytes=limit) as at:
        record = await at.register()
        before = await at.gateway.store.load()
        response = await at.client.request(method, path.format(id=record["id"]), content=content)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert (await at.gateway.store.load()).servers == before.servers


@pytest.mark.parametrize(("method", "path"), NAMED)
@pytest.mark.parametrize("server_id", [NOBODY, "x", "%00", "%ff", "1" * 500])
async def test_an_unknown_server_is_404(method: str, path: str, server_id: str) -> None:
    async with stage() as at:
        response = await at.client.request(method, path.format(id=server_id), json={} if method == "PUT" else None)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "server_not_found")


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/admin/servers?limit=0", "limit"),
        ("/admin/servers?limit=1001", "limit"),
        ("/admin/servers?limit=x", "limit"),
        ("/admin/servers?limit=%C2%B2", "limit"),
        ("/admin/servers?offset=-1", "offset"),
        ("/admin/servers?health_status=fine", "health_status"),
        ("/admin/servers?include_inactive=maybe", "include_inactive"),
        ("/admin/servers?sort=api_key", "sort"),
        ("/admin/servers?order=up", "order"),
        ("/admin/servers/{id}/history?limit=101", "limit"),
        ("/admin/servers/{id}/history?limit=", "limit"),
        ("/admin/logs?level=LOUD", "level"),
        ("/admin/logs?limit=0", "limit"),
        ("/admin/logs?since=yesterday", "since"),
        ("/admin/logs?since=2026-05-01T12:00:00", "since"),
        ("/admin/export?include_keys=please", "include_keys"),
    ],
)
async def test_a_bad_query_names_its_parameter(path: str, param: str) -> None:
    async with stage() as at:
        record = await at.register()
        response = await at.client.get(path.format(id=record["id"]))
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_name_that_leads_nowhere_is_no_usable_url() -> None:
    """The connection test says so at the address, and says nothing about steps that were not taken."""

    async def resolve(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    async with stage(probe=models_probe(Settings()), resolve=resolve) as at:
        tested = (await at.client.post("/admin/test-connection", json=BODY)).json()
        assert (tested["ok"], [(step["step"], step["ok"]) for step in tested["steps"]]) == (False, [("address", False)])
        assert tested["steps"][0]["message"] == tested["reason"]


PADDED: dict[str, Any] = {
    "model_name": " tiny\n",
    "endpoint_url": "\thttp://gpu.example:8000\r\n",
    "api_key": "the-key-of-the-server\n",
    "metadata": {"student_id": "s1\n", "description": "  a card with 8 GB\n\n"},
}


async def check_trimmed(at: Stage) -> None:
    """Check that the only server is as if nothing had been around its texts."""
    (server,) = (await at.gateway.store.load()).servers
    assert (server.model_name, server.endpoint_url, server.api_key) == ("tiny", "http://gpu.example:8000", "the-key-of-the-server")
    assert (server.metadata.student_id, server.metadata.description) == ("s1", "a card with 8 GB")


async def test_white_space_around_a_text_is_dropped() -> None:
    """A file read by a shell ends with a line feed: registered, changed, tested or imported, it does not count."""
    async with stage() as at:
        assert (await at.client.post("/admin/test-connection", json=PADDED)).json()["ok"] is True
        record = await at.register(**PADDED)
        await check_trimmed(at)
        assert (await at.client.post("/admin/register", json=PADDED)).status_code == 200, "the same pair"
        assert (await at.client.put(f"/admin/register/{record['id']}", json={"model_name": "other"})).status_code == 200
        assert (await at.client.put(f"/admin/register/{record['id']}", json=PADDED)).status_code == 200
        await check_trimmed(at)
        imported = await at.client.post("/admin/import", json={"servers": [{**PADDED, "registration_id": f"{record['id']}\n"}]})
        assert imported.json() == {"imported": 1, "created": 0, "updated": 0, "unchanged": 1}
        made = (await at.client.post("/admin/keys", json={"name": " alice\n", "models": ["tiny\n"]})).json()
        assert (made["name"], made["models"]) == ("alice", ["tiny"])
        again = await at.client.post("/admin/keys", json={"name": "alice\n"})
        assert (again.status_code, again.json()["error"]["param"]) == (400, "name"), "the same name"
        for field, text in (("model_name", "a b"), ("model_name", "\n"), ("api_key", "a\nb"), ("api_key", " ")):
            refused = await at.client.post("/admin/register", json={**BODY, field: text})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        refused = await at.client.post("/admin/register", json={**BODY, "metadata": {"description": "two\nlines"}})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "metadata.description")


async def names(at: Stage, **params: Any) -> list[str]:
    return [record["endpoint_url"][7] for record in (await at.client.get("/admin/servers", params=params)).json()]


async def test_the_list_is_filtered_sorted_and_paged() -> None:
    async with stage() as at:
        for letter, model, owner in (("b", "m2", "s1"), ("a", "m1", None), ("c", "m1", "s2")):
            await at.register(endpoint_url=f"http://{letter}.example", model_name=model, metadata={"student_id": owner})
            at.clock.advance(1)
        assert await names(at) == ["b", "a", "c"]
        assert await names(at, model_name="m1") == ["a", "c"]
        assert await names(at, student_id="s1") == ["b"]
        assert await names(at, health_status="healthy", order="desc") == ["c", "a", "b"]
        assert await names(at, health_status="unknown") == []
        assert await names(at, sort="model_name") == ["a", "c", "b"]
        assert await names(at, sort="last_checked_at", order="desc") == ["c", "a", "b"]
        assert await names(at, sort="student_id") == ["a", "b", "c"]
        assert await names(at, limit=1, offset=1) == ["a"]
        assert (await at.client.get("/admin/servers?limit=1")).headers["x-total-count"] == "3"


async def test_inactive_servers_are_listed_where_they_are_asked_for() -> None:
    async with stage() as at:
        gone = await at.register(endpoint_url="http://a.example")
        down = await at.register(endpoint_url="http://b.example")
        await at.client.delete(f"/admin/register/{gone['id']}")
        at.probe.failing["http://b.example"] = "it is off"
        for _ in range(3):
            await at.client.post(f"/admin/servers/{down['id']}/health-check")
        assert await names(at) == []
        records = (await at.client.get("/admin/servers?include_inactive=true")).json()
        assert {record["state"]: (record["active"], record["reason"]) for record in records} == {
            "removed": (False, None),
            "deactivated": (False, "it is off"),
        }


async def test_a_detail_shows_figures_and_history() -> None:
    """FR-HEALTH-006/008: every check is kept with its reason and duration, newest first."""
    async with stage() as at:
        record = await at.register()
        at.clock.advance(60)
        at.probe.failing[BODY["endpoint_url"]] = "it is off"
        checked = (await at.client.post(f"/admin/servers/{record['id']}/health-check")).json()
        assert (checked["passed"], checked["reason"], checked["health_status"]) == (False, "it is off", "unhealthy")
        at.clock.advance(20)
        detail = (await at.client.get(f"/admin/servers/{record['id']}")).json()
        assert (detail["success_rate"], detail["uptime_percentage"], detail["mean_response_time_ms"]) == (0.5, 75.0, 250.0)
        assert (detail["consecutive_failures"], detail["reason"], detail["health_status"]) == (1, "it is off", "unhealthy")
        checks = (await at.client.get(f"/admin/servers/{record['id']}/history")).json()
        assert [check["passed"] for check in checks] == [False, True]
        assert (checks[0]["reason"], checks[0]["duration_ms"]) == ("it is off", 250.0)
        assert len((await at.client.get(f"/admin/servers/{record['id']}/history?limit=1")).json()) == 1


async def test_a_forced_check_that_passes_lifts_unhealthy() -> None:
    async with stage() as at:
        record = await at.register()
        at.probe.failing[BODY["endpoint_url"]] = "it is off"
        await at.client.post(f"/admin/servers/{record['id']}/health-check")
        at.probe.failing.clear()
        checked = await at.client.post(f"/admin/servers/{record['id']}/health-check")
        assert (checked.status_code, checked.json()["passed"], checked.json()["health_status"]) == (200, True, "healthy")


async def test_changing_and_removing() -> None:
    """TC-REG-004, 005, 006."""
    async with stage() as at:
        record = await at.register(metadata={"student_id": "s1"})
        path = f"/admin/register/{record['id']}"
        changed = (await at.client.put(path, json={"max_concurrency": 3})).json()
        assert (changed["id"], changed["max_concurrency"], changed["metadata"]["student_id"]) == (record["id"], 3, "s1")
        assert (await at.client.put(path, json={"endpoint_url": "http://10.0.0.1:9000"})).json()["error"]["param"] == "endpoint_url"
        at.probe.failing["http://new.example"] = "nobody there"
        assert (await at.client.put(path, json={"endpoint_url": "http://new.example"})).status_code == 503
        assert (await at.client.get(f"/admin/servers/{record['id']}")).json()["endpoint_url"] == BODY["endpoint_url"]
        assert (await at.client.delete(path)).status_code == 200
        assert at.gateway.table.routes == {}
        assert (await at.client.delete(path)).status_code == 404
        assert (await at.client.put(path, json={})).status_code == 404


async def test_a_test_registers_nothing_and_is_limited() -> None:
    async with stage() as at:
        for _ in range(10):
            response = await at.client.post("/admin/test-connection", json={"endpoint_url": "http://a.example"})
            assert (response.status_code, response.json()["ok"]) == (200, True)
        assert (await at.client.post("/admin/test-connection", json={"endpoint_url": "http://a.example"})).status_code == 429
        at.clock.advance(60)
        refused = await at.client.post("/admin/test-connection", json={"endpoint_url": "http://192.168.0.1"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "endpoint_url")
        assert (await at.client.get("/admin/servers")).json() == []


async def test_stats_count_what_there_is() -> None:
    async with stage() as at:
        await at.register()
        await at.register(endpoint_url="http://second.example", model_name="other")
        stats = (await at.client.get("/admin/stats")).json()
        assert (stats["total_servers"], stats["healthy_servers"], stats["models"], stats["state"]) == (2, 2, 2, "healthy")
        assert (stats["requests_handled"], stats["in_flight"]) == (0, 0)


async def test_a_registry_goes_out_and_comes_in() -> None:
    async with stage() as one, stage() as other:
        await one.register(api_key="sk-backend")
        exported = (await one.client.get("/admin/export?include_keys=true")).json()
        assert exported["servers"][0]["api_key"] == "sk-backend"
        for expected in ({"created": 1, "unchanged": 0}, {"created": 0, "unchanged": 1}):
            counts = (await other.client.post("/admin/import", json=exported)).json()
            assert {name: counts[name] for name in expected} == expected
        assert (await other.client.get("/admin/servers")).json()[0]["health_status"] == "unknown"


class Tailed:
    """A tail that tells what it was asked for."""

    def select(self, **asked: Any) -> list[dict[str, Any]]:
        return [asked]


async def test_logs_are_asked_for_as_the_query_says() -> None:
    async with stage() as at:
        assert (await at.client.get("/admin/logs")).json() == []
        at.logs.follow(cast(Tail, Tailed()))
        query: dict[str, str | int] = {"level": "WARNING", "component": "health", "text": "x", "since": "1970-01-01T00:01:00Z", "limit": 5}
        expected = {"level": "WARNING", "component": "health", "text": "x", "since": 60.0, "limit": 5, "client": None, "after": None}
        assert (await at.client.get("/admin/logs", params=query)).json() == [expected]


class ReadOnly(MemoryStore):
    """A store on a full disk."""

    async def save_server(self, server: Server) -> None:
        raise StorageUnavailable("The registry cannot be written now; try again in a moment")

    async def save_host(self, host: Host, servers: Sequence[Server] = ()) -> None:
        raise StorageUnavailable("The registry cannot be written now; try again in a moment")


async def test_a_full_disk_is_503_and_not_acknowledged() -> None:
    """TC-ERR-004."""
    async with stage(store=ReadOnly()) as at:
        response = await at.client.post("/admin/register", json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "storage_unavailable")
        assert at.gateway.table.routes == {}


async def test_a_record_shows_what_was_read_from_the_engine() -> None:
    """Beside what the registration states; `null` before the first reading, and for what the engine does not say."""
    async with stage() as at:
        record = await at.register()
        assert record["measured"] is None
        server = at.gateway.table.routes[record["id"]].server
        model = ModelFacts(
            name="tiny", is_loaded=True, context=8192, trained_context=131072, gpu_share=0.8, abilities=Abilities(chat=True, vision=False)
        )
        at.gateway.health_book.note_measured(server, Measured(kind=EngineKind.LLAMA_CPP, version="b1", slots=4, model=model))
        at.gateway.health_book.note_cut(server)
        expected = {
            "engine": "llama.cpp",
            "engine_version": "b1",
            "slots": 4,
            "loaded": True,
            "context_length": 8192,
            "trained_context_length": 131072,
            "size_bytes": None,
            "gpu_share": 0.8,
            "quantization": None,
            "digest": None,
            "abilities": {
                "chat": True,
                "completions": None,
                "embeddings": None,
                "rerank": None,
                "tools": None,
                "vision": False,
                "audio": None,
                "reasoning": None,
                "json_schema": None,
            },
            "truncated_texts": 1,
        }
        assert (await at.client.get(f"/admin/servers/{record['id']}")).json()["measured"] == expected
        assert (await at.client.get("/admin/servers")).json()[0]["measured"] == expected
        at.gateway.health_book.note_measured(server, Measured(kind=EngineKind.OTHER))
        measured = (await at.client.get(f"/admin/servers/{record['id']}")).json()["measured"]
        assert (measured["engine"], measured["context_length"], measured["abilities"]["chat"]) == ("other", None, None)
