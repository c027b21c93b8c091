"""What a server's answer means, whether the gateway retries, and what the client sees when no attempt is left.

    class                retried elsewhere          seen by the client if no attempt is left
    A  connect           yes                        504
    B  broken            yes                        504
    C  timeout           if time remains            504
    D  server error      yes                        504, lists the attempts
    E  busy              yes, at once               429, 503 or 529, with Retry-After
    F  no such model     yes                        status and body of the last server
    G  unsupported       yes                        last body unchanged
    H  refused           once, if it is JSON        502, never 401: the user's key is fine
    I  transient         yes                        504
    J  client error      never                      status and body unchanged
    K  nonsense          yes                        502
    L  local             never                      503

The class of the last attempt decides what the client sees. A stateful request, which leaves something behind on a server, is retried
after A, E, F, G, H and I only: then the server refused before it did anything. Each attempt goes to another server, with one exception:
a stateless request whose kept connection ended unanswered is sent once more, on a new connection to the same server.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import lru_cache
from math import ceil
from typing import assert_never

from attrs import evolve, frozen

from multiverse_gateway.core.addresses import AddressRefusal
from multiverse_gateway.core.answers import check_json, reported_status
from multiverse_gateway.core.content_types import JSON, TEXT, is_identity, relayed_type
from multiverse_gateway.core.errors import (
    BackendBusy,
    BackendOverloaded,
    GatewayError,
    NoHealthyServer,
    Overloaded,
    UpstreamAuthFailed,
    UpstreamBadResponse,
    UpstreamTimeout,
)
from multiverse_gateway.core.refusals import lacks_endpoint, lacks_model
from multiverse_gateway.core.servers import ServerId

DEFAULT_REST = 1.0
"""Seconds to wait for a busy server that does not say how long."""
LONGEST_REST = 60.0
"""Seconds; a longer Retry-After of a server is cut to this."""

_TUNNEL_MARKS = (b"ERR_NGROK_", b"error code: 1033")
_SECONDS = re.compile(rb"\d{1,18}(?:\.\d{1,18})?")
_MAX_DATE = 64


class FailureClass(StrEnum):
    """Why an attempt failed; the letters are those of the table above."""

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


class ConnectFailure(StrEnum):
    """At what a connection to a server failed. `RESOLVE`: its name has no address; `REFUSED_ADDRESS`: its address may not be dialed.

    `NO_TLS`: the server answers, but not in TLS. `TLS_TIMEOUT`: the port is open, and no answer in TLS came in time.
    """

    RESOLVE = "resolve"
    REFUSED_ADDRESS = "refused_address"
    TIMEOUT = "timeout"
    REFUSED = "refused"
    TLS = "tls"
    NO_TLS = "no_tls"
    TLS_TIMEOUT = "tls_timeout"
    OTHER = "other"


@frozen
class Failure:
    """How one attempt ended. `reason` is for people: words, no address, nothing internal. `retry_after` is in seconds, not capped.

    `status` and `body` are those of the server's answer, if there was one, and `content_type` is one that may be relayed.
    `after_request`: the server had the request, or a part of it, when the connection broke. `is_stale`: a kept connection ended
    unanswered, which the server may have closed before the request was written. `connect` says at what a failure of class A failed, and
    `refusal` why the gateway may not connect to this address. `may_hold_error`: only the head is known; the body may report another error.
    """

    kind: FailureClass
    reason: str
    status: int | None = None
    retry_after: float | None = None
    body: bytes = b""
    content_type: bytes = JSON
    after_request: bool = False
    is_stale: bool = False
    connect: ConnectFailure | None = None
    refusal: AddressRefusal | None = None
    may_hold_error: bool = False

    @property
    def is_final(self) -> bool:
        """Return whether a client that gets this answer must not repeat the request: the model is missing, or the body is too large."""
        return self.kind is FailureClass.NO_MODEL or self.status == 413


@frozen
class FailedAttempt:
    """One failed request to one server; `has_key` says whether the gateway sent a key that it keeps for the server."""

    server_id: ServerId
    failure: Failure
    has_key: bool = False

    def without_body(self) -> "FailedAttempt":
        """Return it without the body of the server's answer, which may be large."""
        return evolve(self, failure=evolve(self.failure, body=b""))


@frozen(kw_only=True)
class RetryPolicy:
    """When another attempt may be made. All but `max_retries` are seconds.

    `backoff` is the longest pause before another server, `same_server_delay` that before the only one; after a timeout at least
    `min_remaining` of the deadline must be left. A retry over the budget checks for room every `budget_delay`, for `budget_wait` at
    most, and never past half of what is left of the deadline.
    """

    max_retries: int = 2
    backoff: float = 0.1
    same_server_delay: float = 0.25
    min_remaining: float = 5.0
    budget_delay: float = 0.25
    budget_wait: float = 10.0


@frozen
class Retry:
    """Make another attempt after `delay` seconds: on another server, or on the same one again; `waits` for the model's retry budget."""

    delay: float
    same_server: bool = False
    waits: bool = False


@frozen
class GiveUp:
    """Answer the client: with `error`, or else with status, body and content type of `relay`."""

    error: GatewayError | None = None
    relay: Failure | None = None


def classify(
    status: int,
    headers: Mapping[bytes, bytes],
    body: bytes | None,
    *,
    stream: bool,
    checks_json: bool,
    now_wall: float,
    request: bytes = b"",
    names_response: bool = False,
    answered_before: bool = False,
) -> Failure | None:
    """Return what is wrong with an answer; `None` is a good one.

    Names in `headers` are lower case. `body` is `None` while only the head of a good status is known; of any other status it is
    the whole body, or its first 64 KiB. `checks_json` holds for the paths whose answers are JSON or events. `request` is the body of
    the request: words that the server only repeats from it say nothing about the server. `names_response`: the request carries the id
    of a stored response, so that "not found" speaks of that one. `answered_before`: the server has answered this call, so that a page
    that says "not found" is its tunnel's.

    >>> print(classify(200, {b"content-type": b"application/json"}, None, stream=False, checks_json=True, now_wall=0.0))
    None
    >>> classify(503, {b"retry-after": b"3"}, b"", stream=False, checks_json=True, now_wall=0.0).kind
    <FailureClass.BUSY: 'E'>
    """
    kind = headers.get(b"content-type", b"")
    if status == 530 or b"ngrok-error-code" in headers:
        return Failure(FailureClass.BROKEN, _OFFLINE, status)
    if body is not None and _is_tunnel_page(status, kind, body, answered_before=answered_before):
        # The page may be the server's own and repeat words of the request, so a probe decides.
        return Failure(FailureClass.BROKEN, _OFFLINE, status, after_request=True)
    if 200 <= status < 300:
        return _nonsense(status, headers.get(b"content-encoding"), kind, stream, checks_json)
    meaning, reason = _meaning(status, body or b"", request, names_response)
    if meaning in _RELAYED and not is_identity(headers.get(b"content-encoding")):
        meaning, reason = FailureClass.NONSENSE, _COMPRESSED
    return Failure(
        meaning,
        reason,
        status,
        parse_retry_after(headers.get(b"retry-after"), now_wall),
        body or b"",
        relayed_type(kind, checks_json),
    )


def unusable_head(status: int, headers: Mapping[bytes, bytes], *, stream: bool, checks_json: bool) -> Failure | None:
    """Return what is wrong with the head of an answer with status 2xx, as `classify` does before the body is known.

    >>> unusable_head(200, {b"content-type": b"application/json"}, stream=False, checks_json=True) is None
    True
    """
    if b"ngrok-error-code" in headers:
        return Failure(FailureClass.BROKEN, _OFFLINE, status)
    return _nonsense(status, headers.get(b"content-encoding"), headers.get(b"content-type", b""), stream, checks_json)


def classify_report(
    report: bytes, headers: Mapping[bytes, bytes], *, now_wall: float, request: bytes = b"", names_response: bool = False
) -> Failure:
    """Return the failure that a server reports with status 200: as a whole answer, or as the first event of a stream.

    Its class is that of the numeric `code` in it, and else of its words; without either it is a server error. `report` is the body, or the
    data of the event; the other parameters are those of `classify`.

    >>> classify_report(b'{"error": {"code": 429, "message": "slow down"}}', {}, now_wall=0.0).kind
    <FailureClass.BUSY: 'E'>
    >>> classify_report(b'{"error": "Unexpected endpoint"}', {}, now_wall=0.0).kind
    <FailureClass.UNSUPPORTED: 'G'>
    """
    status = reported_status(report)
    kind, reason = FailureClass.SERVER_ERROR, "reported an error with status 200"
    if status is None and (lacks_endpoint(report, request) or lacks_model(report, request)):
        status = 404
        names_response = names_response and not lacks_endpoint(report, request)
    if status is not None:
        kind, reason = _meaning(status, report, request, names_response)
    return Failure(
        kind,
        reason,
        status,
        parse_retry_after(headers.get(b"retry-after"), now_wall),
        report,
        JSON if check_json(report) else TEXT,
    )


JSON_FOR_STREAM = "the answer to a streaming request is JSON"
_OFFLINE = "the server's tunnel is offline"
_COMPRESSED = "the answer is compressed, although the gateway did not ask for that"
_RELAYED = frozenset({FailureClass.NO_MODEL, FailureClass.UNSUPPORTED, FailureClass.CLIENT_ERROR})


# Saves 0.1 µs per answer; a server sends few different values.
@lru_cache(maxsize=64)
def media_type(content_type: bytes) -> bytes:
    """Return the type without its parameters.

    >>> media_type(b"Text/Event-Stream; charset=utf-8")
    b'text/event-stream'
    """
    return content_type.partition(b";")[0].strip().lower()


def _is_tunnel_page(status: int, kind: bytes, body: bytes, *, answered_before: bool) -> bool:
    if status == 404 and answered_before and not check_json(body):
        return True
    return not _is_json(media_type(kind)) and any(mark in body for mark in _TUNNEL_MARKS)


def _meaning(status: int, body: bytes, request: bytes, names_response: bool) -> tuple[FailureClass, str]:
    reason = f"answered with status {status}"
    match status:
        case 401 | 403:
            return FailureClass.AUTH, f"the request was refused with status {status}"
        case 429 | 503 | 529:
            return FailureClass.BUSY, f"busy (status {status})"
        case 400 | 404 if names_response:
            return FailureClass.CLIENT_ERROR, reason
        case 400 | 404 | 422 if lacks_model(body, request):
            return FailureClass.NO_MODEL, "the server does not have this model"
        case 404 | 405 | 501:
            return FailureClass.UNSUPPORTED, f"the server does not support this endpoint (status {status})"
        case 408 | 425:
            return FailureClass.TRANSIENT, reason
        case 505:
            return FailureClass.NONSENSE, reason
        case _ if 400 <= status < 500:
            return FailureClass.CLIENT_ERROR, reason
        case _ if 500 <= status < 600:
            return FailureClass.SERVER_ERROR, reason
    return FailureClass.NONSENSE, "a redirect, which the gateway does not follow" if 300 <= status < 400 else reason


@lru_cache(maxsize=64)
def _nonsense(status: int, coding: bytes | None, kind: bytes, stream: bool, checks_json: bool) -> Failure | None:
    """Return what is wrong with the head of a 2xx answer; cached, because few of them differ."""
    media, nonsense = media_type(kind), FailureClass.NONSENSE
    if status not in ((200,) if checks_json else (200, 201, 202)):
        return Failure(nonsense, f"answered with status {status}", status)
    if not is_identity(coding):
        return Failure(nonsense, _COMPRESSED, status)
    if media in (b"text/html", b"application/xhtml+xml"):
        return Failure(nonsense, "the answer is a web page", status)
    if stream:
        if checks_json and (not media or _is_json(media)):
            return Failure(nonsense, JSON_FOR_STREAM, status, may_hold_error=True)
        if _is_json(media) or (checks_json and media != b"text/event-stream"):
            return Failure(nonsense, "the answer to a streaming request is not a stream", status)
    elif checks_json and media and not _is_json(media):
        return Failure(nonsense, "the answer is not JSON", status)
    return None


def _is_json(media: bytes) -> bool:
    return media == JSON or media.endswith(b"+json")


def parse_retry_after(value: bytes | None, now_wall: float) -> float | None:
    """Return the seconds that a Retry-After asks for, as a number or a date (RFC 9110, 10.2.3); `None` for garbage and for the past.

    >>> parse_retry_after(b"3", 0.0), parse_retry_after(b"Thu, 01 Jan 1970 00:00:09 GMT", 2.0), parse_retry_after(b"-1", 0.0)
    (3.0, 7.0, None)
    """
    if value is None:
        return None
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    if len(value) > _MAX_DATE:
        return None
    try:
        date = parsedate_to_datetime(value.decode("ascii"))
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now_wall
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return seconds if seconds > 0 else None


_UNBUDGETED = frozenset({FailureClass.CONNECT, FailureClass.BROKEN})
"""A server that fails so is taken out at once: its requests move once, and cannot become a storm."""
_NEVER = frozenset({FailureClass.CLIENT_ERROR, FailureClass.LOCAL})
_HARMLESS = frozenset(
    {
        FailureClass.CONNECT,
        FailureClass.BUSY,
        FailureClass.NO_MODEL,
        FailureClass.UNSUPPORTED,
        FailureClass.AUTH,
        FailureClass.TRANSIENT,
    }
)
"""After these a stateful request may be sent again: the server refused it before it did anything."""


def after_failure(
    attempts: Sequence[FailedAttempt],
    *,
    others: int,
    policy: RetryPolicy,
    remaining: float,
    stateful: bool,
    budget_left: bool,
    random: float,
    repeated: bool = False,
) -> Retry | GiveUp:
    """Decide what follows the last of `attempts`, which are all the failed attempts so far.

    `repeated`: one more attempt was made that is not a failure: the gateway sent the request again without a field that it had added.
    `others` is the number of usable servers not tried yet, `remaining` the seconds left of the deadline, `random` a random number
    in [0, 1).
    """
    failure = attempts[-1].failure
    kind = failure.kind
    if len(attempts) + repeated > policy.max_retries or kind in _NEVER or (stateful and kind not in _HARMLESS):
        return final_error(attempts)
    if kind is FailureClass.AUTH and not _may_be_the_servers_own(attempts):
        return final_error(attempts)
    retry = _next(failure, len(attempts), others, policy, random)
    if retry is not None and not budget_left and kind not in _UNBUDGETED:
        retry = Retry(policy.budget_delay, waits=True)
    needed = policy.min_remaining if kind is FailureClass.TIMEOUT else 0.0
    if retry is None or remaining <= retry.delay or remaining < needed:
        return final_error(attempts)
    return retry


def _may_be_the_servers_own(attempts: Sequence[FailedAttempt]) -> bool:
    """Return whether a refusal may be about the server's key: the first of this request, in JSON, not the page of a firewall."""
    refusals = [attempt.failure for attempt in attempts if attempt.failure.kind is FailureClass.AUTH]
    return len(refusals) == 1 and check_json(refusals[0].body)


def _next(failure: Failure, made: int, others: int, policy: RetryPolicy, random: float) -> Retry | None:
    if failure.is_stale:
        return Retry(0.0, same_server=True)
    if others > 0:
        return Retry(0.0 if failure.kind is FailureClass.BUSY else policy.backoff * random)
    if failure.kind is FailureClass.CONNECT and made == 1:
        return Retry(policy.same_server_delay, same_server=True)
    return None


def final_error(attempts: Sequence[FailedAttempt]) -> GiveUp:
    """Return what the client sees when no attempt is left; the last attempt decides, and there was at least one."""
    last = attempts[-1].failure
    match last.kind:
        case FailureClass.NO_MODEL | FailureClass.UNSUPPORTED | FailureClass.CLIENT_ERROR:
            return GiveUp(relay=last)
        case FailureClass.BUSY:
            return GiveUp(_busy(attempts, last))
        case FailureClass.AUTH:
            return GiveUp(UpstreamAuthFailed(_refused(attempts[-1])))
        case FailureClass.NONSENSE:
            return GiveUp(
                UpstreamBadResponse(
                    f"The model's server gave no usable answer: {last.reason}. Try again later, choose another model, or tell its owner."
                )
            )
        case FailureClass.LOCAL:
            return GiveUp(
                Overloaded("The gateway could not process the request. Send it again in a few seconds.", retry_after=DEFAULT_REST)
            )
        case FailureClass.CONNECT | FailureClass.BROKEN | FailureClass.TIMEOUT | FailureClass.SERVER_ERROR | FailureClass.TRANSIENT:
            return GiveUp(UpstreamTimeout(_all_failed(attempts)))
        case _:
            assert_never(last.kind)


def _refused(attempt: FailedAttempt) -> str:
    if attempt.has_key:
        return (
            "The model's server rejected the API key that the gateway stores for it; your own key is fine. "
            "Ask the server's owner to update that key, or choose another model."
        )
    return (
        f"The model's server refused the request (status {attempt.failure.status}); your own key is fine. "
        "Ask the server's owner: it may need an API key, or its tunnel may send a Host header that it does not accept. "
        "Or choose another model."
    )


def _busy(attempts: Sequence[FailedAttempt], last: Failure) -> GatewayError:
    waits = [attempt.failure.retry_after or DEFAULT_REST for attempt in attempts if attempt.failure.kind is FailureClass.BUSY]
    return busy_error(last.status, min(LONGEST_REST, *waits))


def busy_error(status: int | None, wait: float) -> GatewayError:
    """Return what the client sees when every server asked for a pause: by the status that it sent, and the seconds until one returns."""
    kinds: Mapping[int | None, type[GatewayError]] = {429: BackendBusy, 529: BackendOverloaded}
    kind = kinds.get(status, NoHealthyServer)
    return kind(f"Every server of this model is busy. Try again in {max(1, ceil(wait))} s.", retry_after=wait)


def _all_failed(attempts: Sequence[FailedAttempt]) -> str:
    failures = [attempt.failure for attempt in attempts]
    reasons = dict.fromkeys(failure.reason if failure.status is None else f"status {failure.status}" for failure in failures)
    made = "1 attempt" if len(attempts) == 1 else f"{len(attempts)} attempts"
    return f"The model did not answer ({made}: {', '.join(reasons)}). Try again later, choose another model, or tell the server's owner."
