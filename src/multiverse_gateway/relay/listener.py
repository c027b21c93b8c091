"""The direct door: inference requests on HTTP/1.1, from the callbacks of the socket straight into their exchange.

Theory of operation

Almost all requests that a gateway gets are a `POST` to the API with a body of a few kilobytes. The door serves them without another server
in between, and without a task or a timer per request: the event loop calls `ClientConnection.data_received`, and within that call the head
is read (`heads`), the rules are checked (`intake`), the body is read (`request_body`) and the exchange is started. What the exchange
answers goes through the `ResponseWriter` to the transport. Any other connection is handed over to hypercorn.

1. The door takes a request only if there is no doubt about it: a `POST` to the API in HTTP/1.1 with a host, its head whole in the first
   bytes that arrive and free of errors, with only its body behind it and only empty lines before it. Any other connection is handed over
   with the bytes read so far, and never comes back.
2. A connection has one deadline, `due`, by which its client must have done something. A single sweep, every `SWEEP_SECONDS`, finds
   the clients that are late: setting `due` costs a twentieth of starting and canceling a timer (0.15 µs instead of 3). The sweep also
   renews the `Date` line, and notices when the process was suspended: clients then get the time that they did not have.
3. Reading continues while a request is answered, so that a client that leaves is noticed and its server stopped. What a client sends
   ahead is kept, up to `AHEAD_BYTES`.
4. A request gets one response. If it comes before the end of the body, a small rest of the body is dropped and the connection kept;
   otherwise the connection closes. It is read for a while even then: closing it with unread bytes would send a reset, which can destroy
   the response before the client reads it (RFC 9112, 9.6).
5. A client that does not read stops the server that its response comes from, and is cut off if it takes nothing for too long.
6. `Listener.finish` closes the idle connections and waits for the others. A connection that was made right before may send one request.

The states of a connection. From every state a lost connection leads to CLOSING, and the exchange or the admission is canceled.

| state     | waits for                           | bytes that arrive                | when `due`              | next states               |
|-----------|-------------------------------------|----------------------------------|-------------------------|---------------------------|
| READY     | a request                           | begin a request                  | close                   | any other, or handed over |
| ADMITTING | the rules, if they ask for a quota  | kept; after `AHEAD_BYTES` unread | never                   | READING, BUSY, DROPPING   |
| READING   | the rest of the body                | belong to the body, then kept    | respond with 408        | BUSY, DROPPING            |
| BUSY      | the exchange, or the client to read | kept; too many are dropped       | cut off, if not reading | READY, CLOSING            |
| DROPPING  | the rest of a body that is refused  | dropped, then kept               | cut off                 | READY, CLOSING            |
| CLOSING   | the transport to write the rest     | kept, but never read             | cut off, if not reading | none                      |
"""

import asyncio
from collections.abc import Callable
from email.utils import formatdate
from typing import Final, Generic

from multiverse_gateway.core.pauses import stopped_seconds
from multiverse_gateway.relay.client_connection import ClientConnection, Patience
from multiverse_gateway.relay.heads import Heads
from multiverse_gateway.relay.intake_port import IntakePort, V

SWEEP_SECONDS: Final = 0.25


class Listener(Generic[V]):
    """All connections of the direct door in this process; `protocol` makes one for each that is accepted.

    `hand_over` gets the transport of a connection that is not for this door, and the bytes that were read of it. `root` is the path below
    which a proxy serves the gateway. Made on the event loop that it serves.
    """

    def __init__(
        self,
        intake: IntakePort[V],
        hand_over: Callable[[asyncio.Transport, bytes], None],
        *,
        patience: Patience,
        head_bytes: int,
        root: str = "",
    ) -> None:
        self.intake = intake
        self.hand_over = hand_over
        self.patience = patience
        self.head_bytes = head_bytes
        self.closing = False
        self.heads = Heads(root)
        self.connections: set[ClientConnection[V]] = set()
        self.date = b""
        self.time = asyncio.get_running_loop().time
        self._empty = asyncio.Event()
        self._planned = self.time()
        self._sweep()

    def protocol(self) -> ClientConnection[V]:
        """Make the protocol of a connection."""
        return ClientConnection(self)

    async def finish(self) -> None:
        """Let what is being answered come to its end, and take nothing more. If it is canceled, all connections are cut off."""
        self.closing = True
        for connection in list(self.connections):
            connection.stop()
        try:
            if self.connections:
                await self._empty.wait()
        finally:
            for connection in list(self.connections):
                connection.transport.abort()
            self._sweeper.cancel()

    def add(self, connection: ClientConnection[V]) -> None:
        """Add a connection that has just been opened."""
        self.connections.add(connection)
        if self.closing:
            connection.stop()

    def discard(self, connection: ClientConnection[V]) -> None:
        """Forget a connection, if it was noted."""
        self.connections.discard(connection)
        if self.closing and not self.connections:
            self._empty.set()

    def _sweep(self) -> None:
        now = self.time()
        self.date = b"date: %b\r\n" % formatdate(usegmt=True).encode()
        stopped = stopped_seconds(self._planned, now)
        if stopped:
            for connection in self.connections:
                connection.postpone(stopped)
        self._planned = now + SWEEP_SECONDS
        for connection in [connection for connection in self.connections if connection.due <= now]:
            connection.tick()
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)
