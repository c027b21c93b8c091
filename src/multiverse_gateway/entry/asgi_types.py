"""ASGI, as the rules of entry see it: the types of an application, and where they leave things in the scope."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID = "multiverse.request_id"
"""Where the middleware leaves the request's id in the scope."""
