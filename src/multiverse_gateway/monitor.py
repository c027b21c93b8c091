"""What runs beside the requests: follow what others change in the store, save what was found, probe what is due.

1. One process probes: the one that has the seat. Many servers are worth several seats, and those who sit divide the servers among
   them. A seat is a lease, which ends with its holder where that can be seen (`holders`). Without a store every process probes: rather
   twice than not at all.
2. A probe never waits for another one, as long as fewer than `MAX_PARALLEL` run.
3. When nearly all servers fail, whoever probes lets another process try: its own network may be to blame.
4. No server is taken off before it is certain that not nearly all others fail as well: then our own network is to blame.
5. Nothing here ends because the store or a probe fails; it is told once and tried again.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from hashlib import blake2b
from math import inf
from typing import Protocol

import anyio
import anyio.abc
import attrs

from multiverse_gateway.core.activity import busy_role, held_seconds, hold_seconds
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.health import AutoDeregister, HealthState
from multiverse_gateway.core.routing import Route, RoutingTable
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.health_book import HealthBook
from multiverse_gateway.holders import new_holder
from multiverse_gateway.protocols import ProbeResult, Store
from multiverse_gateway.response_places import ResponsePlaces
from multiverse_gateway.settings import Settings

FOLLOW_SECONDS = 0.5
"""How long a change waits at most to be saved, and again to be read by the other processes: together the second that is promised."""
USAGE_SECONDS = 5.0
TICK_SECONDS = 0.25
LEASE_SECONDS = 5.0
YIELD_SECONDS = 3.0
"""How long a seat stays free for others: they look for one more often than that. Who left it probes on until then."""
YIELD_EVERY = 60.0
LEASE_ROLE = "probe"
SERVERS_PER_SEAT = 100
"""So many servers can hang at once, and one process still judges each of them once in a minute."""
MOST_SEATS = 16
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
    def responses(self) -> ResponsePlaces:
        """Return the places of stored responses, those to be saved among them."""
        ...

    @property
    def health_book(self) -> HealthBook:
        """Return what is known of the servers' health."""
        ...

    @property
    def registry_lock(self) -> anyio.Lock:
        """Return what a change of the registry is made under."""
        ...

    @property
    def now(self) -> Callable[[], float]:
        """Return the monotonic clock."""
        ...

    async def flush_usage(self) -> None:
        """Save what was used since the last call, in one batch."""
        ...

    async def learn_use(self) -> None:
        """Learn what client keys with a daily limit have used today, at other processes too."""
        ...

    async def refresh(self, *, anyway: bool = False) -> None:
        """Read the registry again if anybody changed it, or `anyway`."""
        ...

    async def check(self, server: Server) -> ProbeResult:
        """Probe a server under the timeout, noting nothing."""
        ...

    def note_result(self, result: ProbeResult, *, forced: bool = False, correlated: bool = False) -> None:
        """Advance a server's health by a result; results of removed servers and of older generations are dropped."""
        ...

    def busy_machines(self) -> Collection[str]:
        """Return the URLs of servers on which requests of this process have been running for a while."""
        ...

    async def confirm_access(self, server: Server, path: str) -> None:
        """Ask a server whether it refuses the gateway, and take it out if it does."""
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


def seats(servers: int) -> int:
    """Return how many processes may share the probing of so many servers.

    >>> seats(0), seats(100), seats(101), seats(1_000_000)
    (1, 1, 2, 16)
    """
    return min(MOST_SEATS, max(1, -(-servers // SERVERS_PER_SEAT)))


def claim_period(count: int) -> float:
    """Return the seconds after which a process renews its seat or looks for one, where there are so many.

    The seat of a process that was killed on the same machine is free at once, so the only seat is looked for more often. Each of several
    seats is claimed by every process without one, which at many gateways is most of the load of their database.

    >>> claim_period(1), claim_period(2) < LEASE_SECONDS / 2
    (1.0, True)
    """
    return 1.0 if count == 1 else LEASE_SECONDS / 3


def seat_of(server_id: ServerId, taken: Collection[int]) -> int:
    """Return the seat from which a server is probed: when one is taken or left, only the servers that it gets or had move."""
    return max(taken, key=lambda seat: blake2b(f"{seat} {server_id}".encode(), digest_size=8).digest())


def role_of(seat: int) -> str:
    """Return the name of a seat's lease.

    >>> role_of(0), role_of(1)
    ('probe', 'probe-1')
    """
    return LEASE_ROLE if seat == 0 else f"{LEASE_ROLE}-{seat}"


# Loops


async def watch(gateway: Watched) -> None:
    """Run the loops until cancelled; the lease is given back then, so that another process probes at once."""
    monitor = Monitor(gateway)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_steadily, gateway.health_book.flush, FOLLOW_SECONDS, "results of probes cannot be saved; they are kept")
            group.start_soon(_steadily, gateway.flush_usage, USAGE_SECONDS, "counts of use cannot be saved; they are kept")
            lost = "the places of stored responses cannot be saved; other processes do not know them yet"
            group.start_soon(_steadily, gateway.responses.flush, FOLLOW_SECONDS, lost, gateway.responses.noted)
            unknown = "the counts of today cannot be read; daily limits continue with the last known counts"
            group.start_soon(_steadily, gateway.learn_use, USAGE_SECONDS, unknown)
            trouble = "the registry cannot be read; routing continues with the last known registry"
            group.start_soon(_steadily, gateway.refresh, FOLLOW_SECONDS, trouble, gateway.store.changed)
            group.start_soon(_steadily, monitor.lead, 1.0, "the store cannot say who probes; this process does", monitor.rest)
            often = hold_seconds(gateway.settings.health_check_timeout_seconds)
            group.start_soon(_steadily, monitor.hold, often, "other processes cannot know which servers are busy")
            if gateway.settings.auto_deregister == AutoDeregister.DELETE:
                group.start_soon(_steadily, monitor.clear, FOLLOW_SECONDS, "servers that failed too often cannot be removed")
            group.start_soon(monitor.probe)
    finally:
        with anyio.move_on_after(1, shield=True):
            await monitor.resign()


async def _steadily(
    step: Callable[[], Awaitable[None]], seconds: float, trouble: str, pause: Callable[[float], Awaitable[None]] = anyio.sleep
) -> None:
    """Repeat a step, `seconds` after it at the latest; log once that it fails, and once that it works again. It never ends by itself."""
    works = True
    while True:
        try:
            await step()
            if not works:
                _log.info("over: %s", trouble)
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
    """Probe the servers of one gateway, as long as this process leads."""

    def __init__(self, gateway: Watched) -> None:
        self.leads = False
        self._gateway = gateway
        self._holder = new_holder()
        self._seat: int | None = None
        self._taken: frozenset[int] = frozenset()
        self._seats: dict[ServerId, int] = {}
        self._evidence = Evidence()
        self._running: set[ServerId] = set()
        self._early: set[ServerId] = set()
        self._wake = anyio.Event()
        self._is_widespread = False
        self._yielded_at = -inf

    async def lead(self) -> None:
        """Take or keep a seat, and find out who else has one; whoever gets other servers to probe learns when that was done last.

        Raises:
            StorageUnavailable: Nobody knows who has one; this process probes all.
        """
        before = self._taken
        try:
            if self._yields():
                await self.resign()
                self._divide(frozenset())
                self.leads = await self._claim(0, 0.0)  # until somebody takes it: rather twice than not at all
                return
            count = seats(len(self._gateway.table.routes))
            self._seat = await self._sit(count)
            taken = frozenset() if self._seat is None else frozenset([self._seat, *await self._others(count, self._seat)])
            self._divide(taken)
            if taken and taken != before:
                await self._gateway.refresh(anyway=True)
        except BaseException:
            self._divide(frozenset())
            self.leads = True
            raise
        leads, self.leads = self.leads, self._seat is not None
        if leads is not self.leads:
            _log.info("this process probes" if self.leads else "another process probes", extra={"fields": {"seat": self._seat}})

    async def rest(self, seconds: float) -> None:
        """Wait until it is time for `lead` again: so many seconds, or more where there are several seats."""
        await anyio.sleep(max(seconds, claim_period(seats(len(self._gateway.table.routes)))))

    def _yields(self) -> bool:
        """Tell whether another process shall probe now: at the beginning of widespread failures, and each minute while they last."""
        now = self._gateway.now()
        if self._is_widespread and now >= self._yielded_at + YIELD_EVERY:
            self._yielded_at = now
        return now < self._yielded_at + YIELD_SECONDS

    async def _sit(self, count: int) -> int | None:
        """Return the seat that this process has: its old one if it may keep it, or else the first that is free."""
        if self._seat is not None and self._seat >= count:
            await self._claim(self._seat, 0.0)
        order = sorted(range(count), key=lambda seat: seat != self._seat)
        for seat in order:
            if await self._claim(seat, LEASE_SECONDS):
                return seat
        return None

    async def _others(self, count: int, own: int) -> list[int]:
        """Return the seats that others have: a claim that would end at once says so and takes nothing."""
        return [seat for seat in range(count) if seat != own and not await self._claim(seat, 0.0)]

    async def _claim(self, seat: int, ttl: float) -> bool:
        return await self._gateway.store.claim(role_of(seat), self._holder, ttl)

    def _divide(self, taken: frozenset[int]) -> None:
        if taken != self._taken:
            self._taken = taken
            self._seats.clear()

    def _share(self) -> Mapping[ServerId, Route]:
        """Return the servers that this process probes."""
        routes = self._gateway.table.routes
        if len(self._taken) < 2:
            return routes
        known = self._seats
        for server_id in routes.keys() - known.keys():
            known[server_id] = seat_of(server_id, self._taken)
        return {server_id: route for server_id, route in routes.items() if known[server_id] == self._seat}

    async def resign(self) -> None:
        """Give the seat back if this process has one."""
        self.leads = False
        seat, self._seat = self._seat, None
        if seat is not None:
            try:
                await self._claim(seat, 0.0)
            except StorageUnavailable:
                _log.debug("the lease could not be given back; it expires by itself")

    async def hold(self) -> None:
        """Publish the machines on which requests of this process run, unless it probes all of them: an unanswered probe proves little.

        Raises:
            StorageUnavailable: The other processes cannot know.
        """
        if self.leads and len(self._taken) < 2:
            return
        ttl = held_seconds(self._gateway.settings.health_check_timeout_seconds)
        for url in self._gateway.busy_machines():
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
            async with gateway.registry_lock:
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
            self._running.add(server.id)
            self._early.discard(server.id)
            group.start_soon(self._probe, server)

    def next(self) -> list[Server]:
        """Return the servers to probe now."""
        routes = self._share()
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
        except Exception:  # noqa: BLE001  # the edge of the loops: logged, and tried again
            _log.exception("a server could not be probed", extra={"fields": {"server": server.id}})
        finally:
            was_full = len(self._running) >= MAX_PARALLEL
            self._running.discard(server.id)
            if was_full:
                self._wake.set()

    async def _confirm(self, server: Server, path: str) -> None:
        """Find out whether a server that refused a request refuses the gateway; every process does that for its own requests."""
        try:
            await self._gateway.confirm_access(server, path)
        except Exception:  # noqa: BLE001  the edge of the loops: logged, and tried again
            _log.exception("a refusal could not be confirmed", extra={"fields": {"server": server.id}})

    def note(self, result: ProbeResult, began: float) -> None:
        """Judge and hand on the result of a probe that began at this monotonic instant."""
        routes = self._share()
        route = routes.get(result.server_id)
        if route is None or route.server.generation != result.generation:
            return
        self._evidence.keep(routes)
        reached = result.passed or result.unauthorized or result.is_busy
        self._evidence.note(result.server_id, began, reached=reached)
        self._tell(self._evidence.is_widespread(routes))
        self._gateway.note_result(result, correlated=not reached and self._is_doubtful(route, routes))

    def _is_doubtful(self, route: Route, routes: Mapping[ServerId, Route]) -> bool:
        """Tell whether a failure may be our own network's; ask the others in time for an answer before a server is taken off."""
        server_id = route.server.id
        if self._is_widespread:
            return True
        left = self._gateway.settings.max_consecutive_failures - route.health.consecutive_failures
        if not route.health.is_active or left > 2 or self._evidence.is_proven(server_id, routes):
            return False
        self._early |= self._evidence.outdated(server_id, routes)
        return left <= 1

    def _tell(self, widespread: bool) -> None:
        if widespread and not self._is_widespread:
            _log.error("nearly all servers fail at once: is this machine's own network down? No server is deactivated for it")
        elif self._is_widespread and not widespread:
            _log.warning("not nearly all servers fail any more")
        self._is_widespread = widespread
