"""A real queue in a real browser: what the dashboard and the page Models show while requests wait, and the playground's place in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from browser.conftest import DESKTOP, PHONE, SETTINGS, Watched, cookies_of_an_operator
from browser.test_every_page import check
from support import behaviours
from support.backends import Backend
from support.processes import GatewayProcess
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

KEY = "a-client-key-of-the-script-000001"
LONG = "org/very-long.model_name-of-somebody-who-likes-to-be-exact@2025-01-31+instruct-q4_K_M"


class Crowd:
    """Callers of models whose servers answer when the gate opens."""

    def __init__(self, gateway: GatewayProcess, gate: behaviours.Gate) -> None:
        self.gateway = gateway
        self.gate = gate
        self.threads: list[threading.Thread] = []

    def call(self, model: str, key: str | None = None) -> None:
        """Send a request in the background, and return once it runs or waits."""
        before = self.in_flight()
        self.threads.append(thread := threading.Thread(target=self._ask, args=(model, key)))
        thread.start()
        wait_until(lambda: self.in_flight() > before)

    def _ask(self, model: str, key: str | None) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        httpx2.post(f"{self.gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)

    def in_flight(self) -> float:
        """Return how many requests the gateway has."""
        text = self.gateway.call("GET", "/metrics").text
        return float(text.split("\nmultiverse_requests_in_flight ")[1].split("\n")[0])

    def end(self) -> None:
        """Let the servers answer, and wait for all answers."""
        self.gate.open()
        for thread in self.threads:
            thread.join(30)
        self.threads.clear()


@pytest.fixture(scope="module")
def busy() -> Iterator[GatewayProcess]:
    """Return a gateway with a client key."""
    with GatewayProcess({**SETTINGS, "CLIENT_API_KEYS": KEY}) as process:
        yield process


@pytest.fixture(scope="module")
def cookies(chromium: Any, busy: GatewayProcess) -> Any:
    """Return the cookies of an operator."""
    return cookies_of_an_operator(chromium, busy.url, busy.admin_key)


@pytest.fixture
def crowd(busy: GatewayProcess) -> Iterator[Crowd]:
    """Return callers of two models with one slot each; at the end all are answered and the models are gone."""
    gate = behaviours.Gate()
    backends = [Backend(model, models=[model]) for model in ("crowded", LONG)]
    with serving(*backends):
        ids = [busy.register(backend.name, backend.url, max_concurrency=1) for backend in backends]
        for backend in backends:
            backend.behave = gate.held(behaviours.good(events=3))
        callers = Crowd(busy, gate)
        yield callers
        callers.end()
        for server_id in ids:
            busy.admin("DELETE", f"/register/{server_id}")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_queues_come_and_go_by_themselves(
    browse_at: Callable[..., Watched], busy: GatewayProcess, cookies: Any, crowd: Crowd, viewport: dict[str, int]
) -> None:
    """Open pages show them within a second or two, for each model, with advice when places are shared, and nothing afterwards."""
    watched, other = (browse_at(busy.url, cookies, viewport=viewport) for _ in range(2))
    watched.open("/dashboard")
    other.open("/models")
    queues = watched.page.locator("#queues")
    assert not queues.is_visible()
    assert other.page.get_by_text("waiting").count() == 0
    for _ in range(3):
        crowd.call("crowded")
    crowd.call(LONG, KEY)
    crowd.call(LONG, KEY)
    queues.get_by_text("3 requests waiting").wait_for()
    lines = [" ".join(line.split()) for line in queues.locator("li").all_text_contents()]
    assert lines[0] == "crowded 2 requests from 1 client 1 of 1 slot in use"
    assert lines[1].startswith(f"{LONG} 1 request from 1 client")
    queues.get_by_text("share one place in the queue").wait_for()
    assert queues.get_by_role("link", name="Give each person a key").get_attribute("href") == "/keys"
    other.page.locator("article", has_text="crowded").get_by_text("2 requests waiting").wait_for()
    name = "phone" if viewport is PHONE else "desktop"
    check(watched, f"queues-{name}")
    check(other, f"queues-models-{name}")
    crowd.end()
    queues.wait_for(state="hidden")
    other.page.get_by_text("waiting").first.wait_for(state="hidden")
    assert other.page.get_by_text("waiting").count() == 0
