"""Resolve host names with the system's resolver, so that no lookup delays another.

1. Each lookup has its own thread: a lookup that hangs delays neither other names nor anything else that runs on threads.
2. Concurrent calls for one name share one lookup, so that hanging lookups do not pile up.
3. The threads do not keep the process from exiting.
"""

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

MAX_LOOKUPS = 64
"""Maximum number of concurrent lookups; while it is reached, other names fail to resolve."""


class SystemResolver:
    """Resolve names as the system does. Use it on one event loop only; `look_up` is called like `socket.getaddrinfo`."""

    def __init__(self, look_up: Callable[..., Sequence[Any]] = socket.getaddrinfo) -> None:
        self._look_up = look_up
        self._lookups: dict[tuple[str, int], asyncio.Future[Sequence[str] | None]] = {}

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Return the addresses of a name.

        Raises:
            OSError: The name has no address, or too many names are being resolved, or the system has no thread left.
        """
        lookup = self._lookups.get((host, port))
        if lookup is None:
            lookup = self._start(host, port)
        addresses = await asyncio.shield(lookup)
        if addresses is None:
            raise OSError("the name has no address")
        return addresses

    def _start(self, host: str, port: int) -> asyncio.Future[Sequence[str] | None]:
        if len(self._lookups) >= MAX_LOOKUPS:
            raise OSError("too many names are being resolved")
        loop = asyncio.get_running_loop()
        lookup: asyncio.Future[Sequence[str] | None] = loop.create_future()

        def work() -> None:
            addresses: Sequence[str] | None = None
            with suppress(OSError, UnicodeError):
                addresses = [str(address[0]) for *_, address in self._look_up(host, port, type=socket.SOCK_STREAM)]
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(finish, addresses)

        def finish(addresses: Sequence[str] | None) -> None:
            del self._lookups[host, port]
            lookup.set_result(addresses)

        try:
            threading.Thread(target=work, name="multiverse-names", daemon=True).start()
        except RuntimeError as error:
            raise OSError("no thread is available to resolve the name") from error
        self._lookups[host, port] = lookup  # `finish` runs later, on this loop
        return lookup
