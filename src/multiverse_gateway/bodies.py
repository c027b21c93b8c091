"""The bodies and queries of the admin API: types, from which both the reading (cattrs) and the JSON Schema (msgspec) are made.

1. Reading is strict: unknown fields are errors, types are not converted, each error names its field.
2. Null stands for the default, where there is one.
3. White space around a text is dropped, a line feed at its end included: files and shells add it.
4. What a `Meta` says is a rule for both; its description completes the sentence "FIELD must be ...".
"""

import re
import typing
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime
from typing import Annotated, Any, Final, Literal, TypeVar

import attrs
import cattrs
from msgspec import Meta

from multiverse_gateway.core.addresses import EndpointError, parse_root
from multiverse_gateway.core.errors import BadRequest, InvalidField
from multiverse_gateway.core.registry_plans import Imported
from multiverse_gateway.core.servers import (
    MAX_AT_ONCE,
    MAX_CONCURRENCY,
    MAX_DAILY_LIMIT,
    MAX_WEIGHT,
    MODEL_NAME,
    Capabilities,
    Metadata,
    Server,
    ServerId,
)

MAX_KEY_LENGTH = 512
MAX_IMPORT = 10_000
PAGE = 1000
HISTORY = 100
EXPORT_FORMAT: Final = 1

_Kind = TypeVar("_Kind")


# Values


def _url(value: str) -> str:
    try:
        return parse_root(value).url
    except EndpointError as error:
        raise Unfit(f": {error}") from None


def _uuid(value: str) -> ServerId:
    try:
        return ServerId(str(uuid.UUID(value)))
    except ValueError:
        raise Unfit(" must be a UUID, such as the one that registering answers with") from None


def _instant(value: str) -> float:
    try:
        instant = datetime.fromisoformat(value)
        if instant.tzinfo is None:
            raise ValueError
        seconds = instant.timestamp()
        datetime.fromtimestamp(seconds, UTC)  # what is given can be written again: the zone, or rounding, may lead out of all years
        return seconds
    except (ValueError, OverflowError, OSError):
        raise Unfit(" must be a time in ISO 8601 with zone, such as 2026-05-01T12:00:00+00:00") from None


def _day(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise Unfit(" must be a date, such as 2026-05-01") from None


ModelName = Annotated[
    str,
    Meta(
        pattern=f"^{MODEL_NAME.pattern}$",
        description="1 to 128 letters, digits or any of . _ - : / @ +, such as llama-3.2:3b",
        examples=["llama-3.2:3b"],
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
        description=f"1 to {MAX_KEY_LENGTH} visible ASCII characters without spaces; leave it out if the server asks for no key",
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
    Meta(
        pattern="^[A-Za-z0-9._@+-][A-Za-z0-9 ._@+-]{0,63}$",
        description="1 to 64 letters, digits, blanks or any of . _ @ + -, not beginning with a blank",
        examples=["alice"],
    ),
]
Day = Annotated[
    str, Meta(description="a date in UTC, such as 2026-05-01", examples=["2026-05-01"], extra_json_schema={"format": "date"}), _day
]


# Bodies


_CAP = (
    "how many requests it may get at once, null for any number; left out of a registration, it is what the server's engine states, "
    "or what it was before"
)


@attrs.frozen(kw_only=True)
class Registration:
    """A server as its host describes it; `endpoint_url` is canonical."""

    model_name: ModelName
    endpoint_url: EndpointUrl
    api_key: ServerKey | None = attrs.field(default=None, repr=False)
    capabilities: Capabilities = attrs.field(factory=Capabilities)
    metadata: Metadata = attrs.field(factory=Metadata)
    max_concurrency: Annotated[int, Meta(ge=1, le=MAX_CONCURRENCY, description=_CAP)] | None = None
    weight: Annotated[int, Meta(ge=1, le=MAX_WEIGHT, description="its share of the traffic with the balancer `weighted`")] = 1


@attrs.frozen(kw_only=True)
class ConnectionTest(Registration):
    """A registration that is only tried; the model may be left out."""

    model_name: Annotated[str, Meta(pattern=f"^({MODEL_NAME.pattern})?$", description="the model's name, or nothing")] = "unnamed"


@attrs.frozen(kw_only=True)
class ImportedServer(Registration):
    """One server of an export; a key that is not named stays."""

    registration_id: Uuid | None = None
    registered_at: Instant | None = None
    has_api_key: Any = None


@attrs.frozen(kw_only=True)
class Import:
    """What an export wrote, or a list of registrations written by hand."""

    servers: Annotated[list[ImportedServer], Meta(max_length=MAX_IMPORT)]
    format: Literal[1] = EXPORT_FORMAT
    exported_at: Any = None


@attrs.frozen(kw_only=True)
class KeyChange:
    """The fields of a client key that change. Those that are left out keep their values; null sets the default of a new key."""

    expires_at: Instant | None = None
    rate_limit: Annotated[int, Meta(ge=0, le=1_000_000, description="requests per minute; 0 for no limit")] | None = None
    daily_limit: Annotated[int, Meta(ge=1, le=MAX_DAILY_LIMIT, description="requests to models per day (UTC)")] | None = None
    max_at_once: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=MAX_AT_ONCE,
                description="requests that may run and wait together when another one would have to wait; 0 for no limit, "
                "null for the value of MAX_AT_ONCE_PER_KEY at the moment",
            ),
        ]
        | None
    ) = None
    bulk: Annotated[bool, Meta(description="whether its requests yield to interactive ones")] = False
    models: Annotated[list[ModelName], Meta(max_length=1000, description="the models that it may use; an empty list means all")] = (
        attrs.field(factory=list)
    )


@attrs.frozen(kw_only=True)
class NewKey(KeyChange):
    """A client key that is to be made."""

    name: KeyName


# Queries


@attrs.frozen(kw_only=True)
class ServersQuery:
    """Which records are listed, and in which order."""

    model_name: str | None = None
    health_status: Literal["healthy", "unhealthy", "unknown"] | None = None
    student_id: str | None = None
    include_inactive: Annotated[bool, Meta(description="include servers that were taken out or removed")] = False
    sort: Literal["registered_at", "updated_at", "last_checked_at", "model_name", "health_status", "student_id"] = "registered_at"
    order: Literal["asc", "desc"] = "asc"
    limit: Annotated[int, Meta(ge=1, le=PAGE)] = PAGE
    offset: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


@attrs.frozen(kw_only=True)
class HistoryQuery:
    """How many checks are listed."""

    limit: Annotated[int, Meta(ge=1, le=HISTORY)] = HISTORY


@attrs.frozen(kw_only=True)
class LogsQuery:
    """Which log records are listed, newest last."""

    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Meta(description="the minimum level")] = "DEBUG"
    component: str | None = None
    text: str | None = None
    since: Instant | None = None
    limit: Annotated[int, Meta(ge=1, le=2000)] = 200


@attrs.frozen(kw_only=True)
class ExportQuery:
    """What an export holds."""

    include_keys: Annotated[bool, Meta(description="include the servers' own keys, in plain text")] = False


@attrs.frozen(kw_only=True)
class UsageQuery:
    """Which days are counted, and what is counted apart."""

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


# What they become


@attrs.frozen(kw_only=True)
class Change:
    """What a partial body names, by attribute of `Server`, `Capabilities` and `Metadata`; the rest stays."""

    fields: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    capabilities: Mapping[str, Any] = attrs.field(factory=dict)
    metadata: Mapping[str, Any] = attrs.field(factory=dict)

    def apply(self, server: Server) -> Server:
        """Return the server as it will be, its generation and times untouched."""
        return attrs.evolve(
            server,
            **self.fields,
            capabilities=attrs.evolve(server.capabilities, **self.capabilities),
            metadata=attrs.evolve(server.metadata, **self.metadata),
        )


# Reading


class Unfit(ValueError):
    """A value cannot be used; `words` go on after the field's name, `path` is the field's, from the outside in."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words
        self.path = ""


class Unknown(Unfit):
    """There is no such field; `known` are those that there are."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__("")
        self.path = name[:128].encode(errors="replace").decode()
        self.known = tuple(known)


@contextmanager
def _at(name: str) -> Iterator[None]:
    try:
        yield
    except Unfit as error:
        if isinstance(error, Unknown):
            error.known = tuple(f"{name}.{known}" for known in error.known)
        error.path = f"{name}.{error.path}" if error.path else name
        raise


def _of_fields(kind: type[Any], _: object = None) -> Callable[[Any, Any], Any]:
    fields = {field.name: field for field in attrs.fields(attrs.resolve_types(kind, include_extras=True))}

    def structure(value: Any, _: object) -> Any:
        if not isinstance(value, dict):
            raise Unfit(" must be a JSON object")
        for name in value:
            if name not in fields:
                raise Unknown(name, fields)
        given = {}
        for name, field in fields.items():
            with _at(name):
                if value.get(name) is not None:
                    given[name] = _CONVERTER.structure(value[name], field.type)
                elif field.default is attrs.NOTHING:
                    raise Unfit(" is missing; add it")
        return kind(**given)

    return structure


def _bounded(value: Any, kind: Any) -> Any:
    base, *marks = typing.get_args(kind)
    value = _CONVERTER.structure(value, base)
    if isinstance(value, str):
        value = value.strip()
    for mark in marks:
        if not isinstance(mark, Meta):
            value = mark(value)
        elif not _fits(value, mark):
            if isinstance(value, int):
                raise Unfit(f" must be a whole number from {mark.ge:,} to {mark.le:,}")
            what = mark.description if isinstance(value, str) else f"a list of at most {mark.max_length:,}"
            raise Unfit(f" must be {what}")
    return value


def _fits(value: Any, meta: Meta) -> bool:
    if meta.ge is not None and value < meta.ge:
        return False
    if meta.le is not None and value > meta.le:
        return False
    if meta.max_length is not None and len(value) > meta.max_length:
        return False
    return meta.pattern is None or re.fullmatch(meta.pattern.removeprefix("^").removesuffix("$"), value) is not None


def _exactly(kind: type, words: str) -> None:
    def structure(value: Any, _: object) -> Any:
        if type(value) is not kind:
            raise Unfit(f" must be {words}")
        return value

    _CONVERTER.register_structure_hook(kind, structure)


def _one_of(value: Any, kind: Any) -> Any:
    words = typing.get_args(kind)
    if value not in words or isinstance(value, bool):
        raise Unfit(f" must be {'one of ' if len(words) > 1 else ''}{', '.join(map(str, words))}")
    return value


def _listed(values: Any, kind: Any) -> list[Any]:
    (inner,) = typing.get_args(kind)
    if not isinstance(values, list):
        raise Unfit(" must be a list")
    found = []
    for number, value in enumerate(values):
        with _at(f"[{number}]"):
            found.append(_CONVERTER.structure(value, inner))
    return found


def _made_of(origin: Any) -> Callable[[Any], bool]:
    return lambda kind: typing.get_origin(kind) is origin


_CONVERTER = cattrs.Converter(detailed_validation=False)
_exactly(str, "a string")
_exactly(bool, "true or false")
_exactly(int, "a whole number")
_CONVERTER.register_structure_hook_factory(attrs.has, _of_fields)
_CONVERTER.register_structure_hook_func(_made_of(list), _listed)
_CONVERTER.register_structure_hook_func(_made_of(Literal), _one_of)
_CONVERTER.register_structure_hook_func(_made_of(Annotated), _bounded)


def read(body: Any, kind: type[_Kind]) -> _Kind:
    """Make a value of what stands in a body.

    Raises:
        BadRequest: A field is missing, unknown or cannot be used; `param` names it.
    """
    try:
        return _CONVERTER.structure(body, kind)
    except Unfit as error:
        path = error.path.replace(".[", "[")
        if isinstance(error, Unknown):
            known = ", ".join(name.replace(".[", "[") for name in error.known)
            raise BadRequest(f"There is no field {path}; the fields are {known}", param=path) from None
        if not path:
            raise BadRequest(f"The body{error.words}") from None
        raise InvalidField(path, error.words) from None


def read_query(query: Mapping[str, str], kind: type[_Kind]) -> _Kind:
    """Make a value of a query; names that mean nothing here are let pass.

    Raises:
        BadRequest: A value cannot be used; `param` names it.
    """
    fields = attrs.fields_dict(kind)  # type: ignore[arg-type]
    return read({name: _of_text(query[name], fields[name].type) for name in fields if name in query}, kind)


def _of_text(text: str, kind: Any) -> Any:
    """Return what a text in a query says to a field of the type; what says nothing stays a text, and is refused as one."""
    base = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    if base is int and text.isascii() and text.isdigit() and len(text) <= 12:
        return int(text)
    if base is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text, text)
    return text


def parse_registration(body: Any) -> Registration:
    """Read the body of a registration.

    >>> parse_registration({"model_name": "tiny", "endpoint_url": "http://gpu.example:8000/v1/"}).endpoint_url
    'http://gpu.example:8000'

    Raises:
        BadRequest: A field is missing, unknown or cannot be used; `param` names it.
    """
    return read(body, Registration)


def names_cap(body: Mapping[str, Any]) -> bool:
    """Return whether the body of a registration says how many requests the server may get at once; null says any number.

    >>> names_cap({"max_concurrency": None}), names_cap({})
    (True, False)
    """
    return "max_concurrency" in body


def parse_test(body: Any) -> Registration:
    """Read the body of a connection test: a registration, of which only `endpoint_url` must be there.

    Raises:
        BadRequest: As for a registration.
    """
    found = read(body, ConnectionTest)
    return found if found.model_name else attrs.evolve(found, model_name="unnamed")


_NEEDED = {"model_name": "unnamed", "endpoint_url": "https://unnamed.example"}


def parse_change(body: Any) -> Change:
    """Read the partial body of an update; null clears what is optional.

    >>> parse_change({"capabilities": {"max_tokens": None}}).capabilities
    {'max_tokens': None}

    Raises:
        BadRequest: A field is unknown or cannot be used; `param` names it.
    """
    if isinstance(body, dict):
        for name in _NEEDED:
            if name in body and body[name] is None:
                raise InvalidField(name, " cannot be cleared; write a value or leave it out")
        whole = read({**_NEEDED, **body}, Registration)
    else:
        whole = read(body, Registration)
    return Change(
        fields={name: getattr(whole, name) for name in body if name not in ("capabilities", "metadata")},
        capabilities=_named(body, "capabilities", whole.capabilities),
        metadata=_named(body, "metadata", whole.metadata),
    )


def _named(body: Mapping[str, Any], group: str, found: Any) -> dict[str, Any]:
    """Return those of a group's values that the body names; null names all."""
    if group not in body:
        return {}
    values = attrs.asdict(found)
    return values if body[group] is None else {name: values[name] for name in body[group]}


def parse_import(body: Any) -> tuple[Imported, ...]:
    """Read what `export_registry` wrote, or a hand-written `{"servers": [registration, …]}`.

    Raises:
        BadRequest: Something cannot be used; `param` names it, such as `servers[3].model_name`. Nothing was imported then.
    """
    found = read(body, Import)
    return tuple(
        Imported(
            registration=Registration(**{field.name: getattr(server, field.name) for field in attrs.fields(Registration)}),
            id=server.registration_id,  # type: ignore[arg-type]  # its reader made it one
            registered_at=server.registered_at,  # type: ignore[arg-type]
            has_key="api_key" in given,
        )
        for server, given in zip(found.servers, body["servers"], strict=True)
    )
