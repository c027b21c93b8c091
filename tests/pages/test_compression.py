"""Pages are compressed where that gives no secret away, and the session can be put off."""

from __future__ import annotations

import gzip
import re
import time

import pytest

from multiverse_gateway.pages import compression
from multiverse_gateway.pages.masking import unmasked
from multiverse_gateway.pages.sessions import SESSION_SECONDS
from support.gateways import ADMIN_KEY
from support.pages import Browser, browsing

OURS = {"accept_encoding": "gzip", "sec_fetch_site": "same-origin"}


async def size_of(browser: Browser, path: str, **headers: str) -> tuple[str, int]:
    """Return how a page travels, and in how many bytes."""
    request = browser.client.build_request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    request.headers["accept"] = "text/html"
    answer = await browser.client.send(request, stream=True)
    raw = b"".join([piece async for piece in answer.aiter_raw()])
    assert int(answer.headers["content-length"]) == len(raw)
    assert "Accept-Encoding" in answer.headers["vary"]
    encoding = answer.headers.get("content-encoding", "")
    assert b"<!doctype html>" in (gzip.decompress(raw) if encoding else raw)
    return encoding, len(raw)


async def test_a_page_travels_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pages on another thread; a client that does not accept gzip gets the page as it is."""
    async with browsing() as browser:
        for number in range(30):
            await browser.register(endpoint_url=f"http://lab-{number}.example:8000")
        await browser.sign_in()
        plain = await size_of(browser, "/dashboard", accept_encoding="identity")
        packed = await size_of(browser, "/dashboard", **OURS)
        assert (plain[0], packed[0]) == ("", "gzip")
        assert packed[1] < plain[1] / 5
        monkeypatch.setattr(compression, "LARGE", 1000)
        assert (await size_of(browser, "/dashboard", **OURS))[0] == "gzip"
        head = await browser.client.head("/dashboard", headers={"accept": "text/html", "accept-encoding": "gzip"})
        assert (head.status_code, head.headers["content-encoding"]) == (200, "gzip")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_request_that_another_site_caused_is_not_compressed(site: str) -> None:
    """BREACH: it could put guesses into the address and learn from the length."""
    async with browsing() as browser:
        await browser.sign_in()
        assert (await size_of(browser, "/dashboard?q=guess", accept_encoding="gzip", sec_fetch_site=site))[0] == ""


async def test_the_token_of_a_page_is_another_text_each_time() -> None:
    """All of them are that of the session, also in forms."""
    async with browsing() as browser:
        await browser.sign_in()
        pages = [(await browser.open("/keys")).text for _ in range(2)]
        found = [re.findall(r'name="csrf(?:-token)?" (?:value|content)="([^"]+)"', page) for page in pages]
        assert len(set(found[0])) == len(set(found[1])) == 1
        assert found[0][0] != found[1][0]
        assert len({unmasked(token) for tokens in found for token in tokens}) == 1
        assert unmasked(found[0][0]) not in "".join(pages)
        answer = await browser.client.post("/logout", data={"csrf": found[1][0]}, headers={"origin": "http://gateway"})
        assert answer.status_code == 303


async def test_a_page_that_shows_a_new_key_is_not_compressed() -> None:
    """Nor one that shows the token of an owner."""
    async with browsing() as browser:
        await browser.sign_in()
        made = await browser.send("/keys", {"names": "ada"}, accept_encoding="gzip", sec_fetch_site="same-origin")
        shown = made if made.status_code == 200 else await browser.open(made.headers["location"], **OURS)
        assert "mvg-client-" in shown.text
        assert "content-encoding" not in shown.headers


async def test_streams_exports_and_the_api_are_not_compressed() -> None:
    async with browsing() as browser:
        await browser.register()
        await browser.sign_in()
        for path in ("/v1/models", "/admin/servers", "/session", "/live/state"):
            answer = await browser.client.get(path, headers={"accept-encoding": "gzip", "x-api-key": ADMIN_KEY})
            assert "content-encoding" not in answer.headers, path
        exported = await browser.send("/settings/export", {"key": ADMIN_KEY}, accept_encoding="gzip")
        assert exported.headers["content-type"].startswith("application/json")
        assert "content-encoding" not in exported.headers


async def test_a_session_can_be_put_off_but_not_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lasts its full time again, with the same cookie; one that has ended stays so."""
    async with browsing() as browser:
        later = 0.0
        monkeypatch.setattr(browser.parts.gateway, "wall", lambda: time.time() + later)
        await browser.sign_in()
        assert 'name="session-left" content="43' in (await browser.open("/dashboard")).text
        later = SESSION_SECONDS - 60
        assert 0 < (await browser.client.get("/session")).json()["seconds_left"] <= 60
        stayed = await browser.send("/session/stay")
        assert stayed.json()["seconds_left"] > SESSION_SECONDS - 5
        assert stayed.headers["set-cookie"].startswith("mvg_session=")
        later += 120
        assert (await browser.open("/dashboard")).status_code == 200
        later += SESSION_SECONDS
        assert (await browser.send("/session/stay", hx_request="true")).status_code == 401
        key_only = await browser.client.post("/session/stay", headers={"x-api-key": ADMIN_KEY, "accept": "text/html"})
        assert key_only.status_code == 400


async def test_a_session_that_another_process_ended_is_not_brought_back() -> None:
    """Not even by a request that began before."""
    async with browsing() as browser:
        await browser.sign_in()
        sessions = browser.parts.sessions
        headers = [(b"cookie", f"mvg_session={browser.client.cookies['mvg_session']}".encode())]
        session = sessions.find(headers)
        assert session is not None
        await browser.parts.gateway.store.close_session(session.digest)
        assert await sessions.extend(session, headers) is None
