"""The ASGI door: one exchange whose client is reached through `receive` and `send`, whatever version of HTTP the server speaks."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers
from multiverse_gateway.relay.ports import CUT_SECONDS

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HIGH_WATER = 32768


class AsgiClient:
    """Hold what the exchange answers until the server has taken it: at most `HIGH_WATER` bytes and one chunk."""

    def __init__(self) -> None:
        self._head: tuple[int, Headers] | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._ended = False
        self._whole = False
        self._gone = False
        self._wake = asyncio.Event()
        self._deadline: asyncio.Timeout | None = None
        self.exchange: Exchange | None = None

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Keep a complete response until it is sent."""
        self._head = status, [*headers, (b"content-length", b"%d" % len(body))]
        self._pieces.append(body)
        self._ended = self._whole = True
        self._wake.set()

    def head(self, status: int, headers: Headers) -> None:
        """Keep the head of a response until it is sent."""
        self._head = status, headers
        self._wake.set()

    def body(self, data: bytes) -> None:
        """Keep a piece, and make the exchange pause when more than `HIGH_WATER` bytes wait."""
        self._pieces.append(data)
        self._size += len(data)
        self._wake.set()
        if self._size > HIGH_WATER and self.exchange is not None:
            self.exchange.client_clogged()

    def end(self) -> None:
        """Note that the response is complete."""
        self._ended = self._whole = True
        self._wake.set()

    def cut(self) -> None:
        """Note that the response ends here without being complete."""
        self._ended = True
        self._wake.set()

    def leave(self) -> None:
        """Stop sending: the client has left."""
        self._gone = True
        self._wake.set()
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(0.0)  # ends the `send` under way, which has no receiver any more

    async def send_all(self, send: Send, *, write_timeout: float, can_cut: bool) -> None:
        """Send until the end, or until `leave`. `can_cut` says that a body left unfinished reaches the client as a broken one.

        Raises:
            TimeoutError: The client took nothing for `write_timeout` seconds.
            OSError: The server reports that the client has left.
        """
        exchange = self.exchange
        assert exchange is not None
        now = asyncio.get_running_loop().time

        async with asyncio.timeout(None) as deadline:

            async def put(message: Message) -> None:
                self._deadline = deadline
                deadline.reschedule(now() + write_timeout)
                try:
                    await send(message)
                finally:
                    self._deadline = None
                if deadline.expired():  # and the server swallowed the cancellation, as hypercorn does while it closes
                    raise TimeoutError
                deadline.reschedule(None)

            while not self._gone:
                await self._wake.wait()
                self._wake.clear()
                if self._head is not None:
                    (status, headers), self._head = self._head, None
                    await put({"type": "http.response.start", "status": status, "headers": headers})
                pieces, self._pieces = self._pieces, []
                ended = self._ended
                if pieces or ended:
                    data: bytes | memoryview = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                    more = not (ended and (self._whole or not can_cut))
                    while len(data) > HIGH_WATER:  # so that a slow client is not taken for a stalled one: each slice has its own time
                        await put({"type": "http.response.body", "body": bytes(data[:HIGH_WATER]), "more_body": True})
                        data = memoryview(data)[HIGH_WATER:]
                    if data or not more:
                        await put({"type": "http.response.body", "body": bytes(data), "more_body": more})
                    self._size = sum(map(len, self._pieces))
                    if not self._size:
                        exchange.client_drained()
                if ended:
                    if can_cut and not self._whole:
                        await asyncio.sleep(CUT_SECONDS)
                    return


async def answer(client: AsgiClient, exchange: Exchange, scope: Scope, receive: Receive, send: Send, *, write_timeout: float) -> None:
    """Run the exchange to its end, or until the client leaves.

    Called with the request's body received in full. Canceling it counts as the client leaving, and so does an `OSError` of `send`.
    """
    client.exchange = exchange
    watcher = asyncio.ensure_future(_watch(client, exchange, receive))
    try:
        exchange.start()
        await client.send_all(send, write_timeout=write_timeout, can_cut=str(scope.get("http_version", "1.1")).startswith("1"))
    except TimeoutError:
        exchange.client_stalled()  # has no effect on an exchange that is over, for example because the client left
    except OSError:
        pass
    finally:
        exchange.client_gone()
        exchange.taken()
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def _watch(client: AsgiClient, exchange: Exchange, receive: Receive) -> None:
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    finally:
        exchange.client_gone()
        client.leave()
