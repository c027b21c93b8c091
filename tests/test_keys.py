"""The admin key: made once, kept as a hash."""

from typing import cast

from multiverse_gateway.keys import admin_key, create_admin_key, key_digest, new_key
from multiverse_gateway.protocols import Store
from multiverse_gateway.settings import Settings


class Secrets:
    """The part of a store that keeps secrets."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    async def secret(self, name: str, proposal: str) -> str:
        """Keep the first proposal."""
        return self.kept.setdefault(name, proposal)


async def test_a_key_is_made_once() -> None:
    """The store has its hash only, and the second start does not know it."""
    secrets = Secrets()
    store = cast(Store, secrets)
    first, second = await create_admin_key(store), await create_admin_key(store)
    assert first.created is not None
    assert first.created.startswith("mvg-admin-")
    assert second.created is None
    assert first.digest == second.digest == secrets.kept["admin_key_sha256"] == key_digest(first.created)
    assert key_digest(f"{first.created}x") != second.digest
    assert first.created not in repr(first)


async def test_a_given_key_wins() -> None:
    """None is made then."""
    secrets = Secrets()
    key = await admin_key(Settings(admin_api_key="an-admin-key-of-the-test"), cast(Store, secrets))
    assert (key.created, secrets.kept) == (None, {})
    assert key.digest == key_digest("an-admin-key-of-the-test")


def test_any_text_has_a_digest() -> None:
    """Also one that no header can hold."""
    assert key_digest("\udcff") != key_digest(new_key())
