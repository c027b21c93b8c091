"""The admin key: made once, kept as a hash."""

from multiverse_gateway.admin_key import SECRET_NAME, admin_key, create_admin_key, key_digest, new_key
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.memory import MemoryStore


async def test_a_key_is_made_once() -> None:
    """The store has its hash only, and the second start does not know it."""
    store = MemoryStore()
    first, second = await create_admin_key(store), await create_admin_key(store)
    assert first.created is not None
    assert first.created.startswith("mvg-admin-")
    assert second.created is None
    assert first.digest == second.digest == await store.secret(SECRET_NAME, "none") == key_digest(first.created).hex()
    assert key_digest(f"{first.created}x").hex() != second.digest
    assert first.created not in repr(first)


async def test_a_given_key_wins() -> None:
    """None is made then."""
    store = MemoryStore()
    key = await admin_key(Settings(admin_api_key="an-admin-key-of-the-test"), store)
    assert (key.created, await store.secret(SECRET_NAME, "none")) == (None, "none")
    assert key.digest == key_digest("an-admin-key-of-the-test").hex()


def test_any_text_has_a_digest() -> None:
    """Also one that no header can hold; bytes of a header and the text that they spell are one key."""
    assert key_digest("\udcff") == key_digest(b"\xff") != key_digest(new_key())
