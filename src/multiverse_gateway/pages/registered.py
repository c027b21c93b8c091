"""What the page shows after a server was registered, by the form or by one click."""

from typing import Any

from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.snippets import snippets_of
from multiverse_gateway.pages.words import sentence
from multiverse_gateway.registration import Accepted, route_of


def registered_values(renderer: Renderer, visit: Visit, accepted: Accepted) -> dict[str, Any]:
    """Return the values of `_registered.html`: the server, how it was accepted, code that uses it, and its warning if it has one."""
    gateway, server = renderer.gateway, accepted.server
    warning = route_of(gateway, server.id).health.warning
    base_url = f"{renderer.base_url(visit.request)}/v1"
    return {
        "server": server,
        "accepted": accepted,
        "snippets": snippets_of(base_url, server.model_name, needs_key=gateway.settings.require_client_auth),
        "warning": None if warning is None else sentence(warning),
    }
