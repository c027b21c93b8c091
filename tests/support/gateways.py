"""A gateway without sockets: memory store, a probe whose verdicts the test sets, and an application made of our own routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import attrs
import httpx2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from multiverse_gateway.accounts import owner_digest
from multiverse_gateway.api.admin import admin_routes
from multiverse_gateway.api.endpoints import owned
from multiverse_gateway.api.keys_and_usage import account_routes
from multiverse_gateway.api.model_list import model_routes
from multiverse_gateway.api.status import operations_routes
from multiverse_gateway.balancers.round_robin import create as round_robin
from multiverse_gateway.core.servers import Server
from multiverse_gateway.entry.access import AccessRules
from multiverse_gateway.entry.identity import digests
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.observability.tail import RecentLogs
from multiverse_gateway.protocols import Client, HealthProbe, ProbeResult, Store
from multiverse_gateway.relay.dialer import Resolver
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.memory import MemoryStore
from multiverse_gateway.web.error_middleware import EXCEPTION_HANDLERS, Errors
from multiverse_gateway.web.middleware import AccessMiddleware

ADMIN_KEY = "an-admin-key-for-tests"
BODY: dict[str, Any] = {"model_name": "tiny", "endpoint_url": "http://gpu.example:8000"}


@attrs.define(eq=False)
class Verdicts:
    """A probe that says what the test wants: `failing` and `unauthorized` by URL, everything else passes."""

    wall: Callable[[], float]
    failing: dict[str, str] = attrs.field(factory=dict)
    unauthorized: set[str] = attrs.field(factory=set)
    warnings: dict[str, str] = attrs.field(factory=dict)
    owned_by: str | None = "vllm"
    """What the list of models says about who serves them."""
    checked: list[Server] = attrs.field(factory=list)
    waiting_for: int = 0
    """How many probes must have begun before any of them ends."""
    arrived: anyio.Event = attrs.field(factory=anyio.Event)
    """Set when a probe begins."""
    gate: anyio.Event | None = None
    """What every probe waits for before it ends, if there is one."""
    _begun: anyio.Event = attrs.field(factory=anyio.Event)

    async def check(self, server: Server, http: Client) -> ProbeResult:
        """Return the verdict on the server's URL."""
        self.checked.append(server)
        if len(self.checked) >= self.waiting_for:
            self._begun.set()
        self.arrived.set()
        await self._begun.wait()
        if self.gate is not None:
            await self.gate.wait()
        url = server.endpoint_url
        denied = url in self.unauthorized
        reason = "the server rejects the stored key" if denied else self.failing.get(url)
        return ProbeResult(
            server_id=server.id,
            generation=server.generation,
            passed=reason is None,
            checked_at=self.wall(),
            duration=0.25,
            reason=reason,
            warning=self.warnings.get(url) if reason is None else None,
            unauthorized=denied,
            models=("tiny",) if reason is None else (),
            let_in=reason is None,
            owned_by=self.owned_by,
        )


@attrs.define(eq=False)
class Clock:
    """Both clocks of a gateway; time passes when the test says so."""

    monotonic: float = 1000.0
    wall: float = 1_780_000_000.0

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.monotonic += seconds
        self.wall += seconds


@attrs.define(eq=False)
class Stage:
    """A running gateway and a client that speaks to its application."""

    gateway: Gateway
    probe: Verdicts
    clock: Clock
    client: httpx2.AsyncClient
    app: Starlette
    logs: RecentLogs

    async def register(self, **fields: Any) -> dict[str, Any]:
        """Register a server and return its record."""
        response = await self.client.post("/admin/register", json={**BODY, **fields})
        assert response.status_code in (200, 201), response.text
        record = response.json()
        assert isinstance(record, dict)
        return record


def access_rules_of(gateway: Gateway) -> AccessRules:
    """Make the access rules of a gateway, to which nobody is signed in."""
    return AccessRules.of(
        gateway.settings,
        stored_keys=lambda: gateway.registrations.keys,
        wall=gateway.wall,
        now=gateway.now,
        day_counts=gateway.usage_book.day_counts,
    )


def application(gateway: Gateway, *, extra: list[BaseRoute] | None = None, recent_logs: RecentLogs | None = None) -> Starlette:
    """Make an application of everything but inference."""
    rules = access_rules_of(gateway)
    admin = [*admin_routes(gateway, rules, recent_logs or RecentLogs()), *account_routes(gateway)]
    middleware = [
        Middleware(Errors),
        Middleware(
            AccessMiddleware,
            rules=rules,
            owner_digest=lambda scope: owner_digest(gateway, owned(admin, scope)),
            admin_digests=lambda: digests([gateway.settings.admin_api_key or ""]),
        ),
    ]
    routes = [*(extra or []), *model_routes(gateway), *admin, *operations_routes(gateway)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=EXCEPTION_HANDLERS)


async def _nowhere(host: str, port: int) -> list[str]:
    """Find no address of any name."""
    raise OSError


@asynccontextmanager
async def stage(
    *,
    store: Store | None = None,
    extra: list[BaseRoute] | None = None,
    probe: HealthProbe | None = None,
    resolve: Resolver | None = None,
    **settings: Any,
) -> AsyncIterator[Stage]:
    """Run a gateway without its monitor; it never dials unless it gets another `probe` than the verdicts of the test."""
    clock = Clock()
    verdicts = Verdicts(wall=lambda: clock.wall)
    given = Settings(**{"admin_api_key": ADMIN_KEY, "rate_limit_per_minute": 0, **settings})
    gateway = Gateway(
        given,
        store=store or MemoryStore(wall=lambda: clock.wall),
        balancer=round_robin(given),
        probe=probe or verdicts,
        resolve=resolve or _nowhere,
        now=lambda: clock.monotonic,
        wall=lambda: clock.wall,
        random=lambda: 0.5,
    )
    logs = RecentLogs()
    app = application(gateway, extra=extra, recent_logs=logs)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    headers = {"x-api-key": ADMIN_KEY}
    async with gateway.running(), httpx2.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
        yield Stage(gateway, verdicts, clock, client, app, logs)
