"""Aliases over real sockets, at both doors: which model answers, what its answer says, and who may use it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx2
import pytest
from click.testing import CliRunner

from multiverse_gateway.cli import main
from support import behaviours
from support.backends import Backend
from support.processes import DOORS, GatewayProcess, door_setting
from support.sockets import serving

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    """Return a gateway without limits for its clients."""
    with GatewayProcess({"RATE_LIMIT_PER_MINUTE": "0", **door_setting(request.param)}) as process:
        yield process


def run(gateway: GatewayProcess, *arguments: str) -> str:
    """Run a command about aliases and return what it prints."""
    result = CliRunner().invoke(main, ["aliases", *arguments, "--gateway", gateway.url, "--admin-key", gateway.admin_key])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_for_an_alias_is_answered_by_the_first_model_that_can(gateway: GatewayProcess, stream: bool) -> None:
    """The preferred model; the next one after its server fails, in the same request; usage counts for the model that answered."""
    large, small = Backend("large", models=(f"large-{stream}",)), Backend("small", models=(f"small-{stream}",))
    name = f"class-default-{stream}"
    with serving(large, small):
        for engine in (large, small):
            gateway.register(engine.models[0], engine.url)
        assert "stands for" in run(gateway, "set", name, "missing", large.models[0], small.models[0])
        assert name in run(gateway, "list")
        first = gateway.chat(name, stream=stream)
        assert (first.status_code, first.headers["x-multiverse-model"]) == (200, large.models[0])
        assert json.loads(large.requests[0].body)["model"] == large.models[0]
        direct = gateway.chat(large.models[0], stream=stream)
        assert "x-multiverse-model" not in direct.headers
        large.behave = behaviours.status(500)
        second = gateway.chat(name, stream=stream)
        assert (second.status_code, second.headers["x-multiverse-model"]) == (200, small.models[0])
        assert second.headers["x-multiverse-attempts"] == "2"
        listed = {model["id"]: model for model in gateway.call("GET", "/v1/models").json()["data"]}
        assert listed[name]["alias_of"] == [large.models[0], small.models[0]]
        assert "alias_of" not in listed[large.models[0]]
        assert gateway.call("GET", f"/v1/models/{name}").json() == listed[name]
        run(gateway, "remove", name)
        assert gateway.chat(name, stream=stream).status_code == 404


def test_an_alias_is_defined_changed_and_removed_over_the_api(gateway: GatewayProcess) -> None:
    """Errors name the field; a loop is rejected; the name may have a slash."""

    def put(name: str, body: object) -> httpx2.Response:
        return gateway.admin("PUT", f"/admin/aliases/{name}", body)

    made = put("org/best", {"models": ["phi-4", "qwen3:8b"]})
    assert (made.status_code, made.json()["models"]) == (200, ["phi-4", "qwen3:8b"])
    assert put("other", {"models": ["org/best"]}).status_code == 200
    for name, body, field in (
        ("org/best", {"models": ["other"]}, "models"),
        ("org/best", {"models": []}, "models"),
        ("a b", {"models": ["phi-4"]}, "name"),
        ("org/best", {"models": ["phi-4"], "more": 1}, "more"),
    ):
        refused = put(name, body)
        assert (refused.status_code, refused.json().get("error", refused.json()).get("param", refused.text).split("[")[0]) == (
            400,
            field,
        ), refused.text
    assert [record["name"] for record in gateway.admin("GET", "/admin/aliases").json()] == ["org/best", "other"]
    assert gateway.call("GET", "/admin/aliases").status_code in (401, 403)
    for name in ("org/best", "other:latest"):
        assert gateway.admin("DELETE", f"/admin/aliases/{name}").status_code == 200
        gone = gateway.admin("DELETE", f"/admin/aliases/{name}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "alias_not_found")


def test_a_key_can_be_for_an_alias(gateway: GatewayProcess) -> None:
    """It opens the alias, and not the models that it stands for."""
    engine = Backend("phi", models=("phi-4-mini",))
    with serving(engine):
        gateway.register("phi-4-mini", engine.url)
        run(gateway, "set", "for-the-class", "phi-4-mini")
        key = gateway.admin("POST", "/admin/keys", {"name": "only the alias", "models": ["for-the-class"]}).json()["key"]
        with httpx2.Client(base_url=gateway.url, headers={"authorization": f"Bearer {key}"}) as client:
            statuses = {
                name: client.post("/v1/chat/completions", json={"model": name, "messages": []}).status_code
                for name in ("for-the-class", "phi-4-mini")
            }
            assert statuses == {"for-the-class": 200, "phi-4-mini": 403}
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["for-the-class"]
