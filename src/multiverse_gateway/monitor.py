"""Two loops beside the requests: follow what others change in the store, and probe what is due."""

import logging
import math
import secrets
from collections.abc import Iterable

import anyio

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.routing import Route
from multiverse_gateway.core.servers import Server
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import ProbeResult

FOLLOW_SECONDS = 0.5
LEASE_SECONDS = 5.0
MAX_PARALLEL = 20
LEAST_CORRELATED = 3
CORRELATED_SHARE = 0.8

_log = logging.getLogger("multiverse_gateway.health")


def due(routes: Iterable[Route], now: float) -> list[Server]:
    """Return the servers whose next probe is due, the one that waits longest first."""
    waiting = [route for route in routes if route.health.probe_at <= now and route.health.probe_at < math.inf]
    return [route.server for route in sorted(waiting, key=lambda route: route.health.probe_at)]


def is_correlated(failed: int, probed: int) -> bool:
    """Tell whether so many servers failed at once that our own network is the likelier cause."""
    return failed >= LEAST_CORRELATED and failed >= CORRELATED_SHARE * probed


async def watch(gateway: Gateway) -> None:
    """Run both loops until cancelled; what the store cannot do now is tried again."""
    async with anyio.create_task_group() as group:
        group.start_soon(_follow, gateway)
        group.start_soon(_probe, gateway)


async def _follow(gateway: Gateway) -> None:
    works = True
    while True:
        try:
            await gateway.flush()
            await gateway.refresh()
            works = True
        except StorageUnavailable:
            if works:
                _log.error("the store cannot be reached; routing goes on with what is known")
            works = False
        await anyio.sleep(FOLLOW_SECONDS)


async def _probe(gateway: Gateway) -> None:
    holder = secrets.token_hex(8)
    while True:
        if await _holds_lease(gateway, holder):
            await _round(gateway)
        await anyio.sleep(FOLLOW_SECONDS / 2)


async def _holds_lease(gateway: Gateway, holder: str) -> bool:
    try:
        return await gateway.store.claim("probe", holder, LEASE_SECONDS + gateway.settings.health_check_timeout_seconds)
    except StorageUnavailable:
        return True


async def _round(gateway: Gateway) -> None:
    results: list[ProbeResult] = []
    slots = anyio.Semaphore(MAX_PARALLEL)

    async def one(server: Server) -> None:
        async with slots:
            results.append(await gateway.check(server))

    servers = due(gateway.table.routes.values(), gateway.now())
    async with anyio.create_task_group() as group:
        for server in servers:
            group.start_soon(one, server)
    failed = sum(not result.passed for result in results)
    correlated = is_correlated(failed, len(results))
    if correlated:
        _log.error("nearly all servers fail at once: is this machine's own network down?", extra={"fields": {"failed": failed}})
    for result in results:
        gateway.note_result(result, correlated=correlated and not result.passed)
