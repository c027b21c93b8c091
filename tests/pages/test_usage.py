"""The page about usage, its CSV, and what leads there; without a browser."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import date, timedelta
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.usage import Counts, Usage, UsageKey
from multiverse_gateway.core.usage_tables import UsageBar
from multiverse_gateway.observability.logging import configure
from multiverse_gateway.pages.usage_page import BYTE_ORDER_MARK, chart_of
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.sqlite import SqliteStore
from multiverse_gateway.testing.store import make_key
from support.pages import Browser
from support.pages import browsing as pages_of

TODAY = "2026-05-28"
YESTERDAY = "2026-05-27"
NOW = 1_780_000_000.0


@asynccontextmanager
async def browsing(**given: Any) -> AsyncIterator[Browser]:
    """Run the pages on a day that is always the same."""
    async with pages_of(**given) as browser:
        browser.parts.gateway.wall = lambda: NOW
        yield browser


async def used(browser: Browser, *rows: tuple[str, str, str, str], counts: Counts | None = None) -> None:
    """Save usage by day, client, model and owner."""
    counts = counts or Counts(requests=10, failed=2, canceled=1, prompt_tokens=700, completion_tokens=300)
    usage = [Usage(key=UsageKey(day, model, ServerId("s1"), owner, client), counts=counts) for day, client, model, owner in rows]
    await browser.parts.gateway.store.add_usage(f"batch {time.monotonic_ns()}", usage)


async def key_of(browser: Browser, name: str) -> str:
    """Save a client key and return its id."""
    key = make_key(name, digest=hashlib.sha256(name.encode()).hexdigest())
    await browser.parts.gateway.store.save_key(key)
    await browser.parts.gateway.refresh()
    return key.id


def names_in(page: str) -> list[str]:
    """Return the names of the table's rows."""
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    return [unescape(name) for name in re.findall(r'<td data-label="\w+"><a [^>]*><bdi>([^<]*)</bdi></a>', body)]


def link_to(page: str, words: str) -> str:
    """Return where the first link with these words leads."""
    found = re.search(rf'<a [^>]*href="([^"]*)"[^>]*>(?:<bdi>)?{re.escape(words)}', page)
    assert found, words
    return unescape(found[1])


async def test_usage_is_for_operators() -> None:
    """Visitors of a public dashboard see nothing of it."""
    async with browsing(public_dashboard=True) as browser:
        await browser.register()
        await used(browser, (TODAY, "k1", "tiny", "bob"))
        for path in ("/usage", "/usage/table.csv"):
            assert (await browser.open(path)).status_code == 303
        assert "Usage" not in (await browser.open("/dashboard")).text


async def test_without_requests_the_page_says_so() -> None:
    """Nothing was used yet, or nothing matches the filters, and a link leads back."""
    async with browsing() as browser:
        await browser.sign_in()
        assert "No requests yet." in (await browser.open("/usage")).text
        page = (await browser.open("/usage?model=nothing")).text
        assert "No requests match." in page
        assert link_to(page, "Show the last 30 days") == "/usage"
        answer = await browser.open("/usage/table.csv")
        assert answer.content.decode() == f"{BYTE_ORDER_MARK}key,key_id,requests,failed,canceled,prompt_tokens,completion_tokens\r\n"


async def test_rows_lead_from_key_to_model_to_day() -> None:
    """Each name leads to what its row consists of, with the filters so far; totals and table agree."""
    async with browsing() as browser:
        key = await key_of(browser, "Jürgen & 李明")
        await used(browser, (TODAY, key, "tiny", "bob"), (YESTERDAY, key, "large", ""), (TODAY, "", "tiny", "bob"))
        await browser.sign_in()
        page = (await browser.open("/usage")).text
        assert names_in(page) == ["Jürgen & 李明", "No key"]
        assert page.count("<dd>30</dd>") == 1
        assert "2,100" in page
        by_model = link_to(page, "Jürgen")
        assert by_model == f"/usage?by=model&{urlencode({'client': key})}"
        page = (await browser.open(by_model)).text
        assert names_in(page) == ["large", "tiny"]
        assert link_to(page, "Log of this key").startswith("/logs?client=")
        page = (await browser.open(link_to(page, "By day"))).text
        assert names_in(page) == [TODAY, YESTERDAY]
        page = (await browser.open(link_to(page, YESTERDAY))).text
        assert names_in(page) == ["Jürgen & 李明"]
        assert f'value="{YESTERDAY}"' in page
        page = (await browser.open("/usage?by=owner&client=-")).text
        assert names_in(page) == ["bob"]
        assert names_in((await browser.open("/usage?by=owner")).text) == ["bob", "No owner"]
        assert names_in((await browser.open("/usage?by=model&owner=-")).text) == ["large"]


async def test_columns_sort_by_links() -> None:
    """The head says how the table is sorted, for every reader."""
    async with browsing() as browser:
        await used(browser, (TODAY, "a", "tiny", ""))
        await used(browser, (TODAY, "b", "tiny", ""), counts=Counts(requests=1, failed=1, completion_tokens=900))
        await browser.sign_in()
        page = (await browser.open("/usage")).text
        assert names_in(page) == ["a", "b"]
        assert page.count('aria-sort="descending"') == 1
        page = (await browser.open(link_to(page, "Completion tokens"))).text
        assert names_in(page) == ["b", "a"]
        page = (await browser.open(link_to(page, "Completion tokens"))).text
        assert (names_in(page), page.count('aria-sort="ascending"')) == (["a", "b"], 1)


async def test_the_csv_is_the_table() -> None:
    """The same rows in the same order with the same figures, in UTF-8; no name is a formula."""
    async with browsing() as browser:
        for name in ("=1+1", "Jürgen Müller", "a;=2+2"):
            await used(browser, (TODAY, await key_of(browser, name), "tiny", ""))
        await browser.sign_in()
        page = (await browser.open("/usage?range=7&sort=name&order=desc")).text
        answer = await browser.open(link_to(page, "Download CSV"))
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        assert answer.headers["content-disposition"] == 'attachment; filename="usage-by-key-2026-05-22-2026-05-28.csv"'
        rows = list(csv.DictReader(io.StringIO(answer.content.decode("utf-8-sig"), newline="")))
        assert [row["key"].removeprefix("'") for row in rows] == names_in(page) == ["Jürgen Müller", "a;=2+2", "=1+1"]
        assert rows[2]["key"] == "'=1+1"
        assert [rows[0][name] for name in ("requests", "failed", "canceled", "prompt_tokens", "completion_tokens")] == [
            "10", "2", "1", "700", "300",
        ]  # fmt: skip


async def test_names_of_strangers_are_texts() -> None:
    """In the table, the top five, the filters and the chart."""
    async with browsing() as browser:
        nasty = "<script>alert(1)</script>"
        await used(browser, (TODAY, await key_of(browser, nasty), nasty, nasty), (YESTERDAY, nasty, nasty, nasty))
        await browser.sign_in()
        for path in ("/usage", "/usage?by=model", "/usage?by=owner", "/usage?server=%3Cscript%3E", f"/usage?client={nasty}&model={nasty}"):
            assert "<script>" not in (await browser.open(path)).text, path


async def test_keys_of_equal_names_are_told_apart() -> None:
    """A name may be given again once its key is revoked; the keys in the settings, and the pages, have names of their own."""
    async with browsing() as browser:
        store = browser.parts.gateway.store
        for number in (1, 2):
            await store.save_key(make_key("alice", id=f"{number}0000000-1111", digest=f"{number}" * 64))
        await browser.parts.gateway.refresh()
        for client in ("10000000-1111", "20000000-1111", "setting:1a2b3c4d", "operator", "gone"):
            await used(browser, (TODAY, client, "tiny", ""))
        await browser.sign_in()
        page = (await browser.open("/usage?sort=name")).text
        assert names_in(page) == ["alice", "alice", "gone", "Key in CLIENT_API_KEYS (1a2b3c4d)", "These pages (operator)"]
        assert page.count('<span class="muted">10000000</span>') == 2  # in the table, and in the top five


async def test_usage_that_cannot_be_read_is_said() -> None:
    """With status 503, and the rest of the page."""
    async with browsing() as browser:
        await browser.register()
        await browser.sign_in()

        async def fail(*_: object, **__: object) -> None:
            raise StorageUnavailable("The database does not answer")

        browser.parts.gateway.store.sum_usage = fail  # type: ignore[method-assign, assignment]
        page = await browser.open("/usage")
        assert (page.status_code, "The database does not answer" in page.text) == (503, True)
        assert (await browser.open("/usage/table.csv")).status_code == 503
        assert "Usage, last 30 days" not in (await browser.open("/dashboard")).text


async def test_other_pages_sum_up_and_lead_here() -> None:
    """The dashboard for all servers, each server's page for that one."""
    async with browsing() as browser:
        server_id = await browser.register()
        key = UsageKey(TODAY, "tiny", ServerId(server_id))
        counts = Counts(requests=1234, failed=3, canceled=2, prompt_tokens=5678, completion_tokens=9)
        await browser.parts.gateway.store.add_usage("batch", [Usage(key=key, counts=counts)])
        await browser.sign_in()
        for path, target in (("/dashboard", "/usage"), (f"/server/{server_id}", f"/usage?by=day&server={server_id}")):
            page = (await browser.open(path)).text
            assert "1,234 requests (3 failed, 2 canceled), 5,678 prompt + 9 completion tokens." in page, path
            assert link_to(page, "Show usage") == target
        page = (await browser.open(f"/usage?by=day&server={server_id}")).text
        assert names_in(page) == [TODAY]
        assert link_to(page, "Show all servers") == "/usage?by=day"


async def test_a_filter_replaces_the_address() -> None:
    """A form sends empty fields, too: the address that is shown has none."""
    async with browsing() as browser:
        await browser.sign_in()
        page = await browser.open("/usage?range=7&client=&model=&owner=&since=2026-05-01", hx_request="true")
        assert page.headers["hx-replace-url"] == "/usage?range=7"


async def test_links_work_below_a_path() -> None:
    """As all links of the pages do."""
    async with browsing(prefix="/mounted", root_path="/ai") as browser:
        await used(browser, (TODAY, "a", "tiny", ""))
        await browser.sign_in()
        page = (await browser.open("/usage")).text
        assert link_to(page, "Download CSV") == "/ai/mounted/usage/table.csv"
        assert link_to(page, "a</bdi>") == "/ai/mounted/usage?by=model&client=a"


def test_a_chart_says_what_it_shows() -> None:
    """In words: each bar, and the whole; a bar that is not empty can be seen."""
    bars = [UsageBar(label=f"2026-05-{day:02}", counts=Counts()) for day in range(1, 4)]
    bars[1] = UsageBar(label="2026-05-02", counts=Counts(requests=4000, failed=1, canceled=2000))
    chart = chart_of(bars)
    assert chart.summary.startswith("Requests per day: 4,000 requests (1 failed, 2,000 canceled) from 1 May 2026 to 3 May 2026")
    assert (chart.ticks, chart.width, len(chart.bars)) == (("5,000", "0"), 28, 1)
    (bar,) = chart.bars
    assert bar.words == "2 May 2026: 4,000 requests (1 failed, 2,000 canceled)"
    assert [(piece.tone, piece.height) for piece in bar.pieces] == [("good", 64.0), ("idle", 64.0), ("bad", 1.0)]
    assert chart_of([UsageBar(label="2026-05", counts=Counts(requests=1))]).title == "Requests per month"


# The log


@pytest.fixture
def logged() -> Iterator[None]:
    """Log into memory."""
    logs = configure(Settings(log_level="INFO"), outputs=False)
    yield
    logs.close()


async def test_the_log_can_be_filtered_by_key(logged: None) -> None:
    """The page offers the keys, and each record leads to the usage of its key."""
    async with browsing() as browser:
        key = await key_of(browser, "alice")
        log = logging.getLogger("multiverse_gateway.routing")
        for client in (key, "another"):
            log.info("request finished", extra={"fields": {"model": f"model of {client}", "client": client}})
        await browser.sign_in()
        page = (await browser.open("/logs")).text
        assert f"model of {key}" in page
        assert "model of another" in page
        assert f'<option value="{key}">alice</option>' in page
        assert link_to(page, "alice") == f"/usage?client={key.replace(' ', '%20')}"
        page = (await browser.open(f"/logs?client={key}")).text
        assert f"model of {key}" in page
        assert "model of another" not in page
        assert "client=id+of+alice" in page  # also live
        assert '<option value="gone" selected>gone</option>' in (await browser.open("/logs?client=gone")).text


# A large class


async def test_a_large_class_is_summed_by_the_database(tmp_path: Path) -> None:
    """Of 40 keys, 10 models and 30 days the page reads sums, not rows."""
    store = SqliteStore(tmp_path / "registry.db")
    await store.open()
    first = date.fromisoformat(TODAY)
    keys = [f"key {number}" for number in range(40)]
    for day in range(30):
        at = (first - timedelta(days=day)).isoformat()
        rows = [
            Usage(key=UsageKey(at, f"model {model}", ServerId("s"), "", key), counts=Counts(requests=1))
            for key in keys
            for model in range(10)
        ]
        await store.add_usage(at, rows)
    sums = await store.sum_usage("2026-04-29", TODAY, by=["client"], only={})
    assert [(row.key.client, row.counts.requests) for row in sums] == [(key, 300) for key in sorted(keys)]
    (by_model,) = await store.sum_usage("2026-04-29", TODAY, by=["model"], only={"client": ["key 7"], "model": ["model 3"]})
    assert by_model.counts.requests == 30
    await store.aclose()


async def test_a_model_and_a_key_lead_to_their_usage() -> None:
    """From the pages about them, for operators."""
    async with browsing(public_dashboard=True) as browser:
        await browser.register()
        assert 'href="/usage' not in (await browser.open("/models")).text
        key = await key_of(browser, "alice")
        await used(browser, (TODAY, key, "tiny", ""))
        await browser.sign_in()
        page = (await browser.open("/models")).text
        assert 'href="/usage?model=tiny"' in page
        page = (await browser.open("/keys")).text
        assert unescape(link_to(page, "10 requests")) == f"/usage?by=model&client={key.replace(' ', '%20')}"
        page = (await browser.open(f"/keys/{key}")).text
        assert link_to(page, "Log</a>") == f"/logs?client={key.replace(' ', '%20')}"
