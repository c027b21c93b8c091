"""The engines that several gateways share, as Debian packages them: PostgreSQL, Redis and nginx, each in a directory of its own.

    with PostgresServer() as postgres, RedisServer() as redis:
        gateway = GatewayProcess({"DATABASE_URL": postgres.database(), "RATE_LIMIT_STORAGE": redis.url, "BACKEND_KEY_SECRET": SECRET})

PostgreSQL refuses to run as root, so there it runs as the user `postgres` that its package made. Nothing is written durably.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.processes import Child, NotStartedError
from support.require import require, require_program
from support.sockets import free_port
from support.workers import children

SECRET = "a secret of all gateways and for tests only"
"""What seals the servers' keys in tests."""
READY_SECONDS = 60.0


class Service(Child):
    """A child that listens on a port of 127.0.0.1 and keeps its files in a directory that goes with it."""

    def __init__(self, name: str) -> None:
        """Make the directory and choose the port."""
        self.directory = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.port = free_port()
        super().__init__([], log=self.directory / f"{name}.log", cwd=self.directory)

    def is_ready(self) -> bool:
        """Whether it takes connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
        except OSError:
            return False
        return True

    def start(self) -> None:
        """Start and wait until it is ready. Raises NotStartedError."""
        self.launch()
        deadline = time.monotonic() + READY_SECONDS
        while not self.is_ready():
            if not self.is_running or time.monotonic() > deadline:
                raise NotStartedError(f"{self.command[0]} did not start\n{self.log_tail()}")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        """Start it."""
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Kill it and remove its files."""
        self.resume_if_paused()
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def resume_if_paused(self) -> None:
        """SIGCONT, whatever a test left."""
        if self.process is not None and self.process.poll() is None:
            self.signal_group(signal.SIGCONT)


def postgres_program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs, which Debian keeps in a directory of each version."""
    found = [path for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True) if os.access(path, os.X_OK)]
    return str(found[0]) if found else require_program(name, "a real PostgreSQL server")


class PostgresServer(Service):
    """PostgreSQL with trust for everybody on this machine."""

    def __init__(self, *, durable: bool = False) -> None:
        """Prepare; a durable one waits for the disk at each commit."""
        require("psycopg", "talks to PostgreSQL")
        super().__init__("postgres")
        self.user: dict[str, Any] = {}
        if os.getuid() == 0:
            shutil.chown(self.directory, "postgres", "postgres")
            self.user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        self.data = self.directory / "data"
        self.command = [
            postgres_program("postgres"),
            *("-D", str(self.data), "-p", str(self.port), "-k", str(self.directory)),
            *(
                "-c",
                "listen_addresses=127.0.0.1",
                "-c",
                f"fsync={'on' if durable else 'off'}",
                "-c",
                "max_connections=60",
                "-c",
                "shared_buffers=16MB",
            ),
        ]
        self._made = 0

    def launch(self) -> None:
        """Start it, making its files first if there are none."""
        if not self.data.exists():
            make = [postgres_program("initdb"), "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
            subprocess.run([*make, "--no-locale", "--no-sync"], cwd=self.directory, check=True, stdout=subprocess.DEVNULL, **self.user)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                start_new_session=True,
                **self.user,
            )

    def is_ready(self) -> bool:
        """Whether it answers queries."""
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str = "postgres", *, schema: str | None = None, port: int | None = None) -> str:
        """Return the URL of a database, or of a schema in it; `port` is that of a proxy before the server."""
        options = "" if schema is None else f"?options=-csearch_path%3D{schema}"
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{database}{options}"

    def execute(self, *statements: str) -> list[Any]:
        """Run statements, each by itself, and return the rows of the last one."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            for statement in statements[:-1]:
                connection.execute(statement.encode())
            cursor = connection.execute(statements[-1].encode())
            return cursor.fetchall() if cursor.description else []

    def schema(self) -> str:
        """Make a new, empty schema and return its name: as good as a database of its own, and made at once."""
        self._made += 1
        name = f"test_{self._made}"
        self.execute(f"create schema {name}")
        return name

    def database(self, *, port: int | None = None) -> str:
        """Return the URL of a new, empty schema."""
        return self.url(schema=self.schema(), port=port)

    def signal_group(self, number: int) -> None:
        """Send a signal to the server and its processes, each of which leads a group of its own."""
        if self.process is None:
            return
        for pid in [self.pid, *children(self.pid)]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


class RedisServer(Service):
    """Redis (or Valkey) that keeps everything in memory."""

    def __init__(self) -> None:
        """Prepare."""
        require("redis", "talks to Redis")
        super().__init__("redis")
        program = shutil.which("valkey-server") or require_program("redis-server", "a real Redis server")
        self.command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.directory)]

    @property
    def url(self) -> str:
        """What RATE_LIMIT_STORAGE takes."""
        return f"redis://127.0.0.1:{self.port}/0"

    def ask(self, *words: str) -> Any:
        """Send one command and return its answer."""
        import redis

        with redis.Redis(port=self.port, decode_responses=True) as client:
            return client.execute_command(*words)


class Nginx(Service):
    """nginx before several gateways, in turn, passing on what streams at once."""

    def __init__(self, ports: Sequence[int]) -> None:
        """Prepare."""
        super().__init__("nginx")
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or require_program("nginx", "a real nginx")
        upstream = "".join(f"    server 127.0.0.1:{port} max_fails=1 fail_timeout=1s;\n" for port in ports)
        config = self.directory / "nginx.conf"
        config.write_text(_NGINX.format(directory=self.directory, port=self.port, upstream=upstream))
        self.directory.chmod(0o755)
        self.command = [program, "-p", str(self.directory), "-c", str(config), "-e", str(self.log), "-g", "daemon off;"]

    @property
    def url(self) -> str:
        """The root URL."""
        return f"http://127.0.0.1:{self.port}"


_NGINX = """
worker_processes 1;
pid {directory}/nginx.pid;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  upstream gateways {{
{upstream}    keepalive 16;
  }}
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 20m;
    location / {{
      proxy_pass http://gateways;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $http_x_forwarded_for;
      proxy_buffering off;
      proxy_read_timeout 3600s;
      proxy_next_upstream error timeout non_idempotent;
      proxy_connect_timeout 2s;
    }}
  }}
}}
"""
