"""What serves the connections that the direct door does not: hypercorn 0.18, from its private parts.

Hypercorn makes its own connections from its own listener only. Here one is made from a transport that is open already; the parts that
this takes are named in `PARTS`, and all other use of them is in `cli.guards`.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.utils import wrap_app

from multiverse_gateway.cli.guards.shared import GuardedServer

READ_AHEAD = 32768
PARTS: Mapping[str, tuple[Callable[..., Any], Sequence[str]]] = {
    "hypercorn.asyncio.tcp_server.TCPServer": (TCPServer, ("app", "loop", "config", "context", "state", "reader", "writer")),
    "hypercorn.asyncio.worker_context.WorkerContext": (WorkerContext, ("max_requests",)),
    "hypercorn.utils.wrap_app": (wrap_app, ("app", "wsgi_max_body_size", "mode")),
}
"""What we call, and the parameters that we know it to have."""


def misfit(parts: Mapping[str, tuple[Callable[..., Any], Sequence[str]]] = PARTS) -> str | None:
    """Return what this hypercorn has made different, or `None` when connections can be handed over to it."""
    for name, (part, known) in parts.items():
        found = tuple(inspect.signature(part).parameters)
        if found != tuple(known):
            return f"{name} takes ({', '.join(found)}), not ({', '.join(known)})"
    for member in ("terminated", "terminate"):
        if not hasattr(WorkerContext(None), member):
            return f"a WorkerContext of hypercorn has no {member}"
    return None


class Hypercorn:
    """Connections served by hypercorn. Made on the event loop that it serves."""

    def __init__(self, app: Any, config: Config) -> None:
        self._app = wrap_app(app, config.wsgi_max_body_size, "asgi")
        self._config = config
        self._context = WorkerContext(None)
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, transport: asyncio.Transport, data: bytes) -> None:
        """Serve a connection of which `data` has been read."""
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
        await GuardedServer(self._app, self._loop, self._config, self._context, {}, reader, writer)

    async def finish(self) -> None:
        """Let running requests come to their end. Cancelled, it ends them."""
        await self._context.terminated.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
