"""Clients that leave before the end: the rows D of the fault matrix."""

from __future__ import annotations

import json
import math
import random
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import h2.connection
import h2.errors
import h2.events
import pytest

from e2e.deployment import Deployment
from support import behaviours
from support.backends import Backend
from support.processes import DOORS
from support.raw_client import RawClient
from support.sockets import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True, scope="module")]

Deploy = Callable[..., Deployment]
TIMES = 100
SOON = 1.0
"""Seconds in which a server must have noticed; the usual time is a few milliseconds."""


def leave(client: RawClient, how: str) -> float:
    """Leave by FIN or RST, and return when."""
    at = time.monotonic()
    if how == "FIN":
        client.close()
    else:
        client.abort()
    return at


def check_noticed(deployment: Deployment, left: list[float]) -> None:
    """Check that the server saw each client's end soon, that no slot is left, and that nobody is to blame."""
    backend = deployment.backends[0]
    wait_until(lambda: backend.aborted == len(left), within=SOON, what="the server does not know that its client left")
    deployment.wait_for_quiet(within=SOON)
    lags = sorted(request.ended_at - at for request, at in zip(backend.requests, left, strict=True) if request.ended_at is not None)
    assert len(lags) == len(left)
    assert lags[math.ceil(0.9 * len(lags)) - 1] <= 0.1
    assert lags[-1] <= SOON
    assert deployment.state() == "healthy"


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_a_client_leaves_in_mid_stream(deploy: Deploy, how: str) -> None:
    """D01: the server sees it at once, the slot is free, the server stays healthy."""
    deployment = deploy(Backend("patient", behaviours.stall_stream(2)))
    left = []
    for _ in range(TIMES):
        client = RawClient(deployment.gateway.port)
        deployment.begin(client, stream=True)
        client.read_event()
        left.append(leave(client, how))
        wait_until(lambda: deployment.backends[0].aborted == len(left), within=SOON)
    check_noticed(deployment, left)


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_a_client_leaves_while_tokens_flow(deploy: Deploy, how: str) -> None:
    """D01: as when nothing flows."""
    deployment = deploy(Backend("busy", behaviours.endless_stream(interval=0.002)))
    with RawClient(deployment.gateway.port) as client:
        deployment.begin(client, stream=True)
        client.read_event()
        left = leave(client, how)
    check_noticed(deployment, [left])


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_leaves_before_the_first_byte(deploy: Deploy, stream: bool, how: str) -> None:
    """D02: the same, streamed or not; it is no reason to try another server."""
    deployment = deploy(Backend("silent", behaviours.stall()), Backend("spare", behaviours.stall()))
    left = []
    for number in range(20):
        client = RawClient(deployment.gateway.port)
        deployment.begin(client, stream=stream)
        wait_until(lambda number=number: sum(backend.hits for backend in deployment.backends) == number + 1)  # type: ignore[misc]
        left.append(leave(client, how))
        wait_until(lambda number=number: sum(backend.aborted for backend in deployment.backends) == number + 1, within=SOON)  # type: ignore[misc]
    deployment.wait_for_quiet()
    assert sum(backend.hits for backend in deployment.backends) == 20
    assert [deployment.state(0), deployment.state(1)] == ["healthy", "healthy"]


def test_a_client_leaves_while_it_waits_for_a_slot(deploy: Deploy) -> None:
    """Its place in the queue is given back, and the slot goes to a request that still waits."""
    gate = behaviours.Gate()
    deployment = deploy(Backend("narrow", gate.held()), max_concurrency=1)
    backend = deployment.backends[0]
    with (
        RawClient(deployment.gateway.port) as first,
        RawClient(deployment.gateway.port) as gone,
        RawClient(deployment.gateway.port) as last,
    ):
        deployment.begin(first)
        wait_until(lambda: backend.hits == 1)
        deployment.begin(gone)
        deployment.begin(last)
        gone.abort()
        gate.open()
        assert first.read_response().status == 200
        assert last.read_response().status == 200
    deployment.wait_for_quiet()
    assert backend.most_running == 1


class Connection:
    """An HTTP/2 connection that asks and resets: the usual clients for Python never send RST_STREAM."""

    def __init__(self, port: int) -> None:
        """Connect."""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=5.0)
        self.state = h2.connection.H2Connection()
        self.state.initiate_connection()
        self.flush()

    def flush(self) -> None:
        """Send what is due."""
        self.socket.sendall(self.state.data_to_send())

    def ask(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request and return its stream."""
        stream = self.state.get_next_available_stream_id()
        headers = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "gateway")]
        self.state.send_headers(stream, headers, end_stream=not body)
        if body:
            self.state.send_data(stream, body, end_stream=True)
        self.flush()
        return stream

    def reset(self, stream: int) -> None:
        """Give a stream up."""
        self.state.reset_stream(stream, error_code=h2.errors.ErrorCodes.CANCEL)
        self.flush()

    def wait_for(self, kind: type[h2.events.Event], stream: int) -> None:
        """Read until such an event of the stream came."""
        while True:
            events = self.state.receive_data(self.socket.recv(65_536))
            self.flush()
            if any(isinstance(event, kind) and getattr(event, "stream_id", None) == stream for event in events):
                return


@pytest.mark.parametrize("at", ["first byte", "mid-stream"])
def test_a_stream_of_http2_is_reset(deploy: Deploy, at: str) -> None:
    """D04: RST_STREAM is leaving, and other streams of the connection go on."""
    deployment = deploy(Backend("patient", behaviours.stall() if at == "first byte" else behaviours.stall_stream(2)))
    connection = Connection(deployment.gateway.port)
    left = []
    with connection.socket:
        for number in range(20):
            stream = connection.ask("POST", "/v1/chat/completions", json.dumps(deployment.body(stream=True)).encode())
            if at == "mid-stream":
                connection.wait_for(h2.events.DataReceived, stream)
            wait_until(lambda number=number: deployment.backends[0].hits == number + 1)  # type: ignore[misc]
            left.append(time.monotonic())
            connection.reset(stream)
            wait_until(lambda: deployment.backends[0].aborted == len(left), within=SOON)
        connection.wait_for(h2.events.StreamEnded, connection.ask("GET", "/livez"))
        check_noticed(deployment, left)


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_goodbye(deploy: Deploy, stream: bool) -> None:
    """D06: a client that only stops sending is answered or canceled, and no slot hangs."""
    gate = behaviours.Gate()
    deployment = deploy(Backend("waiting", gate.held()))
    with RawClient(deployment.gateway.port) as client:
        deployment.begin(client, stream=stream)
        wait_until(lambda: deployment.backends[0].hits == 1)
        client.half_close()
        gate.open()
        answer = client.read_response()
        assert answer.complete or answer.ended_by is not None
    deployment.wait_for_quiet()


def test_many_leave_at_any_moment(deploy: Deploy) -> None:
    """D05: in the body, before the first byte, in mid-stream; nothing is left behind, and everybody after them is answered."""
    chooser = random.Random(5)
    deployment = deploy(
        Backend("one", behaviours.good(events=20, interval=0.002)), Backend("two", behaviours.good(first_after=0.01)), max_concurrency=4
    )
    for _ in range(40):
        with ExitStack() as opened:
            clients = [opened.enter_context(RawClient(deployment.gateway.port)) for _ in range(10)]
            for client in clients:
                stream = chooser.random() < 0.7
                moment = chooser.choice(["in the body", "before the answer", "in the answer"])
                if moment == "in the body":
                    client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
                else:
                    deployment.begin(client, stream=stream)
                if moment == "in the answer":
                    client.read_head()
                leave(client, chooser.choice(["FIN", "RST"]))
    deployment.wait_for_quiet(within=2)
    wait_until(lambda: all(backend.running == 0 for backend in deployment.backends))
    assert all(backend.most_running <= 4 for backend in deployment.backends)
    assert {deployment.ask().status_code for _ in range(20)} == {200}
    assert [deployment.state(0), deployment.state(1)] == ["healthy", "healthy"]
