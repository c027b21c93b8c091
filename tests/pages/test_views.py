"""What the pages say, as values."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from attrs import evolve

from multiverse_gateway.bodies import EXPORT_FORMAT
from multiverse_gateway.core.health import Blame, Health, HealthState, NextProbe, Rest
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.pages.views import STATES, Tone, chart_of, heartbeat, next_check_words, overview, reason_of
from multiverse_gateway.protocols import ProbeResult
from support.gateways import Stage, stage


def checks(*passed: bool, duration: float = 0.2, **facts: Any) -> list[ProbeResult]:
    """Return checks, the newest first."""
    return [
        ProbeResult(server_id=ServerId("s"), generation=1, passed=good, checked_at=1000.0 - number, duration=duration, **facts)
        for number, good in enumerate(passed)
    ]


def test_every_state_has_a_name_and_a_colour() -> None:
    """In the one place for them."""
    assert set(STATES) == set(HealthState)
    assert len({state.word for state in STATES.values()}) == len(STATES)


def test_a_bar_stands_right_and_names_what_failed() -> None:
    """The newest check is the last stroke."""
    assert heartbeat([]).summary == "No checks yet"
    bar = heartbeat(checks(False, True, True))
    assert bar.summary == "Last 3 checks: 2 passed, 1 failed"
    assert [beat.tone for beat in bar.beats] == [Tone.GOOD, Tone.GOOD, Tone.BAD]
    assert bar.beats[-1].x + 5 == bar.width
    slow = heartbeat(checks(True, duration=1.5))
    assert (slow.beats[0].tone, slow.beats[0].words) == (Tone.WARN, "Slow, but well.")


@pytest.mark.parametrize(("duration", "top"), [(0.004, "10 ms"), (0.3, "500 ms"), (1.2, "2 s"), (90.0, "120 s")])
def test_a_chart_has_a_round_scale(duration: float, top: str) -> None:
    """Which does not jump with every check."""
    chart = chart_of(checks(True, False, duration=duration))
    assert next(words for _, words in chart.ticks) == top
    assert chart.marks[0].height == chart.height
    assert chart.summary == "Response times of the last 2 checks, 1 of them failed."


def test_a_healthy_server_may_have_something_to_say() -> None:
    """That it rests, that others are chosen first and why, or that it does not list its model."""
    health = Health(state=HealthState.HEALTHY, warning="it lists other models")
    assert reason_of(health, 10.0) == "It lists other models."
    assert reason_of(evolve(health, rest=Rest(until=11.0)), 10.0) == "Busy: it asked for a pause."
    assert "chosen first" in (reason_of(evolve(health, blame=Blame(doubted_until=11.0)), 10.0) or "")
    assert "the model" in (reason_of(evolve(health, blame=Blame(lacking_until=11.0)), 10.0) or "")
    assert reason_of(Health(state=HealthState.SUSPECT, reason="it hung up"), 10.0) == "It hung up."
    assert reason_of(Health(state=HealthState.PROBING), 0.0) is None


def test_the_next_check_is_named_roughly() -> None:
    """Or that none comes."""
    assert next_check_words(Health(next_probe=NextProbe(at=10.0)), 10.0) == "is due now"
    assert next_check_words(Health(next_probe=NextProbe(at=100.0)), 10.0) == "comes in about 1 min"
    assert next_check_words(Health(next_probe=NextProbe(at=inf)), 10.0) == "comes only when somebody asks for it"


async def fail(here: Stage, server: dict[str, Any]) -> None:
    """Let a server fail its check."""
    here.probe.failing[server["endpoint_url"]] = "connection refused: is it running?"
    await here.client.post(f"/admin/servers/{server['id']}/health-check")


async def test_the_overall_state_in_words() -> None:
    """From nothing to everything down."""
    async with stage() as here:
        assert overview(here.gateway).headline == "No server is registered yet."
        first = await here.register(model_name="one", endpoint_url="http://a.example")
        assert overview(here.gateway).headline == "The server is up."
        second = await here.register(model_name="one", endpoint_url="http://b.example")
        assert overview(here.gateway).headline == "All 2 servers are up; every model is served."
        await fail(here, first)
        assert overview(here.gateway).headline == "1 of 2 servers is down; every model is served."
        assert overview(here.gateway).tone is Tone.WARN
        await fail(here, second)
        assert overview(here.gateway).headline == "All 2 servers are down; nobody serves one."
        for name in ("three", "two"):
            await fail(here, await here.register(model_name=name, endpoint_url=f"http://{name}.example"))
        assert overview(here.gateway).headline == "All 4 servers are down; nobody serves one, three and 1 more."
        assert overview(here.gateway).tone is Tone.BAD


async def test_servers_that_wait_for_their_first_check_are_not_called_up() -> None:
    """After an import, or a start without verdicts: nothing is known of them."""
    async with stage() as here:
        first = await here.register(model_name="one", endpoint_url="http://a.example")
        second = await here.register(model_name="one", endpoint_url="http://b.example")
        servers = [{"model_name": "two", "endpoint_url": f"http://new{number}.example"} for number in range(2)]
        await here.client.post("/admin/import", json={"format": EXPORT_FORMAT, "servers": servers})
        assert overview(here.gateway).headline == "2 of 4 servers are up; 2 wait for their first check."
        await fail(here, first)
        assert overview(here.gateway).headline == "1 of 4 servers is down; 2 wait for their first check."
        await fail(here, second)
        assert overview(here.gateway).headline == "2 of 4 servers are down; nobody serves one; 2 wait for their first check."
        assert overview(here.gateway).tone is Tone.BAD
        for server in (first, second):
            await here.client.delete(f"/admin/register/{server['id']}")
        assert overview(here.gateway).headline == "All 2 servers wait for their first check."
        assert overview(here.gateway).tone is Tone.IDLE


async def test_the_pages_count_as_the_api_does() -> None:
    """Whatever became of the servers."""
    async with stage() as here:
        servers = [await here.register(model_name=f"m{number}", endpoint_url=f"http://{number}.example") for number in range(3)]
        await here.client.post(
            "/admin/import", json={"format": EXPORT_FORMAT, "servers": [{"model_name": "x", "endpoint_url": "http://x.example"}]}
        )
        await fail(here, servers[0])
        for _ in range(3):
            await fail(here, servers[1])
        found, stats = overview(here.gateway), (await here.client.get("/admin/stats")).json()
        assert (found.servers, found.healthy, found.models) == (stats["total_servers"], stats["healthy_servers"], stats["models"])
        assert found.down == stats["unhealthy_servers"] + stats["inactive_servers"]
