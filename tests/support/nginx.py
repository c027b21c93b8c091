"""A real nginx in front of a gateway, with a directory of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.require import require_program
from support.sockets import free_port, wait_until

CONFIGURATION = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {directory}/nginx-body;
    proxy_temp_path {directory}/nginx-proxy;
    fastcgi_temp_path {directory}/nginx-fastcgi;
    uwsgi_temp_path {directory}/nginx-uwsgi;
    scgi_temp_path {directory}/nginx-scgi;
    server {{
        listen 127.0.0.1:{port};
        absolute_redirect off;
        {locations}
    }}
}}
"""


@contextmanager
def nginx(directory: Path, locations: str, *, port: int | None = None) -> Iterator[str]:
    """Run nginx with these locations, and return its root URL once it listens."""
    program = require_program("nginx", "the gateway behind a real proxy")
    port = port or free_port()
    configuration = directory / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(directory=directory, port=port, locations=locations))
    process = subprocess.Popen([program, "-c", configuration, "-e", directory / "nginx.log"])
    try:
        wait_until((directory / "nginx.pid").exists, within=10, what=f"nginx does not start: {directory / 'nginx.log'}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def location(root: str, gateway: str, *, strips: bool, host: str = "$http_host") -> str:
    """Return the location that serves a gateway below a path, taking the path off or not."""
    return f"""
        location {root}/ {{
            proxy_pass {gateway}{"/" if strips else ""};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host {host};
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_buffering off;
        }}
    """
