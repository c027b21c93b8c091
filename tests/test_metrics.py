"""What the meter makes of waits: histograms by model and band, an index of fairness, and nothing for a request that does not wait."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from multiverse_gateway.core import waits
from multiverse_gateway.core.fairness import Band, Flow
from multiverse_gateway.observability.metrics import OTHER, WAIT_BOUNDS, Gauges, Meter, exposition
from support.backends import Backend
from support.pages import browsing

CHAT: dict[str, Any] = {"model": "llama3.2:3b", "messages": [{"role": "user", "content": "hi"}]}


def text_of(meter: Meter, waiting: dict[tuple[str, Band], int] | None = None) -> str:
    """Return the figures as Prometheus reads them."""
    gauges = Gauges(
        at=100.0,
        requests=0,
        waiting=waiting or {},
        servers=[],
        body_bytes=0,
        answer_bytes=0,
        waiting_retries=0,
        is_shedding=False,
        tasks=0,
    )
    return exposition(meter, gauges).decode()


def test_waits_are_counted_by_model_and_band() -> None:
    """Each in its bucket; the index is over clients, and no client is named."""
    meter = Meter()
    for client, band, seconds in (("key-1", Band.INTERACTIVE, 3.0), ("key-2", Band.INTERACTIVE, 3.0), ("key-3", Band.BULK, 200.0)):
        meter.wait("llama", Flow(client, band), seconds, now=90.0)
    text = text_of(meter, {("llama", Band.BULK): 2})
    for line in (
        'multiverse_queue_wait_seconds_bucket{band="interactive",le="2.5",model="llama"} 0.0',
        'multiverse_queue_wait_seconds_bucket{band="interactive",le="5.0",model="llama"} 2.0',
        'multiverse_queue_wait_seconds_sum{band="interactive",model="llama"} 6.0',
        'multiverse_queue_wait_seconds_bucket{band="bulk",le="240.0",model="llama"} 1.0',
        'multiverse_queue_fairness{band="interactive",model="llama"} 1.0',
        'multiverse_requests_waiting{band="bulk",model="llama"} 2.0',
    ):
        assert line in text, line
    assert "key-" not in text


def test_the_longest_wait_that_is_allowed_by_default_has_a_bucket() -> None:
    """A bulk request may wait for 240 s."""
    assert WAIT_BOUNDS[-1] == 240.0


def test_a_model_that_is_removed_leaves_the_figures() -> None:
    """Its waits too, though the window is not over."""
    meter = Meter()
    meter.wait("gone", Flow("ada"), 3.0, now=90.0)
    meter.wait(OTHER, Flow("ada"), 3.0, now=90.0)
    meter.forget(set(), {})
    text = text_of(meter)
    assert "gone" not in text
    assert f'multiverse_queue_fairness{{band="interactive",model="{OTHER}"}} 1.0' in text


async def test_a_request_that_does_not_wait_is_not_noted() -> None:
    """Nothing of the waits' code runs for it."""
    ran: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and (code.co_filename == waits.__file__ or code is Meter.wait.__code__):
            ran.add(code.co_qualname)

    with Backend("only", models=[CHAT["model"]]) as server:
        async with browsing(allow_private_networks="127.0.0.0/8") as browser:
            await browser.register(model_name=CHAT["model"], endpoint_url=server.url, max_concurrency=1)
            sys.setprofile(note)
            try:
                for _ in range(20):
                    assert (await browser.client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            finally:
                sys.setprofile(None)
            assert not ran
            text = (await browser.client.get("/metrics")).text
            assert "multiverse_queue_wait_seconds_count" not in text
