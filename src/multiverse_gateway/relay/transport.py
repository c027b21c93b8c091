"""The wire as an httpx2 transport, so that probes and connection tests are held to the same address policy as requests."""

import asyncio
from collections.abc import Mapping

import httpx2

from multiverse_gateway.core.addresses import Endpoint, EndpointError, parse_endpoint, with_opening
from multiverse_gateway.core.content_types import is_identity
from multiverse_gateway.core.failover import ConnectFailure, Failure, FailureClass
from multiverse_gateway.protocols import MAX_PROBE_BYTES, ProbeProblem, ServerUnreachable, UnusableAnswer
from multiverse_gateway.relay.wire import Wire

_OURS = frozenset({b"connection", b"content-length", b"transfer-encoding"})
_WITHHELD = frozenset({b"location", b"set-cookie", b"transfer-encoding"})
"""Headers that are dropped: redirects are not followed, cookies are not kept, and the body has no coding any more."""
_CONTROL = frozenset(b"\r\n\0")


class _Collected:
    """Collect an answer of at most `MAX_PROBE_BYTES`; an answer to HEAD ends with its head."""

    def __init__(self, request: httpx2.Request) -> None:
        self._request = request
        self._size = 0
        self.status = 0
        self.headers: Mapping[bytes, bytes] = {}
        self.pieces: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        self.status, self.headers = status, headers
        if not is_identity(headers.get(b"content-encoding")):
            self._fail(
                UnusableAnswer(
                    "the server's answer is compressed, although the gateway did not ask for that", problem=ProbeProblem.COMPRESSED
                )
            )
        elif self._request.method == "HEAD":
            self.end()

    def body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= MAX_PROBE_BYTES:
            self.pieces.append(data)
        else:
            self._fail(UnusableAnswer("the server's answer is larger than 1 MiB", problem=ProbeProblem.TOO_LARGE))

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def failed(self, failure: Failure) -> None:
        if failure.kind is FailureClass.CONNECT:
            self._fail(ServerUnreachable(failure.reason, cause=failure.connect or ConnectFailure.OTHER, refusal=failure.refusal))
        else:
            self._fail(httpx2.RemoteProtocolError(failure.reason))

    def _fail(self, error: httpx2.TransportError) -> None:
        error.request = self._request
        if not self.done.done():
            self.done.set_exception(error)


class WireTransport(httpx2.AsyncBaseTransport):
    """Send httpx2 requests over a `Wire`, each on a connection of its own; the whole answer is read, 1 MiB at most.

    The timeout `read` of a request bounds the wait for the whole answer; the others are the wire's. `opened_address` is that of the server
    that is asked. Closing the transport leaves the wire open.

    Raises:
        httpx2.UnsupportedProtocol: The URL is none that a server may have; the message says why.
        httpx2.LocalProtocolError: The request's method, target or a header holds a control character.
        ServerUnreachable: No connection could be made, or the address may not be dialed. It is an `httpx2.ConnectError`.
        UnusableAnswer: The answer is compressed or too large. It is an `httpx2.RemoteProtocolError`.
        httpx2.RemoteProtocolError: The answer is broken.
        httpx2.ReadTimeout: It took too long.
    """

    def __init__(self, wire: Wire, *, opened_address: str | None = None) -> None:
        self._wire = wire
        self._opened_address = opened_address

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request and return its whole answer; canceling it closes the connection immediately."""
        endpoint = with_opening(_endpoint(request), self._opened_address)
        head = _head(request, body := await request.aread())
        collected = _Collected(request)
        seconds = request.extensions.get("timeout", {}).get("read")
        sending = self._wire.send(None, endpoint, (head, body) if body else (head,), collected)
        try:
            async with asyncio.timeout(seconds):
                await collected.done
        except TimeoutError:
            raise httpx2.ReadTimeout("the server did not answer in time", request=request) from None
        finally:
            sending.abort()
        headers = [(name, value) for name, value in collected.headers.items() if name not in _WITHHELD]
        return httpx2.Response(collected.status, headers=headers, stream=httpx2.ByteStream(b"".join(collected.pieces)), request=request)


def _endpoint(request: httpx2.Request) -> Endpoint:
    url = request.url
    try:
        return parse_endpoint(f"{url.scheme}://{url.netloc.decode('ascii')}")
    except EndpointError as error:
        raise httpx2.UnsupportedProtocol(str(error), request=request) from None


def _head(request: httpx2.Request, body: bytes) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [b"%b: %b" % (name, value) for name, value in request.headers.raw if name.lower() not in _OURS]
    lines.append(b"connection: close")
    if body or request.method in ("POST", "PUT", "PATCH"):
        lines.append(b"content-length: %d" % len(body))
    if any(not _CONTROL.isdisjoint(line) for line in lines):
        raise httpx2.LocalProtocolError(
            "The head of the request contains a control character; a key or header must be one line", request=request
        )
    return b"\r\n".join([*lines, b"", b""])
