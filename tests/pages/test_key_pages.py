"""The pages of client keys: made, shown once, found, changed, blocked, renewed and revoked."""

from __future__ import annotations

import csv
import io
import re
import time
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any
from urllib.parse import unquote

import httpx2
import pytest

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.usage import Counts, Usage, UsageKey
from multiverse_gateway.stores.memory import MemoryStore
from support.gateways import ADMIN_KEY
from support.pages import Browser, browsing

KEY = re.compile(r"mvg-client-[\w-]{43}")


def keys_in(page: httpx2.Response) -> list[str]:
    """Return the keys that a page shows, each once."""
    return list(dict.fromkeys(KEY.findall(page.text)))


async def make(browser: Browser, names: str = "alice", **fields: str) -> httpx2.Response:
    """Make keys by the form and return the page that shows them."""
    sent = await browser.send("/keys", {"names": names, **fields})
    assert sent.status_code == 303, sent.text
    return await browser.open(sent.headers["location"])


async def made_key(browser: Browser, name: str = "alice", **fields: str) -> tuple[str, str]:
    """Make a key by the form and return its id and the key."""
    (key,) = keys_in(await make(browser, name, **fields))
    (record,) = [record for record in await records(browser) if record["name"] == name]
    return str(record["id"]), key


async def records(browser: Browser) -> list[dict[str, object]]:
    """Return the keys as the API lists them."""
    answer = await browser.client.get(f"{browser.prefix}/admin/keys", headers={"x-api-key": ADMIN_KEY})
    return list(answer.json())


async def unreadable(*days: str, **chosen: Any) -> Any:
    """Fail as a store does that cannot be reached."""
    raise StorageUnavailable("the disk is gone")


def set_clock(browser: Browser, ahead: float) -> None:
    """Let the gateway's clock be so many seconds ahead."""
    browser.parts.gateway.wall = lambda: time.time() + ahead


async def status(browser: Browser, key: str) -> int:
    return (await browser.client.get(f"{browser.prefix}/v1/models", headers={"x-api-key": key})).status_code


# Making keys


@pytest.mark.parametrize(("prefix", "root_path"), [("", ""), ("/mounted", ""), ("/mounted", "/ai")])
async def test_a_key_is_made_and_shown_once(prefix: str, root_path: str) -> None:
    """By a redirect, so that a reload sends nothing again; the sealed cookie is for that page only, which takes it away."""
    async with browsing(prefix=prefix, root_path=root_path) as browser:
        await browser.register(model_name="tiny")
        await browser.sign_in()
        sent = await browser.send("/keys", {"names": "Jürgen Müller"})
        place = sent.headers["location"]
        assert (sent.status_code, place.startswith(f"{root_path}{prefix}/keys/")) == (303, True)
        (cookie,) = sent.headers.get_list("set-cookie")
        assert KEY.search(cookie) is None
        assert f"; HttpOnly; Max-Age=60; Path={place}; SameSite=Strict" in cookie
        headers = {"cookie": "; ".join([cookie.partition(";")[0], *(f"{name}={value}" for name, value in browser.client.cookies.items())])}
        path = place.removeprefix(root_path + prefix)
        assert (await browser.client.head(prefix + path, headers=headers)).status_code == 200
        assert keys_in(await browser.open(path, sec_purpose="prefetch", **headers)) == []
        page = await browser.open(path, **headers)
        (key,) = keys_in(page)
        text = unescape(page.text)
        assert f"Base URL: http://gateway{root_path}{prefix}/v1" in text
        assert 'model="tiny"' in text
        assert page.headers["cache-control"] == "no-store"
        assert f"Max-Age=0; Path={place}" in page.headers["set-cookie"]
        again = await browser.open(path, **headers)
        assert keys_in(again) == []
        assert "renew it" in again.text
        assert await status(browser, key) == 200


async def test_the_key_is_shown_by_whatever_process_answers() -> None:
    """Once in all of them."""
    store = MemoryStore()
    async with browsing(store=store) as here, browsing(store=store) as there:
        await here.sign_in()
        sent = await here.send("/keys", {"names": "alice"})
        there.client.cookies = here.client.cookies
        assert len(keys_in(await there.open(sent.headers["location"]))) == 1


async def test_over_tls_the_cookie_is_for_tls() -> None:
    """So that nothing on plain HTTP can set or read it."""
    async with browsing(trusted_proxies=("127.0.0.1/32",)) as browser:
        answer = await browser.client.post(
            "/keys", data={"names": "alice"}, headers={"x-api-key": ADMIN_KEY, "x-forwarded-proto": "https", "accept": "text/html"}
        )
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Secure-mvg_new_keys=")
        assert cookie.endswith("; Secure")


async def test_a_program_with_the_admin_key_sees_the_key_too() -> None:
    """It has no session; the cookie is sealed for its key."""
    async with browsing() as browser:
        headers = {"x-api-key": ADMIN_KEY, "accept": "text/html"}
        answer = await browser.client.post("/keys", data={"names": "alice"}, headers=headers)
        cookie = answer.headers["set-cookie"].partition(";")[0]
        browser.client.cookies.clear()
        page = await browser.client.get(answer.headers["location"], headers={**headers, "cookie": cookie})
        assert len(keys_in(page)) == 1


async def test_many_keys_are_made_of_a_list() -> None:
    """Names that have a key are left out, and no cell of the table is a formula."""
    async with browsing() as browser:
        await browser.sign_in()
        await make(browser, "Jürgen Müller")
        page = await make(browser, "\ufeffNg, Anna\r\n\r\n李明\r\n=1+1\r\nJürgen Müller\r\n", daily_limit="7")
        assert "Jürgen Müller" in page.text
        found = re.search(r'href="data:text/csv;charset=utf-8,([^"]*)"', page.text)
        assert found
        rows = list(csv.reader(io.StringIO(unquote(unescape(found[1])))))
        assert [row[0] for row in rows] == ["name", "Ng, Anna", "李明", "'=1+1"]
        assert [await status(browser, row[2]) for row in rows[1:]] == [200] * 3
        assert len(await records(browser)) == 4
        refused = await browser.send("/keys", {"names": "李明\nNg, Anna"})
        assert refused.status_code == 400
        assert "have a key already" in refused.text


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"names": ""}, "Enter a name"),
        ({"names": "alice"}, "already a key named alice"),
        ({"names": "Ada\u202e"}, "remove U+202E"),
        ({"names": "bob\nAda\u202e\nbob"}, "Line 2: the name must not contain"),
        ({"names": "bob\nbob"}, "Line 2: bob is on line 1 already"),
        ({"names": "\n".join(map(str, range(501)))}, "at most 500"),
        ({"names": "b", "days": "x"}, "whole number"),
        ({"names": "b", "days": "0"}, "from 1 to"),
        ({"names": "b", "max_at_once": "-1"}, "whole number"),
        ({"names": "b", "daily_limit": "0"}, "Requests per day must"),
        ({"names": "b", "which": "some"}, "Choose at least one model"),
        ({"names": "b", "which": "some", "more_models": "a b"}, "Models must"),
    ],
)
async def test_what_cannot_be_used_stays_in_the_form(form: dict[str, str], problem: str) -> None:
    """With the reason; all lines are checked before any key is made."""
    async with browsing() as browser:
        await browser.sign_in()
        await make(browser)
        refused = await browser.send("/keys", {"bulk": "on", **form})
        assert refused.status_code == 400
        assert 'role="alert"' in refused.text
        assert problem in unescape(refused.text)
        assert 'id="bulk" checked' in refused.text
        assert form["names"].split("\n")[0] in unescape(refused.text)
        assert len(await records(browser)) == 1


# Attacks


async def test_the_sealed_cookie_opens_only_where_it_belongs() -> None:
    """Not in another session, not on the page of another key, not after a minute, not twice, and not when it was tampered with."""
    async with browsing() as browser:
        await browser.sign_in()
        other_id, _ = await made_key(browser, "bob")

        async def sealed(name: str) -> tuple[str, str]:
            sent = await browser.send("/keys", {"names": name})
            cookie = sent.headers["set-cookie"].partition(";")[0]
            for held in list(browser.client.cookies.jar):
                if held.name == "mvg_new_keys":
                    browser.client.cookies.delete(held.name, path=held.path)
            return sent.headers["location"], cookie

        def with_session(cookie: str) -> str:
            return "; ".join([cookie, *(f"{name}={value}" for name, value in browser.client.cookies.items())])

        place, cookie = await sealed("tampered")
        for wrong in (cookie[:-2] + "AA", cookie.partition("=")[0] + "=", cookie.partition("=")[0] + "=;x=" + "A" * 2000):
            assert keys_in(await browser.open(place, cookie=with_session(wrong))) == []
        place, cookie = await sealed("elsewhere")
        assert keys_in(await browser.open(f"/keys/{other_id}/new", cookie=with_session(cookie))) == []
        place, cookie = await sealed("late")
        set_clock(browser, 61)
        assert keys_in(await browser.open(place, cookie=with_session(cookie))) == []
        set_clock(browser, 0)
        place, cookie = await sealed("replayed")
        assert [len(keys_in(await browser.open(place, cookie=with_session(cookie)))) for _ in range(2)] == [1, 0]
        place, cookie = await sealed("of another session")
        await browser.sign_in()
        assert keys_in(await browser.open(place, cookie=with_session(cookie))) == []
        browser.client.cookies.clear()
        assert (await browser.open(place, cookie=cookie)).headers["location"].startswith("/login")


async def test_nothing_changes_without_the_token_of_the_session() -> None:
    """Every form of these pages; what asks changes nothing."""
    async with browsing() as browser:
        await browser.sign_in()
        key_id, key = await made_key(browser)
        before = await records(browser)
        for path in ("/keys", *(f"/keys/{key_id}{part}" for part in ("", "/renew", "/block", "/unblock", "/revoke"))):
            for form, origin in (({"csrf": ""}, "http://gateway"), ({"csrf": "x" * 64}, "http://gateway"), ({}, "http://evil.example")):
                refused = await browser.send(path, {"names": "bob", "name": "bob", **form}, origin=origin)
                assert refused.status_code == 403, path
            await browser.open(path)
        assert await records(browser) == before
        assert await status(browser, key) == 200


async def test_names_are_text_on_every_page() -> None:
    """Markup in a name is shown, not obeyed, also in what is said after a change."""
    hostile = '"><script>alert(1)</script>'
    async with browsing() as browser:
        await browser.sign_in()
        page = await make(browser, hostile)
        key_id = (await records(browser))[0]["id"]
        await browser.send(f"/keys/{key_id}/block")
        pages = [
            page,
            *[await browser.open(path) for path in ("/keys", f"/keys/{key_id}", f"/keys/{key_id}/revoke", f"/keys/{key_id}/new")],
        ]
        for shown in pages:
            assert "<script>alert" not in shown.text
        assert all(hostile in unescape(shown.text) for shown in pages[:-1])


# Changing a key


async def test_a_key_is_changed_on_its_page() -> None:
    """Limits, expiry, models and name; what was not changed stays, to the second."""
    async with browsing() as browser:
        await browser.register(model_name="tiny")
        await browser.sign_in()
        key_id, key = await made_key(browser, days="30", rate_limit="5", which="some", more_models="later", **{"model:tiny": "on"})
        page = await browser.open(f"/keys/{key_id}")
        (before,) = await records(browser)
        assert before["models"] == ["tiny", "later"]
        assert re.search(r'name="model:tiny" checked', page.text)
        assert 'value="later"' in page.text
        day = str(before["expires_at"])[:10]
        same = {"name": "alice", "expires_on": day, "rate_limit": "5", "max_at_once": "64", "which": "some", "more_models": "later"}
        same["model:tiny"] = "on"
        await browser.send(f"/keys/{key_id}", same)
        assert "Nothing was changed." in (await browser.open(f"/keys/{key_id}")).text
        assert await records(browser) == [before]
        sent = await browser.send(f"/keys/{key_id}", {**same, "name": "Ada", "daily_limit": "9", "which": "all", "bulk": "on"})
        assert (sent.status_code, sent.headers["location"]) == (303, f"/keys/{key_id}")
        assert "Saved: name, requests per day, bulk, models." in (await browser.open(f"/keys/{key_id}")).text
        (after,) = await records(browser)
        assert after == {**before, "name": "Ada", "daily_limit": 9, "used_today": 0, "bulk": True, "models": []}
        await browser.send(f"/keys/{key_id}", {"name": "Ada", "expires_on": "2031-01-02"})
        (after,) = await records(browser)
        assert (after["expires_at"], after["rate_limit"], after["max_at_once"]) == ("2031-01-02T23:59:59.000+00:00", None, 64)
        await browser.send(f"/keys/{key_id}", {"name": "Ada", "max_at_once": "0"})
        (after,) = await records(browser)
        assert (after["expires_at"], after["max_at_once"]) == (None, 0)
        assert await status(browser, key) == 200


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"name": " "}, "Name must not be empty"),
        ({"name": "bob"}, "already a key named bob"),
        ({"name": "a\u202e"}, "remove U+202E"),
        ({"expires_on": "soon"}, "Expires on must be a date"),
        ({"expires_on": "2020-01-01"}, "in the past"),
        ({"daily_limit": "0"}, "Requests per day must"),
        ({"which": "some"}, "Choose at least one model"),
    ],
)
async def test_a_change_that_cannot_be_used_stays_in_the_form_of_the_key(form: dict[str, str], problem: str) -> None:
    async with browsing() as browser:
        await browser.sign_in()
        await make(browser, "bob")
        key_id, _ = await made_key(browser)
        before = await records(browser)
        refused = await browser.send(f"/keys/{key_id}", {"name": "alice", "rate_limit": "77", **form})
        assert refused.status_code == 400
        assert problem in unescape(refused.text)
        assert 'value="77"' in refused.text
        assert await records(browser) == before


async def test_a_key_is_blocked_renewed_and_revoked_after_a_question() -> None:
    """A page asks without scripts, a dialog with them; a revoked key offers nothing more."""
    async with browsing() as browser:
        await browser.sign_in()
        key_id, key = await made_key(browser)
        for act in ("block", "renew", "revoke"):
            asked = await browser.open(f"/keys/{key_id}/{act}")
            assert f"{act.capitalize()} this key?" in asked.text
            assert f'action="/keys/{key_id}/{act}"' in asked.text
            assert f'id="ask-{act}"' in (await browser.open(f"/keys/{key_id}")).text
        assert await status(browser, key) == 200
        assert (await browser.send(f"/keys/{key_id}/block")).headers["location"] == f"/keys/{key_id}"
        page = await browser.open(f"/keys/{key_id}")
        assert "is blocked" in page.text
        assert "Unblock" in page.text
        assert await status(browser, key) == 403
        await browser.send(f"/keys/{key_id}/unblock")
        assert await status(browser, key) == 200
        renewed = await browser.send(f"/keys/{key_id}/renew")
        (new,) = keys_in(await browser.open(renewed.headers["location"]))
        assert [await status(browser, each) for each in (key, new)] == [200, 200]  # no key is required here: the old one says nothing
        assert [record["hint"] for record in await records(browser)] == [f"{new[:15]}…{new[-4:]}"]
        assert (await browser.send(f"/keys/{key_id}/revoke")).headers["location"] == "/keys"
        page = await browser.open(f"/keys/{key_id}")
        assert "revoked" in page.text
        assert "Renew" not in page.text
        assert "1 revoked or expired key" in (await browser.open("/keys")).text
        for path in ("", "/new", "/renew", "/block", "/revoke"):
            assert (await browser.open(f"/keys/nobody{path}")).status_code == 404


# Finding a key


async def test_use_of_the_last_days_stands_with_each_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests, tokens, a sparkline with words, and when it was used last; without counts the page is there all the same."""
    async with browsing() as browser:
        await browser.sign_in()
        key_id, _ = await made_key(browser)
        await made_key(browser, "idle")
        gateway = browser.parts.gateway
        today = datetime.fromtimestamp(gateway.wall(), UTC).date()
        rows = [
            Usage(
                key=UsageKey((today - timedelta(days=ago)).isoformat(), "tiny", client=key_id),
                counts=Counts(requests=number, prompt_tokens=500),
            )
            for ago, number in ((1, 1200), (29, 34), (40, 99))
        ]
        await gateway.store.add_usage("batch", rows)
        page = (await browser.open("/keys")).text
        assert "1,234 requests" in page
        assert "1,000 tokens" in page
        assert "yesterday" in page
        assert "never" in page
        assert page.count('<svg class="sparkline"') == 1
        assert f"the most on {today - timedelta(days=1)}, 1,200" in page
        monkeypatch.setattr(gateway.store, "sum_usage", unreadable)
        assert "no requests" in (await browser.open("/keys")).text
        monkeypatch.undo()
        set_clock(browser, 40 * 86_400)
        await browser.sign_in()
        page = (await browser.open(f"/keys/{key_id}")).text
        assert "not in 30 days" in page


@pytest.mark.parametrize(
    ("wanted", "found"), [("", 3), ("MÜLL", 1), ("i", 3), ("nobody", 0), ("begin", 1), ("whole", 1), ("end", 1), (" ", 3)]
)
async def test_keys_are_searched(wanted: str, found: int) -> None:
    """By a part of the name in any case, and by the beginning or the end of the key; those that are over are folded away, but found."""
    async with browsing() as browser:
        await browser.sign_in()
        key_id, _ = await made_key(browser, "Erich")
        await browser.send(f"/keys/{key_id}/revoke")
        await make(browser, "Finn i")
        _, key = await made_key(browser, "Liz Müller")
        text = {"begin": key[:13], "whole": key[:24], "end": key[-4:]}.get(wanted, wanted)
        page = await browser.client.get("/keys", params={"q": text}, headers={"accept": "text/html"})
        assert page.text.count('<code class="key-hint"') == found
        if found == 0:
            assert "No key in use matches." in page.text


@pytest.mark.parametrize(("settings", "words"), [({"rate_limit_per_minute": 60}, "share 60 requests per minute"), ({}, "share one place")])
async def test_an_open_gateway_says_what_one_address_means(settings: dict[str, Any], words: str) -> None:
    """And nothing of it where keys are required."""
    async with browsing(**settings) as browser:
        await browser.sign_in()
        page = " ".join((await browser.open("/keys")).text.split())
        assert words in re.sub("<[^>]*>", "", page).replace("60 requests per minute (RATE_LIMIT_PER_MINUTE)", "60 requests per minute")
    async with browsing(require_client_auth=True) as browser:
        await browser.sign_in()
        assert "Without keys" not in (await browser.open("/keys")).text
