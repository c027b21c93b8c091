"""Many tabs of one browser on plain HTTP, where it opens only six connections to a host: they share one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from starlette.responses import Response

from browser.classroom import CLASS, Classroom, talk
from browser.conftest import Watched, cookies_of_an_operator
from browser.test_every_page import check
from multiverse_gateway.pages.live import Streams
from support.sockets import wait_until

pytestmark = pytest.mark.e2e

TABS = ("/dashboard", "/dashboard?q=lab", "/models", "/logs", "/settings", "/keys", "/server/{id}")
HIDE = """(isHidden) => {
    Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Streams]:
    """Return the counters of open streams that pages used, those of one gateway once per stream."""
    found: list[Streams] = []
    response = Streams.response

    def noting(self: Streams, events: Any) -> Response:
        found.append(self)
        return response(self, events)

    monkeypatch.setattr(Streams, "response", noting)
    return found


@pytest.fixture
def room(streams: list[Streams]) -> Iterator[Classroom]:
    """Return a gateway of a class whose model talks for a long time."""
    with Classroom(CLASS[:4]) as classroom:
        yield classroom


def register(room: Classroom) -> None:
    """Register a fifth server."""
    body = {"model_name": "llama3.2:3b", "endpoint_url": room.talker.url}
    answer = httpx2.post(f"{room.url}/admin/register", json=body, headers={"X-API-Key": room.admin_key}, trust_env=False)
    assert answer.status_code == 201, answer.text


def test_eight_tabs_stay_responsive_while_an_answer_streams(
    chromium: Any, browse_at: Callable[..., Watched], room: Classroom, streams: list[Streams]
) -> None:
    """Finding 4: the seventh tab of a browser did not load. All tabs get their changes by one stream, and each can be left at once."""
    room.talker.behave = talk("word " * 2000, interval=0.05)
    watched = browse_at(room.url, cookies_of_an_operator(chromium, room.url, room.admin_key))
    first = watched.page
    watched.open("/test?model=mistral-nemo:12b")
    first.get_by_label("Your message").fill("Talk.")
    first.get_by_role("button", name="Send").click()
    first.locator(".message-box.assistant .text", has_text="word").wait_for(timeout=5000)
    server_id = first.context.request.get(f"{room.url}/admin/servers").json()[0]["id"]
    pages = []
    for path in TABS:
        page = first.context.new_page()
        page.goto(room.url + path.format(id=server_id), wait_until="load", timeout=5000)
        pages.append(page)
    register(room)
    for page in pages:
        page.locator("#counts", has_text="4 of 5").wait_for(timeout=5000)
    assert pages[0].locator("tr[data-row]").count() == 5
    assert streams[0].open == 1
    pages[3].get_by_role("link", name="Dashboard").first.click()
    pages[3].locator("tr[data-row]").first.wait_for(timeout=5000)
    assert "word" in first.locator(".message-box.assistant .text").inner_text()
    assert first.get_by_role("button", name="Stop").is_visible()


@pytest.mark.parametrize("has_worker", [True, False], ids=["shared worker", "no shared worker"])
def test_hidden_tabs_follow_nothing(
    chromium: Any, browse_at: Callable[..., Watched], room: Classroom, streams: list[Streams], has_worker: bool
) -> None:
    """The stream is closed while every tab is hidden, and a tab that is shown again is brought up to date."""
    watched = browse_at(room.url, cookies_of_an_operator(chromium, room.url, room.admin_key))
    page = watched.page
    if not has_worker:
        page.add_init_script("delete window.SharedWorker")
    watched.open("/dashboard")
    wait_until(lambda: bool(streams) and streams[0].open == 1, within=5)
    page.evaluate(HIDE, True)
    wait_until(lambda: streams[0].open == 0, within=5)
    register(room)
    assert page.locator("tr[data-row]").count() == 4
    page.evaluate(HIDE, False)
    page.locator("tr[data-row] >> nth=4").wait_for(timeout=5000)
    page.locator("#counts", has_text="4 of 5").wait_for(timeout=5000)
    assert streams[0].open == 1


def test_the_stream_outlives_the_tab_that_came_first(
    chromium: Any, browse_at: Callable[..., Watched], room: Classroom, streams: list[Streams]
) -> None:
    """The other tabs do not notice when a tab is closed or crashes; what it followed is dropped."""
    watched = browse_at(room.url, cookies_of_an_operator(chromium, room.url, room.admin_key))
    watched.open("/dashboard")
    second, third = watched.page.context.new_page(), watched.page.context.new_page()
    for page in (second, third):
        page.goto(f"{room.url}/dashboard")
    wait_until(lambda: bool(streams) and streams[0].open == 1, within=5)
    watched.page.close()
    with pytest.raises(Exception, match="crash"):
        second.goto("chrome://crash")
    register(room)
    third.locator("tr[data-row] >> nth=4").wait_for(timeout=5000)
    assert streams[0].open == 1


def test_the_end_of_a_session_is_announced_and_loses_nothing(chromium: Any, browse_at: Callable[..., Watched], room: Classroom) -> None:
    """Before, with a way to stay; after, in the words that fit the page; and a form that the browser sends itself keeps what was typed."""
    watched = browse_at(room.url, cookies_of_an_operator(chromium, room.url, room.admin_key))
    page = watched.page
    page.add_init_script("window.now = Date.now; window.later = 0; Date.now = () => window.now.call(Date) + window.later")
    watched.open("/keys")
    answers = {"token": page.evaluate("() => document.querySelector('meta[name=csrf-token]').content"), "seconds_left": 240}
    page.route("**/session", lambda route: route.fulfill(json=answers))
    page.evaluate("() => { window.later = (12 * 3600 - 240) * 1000; }")
    page.get_by_text("Your session ends in 4 min.").wait_for(timeout=8000)
    page.get_by_role("button", name="Stay signed in").click()
    page.get_by_text("You stay signed in.").wait_for()
    assert page.locator("#session-ends").is_hidden()
    page.unroute("**/session")
    cookies = page.context.cookies()
    page.get_by_label("Names").fill("Ada")
    page.context.clear_cookies()
    page.get_by_role("button", name="Create").first.click()
    page.get_by_text("What you typed is still here").wait_for()
    assert page.get_by_label("Names").input_value() == "Ada"
    page.context.add_cookies(cookies)
    page.get_by_role("button", name="I have signed in").click()
    page.get_by_text("Signed in again.").wait_for()
    page.get_by_role("button", name="Create").first.click()
    page.get_by_text("mvg-client-").first.wait_for()
    watched.open("/settings")
    page.context.clear_cookies()
    page.evaluate("() => { window.later += 13 * 3600 * 1000; }")
    page.get_by_text("this page no longer updates").wait_for(timeout=8000)
    page.locator("#signed-out").get_by_role("link", name="Sign in").click()
    page.wait_for_url("**/login?next=%2Fsettings")
    watched.troubles[:] = [trouble for trouble in watched.troubles if "401" not in trouble]


def test_a_projector_shows_the_wall_view_until_its_link_is_revoked(
    chromium: Any, browse_at: Callable[..., Watched], room: Classroom
) -> None:
    """The link is made on the page; its token leaves the address at once; the view is live, and ends within seconds."""
    watched = browse_at(room.url, cookies_of_an_operator(chromium, room.url, room.admin_key))
    page = watched.page
    watched.open("/settings")
    page.get_by_role("link", name="Links to the wall view").click()
    page.get_by_label("Which screen is it for?").fill("Projector in room 204")
    page.get_by_role("button", name="Create link").click()
    link = page.locator("#wall-link").inner_text()
    screen = browse_at(room.url, viewport={"width": 1920, "height": 1080})
    screen.page.goto(link)
    screen.page.get_by_text("1 of 4 servers is down").wait_for()
    assert screen.page.url == f"{room.url}/wall"
    assert screen.page.title().startswith("1 down · ")
    assert "icon-" in (screen.page.locator("#icon").get_attribute("href") or "")
    assert not [name for name in ("lab-3", "ngrok", "Ana", "refused") if name in screen.page.inner_text("body")]
    register(room)
    screen.page.get_by_text("1 of 5 servers is down").wait_for(timeout=5000)
    check(screen, "wall")
    watched.open("/settings/wall-links")
    check(watched, "wall-links")
    page.get_by_role("button", name="Revoke the link of Projector in room 204").click()
    page.get_by_text("no longer works").wait_for()
    screen.page.get_by_label("Link or its token").wait_for(timeout=8000)
    check(screen, "wall-entry")
    screen.troubles[:] = [trouble for trouble in screen.troubles if "401" not in trouble]
