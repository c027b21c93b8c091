"""What is measured: how each gateway is started in front of the mock backend. Ours runs as anybody would run it, with everything on."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import httpx2

from support.processes import Child, GatewayProcess
from support.sockets import free_port

MODELS = ("model", "model-20ms", "model-idle", "model-flood")
PEERS = Path(os.environ.get("BENCH_PEERS", Path.home() / ".cache" / "multiverse-bench"))
"""Where optional peers are: a virtual environment each, named as the peer."""
SERVERS, FLEET_MODELS = 1000, 200
READY_SECONDS = 60.0


@attrs.frozen(kw_only=True)
class Candidate:
    """A gateway that runs: its port, the process whose tree is measured (none: the backend itself), and the headers it needs."""

    name: str
    port: int
    pid: int | None = None
    headers: tuple[str, ...] = ()
    http2: bool = False
    slow: bool = False
    """Whether it gets fewer requests, so that a round does not take minutes."""


Start = Callable[[int], contextlib.AbstractContextManager[Candidate]]
"""Start a candidate before the backend on this port."""


def pinned(core: int | None) -> tuple[str, ...]:
    return () if core is None else ("taskset", "-c", str(core))


@attrs.frozen
class Starter:
    """Start candidates on one core."""

    core: int | None

    @contextlib.contextmanager
    def direct(self, backend: int) -> Iterator[Candidate]:
        yield Candidate(name="direct", port=backend)

    @contextlib.contextmanager
    def nginx(self, backend: int, *, http2: bool = False) -> Iterator[Candidate]:
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="bench-nginx-") as directory:
            Path(directory).chmod(0o755)  # its worker may be another user, who keeps large bodies there
            Path(directory, "nginx.conf").write_text(_nginx_conf(directory, port, backend, "http2" if http2 else ""))
            command = ["nginx", "-p", directory, "-c", f"{directory}/nginx.conf", "-g", "daemon off;"]
            with self._child("nginx", command, directory) as pid:
                yield _ready(Candidate(name="nginx h2" if http2 else "nginx", port=port, pid=pid, http2=http2))

    def nginx_http2(self, backend: int) -> contextlib.AbstractContextManager[Candidate]:
        return self.nginx(backend, http2=True)

    @contextlib.contextmanager
    def haproxy(self, backend: int) -> Iterator[Candidate]:
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="bench-haproxy-") as directory:
            config = Path(directory, "haproxy.cfg")
            config.write_text(_HAPROXY_CONF.format(port=port, backend=backend))
            with self._child("haproxy", ["haproxy", "-db", "-f", str(config)], directory) as pid:
                yield _ready(Candidate(name="haproxy", port=port, pid=pid))

    @contextlib.contextmanager
    def rust_router(self, name: str, module: str, backend: int) -> Iterator[Candidate]:
        port, metrics = free_port(), free_port()
        command = [
            *(str(PEERS / name / "bin" / "python"), "-m", module, "--worker-urls", f"http://127.0.0.1:{backend}"),
            *("--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--log-level", "error"),
        ]
        with tempfile.TemporaryDirectory(prefix="bench-peer-") as directory, self._child(name, command, directory) as pid:
            yield _ready(Candidate(name=name, port=port, pid=pid))

    @contextlib.contextmanager
    def litellm(self, backend: int) -> Iterator[Candidate]:
        port, key = free_port(), "sk-bench-0123456789abcdef0123456789abcdef"
        with tempfile.TemporaryDirectory(prefix="bench-litellm-") as directory:
            config = Path(directory, "litellm.yaml")
            config.write_text(json.dumps(_litellm_config(backend, key)))
            command = [str(PEERS / "litellm" / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
            env = {**os.environ, "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
            with self._child("litellm", command, directory, env) as pid:
                yield _ready(Candidate(name="litellm", port=port, pid=pid, headers=(f"Authorization: Bearer {key}",), slow=True))

    @contextlib.contextmanager
    def _child(self, name: str, command: Sequence[str], directory: str, env: Mapping[str, str] | None = None) -> Iterator[int]:
        child = Child([*pinned(self.core), *command], log=Path(directory, f"{name}.log"), env=env, cwd=Path(directory))
        child.launch()
        try:
            yield child.pid
        except BaseException:
            print(f"--- the last words of {name} ---\n{child.log_tail(2000)}")
            raise
        finally:
            child.terminate()
            with contextlib.suppress(TimeoutError):
                child.wait(5)
            child.kill()

    @contextlib.contextmanager
    def gateway(
        self, backend: int, *, name: str = "gateway", env: Mapping[str, str] | None = None, http2: bool = False
    ) -> Iterator[Candidate]:
        with GatewayProcess({**EVERYTHING_ON, **(env or {})}, prefix=pinned(self.core)) as process:
            for model in MODELS:
                process.register(model, f"http://127.0.0.1:{backend}")
            yield _ready(Candidate(name=name, port=process.port, pid=process.pid, http2=http2))

    def asgi(self, backend: int) -> contextlib.AbstractContextManager[Candidate]:
        return self.gateway(backend, name="gateway asgi", env=ASGI_ONLY)

    def asgi_http2(self, backend: int) -> contextlib.AbstractContextManager[Candidate]:
        return self.gateway(backend, name="gateway h2", http2=True)

    @contextlib.contextmanager
    def fleet(self, backend: int) -> Iterator[Candidate]:
        """Our gateway with a thousand registered servers of two hundred models; the requests are for one of them."""
        settings = {**EVERYTHING_ON, "HEALTH_CHECK_INTERVAL_SECONDS": "300"}
        with (
            GatewayProcess(settings, prefix=pinned(self.core)) as process,
            httpx2.Client(base_url=process.url, timeout=30, trust_env=False) as client,
        ):
            for number in range(SERVERS):
                model = MODELS[number] if number < len(MODELS) else f"model-{number % FLEET_MODELS}"
                body = {"model_name": model, "endpoint_url": f"http://127.0.0.1:{backend}/s/{number}"}
                client.post("/admin/register", json=body, headers={"X-API-Key": process.admin_key}).raise_for_status()
            yield _ready(Candidate(name="gateway 1000", port=process.port, pid=process.pid))


EVERYTHING_ON = {"RATE_LIMIT_PER_MINUTE": "1000000", "LOG_FORMAT": "json", "HEALTH_CHECK_INTERVAL_SECONDS": "60"}
ASGI_ONLY = {"MULTIVERSE_DIRECT_DOOR": "false"}


def _ready(candidate: Candidate) -> Candidate:
    """Wait until a candidate answers."""
    if candidate.http2:
        return candidate
    headers = dict(line.split(": ", 1) for line in candidate.headers) | {"Content-Type": "application/json"}
    body = b'{"model": "model", "messages": [{"role": "user", "content": "hi"}]}'
    end = time.monotonic() + READY_SECONDS
    while True:
        try:
            asked = urllib.request.Request(f"http://127.0.0.1:{candidate.port}/v1/chat/completions", data=body, headers=headers)
            with urllib.request.urlopen(asked, timeout=10) as answered:
                answered.read()
            return candidate
        except (OSError, urllib.error.HTTPError) as error:
            if time.monotonic() > end:
                raise SystemExit(f"{candidate.name} does not answer: {error}") from error
        time.sleep(0.1)


def available(core: int | None) -> dict[str, Start]:
    """Return the starts of all candidates that are installed here, in the order of measuring."""
    starter = Starter(core)
    found: dict[str, Start] = {"direct": starter.direct}
    if shutil.which("nginx"):
        found |= {"nginx": starter.nginx, "nginx-h2": starter.nginx_http2}
    found |= {"gateway": starter.gateway, "gateway-asgi": starter.asgi, "gateway-h2": starter.asgi_http2, "gateway-1000": starter.fleet}
    if shutil.which("haproxy"):
        found["haproxy"] = starter.haproxy
    for name, module in (("vllm-router", "vllm_router.launch_router"), ("sglang-router", "sglang_router.launch_router")):
        if (PEERS / name / "bin" / "python").exists():
            found[name] = lambda backend, name=name, module=module: starter.rust_router(name, module, backend)  # type: ignore[misc]
    if (PEERS / "litellm" / "bin" / "litellm").exists():
        found["litellm"] = starter.litellm
    return found


def start_backend(port: int, core: int | None) -> "subprocess.Popen[bytes]":
    command = [*pinned(core), sys.executable, "-m", "benchmarks.speed.backend", "--port", str(port), "--models", ",".join(MODELS)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


def _litellm_config(backend: int, key: str) -> object:
    root = f"http://127.0.0.1:{backend}/v1"
    models = [{"model_name": name, "litellm_params": {"model": f"openai/{name}", "api_base": root, "api_key": "x"}} for name in MODELS]
    return {
        "model_list": models,
        "litellm_settings": {"num_retries": 0, "telemetry": False},
        "general_settings": {"master_key": key},
    }


def _nginx_conf(directory: str, port: int, backend: int, protocol: str) -> str:
    return _NGINX_CONF.format(directory=directory, port=port, backend=backend, protocol=protocol)


_NGINX_CONF = """\
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
worker_rlimit_nofile 20000;
events {{ worker_connections 8000; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  client_body_buffer_size 1m;
  client_max_body_size 32m;
  keepalive_requests 100000000;
  tcp_nodelay on;
  upstream backend {{ server 127.0.0.1:{backend}; keepalive 1024; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} {protocol} backlog=4096;
    location / {{
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 300;
    }}
  }}
}}
"""

_HAPROXY_CONF = """\
global
  maxconn 8000
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  option http-no-delay
frontend clients
  bind 127.0.0.1:{port} backlog 4096
  default_backend servers
backend servers
  http-reuse always
  server one 127.0.0.1:{backend} pool-max-conn 2000
"""
