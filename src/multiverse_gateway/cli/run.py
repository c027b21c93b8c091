"""The command `run`: one process that serves, or a parent that keeps several of them alive."""

import asyncio
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import click

from multiverse_gateway.cli.common import config_option, names_here, refuse, settings_here
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.checks import UnusableSetting
from multiverse_gateway.settings.declaration import unusable_value
from multiverse_gateway.settings.sources import as_written

_METAVARS: dict[Any, str] = {bool: "true|false", int: "NUMBER", float: "NUMBER"}


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each setting that is not a secret, because every user of the machine can read a command line."""
    for field in reversed(attrs.fields(Settings)):
        if not field.metadata["secret"]:
            flag = f"--{field.name.replace('_', '-')}"
            metavar = _METAVARS.get(field.type, "TEXT")
            command = click.option(flag, field.name, metavar=metavar, help=field.metadata["description"])(command)
    return command


@click.command("run")
@config_option
@click.option("--certfile", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TLS certificate chain (PEM).")
@click.option("--keyfile", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Private key of the certificate (PEM).")
@click.option("--replaceable", is_flag=True, help="Serve in a child process that SIGUSR2 replaces with a new one (Linux).")
@click.option("--stop-at-eof", is_flag=True, hidden=True, help="Stop when standard input ends, because the parent process is gone.")
@click.option("--worker", is_flag=True, hidden=True, help="Share the port with other workers, and leave Ctrl-C to the parent process.")
@click.option("--join", is_flag=True, hidden=True, help="Share the database with other workers, and never create it.")
@click.option("--ready-fd", type=int, hidden=True, help="File descriptor to which a byte is written when the worker is ready.")
@setting_options
def run_command(
    config: Path | None,
    certfile: Path | None,
    keyfile: Path | None,
    replaceable: bool,
    stop_at_eof: bool,
    worker: bool,
    join: bool,
    ready_fd: int | None,
    **overrides: object,
) -> None:
    """Serve the gateway until it is stopped.

    Settings come from multiverse.toml, .env, the environment and these options; the last win. SIGTERM or Ctrl-C lets running
    requests finish, a second one does not. SIGUSR2, with several workers or --replaceable, replaces the workers while all requests run on.
    """
    settings = settings_here(config, overrides)
    if (certfile is None) != (keyfile is None):
        refuse("--certfile and --keyfile belong together: give both, or neither for plain HTTP")
    try:
        if (settings.workers > 1 or replaceable) and not worker:
            sys.exit(_supervise(settings, sys.argv[1:]))
        if join:
            _require_database(settings)
        from multiverse_gateway.cli.serving import Serving, serve

        tls = (certfile, keyfile) if certfile is not None and keyfile is not None else None
        with bind(settings.host, settings.port, shared=worker) as sock:
            settings = attrs.evolve(settings, port=sock.getsockname()[1])
            serving = Serving(
                settings, sock, tls=tls, stop_at_eof=stop_at_eof, worker=worker, ready_fd=ready_fd, written=names_here(config, overrides)
            )
            sys.exit(serve(serving))
    except (OSError, UnusableSetting) as error:
        raise click.ClickException(as_written(error, names_here(config, overrides))) from None


def _require_database(settings: Settings) -> None:
    """Refuse to start without the file that the other workers use: it was moved or removed, and a new, empty one would lose what they know.

    Raises:
        OSError: It is gone.
    """
    from multiverse_gateway.stores.sqlite import database_path

    if settings.database_url.startswith("sqlite:") and not database_path(settings.database_url).exists():
        raise OSError(f"the database file {database_path(settings.database_url)} was moved or removed; put it back, or stop the gateway")


def _supervise(settings: Settings, arguments: list[str]) -> int:
    if sys.platform != "linux":
        refuse("MULTIVERSE_WORKERS above 1, and --replaceable, need Linux, which shares a port among processes")
    from multiverse_gateway.cli.supervisor import supervise

    bind(settings.host, settings.port).close()  # is the port free? What is shared could be shared with a stranger
    with bind(settings.host, settings.port, shared=True) as held:
        port = held.getsockname()[1]
        command = [sys.executable, "-m", "multiverse_gateway", *arguments, "--port", str(port), "--worker", "--stop-at-eof"]
        return asyncio.run(supervise(command, settings.workers))


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a bound socket that does not listen yet; `shared` ones of several processes may have the same port (Linux).

    Raises:
        UnusableSetting: The host is not an address of this machine.
        OSError: The address is not ours, or the port is taken; the message says what to do.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror:
        raise unusable_value("host", host, "it is not an address of this machine; use 127.0.0.1, or 0.0.0.0 for all addresses") from None
    sock = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(
            f"cannot listen on {host} port {port} ({error.strerror}); stop the program that uses it, or choose another port with --port"
        ) from None
    sock.setblocking(False)
    return sock
