"""The one spelling of each API path: clients write their base URL with `/v1` or without, with a slash too many, or as a whole URL.

`api_path` runs before any rule of the gateway, at both doors, so that keys, quotas, limits and routing see `/v1/...` only. It makes API
paths, and nothing else: a path that becomes none is returned as it came. So no spelling leads to the admin API or to a page that would
not have led there without it.
"""

import re
from typing import Final

PREFIX: Final = "/v1"

CALLS: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/rerank",
        "/v1/reranking",
        "/v1/score",
        "/v1/moderations",
        "/v1/audio/speech",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/images/variations",
    }
)
"""The calls that clients are known to make, all by POST; any other path below `/v1` is relayed as well if its body names a model."""

OWN_SEGMENTS: Final = frozenset(call.split("/")[index] for call in CALLS for index in (1, 2)) | {
    *("v2", "models", "api", "admin", "health", "livez", "readyz", "metrics", "openapi.json", "docs"),
    *("login", "logout", "session", "link", "static", "live", "wall"),
    *("dashboard", "register", "server", "test", "playground", "keys", "usage", "logs", "settings"),
}
"""What the gateway's own paths begin with. A proxy cannot serve it below one of them: `/chat/completions` would mean two calls."""

_ROOT: Final = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)*")
_UNPREFIXED: Final = frozenset(call.removeprefix(PREFIX) for call in CALLS)
_OTHER_NAMES: Final = {"/v2/rerank": "/v1/rerank"}
_OWN: Final = re.compile(r"/v1/(?:models|queue)(?:/|\Z)")
_ORIGIN: Final = re.compile(r"https?://[^/?#]+", re.IGNORECASE)
_SLASHES: Final = re.compile(r"/{2,}")
_BEGINNINGS: Final = "|".join(sorted({call.split("/")[2] for call in CALLS} | {"models", "files"}))
_TWICE: Final = re.compile(rf"({'|'.join(sorted(CALLS, key=len, reverse=True))})/(?:v1/)?(?:{_BEGINNINGS})(?:/|$)")


def is_below(path: str, prefix: str) -> bool:
    """Return whether a path is the prefix, which has no slash at its end, or lies under it.

    >>> is_below("/v1", "/v1"), is_below("/v1/models", "/v1"), is_below("/v10", "/v1")
    (True, True, False)
    """
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/")


def is_api(path: str) -> bool:
    """Return whether a path belongs to the inference API.

    >>> is_api("/v1"), is_api("/v1/models"), is_api("/v10")
    (True, True, False)
    """
    return is_below(path, PREFIX)


def is_own(path: str) -> bool:
    """Return whether the gateway itself answers an API path, from what it knows: these calls are only read.

    >>> is_own("/v1/models/llama"), is_own("/v1/queue"), is_own("/v1/queues")
    (True, True, False)
    """
    return _OWN.match(path) is not None


def without_origin(target: str) -> str:
    """Return a request target without the origin that its absolute form begins with (RFC 9112, 3.2.2).

    >>> without_origin("http://host:8000/v1/models"), without_origin("/v1/models")
    ('/v1/models', '/v1/models')
    """
    origin = _ORIGIN.match(target)
    return target[origin.end() :] if origin else target


def is_root(root: str) -> bool:
    """Return whether a proxy can serve the gateway below a path, which has no slash at its end.

    >>> is_root("/ai/gateway"), is_root(""), is_root("ai"), is_root("/admin"), is_root("/a/../b")
    (True, True, False, False, False)
    """
    return not root or (_ROOT.fullmatch(root) is not None and root.split("/")[1] not in OWN_SEGMENTS)


def below(path: str, root: str) -> str:
    """Return a path without the root below which a proxy serves the gateway; some proxies leave it in the path, others take it off.

    >>> below("/ai/v1/models", "/ai"), below("/v1/models", "/ai"), below("/ai", "/ai"), below("/aim", "/ai")
    ('/v1/models', '/v1/models', '/', '/aim')
    """
    if root and is_below(path, root):
        return path[len(root) :] or "/"
    return path


def api_path(method: str, path: str, *, wants_page: bool = False) -> str:
    """Return the path that the gateway's rules see for a decoded request target without its query.

    Repeated slashes count as one, a slash at the end as none, the origin of an absolute-form target is left out, and the known calls may
    be made without `/v1`; so may a browser's CORS preflight (OPTIONS). `wants_page` holds for a browser, which
    gets the page `/models` and what belongs to it.

    >>> api_path("POST", "//v1//chat/completions/"), api_path("POST", "/chat/completions"), api_path("POST", "http://host/v1/embeddings")
    ('/v1/chat/completions', '/v1/chat/completions', '/v1/embeddings')
    >>> api_path("POST", "//admin/register"), api_path("GET", "/models", wants_page=True)
    ('//admin/register', '/models')
    """
    if path.startswith("/v1/") and "//" not in path and path[-1] != "/":  # nearly all
        return path
    normalized = _SLASHES.sub("/", without_origin(path))
    if normalized.endswith("/"):
        normalized = normalized[:-1]
    normalized = _OTHER_NAMES.get(normalized, normalized)
    if is_api(normalized):
        return normalized
    may_lack_prefix = (
        normalized.startswith("/responses/")
        or (method in ("POST", "OPTIONS") and normalized in _UNPREFIXED)
        or (method in ("GET", "HEAD", "OPTIONS") and not wants_page and (normalized == "/models" or normalized.startswith("/models/")))
    )
    return PREFIX + normalized if may_lack_prefix and "/." not in normalized else path


def hint(path: str) -> str | None:
    """Return what a client that called an API path which cannot exist has to change, or `None` if the path may exist.

    >>> hint("/v1/v1/chat/completions")
    'The path begins with /v1 twice. Write it once in the base URL of your client, or leave it out if the client adds it.'
    """
    if path == PREFIX:
        return "There is no call at /v1 itself. Add the name of a call, as in /v1/chat/completions."
    if path.startswith("/v1/v1/") or path == "/v1/v1":
        return "The path begins with /v1 twice. Write it once in the base URL of your client, or leave it out if the client adds it."
    if path.startswith("/v1/engines/"):  # a server could use the model in the path, and the gateway counts the one in the body
        return "OpenAI has removed the engines API. Call /v1/completions or /v1/embeddings, and name the model in the body."
    twice = _TWICE.match(path)
    if twice is not None:
        return f"The base URL of your client contains the call {twice[1]}, and the client adds another call. The base URL must end in /v1."
    return None
