"""The page of models in a browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from browser.conftest import DESKTOP, SETTINGS, Watched, cookies_of_an_operator
from support import behaviours
from support.backends import Backend
from support.processes import GatewayProcess

NAMES = [f"{family}:{size}b" for family in ("llama3.2", "qwen2.5", "phi-4", "gemma3", "olmo2", "granite3") for size in range(1, 11)]


def test_61_models_fit_into_a_page(chromium: Any, browse_at: Callable[..., Watched]) -> None:
    """One is chosen by a click, or by a link without scripts; one that goes offline moves to the end by itself."""
    with GatewayProcess(SETTINGS) as gateway, Backend("iris", models=NAMES) as iris, Backend("jo", models=["alone"]) as jo:
        jo_id = gateway.register("alone", jo.url)
        servers = [{"model_name": name, "endpoint_url": iris.url} for name in NAMES]
        assert gateway.admin("POST", "/admin/import", {"servers": servers}).json()["created"] == 60
        cookies = cookies_of_an_operator(chromium, gateway.url, gateway.admin_key)
        watched = browse_at(gateway.url, cookies, viewport=DESKTOP)
        page = watched.page
        watched.open("/models")
        assert page.evaluate("document.documentElement.scrollHeight") <= 3000
        rows = page.locator("#models tr")
        assert (rows.count(), page.locator("#use-title").text_content()) == (61, "alone")
        page.get_by_role("link", name="olmo2:3b").click()
        page.locator("#use-title", has_text="olmo2:3b").wait_for()
        page.wait_for_url("**/models?model=olmo2*")
        page.get_by_role("tab", name="curl").click()
        assert '"stream": true' in page.locator("#use [role=tabpanel]:visible").text_content()

        jo.behave_models = behaviours.status(500)
        gateway.admin("POST", f"/admin/servers/{jo_id}/health-check")
        rows.last.get_by_text("Offline").first.wait_for()
        assert "alone" in rows.last.text_content()
        assert "since" in rows.last.text_content()
        page.get_by_label("Search models").fill("phi")
        page.locator("#live", has_text="10 of 61 models").wait_for()

        plain = browse_at(gateway.url, cookies, java_script_enabled=False).page
        plain.goto(f"{gateway.url}/models")
        plain.get_by_role("link", name="phi-4:2b").click()
        assert plain.locator("#use-title").text_content() == "phi-4:2b"
