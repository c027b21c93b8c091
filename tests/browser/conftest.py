"""One gateway with a few servers, and a Chromium that keeps a record of whatever goes wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest

from support import behaviours
from support.backends import Backend, list_models
from support.processes import GatewayProcess
from support.require import require, require_program
from support.sockets import serving

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP gateway.test 127.0.0.1",
]
SETTINGS = {"HEALTH_CHECK_INTERVAL_SECONDS": "1", "HEALTH_CHECK_TIMEOUT_SECONDS": "2", "RATE_LIMIT_PER_MINUTE": "0"}
XSS = "\"><img src=x onerror=window.hacked=1><script>window.hacked=1</script>'{{7*7}}"
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
TABLET = {"width": 768, "height": 1024}


@attrs.define(eq=False)
class Watched:
    """A page of the browser with what went wrong on it."""

    page: Any
    url: str
    troubles: list[str] = attrs.field(factory=list)

    def open(self, path: str) -> Any:
        """Go to a page and wait until it is there."""
        answer = self.page.goto(self.url + path, wait_until="load")
        self.page.wait_for_function("() => window.htmx !== undefined")
        return answer


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Start Debian's Chromium; while Playwright runs no other event loop can in this thread, so it ends with its module."""
    sync_api = require("playwright.sync_api", "the tests in a browser")
    path = require_program("chromium", "the tests in a browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def gateway() -> Iterator[GatewayProcess]:
    """Return a gateway with a registry like that of a class: well, slow, down, strangely named."""
    names = ["llama3.2:3b", "llama3.2:3b", "mistral-nemo", "org/very-long.model_name-of-somebody@2025-01-31+instruct-q4_K_M"]
    offered = [*names[:3], "another"]
    backends = [Backend(name, behaviours.good(events=12, interval=0.03), models=[name]) for name in offered]
    backends[2].behave_models = behaviours.after(0.3, list_models)
    with GatewayProcess(SETTINGS) as process, serving(*backends):
        for number, (backend, name) in enumerate(zip(backends, names, strict=True)):
            words = {"student_id": XSS if number == 3 else f"student-{number}", "description": XSS if number == 3 else "in the lab"}
            process.register(name, backend.url, metadata=words, max_concurrency=4 if number == 1 else None)
        backends[1].behave_models = behaviours.status(500)
        yield process


def cookies_of_an_operator(chromium: Any, url: str, key: str) -> Any:
    """Sign in by the form and return the cookies."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"{url}/logs?level=ERROR")
    page.get_by_label("Admin key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/logs?level=ERROR")
    state = context.storage_state()
    context.close()
    return state


@pytest.fixture(scope="module")
def signed_in(chromium: Any, gateway: GatewayProcess) -> Any:
    """Return the cookies of an operator of the gateway."""
    return cookies_of_an_operator(chromium, gateway.url, gateway.admin_key)


@pytest.fixture
def browse_at(chromium: Any) -> Iterator[Callable[..., Watched]]:
    """Return a function that opens a browser window; at the end of the test nothing may have gone wrong in it."""
    with ExitStack() as stack:
        opened: list[Watched] = []

        def new(root: str, state: Any = None, **options: Any) -> Watched:
            context = chromium.new_context(**{"viewport": DESKTOP, "storage_state": state, "reduced_motion": "reduce", **options})
            stack.callback(context.close)
            watched = Watched(context.new_page(), root)
            watch(watched)
            opened.append(watched)
            return watched

        yield new
        found = [trouble for watched in opened for trouble in watched.troubles]
        assert not found, found


@pytest.fixture
def browse(browse_at: Callable[..., Watched], gateway: GatewayProcess, signed_in: Any) -> Callable[..., Watched]:
    """Return a function that opens a browser window at the gateway, or another `url`, signed in or not."""

    def new(*, operator: bool = True, url: str | None = None, **options: Any) -> Watched:
        return browse_at(url or gateway.url, signed_in if operator else None, **options)

    return new


def watch(watched: Watched) -> None:
    """Note errors of scripts, messages on the console, requests to others and answers that failed."""
    page, troubles = watched.page, watched.troubles

    def said(message: Any) -> None:
        if message.type in ("error", "warning"):
            troubles.append(f"console: {message.text}")

    def asked(request: Any) -> None:
        if not request.url.startswith((watched.url, "blob:", "data:")):
            troubles.append(f"foreign request: {request.url}")

    page.on("console", said)
    page.on("pageerror", lambda error: troubles.append(f"script: {error}"))
    page.on("request", asked)


def screenshot(page: Any, directory: Path | None, name: str) -> None:
    """Take a picture where pictures are wanted."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=directory / f"{name}.png", full_page=True)
