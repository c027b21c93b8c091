"""The commands that talk to a running gateway, against a real listener that answers what it is told."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from multiverse_gateway.cli import main
from support.processes import environment
from support.sockets import free_port

pytestmark = pytest.mark.e2e

KEY = "an-admin-key-of-the-test"
RECORD: dict[str, Any] = {
    "registration_id": "7b0c9e4e-0000-4000-8000-000000000001",
    "model_name": "tiny",
    "endpoint_url": "http://gpu.example:8000",
    "health_status": "unhealthy",
    "state": "deactivated",
    "reason": "no answer\x1b[2J",
    "metadata": {"student_id": "ada"},
    "last_checked_at": "2026-05-01T12:00:00.000+00:00",
}


class Listener(ThreadingHTTPServer):
    """Answer each path with what stands in `answers`, and remember the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.answers: dict[str, tuple[int, Any]] = {}
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        """The root URL."""
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Listener

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        sent = json.loads(body) if body else None
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.command, self.path, headers, sent))
        status, value = self.server.answers[self.path.partition("?")[0]]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(value if isinstance(value, bytes) else json.dumps(value).encode())

    do_PUT = do_DELETE = do_GET  # noqa: N815  http.server's names
    do_POST = do_GET  # noqa: N815  http.server's name

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Run a listener; work in an empty directory whose settings lead to it."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - environment({}).keys():
        monkeypatch.delenv(name)
    with Listener() as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,))
        thread.start()
        (tmp_path / ".env").write_text(f"PORT={listener.server_port}\nADMIN_API_KEY={KEY}\nCLIENT_API_KEYS=client-key-1\n")
        yield listener
        listener.shutdown()
        thread.join()


def call(*arguments: str, stdin: str | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, list(arguments), input=stdin)


def test_register_sends_what_was_given(gateway: Listener) -> None:
    """And nothing else; the key comes from the settings of the directory."""
    gateway.answers["/admin/register"] = (201, {**RECORD, "health_status": "healthy"})
    options = ("--student-id", "ada", "--max-tokens", "512", "--no-streaming", "--api-key", "backend-key", "--weight", "3")
    result = call("register", "http://gpu.example:8000/v1", "tiny", *options)
    assert result.exit_code == 0
    assert RECORD["registration_id"] in result.output
    ((method, _, headers, body),) = gateway.requests
    assert (method, headers["x-api-key"]) == ("POST", KEY)
    assert body == {
        "model_name": "tiny",
        "endpoint_url": "http://gpu.example:8000",
        "api_key": "backend-key",
        "weight": 3,
        "capabilities": {"max_tokens": 512, "streaming": False},
        "metadata": {"student_id": "ada"},
    }


def test_register_says_why_it_was_refused(gateway: Listener) -> None:
    """In the gateway's words, made fit for a terminal."""
    gateway.answers["/admin/register"] = (503, {"error": {"message": "the probe failed\x1b[2J", "code": "probe_failed"}})
    result = call("register", "http://gpu.example:8000", "tiny")
    assert result.exit_code == 1
    assert "Error: the probe failed\\x1b[2J (the gateway answered with status 503)" in result.output


def test_servers_for_people_and_for_programs(gateway: Listener) -> None:
    """A table, or JSON as it came."""
    gateway.answers["/admin/servers"] = (200, [RECORD])
    shown = call("servers", "--model", "tiny", "--all").output
    assert "deactivated" in shown
    assert "ada" in shown
    assert "\x1b" not in shown
    assert json.loads(call("servers", "--json").output) == [RECORD]
    assert gateway.requests[0][1] == "/admin/servers?model_name=tiny&include_inactive=true"
    gateway.answers["/admin/servers"] = (200, [])
    assert "multiverse-gateway register" in call("servers").output


def test_models_are_asked_with_a_client_key(gateway: Listener) -> None:
    """A user needs no admin key."""
    gateway.answers["/v1/models"] = (200, {"object": "list", "data": [{"id": "tiny", "available_servers": 1, "total_servers": 2}]})
    assert "1 of 2" in call("models").output
    assert gateway.requests[0][2]["authorization"] == "Bearer client-key-1"
    assert json.loads(call("models", "--json").output)[0]["id"] == "tiny"
    gateway.answers["/v1/models"] = (200, {"object": "list", "data": []})
    assert "No model" in call("models").output


def test_export_and_import_are_a_circle(gateway: Listener, tmp_path: Path) -> None:
    """What was written can be read; the file is private."""
    registry = {"format": 1, "servers": [{"model_name": "tiny", "endpoint_url": "http://gpu.example"}]}
    gateway.answers["/admin/export"] = (200, registry)
    gateway.answers["/admin/import"] = (200, {"imported": 1, "created": 1, "updated": 0, "unchanged": 0})
    assert json.loads(call("export").output) == registry
    Path("registry.json").write_text("{}")
    Path("registry.json").chmod(0o644)
    assert call("export", "--output", "registry.json", "--with-keys").exit_code == 0
    assert gateway.requests[-1][1] == "/admin/export?include_keys=true"
    if os.name == "posix":
        assert (tmp_path / "registry.json").stat().st_mode & 0o777 == 0o600
    assert "1 created" in call("import", "registry.json").output
    assert gateway.requests[-1][3] == registry
    assert call("import", "-", "--json", stdin=json.dumps(registry)).exit_code == 0
    assert call("import", "-", stdin="{").exit_code == 2
    assert call("import", "missing.json").exit_code == 2
    assert call("export", "--output", str(tmp_path / "missing" / "x.json")).exit_code == 1


def test_an_export_counts_its_aliases(gateway: Listener) -> None:
    """Both commands mention aliases only where there are some."""
    registry = {"format": 1, "servers": [], "hosts": [], "aliases": [{"name": "best", "models": ["tiny"]}]}
    gateway.answers["/admin/export"] = (200, registry)
    assert "0 servers and 1 aliases" in call("export", "--output", "registry.json").output
    gateway.answers["/admin/import"] = (200, {"imported": 0, "created": 0, "updated": 0, "unchanged": 0, "aliases": 1})
    assert "0 unchanged; 1 aliases created or updated." in call("import", "registry.json").output


def test_hosts_are_listed_changed_and_removed(gateway: Listener) -> None:
    """A row per host; the gateway may be named before or after the subcommand; control characters are not printed."""
    servers = [{"model_name": "tiny", "state": "healthy"}, {"model_name": "large\x1b[2J", "state": "unhealthy"}]
    record = {"id": "lab/1", "endpoint_url": "http://gpu.example", "owner": "ada", "max_concurrency": 4, "in_flight": 2, "servers": servers}
    gateway.answers["/admin/hosts"] = (200, [record])
    listed = call("hosts")
    assert "tiny, large" in listed.output
    assert "(unhealthy)" in listed.output
    assert "\x1b" not in listed.output
    assert json.loads(call("hosts", "--json").output) == [record]
    gateway.answers["/admin/hosts/lab%2F1"] = (200, record)
    assert "at most 4 requests" in call("hosts", "set", "lab/1", "--max-concurrency", "4").output
    assert (gateway.requests[-1][0], gateway.requests[-1][3]) == ("PUT", {"max_concurrency": 4})
    gateway.answers["/admin/hosts/lab%2F1"] = (200, {**record, "max_concurrency": None})
    assert "any number of requests" in call("hosts", "--gateway", gateway.url, "set", "lab/1", "--no-max-concurrency").output
    assert gateway.requests[-1][3] == {"max_concurrency": None}
    assert json.loads(call("hosts", "set", "lab/1", "--max-concurrency", "4", "--json").output)["id"] == "lab/1"
    count = len(gateway.requests)
    for options in ((), ("--max-concurrency", "4", "--no-max-concurrency"), ("--max-concurrency", "0")):
        assert call("hosts", "set", "lab/1", *options).exit_code == 2
    assert len(gateway.requests) == count
    gateway.answers["/admin/hosts/lab%2F1"] = (200, {"id": "lab/1", "registration_ids": ["a", "b"]})
    assert "removed with 2 models" in call("hosts", "remove", "lab/1").output
    assert gateway.requests[-1][0] == "DELETE"
    gateway.answers["/admin/hosts"] = (200, [])
    assert "No host" in call("hosts").output


def test_no_key(gateway: Listener, tmp_path: Path) -> None:
    """The message says where to put one."""
    (tmp_path / ".env").unlink()
    result = call("servers", "--gateway", gateway.url)
    assert result.exit_code == 1
    assert "ADMIN_API_KEY" in result.output
    gateway.answers["/admin/servers"] = (403, {"error": {"message": "no"}})
    assert "rejects the admin key" in call("servers", "--gateway", f"{gateway.url}/v1/", "--admin-key", "wrong").output


def test_no_gateway(gateway: Listener) -> None:
    """The message says how to start or name one."""
    for url in (f"http://127.0.0.1:{free_port()}", "http://[", "ftp://x"):
        result = call("servers", "--gateway", url)
        assert result.exit_code == 1
        assert "multiverse-gateway run" in result.output


@pytest.mark.parametrize("answer", [b"<html>", [], {"error": "x"}])
def test_something_else_answers(gateway: Listener, answer: Any) -> None:
    """It is not taken for a gateway."""
    gateway.answers["/admin/servers"] = (404, answer)
    result = call("servers", "--gateway", gateway.url.removeprefix("http://"))
    assert result.exit_code == 1
    assert "is not a gateway" in result.output
