"""Where stored responses are: remembered by this process, saved for the others, and looked up for the exchange that needs one.

The rules stand in `core.stored`; here are the store and the tasks.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import anyio

from multiverse_gateway.core.errors import GatewayError, StorageRefused, StorageUnavailable
from multiverse_gateway.core.routing import RoutingTable, server_at
from multiverse_gateway.core.servers import Server, model_key
from multiverse_gateway.core.stored import (
    KEPT_SECONDS,
    StoredResponse,
    StoredResponses,
    model_elsewhere,
    response_key,
    response_not_found,
    usable_id,
)
from multiverse_gateway.protocols import ResponseStore
from multiverse_gateway.relay.exchange import Exchange

GATHER_SECONDS = 0.1
"""How long the gateway collects further responses before it saves their places together."""
LOOK_AGAIN_SECONDS = (0.2, 0.4)
"""Pauses before the look-up of an unknown response is repeated: another process may be about to save it."""

_registry_log = logging.getLogger("multiverse_gateway.registry")


class _Routing(Protocol):
    @property
    def table(self) -> RoutingTable: ...

    @property
    def wall(self) -> Callable[[], float]: ...

    def refresh(self) -> Awaitable[None]: ...


class ResponsePlaces:
    """The places of stored responses. A store that does not keep them leaves them to each process."""

    def __init__(self, routing: _Routing, store: ResponseStore | None) -> None:
        self._routing = routing
        self._store = store
        self._responses = StoredResponses()
        self._noted = anyio.Event()
        self._waiting: list[tuple[Exchange, str]] = []
        """Exchanges whose stored response has to be looked up in the store, each with the key of the response."""
        self._began_to_wait = anyio.Event()

    def keep(self, source: str, server: Server, response_id: str) -> None:
        """Remember that a server keeps a response for the key or address `source`; the store gets it within a fraction of a second."""
        key = response_key(source, response_id)
        self._responses.add(StoredResponse(key, server.id, server.generation, self._routing.wall() + KEPT_SECONDS))
        self._noted.set()

    def locate(self, exchange: Exchange) -> None:
        """Find the server of the stored response that an exchange needs: in memory at once, otherwise in the store.

        The result comes through `exchange.located` or `exchange.not_located`.
        """
        response_id = usable_id(exchange.request.envelope.response_id)
        if response_id is None:
            exchange.not_located(response_not_found())
            return
        key = response_key(exchange.request.caller.quota, response_id)
        place = self._responses.find(key, self._routing.wall())
        if place is not None:
            self._place(exchange, place)
        elif self._store is None:
            exchange.not_located(response_not_found())
        else:
            self._waiting.append((exchange, key))
            self._began_to_wait.set()

    async def look_up_all(self) -> None:
        """Start a task for each exchange that needs the store, until canceled: the doors call from outside any task."""
        if self._store is None:
            return
        async with anyio.create_task_group() as group:
            while True:
                self._began_to_wait = anyio.Event()
                waiting, self._waiting = self._waiting, []
                for exchange, key in waiting:
                    group.start_soon(self._look_up, exchange, key, self._store)
                await self._began_to_wait.wait()

    async def noted(self, within: float) -> None:
        """Return a moment after a response was made, or after so many seconds."""
        with anyio.move_on_after(within):
            await self._noted.wait()
        await anyio.sleep(GATHER_SECONDS)

    async def flush(self) -> None:
        """Save the places of the responses that were made since the last call.

        Raises:
            StorageUnavailable: They cannot be saved; they are kept for the next call.
        """
        self._noted = anyio.Event()
        responses = self._responses.unsaved
        if not responses or self._store is None:
            return
        try:
            await self._store.save_responses(responses)
        except StorageRefused:
            _registry_log.error("the store rejects the places of stored responses; only this process knows them")
        self._responses.saved(responses)

    async def _look_up(self, exchange: Exchange, key: str, store: ResponseStore) -> None:
        """Look the response up in the store, and retry if it is unknown there: another process may be about to save it."""
        try:
            place = await store.find_response(key)
            for pause in LOOK_AGAIN_SECONDS:
                if place is None:
                    await anyio.sleep(pause)
                    place = await store.find_response(key)
            if place is not None and not self._has(place):  # its server may be too new for the table of this process
                await self._routing.refresh()
        except GatewayError:
            message = "The gateway cannot look up the stored response at the moment. Send the request again in a few seconds."
            exchange.not_located(StorageUnavailable(message, retry_after=5.0))
            return
        if place is None or place.until <= self._routing.wall():
            exchange.not_located(response_not_found())
        else:
            self._responses.learn(place)
            self._place(exchange, place)

    def _has(self, place: StoredResponse) -> bool:
        route = self._routing.table.routes.get(place.server_id)
        return route is not None and route.server.generation == place.generation

    def _place(self, exchange: Exchange, place: StoredResponse) -> None:
        """Send an exchange to the server that has the response, as the server of the model that it asks for."""
        if not self._has(place):
            exchange.not_located(response_not_found())
            return
        table = self._routing.table
        holder = table.routes[place.server_id].server
        name = exchange.request.envelope.model or model_key(holder.model_name)
        server = server_at(holder, table.find(name))
        if server is None:
            exchange.not_located(model_elsewhere(name))
        else:
            exchange.located(server)
