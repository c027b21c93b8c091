"""What both probes share: ask a server, read its answer within bounds, and say in words what is wrong.

A reason names a category and the remedy, never anything that the server sent: hosts see it, and so may whoever looks for open ports.
"""

import time
from collections.abc import Callable, Mapping

import attrs
import httpx2

from multiverse_gateway.core.access import refusal_of
from multiverse_gateway.core.envelope import BOM
from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import Client, ProbeResult

MAX_BYTES = 1 << 20


@attrs.frozen(kw_only=True)
class Finding:
    """What an answer means: `reason` is `None` when it is good. `let_in`, `timed_out` and the rest are those of `ProbeResult`."""

    reason: str | None = None
    warning: str | None = None
    unauthorized: bool = False
    models: tuple[str, ...] = ()
    let_in: bool = False
    timed_out: bool = False
    lacks_chat: bool = False
    owned_by: str | None = None


class TooLargeError(Exception):
    """The answer is larger than `MAX_BYTES`."""


class CodedError(Exception):
    """The answer is compressed, which nobody asked for."""


Judge = Callable[[int, bytes], Finding]
"""Judge an answer by its status and body."""


async def ask(server: Server, http: Client, request: httpx2.Request, judge: Judge) -> ProbeResult:
    """Send a request to a server and make a result of what came of it; the timeout is the caller's."""
    checked_at, began = time.time(), time.perf_counter()
    try:
        status, body = await _answer(http, request)
    except (httpx2.RequestError, httpx2.InvalidURL, TooLargeError, CodedError) as error:
        finding = Finding(reason=_trouble(error), timed_out=_is_timeout(error))
    else:
        finding = _refusal(server, status) or judge(status, body)
    return ProbeResult(
        server_id=server.id,
        generation=server.generation,
        passed=finding.reason is None,
        checked_at=checked_at,
        duration=time.perf_counter() - began,
        reason=finding.reason,
        warning=finding.warning,
        unauthorized=finding.unauthorized,
        models=finding.models,
        let_in=finding.let_in,
        timed_out=finding.timed_out,
        lacks_chat=finding.lacks_chat,
        owned_by=finding.owned_by,
    )


async def _answer(http: Client, request: httpx2.Request) -> tuple[int, bytes]:
    response = await http.send(request, stream=True)
    try:
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise CodedError
        body = bytearray()
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_BYTES:
                raise TooLargeError
        return response.status_code, bytes(body).removeprefix(BOM)
    finally:
        await response.aclose()


def _refusal(server: Server, status: int) -> Finding | None:
    """Judge the statuses that mean the same whatever was asked."""
    refusal = refusal_of(status, has_key=server.api_key is not None)
    if refusal is not None:
        return Finding(reason=refusal, unauthorized=True)
    if 300 <= status < 400:
        return Finding(reason="the server answers with a redirect: register the address that it leads to")
    if status in (429, 503):
        return Finding(reason=f"the server is busy or still loading its model (status {status}): it is asked again soon")
    if status == 530:
        return Finding(reason="the tunnel is there, but nothing is connected to it (status 530): is the tunnel's client running?")
    return None


_WORDS: Mapping[type[Exception], str] = {
    httpx2.ConnectTimeout: "no connection within the time allowed: is the machine on, and is the port open in its firewall?",
    httpx2.ReadTimeout: "no answer within the time allowed: is the server overloaded or still loading its model?",
    httpx2.UnsupportedProtocol: "the URL cannot be used: register the server with an http:// or https:// address",
    httpx2.InvalidURL: "the URL cannot be used: register the server with an http:// or https:// address",
    httpx2.LocalProtocolError: "the stored key cannot be sent in a header: update its api_key",
    TooLargeError: "the answer is larger than 1 MiB: does the URL lead to an OpenAI-compatible server?",
    CodedError: "the answer is compressed, which was not asked for: switch compression off in the server or the proxy before it",
}

_CONNECTING: Mapping[str, str] = {
    "refused": "connection refused: is the server running, and does it listen on that address?",
    "in time": "no connection within the time allowed: is the machine on, and is the port open in its firewall?",
    "TLS": "no secure connection (TLS): is the certificate valid, and does the server speak https at all?",
    "ALLOW_PRIVATE_NETWORKS": (
        "the URL leads to a private address, which this gateway does not dial: use a public address or a tunnel, "
        "or ask the operator to open private networks (ALLOW_PRIVATE_NETWORKS)"
    ),
    "may not be dialled": "the URL leads to an address that this gateway does not dial: use a public one or a tunnel, or ask the operator",
    "name": "the host name leads nowhere: is it spelt right, and is the tunnel still open?",
    "resolve": "the host name leads nowhere: is it spelt right, and is the tunnel still open?",
}


def _is_timeout(error: Exception) -> bool:
    return isinstance(error, httpx2.TimeoutException) or (isinstance(error, httpx2.ConnectError) and "in time" in str(error))


def _trouble(error: Exception) -> str:
    """Say what went wrong on the way. Only marks of categories are looked for in the error's own text: it may name addresses."""
    for kind, words in _WORDS.items():
        if isinstance(error, kind):
            return words
    if isinstance(error, httpx2.ConnectError):
        text = str(error)
        for mark, words in _CONNECTING.items():
            if mark in text:
                return words
        return "no connection: is the server running, and can it be reached from here?"
    if "1 MiB" in str(error):
        return _WORDS[TooLargeError]
    if "compressed" in str(error):
        return _WORDS[CodedError]
    return "the connection broke before the answer was complete: does the URL lead to an HTTP server, and is https right or wrong for it?"
