"""What hosts and operators do to the registry: register, change, remove, check, export, import.

What becomes of the servers is decided in `core.registry_plans`; the functions here read the store, probe, save the decision, and log it.

1. A server is probed before it is accepted; nothing changes when the probe fails.
2. Every write refreshes the gateway's table before it is answered, so this process routes by what it has just confirmed.
3. Writes of one process are serialized, so two registrations of one pair at once give one id. Probes run outside the lock.
"""

import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import ip_address

import attrs

from multiverse_gateway.core.addresses import LOCALHOST_MEANS, AddressRefusal, names_this_computer, parse_endpoint, refusal, with_opening
from multiverse_gateway.core.aliases import plan_import_of_aliases
from multiverse_gateway.core.caps import Cap, Stated, stated_by
from multiverse_gateway.core.errors import (
    AddressForbidden,
    AlreadyRegistered,
    BadRequest,
    InvalidField,
    ModelNotOffered,
    ProbeRefused,
    ServerNotFound,
    StorageUnavailable,
)
from multiverse_gateway.core.health.listing import ANSWERS_UNLISTED, has_answered_unlisted, is_doubtful
from multiverse_gateway.core.hosts import Host, HostIndex, all_hosts, with_caps
from multiverse_gateway.core.registry_plans import (
    Change,
    Description,
    ImportedRegistry,
    ImportPlan,
    imported_caps,
    new_server,
    opened_for,
    plan_change,
    plan_import,
    plan_registration,
)
from multiverse_gateway.core.routing import Route, close_names
from multiverse_gateway.core.servers import MODEL_NAME, HostId, Server, ServerId, identity
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.model_trials import CHAT_SECONDS, Trial, try_model
from multiverse_gateway.plugins import chat_probe
from multiverse_gateway.protocols import HostProbe, ProbeProblem, ProbeResult, Registry

_log = logging.getLogger("multiverse_gateway.registry")


# Judging


def refuse_address(gateway: Gateway, endpoint_url: str, *, opened_address: str | None = None) -> None:
    """Refuse a URL that names an address which must not be dialed; names are judged at each connect, by what they resolve to.

    `opened_address` is that of the server which the URL belongs to.

    Raises:
        BadRequest: The address is closed; the message says why.
    """
    endpoint = with_opening(parse_endpoint(endpoint_url), opened_address)
    host = "127.0.0.1" if endpoint.host == "localhost" or endpoint.host.endswith(".localhost") else endpoint.host  # RFC 6761, 6.3
    try:
        ip_address(host)
    except ValueError:
        return
    reason = refusal(host, endpoint.port, gateway.network.address_policy, is_opened=endpoint.is_opened)
    if reason is AddressRefusal.OWN_LISTENER:
        raise InvalidField("endpoint_url", " is this gateway itself; write the address of the model server")
    if reason is not None:
        hint = LOCALHOST_MEANS if names_this_computer(endpoint.host) else ""
        raise AddressForbidden(reason, is_openable=reason.is_openable, hint=hint)


def candidate(gateway: Gateway, registration: Description, *, opened_address: str | None = None) -> Server:
    """Return the server that a registration would create, for a probe. `opened_address` is the address that the operator opened for it."""
    return new_server(registration, server_id=_new_id(), wall=gateway.wall(), opened_address=opened_address)


def _new_id() -> ServerId:
    return ServerId(str(uuid.uuid4()))


def server_id_of(text: str) -> ServerId:
    """Return the id that a path names.

    Raises:
        ServerNotFound: The id is not valid.
    """
    try:
        return ServerId(str(uuid.UUID(text)))
    except ValueError:
        raise unknown_server() from None


def unknown_server() -> ServerNotFound:
    """Return the error for an id that no registered server has."""
    return ServerNotFound("There is no server with this id, or it was removed; GET /admin/servers lists all servers")


def route_of(gateway: Gateway, server_id: ServerId) -> Route:
    """Return the route of a registered server.

    Raises:
        ServerNotFound: No server has this id.
    """
    route = gateway.table.routes.get(server_id)
    if route is None:
        raise unknown_server()
    return route


def _find(registry: Registry, server_id: ServerId) -> Server:
    for server in registry.servers:
        if server.id == server_id:
            return server
    raise unknown_server()


# Doing


async def probe_for_change(gateway: Gateway, server: Server, of_host: ProbeResult | None = None) -> ProbeResult:
    """Probe a server; if it does not list its model, it must also answer a request for it, unless it has done so before.

    `of_host` is the result of another server of the same host, which makes a probe superfluous if the probe can judge by it.

    Raises:
        BadRequest: The address is closed, or the server has no such model.
        ProbeRefused: The server did not pass its probe.
    """
    refuse_address(gateway, server.endpoint_url, opened_address=server.opened_address)
    probe = gateway.checks.probe
    if of_host is not None and isinstance(probe, HostProbe):
        result = probe.result_for(server, of_host)
    else:
        result = await gateway.checks.check(server)
    if not result.passed:
        error = ProbeRefused(f"The connection test failed: {result.reason or 'no reason is known'}", param="endpoint_url")
        error.failed_step = result.failed_step
        raise error
    if not is_doubtful(result.warning):
        return result
    if not _has_answered(gateway, server):
        await try_unlisted(gateway, server, result.models)
    return attrs.evolve(result, warning=ANSWERS_UNLISTED)


def _has_answered(gateway: Gateway, server: Server) -> bool:
    """Return whether this server is registered like this, and has answered a request for its model although it does not list it."""
    routes = gateway.table.routes.values()
    return any(identity(route.server) == identity(server) and has_answered_unlisted(route.health.warning) for route in routes)


async def try_unlisted(gateway: Gateway, server: Server, listed: Sequence[str]) -> None:
    """Ask a server for one token of a model that it does not list.

    Raises:
        ModelNotOffered: It has no such model.
        ProbeRefused: It did not answer in time, or it is busy.
    """
    probe = chat_probe(gateway.settings)
    trial = await try_model(server, gateway.network.client_for(server), probe, seconds=CHAT_SECONDS)
    if trial.has_answered:
        return
    model, param = server.asked_model, "model_name" if server.upstream_model is None else "upstream_model"
    if trial.problem in _PASSING:
        message = f"The server does not list the model {model}, and a test request for it failed: {_finding(trial)}. Try again in a moment."
        raise ProbeRefused(message, param=param)
    names = [name for name in listed if MODEL_NAME.fullmatch(name)]
    close = close_names(model, names)
    advice = f" Did you mean {' or '.join(close)}?" if close else f" It lists: {', '.join(names[:10])}." if names else ""
    message = f"The server does not list the model {model}, and a test request for it failed: {_finding(trial)}.{advice}"
    error = ModelNotOffered(message, param=param)
    error.close_names = close
    raise error


_PASSING = (ProbeProblem.BUSY, ProbeProblem.TIMEOUT, ProbeProblem.BROKEN)
"""What may be over in a moment: the model may be loading."""
_FINDINGS: Mapping[ProbeProblem | None, str] = {
    None: "it answers none of the calls that were tried (chat, embeddings, rerank, completions)",
    ProbeProblem.UNKNOWN_MODEL: "it does not know the model",
    ProbeProblem.TIMEOUT: f"no answer within {CHAT_SECONDS:g} seconds",
    ProbeProblem.BROKEN: "the connection broke",
}


def _finding(trial: Trial) -> str:
    found = _FINDINGS.get(trial.problem) or (trial.result and trial.result.reason) or "no usable answer"
    return found.partition(": ")[0]


@attrs.frozen(kw_only=True)
class Accepted:
    """The result of a registration: the server, whether it is new, and its limit of concurrent requests with the reason.

    `owner_token` is the new owner token, if this registration created one.
    """

    server: Server
    is_new: bool
    cap: Cap
    owner_token: str | None = attrs.field(default=None, repr=False)


async def stated(gateway: Gateway, server: Server) -> Stated:
    """Return how many requests the engine of a server says that it answers at once; this never fails, see `read_engine_of`."""
    return stated_by(await gateway.checks.engines.read(server))


async def register(
    gateway: Gateway,
    registration: Description,
    *,
    has_cap: bool = True,
    owner_digest: str | None = None,
    opened_address: str | None = None,
) -> Accepted:
    """Probe a server and accept it.

    The same model and URL again updates the record that is there, all of it, and lifts whatever it was taken out for. Without `has_cap`
    the registration says nothing about `max_concurrency`: a new server gets what its engine states, and a known one keeps what it has.
    `owner_digest` is that of a token made for its owner; a server whose owner has one keeps that. `opened_address` is the loopback address
    that the operator opens for it; no API and no form can pass one.

    Raises:
        BadRequest: The address policy forbids the address.
        ModelNotOffered: The server does not have the model; nothing changed.
        ProbeRefused: The server did not pass its probe; nothing changed.
        StorageUnavailable: The server could not be saved.
    """
    new = new_server(registration, server_id=_new_id(), wall=gateway.wall(), owner_digest=owner_digest, opened_address=opened_address)
    result = await probe_for_change(gateway, new)
    engine = None if has_cap else await gateway.checks.engines.read(new, result)
    measured = None if engine is None else engine.of(new.asked_model)
    while True:
        async with gateway.registrations.lock:
            registry = await gateway.store.load()
            plan = plan_registration(registry.servers, new, stated=None if has_cap else stated_by(engine))
            server, host = _hosted(gateway, registry, plan.server, states_cap=has_cap)
            try:
                known = attrs.evolve(result, server_id=server.id, generation=server.generation)
                await gateway.adopt(server, known, measured, host=host)
            except (AlreadyRegistered, ServerNotFound):
                continue  # another process registered or removed it since we looked
        _note("server registered" if plan.is_new else "server registered again", server)
        if engine is None:
            read_engine_soon(gateway, server, result)
        return Accepted(server=server, is_new=plan.is_new, cap=plan.cap)


def read_engine_soon(gateway: Gateway, server: Server, result: ProbeResult) -> None:
    """Read what the engine of a server says that has just passed this probe, without keeping the caller waiting."""
    gateway.housekeeping.in_background(partial(gateway.checks.engines.renew, server, result))


async def update(
    gateway: Gateway, server_id: ServerId, change: Change, *, before_probe: Callable[[], Awaitable[None]] | None = None
) -> Server:
    """Change what the body names and return the record; a new URL, key or model is probed first, and so is a server taken out.

    `before_probe` is called before each probe; it can raise an error to prevent the probe and the change.

    Raises:
        ServerNotFound: No server has this id.
        BadRequest: The address is closed, or another server has this model and URL.
        ModelNotOffered: The server does not have the model; nothing changed.
        ProbeRefused: The server did not pass its probe; nothing changed.
        StorageUnavailable: The server could not be saved.
    """
    probed: tuple[Server, ProbeResult] | None = None
    while True:
        async with gateway.registrations.lock:
            registry = await gateway.store.load()
            current = _find(registry, server_id)
            route = gateway.table.routes.get(server_id)
            is_active = route is None or route.health.is_active
            plan = plan_change(registry.servers, current, change.apply(current), is_active=is_active, wall=gateway.wall())
            if not plan.is_change:
                return current
            server, host = _hosted(gateway, registry, plan.server, states_cap="max_concurrency" in change.fields)
            if not plan.needs_probe or (probed is not None and identity(probed[0]) == identity(server)):
                result = None if probed is None else attrs.evolve(probed[1], generation=server.generation)
                await gateway.adopt(server, result, host=host)
                _note("server changed", server)
                if result is not None:
                    read_engine_soon(gateway, server, result)
                return server
        if before_probe is not None:
            await before_probe()
        probed = server, await probe_for_change(gateway, server)


async def remove(gateway: Gateway, server_id: ServerId) -> None:
    """Remove a server, but keep its record. When this returns, the server gets no new requests.

    Raises:
        ServerNotFound: No server has this id, or it was removed.
        StorageUnavailable: The server could not be removed.
    """
    async with gateway.registrations.lock:
        removed = await gateway.dismiss(server_id)
    if not removed:
        raise unknown_server()
    _log.info("server removed", extra={"fields": {"server": server_id}})


async def check(gateway: Gateway, server_id: ServerId) -> ProbeResult:
    """Probe a server now and record the result. A server that passes is healthy again.

    Raises:
        ServerNotFound: No server has this id.
    """
    await refresh_if_possible(gateway)
    result = await gateway.checks.check_now(route_of(gateway, server_id).server, forced=True)
    await flush_if_possible(gateway)
    return result


async def refresh_if_possible(gateway: Gateway) -> None:
    """Read changes by other processes. While the storage is unavailable, the last known registry stays in use."""
    with suppress(StorageUnavailable):
        await gateway.refresh()


async def flush_if_possible(gateway: Gateway) -> None:
    """Save pending checks, so that the history includes them. While the storage is unavailable, they stay pending."""
    with suppress(StorageUnavailable):
        await gateway.health_book.flush()


def _hosted(gateway: Gateway, registry: Registry, server: Server, *, states_cap: bool) -> tuple[Server, Host]:
    """Return a server that is about to be saved, with its host, and that host."""
    before = next((other for other in registry.servers if other.id == server.id), None)
    index = HostIndex.of(registry.servers, all_hosts(registry.servers, registry.hosts))
    return index.place(server, before=before, states_cap=states_cap, new_id=_new_host_id(), wall=gateway.wall())


def _new_host_id() -> HostId:
    return HostId(str(uuid.uuid4()))


def _note(event: str, server: Server) -> None:
    fields = {"server": server.id, "model": server.model_name, "url": server.endpoint_url, "generation": server.generation}
    _log.info(event, extra={"fields": fields})


# The registry as a file


async def export_registry(gateway: Gateway, *, include_keys: bool = False) -> Registry:
    """Return the registry with its servers in the order of their registration, for the caller to write out in a form that imports accept.

    `include_keys` says that the caller writes the servers' own keys, too; the log records that.
    """
    registry = await gateway.store.load()
    if include_keys:
        _log.warning("registry exported with the servers' keys", extra={"fields": {"servers": len(registry.servers)}})
    servers = sorted(registry.servers, key=lambda server: (server.registered_at, server.id))
    return attrs.evolve(registry, servers=tuple(servers))


async def import_registry(gateway: Gateway, wanted: ImportedRegistry) -> ImportPlan:
    """Save servers without probing them, then the caps of hosts and the aliases.

    New and changed servers are probed soon, and get no requests until then. Idempotent: known servers are recognized by their model and
    URL, or by their id. Without `api_key`, the stored key stays.

    Raises:
        BadRequest: The address policy forbids an address, or an alias would lead to itself; nothing was imported.
        StorageUnavailable: Some servers could not be saved; repeat the import.
    """
    opened = [server for server in (await gateway.store.load()).servers if server.opened_address is not None]
    for number, item in enumerate(wanted.servers):
        try:
            refuse_address(gateway, item.registration.endpoint_url, opened_address=opened_for(opened, item))
        except BadRequest as error:
            raise BadRequest(f"servers[{number}]: {error.message}", param=f"servers[{number}].endpoint_url") from None
    async with gateway.registrations.lock:
        registry = await gateway.store.load()
        removed = {server.id for server in await gateway.store.removed()}
        plan = plan_import(registry.servers, removed, wanted.servers, wall=gateway.wall(), new_id=_new_id)
        aliases = plan_import_of_aliases(wanted.aliases, registry.aliases, wall=gateway.wall())
        known = {server.id: server for server in registry.servers}
        index = HostIndex.of(registry.servers, all_hosts(registry.servers, registry.hosts))
        for saved in plan.saves:
            before = known.get(saved.id)
            server, host = index.place(saved, before=before, states_cap=True, new_id=_new_host_id(), wall=gateway.wall())
            await gateway.store.save_host(host, [server])
            known[server.id] = server
        registry = await gateway.store.load()
        caps = imported_caps(registry.servers, wanted)
        for host in with_caps(all_hosts(registry.servers, registry.hosts), caps, wall=gateway.wall()):
            await gateway.store.save_host(host)
        for alias in aliases:
            await gateway.store.save_alias(alias)
        await gateway.refresh()
    counts = {"created": plan.created, "updated": plan.updated, "unchanged": plan.unchanged}
    _log.info("registry imported", extra={"fields": counts | {"aliases": len(aliases)}})
    return attrs.evolve(plan, aliases=len(aliases) if wanted.aliases else None)
