"""What a student does: register a server, see it, lose it, see that by itself, talk to it, change it, remove it."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from browser.conftest import PHONE, SETTINGS, TABLET, XSS, Watched
from browser.test_every_page import violations
from multiverse_gateway.core.addresses import LOCALHOST_MEANS
from support import behaviours
from support.backends import Backend
from support.processes import GatewayProcess
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e


def test_a_server_from_its_registration_to_its_end(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """The core journey, in a browser."""
    watched = browse()
    page = watched.page
    with Backend("erin", behaviours.good(events=20, interval=0.05), models=["journey-1", "journey-2"]) as erin:
        register(page, watched, erin)
        row = page.locator("tr[data-row]", has_text="journey-2")

        # It dies, and the page says so by itself, without losing what is being typed.
        erin.behave_models = behaviours.status(500)
        search = page.get_by_label("Search")
        search.fill("journ")
        page.wait_for_url("**/dashboard?q=journ")
        page.wait_for_function("() => document.querySelectorAll('tr[data-row]').length === 1")
        search.focus()
        row.get_by_text("status 500").wait_for(timeout=15_000)
        assert page.evaluate("() => document.activeElement.id") == "q"
        page.get_by_text("no server for journey-2").wait_for()

        # It comes back by a forced check, not by itself: its page is open before it works again.
        row.get_by_role("link", name="journey-2").click()
        page.get_by_role("button", name="Check now").wait_for()
        erin.behave_models = behaviours.for_path("/models", list_of("journey-2"))
        page.get_by_role("button", name="Check now").click()
        page.get_by_text("The check passed").wait_for()
        page.locator("#state", has_text="Healthy").wait_for()

        talk(watched, "journey-2")
        change_and_remove(page, watched)


def list_of(name: str) -> behaviours.Behaviour:
    """Answer with a list of one model."""
    return behaviours.answer(200, b'{"object": "list", "data": [{"id": "%s", "object": "model"}]}' % name.encode())


def register(page: Any, watched: Watched, backend: Backend) -> None:
    """Register by the form, with its help."""
    watched.open("/register")
    page.get_by_label("Server address").fill(f"{backend.url.removeprefix('http://')}/v1/chat/completions")
    page.get_by_text(f"{LOCALHOST_MEANS} It will be saved as {backend.url}.").wait_for()
    page.get_by_label("Model name").fill("not a name")
    page.get_by_role("textbox", name="Owner").focus()
    page.get_by_text("Model name must be 1 to 128").wait_for()
    page.locator("#model_name[aria-invalid=true]").wait_for()
    page.get_by_label("Model name").fill("")
    page.get_by_role("button", name="Test connection").click()
    page.get_by_text("2 models found.").wait_for()
    page.get_by_text("journey-1 answers.").wait_for()
    page.get_by_role("button", name="journey-2", exact=True).click()
    page.get_by_role("textbox", name="Owner").fill("erin")
    page.get_by_role("button", name="Register", exact=True).click()
    page.get_by_role("heading", name="journey-2 is registered").wait_for()
    assert len(page.locator("#registration-id").text_content()) == 36
    page.get_by_role("tab", name="curl").click()
    assert "journey-2" in page.get_by_label("curl code", exact=True).text_content()
    watched.open("/dashboard")
    page.locator("tr[data-row]", has_text="journey-2").get_by_text("Healthy").wait_for()


def talk(watched: Watched, model: str) -> None:
    """Ask in the playground: tokens come one by one, and can be stopped."""
    page = watched.page
    page.get_by_role("link", name="Open in playground").click()
    page.wait_for_url("**/playground?model=*")
    assert page.get_by_label("Model", exact=True).input_value() == model
    page.get_by_label("Your message").fill("Hello")
    page.get_by_label("Your message").press("Enter")
    answer = page.locator(".message-box.assistant").first
    lengths: set[int] = set()
    until = time.monotonic() + 10
    while page.get_by_role("button", name="Stop").is_visible() or not lengths:
        lengths.add(len(answer.locator(".text").text_content() or ""))
        assert time.monotonic() < until
    assert len(lengths) > 4
    measures = answer.locator(".measures").text_content() or ""
    assert "first token after" in measures
    assert "tokens/s" in measures
    assert "server " in measures
    assert " in, " in measures
    page.get_by_label("Your message").fill("More")
    page.get_by_role("button", name="Send").click()
    page.wait_for_function("() => [...document.querySelectorAll('.message-box.assistant .text')].at(-1).textContent.length > 3")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped", exact=True).wait_for()
    page.get_by_text("Stream the answer").click()
    page.get_by_label("Your message").fill("In one piece")
    page.get_by_role("button", name="Send").click()
    page.wait_for_function("() => document.querySelectorAll('.message-box.assistant .measures')[2]?.textContent.includes('in all')")
    page.get_by_role("button", name="View code").click()
    assert f'"{model}"' in page.get_by_label("Python code", exact=True).text_content()
    page.go_back()


def change_and_remove(page: Any, watched: Watched) -> None:
    """Edit marks what changed and asks; delete asks too."""
    page.get_by_role("link", name="Edit").click()
    page.get_by_role("textbox", name="Owner").fill(XSS)
    assert page.locator(".changed:visible").count() == 1
    page.get_by_role("button", name="Save changes").click()
    page.get_by_role("dialog").get_by_text("Owner: erin → ").wait_for()
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    page.get_by_text("Saved: Owner.").wait_for()
    assert page.get_by_text(XSS).count() == 1
    assert page.evaluate("() => window.hacked") is None
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_url("**/dashboard")
    page.get_by_text("journey-2 was removed.").wait_for()
    page.wait_for_function("() => ![...document.querySelectorAll('tr[data-row]')].some((row) => row.textContent.includes('journey-2'))")


def test_what_was_typed_survives_signing_out(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """The session ends elsewhere; the form stays, and works again after signing in."""
    watched = browse(operator=False)
    page = watched.page
    sign_in(page, gateway)
    watched.open("/register")
    page.get_by_role("textbox", name="Owner").fill("keep me")
    page.context.clear_cookies()
    page.get_by_role("button", name="Test connection").click()
    page.get_by_text("You are signed out.").wait_for()
    assert page.get_by_role("textbox", name="Owner").input_value() == "keep me"
    other = page.context.new_page()
    sign_in(other, gateway)
    page.get_by_role("button", name="I have signed in").click()
    page.get_by_text("Signed in again.").wait_for()
    page.get_by_role("button", name="Test connection").click()
    page.get_by_text("is missing").first.wait_for()
    assert page.get_by_role("textbox", name="Owner").input_value() == "keep me"
    watched.troubles[:] = [trouble for trouble in watched.troubles if "401" not in trouble and "status of 4" not in trouble]


def sign_in(page: Any, gateway: GatewayProcess) -> None:
    """Sign in by the form."""
    page.goto(f"{gateway.url}/login")
    page.get_by_label("Admin key").fill(gateway.admin_key)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/dashboard")


def test_the_first_steps_with_keys_for_clients(chromium: Any, browse: Callable[..., Watched]) -> None:
    """The link of the first start signs in, an empty dashboard leads on, and the playground needs no client key."""
    settings = {**SETTINGS, "ADMIN_API_KEY": None, "REQUIRE_CLIENT_AUTH": "true", "CLIENT_API_KEYS": "a-client-key-of-the-class"}
    with (
        GatewayProcess(settings) as gateway,
        serving(Backend("frank", behaviours.good(), models=["frank"])) as _,
        Backend("grace", behaviours.good(), models=["grace"]) as grace,
    ):
        wait_until(lambda: "/login?token=" in gateway.log_text(), within=10, what="the gateway did not show its link")
        link = next(word for word in gateway.log_text().split() if "/login?token=" in word)
        watched = browse(operator=False, url=gateway.url)
        page = watched.page
        page.goto(link)
        page.get_by_role("heading", name="Add your first model").wait_for()
        assert "token" not in page.url
        assert httpx2.get(link, trust_env=False).status_code == 403
        key = next(line.split()[-1] for line in gateway.log_text().splitlines() if "admin key  " in line)
        gateway.admin_key = key
        gateway.register("grace", grace.url)
        page.locator("tr[data-row]", has_text="grace").wait_for(timeout=10_000)
        assert gateway.chat("grace").status_code == 401
        watched.open("/playground?model=grace")
        page.get_by_label("Your message").fill("Hello")
        page.get_by_role("button", name="Send").click()
        page.locator(".measures a").wait_for()
        assert page.locator(".failed").count() == 0


def test_a_key_with_a_daily_limit(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """It is made by the form, shown once, used, found, changed, renewed and revoked; on a desk, a tablet and a phone."""
    page = browse().page
    page.goto(f"{gateway.url}/keys")
    page.get_by_label("Names").fill("daily")
    page.get_by_text("Limits and models").click()
    page.get_by_label("Requests per minute").fill("1000000")
    page.get_by_label("Requests per day").fill("1500")
    page.get_by_label("Only these").check()
    page.get_by_label("mistral-nemo").check()
    page.get_by_label("org/very-long.model_name").check()
    page.get_by_role("button", name="Create").dblclick()
    key = page.locator("#made-key").text_content()
    assert key in page.locator("#handout").text_content()
    assert not violations(page)
    page.reload()
    page.get_by_role("heading", name="New keys are shown only once").wait_for()
    assert key not in page.content()
    assert "mvg_new_keys" not in str(page.context.cookies())
    headers = {"x-api-key": key}
    asked = httpx2.post(f"{gateway.base_url}/chat/completions", json={"model": "mistral-nemo"}, headers=headers, trust_env=False)
    assert asked.headers["x-ratelimit-remaining-requests"] == "1499"
    for options in ({}, {"viewport": TABLET}, {"viewport": PHONE, "has_touch": True}):
        page = browse(**options).page
        page.goto(f"{gateway.url}/keys")
        assert page.locator("tr", has_text="daily").get_by_text("1 of 1,500").is_visible()
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0, options
    page.get_by_label("Search keys").fill("dail")
    page.wait_for_url("**/keys?q=dail")
    page.get_by_role("link", name="Edit the key of daily").tap()
    field = page.get_by_label("Requests per day")
    field.fill("0")
    assert field.evaluate("field => field.validity.rangeUnderflow")
    field.fill("1600")
    page.get_by_role("button", name="Save changes").tap()
    page.get_by_text("Saved: requests per day.").wait_for()
    assert not violations(page)
    assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
    for act, then in (("Block", "is blocked"), ("Unblock", "active again"), ("Renew", "cannot be shown again"), ("Revoke", "is revoked")):
        page.goto(f"{gateway.url}/keys?q=dail")
        page.get_by_role("link", name="Edit the key of daily").tap()
        if act == "Unblock":
            page.get_by_role("button", name=act).tap()
        else:
            page.get_by_role("link", name=act, exact=True).tap()
            question = page.get_by_role("dialog")
            assert not violations(page)
            question.get_by_role("button", name=act).tap()
        page.get_by_text(then).wait_for()


def test_a_list_of_names_is_downloaded_with_their_keys(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """The policy of the page allows the table that it holds itself; without scripts, too."""
    page = browse(java_script_enabled=False).page
    page.goto(f"{gateway.url}/keys")
    page.get_by_label("Names").fill("Ng, Anna\n李明\n<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Create").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download keys.csv").click()
    with open(download.value.path(), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["Ng, Anna", "李明", "<img src=x onerror=alert(1)>"]
    page.goto(f"{gateway.url}/keys")
    page.get_by_role("link", name="Edit the key of 李明").click()
    page.get_by_role("link", name="Revoke").click()
    page.get_by_role("button", name="Revoke").click()
    page.get_by_text("The key of 李明 is revoked.").wait_for()
    for row in rows[::2]:
        assert httpx2.get(f"{gateway.base_url}/models", headers={"x-api-key": row["OPENAI_API_KEY"]}, trust_env=False).status_code == 200


@pytest.mark.parametrize(("path", "budget"), [("/dashboard", 60_000), ("/playground", 120_000)])
def test_what_a_page_costs(browse: Callable[..., Watched], record_property: Callable[[str, object], None], path: str, budget: int) -> None:
    """60 KB of scripts at most, 120 KB on the playground, and nothing kept; first load and interaction are measured, not judged."""
    watched = browse()
    page = watched.page
    sizes = []
    page.on("response", lambda response: sizes.append((response.url, int(response.headers.get("content-length", 0)))))
    watched.open(path)
    assert 5_000 < sum(size for url, size in sizes if url.endswith(".js")) < budget
    load = page.evaluate("() => performance.getEntriesByType('navigation')[0].loadEventEnd")
    took = page.evaluate(
        """async () => {
            const began = performance.now();
            document.querySelector('[data-theme-switch]').click();
            await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
            return performance.now() - began;
        }"""
    )
    record_property("first_load_ms", round(load))
    record_property("interaction_ms", round(took, 1))
    print(f"first load {load:.0f} ms, interaction {took:.1f} ms")
    kept = page.evaluate("() => [...Object.keys(localStorage), ...Object.keys(sessionStorage)]")
    assert set(kept) <= {"htmx-current-path-for-history"}
