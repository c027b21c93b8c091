"""Who may change a server, and who used how much: owners' tokens, usage counts.

Tokens are made here, returned once to the caller, and kept only as a hash. Logs redact them by their form.
"""

import logging
from contextlib import suppress
from datetime import UTC, datetime

import attrs

from multiverse_gateway.admin_key import key_digest, new_key
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.registry_plans import Description
from multiverse_gateway.core.routing import listed_name
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.usage_reports import UsageSelection, UsageSummary, admitted, columns_of, days_of, summarize
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.registration import Accepted, register, route_of

_log = logging.getLogger("multiverse_gateway.registry")


# Owners' tokens


async def register_owned(gateway: Gateway, registration: Description, *, has_cap: bool) -> Accepted:
    """Register a server with a token for its owner, as `register` does.

    The token is `None` where the server's owner has one already, which stays.

    Raises:
        BadRequest: The address is closed.
        ModelNotOffered: It does not list the model, and has no such model; nothing changed.
        ProbeRefused: It did not pass its probe; nothing changed.
        StorageUnavailable: It could not be saved.
    """
    token = new_key("owner")
    digest = key_digest(token).hex()
    accepted = await register(gateway, registration, has_cap=has_cap, owner_digest=digest)
    return attrs.evolve(accepted, owner_token=token if accepted.server.owner_digest == digest else None)


async def renew_owner_token(gateway: Gateway, server_id: ServerId) -> str:
    """Make a new token for the owner of a server, and return it; the one before it is void.

    Raises:
        ServerNotFound: There is none with this id.
        StorageUnavailable: It could not be saved.
    """
    token = new_key("owner")
    async with gateway.registrations.lock:
        await gateway.refresh()
        await gateway.adopt(attrs.evolve(route_of(gateway, server_id).server, owner_digest=key_digest(token).hex()))
    _log.info("owner's token made", extra={"fields": {"server": server_id}})
    return token


def owner_digest(gateway: Gateway, server_id: str | None) -> str | None:
    """Return the hash of the token of a server's owner, if there is such a server and it has one."""
    route = gateway.table.routes.get(ServerId(server_id or ""))
    return None if route is None else route.server.owner_digest


# Use


async def usage_summary(gateway: Gateway, selection: UsageSelection) -> UsageSummary:
    """Return what was used, including what this process has counted and not saved yet.

    Raises:
        BadRequest: The span of days ends before it begins.
        StorageUnavailable: The counts cannot be read.
    """
    days = days_of(selection, datetime.fromtimestamp(gateway.wall(), UTC).date().isoformat())
    with suppress(StorageUnavailable):
        await gateway.usage_book.flush()
    names = {key.id: key.name for key in gateway.registrations.keys.values()}
    rows = await gateway.store.sum_usage(*days, by=columns_of(selection.by), only=admitted(selection, names))
    return summarize(rows, selection, days=days, names=names, listed=lambda model: listed_name(gateway.table, model))
