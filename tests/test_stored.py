"""Where the gateway keeps the places of stored responses, when the store cannot hold them, is broken or knows better."""

from __future__ import annotations

import json
from collections.abc import Sequence

import anyio
import pytest

from multiverse_gateway.api.stored_responses import stored_routes
from multiverse_gateway.core.errors import StorageRefused, StorageUnavailable
from multiverse_gateway.core.stored import StoredResponse, lookup_of, response_key
from multiverse_gateway.protocols import Store
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.stores.memory import MemoryStore
from support.exchanges import RecordingClient, sent_by
from support.gateways import Stage, stage

CALLER = "192.0.2.7"


class Plain:
    """A store that was written before stored responses were kept."""

    def __init__(self) -> None:
        self._inner = MemoryStore()

    def __getattr__(self, name: str) -> object:
        if name in ("save_responses", "find_response"):
            raise AttributeError(name)
        return getattr(self._inner, name)


class Broken(MemoryStore):
    """A store that holds everything but the places of responses."""

    error: Exception = StorageUnavailable("gone")

    async def save_responses(self, responses: Sequence[StoredResponse]) -> None:
        """Fail."""
        raise self.error

    async def find_response(self, key: str) -> StoredResponse | None:
        """Fail."""
        raise self.error


def exchange_of(at: Stage, name: str = "resp_1", caller: str = CALLER) -> tuple[Exchange, RecordingClient]:
    """Return an exchange that asks for a stored response, not started yet."""
    envelope = lookup_of("GET", f"/v1/responses/{name}", b"")
    assert envelope is not None
    client = RecordingClient()
    exchange = Exchange(at.gateway, sent_by(caller, envelope, at.gateway.now(), body=b""), client)
    client.exchange = exchange
    at.gateway.begin(exchange)
    return exchange, client


async def answer_to(at: Stage, name: str = "resp_1", caller: str = CALLER) -> tuple[int | None, str]:
    """Return status and code of the answer to a call that no server gets."""
    exchange, client = exchange_of(at, name, caller)
    exchange.start()
    with anyio.fail_after(5):
        while not client.ended:  # noqa: ASYNC110  the client sets no event
            await anyio.sleep(0.01)
    return client.status, json.loads(client.data)["error"]["code"]


async def keep(at: Stage, name: str = "resp_1", caller: str = CALLER) -> None:
    """Make the gateway remember a response of a registered server."""
    registered = await at.register()
    at.gateway.responses.keep(caller, at.gateway.table.routes[registered["registration_id"]].server, name)


def key_in(store: MemoryStore, name: str = "resp_1", caller: str = CALLER) -> StoredResponse | None:
    return store._responses.get(response_key(caller, name))


async def test_a_store_without_places_leaves_them_to_each_process() -> None:
    """The gateway starts, and finds the responses that it relayed itself; others are unknown."""
    store: Store = Plain()  # type: ignore[assignment]
    async with stage(store=store) as at:
        assert await answer_to(at) == (404, "response_not_found")
        await keep(at)
        await at.gateway.responses.flush()
        exchange, client = exchange_of(at)
        exchange.start()
        assert exchange.search.tried == 1
        exchange.client_gone()
        assert client.is_silent


async def test_what_cannot_be_looked_up_is_not_called_unknown() -> None:
    """503: the client asks again when the store works."""
    async with stage(store=Broken()) as at:
        assert await answer_to(at) == (503, "storage_unavailable")


async def test_what_cannot_be_saved_is_kept_for_the_next_time() -> None:
    """Unless the store refuses it: no later call would be better."""
    store = Broken()
    async with stage(store=store) as at:
        await keep(at)
        with pytest.raises(StorageUnavailable):
            await at.gateway.responses.flush()
        assert len(at.gateway.responses._responses.unsaved) == 1
        store.error = StorageRefused("never")
        await at.gateway.responses.flush()
        assert not at.gateway.responses._responses.unsaved


async def test_a_response_is_saved_with_its_caller_and_for_an_hour() -> None:
    """Not the id and not the caller are saved, but a digest of both; the last ones when the gateway is closed."""
    store = MemoryStore(wall=lambda: 1_780_000_000.0)
    async with stage(store=store) as at:
        await keep(at)
        now = at.clock.wall
    found = key_in(store)
    assert found is not None
    assert (found.until, found.generation) == (now + 3600, 1)
    assert "resp_1" not in str(store._responses)
    assert CALLER not in str(store._responses)


async def test_saving_begins_right_after_a_response_was_made() -> None:
    """The loop that saves wakes up at once; without a new response it wakes up after the given time."""
    async with stage() as at:
        with anyio.fail_after(5):
            await at.gateway.responses.noted(0.01)
        async with anyio.create_task_group() as group:
            group.start_soon(at.gateway.responses.noted, 60.0)
            await anyio.lowlevel.checkpoint()
            with anyio.fail_after(5):
                await keep(at)


async def test_a_response_whose_time_is_over_is_unknown() -> None:
    """In memory and in the store."""
    store = MemoryStore(wall=lambda: 1_780_000_000.0)
    async with stage(store=store) as at:
        await keep(at)
        await at.gateway.responses.flush()
        at.clock.advance(3600)
        assert await answer_to(at) == (404, "response_not_found")


async def test_another_process_may_just_be_saving_it() -> None:
    """The store is asked again before an id is called unknown; the server may be as new as the response."""
    store = MemoryStore(wall=lambda: 1_780_000_000.0)
    async with stage(store=store) as first, stage(store=store) as second:
        await keep(first)
        exchange, _ = exchange_of(second)
        exchange.start()
        await anyio.lowlevel.checkpoint()
        await first.gateway.responses.flush()
        with anyio.fail_after(5):
            while not exchange.search.tried:  # noqa: ASYNC110  an exchange sets no event
                await anyio.sleep(0.01)
        exchange.client_gone()


@pytest.mark.parametrize("name", ["x" * 1025, "resp_2"])
async def test_an_id_that_was_never_answered_is_unknown(name: str) -> None:
    """However long it is."""
    async with stage() as at:
        await keep(at)
        exchange, client = exchange_of(at, name)
        exchange.start()
        assert client.ended == (len(name) > 1024)
        exchange.client_gone()
        assert await answer_to(at, caller="192.0.2.8") == (404, "response_not_found")


async def test_the_routes_of_stored_responses_only_describe_them() -> None:
    """The inference endpoint answers their methods; HEAD, which Starlette adds to each GET, is refused."""
    async with stage(extra=list(stored_routes())) as at:
        for path in ("/v1/responses/resp_1", "/v1/responses/resp_1/input_items"):
            assert (await at.client.head(path)).status_code == 405
