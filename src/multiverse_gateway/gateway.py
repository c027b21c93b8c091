"""The engine: one frozen routing table, this process's load, and the exchanges that run on them.

The table is swapped by one assignment; a request that began keeps reading whole tables only. Nothing here touches the store on the
path of a request: health changes are remembered and saved by `flush`, which the monitor calls.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import attrs
import httpx2

from multiverse_gateway.core.engine_facts import Measured
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.errors import Overloaded, StorageUnavailable, TooManyAtOnce
from multiverse_gateway.core.explaining import as_line, compared, described, judged
from multiverse_gateway.core.health import Health, fresh
from multiverse_gateway.core.hosts import Host
from multiverse_gateway.core.load import Admission, BodyBudget, ByteBudget, Load, retry_seconds
from multiverse_gateway.core.routing import (
    Candidates,
    RoutingTable,
    candidates,
    candidates_at,
    has_slot,
    pools_of,
)
from multiverse_gateway.core.servers import Server, ServerId, model_key
from multiverse_gateway.dialing import Network
from multiverse_gateway.health_book import HealthBook
from multiverse_gateway.housekeeping import Housekeeping
from multiverse_gateway.observability.logging import note, redact
from multiverse_gateway.protocols import Balancer, HealthProbe, ProbeResult, Registry, ResponseStore, Scoring, Store
from multiverse_gateway.registration_book import RegistrationBook
from multiverse_gateway.relay.attempt import Attempt
from multiverse_gateway.relay.commentary import Commentary
from multiverse_gateway.relay.dialer import Resolver
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.exchange_errors import key_ended
from multiverse_gateway.relay.ports import Limits, Phase, Sending
from multiverse_gateway.relay.requests import Requests
from multiverse_gateway.relay.waiting import WaitingRoom
from multiverse_gateway.response_places import ResponsePlaces
from multiverse_gateway.server_checks import ServerChecks
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.policies import health_policy, retry_policy
from multiverse_gateway.storage import with_store_errors
from multiverse_gateway.usage_book import UsageBook

SWEEP_SECONDS = 0.05
REST_SECONDS = 1.0
"""How often a gateway without requests looks whether anything is due."""
BULK_QUEUE_SECONDS = 240.0
"""How long a bulk request may wait for a slot, if other requests may wait at all, and not for longer."""

_routing_log = logging.getLogger("multiverse_gateway.routing")
_registry_log = logging.getLogger("multiverse_gateway.registry")


class Gateway:
    """Serve inference requests over the servers of a registry.

    Everything runs on one event loop, inside `running()`. `now` is the monotonic clock, `wall` epoch seconds, `random` returns a random
    number in [0, 1); they are arguments so that tests pass time in.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        balancer: Balancer,
        probe: HealthProbe,
        resolve: Resolver | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        random: Callable[[], float] = random.random,
    ) -> None:
        self.settings = settings
        self.store = with_store_errors(store)
        self.balancer = balancer
        self.now = now
        self.wall = wall
        self.random = random
        self.network = Network(settings, resolve=resolve, transport=transport)
        self.limits = _limits(settings)
        self.registrations = RegistrationBook()
        self.health_book = HealthBook(
            health_policy(settings), store=self.store, now=now, wall=wall, random=random, changed=self._health_changed
        )
        self.load = Load()
        self.admission = Admission(
            max_in_flight=settings.max_in_flight,
            bodies=BodyBudget(settings.body_budget_bytes),
            answers=ByteBudget(settings.answer_budget_bytes),
        )
        self.room = WaitingRoom(self.admission.places(settings.max_queue), self.admission.uncapped_slots)
        self.commentary = Commentary(self.room.queue)
        self.usage_book = UsageBook(
            self.store, self.room.queue, now=now, wall=wall, table=lambda: self.table, keys=lambda: self.registrations.keys.values()
        )
        self.exchanges: set[Exchange] = set()
        self.requests = Requests(count_stream_tokens=settings.count_stream_tokens)
        keeps_responses = hasattr(store, "save_responses") and hasattr(store, "find_response")
        self.responses = ResponsePlaces(self, cast(ResponseStore, self.store) if keeps_responses else None)
        self.housekeeping = Housekeeping(now)
        self.checks = ServerChecks(self, probe, timeout=settings.health_check_timeout_seconds)

    # The lifespan

    @asynccontextmanager
    async def running(self, watch: Callable[["Gateway"], Coroutine[Any, Any, None]] | None = None) -> AsyncIterator[None]:
        """Open the store, load the table, sweep deadlines and run `watch` (the monitor) until the block is left."""
        self.network.learn_local_addresses()
        await self.store.open()
        self.follow(await self.store.load())
        try:
            await self.usage_book.learn_day()
        except StorageUnavailable:
            _registry_log.warning("today's usage counts cannot be read; daily limits start with what this process has counted")
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.housekeeping.sweep_forever, self.sweep, self._may_rest)
                group.start_soon(self.housekeeping.run_background, group)
                group.start_soon(self.responses.look_up_all)
                if watch is not None:
                    group.start_soon(watch, self)
                try:
                    yield
                except Exception as error:  # noqa: BLE001  nothing but cancellation leaves a group; raised below
                    failure = error
                self.interrupt()
                group.cancel_scope.cancel()
            if failure is not None:
                raise failure
        finally:
            with anyio.move_on_after(5, shield=True):
                await self._close()

    async def _close(self) -> None:
        self.interrupt()
        await self.network.aclose()
        last_steps = (
            (self.health_book.flush, "the results of the last probes could not be saved"),
            (self.usage_book.flush, "the last usage counts could not be saved"),
            (self.responses.flush, "the places of the last stored responses could not be saved"),
            (self.store.aclose, "the store could not be closed"),
        )
        for step, trouble in last_steps:
            try:
                await step()
            except StorageUnavailable:
                _registry_log.warning(trouble)

    def begin_shutdown(self) -> None:
        """Take no new inference requests; the running ones go on. Those that wait for a slot are refused."""
        self.admission.is_closed = self.room.is_closed = True
        for exchange in list(self.exchanges):
            if exchange.phase is Phase.QUEUED:
                exchange.interrupt()

    def interrupt(self) -> None:
        """End every exchange now; committed streams are told why."""
        self.admission.is_closed = self.room.is_closed = True
        for exchange in list(self.exchanges):
            exchange.interrupt()

    def _may_rest(self) -> bool:
        return not (self.exchanges or self.health_book.slow or self.admission.shedding)

    def sweep(self, now: float) -> None:
        """Do what is due at this monotonic instant; called every `SWEEP_SECONDS` while there is anything to do.

        After a pause of this process (SIGSTOP, suspend) all deadlines move by as much, so that what is in the sockets is read first.
        Only `now` is compared with them, for the process may be stopped in here, too.
        """
        stopped, is_strained = self.housekeeping.begin_sweep(now)
        self._postpone(stopped)
        self._shed(is_strained)
        self._raise_shares(now)
        if self.housekeeping.should_flush_tallies(now):
            self.usage_book.flush_tallies()
        if self.housekeeping.should_decay(now):
            self.load.decay()
        self._end_waiting()
        self.room.look(now)
        self.commentary.look(now)
        for exchange in [exchange for exchange in self.exchanges if exchange.due <= now]:
            exchange.tick(now)

    def notice_pause(self, now: float) -> None:
        """Move all deadlines if this process was stopped since the last sweep."""
        self._postpone(self.housekeeping.stopped_seconds(now))

    def _postpone(self, seconds: float) -> None:
        if seconds:
            for exchange in self.exchanges:
                exchange.postpone(seconds)

    def _shed(self, shedding: bool) -> None:
        if shedding is not self.admission.shedding:
            self.admission.shedding = shedding
            _routing_log.warning(
                "this process cannot keep up; new requests are rejected"
                if shedding
                else "this process has caught up; new requests are accepted again"
            )

    def _raise_shares(self, now: float) -> None:
        for server_id, part in self.health_book.traffic_shares(now):
            self.load.set_traffic_share(server_id, part)

    # The registry and its health

    def follow(self, registry: Registry) -> None:
        """Adopt a newer registry: replace the routing table by one assignment."""
        for server in registry.servers:
            redact(server.api_key)
        known_routes = self.table.routes
        for server_id in self.health_book.follow(registry):
            self.network.wire.drop(known_routes[server_id].server.host_id)
            self.load.forget(server_id)
        self.requests.follow(registry.servers)
        self.registrations.follow(registry)
        self._end_waiting()
        routes = self.table.routes
        for server_id, route in known_routes.items():
            if route.health.status == "healthy" and server_id in routes and routes[server_id].health.status != "healthy":
                self.network.wire.drop(route.server.host_id)  # an idle connection may keep it from answering another process
        self._raise_shares(self.now())
        self._note_pools()
        for model in [*self.table.models, *self.table.aliases]:
            self.slot_freed(model)

    def _end_waiting(self) -> None:
        """End the waiting requests of keys that are blocked, revoked or expired; those that run end as usual."""
        ended = self.registrations.ended_keys(self.wall()) if self.room.queue.anybody_waits else {}
        for exchange in [exchange for exchange in self.exchanges if ended and exchange.request.caller.name in ended]:
            exchange.search.end_waiting(key_ended(ended[exchange.request.caller.name]))

    def _health_changed(self, server: Server, before: Health, after: Health) -> None:
        if after.slow_since is not before.slow_since:
            self._raise_shares(self.now())
        if after.state is not before.state:
            if after.status != "healthy":
                self.network.wire.drop(server.host_id)
            self._note_pools()
            self.slot_freed(model_key(server.model_name))

    @property
    def table(self) -> RoutingTable:
        """The servers, their models and their health at this moment."""
        return self.health_book.table

    async def refresh(self, *, anyway: bool = False) -> None:
        """Read the registry again if anybody changed it; `anyway` also what does not count as a change, as when a check was passed."""
        if anyway or await self.store.version() != self.table.version:
            self.follow(await self.store.load())

    async def adopt(
        self, server: Server, result: ProbeResult | None = None, measured: Measured | None = None, *, host: Host | None = None
    ) -> None:
        """Save a server durably, with its host if that is given, and route by it.

        `result` is the probe that it has just passed, `measured` what its engine says.

        Without a result the health that is known of its generation stays; a new generation starts unproven.
        """
        await (self.store.save_server(server) if host is None else self.store.save_host(host, [server]))
        self.health_book.doomed.discard(server.id)
        if result is None:
            await self.refresh()
            return
        known = self.table.routes.get(server.id)
        if measured is None and known is not None and known.health.generation == server.generation:
            measured = known.health.measured
        new = fresh(server.generation, now=self.now(), wall=self.wall(), policy=self.health_book.policy)
        health = attrs.evolve(new, warning=result.warning, models=result.models, measured=measured)
        await self.store.save_health({server.id: health}, [attrs.evolve(result, listing=None)])
        await self.refresh()
        if self.health_book.adopt(server.id, health):
            self._note_pools()
            self.slot_freed(model_key(server.model_name))

    async def dismiss(self, server_id: ServerId) -> bool:
        """Remove a server durably; when this returns, no new request goes to it. False when there is none."""
        removed = await self.store.remove_server(server_id)
        left = [route for route in self.table.routes.values() if route.server.id != server_id]
        if removed and len(left) < len(self.table.routes):
            servers = tuple(route.server for route in left)
            self.follow(attrs.evolve(self.registrations.registry, servers=servers, health={}))
        return removed

    # What exchanges ask for

    def candidates(self, envelope: Envelope, excluded: frozenset[ServerId], now: float) -> Candidates | None:
        """Return the servers that could serve the request now; `None` for a model without servers, and for a server that is gone."""
        table = self.health_book.table
        model = table.find(envelope.model) if table.aliases else table.models.get(envelope.model)  # without aliases it saves a call
        if model is None:
            return None
        if envelope.server_id is not None:
            return candidates_at(model, self.load, envelope, excluded=excluded, now=now)
        if envelope.needs is not None:
            model = model.suited(envelope.needs, excluded)
        return candidates(model, self.load, stream=envelope.stream, path=envelope.path, excluded=excluded, now=now)

    def is_registered(self, server: Server) -> bool:
        """Return whether the table still has the server in this generation."""
        route = self.table.routes.get(server.id)
        return route is not None and route.server.generation == server.generation

    def has_slot(self, server: Server) -> bool:
        """Return whether the table still has the server in this generation, and it may have one more request now."""
        return self.is_registered(server) and has_slot(self.table.routes[server.id], self.load)

    def model_names(self) -> Sequence[str]:
        """Return the models and aliases that have an active server, sorted."""
        found = [model for models in (self.table.models, self.table.aliases) for model in models.values()]
        return sorted({model.name for model in found if any(route.health.is_active for route in model.routes)})

    def pick(self, servers: Sequence[Server], envelope: Envelope) -> Server:
        """Return the server that the balancer chooses from the candidates."""
        return self.balancer.pick(servers, self.load, envelope)

    def send(self, attempt: Attempt) -> Sending:
        """Send the request of an attempt to its server."""
        server, request = attempt.server, attempt.request
        endpoint, data = self.requests.write(server, request, asks_usage=attempt.asks_usage)
        return self.network.wire.send(server.host_id, endpoint, data, attempt, fresh=request.envelope.stateful or attempt.is_replay)

    def explain(self, exchange: Exchange, server: Server, now: float) -> Mapping[str, object]:
        """Explain the choice of a server: the verdict on each server of the model, and what the balancer compared."""
        envelope, search = exchange.request.envelope, exchange.search
        servers = judged(self.table.find(envelope.model), self.load, envelope, excluded=search.excluded, now=now)
        scores = self.balancer.scores(compared(servers), self.load) if isinstance(self.balancer, Scoring) else {}
        return {
            "attempt": search.tried,
            "server": server.id,
            "balancer": self.settings.balancer,
            "failed": [[failed.server_id, failed.failure.kind.name.lower(), failed.failure.reason] for failed in search.failures],
            "candidates": described(servers, self.load, scores),
        }

    def slot_freed(self, model: str) -> None:
        """Offer what is free of a model to the exchanges that wait for it."""
        if self.room.queue.anybody_waits:
            self.room.slot_freed(model, self.now())

    def _note_pools(self) -> None:
        """Update the slots that the queue knows: servers, or the states of some, have changed. It costs about a microsecond per server."""
        self.room.queue.serve(pools_of(self.table))

    def budget_refused(self) -> None:
        """Count a retry that its model's budget did not let begin in time."""
        self.usage_book.meter.refused_retries += 1

    def soon(self, call: Callable[[], None]) -> None:
        """Call a function in the next turn of the event loop, after everything else that is ready."""
        asyncio.get_running_loop().call_soon(call)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function after so many seconds."""
        asyncio.get_running_loop().call_later(seconds, call)

    # Requests

    def overloaded(self) -> Overloaded:
        """Return the refusal of what this process has no room for."""
        return Overloaded("The gateway is overloaded. Try again in a few seconds.", retry_after=retry_seconds(self.random()))

    def begin(self, exchange: Exchange) -> None:
        """Number and track an exchange; the door starts it."""
        self.admission.begun += 1
        exchange.number = self.admission.begun
        self.exchanges.add(exchange)
        if exchange.response.comments is not None:
            self.commentary.add(exchange)
        self.room.at_once.take(exchange.request.caller.quota)
        self.housekeeping.wake()
        if exchange.choice_trace is None and _routing_log.isEnabledFor(logging.DEBUG):
            exchange.choice_trace = []

    def finished(self, exchange: Exchange) -> None:
        """Count, log and forget an exchange that is over."""
        self.exchanges.discard(exchange)
        request, response = exchange.request, exchange.response
        if response.comments is not None:
            self.commentary.discard(exchange)
        self.room.at_once.give_back(request.caller.quota)
        if response.status == 429 and response.error_code == TooManyAtOnce.code:  # as refused at the door: no use of anything
            self.usage_book.meter.refusals[TooManyAtOnce.code] += 1
            return
        wall, seconds = self.wall(), self.now() - request.arrived
        events = exchange.events
        self.usage_book.count(exchange, seconds, wall, events)
        if exchange.choice_trace:
            _routing_log.debug(
                "why this server", extra={"fields": {"request_id": request.request_id, "why": as_line(exchange.choice_trace)}}
            )
        if _routing_log.isEnabledFor(logging.INFO):
            note(_routing_log, "request finished", _record(exchange, seconds, events), wall)


def _record(exchange: Exchange, seconds: float, events: int) -> dict[str, object]:
    request, response, search, attempt = exchange.request, exchange.response, exchange.search, exchange.attempt
    envelope, first = request.envelope, None if attempt is None else attempt.first_byte_seconds
    record = {
        "request_id": request.request_id,
        "path": envelope.path,
        "model": envelope.model,
        "stream": envelope.stream,
        "server": attempt.server.id if attempt is not None else None,
        "status": response.status,
        "code": response.error_code,
        "attempts": search.tried,
        "failures": "".join([failed.failure.kind.value for failed in search.failures]) if search.failures else "",
        "seconds": int(seconds * 10000 + 0.5) / 10000,
        "first_byte_seconds": None if first is None else int(first * 10000 + 0.5) / 10000,
        "events": events,
        "bytes": response.sent_bytes,
    }
    if request.caller.name:
        record["client"] = request.caller.name
    return record


def _limits(settings: Settings) -> Limits:
    return Limits(
        request_timeout=settings.request_timeout_seconds,
        first_byte_timeout=settings.first_byte_timeout_seconds,
        idle_timeout=settings.idle_timeout_seconds,
        queue_timeout=settings.queue_timeout_seconds,
        bulk_queue_timeout=max(settings.queue_timeout_seconds, BULK_QUEUE_SECONDS if settings.queue_timeout_seconds else 0.0),
        max_response_bytes=settings.max_response_bytes,
        max_embeddings_bytes=settings.max_embeddings_bytes,
        max_event_bytes=settings.max_event_bytes,
        max_large_event_bytes=settings.max_large_event_bytes,
        max_stream_bytes=settings.max_stream_bytes,
        max_stream_seconds=settings.max_stream_seconds,
        retry_policy=retry_policy(settings),
    )
