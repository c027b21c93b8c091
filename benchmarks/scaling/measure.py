"""Measure what grows with servers and gateways.

Gateways are processes of their own on one real PostgreSQL; the servers are paths of one small HTTP server, and each is probed every
INTERVAL seconds. Everything shares this machine, so the figures are upper bounds.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any

import anyio
import httpx2
from benchmarks.scaling.costs import cpu_seconds

from multiverse_gateway import Health, HealthState, ServerId
from multiverse_gateway.core.routing import build_table, with_health
from multiverse_gateway.stores.postgres import PostgresStore
from multiverse_gateway.testing.store import make_result, make_server
from support.processes import GatewayProcess
from support.services import SECRET, PostgresServer
from support.sockets import LoopThread, free_port, wait_until

INTERVAL = 20.0


class Probed:
    """A server for everything below it that lists one model and counts who was asked."""

    def __init__(self) -> None:
        self.port = free_port()
        self.hits: Counter[bytes] = Counter()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.hits[head.split(b" ", 2)[1]] += 1
                body = b'{"object": "list", "data": [{"id": "m", "object": "model"}], "choices": [{}]}'  # it answers to any name
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen(self) -> None:
        await asyncio.start_server(self.answer, "127.0.0.1", self.port, backlog=4096)


def timed(work: Callable[[], Any], rounds: int = 9) -> float:
    """Return the median milliseconds of something."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return 1000 * statistics.median(took)


def health_of(gateway: GatewayProcess) -> dict[str, int]:
    counts: dict[str, int] = gateway.call("GET", "/health").json()["counts"]
    return counts


def measure_gateways(servers: int, gateways: int) -> None:
    """Import the servers into one gateway, wait until all of them serve everywhere, and look at the quiet afterward."""
    probed = Probed()
    with ExitStack() as stack:
        thread = LoopThread()
        stack.callback(thread.stop)
        thread.call(probed.listen())
        postgres = stack.enter_context(PostgresServer())
        settings = {
            "DATABASE_URL": postgres.database(),
            "BACKEND_KEY_SECRET": SECRET,
            "HEALTH_CHECK_INTERVAL_SECONDS": str(INTERVAL),
            "HEALTH_CHECK_TIMEOUT_SECONDS": "5",
            "LOG_LEVEL": "WARNING",
        }
        running = [stack.enter_context(GatewayProcess(settings)) for _ in range(gateways)]
        at_rest = [gateway.memory_bytes() for gateway in running]
        body = {
            "servers": [
                {"model_name": f"m{number % 200}", "endpoint_url": f"http://127.0.0.1:{probed.port}/s{number}", "api_key": f"key-{number}"}
                for number in range(servers)
            ]
        }
        began = time.monotonic()
        answer = running[0].admin("POST", "/import", body, timeout=600)
        assert answer.status_code == 200, answer.text
        imported = time.monotonic() - began
        wait_until(lambda: all(health_of(gateway)["healthy_servers"] == servers for gateway in running), within=300)
        usable = time.monotonic() - began
        time.sleep(INTERVAL)
        probes, transactions = probed.hits.total(), commits(postgres)
        cpu = [cpu_seconds(gateway.pid) for gateway in running]
        began = time.monotonic()
        time.sleep(2 * INTERVAL)
        took = time.monotonic() - began
        rate = (probed.hits.total() - probes) / took
        busy = [(cpu_seconds(gateway.pid) - before) / took for gateway, before in zip(running, cpu, strict=True)]
        written = (commits(postgres) - transactions) / took
        lags = [lag(running, f"http://127.0.0.1:{probed.port}/late{number}") for number in range(5)]
        memory = [(gateway.memory_bytes() - before) / (1 << 20) for gateway, before in zip(running, at_rest, strict=True)]
    shares = " + ".join(f"{100 * share:.1f}" for share in busy)
    probing = f"{rate:.1f} ({rate * INTERVAL / servers:.2f})"
    seen = 1000 * statistics.median(lags)
    times = [f"{imported:.1f}", f"{usable:.1f}"]
    figures = [f"{servers:,}", gateways, *times, probing, shares, f"{written:.1f}", f"{seen:.0f}", f"{max(memory):.1f}"]
    print("| " + " | ".join(map(str, figures)) + " |", flush=True)


def commits(postgres: PostgresServer) -> int:
    return int(postgres.execute("select xact_commit from pg_stat_database where datname = 'postgres'")[0][0])


def lag(running: list[GatewayProcess], url: str) -> float:
    """Return the seconds from a registration's answer at the first gateway to its model's being listed by the last one."""
    model = url.rpartition("/")[2]
    running[0].register(model, url)
    began = time.monotonic()
    with httpx2.Client(base_url=running[-1].url, trust_env=False) as client:
        wait_until(lambda: client.get(f"/v1/models/{model}").status_code == 200, within=10)
    return time.monotonic() - began


async def measure_table(servers: int) -> None:
    """Measure what a change costs a gateway: the registry read from PostgreSQL, the table built, one verdict changed in it."""
    with PostgresServer() as postgres:
        store = PostgresStore(postgres.database(), secret=SECRET)
        await store.open()
        for number in range(servers):
            await store.save_server(make_server(f"s{number}", model_name=f"m{number % 200}"))
        healths = {ServerId(f"s{number}"): Health(state=HealthState.HEALTHY, models=("a", "b")) for number in range(servers)}
        await store.save_health(healths, [])
        registry = await store.load()
        reads, saves = [], []
        for _ in range(7):
            began = time.perf_counter()
            registry = await store.load()
            reads.append(time.perf_counter() - began)
            began = time.perf_counter()
            await store.save_health(dict(list(healths.items())[:20]), [])
            saves.append(time.perf_counter() - began)
        await store.aclose()
    table = build_table(1, registry.servers, registry.health)
    build = timed(lambda: build_table(1, registry.servers, registry.health))
    one = timed(lambda: with_health(table, ServerId("s0"), Health(state=HealthState.UNHEALTHY)))
    read, save = (1000 * statistics.median(times) for times in (reads, saves))
    print(f"| {servers:,} | {read:.1f} | {build:.2f} | {one:.3f} | {save:.1f} |", flush=True)


async def measure_database(durable: bool) -> None:
    """Measure how much one PostgreSQL on this machine does: ten gateways that save a verdict and a check, or ask for the version."""
    with PostgresServer(durable=durable) as postgres:
        stores = [PostgresStore(postgres.database(), secret=SECRET)]
        url = stores[0].database.url
        stores += [PostgresStore(url, secret=SECRET) for _ in range(9)]
        for store in stores:
            await store.open()
        await stores[0].save_server(make_server("s0"))
        verdict = {ServerId("s0"): Health(state=HealthState.HEALTHY)}
        works: dict[str, Callable[[PostgresStore], Awaitable[object]]] = {
            "saved": lambda store: store.save_health(verdict, [make_result("s0")]),
            "asked": lambda store: store.version(),
        }
        counts: Counter[str] = Counter()
        for name, work in works.items():
            with anyio.move_on_after(5):
                async with anyio.create_task_group() as group:
                    for store in stores:
                        group.start_soon(repeat, work, store, counts, name)
        for store in stores:
            await store.aclose()
    print(f"| {'yes' if durable else 'no'} | {counts['saved'] / 5:,.0f} | {counts['asked'] / 5:,.0f} |", flush=True)


async def repeat(work: Callable[[PostgresStore], Awaitable[object]], store: PostgresStore, counts: Counter[str], name: str) -> None:
    while True:
        await work(store)
        counts[name] += 1


def measure(sizes: Sequence[int], crews: Sequence[int]) -> None:
    """Measure with each number of servers, on each number of gateways."""
    print("| servers | registry read, ms | table built, ms | one verdict changed, ms | 20 verdicts saved, ms |\n|---|---|---|---|---|")
    for servers in sizes:
        asyncio.run(measure_table(servers))
    print("\n| durable (fsync) | batches saved/s | versions asked/s |\n|---|---|---|")
    for durable in (True, False):
        asyncio.run(measure_database(durable))
    print(
        "\n| servers | gateways | imported in s | healthy everywhere in s | probes/s (per server and interval) | CPU of each gateway, % | "
        "transactions/s | change seen after ms | memory more than at rest, MiB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for servers in sizes:
        for gateways in crews:
            measure_gateways(servers, gateways)
