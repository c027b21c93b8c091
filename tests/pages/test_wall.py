"""The wall view: what it shows, who may see it, and how its links are made and revoked."""

from __future__ import annotations

import re
from typing import Any

import attrs
import httpx2
import pytest

from multiverse_gateway.pages import live, wall
from multiverse_gateway.wall_links import MOST_LINKS
from support.gateways import ADMIN_KEY
from support.pages import Browser, browsing

SECRETS = ("gpu.example", "ada-the-owner", "connection refused", "in the lab")


async def make_link(browser: Browser, name: str = "Room 204") -> str:
    """Create a link by the API and return its token."""
    made = await browser.client.post("/admin/wall-links", json={"name": name}, headers={"x-api-key": ADMIN_KEY})
    assert made.status_code == 201, made.text
    path, _, token = made.json()["path"].partition("#")
    assert path == "/wall"
    return str(token)


async def open_wall(browser: Browser, token: str) -> httpx2.Response:
    """Do what the script of the entry page does."""
    return await browser.client.post(f"{browser.prefix}/wall/open", data={"token": token}, headers={"accept": "text/html"})


async def links_of(browser: Browser) -> Any:
    return (await browser.client.get("/admin/wall-links", headers={"x-api-key": ADMIN_KEY})).json()


@pytest.mark.parametrize("prefix", ["", "/ai"])
async def test_a_link_shows_the_state_and_nothing_private(prefix: str) -> None:
    """Without a session or navigation; what a visitor of a public dashboard would not see is not there either."""
    async with browsing(prefix=prefix) as browser:
        await browser.register(metadata={"student_id": "ada-the-owner", "description": "in the lab"})
        browser.client.base_url = httpx2.URL(f"http://gateway{prefix}")
        token = await make_link(browser)
        stranger = await browser.client.get("/wall", headers={"accept": "text/html"})
        assert (stranger.status_code, "tiny" in stranger.text, stranger.headers["referrer-policy"]) == (200, False, "no-referrer")
        browser.client.base_url = httpx2.URL("http://gateway")
        opened = await open_wall(browser, token)
        assert (opened.status_code, opened.headers["location"]) == (303, f"{prefix}/wall")
        assert "HttpOnly" in opened.headers["set-cookie"]
        page = await browser.open("/wall")
        assert (page.status_code, page.headers["referrer-policy"], page.headers["cache-control"]) == (200, "no-referrer", "no-store")
        assert "1 of 1 up" in page.text
        assert token not in page.text
        assert not [secret for secret in (*SECRETS, "<nav", "Sign out") if secret in page.text]
        assert (await browser.open("/dashboard")).status_code == 303
        assert (await browser.open("/admin/servers")).status_code in (401, 403)


async def test_a_screen_follows_its_view_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream ends when the link is revoked, and then it sees no more than anybody else."""
    monkeypatch.setattr(live, "TICK_SECONDS", 0)
    async with browsing() as browser:
        await browser.register()
        assert (await browser.open("/live?of=wall", hx_request="true")).status_code == 401
        token = await make_link(browser)
        await open_wall(browser, token)
        revoked: list[bool] = []
        render = wall.Wall._parts

        def revoking(self: wall.Wall, visit: Any) -> Any:
            if not revoked:
                revoked.append(True)
                registry = browser.parts.gateway.registrations
                registry.follow(attrs.evolve(registry.registry, wall_links=()))
            return render(self, visit)

        monkeypatch.setattr(wall.Wall, "_parts", revoking)
        text = (await browser.open("/live?of=wall&of=dashboard&of=logs", hx_request="true")).text
        assert re.findall(r"event: (\w+)\nid: (\d)", text) == [("update", "0"), ("out", "1"), ("out", "2")]
        assert (await browser.open("/live/state", hx_request="true")).status_code == 401


async def test_links_are_made_and_revoked_on_the_page() -> None:
    """The link is shown once, and not compressed; a name is used once."""
    async with browsing() as browser:
        await browser.sign_in()
        made = await browser.send("/settings/wall-links", {"name": "Projector in room 204"}, accept_encoding="gzip")
        assert "content-encoding" not in made.headers
        (url,) = re.findall(r"http://gateway/wall#mvg-wall-[\w-]{43}", made.text)
        again = await browser.send("/settings/wall-links", {"name": "Projector in room 204"})
        assert (again.status_code, "already" in again.text) == (400, True)
        assert "mvg-wall" not in (await browser.open("/settings/wall-links")).text
        assert (await browser.send("/settings/wall-links", {"name": ""})).status_code == 400
        (link,) = await links_of(browser)
        assert (await open_wall(browser, url)).status_code == 303
        gone = await browser.send(f"/settings/wall-links/{link['id']}/revoke")
        assert (gone.status_code, gone.headers["location"]) == (303, "/settings/wall-links")
        assert await links_of(browser) == []
        refused = await open_wall(browser, url)
        assert (refused.status_code, "does not work" in refused.text) == (403, True)


async def test_the_api_lists_links_without_tokens_and_revokes_them() -> None:
    async with browsing() as browser:
        token = await make_link(browser)
        links = await links_of(browser)
        assert token not in str(links)
        taken = await browser.client.post("/admin/wall-links", json={"name": "Room 204"}, headers={"x-api-key": ADMIN_KEY})
        assert taken.status_code == 400
        path = f"/admin/wall-links/{links[0]['id']}"
        assert (await browser.client.delete(path, headers={"x-api-key": ADMIN_KEY})).json() == links[0]
        unknown = await browser.client.delete(path, headers={"x-api-key": ADMIN_KEY})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
        assert (await browser.client.get("/admin/wall-links")).status_code in (401, 403)


async def test_there_is_an_end_to_links_and_to_guesses() -> None:
    async with browsing() as browser:
        for number in range(MOST_LINKS):
            await make_link(browser, f"screen {number}")
        more = await browser.client.post("/admin/wall-links", json={"name": "one more"}, headers={"x-api-key": ADMIN_KEY})
        assert more.status_code == 400
        statuses = [(await open_wall(browser, "mvg-wall-guess")).status_code for _ in range(wall.MAX_TRIES + 1)]
        assert (set(statuses[:-1]), statuses[-1]) == ({403}, 429)
        large = await browser.client.post("/wall/open", content=b"token=" + b"x" * (2 << 20), headers={"accept": "text/html"})
        assert large.status_code == 413
