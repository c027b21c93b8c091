"""The one loopback address that a server may dial because the operator opened it for that server: who may use it, and when."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx2
import pytest

from multiverse_gateway.api.request_types import Registration
from multiverse_gateway.core.errors import BadRequest, GatewayError, ProbeRefused
from multiverse_gateway.core.registry_plans import Change, Imported, ImportedRegistry
from multiverse_gateway.core.servers import Server
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.registration import Accepted, candidate, check, import_registry, register, update
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.policies import is_private_to_this_computer
from support.backends import Backend
from support.behaviours import redirect
from support.pages import Browser, browsing

BODY = {"model": "test-model", "messages": [{"role": "user", "content": "Hi"}]}


def listen_on(gateway: Gateway, address: str) -> None:
    """Let a gateway that runs learn what `run` tells it before it starts."""
    gateway.network.listen_on(address)
    gateway.network.learn_local_addresses()


@asynccontextmanager
async def gateway_here(listener: str | None = "127.0.0.1", **settings: Any) -> AsyncIterator[tuple[Browser, Gateway]]:
    """Run a gateway that probes and dials for real; `listener` is the address that it listens on."""
    async with browsing(probes=True, **settings) as browser:
        gateway = browser.parts.gateway
        if listener is not None:
            listen_on(gateway, listener)
        yield browser, gateway


async def accept(gateway: Gateway, backend: Backend, **fields: Any) -> Accepted:
    """Register a server of this computer as the operator's offer does."""
    registration = Registration(model_name="test-model", endpoint_url=backend.url, **fields)
    return await register(gateway, registration, has_cap=False, opened_address=f"127.0.0.1:{backend.port}")


async def ask(browser: Browser) -> httpx2.Response:
    return await browser.client.post("/v1/chat/completions", json=BODY)


async def test_an_opened_server_serves_and_nothing_else_opens() -> None:
    """Probes and requests reach it; the same address without the opening, its neighbors and its other names stay closed."""
    async with gateway_here() as (browser, gateway):
        with Backend("mine", models=["test-model", "other"]) as mine, Backend("neighbor") as neighbor:
            mine.owned_by = "library"
            server = (await accept(gateway, mine)).server
            answer = await ask(browser)
            assert (answer.status_code, answer.headers["x-gateway-server-id"]) == (200, server.id)
            assert (await check(gateway, server.id)).passed
            assert len(mine.readings) > 0, "what its engine states is read as well"
            for url in (
                mine.url,
                neighbor.url,
                f"http://localhost:{mine.port}",
                f"http://[::1]:{mine.port}",
                f"http://127.0.0.2:{mine.port}",
                f"http://engine.localhost:{mine.port}",
            ):
                with pytest.raises(BadRequest):
                    await register(gateway, Registration(model_name="other", endpoint_url=url))
            unopened = candidate(gateway, Registration(model_name="other", endpoint_url=mine.url))
            result = await gateway.checks.check(unopened)
            assert "gateway's own computer" in (result.reason or "")
            elsewhere = attrs.evolve(unopened, endpoint_url=neighbor.url, opened_address=f"127.0.0.1:{mine.port}")
            assert not (await gateway.checks.check(elsewhere)).passed
            assert neighbor.connections == 0


async def test_no_change_of_the_server_leads_elsewhere() -> None:
    """Its URL cannot be turned to another port, host or name; the rest can change."""
    async with gateway_here() as (browser, gateway):
        with Backend("mine", models=["test-model", "other"]) as mine, Backend("neighbor") as neighbor:
            server = (await accept(gateway, mine)).server
            for url in (neighbor.url, f"http://localhost:{mine.port}", f"http://[::1]:{mine.port}"):
                with pytest.raises(BadRequest):
                    await update(gateway, server.id, Change(fields={"endpoint_url": url}))
            with pytest.raises(GatewayError):
                await update(gateway, server.id, Change(fields={"endpoint_url": f"http://rebound.example:{mine.port}"}))
            changed = await update(gateway, server.id, Change(fields={"model_name": "other", "weight": 3}))
            assert (changed.model_name, changed.opened_address) == ("other", f"127.0.0.1:{mine.port}")
            assert (await browser.client.post("/v1/chat/completions", json={**BODY, "model": "other"})).status_code == 200
            assert neighbor.connections == 0


async def test_a_name_that_leads_to_the_opened_address_is_refused() -> None:
    """DNS rebinding: the name of a public server begins to resolve to the opened address and port."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async with gateway_here(resolve=resolve) as (_, gateway):
        with Backend("mine") as mine:
            server = (await accept(gateway, mine)).server
            seen = mine.connections
            named = attrs.evolve(server, endpoint_url=f"http://rebound.example:{mine.port}")
            result = await gateway.checks.check(named)
            assert "gateway's own computer" in (result.reason or "")
            assert mine.connections == seen


async def test_a_redirect_of_the_opened_server_leads_nowhere() -> None:
    async with gateway_here() as (browser, gateway):
        with Backend("neighbor") as neighbor, Backend("mine", redirect(neighbor.url)) as mine:
            await accept(gateway, mine)
            assert (await ask(browser)).status_code == 502
            mine.behave_models = redirect(f"{neighbor.url}/v1/models")
            with pytest.raises(ProbeRefused):
                await accept(gateway, mine)
            assert neighbor.connections == 0


@pytest.mark.parametrize(
    ("listener", "settings", "is_open"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        (None, {}, False),
        ("0.0.0.0", {}, False),
        ("::", {}, False),
        ("192.168.1.20", {}, False),
        ("127.0.0.1", {"trusted_proxies": ("127.0.0.1/32",)}, False),
        ("127.0.0.1", {"public_url": ("https://models.example",)}, False),
        ("0.0.0.0", {"allow_private_networks": "127.0.0.1/32"}, True),
    ],
)
async def test_an_opening_holds_while_no_other_computer_can_reach_the_gateway(
    listener: str | None, settings: dict[str, Any], is_open: bool
) -> None:
    """A gateway that was restarted for others does not dial it, and says what to do; inside another program it never does."""
    async with gateway_here(listener, **settings) as (_, gateway):
        with Backend("mine") as mine:
            if is_open:
                await accept(gateway, mine)
                assert mine.connections > 0
                return
            with pytest.raises(BadRequest):
                await accept(gateway, mine)
            server = candidate(gateway, Registration(model_name="test-model", endpoint_url=mine.url))
            result = await gateway.checks.check(attrs.evolve(server, opened_address=f"127.0.0.1:{mine.port}"))
            assert "set ALLOW_PRIVATE_NETWORKS=127.0.0.1/32" in (result.reason or "")
            assert mine.connections == 0


def test_gateways_that_share_a_database_share_no_computer() -> None:
    """Each would dial a program of its own computer under the address that was opened on another one."""
    shared = Settings(database_url="postgresql://user@db.example/multiverse", backend_key_secret="s" * 44)
    assert not is_private_to_this_computer(shared, "127.0.0.1")
    assert is_private_to_this_computer(Settings(), "127.0.0.1")
    assert not is_private_to_this_computer(Settings(), "a pipe")


async def test_an_import_keeps_an_opening_and_makes_none() -> None:
    """The import that keeps its URL is possible; the same server at a gateway that never opened it is refused."""

    def imported(server: Server, **fields: Any) -> ImportedRegistry:
        return ImportedRegistry(servers=(Imported(registration=attrs.evolve(server, **fields), id=server.id),))

    async with gateway_here() as (_, gateway):
        with Backend("mine") as mine:
            server = (await accept(gateway, mine)).server
            await import_registry(gateway, imported(server, weight=7))
            kept = gateway.table.routes[server.id].server
            assert (kept.weight, kept.opened_address) == (7, server.opened_address)
            with pytest.raises(BadRequest):
                await import_registry(gateway, imported(server, model_name="other", endpoint_url="http://127.0.0.1:8080"))
    async with gateway_here() as (_, gateway):
        with pytest.raises(BadRequest):
            await import_registry(gateway, imported(server))
