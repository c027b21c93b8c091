"""Whose fault was it, and what is next: the classes A to L of a failed attempt, and the decision to try another server.

* Nothing that a client did wrong is repeated or held against a server (class J).
* All attempts of a request go to different servers, at most one more to the only one there is, and only when it was not reached.
* No retry sleeps past the deadline, and all retries of a model together stay within a budget.
"""

import re
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from enum import StrEnum

import attrs
import msgspec

from multiverse_gateway.core.errors import (
    BackendBusy,
    GatewayError,
    NoHealthyServer,
    UpstreamAuthFailed,
    UpstreamBadResponse,
    UpstreamTimeout,
)
from multiverse_gateway.core.servers import ServerId


class FailureClass(StrEnum):
    """What went wrong before the commit point."""

    CONNECT = "A"
    BROKEN = "B"
    TIMEOUT = "C"
    SERVER_ERROR = "D"
    BUSY = "E"
    NO_MODEL = "F"
    UNSUPPORTED = "G"
    AUTH = "H"
    TRANSIENT = "I"
    CLIENT_ERROR = "J"
    NONSENSE = "K"
    LOCAL = "L"


@attrs.frozen(kw_only=True)
class Failure:
    """The end of an attempt that brought no answer; `reason` is in words and holds nothing internal."""

    kind: FailureClass
    reason: str
    status: int | None = None
    retry_after: float | None = None
    body: bytes = attrs.field(default=b"", repr=False)
    content_type: bytes = b"application/json"


@attrs.frozen(kw_only=True)
class Attempt:
    """One failed attempt."""

    server_id: ServerId
    failure: Failure


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often and how fast; seconds."""

    max_retries: int = 2
    backoff: float = 0.1
    same_server_delay: float = 0.25
    min_remaining: float = 5.0


@attrs.frozen(kw_only=True)
class Retry:
    """Try again after `delay` seconds, on another server unless `same_server`."""

    delay: float
    same_server: bool = False


@attrs.frozen(kw_only=True)
class GiveUp:
    """Tell the client: our own error, or the server's answer as it was."""

    error: GatewayError | None = None
    relay: Failure | None = None


_TUNNEL = re.compile(rb"ERR_NGROK_|error code: 1033|cloudflared", re.IGNORECASE)
_NO_MODEL = re.compile(rb"model_not_found|model ['\"\\][^\n]{0,300}not found|does not exist", re.IGNORECASE)


def parse_retry_after(value: bytes | None, now_wall: float) -> float | None:
    """Return the seconds of a `Retry-After`, which may be a number or a date; `None` for anything odd or past (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now_wall
        except (ValueError, OverflowError):
            return None
    return seconds if 0 < seconds < 1e9 else None


def check_json(body: bytes) -> bool:
    """Tell whether a body is a JSON object or list."""
    if body.lstrip()[:1] not in (b"{", b"["):
        return False
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (ValueError, RecursionError):
        return False
    return True


def classify(
    status: int, headers: Mapping[bytes, bytes], body: bytes | None, *, stream: bool, checks_json: bool, now_wall: float
) -> Failure | None:
    """Return what is wrong with an answer, or `None` for a good one.

    With a good status only the head is judged. `checks_json` tells that the path answers in JSON or events; `headers` are in lower case.
    """
    content_type = headers.get(b"content-type", b"application/octet-stream")
    kind = content_type.partition(b";")[0].strip().lower()
    is_html = kind == b"text/html"
    if b"ngrok-error-code" in headers or status == 530 or (is_html and body is not None and _TUNNEL.search(body)):
        return Failure(kind=FailureClass.BROKEN, reason="the tunnel to the server is offline", status=status)
    if 200 <= status < 300:
        return _classify_head(status, headers, kind, stream=stream, checks_json=checks_json)

    def shown(kind: FailureClass, reason: str, retry_after: float | None = None) -> Failure:
        return Failure(kind=kind, reason=reason, status=status, retry_after=retry_after, body=body or b"", content_type=content_type)

    if status in (429, 503):
        wait = parse_retry_after(headers.get(b"retry-after"), now_wall)
        return shown(FailureClass.BUSY, f"the server is busy (status {status})", wait)
    if status == 404 and _NO_MODEL.search(body or b""):
        return shown(FailureClass.NO_MODEL, "the server does not have this model")
    if status in (404, 405, 501):
        return shown(FailureClass.UNSUPPORTED, f"the server does not know this call (status {status})")
    if status in (401, 403):
        return Failure(kind=FailureClass.AUTH, reason="the server refuses the key that is stored for it", status=status)
    if status in (408, 425):
        return Failure(kind=FailureClass.TRANSIENT, reason=f"the server asked to try again (status {status})", status=status)
    if 400 <= status < 500:
        return shown(FailureClass.CLIENT_ERROR, f"the server refused the request (status {status})")
    if 500 <= status < 600 and status != 505:
        return Failure(kind=FailureClass.SERVER_ERROR, reason=f"the server failed (status {status})", status=status)
    return Failure(kind=FailureClass.NONSENSE, reason=f"an answer with the status {status}", status=status)


def _classify_head(status: int, headers: Mapping[bytes, bytes], kind: bytes, *, stream: bool, checks_json: bool) -> Failure | None:
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
        return Failure(kind=FailureClass.NONSENSE, reason="a compressed answer, which was not asked for", status=status)
    if not checks_json:
        return None
    if status != 200:
        return Failure(kind=FailureClass.NONSENSE, reason=f"an answer with the status {status}", status=status)
    if stream and kind != b"text/event-stream":
        return Failure(kind=FailureClass.NONSENSE, reason="no stream of events, which was asked for", status=status)
    if not stream and kind not in (b"application/json", b"application/octet-stream"):
        return Failure(kind=FailureClass.NONSENSE, reason="an answer that is not JSON", status=status)
    return None


def after_failure(
    attempts: Sequence[Attempt],
    *,
    others: int,
    policy: RetryPolicy,
    remaining: float,
    stateful: bool,
    budget_left: bool,
    chance: float,
) -> Retry | GiveUp:
    """Decide what follows the last attempt.

    `others` counts usable servers that were not tried, `remaining` the seconds to the deadline; `stateful` requests are repeated only
    when the server was never reached.
    """
    kind = attempts[-1].failure.kind
    repeatable = kind is FailureClass.CONNECT if stateful else kind not in (FailureClass.CLIENT_ERROR, FailureClass.LOCAL)
    if not repeatable or not budget_left or len(attempts) > policy.max_retries:
        return final_error(attempts)
    if kind is FailureClass.TIMEOUT and remaining < policy.min_remaining:
        return final_error(attempts)
    if others:
        delay = 0.0 if kind is FailureClass.BUSY else policy.backoff * chance
        return Retry(delay=delay) if delay < remaining else final_error(attempts)
    if kind is FailureClass.CONNECT and len(attempts) == 1 and policy.same_server_delay < remaining:
        return Retry(delay=policy.same_server_delay, same_server=True)
    return final_error(attempts)


def final_error(attempts: Sequence[Attempt]) -> GiveUp:
    """Return what the client is told when no attempt is left; there was at least one."""
    last = attempts[-1].failure
    match last.kind:
        case FailureClass.CLIENT_ERROR | FailureClass.NO_MODEL | FailureClass.UNSUPPORTED:
            return GiveUp(relay=last)
        case FailureClass.BUSY:
            wait = last.retry_after if last.retry_after is not None else 5.0
            message = "Every server of this model is busy. Wait as long as Retry-After says, then send the request again."
            refusal = BackendBusy if last.status == 429 else NoHealthyServer
            return GiveUp(error=refusal(message, retry_after=min(60.0, wait)))
        case FailureClass.AUTH:
            return GiveUp(
                error=UpstreamAuthFailed(
                    "The server refuses the key that its owner stored for it; your own key is fine. "
                    "Choose another model, or tell the owner to update the server's key."
                )
            )
        case FailureClass.NONSENSE:
            return GiveUp(error=UpstreamBadResponse(f"No server gave a usable answer: {_listed(attempts)}. Choose another model."))
    return GiveUp(error=UpstreamTimeout(f"No server answered: {_listed(attempts)}. Try again later, or choose another model."))


def _listed(attempts: Sequence[Attempt]) -> str:
    return "; ".join(f"attempt {number}: {attempt.failure.reason}" for number, attempt in enumerate(attempts, 1))
