"""The admin API: JSON for hosts, operators and their scripts. The key was checked before anything here runs (`security`)."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway._version import __version__
from multiverse_gateway.core.errors import BadRequest
from multiverse_gateway.core.health import Health
from multiverse_gateway.core.history import statistics
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.registration import (
    check,
    describe,
    export_registry,
    import_registry,
    iso,
    parse_change,
    parse_import,
    parse_registration,
    parse_test,
    refreshed,
    register,
    remove,
    saved,
    server_id_of,
    try_connection,
    unknown_server,
    update,
)
from multiverse_gateway.web.answers import body_of, by_method, json_response, query_flag, query_number, query_word
from multiverse_gateway.web.operations import counts, state_of
from multiverse_gateway.web.security import ADDRESS, MAX_TESTS, LocalWindow

HISTORY = 100
PAGE = 1000
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
STATUSES = ("healthy", "unhealthy", "unknown")
SORTS = ("registered_at", "updated_at", "last_checked_at", "model_name", "health_status", "student_id")

Record = dict[str, Any]


# Records


def record_of(gateway: Gateway, server: Server, health: Health) -> Record:
    """Return a server's record as the API shows it."""
    return {
        "id": server.id,
        **describe(server),
        "status": "registered",
        "health_status": health.status,
        "state": health.state.value,
        "resting": health.resting_until > gateway.now(),
        "reason": health.reason,
        "warning": health.warning,
        "consecutive_failures": health.consecutive_failures,
        "active": health.is_active,
        "in_flight": gateway.load.in_flight(server.id),
        "created_at": iso(server.created_at),
        "updated_at": iso(server.updated_at),
        "last_checked_at": iso(health.last_checked_at),
        "last_transition_at": iso(health.last_transition_at),
    }


def removed_record(gateway: Gateway, server: Server) -> Record:
    """Return the record of a server that was removed."""
    record = record_of(gateway, server, Health(generation=server.generation))
    return record | {"status": "deregistered", "health_status": "unknown", "state": "removed", "active": False}


def record_with(gateway: Gateway, server_id: ServerId) -> Record:
    """Return the record of a registered server.

    Raises:
        ServerNotFound: There is none with this id.
    """
    server, health = _route(gateway, server_id)
    return record_of(gateway, server, health)


def _route(gateway: Gateway, server_id: ServerId) -> tuple[Server, Health]:
    route = gateway.table.routes.get(server_id)
    if route is None:
        raise unknown_server()
    return route.server, route.health


def figures_of(gateway: Gateway, checks: Sequence[ProbeResult]) -> Record:
    """Return what the last checks say, as a detail record shows it."""
    found = statistics(checks, wall=gateway.wall())
    mean = found.mean_response_time
    return {
        "checks": found.checks,
        "success_rate": found.success_rate,
        "mean_response_time_ms": None if mean is None else round(1000 * mean, 1),
        "uptime_percentage": found.uptime_percentage,
    }


def check_of(result: ProbeResult) -> Record:
    """Return one check as the API shows it."""
    return {
        "checked_at": iso(result.checked_at),
        "passed": result.passed,
        "duration_ms": round(1000 * result.duration, 1),
        "reason": result.reason,
        "warning": result.warning,
    }


async def list_records(
    gateway: Gateway,
    *,
    model_name: str | None = None,
    health_status: str | None = None,
    student_id: str | None = None,
    include_inactive: bool = False,
    sort: str = "registered_at",
    descending: bool = False,
) -> list[Record]:
    """Return the records that match, sorted; those taken out and those removed only with `include_inactive`."""
    await refreshed(gateway)
    records = [record_of(gateway, route.server, route.health) for route in gateway.table.routes.values()]
    if include_inactive:
        records += [removed_record(gateway, server) for server in await gateway.store.removed()]
    kept = [
        record
        for record in records
        if (include_inactive or record["active"])
        and model_name in (None, record["model_name"])
        and health_status in (None, record["health_status"])
        and student_id in (None, record["metadata"]["student_id"])
    ]

    def rank(record: Record) -> tuple[bool, str, str, str]:
        value = record["metadata"]["student_id"] if sort == "student_id" else record[sort]
        return value is not None, value or "", record["registered_at"], record["id"]

    return sorted(kept, key=rank, reverse=descending)


def totals(gateway: Gateway) -> Record:
    """Return the totals that the dashboard shows."""
    requests = gateway.statistics()
    return {
        **counts(gateway),
        "state": state_of(gateway),
        "requests_handled": requests["requests"],
        "requests": dict(requests),
        "in_flight": gateway.load.total,
        "uptime_seconds": round(max(0.0, gateway.wall() - gateway.started_at), 1),
        "version": __version__,
    }


# Routes


def admin_routes(gateway: Gateway) -> list[Route]:
    """Make the routes below `/admin`."""
    tests = LocalWindow(MAX_TESTS)

    async def post_register(request: Request) -> Response:
        server, created = await register(gateway, parse_registration(await body_of(request, gateway)))
        return json_response(record_with(gateway, server.id), 201 if created else 200)

    async def put_server(request: Request) -> Response:
        server_id = _id(request)
        _known(gateway, server_id)
        server = await update(gateway, server_id, parse_change(await body_of(request, gateway)))
        return json_response(record_with(gateway, server.id))

    async def delete_server(request: Request) -> Response:
        server_id = _id(request)
        await remove(gateway, server_id)
        return json_response({"registration_id": server_id, "status": "deregistered"})

    async def list_servers(request: Request) -> Response:
        query = request.query_params
        limit = query_number(request, "limit", PAGE, 1, PAGE)
        offset = query_number(request, "offset", 0, 0, 1_000_000)
        records = await list_records(
            gateway,
            model_name=query.get("model_name"),
            health_status=query_word(request, "health_status", STATUSES, STATUSES[0]) if "health_status" in query else None,
            student_id=query.get("student_id"),
            include_inactive=query_flag(request, "include_inactive"),
            sort=query_word(request, "sort", SORTS, SORTS[0]),
            descending=query_word(request, "order", ("asc", "desc"), "asc") == "desc",
        )
        return json_response(records[offset : offset + limit], headers={"x-total-count": str(len(records))})

    async def one_server(request: Request) -> Response:
        await refreshed(gateway)
        server_id = _id(request)
        server, health = _route(gateway, server_id)
        await saved(gateway)
        checks = await gateway.store.history(server_id, HISTORY)
        return json_response(record_of(gateway, server, health) | figures_of(gateway, checks) | {"models": list(health.models)})

    async def history(request: Request) -> Response:
        limit = query_number(request, "limit", HISTORY, 1, HISTORY)
        await refreshed(gateway)
        server_id = _id(request)
        _known(gateway, server_id)
        await saved(gateway)
        return json_response([check_of(result) for result in await gateway.store.history(server_id, limit)])

    async def check_now(request: Request) -> Response:
        server_id = _id(request)
        result = await check(gateway, server_id)
        route = gateway.table.routes.get(server_id)
        now = {} if route is None else {"health_status": route.health.status, "state": route.health.state.value}
        return json_response({"registration_id": server_id, **check_of(result), **now})

    async def test(request: Request) -> Response:
        registration = parse_test(await body_of(request, gateway))
        quota = tests.hit(request.scope.get(ADDRESS, "unknown"), gateway.now())
        if not quota.allowed:
            raise quota.error(f"At most {MAX_TESTS} connection tests per minute are possible; wait, then test again")
        return json_response(await try_connection(gateway, registration))

    async def stats(request: Request) -> Response:
        await refreshed(gateway)
        return json_response(totals(gateway))

    async def logs(request: Request) -> Response:
        query = request.query_params
        return json_response(
            recent_logs(
                gateway,
                level=query_word(request, "level", LEVELS, LEVELS[0]),
                component=query.get("component") or None,
                text=query.get("text") or None,
                since=_since(query),
                limit=query_number(request, "limit", 200, 1, 2000),
            )
        )

    async def export(request: Request) -> Response:
        return json_response(await export_registry(gateway, include_keys=query_flag(request, "include_keys")))

    async def post_import(request: Request) -> Response:
        return json_response(await import_registry(gateway, parse_import(await body_of(request, gateway))))

    return [
        Route("/admin/register", post_register, methods=["POST"]),
        Route("/admin/register/{server_id}", by_method(PUT=put_server, DELETE=delete_server), methods=["PUT", "DELETE"]),
        Route("/admin/servers", list_servers),
        Route("/admin/servers/{server_id}", one_server),
        Route("/admin/servers/{server_id}/history", history),
        Route("/admin/servers/{server_id}/health-check", check_now, methods=["POST"]),
        Route("/admin/test-connection", test, methods=["POST"]),
        Route("/admin/stats", stats),
        Route("/admin/logs", logs),
        Route("/admin/export", export),
        Route("/admin/import", post_import, methods=["POST"]),
    ]


def _id(request: Request) -> ServerId:
    return server_id_of(request.path_params["server_id"])


def _known(gateway: Gateway, server_id: ServerId) -> None:
    _route(gateway, server_id)


def _since(query: Mapping[str, str]) -> float | None:
    text = query.get("since")
    if not text:
        return None
    try:
        instant = datetime.fromisoformat(text.replace(" ", "+"))
        if instant.tzinfo is None:
            raise ValueError
        return instant.timestamp()
    except (ValueError, OverflowError):
        raise BadRequest("since must be a time in ISO 8601 with zone, such as 2026-05-01T12:00:00Z", param="since") from None


def recent_logs(
    gateway: Gateway, *, level: str, component: str | None, text: str | None, since: float | None, limit: int
) -> Sequence[Mapping[str, Any]]:
    """Return the newest log records that match; none where nothing is kept."""
    if gateway.tail is None:
        return []
    return list(gateway.tail.select(level=level, component=component, text=text, since=since, limit=limit))
