"""The wire as an httpx2 transport, so that probes and registration dial through the same checked door."""

import asyncio
from collections.abc import Mapping

import httpx2

from multiverse_gateway.core.addresses import EndpointError, parse_endpoint
from multiverse_gateway.core.failover import Failure
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.relay.wire import Wire

MAX_BYTES = 1 << 20


class _Collected:
    """Gather an answer of at most `MAX_BYTES`."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Mapping[bytes, bytes] = {}
        self.pieces: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._size = 0

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        self.status, self.headers = status, headers

    def body(self, data: bytes) -> None:
        self._size += len(data)
        self.pieces.append(data)
        if self._size > MAX_BYTES:
            self._fail("the answer is larger than 1 MiB")

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def failed(self, failure: Failure) -> None:
        self._fail(failure.reason)

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(httpx2.ConnectError(reason))


class WireTransport(httpx2.AsyncBaseTransport):
    """Send httpx2 requests over a `Wire`.

    Raises:
        httpx2.ConnectError: the server could not be reached, or its answer could not be read; the message is the reason in words.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request and return its whole answer."""
        url = request.url
        try:
            endpoint = parse_endpoint(f"{url.scheme}://{url.netloc.decode()}")
        except EndpointError as error:
            raise httpx2.UnsupportedProtocol(str(error)) from None
        body = await request.aread()
        head = [request.method.encode() + b" " + url.raw_path + b" HTTP/1.1"]
        head += [name + b": " + value for name, value in request.headers.raw if name.lower() != b"connection"]
        collected = _Collected()
        block = b"\r\n".join([*head, b"connection: close", b"", b""])
        sending = self._wire.send(ServerId(f"probe {endpoint.url}"), endpoint, (block, body), collected)
        try:
            await collected.done
        finally:
            sending.abort()
        return httpx2.Response(
            collected.status, headers=list(collected.headers.items()), content=b"".join(collected.pieces), request=request
        )
