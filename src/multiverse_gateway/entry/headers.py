"""The headers that every answer gets, by the path that was asked for.

What comes from below `/v1` may have been written by a model server, and anybody may register one. Its content type is a harmless one
already (`core.content_types`); `nosniff` keeps browsers from guessing another, and the policy leaves a document without scripts, forms
and an origin of its own, should one ever be shown all the same.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from multiverse_gateway.core.origins import OriginPolicy
from multiverse_gateway.core.paths import is_below

Header = tuple[bytes, bytes]

API_HEADERS: tuple[Header, ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"sandbox; default-src 'none'"),
)
PAGE_HEADERS: tuple[Header, ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
)
NO_STORE: Header = (b"cache-control", b"no-store")

EXPOSED_HEADERS = (
    "x-request-id",
    "x-gateway-server-id",
    "x-multiverse-server",
    "x-multiverse-model",
    "x-multiverse-attempts",
    "x-multiverse-queued-ms",
    "x-multiverse-queue-length",
    "x-multiverse-truncated",
    "x-multiverse-why",
    "x-should-retry",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "retry-after",
    "retry-after-ms",
    "request-id",
    "allow",
    "www-authenticate",
)
"""The headers of ours that CORS lets pages of other origins read; browsers show them only a few without."""


def with_defaults(headers: Iterable[Header], defaults: Iterable[Header]) -> list[Header]:
    """Return headers completed by those of the defaults that are not set yet."""
    present = list(headers)
    names = {name.lower() for name, _ in present}
    return present + [(name, value) for name, value in defaults if name not in names]


def path_of(scope: Any) -> str:
    """Return the path below the place where the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def headers_for(path: str) -> list[Header]:
    """Return what the answer to a request for a path gets, unless it says otherwise itself."""
    if is_below(path, "/v1"):
        return [*with_defaults(API_HEADERS, PAGE_HEADERS), NO_STORE]
    return [*PAGE_HEADERS, NO_STORE] if is_below(path, "/admin") else list(PAGE_HEADERS)


def cors_headers(names: Mapping[bytes, bytes], policy: OriginPolicy) -> list[tuple[bytes, bytes]]:
    """Return what lets a page of an allowed origin read the answer: for the door that no middleware stands before."""
    origin = names.get(b"origin")
    if origin is None or not policy.allows(origin):
        return []
    exposed = (b"access-control-expose-headers", ", ".join(EXPOSED_HEADERS).encode())
    if policy.allows_any:
        return [(b"access-control-allow-origin", b"*"), exposed]
    return [(b"access-control-allow-origin", origin), exposed, (b"vary", b"Origin")]
