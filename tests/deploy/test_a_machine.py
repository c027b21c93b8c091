"""What `deploy/` does, done below a directory: install, serve through a real nginx, back up, break, restore, update, roll back."""

from __future__ import annotations

import signal
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest

from support import behaviours
from support.backends import Backend
from support.certificates import write_certificate
from support.processes import environment
from support.require import require_program
from support.sockets import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="deploy/ is for Linux")]

ROOT = Path(__file__).parents[2]
MODEL = "tiny"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
MIGRATES = Path("/proc/sys/net/ipv4/tcp_migrate_req").exists() and Path("/proc/sys/net/ipv4/tcp_migrate_req").read_text().strip() == "1"
"""Whether the kernel does what `deploy/sysctl.conf` asks for; else a connection may arrive at a process just as it stops listening."""
SERVICE = """#!/bin/bash
# what systemd does with the unit file
cd "{state}" || exit 1
case $1 in
  start) setsid "{current}/bin/python" -m multiverse_gateway run --replaceable >>"{log}" 2>&1 & echo $! >pid ;;
  reload) kill -USR2 "$(cat pid)" ;;
  stop) kill "$(cat pid)"; while kill -0 "$(cat pid)" 2>/dev/null; do sleep 0.05; done ;;
esac
"""


@attrs.frozen
class Machine:
    """A directory that stands for a machine, and nginx before it."""

    root: Path
    wheels: dict[str, Path]
    env: dict[str, str]
    client: httpx2.Client

    def run(self, script: str, *arguments: str, succeeds: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a script of `deploy/`."""
        command = [str(ROOT / "deploy" / script), *arguments]
        done = subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=600, check=False)
        assert (done.returncode == 0) is succeeds, (
            f"{script} ended with {done.returncode}\n{self.log()[-2000:]}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def log(self) -> str:
        """Return what the gateway said."""
        path = self.root / "gateway.log"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> Path:
        """Where database and settings are."""
        return self.root / "var/lib/multiverse-gateway"

    @property
    def backups(self) -> list[Path]:
        """The copies, oldest first."""
        return sorted((self.root / "var/backups/multiverse-gateway").glob("multiverse-*.db"))

    @property
    def admin_key(self) -> str:
        """The key that install.sh made."""
        return (self.root / "etc/multiverse-gateway/settings.env").read_text().partition("ADMIN_API_KEY=")[2].split()[0]

    def version(self) -> str:
        """Return the version that serves."""
        return str(self.client.get("/health").json()["version"])

    def servers(self) -> list[str]:
        """Return the URLs that are registered."""
        answer = self.client.get("/admin/servers", headers={"x-api-key": self.admin_key}).json()
        return [record["endpoint_url"] for record in answer]


def wheel(directory: Path, source: Path, version: str, broken: bool = False) -> Path:
    """Make the wheel that differs from another one in its version, and that may not start."""
    target = directory / source.name.replace(version_of(source), version)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith(("_version.py", "METADATA", "WHEEL", "RECORD")):
                data = data.replace(version_of(source).encode(), version.encode())
            if name.endswith("RECORD"):  # without the hashes, which are not of these files
                data = b"".join(line.split(b",")[0] + b",,\n" for line in data.splitlines())
            if broken and name.endswith("multiverse_gateway/app.py"):
                data = b"raise RuntimeError('a release that does not start')\n"
            new.writestr(name.replace(version_of(source), version), data)
    return target


def version_of(path: Path) -> str:
    """Return the version in a wheel's name."""
    return path.name.split("-")[1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build this version, and make a next one and a broken one of it."""
    directory = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (first,) = directory.glob("*.whl")
    return {"first": first, "next": wheel(directory, first, "9.0.0"), "broken": wheel(directory, first, "9.1.0", broken=True)}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Iterator[Machine]:
    """Return a machine with nginx and without a gateway."""
    require_program("nginx", "the gateway behind a real proxy")
    root = tmp_path_factory.mktemp("machine")
    port, tls_port = free_port(), free_port()
    service = root / "service"
    current = root / "opt/multiverse-gateway/current"
    service.write_text(SERVICE.format(state=root / "var/lib/multiverse-gateway", current=current, log=root / "gateway.log"))
    service.chmod(0o755)
    env = environment({"MULTIVERSE_PORT": str(port), "MULTIVERSE_ALLOW_PRIVATE_NETWORKS": "true", "MULTIVERSE_RATE_LIMIT_PER_MINUTE": "0"})
    env |= {"GATEWAY_ROOT": str(root), "GATEWAY_SERVICE": str(service), "PYTHON": sys.executable, "PYTHONPATH": str(root / "shared")}
    certificate, key = write_certificate(root)
    trust = ssl.create_default_context(cafile=str(certificate))
    with nginx(root, port, tls_port, certificate, key):
        options: dict[str, Any] = {"http2": True, "verify": trust, "trust_env": False, "timeout": 30.0}
        with httpx2.Client(base_url=f"https://127.0.0.1:{tls_port}", **options) as client:
            yield Machine(root, wheels, env, client)
    if (root / "var/lib/multiverse-gateway/pid").exists():
        subprocess.run([service, "stop"], env=env, check=False, timeout=60)


NGINX = """
daemon off;
pid {root}/nginx.pid;
error_log {root}/nginx.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {root}/nginx-body;
    proxy_temp_path {root}/nginx-proxy;
    fastcgi_temp_path {root}/nginx-fastcgi;
    uwsgi_temp_path {root}/nginx-uwsgi;
    scgi_temp_path {root}/nginx-scgi;
    {site}
}}
"""


@contextmanager
def nginx(root: Path, port: int, tls_port: int, certificate: Path, key: Path) -> Iterator[None]:
    """Run nginx with our configuration; only ports and paths are others."""
    site = (ROOT / "deploy/nginx.conf").read_text()
    for old, new in {
        "listen [::]": "# listen [::]",
        "listen 443 ": f"listen 127.0.0.1:{tls_port} ",
        "listen 80;": f"listen 127.0.0.1:{free_port()};",
        "proxy_pass http://127.0.0.1:8000;": f"proxy_pass http://127.0.0.1:{port};",
        "/etc/letsencrypt/live/gateway.example/fullchain.pem": str(certificate),
        "/etc/letsencrypt/live/gateway.example/privkey.pem": str(key),
    }.items():
        assert old in site
        site = site.replace(old, new)
    (root / "nginx.conf").write_text(NGINX.format(root=root, site=site))
    process = subprocess.Popen(["nginx", "-c", root / "nginx.conf", "-e", root / "nginx.log"])
    try:
        yield
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(30)


def test_the_life_of_a_machine(machine: Machine) -> None:
    """Each step with a model server behind the gateway, and the client outside of nginx."""
    goes_on = threading.Event()
    with Backend("one", [behaviours.held_stream(goes_on), behaviours.good()], models=[MODEL]) as backend:
        install(machine, backend)
        stream_passes_nginx_unbuffered(machine, goes_on)
        backups_are_made_and_rotated(machine)
        broken_database_is_brought_back(machine, backend)
        next_release_takes_over_under_a_stream(machine, backend)
        broken_release_changes_nothing(machine)
        machine.run("update.sh", "--rollback")
        assert machine.version() == version_of(machine.wheels["first"])
        assert machine.servers() == [backend.url]
        assert machine.client.post("/v1/chat/completions", json=BODY).status_code == 200


def install(machine: Machine, backend: Backend) -> None:
    """From a wheel with all it depends on, by pip."""
    machine.run("install.sh", "--from", str(machine.wheels["first"]), "--domain", "gateway.school.example")
    assert "gateway.school.example {" in (machine.root / "etc/caddy/Caddyfile").read_text()
    assert machine.state.stat().st_mode & 0o077 == 0
    assert len(machine.admin_key) >= 40
    record = {"model_name": MODEL, "endpoint_url": backend.url, "api_key": "the-server-s-own-key"}
    answer = machine.client.post("/admin/register", json=record, headers={"x-api-key": machine.admin_key})
    assert answer.status_code == 201, answer.text
    assert answer.http_version == "HTTP/2"
    assert machine.client.get("/metrics").status_code == 404
    share_dependencies(machine.root)


def share_dependencies(root: Path) -> None:
    """Let the releases to come find what the first one installed: they differ in our own package alone."""
    (installed,) = (root / "opt/multiverse-gateway/current/lib").glob("python*/site-packages")
    (root / "shared").mkdir()
    for path in installed.resolve().iterdir():
        if not path.name.startswith(("multiverse_gateway", "pip")):
            (root / "shared" / path.name).symlink_to(path)


def stream_passes_nginx_unbuffered(machine: Machine, goes_on: threading.Event) -> None:
    """The first event is here while the server has not sent the second."""
    with machine.client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        goes_on.set()
        assert list(lines)[-2] == "data: [DONE]"


def backups_are_made_and_rotated(machine: Machine) -> None:
    """Two are made, the newer one is kept, each went elsewhere as well; the secret of the keys did not."""
    elsewhere = machine.root / "bucket"
    elsewhere.mkdir()
    for _ in range(2):
        machine.run("backup.sh", BACKUP_KEEP="1", BACKUP_UPLOAD=f'cp "$FILE" {elsewhere}/')
    assert len(machine.backups) == 1
    assert len(list(elsewhere.iterdir())) == 2
    assert (machine.backups[0].parent / "multiverse.db.key").stat().st_mode & 0o777 == 0o600
    failed = machine.run("backup.sh", BACKUP_UPLOAD="exit 3", succeeds=False)
    assert "was not uploaded" in failed.stderr


def broken_database_is_brought_back(machine: Machine, backend: Backend) -> None:
    """A disk that lost database and secret is no loss."""
    (machine.state / "multiverse.db").write_bytes(b"this was a database" * 1000)
    (machine.state / "multiverse.db.key").unlink()
    machine.run("restore.sh")
    assert machine.servers() == [backend.url]
    assert machine.client.post("/v1/chat/completions", json=BODY).status_code == 200
    assert backend.last.header("authorization") == "Bearer the-server-s-own-key"


def next_release_takes_over_under_a_stream(machine: Machine, backend: Backend) -> None:
    """The stream that the old one has begun comes to its end, and no request in the meantime is refused."""
    goes_on, updated = threading.Event(), threading.Event()
    backend.behave = [behaviours.held_stream(goes_on), behaviours.good()]
    statuses: list[int] = []

    def ask() -> None:
        while not updated.wait(0.05):
            statuses.append(machine.client.post("/v1/chat/completions", json=BODY).status_code)

    with machine.client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            machine.run("update.sh", "--from", str(machine.wheels["next"]), PIP_NO_DEPS="1")
        finally:
            updated.set()
            asking.join()
        assert machine.version() == "9.0.0"
        goes_on.set()
        assert list(lines)[-2] == "data: [DONE]"
    assert len(statuses) > 20
    refused = [status for status in statuses if status != 200]
    assert refused in ([], [] if MIGRATES else [502])
    assert machine.servers() == [backend.url]


def broken_release_changes_nothing(machine: Machine) -> None:
    """It is found out in the rehearsal."""
    failed = machine.run("update.sh", "--from", str(machine.wheels["broken"]), PIP_NO_DEPS="1", succeeds=False)
    assert "a release that does not start" in failed.stderr
    assert machine.version() == "9.0.0"
    assert len(list((machine.root / "opt/multiverse-gateway/releases").iterdir())) == 2
