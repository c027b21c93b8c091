"""A model that a server does not list is tried before it is accepted, at every door."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from multiverse_gateway.cli import main
from support import behaviours
from support.backends import Backend, Exchange
from support.processes import GatewayProcess

SETTINGS = {"RATE_LIMIT_PER_MINUTE": "0", "HEALTH_CHECK_TIMEOUT_SECONDS": "2"}
LISTED = ("llama3.2:1b", "nomic-embed-text")


async def like_ollama(exchange: Exchange) -> None:
    """Answer requests for one name that is listed, and for two that are not; as Ollama for any other."""
    path, model = exchange.request.path, exchange.model
    if model == "alias":
        await exchange.answer(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": "H"}}]}).encode())
    elif model == "embed-alias" and path == "/v1/embeddings":
        await exchange.answer(200, json.dumps({"data": [{"embedding": [0.5]}]}).encode())
    elif model == "embed-alias":
        await exchange.answer(400, json.dumps({"error": {"message": f'"{model}" does not support chat'}}).encode())
    elif model == "loading":
        await exchange.answer(503, b"{}")
    elif model == "bare":
        await exchange.answer(404, b"", content_type=None)
    else:
        await exchange.answer(404, json.dumps({"error": {"message": f'model "{model}" not found, try pulling it first'}}).encode())


async def lack_everything(exchange: Exchange) -> None:
    """Answer as a server from which the model was removed."""
    await exchange.answer(404, json.dumps({"error": {"message": f"model '{exchange.model}' not found"}}).encode())


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """Run a gateway."""
    with GatewayProcess(SETTINGS) as process:
        yield process


@pytest.fixture
def ollama() -> Iterator[Backend]:
    """Run a server that knows what it has."""
    with Backend("ollama", like_ollama, models=LISTED) as backend:
        backend.behave_trial = like_ollama
        yield backend


def error_of(answer: Any) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.e2e
def test_a_misspelled_model_is_refused_with_the_closest_name(gateway: GatewayProcess, ollama: Backend) -> None:
    """By registration, by a change of the name, and by the command; nothing is registered, and no other model is asked for a token."""
    body = {"model_name": "lama3.2:1b", "endpoint_url": ollama.url}
    refused = gateway.admin("POST", "/admin/register", body)
    assert (refused.status_code, error_of(refused)["code"], error_of(refused)["param"]) == (400, "model_not_offered", "model_name")
    assert error_of(refused)["message"] == (
        "The server does not list the model lama3.2:1b, and a test request for it failed: it does not know the model. "
        "Did you mean llama3.2:1b?"
    )
    assert [request.asked("model") for request in ollama.trials] == ["lama3.2:1b"]
    far = gateway.admin("POST", "/admin/register", {**body, "model_name": "gpt-4"})
    assert "It lists: llama3.2:1b, nomic-embed-text." in error_of(far)["message"]

    server = gateway.register("llama3.2:1b", ollama.url)
    assert len(ollama.trials) == 2, "a listed model costs no token"
    changed = gateway.admin("PUT", f"/admin/register/{server}", {"model_name": "lama3.2:1b"})
    assert (changed.status_code, error_of(changed)["code"]) == (400, "model_not_offered")
    assert gateway.server(server)["model_name"] == "llama3.2:1b"
    options = ["--gateway", gateway.url, "--admin-key", gateway.admin_key]
    result = CliRunner().invoke(main, ["register", ollama.url, "lama3.2:1b", *options])
    assert (result.exit_code, "Did you mean llama3.2:1b?" in result.output) == (1, True)
    gateway.admin("DELETE", f"/admin/register/{server}")


@pytest.mark.e2e
@pytest.mark.parametrize("model", ["alias", "embed-alias"])
def test_a_name_that_answers_is_accepted_with_a_note(gateway: GatewayProcess, ollama: Backend, model: str) -> None:
    """It needs no attention, and registering it again costs no other token."""
    server = gateway.register(model, ollama.url)
    record = gateway.server(server)
    assert record["warning"] == "the server does not list the registered model, but it answers requests for it"
    assert not record["needs_attention"]
    tokens = len(ollama.trials)
    gateway.register(model, ollama.url, weight=2)
    checked = gateway.admin("POST", f"/admin/servers/{server}/health-check")
    assert checked.json()["passed"]
    assert gateway.server(server)["warning"] == record["warning"]
    assert len(ollama.trials) == tokens
    gateway.admin("DELETE", f"/admin/register/{server}")


@pytest.mark.e2e
@pytest.mark.parametrize(("model", "status", "code"), [("loading", 503, "probe_failed"), ("bare", 400, "model_not_offered")])
def test_a_test_request_that_proves_nothing_registers_nothing(
    gateway: GatewayProcess, ollama: Backend, model: str, status: int, code: str
) -> None:
    """A server that is still loading may know the model in a moment; one that answers no call under the name has no such model."""
    refused = gateway.admin("POST", "/admin/register", {"model_name": model, "endpoint_url": ollama.url})
    assert (refused.status_code, error_of(refused)["code"], error_of(refused)["param"]) == (status, code, "model_name")


@pytest.mark.e2e
def test_an_endless_answer_is_not_read_to_its_end(gateway: GatewayProcess, ollama: Backend) -> None:
    """Of a server without chat that sends and sends, the gateway reads no more than a probe would."""

    async def endless(exchange: Exchange) -> None:
        if exchange.request.path == "/v1/chat/completions":
            await exchange.answer(404, b"{}")
            return
        await exchange.start_stream(content_type="application/json")
        while True:
            await exchange.chunk(b" " * 65536)

    ollama.behave = ollama.behave_trial = endless
    refused = gateway.admin("POST", "/admin/register", {"model_name": "endless", "endpoint_url": ollama.url})
    assert error_of(refused)["code"] == "model_not_offered"
    sent = [request.sent for request in ollama.requests]
    assert len(sent) == 3
    assert max(sent) < 16 << 20


@pytest.mark.e2e
def test_a_server_without_a_list_is_asked_for_the_model(gateway: GatewayProcess, ollama: Backend) -> None:
    """An empty list lacks every model."""
    ollama.models = ()
    refused = gateway.admin("POST", "/admin/register", {"model_name": "gpt-4", "endpoint_url": ollama.url})
    assert error_of(refused)["message"].endswith("it does not know the model.")


@pytest.mark.e2e
def test_an_imported_server_that_lacks_its_model_needs_attention(gateway: GatewayProcess, ollama: Backend) -> None:
    """An import asks no server for anything; the next check finds that the list lacks the model, and the first good answer settles it."""
    answer = gateway.admin("POST", "/admin/import", {"servers": [{"model_name": "alias", "endpoint_url": ollama.url}]})
    assert answer.json()["created"] == 1
    (server,) = [record["id"] for record in gateway.admin("GET", "/admin/servers").json() if record["endpoint_url"] == ollama.url]
    gateway.admin("POST", f"/admin/servers/{server}/health-check")
    record = gateway.server(server)
    assert (record["health_status"], record["needs_attention"], ollama.trials) == ("healthy", True, [])
    assert gateway.admin("GET", "/admin/stats").json()["attention_servers"] == 1
    ollama.behave = behaviours.good()
    assert gateway.chat("alias").status_code == 200
    record = gateway.server(server)
    assert (record["needs_attention"], record["warning"][:40]) == (False, "the server does not list the registered ")
    ollama.behave = lack_everything
    assert gateway.chat("alias").status_code == 404
    assert gateway.server(server)["needs_attention"]
    gateway.admin("DELETE", f"/admin/register/{server}")


@pytest.mark.e2e
def test_the_form_offers_the_close_name(gateway: GatewayProcess, ollama: Backend) -> None:
    """As a button that fills the field in."""
    with httpx2.Client(base_url=gateway.url, headers={"origin": gateway.url}, follow_redirects=True) as browser:
        page = browser.get("/login").text
        browser.post("/login", data={"key": gateway.admin_key, "form_token": re.search(r'form_token" value="([^"]*)', page)[1]})  # type: ignore[index]
        token = browser.get("/session").json()["token"]
        form = {"csrf": token, "model_name": "lama3.2:1b", "endpoint_url": ollama.url}
        answer = browser.post("/register", data=form, headers={"hx-request": "true"})
    assert 'data-fill="model_name" data-value="llama3.2:1b">Use llama3.2:1b</button>' in answer.text
    assert "Did you mean llama3.2:1b?" in answer.text
