"""The system's answers to names, with no lookup in another's way.

1. Each lookup has a thread of its own: one that hangs holds up neither other names nor anything else that runs on threads.
2. A name is looked up once at a time, however many ask: what hangs does not pile up.
3. The threads do not keep the process from ending.
"""

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

MAX_LOOKUPS = 64
"""Names that are looked up at the same time; what is beyond counts as not found, until one of them is answered."""


class SystemResolver:
    """Resolve names as the system does. Belongs to the event loop it is used on; `look_up` is called as `socket.getaddrinfo` is."""

    def __init__(self, look_up: Callable[..., Sequence[Any]] = socket.getaddrinfo) -> None:
        self._look_up = look_up
        self._asked: dict[tuple[str, int], asyncio.Future[Sequence[str] | None]] = {}

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Return the addresses of a name.

        Raises:
            OSError: It has none, or too many names are being looked up, or the system has no thread left.
        """
        answer = self._asked.get((host, port))
        if answer is None:
            answer = self._ask(host, port)
        found = await asyncio.shield(answer)
        if found is None:
            raise OSError("the name has no address")
        return found

    def _ask(self, host: str, port: int) -> asyncio.Future[Sequence[str] | None]:
        if len(self._asked) >= MAX_LOOKUPS:
            raise OSError("too many names are being looked up")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[str] | None] = loop.create_future()

        def work() -> None:
            found: Sequence[str] | None = None
            with suppress(OSError, UnicodeError):
                found = [str(address[0]) for *_, address in self._look_up(host, port, type=socket.SOCK_STREAM)]
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, found)

        def tell(found: Sequence[str] | None) -> None:
            del self._asked[host, port]
            answer.set_result(found)

        try:
            threading.Thread(target=work, name="multiverse-names", daemon=True).start()
        except RuntimeError as error:
            raise OSError("there is no thread for the lookup") from error
        self._asked[host, port] = answer  # `tell` runs later, on this loop
        return answer
