"""The responses of the API as types; the responses and their JSON Schema are made from these.

Instants are ISO 8601 with zone.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import attrs
from msgspec import UNSET, Meta, UnsetType

from multiverse_gateway.api.request_types import EXPORT_FORMAT
from multiverse_gateway.core.registry_plans import ImportPlan
from multiverse_gateway.core.servers import Capabilities, Metadata, Server
from multiverse_gateway.core.totals import ServerTotals
from multiverse_gateway.core.usage import Counts, Usage
from multiverse_gateway.core.usage_reports import UsageSummary

Time = Annotated[str, Meta(description="a time in ISO 8601 with zone", extra_json_schema={"format": "date-time"})]
Uuid = Annotated[str, Meta(extra_json_schema={"format": "uuid"})]
Status = Literal["healthy", "unhealthy", "unknown"]
EPOCH_SECONDS = "epoch seconds"
"""Description of a number that is an instant, as OpenAI's API writes it."""


def iso(instant: float) -> str:
    """Return an instant in ISO 8601 with the time zone.

    >>> iso(0.0)
    '1970-01-01T00:00:00.000+00:00'
    """
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds")


def iso_or_none(instant: float | None) -> str | None:
    """Return `iso(instant)`, or `None` for no instant."""
    return None if instant is None else iso(instant)


@attrs.frozen(kw_only=True)
class ServerFacts:
    """What a record says about the server itself; of its key only whether there is one."""

    registration_id: Uuid
    model_name: str
    endpoint_url: str
    has_api_key: bool
    capabilities: Capabilities
    metadata: Metadata
    max_concurrency: int | None
    weight: int
    registered_at: Time


def facts_of(server: Server) -> ServerFacts:
    """Return the facts about a server that all of its records share."""
    return ServerFacts(
        registration_id=server.id,
        model_name=server.model_name,
        endpoint_url=server.endpoint_url,
        has_api_key=server.api_key is not None,
        capabilities=server.capabilities,
        metadata=server.metadata,
        max_concurrency=server.max_concurrency,
        weight=server.weight,
        registered_at=iso(server.registered_at),
    )


@attrs.frozen(kw_only=True)
class ServerRecord(ServerFacts):
    """A server and how it is. `state` is what the gateway knows in detail, `health_status` what it comes to."""

    id: Uuid
    status: Literal["registered", "deregistered"]
    health_status: Status
    state: str
    resting: Annotated[bool, Meta(description="it asked for a pause that is not over, or it did not have the model a moment ago")]
    reason: str | None
    warning: str | None
    consecutive_failures: int
    active: bool
    in_flight: int
    created_at: Time
    updated_at: Time
    last_checked_at: Time | None
    last_transition_at: Time | None


@attrs.frozen(kw_only=True)
class Registered(ServerRecord):
    """A server that was registered; the owner's token is shown this once, and only for a new one."""

    owner_token: Annotated[
        str | None, Meta(description="replaces the admin key for this server only: its holder can change, check and remove it")
    ]
    max_concurrency_reason: Annotated[str, Meta(description="why the server has this `max_concurrency`, in a sentence for people")]


@attrs.frozen(kw_only=True, slots=False)
class Figures:
    """What the last checks of a server say."""

    checks: int
    success_rate: Annotated[float | None, Meta(description="from 0 to 1")]
    mean_response_time_ms: float | None
    uptime_percentage: Annotated[float | None, Meta(description="over the last 100 checks, however much time they cover")]
    uptime_24h_percentage: Annotated[float | None, Meta(description="over the 24 hours before the last check; null if nothing is known")]
    uptime_7d_percentage: Annotated[float | None, Meta(description="over the 7 days before the last check; null if nothing is known")]
    uptime_known_since: Annotated[Time | None, Meta(description="from when on the uptime of the 7 days is known to this process")]


@attrs.frozen(kw_only=True)
class ServerDetail(ServerRecord, Figures):
    """A server, how it is, and what its last checks say."""

    models: Annotated[list[str], Meta(description="the names that the server itself lists")]


@attrs.frozen(kw_only=True)
class Check:
    """One check of a server."""

    checked_at: Time
    passed: bool
    duration_ms: float
    reason: str | None
    warning: str | None


@attrs.frozen(kw_only=True)
class CheckNow(Check):
    """A check that was asked for, and how the server is now."""

    registration_id: Uuid
    health_status: Status | None = None
    state: str | None = None


@attrs.frozen(kw_only=True)
class Removed:
    """A server that was removed."""

    registration_id: Uuid
    status: Literal["deregistered"] = "deregistered"


@attrs.frozen(kw_only=True)
class OwnerToken:
    """An owner's token, shown this once; the one before it is void."""

    registration_id: Uuid
    owner_token: str


@attrs.frozen(kw_only=True)
class Step:
    """One step of a connection test."""

    step: str
    ok: bool
    message: str


@attrs.frozen(kw_only=True)
class TestResult:
    """What a connection test found."""

    __test__ = False  # for pytest

    ok: bool
    reason: str | None
    warning: str | None
    steps: list[Step]


@attrs.frozen(kw_only=True)
class ServerCounts:
    """How many servers and models there are."""

    total_servers: int
    active_servers: int
    healthy_servers: int
    unhealthy_servers: int
    unknown_servers: int
    inactive_servers: int
    models: int


def counts_of(totals: ServerTotals) -> ServerCounts:
    """Return how many servers and models there are."""
    return ServerCounts(
        total_servers=totals.servers,
        active_servers=totals.active,
        healthy_servers=totals.healthy,
        unhealthy_servers=totals.unhealthy,
        unknown_servers=totals.unknown,
        inactive_servers=totals.inactive,
        models=totals.models,
    )


@attrs.frozen(kw_only=True)
class Stats(ServerCounts):
    """The totals of the dashboard; requests are those that this process has handled."""

    state: Literal["healthy", "degraded", "unhealthy", "empty"]
    requests_handled: int
    requests: dict[str, int]
    in_flight: int
    uptime_seconds: float
    version: str


@attrs.frozen(kw_only=True)
class GatewayHealth:
    """The answer of `GET /health`: status, version, database and counts."""

    status: Literal["ok", "degraded", "stopping"]
    version: str
    database: Literal["ok", "unavailable"]
    database_reason: str | None
    """Why the database cannot be used, and what to do; null while it works."""
    servers: Literal["healthy", "degraded", "unhealthy", "empty"]
    counts: ServerCounts
    uptime_seconds: float


@attrs.frozen(kw_only=True)
class Word:
    """One word on how the gateway is."""

    status: str


@attrs.frozen(kw_only=True)
class ExportedWithKey(ServerFacts):
    """A server in an export that was asked to hold the keys."""

    api_key: str | None = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Export:
    """The registry, as importing takes it."""

    format: int
    exported_at: Time
    servers: Annotated[list[ServerFacts], Meta(description="with `include_keys` each has `api_key`, too")]


def export_of(servers: Iterable[Server], *, wall: float, include_keys: bool) -> Export:
    """Return the export of servers; `wall` is the present instant in epoch seconds."""
    exported: list[ServerFacts] = []
    for server in servers:
        facts = facts_of(server)
        exported.append(ExportedWithKey(**attrs.asdict(facts, recurse=False), api_key=server.api_key) if include_keys else facts)
    return Export(format=EXPORT_FORMAT, exported_at=iso(wall), servers=exported)


@attrs.frozen(kw_only=True)
class ImportCounts:
    """How many servers an import created, updated and left unchanged."""

    imported: int
    created: int = 0
    updated: int = 0
    unchanged: int = 0


def import_counts(plan: ImportPlan) -> ImportCounts:
    """Return what an import did, in numbers."""
    counts = {"created": plan.created, "updated": plan.updated, "unchanged": plan.unchanged}
    return ImportCounts(imported=sum(counts.values()), **counts)


@attrs.frozen(kw_only=True)
class ModelServers:
    """How many servers a model has."""

    servers_healthy: int
    servers_total: int


@attrs.frozen(kw_only=True)
class ModelItem:
    """A model, as OpenAI's list shows it, and how many servers it has."""

    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Meta(description=EPOCH_SECONDS)]
    owned_by: str
    available_servers: int
    total_servers: int
    multiverse: ModelServers
    context_length: Annotated[
        int | UnsetType, Meta(description="tokens that fit into the context of each server; left out if no server states it")
    ] = UNSET


@attrs.frozen(kw_only=True)
class ModelList:
    """The answer of `GET /v1/models`, in OpenAI's form."""

    object: Literal["list"] = "list"
    data: list[ModelItem]


@attrs.frozen(kw_only=True)
class QueuedModel:
    """How much a model is used. `people_waiting` counts the keys and addresses with a waiting request."""

    model: str
    slots: Annotated[int | None, Meta(description="requests that its servers take at once; null without a limit")]
    running: int
    waiting: int
    people_waiting: int


@attrs.frozen(kw_only=True)
class QueuedRequest:
    """A waiting request of the caller."""

    request_id: str
    model: str
    position: Annotated[int, Meta(description="1 for the request that begins next if no other request comes")]
    waiting: Annotated[int, Meta(description="all requests that wait for the model")]
    waited_seconds: float
    about_seconds: Annotated[
        int | None,
        Meta(
            description="about how long until it begins, in seconds: one of 5, 10, 20, 30, 60, 120 and 240; null if that is not known yet"
        ),
    ]
    priority: Literal["interactive", "bulk"]


@attrs.frozen(kw_only=True)
class QueueList:
    """The models, and the caller's own waiting requests."""

    object: Literal["list"] = "list"
    data: list[QueuedModel]
    yours: list[QueuedRequest]


@attrs.frozen(kw_only=True)
class StoredAnswer:
    """The response, as the server that made it keeps it."""

    id: str
    object: str


@attrs.frozen(kw_only=True)
class DeletedResponse:
    """The server's confirmation that it has deleted a response."""

    id: str
    deleted: bool


@attrs.frozen(kw_only=True)
class InputItems:
    """The items of a response's input, as the server that made it keeps them."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


@attrs.frozen(kw_only=True)
class UsageRecord(Counts):
    """Requests and tokens of what was asked to be counted apart; the rest of the names are null."""

    day: str | None
    model: str | None
    server: Annotated[str | None, Meta(description="the id of the server; empty if no server answered")]
    owner: Annotated[str | None, Meta(description="the server's student_id; empty if it has none")]
    client: Annotated[str | None, Meta(description="the name of the client key; empty for clients without one")]
    client_id: Annotated[str | None, Meta(description="the id of the client key")]


@attrs.frozen(kw_only=True)
class UsageReport:
    """What was used in a span of days, both included."""

    since: str
    until: str
    total: Counts
    rows: list[UsageRecord]


def usage_report(summary: UsageSummary) -> UsageReport:
    """Return the report of what was used."""
    rows = [_usage_record(usage, summary) for usage in summary.rows]
    return UsageReport(since=summary.since, until=summary.until, total=summary.total, rows=rows)


def _usage_record(usage: Usage, summary: UsageSummary) -> UsageRecord:
    key, by = usage.key, summary.by
    return UsageRecord(
        **attrs.asdict(usage.counts),
        day=key.day if "day" in by else None,
        model=key.model if "model" in by else None,
        server=key.server_id if "server" in by else None,
        owner=key.owner if "owner" in by else None,
        client=summary.names.get(key.client, key.client) if "client" in by else None,
        client_id=key.client if "client" in by else None,
    )


@attrs.frozen(kw_only=True)
class ErrorFacts:
    """What went wrong, for people (`message`) and programs (`type`, `code`)."""

    message: Annotated[str, Meta(description="what is wrong and what to do next")]
    type: str
    param: Annotated[str | None, Meta(description="the field that caused the error")]
    code: str | None


@attrs.frozen(kw_only=True)
class ErrorAnswer:
    """Every error has this form."""

    error: ErrorFacts


@attrs.frozen(kw_only=True)
class AnthropicErrorFields:
    """What went wrong, in the words of Anthropic's API."""

    type: str
    message: str


@attrs.frozen(kw_only=True)
class AnthropicErrorAnswer:
    """The form of every error on the calls of Anthropic's API."""

    type: Literal["error"] = "error"
    error: AnthropicErrorFields
    request_id: str | None
