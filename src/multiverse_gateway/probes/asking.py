"""What both probes share: ask a server, read its answer within bounds, and say in words what is wrong.

A reason names a category and the remedy, never anything that the server sent: hosts see it, and so can a person who scans for open ports.
"""

import time
from collections.abc import Callable, Mapping

import attrs
import httpx2

from multiverse_gateway.core.addresses import AddressRefusal
from multiverse_gateway.core.content_types import is_identity
from multiverse_gateway.core.failover import ConnectFailure
from multiverse_gateway.core.lenient import BOM
from multiverse_gateway.core.server_access import refusal_of
from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import MAX_PROBE_BYTES, Client, ProbeProblem, ProbeResult, ProbeStep, ServerUnreachable, UnusableAnswer


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
    listing: object = None
    failed_at: ProbeStep | None = None
    problem: ProbeProblem | None = None


Judge = Callable[[int, bytes], Finding]
"""Judge an answer by its status and body."""


async def ask(server: Server, http: Client, request: httpx2.Request, judge: Judge) -> ProbeResult:
    """Send a request to a server and make a result of what came of it; the timeout is the caller's."""
    checked_at, began = time.time(), time.perf_counter()
    status: int | None = None
    try:
        response, body = await _answer(http, request)
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        finding = _trouble(error)
    else:
        status = response.status_code
        finding = _refusal(server, response) or judge(status, body)
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
        listing=finding.listing,
        failed_at=finding.failed_at,
        problem=finding.problem,
        status=status,
    )


async def _answer(http: Client, request: httpx2.Request) -> tuple[httpx2.Response, bytes]:
    response = await http.send(request, stream=True)
    try:
        if not is_identity(response.headers.get("content-encoding", "").encode()):
            raise UnusableAnswer("the answer is compressed", problem=ProbeProblem.COMPRESSED)
        body = bytearray()
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_PROBE_BYTES:
                raise UnusableAnswer("the answer is too large", problem=ProbeProblem.TOO_LARGE)
        return response, bytes(body).removeprefix(BOM)
    finally:
        await response.aclose()


def _refusal(server: Server, response: httpx2.Response) -> Finding | None:
    """Judge the answers that mean the same whatever was asked."""
    status = response.status_code
    if status == 530 or "ngrok-error-code" in response.headers:  # the page is the tunnel's own
        reason = f"the tunnel exists, but no server is connected to it (status {status}): is the tunnel's client running?"
        return Finding(reason=reason, failed_at=ProbeStep.CONNECTION, problem=ProbeProblem.IDLE_TUNNEL)
    refusal = refusal_of(status, has_key=server.api_key is not None)
    if refusal is not None:
        problem = _REFUSALS.get((status, server.api_key is not None), ProbeProblem.ACCESS_REFUSED)
        return Finding(reason=refusal, unauthorized=True, failed_at=ProbeStep.ACCESS, problem=problem)
    if 300 <= status < 400:
        reason = "the server answers with a redirect: register the address that it leads to"
        return Finding(reason=reason, problem=ProbeProblem.REDIRECT)
    if status in (429, 503):
        reason = f"the server is busy or still loading its model (status {status})"
        return Finding(reason=reason, problem=ProbeProblem.BUSY)
    return None


_REFUSALS = {(401, False): ProbeProblem.KEY_MISSING, (401, True): ProbeProblem.KEY_REFUSED}


_NO_CONNECTION = "no connection within the timeout: is the machine on, and is the port open in its firewall?"
_UNUSABLE_URL = "the URL is not valid: register the server with an http:// or https:// URL"
_BROKEN = "the connection broke before the answer was complete: does the URL lead to an HTTP server, and should it be http or https?"

_TROUBLES: Mapping[type[Exception], Finding] = {
    httpx2.ConnectTimeout: Finding(reason=_NO_CONNECTION, timed_out=True, failed_at=ProbeStep.CONNECTION),
    httpx2.ReadTimeout: Finding(
        reason="no answer within the timeout: is the server overloaded or still loading its model?",
        timed_out=True,
        problem=ProbeProblem.TIMEOUT,
    ),
    httpx2.UnsupportedProtocol: Finding(reason=_UNUSABLE_URL, failed_at=ProbeStep.URL),
    httpx2.InvalidURL: Finding(reason=_UNUSABLE_URL, failed_at=ProbeStep.URL),
    httpx2.LocalProtocolError: Finding(
        reason="the stored key cannot be sent in a header: update its api_key", problem=ProbeProblem.UNSENDABLE_KEY
    ),
}

_FLAWS: Mapping[ProbeProblem, str] = {
    ProbeProblem.TOO_LARGE: "the answer is larger than 1 MiB: does the URL lead to an OpenAI-compatible server?",
    ProbeProblem.COMPRESSED: (
        "the answer is compressed, although the gateway did not ask for that: turn off "
        "compression in the server or in the proxy in front of it"
    ),
}

_UNREACHED: Mapping[ConnectFailure, str] = {
    ConnectFailure.RESOLVE: "the host name cannot be resolved: is it spelled correctly, and is the tunnel still open?",
    ConnectFailure.TIMEOUT: _NO_CONNECTION,
    ConnectFailure.REFUSED: "connection refused: is the server running, and does it listen on that address?",
    ConnectFailure.TLS: "no secure connection (TLS): is the certificate valid, and does the server support https?",
    ConnectFailure.NO_TLS: "the port is open but does not answer in TLS: try http:// instead of https://",
    ConnectFailure.TLS_TIMEOUT: "the port is open but gives no answer in TLS: try http:// instead of https://",
    ConnectFailure.REFUSED_ADDRESS: (
        "the URL leads to an address that this gateway does not connect to: use a public one or a tunnel, or ask the operator"
    ),
    ConnectFailure.OTHER: "no connection: is the server running, and can it be reached from here?",
}
_OPENABLE = (
    "the URL leads to a private address, which this gateway does not connect to: use a public address or a tunnel, "
    "or ask the operator to open private networks (ALLOW_PRIVATE_NETWORKS)"
)

_LOOPBACK = (
    "the URL leads to the gateway's own computer, which this gateway does not connect to: use the address of the computer that runs the "
    "model server, or a tunnel (the operator can open the gateway's own computer with ALLOW_PRIVATE_NETWORKS=127.0.0.0/8)"
)
_CLOSED_AGAIN = (
    "the operator opened this address while no other computer could reach the gateway, and now others can: "
    "set ALLOW_PRIVATE_NETWORKS=127.0.0.1/32 and restart the gateway to keep the server"
)
_REFUSED: Mapping[AddressRefusal, str] = {
    AddressRefusal.PRIVATE: _OPENABLE,
    AddressRefusal.LOOPBACK: _LOOPBACK,
    AddressRefusal.CLOSED_AGAIN: _CLOSED_AGAIN,
}
"""The reasons for refusals of addresses that a setting can open."""

_STEPS: Mapping[ConnectFailure, ProbeStep] = {
    ConnectFailure.RESOLVE: ProbeStep.NAME,
    ConnectFailure.REFUSED_ADDRESS: ProbeStep.ADDRESS,
}
"""The steps at which a connection fails; any other failure belongs to the step `CONNECTION`."""


def _trouble(error: Exception) -> Finding:
    """Return what an error on the way means; its own text is never read, because it may name addresses."""
    for kind, finding in _TROUBLES.items():
        if isinstance(error, kind):
            return finding
    if isinstance(error, ServerUnreachable):
        return _unreached(error.cause, error.refusal)
    if isinstance(error, httpx2.ConnectError):
        return _unreached(ConnectFailure.OTHER)
    if isinstance(error, UnusableAnswer):
        return Finding(reason=_FLAWS[error.problem], problem=error.problem)
    return Finding(reason=_BROKEN, timed_out=isinstance(error, httpx2.TimeoutException), problem=ProbeProblem.BROKEN)


def _unreached(cause: ConnectFailure, refusal: AddressRefusal | None = None) -> Finding:
    return Finding(
        reason=_UNREACHED[cause] if refusal is None else _REFUSED.get(refusal, _UNREACHED[cause]),
        timed_out=cause is ConnectFailure.TIMEOUT or cause is ConnectFailure.TLS_TIMEOUT,
        failed_at=_STEPS.get(cause, ProbeStep.CONNECTION),
        problem=ProbeProblem.NO_TLS if cause is ConnectFailure.NO_TLS or cause is ConnectFailure.TLS_TIMEOUT else None,
    )
