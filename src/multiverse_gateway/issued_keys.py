"""Create, change, renew and revoke client keys while the gateway runs.

1. A key is returned once, when it is created, and stored only as a hash. Logs redact keys by their format.
2. Each change holds a lease of the store, so that changes by several processes are serialized: two active keys never get the same name, and
   no change undoes another one, such as a renewal or a block.
"""

import logging
import secrets
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import attrs

from multiverse_gateway.admin_key import key_digest
from multiverse_gateway.core.errors import BadRequest, InvalidField, KeyNameTaken, KeyNotFound, StorageUnavailable
from multiverse_gateway.core.key_names import SEED_BYTES, hint_of, nth_secret
from multiverse_gateway.core.servers import ClientKey, KeyTerms
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.holders import new_holder

LEASE_ROLE = "client_keys"
LEASE_SECONDS = 30.0
"""How long a process that died during a change blocks changes by others, unless they notice that it is dead."""
PATIENCE_SECONDS = 5.0
TURN_SECONDS = 0.02
_log = logging.getLogger("multiverse_gateway.registry")


@asynccontextmanager
async def _changing(gateway: Gateway) -> AsyncIterator[None]:
    """Exclude all other changes of client keys, in this process and in others. Inside, the known keys are current.

    Raises:
        StorageUnavailable: Another process kept the lease too long, or the store is unavailable.
    """
    holder = new_holder()
    async with gateway.registrations.lock:
        try:
            with anyio.move_on_after(PATIENCE_SECONDS) as waiting:
                while not await gateway.store.claim(LEASE_ROLE, holder, LEASE_SECONDS):  # noqa: ASYNC110  no event comes from other processes
                    await anyio.sleep(TURN_SECONDS)
            if waiting.cancelled_caught:
                raise StorageUnavailable("Another process of the gateway is changing client keys. Try again in a moment.", retry_after=1.0)
            await gateway.refresh()
            yield
        finally:
            with anyio.move_on_after(2, shield=True), suppress(StorageUnavailable):
                await gateway.store.claim(LEASE_ROLE, holder, 0.0)


def new_seed() -> bytes:
    """Return random bytes from which keys are derived (`core.key_names.nth_secret`)."""
    return secrets.token_bytes(SEED_BYTES)


async def create_key(gateway: Gateway, name: str, terms: KeyTerms) -> tuple[ClientKey, str]:
    """Create a client key; return its record and its secret, which is not stored.

    Raises:
        KeyNameTaken: An active key has this name.
        BadRequest: The expiry time has passed.
        StorageUnavailable: The key could not be saved.
    """
    seed = new_seed()
    made = await create_keys(gateway, [name], terms, seed)
    if not made:
        raise KeyNameTaken(name)
    return made[0], nth_secret(seed, 0)


async def create_keys(gateway: Gateway, names: Sequence[str], terms: KeyTerms, seed: bytes) -> list[ClientKey]:
    """Create a client key for each name that no active key has, and return the records.

    The secrets are derived from the seed by `nth_secret`, numbered from 0 in this order. If the store fails after some keys, the records of
    those keys are returned.

    Raises:
        BadRequest: The expiry time has passed.
        StorageUnavailable: No key could be saved.
    """
    wall = gateway.wall()
    values = _values_of(gateway, terms)
    made: list[ClientKey] = []
    async with _changing(gateway):
        taken = {key.name for key in gateway.registrations.keys.values() if not key.is_over(wall)}
        for name in dict.fromkeys(name for name in names if name not in taken):
            secret = nth_secret(seed, len(made))
            digest = key_digest(secret).hex()
            key = ClientKey(id=str(uuid.uuid4()), name=name, digest=digest, hint=hint_of(secret), created_at=wall, **values)
            try:
                await gateway.store.save_key(key)
            except StorageUnavailable:
                if not made:
                    raise
                _log.error("the store failed before all client keys were made", extra={"fields": {"made": len(made)}})
                break
            made.append(key)
            _log.info("client key made", extra={"fields": {"key": key.id, "name": key.name}})
        await _refresh_for(gateway, made)
    return made


async def _refresh_for(gateway: Gateway, made: Sequence[ClientKey]) -> None:
    """Read the registry again. If that fails, created keys are still returned, because they cannot be shown later."""
    try:
        await gateway.refresh()
    except StorageUnavailable:
        if not made:
            raise


async def change_key(
    gateway: Gateway, key_id: str, terms: KeyTerms, *, named: Collection[str], name: str | None = None, is_blocked: bool | None = None
) -> ClientKey:
    """Change a client key: the attributes of `terms` that `named` lists, its name, and whether it is blocked; `None` changes nothing.

    When this returns, this process applies the change. Waiting requests of a blocked key end; running ones finish.

    Raises:
        KeyNameTaken: Another active key has the name.
        BadRequest: The new expiry time has passed, or the key is revoked.
        KeyNotFound: No key has this id.
        StorageUnavailable: The change could not be saved.
    """
    values = _values_of(gateway, terms)
    changes = {attribute: values[attribute] for attribute in named}
    if name is not None:
        changes["name"] = name
    async with _changing(gateway):
        before = _unrevoked(gateway, key_id, "cannot be changed")
        if is_blocked is not None:
            changes["blocked_at"] = (before.blocked_at or gateway.wall()) if is_blocked else None
        key = attrs.evolve(before, **changes)
        _require_free_name(gateway, key)
        await gateway.store.save_key(key)
        await gateway.refresh()
    event = "client key changed" if is_blocked is None else "client key blocked" if is_blocked else "client key unblocked"
    _log.info(event, extra={"fields": {"key": key.id, "name": key.name}})
    return key


def _require_free_name(gateway: Gateway, key: ClientKey) -> None:
    wall = gateway.wall()
    others = (other for other in gateway.registrations.keys.values() if other.id != key.id and not other.is_over(wall))
    if not key.is_over(wall) and any(other.name == key.name for other in others):
        raise KeyNameTaken(key.name)


def _values_of(gateway: Gateway, terms: KeyTerms) -> dict[str, Any]:
    """Return the terms by attribute of a client key, with the default for a missing `max_at_once`.

    Raises:
        BadRequest: The expiry time has passed.
    """
    if terms.expires_at is not None and terms.expires_at <= gateway.wall():
        raise InvalidField("expires_at", " is in the past; give a later time, or leave it out")
    at_once = gateway.settings.max_at_once_per_key if terms.max_at_once is None else terms.max_at_once
    return attrs.asdict(terms, recurse=False) | {"max_at_once": at_once}


def find_key(gateway: Gateway, key_id: str) -> ClientKey:
    """Return the client key with an id, as known to this process.

    Raises:
        KeyNotFound: No key has this id.
    """
    key = next((key for key in gateway.registrations.keys.values() if key.id == key_id), None)
    if key is None:
        raise KeyNotFound("There is no client key with this id; GET /admin/keys lists all keys")
    return key


def _unrevoked(gateway: Gateway, key_id: str, problem: str) -> ClientKey:
    key = find_key(gateway, key_id)
    if key.revoked_at is not None:
        raise BadRequest(f"The key is revoked, so it {problem}; create another one")
    return key


async def renew_key(gateway: Gateway, key_id: str, seed: bytes) -> ClientKey:
    """Replace the secret of a key with number 0 of the seed (`nth_secret`); everything else stays.

    When this returns, this process rejects the old secret. Requests sent with it before finish.

    Raises:
        BadRequest: The key is revoked.
        KeyNotFound: No key has this id.
        StorageUnavailable: The change could not be saved.
    """
    secret = nth_secret(seed, 0)
    async with _changing(gateway):
        before = _unrevoked(gateway, key_id, "cannot be renewed")
        key = attrs.evolve(before, digest=key_digest(secret).hex(), hint=hint_of(secret))
        await gateway.store.save_key(key)
        await _refresh_for(gateway, [key])
    _log.info("client key renewed", extra={"fields": {"key": key.id, "name": key.name}})
    return key


async def revoke_key(gateway: Gateway, key_id: str) -> ClientKey:
    """Revoke a client key permanently. When this returns, this process rejects it; revoking it again changes nothing.

    Raises:
        KeyNotFound: There is none with this id.
        StorageUnavailable: It could not be saved.
    """
    async with _changing(gateway):
        key = find_key(gateway, key_id)
        if key.revoked_at is None:
            key = attrs.evolve(key, revoked_at=gateway.wall())
            await gateway.store.save_key(key)
            await gateway.refresh()
            _log.info("client key revoked", extra={"fields": {"key": key.id, "name": key.name}})
    return key


def all_keys(gateway: Gateway) -> list[ClientKey]:
    """Return all client keys, the newest first."""
    return sorted(gateway.registrations.keys.values(), key=lambda key: (key.created_at, key.id), reverse=True)
