"""36: the pages below a path of a proxy, in a real browser behind a real nginx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser.conftest import SETTINGS, Watched, cookies_of_an_operator
from support.backends import Backend
from support.nginx import location, nginx
from support.processes import GatewayProcess
from support.sockets import free_port, serving

pytestmark = pytest.mark.e2e

ROOT = "/ai/gateway"


@pytest.fixture(params=[True, False], ids=["stripped", "left"])
def proxied(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, GatewayProcess]]:
    """Return a gateway and its address behind an nginx that takes the path off or leaves it, and hides the host in either case."""
    port = free_port()
    public = f"http://gateway.test:{port}"
    backend = Backend("tiny", models=["tiny"])
    with GatewayProcess({**SETTINGS, "ROOT_PATH": ROOT, "PUBLIC_URL": public}) as gateway, serving(backend):
        gateway.register("tiny", backend.url)
        with nginx(tmp_path, location(ROOT, gateway.url, strips=request.param, host="internal.example"), port=port):
            yield public + ROOT, gateway


def test_an_operator_works_below_a_path(chromium: Any, browse_at: Callable[..., Watched], proxied: tuple[str, GatewayProcess]) -> None:
    """Sign in, follow the menu, see the dashboard live, talk to a model, sign out; nothing is asked for elsewhere, and nothing fails."""
    url, gateway = proxied
    watched = browse_at(url, cookies_of_an_operator(chromium, url, gateway.admin_key))
    page = watched.page
    watched.open("/dashboard")
    page.locator("tr[data-row]", has_text="tiny").get_by_text("Healthy").wait_for()
    for name in ("Register", "Models", "Playground", "Keys", "Usage", "Logs", "Settings", "API docs"):
        page.get_by_role("link", name=name, exact=True).click()
        page.get_by_role("heading", level=1).first.wait_for()
        assert page.url.startswith(url)
    page.goto(f"{url}/playground?model=tiny")
    page.get_by_label("Your message").fill("Hello")
    page.get_by_label("Your message").press("Enter")
    page.locator(".message-box.assistant .measures").get_by_text("first token after").wait_for()
    page.get_by_role("button", name="View code").click()
    assert f"{url}/v1" in (page.locator("#as-curl").text_content() or "")
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url(f"{url}/login")
    for_https = ("Cross-Origin-Opener-Policy", "Clear-Site-Data")
    watched.troubles[:] = [trouble for trouble in watched.troubles if not any(header in trouble for header in for_https)]
