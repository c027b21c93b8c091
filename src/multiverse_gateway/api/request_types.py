"""The bodies and queries of the admin API as types, from which both their parsing (`request_reading`) and their JSON Schema are derived.

A `Meta` applies to both; its description completes the sentence "FIELD must be …". A function beside it parses the text.
"""

import uuid
from datetime import UTC, date, datetime
from typing import Annotated, Any, Final, Literal

import attrs
from msgspec import Meta

from multiverse_gateway.core.addresses import EndpointError, parse_root
from multiverse_gateway.core.aliases import MAX_ALIASES
from multiverse_gateway.core.aliases import MAX_MODELS as MAX_MODELS_OF_ALIAS
from multiverse_gateway.core.key_names import MAX_KEY_NAME, UnfitName, key_name
from multiverse_gateway.core.servers import (
    MAX_AT_ONCE,
    MAX_CONCURRENCY,
    MAX_DAILY_LIMIT,
    MAX_UPSTREAM_MODEL,
    MAX_WEIGHT,
    MODEL_NAME,
    ONE_LINE,
    Capabilities,
    Metadata,
    ServerId,
    StudentId,
)

MAX_KEY_LENGTH = 512
MAX_IMPORT = 10_000
PAGE = 1000
HISTORY = 100
EXPORT_FORMAT: Final = 1

# Values


class UnfitValue(ValueError):
    """A value is invalid. `problem` completes a sentence that begins with the field's name; `path` is the path of the field."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = ""


def _url(value: str) -> str:
    try:
        return parse_root(value).url
    except EndpointError as error:
        raise UnfitValue(f": {error}") from None


def _uuid(value: str) -> ServerId:
    try:
        return ServerId(str(uuid.UUID(value)))
    except ValueError:
        raise UnfitValue(" must be a UUID, such as the id returned by a registration") from None


def _instant(value: str) -> float:
    try:
        instant = datetime.fromisoformat(value)
        if instant.tzinfo is None:
            raise ValueError
        seconds = instant.timestamp()
        datetime.fromtimestamp(seconds, UTC)  # it must be representable in UTC: the zone, or rounding, may leave the range of years
        return seconds
    except (ValueError, OverflowError, OSError):
        raise UnfitValue(" must be a time in ISO 8601 with zone, such as 2026-05-01T12:00:00+00:00") from None


def _key_name(value: str) -> str:
    try:
        return key_name(value)
    except UnfitName as error:
        raise UnfitValue(f" {error}") from None


def _day(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise UnfitValue(" must be a date, such as 2026-05-01") from None


ModelName = Annotated[
    str,
    Meta(
        pattern=f"^{MODEL_NAME.pattern}$",
        description="1 to 128 letters, digits or any of . _ - : / @ +, such as llama-3.2:3b",
        examples=["llama-3.2:3b"],
    ),
]
UpstreamModel = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_UPSTREAM_MODEL,
        pattern=ONE_LINE,
        description=f"one line of at most {MAX_UPSTREAM_MODEL} characters, without control characters, such as org/Llama-3.2-3B-Instruct",
        examples=["org/Llama-3.2-3B-Instruct"],
    ),
]
EndpointUrl = Annotated[
    str,
    Meta(
        description="the URL of the server's root, such as http://host:8000; a trailing /v1 is dropped",
        examples=["https://gpu.example"],
        extra_json_schema={"format": "endpoint-url"},
    ),
    _url,
]
ServerKey = Annotated[
    str,
    Meta(
        pattern=f"^[!-~]{{1,{MAX_KEY_LENGTH}}}$",
        description=f"1 to {MAX_KEY_LENGTH} visible ASCII characters without spaces; omit it if the server needs no key",
        examples=["the-key-of-the-server"],
    ),
]
Uuid = Annotated[str, Meta(description="a UUID", extra_json_schema={"format": "uuid"}), _uuid]
Instant = Annotated[
    str,
    Meta(description="a time in ISO 8601 with zone", examples=["2026-05-01T12:00:00+00:00"], extra_json_schema={"format": "date-time"}),
    _instant,
]
KeyName = Annotated[
    str,
    _key_name,
    Meta(
        description=f"1 to {MAX_KEY_NAME} printable characters of any language, none of them invisible; it is kept in Unicode's form NFC",
        examples=["Jürgen Müller"],
        extra_json_schema={"format": "key-name"},
    ),
]
Day = Annotated[
    str, Meta(description="a date in UTC, such as 2026-05-01", examples=["2026-05-01"], extra_json_schema={"format": "date"}), _day
]


# Bodies


_CAP = (
    "the maximum number of concurrent requests, null for no limit; if a registration omits it, the limit that the server's engine "
    "reports, or the previous one"
)


@attrs.frozen(kw_only=True)
class Registration:
    """A server to register (a `core.registry_plans.Description`); `endpoint_url` is normalized."""

    model_name: ModelName
    endpoint_url: EndpointUrl
    api_key: ServerKey | None = attrs.field(default=None, repr=False)
    capabilities: Capabilities = attrs.field(factory=Capabilities)
    metadata: Metadata = attrs.field(factory=Metadata)
    max_concurrency: Annotated[int, Meta(ge=1, le=MAX_CONCURRENCY, description=_CAP)] | None = None
    weight: Annotated[int, Meta(ge=1, le=MAX_WEIGHT, description="the server's share of the traffic with the balancer `weighted`")] = 1
    upstream_model: UpstreamModel | None = None


UNNAMED = "unnamed"
"""Stands for the model of a server that is tested without one."""


@attrs.frozen(kw_only=True)
class ConnectionTest(Registration):
    """A server to test without registering it; the model is optional."""

    model_name: Annotated[str, Meta(pattern=f"^({MODEL_NAME.pattern})?$", description="the name of the model, or empty")] = UNNAMED


@attrs.frozen(kw_only=True)
class AliasChange:
    """The models that an alias stands for; each request gets the first of them that can serve it."""

    models: Annotated[
        list[ModelName],
        Meta(
            min_length=1,
            max_length=MAX_MODELS_OF_ALIAS,
            description=f"1 to {MAX_MODELS_OF_ALIAS} models, the preferred one first",
        ),
    ]


@attrs.frozen(kw_only=True)
class NewAlias(AliasChange):
    """An alias to define, with the name that the path has."""

    name: ModelName


@attrs.frozen(kw_only=True)
class ImportedServer(Registration):
    """One server of an import. Without `api_key`, the stored key of a known server stays."""

    registration_id: Uuid | None = None
    registered_at: Instant | None = None
    has_api_key: Any = None


_HOST_CAP = "the maximum number of concurrent requests on all servers of the host, null for no limit"


@attrs.frozen(kw_only=True)
class ExportedHost:
    """The limit of a host whose servers do not show it: they have other ones."""

    servers: Annotated[list[Uuid], Meta(min_length=1, max_length=MAX_IMPORT, description="the `registration_id` of each of its servers")]
    max_concurrency: Annotated[int, Meta(ge=1, le=MAX_CONCURRENCY, description=_HOST_CAP)] | None = None


@attrs.frozen(kw_only=True)
class Import:
    """The registry to import: an export of this version or an older one, or a list of servers written by hand."""

    servers: Annotated[list[ImportedServer], Meta(max_length=MAX_IMPORT)]
    hosts: Annotated[list[ExportedHost], Meta(max_length=MAX_IMPORT)] = attrs.field(factory=list)
    aliases: Annotated[list[NewAlias], Meta(max_length=MAX_ALIASES)] = attrs.field(factory=list)
    format: Literal[1] = EXPORT_FORMAT
    exported_at: Any = None


@attrs.frozen(kw_only=True)
class KeyLimits:
    """What a client key may do, and until when."""

    expires_at: Instant | None = None
    rate_limit: Annotated[int, Meta(ge=0, le=1_000_000, description="requests per minute; 0 for no limit")] | None = None
    daily_limit: Annotated[int, Meta(ge=1, le=MAX_DAILY_LIMIT, description="inference requests per day (UTC)")] | None = None
    max_at_once: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=MAX_AT_ONCE,
                description="maximum of running and waiting requests before one that would have to wait is rejected; 0 for no limit, "
                "null for the current value of MAX_AT_ONCE_PER_KEY",
            ),
        ]
        | None
    ) = None
    bulk: Annotated[bool, Meta(description="whether interactive requests go first")] = False
    models: Annotated[list[ModelName], Meta(max_length=1000, description="models that the key may use; an empty list means all")] = (
        attrs.field(factory=list)
    )


@attrs.frozen(kw_only=True)
class KeyChange(KeyLimits):
    """The fields of a client key that change. Those that are left out keep their values; null sets the default of a new key."""

    name: KeyName | None = None
    """`None` changes nothing: a key always has a name."""
    blocked: Annotated[bool, Meta(description="whether requests with this key are rejected until it is unblocked")] = False


@attrs.frozen(kw_only=True)
class NewKey(KeyLimits):
    """A client key to create."""

    name: KeyName


@attrs.frozen(kw_only=True)
class HostFields:
    """The fields of a host that change, with all its servers. Those that are left out keep their values; null clears them."""

    endpoint_url: EndpointUrl | None = None
    """`None` changes nothing: a host always has a URL."""
    api_key: ServerKey | None = attrs.field(default=None, repr=False)
    owner: StudentId | None = None
    max_concurrency: Annotated[int, Meta(ge=1, le=MAX_CONCURRENCY, description=_HOST_CAP)] | None = None


# Queries


@attrs.frozen(kw_only=True)
class ServersQuery:
    """The filters, the order and the page of a list of servers."""

    model_name: str | None = None
    health_status: Literal["healthy", "unhealthy", "unknown"] | None = None
    student_id: str | None = None
    include_inactive: Annotated[bool, Meta(description="include servers that are offline or removed")] = False
    sort: Literal["registered_at", "updated_at", "last_checked_at", "model_name", "health_status", "student_id"] = "registered_at"
    order: Literal["asc", "desc"] = "asc"
    limit: Annotated[int, Meta(ge=1, le=PAGE)] = PAGE
    offset: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


@attrs.frozen(kw_only=True)
class HistoryQuery:
    """The length of a server's history."""

    limit: Annotated[int, Meta(ge=1, le=HISTORY)] = HISTORY


@attrs.frozen(kw_only=True)
class LogsQuery:
    """The filters of a list of log records; the newest comes last."""

    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Meta(description="the minimum level")] = "DEBUG"
    component: str | None = None
    text: str | None = None
    client: Annotated[str | None, Meta(description="the id of a client key: only its requests")] = None
    since: Instant | None = None
    limit: Annotated[int, Meta(ge=1, le=2000)] = 200


@attrs.frozen(kw_only=True)
class ExportQuery:
    """The contents of an export."""

    include_keys: Annotated[bool, Meta(description="include the servers' API keys, in plain text")] = False


@attrs.frozen(kw_only=True)
class UsageQuery:
    """The days, groups and filters of a usage report."""

    since: Day | None = None
    until: Day | None = None
    by: Annotated[
        str,
        Meta(
            pattern="^(day|model|server|owner|client)(,(day|model|server|owner|client))*$",
            description="one or more of day, model, server, owner, client, separated by commas",
            examples=["day,model"],
        ),
    ] = "day,model,server,owner,client"
    model: str | None = None
    server: str | None = None
    owner: str | None = None
    client: str | None = None
    format: Literal["json", "csv"] = "json"
