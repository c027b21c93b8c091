"""The ASGI side of `core.paths`: a middleware outside all others, so that every rule sees the one spelling of an API path.

And the paths of an API that the gateway does not have, which say where the one is that it has.
"""

import re
from collections.abc import Collection
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.core.errors import UnknownURL
from multiverse_gateway.core.paths import api_path, below, is_api, without_origin
from multiverse_gateway.entry.asgi_types import App, Receive, Scope, Send
from multiverse_gateway.entry.identity import Network, is_secure

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(?::\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](?::\d{1,5})?")


class Paths:
    """Replace the path of an API call in another spelling; pass any other request on as it is.

    `root` is the path below which a proxy serves the gateway. Whether the proxy leaves it in the path or not, all that is inside finds it
    there, and in `root_path` as ASGI has it: so rules and routing take off the same, once.
    """

    def __init__(self, app: App, *, root: str = "") -> None:
        self._app = app
        self._root = root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        await self._app(self._respelled(scope) if scope["type"] == "http" else scope, receive, send)

    def _respelled(self, scope: Scope) -> Scope:
        target, mount = str(scope["path"]), str(scope.get("root_path", ""))
        path = below(below(target, self._root), mount)
        called = api_path(scope["method"], below(below(without_origin(target), self._root), mount), wants_page=_wants_page(scope))
        if is_api(called):
            path = called
        root = self._root + mount
        if root + path == target and root == mount:
            return scope
        return {**scope, "root_path": root, "path": root + path, "raw_path": quote(root + path).encode()}


def _wants_page(scope: Scope) -> bool:
    """Return whether a request comes from a browser that shows a page, from htmx in it, or from its stream of changes."""
    return any(
        name == b"hx-request" or (name == b"accept" and (b"text/html" in value or b"text/event-stream" in value))
        for name, value in scope["headers"]
    )


def ollama_routes(trusted: Collection[Network]) -> list[Route]:
    """Make the routes of Ollama's own API, which answer every client of it with the base URL of OpenAI's."""

    async def explain(request: Request) -> Response:
        host = request.headers.get("host", "")
        scheme = "https" if is_secure(request.scope, trusted) else "http"
        root = f"{scheme}://{host if _HOST.fullmatch(host) else 'localhost'}{str(request.scope.get('root_path', '')).rstrip('/')}"
        raise UnknownURL(
            "The gateway supports OpenAI's API, but not Ollama's own under /api. Use an "
            f"OpenAI-compatible client with the base URL {root}/v1."
        )

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    return [Route(path, explain, methods=methods) for path in ("/api", "/api/{path:path}")]
