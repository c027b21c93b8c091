"""The composition root: `create_app` builds a gateway and everything around it, wires them and starts nothing."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import anyio.to_thread
import attrs
import httpx2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from multiverse_gateway import plugins
from multiverse_gateway.accounts import owner_digest
from multiverse_gateway.admin_key import AdminKeys
from multiverse_gateway.api.admin import admin_routes
from multiverse_gateway.api.alias_routes import alias_routes
from multiverse_gateway.api.endpoints import owned
from multiverse_gateway.api.host_routes import host_routes
from multiverse_gateway.api.keys_and_usage import account_routes
from multiverse_gateway.api.model_list import model_routes
from multiverse_gateway.api.openapi import openapi_routes
from multiverse_gateway.api.queue import waiting_routes
from multiverse_gateway.api.screens import wall_link_routes
from multiverse_gateway.api.status import operations_routes
from multiverse_gateway.api.stored_responses import stored_routes
from multiverse_gateway.core.engine_offers import ENGINES, LocalEngine
from multiverse_gateway.core.paths import CALLS
from multiverse_gateway.entry.access import AccessRules
from multiverse_gateway.entry.intake import Intake
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.local_engines import LocalEngines
from multiverse_gateway.monitor import watch
from multiverse_gateway.observability import telemetry
from multiverse_gateway.observability.logging import configure
from multiverse_gateway.observability.tail import RecentLogs
from multiverse_gateway.pages.routes import Pages
from multiverse_gateway.pages.sessions import Sessions
from multiverse_gateway.protocols import Balancer, HealthProbe, RegistryStore
from multiverse_gateway.relay.dialer import Resolver
from multiverse_gateway.settings import Settings
from multiverse_gateway.web.error_middleware import EXCEPTION_HANDLERS, Errors
from multiverse_gateway.web.inference import Inference
from multiverse_gateway.web.middleware import AccessMiddleware, Cors
from multiverse_gateway.web.path_middleware import Paths, ollama_routes

TELEMETRY_SECONDS = 3.0
"""How long the last spans may take on their way out."""


@attrs.frozen
class Assembly:
    """The parts of a gateway, wired: the application, and what the one who serves it needs beside it."""

    app: Starlette
    gateway: Gateway
    intake: Intake
    sessions: Sessions
    admin_keys: AdminKeys
    recent_logs: RecentLogs


def create_app(
    settings: Settings | None = None,
    *,
    store: RegistryStore | None = None,
    balancer: Balancer | None = None,
    probe: HealthProbe | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
    resolve: Resolver | None = None,
    now: Callable[[], float] | None = None,
) -> Starlette:
    """Return a gateway as an ASGI application; instances given here win over names in `settings`.

    Nothing is opened before its lifespan is entered; the gateway is `app.state.gateway`. A parent application that mounts it enters
    `lifespan(app)` in its own.
    """
    parts = assemble(settings, store=store, balancer=balancer, probe=probe, transport=transport, resolve=resolve, now=now)
    return parts.app


def assemble(
    settings: Settings | None = None,
    *,
    store: RegistryStore | None = None,
    balancer: Balancer | None = None,
    probe: HealthProbe | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
    resolve: Resolver | None = None,
    now: Callable[[], float] | None = None,
    engines: Sequence[LocalEngine] = ENGINES,
) -> Assembly:
    """Build and wire the parts of a gateway, as `create_app` says; `engines` are those to look for on this computer."""
    settings = settings or Settings()
    telemetry.check(settings)
    clock = {} if now is None else {"now": now}
    gateway = Gateway(
        settings,
        store=plugins.store(settings) if store is None else plugins.completed(store),
        balancer=balancer or plugins.balancer(settings),
        probe=probe or plugins.probe(settings),
        transport=transport,
        resolve=resolve,
        **clock,
    )
    sessions = Sessions(gateway)
    rules = AccessRules.of(
        settings, sessions.stands_for_key, lambda: gateway.registrations.keys, gateway.wall, gateway.now, gateway.usage_book.day_counts
    )
    admin_keys, recent_logs = AdminKeys(), RecentLogs()
    pages = None
    if settings.ui:
        local_engines = LocalEngines(gateway, plugins.models_probe(settings), engines)
        pages = Pages(
            gateway,
            sessions=sessions,
            rules=rules,
            admin_digests=admin_keys.digests,
            recent_logs=recent_logs,
            local_engines=local_engines,
        )

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        logs = configure(settings, outputs=False)
        recent_logs.follow(logs.tail)
        gateway.usage_book.observe, stop_telemetry = telemetry.start(settings)
        try:
            async with gateway.running(watch):
                await admin_keys.load(settings, gateway.store)
                yield
        finally:
            await rules.limiter.aclose()
            with anyio.move_on_after(TELEMETRY_SECONDS, shield=True):
                await anyio.to_thread.run_sync(stop_telemetry, abandon_on_cancel=True)
            logs.close()

    intake = Intake(gateway, rules)
    inference = Inference(intake)
    admin = [
        *admin_routes(gateway, rules, recent_logs),
        *account_routes(gateway),
        *alias_routes(gateway),
        *host_routes(gateway),
        *wall_link_routes(gateway),
    ]
    middleware = [
        Middleware(Paths, root=settings.root_path.rstrip("/")),
        Middleware(Errors),
        *([Middleware(Cors, policy=rules.origins)] if settings.enable_cors else []),
        Middleware(
            AccessMiddleware,
            rules=rules,
            admin_digests=admin_keys.digests,
            inference=inference,
            signed_in=lambda scope: sessions.stands_for_key(scope["method"], scope["headers"]),
            owner_digest=lambda scope: owner_digest(gateway, owned(admin, scope)),
        ),
    ]
    app = Starlette(
        routes=[
            *model_routes(gateway),
            *waiting_routes(gateway),
            *stored_routes(),
            *[Route(path, endpoint=inference, methods=["POST"]) for path in sorted(CALLS)],  # for 405; `Security` takes every POST
            *admin,
            *operations_routes(gateway),
            *openapi_routes(),
            *ollama_routes(rules.trusted),
            *(pages.routes() if pages else []),
        ],
        middleware=middleware,
        exception_handlers=EXCEPTION_HANDLERS if pages is None else {**EXCEPTION_HANDLERS, HTTPException: pages.not_found},
        lifespan=running,
    )
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return Assembly(app, gateway, intake, sessions, admin_keys, recent_logs)


def lifespan(app: Starlette) -> AbstractAsyncContextManager[object]:
    """Return the running gateway of an application that is mounted in another one: enter it in the parent's lifespan."""
    return app.router.lifespan_context(app)
