"""What a disk, a network and an operator do to a running gateway: requests go on, what was acknowledged stays, the end is orderly."""

from __future__ import annotations

import contextlib
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx2
import pytest

from support import behaviours
from support.backends import Backend
from support.gateways import stage
from support.processes import DOORS, Door, GatewayProcess, door_setting
from support.raw_client import RawClient
from support.sockets import serving, wait_until

CHAT = "/v1/chat/completions"
UNLIMITED = resource.RLIM_INFINITY


def streaming(gateway: GatewayProcess, model: str) -> RawClient:
    """Begin a stream and read its first event."""
    client = RawClient(gateway.port)
    client.request("POST", CHAT, json={"model": model, "messages": [], "stream": True})
    client.read_event()
    return client


@contextlib.contextmanager
def full_disk(pid: int) -> Iterator[None]:
    """Let no file of a process grow: every write fails, as on a full disk."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, UNLIMITED))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))


@pytest.mark.e2e
def test_a_full_disk_stops_no_request() -> None:
    """P02, P11: registering is refused with 503, inference, probes and streams go on, and once there is space all works, unrestarted."""
    server = Backend("good", models=("tiny", "other"))
    with serving(server), GatewayProcess({"HEALTH_CHECK_INTERVAL_SECONDS": "1", "LOG_FILE": "gateway.log"}) as gateway:
        kept = gateway.register("tiny", server.url)
        with full_disk(gateway.pid):
            answer = gateway.admin("POST", "/register", {"model_name": "other", "endpoint_url": server.url})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert gateway.admin("DELETE", f"/register/{kept}").status_code == 503
            assert gateway.admin("PUT", f"/register/{kept}", {"weight": 7}).status_code == 503
            assert [gateway.chat("tiny", stream=number % 2 == 0).status_code for number in range(30)] == [200] * 30
            probes = len(server.probes)
            wait_until(lambda: len(server.probes) > probes + 1, within=5)
            assert gateway.call("GET", "/readyz").status_code == 200
            assert gateway.server(kept)["state"] == "healthy"
        gateway.register("other", server.url)
        assert gateway.chat("other").status_code == 200
        gateway.restart()
        assert {server["model_name"] for server in gateway.admin("GET", "/servers").json()} == {"tiny", "other"}


READ_ONLY = """
import os, sys, anyio, httpx2
from multiverse_gateway import Settings, create_app, lifespan

url, database = sys.argv[1:]
app = create_app(
    Settings(admin_api_key="an-admin-key-for-tests", database_url=f"sqlite:///{database}", allow_private_networks="true")
)

async def main():
    headers = {"x-api-key": "an-admin-key-for-tests"}
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway", headers=headers, timeout=20) as client:
        async with lifespan(app):
            answers = [await client.post("/v1/chat/completions", json={"model": "tiny", "messages": []}) for _ in range(5)]
            registered = await client.post("/admin/register", json={"model_name": "other", "endpoint_url": url})
            print([answer.status_code for answer in answers], registered.status_code, registered.json()["error"]["code"])

anyio.run(anyio.sleep, 0)  # all is imported while it can be read
if os.geteuid() == 0:  # root may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
anyio.run(main)
"""


@pytest.mark.e2e
def test_a_folder_that_cannot_be_written_stops_no_request() -> None:
    """P05: with the database and its folder read-only the known servers serve; registering is refused with 503."""
    server = Backend("good", models=("tiny", "other"))
    with serving(server), tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        folder.mkdir()
        with GatewayProcess(cwd=folder) as gateway:
            gateway.register("tiny", server.url)
            gateway.kill()
            database = gateway.database
        Path(name).chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, server.url, str(database)], capture_output=True, text=True, timeout=60, check=False, cwd=name
        )
        folder.chmod(0o755)
    assert done.stdout == "[200, 200, 200, 200, 200] 503 storage_unavailable\n", done.stdout + done.stderr


@pytest.mark.e2e
def test_a_locked_database_stops_no_request() -> None:
    """P04: writes are refused after five seconds, inference takes no longer than ever, and the lock's end is the end of it."""
    server = Backend("good", models=("tiny", "other"))
    with serving(server), GatewayProcess() as gateway:
        gateway.register("tiny", server.url)
        lock = sqlite3.connect(gateway.database, isolation_level=None)
        lock.execute("begin exclusive")
        answers: list[httpx2.Response] = []
        body = {"model_name": "other", "endpoint_url": server.url}
        writer = threading.Thread(target=lambda: answers.append(gateway.admin("POST", "/register", body)))
        began = time.monotonic()
        writer.start()
        slowest = 0.0
        while writer.is_alive():
            asked = time.monotonic()
            assert gateway.chat("tiny").status_code == 200
            slowest = max(slowest, time.monotonic() - asked)
        assert 4 < time.monotonic() - began < 12
        assert slowest < 3, "no request waits as long as the writer does"
        assert answers[0].status_code == 503
        lock.execute("rollback")
        lock.close()
        gateway.register("other", server.url)


class Unread(GatewayProcess):
    """A gateway whose output nobody reads."""

    def launch(self) -> None:
        """Start it with a pipe that is left alone."""
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=None if self.env is None else dict(self.env),
            cwd=self.cwd,
            start_new_session=True,
        )


@pytest.mark.e2e
def test_a_log_that_nobody_reads_stops_no_request() -> None:
    """P11: with the pipe full, hundreds of requests are answered as fast as ever, and the process still ends in time."""
    server = Backend("good", models=("tiny",))
    with serving(server), Unread({"LOG_LEVEL": "DEBUG"}) as gateway:
        gateway.register("tiny", server.url)
        with httpx2.Client(base_url=gateway.url, trust_env=False) as client:
            for _ in range(300):
                assert client.post(CHAT, json={"model": "tiny", "messages": [], "user": "x" * 100}, timeout=5).status_code == 200
        assert gateway.stop(within=10) == 0
        assert gateway.process is not None
        assert gateway.process.stdout is not None
        gateway.process.stdout.close()


@pytest.mark.e2e
@pytest.mark.parametrize("door", DOORS)
def test_streams_are_told_that_the_gateway_ends(door: Door) -> None:
    """G01: what ends within the grace ends well; the others get the error event and no [DONE]; exit 0 in time; nothing new comes in."""
    brief = behaviours.stream([b'data: {"choices":[{"index":0,"delta":{}}]}\n\n'] * 5 + [b"data: [DONE]\n\n"], interval=0.1)
    endless = behaviours.endless_stream(0.05)
    one, two = Backend("brief", brief, models=("brief",)), Backend("endless", endless, models=("endless",))
    with serving(one, two), GatewayProcess({"SHUTDOWN_GRACE_SECONDS": "1.5", **door_setting(door)}) as gateway:
        gateway.register("brief", one.url)
        gateway.register("endless", two.url)
        long = [streaming(gateway, "endless") for _ in range(20)]
        short = streaming(gateway, "brief")
        began = time.monotonic()
        gateway.terminate()
        assert short.read_response().data[-1] == "[DONE]"
        for client in long:
            answer = client.read_response()
            assert not answer.complete
            assert answer.data[-1]["error"]["code"] == "gateway_shutting_down"
            assert "[DONE]" not in answer.data
        assert gateway.wait(within=5) == 0
        assert 1.4 < time.monotonic() - began < 3.5
        wait_until(lambda: two.running == 0)
        for client in [short, *long]:
            client.close()
        assert not gateway.database.with_name("multiverse.db-wal").exists(), "the journal is in the file"


@pytest.mark.e2e
@pytest.mark.parametrize("door", DOORS)
def test_a_second_signal_means_now(door: Door) -> None:
    """G01: a minute of grace is left, and the process is gone within a second or so; the stream is told nevertheless."""
    server = Backend("endless", behaviours.endless_stream(0.05), models=("endless",))
    with serving(server), GatewayProcess({"SHUTDOWN_GRACE_SECONDS": "60", **door_setting(door)}) as gateway:
        gateway.register("endless", server.url)
        client = streaming(gateway, "endless")
        gateway.terminate()
        time.sleep(0.3)
        assert gateway.is_running
        began = time.monotonic()
        gateway.terminate()
        assert client.read_response().data[-1]["error"]["code"] == "gateway_shutting_down"
        assert gateway.wait(within=5) == 0
        assert time.monotonic() - began < 2.5
        client.close()


@pytest.mark.e2e
@pytest.mark.parametrize("door", DOORS)
def test_who_waits_in_the_queue_is_sent_elsewhere(door: Door) -> None:
    """G02: at once with 503 and Retry-After; the request that runs is finished."""
    gate = behaviours.Gate()
    server = Backend("busy", gate.held(behaviours.good()), models=("tiny",))
    with serving(server), GatewayProcess(door_setting(door)) as gateway:
        gateway.register("tiny", server.url, max_concurrency=1)
        with RawClient(gateway.port) as first, RawClient(gateway.port) as second:
            for client in (first, second):
                client.request("POST", CHAT, json={"model": "tiny", "messages": []})
                wait_until(lambda: server.hits == 1)
            time.sleep(0.2)
            gateway.terminate()
            began = time.monotonic()
            refused = second.read_response()
            assert time.monotonic() - began < 5, "not when the grace is over"
            assert (refused.status, refused.json["error"]["code"]) == (503, "gateway_shutting_down")
            assert int(refused.header("retry-after") or 0) >= 1
            gate.open()
            assert first.read_response().status == 200
        assert gateway.wait(within=8) == 0


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_a_clock_that_jumps_changes_nothing(jump: float) -> None:
    """H09: an hour forth or back on the wall: the same states, probes and timers; a new check shows the new time."""
    async with stage() as there:
        for number in range(3):
            await there.register(endpoint_url=f"http://gpu-{number}.example")
        before = dict(there.gateway.table.routes)
        there.clock.wall += jump
        await there.gateway.health_book.flush()
        await there.gateway.refresh()
        await anyio.sleep(0.1)
        assert {key: route.health for key, route in there.gateway.table.routes.items()} == {key: r.health for key, r in before.items()}
        for route in before.values():
            await there.gateway.checks.check_now(route.server)
        for key, route in there.gateway.table.routes.items():
            assert route.health.state is before[key].health.state
            assert abs(route.health.next_probe.at - before[key].health.next_probe.at) < 60
            assert route.health.last_checked_at == there.clock.wall
