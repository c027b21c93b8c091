"""Who may use what, and who used how much: client keys, owners' tokens, usage counts.

Keys and tokens are made here, returned once to the caller, and kept only as a hash. Logs redact them by their form.
"""

import logging
import uuid
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import attrs

from multiverse_gateway.admin_key import key_digest, new_key
from multiverse_gateway.core.errors import BadRequest, InvalidField, KeyNotFound, StorageUnavailable
from multiverse_gateway.core.registry_plans import Description
from multiverse_gateway.core.routing import listed_name
from multiverse_gateway.core.servers import ClientKey, KeyTerms, ServerId
from multiverse_gateway.core.usage_reports import UsageSelection, UsageSummary, days_of, summarize
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.registration import Accepted, register, route_of

_log = logging.getLogger("multiverse_gateway.registry")


# Client keys


async def create_key(gateway: Gateway, name: str, terms: KeyTerms) -> tuple[ClientKey, str]:
    """Make a client key; return what is kept of it, and the key itself, which is kept nowhere.

    Raises:
        BadRequest: Another key of this name works, or the time of expiry has passed.
        StorageUnavailable: The key could not be saved.
    """
    wall = gateway.wall()
    values = _values_of(gateway, terms)
    async with gateway.registrations.lock:
        await gateway.refresh()
        if any(key.name == name and key.works(wall) for key in gateway.registrations.keys.values()):
            raise BadRequest(f"There is a key named {name} already; choose another name, or revoke that one", param="name")
        secret = new_key("client")
        key = ClientKey(id=str(uuid.uuid4()), name=name, digest=key_digest(secret).hex(), created_at=wall, **values)
        await gateway.store.save_key(key)
        await gateway.refresh()
    _log.info("client key made", extra={"fields": {"key": key.id, "name": key.name}})
    return key, secret


async def change_key(gateway: Gateway, key_id: str, terms: KeyTerms, *, named: Collection[str]) -> ClientKey:
    """Change the attributes of a client key that `named` lists; when this returns, this process applies them.

    Raises:
        BadRequest: The new time of expiry has passed, or the key is revoked.
        KeyNotFound: There is no key with this id.
        StorageUnavailable: The change could not be saved.
    """
    values = _values_of(gateway, terms)
    async with gateway.registrations.lock:
        await gateway.refresh()
        key = _key_of(gateway, key_id)
        if key.revoked_at is not None:
            raise BadRequest("The key is revoked, so its limits cannot be changed; create another one")
        key = attrs.evolve(key, **{name: values[name] for name in named})
        await gateway.store.save_key(key)
        await gateway.refresh()
    _log.info("client key changed", extra={"fields": {"key": key.id, "name": key.name}})
    return key


def _values_of(gateway: Gateway, terms: KeyTerms) -> dict[str, Any]:
    """Return the terms by attribute of a client key, with the gateway's default in place of a missing `max_at_once`.

    Raises:
        BadRequest: The time of expiry has passed.
    """
    if terms.expires_at is not None and terms.expires_at <= gateway.wall():
        raise InvalidField("expires_at", " is in the past; give a later time, or leave it out")
    at_once = gateway.settings.max_at_once_per_key if terms.max_at_once is None else terms.max_at_once
    return attrs.asdict(terms, recurse=False) | {"max_at_once": at_once}


def _key_of(gateway: Gateway, key_id: str) -> ClientKey:
    key = next((key for key in gateway.registrations.keys.values() if key.id == key_id), None)
    if key is None:
        raise KeyNotFound("There is no client key with this id; GET /admin/keys lists all keys")
    return key


async def revoke_key(gateway: Gateway, key_id: str) -> ClientKey:
    """End a client key for good; when this returns, this process no longer accepts it. Revoking it again changes nothing.

    Raises:
        KeyNotFound: There is none with this id.
        StorageUnavailable: It could not be saved.
    """
    async with gateway.registrations.lock:
        await gateway.refresh()
        key = _key_of(gateway, key_id)
        if key.revoked_at is None:
            key = attrs.evolve(key, revoked_at=gateway.wall())
            await gateway.store.save_key(key)
            await gateway.refresh()
            _log.info("client key revoked", extra={"fields": {"key": key.id, "name": key.name}})
    return key


def all_keys(gateway: Gateway) -> list[ClientKey]:
    """Return all client keys, the newest first."""
    return sorted(gateway.registrations.keys.values(), key=lambda key: (key.created_at, key.id), reverse=True)


# Owners' tokens


async def register_owned(gateway: Gateway, registration: Description, *, has_cap: bool) -> Accepted:
    """Register a server with a token for its owner, as `register` does.

    The token is `None` where the server's owner has one already, which stays.

    Raises:
        BadRequest: The address is closed.
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
    return summarize(
        await gateway.store.usage(*days), selection, days=days, names=names, listed=lambda model: listed_name(gateway.table, model)
    )
