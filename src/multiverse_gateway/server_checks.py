"""Checks of servers: the probe, with what the gateway sees of the server's answers to other requests meanwhile.

What a result means is decided in `core.health`; here are the probe, its timeout, and the requests that ask for one.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

import anyio
import attrs

from multiverse_gateway.access_checks import ask_for_access
from multiverse_gateway.core.activity import ELSEWHERE, Activity, Running, busy_role, held_seconds
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.health import HealthState, Refused, is_refused
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.pauses import stopped_seconds
from multiverse_gateway.core.server_access import CONFIRMING_PATH, Access
from multiverse_gateway.core.servers import Server, ServerId, identity
from multiverse_gateway.dialing import Network
from multiverse_gateway.engines import READ_SECONDS, EngineBook
from multiverse_gateway.health_book import HealthBook
from multiverse_gateway.housekeeping import Housekeeping
from multiverse_gateway.observability.logging import redact
from multiverse_gateway.protocols import HealthProbe, HostProbe, ProbeResult, Store
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.requests import endpoint_of
from multiverse_gateway.usage_book import UsageBook

MAX_PAUSED_CHECKS = 3
"""How often a check is made if this process was stopped while it ran."""
BUSY = "the server is busy: it is answering other requests, and did not answer the check in time"

_health_log = logging.getLogger("multiverse_gateway.health")


class _Serving(Protocol):
    """What the checks need of the gateway."""

    network: Network
    housekeeping: Housekeeping
    store: Store
    load: Load
    exchanges: set[Exchange]
    health_book: HealthBook
    usage_book: UsageBook

    @property
    def now(self) -> Callable[[], float]: ...

    @property
    def wall(self) -> Callable[[], float]: ...


class ServerChecks:
    """Check servers, each within `timeout` seconds."""

    def __init__(self, gateway: _Serving, probe: HealthProbe, *, timeout: float) -> None:
        self.probe = probe
        self.engines = EngineBook(
            gateway.network.client_for, lambda: gateway.health_book, now=gateway.now, seconds=min(READ_SECONDS, timeout)
        )
        self._gateway = gateway
        self._timeout = timeout
        self._waiting: dict[ServerId, list[Callable[[bool], None]]] = {}
        """What learns the result of a probe, by the server that keeps it waiting."""

    async def check(self, server: Server) -> ProbeResult:
        """Probe a server within the timeout, and report what it did for other requests meanwhile; any error is a failed result.

        A server that was not probed since it was changed, or that refused the gateway, must also accept a request with its key.
        Nothing is noted.
        """
        redact(server.api_key)
        before = self._activity(server)
        result = await self._probed(server)
        if result.timed_out and self._gateway.network.wire.close_idle(endpoint_of(server)):
            result = await self._probed(server)  # a server that handles one connection at a time waited for the next request on ours
        path = self._confirming_path(server)
        if result.passed and path is not None and not result.let_in:
            access = await self._access(server, path)
            refused = access.refusal is not None
            return attrs.evolve(result, passed=not refused, reason=access.refusal, unauthorized=refused, let_in=access.granted)
        if not result.timed_out:
            return result
        activity = self._activity(server)
        if activity.oldest is None and await self._is_busy_elsewhere(server):
            elsewhere = Running(ELSEWHERE, self._gateway.now() + held_seconds(self._timeout))
            activity = attrs.evolve(activity, oldest=elsewhere)
        result = attrs.evolve(result, is_busy=activity.shows_life_since(before), running=activity.oldest)
        return attrs.evolve(result, reason=BUSY) if result.is_busy else result

    async def _probed(self, server: Server) -> ProbeResult:
        timeout = self._timeout
        reason, timed_out = f"no answer within {timeout:g} seconds: is the server running, and can it be reached from here?", True
        began = self._gateway.now()
        try:
            for _ in range(MAX_PAUSED_CHECKS):
                began = self._gateway.now()
                with anyio.move_on_after(timeout):
                    return await self.probe.check(server, self._gateway.network.client_for(server))
                if not stopped_seconds(began + timeout, self._gateway.now()):
                    break  # else this process was stopped, and the server did not get its time
        except TimeoutError:
            pass
        except Exception:  # noqa: BLE001  a probe is a plug-in: whatever it raises is a failed result
            _health_log.exception("the probe itself failed", extra={"fields": {"server": server.id}})
            reason, timed_out = "the probe itself failed; the cause is in the gateway's log", False
        return ProbeResult(
            server_id=server.id,
            generation=server.generation,
            passed=False,
            checked_at=self._gateway.wall(),
            duration=self._gateway.now() - began,
            reason=reason,
            timed_out=timed_out,
        )

    def _activity(self, server: Server) -> Activity:
        """Return what the machine of a server does for this process now; it may serve several models."""
        running = [
            (exchange, attempt)
            for exchange in self._gateway.exchanges
            if (attempt := exchange.running) is not None and attempt.server.endpoint_url == server.endpoint_url
        ]
        oldest = min((exchange for exchange, _ in running), key=lambda exchange: exchange.number, default=None)
        return Activity(
            answers=self._gateway.usage_book.meter.answers(server.id),
            received={(exchange.number, exchange.search.tried): attempt.received for exchange, attempt in running},
            oldest=None if oldest is None else Running((oldest.number, oldest.search.tried), oldest.due),
        )

    async def _is_busy_elsewhere(self, server: Server) -> bool:
        """Return whether another process has requests running on the machine of a server, as far as the store can say."""
        try:
            return not await self._gateway.store.claim(busy_role(server.endpoint_url), "", 0.0)
        except StorageUnavailable:
            return False

    def busy_machines(self) -> set[str]:
        """Return the URLs of servers on which requests of this process have been running for longer than half of a probe's time."""
        now, least = self._gateway.now(), self._timeout / 2
        return {
            attempt.server.endpoint_url
            for exchange in self._gateway.exchanges
            if (attempt := exchange.running) is not None and exchange.due > now >= attempt.began + least
        }

    def _confirming_path(self, server: Server) -> str | None:
        """Return the API path on which the server has to let the gateway in, or `None` if there is no doubt about that."""
        route = self._gateway.health_book.table.routes.get(server.id)
        if route is None or route.health.state is HealthState.PROBING or identity(route.server) != identity(server):
            return CONFIRMING_PATH
        return is_refused(route.health)

    async def _access(self, server: Server, path: str) -> Access:
        with anyio.move_on_after(self._timeout):
            return await ask_for_access(server, self._gateway.network.client_for(server), path)
        return Access()

    async def confirm_access(self, server: Server, path: str) -> None:
        """Ask a server that refused a request whether it refuses the gateway, and take it out if it does."""
        access = await self._access(server, path)
        if access.refusal is not None:
            self._gateway.health_book.report(server.id, Refused(generation=server.generation, reason=access.refusal, path=path))

    async def check_now(self, server: Server, *, forced: bool = False) -> ProbeResult:
        """Probe a registered server and note what was found."""
        result = await self.check(server)
        self.note_result(result, forced=forced)
        return result

    def result_for(self, server: Server, result: ProbeResult) -> ProbeResult | None:
        """Return what the probe of another model of its host shows about a server, or `None` if the server must be probed itself."""
        probe = self.probe
        if not isinstance(probe, HostProbe) or (result.passed and self._confirming_path(server) is not None):
            return None
        return probe.result_for(server, result)

    def note_result(self, result: ProbeResult, *, forced: bool = False, correlated: bool = False) -> None:
        """Advance the server's health by a probe's result, and count the probe."""
        outcome = self._gateway.health_book.note_result(result, forced=forced, correlated=correlated)
        if outcome is not None:
            self._gateway.usage_book.meter.probe(outcome, result.duration)

    def ask(self, server: Server, probed: Callable[[bool], None]) -> None:
        """Probe a server that keeps an attempt waiting, and call `probed` with whether it is alive; all that it keeps waiting share one."""
        waiting = self._waiting.get(server.id)
        if waiting is not None:
            waiting.append(probed)
        else:
            self._waiting[server.id] = [probed]
            self._gateway.housekeeping.in_background(partial(self._ask, server))

    async def _ask(self, server: Server) -> None:
        result = await self.check(server)
        self.note_result(result)
        is_alone = result.timed_out and self._gateway.load.in_flight(server.id) == 1  # it may serve one connection at a time
        for probed in self._waiting.pop(server.id):
            probed(result.passed or result.is_busy or is_alone)
