"""The pages without a browser: who sees what, what may change something, and that nothing of a stranger becomes markup."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

from multiverse_gateway.core.paths import OWN_SEGMENTS
from multiverse_gateway.entry.access import MAX_ADMIN_FAILURES
from multiverse_gateway.pages.rendering import NEXT_PIECE
from multiverse_gateway.protocols import ProbeResult, ProbeStep
from support.gateways import ADMIN_KEY, BODY
from support.pages import Browser, browsing, value_of
from support.troubles import NETWORKS, STEPS, resolve, troubled

XSS = "\"><script>alert(1)</script>'{{7*7}}"
PRIVATE = [
    "/dashboard",
    "/register",
    "/models",
    "/playground",
    "/logs",
    "/settings",
    "/keys",
    "/server/{id}",
    "/server/{id}/edit",
    "/session",
    "/live",
    "/live/state",
]


# Who sees what


async def test_nothing_is_revealed_to_strangers() -> None:
    """Every page leads to the form to sign in, which says nothing about servers."""
    async with browsing() as browser:
        server_id = await browser.register(model_name="secret-model")
        for path in PRIVATE:
            answer = await browser.open(path.format(id=server_id))
            assert answer.status_code == 303, path
            assert answer.headers["location"].startswith("/login")
            assert answer.text == ""
        assert (await browser.open("/dashboard", hx_request="true")).status_code == 401
        page = await browser.open("/login")
        assert "secret-model" not in page.text
        assert "healthy" not in page.text
        lost = await browser.open("/nothing")
        assert lost.status_code == 404
        assert "healthy" not in lost.text
        assert (await browser.open("/")).headers["location"] == "/dashboard"


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/plain, */*;q=0.5", ""])
@pytest.mark.parametrize("prefix", ["", "/ai"])
async def test_a_program_that_asks_for_a_page_is_told_how_to_come_in(prefix: str, accept: str) -> None:
    """28: 401 with a challenge, and words that name both ways; a browser, which asks for HTML, gets the form."""
    async with browsing(prefix=prefix) as browser:
        server_id = await browser.register()
        pages = [path for path in PRIVATE if path != "/models"]  # which is the list of models for a program
        for path in (*pages, "/server/{id}/delete"):
            method = "POST" if path.endswith("delete") else "GET"
            answer = await browser.client.request(method, prefix + path.format(id=server_id), headers={"accept": accept})
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"].startswith("Bearer ")
            assert answer.headers["content-type"].startswith("text/plain")
            assert f" {prefix}/login " in answer.text
            assert "X-API-Key" in answer.text
        by_hand = await browser.client.get(f"{prefix}/settings", headers={"accept": accept, "x-api-key": ADMIN_KEY})
        assert by_hand.status_code == 200


async def test_signing_in_leads_to_where_one_wanted_to_go_and_nowhere_else() -> None:
    """A path of ours, never another host."""
    async with browsing() as browser:
        first = await browser.open("/logs?level=ERROR")
        assert first.headers["location"] == "/login?next=%2Flogs%3Flevel%3DERROR"
        answer = await browser.sign_in(next="/logs?level=ERROR")
        assert answer.headers["location"] == "/logs?level=ERROR"
        for evil in ("//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "/login"):
            assert (await browser.sign_in(next=evil)).headers["location"] == "/dashboard"


async def test_a_session_begins_anew_with_each_sign_in_and_ends_at_sign_out() -> None:
    """X09: The token before is worth nothing after."""
    async with browsing() as browser:
        await browser.sign_in()
        before = browser.client.cookies["mvg_session"]
        await browser.sign_in()
        after = browser.client.cookies["mvg_session"]
        assert before != after
        stale = await browser.client.get("/dashboard", headers={"cookie": f"mvg_session={before}", "accept": "text/html"})
        assert stale.status_code == 303 or "mvg_session" in stale.request.headers["cookie"]
        answer = await browser.send("/logout")
        assert answer.headers["location"] == "/login"
        browser.client.cookies.set("mvg_session", after, domain="gateway")
        assert (await browser.open("/dashboard")).status_code == 303


async def test_a_wrong_key_is_refused_and_guessing_is_slow() -> None:
    """Ten attempts a minute, right or wrong."""
    async with browsing() as browser:
        refused = await browser.sign_in("a-wrong-key-of-sixteen")
        assert refused.status_code == 403
        assert "Wrong key" in refused.text
        for _ in range(9):
            await browser.sign_in("a-wrong-key-of-sixteen")
        throttled = await browser.sign_in(ADMIN_KEY)
        assert throttled.status_code == 429
        assert int(throttled.headers["retry-after"]) > 0
        assert "mvg_session" not in browser.client.cookies


async def test_guessing_keys_at_pages_is_as_slow_as_at_the_api(caplog: pytest.LogCaptureFixture) -> None:
    """One window for both, and a word in the log; the right key, and requests without one, are not slowed down."""
    async with browsing() as browser:
        wrong = {"x-api-key": "a-wrong-key-of-sixteen"}
        for _ in range(MAX_ADMIN_FAILURES // 2):
            assert (await browser.client.get("/settings", headers=wrong)).status_code == 401
            assert (await browser.client.get("/admin/stats", headers=wrong)).status_code == 403
        for path in ("/settings", "/docs", "/admin/stats"):
            refused = await browser.client.get(path, headers=wrong)
            assert refused.status_code == 429, path
            assert int(refused.headers["retry-after"]) >= 1
        assert (await browser.client.get("/settings", headers={"x-api-key": ADMIN_KEY})).status_code == 200
        assert (await browser.open("/settings")).status_code == 303
        assert "key refused" in caplog.messages
        assert (await browser.sign_in()).status_code == 303


async def test_signing_in_needs_our_own_form() -> None:
    """X08: Neither another origin nor a form of another browser will do."""
    async with browsing() as browser:
        page = await browser.open("/login")
        form = {"form_token": value_of(page, "form_token"), "key": ADMIN_KEY}
        assert (await browser.send("/login", form, origin="http://evil.example")).status_code == 403
        assert (await browser.send("/login", {**form, "form_token": "x"})).status_code == 403
        browser.client.cookies.clear()
        assert (await browser.send("/login", form)).status_code == 403


async def test_the_link_of_the_first_start_signs_in_once() -> None:
    """X09: And leaves no trace of itself in the address."""
    async with browsing() as browser:
        token = await browser.parts.sessions.create_link()
        prefetched = await browser.open(f"/login?token={token}", sec_purpose="prefetch")
        assert "mvg_session" not in prefetched.headers.get("set-cookie", "").replace("mvg_form", "")
        answer = await browser.open(f"/login?token={token}")
        assert answer.status_code == 303
        assert answer.headers["location"] == "/dashboard"
        assert (await browser.open("/dashboard")).status_code == 200
        browser.client.cookies.clear()
        again = await browser.open(f"/login?token={token}")
        assert again.status_code == 403
        assert "already used" in again.text


async def test_the_admin_key_opens_pages_to_programs() -> None:
    """A request may carry it instead of a session, and needs no token then."""
    async with browsing() as browser:
        server_id = await browser.register()
        key = {"x-api-key": ADMIN_KEY}
        assert (await browser.client.get("/settings", headers=key)).status_code == 200
        deleted = await browser.client.post(f"/server/{server_id}/delete", headers=key)
        assert deleted.status_code == 303
        assert (await browser.client.get(f"/server/{server_id}", headers=key)).status_code == 404


async def test_a_public_dashboard_shows_neither_addresses_nor_owners() -> None:
    """Not by any filter either."""
    async with browsing(public_dashboard=True) as browser:
        url = "http://gpu.example:8000"
        await browser.register(metadata={"student_id": "eve-the-owner", "description": "in room 5"})
        server = next(iter(browser.parts.gateway.table.routes))
        browser.probe.failing[url] = "connection refused: is the server running?"
        await browser.client.post(f"/admin/servers/{server}/health-check", headers={"x-api-key": ADMIN_KEY})
        for path in (
            "/dashboard",
            "/models",
            "/dashboard?q=eve",
            "/dashboard?q=gpu.exam",
            "/dashboard?owner=nobody",
            "/dashboard?sort=owner",
        ):
            page = await browser.open(path)
            assert page.status_code == 200
            for secret in ("gpu.example", "eve-the-owner", "room 5", str(server)[:8] + "-", "refused", "/server/"):
                assert secret not in page.text.replace(f"row-{server}", ""), (path, secret)
        assert "tiny" in (await browser.open("/dashboard?owner=nobody")).text
        assert "No matching servers" in (await browser.open("/dashboard?q=eve")).text
        for path in ("/register", "/playground", "/logs", "/settings", f"/server/{server}"):
            assert (await browser.open(path)).status_code == 303


async def test_an_owner_token_is_made_without_scripts_too() -> None:
    """Where HTMX does not run, the answer is a page of its own, which no cache keeps; the token before it is void."""
    async with browsing() as browser:
        await browser.sign_in()
        server_id = await browser.register()
        tokens = [await made_token(browser, f"/server/{server_id}/token") for _ in range(2)]
        assert "made, never shown" in (await browser.open(f"/server/{server_id}")).text
        browser.client.cookies.clear()
        answers = [
            await browser.client.get(f"/admin/servers/{server_id}", headers={"authorization": f"Bearer {token}"}) for token in tokens
        ]
        assert [answer.status_code for answer in answers] == [403, 200]


async def made_token(browser: Browser, path: str) -> str:
    """Make an owner token with a plain form and return it."""
    page = await browser.send(path)
    assert page.headers["cache-control"] == "no-store"
    found = re.search(r"mvg-owner-[\w-]+", page.text)
    assert found, page.text
    return found[0]


async def test_a_figure_of_zero_is_not_green() -> None:
    """No healthy server is not good news, with servers that are down and without any that are up."""
    async with browsing() as browser:
        await browser.sign_in()
        server_id = await browser.register()
        assert '<div class="good"><dt>Healthy</dt><dd>1</dd>' in (await browser.open("/dashboard")).text
        browser.probe.failing[BODY["endpoint_url"]] = "connection refused: is it running?"
        await browser.send(f"/server/{server_id}/check")
        assert '<div class=""><dt>Healthy</dt><dd>0</dd>' in (await browser.open("/dashboard")).text


@pytest.mark.parametrize("place", [{}, {"prefix": "/ai"}, {"root_path": "/ai"}], ids=["root", "mounted", "root_path"])
async def test_the_playground_is_found_at_its_former_address(place: dict[str, Any]) -> None:
    """For good, with the model that a bookmark names, and below a path too; the page carries the name of the project."""
    async with browsing(**place) as browser:
        await browser.sign_in()
        moved = await browser.open("/test?model=llama3.2%3A3b")
        path = "".join(place.values())
        assert (moved.status_code, moved.headers["location"]) == (308, f"{path}/playground?model=llama3.2%3A3b")
        page = await browser.open("/playground?model=llama3.2%3A3b")
        assert "<title>Playground · Multiverse Gateway</title>" in page.text
        assert "Inference" not in page.text


# Changing something


@pytest.mark.parametrize(
    "path",
    [
        "/register",
        "/register/test",
        "/register/address",
        "/register/field?name=weight",
        "/logout",
        "/settings/export",
        "/server/{id}/delete",
        "/server/{id}/check",
        "/server/{id}/limit",
        "/server/{id}/token",
        "/server/{id}/edit",
    ],
)
async def test_nothing_changes_without_proof_that_our_page_asks(path: str) -> None:
    """X08: The cookie alone is not enough, whatever the origin says."""
    async with browsing() as browser:
        server_id = await browser.register()
        await browser.sign_in()
        path = path.format(id=server_id)
        for headers, form in (
            ({}, {"csrf": ""}),
            ({}, {"csrf": "guessed"}),
            ({"origin": "http://evil.example"}, {}),
            ({"sec_fetch_site": "cross-site"}, {}),
        ):
            answer = await browser.send(path, form, **headers)
            assert answer.status_code == 403, (path, headers, form)
            assert "text/html" in answer.headers["content-type"]
        no_cookie = await browser.client.post(path, data={}, headers={"cookie": "mvg_session=x", "origin": "http://gateway"})
        assert no_cookie.status_code == 401
        assert (await browser.open(f"/server/{server_id}")).status_code == 200


async def test_a_session_stands_for_the_keys_of_the_apis() -> None:
    """With its token; inference with required client keys, too."""
    async with browsing(require_client_auth=True, client_api_keys=("a-client-key",)) as browser:
        await browser.register()
        await browser.sign_in()
        proof = {"origin": "http://gateway", "x-csrf-token": browser._token}
        assert (await browser.client.get("/admin/stats")).status_code == 200
        assert (await browser.client.get("/v1/models")).status_code == 200
        asked = {"model": "nobody-has-this", "messages": []}
        assert (await browser.client.post("/v1/chat/completions", json=asked)).status_code == 401
        assert (await browser.client.post("/v1/chat/completions", json=asked, headers=proof)).status_code == 404
        assert (await browser.client.post("/admin/test-connection", json=BODY)).status_code == 403
        assert (await browser.client.post("/admin/test-connection", json=BODY, headers=proof)).status_code == 200
        browser.client.cookies.clear()
        assert (await browser.client.post("/v1/chat/completions", json=asked, headers=proof)).status_code == 401


async def test_where_every_site_may_use_the_api_a_session_stands_for_nothing_there() -> None:
    """S1: its cookie would be sent along; the admin API, which CORS does not open, goes on."""
    async with browsing(require_client_auth=True, enable_cors=True) as browser:
        await browser.sign_in()
        proof = {"origin": "http://gateway", "x-csrf-token": browser._token}
        asked = {"model": "nobody-has-this", "messages": []}
        assert (await browser.client.get("/v1/models", headers=proof)).status_code == 401
        assert (await browser.client.post("/v1/chat/completions", json=asked, headers=proof)).status_code == 401
        assert (await browser.client.get("/admin/stats")).status_code == 200


@pytest.mark.parametrize(
    ("settings", "origin", "allowed"),
    [
        ({}, "https://class.example", None),
        ({"enable_cors": True}, "https://class.example", "*"),
        ({"enable_cors": True}, "null", "*"),
        ({"enable_cors": True, "cors_origins": ("*",)}, "https://class.example", "*"),
        ({"enable_cors": True, "cors_origins": ("https://Class.example:443/",)}, "https://class.example", "https://class.example"),
        ({"enable_cors": True, "cors_origins": ("https://class.example",)}, "https://other.example", None),
        ({"enable_cors": True, "cors_origins": ("https://class.example",)}, "http://[", None),
        ({"cors_origins": ("https://class.example",)}, "https://class.example", None),
    ],
)
async def test_other_origins_may_read_the_api_where_the_settings_say_so(settings: dict[str, Any], origin: str, allowed: str | None) -> None:
    """Without cookies, the refusals too; a form of theirs passes then, and a preflight says the same as the answer."""
    async with browsing(**settings) as browser:
        headers = {"origin": origin, "sec-fetch-site": "cross-site"}
        asked = {"model": "nobody-has-this", "messages": []}
        answers = [
            await browser.client.get("/v1/models", headers=headers),
            await browser.client.post("/v1/chat/completions", json=asked, headers=headers),
            await browser.client.options("/v1/chat/completions", headers={**headers, "access-control-request-method": "POST"}),
        ]
        for answer in answers:
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert "access-control-allow-credentials" not in answer.headers
        form = await browser.client.post("/v1/chat/completions", content=b"{}", headers={**headers, "content-type": "text/plain"})
        assert form.status_code == (400 if allowed else 403)
        assert "access-control-allow-origin" not in (await browser.client.get("/admin/stats", headers=headers)).headers


async def test_a_public_address_is_our_own_origin() -> None:
    """Behind a proxy that changes `Host`, where the browser says nothing but `Origin`."""
    proxied = {"origin": "https://models.example", "host": "10.0.0.5:8000"}
    for public, status in (((), 403), (("https://models.example",), 303)):
        async with browsing(public_url=public) as browser:
            form = {"form_token": value_of(await browser.open("/login"), "form_token"), "key": ADMIN_KEY}
            assert (await browser.send("/login", form, **proxied)).status_code == status
            if public:
                assert "https://models.example/v1" in (await browser.open("/docs", host="10.0.0.5:8000")).text
                assert "http://gateway/v1" not in (await browser.open("/docs")).text


async def test_a_session_alone_shows_no_servers_key() -> None:
    """The keys leave with the admin key only, which a cookie does not stand for; the refusal says what to do."""
    async with browsing() as browser:
        await browser.register(api_key="sk-of-a-server")
        await browser.sign_in()
        path = "/admin/export?include_keys=true"
        assert "sk-of-a-server" not in (await browser.client.get("/admin/export")).text
        proof = {"origin": "http://gateway", "x-csrf-token": browser._token}
        for headers in ({}, proof, {"x-api-key": "a-wrong-key-of-sixteen"}, {"accept": "text/html", "sec-fetch-site": "same-origin"}):
            refused = await browser.client.get(path, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
            assert "X-API-Key" in refused.json()["error"]["message"]
        for headers in ({"x-api-key": ADMIN_KEY}, {"authorization": f"Bearer {ADMIN_KEY}"}):
            assert (await browser.client.get(path, headers=headers)).json()["servers"][0]["api_key"] == "sk-of-a-server"


async def test_the_form_that_exports_keys_asks_for_the_admin_key_again() -> None:
    """It needs our own page, the session and the key; the file is one that importing takes, and no cache keeps it."""
    async with browsing() as browser:
        await browser.register(api_key="sk-of-a-server")
        assert (await browser.send("/settings/export", {"key": ADMIN_KEY})).status_code == 303, "to sign in"
        await browser.sign_in()
        assert 'action="/settings/export"' in (await browser.open("/settings")).text
        assert (await browser.open("/settings/export")).headers["location"] == "/settings"
        for key in ("", "a-wrong-key-of-sixteen"):
            refused = await browser.send("/settings/export", {"key": key})
            assert refused.status_code == 403
            assert "Wrong key" in refused.text
            assert "sk-of-a-server" not in refused.text
        forged = await browser.send("/settings/export", {"key": ADMIN_KEY}, origin="http://evil.example")
        assert forged.status_code == 403
        exported = await browser.send("/settings/export", {"key": f" {ADMIN_KEY} "})
        assert exported.headers["content-disposition"] == 'attachment; filename="multiverse-servers.json"'
        assert exported.headers["cache-control"] == "no-store"
        assert exported.json()["servers"][0]["api_key"] == "sk-of-a-server"
        again = await browser.client.post("/admin/import", json=exported.json(), headers={"x-api-key": ADMIN_KEY})
        assert again.json()["unchanged"] == 1


async def test_guessing_the_key_at_the_export_is_as_slow_as_signing_in() -> None:
    """The two share the ten attempts a minute."""
    async with browsing() as browser:
        await browser.sign_in()
        for _ in range(9):
            assert (await browser.send("/settings/export", {"key": "a-wrong-key-of-sixteen"})).status_code == 403
        throttled = await browser.send("/settings/export", {"key": ADMIN_KEY})
        assert throttled.status_code == 429
        assert int(throttled.headers["retry-after"]) > 0
        assert "Try again in" in throttled.text


@pytest.mark.parametrize("origin", ["http://[", "http://]", "http://[::1", "null", "", "\xff", "http://gateway:99999", "http://a b", "//"])
async def test_an_unreadable_origin_is_another_one(origin: str) -> None:
    """Whatever the header holds, the answer is a refusal, never a mistake of ours."""
    async with browsing() as browser:
        page = await browser.open("/login")
        form = {"form_token": value_of(page, "form_token"), "key": ADMIN_KEY}
        raw = [(b"origin", origin.encode("latin-1"))]
        assert (await browser.client.post("/login", data=form, headers=raw)).status_code == 403
        await browser.sign_in()
        refused = await browser.client.post("/logout", data={"csrf": browser._token}, headers=raw)
        assert refused.status_code == 403
        asked = {"model": "nobody-has-this", "messages": []}
        assert (await browser.client.post("/v1/chat/completions", json=asked, headers=raw)).status_code == 404


@pytest.mark.parametrize("host", ["[", "]", "[::1", "a b", "a:b", ":", "\xff", "x" * 300, "a/b?c#d"])
async def test_an_unreadable_host_breaks_no_page(host: str) -> None:
    """Neither one that is shown nor one that only sends on to sign in."""
    async with browsing() as browser:
        raw = [(b"host", host.encode("latin-1")), (b"accept", b"text/html"), (b"referer", b"http://[")]
        for path in (
            "/",
            "/login",
            "/dashboard?sort=model",
            "/logs?level=ERROR",
            "/docs",
            "/models",
            "/nowhere",
            "/v1/models",
            "/openapi.json",
        ):
            assert (await browser.client.get(path, headers=raw)).status_code in (200, 303, 404), path
        await browser.sign_in()
        for path in ("/dashboard", "/playground", "/docs", "/models", "/settings", "/keys", "/nowhere"):
            assert (await browser.client.get(path, headers=raw)).status_code in (200, 404), path


@pytest.mark.parametrize("cookie", ['prefs={"a":1}', "k[]=1", "a=b c", "caf\xe9=\xff", "=x", "x" * 3000, "mvg_theme=x", "mvg_session=x"])
async def test_cookies_of_other_applications_do_no_harm(cookie: str) -> None:
    """A visitor with them signs in, and the page has the theme that was chosen."""
    async with browsing() as browser:

        async def send(method: str, path: str, **more: Any) -> Any:
            ours = "; ".join(f"{name}={value}" for name, value in browser.client.cookies.items())
            text = f"{cookie}; {ours}; mvg_theme=dark" if ours else cookie
            raw = [(b"cookie", text.encode("latin-1")), (b"origin", b"http://gateway"), (b"accept", b"text/html")]
            return await browser.client.request(method, path, headers=raw, **more)

        page = await send("GET", "/login")
        signed_in = await send("POST", "/login", data={"form_token": value_of(page, "form_token"), "key": ADMIN_KEY})
        assert signed_in.status_code == 303
        page = await send("GET", "/dashboard")
        assert page.status_code == 200
        assert 'data-theme="dark"' in page.text


async def test_a_server_is_registered_by_the_form() -> None:
    """With and without scripts."""
    async with browsing() as browser:
        await browser.sign_in()
        form = {
            "model_name": "tiny",
            "endpoint_url": "http://gpu.example:8000/v1/",
            "student_id": "eve",
            "max_tokens": "2,048",
            "streaming": "on",
        }
        page = await browser.send("/register", form)
        assert page.status_code == 200
        record = (await browser.client.get("/admin/servers")).json()[0]
        assert record["endpoint_url"] == "http://gpu.example:8000"
        assert record["capabilities"] == {"max_tokens": 2048, "context_length": None, "streaming": True}
        assert record["id"] in page.text
        again = await browser.send("/register", form, hx_request="true")
        assert "up to date" in again.text
        assert again.headers["hx-retarget"] == "#wizard"
        assert "toast" in again.headers["hx-trigger"]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"model_name": ""}, "model_name", "missing"),
        ({"model_name": "with space"}, "model_name", "Model name must be"),
        ({"endpoint_url": "ftp://x"}, "endpoint_url", "Address"),
        ({"endpoint_url": "http://127.0.0.1:8001"}, "endpoint_url", "does not connect to"),
        ({"max_tokens": "many"}, "max_tokens", "Max output tokens must be a whole number"),
        ({"weight": "101"}, "weight", "Weight must be"),
        ({"student_id": "a\u202eb"}, "student_id", "invisible"),
    ],
)
async def test_what_is_wrong_stands_beside_its_field(fields: dict[str, str], field: str, words: str) -> None:
    """What was typed stays, but for the key."""
    async with browsing() as browser:
        await browser.sign_in()
        form = {"model_name": "tiny", "endpoint_url": "http://gpu.example:8000", "api_key": "sk-secret", **fields}
        answer = await browser.send("/register", form, hx_request="true")
        assert answer.status_code == 422
        assert f'id="note-{field}" hx-swap-oob' in answer.text
        assert words in unescape(answer.text)
        page = await browser.send("/register", form)
        assert page.status_code == 400
        assert "sk-secret" not in page.text
        assert unescape(page.text).count(words) >= 1
        assert len((await browser.client.get("/admin/servers")).json()) == 0


async def test_a_server_is_changed_by_what_differs_only() -> None:
    """Its key stays unless it is replaced or forgotten, and is never shown."""
    async with browsing() as browser:
        server_id = await browser.register(api_key="sk-of-the-server", metadata={"student_id": "eve"}, capabilities={"max_tokens": 5})
        await browser.sign_in()
        page = await browser.open(f"/server/{server_id}/edit")
        assert "sk-of-the-server" not in page.text
        same = {
            "model_name": "tiny",
            "endpoint_url": "http://gpu.example:8000",
            "student_id": "eve",
            "max_tokens": "5",
            "weight": "1",
            "streaming": "on",
        }
        path = f"/server/{server_id}/edit"
        assert (await browser.send(path, same)).headers["location"] == f"/server/{server_id}"
        assert "Nothing was changed" in (await browser.open(f"/server/{server_id}")).text
        answer = await browser.send(path, {**same, "student_id": "", "max_tokens": ""}, hx_request="true")
        assert answer.headers["hx-redirect"] == f"/server/{server_id}"
        assert "Saved: Owner, Max output tokens" in (await browser.open("/dashboard")).text
        record = (await browser.client.get(f"/admin/servers/{server_id}")).json()
        assert record["metadata"]["student_id"] is None
        assert record["has_api_key"]
        await browser.send(path, {**same, "remove_key": "on"})
        assert not (await browser.client.get(f"/admin/servers/{server_id}")).json()["has_api_key"]
        bad = await browser.send(path, {**same, "endpoint_url": "no such thing"})
        assert bad.status_code == 400
        browser.probe.failing["http://new.example"] = "connection refused: is it running?"
        refused = await browser.send(path, {**same, "endpoint_url": "http://new.example"}, hx_request="true")
        assert refused.status_code == 422
        assert "connection refused" in refused.text
        assert (await browser.client.get(f"/admin/servers/{server_id}")).json()["endpoint_url"] == "http://gpu.example:8000"


async def test_the_stored_key_is_not_tried_at_another_address() -> None:
    """Test connection on the edit page sends it only where it belongs."""
    async with browsing() as browser:
        server_id = await browser.register(api_key="sk-of-the-server")
        await browser.sign_in()
        for url, key in (("http://gpu.example:8000", "sk-of-the-server"), ("http://evil.example", None)):
            await browser.send("/register/test", {"server_id": server_id, "endpoint_url": url})
            assert browser.probe.checked[-1].endpoint_url == url
            assert browser.probe.checked[-1].api_key == key


TITLES = {
    ProbeStep.NAME: "DNS lookup",
    ProbeStep.ADDRESS: "Address allowed",
    ProbeStep.CONNECTION: "Connection",
    ProbeStep.ACCESS: "Authentication",
    ProbeStep.ANSWER: "Model list",
}


@pytest.mark.e2e
async def test_the_connection_test_shows_the_step_at_which_it_failed() -> None:
    """With servers that really fail, each in its own way, and the gateway's own probe."""
    async with troubled() as urls, browsing(probes=True, resolve=resolve, allow_private_networks=NETWORKS) as browser:
        await browser.sign_in()
        for name in ("nowhere", "private", "closed", "no-tls", "idle-tunnel", "wants-a-key", "lists-but-refuses", "broken", "well"):
            step = STEPS[name]
            answer = await browser.send("/register/test", {"endpoint_url": urls[name]}, hx_request="true")
            failed = re.findall(r'<li class="bad">.*<strong>(.*)</strong>', answer.text.rpartition(NEXT_PIECE)[2])
            assert failed == ([] if step is None else [TITLES[step]]), name


async def test_tests_are_limited_with_a_word_when_to_go_on() -> None:
    """Ten a minute."""
    async with browsing() as browser:
        await browser.sign_in()
        for _ in range(10):
            await browser.send("/register/test", {"endpoint_url": "http://127.0.0.1:8001"}, hx_request="true")
        answer = await browser.send("/register/test", {"endpoint_url": "http://127.0.0.1:8001"}, hx_request="true")
        assert int(answer.headers["retry-after"]) > 0
        assert "at most 10 per minute" in answer.text


async def test_changes_that_are_probed_and_the_api_count_as_tries() -> None:
    """One window: an address that has used it up at one place cannot continue at the other."""
    async with browsing() as browser:
        server_id = await browser.register()
        await browser.sign_in()
        form = {**BODY, "streaming": "on", "weight": "1"}
        for number in range(9):
            form["endpoint_url"] = f"http://gpu.example:{9000 + number}"
            assert (await browser.send(f"/server/{server_id}/edit", form)).status_code == 303
        test = {"endpoint_url": "http://gpu.example:9100"}
        key = {"x-api-key": ADMIN_KEY}
        assert (await browser.client.post("/admin/test-connection", json=test, headers=key)).status_code == 200
        assert (await browser.client.post("/admin/test-connection", json=test, headers=key)).status_code == 429
        refused = await browser.send(f"/server/{server_id}/edit", {**form, "endpoint_url": "http://gpu.example:9999"})
        assert refused.status_code == 429
        assert "at most 10 per minute. Try again in" in refused.text
        assert (await browser.send(f"/server/{server_id}/edit", {**form, "weight": "2"})).status_code == 303


@pytest.mark.parametrize(
    ("typed", "words", "read_as"),
    [
        ("93.184.215.14:11434", "public address", "http://93.184.215.14:11434"),
        ("gpu-box", "the host gpu-box", "http://gpu-box"),
        ("abc.ngrok-free.app", "ngrok tunnel", "https://abc.ngrok-free.app"),
        ("<https://abc.ngrok-free.app/v1/>", "ngrok tunnel", "https://abc.ngrok-free.app"),
        ("https://abc.ngrok-free.app/v1", "ngrok tunnel", "https://abc.ngrok-free.app"),
        ("https://abc.trycloudflare.com", "Cloudflare", None),
        ("http://gpu.example:8000/v1/chat/completions", "the host gpu.example", "http://gpu.example:8000"),
        ("http://gpu.example/prefix/", "the host gpu.example", None),
        ("http://8.8.8.8", "public address", None),
        ("http://10.1.2.3:8000", "does not connect to", None),
        ("http://user:pw@gpu.example", "", None),
        ("", "", None),
    ],
)
async def test_an_address_is_recognized(typed: str, words: str, read_as: str | None) -> None:
    """Whatever was pasted; and what is registered is what it was read as."""
    async with browsing() as browser:
        await browser.sign_in()
        note = await browser.send("/register/address", {"endpoint_url": typed}, hx_request="true")
        assert note.status_code == 200
        assert words in note.text
        assert (f"It will be saved as {read_as}." in note.text) if read_as else ("saved as" not in note.text)
        if read_as:
            await browser.send("/register", {"endpoint_url": typed, "model_name": "tiny"})
            (server,) = (await browser.client.get("/admin/servers")).json()
            assert server["endpoint_url"] == read_as


async def test_an_owner_checks_and_removes_a_server() -> None:
    """By two buttons."""
    async with browsing() as browser:
        server_id = await browser.register()
        await browser.sign_in()
        passed = await browser.send(f"/server/{server_id}/check", hx_request="true")
        assert "The check passed" in passed.headers["hx-trigger"]
        browser.probe.failing["http://gpu.example:8000"] = "connection refused: is it running?"
        failed = await browser.send(f"/server/{server_id}/check")
        assert failed.status_code == 303
        page = await browser.open(f"/server/{server_id}")
        assert "Connection refused: is it running?" in page.text
        assert "The only server is down; no server for tiny." in (await browser.open("/dashboard")).text
        answer = await browser.send(f"/server/{server_id}/delete", hx_request="true")
        assert answer.headers["hx-redirect"] == "/dashboard"
        assert "was removed" in (await browser.open("/dashboard")).text
        assert (await browser.open(f"/server/{server_id}")).status_code == 404
        assert (await browser.open("/server/nonsense")).status_code == 404


# What stands on the pages


async def test_nothing_of_a_stranger_becomes_markup() -> None:
    """X07: In any field, on any page, in any fragment."""
    async with browsing() as browser:
        server_id = await browser.register(metadata={"student_id": XSS, "description": XSS})
        await browser.sign_in()
        browser.probe.failing["http://gpu.example:8000"] = XSS
        await browser.send(f"/server/{server_id}/check")
        paths = [path.format(id=server_id) for path in PRIVATE if not path.endswith("live")]
        queries = [
            f"{path}?{name}={XSS}"
            for path in ("/dashboard", "/models", "/logs", "/playground", "/login", "/register")
            for name in ("q", "model", "text", "next", "owner", "model_name")
        ]
        for path in (*paths, *queries, f"/{XSS}"):
            page = await browser.open(path)
            assert "<script>alert" not in page.text, path
            assert "49" not in re.sub(r"[0-9a-f-]{16,}|\d{2,}\.\d+|\d+ ", "", page.text) or "'49" not in page.text
        for form in (
            {"endpoint_url": XSS},
            {"model_name": XSS, "endpoint_url": "http://x"},
            {"endpoint_url": "http://x", "model_name": "m", "student_id": XSS},
        ):
            for path in ("/register", "/register/test", "/register/address", "/register/field?name=model_name"):
                for headers in ({"hx_request": "true"}, {}):
                    assert "<script>alert" not in (await browser.send(path, form, **headers)).text


async def test_every_answer_of_markup_has_the_policy() -> None:
    """X07: And is kept by no cache; scripts and styles are files of ours."""
    async with browsing() as browser:
        server_id = await browser.register()
        answers = [await browser.open("/login"), await browser.open("/nothing")]
        await browser.sign_in()
        answers += [await browser.open(path.format(id=server_id)) for path in PRIVATE if not path.endswith(("live", "session", "state"))]
        answers.append(await browser.send("/register", {"endpoint_url": "x"}, hx_request="true"))
        for answer in answers:
            assert "text/html" in answer.headers["content-type"]
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["x-frame-options"] == "DENY"
            assert " style=" not in answer.text
            assert not re.search(
                r"<script(?![^>]*src=)|\son[a-z]+=|javascript:|https?://(?!gateway|gpu\.example|192\.168|www\.w3)[a-z0-9.-]+\.(?:com|net|org|io)/",
                answer.text,
            )


async def test_the_pages_work_below_a_prefix() -> None:
    """Every link and every file, signing in included."""
    async with browsing(prefix="/ai/gateway") as browser:
        assert (await browser.open("/dashboard")).headers["location"] == "/ai/gateway/login"
        answer = await browser.sign_in(next="/models")
        assert answer.headers["location"] == "/ai/gateway/models"
        server_id = await browser.register()
        links: set[str] = set()
        for path in (
            "/dashboard",
            "/models",
            "/register",
            f"/server/{server_id}",
            f"/server/{server_id}/edit",
            "/logs",
            "/settings",
            "/playground",
        ):
            page = await browser.open(path)
            assert page.status_code == 200
            links |= {
                unescape(found)
                for found in re.findall(r'(?:href|src|action|hx-get|hx-post|sse-connect|data-poll|data-post)="([^"#]+)"', page.text)
            }
        assert len(links) > 20
        for link in links:
            assert link.startswith("/ai/gateway/"), link
            if not any(part in link for part in ("/live", "/check", "/limit", "/token", "/delete", "/logout", "/register/", "/v1/")):
                assert (await browser.client.get(link)).status_code in (200, 303), link
        assert 'base_url="http://gateway/ai/gateway/v1"' in unescape((await browser.open("/models")).text)


async def test_the_dashboard_finds_and_sorts() -> None:
    """As the URL says; what makes no sense counts as not said."""
    async with browsing() as browser:
        await browser.register(model_name="alpha", metadata={"student_id": "zoe"})
        await browser.register(model_name="beta", endpoint_url="http://other.example", metadata={"student_id": "adam"})
        browser.probe.failing["http://other.example"] = "connection refused: is it running?"
        await browser.sign_in()
        server = next(server for server in (await browser.client.get("/admin/servers")).json() if server["model_name"] == "beta")
        await browser.send(f"/server/{server['id']}/check")

        async def order(query: str) -> list[str]:
            page = await browser.open(f"/dashboard?{query}", hx_request="true", hx_target="live")
            assert page.status_code == 200
            return re.findall(r'<a class="model"[^>]*>([a-z]+)</a>', page.text)

        assert await order("") == ["beta", "alpha"]
        assert await order("sort=model") == ["alpha", "beta"]
        assert await order("sort=model&order=desc") == ["beta", "alpha"]
        assert await order("sort=status") == ["beta", "alpha"]
        assert await order("sort=owner") == ["beta", "alpha"]
        assert await order("sort=response") == ["alpha", "beta"]
        assert await order("sort=uptime&order=desc") == ["alpha", "beta"]
        assert await order("sort=checked") in (["alpha", "beta"], ["beta", "alpha"])
        assert await order("q=OTHER") == ["beta"]
        assert await order("q=zoe") == ["alpha"]
        assert await order("status=unhealthy") == ["beta"]
        assert await order("model=alpha") == ["alpha"]
        assert await order("owner=adam") == ["beta"]
        assert await order("sort=nonsense&status=nonsense&order=x") == ["beta", "alpha"]
        page = await browser.open("/dashboard?q=OTHER&status=&sort=registered", hx_request="true", hx_target="live")
        assert page.headers["hx-replace-url"] == "/dashboard?q=OTHER"
        assert "1 of 2 servers is down; no server for beta." in (await browser.open("/dashboard")).text


async def test_a_dashboard_that_is_polled_turns_from_empty_to_full_and_back() -> None:
    """As long as it is empty nothing is replaced; then the whole page takes the place of the part that was asked for."""
    async with browsing() as browser:
        await browser.sign_in()
        empty = re.search(r'id="live"[^>]*data-poll="([^"]+)"', (await browser.open("/dashboard")).text)
        assert empty
        assert (await browser.open(empty[1], hx_request="true", hx_target="live")).status_code == 204
        server_id = await browser.register(model_name="first")
        full = await browser.open(empty[1], hx_request="true", hx_target="live")
        assert (full.headers["hx-retarget"], full.headers["hx-reselect"]) == ("#page", "#page")
        assert '<main id="page"' in full.text
        board = re.search(r'id="live"[^>]*data-poll="([^"]+)"', full.text)
        assert board
        part = await browser.open(board[1], hx_request="true", hx_target="live")
        assert "hx-retarget" not in part.headers
        assert "<main" not in part.text
        await browser.send(f"/server/{server_id}/delete")
        assert "Add your first model" in (again := await browser.open(board[1], hx_request="true", hx_target="live")).text
        assert again.headers["hx-retarget"] == "#page"


async def test_the_settings_are_shown_without_secrets() -> None:
    """The masked ones."""
    async with browsing(client_api_keys=("a-client-key-of-the-class",)) as browser:
        await browser.sign_in()
        page = await browser.open("/settings")
        assert ADMIN_KEY not in page.text
        assert "a-client-key-of-the-class" not in page.text
        assert "MULTIVERSE_REQUEST_TIMEOUT_SECONDS" in page.text


async def test_files_are_kept_by_browsers_as_long_as_they_are_current() -> None:
    """Their address changes with them."""
    async with browsing() as browser:
        page = await browser.open("/login")
        path = re.search(r'href="(/static/[0-9a-f]+/tokens\.css)"', page.text)
        assert path
        current = await browser.client.get(path[1])
        assert "immutable" in current.headers["cache-control"]
        assert current.headers["content-type"].startswith("text/css")
        old = await browser.client.get("/static/old/tokens.css")
        assert old.headers["cache-control"] == "no-cache"
        plain = await browser.client.get(path[1], headers={"accept-encoding": "identity"})
        assert plain.content == current.content
        assert (await browser.client.get("/static/old/../../app.py")).status_code == 404
        assert (await browser.client.get("/static/old/%2e%2e/pages.py")).status_code == 404


async def test_without_pages_there_are_none() -> None:
    """Headless is headless."""
    async with browsing(ui=False) as browser:
        for path in ("/dashboard", "/login", "/static/x/tokens.css", "/"):
            answer = await browser.open(path)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "unknown_url"


async def test_programs_still_get_their_errors_as_json() -> None:
    """A page is for browsers that ask for one, outside of the APIs."""
    async with browsing() as browser:
        assert (await browser.client.get("/nothing")).json()["error"]["code"] == "unknown_url"
        assert (await browser.open("/v2/nothing")).headers["content-type"].startswith("text/html")
        assert (await browser.open("/admin/nothing")).headers["content-type"] == "application/json"
        assert (await browser.client.delete("/dashboard")).status_code == 405


async def test_a_page_that_fails_says_so_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the request's id and nothing internal."""
    async with browsing() as browser:
        await browser.sign_in()
        browser.parts.gateway.usage_book._totals = None  # type: ignore[assignment]
        page = await browser.open("/settings")
        assert page.status_code == 500
        assert "NoneType" not in page.text


# Live


async def test_a_history_is_told_in_words() -> None:
    """Down with its reason, back after how long."""
    async with browsing() as browser:
        server_id = await browser.register()
        await browser.sign_in()
        gateway = browser.parts.gateway
        wall = gateway.wall()
        for age, passed in ((600, True), (500, False), (400, False), (100, True)):
            gateway.checks.note_result(
                ProbeResult(
                    server_id=server_id,  # type: ignore[arg-type]
                    generation=1,
                    passed=passed,
                    checked_at=wall - age,
                    duration=0.01,
                    reason=None if passed else "connection refused: is it running?",
                )
            )
        page = await browser.open(f"/server/{server_id}")
        assert "Answers again after 6 min; 2 checks had failed." in page.text
        assert page.text.count("Marked down") == 1
        assert "Connection refused: is it running?" in page.text


async def test_an_outage_that_lasts_says_when_the_next_check_comes() -> None:
    """And each new reason is told."""
    async with browsing() as browser:
        server_id = await browser.register()
        await browser.sign_in()
        for reason in ("connection refused: is it running?", "no answer within 10 seconds", "no answer within 10 seconds"):
            browser.probe.failing["http://gpu.example:8000"] = reason
            browser.clock.advance(30)
            await browser.send(f"/server/{server_id}/check", hx_request="true")
        page = (await browser.open(f"/server/{server_id}")).text
        assert page.index("Still down") < page.index("Marked down")
        assert re.search(r"No answer within 10 seconds. 3 checks failed so far; the next one comes in about \d+ (s|min)", page)


# Use


async def test_registering_on_the_page_shows_the_owners_token_once() -> None:
    async with browsing() as browser:
        await browser.sign_in()
        form = {"model_name": "tiny", "endpoint_url": "http://gpu.example:8000", "streaming": "on"}
        assert "mvg-owner-" in (await browser.send("/register", form)).text
        assert "mvg-owner-" not in (await browser.send("/register", form)).text


async def test_a_mounted_gateway_may_have_a_proxy_before_it() -> None:
    """36: the path of the proxy comes before the path of the application."""
    async with browsing(prefix="/mounted", root_path="/ai") as browser:
        assert (await browser.open("/")).headers["location"] == "/ai/mounted/dashboard"
        page = await browser.open("/login")
        assert 'action="/ai/mounted/login"' in page.text
        assert (await browser.sign_in()).headers["location"] == "/ai/mounted/dashboard"
        assert (await browser.client.get("/mounted/chat/completions")).status_code == 404
        assert (await browser.client.post("/mounted/chat/completions", json={"model": "x"})).json()["error"]["code"] == "model_not_found"


async def test_no_proxy_can_serve_the_gateway_below_a_path_of_its_own() -> None:
    """36: every first segment of a route is one that `ROOT_PATH` may not begin with."""
    async with browsing() as browser:
        paths = [str(getattr(route, "path", "")) for route in browser.parts.app.routes]
        assert {path.split("/")[1] for path in paths} - {""} <= OWN_SEGMENTS
