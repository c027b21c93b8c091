"""What hosts and operators do to the registry: register, change, remove, check, export, import.

1. A body is read strictly: unknown fields are errors, types are not converted, each error names its field.
2. A server is probed before it is accepted; nothing changes when the probe fails.
3. Whoever writes refreshes the gateway's table before it answers: this process routes by what it has just said.
4. Writes of one process are serialised, so two registrations of one pair at once give one id. Probes run outside the lock.
"""

import logging
import re
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

import attrs

from multiverse_gateway.core.addresses import EndpointError, parse_endpoint, refusal
from multiverse_gateway.core.errors import AlreadyRegistered, BadRequest, ProbeRefused, ServerNotFound, StorageUnavailable
from multiverse_gateway.core.servers import MAX_CONCURRENCY, MAX_WEIGHT, MODEL_NAME, Capabilities, Metadata, Server, ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import ProbeResult, Registry

MAX_KEY_LENGTH = 512
MAX_STUDENT_ID = 128
MAX_DESCRIPTION = 1000
MAX_TOKENS = 1_000_000_000
MAX_IMPORT = 10_000
EXPORT_FORMAT = 1

_KEY = re.compile(rf"[!-~]{{1,{MAX_KEY_LENGTH}}}")
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Body = Mapping[str, Any]

_log = logging.getLogger("multiverse_gateway.registry")


# Reading bodies


@attrs.frozen(kw_only=True)
class Registration:
    """A server as its host describes it; `endpoint_url` is canonical."""

    model_name: str
    endpoint_url: str
    api_key: str | None = attrs.field(default=None, repr=False)
    capabilities: Capabilities = attrs.field(factory=Capabilities)
    metadata: Metadata = attrs.field(factory=Metadata)
    max_concurrency: int | None = None
    weight: int = 1


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


@attrs.frozen(kw_only=True)
class Imported:
    """One server of an export; `id` and `registered_at` as far as they were given, `has_key` tells whether it names a key at all."""

    registration: Registration
    id: ServerId | None = None
    registered_at: float | None = None
    has_key: bool = False


Reader = Callable[[Any, str], Any]
"""Make a value of what stands in a body; the text is the field's name for errors."""


def _model_name(value: Any, param: str) -> str:
    if not isinstance(value, str) or not MODEL_NAME.fullmatch(value):
        raise BadRequest(f"{param} must be 1 to 128 letters, digits or any of . _ - : / @ +, such as llama-3.2:3b", param=param)
    return value


def _endpoint_url(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{param} must be a string, such as http://host:8000", param=param)
    try:
        return parse_endpoint(value).url
    except EndpointError as error:
        raise BadRequest(f"{param}: {error}", param=param) from None


def _api_key(value: Any, param: str) -> str:
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        raise BadRequest(
            f"{param} must be 1 to {MAX_KEY_LENGTH} visible ASCII characters without spaces; leave it out if the server asks for no key",
            param=param,
        )
    return value


def _words(longest: int) -> Reader:
    def read(value: Any, param: str) -> str | None:
        if not isinstance(value, str):
            raise BadRequest(f"{param} must be a string of at most {longest} characters, or null", param=param)
        text = value.strip()
        if len(text) > longest:
            raise BadRequest(f"{param} is too long; write at most {longest} characters", param=param)
        if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDI for character in text):
            raise BadRequest(f"{param} contains a line break or an invisible control character; write it on one line without", param=param)
        return text or None

    return read


def _whole(least: int, most: int) -> Reader:
    def read(value: Any, param: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise BadRequest(f"{param} must be a whole number from {least:,} to {most:,}", param=param)
        return value

    return read


def _truth(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{param} must be true or false", param=param)
    return value


def _text_id(value: Any, param: str) -> ServerId:
    try:
        return ServerId(str(uuid.UUID(value)))
    except (ValueError, AttributeError, TypeError):
        raise BadRequest(f"{param} must be a UUID, such as the one that registering answers with", param=param) from None


def _instant(value: Any, param: str) -> float:
    try:
        instant = datetime.fromisoformat(value)
        if instant.tzinfo is None:
            raise ValueError
        return instant.timestamp()
    except (ValueError, TypeError, OverflowError):
        raise BadRequest(f"{param} must be a time in ISO 8601 with zone, such as 2026-05-01T12:00:00+00:00", param=param) from None


def _ignored(value: Any, param: str) -> None:
    """Take a field that an export shows for people only."""


_REQUIRED: Mapping[str, Reader] = {"model_name": _model_name, "endpoint_url": _endpoint_url}
_OPTIONAL: Mapping[str, Reader] = {
    "api_key": _api_key,
    "max_concurrency": _whole(1, MAX_CONCURRENCY),
    "weight": _whole(1, MAX_WEIGHT),
}
_CAPABILITIES: Mapping[str, Reader] = {"max_tokens": _whole(1, MAX_TOKENS), "context_length": _whole(1, MAX_TOKENS), "streaming": _truth}
_METADATA: Mapping[str, Reader] = {"student_id": _words(MAX_STUDENT_ID), "description": _words(MAX_DESCRIPTION)}
_CLEARED: Mapping[str, Any] = {"weight": 1, "streaming": True}
"""What null means where it is not `None`."""
_GROUPS: Mapping[str, Mapping[str, Reader]] = {"capabilities": _CAPABILITIES, "metadata": _METADATA}
_FIELDS = (*_REQUIRED, *_OPTIONAL, *_GROUPS)


def _object(value: Any, param: str | None) -> Body:
    if not isinstance(value, dict):
        raise BadRequest(f"{param or 'The body'} must be a JSON object", param=param)
    return value


def _only(body: Body, known: Iterable[str], prefix: str) -> None:
    names = tuple(known)
    for name in body:
        if name not in names:
            shown = f"{prefix}{name}"[:128].encode(errors="replace").decode()
            raise BadRequest(f"There is no field {shown}; the fields are {', '.join(prefix + known for known in names)}", param=shown)


def _read(body: Body, readers: Mapping[str, Reader], prefix: str) -> dict[str, Any]:
    """Read the fields that the body names; null stands for the default."""
    return {
        name: _CLEARED.get(name) if body[name] is None else read(body[name], prefix + name)
        for name, read in readers.items()
        if name in body
    }


def _read_group(body: Body, group: str, prefix: str) -> dict[str, Any]:
    readers = _GROUPS[group]
    if group not in body:
        return {}
    if body[group] is None:
        return {name: _CLEARED.get(name) for name in readers}
    inner = _object(body[group], prefix + group)
    _only(inner, readers, f"{prefix}{group}.")
    return _read(inner, readers, f"{prefix}{group}.")


def _read_registration(body: Body, prefix: str) -> Registration:
    for name in _REQUIRED:
        if body.get(name) is None:
            raise BadRequest(f"{prefix}{name} is missing; add it", param=prefix + name)
    return Registration(
        **_read(body, _REQUIRED, prefix),
        **_read(body, _OPTIONAL, prefix),
        capabilities=Capabilities(**_read_group(body, "capabilities", prefix)),
        metadata=Metadata(**_read_group(body, "metadata", prefix)),
    )


def parse_registration(body: Any) -> Registration:
    """Read the body of a registration.

    >>> parse_registration({"model_name": "tiny", "endpoint_url": "http://gpu.example:8000/v1/"}).endpoint_url
    'http://gpu.example:8000'

    Raises:
        BadRequest: A field is missing, unknown or cannot be used; `param` names it.
    """
    body = _object(body, None)
    _only(body, _FIELDS, "")
    return _read_registration(body, "")


def parse_test(body: Any) -> Registration:
    """Read the body of a connection test: a registration, of which only `endpoint_url` must be there.

    Raises:
        BadRequest: As for a registration.
    """
    body = _object(body, None)
    named = body if body.get("model_name") not in (None, "") else {**body, "model_name": "unnamed"}
    return parse_registration(named)


def parse_change(body: Any) -> Change:
    """Read the partial body of an update; null clears what is optional.

    >>> parse_change({"capabilities": {"max_tokens": None}}).capabilities
    {'max_tokens': None}

    Raises:
        BadRequest: A field is unknown or cannot be used; `param` names it.
    """
    body = _object(body, None)
    _only(body, _FIELDS, "")
    for name in _REQUIRED:
        if name in body and body[name] is None:
            raise BadRequest(f"{name} cannot be cleared; write a value or leave it out", param=name)
    return Change(
        fields=_read(body, {**_REQUIRED, **_OPTIONAL}, ""),
        capabilities=_read_group(body, "capabilities", ""),
        metadata=_read_group(body, "metadata", ""),
    )


_EXTRA: Mapping[str, Reader] = {"registration_id": _text_id, "registered_at": _instant, "has_api_key": _ignored}


def parse_import(body: Any) -> tuple[Imported, ...]:
    """Read what `export_registry` wrote, or a hand-written `{"servers": [registration, …]}`.

    Raises:
        BadRequest: Something cannot be used; `param` names it, such as `servers[3].model_name`. Nothing was imported then.
    """
    body = _object(body, None)
    _only(body, ("format", "exported_at", "servers"), "")
    if body.get("format", EXPORT_FORMAT) != EXPORT_FORMAT or isinstance(body.get("format"), bool):
        raise BadRequest(f"format must be {EXPORT_FORMAT}; export the registry again with this version of the gateway", param="format")
    servers = body.get("servers")
    if not isinstance(servers, list) or len(servers) > MAX_IMPORT:
        raise BadRequest(f"servers must be a list of at most {MAX_IMPORT:,} registrations", param="servers")
    return tuple(_read_imported(item, f"servers[{number}]") for number, item in enumerate(servers))


def _read_imported(item: Any, name: str) -> Imported:
    body = _object(item, name)
    prefix = f"{name}."
    _only(body, (*_FIELDS, *_EXTRA), prefix)
    extra = _read(body, _EXTRA, prefix)
    return Imported(
        registration=_read_registration(body, prefix),
        id=extra.get("registration_id"),
        registered_at=extra.get("registered_at"),
        has_key="api_key" in body,
    )


# Judging


def iso(instant: float | None) -> str | None:
    """Write an instant in ISO 8601 with zone.

    >>> iso(0.0)
    '1970-01-01T00:00:00.000+00:00'
    """
    return None if instant is None else datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds")


def refuse_address(gateway: Gateway, endpoint_url: str) -> None:
    """Refuse a URL that names an address which must not be dialled; names are judged at each connect, by what they resolve to.

    Raises:
        BadRequest: The address is closed; the message says why.
    """
    endpoint = parse_endpoint(endpoint_url)
    host = "127.0.0.1" if endpoint.host == "localhost" or endpoint.host.endswith(".localhost") else endpoint.host  # RFC 6761, 6.3
    try:
        ip_address(host)
    except ValueError:
        return
    reason = refusal(host, endpoint.port, gateway.address_policy)
    if reason == "own listener":
        raise BadRequest("endpoint_url is this gateway itself; write the address of the model server", param="endpoint_url")
    if reason is not None:
        raise BadRequest(
            f"endpoint_url names an address that this gateway does not dial ({reason}); write a public address or a tunnel's, "
            "or ask the operator to open private networks (ALLOW_PRIVATE_NETWORKS)",
            param="endpoint_url",
        )


def _identity(server: Server | Registration) -> tuple[str, str, str | None]:
    """Return what a verdict about a server depends on; a change of it begins a new generation."""
    return server.model_name, server.endpoint_url, server.api_key


def _pair(server: Server | Registration) -> tuple[str, str]:
    return server.model_name, server.endpoint_url


def _server(registration: Registration, *, server_id: ServerId, wall: float, registered_at: float | None = None) -> Server:
    since = wall if registered_at is None else min(registered_at, wall)
    return Server(id=server_id, registered_at=since, created_at=since, updated_at=wall, **_facts(registration))


def _facts(registration: Registration) -> dict[str, Any]:
    return {field.name: getattr(registration, field.name) for field in attrs.fields(Registration)}


def server_id_of(text: str) -> ServerId:
    """Return the id that a path names.

    Raises:
        ServerNotFound: It is no id at all.
    """
    try:
        return ServerId(str(uuid.UUID(text)))
    except ValueError:
        raise unknown_server() from None


def unknown_server() -> ServerNotFound:
    """Return the refusal of an id that no registered server has."""
    return ServerNotFound("There is no server with this id, or it was removed; GET /admin/servers lists those there are")


def _find(registry: Registry, server_id: ServerId) -> Server:
    for server in registry.servers:
        if server.id == server_id:
            return server
    raise unknown_server()


def _with_pair(registry: Registry, wanted: Server | Registration) -> Server | None:
    return next((server for server in registry.servers if _pair(server) == _pair(wanted)), None)


# Doing


async def _probed(gateway: Gateway, server: Server) -> ProbeResult:
    refuse_address(gateway, server.endpoint_url)
    result = await gateway.check(server)
    if not result.passed:
        raise ProbeRefused(f"The server did not pass its probe: {result.reason or 'no reason is known'}", param="endpoint_url")
    return result


async def register(gateway: Gateway, registration: Registration) -> tuple[Server, bool]:
    """Probe a server and accept it; return its record and whether it is a new one.

    The same model and URL again updates the record that is there, all of it, and lifts whatever it was taken out for.

    Raises:
        BadRequest: The address is closed.
        ProbeRefused: It did not pass its probe; nothing changed.
        StorageUnavailable: It could not be saved.
    """
    wall = gateway.wall()
    candidate = _server(registration, server_id=ServerId(str(uuid.uuid4())), wall=wall)
    result = await _probed(gateway, candidate)
    while True:
        async with gateway.registry_lock:
            existing = _with_pair(await gateway.store.load(), registration)
            server = candidate
            if existing is not None:
                generation = existing.generation + (existing.api_key != registration.api_key)
                server = attrs.evolve(existing, **_facts(registration), generation=generation, updated_at=wall)
            try:
                await gateway.adopt(server, attrs.evolve(result, server_id=server.id, generation=server.generation))
            except (AlreadyRegistered, ServerNotFound):
                continue  # another process registered or removed it since we looked
        _note("server registered" if existing is None else "server registered again", server)
        return server, existing is None


async def update(gateway: Gateway, server_id: ServerId, change: Change) -> Server:
    """Change what the body names and return the record; a new URL, key or model is probed first, and so is a server taken out.

    Raises:
        ServerNotFound: There is none with this id.
        BadRequest: The address is closed, or another server has this model and URL.
        ProbeRefused: It did not pass its probe; nothing changed.
        StorageUnavailable: It could not be saved.
    """
    probed: tuple[Server, ProbeResult] | None = None
    while True:
        async with gateway.registry_lock:
            registry = await gateway.store.load()
            current = _find(registry, server_id)
            wanted = change.apply(current)
            other = _with_pair(registry, wanted)
            if other is not None and other.id != server_id:
                raise AlreadyRegistered(other.id)
            is_new = _identity(wanted) != _identity(current)
            route = gateway.table.routes.get(server_id)
            needs_probe = is_new or (route is not None and not route.health.is_active)
            if not needs_probe or (probed is not None and _identity(probed[0]) == _identity(wanted)):
                server = attrs.evolve(wanted, generation=current.generation + is_new, updated_at=gateway.wall())
                result = None if probed is None else attrs.evolve(probed[1], generation=server.generation)
                if server.generation != current.generation or wanted != current or needs_probe:
                    await gateway.adopt(server, result)
                    _note("server changed", server)
                    return server
                return current
        probed = wanted, await _probed(gateway, wanted)


async def remove(gateway: Gateway, server_id: ServerId) -> None:
    """Remove a server softly; when this returns, no new request goes to it.

    Raises:
        ServerNotFound: There is none with this id (any more).
        StorageUnavailable: It could not be removed.
    """
    async with gateway.registry_lock:
        removed = await gateway.dismiss(server_id)
    if not removed:
        raise unknown_server()
    _log.info("server removed", extra={"fields": {"server": server_id}})


async def check(gateway: Gateway, server_id: ServerId) -> ProbeResult:
    """Probe a server now and note the result, whatever it is; a good one lifts "unhealthy".

    Raises:
        ServerNotFound: There is none with this id.
    """
    await refreshed(gateway)
    route = gateway.table.routes.get(server_id)
    if route is None:
        raise unknown_server()
    result = await gateway.probe_server(route.server, forced=True)
    await saved(gateway)
    return result


async def refreshed(gateway: Gateway) -> None:
    """Follow what other processes wrote, as far as the storage can be read: else the last known registry serves."""
    with suppress(StorageUnavailable):
        await gateway.refresh()


async def saved(gateway: Gateway) -> None:
    """Save the checks that are not saved yet, so that a history shows them; what fails is kept for later."""
    with suppress(StorageUnavailable):
        await gateway.flush()


async def try_connection(gateway: Gateway, registration: Registration) -> dict[str, Any]:
    """Probe a server without registering it and say step by step what works, in categories only.

    Raises:
        BadRequest: The address is closed.
    """
    refuse_address(gateway, registration.endpoint_url)
    result = await gateway.check(_server(registration, server_id=ServerId(str(uuid.uuid4())), wall=gateway.wall()))
    reason = result.reason or "The server did not answer as expected"
    reached = result.passed or result.unauthorized
    steps = [
        _step("address", True, "The URL can be used"),
        _step("answer", reached, "The server answers" if reached else reason),
    ]
    if reached:
        steps.append(_step("key", not result.unauthorized, reason if result.unauthorized else "The server lets the gateway in"))
    if result.passed:
        steps.append(_step("model", result.warning is None, result.warning or "The server offers models"))
    return {"ok": result.passed, "reason": result.reason, "warning": result.warning, "steps": steps}


def _step(step: str, ok: bool, message: str) -> dict[str, Any]:
    return {"step": step, "ok": ok, "message": message}


def _note(event: str, server: Server) -> None:
    fields = {"server": server.id, "model": server.model_name, "url": server.endpoint_url, "generation": server.generation}
    _log.info(event, extra={"fields": fields})


# The registry as a file


def describe(server: Server) -> dict[str, Any]:
    """Return what a record says about the server itself, the key left out."""
    return {
        "registration_id": server.id,
        "model_name": server.model_name,
        "endpoint_url": server.endpoint_url,
        "has_api_key": server.api_key is not None,
        "capabilities": attrs.asdict(server.capabilities),
        "metadata": attrs.asdict(server.metadata),
        "max_concurrency": server.max_concurrency,
        "weight": server.weight,
        "registered_at": iso(server.registered_at),
    }


async def export_registry(gateway: Gateway, *, include_keys: bool = False) -> dict[str, Any]:
    """Return all registered servers as `import_registry` takes them; the servers' keys only where they are asked for."""
    registry = await gateway.store.load()
    servers = []
    for server in sorted(registry.servers, key=lambda server: (server.registered_at, server.id)):
        key = {"api_key": server.api_key} if include_keys else {}
        servers.append(describe(server) | key)
    if include_keys:
        _log.warning("registry exported with the servers' keys", extra={"fields": {"servers": len(servers)}})
    return {"format": EXPORT_FORMAT, "exported_at": iso(gateway.wall()), "servers": servers}


async def import_registry(gateway: Gateway, servers: Iterable[Imported]) -> dict[str, int]:
    """Save servers without probing them; those that are new or other than before are probed soon, and not routed to until then.

    Idempotent: a server is known again by its model and URL, or by its id. A key that is not named stays.

    Raises:
        BadRequest: An address is closed; nothing was imported then.
        StorageUnavailable: Some could not be saved; import again.
    """
    wanted = list(servers)
    for number, item in enumerate(wanted):
        try:
            refuse_address(gateway, item.registration.endpoint_url)
        except BadRequest as error:
            raise BadRequest(f"servers[{number}]: {error.message}", param=f"servers[{number}].endpoint_url") from None
    counts = {"created": 0, "updated": 0, "unchanged": 0}
    async with gateway.registry_lock:
        registry = await gateway.store.load()
        known = {server.id: server for server in registry.servers}
        pairs = {_pair(server): server.id for server in registry.servers}
        gone = {server.id for server in await gateway.store.removed()}
        for item in wanted:
            found = pairs.get(_pair(item.registration)) or (item.id if item.id in known else None)
            if found is None:
                fresh_id = item.id if item.id is not None and item.id not in gone else ServerId(str(uuid.uuid4()))
                server = _server(item.registration, server_id=fresh_id, wall=gateway.wall(), registered_at=item.registered_at)
                counts["created"] += 1
            else:
                current = known[found]
                server = _merged(current, item)
                if server == current:
                    counts["unchanged"] += 1
                    continue
                server = attrs.evolve(server, updated_at=gateway.wall())
                pairs.pop(_pair(current))
                counts["updated"] += 1
            known[server.id] = server
            pairs[_pair(server)] = server.id
            await gateway.adopt(server)
    _log.info("registry imported", extra={"fields": counts})
    return {"imported": len(wanted), **counts}


def _merged(current: Server, item: Imported) -> Server:
    facts = _facts(item.registration)
    if not item.has_key:
        facts["api_key"] = current.api_key
    server = attrs.evolve(current, **facts)
    return attrs.evolve(server, generation=current.generation + (_identity(server) != _identity(current)))
