"""Every page in every state, wide and narrow, light and dark: no error, no foreign request, nothing axe finds, no scrolling sideways."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest

from browser.classroom import CLASS, Classroom, Host
from browser.conftest import DESKTOP, PHONE, XSS, Watched, cookies_of_an_operator, screenshot
from multiverse_gateway.core.health import HealthState
from support import answers, behaviours
from support.require import require

pytestmark = pytest.mark.e2e

PICTURES = Path(os.environ["MVG_SCREENSHOTS"]) if "MVG_SCREENSHOTS" in os.environ else None
NASTY = Host(
    model="org/very-long.model_name-of-somebody-who-likes-to-be-exact@2025-01-31+instruct-q4_K_M",
    url="https://a-tunnel-with-a-name-that-has-no-end-and-no-place-to-break-00112233445566778899.ngrok-free.app/a/prefix",
    owner=XSS,
    description=XSS * 3,
    state=HealthState.UNHEALTHY,
    trouble=range(3),
    reason="connection refused: is the server running?",
)
PAGES = {
    "dashboard": "/dashboard",
    "search": "/dashboard?q=llama&status=healthy&sort=uptime&order=desc",
    "nothing-found": "/dashboard?q=" + "no-such-thing" * 9,
    "register": "/register",
    "server": "/server/{nasty}",
    "server-well": "/server/{well}",
    "edit": "/server/{nasty}/edit",
    "models": "/models",
    "playground": "/playground",
    "keys": "/keys",
    "key": "/keys/{key}",
    "key-asked": "/keys/{key}/revoke",
    "key-again": "/keys/{key}/new",
    "usage": "/usage",
    "usage-custom": "/usage?by=model&since=2020-01-01&until=2020-01-09&server=s1",
    "logs": "/logs?level=DEBUG",
    "settings": "/settings",
    "docs": "/docs",
    "missing": "/nothing-here",
}
WIDTHS = (320, 360, 761, 820, 1024, 1171)
"""Of small phones, tablets, and right beside where the style changes; every page is looked at in full at two others."""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]


TOO_SMALL = """() => [...document.querySelectorAll("summary, .pair a, main :is(button, a.model, select, input)")]
    .filter((target) => target.checkVisibility() && !target.closest("#api, svg") && !["checkbox", "radio"].includes(target.type))
    .map((target) => [target.getBoundingClientRect(), target.outerHTML.slice(0, 120)])
    .filter(([box]) => box.height > 1 && box.height < 23.9)
    .map(([box, html]) => `${box.height} px: ${html}`)"""
"""Targets on a page that are less than 24 px high; links in a sentence may be."""


OUT_OF_LINE = """() => [...document.querySelectorAll(".filter")].flatMap((filter) => {
    const boxes = [...filter.querySelectorAll(":is(input, select, button)")].filter((control) => control.checkVisibility())
        .map((control) => control.getBoundingClientRect()).filter((box) => box.height > 1);
    const middles = boxes.map((box) => box.top + box.height / 2);
    return middles.filter((middle) => middles.some((other) => Math.abs(other - middle) > 1 && Math.abs(other - middle) < 15));
})"""
"""The middles of controls that are a few pixels higher or lower than their neighbors."""


def violations(page: Any, *, only: str | None = None) -> list[str]:
    """Return what axe finds on a page, in its words; `only` by one of its rules."""
    axe = require("axe_playwright_python.sync_playwright", "the accessibility of the pages").Axe()
    results = axe.run(
        page,
        options={"runOnly": [only] if only else RULES, "resultTypes": ["violations"]},  # of the rest, what stands for it is enough
    )
    return [
        f"{item['id']}: {item['help']}: {node['html'][:160]} {node.get('failureSummary', '')[:300]}"
        for item in results.response["violations"]
        for node in item["nodes"]
    ]


def check(watched: Watched, name: str) -> None:
    """Hold a page against all that every page must hold."""
    page = watched.page
    page.evaluate("() => { for (const fold of document.querySelectorAll('details')) fold.open = true; }")
    screenshot(page, PICTURES, name)
    usual = page.viewport_size
    for width in (usual["width"], *(WIDTHS if usual["width"] == PHONE["width"] else ())):
        page.set_viewport_size({**usual, "width": width})
        wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{name} scrolls sideways by {wide} px where {width} are there"
    page.set_viewport_size(usual)
    assert violations(page) == [], name
    if usual["width"] == PHONE["width"]:
        assert page.evaluate(TOO_SMALL) == [], f"{name}: fingers need 24 px (WCAG 2.5.8)"
    assert violations(page, only="label-content-name-mismatch") == [], f"{name}: whoever speaks what is written must reach it (WCAG 2.5.3)"
    page.emulate_media(color_scheme="dark")
    assert violations(page, only="color-contrast") == [], f"{name}, dark"
    page.emulate_media(color_scheme="light")
    assert page.evaluate("() => window.hacked") is None


@attrs.frozen
class School:
    """The class, and an operator's cookies."""

    room: Classroom
    cookies: Any
    ids: dict[str, str]


@pytest.fixture(scope="module")
def school(chromium: Any) -> Iterator[School]:
    """Return a gateway with servers in every state, one of them nasty, and a key with a nasty name."""
    with Classroom((*CLASS, NASTY)) as room:
        headers = {"X-API-Key": room.admin_key}
        servers = httpx2.get(f"{room.url}/admin/servers?include_inactive=true", headers=headers, trust_env=False).json()
        ids = {"nasty" if "very-long" in server["model_name"] else "well": server["id"] for server in servers}
        name = ("<b>Ng, Anna" * 10)[:64]
        made = httpx2.post(f"{room.url}/admin/keys", headers=headers, json={"name": name, "models": [NASTY.model]}, trust_env=False).json()
        ids["key"] = made["id"]
        yield School(room, cookies_of_an_operator(chromium, room.url, room.admin_key), ids)


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_every_page(browse_at: Callable[..., Watched], school: School, size: str) -> None:
    """In one window, one after the other, then what floats above them; each in light and dark."""
    watched = browse_at(school.room.url, school.cookies, viewport=DESKTOP if size == "desktop" else PHONE)
    page = watched.page
    for name, path in PAGES.items():
        watched.open(path.format(**school.ids))
        if name == "docs":
            open_some_calls(page)
        check(watched, f"{name}-{size}")
        assert page.evaluate(OUT_OF_LINE) == [], f"{name}: the controls of a filter share a line"
        assert page.locator("h1").count() == 1, name
    watched.open(f"/server/{school.ids['nasty']}")
    page.evaluate("() => { for (const id of ['offline', 'signed-out']) document.getElementById(id).hidden = false; }")
    if size == "phone":
        page.get_by_role("button", name="Menu").click()
    page.locator(".chart rect").first.dispatch_event("pointerover")
    check(watched, f"floating-{size}")
    page.get_by_role("button", name="Delete").click()
    check(watched, f"dialog-{size}")
    watched.troubles[:] = [trouble for trouble in watched.troubles if "status of 404" not in trouble]  # /nothing-here


def open_some_calls(page: Any) -> None:
    """Open a call with and one without a body in the API docs, as somebody does who tries them."""
    for call in ("#operations-inference-get_v1_models", "#operations-inference-post_v1_embeddings"):
        page.locator(f"{call} .opblock-summary-control").click()
        page.locator(call).get_by_role("button", name="Try it out").click()
    page.get_by_role("textbox", name="Request body").wait_for()


def test_the_api_docs_take_a_key(browse_at: Callable[..., Watched], school: School) -> None:
    """The dialog for keys is as readable as the page below it, and leaves the page's own rules for code alone."""
    watched = browse_at(school.room.url, school.cookies, viewport=PHONE)
    watched.open("/docs")
    watched.page.get_by_role("button", name="Authorize").first.click()
    watched.page.get_by_role("button", name="Close").last.wait_for()
    check(watched, "docs-keys-phone")


def test_the_form_to_sign_in(browse_at: Callable[..., Watched], school: School) -> None:
    """For those who are not signed in yet."""
    watched = browse_at(school.room.url, viewport=PHONE)
    watched.open("/dashboard")
    assert watched.page.url.endswith("/login")
    assert "healthy" not in watched.page.content()
    check(watched, "login-phone")


def test_an_empty_gateway_below_a_prefix(chromium: Any, browse_at: Callable[..., Watched]) -> None:
    """Each page leads a newcomer on; then the dashboard turns from empty to full by itself."""
    with Classroom((), prefix="/ai/gateway") as room:
        watched = browse_at(room.url, cookies_of_an_operator(chromium, room.url, room.admin_key))
        page = watched.page
        for name, path in {"empty-models": "/models", "empty-playground": "/playground", "empty": "/dashboard"}.items():
            watched.open(path)
            check(watched, name)
        assert f'base_url="{room.url}/v1"' in page.content().replace("&quot;", '"')
        body = {"model_name": "mistral-nemo:12b", "endpoint_url": "http://gpu-club.campus.example:8000"}
        httpx2.post(f"{room.url}/admin/register", json=body, headers={"X-API-Key": room.admin_key}, trust_env=False).raise_for_status()
        page.locator("tr[data-row]", has_text="mistral-nemo:12b").get_by_text("Healthy").wait_for()
        page.get_by_role("link", name="Playground", exact=True).click()
        room.talker.behave = talk_of(XSS)
        page.get_by_label("Your message").fill(XSS)
        page.get_by_role("button", name="Send").click()
        page.get_by_text("1 attempt").wait_for()
        assert page.locator(".message-box .text").all_text_contents() == [XSS, XSS]
        assert page.locator(".measures a").text_content() == "server gpu-club.campus.example:8000"
        check(watched, "playground-below-a-prefix")


def talk_of(text: str) -> Any:
    """Answer with this text in one piece."""
    events = [answers.chat_event("club", "m", {"content": text}), answers.chat_event("club", "m", {}, finish="stop"), answers.DONE]
    return behaviours.stream(events)
