"""The admin API: JSON for owners, operators and their scripts. Middleware has checked the key before any endpoint here runs."""

from collections.abc import Sequence
from typing import Any

import attrs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway._version import __version__
from multiverse_gateway.accounts import register_owned
from multiverse_gateway.api.connection_tests import try_connection
from multiverse_gateway.api.endpoints import ApiRoute, Call, body_of, json_response
from multiverse_gateway.api.exports import Export, ImportCounts, export_of, import_counts
from multiverse_gateway.api.measured import measured_facts
from multiverse_gateway.api.request_reading import names_cap, parse_change, parse_import, parse_registration, parse_test, read_query
from multiverse_gateway.api.request_types import (
    HISTORY,
    ConnectionTest,
    ExportQuery,
    HistoryQuery,
    Import,
    LogsQuery,
    Registration,
    ServersQuery,
)
from multiverse_gateway.api.response_types import (
    Check,
    CheckNow,
    Figures,
    Registered,
    Removed,
    ServerDetail,
    ServerRecord,
    Stats,
    TestResult,
    counts_of,
    facts_of,
    iso,
    iso_or_none,
)
from multiverse_gateway.api.status import state_of
from multiverse_gateway.core.errors import AdminKeyRequired, ModelNotOffered, ProbeRefused, ServerNotFound, StorageUnavailable
from multiverse_gateway.core.health import Health, needs_attention
from multiverse_gateway.core.history import statistics
from multiverse_gateway.core.registry_plans import Change
from multiverse_gateway.core.routing import Route as ServerRoute
from multiverse_gateway.core.servers import Server, ServerId, model_key
from multiverse_gateway.core.timelines import uptimes
from multiverse_gateway.core.totals import totals_of
from multiverse_gateway.entry.access import AccessRules
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.observability.tail import RecentLogs
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.registration import (
    check,
    export_registry,
    flush_if_possible,
    import_registry,
    refresh_if_possible,
    remove,
    route_of,
    server_id_of,
    update,
)
from multiverse_gateway.web.middleware import ADDRESS, HAS_ADMIN_KEY, OWNER

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


# Records


def record_of(gateway: Gateway, server: Server, health: Health) -> ServerRecord:
    """Return a server's record as the API shows it."""
    speed = gateway.usage_book.speeds.of(server.id)
    return ServerRecord(
        **attrs.asdict(facts_of(server), recurse=False),
        id=server.id,
        host_id=server.host_id,
        status="registered",
        health_status=health.status,
        state=health.state.value,
        resting=max(health.rest.until, health.blame.lacking_until) > gateway.now(),
        needs_attention=needs_attention(health, gateway.now()),
        reason=health.reason,
        warning=health.warning,
        consecutive_failures=health.consecutive_failures,
        active=health.is_active,
        in_flight=gateway.load.in_flight(server.id),
        tokens_per_second=None if speed is None else round(speed, 1),
        created_at=iso(server.created_at),
        updated_at=iso(server.updated_at),
        last_checked_at=iso_or_none(health.last_checked_at),
        last_transition_at=iso_or_none(health.last_transition_at),
        measured=measured_facts(health.measured, truncated_texts=gateway.health_book.cut_texts.get(server.id, 0)),
    )


def removed_record(gateway: Gateway, server: Server) -> ServerRecord:
    """Return the record of a server that was removed."""
    record = record_of(gateway, server, Health(generation=server.generation))
    return attrs.evolve(record, status="deregistered", health_status="unknown", state="removed", active=False)


def record_with(gateway: Gateway, server_id: ServerId) -> ServerRecord:
    """Return the record of a registered server.

    Raises:
        ServerNotFound: There is none with this id.
    """
    route = route_of(gateway, server_id)
    return record_of(gateway, route.server, route.health)


def figures_of(gateway: Gateway, route: ServerRoute, checks: Sequence[ProbeResult]) -> Figures:
    """Return statistics over the last checks of a server and its uptime, for its detail record."""
    summary = statistics(checks, wall=gateway.wall())
    mean = summary.mean_response_time
    timelines = gateway.health_book.timelines
    timelines.learn(route.server.id, checks)
    measured = uptimes(timelines.of(route.server.id), route.health.last_checked_at, gateway.wall())
    return Figures(
        checks=summary.checks,
        success_rate=summary.success_rate,
        mean_response_time_ms=None if mean is None else round(1000 * mean, 1),
        uptime_percentage=summary.uptime_percentage,
        uptime_24h_percentage=_percentage(measured.day.share),
        uptime_7d_percentage=_percentage(measured.week.share),
        uptime_known_since=iso_or_none(measured.week.since),
    )


def _percentage(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def check_of(result: ProbeResult) -> Check:
    """Return one check as the API shows it."""
    return Check(
        checked_at=iso(result.checked_at),
        passed=result.passed,
        duration_ms=round(1000 * result.duration, 1),
        reason=result.reason,
        warning=result.warning,
    )


async def list_records(gateway: Gateway, query: ServersQuery) -> list[ServerRecord]:
    """Return the records that match, sorted; those taken out and those removed only with `include_inactive`."""
    await refresh_if_possible(gateway)
    records = [record_of(gateway, route.server, route.health) for route in gateway.table.routes.values()]
    if query.include_inactive:
        records += [removed_record(gateway, server) for server in await gateway.store.removed()]
    kept = [
        record
        for record in records
        if (query.include_inactive or record.active)
        and (query.model_name is None or model_key(query.model_name) == model_key(record.model_name))
        and query.health_status in (None, record.health_status)
        and query.student_id in (None, record.metadata.student_id)
    ]

    def rank(record: ServerRecord) -> tuple[bool, str, str, str]:
        value = record.metadata.student_id if query.sort == "student_id" else getattr(record, query.sort)
        return value is not None, value or "", record.registered_at, record.id

    return sorted(kept, key=rank, reverse=query.order == "desc")


def totals(gateway: Gateway) -> Stats:
    """Return the totals that the dashboard shows."""
    requests = gateway.usage_book.totals
    return Stats(
        **attrs.asdict(counts_of(totals_of(gateway.table, gateway.now()))),
        state=state_of(gateway),
        requests_handled=requests["requests"],
        requests=dict(requests),
        in_flight=gateway.load.total,
        uptime_seconds=round(max(0.0, gateway.wall() - gateway.usage_book.started_at), 1),
        version=__version__,
    )


# Routes


_LOG = {
    "application/json": [
        {"number": 1, "timestamp": "2026-05-01T12:00:00.000Z", "level": "INFO", "component": "health", "message": "server is healthy now"}
    ]
}


def admin_routes(gateway: Gateway, rules: AccessRules, recent_logs: RecentLogs) -> list[Route]:
    """Make the routes below `/admin`."""

    async def count_probe(request: Request) -> None:
        await rules.count_probe(request.scope.get(OWNER) or request.scope.get(ADDRESS, "unknown"))

    async def count_owners_probe(request: Request) -> None:
        if OWNER in request.scope:
            await count_probe(request)

    async def post_register(request: Request) -> Response:
        """Register a server. The gateway probes it first; registering the same model and URL again updates the existing record."""
        body = await body_of(request, gateway)
        accepted = await register_owned(gateway, parse_registration(body), has_cap=names_cap(body))
        record = attrs.asdict(record_with(gateway, accepted.server.id), recurse=False)
        answer = Registered(**record, owner_token=accepted.owner_token, max_concurrency_reason=accepted.cap.reason)
        return json_response(answer, 201 if accepted.is_new else 200)

    async def put_server(request: Request) -> Response:
        """Change a server. A new URL, API key or model is probed first; if the probe fails, nothing changes."""
        server_id = _id(request)
        route_of(gateway, server_id)
        change = parse_change(await body_of(request, gateway))
        server = await update(gateway, server_id, change, before_probe=lambda: count_owners_probe(request))
        return json_response(record_with(gateway, server.id))

    async def delete_server(request: Request) -> Response:
        """Remove a server. Once this call returns, the server gets no new requests."""
        server_id = _id(request)
        await remove(gateway, server_id)
        return json_response(Removed(registration_id=server_id))

    async def list_servers(request: Request) -> Response:
        """List the servers. The header `x-total-count` is the number of servers on all pages."""
        query = read_query(request.query_params, ServersQuery)
        records = await list_records(gateway, query)
        page = records[query.offset : query.offset + query.limit]
        return json_response(page, headers={"x-total-count": str(len(records))})

    async def one_server(request: Request) -> Response:
        """Return a server with its health and statistics over its last checks."""
        await refresh_if_possible(gateway)
        server_id = _id(request)
        route = route_of(gateway, server_id)
        await flush_if_possible(gateway)
        figures = figures_of(gateway, route, await gateway.store.history(server_id, HISTORY))
        record = record_of(gateway, route.server, route.health)
        models = list(route.health.models)
        return json_response(ServerDetail(**attrs.asdict(record, recurse=False), **attrs.asdict(figures), models=models))

    async def history(request: Request) -> Response:
        """List the last checks of a server, newest first."""
        limit = read_query(request.query_params, HistoryQuery).limit
        await refresh_if_possible(gateway)
        server_id = _id(request)
        route_of(gateway, server_id)
        await flush_if_possible(gateway)
        return json_response([check_of(result) for result in await gateway.store.history(server_id, limit)])

    async def check_now(request: Request) -> Response:
        """Probe a server now. A server that passes is healthy again; with an owner token, at most 10 calls per minute are allowed."""
        server_id = _id(request)
        await count_owners_probe(request)
        result = await check(gateway, server_id)
        route = gateway.table.routes.get(server_id)
        fields = attrs.asdict(check_of(result))
        if route is None:
            return json_response(CheckNow(**fields, registration_id=server_id))
        health = route.health
        return json_response(CheckNow(**fields, registration_id=server_id, health_status=health.status, state=health.state.value))

    async def test(request: Request) -> Response:
        """Test the connection to a server without registering it. At most 10 calls per minute are allowed."""
        registration = parse_test(await body_of(request, gateway))
        await count_probe(request)
        return json_response(await try_connection(gateway, registration))

    async def stats(request: Request) -> Response:
        """Return the totals of the dashboard."""
        await refresh_if_possible(gateway)
        return json_response(totals(gateway))

    async def logs(request: Request) -> Response:
        """List the newest log records of this process."""
        query = read_query(request.query_params, LogsQuery)
        return json_response(
            recent_logs.select(
                level=query.level,
                component=query.component or None,
                text=query.text or None,
                client=query.client or None,
                since=query.since,  # type: ignore[arg-type]  # its reader made it an instant
                limit=query.limit,
            )
        )

    async def export(request: Request) -> Response:
        """Export the registry in the format that imports accept. The servers' API keys require the admin key; a session is not enough."""
        include_keys = read_query(request.query_params, ExportQuery).include_keys
        if include_keys and HAS_ADMIN_KEY not in request.scope:
            raise AdminKeyRequired(
                "A session is not enough to export the servers' API keys. Send the admin key in the header X-API-Key, or use the form "
                "on the Settings page."
            )
        registry = await export_registry(gateway, include_keys=include_keys)
        return json_response(export_of(registry, wall=gateway.wall(), include_keys=include_keys))

    async def post_import(request: Request) -> Response:
        """Import servers, without probing them first, and aliases. Importing the same file again changes nothing."""
        return json_response(import_counts(await import_registry(gateway, parse_import(await body_of(request, gateway)))))

    changing = (ServerNotFound, ModelNotOffered, ProbeRefused, StorageUnavailable)
    return [
        ApiRoute(
            "/admin/register",
            POST=Call(
                endpoint=post_register,
                body=Registration,
                answers={201: Registered, 200: Registered},
                errors=(ModelNotOffered, ProbeRefused, StorageUnavailable),
            ),
        ),
        ApiRoute(
            "/admin/register/{server_id}",
            PUT=Call(endpoint=put_server, body=Change, answers={200: ServerRecord}, errors=changing, for_owners=True),
            DELETE=Call(endpoint=delete_server, answers={200: Removed}, errors=(ServerNotFound, StorageUnavailable), for_owners=True),
        ),
        ApiRoute("/admin/servers", GET=Call(endpoint=list_servers, query=ServersQuery, answers={200: list[ServerRecord]})),
        ApiRoute(
            "/admin/servers/{server_id}",
            GET=Call(endpoint=one_server, answers={200: ServerDetail}, errors=(ServerNotFound, StorageUnavailable), for_owners=True),
        ),
        ApiRoute(
            "/admin/servers/{server_id}/history",
            GET=Call(
                endpoint=history,
                query=HistoryQuery,
                answers={200: list[Check]},
                errors=(ServerNotFound, StorageUnavailable),
                for_owners=True,
            ),
        ),
        ApiRoute(
            "/admin/servers/{server_id}/health-check",
            POST=Call(endpoint=check_now, answers={200: CheckNow}, errors=(ServerNotFound,), for_owners=True),
        ),
        ApiRoute("/admin/test-connection", POST=Call(endpoint=test, body=ConnectionTest, answers={200: TestResult})),
        ApiRoute("/admin/stats", GET=Call(endpoint=stats, answers={200: Stats})),
        ApiRoute(
            "/admin/logs",
            GET=Call(endpoint=logs, query=LogsQuery, answers={200: list[dict[str, Any]]}, examples=_LOG),
        ),
        ApiRoute("/admin/export", GET=Call(endpoint=export, query=ExportQuery, answers={200: Export}, errors=(StorageUnavailable,))),
        ApiRoute("/admin/import", POST=Call(endpoint=post_import, body=Import, answers={200: ImportCounts}, errors=(StorageUnavailable,))),
    ]


def _id(request: Request) -> ServerId:
    return server_id_of(request.path_params["server_id"])
