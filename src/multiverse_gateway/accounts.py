"""Owner tokens of servers, and reports of usage.

A token is generated here, returned once to the caller, and stored only as a hash. Logs redact tokens by their format.
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


# Owner tokens


async def register_owned(gateway: Gateway, registration: Description, *, has_cap: bool) -> Accepted:
    """Register a server with a new token for its owner, as `register` does.

    A server that already has an owner token keeps it; the returned token is then `None`.

    Raises:
        BadRequest: The address policy forbids the address.
        ModelNotOffered: The server does not have the model; nothing changed.
        ProbeRefused: The server did not pass its probe; nothing changed.
        StorageUnavailable: The server could not be saved.
    """
    token = new_key("owner")
    digest = key_digest(token).hex()
    accepted = await register(gateway, registration, has_cap=has_cap, owner_digest=digest)
    return attrs.evolve(accepted, owner_token=token if accepted.server.owner_digest == digest else None)


async def renew_owner_token(gateway: Gateway, server_id: ServerId) -> str:
    """Generate a new owner token for a server and return it; the previous token stops working.

    Raises:
        ServerNotFound: No server has this id.
        StorageUnavailable: The token could not be saved.
    """
    token = new_key("owner")
    async with gateway.registrations.lock:
        await gateway.refresh()
        await gateway.adopt(attrs.evolve(route_of(gateway, server_id).server, owner_digest=key_digest(token).hex()))
    _log.info("owner token created", extra={"fields": {"server": server_id}})
    return token


def owner_digest(gateway: Gateway, server_id: str | None) -> str | None:
    """Return the hash of a server's owner token, or `None` if the server is unknown or has no token."""
    route = gateway.table.routes.get(ServerId(server_id or ""))
    return None if route is None else route.server.owner_digest


# Usage


async def usage_summary(gateway: Gateway, selection: UsageSelection) -> UsageSummary:
    """Return a usage report, including counts of this process that are not saved yet.

    Raises:
        BadRequest: The last day is before the first day.
        StorageUnavailable: The usage counts cannot be read.
    """
    days = days_of(selection, datetime.fromtimestamp(gateway.wall(), UTC).date().isoformat())
    with suppress(StorageUnavailable):
        await gateway.usage_book.flush()
    names = {key.id: key.name for key in gateway.registrations.keys.values()}
    rows = await gateway.store.sum_usage(*days, by=columns_of(selection.by), only=admitted(selection, names))
    return summarize(rows, selection, days=days, names=names, listed=lambda model: listed_name(gateway.table, model))
