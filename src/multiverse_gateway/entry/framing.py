"""What the head of a request may look like, so that it can be read in one way only and comes from no form of another site.

Both doors hold these rules, after a parser that is strict by itself (llhttp, h11 or h2):

1. There is one host at most. A length is digits and nothing else, and the only transfer coding is `chunked`.
2. The length of the body is stated once, by `Content-Length` or by `Transfer-Encoding`. A server or proxy that believed the other one would
   take a part of the body for the next request.
3. A request that a gateway has passed on is refused, so that gateways which are registered with each other make no circle.
4. The body is not compressed: its model could not be read, and a small body could become a huge one.
5. A `POST` is refused if a form on a page of another site could have sent it.
"""

import re
from collections.abc import Mapping

from multiverse_gateway.core.errors import (
    CompressedRequest,
    ForeignForm,
    GatewayError,
    LoopDetected,
    UnknownURL,
)
from multiverse_gateway.core.origins import OriginPolicy
from multiverse_gateway.entry.asgi_types import Scope
from multiverse_gateway.entry.error_responses import BadFraming
from multiverse_gateway.entry.identity import Headers

HOP = b"x-multiverse-hop"


def refuse_bad_framing(headers: Headers) -> GatewayError | None:
    """Return why a request could be read as two different ones, or `None` (RFC 9112, 6.3: request smuggling).

    The connection is closed after the answer.
    """
    hosts = lengths = codings = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            lengths += 1
            if not value.isdigit():
                return BadFraming("The Content-Length header is not a number; send the length of the body in bytes")
        elif name == b"transfer-encoding":
            codings += 1
            if value.strip().lower() != b"chunked":
                return BadFraming("The Transfer-Encoding header is not chunked; send the body with a Content-Length, or chunked")
    if hosts > 1:
        return BadFraming("The request has several Host headers; send one")
    if lengths + codings > 1:
        return BadFraming(
            "The request states the length of its body more than once; send Content-Length or Transfer-Encoding, and only once"
        )
    return None


def refuse_loop(headers: Headers) -> GatewayError | None:
    """Return the refusal of a request that came through a gateway before, or `None`."""
    if HOP in dict(headers):
        return LoopDetected("This request has already passed through a gateway; register the model's own server instead of a gateway")
    return None


def asks_for_websocket(method: str, headers: Headers) -> bool:
    """Return whether a request is the beginning of a WebSocket: of HTTP/1.1 (RFC 6455, 4.1) or of HTTP/2 (RFC 8441)."""
    if method != "GET":
        return method == "CONNECT"
    return any(name == b"upgrade" and b"websocket" in value.lower() for name, value in headers)


def no_websocket(path: str) -> UnknownURL:
    """Return the refusal of a WebSocket; the gateway has none."""
    shown = path[:128].encode(errors="replace").decode()
    return UnknownURL(f"There is no WebSocket at {shown}; send the request over plain HTTP, and set `stream` to stream the answer")


def refuse_compression(headers: Headers) -> GatewayError | None:
    """Return the refusal of a body in a content coding, or `None`; decoded, a small body could become a huge one."""
    codings = b",".join(value for name, value in headers if name == b"content-encoding").decode("latin-1").lower().split(",")
    coding = next((applied for applied in map(str.strip, codings) if applied not in ("", "identity")), None)
    if coding is None:
        return None
    shown = coding if _CODING.fullmatch(coding) else "an unknown encoding"
    return CompressedRequest(
        f"The request body is compressed ({shown}), but the gateway accepts only plain JSON. Turn off request compression in your client; "
        "in Codex, set `enable_request_compression = false` under `[features]` in config.toml."
    )


_TELLING = frozenset({b"transfer-encoding", b"content-encoding", HOP})
"""Without one of these, and with no name twice, there is nothing to look at more closely."""
_CODING = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,32}")


def check_head(headers: Headers, names: Mapping[bytes, bytes]) -> None:
    """Let pass only a head that can be read in one way and did not come through a gateway before; `names` is a dictionary of it.

    Raises:
        GatewayError: It does not.
    """
    # The usual head: no name comes twice, and none that any of the rules is about. It saves three passes over the headers.
    if len(names) == len(headers) and _TELLING.isdisjoint(names) and names.get(b"content-length", b"0").isdigit():
        return
    refused = refuse_bad_framing(headers) or refuse_loop(headers) or refuse_compression(headers)
    if refused is not None:
        try:
            raise refused
        finally:
            del refused  # else this frame and the error keep each other alive, and with them all that was read of the request


def check_site(names: Mapping[bytes, bytes], policy: OriginPolicy) -> None:
    """Let pass only a `POST` that no page of another site can have sent as a form.

    Raises:
        ForeignForm: A page of another site sent it, or may have.
    """
    if policy.is_foreign_form(names):
        raise ForeignForm(
            "This request looks like a form sent by a web page of another site. Send it as application/json; for a web app on another "
            "origin, ask the operator of this gateway to allow it (ENABLE_CORS, CORS_ORIGINS)."
        )


def check_request(method: str, headers: Headers, names: Mapping[bytes, bytes], policy: OriginPolicy) -> None:
    """Check the head of a request to the inference API: its framing first, then the site that a `POST` comes from.

    Raises:
        GatewayError: As `check_head` and `check_site` do.
    """
    check_head(headers, names)
    if method == "POST":
        check_site(names, policy)


def declared_length(headers: Headers) -> int | None:
    """Return what `Content-Length` says, or `None`."""
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def may_have_body(scope: Scope) -> bool:
    """Return whether something may follow the request's head."""
    names = {name for name, _ in scope["headers"]}
    if str(scope.get("http_version", "1.1")).startswith("1"):
        return b"transfer-encoding" in names or bool(declared_length(scope["headers"]))
    return scope["method"] not in ("GET", "HEAD", "OPTIONS", "TRACE")
