"""What hostile and broken clients send to the port, through the server that users run."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import httpx2
import pytest

from support.backends import Backend
from support.h2_client import H2Client, frame
from support.processes import ADMIN_KEY, DOORS, GatewayProcess, door_setting
from support.raw_client import RawClient
from support.require import require_program
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
BODY_SECONDS = 2.0
HEAD_SECONDS = 2.0
CLIENT_KEY = "client-key-of-the-class"


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    """Return a gateway behind each door that asks for client keys, logs everything as JSON, and has little patience with bodies."""
    settings = {
        "LOG_LEVEL": "DEBUG",
        "LOG_FORMAT": "json",
        "REQUIRE_CLIENT_AUTH": "true",
        "CLIENT_API_KEYS": CLIENT_KEY,
        "MULTIVERSE_CLIENT_HEAD_TIMEOUT_SECONDS": f"{HEAD_SECONDS:g}",
        "MULTIVERSE_CLIENT_BODY_TIMEOUT_SECONDS": f"{BODY_SECONDS:g}",
        **door_setting(request.param),
    }
    with GatewayProcess(settings) as process:
        yield process
        assert process.stop() == 0


@pytest.fixture(scope="module")
def backend(gateway: GatewayProcess) -> Iterator[Backend]:
    """Return a registered server."""
    server = Backend("good", models=("tiny",))
    with serving(server):
        gateway.register("tiny", server.url)
        yield server


def body(**more: object) -> bytes:
    """Return the body of a good request."""
    return json.dumps({"model": "tiny", "messages": [], **more}).encode()


INSIDE = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-api-key: client-key-of-the-class\r\ncontent-length: %d\r\n\r\n%s" % (
    len(body()),
    body(),
)
"""What somebody would like to smuggle in."""
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nx-api-key: client-key-of-the-class\r\n"


def smuggled(fields: str, payload: bytes, *, head: str = HEAD, host: str = "host: x\r\n") -> bytes:
    """Return a request with these header lines."""
    return f"{head}{host}{fields}\r\n".encode("latin-1") + payload


CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body()), body())
LENGTH = f"content-length: {len(body())}\r\n"
TRICKS = {
    "length and chunks": smuggled(f"{LENGTH}transfer-encoding: chunked\r\n", CHUNKED + INSIDE),
    "chunks and length": smuggled(f"transfer-encoding: chunked\r\n{LENGTH}", CHUNKED + INSIDE),
    "length 0 and chunks": smuggled("content-length: 0\r\ntransfer-encoding: chunked\r\n", CHUNKED + INSIDE),
    "two lengths": smuggled(f"{LENGTH}content-length: 0\r\n", body() + INSIDE),
    "two equal lengths": smuggled(LENGTH * 2, body()),
    "lengths in a list": smuggled(f"content-length: {len(body())}, {len(body())}\r\n", body()),
    "length with a plus": smuggled(f"content-length: +{len(body())}\r\n", body() + INSIDE),
    "length negative": smuggled("content-length: -1\r\n", body()),
    "length in hex": smuggled("content-length: 0x10\r\n", body()),
    "length with an underscore": smuggled("content-length: 1_0\r\n", body()),
    "length empty": smuggled("content-length:\r\n", body()),
    "length endless": smuggled(f"content-length: {'9' * 400}\r\n", body()),
    "coding xchunked": smuggled("transfer-encoding: xchunked\r\n", CHUNKED + INSIDE),
    "coding chunked twice": smuggled("transfer-encoding: chunked\r\n" * 2, CHUNKED + INSIDE),
    "coding chunked, identity": smuggled("transfer-encoding: chunked, identity\r\n", CHUNKED + INSIDE),
    "coding gzip, chunked": smuggled("transfer-encoding: gzip, chunked\r\n", CHUNKED + INSIDE),
    "coding with a tab": smuggled("transfer-encoding:\tchunked\x0b\r\n", CHUNKED + INSIDE),
    "coding before a colon": smuggled("transfer-encoding : chunked\r\n", CHUNKED + INSIDE),
    "coding with a null": smuggled("transfer-encoding: \x00chunked\r\n", CHUNKED + INSIDE),
    "coding on HTTP/1.0": smuggled("transfer-encoding: chunked\r\n", CHUNKED + INSIDE, head=HEAD.replace("1.1", "1.0")),
    "a folded line": smuggled(f"x-a: b\r\n transfer-encoding: chunked\r\n{LENGTH}", body()),
    "a folded coding": smuggled("transfer-encoding:\r\n chunked\r\n", CHUNKED + INSIDE),
    "bare line feeds": smuggled(f"x-a: b\ntransfer-encoding: chunked\n{LENGTH}", body() + INSIDE),
    "a bare carriage return": smuggled(f"x-a: b\rtransfer-encoding: chunked\r\n{LENGTH}", body() + INSIDE),
    "a space before a name": smuggled(f" x-a: b\r\n{LENGTH}", body()),
    "a line without a colon": smuggled(f"nonsense\r\n{LENGTH}", body()),
    "two hosts": smuggled(f"host: y\r\n{LENGTH}", body()),
    "no host": smuggled(LENGTH, body(), host=""),
    "a chunk size that is negative": smuggled("transfer-encoding: chunked\r\n", b"-1\r\n" + CHUNKED),
    "a chunk size with 0x": smuggled("transfer-encoding: chunked\r\n", b"0x" + CHUNKED),
    "an endless chunk size": smuggled("transfer-encoding: chunked\r\n", b"f" * 40 + b"\r\n" + CHUNKED),
    "a chunk that is too long": smuggled("transfer-encoding: chunked\r\n", b"2\r\nabc\r\n0\r\n\r\n" + INSIDE),
    "a chunk ended by a line feed": smuggled("transfer-encoding: chunked\r\n", CHUNKED.replace(b"\r\n", b"\n") + INSIDE),
    "an upgrade to h2c": smuggled(
        "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n", b"", host="host: x\r\n"
    ),
    "an upgrade to h2c with a body": smuggled(f"connection: upgrade\r\nupgrade: h2c\r\n{LENGTH}", body()),
    "GET, upgrade to h2c": smuggled("connection: upgrade\r\nupgrade: h2c\r\n", b"", head="GET /v1/models HTTP/1.1\r\n"),
    "GET, upgrade to a web socket": smuggled(
        "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
        b"",
        head="GET /v1/chat/completions HTTP/1.1\r\n",
    ),
    "a null in the target": smuggled(LENGTH, body(), head=HEAD.replace("/v1/", "/v1/\x00")),
    "a space in the target": smuggled(LENGTH, body(), head=HEAD.replace("/v1/", "/v1/ ")),
    "another version": smuggled(LENGTH, body(), head=HEAD.replace("1.1", "3.7")),
    "a method of blanks": b" \r\n\r\n",
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xff" * 64,
}


@pytest.mark.parametrize("name", TRICKS)
def test_no_request_is_read_as_two(gateway: GatewayProcess, backend: Backend, name: str) -> None:
    """X04: refused and closed, or one well-formed answer; what is hidden in a body is never carried out, nothing is upgraded."""
    hits = backend.hits
    with RawClient(gateway.port, timeout=BODY_SECONDS + 3) as client:
        with suppress(ConnectionError):
            client.send(TRICKS[name])
        client.half_close()
        raw = client.read_to_end()
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", raw)]
    assert 101 not in statuses
    assert len(statuses) <= 1, raw
    assert backend.hits - hits <= 1
    if statuses and statuses[0] not in (200, 401, 404, 405):
        assert statuses[0] in (400, 403, 408, 413, 431, 501), raw
    two_ways = ("length and", "chunks and", "two lengths", "coding", "two hosts", "folded")
    if any(word in name for word in two_ways):
        assert backend.hits == hits
    assert gateway.call("GET", "/livez").status_code == 200


def test_a_request_after_a_refused_one_is_not_read(gateway: GatewayProcess, backend: Backend) -> None:
    """X04: the connection is of no use any more."""
    hits = backend.hits
    with RawClient(gateway.port, timeout=5) as client:
        client.send(TRICKS["length and chunks"] + INSIDE)
        answer = client.read_response()
        assert (answer.status, answer.header("connection")) == (400, "close")
        client.read_to_end()
    assert backend.hits == hits


# Slowness


def idle_connections(gateway: GatewayProcess, count: int, first: bytes) -> list[socket.socket]:
    """Connect often, and send the beginning of something."""
    made = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=15)
        connection.sendall(first)
        made.append(connection)
    return made


def seconds_until_closed(connection: socket.socket, since: float) -> float:
    """Wait for the other end to close."""
    with suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return time.monotonic() - since


def slowness(gateway: GatewayProcess) -> float:
    """Return how long a bystander waits for an answer at worst, of five."""
    return max(seconds_of(gateway) for _ in range(5))


def seconds_of(gateway: GatewayProcess) -> float:
    """Return how long a bystander waits for an answer."""
    began = time.monotonic()
    assert gateway.call("GET", "/livez").status_code == 200
    return time.monotonic() - began


def test_who_does_not_finish_a_head_is_cut_off(gateway: GatewayProcess, backend: Backend) -> None:
    """L03: silent, half-headed, dribbling, and silent on HTTP/2: closed when the time is up; others are served meanwhile."""
    usual = slowness(gateway)
    since = time.monotonic()
    half = HEAD.encode()
    connections = [
        *idle_connections(gateway, 200, b""),
        *idle_connections(gateway, 100, half),
        *idle_connections(gateway, 20, b"PRI * HTTP/2.0\r\n\r\n"),
    ]
    (dribbling,) = idle_connections(gateway, 1, half)
    with RawClient(gateway.port, timeout=15) as kept:
        kept.request("POST", CHAT, body=body(), headers=[("x-api-key", CLIENT_KEY), ("content-type", "application/json")])
        assert kept.read_response().status == 200
        slowest = 0.0
        while time.monotonic() - since < HEAD_SECONDS - 0.5:
            slowest = max(slowest, seconds_of(gateway))
            dribbling.sendall(b"x")
            time.sleep(0.2)
        assert slowest < 0.5 + 10 * usual
        assert all(seconds_until_closed(connection, since) < HEAD_SECONDS + 1 for connection in [*connections, dribbling])
        kept.request("GET", "/livez")
        assert kept.read_response().status == 200, "a kept connection may rest between two requests"
    for connection in [*connections, dribbling]:
        connection.close()


def test_who_does_not_finish_a_body_is_cut_off(gateway: GatewayProcess, backend: Backend) -> None:
    """L02: one byte a second: 408 and closed when the time is up; 60 of them stop nobody."""
    head = HEAD.encode() + b"host: x\r\ncontent-length: 1000\r\n\r\n{"
    since = time.monotonic()
    connections = idle_connections(gateway, 60, head)
    assert gateway.call("POST", CHAT, json.loads(body()), headers={"x-api-key": CLIENT_KEY}).status_code == 200
    for connection in connections:
        received = connection.recv(4096)
        assert b" 408 " in received.split(b"\r\n")[0]
        assert seconds_until_closed(connection, since) < BODY_SECONDS + 2
        connection.close()
    wait_until(lambda: gateway.admin("GET", "/stats").status_code == 200)


def test_a_slow_body_elsewhere(gateway: GatewayProcess) -> None:
    """L02: the admin API has no more patience."""
    head = f"POST /admin/register HTTP/1.1\r\nhost: x\r\nx-api-key: {ADMIN_KEY}\r\ncontent-length: 1000\r\n\r\n{{".encode()
    since = time.monotonic()
    (connection,) = idle_connections(gateway, 1, head)
    assert b" 408 " in connection.recv(4096)
    assert time.monotonic() - since < BODY_SECONDS + 2
    connection.close()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/admin/register", "/admin/import", "/admin/test-connection"])
def test_a_large_body_elsewhere(gateway: GatewayProcess, path: str, chunked: bool) -> None:
    """L04: more than 1 MiB is refused, told or not, and the answer arrives."""
    with RawClient(gateway.port) as client:
        headers = [("x-api-key", ADMIN_KEY), ("content-type", "application/json")]
        answer = client.fetch("POST", path, body=b" " * ((1 << 20) + 1), headers=headers, chunked=chunked)
    assert answer.status == 413


HOSTILE = {
    "deep": b'{"model_name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "many keys": b"{" + b",".join(b'"k%d":1' % number for number in range(60_000)) + b"}",
    "a long number": b'{"max_concurrency": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"max_concurrency": NaN}',
    "a lone surrogate": b'{"model_name": "\\ud800"}',
    "not UTF-8": b'{"model_name": "\xff"}',
    "a name twice": b'{"model_name": "a", "model_name": "b"}',
    "an exponent": b'{"max_concurrency": 1e400}',
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", ["/admin/register", "/admin/import", "/admin/test-connection"])
def test_hostile_json_elsewhere(gateway: GatewayProcess, path: str, name: str) -> None:
    """L06: 400, never 500, and soon."""
    answer = gateway.admin("POST", path, content=HOSTILE[name], timeout=5)
    assert answer.status_code == 400, answer.text


# HTTP/2


def test_resets_without_end_are_cut_off(gateway: GatewayProcess) -> None:
    """L12: 20 connections with 999 resets each: others are served meanwhile, the attackers are sent away, memory stays."""
    usual = slowness(gateway)
    before = gateway.memory_bytes()
    ends: list[int | None] = []

    attacker = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    attacker.initiate_connection()
    for _ in range(999):
        stream = attacker.get_next_available_stream_id()
        attacker.send_headers(stream, [(":method", "GET"), (":scheme", "http"), (":path", "/livez"), (":authority", "x")], end_stream=True)
        attacker.reset_stream(stream, error_code=h2.errors.ErrorCodes.CANCEL)
    flood = attacker.data_to_send()

    def attack() -> None:
        with RawClient(gateway.port) as client, suppress(OSError):
            client.send(flood)
            received = client.read_to_end()
            last = received.rfind(struct.pack(">I", 8)[1:] + bytes([7, 0]))
            ends.append(int.from_bytes(received[last + 13 : last + 17], "big") if last >= 0 else None)

    threads = [threading.Thread(target=attack) for _ in range(20)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        slowest = max(slowest, seconds_of(gateway))
    assert slowest < 3 + 10 * usual, "less than a second on a machine that does nothing else"
    assert set(ends) <= {h2.errors.ErrorCodes.ENHANCE_YOUR_CALM, None}
    assert gateway.memory_bytes() - before < 50 << 20


def test_a_person_who_cancels_is_left_alone(gateway: GatewayProcess, backend: Backend) -> None:
    """L12: a few resets on one connection are everyday life."""
    client = H2Client(gateway.port)
    for _ in range(50):
        client.reset(client.ask("GET", "/livez"))
    stream = client.ask("GET", "/livez")
    assert client.read(h2.events.StreamEnded, stream) is not None
    client.socket.close()


@pytest.mark.parametrize("flood", ["continuation", "ping", "settings", "empty data", "window"])
def test_a_flood_of_frames(gateway: GatewayProcess, flood: str) -> None:
    """L12: the flood is cut off or waits for itself; others are served, memory stays."""
    usual = slowness(gateway)
    before = gateway.memory_bytes()
    client = H2Client(gateway.port)
    client.socket.settimeout(1)
    frames = {
        "continuation": frame(1, 0, 1, b"\x82") + frame(9, 0, 1, b"\x82" * 100) * 5000,
        "ping": frame(6, 0, 0, b"12345678") * 20_000,
        "settings": frame(4, 0, 0, b"\x00\x03\x00\x00\x00\x64") * 10_000,
        "empty data": frame(1, 4, 1, b"\x83\x86\x84\x41\x01x") + frame(0, 0, 1, b"") * 20_000,
        "window": frame(8, 0, 0, b"\x00\x00\x00\x01") * 20_000,
    }[flood]
    sender = threading.Thread(target=lambda: suppress_all(lambda: client.socket.sendall(frames)))
    sender.start()
    slowest = max(seconds_of(gateway) for _ in range(20))
    sender.join(10)
    client.socket.close()
    assert slowest < 3 + 10 * usual
    assert gateway.memory_bytes() - before < 50 << 20


def suppress_all(action: object) -> None:
    """Do something that the other end may not like."""
    assert callable(action)
    with suppress(OSError):
        action()


def test_an_early_answer_on_http2_leaves_the_other_streams_alone(gateway: GatewayProcess, backend: Backend) -> None:
    """L04, X04: a refused body whose rest still comes does not break the connection; neither does CONNECT or a line end in a header."""
    client = H2Client(gateway.port)
    refused = client.ask("POST", "/admin/register", b"{" * 1000, end=False, headers=[("x-api-key", "wrong")])
    assert client.read(h2.events.StreamEnded, refused) is not None
    with suppress(h2.exceptions.ProtocolError):
        client.state.send_data(refused, b"{" * 1000)
        client.flush()
    stream = client.ask("GET", "/livez")
    assert client.read(h2.events.StreamEnded, stream) is not None
    client.socket.close()


def test_line_ends_in_headers_of_http2(gateway: GatewayProcess, backend: Backend) -> None:
    """X04: a header of HTTP/2 that would be two on HTTP/1.1 reaches no server."""
    hits = backend.hits
    client = H2Client(gateway.port)
    with suppress(h2.exceptions.ProtocolError, OSError):
        client.ask("POST", CHAT, end=False, headers=[("x-api-key", CLIENT_KEY), ("content-type", "a\r\nx-smuggled: 1")])
        client.read(h2.events.ResponseReceived)
    client.socket.close()
    assert all(request.header("x-smuggled") is None for request in backend.requests[hits:])
    assert gateway.call("GET", "/livez").status_code == 200


def test_who_left_holds_nothing(gateway: GatewayProcess, backend: Backend) -> None:
    """L13: whichever way a client leaves, silent, served, in the middle of an answer, on HTTP/2, its socket is given back soon."""
    gateway.call("POST", CHAT, json.loads(body()), headers={"x-api-key": CLIENT_KEY})
    time.sleep(0.3)
    before = gateway.open_sockets()
    for _ in range(10):
        with RawClient(gateway.port) as silent:
            pass
        with RawClient(gateway.port) as served_once:
            served_once.fetch("GET", "/livez")
        with RawClient(gateway.port) as waiting:
            waiting.request("POST", CHAT, body=body(stream=True), headers=[("x-api-key", CLIENT_KEY)])
        client = H2Client(gateway.port)
        client.ask("POST", CHAT, end=False, headers=[("x-api-key", CLIENT_KEY)])
        client.socket.close()
        assert silent is not served_once
    wait_until(lambda: gateway.open_sockets() <= before, within=BODY_SECONDS + 3)


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    """L13: with 64 descriptors and 200 clients nobody falls over, and when they leave all is well again by itself."""
    prefix = [require_program("prlimit", "a process with few descriptors"), "--nofile=64"]
    server = Backend("good", models=("tiny",))
    with serving(server), GatewayProcess(prefix=prefix) as gateway:
        gateway.register("tiny", server.url)
        pid = gateway.pid
        with ExitStack() as held:
            for _ in range(200):
                connection = socket.socket()
                held.callback(connection.close)
                connection.settimeout(1)
                with suppress(OSError):
                    connection.connect(("127.0.0.1", gateway.port))
            time.sleep(0.3)
            with suppress(httpx2.HTTPError):
                assert gateway.chat("tiny", timeout=1).status_code in (200, 503, 504)
        wait_until(lambda: is_served(gateway), within=10)
        assert gateway.is_running
        assert gateway.pid == pid
        assert len(gateway.log_text()) < 200_000, "the log is not flooded"


def is_served(gateway: GatewayProcess) -> bool:
    """Return whether a request is answered."""
    try:
        return gateway.chat("tiny", timeout=2).status_code == 200
    except httpx2.HTTPError:
        return False


# Names and keys


def test_nobody_writes_lines_into_the_log(gateway: GatewayProcess, backend: Backend) -> None:
    """X12: line ends, escapes and quotes in path, model and agent: one record per event, each line whole JSON, nothing to move a cursor."""
    evil = 'x\r\n{"level": "ERROR", "message": "forged"}\x1b[2J\u2028\u202e"'
    for path in ("/admin/%0d%0a%7b%22message%22%3a%22forged%22%7d", "/v1/%1b%5b2J%0aforged", "/%e2%80%a8forged", "/%00%0d%0aforged"):
        gateway.call("GET", path, headers={"x-api-key": ADMIN_KEY})
    gateway.call("POST", CHAT, {"model": evil, "messages": []}, headers={"x-api-key": CLIENT_KEY})
    gateway.admin("POST", "/register", {"model_name": evil, "endpoint_url": f"http://{evil}"})
    gateway.admin("GET", f"/logs?text={'%0aforged'}")
    gateway.call("POST", CHAT, {"model": "tiny", "messages": []}, headers={"x-api-key": CLIENT_KEY, "x-request-id": "a forged id"})
    time.sleep(0.2)
    lines = [line for line in gateway.log_text().split("\n") if line.startswith("{") or "forged" in line]
    assert len(lines) > 5
    for line in lines:
        record = json.loads(line)
        assert record["message"] != "forged"
        assert not re.search(r"[\x00-\x1f\x7f\u2028\u202e]", json.dumps(record, ensure_ascii=False)), line


@pytest.mark.parametrize(
    "key",
    [b"' or '1'='1", b'"; drop table servers; --', b"\xff\xfe\x80", "schl\u00fcssel".encode(), b"", b"Bearer", b"k" * 10_000, b"null"],
)
@pytest.mark.parametrize("header", [b"x-api-key: ", b"authorization: Bearer "])
def test_a_wrong_key_is_only_wrong(gateway: GatewayProcess, backend: Backend, header: bytes, key: bytes) -> None:
    """X10: 403 for operators, 401 for users, whatever stands in it."""
    hits = backend.hits
    for target, status in ((b"GET /admin/servers", (403, 429)), (b"GET /v1/models", (401,)), (b"POST /v1/chat/completions", (401,))):
        with RawClient(gateway.port) as client:
            client.send(target + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n" + header + key + b"\r\n\r\n")
            assert client.read_response().status in (*status, 400)
    assert backend.hits == hits


def test_a_key_of_a_mebibyte(gateway: GatewayProcess) -> None:
    """X10: the head is refused before it is whole."""
    with RawClient(gateway.port) as client:
        with suppress(ConnectionError):
            client.send(b"GET /admin/servers HTTP/1.1\r\nhost: x\r\nx-api-key: " + b"k" * (1 << 20) + b"\r\n\r\n")
        raw = client.read_to_end()
    assert not raw or raw.split(b" ")[1] in (b"400", b"431"), raw[:100]


PATHS = """
/admin/servers /admin/../admin/servers /v1/../admin/servers /admin/../v1/../admin/servers //admin/servers /admin//servers /./admin/servers
/admin/./servers /%61dmin/servers /admin%2fservers /%2fadmin/servers /admin/%2e%2e/admin/servers /v1/%2e%2e/admin/servers /ADMIN/servers
/Admin/Servers /admin/servers/ /admin/servers;x=1 /admin/servers%00 /admin/servers%20 /admin/servers%2f /admin/servers? /admin;/servers
/livez/../admin/servers /livez%2f..%2fadmin/servers /admin/export /admin%2fexport /v1/models/../../admin/export /admin/servers#x
/health/..;/admin/servers /\\admin/servers /admin\\servers http://x/admin/servers http://localhost/admin/servers
/v1/%252e%252e/admin/servers
""".split()  # noqa: SIM905  a list of words is easier to read so


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("host", ["x", "localhost.", "ADMIN", "127.0.0.1"])
def test_no_path_leads_past_the_key(gateway: GatewayProcess, backend: Backend, path: str, host: str) -> None:
    """X15: without a key nothing of the registry is shown, however its path is written and whatever the host is called."""
    with RawClient(gateway.port) as client:
        client.send(
            f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\nx-original-url: /livez\r\nx-rewrite-url: /livez\r\n\r\n".encode()
        )
        answer = client.read_response()
    assert answer.status in (400, 401, 403, 404, 405, 429), answer.status
    assert backend.url.encode() not in answer.body


def test_forwarded_addresses_are_not_believed() -> None:
    """X13: without trusted proxies a spoofed hop is nothing; behind one, a whole /64 is one caller, and so is a malformed chain."""
    server = Backend("good", models=("tiny",))
    with serving(server), GatewayProcess({"RATE_LIMIT_PER_MINUTE": "5", "TRUSTED_PROXIES": "127.0.0.2/32"}) as gateway:
        gateway.register("tiny", server.url)
        assert served(gateway, "127.0.0.1", [f"198.51.100.{number}" for number in range(12)]) == 5
        proxy = "127.0.0.2"
        assert served(gateway, proxy, [f"2001:db8:1:2::{number:x}" for number in range(40)]) == 5
        assert served(gateway, proxy, [f"198.51.100.{number}, 203.0.113.7" for number in range(12)]) == 5
        assert served(gateway, proxy, [f"198.51.100.{number}, 203.0.113.8, 127.0.0.2" for number in range(12)]) == 5
        assert served(gateway, proxy, [f"198.51.100.{number}, nonsense {number}" for number in range(12)]) == 5


def served(gateway: GatewayProcess, peer: str, chains: list[str]) -> int:
    """Return how many of these callers were served, all through one peer; the others were told when to come back."""
    count = 0
    transport = httpx2.HTTPTransport(verify=False, trust_env=False, local_address=peer)
    with httpx2.Client(transport=transport, base_url=gateway.url) as client:
        for chain in chains:
            answer = client.post(CHAT, json={"model": "tiny", "messages": []}, headers={"x-forwarded-for": chain})
            assert answer.status_code in (200, 429)
            count += answer.status_code == 200
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
    return count
