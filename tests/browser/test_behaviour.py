"""How the pages behave when something changes under the reader's hands: new checks, a lost gateway, a limit; and without a mouse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from browser.conftest import PHONE, SETTINGS, Watched, cookies_of_an_operator
from browser.test_every_page import check
from support import behaviours
from support.backends import Backend, list_models
from support.processes import GatewayProcess
from support.sockets import serving

pytestmark = pytest.mark.e2e

FOCUSED = "() => document.activeElement.id"
ON_ONE_LINE = """(cells) => cells.every((cell) => {
    const range = document.createRange();
    range.selectNodeContents(cell);
    return range.getClientRects().length === 1;
})"""


def test_news_take_neither_focus_nor_what_was_unfolded(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """The row under the hand is replaced as its server falls ill, and the hand does not notice."""
    page = browse().page
    with Backend("hana", models=["hand-held"]) as hana:
        server_id = gateway.register("hand-held", hana.url)
        try:
            page.goto(f"{gateway.url}/dashboard?q=hand-held")
            address = page.locator(f"#address-{server_id}")
            address.click()
            page.locator(f"#open-{server_id}").focus()
            hana.behave_models = behaviours.status(500)
            page.locator(f"#row-{server_id}").get_by_text("status 500").wait_for()
            assert page.evaluate(FOCUSED) == f"open-{server_id}"
            assert address.get_attribute("aria-expanded") == "true"
        finally:
            gateway.admin("DELETE", f"/register/{server_id}")


def test_search_filter_and_order_stay_in_the_address(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """Each keeps what the others set, and a reload shows the same."""
    page = browse().page
    page.goto(f"{gateway.url}/dashboard")
    page.get_by_role("link", name="Uptime").click()
    page.wait_for_url("**/dashboard?sort=uptime")
    page.get_by_role("link", name="Uptime").click()
    page.wait_for_url("**/dashboard?sort=uptime&order=desc")
    page.get_by_label("Search").fill("llama")
    page.wait_for_url("**/dashboard?q=llama&sort=uptime&order=desc")
    page.locator("select[name=model]").select_option("llama3.2:3b")
    page.wait_for_url("**/dashboard?q=llama&model=llama3.2%3A3b&sort=uptime&order=desc")
    page.reload()
    assert page.get_by_label("Search").input_value() == "llama"
    assert page.get_by_role("columnheader", name="Uptime").get_attribute("aria-sort") == "descending"
    page.locator("select[name=sort]").select_option("model")
    page.wait_for_url("**/dashboard?q=llama&model=llama3.2%3A3b&sort=model")


def test_a_phone_sorts_either_way(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """There are no heads of columns to press, so the order is chosen beside what it is of; another column starts over."""
    page = browse(viewport=PHONE).page
    page.goto(f"{gateway.url}/dashboard?sort=model")

    def models() -> list[str]:
        found: list[str] = page.locator("tr[data-row] a.model").all_text_contents()
        return found

    before = models()
    assert before == sorted(before)
    assert not page.get_by_label("Order").is_visible()
    page.get_by_text("Filters").click()
    page.get_by_label("Order").select_option("desc")
    page.wait_for_url("**/dashboard?sort=model&order=desc")
    assert models() == sorted(before, reverse=True)
    page.get_by_label("Sort by").select_option("uptime")
    page.wait_for_url("**/dashboard?sort=uptime")
    assert page.get_by_label("Order").input_value() == ""


def test_without_events_an_empty_dashboard_fills_all_the_same(chromium: Any, browse_at: Callable[..., Watched]) -> None:
    """It asks from time to time, disturbs nobody while there is nothing new, and turns back when the last server is removed."""
    with GatewayProcess(SETTINGS) as gateway, Backend("jo", models=["jo"]) as jo:
        watched = browse_at(gateway.url, cookies_of_an_operator(chromium, gateway.url, gateway.admin_key))
        page = watched.page
        page.add_init_script("delete window.SharedWorker")  # requests of a shared worker cannot be aborted here
        page.route("**/live?*", lambda route: route.abort())
        with page.expect_response(lambda answer: "shape=empty" in answer.url) as polled:
            watched.open("/dashboard")
            page.get_by_role("heading", name="Add your first model").wait_for()
            page.locator("#live [data-copy]").first.focus()
        assert polled.value.status == 204
        assert page.evaluate("() => document.activeElement.dataset.copy !== undefined")
        server_id = gateway.register("jo", jo.url)
        page.locator(f"#row-{server_id}").wait_for()
        assert page.get_by_label("Search").is_visible()
        gateway.admin("DELETE", f"/register/{server_id}")
        page.get_by_role("heading", name="Add your first model").wait_for()
        watched.troubles.clear()  # the events that never came


def test_a_connection_test_shows_its_steps_as_they_happen(browse: Callable[..., Watched]) -> None:
    """What passed, what is being tried and what comes later, while the server takes its time; twice, as people do."""
    listing, chat = behaviours.Gate(), behaviours.Gate()
    with Backend("kim", chat.held(), models=["kim"], behave_models=listing.held(list_models)) as kim:
        watched = browse()
        page = watched.page
        watched.open("/register")
        page.get_by_label("Server address").fill(kim.url)
        for _ in range(2):
            page.get_by_role("button", name="Test connection").click()
            page.locator("#test li.busy", has_text="DNS lookup").wait_for()
            assert states(page) == ["busy", *["idle"] * 5]
            listing.open()
            page.locator("#test li.busy", has_text="Test reply").wait_for()
            assert states(page) == [*["good"] * 5, "busy"]
            assert page.locator("#choices button").count() == 0
            assert page.locator("#test").get_attribute("aria-busy") == "true"
            chat.open()
            page.get_by_text("All checks passed.").wait_for()
            assert states(page) == ["good"] * 6
            assert page.locator("#test").get_attribute("aria-busy") is None
            assert page.get_by_label("Model name").input_value() == "kim"
            for gate in (listing, chat):
                gate.close()
            page.locator("#choices").evaluate("(choices) => choices.replaceChildren()")


def test_a_connection_test_that_is_cut_off_ends(chromium: Any, browse_at: Callable[..., Watched]) -> None:
    """No step is under way any more when the gateway is gone in the middle."""
    gate = behaviours.Gate()
    with GatewayProcess(SETTINGS) as gateway, Backend("kim", models=["kim"], behave_models=gate.held(list_models)) as kim:
        watched = browse_at(gateway.url, cookies_of_an_operator(chromium, gateway.url, gateway.admin_key))
        page = watched.page
        watched.open("/register")
        page.get_by_label("Server address").fill(kim.url)
        page.get_by_role("button", name="Test connection").click()
        page.locator("#test li.busy").wait_for()
        gateway.kill()
        page.locator("#offline").wait_for()
        page.get_by_role("button", name="Test connection").wait_for()
        assert states(page) == ["idle"] * 6
        watched.troubles.clear()  # the answer that broke off


def states(page: Any) -> list[str]:
    """Return the states of the steps of a connection test."""
    found: list[str] = page.locator("#test li").evaluate_all("(steps) => steps.map((step) => step.className)")
    return found


@pytest.mark.parametrize("options", [{}, {"viewport": PHONE}], ids=["desktop", "phone"])
def test_the_playground_says_why_this_server(browse: Callable[..., Watched], gateway: GatewayProcess, options: dict[str, Any]) -> None:
    """A table for each attempt: all servers of the model, which was chosen, and what became of the attempt before; names as text."""
    with Backend("lou", behaviours.status(500), models=["why"]) as lou, Backend("mia", models=["why"]) as mia:
        hosts = [backend.url.removeprefix("http://") for backend in (lou, mia)]
        ids = [gateway.register("why", backend.url) for backend in (lou, mia)]
        try:
            watched = browse(**options)
            page = watched.page
            watched.open("/playground?model=why")
            answers = page.locator(".message-box.assistant")
            for number in range(2):  # the servers take turns: one of two questions comes to the one that fails
                page.get_by_label("Your message").fill("Hello")
                page.get_by_role("button", name="Send").click()
                answers.nth(number).locator("summary", has_text="Why this server").wait_for()
                if "2 attempts" in (answers.nth(number).text_content() or ""):
                    break
            answer = answers.last
            answer.get_by_text("2 attempts").wait_for()
            assert not answer.locator("table").first.is_visible()
            answer.get_by_text("Why this server").click()
            heads = answer.locator("table").first.locator("th").all_text_contents()
            assert heads == ["Server", "Verdict", "State", "Running", "Latency", "Score"]
            first, second = answer.locator("tbody").all()
            assert chosen(first) == [hosts[0]]
            assert chosen(second) == [hosts[1]]
            assert sorted(first.locator("td:first-child").all_text_contents()) == sorted(hosts)
            assert answer.locator("td").evaluate_all(ON_ONE_LINE)
            words = answer.locator("details p").all_text_contents()
            assert words[0].startswith(f"Attempt 1: {hosts[0]}, by ")
            assert words[1].startswith(f"{hosts[0]} failed (")
            assert f"Attempt 2: {hosts[1]}, by " in words[1]
            check(watched, f"why-{'phone' if options else 'desktop'}")
        finally:
            for server_id in ids:
                gateway.admin("DELETE", f"/register/{server_id}")


def chosen(table: Any) -> list[str]:
    """Return the servers that a table calls chosen."""
    found: list[str] = table.locator("tr", has=table.page.get_by_text("chosen", exact=True)).locator("td:first-child").all_text_contents()
    return found


def test_a_minute_of_a_bar_says_when_and_what(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """To the mouse and to a finger; the chart of the server says why, too."""
    for options in ({}, {"viewport": PHONE, "has_touch": True}):
        page = browse(**options).page
        page.goto(f"{gateway.url}/dashboard")
        bar = page.locator("svg[data-tones$=b]").last
        bar.wait_for()
        box = bar.bounding_box()
        assert box is not None
        now = {"x": box["width"] - 2, "y": box["height"] / 2}
        if options:
            bar.tap(position=now)
        else:
            bar.hover(position=now)
        page.locator("#tip", has_text="Down").wait_for()
        page.keyboard.press("Escape")
        page.locator("#tip").wait_for(state="hidden")
        page.locator("tr", has=bar).get_by_role("link").first.click()
        stroke = page.locator("rect.bad[data-at]").last
        if options:
            stroke.tap()
        else:
            stroke.hover()
        page.locator("#tip").get_by_text("status 500").wait_for()
        assert " ms" in page.locator("#tip strong").text_content()
        page.keyboard.press("Escape")
        page.locator("#tip").wait_for(state="hidden")


def test_a_lost_gateway_and_a_limit(chromium: Any, browse_at: Callable[..., Watched]) -> None:
    """A banner says so and goes by itself; what was typed stays; a limit counts down and then offers to go on."""
    with GatewayProcess(SETTINGS) as gateway, Backend("iris", models=["iris"]) as iris:
        server_id = gateway.register("iris", iris.url)
        watched = browse_at(gateway.url, cookies_of_an_operator(chromium, gateway.url, gateway.admin_key))
        page, other = watched.page, watched.page.context.new_page()
        banner = page.get_by_text("The gateway cannot be reached.")

        other.goto(f"{gateway.url}/dashboard")
        page.goto(f"{gateway.url}/register")
        page.get_by_role("textbox", name="Owner").fill("keep me")
        gateway.kill()
        other.get_by_text("The gateway cannot be reached.").wait_for()
        page.get_by_role("button", name="Test connection").click()
        banner.wait_for()
        gateway.start()
        banner.wait_for(state="hidden")
        other.get_by_text("The gateway cannot be reached.").wait_for(state="hidden")
        assert page.get_by_role("textbox", name="Owner").input_value() == "keep me"

        page.bring_to_front()
        page.goto(f"{gateway.url}/server/{server_id}")
        limit = page.get_by_text("Too many checks were requested: at most 10 per minute. Try again in")
        for _ in range(12):
            page.get_by_role("button", name="Check now").click()
            page.wait_for_function("() => !document.querySelector('[aria-busy=true]')")
            if limit.count():
                break
        limit.first.wait_for()
        watched.troubles.clear()


def test_the_log_waits_while_it_is_read(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """And goes on when told."""
    page = browse().page
    page.goto(f"{gateway.url}/logs?level=DEBUG")
    page.get_by_role("button", name="Pause").click()
    page.wait_for_function("() => document.getElementById('pause').getAttribute('aria-pressed') === 'true'")
    before = page.locator("#log-rows tr").count()
    gateway.chat("no-such-model")
    page.get_by_role("button", name="Resume").click()
    page.get_by_text("no-such-model").first.wait_for()
    assert page.locator("#log-rows tr").count() >= before


def test_a_changed_form_is_not_left_by_mistake(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """The browser asks before what was typed is lost: not before anything is changed, nor after Cancel, nor once it is saved."""
    page = browse().page
    asked: list[str] = []

    def stay(dialog: Any) -> None:
        asked.append(dialog.type)
        dialog.dismiss()

    page.on("dialog", stay)
    with Backend("noa", models=["left-behind"]) as noa:
        server_id = gateway.register("left-behind", noa.url)
        try:
            page.goto(f"{gateway.url}/server/{server_id}/edit")
            page.get_by_role("link", name="Models").click()
            page.wait_for_url("**/models")
            page.goto(f"{gateway.url}/server/{server_id}/edit")
            page.get_by_label("Description").fill("moved to room 7")
            page.get_by_role("link", name="Models").click()
            page.wait_for_function("() => document.readyState === 'complete'")
            assert asked == ["beforeunload"]
            assert page.get_by_label("Description").input_value() == "moved to room 7"
            page.get_by_role("button", name="Save changes").click()
            page.get_by_role("button", name="Save", exact=True).click()
            page.wait_for_url(f"**/server/{server_id}")
            page.get_by_text("moved to room 7").wait_for()
            page.goto(f"{gateway.url}/server/{server_id}/edit")
            page.get_by_label("Description").fill("something else")
            page.get_by_role("link", name="Cancel").click()
            page.wait_for_url(f"**/server/{server_id}")
            assert asked == ["beforeunload"]
        finally:
            gateway.admin("DELETE", f"/register/{server_id}")


def test_an_operator_makes_a_new_owner_token(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """It is asked for, shown once with a button to copy it, and works in place of the one before it."""
    page = browse().page
    with Backend("ivo", models=["owned"]) as ivo:
        server_id = gateway.register("owned", ivo.url)
        try:
            page.goto(f"{gateway.url}/server/{server_id}")
            page.get_by_role("button", name="New owner token").click()
            page.get_by_text("The current token stops working immediately.").wait_for()
            page.get_by_role("button", name="Create token").click()
            token = page.get_by_role("dialog").locator("#owner-token").text_content() or ""
            assert token.startswith("mvg-owner-")
            assert page.get_by_role("button", name="Copy the owner token").is_visible()
            page.get_by_role("dialog").get_by_role("button", name="Close").click()
            owner = httpx2.get(f"{gateway.url}/admin/servers/{server_id}", headers={"authorization": f"Bearer {token}"}, trust_env=False)
            assert owner.status_code == 200, owner.text
            page.reload()
            assert token not in page.content()
        finally:
            gateway.admin("DELETE", f"/register/{server_id}")


def test_without_a_mouse(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """From the first Tab to a deleted server, and whatever has the focus shows it."""
    watched = browse()
    page = watched.page
    with Backend("jo", models=["by-keyboard"]) as jo:
        watched.open("/register")
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.textContent") == "Skip to the content"
        page.keyboard.press("Enter")
        tab_to(page, "() => document.activeElement.id === 'endpoint_url'")
        page.keyboard.type(jo.url)
        tab_to(page, "() => document.activeElement.textContent.trim() === 'Test connection'")
        page.keyboard.press("Enter")
        page.get_by_text("by-keyboard answers.").wait_for()
        page.wait_for_function("() => document.getElementById('model_name').value === 'by-keyboard'")
        tab_to(page, "() => document.activeElement.textContent.trim() === 'Register'")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="by-keyboard is registered").wait_for()
        assert page.evaluate(FOCUSED) == "registered"
        tab_to(page, "() => document.activeElement.getAttribute('role') === 'tab'")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("() => document.activeElement.textContent") == "Node"
        tab_to(page, "() => document.activeElement.textContent === 'View server'")
        page.keyboard.press("Enter")
        page.wait_for_url("**/server/*")
        tab_to(page, "() => document.activeElement.textContent === 'Delete'")
        page.keyboard.press("Enter")
        page.get_by_role("dialog").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("dialog").wait_for(state="hidden")
        assert page.evaluate("() => document.activeElement.textContent") == "Delete"
        page.keyboard.press("Enter")
        tab_to(page, "() => document.activeElement.matches('dialog button.danger')")
        page.keyboard.press("Enter")
        page.get_by_text("by-keyboard was removed.").wait_for()


def tab_to(page: Any, there: str) -> None:
    """Press Tab until the focus is where it shall be; on the way it is always to be seen."""
    for _ in range(60):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            "() => { const style = getComputedStyle(document.activeElement);"
            " return document.activeElement === document.body || style.outlineStyle !== 'none' || style.boxShadow !== 'none'; }"
        )
        assert seen, page.evaluate("() => document.activeElement.outerHTML")
        if page.evaluate(there):
            return
    raise AssertionError(f"Tab does not lead to {there}")


def test_a_phone_unfolds_its_menu(browse: Callable[..., Watched], gateway: GatewayProcess) -> None:
    """And it leads on."""
    watched = browse(viewport=PHONE)
    page = watched.page
    watched.open("/dashboard")
    assert not page.get_by_role("link", name="Models").is_visible()
    page.get_by_role("button", name="Menu").click()
    page.get_by_role("link", name="Models").click()
    page.wait_for_url("**/models")
    assert page.get_by_role("button", name="Menu").get_attribute("aria-expanded") == "false"


@pytest.mark.parametrize("door", ["true", "false"])
def test_a_browser_reads_why_an_answer_broke_off(chromium: Any, browse_at: Callable[..., Watched], door: str) -> None:
    """The last event of a stream whose server dies is not lost, although the connection ends right after it."""
    backend = Backend("mortal", behaviours.cut_stream(after=2), models=["mortal"])
    read = """async () => {
        const options = {method: "POST", headers: {"content-type": "application/json"},
            body: JSON.stringify({model: "mortal", stream: true, messages: [{role: "user", content: "Hello"}]})};
        const response = await fetch("/v1/chat/completions", options);
        const decoder = new TextDecoder(), reader = response.body.getReader();
        let text = "";
        try {
            for (let piece = await reader.read(); !piece.done; piece = await reader.read()) { text += decoder.decode(piece.value); }
        } catch (error) { text += " cut"; }
        return text;
    }"""
    with GatewayProcess({**SETTINGS, "DIRECT_DOOR": door}) as gateway, serving(backend):
        gateway.register("mortal", backend.url)
        watched = browse_at(gateway.url, cookies_of_an_operator(chromium, gateway.url, gateway.admin_key))
        watched.open("/models")
        texts = [watched.page.evaluate(read) for _ in range(8)]
        watched.troubles.clear()  # the answers that broke off
    assert all("upstream_stream_interrupted" in text and text.endswith(" cut") for text in texts), texts
