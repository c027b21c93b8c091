"""The admin key: given by a setting, or made at the first start and kept as a hash.

A fast hash is right for keys that are random: there is nothing to guess.
"""

import hashlib
import hmac
import secrets
from collections.abc import Collection, Iterable

import attrs

from multiverse_gateway.protocols import Coordination
from multiverse_gateway.settings import Settings

SECRET_NAME = "admin_key_sha256"


@attrs.frozen
class AdminKey:
    """What a presented key is held against; `created` is the key itself when it was made just now, to be shown once."""

    digest: str
    created: str | None = attrs.field(default=None, repr=False)


def new_key(kind: str = "admin") -> str:
    """Return a random key of 256 bit."""
    return f"mvg-{kind}-{secrets.token_urlsafe(32)}"


def key_digest(key: str | bytes) -> bytes:
    """Return the SHA-256 of a key or token: all that is ever stored of it, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key).digest()


def is_known(digest: bytes, digests: Iterable[bytes]) -> bool:
    """Return whether a digest is one of the known ones; all are compared, in constant time, so that the time tells nothing.

    >>> is_known(key_digest("mvg-admin-1"), [key_digest("mvg-admin-2"), key_digest("mvg-admin-1")])
    True
    """
    return any([hmac.compare_digest(digest, other) for other in digests])  # noqa: C419  a generator would stop at the first one


async def create_admin_key(store: Coordination) -> AdminKey:
    """Make a key unless the store has the hash of one; of several processes at once, one makes it and the others get its hash."""
    key = new_key()
    digest = key_digest(key).hex()
    kept = await store.secret(SECRET_NAME, digest)
    return AdminKey(kept, key if hmac.compare_digest(kept, digest) else None)


async def admin_key(settings: Settings, store: Coordination) -> AdminKey:
    """Return the admin key of the settings, which wins, or else that of the store, made when there is none."""
    if settings.admin_api_key is not None:
        return AdminKey(key_digest(settings.admin_api_key).hex())
    return await create_admin_key(store)


class AdminKeys:
    """What presented admin keys are held against; nothing is known before `load`."""

    def __init__(self) -> None:
        self.created: str | None = None
        """The key itself if this process made it just now, to be shown once."""
        self._digests: frozenset[bytes] = frozenset()

    async def load(self, settings: Settings, store: Coordination) -> None:
        """Learn the admin key from the settings or the store, and make one if there is none."""
        key = await admin_key(settings, store)
        self.created = key.created
        self._digests = frozenset({bytes.fromhex(key.digest)})

    def digests(self) -> Collection[bytes]:
        """Return the digests of the keys that are valid now."""
        return self._digests
