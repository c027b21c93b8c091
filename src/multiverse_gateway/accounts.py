"""Who may use what, and who used how much: client keys, owners' tokens, counts of use.

A key or a token is made here, shown once by whoever asked for it, and kept as a hash. Logs know what is made here by its form.
"""

import csv
import io
import logging
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any

import attrs

from multiverse_gateway.admin_key import key_digest, new_key
from multiverse_gateway.bodies import KeyChange, NewKey, Registration, UsageQuery, read
from multiverse_gateway.core.errors import BadRequest, InvalidField, KeyNotFound, StorageUnavailable
from multiverse_gateway.core.routing import listed_name
from multiverse_gateway.core.servers import ClientKey, ServerId, model_key
from multiverse_gateway.core.usage import Counts, Usage, UsageKey, summed
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.records import KeyRecord, UsageRecord, UsageReport, key_record
from multiverse_gateway.registration import Accepted, register, route_of

DAYS = 30
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What makes spreadsheets take a text for a formula."""

_log = logging.getLogger("multiverse_gateway.registry")


# Client keys


async def create_key(gateway: Gateway, wanted: NewKey) -> tuple[ClientKey, str]:
    """Make a client key; return its record and the key itself, which is kept nowhere.

    Raises:
        BadRequest: A key of this name works already, or it would be over before it begins.
        StorageUnavailable: It could not be saved.
    """
    wall = gateway.wall()
    limits = _limits_of(gateway, wanted)
    async with gateway.registrations.lock:
        await gateway.refresh()
        if any(key.name == wanted.name and key.works(wall) for key in gateway.registrations.keys.values()):
            raise BadRequest(f"There is a key named {wanted.name} already; choose another name, or revoke that one", param="name")
        secret = new_key("client")
        key = ClientKey(
            id=str(uuid.uuid4()),
            name=wanted.name,
            digest=key_digest(secret).hex(),
            created_at=wall,
            **limits,
        )
        await gateway.store.save_key(key)
        await gateway.refresh()
    _log.info("client key made", extra={"fields": {"key": key.id, "name": key.name}})
    return key, secret


async def change_key(gateway: Gateway, key_id: str, body: Mapping[str, Any]) -> ClientKey:
    """Change the fields of a client key that a body names; when this returns, they hold in this process.

    Raises:
        BadRequest: A field is unknown or cannot be used, or the key is revoked.
        KeyNotFound: There is none with this id.
        StorageUnavailable: It could not be saved.
    """
    limits = _limits_of(gateway, read(body, KeyChange))
    async with gateway.registrations.lock:
        await gateway.refresh()
        key = _key_of(gateway, key_id)
        if key.revoked_at is not None:
            raise BadRequest("The key is revoked, so its limits cannot be changed; create another one")
        key = attrs.evolve(key, **{_ATTRIBUTES.get(name, name): limits[_ATTRIBUTES.get(name, name)] for name in body})
        await gateway.store.save_key(key)
        await gateway.refresh()
    _log.info("client key changed", extra={"fields": {"key": key.id, "name": key.name}})
    return key


_ATTRIBUTES = {"bulk": "is_bulk"}
"""The attributes of a client key that have other names in the API."""


def _limits_of(gateway: Gateway, wanted: KeyChange) -> dict[str, Any]:
    """Return what a body says about a client key, by attribute.

    Raises:
        BadRequest: It would be over before it begins.
    """
    expires_at: float | None = wanted.expires_at  # type: ignore[assignment]  # its reader made it an instant
    if expires_at is not None and expires_at <= gateway.wall():
        raise InvalidField("expires_at", " is in the past; give a later time, or leave it out")
    return {
        "expires_at": expires_at,
        "rate_limit": wanted.rate_limit,
        "daily_limit": wanted.daily_limit,
        "max_at_once": gateway.settings.max_at_once_per_key if wanted.max_at_once is None else wanted.max_at_once,
        "is_bulk": wanted.bulk,
        "models": tuple(dict.fromkeys(wanted.models)),
    }


def _key_of(gateway: Gateway, key_id: str) -> ClientKey:
    key = next((key for key in gateway.registrations.keys.values() if key.id == key_id), None)
    if key is None:
        raise KeyNotFound("There is no client key with this id; GET /admin/keys lists all keys")
    return key


async def revoke_key(gateway: Gateway, key_id: str) -> ClientKey:
    """End a client key for good; when this returns, this process lets nobody in with it. Revoking it again changes nothing.

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


def all_keys(gateway: Gateway) -> list[KeyRecord]:
    """Describe all client keys, the newest first."""
    keys = sorted(gateway.registrations.keys.values(), key=lambda key: (key.created_at, key.id), reverse=True)
    return [record_of(gateway, key) for key in keys]


def record_of(gateway: Gateway, key: ClientKey) -> KeyRecord:
    """Describe a client key, and how much of its day is used."""
    wall = gateway.wall()
    return key_record(key, wall, gateway.usage_book.day_counts.total(key.id, wall))


# Owners' tokens


async def register_owned(gateway: Gateway, registration: Registration, *, has_cap: bool) -> Accepted:
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


async def usage_report(gateway: Gateway, query: UsageQuery) -> UsageReport:
    """Count what was used, what this process has counted just now included.

    Raises:
        BadRequest: The span of days ends before it begins.
        StorageUnavailable: The counts cannot be read.
    """
    today = datetime.fromtimestamp(gateway.wall(), UTC).date()
    until = query.until or today.isoformat()
    first = date.fromisoformat(until).toordinal() - DAYS + 1
    since = query.since or date.fromordinal(max(1, first)).isoformat()
    if since > until:
        raise BadRequest("since is later than until; swap them", param="since")
    with suppress(StorageUnavailable):
        await gateway.usage_book.flush()
    names = client_names(gateway)
    rows = [usage for usage in await gateway.store.usage(since, until) if _is_wanted(usage.key, query, names)]
    by = set(query.by.split(","))

    def without(key: UsageKey) -> UsageKey:
        return UsageKey(
            key.day if "day" in by else "",
            listed_name(gateway.table, key.model) if "model" in by else "",
            key.server_id if "server" in by else ServerId(""),
            key.owner if "owner" in by else "",
            key.client if "client" in by else "",
        )

    found = sorted(summed(rows, without), key=lambda usage: attrs.astuple(usage.key))
    total = sum((usage.counts for usage in rows), Counts())
    return UsageReport(since=since, until=until, total=total, rows=[_record(usage, by, names) for usage in found])


def client_names(gateway: Gateway) -> dict[str, str]:
    """Return the names of clients by what their use is counted by."""
    return {key.id: key.name for key in gateway.registrations.keys.values()}


def _is_wanted(key: UsageKey, query: UsageQuery, names: dict[str, str]) -> bool:
    return (
        (query.model is None or model_key(query.model) == model_key(key.model))
        and query.server in (None, key.server_id)
        and query.owner in (None, key.owner)
        and query.client in (None, key.client, names.get(key.client))
    )


def _record(usage: Usage, by: set[str], names: dict[str, str]) -> UsageRecord:
    key = usage.key
    return UsageRecord(
        **attrs.asdict(usage.counts),
        day=key.day if "day" in by else None,
        model=key.model if "model" in by else None,
        server=key.server_id if "server" in by else None,
        owner=key.owner if "owner" in by else None,
        client=names.get(key.client, key.client) if "client" in by else None,
        client_id=key.client if "client" in by else None,
    )


def csv_of(rows: Sequence[UsageRecord]) -> str:
    """Write rows as CSV with a head; a text that a spreadsheet would take for a formula gets an apostrophe in front."""
    columns = ("day", "model", "server", "owner", "client", "client_id", *(field.name for field in attrs.fields(Counts)))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([_cell(getattr(row, name)) for name in columns] for row in rows)
    return text.getvalue()


def _cell(value: str | int | None) -> str | int:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA) else value
    return "" if value is None else value
