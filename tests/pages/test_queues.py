"""What the pages show of requests that wait: by model, to operators and visitors, and nothing while none does."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import httpx2

from multiverse_gateway.pages.model_rows import id_of
from multiverse_gateway.pages.views import NO_QUEUES, Queue, Queues
from support import behaviours
from support.backends import Backend
from support.pages import Browser, browsing

KEYS = ("a-key-of-the-first-client-000001", "a-key-of-the-second-client-00001")
MODEL = "tiny"


@asynccontextmanager
async def crowded(keys: Sequence[str | None]) -> AsyncIterator[Browser]:
    """Run a gateway whose only server, of one slot, is busy with the first of these clients' requests; the others wait."""
    gate = behaviours.Gate()
    scene = browsing(allow_private_networks="127.0.0.0/8", client_api_keys=KEYS, public_dashboard=True)
    with Backend("busy", models=[MODEL]) as server:
        async with scene as browser, anyio.create_task_group() as group:
            await browser.register(model_name=MODEL, endpoint_url=server.url, max_concurrency=1)
            server.behave = gate.held(behaviours.good())
            gateway = browser.parts.gateway
            for number, key in enumerate(keys):
                group.start_soon(ask, browser, key)
                while gateway.room.queue.waiting(MODEL) < number or not gateway.load.total:  # noqa: ASYNC110  the gateway has no event for it
                    await anyio.sleep(0.01)
            yield browser
            gate.open()


async def ask(browser: Browser, key: str | None) -> None:
    """Send a request and wait for its answer."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    assert (await browser.client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200


def words_of(page: httpx2.Response, element: str) -> str:
    """Return the text of an element that has an id."""
    found = re.search(rf'<(\w+) id="{element}".*?</\1>', page.text, re.DOTALL)
    assert found, page.text
    return " ".join(re.sub(r"<[^>]*>", " ", found[0]).split())


async def test_the_queues_are_shown_to_operators_and_visitors() -> None:
    """How many requests of how many clients wait for which model, and how many of its slots are in use; with keys there is no advice."""
    async with crowded([KEYS[0], KEYS[0], KEYS[0], KEYS[1]]) as browser:
        for signed_in in (False, True):
            if signed_in:
                await browser.sign_in()
            page = await browser.open("/dashboard")
            assert words_of(page, "queues") == "3 requests waiting tiny 3 requests from 2 clients 1 of 1 slot in use"
            assert "3 requests waiting" in words_of(await browser.open("/models"), f"model-{id_of('tiny')}")
            fragment = await browser.open("/dashboard?sort=model", hx_request="true", hx_target="live")
            assert "3 requests from 2 clients" in fragment.text, "browsers without events poll"


async def test_a_shared_place_is_explained() -> None:
    """Two waiting requests without a key that come from one address share a place: operators are sent to the keys, visitors to theirs."""
    async with crowded([KEYS[0], KEYS[0], None, None]) as browser:
        visitors = words_of(await browser.open("/dashboard"), "queues")
        assert "Requests without a key share one place in the queue" in visitors
        assert visitors.endswith("Send a key of your own with your requests.")
        await browser.sign_in()
        page = await browser.open("/dashboard")
        assert words_of(page, "queues").endswith("Give each person a key to share the servers fairly.")
        assert 'href="/keys">Give each person a key' in page.text


async def test_one_request_without_a_key_shares_nothing() -> None:
    """So nothing is advised."""
    async with crowded([KEYS[0], KEYS[0], None]) as browser:
        assert words_of(await browser.open("/dashboard"), "queues").startswith("2 requests waiting tiny")
        assert "share one place" not in (await browser.open("/dashboard")).text


async def test_without_waiting_requests_nothing_is_said() -> None:
    """Neither a heading nor a count of zero."""
    async with crowded([KEYS[0]]) as browser:
        page = await browser.open("/dashboard")
        assert words_of(page, "queues") == ""
        assert re.search(r'id="queues"[^>]* hidden', page.text)
        models = await browser.open("/models")
        assert "waiting" not in words_of(models, f"model-{id_of('tiny')}")


def test_queues_are_found_by_model() -> None:
    """And summed up."""
    queue = Queue(model="a", waiting=2, clients=1, running=1, slots=None)
    queues = Queues(models=(queue, Queue(model="b", waiting=1, clients=1, running=1, slots=4)))
    assert (queues.waiting, queues.of("a"), queues.of("c")) == (3, queue, None)
    assert NO_QUEUES.waiting == 0
