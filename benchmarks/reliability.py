"""Measure how the gateway stands faults, or let random faults rain on it until something leaks.

    python benchmarks/reliability.py                  # the figures of docs/explanation/reliability.md, in about five minutes
    python benchmarks/reliability.py --only drift     # one of them
    python benchmarks/reliability.py --scale 10       # ten times as many requests
    python benchmarks/reliability.py soak --minutes 30

The gateway runs as users run it, in a process of its own; the model servers are those of the tests, on loopback. Exit code 1: a goal
was missed, or something leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import resource
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from statistics import quantiles

import httpx2
import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import behaviours
from support.backends import Backend, Outcome
from support.h2_client import H2Client
from support.processes import GatewayProcess
from support.raw_client import AsyncRawClient, EndedError, RawClient
from support.sockets import free_port, until

ROOT = Path(__file__).resolve().parents[1]
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

    async def register_model(self, stack: AsyncExitStack, *backends: Backend, **fields: object) -> str:
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

    def state(self, backend: Backend) -> str:
        """Return the state of the server that was registered for a backend."""
        records = self.gateway.admin("GET", "/servers").json()
        return str(next(record["state"] for record in records if record["endpoint_url"] == backend.url))

    async def tasks(self) -> int:
        """Return the tasks of the gateway's event loop, its answer to this question included."""
        text = (await asyncio.to_thread(self.gateway.call, "GET", "/metrics")).text
        return int(float(next(line.split()[-1] for line in text.splitlines() if line.startswith("multiverse_tasks "))))

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
    for clients in (4, 16):
        flaky = [Backend(f"flaky {n}", behaviours.randomly(0.3, behaviours.reset_first(), seed=n)) for n in range(3)]
        good, count = 0, bench.count(1000)
        async with AsyncExitStack() as stack:
            model = await bench.register_model(stack, *flaky)

            async def one(model: str = model) -> None:
                nonlocal good
                status, _ = await bench.ask(model)
                good += status == 200

            await at_once(count, clients, one)
        bench.tell(
            f"success with 30 % resets before the first byte, 3 servers, {clients} clients at once",
            f"{good / count:.1%} of {count}",
            "≥ 98.5 %",
            good >= 0.985 * count,
        )


async def dead(bench: Bench) -> None:
    three = [Backend(f"number {n}") for n in range(3)]
    count, good = bench.count(1000), 0
    async with AsyncExitStack() as stack:
        model = await bench.register_model(stack, *three)
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
        model = await bench.register_model(stack, *two)

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
        model = await bench.register_model(stack, broken, Backend("as bad", behaviours.cut_stream(3)))
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
        model = await bench.register_model(stack, *four)
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
            model = await bench.register_model(stack, backend)
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
    count, rng = bench.count(2000), random.Random(5)
    async with AsyncExitStack() as stack:
        backends = [Backend(f"number {n}", behaviours.after(0.005, behaviours.good(interval=0.005))) for n in range(3)]
        model = await bench.register_model(stack, *backends)
        await bench.ask(model)
        before, tasks_before = bench.gateway.open_sockets(), await bench.tasks()

        async def one() -> None:
            async with AsyncRawClient(bench.gateway.port) as client:
                await client.request("POST", CHAT, json=body(model, stream=rng.random() < 0.5))
                try:
                    async with asyncio.timeout(rng.random() * 0.04):
                        await client.read_response()
                except (TimeoutError, EndedError):
                    client.abort()

        await at_once(count, 50, one)
        settled = await bench.settled()
        later = [await bench.ask(model) for _ in range(20)]
        running = sum(backend.running for backend in backends)
        with suppress(AssertionError):
            await until(lambda: bench.gateway.open_sockets() <= before, within=35)  # kept connections to servers end after 30 s
        left = max(0, bench.gateway.open_sockets() - before)
        tasks = max(0, await bench.tasks() - tasks_before)
    good = sum(status == 200 for status, _ in later)
    bench.tell(
        f"after {count} random cancels: slots, requests at servers, sockets, tasks left; later requests served",
        f"{0 if settled else 'some'}, {running}, {left}, {tasks}; {good} of 20",
        "0, 0, 0, 0; 20",
        settled and not running and not left and not tasks and good == 20,
    )


async def drift(bench: Bench) -> None:
    count = bench.count(4000)
    async with AsyncExitStack() as stack:
        model = await bench.register_model(stack, Backend("one"), Backend("two"))

        async def one() -> None:
            await bench.ask(model, stream=True)

        await at_once(max(1000, count // 2), 16, one)
        before = bench.gateway.memory_bytes()
        await at_once(count, 16, one)
        grown = (bench.gateway.memory_bytes() - before) / 2**20
    bench.tell(f"memory drift over {count} streams", f"{grown:+.1f} MB", "≤ 2 MB", grown <= 2)


async def hung(bench: Bench) -> None:
    """A server that accepts and never answers, right after a good probe: without traffic, and with it."""
    first_byte = float(SETTINGS["FIRST_BYTE_TIMEOUT_SECONDS"])
    async with AsyncExitStack() as stack:
        idle, busy, other = Backend("idle"), Backend("busy"), Backend("other")
        await bench.register_model(stack, idle)
        model = await bench.register_model(stack, busy, other)
        began = time.monotonic()
        for backend in (idle, busy):
            backend.behave = backend.behave_models = behaviours.stall()
        answers = await asyncio.gather(*(bench.ask(model) for _ in range(8)))
        await until(lambda: bench.state(busy) == "unhealthy", within=30)
        under_traffic = time.monotonic() - began
        await until(lambda: bench.state(idle) == "unhealthy", within=90)
        without = time.monotonic() - began
    bench.tell("a hung server is noticed without traffic", f"{without:.0f} s", "≤ 60 s", without <= 61)
    bench.tell(
        f"a hung server is noticed under traffic, first-byte timeout {first_byte:g} s; requests answered meanwhile",
        f"{under_traffic:.2f} s; {[status for status, _ in answers].count(200)} of {len(answers)}",
        "the timeout; all",
        under_traffic <= first_byte + 1 and all(status == 200 for status, _ in answers),
    )


async def broken_storage(bench: Bench) -> None:
    """A database that is locked, then a disk on which nothing can be written, log included; and no Redis for the limits."""
    count, good = bench.count(500), 0
    settings = {
        **SETTINGS,
        "LOG_FILE": "gateway.log",
        "RATE_LIMIT_STORAGE": f"redis://127.0.0.1:{free_port()}",
        "RATE_LIMIT_PER_MINUTE": "900000",
    }
    with GatewayProcess(settings) as gateway:
        own = Bench(gateway, bench.scale)
        async with AsyncExitStack() as stack:
            model = await own.register_model(stack, Backend("one"), Backend("two"))

            async def one() -> None:
                nonlocal good
                status, _ = await own.ask(model)
                good += status == 200

            lock = sqlite3.connect(gateway.database, isolation_level=None)
            lock.execute("begin exclusive")
            await at_once(count, 8, one)
            lock.execute("rollback")
            lock.close()
            resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            await at_once(count, 8, one)
            resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    bench.tell("inference while database, disk, log or Redis is broken", f"{good} of {2 * count}", "100 %", good == 2 * count)


WRITER = """
import sys, anyio
from pathlib import Path
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.stores.sqlite import SqliteStore

async def main():
    store, number = SqliteStore(Path(sys.argv[1])), int(sys.argv[2])
    await store.open()
    print("open", flush=True)
    while True:
        name = f"s{number}"
        server = Server(id=ServerId(name), model_name=name, endpoint_url="http://x", registered_at=0, created_at=0, updated_at=0)
        await store.save_server(server)
        print("saved", name, flush=True)
        if number % 2:
            await store.remove_server(ServerId(name))
            print("removed", name, flush=True)
        number += 1

anyio.run(main)
"""


def killed_writer(database: Path, number: int, seconds: float) -> list[list[str]]:
    """Run the writer for a moment, kill it, and return what it said was done."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(database), str(number)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n", "the database could not be opened after a kill"
        time.sleep(seconds)
        writer.kill()
        return [line.split() for line in writer.stdout if line.endswith("\n")]


async def kills(bench: Bench) -> None:
    """Processes that write without pause are killed; whatever they said was done is done."""
    cycles, lost, acknowledged, rng = bench.count(100), 0, 0, random.Random(9)
    with tempfile.TemporaryDirectory() as folder:
        database, number = Path(folder, "registry.db"), 0
        expected: dict[str, str] = {}
        for _ in range(cycles):
            said = await asyncio.to_thread(killed_writer, database, number, rng.random() * 0.1)
            acknowledged += len(said)
            expected |= {name: word for word, name in said}
            last = said[-1] if said else None
            with contextlib.closing(sqlite3.connect(database)) as reader:
                present = {name for (name,) in reader.execute("select id from servers where removed_at is null")}
                number = reader.execute("select count(*) from servers").fetchone()[0]
            for name, word in list(expected.items()):
                in_flight = last is not None and name == last[1] and word == "saved"  # its removal may have been on its way
                lost += (name in present) != (word == "saved") and not in_flight
                if in_flight:
                    expected[name] = "saved" if name in present else "removed"
    bench.tell(
        f"acknowledged changes lost over {cycles} kill -9 of a writing process",
        f"{lost} of {acknowledged}",
        "0",
        not lost and acknowledged > 0,
    )


async def restarts(bench: Bench) -> None:
    """The whole gateway is killed while servers are registered through its API, and started again."""
    lost, done, slowest, cycles = 0, 0, 0.0, max(5, int(10 * bench.scale))
    backend = Backend("one")
    async with backend:
        gateway = bench.gateway
        known: set[str] = set()
        for cycle in range(cycles):

            def register(cycle: int = cycle) -> None:
                with suppress(httpx2.HTTPError):
                    for number in range(1000):
                        known.add(gateway.register(f"m-{cycle}-{number}", backend.url))

            running = asyncio.ensure_future(asyncio.to_thread(register))
            await asyncio.sleep(0.5)
            gateway.kill()
            await running
            await asyncio.to_thread(gateway.start)
            slowest = max(slowest, gateway.started_in)
            listed = {record["registration_id"] for record in (await asyncio.to_thread(gateway.admin, "GET", "/servers")).json()}
            lost += len(known - listed)
            done = len(known)
    bench.tell(
        f"registrations lost over {cycles} kill -9 of the gateway; slowest start after it",
        f"{lost} of {done}; {slowest:.1f} s",
        "0; ≤ 5 s",
        not lost and done > 0 and slowest <= 5,
    )


async def addresses(bench: Bench) -> None:
    """The tests that try every payload at every door, with listeners that count connections."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/faults/test_addresses.py"]
    done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "nothing was run"
    bench.tell(
        "private addresses reached, by literals, names, mixed answers, rebinding, redirects", f"0 ({summary})", "0", done.returncode == 0
    )


UPLOADED = 2_000_000
ANSWER_BYTES = 6 << 20
MAX_HELD_BYTES = 256 << 20
"""The default of `ANSWER_BUDGET_BYTES`."""
HOSTILE = {"CR CR": b"\r\r", "LF LF": b"\n\n", "comments": b": x\n\n", "empty objects": b"data:{}\n\n"}

HOSTILE_SERVER = """
import socket, sys, threading

block = bytes.fromhex(sys.argv[1]) * 10_000
listening = socket.create_server(("127.0.0.1", int(sys.argv[2])), backlog=64)
models = b'{"object":"list","data":[{"id":"%s","object":"model"}]}' % sys.argv[3].encode()

def serve(connection):
    with connection:
        try:
            request = b""
            while b"\\r\\n\\r\\n" not in request:
                request += connection.recv(65536)
            if request.startswith(b"GET"):
                connection.sendall(b"HTTP/1.1 200 OK\\r\\nconnection: close\\r\\ncontent-type: application/json\\r\\n\\r\\n" + models)
                return
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nconnection: close\\r\\ncontent-type: text/event-stream\\r\\n\\r\\n")
            while True:
                connection.sendall(block)
        except OSError:
            pass

while True:
    threading.Thread(target=serve, args=listening.accept()[:1], daemon=True).start()
"""
"""Sends the same bytes for ever, as fast as they are taken, in a process of its own."""


def leave_on_http2(port: int, path: str, streams: int, *, resets: bool) -> None:
    """Ask for something on many streams and leave them: each by itself, or all with their connection."""
    with H2Client(port) as client:
        asked = [client.ask("GET", path) for _ in range(streams)]
        client.status(asked[0])
        if resets:
            for stream in asked:
                client.reset(stream)
            client.status(client.ask("GET", "/livez"))


async def quiet_tasks(bench: Bench, most: int) -> int:
    """Return the tasks once there are no more than `most`, or after a while."""
    for _ in range(100):
        found = await bench.tasks()
        if found <= most:
            break
        await asyncio.sleep(0.05)
    return found


async def leaves_nothing(bench: Bench, what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Report the tasks and the memory that the gateway still holds after `work`, for which it was warmed up before."""
    tasks, before = await bench.tasks(), bench.gateway.memory_bytes()
    await work()
    left = await quiet_tasks(bench, tasks) - tasks
    grown = (bench.gateway.memory_bytes() - before) / 2**20
    bench.tell(f"after {what}: tasks, memory", f"{max(0, left)}, {grown:+.1f} MB", "0, ≤ 5 MB", left <= 0 and grown <= 5)


async def left_on_http2(bench: Bench) -> None:
    count, streams, turn = bench.count(10_000), 90, itertools.count()
    path = "/static/x/vendor/swagger-ui-bundle.js"

    async def one() -> None:
        await asyncio.to_thread(leave_on_http2, bench.gateway.port, path, streams, resets=next(turn) % 2 == 0)

    rounds = -(-count // streams)
    await at_once(rounds, 4, one)  # what is needed at once differs, and Python keeps the most that it ever needed
    await leaves_nothing(bench, f"{count} requests on HTTP/2 that were left", lambda: at_once(rounds, 4, one))


async def refused_uploads(bench: Bench) -> None:
    count = bench.count(1000)
    data = b"\0" * UPLOADED

    async def one() -> None:
        with suppress(OSError, EndedError, TimeoutError):
            async with AsyncRawClient(bench.gateway.port, timeout=20) as client:
                await client.fetch("POST", "/admin/register", body=data)

    await at_once(count // 2, 8, one)
    await leaves_nothing(bench, f"{count} refused uploads of {UPLOADED / 1e6:g} MB", lambda: at_once(count, 8, one))


async def held_answers(bench: Bench) -> None:
    """Whole answers that no client reads: they are held, or refused when there are too many, and others are served meanwhile."""
    count = bench.count(300)
    answer = b'{"object":"chat.completion","choices":[{"index":0,"message":{"content":"' + b"x" * ANSWER_BYTES + b'"}}]}'
    async with AsyncExitStack() as stack:
        model = await bench.register_model(stack, Backend("large", behaviours.answer(200, answer)))
        other = await bench.register_model(stack, Backend("other"))
        await bench.ask(other)
        before = bench.gateway.memory_bytes()
        clients = [stack.enter_context(RawClient(bench.gateway.port, receive_buffer=4096, timeout=60)) for _ in range(count)]
        for client in clients:
            client.request("POST", CHAT, json=body(model))
        heads = [await asyncio.to_thread(client.read_head) for client in clients]
        refused = [head.status for head in heads].count(503)
        held = bench.gateway.memory_bytes() - before
        served = [(await bench.ask(other))[0] for _ in range(20)].count(200)
    bench.tell(
        f"{count} answers of {ANSWER_BYTES >> 20} MiB that no client reads: memory; other requests served",
        f"{held / 2**20:.0f} MB ({refused} refused); {served} of 20",
        f"≤ {1.5 * MAX_HELD_BYTES / 2**20:.0f} MB; 20",
        held <= 1.5 * MAX_HELD_BYTES and served == 20,
    )


async def hostile_streams(bench: Bench) -> None:
    """Eight streams that bring nothing but work; the servers that send them and the clients that take them are other processes."""
    for words, piece in HOSTILE.items():
        port, seconds = free_port(), []
        async with AsyncExitStack() as stack:
            bench.number += 1
            hostile = f"hostile-{bench.number}"
            command = [sys.executable, "-c", HOSTILE_SERVER, piece.hex(), str(port), hostile]
            server = await asyncio.create_subprocess_exec(*command)
            stack.callback(server.kill)
            await until(lambda port=port: is_listening(port))  # type: ignore[misc]
            await asyncio.to_thread(bench.gateway.register, hostile, f"http://127.0.0.1:{port}")
            model = await bench.register_model(stack, Backend("good"))
            url, data = f"{bench.gateway.url}{CHAT}", json.dumps(body(hostile, stream=True))
            for _ in range(8):
                curl = await asyncio.create_subprocess_exec(
                    "curl", "-sN", "-o", "/dev/null", "-H", "content-type: application/json", "-d", data, url, stdout=subprocess.DEVNULL
                )
                stack.callback(kill, curl)
            await asyncio.sleep(0.5)
            for _ in range(bench.count(200)):
                began = time.monotonic()
                status, _ = await bench.ask(model)
                seconds.append(time.monotonic() - began)
                assert status == 200
        p99 = 1000 * quantiles(seconds, n=100)[98]
        bench.tell(f"others' requests beside 8 streams of {words}, p99", f"{p99:.1f} ms", "≤ 50 ms", p99 <= 50)


def kill(process: asyncio.subprocess.Process) -> None:
    """End a process, if it has not ended by itself."""
    with suppress(ProcessLookupError):
        process.kill()


def is_listening(port: int) -> bool:
    """Return whether somebody listens."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


FIGURES = (
    resets,
    dead,
    mistakes,
    truncated,
    hits,
    leaving,
    cancels,
    hung,
    broken_storage,
    kills,
    restarts,
    addresses,
    drift,
    left_on_http2,
    refused_uploads,
    held_answers,
    hostile_streams,
)


async def measure(scale: float, only: Sequence[str]) -> int:
    print("| figure | measured | goal | met |\n| --- | --- | --- | --- |")
    missed: list[str] = []
    for figure in FIGURES:
        if only and figure.__name__ not in only:
            continue
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
    rng = random.Random(seed)
    print(f"seed {seed}", flush=True)
    settings = {**SETTINGS, "HEALTH_CHECK_INTERVAL_SECONDS": "2", "HEALTH_CHECK_TIMEOUT_SECONDS": "1"}
    with GatewayProcess(settings) as gateway:
        bench = Bench(gateway, 1)
        async with AsyncExitStack() as stack:
            backends = [Backend(f"number {n}") for n in range(6)]
            model = await bench.register_model(stack, *backends, max_concurrency=8)

            async def client_once() -> None:
                if rng.random() < 0.02:
                    with suppress(OSError, AssertionError):
                        await asyncio.to_thread(leave_on_http2, gateway.port, "/openapi.json", 20, resets=rng.random() < 0.5)
                    return
                if rng.random() < 0.02:
                    with suppress(OSError, EndedError, TimeoutError):
                        async with AsyncRawClient(gateway.port, timeout=15) as uploading:
                            await uploading.fetch("POST", "/admin/register", body=bytes(UPLOADED))
                    return
                try:
                    async with AsyncRawClient(gateway.port, timeout=15) as client:
                        await client.request("POST", CHAT, json=body(model, stream=rng.random() < 0.6))
                        if rng.random() < 0.3:
                            await asyncio.sleep(rng.random() * 0.1)
                            client.abort()
                        else:
                            await client.read_response()
                except (OSError, EndedError, TimeoutError):
                    pass

            async def rain(until: float) -> None:
                while time.monotonic() < until:
                    backend = rng.choice(backends)
                    backend.behave = rng.choice(FAULTS)()
                    if rng.random() < 0.05:
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

            async def rest() -> tuple[int, int, int, int]:
                for backend in backends:
                    backend.behave = behaviours.good()
                await asyncio.sleep(5)
                assert await bench.settled(), "a slot is left"
                await asyncio.sleep(32)  # kept connections to servers end after 30 s
                tasks = min([await bench.tasks() for _ in range(30)])  # some are of probes, which come and go
                return gateway.memory_bytes(), gateway.open_sockets(), gateway.open_files(), tasks

            total = max(20.0, minutes * 60)
            await storm(total * 0.3)
            memory, sockets, files, tasks = await rest()
            await storm(total * 0.7)
            memory_after, sockets_after, files_after, tasks_after = await rest()
            served = [(await bench.ask(model))[0] for _ in range(20)]
            running = sum(backend.running for backend in backends)
        problems = {
            "requests not served afterwards": 20 - served.count(200),
            "requests still running on servers": running,
            "sockets": max(0, sockets_after - sockets - 6),
            "descriptors": max(0, files_after - files - 6),
            "tasks": max(0, tasks_after - tasks),
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
    parser.add_argument(
        "--only", action="append", default=[], choices=[figure.__name__ for figure in FIGURES], help="measure this one; may be repeated"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long the soak lasts")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the soak's faults")
    given = parser.parse_args()
    return asyncio.run(soak(given.minutes, given.seed) if given.what == "soak" else measure(given.scale, given.only))


if __name__ == "__main__":
    sys.exit(main())
