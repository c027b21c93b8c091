"""A gateway as a class runs it: ten servers in every state of health, with a past, for pictures and for looking at pages.

Nothing leaves this machine: probes say what is planned, and the one server that is really asked listens on a loopback address.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import attrs
import hypercorn.asyncio
from hypercorn.config import Config
from starlette.applications import Starlette
from starlette.routing import Mount

from multiverse_gateway import Settings, create_app, lifespan
from multiverse_gateway.core.budget import day_name, day_of
from multiverse_gateway.core.health import Health, HealthState
from multiverse_gateway.core.servers import Capabilities, Metadata, Server, ServerId
from multiverse_gateway.core.usage import Counts, Usage, UsageKey
from multiverse_gateway.protocols import Client, ProbeResult
from multiverse_gateway.stores.sqlite import SqliteStore
from support import answers, behaviours
from support.backends import Backend
from support.processes import ADMIN_KEY
from support.sockets import LoopThread, free_port, wait_until

MINUTE = 60.0
CHECKS = 100
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
TALKERS = itertools.count(1)
"""The last part of the loopback address of the server that is really asked; the part before it is the worker's."""
ANSWER = """A **heat pump** moves heat instead of making it:

1. A liquid that boils at a low temperature takes heat from the air outside.
2. A compressor squeezes the vapor, which makes it hot.
3. Inside the house it gives its heat away and turns back into a liquid.

| outside | heat per unit of electricity |
|--:|--:|
| 7 °C | 4.1 |
| -7 °C | 2.8 |

```python
heat = electricity * 4.1  # kWh, on a mild day
```"""


@attrs.frozen(kw_only=True)
class Host:
    """One server of the class: what it is, where it stands, how its checks went.

    `usual` is the seconds that a check takes; `trouble` names the checks that failed, counted from the newest, 0; `reason` says why.
    """

    model: str
    url: str
    owner: str
    description: str | None = None
    state: HealthState = HealthState.HEALTHY
    usual: float = 0.04
    trouble: range = range(0)
    reason: str | None = None
    warning: str | None = None
    context: int | None = None
    most: int | None = None
    slots: int | None = None
    checks: int = CHECKS


CLASS: Sequence[Host] = (
    Host(
        model="llama3.2:3b",
        url="http://lab-3.campus.example:8080",
        owner="Ana Kovač",
        description="Workstation in room 204, RTX 4090",
        usual=0.018,
        context=131_072,
        most=4096,
        slots=8,
    ),
    Host(
        model="llama3.2:3b",
        url="https://amber-otter-71.ngrok-free.app",
        owner="Bela Molnár",
        description="My laptop, on in the evenings",
        usual=0.21,
        trouble=range(46, 60),
        reason="nothing is connected to the tunnel: is it open, and is its address still the same?",
        context=8192,
    ),
    Host(
        model="mistral-nemo:12b",
        url="http://gpu-club.campus.example:8000",
        owner="GPU club",
        description="Two RTX 3090 in the server room",
        usual=0.9,
        context=128_000,
        slots=4,
    ),
    Host(
        model="qwen2.5-coder:7b",
        url="http://lab-5.campus.example:11434",
        owner="Chidi Obi",
        state=HealthState.UNHEALTHY,
        trouble=range(2),
        reason="connection refused: is the server running?",
        usual=0.03,
        context=32_768,
    ),
    Host(
        model="qwen2.5-coder:7b",
        url="http://lab-6.campus.example:8000",
        owner="Fatima Zahra",
        state=HealthState.HALF_OPEN,
        trouble=range(1, 7),
        reason="no answer within 10 seconds",
        usual=0.05,
        context=32_768,
    ),
    Host(
        model="gemma-2:9b",
        url="https://blue-heron-plain.trycloudflare.com",
        owner="Dora Vuković",
        state=HealthState.MISCONFIGURED,
        trouble=range(4),
        reason="the server rejects the stored key",
        usual=0.14,
    ),
    Host(
        model="phi-4:14b",
        url="https://old-laptop.tail1234.ts.net",
        owner="Emil Larsson",
        state=HealthState.DEACTIVATED,
        trouble=range(35),
        reason="the host name cannot be resolved: is it spelled correctly?",
        usual=0.3,
    ),
    Host(
        model="nomic-embed-text:v1.5",
        url="http://lab-3.campus.example:8081",
        owner="Ana Kovač",
        warning="the server does not list this model; it lists nomic-embed-text",
        usual=0.012,
    ),
    Host(
        model="llama-3.3:70b-instruct",
        url="http://10.20.4.17:8000",
        owner="Guest lecture",
        state=HealthState.PROBING,
        checks=0,
    ),
    Host(
        model="deepseek-r1-distill:32b",
        url="https://quiet-fox-12.ngrok-free.app",
        owner="Hugo Weber",
        state=HealthState.ARCHIVED,
        trouble=range(100),
        reason="nothing is connected to the tunnel: is it open, and is its address still the same?",
    ),
)


@attrs.define(eq=False)
class Planned:
    """A probe that finds what is planned for a URL; what nobody planned passes, and some checks never end."""

    hosts: dict[str, Host]

    async def check(self, server: Server, http: Client) -> ProbeResult:
        """Return the next result."""
        host = self.hosts.get(server.endpoint_url)
        if host is not None and host.state in (HealthState.PROBING, HealthState.HALF_OPEN):
            await anyio.sleep_forever()
        bad = host is not None and host.state is not HealthState.HEALTHY
        return ProbeResult(
            server_id=server.id,
            generation=server.generation,
            passed=not bad,
            checked_at=time.time(),
            duration=host.usual if host else 0.02,
            reason=host.reason if host and bad else None,
            warning=host.warning if host and not bad else None,
            unauthorized=host is not None and host.state is HealthState.MISCONFIGURED,
            let_in=not bad,
            models=() if bad else (host.model,) if host else ("llama3.1:8b", "llama3.2:3b", "nomic-embed-text:v1.5"),
        )


def past(server: Server, host: Host, wall: float) -> list[ProbeResult]:
    """Return the checks of a server, newest first."""
    chance = random.Random(server.endpoint_url)
    results = []
    for number in range(host.checks):
        bad = number in host.trouble
        slow = 1.0 + chance.random() * 0.35 + (chance.random() > 0.93) * chance.random() * 3
        results.append(
            ProbeResult(
                server_id=server.id,
                generation=1,
                passed=not bad,
                checked_at=wall - 20 - number * MINUTE - chance.random() * 5,
                duration=0.002 if bad and "refused" in (host.reason or "") else host.usual * slow,
                reason=host.reason if bad else None,
                warning=host.warning if not bad else None,
            )
        )
    return results


async def furnish(path: Path, hosts: Sequence[Host]) -> None:
    """Write the registry and the past of the class."""
    store = SqliteStore(path)
    await store.open()
    wall = time.time()
    for number, host in enumerate(hosts):
        began = wall - (len(hosts) - number) * 26 * 60 * MINUTE / len(hosts)
        server = Server(
            id=ServerId(f"{random.Random(host.url).getrandbits(32):08x}-5d3c-4b1a-9e2f-{number:012d}"),
            model_name=host.model,
            endpoint_url=host.url,
            api_key="a-stored-key" if host.state is HealthState.MISCONFIGURED else None,
            capabilities=Capabilities(context_length=host.context, max_tokens=host.most),
            metadata=Metadata(student_id=host.owner, description=host.description),
            max_concurrency=host.slots,
            registered_at=began,
            created_at=began,
            updated_at=began,
        )
        await store.save_server(server)
        results = past(server, host, wall)
        moved = results[len(host.trouble) - 1].checked_at if host.trouble and 0 in host.trouble else began
        health = Health(
            state=host.state,
            consecutive_failures=len(host.trouble) if 0 in host.trouble else 0,
            reason=None if host.state is HealthState.HEALTHY else host.reason,
            warning=host.warning,
            last_checked_at=results[0].checked_at if results else None,
            last_passed_at=next((result.checked_at for result in results if result.passed), None),
            last_transition_at=moved,
        )
        await store.save_health({server.id: health}, results[::-1])
        await store.add_usage(server.id, usage_of(server, number, wall))
    await store.aclose()


def usage_of(server: Server, number: int, wall: float) -> list[Usage]:
    """Return what was asked of a server in the last month: by a script, without a key, and by somebody who stops often."""
    chance = random.Random(number)
    rows = []
    for day in range(30):
        for client in ("nightly", "", server.metadata.student_id or ""):
            requests = chance.randrange(1, 90)
            counts = Counts(
                requests=requests,
                failed=requests // 30,
                canceled=requests // 12,
                prompt_tokens=requests * 240,
                completion_tokens=requests * 110,
            )
            key = UsageKey(day_name(day_of(wall) - day), server.model_name, server.id, server.metadata.student_id or "", client)
            rows.append(Usage(key=key, counts=counts))
    return rows


def talk(text: str = ANSWER, interval: float = 0.03) -> behaviours.Behaviour:
    """Answer a chat with a text, word by word."""
    words = re.findall(r"\S+\s*", text)

    async def act(exchange: behaviours.Exchange) -> None:
        if not exchange.request.wants_stream:
            await behaviours.good(text=text)(exchange)
            return
        deltas: list[dict[str, Any]] = [{"role": "assistant"}, *({"content": word} for word in words)]
        events = [answers.chat_event("club", exchange.model, delta) for delta in deltas]
        events.append(answers.chat_event("club", exchange.model, {}, finish="stop"))
        usage = {"prompt_tokens": 24, "completion_tokens": len(words), "total_tokens": 24 + len(words)}
        events.append(answers.event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": usage}))
        await behaviours.send_events(exchange, [*events, answers.DONE], interval=interval)

    return act


class Classroom:
    """The gateway of the class, running in this process, mounted at `prefix`; `hosts` stand in it when it opens."""

    def __init__(self, hosts: Sequence[Host] = CLASS, *, prefix: str = "", **settings: Any) -> None:
        self.admin_key = ADMIN_KEY
        self.prefix = prefix
        self.port = free_port()
        self._hosts = hosts
        self._settings = settings
        self.talker = Backend("club", talk(), models=["mistral-nemo:12b"], host=f"127.77.{WORKER}.{next(TALKERS)}", port=8000)

    @property
    def url(self) -> str:
        """The root URL, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    def __enter__(self) -> Self:
        """Open the doors."""
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="classroom-"))
            path = Path(directory, "multiverse.db")
            thread = LoopThread()
            stack.callback(thread.stop)
            thread.call(furnish(path, self._hosts))
            stack.enter_context(self.talker)
            app = self._app(path)
            outer = Starlette(routes=[Mount(self.prefix, app)], lifespan=self._mounted(app)) if self.prefix else app
            config = Config()
            config.bind = [f"127.0.0.1:{self.port}"]
            config.graceful_timeout = 1.0
            ending = asyncio.Event()
            served = asyncio.run_coroutine_threadsafe(
                hypercorn.asyncio.serve(outer, config, shutdown_trigger=ending.wait),  # type: ignore[arg-type]
                thread.loop,
            )
            stack.callback(served.result, 20)
            stack.callback(thread.loop.call_soon_threadsafe, ending.set)
            wait_until(lambda: self._is_open(app, served), within=20)
            self._closing = stack.pop_all()
        return self

    def _mounted(self, app: Starlette) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
        @asynccontextmanager
        async def running(outer: Starlette) -> AsyncIterator[None]:
            async with lifespan(app):
                yield

        return running

    async def _resolve(self, host: str, port: int) -> list[str]:
        """Let every name lead to the server that answers."""
        return [self.talker.host]

    def _app(self, path: Path) -> Starlette:
        given: dict[str, Any] = {
            "admin_api_key": ADMIN_KEY,
            "database_url": f"sqlite:///{path.as_posix()}",
            "allow_private_networks": "true",
            "rate_limit_per_minute": 0,
            "health_check_interval_seconds": 300.0,
            "health_check_timeout_seconds": 120.0,
            "max_consecutive_failures": 50,
        }
        probe = Planned({host.url: host for host in self._hosts})
        return create_app(Settings(**{**given, **self._settings}), probe=probe, resolve=self._resolve)

    def _is_open(self, app: Starlette, served: Future[None]) -> bool:
        assert not served.done(), served.result()
        if not app.state.gateway.registrations.is_loaded:
            return False
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close them."""
        self._closing.close()
