"""What clients of HTTP/2 leave behind, through the server that users run: nothing, however they go."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import httpx2
import pytest
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from multiverse_gateway.cli.hypercorn_hardening import HardenedConfig
from multiverse_gateway.cli.hypercorn_hardening.http2 import HardenedH2
from support import behaviours
from support.backends import Backend
from support.certificates import write_certificate
from support.h2_client import H2Client, frame
from support.processes import GatewayProcess
from support.require import require_program
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

ASSET = "/static/x/vendor/swagger-ui-bundle.js"
"""1.7 MB."""
CHAT = "/v1/chat/completions"
WRITE_SECONDS = 0.8
OVERSIZED = b"\xff\xff\xff" + frame(0, 0, 1, b"")[3:]
"""The head of a frame of 16 MiB."""
STREAMS = 90
"""On one connection: fewer than may be reset in a short time."""
MOST_PER_STREAM = 64 << 10


class Stage:
    """A gateway that serves plain and encrypted HTTP/2, and what it holds."""

    def __init__(self, gateway: GatewayProcess, trust: ssl.SSLContext | None) -> None:
        self.gateway = gateway
        self.trust = trust
        self.backend = Backend("good", models=("tiny",))

    def connect(self, **more: Any) -> H2Client:
        """Return a new connection."""
        return H2Client(self.gateway.port, tls=self.trust, **more)

    def tasks(self) -> int:
        """Return the tasks of the gateway's loop, those of this question included."""
        text = self.call("/metrics")
        return int(float(next(line.split()[-1] for line in text.splitlines() if line.startswith("multiverse_tasks "))))

    def call(self, path: str) -> str:
        """Ask for a path over HTTP/1.1."""
        verify: Any = False if self.trust is None else self.trust
        scheme = "http" if self.trust is None else "https"
        return httpx2.get(f"{scheme}://127.0.0.1:{self.gateway.port}{path}", verify=verify, trust_env=False).text


class TlsGateway(GatewayProcess):
    """A gateway that serves HTTPS."""

    trust: ssl.SSLContext

    @property
    def url(self) -> str:
        """The root URL."""
        return super().url.replace("http://", "https://")

    def is_ready(self) -> bool:
        """Whether it answers."""
        with suppress(httpx2.HTTPError):
            return httpx2.get(self.url + self.ready_path, timeout=2.0, trust_env=False, verify=self.trust).status_code == 200
        return False


SETTINGS = {
    "MULTIVERSE_CLIENT_WRITE_TIMEOUT_SECONDS": f"{WRITE_SECONDS:g}",
    "MULTIVERSE_CLIENT_BODY_TIMEOUT_SECONDS": "20",
    "PUBLIC_DASHBOARD": "true",
    "LOG_LEVEL": "WARNING",
}


@pytest.fixture(scope="module", params=["plain", "tls"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Return a gateway with little patience for clients that do not read."""
    if request.param == "plain":
        with GatewayProcess(SETTINGS) as gateway:
            yield from staged(Stage(gateway, None))
        return
    certificate, key = write_certificate(tmp_path_factory.mktemp("tls"))
    process = TlsGateway(SETTINGS, args=["--certfile", str(certificate), "--keyfile", str(key)])
    process.trust = ssl.create_default_context(cafile=str(certificate))
    with process as gateway:
        yield from staged(Stage(gateway, process.trust))


def staged(it: Stage) -> Iterator[Stage]:
    """Register a server and let caches fill; in the end nothing may have gone wrong inside."""
    with serving(it.backend):
        record = {"model_name": "tiny", "endpoint_url": it.backend.url}
        verify: Any = False if it.trust is None else it.trust
        headers = {"x-api-key": it.gateway.admin_key}
        url = f"{it.gateway.url}/admin/register"
        assert httpx2.post(url, json=record, headers=headers, verify=verify, trust_env=False).status_code == 201
        for path in (ASSET, "/openapi.json", "/", "/metrics"):
            it.call(path)
        yield it
    assert it.gateway.stop() == 0
    assert "Traceback" not in it.gateway.log_text()


@pytest.fixture
def stage(shared: Stage) -> Iterator[Stage]:
    """Return the gateway, and compare its tasks before and after the test: none may be left."""
    before = shared.tasks()
    yield shared
    wait_until(lambda: shared.tasks() <= before, within=WRITE_SECONDS + 5, what="a task is left")


def body(**more: object) -> bytes:
    """Return the body of a good request."""
    return json.dumps({"model": "tiny", "messages": [], **more}).encode()


def open_streams(client: H2Client, path: str, count: int = STREAMS) -> list[int]:
    """Ask often, and wait until the last answer has begun."""
    streams = [client.ask("GET", path) for _ in range(count)]
    for stream in streams:
        assert client.status(stream) == 200
    return streams


# Clients that do not read


@pytest.mark.parametrize("path", [ASSET, "/openapi.json"])
def test_windows_that_stay_closed(stage: Stage, path: str) -> None:
    """Little is held of each answer however large it is, and the stream ends after the write timeout."""
    clients = [stage.connect(window=0) for _ in range(2)]
    for client in clients:  # the first time tasks and buffers are made, their memory is used again
        for stream in open_streams(client, path):
            assert client.read(h2.events.StreamReset, stream) is not None
    before = stage.gateway.memory_bytes()
    opened = [(client, open_streams(client, path)) for client in clients]
    held = stage.gateway.memory_bytes() - before
    for client, streams in opened:
        for stream in streams:
            assert client.read(h2.events.StreamReset, stream) is not None
        assert client.status(client.ask("GET", "/livez")) == 200, "the connection lives on"
        client.socket.close()
    assert held <= 2 * STREAMS * MOST_PER_STREAM
    assert stage.gateway.memory_bytes() - before < 5 << 20


ANSWERS: dict[str, Callable[[Stage], tuple[str, str, bytes | None, list[tuple[str, str]]]]] = {
    "page": lambda stage: ("GET", "/dashboard", None, []),
    "small page": lambda stage: ("GET", "/livez", None, []),
    "live page": lambda stage: ("GET", "/live?of=dashboard", None, []),
    "admin": lambda stage: ("GET", "/admin/servers", None, [("x-api-key", stage.gateway.admin_key)]),
    "export": lambda stage: ("GET", "/admin/export", None, [("x-api-key", stage.gateway.admin_key)]),
    "models": lambda stage: ("GET", "/v1/models", None, []),
    "error": lambda stage: ("GET", "/nothing", None, []),
    "inference": lambda stage: ("POST", CHAT, body(), []),
    "stream": lambda stage: ("POST", CHAT, body(stream=True), []),
    "refusal": lambda stage: ("POST", CHAT, b"{", []),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_answer_that_is_not_taken_ends(stage: Stage, answer: str) -> None:
    """Pages and API, large and small: reset after the write timeout."""
    method, path, content, headers = ANSWERS[answer](stage)
    with stage.connect(window=0) as client:
        stream = client.ask(method, path, content, headers=headers)
        assert client.status(stream) < 500
        assert client.read(h2.events.StreamReset, stream) is not None


def test_a_window_that_drips(stage: Stage) -> None:
    """One byte now and then does not keep an answer in memory for ever."""
    with stage.connect(window=0) as client:
        streams = open_streams(client, ASSET, 10)
        reset: set[int] = set()
        client.socket.settimeout(0.05)
        while len(reset) < len(streams):
            for stream in set(streams) - reset:
                with suppress(h2.exceptions.ProtocolError):
                    client.allow(1, stream)
            with suppress(TimeoutError):
                event = client.read(h2.events.StreamReset)
                assert isinstance(event, h2.events.StreamReset)
                reset.add(event.stream_id)


def test_a_slow_client_gets_everything(stage: Stage) -> None:
    """A window that opens in time is no stall, however small its steps."""
    expected = stage.call("/openapi.json")
    with stage.connect(window=5000) as client:
        stream = client.ask("GET", "/openapi.json")
        assert client.body(stream) == expected.encode()


def test_windows_that_shrink_and_grow(stage: Stage) -> None:
    """A client may take its window back and open it again (RFC 9113, 6.9.2)."""
    with stage.connect() as client:
        stream = client.ask("GET", "/openapi.json")
        assert client.read(h2.events.DataReceived, stream) is not None
        client.state.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        client.flush()
        assert client.read(h2.events.SettingsAcknowledged) is not None
        client.state.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
        client.allow(1 << 20)
        assert client.read(h2.events.StreamEnded, stream) is not None


def test_a_client_that_reads_nothing_of_its_socket(stage: Stage) -> None:
    """The windows are open, but nothing is taken off the wire: the connection ends."""
    with stage.connect(window=1 << 30) as client:
        client.allow(1 << 30)
        for _ in range(20):
            client.ask("GET", ASSET)
        wait_until(lambda: is_ended(client.socket), within=WRITE_SECONDS + 5)


def is_ended(connection: socket.socket) -> bool:
    """Return whether the other end closed the connection; nothing is read."""
    try:
        connection.send(frame(6, 0, 0, b"12345678"))
    except (ConnectionError, ssl.SSLError):
        return True
    return False


def test_windows_without_end(stage: Stage) -> None:
    """A window beyond its bounds ends the stream; opening it again and again costs nothing."""
    with stage.connect() as client:
        client.socket.sendall(b"".join(frame(8, 0, 0, b"\0\0\0\1") for _ in range(5000)))
        assert client.status(client.ask("GET", "/livez")) == 200
        client.socket.sendall(frame(8, 0, 0, b"\x7f\xff\xff\xff"))
        assert client.read(h2.events.ConnectionTerminated) is not None


# Clients that leave

WAYS = ("reset", "goaway", "fin", "rst", "half", "garbage", "frame")


def leave(client: H2Client, streams: list[int], way: str) -> None:
    """Leave a connection, or its streams, in one of the ways."""
    if way == "reset":
        for stream in streams:
            client.reset(stream)
    elif way == "goaway":
        client.state.close_connection()
        client.flush()
    elif way == "fin":
        client.socket.close()
    elif way == "rst":
        client.abort()
    elif way == "half":
        client.socket.shutdown(socket.SHUT_WR)
    else:
        client.socket.sendall(b"\xff" * 100 if way == "garbage" else OVERSIZED)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [0, 65_535])
def test_answers_that_are_left(stage: Stage, way: str, window: int) -> None:
    """In the middle of large answers, of live pages and of streams from models."""
    before = stage.tasks()
    stage.backend.behave = behaviours.endless_stream(0.01)
    live = 4  # tasks of a connection that waits for the next request
    clients = [stage.connect(window=window) for _ in range(3)]
    for client in clients:
        streams = [client.ask("GET", ASSET) for _ in range(20)]
        streams += [client.ask("GET", "/live?of=dashboard") for _ in range(5)]
        streams += [client.ask("POST", CHAT, body(stream=True)) for _ in range(5)]
        client.status(streams[-1])
        leave(client, streams, way)
    wait_until(lambda: stage.tasks() <= before + len(clients) * live, within=WRITE_SECONDS + 5, what="a left request still has a task")
    wait_until(lambda: not stage.backend.running)
    for client in clients:
        client.socket.close()
    stage.backend.behave = behaviours.good()


def test_thousands_of_requests_that_are_left(stage: Stage) -> None:
    """Memory does not grow with them."""

    def leave_many(connections: int) -> None:
        for _ in range(connections):
            with stage.connect() as client:
                for stream in [client.ask("GET", ASSET) for _ in range(STREAMS)]:
                    client.reset(stream)
                client.status(client.ask("GET", "/livez"))

    leave_many(10)
    before = stage.gateway.memory_bytes()
    leave_many(15)
    assert stage.gateway.memory_bytes() - before < 5 << 20


# Bodies


def test_answers_before_the_body_has_arrived(stage: Stage) -> None:
    """What comes later is dropped, and no other stream waits for it."""
    with stage.connect() as client:
        refused = [client.ask("POST", "/admin/register", b"{" * 60_000, end=False, headers=[("x-api-key", "wrong")]) for _ in range(20)]
        for stream in refused:
            assert client.status(stream) in (403, 429)
            assert client.read(h2.events.StreamEnded, stream) is not None
        upload = client.ask("POST", CHAT, b"", end=False)
        sent = 0
        content = body(user="x" * 500_000)
        while sent < len(content):
            room = client.state.local_flow_control_window(upload)
            if not room:
                client.read(h2.events.WindowUpdated)
                continue
            client.send_body(upload, content[sent : sent + room], end=False)
            sent += room
        client.state.end_stream(upload)
        client.flush()
        assert client.status(upload) == 200
        for stream in refused:
            client.reset(stream)


@pytest.mark.parametrize("path", [CHAT, "/admin/register", "/v1/audio/transcriptions", "/login", "/nothing"])
@pytest.mark.parametrize("way", ["reset", "goaway", "fin", "rst"])
def test_bodies_that_are_left(stage: Stage, path: str, way: str) -> None:
    """In the middle of an upload, whether somebody reads it or not."""
    clients = [stage.connect() for _ in range(3)]
    for client in clients:
        headers = [("x-api-key", stage.gateway.admin_key), ("content-type", "application/json")]
        streams = [client.ask("POST", path, b" " * 50_000, end=False, headers=headers) for _ in range(20)]
        if way != "rst":
            client.ask("GET", "/livez")
        leave(client, streams, way)
    for client in clients:
        client.socket.close()


@pytest.mark.parametrize("head", ["data", "headers"])
def test_oversized_frames_are_not_buffered(stage: Stage, head: str) -> None:
    """A frame that says that it is larger than frames may be, and a head without end, end the connection before they are held."""
    endless = frame(1, 0, 1, b"\x82") + frame(9, 0, 1, b"\x82" * 16_000) * 10
    with stage.connect() as client:
        client.status(client.ask("GET", "/livez"))
        with suppress(h2.exceptions.ProtocolError, OSError):  # the end may come while the client still sends
            client.socket.sendall(OVERSIZED if head == "data" else endless)
            while client.read(h2.events.ConnectionTerminated) is not None:
                pass


# What HTTP/2 also has


def test_connect_is_answered(stage: Stage) -> None:
    """There are no WebSockets: 404 with the usual error, on any path (RFC 8441)."""
    with stage.connect() as client:
        for path in ("/v1/responses", "/v1/realtime", "/livez"):
            stream = client.state.get_next_available_stream_id()
            fields = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", path), (":authority", "gateway")]
            client.state.send_headers(stream, [*fields, ("sec-websocket-version", "13")])
            client.flush()
            assert client.status(stream) == 404
            assert json.loads(client.body(stream))["error"]["code"] == "unknown_url"
        stream = client.state.get_next_available_stream_id()
        client.state.send_headers(stream, [(":method", "CONNECT"), (":authority", "gateway:443")])
        client.flush()
        assert client.read(h2.events.StreamReset, stream) is not None
        assert client.status(client.ask("GET", "/livez")) == 200


def test_priorities_are_not_remembered(stage: Stage) -> None:
    """Thousands of them, for streams that will never be, change nothing."""
    with stage.connect() as client:
        for dependency in (0, 1, 5):
            payload = dependency.to_bytes(4, "big") + b"\x10"
            client.socket.sendall(b"".join(frame(2, 0, stream, payload) for stream in range(101, 8001, 2)))
        assert client.body(client.ask("GET", "/livez"))


@pytest.mark.parametrize("path", ["/\xff", "*", "relative"])
def test_odd_paths_hurt_no_other_stream(stage: Stage, path: str) -> None:
    """Refused, one way or the other."""
    with stage.connect() as client:
        stream = client.state.get_next_available_stream_id()
        fields: Any = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", path.encode("latin-1")), (b":authority", b"x")]
        client.state.send_headers(stream, fields, end_stream=True)
        other = client.ask("GET", "/livez")
        assert client.status(other) == 200


async def test_many_streams_share_a_connection(stage: Stage) -> None:
    """All get everything, in turn."""
    expected = (await asyncio.to_thread(stage.call, "/openapi.json")).encode()
    verify: Any = stage.trust or False
    async with httpx2.AsyncClient(http1=stage.trust is not None, http2=True, verify=verify, trust_env=False) as client:
        answers = await asyncio.gather(*(client.get(f"{stage.gateway.url}/openapi.json") for _ in range(20)))
    assert [answer.http_version for answer in answers] == ["HTTP/2"] * 20
    assert [answer.content for answer in answers] == [expected] * 20


def test_the_end_of_the_process_waits_for_streams() -> None:
    """A stream that runs comes to its end, another is refused so that it may be sent elsewhere, and then the connection is closed."""
    backend, gate = Backend("good", models=("tiny",)), behaviours.Gate()
    backend.behave = gate.held()
    with serving(backend), GatewayProcess(SETTINGS) as gateway:
        gateway.register("tiny", backend.url)
        with H2Client(gateway.port) as client:
            running = client.ask("POST", CHAT, body(stream=True))
            wait_until(lambda: backend.running)
            gateway.terminate()
            wait_until(lambda: is_refused(client))
            gate.open()
            assert client.status(running) == 200
            assert client.body(running).endswith(b"data: [DONE]\n\n")
            assert client.read(h2.events.ConnectionTerminated) is not None
        assert gateway.wait() == 0
        assert "Traceback" not in gateway.log_text()


def is_refused(client: H2Client) -> bool:
    """Return whether a new stream is refused."""
    stream = client.ask("GET", "/livez")
    while (event := client.read(h2.events.Event, stream)) is not None:
        if isinstance(event, h2.events.StreamReset):
            return event.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
        if isinstance(event, h2.events.StreamEnded):
            return False
    raise AssertionError("the connection ended")


def test_curl_speaks_http2(stage: Stage) -> None:
    """With prior knowledge, and by ALPN."""
    curl = require_program("curl", "a client of HTTP/2")
    how = ["--http2-prior-knowledge"] if stage.trust is None else ["--http2", "--insecure"]
    command = [curl, "-s", "-w", "%{http_version} %{response_code}", "-d", body().decode(), "-H", "content-type: application/json"]
    done = subprocess.run([*command, *how, f"{stage.gateway.url}{CHAT}"], capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout.endswith("2 200")


# Hypercorn's own HTTP/2


class Server(TCPServer):
    """Hypercorn's server of one connection, with the HTTP/2 that a test chooses."""

    protocol_class: type[Any] = H2Protocol

    async def run(self) -> None:
        """Serve HTTP/2 only."""
        async with TaskGroup(self.loop) as group:
            self._task_group = group
            state = ConnectionState({})
            self.protocol = self.protocol_class(self.app, self.config, self.context, group, state, False, None, None, self.protocol_send)
            await self.protocol.initiate()
            await self.idle_task.restart(group, self._idle_timeout)
            await self._read_data()


class OurServer(Server):
    """The same with ours."""

    protocol_class = HardenedH2


async def is_left_behind(server: type[Server]) -> bool:
    """Return whether an application still sends an answer whose client, with a closed window, has left."""
    left, ended = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        watching = asyncio.ensure_future(watch())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 100_000})
        await watching
        ended.set()

    serving: list[asyncio.Task[Any]] = []
    writers: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: Any = asyncio.current_task()
        serving.append(task)
        writers.append(writer)
        loop = asyncio.get_running_loop()
        await server(wrap_app(app, 0, "asgi"), loop, HardenedConfig(), WorkerContext(None), {}, reader, writer)

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        client = await asyncio.to_thread(H2Client, port, window=0)
        stream = await asyncio.to_thread(client.ask, "GET", "/")
        assert await asyncio.to_thread(client.status, stream) == 200
        client.socket.close()
        async with asyncio.timeout(5):
            await left.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        result = not ended.is_set()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()
    return result


async def test_hypercorn_still_leaves_senders_behind() -> None:
    """When this fails after an upgrade, see whether `cli.hypercorn_hardening.http2` can be dropped."""
    assert await is_left_behind(Server), (
        "hypercorn now closes the buffer of a stream whose client has left: compare cli/hypercorn_hardening/http2.py "
        "with hypercorn/protocol/h2.py, "
        "run the tests of this module without harden_hypercorn, and drop what is needless"
    )


async def test_our_http2_does_not() -> None:
    """The same client leaves the same application."""
    assert not await is_left_behind(OurServer)
