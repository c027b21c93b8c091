"""What the pages show of the whole gateway, as values."""

from __future__ import annotations

from typing import Any

from multiverse_gateway.api.request_types import EXPORT_FORMAT
from multiverse_gateway.core.health.listing import UNLISTED
from multiverse_gateway.pages.states import Tone
from multiverse_gateway.pages.views import overview
from support.gateways import Stage, stage


async def fail(here: Stage, server: dict[str, Any]) -> None:
    """Let a server fail its check."""
    here.probe.failing[server["endpoint_url"]] = "connection refused: is it running?"
    await here.client.post(f"/admin/servers/{server['id']}/health-check")


async def test_the_overall_state_in_words() -> None:
    """From nothing to everything down."""
    async with stage() as here:
        assert overview(here.gateway).headline == "No server is registered yet."
        first = await here.register(model_name="one", endpoint_url="http://a.example")
        assert overview(here.gateway).headline == "The server is up."
        second = await here.register(model_name="one", endpoint_url="http://b.example")
        assert overview(here.gateway).headline == "Both servers are up; all models available."
        await fail(here, first)
        assert overview(here.gateway).headline == "1 of 2 servers is down; all models available."
        assert overview(here.gateway).tone is Tone.WARN
        await fail(here, second)
        assert overview(here.gateway).headline == "Both servers are down; no server for one."
        for name in ("three", "two"):
            await fail(here, await here.register(model_name=name, endpoint_url=f"http://{name}.example"))
        assert overview(here.gateway).headline == "All 4 servers are down; no server for one, three and 1 more."
        assert overview(here.gateway).tone is Tone.BAD


async def test_a_long_name_is_cut_short_in_the_headline_and_whole_in_its_title() -> None:
    """A model's name has up to 128 characters, the headline one line; with no server up, no figure is green."""
    async with stage() as here:
        name = "org/" + "a-long-name-" * 9
        await fail(here, await here.register(model_name=name, endpoint_url="http://a.example"))
        seen = overview(here.gateway)
        assert seen.headline == f"The only server is down; no server for {name[:39]}…."
        assert seen.full_headline == f"The only server is down; no server for {name}."


async def test_servers_that_wait_for_their_first_check_are_not_called_up() -> None:
    """After an import, or a start without verdicts: nothing is known of them."""
    async with stage() as here:
        first = await here.register(model_name="one", endpoint_url="http://a.example")
        second = await here.register(model_name="one", endpoint_url="http://b.example")
        servers = [{"model_name": "two", "endpoint_url": f"http://new{number}.example"} for number in range(2)]
        await here.client.post("/admin/import", json={"format": EXPORT_FORMAT, "servers": servers})
        assert overview(here.gateway).headline == "2 of 4 servers are up; 2 are waiting for their first check."
        await fail(here, first)
        assert overview(here.gateway).headline == "1 of 4 servers is down; 2 are waiting for their first check."
        await fail(here, second)
        assert overview(here.gateway).headline == "2 of 4 servers are down; no server for one; 2 are waiting for their first check."
        assert overview(here.gateway).tone is Tone.BAD
        for server in (first, second):
            await here.client.delete(f"/admin/register/{server['id']}")
        assert overview(here.gateway).headline == "Both servers are waiting for their first check."
        assert overview(here.gateway).tone is Tone.IDLE


async def test_the_pages_count_as_the_api_does() -> None:
    """Whatever became of the servers."""
    async with stage() as here:
        servers = [await here.register(model_name=f"m{number}", endpoint_url=f"http://{number}.example") for number in range(3)]
        await here.client.post(
            "/admin/import", json={"format": EXPORT_FORMAT, "servers": [{"model_name": "x", "endpoint_url": "http://x.example"}]}
        )
        await fail(here, servers[0])
        for _ in range(3):
            await fail(here, servers[1])
        found, stats = overview(here.gateway), (await here.client.get("/admin/stats")).json()
        assert (found.servers, found.healthy, found.models) == (stats["total_servers"], stats["healthy_servers"], stats["models"])
        assert found.down == stats["unhealthy_servers"] + stats["inactive_servers"]


async def test_servers_that_need_attention_are_counted_apart() -> None:
    """A model that only such servers offer is not called available."""
    async with stage() as here:
        first = await here.register(model_name="one", endpoint_url="http://a.example")
        second = await here.register(model_name="one", endpoint_url="http://b.example")
        third = await here.register(model_name="two", endpoint_url="http://c.example")

        async def doubt(server: dict[str, Any]) -> None:
            here.probe.warnings[server["endpoint_url"]] = UNLISTED
            await here.client.post(f"/admin/servers/{server['id']}/health-check")

        await doubt(first)
        found = overview(here.gateway)
        assert found.headline == "2 of 3 servers are up; 1 needs attention; all models available."
        assert (found.tone, found.healthy, found.attention) == (Tone.WARN, 2, 1)
        await doubt(third)
        assert overview(here.gateway).headline == "1 of 3 servers is up; 2 need attention."
        await fail(here, second)
        assert overview(here.gateway).headline == "1 of 3 servers is down; 2 need attention."
        await here.client.delete(f"/admin/register/{second['id']}")
        assert overview(here.gateway).headline == "Both servers need attention."
        stats = (await here.client.get("/admin/stats")).json()
        assert (stats["attention_servers"], stats["healthy_servers"]) == (2, 2)
