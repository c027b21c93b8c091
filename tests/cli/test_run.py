"""The commands `run` and `demo` as processes."""

import itertools
import os
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path

import anyio
import httpx2
import pytest

from multiverse_gateway.cli.supervisor import MAX_EARLY_EXITS, EarlyExits, supervise
from support import behaviours
from support.backends import Backend
from support.processes import Child, GatewayProcess, environment
from support.sockets import free_port, wait_until
from support.workers import children

ON_LINUX = sys.platform == "linux"


def test_workers_that_end_at_once_are_a_loop() -> None:
    """Restarts come later and later, and then no more; a long life forgives all."""
    exits = EarlyExits()
    pauses = []
    while not exits.is_loop:
        pauses.append(exits.pause)
        exits = exits.after(0.1)
    assert pauses == sorted(pauses)
    assert len(pauses) == 4
    assert not exits.after(60.0).is_loop


@pytest.mark.e2e
async def test_a_crash_loop_ends_with_1(capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the workers' own code."""
    with anyio.fail_after(60):
        assert await supervise([sys.executable, "-c", "raise SystemExit(3)"], 1) == 1
    assert "the gateway stops" in capfd.readouterr().err


ONE_LASTS = """
import os, pathlib, sys
lasting = pathlib.Path("lasting")
if lasting.exists():
    with open("ended", "a") as file:
        file.write(" ".join(sys.argv[1:2]) + "\\n")
    raise SystemExit(3)
lasting.touch()
os.write(int(sys.argv[-1]), b".")
sys.stdin.buffer.read(1)
"""


@pytest.mark.e2e
async def test_workers_that_last_outlive_a_crash_loop_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps a new worker from starting ends no worker that serves; later workers are told that there are others."""
    monkeypatch.chdir(tmp_path)
    ended = tmp_path / "ended"
    jumps = itertools.count(0.0, 7.0)  # each look at the clock is seven seconds later: the one that lasts is old soon
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(partial(supervise, [sys.executable, "-c", ONE_LASTS], 2, now=lambda: next(jumps)))
            while not ended.exists() or len(ended.read_text().splitlines()) <= MAX_EARLY_EXITS:  # noqa: ASYNC110  another process writes it
                await anyio.sleep(0.05)
            assert "--join" in ended.read_text()
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.e2e
async def test_unusable_settings_are_not_tried_again() -> None:
    """A worker that ended with 2 says that all would."""
    with anyio.fail_after(60):
        assert await supervise([sys.executable, "-c", "raise SystemExit(2)"], 2) == 2


@pytest.mark.e2e
def test_the_first_start_shows_the_key_once(tmp_path: Path) -> None:
    """And the link to use it at."""
    with GatewayProcess({"ADMIN_API_KEY": None}, cwd=tmp_path) as gateway:
        wait_until(lambda: "mvg-admin-" in gateway.log_text())
        text = gateway.log_text()
        assert text.count("mvg-admin-") == 1
        assert f"{gateway.url}/login" in text
        key = text.partition("mvg-admin-")[2].split()[0]
        assert gateway.admin("GET", "/servers", key=f"mvg-admin-{key}").status_code == 200
        assert gateway.stop() == 0
        gateway.start()
        assert gateway.log_text().count("mvg-admin-") == 1


@pytest.mark.e2e
def test_sigterm_ends_with_0() -> None:
    """And the listener is closed."""
    with GatewayProcess() as gateway:
        assert gateway.stop() == 0
        with pytest.raises(httpx2.ConnectError):
            gateway.call("GET", "/readyz")


@pytest.mark.e2e
def test_ctrl_c_ends_with_0() -> None:
    """As SIGTERM."""
    with GatewayProcess() as gateway:
        gateway.signal(signal.SIGINT)
        assert gateway.wait() == 0


@pytest.mark.e2e
def test_the_second_signal_ends_it_now() -> None:
    """A connection whose request never ends keeps nobody."""
    with GatewayProcess({"SHUTDOWN_GRACE_SECONDS": "60"}) as gateway, socket.create_connection(("127.0.0.1", gateway.port)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wait_until(lambda: gateway.call("GET", "/readyz").status_code == 200)
        gateway.terminate()
        wait_until(lambda: "stopping" in gateway.log_text())
        gateway.terminate()
        assert gateway.wait(within=10) == 0


@pytest.mark.e2e
def test_a_taken_port_is_said() -> None:
    """With exit code 1 and the remedy."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        child = Child([sys.executable, "-m", "multiverse_gateway", "run", "--port", str(port)], log=Path(os.devnull), env=environment({}))
        child.launch()
        try:
            assert child.wait() == 1
        finally:
            child.kill()


@pytest.mark.e2e
@pytest.mark.skipif(not ON_LINUX, reason="workers share a port on Linux only")
def test_a_dead_worker_is_replaced_and_all_end_together() -> None:
    """A worker killed from outside does not end the service."""
    with GatewayProcess(args=["--workers", "2"]) as gateway:
        wait_until(lambda: len(children(gateway.pid)) == 2)
        before = children(gateway.pid)
        os.kill(min(before), signal.SIGKILL)
        wait_until(lambda: len(children(gateway.pid) - before) == 1, within=20)
        wait_until(gateway.is_ready, within=20)
        assert gateway.stop() == 0
        assert not [pid for pid in before if Path(f"/proc/{pid}").exists()]


@pytest.mark.e2e
@pytest.mark.skipif(not ON_LINUX, reason="workers share a port on Linux only")
def test_workers_end_with_their_parent() -> None:
    """Also when it had no time to tell them."""
    with GatewayProcess(args=["--workers", "2"]) as gateway:
        wait_until(lambda: len(children(gateway.pid)) == 2)
        workers = children(gateway.pid)
        gateway.signal(signal.SIGKILL)
        gateway.wait()
        wait_until(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()], within=20)


@pytest.mark.e2e
@pytest.mark.skipif(not ON_LINUX, reason="workers share a port on Linux only")
def test_a_worker_is_replaced_under_a_running_stream() -> None:
    """SIGUSR2: a new one serves, the stream that the old one has begun goes on to its end, and then the old one is gone."""
    goes_on = threading.Event()
    script = [behaviours.held_stream(goes_on), behaviours.good()]
    with Backend("one", script, models=["tiny"]) as backend, GatewayProcess(args=["--replaceable"]) as gateway:
        gateway.register("tiny", backend.url)
        (old,) = children(gateway.pid)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
        with httpx2.stream("POST", f"{gateway.base_url}/chat/completions", json=body, timeout=30, trust_env=False) as answer:
            lines = answer.iter_lines()
            begun = next(lines)
            gateway.signal(signal.SIGUSR2)
            wait_until(lambda: "The new workers are serving" in gateway.log_text(), within=30)
            assert len(children(gateway.pid)) == 2
            wait_until(lambda: gateway.chat("tiny").status_code == 200, within=10)
            goes_on.set()
            said = [begun, *lines]
        assert said[-2:] == ["data: [DONE]", ""]
        wait_until(lambda: not Path(f"/proc/{old}").exists(), within=20)
        assert len(children(gateway.pid)) == 1
        assert gateway.stop() == 0


@pytest.mark.e2e
@pytest.mark.skipif(not ON_LINUX, reason="workers share a port on Linux only")
def test_a_worker_that_does_not_come_to_serve_replaces_nobody(tmp_path: Path) -> None:
    """Settings that became unusable meanwhile are found out in time."""
    with GatewayProcess(args=["--replaceable"], cwd=tmp_path) as gateway:
        before = children(gateway.pid)
        (tmp_path / ".env").write_text("MULTIVERSE_MAX_QUEUE=many\n")
        gateway.signal(signal.SIGUSR2)
        wait_until(lambda: "so the old ones continue" in gateway.log_text(), within=30)
        wait_until(lambda: children(gateway.pid) == before, within=10)
        assert gateway.is_ready()
        (tmp_path / ".env").unlink()
        gateway.signal(signal.SIGUSR2)
        wait_until(lambda: children(gateway.pid) and not children(gateway.pid) & before, within=30)
        assert gateway.is_ready()
        assert gateway.stop() == 0


WORKER = """#!{python}
import contextlib, os, sys
with contextlib.suppress(BrokenPipeError):  # the first ones are not waited for
    os.write(int(sys.argv[-1]), b".")
print("a worker serves", flush=True)
sys.stdin.buffer.read(1)
"""
SUPERVISOR = "import sys, anyio; from multiverse_gateway.cli.supervisor import supervise; sys.exit(anyio.run(supervise, [sys.argv[1]], 1))"


@pytest.mark.e2e
@pytest.mark.skipif(not ON_LINUX, reason="there are no such signals elsewhere")
def test_a_program_that_is_gone_replaces_nobody(tmp_path: Path) -> None:
    """As while Python itself is renewed: the old worker goes on, and later one can be replaced again."""
    program = tmp_path / "worker"
    program.write_text(WORKER.format(python=sys.executable))
    program.chmod(0o700)
    child = Child([sys.executable, "-c", SUPERVISOR, str(program)], log=tmp_path / "log", env=environment({}), cwd=tmp_path)
    child.launch()
    try:
        wait_until(lambda: "a worker serves" in child.log_text(), within=10)
        before = children(child.pid)
        program.rename(tmp_path / "away")
        child.signal(signal.SIGUSR2)
        wait_until(lambda: "so the old ones continue" in child.log_text() or not child.is_running, within=10)
        assert children(child.pid) == before, child.log_tail()
        (tmp_path / "away").rename(program)
        child.signal(signal.SIGUSR2)
        wait_until(lambda: "The new workers are serving" in child.log_text(), within=10)
        child.signal(signal.SIGTERM)
        assert child.wait(10) == 0, child.log_tail()
    finally:
        child.kill()


@pytest.mark.e2e
def test_the_demonstration_runs_through(tmp_path: Path) -> None:
    """It ends with 0, and leaves nothing running."""
    log = tmp_path / "demo.log"
    command = [sys.executable, "-m", "multiverse_gateway", "demo", "--once", "--port", str(free_port())]
    child = Child(command, log=log, env=environment({}), cwd=tmp_path)
    child.launch()
    try:
        assert child.wait(90) == 0, child.log_tail()
    finally:
        child.kill()
    text = child.log_text()
    assert "is killed" in text
    assert "took over" in text
    assert "\x1b" not in text


@pytest.mark.e2e
def test_the_demonstration_stays_until_it_is_stopped(tmp_path: Path) -> None:
    """With lines to copy, which work."""
    port = free_port()
    command = [sys.executable, "-m", "multiverse_gateway", "demo", "--port", str(port)]
    child = Child(command, log=tmp_path / "demo.log", env=environment({}), cwd=tmp_path)
    child.launch()
    try:
        wait_until(lambda: "Press Ctrl-C to stop everything" in child.log_text() or not child.is_running, within=90)
        assert child.is_running, child.log_tail()
        assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in child.log_text()
        child.signal(signal.SIGINT)
        assert child.wait() == 0
    finally:
        child.kill()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
