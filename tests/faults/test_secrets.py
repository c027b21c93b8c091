"""Keys and prompts stay where they belong: a whole scenario with markers, and everything that was written is searched for them."""

from __future__ import annotations

import io
import json
import logging
import stat
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from multiverse_gateway.core.servers import Server
from multiverse_gateway.observability.logging import configure, redact
from multiverse_gateway.protocols import Client, ProbeResult
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.sqlite import SqliteStore
from support import behaviours
from support.backends import Backend, Exchange
from support.gateways import BODY, stage
from support.processes import GatewayProcess
from support.raw_client import RawClient
from support.sockets import serving

KEYS = {name: f"MARKER-{name}-key-0123456789" for name in ("first", "second", "refused", "tested", "imported")}
CLIENT_KEY = "MARKER-client-key-0123456789"
ADMIN_KEY = "MARKER-admin-key-0123456789abcdef"
WRONG_KEY = "MARKER-wrong-key-0123456789"
SECRET = "MARKER-secret-of-the-vault-0123456789"
PROMPT = "MARKER-prompt-the-patient-is-called-Jo"
OUTPUT = "MARKER-output-take-two-of-these"


def answering(code: int) -> behaviours.Behaviour:
    """Return a server that throws back all that it was told, key included."""

    async def behave(exchange: Exchange) -> None:
        told = {"headers": exchange.request.headers, "body": exchange.request.body.decode(), "output": OUTPUT}
        await exchange.answer(code, json.dumps({"error": told}).encode())

    return behave


def talking(text: str) -> behaviours.Behaviour:
    """Return a server that answers with this text."""

    async def behave(exchange: Exchange) -> None:
        await exchange.answer(200, json.dumps({"object": "chat.completion", "choices": [{"message": {"content": text}}]}).encode())

    return behave


class Scenario:
    """What an operator and a user do in a bad hour, and all that they were answered."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self.gateway = gateway
        self.answers: list[httpx2.Response] = []

    def admin(self, method: str, path: str, json: Any = None, **more: Any) -> httpx2.Response:
        self.answers.append(self.gateway.admin(method, path, json, **more))
        return self.answers[-1]

    def ask(self, model: str, **more: Any) -> httpx2.Response:
        body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "user": PROMPT, **more}
        headers = {"authorization": f"Bearer {CLIENT_KEY}", "cookie": f"session={WRONG_KEY}"}
        return self.gateway.call("POST", "/v1/chat/completions", body, headers=headers)


def play(scenario: Scenario, good: Backend, bad: Backend) -> None:
    """Do everything that has to do with a key or a prompt, well and badly."""
    admin, ask = scenario.admin, scenario.ask
    first = admin("POST", "/register", {"model_name": "one", "endpoint_url": good.url, "api_key": KEYS["first"]}).json()
    assert "registration_id" in first, first
    admin("POST", "/register", {"model_name": "one", "endpoint_url": bad.url, "api_key": KEYS["first"]})
    refused = {"model_name": "one", "endpoint_url": "http://127.0.0.1:1024", "api_key": KEYS["refused"]}
    assert admin("POST", "/register", refused).status_code == 503
    admin("POST", "/register", {**refused, "endpoint_url": f"http://user:{KEYS['refused']}@127.0.0.1:1024"})
    admin("POST", "/register", {**refused, "weight": KEYS["refused"]})
    admin("POST", "/test-connection", {**refused, "api_key": KEYS["tested"]})
    admin("POST", "/test-connection", {**refused, "endpoint_url": good.url, "api_key": KEYS["tested"]})
    imported = {"model_name": "two", "endpoint_url": bad.url, "api_key": KEYS["imported"]}
    assert admin("POST", "/import", {"servers": [imported]}).status_code == 200
    assert admin("PUT", f"/register/{first['registration_id']}", {"api_key": KEYS["second"]}).status_code == 200
    good.behave = talking(OUTPUT)
    for behave in (*(answering(code) for code in (500, 503, 200, 302, 429)), behaviours.status(401), behaviours.cut_stream()):
        bad.behave = behave
        ask("one", stream=True)
        ask("one")
    assert ask("one").status_code == 200
    scenario.answers.append(ask("nobody-has-this"))
    scenario.answers.append(scenario.gateway.call("POST", "/v1/chat/completions", {"model": 7, "user": PROMPT}))
    scenario.answers.append(ask("one", stream=PROMPT))
    scenario.answers.append(scenario.gateway.call("POST", "/v1/chat/completions", headers={"authorization": f"Bearer {WRONG_KEY}"}))
    scenario.answers.append(scenario.gateway.admin("GET", "/servers", key=WRONG_KEY))
    for path in ("/servers", f"/servers/{first['registration_id']}", "/export", "/statistics", "/logs?limit=1000", "/settings"):
        admin("GET", path)
    admin("POST", f"/servers/{first['registration_id']}/health-check")
    admin("GET", f"/servers/{first['registration_id']}/health")
    for path in ("/health", "/metrics", "/v1/models", "/openapi.json"):
        scenario.answers.append(scenario.gateway.call("GET", path, headers={"x-api-key": CLIENT_KEY}))
    with RawClient(scenario.gateway.port) as client:  # who leaves in the middle
        client.request("POST", "/v1/chat/completions", json={"model": "one", "messages": [], "user": PROMPT})
    assert admin("DELETE", f"/register/{first['registration_id']}").status_code in (200, 204)


@pytest.mark.e2e
def test_nothing_that_is_written_holds_a_key_or_a_prompt(tmp_path: Path) -> None:
    """Section 10: not the log, the log file, the database and its journal, nor any answer; all files are private."""
    settings = {
        "LOG_LEVEL": "DEBUG",
        "LOG_FILE": str(tmp_path / "gateway.log"),
        "ADMIN_API_KEY": ADMIN_KEY,
        "CLIENT_API_KEYS": CLIENT_KEY,
        "REQUIRE_CLIENT_AUTH": "true",
        "BACKEND_KEY_SECRET": SECRET,
        "FIRST_BYTE_TIMEOUT_SECONDS": "2",
    }
    good, bad = Backend("good", models=("one", "two")), Backend("bad", models=("one", "two"))
    with serving(good, bad), GatewayProcess(settings, cwd=tmp_path) as gateway:
        scenario = Scenario(gateway)
        play(scenario, good, bad)
        gateway.restart()  # keys that were read, not given
        scenario.ask("two")
        written = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert {path.name for path in written} >= {"multiverse.db", "multiverse.db-wal", "gateway.log", "gateway-output.log"}
        gateway.stop()
        written |= {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert any(KEYS["second"] in str(request.headers) for request in good.requests), "the server itself got its key"
    for path, data in written.items():
        assert b"MARKER" not in data, path
        if path.name != "gateway-output.log" and path.exists():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    for answer in scenario.answers:
        text = f"{answer.headers} {answer.text}"
        for key in (*KEYS.values(), CLIENT_KEY, ADMIN_KEY, WRONG_KEY, SECRET, PROMPT, OUTPUT):
            assert key not in text, answer.request.url


class Careless:
    """A probe that talks too much."""

    async def check(self, server: Server, http: Client) -> ProbeResult:
        raise RuntimeError(f"sent Authorization: {server.api_key} to {server!r}")


@pytest.mark.parametrize("form", ["text", "json"])
async def test_a_traceback_holds_no_key(form: str) -> None:
    """Section 10: even from a plug-in that puts the key into its message, and even for a key of an unknown form."""
    written = io.StringIO()
    logs = configure(Settings(log_format=form, log_level="DEBUG"), console=written)
    try:
        async with stage() as there:
            there.gateway.checks.probe = Careless()
            answer = await there.client.post("/admin/register", json={**BODY, "api_key": KEYS["refused"]})
            assert answer.status_code == 503
            there.gateway.checks.probe = there.probe
            record = await there.register(api_key=KEYS["first"])
            await there.client.put(f"/admin/register/{record['registration_id']}", json={"api_key": KEYS["second"]})
            there.gateway.checks.probe = Careless()
            await there.client.post(f"/admin/servers/{record['registration_id']}/health-check")
            (route,) = there.gateway.table.routes.values()
            shown = repr((route, there.gateway.table, there.gateway.settings, await there.gateway.store.load()))
    finally:
        logs.close()
    text = written.getvalue()
    assert "Traceback" in text
    assert text.count("RuntimeError") >= 2
    assert "MARKER" not in text
    assert "MARKER" not in shown


async def test_a_key_that_is_read_from_the_store_is_known_to_the_log(tmp_path: Path) -> None:
    """Section 10: a start knows the keys that an earlier one saved, also where a quotation mark hides them from a plain search."""
    key = 'MARKER"with\\marks'
    store = SqliteStore(tmp_path / "multiverse.db")
    async with stage(store=store) as there:
        await there.register(api_key=key)
    written = io.StringIO()
    logs = configure(Settings(), console=written)
    try:
        async with stage(store=SqliteStore(tmp_path / "multiverse.db")) as there:
            there.gateway.checks.probe = Careless()
            (server,) = (await there.gateway.store.load()).servers
            assert server.api_key == key
            await there.gateway.checks.check(server)
            logging.getLogger("multiverse_gateway.api").warning("told %s, %r and %s", key, key, json.dumps(key))
    finally:
        logs.close()
    assert "MARKER" not in written.getvalue()
    assert written.getvalue().count("[secret]") >= 4


def test_a_log_file_is_not_for_everybody(tmp_path: Path) -> None:
    """Section 10: one that was there, and open to all, is closed to others; the group is the operator's business."""
    path = tmp_path / "gateway.log"
    path.write_text("")
    path.chmod(0o666)
    logs = configure(Settings(log_file=str(path)), console=io.StringIO())
    logs.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_ten_thousand_keys_are_learned_at_once(tmp_path: Path) -> None:
    """A registry of many servers does not make the start slow."""
    logs = configure(Settings(), outputs=False)
    try:
        began = time.monotonic()
        for number in range(10_000):
            redact(f"key-number-{number}")
        assert time.monotonic() - began < 20, "a pattern of all for each would take minutes"
    finally:
        logs.close()
