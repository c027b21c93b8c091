"""A real queue in a real browser: what the dashboard and the page Models show while requests wait, and the playground's place in it."""

from __future__ import annotations

import re
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


class Callers:
    """Callers of models whose servers answer when the gate opens."""

    def __init__(self, gateway: GatewayProcess, gate: behaviours.Gate, backend: Backend) -> None:
        self.gateway = gateway
        self.gate = gate
        self.backend = backend
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
def callers(busy: GatewayProcess) -> Iterator[Callers]:
    """Return callers of two models with one slot each; at the end all are answered and the models are gone."""
    gate = behaviours.Gate()
    backends = [Backend(model, models=[model]) for model in ("crowded", LONG)]
    with serving(*backends):
        ids = [busy.register(backend.name, backend.url, max_concurrency=1) for backend in backends]
        for backend in backends:
            backend.behave = gate.held(behaviours.good(events=3))
        made = Callers(busy, gate, backends[0])
        yield made
        made.end()
        for server_id in ids:
            busy.admin("DELETE", f"/register/{server_id}")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_queues_come_and_go_by_themselves(
    browse_at: Callable[..., Watched], busy: GatewayProcess, cookies: Any, callers: Callers, viewport: dict[str, int]
) -> None:
    """Open pages show them within a second or two, for each model, with advice when places are shared, and nothing afterward."""
    watched, other = (browse_at(busy.url, cookies, viewport=viewport) for _ in range(2))
    watched.open("/dashboard")
    other.open("/models")
    queues = watched.page.locator("#queues")
    assert not queues.is_visible()
    assert other.page.get_by_text("waiting").count() == 0
    for _ in range(3):
        callers.call("crowded")
    callers.call(LONG, KEY)
    callers.call(LONG, KEY)
    queues.get_by_text("3 requests waiting").wait_for()
    lines = [" ".join(line.split()) for line in queues.locator("li").all_text_contents()]
    assert lines[0] == "crowded 2 requests from 1 client 1 of 1 slot in use"
    assert lines[1].startswith(f"{LONG} 1 request from 1 client")
    queues.get_by_text("share one place in the queue").wait_for()
    assert queues.get_by_role("link", name="Give each person a key").get_attribute("href") == "/keys"
    other.page.locator("tr", has_text="crowded").get_by_text("2 requests waiting").wait_for()
    name = "phone" if viewport is PHONE else "desktop"
    check(watched, f"queues-{name}")
    check(other, f"queues-models-{name}")
    callers.end()
    queues.wait_for(state="hidden")
    other.page.get_by_text("waiting").first.wait_for(state="hidden")
    assert other.page.get_by_text("waiting").count() == 0


def send(watched: Watched, text: str = "Hello") -> Any:
    """Send a message in the playground and return the box of its answer."""
    page = watched.page
    number = page.locator(".message-box.assistant").count()
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()
    return page.locator(".message-box.assistant").nth(number)


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_playground_shows_the_place_in_the_queue(
    browse_at: Callable[..., Watched], busy: GatewayProcess, cookies: Any, callers: Callers, viewport: dict[str, int]
) -> None:
    """It counts down as others begin, then says that the model reads the prompt; when the answer comes the badge goes."""
    callers.backend.behave = behaviours.good(events=3)
    busy.chat("crowded")
    callers.backend.behave = callers.gate.held(behaviours.good(events=3))
    watched = browse_at(busy.url, cookies, viewport=viewport)
    watched.open("/playground?model=crowded")
    for _ in range(3):
        callers.call("crowded")
    answer = send(watched)
    badge = answer.locator(".standing")
    badge.get_by_text("Waiting: 3rd of 3, about 5 s").wait_for()
    assert badge.get_attribute("aria-live") == "polite"
    check(watched, f"playground-waits-{'phone' if viewport is PHONE else 'desktop'}")
    gates = [callers.gate, behaviours.Gate(), behaviours.Gate(), behaviours.Gate()]
    for before, following, words in zip(
        gates, gates[1:], ("Waiting: 2nd of 2", "Waiting: 1st of 1", "The model is reading your prompt…"), strict=False
    ):
        callers.backend.behave = following.held(behaviours.good(events=3))
        before.open()
        badge.get_by_text(words).wait_for()
    assert re.search(r"prompt… \d+ s$", badge.text_content() or "")
    gates[-1].open()
    badge.wait_for(state="detached")
    answer.get_by_text("of it in the queue").wait_for()
    answer.get_by_text("1 attempt").wait_for()
    answer.get_by_text("Why this server").wait_for()
    assert answer.locator(".measures a").get_attribute("href").startswith("/server/")


def test_the_playground_says_why_a_wait_was_in_vain(
    browse_at: Callable[..., Watched], busy: GatewayProcess, cookies: Any, callers: Callers
) -> None:
    """The head of the answer has been sent, so the error is an event of the stream; the page shows the gateway's own words."""
    watched = browse_at(busy.url, cookies)
    watched.open("/playground?model=crowded")
    callers.call("crowded")
    answer = send(watched)
    answer.get_by_text("Waiting: 1st of 1").wait_for()
    callers.backend.behave = behaviours.status(400, message="This prompt is too long.")
    callers.gate.open()
    answer.get_by_text("This prompt is too long.").wait_for()
    assert answer.locator(".standing").count() == 0
    assert "failed" in (answer.get_attribute("class") or "")
    watched.troubles.clear()  # the stream ends without its last chunk, as for every error in it


def test_stop_leaves_the_queue(browse_at: Callable[..., Watched], busy: GatewayProcess, cookies: Any, callers: Callers) -> None:
    """A person who no longer wants to wait gives the place back."""
    watched = browse_at(busy.url, cookies)
    watched.open("/playground?model=crowded")
    callers.call("crowded")
    answer = send(watched)
    answer.get_by_text("Waiting: 1st of 1").wait_for()
    watched.page.get_by_role("button", name="Stop").click()
    answer.get_by_text("Stopped before the first token.").wait_for()
    assert answer.locator(".standing").count() == 0
    wait_until(lambda: callers.in_flight() == 1)


WORDS = """async (places) => {
  const { placeWords } = await import(new URL("./standing.js", document.querySelector("script[src*=playground]").src));
  return places.map(([position, waiting, about_seconds]) => placeWords({ position, waiting, about_seconds }));
}"""
READ = """async ([text, size]) => {
  const { pieces } = await import(new URL("./stream.js", document.querySelector("script[src*=playground]").src));
  const bytes = new TextEncoder().encode(text);
  const body = new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
      controller.close();
    },
  });
  const found = [];
  for await (const piece of pieces(body)) found.push(piece);
  return found;
}"""


def test_places_in_words(browse_at: Callable[..., Watched], busy: GatewayProcess, cookies: Any) -> None:
    """English ordinals, and steps of seconds and minutes; no time while none is known."""
    watched = browse_at(busy.url, cookies)
    watched.open("/playground")
    places = [(1, 1, 5), (2, 9, 30), (3, 7, 20), (4, 4, 60), (11, 40, 120), (12, 40, 240), (21, 40, None), (112, 1200, 240)]
    assert watched.page.evaluate(WORDS, places) == [
        "1st of 1, about 5 s",
        "2nd of 9, about 30 s",
        "3rd of 7, about 20 s",
        "4th of 4, about 1 min",
        "11th of 40, about 2 min",
        "12th of 40, about 4 min",
        "21st of 40",
        "112th of 1,200, about 4 min",
    ]


def test_a_stream_is_read_however_it_is_cut(browse_at: Callable[..., Watched], busy: GatewayProcess, cookies: Any) -> None:
    """In pieces of any size, with any line ends; comments count only before the first event, because later ones are a server's."""
    watched = browse_at(busy.url, cookies)
    watched.open("/playground")
    lines = [
        ': queue {"position":1}',
        ": ping",
        ': headers {"a":"ü"}',
        'data: {"n":',
        "data: 1}",
        "",
        ': queue {"position":9}',
        'data: {"n":2}',
        "",
    ]
    for end in ("\n", "\r\n", "\r"):
        text = "".join(f"{line}{end}" for line in lines)
        for size in (1, 2, 3, 7, 1000):
            found = watched.page.evaluate(READ, [text, size])
            assert found == [{"queue": {"position": 1}}, {"headers": {"a": "ü"}}, {"data": {"n": 1}}, {"data": {"n": 2}}], (end, size)
        assert watched.page.evaluate(READ, [f'data: [DONE]{end}{end}data: {{"n":3}}{end}{end}', 1000]) == []
