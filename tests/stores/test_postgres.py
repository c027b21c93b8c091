"""The PostgreSQL store keeps the contract, and what happens to connections and servers loses nothing, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from multiverse_gateway import Store
from multiverse_gateway.testing.store import StoreContract
from support.require import require
from support.services import SECRET, PostgresServer

require("psycopg", "the store for PostgreSQL")

from multiverse_gateway.stores.postgres import PostgresStore  # noqa: E402  needs the extra

pytestmark = pytest.mark.e2e


class TestPostgresStore(StoreContract):
    """In a schema of a real server."""

    @pytest.fixture
    async def store(self, postgres: PostgresServer) -> AsyncIterator[Store]:
        """Yield an empty store."""
        store = PostgresStore(postgres.database(), secret=SECRET)
        await store.open()
        yield store
        await store.aclose()
