"""What runs beside the requests: follow what others change in the store, save what was found, probe what is due.

1. One process probes: the one that holds the lease. Without a store every process does: rather twice than not at all.
2. A probe never waits for another one, as long as fewer than `MAX_PARALLEL` run.
3. No server is taken off before it is certain that not nearly all others fail as well: then our own network is to blame.
4. Nothing here ends because the store or a probe fails; it is told once and tried again.
"""

import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol

import anyio
import anyio.abc
import attrs

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.health import AutoDeregister, HealthState
from multiverse_gateway.core.routing import Route, RoutingTable
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.protocols import ProbeResult, Store
from multiverse_gateway.settings import Settings

FOLLOW_SECONDS = 0.5
TICK_SECONDS = 0.25
LEASE_SECONDS = 5.0
LEASE_ROLE = "probe"
MAX_PARALLEL = 20
LEAST_CORRELATED = 3
CORRELATED_SHARE = 0.8

_log = logging.getLogger("multiverse_gateway.health")


class Watched(Protocol):
    """What the monitor needs of a gateway."""

    @property
    def settings(self) -> Settings:
        """Return the settings."""
        ...

    @property
    def store(self) -> Store:
        """Return the open store."""
        ...

    @property
    def table(self) -> RoutingTable:
        """Return the table of this moment."""
        ...

    @property
    def registry_lock(self) -> anyio.Lock:
        """Return what a change of the registry is made under."""
        ...

    @property
    def now(self) -> Callable[[], float]:
        """Return the monotonic clock."""
        ...

    async def flush(self) -> None:
        """Save what was noted since the last call, in one batch."""
        ...

    async def refresh(self) -> None:
        """Read the registry again if anybody changed it."""
        ...

    async def check(self, server: Server) -> ProbeResult:
        """Probe a server under the timeout, noting nothing."""
        ...

    def note_result(self, result: ProbeResult, *, forced: bool = False, correlated: bool = False) -> None:
        """Advance a server's health by a result; results of removed servers and of older generations are dropped."""
        ...

    async def dismiss(self, server_id: ServerId) -> bool:
        """Remove a server durably."""
        ...


# Decisions


def due(routes: Iterable[Route], now: float) -> list[Server]:
    """Return the servers whose next probe is due, the one that waits longest first."""
    waiting = [route for route in routes if route.health.probe_at <= now]
    return [route.server for route in sorted(waiting, key=lambda route: route.health.probe_at)]


def is_correlated(failed: int, watched: int) -> bool:
    """Tell whether so many of the servers failed that our own network is the likelier cause.

    >>> is_correlated(3, 3), is_correlated(2, 2), is_correlated(4, 6)
    (True, False, False)
    """
    return failed >= LEAST_CORRELATED and failed >= CORRELATED_SHARE * watched


@attrs.frozen
class Verdict:
    """What the latest probe of a server says of the network: whether the server was reached, and when the probe began.

    `failing_since` is when the first probe of the present row of failures began.
    """

    began: float
    reached: bool
    failing_since: float | None = None


@attrs.define(eq=False)
class Evidence:
    """Tell a broken server from a broken network of our own, by the latest probes of all. Instants are monotonic."""

    _verdicts: dict[ServerId, Verdict] = attrs.field(factory=dict)

    def note(self, server_id: ServerId, began: float, *, reached: bool) -> None:
        """Take the outcome of a probe that began at this instant; a server that refuses its key was reached."""
        before = self._verdicts.get(server_id)
        since = before.failing_since if before is not None and before.failing_since is not None else began
        self._verdicts[server_id] = Verdict(began, reached, None if reached else since)

    def keep(self, known: Mapping[ServerId, object]) -> None:
        """Forget the servers that are not among these."""
        self._verdicts = {server_id: verdict for server_id, verdict in self._verdicts.items() if server_id in known}

    def is_widespread(self, routes: Mapping[ServerId, Route]) -> bool:
        """Tell whether nearly all active servers failed their latest probe."""
        active = _active(routes)
        failing = [server_id for server_id in active if server_id in self._verdicts and not self._verdicts[server_id].reached]
        return is_correlated(len(failing), len(active))

    def is_proven(self, server_id: ServerId, routes: Mapping[ServerId, Route]) -> bool:
        """Tell whether enough others were reached since the server began to fail: then it is the server."""
        active = _active(routes)
        return not is_correlated(len(active) - len(active - self.outdated(server_id, routes) - self._failing()), len(active))

    def outdated(self, server_id: ServerId, routes: Mapping[ServerId, Route]) -> set[ServerId]:
        """Return the other active servers whose latest probe is older than the server's failing."""
        verdict = self._verdicts.get(server_id)
        since = float("inf") if verdict is None or verdict.failing_since is None else verdict.failing_since
        return {
            other
            for other in _active(routes)
            if other != server_id and (other not in self._verdicts or self._verdicts[other].began < since)
        }

    def _failing(self) -> set[ServerId]:
        return {server_id for server_id, verdict in self._verdicts.items() if not verdict.reached}


def _active(routes: Mapping[ServerId, Route]) -> set[ServerId]:
    return {server_id for server_id, route in routes.items() if route.health.is_active}


def unsettled(before: RoutingTable, after: RoutingTable) -> set[ServerId]:
    """Return the servers that another process found ill, or not quite well, between these tables: they want a probe at once."""
    old = before.routes
    return {
        server_id
        for server_id, route in after.routes.items()
        if server_id in old
        and old[server_id].health.state is not route.health.state
        and route.health.state in (HealthState.UNHEALTHY, HealthState.HALF_OPEN)
    }


# Loops


async def watch(gateway: Watched) -> None:
    """Run the loops until cancelled; the lease is given back then, so that another process probes at once."""
    monitor = Monitor(gateway)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_steadily, gateway.flush, FOLLOW_SECONDS, "results of probes cannot be saved; they are kept")
            group.start_soon(_steadily, monitor.follow, FOLLOW_SECONDS, "the registry cannot be read; routing goes on with what is known")
            group.start_soon(_steadily, monitor.lead, LEASE_SECONDS / 3, "the store cannot say who probes; this process does")
            if gateway.settings.auto_deregister == AutoDeregister.DELETE:
                group.start_soon(_steadily, monitor.clear, FOLLOW_SECONDS, "servers that failed too often cannot be removed")
            group.start_soon(monitor.probe)
    finally:
        with anyio.move_on_after(1, shield=True):
            await monitor.resign()


async def _steadily(step: Callable[[], Awaitable[None]], seconds: float, trouble: str) -> None:
    """Repeat a step; tell once that the store fails, and once that it works again."""
    works = True
    while True:
        try:
            await step()
            if not works:
                _log.info("over: %s", trouble)
            works = True
        except StorageUnavailable as error:
            if works:
                _log.error(trouble, extra={"fields": {"cause": repr(error.__cause__ or error)}})
            works = False
        except Exception:  # noqa: BLE001  # the edge of the loops: told, and tried again
            if works:
                _log.exception(trouble)
            works = False
        await anyio.sleep(seconds)


class Monitor:
    """Probe the servers of one gateway, as long as this process leads."""

    def __init__(self, gateway: Watched) -> None:
        self.leads = False
        self._gateway = gateway
        self._holder = secrets.token_hex(8)
        self._evidence = Evidence()
        self._running: set[ServerId] = set()
        self._early: set[ServerId] = set()
        self._wake = anyio.Event()
        self._is_widespread = False

    async def lead(self) -> None:
        """Take or renew the lease.

        Raises:
            StorageUnavailable: Nobody knows who has it; this process probes.
        """
        try:
            self.leads = await self._gateway.store.claim(LEASE_ROLE, self._holder, LEASE_SECONDS)
        except BaseException:
            self.leads = True
            raise

    async def resign(self) -> None:
        """Give the lease back if this process has it."""
        leads, self.leads = self.leads, False
        if leads:
            try:
                await self._gateway.store.claim(LEASE_ROLE, self._holder, 0.0)
            except StorageUnavailable:
                _log.debug("the lease could not be given back; it expires by itself")

    async def follow(self) -> None:
        """Adopt what others changed; what they found ill is probed soon, if this process leads.

        Raises:
            StorageUnavailable: The registry cannot be read.
        """
        before = self._gateway.table
        await self._gateway.refresh()
        if self._gateway.table is not before:
            self._early |= unsettled(before, self._gateway.table)

    async def clear(self) -> None:
        """Remove the servers that were taken off: AUTO_DEREGISTER=delete.

        Raises:
            StorageUnavailable: They cannot be removed.
        """
        if not self.leads:
            return
        for server_id in [key for key, route in self._gateway.table.routes.items() if route.health.state is HealthState.DEACTIVATED]:
            async with self._gateway.registry_lock:
                route = self._gateway.table.routes.get(server_id)
                if route is not None and route.health.state is HealthState.DEACTIVATED and await self._gateway.dismiss(server_id):
                    _log.warning("server removed after too many failed probes", extra={"fields": {"server": server_id}})

    async def probe(self) -> None:
        """Probe what is due, again and again."""
        async with anyio.create_task_group() as group:
            while True:
                self._wake = anyio.Event()
                self.start(group)
                with anyio.move_on_after(TICK_SECONDS):
                    await self._wake.wait()

    def start(self, group: anyio.abc.TaskGroup) -> None:
        """Start as many probes as are due and may run."""
        if not self.leads:
            self._early.clear()
            return
        for server in self.next():
            self._running.add(server.id)
            self._early.discard(server.id)
            group.start_soon(self._probe, server)

    def next(self) -> list[Server]:
        """Return the servers to probe now."""
        routes = self._gateway.table.routes
        self._early &= routes.keys()
        servers = due(routes.values(), self._gateway.now())
        planned = {server.id for server in servers}
        servers += [routes[server_id].server for server_id in self._early - planned]
        return [server for server in servers if server.id not in self._running][: MAX_PARALLEL - len(self._running)]

    async def _probe(self, server: Server) -> None:
        began = self._gateway.now()
        try:
            result = await self._gateway.check(server)
            self.note(attrs.evolve(result, server_id=server.id, generation=server.generation), began)
        except Exception:  # noqa: BLE001  # the edge of the loops: told, and tried again
            _log.exception("a server could not be probed", extra={"fields": {"server": server.id}})
        finally:
            was_full = len(self._running) >= MAX_PARALLEL
            self._running.discard(server.id)
            if was_full:
                self._wake.set()

    def note(self, result: ProbeResult, began: float) -> None:
        """Judge and hand on the result of a probe that began at this monotonic instant."""
        routes = self._gateway.table.routes
        route = routes.get(result.server_id)
        if route is None or route.server.generation != result.generation:
            return
        self._evidence.keep(routes)
        reached = result.passed or result.unauthorized
        self._evidence.note(result.server_id, began, reached=reached)
        self._tell(self._evidence.is_widespread(routes))
        self._gateway.note_result(result, correlated=not reached and self._is_doubtful(route))

    def _is_doubtful(self, route: Route) -> bool:
        """Tell whether a failure may be our own network's; ask the others in time for an answer before a server is taken off."""
        routes, server_id = self._gateway.table.routes, route.server.id
        if self._is_widespread:
            return True
        left = self._gateway.settings.max_consecutive_failures - route.health.consecutive_failures
        if not route.health.is_active or left > 2 or self._evidence.is_proven(server_id, routes):
            return False
        self._early |= self._evidence.outdated(server_id, routes)
        return left <= 1

    def _tell(self, widespread: bool) -> None:
        if widespread and not self._is_widespread:
            _log.error("nearly all servers fail at once: is this machine's own network down? None is taken off for it")
        elif self._is_widespread and not widespread:
            _log.warning("not nearly all servers fail any more")
        self._is_widespread = widespread
