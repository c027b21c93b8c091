"""One serving process: hypercorn around the application, and an orderly end.

1. The first signal closes the listener and lets running requests finish, for the grace; then they are told and ended.
2. The second signal ends them now. Whatever hangs, the process is gone seconds later.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import click
import hypercorn.asyncio
from hypercorn.utils import LifespanFailureError, LifespanTimeoutError

from multiverse_gateway._version import __version__
from multiverse_gateway.app import Assembly, assemble
from multiverse_gateway.cli.common import host_for_url
from multiverse_gateway.cli.hypercorn_adapter import Hypercorn, incompatibility
from multiverse_gateway.cli.hypercorn_hardening import HardenedConfig, harden_hypercorn
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.reach import Reach, network_url
from multiverse_gateway.dialing import Network
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.observability.logging import configure
from multiverse_gateway.relay.client_connection import Patience
from multiverse_gateway.relay.listener import Listener
from multiverse_gateway.settings import Settings, SettingsError
from multiverse_gateway.settings.declaration import unusable
from multiverse_gateway.settings.sources import Written, as_written

LAST_SECONDS = 5.0
HURRIED_SECONDS = 2.0
HANDOVER_SECONDS = 2.0
"""How long a process that was relieved still takes requests: those that are on their way on connections it has accepted."""
GARBAGE = 50_000
"""New objects after which the collector looks for cycles."""
HEAD_BYTES = 17 * 1024

_log = logging.getLogger("multiverse_gateway.api")


@attrs.frozen
class Serving:
    """What one process serves, and how: the socket is bound to the port of the settings, `tls` is certificate chain and key.

    `written` is how the settings were written, for messages about them.
    """

    settings: Settings
    sock: socket.socket
    tls: tuple[Path, Path] | None = None
    stop_at_eof: bool = False
    worker: bool = False
    ready_fd: int | None = None
    written: Written = attrs.field(factory=dict)

    @property
    def url(self) -> str:
        """The root URL, as reached from this machine."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{host_for_url(self.settings.host)}:{self.settings.port}"


def serve(serving: Serving) -> int:
    """Serve until told to stop, and return the exit code."""
    try:
        logs = configure(serving.settings)
    except OSError as error:
        refusal = unusable(serving.settings, "log_file", f"it cannot be written ({error.strerror}); name a file in a folder that can be")
        click.echo(f"Error: {as_written(refusal, serving.written)}", err=True)
        return 2
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(serving))
    except SettingsError as error:
        click.echo(f"Error: {as_written(error, serving.written)}", err=True)
        return 2
    except (LifespanFailureError, LifespanTimeoutError, GatewayError) as error:
        click.echo(f"Error: the gateway could not start: {start_error(error)}", err=True)
        return 1
    finally:
        logs.close()


def start_error(error: BaseException) -> BaseException:
    """Return the error of ours that made a start fail, or else the error itself.

    Starlette reports a start that fails while it handles the exception, and hypercorn raises an error of its own then: ours is its context.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, GatewayError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(serving: Serving) -> int:
    settings = serving.settings
    harden_hypercorn()
    parts = assemble(settings)
    parts.gateway.network.listen_on(serving.sock.getsockname()[0])
    app = parts.app
    shutdown = Shutdown(parts.gateway, settings.shutdown_grace_seconds)
    _listen_to_signals(shutdown, serving)
    _log.info("starting", extra={"fields": {"version": __version__, "url": serving.url}})
    _log.info("settings", extra={"fields": settings.masked()})
    announced = Announced(app, lambda: _announce(serving, parts))
    config = server_config(settings, serving.tls)
    if _has_direct_door(settings):
        # hypercorn runs the application's lifespan; what it takes for the wait for the end is our serving
        await hypercorn.asyncio.serve(announced, config, shutdown_trigger=partial(_serve_directly, serving, parts, config, shutdown))
    else:
        config.bind = [f"fd://{serving.sock.detach()}"]
        await hypercorn.asyncio.serve(announced, config, shutdown_trigger=partial(_serve_by_hypercorn, serving, shutdown))
    shutdown.cancel()
    _log.info("stopped")
    return 0


def _has_direct_door(settings: Settings) -> bool:
    if not settings.direct_door:
        _log.info("the direct door is switched off: hypercorn serves all requests")
        return False
    problem = incompatibility()
    if problem is not None:
        _log.warning(
            "the direct door does not work with this version of hypercorn, which serves all requests instead",
            extra={"fields": {"why": problem}},
        )
    return problem is None


async def _serve_by_hypercorn(serving: Serving, shutdown: "Shutdown") -> None:
    """Wait for the end; hypercorn begins to wait for it when it listens."""
    _report_ready(serving)
    await shutdown.begun.wait()


async def _serve_directly(serving: Serving, parts: Assembly, config: HardenedConfig, shutdown: "Shutdown") -> None:
    """Listen until the end begins, and return when all that was being answered then has come to its end."""
    settings = serving.settings
    others = Hypercorn(parts.app, config)
    patience = Patience(
        head=config.head_timeout,
        keep_alive=config.keep_alive_timeout,
        write=settings.client_write_timeout_seconds,
        dropping=settings.client_body_timeout_seconds,
    )
    root = settings.root_path.rstrip("/")
    listener = Listener(parts.intake, others.take, patience=patience, head_bytes=HEAD_BYTES, root=root)
    tls = config.create_ssl_context()
    server = await asyncio.get_running_loop().create_server(
        listener.protocol,
        sock=serving.sock,
        backlog=config.backlog,
        ssl=tls,
        ssl_handshake_timeout=None if tls is None else config.ssl_handshake_timeout,
    )
    _report_ready(serving)
    _spare_garbage_collection()
    await shutdown.begun.wait()
    server.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(config.graceful_timeout):
            await asyncio.gather(listener.finish(), others.finish())


def _spare_garbage_collection() -> None:
    """Let the collector look only at what requests leave behind, and seldom.

    All that the start has made stays anyway, and nearly all that a request makes is gone by itself. Measured at 64 connections,
    with the usual look after 700 new objects: 5 µs of 117 per request went into looking.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE, 20, 20)


def server_config(settings: Settings, tls: tuple[Path, Path] | None) -> HardenedConfig:
    """Return hypercorn's configuration, without a socket: its defaults suit neither streams nor browsers."""
    config = HardenedConfig()
    config.bind = []
    if tls is not None:
        config.certfile, config.keyfile = (str(path) for path in tls)
    config.head_timeout = config.ssl_handshake_timeout = settings.client_head_timeout_seconds
    config.write_timeout = settings.client_write_timeout_seconds
    config.backlog = 2048
    config.keep_alive_timeout = 75
    config.keep_alive_max_requests = 1_000_000
    config.graceful_timeout = settings.shutdown_grace_seconds + LAST_SECONDS / 2
    config.h11_max_incomplete_size = HEAD_BYTES
    config.h2_max_header_list_size = HEAD_BYTES
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = logging.getLogger("multiverse_gateway.api.hypercorn")
    config.errorlog.setLevel(max(logging.WARNING, config.errorlog.getEffectiveLevel()))
    return config


class Announced:
    """Run the application, and a function once it has started."""

    def __init__(self, app: Any, announce: Callable[[], Awaitable[None]]) -> None:
        self._app = app
        self._announce = announce

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on; watch the lifespan go by."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def watching(message: Any) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                await self._announce()

        await self._app(scope, receive, watching)


class Shutdown:
    """The shutdown of the process: new requests are refused, running ones get the grace, the rest are interrupted, the process exits."""

    def __init__(self, gateway: Gateway, grace: float) -> None:
        self._gateway = gateway
        self._grace = grace
        self._loop = asyncio.get_running_loop()
        self._timers: list[asyncio.TimerHandle] = []
        self.begun = asyncio.Event()

    def begin(self, *, refuse_after: float = 0.0) -> None:
        """Let running requests finish, and refuse new ones immediately or after `refuse_after` seconds. Further calls change nothing."""
        if self.begun.is_set():
            return
        _log.info("stopping", extra={"fields": {"grace_seconds": self._grace}})
        if refuse_after:
            self._timers.append(self._loop.call_later(refuse_after, self._gateway.begin_shutdown))
        else:
            self._gateway.begin_shutdown()
        self.begun.set()
        self._timers.append(self._loop.call_later(self._grace, self._gateway.interrupt))
        self._timers.append(self._loop.call_later(self._grace + LAST_SECONDS, os._exit, 1))

    def hurry(self) -> None:
        """Interrupt running requests immediately, and exit."""
        self.begin()
        self._gateway.interrupt()
        self._timers.append(self._loop.call_later(HURRIED_SECONDS, os._exit, 0))

    def handle_signal(self) -> None:
        """Handle a signal: the first begins the shutdown, the second interrupts running requests."""
        if self.begun.is_set():
            self.hurry()
        else:
            self.begin()

    def cancel(self) -> None:
        """Cancel the timers: everything has ended by itself."""
        for timer in self._timers:
            timer.cancel()


def _listen_to_signals(shutdown: Shutdown, serving: Serving) -> None:
    loop = asyncio.get_running_loop()
    polite = shutdown.begin if serving.worker else shutdown.handle_signal
    for name in ("SIGTERM", "SIGINT", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is None:
            continue
        if serving.worker and name == "SIGINT":
            signal.signal(number, signal.SIG_IGN)  # a terminal sends it to all; the parent tells what it means
            continue
        try:
            loop.add_signal_handler(number, polite)
        except NotImplementedError:  # asyncio handles no signals on Windows: there the standard way does
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(polite))
    if serving.stop_at_eof:
        descriptor = sys.stdin.fileno()
        os.set_blocking(descriptor, False)
        loop.add_reader(descriptor, _read_parent, shutdown, loop, descriptor)


def _read_parent(shutdown: Shutdown, loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    commands = os.read(descriptor, 64)
    if not commands:
        loop.remove_reader(descriptor)
    if b"!" in commands:
        shutdown.hurry()
    else:
        shutdown.begin(refuse_after=HANDOVER_SECONDS if b"r" in commands else 0.0)


def _report_ready(serving: Serving) -> None:
    """Report to the parent process, if it waits for that, that connections are accepted."""
    if serving.ready_fd is not None:
        with contextlib.suppress(BrokenPipeError):  # the parent no longer waits for it
            os.write(serving.ready_fd, b".")
        os.close(serving.ready_fd)


def reach_lines(serving: Serving, network: Network) -> list[tuple[str, str]]:
    """Return what the first lines say about other computers: how they reach the gateway, or how to let them."""
    if network.reach is Reach.THIS_COMPUTER:
        return [("for others", "nothing yet: only this computer can reach it; --host 0.0.0.0 opens it to your network")]
    scheme = "https" if serving.tls else "http"
    url = network_url(network.hosts_for_others, serving.settings.port, scheme=scheme)
    return [("for others", f"base_url={url}/v1")] if url else []


async def _announce(serving: Serving, parts: Assembly) -> None:
    created = parts.admin_keys.created
    if serving.worker and created is None:
        return
    lines = [f"Multiverse Gateway {__version__} serves on {serving.url}"]
    if serving.settings.ui:
        lines.append(f"  in a browser     {serving.url}/")
    lines.append(f"  for programs     base_url={serving.url}/v1")
    lines += [f"  {label:<16} {text}" for label, text in reach_lines(serving, parts.gateway.network)]
    if created is not None:
        lines += [
            "",
            "This is the first start, so an admin key was created. It is shown only once; keep it safe:",
            f"  admin key        {created}",
        ]
        if serving.settings.ui:
            token = await parts.sessions.create_link()
            lines.append(f"  sign in, once    {serving.url}/login?token={token}  (within 15 minutes)")
        lines.append("")
    click.echo("\n".join(lines))
