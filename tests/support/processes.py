"""Real child processes for tests: a llama.cpp server and the gateway itself.

    with LlamaServer("tiny") as llama, GatewayProcess({"LOG_LEVEL": "DEBUG"}) as gateway:
        gateway.register("tiny", llama.url)
        llama.pause()                                # SIGSTOP
        gateway.kill()                               # SIGKILL
        gateway.start()                              # on the same port, with the same database

Every child leads its own process group and is killed with it when its `with` block ends, however it ends. No wait is
unbounded; what a child wrote is in `log_text()` and in the message when it does not start.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json as json_module
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx2

from support.sockets import free_port, wait_until
from support.tiny_model import write_tiny_model

__all__ = [
    "ADMIN_KEY",
    "DOORS",
    "Child",
    "Door",
    "GatewayProcess",
    "LlamaServer",
    "NotStartedError",
    "door_setting",
    "free_port",
    "tiny_model",
    "wait_until",
]

ADMIN_KEY = "test-admin-key-0123456789abcdef0123"
SUPPORT = Path(__file__).resolve().parent
SOURCES = SUPPORT.parents[1] / "src"
KILL_TIMEOUT = 10.0
PLAIN_NAMES = frozenset(
    {
        "PORT",
        "LOG_LEVEL",
        "DATABASE_URL",
        "ADMIN_API_KEY",
        "HEALTH_CHECK_INTERVAL_SECONDS",
        "HEALTH_CHECK_TIMEOUT_SECONDS",
        "MAX_CONSECUTIVE_FAILURES",
        "REQUEST_TIMEOUT_SECONDS",
        "MAX_RETRY_ATTEMPTS",
        "REQUIRE_CLIENT_AUTH",
        "CLIENT_API_KEYS",
        "ENABLE_CORS",
        "CORS_ORIGINS",
        "RATE_LIMIT_PER_MINUTE",
        "KEY_RATE_LIMIT_PER_MINUTE",
        "RATE_LIMIT_STORAGE",
        "MAX_BODY_BYTES",
        "MAX_ADMIN_BODY_BYTES",
        "ALLOW_PRIVATE_NETWORKS",
        "VERIFY_BACKEND_TLS",
        "TRUSTED_PROXIES",
        "PUBLIC_URL",
        "ROOT_PATH",
        "AUTO_DEREGISTER",
        "CONNECT_TIMEOUT_SECONDS",
        "FIRST_BYTE_TIMEOUT_SECONDS",
        "IDLE_TIMEOUT_SECONDS",
        "SHUTDOWN_GRACE_SECONDS",
        "BALANCER",
        "PROBE",
        "LOG_FILE",
        "LOG_FORMAT",
        "PUBLIC_DASHBOARD",
        "BACKEND_KEY_SECRET",
    }
)
"""Settings that the gateway also reads without the prefix: kept from leaking out of the developer's shell."""


class NotStartedError(AssertionError):
    """A child ended, or was not ready in time; the message has the end of its log."""


class Child:
    """A child process in a group of its own."""

    def __init__(self, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        """Prepare; `start` starts it. `env` is the whole environment."""
        self.command = list(command)
        self.log = log
        self.env = env
        self.cwd = cwd
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The id of the running or last process."""
        assert self.process is not None, "not started"
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it runs (or is stopped by a signal), as opposed to having ended."""
        return self.process is not None and self.process.poll() is None

    def launch(self) -> None:
        """Start the process, appending to the log, and return at once."""
        assert not self.is_running, "already running"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if self.env is None else dict(self.env),
                cwd=self.cwd,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        assert self.process is not None, "not started"
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Send a signal to the process and all its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def pause(self) -> None:
        """SIGSTOP, and wait until it holds: connections are accepted by the kernel and never answered."""
        self.signal_group(signal.SIGSTOP)
        wait_until(lambda: os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT | os.WNOHANG), within=KILL_TIMEOUT)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal_group(signal.SIGCONT)

    def terminate(self) -> None:
        """Send SIGTERM and return at once; `wait` tells the rest."""
        self.signal(signal.SIGTERM)

    def wait(self, within: float = 30.0) -> int:
        """Wait for the end and return the exit code. Raises TimeoutError."""
        assert self.process is not None, "not started"
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{self.command[0]} still runs after {within} s\n{self.log_tail()}") from error

    def kill(self) -> None:
        """SIGKILL to the whole group, and reap."""
        if self.process is not None:
            self.signal_group(signal.SIGKILL)
            self.process.wait(KILL_TIMEOUT)

    def log_text(self) -> str:
        """Return all that it wrote so far, in all its lives."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, characters: int = 4000) -> str:
        """Return the end of what it wrote."""
        return self.log_text()[-characters:]

    def memory_bytes(self) -> int:
        """Return its resident memory (Linux)."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> int:
        """Return the number of its file descriptors (Linux)."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def open_sockets(self) -> int:
        """Return the number of its sockets (Linux)."""
        count = 0
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                count += str(link.readlink()).startswith("socket:")
        return count


class WebChild(Child):
    """A child that serves HTTP on 127.0.0.1 and says when it is ready."""

    ready_path = "/"

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        ready_within: float = 30.0,
    ) -> None:
        """Prepare."""
        super().__init__(command, log=log, env=env, cwd=cwd)
        self.port = port
        self.ready_within = ready_within
        self.started_in = 0.0
        """Seconds from the last start to being ready."""

    @property
    def url(self) -> str:
        """The root URL, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def verify(self) -> bool:
        """Whether certificates matter: without TLS they do not, and reading all there are takes 50 ms for each call."""
        return self.url.startswith("https:")

    def start(self) -> None:
        """Start and wait until it is ready. Raises NotStartedError."""
        begun = time.monotonic()
        self.launch()
        while not self.is_ready():
            if not self.is_running:
                raise NotStartedError(f"ended with code {self.wait(1)}: {' '.join(self.command)}\n{self.log_tail()}")
            if time.monotonic() - begun > self.ready_within:
                self.kill()
                raise NotStartedError(f"not ready within {self.ready_within} s: {' '.join(self.command)}\n{self.log_tail()}")
            time.sleep(0.02)
        self.started_in = time.monotonic() - begun

    def is_ready(self) -> bool:
        """Whether GET on the ready path answers 200 now."""
        try:
            return httpx2.get(self.url + self.ready_path, timeout=2.0, trust_env=False, verify=self.verify).status_code == 200
        except httpx2.HTTPError:
            return False

    def restart(self) -> None:
        """Kill it if it runs, and start it again on the same port."""
        self.kill()
        self.start()


@functools.cache
def tiny_model() -> Path:
    """Return the path of the tiny random model, written once per test process."""
    directory = Path(tempfile.mkdtemp(prefix="tiny-model-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return write_tiny_model(directory / "tiny.gguf")


class LlamaServer(WebChild):
    """A real llama.cpp server with a tiny random model. Needs the packages xllamacpp, gguf and numpy."""

    ready_path = "/v1/models"

    def __init__(self, alias: str = "tiny", port: int | None = None, *, model: Path | None = None, ready_within: float = 30.0) -> None:
        """Prepare; entering starts it. `alias` is the model name it reports."""
        self.alias = alias
        self._directory = Path(tempfile.mkdtemp(prefix="llama-"))
        chosen = free_port() if port is None else port
        command = [sys.executable, str(SUPPORT / "llama_server.py"), str(model or tiny_model()), str(chosen), alias]
        super().__init__(command, port=chosen, log=self._directory / "llama.log", ready_within=ready_within)

    def __enter__(self) -> Self:
        """Start it."""
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Kill it."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


Door = Literal["direct", "hypercorn"]
DOORS: tuple[Door, ...] = ("direct", "hypercorn")
"""What serves inference on HTTP/1.1: `pytest.mark.parametrize("door", DOORS)` where the door matters."""


def door_setting(door: Door) -> dict[str, str]:
    """Return the setting that chooses a door."""
    return {"MULTIVERSE_DIRECT_DOOR": "true" if door == "direct" else "false"}


class GatewayProcess(WebChild):
    """The gateway as a user runs it: `python -m multiverse_gateway run`, in an empty directory.

    Defaults that `env` may override (with or without the prefix `MULTIVERSE_`; None leaves a setting out): a known admin
    key, a database in the directory, private networks allowed, no rate limit. Nothing of the developer's own settings leaks in.
    """

    ready_path = "/readyz"

    def __init__(
        self,
        env: Mapping[str, str | None] | None = None,
        args: Sequence[str] = (),
        cwd: Path | None = None,
        *,
        port: int | None = None,
        command: Sequence[str] = ("-m", "multiverse_gateway", "run"),
        prefix: Sequence[str] = (),
        ready_within: float = 30.0,
    ) -> None:
        """Prepare; entering starts it.

        `args` are appended to the command line, `prefix` (such as `prlimit --nofile=128`) goes before it. A `cwd` that is
        given outlives the process, with database and log; the default one is removed.
        """
        self._own_directory = cwd is None
        directory = Path(tempfile.mkdtemp(prefix="gateway-")) if cwd is None else cwd
        chosen = free_port() if port is None else port
        settings = self.settings(env or {}, directory)
        self.admin_key = settings.get("ADMIN_API_KEY") or settings.get("MULTIVERSE_ADMIN_API_KEY") or ""
        line = [*prefix, sys.executable, *command, "--host", "127.0.0.1", "--port", str(chosen), *args]
        super().__init__(
            line, port=chosen, log=directory / "gateway-output.log", env=environment(settings), cwd=directory, ready_within=ready_within
        )

    @staticmethod
    def settings(overrides: Mapping[str, str | None], directory: Path) -> dict[str, str]:
        """Return our default settings under those of the test."""
        defaults = {
            "ADMIN_API_KEY": ADMIN_KEY,
            "DATABASE_URL": f"sqlite:///{(directory / 'multiverse.db').as_posix()}",
            "ALLOW_PRIVATE_NETWORKS": "true",
            "RATE_LIMIT_PER_MINUTE": "0",
        }
        named = {name.removeprefix("MULTIVERSE_") for name in overrides}
        kept = {name: value for name, value in defaults.items() if name not in named}
        return kept | {name: value for name, value in overrides.items() if value is not None}

    @property
    def directory(self) -> Path:
        """Where it runs: database and logs are here."""
        assert self.cwd is not None
        return self.cwd

    @property
    def database(self) -> Path:
        """The default database file."""
        return self.directory / "multiverse.db"

    @property
    def base_url(self) -> str:
        """What an `openai` client takes as base_url."""
        return f"{self.url}/v1"

    def admin(
        self, method: str, path: str, json: Any = None, *, key: str | None = None, timeout: float = 30.0, **more: Any
    ) -> httpx2.Response:
        """Call the admin API; `path` begins with `/admin` or after it (`/servers`). An empty `key` sends none."""
        full = path if path.startswith("/admin") else f"/admin{path}"
        sent = self.admin_key if key is None else key
        headers = {"X-API-Key": sent} if sent else {}
        return self.call(method, full, json, headers=headers, timeout=timeout, **more)

    def call(
        self, method: str, path: str, json: Any = None, *, headers: Mapping[str, str] | None = None, timeout: float = 30.0, **more: Any
    ) -> httpx2.Response:
        """Call any path, on a connection of its own, not following redirects."""
        if json is not None:
            more["content"] = json_module.dumps(json).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        return httpx2.request(method, self.url + path, headers=headers, timeout=timeout, trust_env=False, verify=self.verify, **more)

    def register(self, model: str, url: str, **fields: Any) -> str:
        """Register a server and return its registration id.

        Raises:
            AssertionError: it was refused; the message has the answer.
        """
        answer = self.admin("POST", "/admin/register", {"model_name": model, "endpoint_url": url, **fields})
        assert answer.status_code in (200, 201), f"{answer.status_code}: {answer.text}"
        return str(answer.json()["registration_id"])

    def server(self, registration_id: str) -> dict[str, Any]:
        """Return the record of one server."""
        answer = self.admin("GET", f"/admin/servers/{registration_id}")
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        record: dict[str, Any] = answer.json()
        return record

    def chat(self, model: str, *, text: str = "Hello", stream: bool = False, timeout: float = 30.0, **fields: Any) -> httpx2.Response:
        """Ask for one chat completion and return the whole answer (the raw events when streamed)."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream, **fields}
        return self.call("POST", "/v1/chat/completions", body, timeout=timeout)

    def stop(self, within: float = 40.0) -> int:
        """SIGTERM, wait, return the exit code. Raises TimeoutError."""
        self.terminate()
        return self.wait(within)

    def __enter__(self) -> Self:
        """Start it."""
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Kill it; when the test failed, show the end of its log (pytest prints it with the failure)."""
        self.kill()
        if error is not None:
            print(f"--- the gateway's last words ---\n{self.log_tail()}")
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return our environment without any setting of the gateway, plus `settings`, plus the source tree to import from.

    What a start compiles is kept for the next one, as anywhere else: some images forbid that, and each start takes a second more.
    """
    dropped = {*PLAIN_NAMES, "PYTHONDONTWRITEBYTECODE"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("MULTIVERSE_")}
    paths = [str(SOURCES), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **settings}
