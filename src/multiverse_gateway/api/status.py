"""The health of the gateway itself, for load balancers, supervisors and people."""

from collections import Counter
from typing import Literal

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway._version import __version__
from multiverse_gateway.api.endpoints import ApiRoute, Call, json_response
from multiverse_gateway.api.response_types import GatewayHealth, Word, counts_of
from multiverse_gateway.core.errors import AdminKeyRequired, ShuttingDown, StorageUnavailable, Unavailable
from multiverse_gateway.core.fairness import Band
from multiverse_gateway.core.history import overall
from multiverse_gateway.core.routing import listed_name
from multiverse_gateway.core.totals import totals_of
from multiverse_gateway.entry.identity import digests, verified
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.observability.metrics import CONTENT_TYPE, Gauges, exposition

STORE_PATIENCE = 2.0
_FIGURES = {"text/plain": 'multiverse_requests_total{model="llama-3.2:3b",status="200"} 42\n'}
_FRESH = {"cache-control": "no-store"}


def state_of(gateway: Gateway) -> Literal["healthy", "degraded", "unhealthy", "empty"]:
    """Return the state of the registered servers in one word: healthy, degraded, unhealthy or empty."""
    return overall(route.health.status for route in gateway.table.routes.values() if route.health.is_active)


async def database_trouble(gateway: Gateway) -> str | None:
    """Return a sentence about why the store is unavailable, or `None` while it answers in time."""
    try:
        with anyio.fail_after(STORE_PATIENCE):
            await gateway.store.version()
    except StorageUnavailable as error:
        return error.message
    except TimeoutError:
        return f"The database did not answer within {STORE_PATIENCE:g} seconds; inference continues."
    return None


async def health(gateway: Gateway) -> GatewayHealth:
    """Return the body of `/health`."""
    trouble = await database_trouble(gateway)
    stopping = gateway.admission.is_closed
    return GatewayHealth(
        status="stopping" if stopping else "ok" if trouble is None else "degraded",
        version=__version__,
        database="ok" if trouble is None else "unavailable",
        database_reason=trouble,
        servers=state_of(gateway),
        counts=counts_of(totals_of(gateway.table, gateway.now())),
        uptime_seconds=round(max(0.0, gateway.wall() - gateway.usage_book.started_at), 1),
    )


def operations_routes(gateway: Gateway) -> list[Route]:
    """Return the routes that report whether the gateway is alive and ready, and its state; none of them needs a key."""

    async def show_health(request: Request) -> Response:
        """Return the health status of the gateway. The status is 200 while the process is alive, even if all servers are down."""
        return json_response(await health(gateway), headers=_FRESH)

    async def live(request: Request) -> Response:
        """Return 200 while the process is alive."""
        return json_response(Word(status="ok"), headers=_FRESH)

    async def ready(request: Request) -> Response:
        """Return 200 while the gateway accepts requests, and 503 before it has read its registry and while it shuts down."""
        if gateway.admission.is_closed:
            raise ShuttingDown("The gateway is shutting down; send requests to another one", retry_after=5.0)
        if not gateway.registrations.is_loaded:
            raise Unavailable("The gateway has not read its registry yet; try again in a moment", code="not_ready", retry_after=1.0)
        return json_response(Word(status="ready"), headers=_FRESH)

    async def metrics(request: Request) -> Response:
        """Return the metrics of this process in Prometheus format."""
        key = gateway.settings.metrics_key
        if key is not None and verified(request.scope["headers"], digests([key])) is None:
            raise AdminKeyRequired("The key is missing or wrong; send METRICS_KEY as `Authorization: Bearer`")
        return Response(metrics_of(gateway), headers=_FRESH, media_type=CONTENT_TYPE)

    return [
        ApiRoute("/metrics", GET=Call(endpoint=metrics, answers={200: "text/plain"}, examples=_FIGURES, errors=(AdminKeyRequired,))),
        ApiRoute("/health", GET=Call(endpoint=show_health, answers={200: GatewayHealth})),
        ApiRoute("/livez", GET=Call(endpoint=live, answers={200: Word})),
        ApiRoute("/readyz", GET=Call(endpoint=ready, answers={200: Word}, errors=(ShuttingDown, Unavailable))),
    ]


def metrics_of(gateway: Gateway) -> bytes:
    """Return the metrics of this process in Prometheus format."""
    meter = gateway.usage_book.meter
    meter.forget({model.name for model in gateway.table.models.values()}, gateway.table.routes)
    routes = gateway.table.routes.values()
    waiting: Counter[tuple[str, Band]] = Counter()
    for (model, band), length in gateway.room.queue.lengths_by_band().items():
        waiting[gateway.usage_book.label(model), band] += length
    gauges = Gauges(
        at=gateway.now(),
        requests=len(gateway.exchanges),
        waiting=waiting,
        servers=[
            (
                route.server.id,
                listed_name(gateway.table, route.server.model_name),
                route.health.state.value,
                gateway.load.in_flight(route.server.id),
                gateway.usage_book.speeds.of(route.server.id),
            )
            for route in routes
        ],
        body_bytes=gateway.admission.bodies.held,
        answer_bytes=gateway.admission.answers.held,
        waiting_retries=sum(exchange.search.waits_for_budget for exchange in gateway.exchanges),
        is_shedding=gateway.admission.shedding,
        tasks=len(anyio.get_running_tasks()),
    )
    return exposition(meter, gauges)
