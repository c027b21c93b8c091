"""How the gateway itself is doing: for load balancers, supervisors and people."""

from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway._version import __version__
from multiverse_gateway.core.errors import ShuttingDown, StorageUnavailable, Unavailable
from multiverse_gateway.core.history import overall
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.web.answers import json_response

STORE_PATIENCE = 2.0


def counts(gateway: Gateway) -> dict[str, int]:
    """Return the numbers of servers by what they are, and of models."""
    healths = [route.health for route in gateway.table.routes.values()]
    active = [health.status for health in healths if health.is_active]
    return {
        "total_servers": len(healths),
        "active_servers": len(active),
        "healthy_servers": active.count("healthy"),
        "unhealthy_servers": active.count("unhealthy"),
        "unknown_servers": active.count("unknown"),
        "inactive_servers": len(healths) - len(active),
        "models": len(gateway.model_names()),
    }


def state_of(gateway: Gateway) -> str:
    """Return in one word how the registry is doing: healthy, degraded, unhealthy or empty."""
    return overall(route.health.status for route in gateway.table.routes.values() if route.health.is_active)


async def database_works(gateway: Gateway) -> bool:
    """Tell whether the store answers in time."""
    try:
        with anyio.fail_after(STORE_PATIENCE):
            await gateway.store.version()
    except (StorageUnavailable, TimeoutError):
        return False
    return True


async def health(gateway: Gateway) -> dict[str, Any]:
    """Return the body of `/health`."""
    works = await database_works(gateway)
    stopping = gateway.shutting_down
    return {
        "status": "stopping" if stopping else "ok" if works else "degraded",
        "version": __version__,
        "database": "ok" if works else "unavailable",
        "servers": state_of(gateway),
        "counts": counts(gateway),
        "uptime_seconds": round(max(0.0, gateway.wall() - gateway.started_at), 1),
    }


def operations_routes(gateway: Gateway) -> list[Route]:
    """Make the routes that tell whether the gateway lives, is ready, and how it is doing; none needs a key."""

    async def show_health(request: Request) -> Response:
        return json_response(await health(gateway), headers={"cache-control": "no-store"})

    async def live(request: Request) -> Response:
        return json_response({"status": "ok"}, headers={"cache-control": "no-store"})

    async def ready(request: Request) -> Response:
        if gateway.shutting_down:
            raise ShuttingDown("The gateway is being stopped; send requests to another one", retry_after=5.0)
        if not gateway.loaded:
            raise Unavailable("The gateway has not read its registry yet; ask again in a moment", code="not_ready", retry_after=1.0)
        return json_response({"status": "ready"}, headers={"cache-control": "no-store"})

    return [Route("/health", show_health), Route("/livez", live), Route("/readyz", ready)]
