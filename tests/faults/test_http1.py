"""HTTP/1.1 as real clients speak it, careless or greedy, at both doors."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from support import behaviours
from support.backends import Backend
from support.processes import DOORS, GatewayProcess, door_setting
from support.raw_client import EndedError, RawClient
from support.require import require_program
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

ASSET = "/static/x/vendor/swagger-ui-bundle.js"
"""1.7 MB."""
CHAT = "/v1/chat/completions"
WRITE_SECONDS = 0.5
PAUSE_SECONDS = 0.5


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    """Return a gateway behind each door with a server, and little patience for clients that do not read."""
    settings = {
        "MULTIVERSE_CLIENT_WRITE_TIMEOUT_SECONDS": f"{WRITE_SECONDS:g}",
        "MULTIVERSE_CLIENT_BODY_TIMEOUT_SECONDS": f"{PAUSE_SECONDS:g}",
        "PUBLIC_DASHBOARD": "true",
        "LOG_LEVEL": "WARNING",
        **door_setting(request.param),
    }
    with GatewayProcess(settings) as process:
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log_text(), process.log_text()


@pytest.fixture(scope="module", autouse=True)
def backend(gateway: GatewayProcess) -> Iterator[Backend]:
    """Return the server that every test may ask."""
    it = Backend("good", models=("tiny",))
    with serving(it):
        gateway.register("tiny", it.url)
        yield it


def tasks(gateway: GatewayProcess) -> int:
    """Return the tasks of the gateway's loop, those of this question included."""
    text = gateway.call("GET", "/metrics").text
    return int(float(next(line.split()[-1] for line in text.splitlines() if line.startswith("multiverse_tasks "))))


def post(path: str = CHAT, *, fields: str = "", version: str = "1.1", stream: bool = False) -> bytes:
    """Return a request to a model."""
    body = json.dumps({"model": "tiny", "messages": [], "stream": stream}).encode()
    head = f"POST {path} HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\n{fields}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def get(path: str = "/livez", *, fields: str = "", version: str = "1.1") -> bytes:
    """Return a request for a page."""
    return f"GET {path} HTTP/{version}\r\nhost: x\r\n{fields}\r\n".encode()


CLOSE = "connection: close\r\n"
LAST = {
    "inference": post(fields=CLOSE),
    "stream": post(fields=CLOSE, stream=True),
    "list with close": post(fields="connection: keep-alive, Close\r\n"),
    "inference in HTTP/1.0": post(version="1.0"),
    "page": get(fields=CLOSE),
    "page in HTTP/1.0": get(version="1.0"),
    "models": get("/v1/models", fields=CLOSE),
}
"""Requests that are the last of their connection."""
EXTRA = {
    "a line end": b"\r\n",
    "rubbish": b"\0\xff rubbish \r\n\r\n" * 10,
    "a request": get(),
    "a large one": b"x" * 200_000,
}


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("together", [True, False])
def test_what_follows_the_last_request_is_ignored(gateway: GatewayProcess, last: str, extra: str, together: bool) -> None:
    """The request is answered, once, and the connection closed (RFC 9112, 9.6)."""
    with RawClient(gateway.port) as client:
        if together:
            client.send(LAST[last] + EXTRA[extra])
        else:
            client.send(LAST[last])
            with suppress(ConnectionError):  # the answer and the end may come first
                client.send(EXTRA[extra])
        answer = client.read_response()
        assert (answer.status, answer.complete) == (200, True)
        raw = client.read_to_end()
    assert raw.count(b"HTTP/1.") == 1


def unsent(path: str, fields: str = "") -> bytes:
    """Return the head of a request whose body does not come."""
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{fields}content-length: 40\r\n\r\n".encode()


EARLY = {
    "admin without a key": (unsent("/admin/register"), 403),
    "too large": (unsent(CHAT).replace(b": 40", b": 400000000"), 413),
    "compressed": (unsent(CHAT, "content-encoding: gzip\r\n"), 415),
}
"""Requests that are answered before their body has come."""


@pytest.mark.parametrize("early", EARLY)
def test_an_answer_that_comes_before_the_body_says_that_the_connection_closes(gateway: GatewayProcess, early: str) -> None:
    """Or a client would send its next request on it, and lose it (RFC 9112, 9.3)."""
    head, status = EARLY[early]
    with RawClient(gateway.port) as client:
        client.send(head)
        answer = client.read_response()
        assert answer.status == status
        if answer.header("connection") != "close":  # then the next request is answered
            client.send(b"x" * 40 + get())
            client.reader.expect()
            assert client.read_response().status == 200


EMPTY = {"CRLF": b"\r\n", "LF": b"\n", "several": b"\r\n\r\n\n\r\n", "many": b"\r\n" * 1000}


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("request_bytes", [post(), get(), get("/v1/models")])
def test_empty_lines_before_a_request_are_ignored(gateway: GatewayProcess, empty: str, request_bytes: bytes) -> None:
    """RFC 9112, 2.2: at the beginning, between two requests, together with one, alone, and in pieces."""
    lines = EMPTY[empty]
    with RawClient(gateway.port) as client:
        for pieces in (
            [lines + request_bytes],
            [lines, request_bytes],
            [lines[:1], lines[1:] + request_bytes],
            [request_bytes + lines, request_bytes],
        ):
            for piece in pieces:
                client.send(piece)
            for _ in range(sum(request_bytes in piece for piece in pieces)):
                assert client.read_response().status == 200
                client.reader.expect()


def test_an_empty_line_hides_no_folded_header(gateway: GatewayProcess) -> None:
    """What is refused in a head is refused behind empty lines, and in the second of two requests, too."""
    folded = b"GET /livez HTTP/1.1\r\nhost: x\r\nx-a: b\r\n c\r\n\r\n"
    for before, answers in ((b"\r\n", [400]), (b"\r\n\r\n", [400]), (get(), [200, 400]), (get() + b"\r\n", [200, 400])):
        with RawClient(gateway.port) as client:
            client.send(before + folded)
            for status in answers:
                assert client.read_response().status == status
                client.reader.expect()


@pytest.mark.parametrize(("path", "count"), [(ASSET, 10), ("/openapi.json", 100)])
def test_answers_that_are_not_taken_end(gateway: GatewayProcess, path: str, count: int) -> None:
    """One large answer or many small ones: the connection is cut off after the write timeout, and no task is left."""
    before = tasks(gateway)
    with RawClient(gateway.port, receive_buffer=4096, timeout=0.2) as client:
        with suppress(OSError):
            client.send(get(path) * count)
        wait_until(lambda: tasks(gateway) <= before, within=WRITE_SECONDS + 8)


def test_a_client_that_sends_ahead_and_leaves(gateway: GatewayProcess) -> None:
    """The request behind one that is being answered keeps nothing alive."""
    before = tasks(gateway)
    for _ in range(5):
        with RawClient(gateway.port, receive_buffer=4096) as client:
            client.send(get(ASSET) * 5)
            client.read_head()
            client.abort()
    wait_until(lambda: tasks(gateway) <= before, within=5)


@pytest.mark.parametrize("path", [CHAT, "/admin/register", "/nothing", "/login", "/livez"])
@pytest.mark.parametrize("chunked", [True, False])
def test_uploads_that_are_left(gateway: GatewayProcess, path: str, chunked: bool) -> None:
    """Whether they are refused, too large or read: when the client leaves in the middle, no task is left."""
    before = tasks(gateway)
    framing = "transfer-encoding: chunked" if chunked else "content-length: 3000000"
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{framing}\r\n\r\n".encode()
    for leave in (RawClient.abort, RawClient.half_close):
        with RawClient(gateway.port, timeout=0.5) as client, suppress(OSError):
            client.send(head + (b"100000\r\n" if chunked else b"") + b" " * (1 << 20))
            leave(client)
            client.read_to_end()
    wait_until(lambda: tasks(gateway) <= before, within=5)


UPLOADS = {
    "inference": (CHAT, json.dumps({"model": "tiny", "messages": []}), 200),
    "admin": ("/admin/test-connection", json.dumps({"endpoint_url": "no URL"}), 400),
    "page": ("/login", "key=wrong", 403),
}


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("upload", UPLOADS)
def test_a_slow_upload_arrives(gateway: GatewayProcess, upload: str, chunked: bool) -> None:
    """However long it takes in all; only a pause is too long."""
    path, text, status = UPLOADS[upload]
    kind = "application/json" if text[0] == "{" else "application/x-www-form-urlencoded"
    body = text.encode() + b" " * 100
    framing = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {gateway.admin_key}\r\ncontent-type: {kind}\r\n{framing}\r\n\r\n"
    with RawClient(gateway.port) as client:
        client.send(head.encode())
        for start in range(0, len(body), len(body) // 6):
            piece = body[start : start + len(body) // 6]
            client.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            time.sleep(PAUSE_SECONDS / 4)
        if chunked:
            client.send(b"0\r\n\r\n")
        assert client.read_response().status == status
    with RawClient(gateway.port) as client:
        client.send(head.encode() + (b"1\r\n{\r\n" if chunked else b"{"))
        assert client.read_response().status == 408


@pytest.mark.parametrize("path", ["/admin/register", CHAT, "/login"])
@pytest.mark.parametrize("chunked", [True, False])
def test_refused_uploads_give_their_memory_back(gateway: GatewayProcess, path: str, chunked: bool) -> None:
    """Without the collector, which looks seldom."""

    def refuse(count: int) -> None:
        for _ in range(count):
            with RawClient(gateway.port) as client:
                answer = client.fetch("POST", path, body=b"\0" * 2_000_000, headers=[("content-type", "application/json")], chunked=chunked)
                assert answer.status in (400, 403, 413, 415, 429)

    refuse(10)
    before = gateway.memory_bytes()
    refuse(50)
    assert gateway.memory_bytes() - before < 5 << 20


H2C = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"


@pytest.mark.parametrize("request_bytes", [post(fields=H2C), post(fields=H2C, stream=True), get(fields=H2C), get("/v1/models", fields=H2C)])
def test_the_offer_of_http2_is_ignored(gateway: GatewayProcess, request_bytes: bytes) -> None:
    """RFC 9110, 7.8: answered in HTTP/1.1, and the connection goes on."""
    with RawClient(gateway.port) as client:
        for _ in range(3):
            client.send(request_bytes)
            answer = client.read_response()
            assert (answer.status, answer.informational, answer.complete) == (200, [], True)
            client.reader.expect()


def test_a_client_that_offers_http2_and_leaves_is_noticed(gateway: GatewayProcess, backend: Backend) -> None:
    """While its request is being answered, as any other."""
    backend.behave = behaviours.stall()
    with RawClient(gateway.port) as client:
        client.send(post(fields=H2C))
        wait_until(lambda: backend.running)
    wait_until(lambda: not backend.running)
    backend.behave = behaviours.good()


AHEAD = {"a line end": b"\r\n", "a request": get(), "half a request": get()[:20], "a few": get() * 20, "too much": b"x" * 200_000}


@pytest.mark.parametrize("ahead", AHEAD)
def test_a_client_that_sends_ahead_and_leaves_is_noticed(gateway: GatewayProcess, backend: Backend, ahead: str) -> None:
    """What lies behind a request that is being answered does not hide the end of the connection."""
    backend.behave = behaviours.stall()
    with RawClient(gateway.port) as client:
        client.send(post() + AHEAD[ahead])
        wait_until(lambda: backend.running)
    wait_until(lambda: not backend.running)
    backend.behave = behaviours.good()


@pytest.mark.parametrize("first", [post(), post(stream=True), get()])
def test_requests_that_were_sent_ahead_are_answered_in_order(gateway: GatewayProcess, first: bytes) -> None:
    """Whole, in pieces, with bodies, and more than is read ahead at once, up to where the connection is closed."""
    last = post("/v1/nothing")
    with RawClient(gateway.port) as client:
        for data in (first + get() + last, first[:-3], first[-3:] + get()[:9], get()[9:] + last[:-9], last[-9:]):
            client.send(data)
        for status in (200, 200, 404) * 2:
            answer = client.read_response()
            assert (answer.status, answer.complete) == (status, True)
            client.reader.expect()
    with RawClient(gateway.port) as client:
        client.send(first + get() * 5000)
        while True:
            try:
                assert client.read_head().status == 200
            except EndedError:
                break
            assert client.read_response().complete
            client.reader.expect()
            if client.response.ended_by is not None and not client.reader.unread:
                break


def test_curl_asks_for_http2(gateway: GatewayProcess) -> None:
    """`--http2` on a plain connection offers the upgrade; bodies, streams and chunks arrive whole."""
    curl = require_program("curl", "a client that offers h2c")
    for stream in (False, True):
        body = json.dumps({"model": "tiny", "messages": [], "stream": stream})
        for more in ([], ["-H", "transfer-encoding: chunked"]):
            command = [curl, "-s", "--http2", "-w", " %{http_version} %{response_code}", "-H", "content-type: application/json", *more]
            command += ["-d", body, f"{gateway.url}{CHAT}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
            assert done.stdout.endswith(" 1.1 200"), done.stdout
            assert ("[DONE]" in done.stdout) == stream


WEBSOCKET = "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"


@pytest.mark.parametrize("fields", [WEBSOCKET, "connection: upgrade\r\nupgrade: WebSocket\r\n", WEBSOCKET.replace("13", "8")])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/realtime?model=tiny", "/livez", "/dashboard", "/nothing"])
def test_there_are_no_websockets(gateway: GatewayProcess, path: str, fields: str) -> None:
    """404 with the usual error, whatever the path, and however well the handshake is made; the connection goes on."""
    with RawClient(gateway.port) as client:
        for _ in range(2):
            client.send(get(path, fields=fields))
            answer = client.read_response()
            assert answer.status == 404
            assert answer.json["error"]["code"] == "unknown_url"
            assert "WebSocket" in answer.json["error"]["message"]
            client.reader.expect()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_nothing_goes_wrong_when_an_answer_closes_its_connection(gateway: GatewayProcess, version: str, stream: bool) -> None:
    """The fixture looks for tracebacks in the log."""
    for fields in ("", CLOSE, "connection: keep-alive\r\n"):
        for _ in range(5):
            with RawClient(gateway.port) as client:
                client.send(post(fields=fields, version=version, stream=stream))
                answer = client.read_response()
                assert (answer.status, answer.complete) == (200, True)
