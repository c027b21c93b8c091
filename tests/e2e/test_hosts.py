"""Hosts over real sockets: several models of one computer share its slots, and an engine is asked for its own names of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx2
import pytest

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
