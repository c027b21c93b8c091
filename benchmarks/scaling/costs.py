"""Measure what one call to PostgreSQL costs it, and the gateway: what the simulation is fed with."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from multiverse_gateway import Health, HealthState, ServerId
from multiverse_gateway.core.usage import Counts, Usage, UsageKey
from multiverse_gateway.stores.postgres import PostgresStore
from multiverse_gateway.testing.store import make_result, make_server
from support.services import SECRET, PostgresServer
from support.workers import children

SECONDS = 3.0
"""How long each call is repeated."""
TICKS = os.sysconf("SC_CLK_TCK")


async def measure_costs(servers: int) -> None:
    """Print the milliseconds of each call: how long it takes, and the CPU of PostgreSQL and of the gateway in it."""
    with PostgresServer(durable=True) as postgres:
        store = PostgresStore(postgres.database(), secret=SECRET)
        await store.open()
        try:
            for number in range(servers):
                await store.save_server(make_server(f"s{number}", model_name=f"m{number % 200}"))
            healths = {ServerId(f"s{number}"): Health(state=HealthState.HEALTHY, models=("a", "b")) for number in range(servers)}
            await store.save_health(healths, [make_result(server_id) for server_id in healths])
            for name, call in calls(store, healths).items():
                print(f"| {name} | {await cost(postgres, call)} |", flush=True)
        finally:
            await store.aclose()


def calls(store: PostgresStore, healths: dict[ServerId, Health]) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return the calls that gateways make while nothing changes, and when something does."""
    numbers = itertools.count()
    few = dict(list(healths.items())[:20])
    rows = [Usage(key=UsageKey("2026-05-01", "m0", ServerId(f"s{number}")), counts=Counts(requests=1)) for number in range(100)]
    return {
        "the version": store.version,
        "a lease asked about": lambda: store.claim("probe", "nobody", 0.0),
        "a lease renewed": lambda: store.claim("probe-1", "somebody", 5.0),
        "1 verdict and check saved": lambda: store.save_health({ServerId("s0"): healths[ServerId("s0")]}, [make_result("s0")]),
        "20 verdicts and checks saved": lambda: store.save_health(few, [make_result(server_id) for server_id in few]),
        "1 usage count": lambda: store.add_usage(f"batch-{next(numbers)}", rows[:1]),
        "100 usage counts": lambda: store.add_usage(f"batch-{next(numbers)}", rows),
        f"the registry, {len(healths):,} servers": store.load,
    }


async def cost(postgres: PostgresServer, call: Callable[[], Awaitable[object]]) -> str:
    await call()
    before, own, began, count = cpu_of(postgres), time.process_time(), time.perf_counter(), 0
    while time.perf_counter() < began + SECONDS:
        await call()
        count += 1
    took = time.perf_counter() - began
    return " | ".join(f"{1000 * spent / count:.2f}" for spent in (took, cpu_of(postgres) - before, time.process_time() - own))


def cpu_of(postgres: PostgresServer) -> float:
    """Return the CPU seconds of the server and its processes."""
    return sum(cpu_seconds(pid) for pid in [postgres.pid, *children(postgres.pid)])


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
