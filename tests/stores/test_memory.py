"""The memory store keeps the contract."""

from collections.abc import AsyncIterator

import pytest

from multiverse_gateway import Store
from multiverse_gateway.stores.memory import MemoryStore
from multiverse_gateway.testing.store import ResponseStoreContract, StoreContract


class TestMemoryStore(StoreContract, ResponseStoreContract):
    """In dictionaries."""

    @pytest.fixture
    async def store(self) -> AsyncIterator[Store]:
        """Yield an empty store."""
        store = MemoryStore()
        await store.open()
        yield store
        await store.aclose()
