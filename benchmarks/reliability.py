"""Measure how the gateway stands faults, or let random faults rain on it until something leaks.

    python benchmarks/reliability.py                  # the figures of docs/explanation/reliability.md, in about two minutes
    python benchmarks/reliability.py --scale 10       # ten times as many requests
    python benchmarks/reliability.py soak --minutes 30

The gateway runs as users run it, in a process of its own; the model servers are those of the tests, on loopback. Exit code 1: a goal
was missed, or something leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from statistics import quantiles

import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import behaviours
from support.backends import Backend, Outcome
from support.processes import GatewayProcess
from support.raw_client import AsyncRawClient, EndedError
from support.sockets import until

CHAT = "/v1/chat/completions"
SETTINGS = {"FIRST_BYTE_TIMEOUT_SECONDS": "2", "IDLE_TIMEOUT_SECONDS": "2", "CONNECT_TIMEOUT_SECONDS": "1", "LOG_LEVEL": "WARNING"}
REFUSED = b'{"detail": [ {"msg" : "context too long", "n": 1.50e+3} ]}\n'


def body(model: str, *, stream: bool = False) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], "stream": stream}


class Bench:
    """A gateway and the servers of the moment."""

    def __init__(self, gateway: GatewayProcess, scale: float) -> None:
        self.gateway = gateway
        self.scale = scale
        self.missed: list[str] = []
        self.number = 0

    def count(self, usual: int) -> int:
        return max(20, int(usual * self.scale))

    def tell(self, figure: str, value: str, goal: str, met: bool) -> None:
        print(f"| {figure} | {value} | {goal} | {'yes' if met else '**no**'} |", flush=True)
        if not met:
            self.missed.append(figure)

    async def scene(self, stack: AsyncExitStack, *backends: Backend, **fields: object) -> str:
        self.number += 1
        model = f"model-{self.number}"
        for backend in backends:
            await stack.enter_async_context(backend)
            registered = await asyncio.to_thread(self.gateway.register, model, backend.url, **fields)
            stack.push_async_callback(asyncio.to_thread, self.gateway.admin, "DELETE", f"/register/{registered}")
        return model

    async def ask(self, model: str, *, stream: bool = False) -> tuple[int, bytes]:
        async with AsyncRawClient(self.gateway.port, timeout=20) as client:
            answer = await client.fetch("POST", CHAT, json=body(model, stream=stream))
            return answer.status, answer.body

    async def settled(self) -> bool:
        """Wait until nothing runs any more."""
        for _ in range(200):
            found = (await asyncio.to_thread(self.gateway.admin, "GET", "/servers")).json()
            if not any(server.get("in_flight", 0) for server in found):
                return True
            await asyncio.sleep(0.05)
        return False


async def at_once(count: int, parallel: int, work: Callable[[], Awaitable[None]]) -> None:
    """Do something `count` times, some at once."""
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await work()

    await asyncio.gather(*(worker() for _ in range(parallel)))


async def resets(bench: Bench) -> None:
    flaky = [Backend(f"flaky {n}", behaviours.randomly(0.3, behaviours.reset_first(), seed=n)) for n in range(3)]
    good = 0
    count = bench.count(1000)
    async with AsyncExitStack() as stack:
        model = await bench.scene(stack, *flaky)

        async def one() -> None:
            nonlocal good
            status, _ = await bench.ask(model)
            good += status == 200

        await at_once(count, 4, one)
    bench.tell(
        "success with 30 % resets before the first byte, 3 servers", f"{good / count:.1%} of {count}", "≥ 98.5 %", good >= 0.985 * count
    )


async def dead(bench: Bench) -> None:
    three = [Backend(f"number {n}") for n in range(3)]
    count, good = bench.count(1000), 0
    async with AsyncExitStack() as stack:
        model = await bench.scene(stack, *three)
        three[0].crash()

        async def one() -> None:
            nonlocal good
            status, _ = await bench.ask(model)
            good += status == 200

        await at_once(count, 8, one)
        began = time.monotonic()
        await until(lambda: any(s["health_status"] == "unhealthy" for s in bench.gateway.admin("GET", "/servers").json()))
        noticed = time.monotonic() - began
        three[0].accept()
    bench.tell("one of three servers dead: success", f"{good} of {count}", "100 %", good == count)
    bench.tell("a refused server is noticed", f"{noticed:.2f} s after the requests", "≤ 1 s", noticed <= 1)


async def mistakes(bench: Bench) -> None:
    two = [Backend(f"number {n}", behaviours.answer(422, REFUSED, content_type="application/problem+json")) for n in range(2)]
    count, same = bench.count(1000), 0
    async with AsyncExitStack() as stack:
        model = await bench.scene(stack, *two)

        async def one() -> None:
            nonlocal same
            answer = await bench.ask(model)
            same += answer == (422, REFUSED)

        await at_once(count, 8, one)
        lost = sum(s["health_status"] != "healthy" for s in bench.gateway.admin("GET", "/servers").json())
    bench.tell(
        "client 4xx relayed byte for byte; servers lost by them", f"{same} of {count}; {lost}", "100 %; 0", same == count and not lost
    )


async def truncated(bench: Bench) -> None:
    count, raised = bench.count(300), 0
    async with AsyncExitStack() as stack:
        broken = Backend("broken", behaviours.cut_stream(3))
        model = await bench.scene(stack, broken, Backend("as bad", behaviours.cut_stream(3)))
        sdk = await stack.enter_async_context(openai.AsyncOpenAI(base_url=bench.gateway.base_url, api_key="any", max_retries=0))

        async def one() -> None:
            nonlocal raised
            try:
                async for _ in await sdk.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], stream=True):
                    pass
            except openai.APIError:
                raised += 1

        await at_once(count, 4, one)
    bench.tell("truncated streams that reach the SDK as an error", f"{raised} of {count}", "all", raised == count)


async def hits(bench: Bench) -> None:
    async with AsyncExitStack() as stack:
        four = [Backend(f"number {n}", behaviours.status(500)) for n in range(4)]
        model = await bench.scene(stack, *four)
        sdk = await stack.enter_async_context(openai.AsyncOpenAI(base_url=bench.gateway.base_url, api_key="any"))
        with suppress(openai.APIError):
            await sdk.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}])
        total = sum(backend.hits for backend in four)
    bench.tell("upstream hits for one failed SDK call", str(total), "≤ 3", total <= 3)


async def leaving(bench: Bench) -> None:
    for words, behave, stream in (
        ("before the first byte", behaviours.stall(), False),
        ("in mid-stream", behaviours.endless_stream(0.01), True),
    ):
        seconds: list[float] = []
        async with AsyncExitStack() as stack:
            backend = Backend("patient", behave)
            model = await bench.scene(stack, backend)
            for _ in range(bench.count(200)):
                before = backend.hits
                async with AsyncRawClient(bench.gateway.port) as client:
                    await client.request("POST", CHAT, json=body(model, stream=stream))
                    await until(lambda backend=backend, before=before: backend.hits > before)  # type: ignore[misc]
                    if stream:
                        await client.read_event()
                    left = time.monotonic()
                    client.abort()
                request = backend.last
                await until(lambda request=request: request.outcome is not Outcome.RUNNING)  # type: ignore[misc]
                assert request.ended_at is not None
                seconds.append(request.ended_at - left)
        p99 = 1000 * quantiles(seconds, n=100)[98]
        bench.tell(f"server freed after the client left {words}, p99", f"{p99:.1f} ms", "≤ 20 ms", p99 <= 20)


async def cancels(bench: Bench) -> None:
    count, chance = bench.count(2000), random.Random(5)
    async with AsyncExitStack() as stack:
        backends = [Backend(f"number {n}", behaviours.after(0.005, behaviours.good(interval=0.005))) for n in range(3)]
        model = await bench.scene(stack, *backends)
        await bench.ask(model)
        before = bench.gateway.open_sockets()

        async def one() -> None:
            async with AsyncRawClient(bench.gateway.port) as client:
                await client.request("POST", CHAT, json=body(model, stream=chance.random() < 0.5))
                try:
                    async with asyncio.timeout(chance.random() * 0.04):
                        await client.read_response()
                except (TimeoutError, EndedError):
                    client.abort()

        await at_once(count, 50, one)
        settled = await bench.settled()
        later = [await bench.ask(model) for _ in range(20)]
        for _ in range(100):
            left = bench.gateway.open_sockets() - before
            if left <= 64 * len(backends):
                break
            await asyncio.sleep(0.1)
        running = sum(backend.running for backend in backends)
    good = sum(status == 200 for status, _ in later)
    bench.tell(
        f"after {count} random cancels: slots or requests left; later requests served",
        f"{0 if settled else 'some'}, {running}; {good} of 20",
        "0; 20",
        settled and not running and good == 20,
    )


async def drift(bench: Bench) -> None:
    count = bench.count(4000)
    async with AsyncExitStack() as stack:
        model = await bench.scene(stack, Backend("one"), Backend("two"))

        async def one() -> None:
            await bench.ask(model, stream=True)

        await at_once(max(1000, count // 2), 16, one)
        before = bench.gateway.memory_bytes()
        await at_once(count, 16, one)
        grown = (bench.gateway.memory_bytes() - before) / 2**20
    bench.tell(f"memory drift over {count} streams", f"{grown:+.1f} MB", "≤ 2 MB", grown <= 2)


FIGURES = (resets, dead, mistakes, truncated, hits, leaving, cancels, drift)


async def measure(scale: float) -> int:
    print("| figure | measured | goal | met |\n| --- | --- | --- | --- |")
    missed: list[str] = []
    for figure in FIGURES:
        with GatewayProcess(SETTINGS) as gateway:
            bench = Bench(gateway, scale)
            await figure(bench)
            missed += bench.missed
    return 1 if missed else 0


FAULTS: tuple[Callable[[], behaviours.Behaviour], ...] = (
    behaviours.good,
    behaviours.good,
    behaviours.good,
    behaviours.reset_first,
    behaviours.eof_first,
    behaviours.garbage,
    behaviours.stall,
    behaviours.broken_json,
    behaviours.truncated_body,
    behaviours.cut_stream,
    behaviours.reset_stream,
    behaviours.stall_stream,
    behaviours.no_done,
    behaviours.html_page,
    behaviours.endless_continue,
    behaviours.big_header,
    lambda: behaviours.status(500),
    lambda: behaviours.status(503),
    lambda: behaviours.status(429, retry_after=1),
)


async def soak(minutes: float, seed: int) -> int:
    """Let faults of servers and clients rain, and count what is left when they stop."""
    chance = random.Random(seed)
    print(f"seed {seed}", flush=True)
    settings = {**SETTINGS, "HEALTH_CHECK_INTERVAL_SECONDS": "2", "HEALTH_CHECK_TIMEOUT_SECONDS": "1"}
    with GatewayProcess(settings) as gateway:
        bench = Bench(gateway, 1)
        async with AsyncExitStack() as stack:
            backends = [Backend(f"number {n}") for n in range(6)]
            model = await bench.scene(stack, *backends, max_concurrency=8)

            async def client_once() -> None:
                try:
                    async with AsyncRawClient(gateway.port, timeout=15) as client:
                        await client.request("POST", CHAT, json=body(model, stream=chance.random() < 0.6))
                        if chance.random() < 0.3:
                            await asyncio.sleep(chance.random() * 0.1)
                            client.abort()
                        else:
                            await client.read_response()
                except (OSError, EndedError, TimeoutError):
                    pass

            async def rain(until: float) -> None:
                while time.monotonic() < until:
                    backend = chance.choice(backends)
                    backend.behave = chance.choice(FAULTS)()
                    if chance.random() < 0.05:
                        backend.crash()
                        await asyncio.sleep(0.2)
                        backend.accept()
                    await asyncio.sleep(0.05)

            async def storm(seconds: float) -> None:
                until = time.monotonic() + seconds

                async def client() -> None:
                    while time.monotonic() < until:
                        await client_once()

                await asyncio.gather(rain(until), *(client() for _ in range(24)))

            async def rest() -> tuple[int, int, int]:
                for backend in backends:
                    backend.behave = behaviours.good()
                await asyncio.sleep(5)
                assert await bench.settled(), "a slot is left"
                await asyncio.sleep(32)  # kept connections to servers end after 30 s
                return gateway.memory_bytes(), gateway.open_sockets(), gateway.open_files()

            total = max(20.0, minutes * 60)
            await storm(total * 0.3)
            memory, sockets, files = await rest()
            await storm(total * 0.7)
            memory_after, sockets_after, files_after = await rest()
            served = [(await bench.ask(model))[0] for _ in range(20)]
            running = sum(backend.running for backend in backends)
        problems = {
            "requests not served afterwards": 20 - served.count(200),
            "requests still running on servers": running,
            "sockets": max(0, sockets_after - sockets - 6),
            "descriptors": max(0, files_after - files - 6),
            "megabytes": max(0, (memory_after - memory >> 20) - 8),
            "tracebacks in the log": gateway.log_text().count("Traceback"),
        }
    for what, left in problems.items():
        print(f"{what}: {left}", flush=True)
    return 1 if any(problems.values()) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "soak"), default="measure")
    parser.add_argument("--scale", type=float, default=1.0, help="how many requests, times the usual number")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long the soak lasts")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the soak's faults")
    given = parser.parse_args()
    return asyncio.run(soak(given.minutes, given.seed) if given.what == "soak" else measure(given.scale))


if __name__ == "__main__":
    sys.exit(main())
