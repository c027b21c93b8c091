"""What the admin API answers about client keys; their JSON Schema is made from these types."""

from typing import Annotated

import attrs
from msgspec import Meta

from multiverse_gateway.api.response_types import Time, Uuid, iso, iso_or_none
from multiverse_gateway.core.servers import ClientKey, KeyState


@attrs.frozen(kw_only=True)
class KeyRecord:
    """A client key, without the key itself. `rate_limit` is per minute; null is what holds for all keys. Days are of UTC."""

    id: Uuid
    name: str
    hint: Annotated[str | None, Meta(description="the beginning and the end of the key itself; null for keys of older versions")]
    state: Annotated[KeyState, Meta(description="`blocked` can be undone; an `expired` key works again if it gets a later time")]
    created_at: Time
    expires_at: Time | None
    revoked_at: Time | None
    blocked_at: Time | None
    rate_limit: int | None
    daily_limit: Annotated[int | None, Meta(description="requests to models per day; null means no limit")]
    used_today: Annotated[int | None, Meta(description="requests of today that the gateway knows of; null without a daily limit")]
    max_at_once: Annotated[
        int,
        Meta(description="requests that it may have running and waiting before one that would have to wait is rejected; 0 means no limit"),
    ]
    bulk: Annotated[bool, Meta(description="whether its requests yield to interactive ones")]
    models: Annotated[list[str], Meta(description="the models that it may use; an empty list means all")]
    works: Annotated[bool, Meta(description="whether requests with this key are accepted now")]


def key_record(key: ClientKey, wall: float, used_today: int = 0) -> KeyRecord:
    """Return the record of a client key, without the key itself."""
    return KeyRecord(
        id=key.id,
        name=key.name,
        hint=key.hint,
        state=key.state(wall),
        created_at=iso(key.created_at),
        expires_at=iso_or_none(key.expires_at),
        revoked_at=iso_or_none(key.revoked_at),
        blocked_at=iso_or_none(key.blocked_at),
        rate_limit=key.rate_limit,
        daily_limit=key.daily_limit,
        used_today=None if key.daily_limit is None else min(used_today, key.daily_limit),
        max_at_once=key.max_at_once,
        bulk=key.is_bulk,
        models=list(key.models),
        works=key.works(wall),
    )


@attrs.frozen(kw_only=True)
class MadeKey(KeyRecord):
    """A client key that was made or renewed; `key` is shown this once."""

    key: str = attrs.field(repr=False)


def made_key(key: ClientKey, wall: float, secret: str) -> MadeKey:
    """Describe a client key that was made, and show it."""
    return MadeKey(**attrs.asdict(key_record(key, wall)), key=secret)
