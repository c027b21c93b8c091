"""What this process knows of the servers' health: the routing table, and what the store does not have of it yet.

The rules stand in `core.health` and `core.routing`. The table is replaced as a whole by one assignment; a request that began keeps
reading whole tables only.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

import attrs
from attrs import evolve

from multiverse_gateway.core.engine_facts import Measured
from multiverse_gateway.core.errors import StorageRefused
from multiverse_gateway.core.failover import FailureClass
from multiverse_gateway.core.health import (
    AttemptFailed,
    AttemptPassed,
    AutoDeregister,
    Health,
    HealthEvent,
    HealthPolicy,
    HealthState,
    ProbeFailed,
    ProbePassed,
    ProbeTimedOut,
    advance,
    has_answered,
    is_refused,
    is_settled,
    merged,
    traffic_share,
)
from multiverse_gateway.core.needs import Needs, context_of, was_cut
from multiverse_gateway.core.routing import Route, RoutingTable, build_table, with_health
from multiverse_gateway.core.server_access import confirming_path
from multiverse_gateway.core.servers import Server, ServerId, share_connection
from multiverse_gateway.core.timelines import Timelines
from multiverse_gateway.protocols import ProbeResult, Registry, Store

CONFIRM_SECONDS = 60.0
"""Minimum time between two checks of whether a server that refused a request refuses the gateway."""
MAX_RESULTS = 2000
"""Results of probes that are kept while they cannot be saved; the newest."""
MAX_RECENT = 20
"""Results of each server that are kept in memory for the pages."""

_health_log = logging.getLogger("multiverse_gateway.health")

Changed = Callable[[Server, Health, Health], None]
"""Called after the health of a server changed, with the server, its health before and its health after."""


class HealthBook:
    """The routing table with the health of every server, advanced by what happens to them.

    `now` is the monotonic clock, `wall` epoch seconds, `random` returns a random number in [0, 1).
    """

    def __init__(
        self,
        policy: HealthPolicy,
        *,
        store: Store,
        now: Callable[[], float],
        wall: Callable[[], float],
        random: Callable[[], float],
        changed: Changed,
    ) -> None:
        self.policy = policy
        self.table: RoutingTable = build_table(0, (), {})
        self.doomed: set[ServerId] = set()
        """Servers that this process has taken out and the monitor deletes: AUTO_DEREGISTER=delete."""
        self.slow: set[ServerId] = set()
        """Servers in their slow start, which get less traffic than usual."""
        self.cut_texts: dict[ServerId, int] = {}
        """How many long texts each server has read only in part, without saying so, as far as this process knows."""
        self.timelines = Timelines()
        self.recent: dict[ServerId, deque[tuple[float | None, ProbeResult]]] = {}
        """The last results of this process's own probes, newest first, each with the `last_checked_at` that it led to.

        Pages need not read these from the store.
        """
        self._store = store
        self._now = now
        self._wall = wall
        self._random = random
        self._changed = changed
        self._unsaved: set[ServerId] = set()
        self._results: list[ProbeResult] = []
        self._refusals: dict[ServerId, str] = {}
        """API paths on which servers refused a request, until that is confirmed or not."""
        self._confirmed_at: dict[ServerId, float] = {}

    def follow(self, registry: Registry) -> Collection[ServerId]:
        """Replace the table by a newer registry, and return the servers that left.

        What this process knows of a server's health beyond the store's record is kept.
        """
        health = {server.id: self._merged(server, registry.health.get(server.id)) for server in registry.servers}
        gone = self.table.routes.keys() - health.keys()
        self._unsaved -= gone
        self.doomed -= gone
        for server_id in gone:
            self._confirmed_at.pop(server_id, None)
            self.cut_texts.pop(server_id, None)
            self.timelines.forget(server_id)
            self.recent.pop(server_id, None)
        for server_id, record in health.items():
            self.timelines.note(server_id, record, self._wall())
        self.table = build_table(registry.version, registry.servers, health, registry.hosts, registry.aliases)
        self.slow |= {server_id for server_id, record in health.items() if record.slow_since is not None}
        return gone

    def _merged(self, server: Server, stored: Health | None) -> Health:
        route = self.table.routes.get(server.id)
        return merged(
            None if route is None else route.health,
            stored,
            self.policy,
            generation=server.generation,
            is_unsaved=server.id in self._unsaved,
            now=self._now(),
            wall=self._wall(),
        )

    def traffic_shares(self, now: float) -> Sequence[tuple[ServerId, float]]:
        """Return the part of the usual traffic that each server in its slow start should get now; a server that left gets 1."""
        shares = []
        for server_id in list(self.slow):
            route = self.table.routes.get(server_id)
            part = 1.0 if route is None else traffic_share(route.health, self.policy, now)
            shares.append((server_id, part))
            if part >= 1.0:
                self.slow.discard(server_id)
        return shares

    def adopt(self, server_id: ServerId, health: Health) -> bool:
        """Set the health of a server that was probed just now; false if there is no such server."""
        if server_id not in self.table.routes:
            return False
        self.table = with_health(self.table, server_id, health)
        self.timelines.note(server_id, health, self._wall())
        return True

    def passed(self, server: Server, path: str) -> None:
        """Note that an attempt went well; for a server that is settled nothing changes."""
        route = self.table.routes.get(server.id)
        if route is not None:
            health = route.health
            if not (health.is_undisturbed and path in health.answered) and not is_settled(health, path):
                self.report(server.id, AttemptPassed(server.generation, path))

    def has_answered(self, server: Server, path: str) -> bool:
        """Return whether this generation of a server has answered the API path before."""
        route = self.table.routes.get(server.id)
        return route is not None and route.server.generation == server.generation and has_answered(route.health, path)

    def was_cut(self, server: Server, needs: Needs, prompt_tokens: int) -> bool:
        """Return whether the server has probably read only a part of a text, of which it counted so many tokens."""
        route = self.table.routes.get(server.id)
        return route is not None and was_cut(needs, context_of(server, route.health.measured), prompt_tokens)

    def note_cut(self, server: Server) -> None:
        """Count a text of which the server has read only a part."""
        self.cut_texts[server.id] = self.cut_texts.get(server.id, 0) + 1

    def report(self, server_id: ServerId, event: HealthEvent) -> None:
        """Advance a server's health and swap the table when that changed anything; unknown servers are ignored.

        A request that shows something about the connection to the server's host advances the health of all its servers.
        """
        route = self.table.routes.get(server_id)
        if route is None:
            return
        self._advance(route, event)
        if isinstance(event, AttemptFailed) and event.concerns_host and event.generation == route.server.generation:
            for other in self.table.routes_of(route.server.host_id):
                if other.server.id != server_id and share_connection(other.server, route.server):
                    self._advance(other, evolve(event, generation=other.server.generation))

    def _advance(self, route: Route, event: HealthEvent) -> None:
        server_id = route.server.id
        before = route.health
        if isinstance(event, AttemptFailed) and event.failure.kind is FailureClass.AUTH and event.generation == before.generation:
            self._refusals.setdefault(server_id, confirming_path(event.path))
        after = advance(before, event, self.policy, now=self._now(), wall=self._wall(), random=self._random())
        if after is before:
            return
        self.table = with_health(self.table, server_id, after)
        is_new_state = after.state is not before.state
        if is_new_state or after.last_checked_at != before.last_checked_at or after.warning != before.warning:
            self._unsaved.add(server_id)
            self.timelines.note(server_id, after, self._wall())
        if after.state is HealthState.DEACTIVATED and is_new_state and self.policy.auto_deregister is AutoDeregister.DELETE:
            self.doomed.add(server_id)
        if after.slow_since is not before.slow_since:
            self.slow.add(server_id)
        if is_new_state:
            _log_state(route.server, before, after)
        self._changed(route.server, before, after)

    def note_result(self, result: ProbeResult, *, forced: bool = False, correlated: bool = False) -> str | None:
        """Advance the server's health by a probe's result; keep the result for the next `flush` if it was a verdict.

        Returns:
            "passed", "failed" or "undecided"; `None` if there is no such server.
        """
        before = self.table.routes.get(result.server_id)
        if before is None:
            return None
        self.report(result.server_id, _event_of(result, forced=forced, correlated=correlated))
        after = self.table.routes[result.server_id]
        is_verdict = not result.timed_out or after.health.last_checked_at != before.health.last_checked_at
        outcome = "passed" if result.passed else "failed" if is_verdict else "undecided"
        if is_verdict:
            self._results.append(attrs.evolve(result, listing=None))
            recent = self.recent.setdefault(result.server_id, deque(maxlen=MAX_RECENT))
            recent.appendleft((after.health.last_checked_at, attrs.evolve(result, models=(), listing=None)))
        _health_log.log(
            logging.DEBUG if result.passed else logging.INFO,
            "probe %s",
            outcome,
            extra={"fields": {"server": result.server_id, "seconds": round(result.duration, 3), "reason": result.reason}},
        )
        return outcome

    def doubted_accesses(self) -> Sequence[tuple[Server, str]]:
        """Return the servers that refused a request, each with the API path on which to confirm that now; each is returned once.

        A server is returned at most once in `CONFIRM_SECONDS`; a refusal in between waits.
        """
        now = self._now()
        doubted = []
        for server_id, path in list(self._refusals.items()):
            route = self.table.routes.get(server_id)
            if route is not None and is_refused(route.health) is None:
                if now < self._confirmed_at.get(server_id, -math.inf) + CONFIRM_SECONDS:
                    continue
                self._confirmed_at[server_id] = now
                doubted.append((route.server, path))
            del self._refusals[server_id]
        return doubted

    def note_measured(self, server: Server, measured: Measured) -> None:
        """Note what was read from the engine of this generation of a server."""
        route = self.table.routes.get(server.id)
        if route is None or route.server.generation != server.generation or route.health.measured == measured:
            return
        self.table = with_health(self.table, server.id, attrs.evolve(route.health, measured=measured))
        self._unsaved.add(server.id)

    async def flush(self) -> None:
        """Save the health that changed and the results of probes since the last call.

        Raises:
            StorageUnavailable: The store cannot be written; what was to be saved is kept for the next call, `MAX_RESULTS` results of it.
        """
        if not self._unsaved and not self._results:
            return
        results, self._results = self._results, []
        routes = self.table.routes
        changes = {server_id: routes[server_id].health for server_id in self._unsaved if server_id in routes}
        try:
            await self._save(changes, results)
        except BaseException:
            self._results = [*results, *self._results][-MAX_RESULTS:]
            raise
        routes = self.table.routes  # what changed meanwhile is not saved yet
        self._unsaved = {key for key in self._unsaved if key in routes and routes[key].health is not changes.get(key)}

    async def _save(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        """Save everything in one batch; if the store refuses it, save server by server, and drop what it still refuses."""
        try:
            await self._store.save_health(changes, results)
        except StorageRefused:
            for server_id in dict.fromkeys([*changes, *(result.server_id for result in results)]):
                own = {server_id: changes[server_id]} if server_id in changes else {}
                try:
                    await self._store.save_health(own, [result for result in results if result.server_id == server_id])
                except StorageRefused:
                    _health_log.error("the store rejects the health of a server; it is not saved", extra={"fields": {"server": server_id}})


def _event_of(result: ProbeResult, *, forced: bool, correlated: bool) -> HealthEvent:
    generation, reason = result.generation, result.reason or "the probe failed"
    if result.passed:
        return ProbePassed(generation, result.warning, result.models, forced=forced, let_in=result.let_in)
    if result.timed_out:
        return ProbeTimedOut(generation, reason, result.is_busy, result.running, correlated=correlated, forced=forced)
    return ProbeFailed(generation, reason, unauthorized=result.unauthorized, correlated=correlated, forced=forced)


def _log_state(server: Server, before: Health, after: Health) -> None:
    fields = {
        "server": server.id,
        "model": server.model_name,
        "from": before.state.value,
        "to": after.state.value,
        "reason": after.reason,
    }
    level = logging.INFO if after.status == "healthy" else logging.WARNING
    _health_log.log(level, "server is %s now", after.state.value, extra={"fields": fields})
