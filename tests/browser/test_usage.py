"""The page about usage in a real browser: filtering by keyboard, sorting, the CSV, and all of it without scripts."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser.classroom import CLASS, Classroom
from browser.conftest import PHONE, Watched, cookies_of_an_operator

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def room() -> Iterator[Classroom]:
    """Return a class that has used its models for a month."""
    with Classroom(CLASS) as room:
        yield room


def table(page: Any) -> list[list[str]]:
    """Return the cells of the table as they are shown."""
    rows: list[list[str]] = page.locator("table.usage-table tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.querySelector('a')?.textContent ?? cell.textContent))"
    )
    return rows


def test_usage_is_filtered_by_keyboard_and_saved_as_shown(chromium: Any, browse_at: Callable[..., Watched], room: Classroom) -> None:
    """The address follows, the focus stays, and the file is the table."""
    watched = browse_at(room.url, cookies_of_an_operator(chromium, room.url, room.admin_key))
    page = watched.page
    watched.open("/dashboard")
    page.get_by_role("link", name="Show usage").click()
    page.get_by_role("heading", name="Usage", level=1).wait_for()
    everything = table(page)
    page.get_by_label("Days").focus()
    page.keyboard.type("Last 7")
    page.wait_for_url("**/usage?range=7")
    assert page.evaluate("() => document.activeElement.id") == "range"
    fewer = table(page)
    assert len(fewer) == len(everything)
    assert int(fewer[0][1].replace(",", "")) < int(everything[0][1].replace(",", ""))
    page.locator("#filter-model").select_option("llama3.2:3b")
    page.wait_for_url("**/usage?range=7&model=llama3.2%3A3b")
    page.get_by_role("columnheader", name="Key").get_by_role("link").press("Enter")
    page.wait_for_url("**&sort=name")
    shown = table(page)
    assert [row[0] for row in shown] == sorted((row[0] for row in shown), key=str.casefold)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download CSV").click()
    saved = list(csv.reader(io.StringIO(Path(download.value.path()).read_text("utf-8-sig"), newline="")))
    assert [[row[0], *(f"{int(count):,}" for count in row[2:])] for row in saved[1:]] == shown
    page.get_by_role("link", name="By day").click()
    assert page.get_by_role("img", name="Requests per day:").count() == 1
    assert len(table(page)) == 7
    page.go_back()
    assert table(page) == shown


def test_usage_works_without_scripts(chromium: Any, browse_at: Callable[..., Watched], room: Classroom) -> None:
    """On a phone: a custom range shows its dates, and a button applies the form."""
    cookies = cookies_of_an_operator(chromium, room.url, room.admin_key)
    page = browse_at(room.url, cookies, viewport=PHONE, java_script_enabled=False).page
    page.goto(f"{room.url}/usage")
    assert not page.locator("#since").is_visible()
    page.get_by_label("Days").select_option("custom")
    assert page.locator("#since").is_visible()
    last = page.locator("#until").input_value()
    page.locator("#since").fill(last)
    page.get_by_role("button", name="Show").click()
    assert f"since={last}&until={last}" in page.url
    assert page.locator("table.usage-table tbody tr").count() > 0
    assert page.locator(".usage-chart").count() == 0
