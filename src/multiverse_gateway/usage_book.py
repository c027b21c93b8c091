"""What this process has done: for `/metrics`, for the statistics of use, and for the estimates of the queue.

A request that is over is only added to the tally of those like it (a few dictionary operations); what they have in common is counted
once for all of them, at the latest after `TALLY_SECONDS` (see `Gateway.sweep`) and before anybody reads a figure.
"""

import logging
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any

import anyio
import attrs

from multiverse_gateway.core.budget import DAY_SECONDS, DayCounts, day_name, day_of
from multiverse_gateway.core.errors import StorageRefused
from multiverse_gateway.core.fairness import FairQueue
from multiverse_gateway.core.routing import RoutingTable, listed_name
from multiverse_gateway.core.servers import ClientKey, model_key
from multiverse_gateway.core.speeds import Speeds
from multiverse_gateway.core.usage import NO_OWNER, NO_SERVER, Counts, Ledger, Outbox, Tally, UsageGroup
from multiverse_gateway.core.waits import LEAST_WAIT_SECONDS
from multiverse_gateway.observability.metrics import OTHER, Meter
from multiverse_gateway.observability.telemetry import Observe
from multiverse_gateway.protocols import Store
from multiverse_gateway.relay.exchange import Exchange

TALLY_SECONDS = 1.0
"""How long requests that are over are tallied before they are counted."""

_registry_log = logging.getLogger("multiverse_gateway.registry")


@attrs.define
class Totals:
    """What this process has done since its start."""

    requests: int = 0
    succeeded: int = 0
    failed: int = 0
    left: int = 0
    attempts: int = 0


class UsageBook:
    """Count requests, tokens and waits. `now` is the monotonic clock, `wall` epoch seconds; `table` returns the servers there are, `keys`
    the client keys.
    """

    def __init__(
        self,
        store: Store,
        queue: FairQueue,
        *,
        now: Callable[[], float],
        wall: Callable[[], float],
        table: Callable[[], RoutingTable],
        keys: Callable[[], Collection[ClientKey]],
    ) -> None:
        self.started_at = wall()
        """Epoch seconds."""
        self.observe: Observe | None = None
        """Called with each request that is over, for telemetry."""
        self.day_counts = DayCounts()
        """Requests of today by client key, for those with a daily limit."""
        self._speeds = Speeds()
        self._store = store
        self._queue = queue
        self._now = now
        self._wall = wall
        self._table = table
        self._keys = keys
        self._meter = Meter()
        self._totals = Totals()
        self._ledger = Ledger()
        self._outbox = Outbox(self._ledger)
        self._tallies: dict[tuple[Any, ...], Tally] = {}
        """Requests that are over and not counted yet, by what they have in common."""
        self._saving = anyio.Lock()

    @property
    def meter(self) -> Meter:
        """What is counted for metrics."""
        self.flush_tallies()
        return self._meter

    @property
    def speeds(self) -> Speeds:
        """How fast the servers answer."""
        self.flush_tallies()
        return self._speeds

    @property
    def totals(self) -> Mapping[str, int]:
        """What this process has done since its start, the fields of `Totals`."""
        self.flush_tallies()
        return attrs.asdict(self._totals)

    def label(self, model: str) -> str:
        """Return the name of a model in metrics: those that are not registered are not told apart."""
        table = self._table()
        return listed_name(table, model) if table.find(model) is not None else OTHER

    def count(self, exchange: Exchange, seconds: float, wall: float, events: int) -> None:
        """Add a request that is over to those like it; it arrived `seconds` before the instant `wall`, and got so many events."""
        request, response, search, attempt = exchange.request, exchange.response, exchange.search, exchange.attempt
        model = request.envelope.model
        day = int((wall - seconds) // DAY_SECONDS)  # `day_of`, written out: a call is 0.2 % of a request
        server_id, generation = (None, 0) if attempt is None else (attempt.server.id, attempt.server.generation)
        caller, status, code = request.caller.name, response.status, response.error_code
        key = (model, server_id, generation, caller, day, status, code, search.tried, len(search.failures))
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = self._tally(exchange, day)
        tally.seconds.append(seconds)
        waited_seconds = search.waited_seconds
        if waited_seconds >= LEAST_WAIT_SECONDS:
            tally.waited_seconds += waited_seconds
            self._meter.wait(self.label(model), search.flow, waited_seconds, self._now())
        if attempt is not None and attempt.first_byte_seconds is not None:
            tally.first_byte_seconds.append(attempt.first_byte_seconds)
        prompt_tokens, completion_tokens = exchange.usage
        tally.prompt_tokens += prompt_tokens
        tally.completion_tokens += completion_tokens
        tally.events += events
        tally.sent_bytes += response.sent_bytes
        if search.failures:
            self._meter.failures(search.failures)
        if self.observe is not None:
            self.observe(exchange, wall, seconds)

    def _tally(self, exchange: Exchange, day: int) -> Tally:
        model, attempt, table = exchange.request.envelope.model, exchange.attempt, self._table()
        server = None if attempt is None else attempt.server
        group = UsageGroup(
            model=listed_name(table, model) if server is None or model not in table.aliases else server.model_name,
            is_known=table.find(model) is not None,
            server_id=NO_SERVER if server is None else server.id,
            owner=NO_OWNER if server is None else server.metadata.student_id or NO_OWNER,
            client=exchange.request.caller.name,
            day=day,
            status=exchange.response.status,
            failed=exchange.response.error_code is not None and not exchange.response.is_canceled,
            canceled=exchange.response.is_canceled,
            tries=exchange.search.tried,
            worked=exchange.search.tried > len(exchange.search.failures),
        )
        return Tally(group)

    def flush_tallies(self) -> None:
        """Add the tallies to the totals, the ledger, the metrics and the estimates of the queue: once for many requests."""
        tallies, self._tallies = self._tallies, {}
        for tally in tallies.values():
            self._learn(tally)
            self._add(tally)
            self._meter.requests(tally)
        if tallies:
            self._speeds.keep(self._table().routes)

    def _learn(self, tally: Tally) -> None:
        """Teach the queue how long answers of the model take and how large they are."""
        group, count = tally.group, len(tally.seconds)
        tokens = tally.completion_tokens or tally.events
        if tokens and group.worked and group.succeeded:
            taken = sum(tally.seconds) - tally.waited_seconds
            self._queue.learn(model_key(group.model), seconds=taken / count, output_tokens=tokens / count)
            if group.tries == 1:
                self._speeds.learn(group.server_id, tokens=tokens, seconds=taken, answers=count)

    def _add(self, tally: Tally) -> None:
        group, count, totals = tally.group, len(tally.seconds), self._totals
        totals.requests += count
        totals.attempts += count * group.tries
        if group.canceled:
            totals.left += count
        elif group.failed:
            totals.failed += count
        else:
            totals.succeeded += count
        if group.is_known or group.server_id != NO_SERVER:
            counts = Counts(
                requests=count,
                failed=count * group.failed,
                canceled=count * group.canceled,
                prompt_tokens=tally.prompt_tokens,
                completion_tokens=tally.completion_tokens,
            )
            self._ledger.count(group.model, group.server_id, group.owner, group.client, day=group.day, counts=counts)

    async def flush(self) -> None:
        """Save the use since the last call. A row that the store refuses holds up no other one (`Outbox`).

        Raises:
            StorageUnavailable: Nothing can be saved; it is kept for the next call, and no row is saved twice.
        """
        async with self._saving:
            self.flush_tallies()
            self._outbox.begin()
            refusal: StorageRefused | None = None
            saved = False
            try:
                while (batch := self._outbox.next(secrets.token_hex(16))) is not None:
                    try:
                        await self._store.add_usage(batch.id, batch.rows)
                    except StorageRefused as error:
                        refusal = error
                        self._outbox.refused()
                    else:
                        saved = True
                        self._outbox.accepted()
            finally:
                for usage in self._outbox.end():
                    fields = {"day": usage.key.day, "model": usage.key.model, "server": usage.key.server_id, **attrs.asdict(usage.counts)}
                    _registry_log.error("usage counts are dropped because the store rejects them", extra={"fields": fields})
            if refusal is not None and not saved:
                raise refusal

    async def learn_day(self) -> None:
        """Learn what those client keys that have a daily limit have used today, before this process began and at other processes.

        Nothing is read if no key has such a limit.

        Raises:
            StorageUnavailable: It cannot be read; daily limits continue with the last known counts.
        """
        limited = {key.id for key in self._keys() if key.daily_limit is not None}
        if limited:
            day = day_of(self._wall())
            requests = await self._store.requests_on(day_name(day))
            self.day_counts.learn({key: requests[key] for key in limited & requests.keys()}, day, self._wall())
