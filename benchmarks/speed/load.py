"""Clients over HTTP/1.1, as one process that prints one line of JSON.

streams   so many streams at once, each begun again until the time is over
open      plain requests at a fixed rate: latency counts from when a request was due, so that waiting is not hidden
hold      so many streams, each read until its first event (`--stalled`: not at all), until standard input ends
"""

import argparse
import asyncio
import contextlib
import json
import re
import socket
import sys
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any, cast

STAMP = re.compile(rb"T(\d{15}) ")
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
STAMP_SIZE = 17
GRACE = 20.0


def percentile(values: list[int], part: float) -> float | None:
    """Return the value in microseconds below which the part of the values lies; they are nanoseconds."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * part))] / 1000, 1) if ordered else None


def request(given: argparse.Namespace, **fields: object) -> bytes:
    body = {"model": given.model, **fields, "messages": [{"role": "user", "content": "x" * 600}], "temperature": 0.7}
    data = json.dumps(body).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: 127.0.0.1:{given.port}",
        "Content-Type: application/json",
        *given.header,
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


class Seen:
    """What all clients saw: nanoseconds from request to first event, and from an event's stamp to its arrival."""

    def __init__(self) -> None:
        self.first: list[int] = []
        self.late: list[int] = []
        self.done = 0
        self.errors: dict[str, int] = {}

    def error(self, what: str) -> None:
        self.errors[what] = self.errors.get(what, 0) + 1


class Stream(asyncio.Protocol):
    """One connection that asks for a stream, and for the next one when that has ended."""

    def __init__(self, seen: Seen, request: bytes, stop_at: float) -> None:
        self.seen = seen
        self.request = request
        self.stop_at = stop_at
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.begin()

    def begin(self) -> None:
        self.rest = b""
        self.head = self.running = True
        self.ending = self.answered = False
        self.sent_at = time.monotonic_ns()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self.head:
            self.head = False
            if not data.startswith(b"HTTP/1.1 200"):
                self.fail(data[9:12].decode("latin-1"))
                return
        data = self.rest + data
        end = 0
        for match in STAMP.finditer(data):
            end = match.end()
            self.seen.late.append(now - int(match[1]))
        if end and not self.answered:
            self.answered = True
            self.seen.first.append(now - self.sent_at)
        self.ending = self.ending or b"[DONE]" in data
        if self.ending and data.endswith(b"0\r\n\r\n"):
            self.seen.done += 1
            self.running = False
            if time.monotonic() < self.stop_at:
                self.begin()
            else:
                self.transport.close()
            return
        self.rest = data[max(end, len(data) - STAMP_SIZE) :]

    def fail(self, what: str) -> None:
        self.seen.error(what)
        self.running = False
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.running:
            self.seen.error("cut off")
        if not self.over.done():
            self.over.set_result(None)


async def streams(given: argparse.Namespace) -> dict[str, object]:
    seen, loop = Seen(), asyncio.get_running_loop()
    began = time.monotonic()
    wanted, stop_at = request(given, stream=True), began + given.seconds

    async def one(number: int) -> None:
        await asyncio.sleep(number / given.clients)  # spread over a second: not all at once
        while time.monotonic() < stop_at:
            errors = sum(seen.errors.values())
            try:
                _, stream = await loop.create_connection(lambda: Stream(seen, wanted, stop_at), "127.0.0.1", given.port)
                await stream.over
            except OSError as error:
                seen.error(type(error).__name__)
            if sum(seen.errors.values()) > errors:
                await asyncio.sleep(0.05)

    try:
        async with asyncio.timeout(given.seconds + GRACE):
            await asyncio.gather(*map(one, range(given.clients)))
    except TimeoutError:
        seen.error("hung")
    return {
        "done": len(seen.late),
        "streams": seen.done,
        "seconds": round(time.monotonic() - began, 3),
        "errors": sum(seen.errors.values()),
        "kinds": seen.errors,
        "first_p50_us": percentile(seen.first, 0.5),
        "first_p99_us": percentile(seen.first, 0.99),
        "chunk_p50_us": percentile(seen.late, 0.5),
        "chunk_p99_us": percentile(seen.late, 0.99),
    }


class Plain(asyncio.Protocol):
    """One kept connection for plain requests."""

    def __init__(self, clients: "Clients") -> None:
        self.clients = clients
        self.due: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, due: int) -> None:
        self.due = due
        self.buffer = b""
        self.transport.write(self.clients.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        length = LENGTH.search(self.buffer, 0, head)
        whole = self.buffer.endswith(b"0\r\n\r\n") if length is None else len(self.buffer) >= head + 4 + int(length[1])
        if whole and self.due is not None:
            self.clients.late.append(time.monotonic_ns() - self.due)
            self.clients.errors += not self.buffer.startswith(b"HTTP/1.1 200")
            self.due = None
            self.clients.free(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.clients.errors += self.due is not None


class Clients:
    """Kept connections, and requests that are due while none is free."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.late: list[int] = []
        self.errors = 0
        self.idle: deque[Plain] = deque()
        self.waiting: deque[int] = deque()
        self.news = asyncio.Event()

    def ask(self, due: int) -> None:
        if self.idle:
            self.idle.popleft().ask(due)
        else:
            self.waiting.append(due)

    async def all(self, count: int) -> None:
        """Wait for so many answers."""
        while len(self.late) < count:
            self.news.clear()
            await self.news.wait()

    def free(self, connection: Plain) -> None:
        self.news.set()
        if self.waiting:
            connection.ask(self.waiting.popleft())
        else:
            self.idle.append(connection)


async def open_loop(given: argparse.Namespace) -> dict[str, object]:
    clients, loop = Clients(request(given)), asyncio.get_running_loop()
    for _ in range(given.clients):
        _, connection = await loop.create_connection(lambda: Plain(clients), "127.0.0.1", given.port)
        clients.idle.append(connection)
    count, step = int(given.rate * given.seconds), int(1e9 / given.rate)
    due = time.monotonic_ns() + step
    for _ in range(count):
        await asyncio.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
        clients.ask(due)
        due += step
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(clients.all(count), GRACE)
    return {
        "done": len(clients.late),
        "errors": clients.errors + count - len(clients.late),
        "p50_us": percentile(clients.late, 0.5),
        "p99_us": percentile(clients.late, 0.99),
    }


class Held(asyncio.Protocol):
    """One stream that is held open."""

    def __init__(self, request: bytes, stalled: bool) -> None:
        self.request = request
        self.stalled = stalled
        self.began = asyncio.get_running_loop().create_future()
        self.head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)
        if self.stalled:
            self.transport.pause_reading()
            self.began.set_result(True)

    def data_received(self, data: bytes) -> None:
        self.head += data
        if not self.began.done() and STAMP.search(self.head):
            self.began.set_result(self.head.startswith(b"HTTP/1.1 200"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.began.done():
            self.began.set_result(False)


async def hold(given: argparse.Namespace) -> dict[str, object]:
    """Report on standard output when all streams are there; end when standard input does."""
    wanted, loop = request(given, stream=True), asyncio.get_running_loop()
    held: list[Held] = []
    for _ in range(given.clients):
        sock = socket.socket()
        sock.setblocking(False)
        if given.stalled:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(sock, ("127.0.0.1", given.port))
        _, stream = await loop.create_connection(lambda: Held(wanted, given.stalled), sock=sock)
        held.append(stream)
    began = await asyncio.wait_for(asyncio.gather(*(stream.began for stream in held)), GRACE)
    print("held", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    lost = sum(stream.transport.is_closing() for stream in held)
    return {"done": sum(began), "errors": given.clients - sum(began) + lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["streams", "open", "hold"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--stalled", action="store_true")
    given = parser.parse_args()
    work: Coroutine[Any, Any, dict[str, object]] = {"streams": streams, "open": open_loop, "hold": hold}[given.what](given)
    try:
        import uvloop
    except ImportError:
        result = asyncio.run(work)
    else:
        result = uvloop.run(work)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
