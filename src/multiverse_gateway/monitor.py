"""The work beside the requests: follow the store, save results, and probe the servers that are due.

1. The process that holds the lease probes; many servers are divided among several leases (`core.probing`). A lease ends with its holder
   where the end of a process can be seen (`holders`). If the store cannot be reached, every process probes: a second probe does less
   harm than none.
2. A probe never waits for another one, as long as fewer than `MAX_PARALLEL` run.
3. When nearly all servers fail, the process that probes lets another one try, because its own network may be the cause.
4. Nothing here ends because the store or a probe fails: the failure is logged once, and the work is tried again.

    a process that …                       | holds the lease of | probes
    ---------------------------------------|--------------------|-----------------------------------------------
    leads alone                            | shard 0            | all servers
    is one of several                      | one shard          | the servers of that shard
    found every lease held                 | none               | none; it claims again after `claim_period`
    yields, because nearly all failed      | none               | all, until another process holds shard 0
    cannot reach the store                 | unknown            | all
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from math import inf
from typing import Protocol

import anyio
import anyio.abc
import attrs

from multiverse_gateway.core.activity import busy_role, held_seconds, hold_seconds
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.health import AutoDeregister, HealthState
from multiverse_gateway.core.probing import (
    LEASE_SECONDS,
    MAX_PARALLEL,
    Doubt,
    FailurePattern,
    claim_period,
    lease_role,
    next_probes,
    one_per_host,
    shard_count,
    shard_of,
)
from multiverse_gateway.core.routing import Route, RoutingTable
from multiverse_gateway.core.servers import HostId, Server, ServerId, share_connection
from multiverse_gateway.health_book import HealthBook
from multiverse_gateway.holders import new_holder
from multiverse_gateway.protocols import ProbeResult, Store
from multiverse_gateway.registration_book import RegistrationBook
from multiverse_gateway.response_places import ResponsePlaces
from multiverse_gateway.server_checks import ServerChecks
from multiverse_gateway.settings import Settings
from multiverse_gateway.usage_book import UsageBook

FOLLOW_SECONDS = 0.5
"""How long a change waits at most to be saved, and again to be read by the other processes: together the second that is promised."""
USAGE_SECONDS = 5.0
TICK_SECONDS = 0.25
YIELD_SECONDS = 3.0
"""How long a lease stays free for other processes, which look for one more often than that. The process that gave it up probes on."""
YIELD_EVERY = 60.0

_log = logging.getLogger("multiverse_gateway.health")


class Watched(Protocol):
    """What the monitor needs of a gateway."""

    @property
    def settings(self) -> Settings:
        """Return the settings of the gateway."""
        ...

    @property
    def store(self) -> Store:
        """Return the store, which must be open."""
        ...

    @property
    def table(self) -> RoutingTable:
        """Return the table of this moment."""
        ...

    @property
    def responses(self) -> ResponsePlaces:
        """Return the places of stored responses, those to be saved among them."""
        ...

    @property
    def usage_book(self) -> UsageBook:
        """Return what this process has done, with the counts that are to be saved."""
        ...

    async def dismiss(self, server_id: ServerId) -> bool:
        """Remove a server that failed too often, as `AUTO_DEREGISTER=delete` wants."""
        ...

    @property
    def checks(self) -> ServerChecks:
        """Return the object that probes servers."""
        ...

    @property
    def health_book(self) -> HealthBook:
        """Return what is known of the servers' health."""
        ...

    @property
    def registrations(self) -> RegistrationBook:
        """Return what was read of the registry, and the lock under which it changes."""
        ...

    @property
    def now(self) -> Callable[[], float]:
        """Return the clock that measures intervals, in seconds."""
        ...

    async def refresh(self, *, anyway: bool = False) -> None:
        """Read the registry again if anybody changed it, or `anyway`."""
        ...


# Loops


async def watch(gateway: Watched) -> None:
    """Run the loops until canceled; the lease is released then, so that another process probes immediately."""
    monitor = Monitor(gateway)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(
                _steadily, gateway.health_book.flush, FOLLOW_SECONDS, "results of probes cannot be saved; they are kept in memory"
            )
            group.start_soon(_steadily, gateway.usage_book.flush, USAGE_SECONDS, "usage counts cannot be saved; they are kept in memory")
            lost = "the places of stored responses cannot be saved; other processes do not know them yet"
            group.start_soon(_steadily, gateway.responses.flush, FOLLOW_SECONDS, lost, gateway.responses.noted)
            unknown = "today's usage counts cannot be read; daily limits continue with the last known counts"
            group.start_soon(_steadily, gateway.usage_book.learn_day, USAGE_SECONDS, unknown)
            trouble = "the registry cannot be read; routing continues with the last known registry"
            group.start_soon(_steadily, gateway.refresh, FOLLOW_SECONDS, trouble, gateway.store.changed)
            group.start_soon(
                _steadily, monitor.lead, 1.0, "the store cannot name the process that probes; this process does it", monitor.rest
            )
            often = hold_seconds(gateway.settings.health_check_timeout_seconds)
            group.start_soon(_steadily, monitor.hold, often, "other processes cannot learn which servers are busy")
            if gateway.settings.auto_deregister == AutoDeregister.DELETE:
                group.start_soon(_steadily, monitor.clear, FOLLOW_SECONDS, "servers that failed too often could not be removed")
            group.start_soon(monitor.probe)
    finally:
        with anyio.move_on_after(1, shield=True):
            await monitor.release()


async def _steadily(
    step: Callable[[], Awaitable[None]], seconds: float, trouble: str, pause: Callable[[float], Awaitable[None]] = anyio.sleep
) -> None:
    """Repeat a step, `seconds` after it at the latest; log once that it fails, and once that it works again. It never ends by itself."""
    works = True
    while True:
        try:
            await step()
            if not works:
                _log.info("no longer the case: %s", trouble)
            works = True
        except StorageUnavailable as error:
            if works:
                _log.error(trouble, extra={"fields": {"cause": type(error.__cause__ or error).__name__, "reason": error.message}})
            works = False
        except Exception:  # noqa: BLE001  # the edge of the loops: logged, and tried again
            if works:
                _log.exception(trouble)
            works = False
        try:
            await pause(seconds)
        except Exception:  # noqa: BLE001  # the store cannot report changes: look after a fixed time
            await anyio.sleep(seconds)


class Monitor:
    """Probe the servers of one gateway, as long as this process is the one to do so."""

    def __init__(self, gateway: Watched) -> None:
        self.leads = False
        """Whether this process probes."""
        self._gateway = gateway
        self._holder = new_holder()
        self._shard: int | None = None
        """The shard whose lease this process holds."""
        self._held: frozenset[int] = frozenset()
        """The shards that are held by any process."""
        self._shards: dict[ServerId, int] = {}
        self._pattern = FailurePattern()
        self._running: set[HostId] = set()
        """The hosts that are being probed."""
        self._early: set[ServerId] = set()
        self._wake = anyio.Event()
        self._is_widespread = False
        self._yielded_at = -inf

    async def lead(self) -> None:
        """Claim or renew a lease, and find out which others are held; if the shards change, read when their servers were probed last.

        Raises:
            StorageUnavailable: The holders are not known; this process probes all servers.
        """
        before = self._held
        try:
            if self._yields():
                await self.release()
                self._divide(frozenset())
                self.leads = await self._claim(0, 0.0)  # until another process takes it: a second probe does less harm than none
                return
            count = shard_count(len(self._gateway.table.routes))
            self._shard = await self._claim_shard(count)
            held = frozenset() if self._shard is None else frozenset([self._shard, *await self._held_by_others(count, self._shard)])
            self._divide(held)
            if held and held != before:
                await self._gateway.refresh(anyway=True)
        except BaseException:
            self._divide(frozenset())
            self.leads = True
            raise
        leads, self.leads = self.leads, self._shard is not None
        if leads is not self.leads:
            _log.info("this process probes" if self.leads else "another process probes", extra={"fields": {"shard": self._shard}})

    async def rest(self, seconds: float) -> None:
        """Wait until the next `lead`: `seconds`, or longer where there are several shards."""
        await anyio.sleep(max(seconds, claim_period(shard_count(len(self._gateway.table.routes)))))

    def _yields(self) -> bool:
        """Return whether another process is to probe now: when widespread failures begin, and every minute while they last."""
        now = self._gateway.now()
        if self._is_widespread and now >= self._yielded_at + YIELD_EVERY:
            self._yielded_at = now
        return now < self._yielded_at + YIELD_SECONDS

    async def _claim_shard(self, count: int) -> int | None:
        """Return the shard that this process holds: its present one if it can be renewed, or else the first that is free."""
        if self._shard is not None and self._shard >= count:
            await self._claim(self._shard, 0.0)
        order = sorted(range(count), key=lambda shard: shard != self._shard)
        for shard in order:
            if await self._claim(shard, LEASE_SECONDS):
                return shard
        return None

    async def _held_by_others(self, count: int, own: int) -> list[int]:
        """Return the shards that other processes hold: a claim for no time shows that and takes nothing."""
        return [shard for shard in range(count) if shard != own and not await self._claim(shard, 0.0)]

    async def _claim(self, shard: int, ttl: float) -> bool:
        return await self._gateway.store.claim(lease_role(shard), self._holder, ttl)

    def _divide(self, held: frozenset[int]) -> None:
        if held != self._held:
            self._held = held
            self._shards.clear()

    def _own_routes(self) -> Mapping[ServerId, Route]:
        """Return the routes of the servers that this process probes."""
        routes = self._gateway.table.routes
        if len(self._held) < 2:
            return routes
        shards = self._shards
        for server_id in routes.keys() - shards.keys():
            shards[server_id] = shard_of(routes[server_id].server.host_id, self._held)
        return {server_id: route for server_id, route in routes.items() if shards[server_id] == self._shard}

    async def release(self) -> None:
        """Release the lease if this process holds one."""
        self.leads = False
        shard, self._shard = self._shard, None
        if shard is not None:
            try:
                await self._claim(shard, 0.0)
            except StorageUnavailable:
                _log.debug("the lease could not be released; it expires by itself")

    async def hold(self) -> None:
        """Publish the machines on which requests of this process run, unless it probes all of them: an unanswered probe proves little.

        Raises:
            StorageUnavailable: The other processes cannot know.
        """
        if self.leads and len(self._held) < 2:
            return
        ttl = held_seconds(self._gateway.settings.health_check_timeout_seconds)
        for url in self._gateway.checks.busy_machines():
            await self._gateway.store.claim(busy_role(url), self._holder, ttl)

    async def clear(self) -> None:
        """Delete the servers that were taken out: AUTO_DEREGISTER=delete.

        The process that takes a server out deletes it, whatever other processes have found since; the one that probes deletes what is
        deactivated for any other reason.

        Raises:
            StorageUnavailable: They cannot be deleted; they are next time.
        """
        gateway = self._gateway
        deactivated = {key for key, route in gateway.table.routes.items() if route.health.state is HealthState.DEACTIVATED}
        for server_id in gateway.health_book.doomed | (deactivated if self.leads else set()):
            async with gateway.registrations.lock:
                route = gateway.table.routes.get(server_id)
                if route is None or (route.health.state is not HealthState.DEACTIVATED and server_id not in gateway.health_book.doomed):
                    continue
                if await gateway.dismiss(server_id):
                    _log.warning("server removed after too many failed probes", extra={"fields": {"server": server_id}})

    async def probe(self) -> None:
        """Probe what is due, again and again."""
        async with anyio.create_task_group() as group:
            while True:
                self._wake = anyio.Event()
                self.start(group)
                for server, path in self._gateway.health_book.doubted_accesses():
                    group.start_soon(self._confirm, server, path)
                with anyio.move_on_after(TICK_SECONDS):
                    await self._wake.wait()

    def start(self, group: anyio.abc.TaskGroup) -> None:
        """Start as many probes as are due and may run."""
        if not self.leads:
            self._early.clear()
            return
        for server in self.next():
            self._running.add(server.host_id)
            self._early.discard(server.id)
            group.start_soon(self._probe, server)

    def next(self) -> list[Server]:
        """Return the servers to probe now."""
        routes = self._own_routes()
        self._early &= routes.keys()
        return next_probes(routes, early=self._early, running=self._running, now=self._gateway.now())

    async def _probe(self, server: Server) -> None:
        began = self._gateway.now()
        result: ProbeResult | None = None
        try:
            result = await self._gateway.checks.check(server)
            self.note(attrs.evolve(result, server_id=server.id, generation=server.generation), began)
            for route in self._gateway.table.routes_of(server.host_id):
                is_other = route.server.id != server.id and share_connection(route.server, server)
                about = self._gateway.checks.result_for(route.server, result) if is_other else None
                if about is not None:
                    self.note(about, began)
        except Exception:  # noqa: BLE001  # the edge of the loops: logged, and tried again
            _log.exception("a server could not be probed", extra={"fields": {"server": server.id}})
        finally:
            was_full = len(self._running) >= MAX_PARALLEL
            self._running.discard(server.host_id)
            if was_full:
                self._wake.set()
        if result is not None:
            await self._read_engine(server, result)

    async def _read_engine(self, server: Server, result: ProbeResult) -> None:
        """Read what the server's engine says, if that is due; it takes up no place among the probes."""
        try:
            await self._gateway.checks.engines.follow(server, result)
        except Exception:  # noqa: BLE001  the edge of the loops: logged, and tried again
            _log.exception("an engine could not be read", extra={"fields": {"server": server.id}})

    async def _confirm(self, server: Server, path: str) -> None:
        """Find out whether a server that refused a request refuses the gateway; every process does that for its own requests."""
        try:
            await self._gateway.checks.confirm_access(server, path)
        except Exception:  # noqa: BLE001  the edge of the loops: logged, and tried again
            _log.exception("a refusal of access could not be confirmed", extra={"fields": {"server": server.id}})

    def note(self, result: ProbeResult, began: float) -> None:
        """Judge and hand on the result of a probe that began at this monotonic instant."""
        routes = self._own_routes()
        route = routes.get(result.server_id)
        if route is None or route.server.generation != result.generation:
            return
        hosts = one_per_host(routes)
        first = next(other.server for other in hosts.values() if other.server.host_id == route.server.host_id)
        self._pattern.keep(hosts)
        reached = result.passed or result.unauthorized or result.is_busy
        self._pattern.note(first.id, began, reached=reached)
        self._report(self._pattern.is_widespread(hosts))
        doubt = Doubt(is_correlated=False) if reached else self._doubt(attrs.evolve(route, server=first), hosts)
        self._early |= doubt.early
        self._gateway.checks.note_result(result, correlated=doubt.is_correlated)

    def _doubt(self, route: Route, routes: Mapping[ServerId, Route]) -> Doubt:
        if self._is_widespread:
            return Doubt(is_correlated=True)
        return self._pattern.doubt(route, routes, max_failures=self._gateway.settings.max_consecutive_failures)

    def _report(self, widespread: bool) -> None:
        if widespread and not self._is_widespread:
            _log.error("nearly all servers fail at once: is this machine's own network down? No server is deactivated meanwhile")
        elif self._is_widespread and not widespread:
            _log.warning("most servers work again")
        self._is_widespread = widespread
