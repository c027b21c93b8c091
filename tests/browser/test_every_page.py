"""Every page, wide and narrow, light and dark: no error, no foreign request, nothing that axe finds, no scrolling sideways."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser.conftest import DESKTOP, PHONE, Watched, screenshot
from support.processes import GatewayProcess
from support.require import require

pytestmark = pytest.mark.e2e

PICTURES = Path(os.environ["MVG_SCREENSHOTS"]) if "MVG_SCREENSHOTS" in os.environ else None
PAGES = {
    "dashboard": "/dashboard",
    "search": "/dashboard?q=llama&status=healthy&sort=uptime",
    "register": "/register",
    "server": "/server/{id}",
    "edit": "/server/{id}/edit",
    "models": "/models",
    "playground": "/test",
    "logs": "/logs?level=DEBUG",
    "settings": "/settings",
    "docs": "/docs",
    "missing": "/nothing-here",
}
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]


def violations(page: Any) -> list[str]:
    """Return what axe finds on a page, in its words."""
    axe = require("axe_playwright_python.sync_playwright", "the accessibility of the pages").Axe()
    results = axe.run(page, context={"exclude": [["#api .swagger-ui"]]}, options={"runOnly": RULES})  # Swagger UI's markup is its own
    return [
        f"{item['id']}: {item['help']}: {node['html'][:160]} {node.get('failureSummary', '')[:300]}"
        for item in results.response["violations"]
        for node in item["nodes"]
    ]


def check(watched: Watched, name: str) -> None:
    """Hold a page against all that every page must hold."""
    page = watched.page
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    screenshot(page, PICTURES, name)
    assert wide <= 0, f"{name} scrolls sideways by {wide} px"
    assert violations(page) == [], name
    assert page.evaluate("() => window.hacked") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_every_page(browse: Callable[..., Watched], gateway: GatewayProcess, size: str, scheme: str) -> None:
    """In one window, one after the other."""
    watched = browse(viewport=DESKTOP if size == "desktop" else PHONE, color_scheme=scheme)
    servers = gateway.admin("GET", "/servers").json()
    for name, path in PAGES.items():
        watched.open(path.format(id=servers[0]["id"]))
        if name == "docs":
            watched.page.locator(".opblock").first.wait_for()
        check(watched, f"{name}-{size}-{scheme}")
    watched.troubles[:] = [trouble for trouble in watched.troubles if "status of 404" not in trouble]  # /nothing-here


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_form_to_sign_in(browse: Callable[..., Watched], scheme: str) -> None:
    """For those who are not signed in yet."""
    watched = browse(operator=False, viewport=PHONE, color_scheme=scheme)
    watched.open("/dashboard")
    assert watched.page.url.endswith("/login")
    assert "healthy" not in watched.page.content()
    check(watched, f"login-phone-{scheme}")
