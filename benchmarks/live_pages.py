"""What the live dashboard costs: the bytes of each viewer, and the gateway's processor time.

`python -m benchmarks.live_pages` runs a gateway in this process, with servers that had a common outage a few minutes ago, and viewers
that follow the dashboard with all its rows. The checks are real, except that the answers are made up. Each scenario is measured without
viewers as well; what the viewers cost is the difference.
"""

import argparse
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import anyio
import attrs

from multiverse_gateway import Settings, create_app, lifespan
from multiverse_gateway.core.health import Health, HealthState
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.protocols import Client, ProbeResult
from multiverse_gateway.stores.sqlite import SqliteStore

ADMIN_KEY = "the-admin-key-of-the-benchmark"
SCENARIOS = {"healthy after an outage": 0.0, "a tenth down": 0.1, "all down": 1.0}
"""The share of the servers that fail their checks."""


@attrs.define
class Planned:
    """A probe whose verdict is planned: the first `failing` servers fail."""

    failing: int

    async def check(self, server: Server, http: Client) -> ProbeResult:
        """Return the verdict at once."""
        passed = int(server.id[-12:]) >= self.failing
        return ProbeResult(
            server_id=server.id,
            generation=server.generation,
            passed=passed,
            checked_at=time.time(),
            duration=0.02 + time.time() % 0.01,
            reason=None if passed else "connection refused: is the server running?",
            models=(server.model_name,) if passed else (),
        )


async def furnish(path: Path, servers: int) -> None:
    """Write a registry of servers, each with 100 checks, which failed for five minutes a quarter of an hour ago."""
    store = SqliteStore(path)
    await store.open()
    wall = time.time()
    for number in range(servers):
        server = Server(
            id=ServerId(f"00000000-0000-4000-8000-{number:012d}"),
            model_name=f"model-{number % 61}:7b",
            endpoint_url=f"http://lab-{number}.campus.example:8000",
            registered_at=wall - 86_400 + number,
            created_at=wall - 86_400,
            updated_at=wall - 86_400,
        )
        await store.save_server(server)
        ages = range(100, 0, -1)
        results = [
            ProbeResult(
                server_id=server.id, generation=1, passed=not 15 <= age < 20, checked_at=wall - 60 * age - number % 60, duration=0.02
            )
            for age in ages
        ]
        health = Health(state=HealthState.HEALTHY, last_checked_at=results[-1].checked_at, last_transition_at=wall - 900)
        await store.save_health({server.id: health}, results)
    await store.aclose()


Message = MutableMapping[str, Any]


async def view(app: Callable[..., Awaitable[None]], query: str, sizes: list[int]) -> None:
    """Follow the dashboard until canceled, and add up the bytes of the body."""
    mine = len(sizes)
    sizes.append(0)
    headers = [(b"x-api-key", ADMIN_KEY.encode()), (b"host", b"gateway")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/live",
        "raw_path": b"/live",
        "query_string": query.encode(),
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1000 + mine),
        "server": ("127.0.0.1", 80),
        "extensions": {},
    }

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        sizes[mine] += len(message.get("body", b""))

    await app(scope, receive, send)


async def measure(path: Path, *, servers: int, viewers: int, down: float, seconds: float) -> tuple[float, float]:
    """Return the bytes per second of one viewer, and the share of a core that this process took."""
    settings = Settings(
        admin_api_key=ADMIN_KEY, database_url=f"sqlite:///{path.as_posix()}", allow_private_networks="true", log_level="WARNING"
    )

    async def resolve(host: str, port: int) -> list[str]:
        return ["192.0.2.7"]

    app = create_app(settings, probe=Planned(round(servers * down)), resolve=resolve)
    sizes: list[int] = []
    async with lifespan(app), anyio.create_task_group() as group:
        await anyio.sleep(min(20.0, seconds))  # until all servers were checked and failures are known
        for _ in range(viewers):
            group.start_soon(view, app, f"of={quote('dashboard?all=1')}", sizes)
        await anyio.sleep(3)  # the first events hold the whole page
        before, began, spent = list(sizes), time.monotonic(), time.process_time()
        await anyio.sleep(seconds)
        took, spent = time.monotonic() - began, time.process_time() - spent
        grown = [after - first for after, first in zip(sizes, before, strict=True)]
        group.cancel_scope.cancel()
    return (max(grown) / took if grown else 0.0), spent / took


async def run(servers: int, viewers: list[int], seconds: float) -> None:
    """Print a table of all scenarios."""
    print("| servers | viewers | bytes/s per viewer | core, all | core, viewers |\n|---|---|---|---|---|")
    for name, down in SCENARIOS.items():
        alone = 0.0
        for count in [0, *viewers]:
            with TemporaryDirectory() as directory:
                path = Path(directory, "registry.db")
                await furnish(path, servers)
                size, share = await measure(path, servers=servers, viewers=count, down=down, seconds=seconds)
            alone = share if count == 0 else alone
            print(f"| {servers}, {name} | {count} | {size:,.0f} | {share:.1%} | {share - alone:.1%} |", flush=True)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_pages", description=__doc__)
    parser.add_argument("--servers", type=int, default=200)
    parser.add_argument("--viewers", type=int, nargs="*", default=[1, 30])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    given = parser.parse_args()
    anyio.run(run, given.servers, given.viewers, given.seconds)


if __name__ == "__main__":
    main()
