"""The pages without a browser: an application, and a client that keeps cookies and sends forms as our own pages do."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from html import unescape
from typing import Any

import attrs
import httpx2
from starlette.applications import Starlette
from starlette.routing import Mount

from multiverse_gateway import Settings, lifespan
from multiverse_gateway.app import Assembly, assemble
from multiverse_gateway.core.engine_offers import LocalEngine
from multiverse_gateway.relay.dialer import Resolver
from multiverse_gateway.stores.memory import MemoryStore
from support.gateways import ADMIN_KEY, BODY, Clock, Verdicts


@attrs.define(eq=False)
class Browser:
    """A client with cookies that behaves as a browser does."""

    parts: Assembly
    client: httpx2.AsyncClient
    probe: Verdicts
    clock: Clock
    prefix: str = ""
    host: str = "gateway"
    _token: str = ""
    _form_token: str = ""

    async def open(self, path: str, **headers: str) -> httpx2.Response:
        """Get a page."""
        return await self.client.get(self.prefix + path, headers={"accept": "text/html", **_names(headers)})

    async def send(self, path: str, form: dict[str, str] | None = None, **headers: str) -> httpx2.Response:
        """Send a form as our own page does, with the session's token."""
        sent = {"csrf": self._token, **(form or {})}
        return await self.client.post(
            self.prefix + path, data=sent, headers={"origin": f"http://{self.host}", "accept": "text/html", **_names(headers)}
        )

    async def sign_in(self, key: str = ADMIN_KEY, **form: str) -> httpx2.Response:
        """Sign in by the form."""
        if not self._form_token:
            self._form_token = value_of(await self.open("/login"), "form_token")
        answer = await self.send("/login", {"form_token": self._form_token, "key": key, **form})
        if answer.status_code == 303:
            self._token = (await self.client.get(f"{self.prefix}/session")).json()["token"]
        return answer

    async def register(self, **fields: Any) -> str:
        """Register a server by the API and return its id."""
        answer = await self.client.post(f"{self.prefix}/admin/register", json={**BODY, **fields}, headers={"x-api-key": ADMIN_KEY})
        assert answer.status_code in (200, 201), answer.text
        return str(answer.json()["id"])


def _names(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def value_of(page: httpx2.Response, name: str) -> str:
    """Return what a hidden field holds."""
    found = re.search(rf'name="{name}" value="([^"]*)"', page.text)
    assert found, page.text
    return unescape(found[1])


@asynccontextmanager
async def browsing(
    *,
    prefix: str = "",
    servers: httpx2.AsyncBaseTransport | None = None,
    resolve: Resolver | None = None,
    probes: bool = False,
    engines: Sequence[LocalEngine] = (),
    peer: str = "127.0.0.1",
    host: str = "gateway",
    store: MemoryStore | None = None,
    **settings: Any,
) -> AsyncIterator[Browser]:
    """Run an application of pages, perhaps mounted in another one, with a client that is not signed in.

    `servers` answers what is asked of model servers, but for the probes. With `probes` the gateway probes servers itself. It looks for
    `engines` on this computer, and `peer` is the address that the client comes from, `host` what it calls the gateway. Applications
    with the same `store` are processes of one gateway.
    """
    clock = Clock()
    probe = Verdicts(wall=lambda: clock.wall)
    given = Settings(**{"admin_api_key": ADMIN_KEY, "rate_limit_per_minute": 0, **settings})
    parts = assemble(
        given, store=store or MemoryStore(), probe=None if probes else probe, transport=servers, resolve=resolve, engines=engines
    )
    app = parts.app
    outer = Starlette(routes=[Mount(prefix, app)]) if prefix else app
    transport = httpx2.ASGITransport(outer, raise_app_exceptions=False, client=(peer, 40_000))
    async with lifespan(app), httpx2.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
        yield Browser(parts, client, probe, clock, prefix, host)
