"""Hosts over real sockets: several models of one computer share its slots, and an engine is asked for its own names of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx2
import pytest
from click.testing import CliRunner

from multiverse_gateway.cli import main
from support import behaviours
from support.backends import Backend
from support.processes import DOORS, GatewayProcess, door_setting
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    """Return a gateway without limits for its clients."""
    with GatewayProcess({"RATE_LIMIT_PER_MINUTE": "0", **door_setting(request.param)}) as process:
        yield process


@pytest.mark.parametrize("stream", [False, True])
def test_two_models_of_a_host_never_exceed_its_cap(gateway: GatewayProcess, stream: bool) -> None:
    """Eight requests for two models of one computer with two slots: two run at a time, and the slots go from model to model."""
    names = [f"{size}-{stream}" for size in ("large", "small")]
    engine, gate, answers = Backend("lab", models=names), behaviours.Gate(), list[int]()
    engine.behave = gate.held(behaviours.good())
    with serving(engine):
        records = [gateway.server(gateway.register(name, engine.url, max_concurrency=2)) for name in names]
        assert len({record["host_id"] for record in records}) == 1

        def ask(model: str) -> None:
            with httpx2.Client(base_url=gateway.url, timeout=30) as client:
                body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
                answers.append(client.post("/v1/chat/completions", json=body).status_code)

        threads = [threading.Thread(target=ask, args=[names[number % 2]]) for number in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(queue["waiting"] for queue in gateway.call("GET", "/v1/queue").json()["data"]) == 6)
        assert engine.running == 2
        gate.open()
        for thread in threads:
            thread.join(30)
        assert (answers, engine.most_running) == ([200] * 8, 2)
        for record in records:
            assert gateway.admin("DELETE", f"/admin/register/{record['registration_id']}").status_code in (200, 204)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_is_asked_for_its_own_name_of_a_model(gateway: GatewayProcess, stream: bool) -> None:
    """The same model at two engines that call it differently is one model; every other byte of a request stays."""
    upstream = {"ollama": "llama3.2:3b", "vllm": "meta-llama/Llama 3.2 3B (Instruct)"}
    engines = [Backend(name, models=(asked,)) for name, asked in upstream.items()]
    body = b'{"messages":  [{"role":"user","content":"model"}], "x":{"model":1}, "model" :"llama-3.2-3b", "stream":%b}'
    body %= b"true" if stream else b"false"
    with serving(*engines):
        for engine in engines:
            record = gateway.server(gateway.register("llama-3.2-3b", engine.url, upstream_model=upstream[engine.name]))
            assert record["upstream_model"] == upstream[engine.name]
            assert record["warning"] is None
        for _ in range(4):
            answer = httpx2.post(f"{gateway.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 200
        for engine in engines:
            sent = [request.body for request in engine.requests if request.path.endswith("/chat/completions")]
            assert sent, "both engines serve the model"
            name = json.dumps(upstream[engine.name]).encode()
            expected = body.replace(b'"llama-3.2-3b"', name)
            asked = {each.replace(b'"stream_options":{"include_usage":true},', b"") for each in sent}
            assert asked == {expected}
        assert [model["id"] for model in gateway.call("GET", "/v1/models").json()["data"]].count("llama-3.2-3b") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_new_cap_of_a_host_holds_for_the_requests_that_wait(gateway: GatewayProcess, stream: bool) -> None:
    """A larger one starts waiting requests of all models; under a smaller one those that run end, and the others wait for it."""
    names = [f"{size}-put-{stream}" for size in ("large", "small")]
    engine, gate, answers = Backend("lab", models=names), behaviours.Gate(), list[int]()
    engine.behave = gate.held(behaviours.good())
    with serving(engine):
        records = [gateway.server(gateway.register(name, engine.url, max_concurrency=1)) for name in names]
        path = f"/admin/hosts/{records[0]['host_id']}"

        def ask(model: str) -> None:
            with httpx2.Client(base_url=gateway.url, timeout=30) as client:
                body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
                answers.append(client.post("/v1/chat/completions", json=body).status_code)

        threads = [threading.Thread(target=ask, args=[names[number % 2]]) for number in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(queue["waiting"] for queue in gateway.call("GET", "/v1/queue").json()["data"]) == 7)
        assert engine.running == 1
        changed = gateway.admin("PUT", path, {"max_concurrency": 3})
        assert (changed.status_code, changed.json()["max_concurrency"]) == (200, 3)
        assert [server["max_concurrency"] for server in changed.json()["servers"]] == [3, 3]
        wait_until(lambda: engine.running == 3)
        assert gateway.admin("GET", path).json()["in_flight"] == 3
        listed = CliRunner().invoke(main, ["hosts", "--gateway", gateway.url, "--admin-key", gateway.admin_key]).output
        assert ", ".join(names) in listed
        arguments = ["set", records[0]["host_id"], "--max-concurrency", "2", "--gateway", gateway.url, "--admin-key", gateway.admin_key]
        assert "at most 2 requests" in CliRunner().invoke(main, ["hosts", *arguments]).output
        gate.open()
        for thread in threads:
            thread.join(30)
        assert (answers, engine.most_running) == ([200] * 8, 3)
        assert sorted(gateway.admin("DELETE", path).json()["registration_ids"]) == sorted(record["id"] for record in records)


def test_a_host_moves_with_all_its_models_after_one_probe(gateway: GatewayProcess) -> None:
    """The new address must answer and offer every model; otherwise nothing changes. Owner tokens stay."""
    names = ("moving-a", "moving-b", "moving-c")
    old, new, other = Backend("old", models=names), Backend("new", models=names), Backend("other", models=names[:2])
    other.behave_trial = behaviours.model_not_found()
    with serving(old, new, other):
        made = [
            gateway.admin("POST", "/admin/register", {"model_name": name, "endpoint_url": old.url, "metadata": {"student_id": "s1"}}).json()
            for name in names
        ]
        path = f"/admin/hosts/{made[0]['host_id']}"
        refused = gateway.admin("PUT", path, {"endpoint_url": other.url})
        assert (refused.status_code, refused.json().get("error", {}).get("code")) == (400, "model_not_offered"), refused.text
        assert gateway.admin("GET", path).json()["endpoint_url"] == old.url
        moved = gateway.admin("PUT", path, {"endpoint_url": f"{new.url}/v1", "api_key": "sk-new", "owner": "s2"})
        assert moved.status_code == 200, moved.text
        assert "sk-new" not in moved.text
        record = moved.json()
        assert (record["endpoint_url"], record["has_api_key"], record["owner"]) == (new.url, True, "s2")
        assert [(server["model_name"], server["state"]) for server in record["servers"]] == [(name, "healthy") for name in names]
        for name, server in zip(names, made, strict=True):
            assert gateway.chat(name).status_code == 200
            mine = gateway.admin("GET", f"/admin/servers/{server['id']}", key=server["owner_token"])
            assert (mine.status_code, mine.json()["host_id"]) == (200, record["id"])
        assert len(new.probes) == 1
        assert {request.header("authorization") for request in new.requests} == {"Bearer sk-new"}
        for method, key in (("GET", made[0]["owner_token"]), ("PUT", made[0]["owner_token"]), ("DELETE", "")):
            assert gateway.admin(method, path, {} if method == "PUT" else None, key=key).status_code in (401, 403)
        for body, field in (
            ({"endpoint_url": None}, "endpoint_url"),
            ({"max_concurrency": 0}, "max_concurrency"),
            ({"model_name": "x"}, "model_name"),
        ):
            wrong = gateway.admin("PUT", path, body)
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, field)
        assert record["id"] in [host["id"] for host in gateway.admin("GET", "/admin/hosts").json()]
        assert gateway.admin("DELETE", path).status_code == 200
        assert [gateway.chat(name).status_code for name in names] == [404] * 3
        for method in ("GET", "PUT", "DELETE"):
            gone = gateway.admin(method, path, {} if method == "PUT" else None)
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "host_not_found")


def test_other_processes_follow_a_change_of_a_host(gateway: GatewayProcess) -> None:
    """A second gateway with the same database applies a new limit, and knows none of the models once the host is removed."""
    names = ("shared-a", "shared-b")
    engine = Backend("shared", models=names)
    with serving(engine), GatewayProcess({"DATABASE_URL": f"sqlite:///{gateway.database.as_posix()}"}) as second:
        records = [gateway.server(gateway.register(name, engine.url)) for name in names]
        path = f"/admin/hosts/{records[0]['host_id']}"
        wait_until(lambda: [second.chat(name).status_code for name in names] == [200, 200])
        assert gateway.admin("PUT", path, {"max_concurrency": 2}).status_code == 200
        assert second.admin("GET", path).json()["max_concurrency"] == 2
        assert gateway.admin("DELETE", path).status_code == 200
        wait_until(lambda: [second.chat(name).status_code for name in names] == [404, 404])
        assert second.admin("GET", path).status_code == 404
