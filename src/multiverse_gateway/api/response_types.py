"""The responses of the API as types; the responses and their JSON Schema are made from these.

Instants are ISO 8601 with zone.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import attrs
from msgspec import UNSET, Meta, UnsetType

from multiverse_gateway.api.measured import MeasuredFacts
from multiverse_gateway.core.aliases import Alias
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
    """The settings of a registered server. The server's API key is never included, only whether one is stored."""

    registration_id: Uuid
    model_name: str
    endpoint_url: str
    has_api_key: bool
    capabilities: Capabilities
    metadata: Metadata
    max_concurrency: int | None
    weight: int
    registered_at: Time
    upstream_model: Annotated[str | None, Meta(description="what its engine calls the model; null for the same name")]


def facts_of(server: Server) -> ServerFacts:
    """Return the settings of a server that every kind of record includes."""
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
        upstream_model=server.upstream_model,
    )


@attrs.frozen(kw_only=True)
class ServerRecord(ServerFacts):
    """A server and its health: `state` is the detailed state, `health_status` its summary."""

    id: Uuid
    host_id: Annotated[str, Meta(description="the host that offers the model; its other models have the same one")]
    status: Literal["registered", "deregistered"]
    health_status: Status
    state: str
    resting: Annotated[bool, Meta(description="whether the server is paused: it asked for a pause, or it lacked the model a moment ago")]
    needs_attention: Annotated[bool, Meta(description="whether the server is healthy but may not have its model; `warning` says why")]
    reason: str | None
    warning: str | None
    consecutive_failures: int
    active: bool
    in_flight: int
    tokens_per_second: Annotated[
        float | None, Meta(description="speed of the answers that this process relayed, as a moving average; null if it has relayed none")
    ]
    created_at: Time
    updated_at: Time
    last_checked_at: Time | None
    last_transition_at: Time | None
    measured: Annotated[MeasuredFacts | None, Meta(description="what was read from the server's engine; null before the first reading")]


@attrs.frozen(kw_only=True)
class Registered(ServerRecord):
    """A registered server. The owner token is returned only here, and only when the registration creates one."""

    owner_token: Annotated[
        str | None, Meta(description="shown once; authorizes edits, checks and removal of this server in place of the admin key")
    ]
    max_concurrency_reason: Annotated[str, Meta(description="a sentence about why the server has this `max_concurrency`")]


@attrs.frozen(kw_only=True, slots=False)
class Figures:
    """Statistics over the last checks of a server."""

    checks: int
    success_rate: Annotated[float | None, Meta(description="from 0 to 1")]
    mean_response_time_ms: float | None
    uptime_percentage: Annotated[float | None, Meta(description="over the last 100 checks, regardless of the time they span")]
    uptime_24h_percentage: Annotated[float | None, Meta(description="over the 24 hours before the last check; null without data")]
    uptime_7d_percentage: Annotated[float | None, Meta(description="over the 7 days before the last check; null without data")]
    uptime_known_since: Annotated[Time | None, Meta(description="start of the data for the 7-day uptime in this process")]


@attrs.frozen(kw_only=True)
class ServerDetail(ServerRecord, Figures):
    """A server, its health, and statistics over its last checks."""

    models: Annotated[list[str], Meta(description="the models that the server itself lists")]


@attrs.frozen(kw_only=True)
class Check:
    """The result of one check of a server."""

    checked_at: Time
    passed: bool
    duration_ms: float
    reason: str | None
    warning: str | None


@attrs.frozen(kw_only=True)
class CheckNow(Check):
    """The result of a requested check, and the server's health after it."""

    registration_id: Uuid
    health_status: Status | None = None
    state: str | None = None


@attrs.frozen(kw_only=True)
class Removed:
    """Confirmation that a server was removed."""

    registration_id: Uuid
    status: Literal["deregistered"] = "deregistered"


@attrs.frozen(kw_only=True)
class OwnerToken:
    """A new owner token, shown once. It replaces the previous token, which no longer works."""

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
    """The result of a connection test."""

    __test__ = False  # for pytest

    ok: bool
    reason: str | None
    warning: str | None
    steps: list[Step]


@attrs.frozen(kw_only=True)
class ServerCounts:
    """The number of servers by state, and the number of models."""

    total_servers: int
    active_servers: int
    healthy_servers: int
    unhealthy_servers: int
    unknown_servers: int
    inactive_servers: int
    attention_servers: Annotated[int, Meta(description="healthy servers that may not have their model; `healthy_servers` includes them")]
    models: int


def counts_of(totals: ServerTotals) -> ServerCounts:
    """Return the number of servers by state, and the number of models."""
    return ServerCounts(
        total_servers=totals.servers,
        active_servers=totals.active,
        healthy_servers=totals.healthy,
        unhealthy_servers=totals.unhealthy,
        unknown_servers=totals.unknown,
        inactive_servers=totals.inactive,
        attention_servers=totals.attention,
        models=totals.models,
    )


@attrs.frozen(kw_only=True)
class Stats(ServerCounts):
    """The totals of the dashboard. Requests are counted by this process since its start."""

    state: Literal["healthy", "degraded", "unhealthy", "empty"]
    requests_handled: int
    requests: dict[str, int]
    in_flight: int
    uptime_seconds: float
    version: str


@attrs.frozen(kw_only=True)
class GatewayHealth:
    """The response of `GET /health`: status, version, database and server counts."""

    status: Literal["ok", "degraded", "stopping"]
    version: str
    database: Literal["ok", "unavailable"]
    database_reason: str | None
    """Why the database is unavailable, and what to do; null while it works."""
    servers: Literal["healthy", "degraded", "unhealthy", "empty"]
    counts: ServerCounts
    uptime_seconds: float


@attrs.frozen(kw_only=True)
class Word:
    """The status of the gateway in one word."""

    status: str


@attrs.frozen(kw_only=True)
class ModelServers:
    """The number of servers that offer a model."""

    servers_healthy: int
    servers_total: int
    largest_context_length: Annotated[
        int | UnsetType, Meta(description="tokens that the server with the most room has room for, as measured; omitted if unknown")
    ] = UNSET
    trained_context_length: Annotated[int | UnsetType, Meta(description="tokens that the model was made for; omitted if unknown")] = UNSET
    abilities: Annotated[
        dict[str, bool] | UnsetType, Meta(description="true: a server can do it; false: none can; what is unknown is omitted")
    ] = UNSET


@attrs.frozen(kw_only=True)
class ModelItem:
    """A model in OpenAI's format, with the number of its servers."""

    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Meta(description=EPOCH_SECONDS)]
    owned_by: str
    available_servers: int
    total_servers: int
    multiverse: ModelServers
    context_length: Annotated[
        int | UnsetType,
        Meta(description="context length in tokens that every server of the model has, as measured or stated; omitted if it is unknown"),
    ] = UNSET
    alias_of: Annotated[
        list[str] | UnsetType, Meta(description="the models that an alias stands for, in order of preference; omitted for a model")
    ] = UNSET


@attrs.frozen(kw_only=True)
class AliasRecord:
    """An alias and the models that it stands for, in order of preference."""

    name: str
    models: list[str]
    created_at: Time
    updated_at: Time


def alias_record(alias: Alias) -> AliasRecord:
    """Return the record of an alias."""
    return AliasRecord(name=alias.name, models=list(alias.models), created_at=iso(alias.created_at), updated_at=iso(alias.updated_at))


@attrs.frozen(kw_only=True)
class ModelList:
    """The response of `GET /v1/models`, in OpenAI's format."""

    object: Literal["list"] = "list"
    data: list[ModelItem]


@attrs.frozen(kw_only=True)
class QueuedModel:
    """The load of a model. `people_waiting` is the number of keys and addresses that have a waiting request."""

    model: str
    slots: Annotated[int | None, Meta(description="concurrent requests that its servers accept; null means no limit")]
    running: int
    waiting: int
    people_waiting: int


@attrs.frozen(kw_only=True)
class QueuedRequest:
    """One of the caller's waiting requests."""

    request_id: str
    model: str
    position: Annotated[int, Meta(description="place in the queue; 1 starts next unless another request is ranked before it")]
    waiting: Annotated[int, Meta(description="all waiting requests for the model")]
    waited_seconds: float
    about_seconds: Annotated[
        int | None,
        Meta(description="estimated wait in seconds: 5, 10, 20, 30, 60, 120 or 240; null while there is no estimate"),
    ]
    priority: Literal["interactive", "bulk"]


@attrs.frozen(kw_only=True)
class QueueList:
    """The load of each model, and the caller's own waiting requests."""

    object: Literal["list"] = "list"
    data: list[QueuedModel]
    yours: list[QueuedRequest]


@attrs.frozen(kw_only=True)
class StoredAnswer:
    """The stored response, as returned by the server that created it."""

    id: str
    object: str


@attrs.frozen(kw_only=True)
class DeletedResponse:
    """Confirmation from the server that it deleted a response."""

    id: str
    deleted: bool


@attrs.frozen(kw_only=True)
class InputItems:
    """The input items of a response, as returned by the server that created it."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


@attrs.frozen(kw_only=True)
class UsageRecord(Counts):
    """Requests and tokens of one group; fields that the report is not grouped by are null."""

    day: str | None
    model: str | None
    server: Annotated[str | None, Meta(description="id of the server; empty if no server answered")]
    owner: Annotated[str | None, Meta(description="owner of the server (`student_id`); empty if it has none")]
    client: Annotated[str | None, Meta(description="name of the client key; empty for clients without a key")]
    client_id: Annotated[str | None, Meta(description="id of the client key")]


@attrs.frozen(kw_only=True)
class UsageReport:
    """Usage from day `since` to day `until`, both included."""

    since: str
    until: str
    total: Counts
    rows: list[UsageRecord]


def usage_report(summary: UsageSummary) -> UsageReport:
    """Return the usage report of a summary."""
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
    """An error, for people (`message`) and for programs (`type`, `code`)."""

    message: Annotated[str, Meta(description="what happened and what to do next")]
    type: str
    param: Annotated[str | None, Meta(description="the field that caused the error")]
    code: str | None


@attrs.frozen(kw_only=True)
class ErrorAnswer:
    """An error in OpenAI's format."""

    error: ErrorFacts


@attrs.frozen(kw_only=True)
class AnthropicErrorFields:
    """An error in the terms of Anthropic's API."""

    type: str
    message: str


@attrs.frozen(kw_only=True)
class AnthropicErrorAnswer:
    """An error in Anthropic's format, returned by the calls of its API."""

    type: Literal["error"] = "error"
    error: AnthropicErrorFields
    request_id: str | None
