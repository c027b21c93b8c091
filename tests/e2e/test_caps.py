"""How many requests a new server gets at once if its registration does not say: what its engine states, read over real sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from support import behaviours
from support.backends import Backend, Behaviour, Exchange
from support.processes import GatewayProcess, LlamaServer, environment

pytestmark = pytest.mark.e2e

SLOTS = {"/props": {"total_slots": 4, "model_path": "tiny.gguf"}}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """Start a gateway whose probes may take a second."""
    with GatewayProcess({"HEALTH_CHECK_TIMEOUT_SECONDS": "1", "RATE_LIMIT_PER_MINUTE": "0"}) as running:
        yield running


def register(gateway: GatewayProcess, url: str, **fields: Any) -> dict[str, Any]:
    """Register a server and return the answer, whose cap has to be that of the record."""
    answer = gateway.admin("POST", "/admin/register", {"model_name": "test-model", "endpoint_url": url, **fields})
    assert answer.status_code in (200, 201), answer.text
    record: dict[str, Any] = answer.json()
    assert gateway.server(record["id"])["max_concurrency"] == record["max_concurrency"]
    return record


@contextmanager
def engine(owned_by: str, states: Mapping[str, object]) -> Iterator[Backend]:
    """Run a server whose engine states something about itself."""
    with Backend("engine") as backend:
        backend.owned_by, backend.states = owned_by, states
        yield backend


@pytest.mark.parametrize(
    ("owned_by", "states", "limit", "reason", "paths"),
    [
        ("llamacpp", SLOTS, 4, "llama.cpp states 4 slots, so it gets at most 4 requests at once.", {"/props"}),
        (
            "sglang",
            {"/get_server_info": {"max_running_requests": 32}},
            32,
            "SGLang states",
            {"/server_info", "/get_server_info", "/get_model_info"},
        ),
        ("org/model", {"/info": {"model_id": "org/model", "max_concurrent_requests": 128}}, 128, "TGI states", None),
        ("library", {"/api/version": {"version": "0.12.5"}}, 1, "Ollama does not state", {"/api/version", "/api/tags", "/api/ps"}),
        ("somebody", {"/api/version": {"version": "0.12.5"}}, 1, "Ollama does not state", None),
        ("vllm", {"/version": {"version": "0.11.0"}}, None, "vLLM does not state", {"/version"}),
        ("organization_owner", {}, None, "The server does not state", None),
    ],
)
def test_a_new_server_gets_what_its_engine_states(
    gateway: GatewayProcess, owned_by: str, states: Mapping[str, object], limit: int | None, reason: str, paths: set[str] | None
) -> None:
    """By GET requests with the stored key that generate nothing, and below the prefix of the server's URL if it has one."""
    with engine(owned_by, states) as backend:
        record = register(gateway, backend.url, api_key="sk-of-the-engine")
        assert record["max_concurrency"] == limit
        assert record["max_concurrency_reason"].startswith(reason)
        assert backend.hits == 0
        assert paths is None or {reading.path for reading in backend.readings} == paths
        assert {(reading.method, reading.header("authorization")) for reading in backend.readings} <= {("GET", "Bearer sk-of-the-engine")}
        assert all("autoload=false" in reading.target for reading in backend.readings if "model=" in reading.target)


def test_a_number_counts_null_is_no_cap_and_nothing_keeps_what_there_is(gateway: GatewayProcess) -> None:
    with engine("llamacpp", SLOTS) as backend:
        assert register(gateway, backend.url, max_concurrency=9)["max_concurrency"] == 9
        kept = register(gateway, backend.url)
        assert (kept["max_concurrency"], kept["max_concurrency_reason"]) == (
            9,
            "It keeps its limit of 9; the registration sets no other one.",
        )
        assert register(gateway, backend.url, max_concurrency=None)["max_concurrency"] is None
        still = register(gateway, backend.url)
        assert still["max_concurrency"] is None
        assert still["max_concurrency_reason"].endswith("llama.cpp states 4 slots: set max_concurrency to 4 to use that.")


def test_imports_and_changes_take_no_limit_from_the_engine(gateway: GatewayProcess) -> None:
    with engine("llamacpp", SLOTS) as backend:
        server = {"model_name": "test-model", "endpoint_url": backend.url}
        assert gateway.admin("POST", "/admin/import", {"servers": [server]}).json()["created"] == 1
        found = [item for item in gateway.admin("GET", "/admin/export").json()["servers"] if item["endpoint_url"] == backend.url]
        assert [item["max_concurrency"] for item in found] == [None]
        changed = gateway.admin("PUT", f"/admin/register/{found[0]['registration_id']}", {"weight": 3})
        assert changed.json()["max_concurrency"] is None


async def hang(exchange: Exchange) -> None:
    """Answer nothing."""
    await exchange.forever()


async def drip(exchange: Exchange) -> None:
    """Send an answer that never ends."""
    await exchange.start_stream(content_type="application/json")
    while True:
        await exchange.chunk(b" " * 65536)


async def redirect(exchange: Exchange) -> None:
    """Lead to somebody else."""
    await exchange.answer(302, b'{"total_slots": 7}', headers=[("location", f"{exchange.backend.url}/v1/models")])


async def reset(exchange: Exchange) -> None:
    """Drop the connection."""
    exchange.reset()


async def rambles(exchange: Exchange) -> None:
    """Answer with a page."""
    await exchange.answer(200, b"<html>", content_type="text/html")


@pytest.mark.parametrize("behave", [hang, drip, redirect, reset, rambles, behaviours.status(401), behaviours.status(500)])
@pytest.mark.parametrize("owned_by", ["llamacpp", "somebody"])
def test_a_server_that_says_nothing_of_use_is_registered_all_the_same(gateway: GatewayProcess, behave: Behaviour, owned_by: str) -> None:
    with engine(owned_by, {}) as backend:
        backend.behave_engine = behave
        record = register(gateway, backend.url)
        assert record["max_concurrency"] is None
        assert record["max_concurrency_reason"] == ("The server does not state how many requests it answers at once, so there is no limit.")
        assert record["health_status"] == "healthy"


async def hang_but_for_slots(exchange: Exchange) -> None:
    """Answer one of the paths and leave the others open."""
    if exchange.request.path != "/props":
        await exchange.forever()
    await exchange.answer(200, b'{"total_slots": 3}')


def test_one_path_that_hangs_hides_no_other(gateway: GatewayProcess) -> None:
    with engine("somebody", {}) as backend:
        backend.behave_engine = hang_but_for_slots
        assert register(gateway, backend.url)["max_concurrency"] == 3


def test_a_real_llama_server_states_its_slots(gateway: GatewayProcess, needs_llama: None) -> None:
    with LlamaServer("test-model") as llama:
        record = register(gateway, llama.url)
        assert record["max_concurrency"] == 4
        assert record["max_concurrency_reason"] == "llama.cpp states 4 slots, so it gets at most 4 requests at once."


def test_the_command_says_which_limit_and_why(gateway: GatewayProcess) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "multiverse_gateway", "register", backend.url, "test-model", "--gateway", gateway.url, *options]
        return subprocess.run(
            command, env=environment({"ADMIN_API_KEY": gateway.admin_key}), capture_output=True, text=True, timeout=60, cwd=os.sep
        )

    with engine("llamacpp", SLOTS) as backend:
        assert "  limit   4: llama.cpp states 4 slots, so it gets at most 4 requests at once.\n" in run().stdout
        assert "  limit   none: The registration asks for no limit.\n" in run("--no-max-concurrency").stdout
        both = run("--no-max-concurrency", "--max-concurrency", "2")
        assert both.returncode == 2
        assert "contradict each other" in both.stderr
