"""Reading the bodies and queries of the admin API into the types of `request_types`, and those into values of `core`.

1. Reading is strict: unknown fields are errors, types are not converted, each error names its field.
2. Null means the default, where there is one.
3. White space around a text is dropped, also a line feed at its end: files and shells add it.
"""

import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

import attrs
import cattrs
from msgspec import Meta

from multiverse_gateway.api.request_types import (
    UNNAMED,
    ConnectionTest,
    ExportedHost,
    HostFields,
    Import,
    KeyChange,
    KeyLimits,
    NewAlias,
    NewKey,
    Registration,
    UnfitValue,
    UsageQuery,
)
from multiverse_gateway.core.errors import BadRequest, InvalidField
from multiverse_gateway.core.registry_plans import Change, HostChange, Imported, ImportedHost, ImportedRegistry
from multiverse_gateway.core.servers import KeyTerms, ServerId
from multiverse_gateway.core.usage_reports import UsageSelection

_Kind = TypeVar("_Kind")


class UnknownField(UnfitValue):
    """There is no such field; `fields` are the names of the fields that exist."""

    def __init__(self, name: str, fields: Iterable[str]) -> None:
        super().__init__("")
        self.path = name[:128].encode(errors="replace").decode()
        self.fields = tuple(fields)


@contextmanager
def _at(name: str) -> Iterator[None]:
    try:
        yield
    except UnfitValue as error:
        if isinstance(error, UnknownField):
            error.fields = tuple(f"{name}.{field}" for field in error.fields)
        error.path = f"{name}.{error.path}" if error.path else name
        raise


def _of_fields(kind: type[Any], _: object = None) -> Callable[[Any, Any], Any]:
    fields = {field.name: field for field in attrs.fields(attrs.resolve_types(kind, include_extras=True))}

    def structure(value: Any, _: object) -> Any:
        if not isinstance(value, dict):
            raise UnfitValue(" must be a JSON object")
        for name in value:
            if name not in fields:
                raise UnknownField(name, fields)
        given = {}
        for name, field in fields.items():
            with _at(name):
                if value.get(name) is not None:
                    given[name] = _CONVERTER.structure(value[name], field.type)
                elif field.default is attrs.NOTHING:
                    raise UnfitValue(" is missing; add it")
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
                raise UnfitValue(f" must be a whole number from {mark.ge:,} to {mark.le:,}")
            what = mark.description if isinstance(value, str) else f"a list of at most {mark.max_length:,}"
            raise UnfitValue(f" must be {what}")
    return value


def _fits(value: Any, meta: Meta) -> bool:
    if meta.ge is not None and value < meta.ge:
        return False
    if meta.le is not None and value > meta.le:
        return False
    if meta.max_length is not None and len(value) > meta.max_length:
        return False
    return meta.pattern is None or re.fullmatch(meta.pattern.removeprefix("^").removesuffix("$"), value) is not None


def _exactly(kind: type, requirement: str) -> None:
    def structure(value: Any, _: object) -> Any:
        if type(value) is not kind:
            raise UnfitValue(f" must be {requirement}")
        return value

    _CONVERTER.register_structure_hook(kind, structure)


def _one_of(value: Any, kind: Any) -> Any:
    choices = typing.get_args(kind)
    if value not in choices or isinstance(value, bool):
        raise UnfitValue(f" must be {'one of ' if len(choices) > 1 else ''}{', '.join(map(str, choices))}")
    return value


def _listed(values: Any, kind: Any) -> list[Any]:
    (inner,) = typing.get_args(kind)
    if not isinstance(values, list):
        raise UnfitValue(" must be a list")
    items = []
    for number, value in enumerate(values):
        with _at(f"[{number}]"):
            items.append(_CONVERTER.structure(value, inner))
    return items


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
    """Return the value that a body states.

    Raises:
        BadRequest: A field is missing, unknown or cannot be used; `param` names it.
    """
    try:
        return _CONVERTER.structure(body, kind)
    except UnfitValue as error:
        path = error.path.replace(".[", "[")
        if isinstance(error, UnknownField):
            fields = ", ".join(name.replace(".[", "[") for name in error.fields)
            raise BadRequest(f"There is no field {path}; the fields are {fields}", param=path) from None
        if not path:
            raise BadRequest(f"The body{error.problem}") from None
        raise InvalidField(path, error.problem) from None


def read_query(query: Mapping[str, str], kind: type[_Kind]) -> _Kind:
    """Return the value that a query states; unknown names are ignored.

    Raises:
        BadRequest: A value cannot be used; `param` names it.
    """
    fields = attrs.fields_dict(kind)  # type: ignore[arg-type]
    return read({name: _of_text(query[name], fields[name].type) for name in fields if name in query}, kind)


def _of_text(text: str, kind: Any) -> Any:
    """Return the value of a text in a query for a field of the type; any other text stays a text, and is rejected later."""
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
    test = read(body, ConnectionTest)
    return test if test.model_name else attrs.evolve(test, model_name=UNNAMED)


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


def parse_host_change(body: Any) -> HostChange:
    """Read the partial body of a change of a host; null clears what is optional.

    Raises:
        BadRequest: A field is unknown or cannot be used; `param` names it.
    """
    whole = read(body, HostFields)
    if "endpoint_url" in body and whole.endpoint_url is None:
        raise InvalidField("endpoint_url", " cannot be cleared; write a value or leave it out")
    return HostChange(fields={name: getattr(whole, name) for name in body})


def _named(body: Mapping[str, Any], group: str, change: Any) -> dict[str, Any]:
    """Return the values of a group that the body names; null names all of them."""
    if group not in body:
        return {}
    values = attrs.asdict(change)
    return values if body[group] is None else {name: values[name] for name in body[group]}


def parse_import(body: Any) -> ImportedRegistry:
    """Read what an export wrote, or a hand-written `{"servers": [registration, …]}`.

    Raises:
        BadRequest: Something cannot be used; `param` names it, such as `servers[3].model_name`. Nothing was imported then.
    """
    wanted = read(body, Import)
    servers = tuple(
        Imported(
            registration=Registration(**{field.name: getattr(server, field.name) for field in attrs.fields(Registration)}),
            id=server.registration_id,  # type: ignore[arg-type]  # its reader made it one
            registered_at=server.registered_at,  # type: ignore[arg-type]
            has_key="api_key" in given,
        )
        for server, given in zip(wanted.servers, body["servers"], strict=True)
    )
    positions = {server.id: number for number, server in enumerate(servers) if server.id is not None}
    return ImportedRegistry(
        servers=servers,
        hosts=tuple(
            ImportedHost(servers=_positions(host, number, positions), max_concurrency=host.max_concurrency)
            for number, host in enumerate(wanted.hosts)
        ),
        aliases=tuple((alias.name, tuple(alias.models)) for alias in wanted.aliases),
    )


def _positions(host: ExportedHost, number: int, positions: Mapping[ServerId, int]) -> tuple[int, ...]:
    try:
        return tuple(positions[ServerId(server_id)] for server_id in host.servers)
    except KeyError:
        raise InvalidField(f"hosts[{number}].servers", " must name servers of this import by their registration_id") from None


def parse_new_key(body: Any) -> tuple[str, KeyTerms]:
    """Read the body that makes a client key; return the name and the terms of the key.

    Raises:
        BadRequest: A field is missing, unknown or cannot be used; `param` names it.
    """
    new_key = read(body, NewKey)
    return new_key.name, _terms_of(new_key)


@attrs.frozen(kw_only=True)
class KeyChanges:
    """What changes of a client key: of the terms those that `named` lists, by attribute; `None` for a name or a block that stays."""

    terms: KeyTerms
    named: tuple[str, ...]
    name: str | None = None
    is_blocked: bool | None = None


def parse_alias(name: str, body: Any) -> tuple[str, list[str]]:
    """Read the name in the path and the body that define an alias.

    Raises:
        BadRequest: The name or the list cannot be used; `param` names the field.
    """
    return name, read({"name": name, **body} if isinstance(body, dict) else body, NewAlias).models


def parse_key_change(body: Any) -> KeyChanges:
    """Read the body that changes a client key.

    Raises:
        BadRequest: A field is unknown or cannot be used; `param` names it.
    """
    change = read(body, KeyChange)
    return KeyChanges(
        terms=_terms_of(change),
        named=tuple(_TERMS.get(name, name) for name in body if name not in ("name", "blocked")),
        name=change.name,
        is_blocked=change.blocked if "blocked" in body else None,
    )


_TERMS = {"bulk": "is_bulk"}
"""The terms of a client key that have other names in the API."""


def _terms_of(body: KeyLimits) -> KeyTerms:
    return KeyTerms(
        expires_at=body.expires_at,  # type: ignore[arg-type]  # its reader made it an instant
        rate_limit=body.rate_limit,
        daily_limit=body.daily_limit,
        max_at_once=body.max_at_once,
        is_bulk=body.bulk,
        models=tuple(dict.fromkeys(body.models)),
    )


def selection_of(query: UsageQuery) -> UsageSelection:
    """Return which counts a query asks for."""
    return UsageSelection(
        since=query.since,
        until=query.until,
        by=frozenset(query.by.split(",")),
        model=query.model,
        server=query.server,
        owner=query.owner,
        client=query.client,
    )
