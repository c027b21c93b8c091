"""Take the pictures of README and documentation: every page of a gateway as a class runs it.

`nox -s screenshots` writes docs/images; names given as arguments limit it to those.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2
from playwright.sync_api import sync_playwright

from browser.classroom import Classroom
from browser.conftest import DESKTOP, FLAGS, PHONE

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
QUALITY = 78
HOST = "gateway.campus.example"
MODEL = "mistral-nemo:12b"


def go(path: str) -> Callable[[Any], None]:
    """Show a page as it stands."""
    return lambda page: page.goto(f"http://{HOST}{path}")


def register(page: Any) -> None:
    """Show the wizard after a test that passed."""
    page.goto(f"http://{HOST}/register")
    page.get_by_label("Server address").fill("lab-9.campus.example:8000/v1")
    page.get_by_text("It will be saved as").wait_for()
    page.get_by_role("button", name="Test connection").click()
    page.get_by_role("button", name="llama3.1:8b").click()
    page.get_by_role("textbox", name="Owner").fill("Ines Duarte")
    page.get_by_label("Description").fill("Desktop under the window, RTX 4070")
    page.get_by_text("llama3.1:8b answers.").wait_for()


def server(page: Any) -> None:
    """Show the page of the laptop behind a tunnel that was away for a while."""
    page.goto(f"http://{HOST}/dashboard?q=amber-otter")
    page.locator("a.model").click()
    page.get_by_role("heading", name="History").wait_for()


def edit(page: Any) -> None:
    """Show a change before it is saved."""
    server(page)
    page.get_by_role("link", name="Edit").click()
    page.get_by_label("Server address").fill("https://brave-otter-16.ngrok-free.app")
    page.get_by_role("button", name="Save changes").click()
    page.get_by_role("dialog").wait_for()


def models(page: Any) -> None:
    """Show the models, and the servers and code of one."""
    page.goto(f"http://{HOST}/models?q=ll&model=llama3.2:3b")


def playground(page: Any) -> None:
    """Show an answer with its measures."""
    page.goto(f"http://{HOST}/playground?model={MODEL}")
    page.get_by_label("Your message").fill("How does a heat pump work? Briefly, please.")
    page.get_by_label("Your message").press("Enter")
    page.locator(".measures").last.get_by_text("tokens/s").wait_for()


def keys(page: Any) -> None:
    """Show some keys and the form that makes more."""
    page.goto(f"http://{HOST}/keys")
    for name, days, rate, daily in (("course-2026", "120", "", ""), ("Ines Duarte", "", "30", "500"), ("guest-lecture", "1", "", "")):
        page.get_by_label("Names").fill(name)
        page.get_by_label("Expires after (days)").fill(days)
        page.get_by_text("Limits and models").click()
        page.get_by_label("Requests per minute").fill(rate)
        page.get_by_label("Requests per day").fill(daily)
        page.get_by_role("button", name="Create").click()
        page.get_by_role("heading", name=f"The key of {name}").wait_for()
        page.evaluate(USE, [page.locator("#made-key").text_content(), MODEL, len(name)])
        page.goto(f"http://{HOST}/keys")


USE = """async ([key, model, times]) => {
    const body = JSON.stringify({ model, messages: [{ role: "user", content: "Hello" }] });
    const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
    for (let number = 0; number < times; number += 1) await (await fetch("/v1/chat/completions", { method: "POST", headers, body })).text();
}"""
"""Ask with a key a few times."""
PICTURES: Mapping[str, tuple[Callable[[Any], None], Mapping[str, int], str]] = {
    "dashboard": (go("/dashboard?sort=model"), DESKTOP, "light"),
    "dashboard-dark": (go("/dashboard?sort=model"), DESKTOP, "dark"),
    "dashboard-phone": (go("/dashboard?sort=status"), PHONE, "light"),
    "register": (register, DESKTOP, "light"),
    "server": (server, DESKTOP, "light"),
    "edit": (edit, DESKTOP, "light"),
    "models": (models, DESKTOP, "light"),
    "playground": (playground, DESKTOP, "light"),
    "playground-phone": (playground, PHONE, "dark"),
    "keys": (keys, DESKTOP, "light"),
    "usage": (go("/usage"), DESKTOP, "light"),
    "logs": (go("/logs"), DESKTOP, "light"),
    "settings": (go("/settings"), DESKTOP, "light"),
    "docs": (go("/docs"), DESKTOP, "light"),
}
"""What each picture shows, how large the window is, and its colors."""


def take(page: Any, name: str) -> int:
    """Write a picture of the window and return its size."""
    page.wait_for_function("() => window.htmx && document.readyState === 'complete'")
    page.evaluate("() => { document.activeElement?.blur(); scrollTo(0, 0); }")
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    shot = page.context.new_cdp_session(page).send("Page.captureScreenshot", {"format": "webp", "quality": QUALITY})
    data = base64.b64decode(shot["data"])
    (IMAGES / f"{name}.webp").write_bytes(data)
    return len(data)


def signed_in(browser: Any, room: Classroom) -> Any:
    """Sign in and return the cookies."""
    context = browser.new_context(viewport=DESKTOP, color_scheme="light", locale="en-GB")
    page = context.new_page()
    page.goto(f"http://{HOST}/login")
    page.get_by_label("Admin key").fill(room.admin_key)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/dashboard")
    return context.storage_state()


def main() -> int:
    """Take the pictures; return the exit code."""
    wanted = sys.argv[1:] or list(PICTURES)
    with Classroom() as room, sync_playwright() as playwright:
        for text in ("Hello", "Good morning", "One more thing"):
            body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
            httpx2.post(f"{room.url}/v1/chat/completions", json=body, trust_env=False).raise_for_status()
        flags = [*FLAGS, f"--host-resolver-rules=MAP {HOST} 127.0.0.1:{room.port}"]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        state = signed_in(browser, room)
        total = 0
        for name in wanted:
            show, viewport, scheme = PICTURES[name]
            options = {"viewport": viewport, "color_scheme": scheme, "storage_state": state, "locale": "en-GB", "reduced_motion": "reduce"}
            context = browser.new_context(**options, device_scale_factor=2 if viewport is PHONE else 1.25)
            page = context.new_page()
            show(page)
            size = take(page, name)
            total += size
            print(f"{name}: {size / 1024:.0f} KiB")
            context.close()
        print(f"in all: {total / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
