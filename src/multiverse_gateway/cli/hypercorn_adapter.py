"""Let hypercorn 0.18 serve the connections that the direct door does not take.

Hypercorn creates connections only from its own listener. This module creates one from a transport that is already open, with parts of
hypercorn that are not public. `PARTS` names them; `cli.hypercorn_hardening` has every other use of private parts.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.utils import wrap_app

from multiverse_gateway.cli.hypercorn_hardening.shared import HardenedServer

READ_AHEAD = 32768
PARTS: Mapping[str, tuple[Callable[..., Any], Sequence[str]]] = {
    "hypercorn.asyncio.tcp_server.TCPServer": (TCPServer, ("app", "loop", "config", "context", "state", "reader", "writer")),
    "hypercorn.asyncio.worker_context.WorkerContext": (WorkerContext, ("max_requests",)),
    "hypercorn.utils.wrap_app": (wrap_app, ("app", "wsgi_max_body_size", "mode")),
}
"""The functions and classes that we call, each with the parameters that it has in hypercorn 0.18."""


def incompatibility(parts: Mapping[str, tuple[Callable[..., Any], Sequence[str]]] = PARTS) -> str | None:
    """Return how the installed hypercorn differs from hypercorn 0.18, or `None` if connections can be handed over to it."""
    for name, (part, expected) in parts.items():
        parameters = tuple(inspect.signature(part).parameters)
        if parameters != tuple(expected):
            return f"{name} takes ({', '.join(parameters)}), not ({', '.join(expected)})"
    for member in ("terminated", "terminate"):
        if not hasattr(WorkerContext(None), member):
            return f"a WorkerContext of hypercorn has no {member}"
    return None


class Hypercorn:
    """Connections that hypercorn serves. Create it on the event loop that serves them."""

    def __init__(self, app: Any, config: Config) -> None:
        self._app = wrap_app(app, config.wsgi_max_body_size, "asgi")
        self._config = config
        self._context = WorkerContext(None)
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, transport: asyncio.Transport, data: bytes) -> None:
        """Serve a connection from which `data` has already been read."""
        reader = asyncio.StreamReader(READ_AHEAD, self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, self._serve, self._loop)
        transport.set_write_buffer_limits(high=READ_AHEAD)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if data:
            protocol.data_received(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: asyncio.Task[None] | None = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await HardenedServer(self._app, self._loop, self._config, self._context, {}, reader, writer)

    async def finish(self) -> None:
        """Wait until the running requests have finished. If this call is canceled, they are canceled too."""
        await self._context.terminated.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
