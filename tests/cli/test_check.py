"""The command `check` against servers that work, and servers that do not."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from multiverse_gateway.cli import main
from multiverse_gateway.cli.scripted_server import MODEL, ScriptedServer
from support.processes import environment
from support.sockets import free_port


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory, without the developer's settings."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - environment({}).keys():
        monkeypatch.delenv(name)


def call(*arguments: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, ["check", *arguments])


def serve(server: ThreadingHTTPServer) -> Iterator[str]:
    """Serve on a thread and give the root URL."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def scripted() -> Iterator[str]:
    """Run a server that works."""
    yield from serve(ScriptedServer("A", word_seconds=0))


class Answers(BaseHTTPRequestHandler):
    """Answer with the server's `answers` by method."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        answers: dict[str, tuple[int, dict[str, str], bytes]] = self.server.answers  # type: ignore[attr-defined]
        status, headers, body = answers.get(self.path, answers[self.command])
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815  http.server's name

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def strange() -> Iterator[tuple[dict[str, Any], str]]:
    """Run a server that answers what the test says."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    answers: dict[str, Any] = {"GET": (200, {}, b'{"data": [{"id": "tiny"}]}'), "POST": (200, {}, b'{"choices": [{}]}')}
    server.answers = answers  # type: ignore[attr-defined]
    for url in serve(server):
        yield answers, url


@pytest.mark.e2e
def test_a_good_server_passes_each_step(scripted: str) -> None:
    """In words for people, and as data."""
    result = call(scripted, "--allow-private")
    assert result.exit_code == 0
    assert "A gateway can use this server." in result.output
    assert f"{MODEL} made one token" in result.output
    report = json.loads(call(scripted, "--allow-private", "--json").output)
    assert report["passed"] is True
    assert [step["name"] for step in report["steps"]] == ["URL", "name", "address", "connection", "model list", "models", "chat"]


@pytest.mark.e2e
def test_a_private_address_is_told_and_the_rest_still_checked(scripted: str) -> None:
    """A host sees at once whether the server itself is fine."""
    result = call(scripted)
    assert result.exit_code == 1
    assert "loopback" in result.output
    assert "every computer calls itself so" in result.output
    assert "--allow-private" in result.output
    assert "made one token" in result.output


@pytest.mark.e2e
def test_an_address_that_no_setting_opens_names_none() -> None:
    """A link-local one stays closed whatever is set."""
    result = call("http://169.254.1.1:8000")
    assert result.exit_code == 1
    assert "FAILED  address: a gateway with these settings does not connect to it: link-local" in result.output
    assert "ALLOW_PRIVATE_NETWORKS" not in result.output


@pytest.mark.e2e
def test_another_name_is_a_note(scripted: str) -> None:
    """Many servers take any."""
    result = call(scripted, "--allow-private", "--model", "other")
    assert result.exit_code == 0
    assert f"other is not in the list: {MODEL}" in result.output


@pytest.mark.e2e
def test_a_url_without_a_scheme_is_read_as_the_form_reads_it(scripted: str) -> None:
    """And so is one with the path of a call."""
    host = scripted.removeprefix("http://")
    for url in (host, f"{host}/v1/chat/completions"):
        result = call(url, "--allow-private")
        assert (result.exit_code, f"ok  URL: {scripted}" in result.output) == (0, True), result.output


@pytest.mark.parametrize("url", ["", "ftp://gpu.example", "http://user:pass@gpu.example", "http://gpu.example:22"])
def test_a_url_that_cannot_be(url: str) -> None:
    """Nothing is dialed."""
    result = call(url)
    assert result.exit_code == 1
    assert "FAILED  URL" in result.output


@pytest.mark.e2e
def test_a_name_that_is_not_there() -> None:
    """Names under .invalid never are (RFC 6761)."""
    result = call("http://gpu.invalid:8000")
    assert result.exit_code == 1
    assert "cannot be resolved" in result.output


@pytest.mark.e2e
def test_a_closed_port() -> None:
    """The remedy names the usual mistake."""
    result = call(f"http://127.0.0.1:{free_port()}", "--allow-private")
    assert result.exit_code == 1
    assert "start the server" in result.output


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("method", "answer", "words"),
    [
        ("GET", (401, {}, b""), "requires a key"),
        ("GET", (403, {}, b""), "Host header"),
        ("POST", (401, {}, b""), "requires a key"),
        ("POST", (403, {}, b""), "Host header"),
        ("POST", (404, {}, b'{"error": {"message": "model \'tiny\' not found"}}'), "does not know the model"),
        ("POST", (500, {}, b"out of memory"), "status 500"),
        ("GET", (302, {"location": "/x"}, b""), "redirects"),
        ("GET", (404, {}, b""), "the path does not exist"),
        ("GET", (404, {"ngrok-error-code": "ERR_NGROK_3200"}, b""), "nothing is behind it"),
        ("GET", (503, {}, b""), "loading or busy"),
        ("GET", (500, {}, b""), "status 500"),
        ("GET", (200, {}, b"<html>"), "not with an OpenAI list"),
        ("GET", (200, {}, b'{"data": []}'), "the list is empty"),
        ("GET", (200, {}, b"x" * (1 << 20) + b"x"), "larger than 1 MiB"),
        ("POST", (200, {}, b"{}"), "has no choices"),
        ("POST", (429, {}, b""), "busy"),
    ],
)
def test_what_is_wrong_is_said(strange: tuple[dict[str, Any], str], method: str, answer: Any, words: str) -> None:
    """With exit code 1."""
    answers, url = strange
    answers[method] = answer
    result = call(url, "--allow-private")
    assert result.exit_code == 1
    assert words in result.output
    assert "->" in result.output


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("method", "answer", "words"),
    [
        ("GET", (200, {"content-encoding": "gzip"}, b"x"), "FAILED  model list: the answer is compressed"),
        ("POST", (200, {}, b"<html>"), "FAILED  chat: the answer has no choices"),
        ("GET", (401, {"ngrok-error-code": "ERR_NGROK_3004"}, b""), "FAILED  model list: the tunnel answers, but nothing is behind it"),
    ],
)
def test_what_a_gateway_would_trip_over_is_reported(strange: tuple[dict[str, Any], str], method: str, answer: Any, words: str) -> None:
    """As the gateway's own requests find it."""
    answers, url = strange
    answers[method] = answer
    result = call(url, "--allow-private")
    assert (result.exit_code, words in result.output) == (1, True), result.output


@pytest.mark.e2e
def test_a_server_that_speaks_no_tls_fails_at_the_connection(scripted: str) -> None:
    """A gateway would not get further."""
    result = call(scripted.replace("http:", "https:"), "--allow-private")
    assert result.exit_code == 1
    assert "FAILED  connection: the port is open but does not speak TLS" in result.output


@pytest.mark.e2e
def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time that a gateway's probe has."""
    monkeypatch.setenv("MULTIVERSE_HEALTH_CHECK_TIMEOUT_SECONDS", "0.2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        result = call(f"http://127.0.0.1:{silent.getsockname()[1]}", "--allow-private")
    assert result.exit_code == 1
    assert "FAILED  model list: no answer within 0.2 seconds" in result.output


@pytest.mark.e2e
def test_a_model_that_is_named_is_tried_although_the_list_is_empty(strange: tuple[dict[str, Any], str]) -> None:
    """Some servers list nothing before the model is loaded."""
    answers, url = strange
    answers["GET"] = (200, {}, b'{"data": []}')
    result = call(url, "--allow-private", "--model", "tiny")
    assert result.exit_code == 0
    assert "the list is empty; tiny is tried all the same" in result.output
    assert "tiny made one token" in result.output


@pytest.mark.e2e
def test_a_key_that_no_header_can_carry_is_named(scripted: str) -> None:
    """Nothing is sent."""
    result = call(scripted, "--allow-private", "--api-key", "two\nlines")
    assert result.exit_code == 1
    assert "the key cannot be sent in a header" in result.output


NO_CHAT: Any = (400, {}, b'{"error": {"message": "\\"tiny\\" does not support chat"}}')


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/embeddings", b'{"data": [{"embedding": [0.1]}]}', "no chat: tiny makes embeddings"),
        ("/v1/rerank", b'{"results": [{"index": 0}]}', "no chat: tiny ranks documents"),
        ("/v1/completions", b'{"choices": [{"text": "x"}]}', "no chat: tiny completes text"),
        ("/v1/audio/speech", b"", "no chat"),
    ],
)
@pytest.mark.parametrize("refusal", [NO_CHAT, (404, {}, b'{"detail": "Not Found"}'), (501, {}, b"")])
def test_a_server_without_chat_can_be_used(strange: tuple[dict[str, Any], str], refusal: Any, path: str, body: bytes, words: str) -> None:
    """Outside case 21: as one for embeddings."""
    answers, url = strange
    answers |= {"POST": (404, {}, b""), "/v1/chat/completions": refusal, path: (200, {}, body)}
    result = call(url, "--allow-private")
    assert result.exit_code == 0, result.output
    assert words in result.output
    assert "A gateway can use this server." in result.output


@pytest.mark.e2e
def test_a_key_that_was_given_is_called_refused(strange: tuple[dict[str, Any], str]) -> None:
    """And only then."""
    answers, url = strange
    answers["GET"] = (401, {}, b"")
    assert "rejects the key" in call(url, "--allow-private", "--api-key", "wrong").output
    assert "rejects the key" not in call(url, "--allow-private").output
