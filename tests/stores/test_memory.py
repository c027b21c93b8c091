"""The memory store keeps the contract."""

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from multiverse_gateway import Store
from multiverse_gateway.plugins import completed
from multiverse_gateway.protocols import Coordination, RegistryStore, UsageStore, methods_of
from multiverse_gateway.stores.memory import MemoryStore
from multiverse_gateway.testing.store import ResponseStoreContract, StoreContract, UsageStoreContract, UsageSumStoreContract


class TestMemoryStore(StoreContract, UsageSumStoreContract, ResponseStoreContract):
    """In dictionaries."""

    @pytest.fixture
    async def store(self) -> AsyncIterator[Store]:
        """Yield an empty store."""
        store = MemoryStore()
        await store.open()
        yield store
        await store.aclose()


class Required:
    """A store of the two parts that it must have, and no others."""

    def __init__(self) -> None:
        self._inner = MemoryStore()

    def __getattr__(self, name: str) -> Any:
        if name not in methods_of(RegistryStore) | methods_of(Coordination):
            raise AttributeError(name)
        return getattr(self._inner, name)


class TestCompletedStore(StoreContract, UsageSumStoreContract):
    """Sessions and usage counts that a store does not keep are kept in memory."""

    @pytest.fixture
    async def store(self) -> AsyncIterator[Store]:
        """Yield an empty store."""
        store = completed(cast(RegistryStore, Required()))
        await store.open()
        yield store
        await store.aclose()


class Counting(Required):
    """A store that keeps usage counts, and does not sum them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name) if name in methods_of(UsageStore) else super().__getattr__(name)


class TestSummedStore(UsageStoreContract, UsageSumStoreContract):
    """The sums of usage counts that a store does not make are made of its rows."""

    @pytest.fixture
    async def store(self) -> AsyncIterator[Store]:
        """Yield an empty store."""
        store = completed(cast(RegistryStore, Counting()))
        await store.open()
        yield store
        await store.aclose()


def test_a_whole_store_is_left_as_it_is() -> None:
    """Nothing stands between the gateway and a store that has all parts."""
    store = MemoryStore()
    assert completed(store) is store
