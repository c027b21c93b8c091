"""The gateway's sweep: what is due is done, and a pause of the process is nobody's fault."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import attrs
import pytest

from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.health import AttemptFailed, AttemptPassed, HealthEvent, ProbePassed
from multiverse_gateway.core.servers import ClientKey, ServerId
from multiverse_gateway.gateway import SWEEP_SECONDS, Gateway
from multiverse_gateway.relay.exchange import Exchange
from support.exchanges import RecordingClient, envelope, sent_by
from support.gateways import Stage, stage

PAUSE_SECONDS = 60.0


@attrs.define(eq=False)
class Deadline:
    """What the sweep sees of an exchange: it notes when it was told that its time is up."""

    due: float
    at_tick: Callable[[], None] = lambda: None
    choice_trace: list[str] | None = None
    request: SimpleNamespace = attrs.Factory(lambda: SimpleNamespace(caller=Caller("someone")))
    response: SimpleNamespace = attrs.Factory(lambda: SimpleNamespace(comments=None))
    number: int = 0
    ticks: list[float] = attrs.Factory(list)

    def postpone(self, seconds: float) -> None:
        """Move the deadline."""
        self.due += seconds

    def tick(self, now: float) -> None:
        """Note the instant; the deadline has passed."""
        self.ticks.append(now)
        self.due += 1000.0
        self.at_tick()

    def interrupt(self) -> None:
        """The gateway ends; nothing is to be done."""


def begin(gateway: Gateway, deadline: Deadline) -> Deadline:
    """Let the gateway watch over this one."""
    gateway.begin(cast(Exchange, deadline))
    return deadline


def sweep(scene: Stage, seconds: float = SWEEP_SECONDS) -> None:
    """Let time pass, then sweep."""
    scene.clock.advance(seconds)
    scene.gateway.sweep(scene.clock.monotonic)


async def test_what_is_due_is_done_at_the_next_sweep() -> None:
    async with stage() as scene:
        first = begin(scene.gateway, Deadline(scene.clock.monotonic + SWEEP_SECONDS))
        later = begin(scene.gateway, Deadline(scene.clock.monotonic + 1.0))
        sweep(scene)
        assert (first.ticks, later.ticks) == ([scene.clock.monotonic], [])


async def test_a_pause_between_two_sweeps_moves_the_deadlines() -> None:
    async with stage() as scene:
        running = begin(scene.gateway, Deadline(scene.clock.monotonic + 1.0))
        sweep(scene, PAUSE_SECONDS)
        assert running.ticks == []
        sweep(scene, 1.0 + SWEEP_SECONDS - 0.6)
        sweep(scene, 0.3)
        sweep(scene, 0.3)
        assert len(running.ticks) == 1


async def test_a_pause_before_the_first_sweep_moves_the_deadlines() -> None:
    """The process may be stopped as soon as a request has come, before the sweeper wakes up."""
    async with stage() as scene:
        scene.clock.advance(30.0)
        running = begin(scene.gateway, Deadline(scene.clock.monotonic + 1.0))
        sweep(scene, PAUSE_SECONDS)
        assert running.ticks == []


@pytest.mark.parametrize("late", [0.0, PAUSE_SECONDS])
async def test_a_pause_during_a_sweep_moves_the_deadlines_of_the_others(late: float) -> None:
    async with stage() as scene:
        now = scene.clock.monotonic
        begin(scene.gateway, Deadline(now, at_tick=lambda: scene.clock.advance(late)))
        running = begin(scene.gateway, Deadline(now + 1.0))
        sweep(scene)
        sweep(scene)
        assert running.ticks == []
        assert running.due == pytest.approx(now + 1.0 + late)


async def test_the_queue_knows_the_slots_of_a_server_at_any_moment() -> None:
    """Also while no request waits: half of a model's slots is what they are now, not what they were at the last sweep."""
    async with stage() as scene:
        server_id = ServerId((await scene.register(max_concurrency=4))["id"])
        generation = scene.gateway.table.routes[server_id].server.generation

        def slots(event: HealthEvent) -> int | None:
            scene.gateway.health_book.report(server_id, event)
            return scene.gateway.room.queue.counts("tiny").slots

        refused = Failure(FailureClass.CONNECT, "refused")
        assert scene.gateway.room.queue.counts("tiny").slots == 4
        assert slots(AttemptFailed(generation, "client", 1, refused, "/v1/chat/completions")) == 0
        assert slots(ProbePassed(generation)) == 1
        assert slots(AttemptPassed(generation, "/v1/chat/completions")) == 4


@pytest.mark.parametrize(("seconds", "bulk"), [(0.0, 0.0), (60.0, 240.0), (900.0, 900.0)])
async def test_bulk_requests_wait_longer_only_where_requests_wait(seconds: float, bulk: float) -> None:
    """`QUEUE_TIMEOUT_SECONDS=0` means that no request waits."""
    async with stage(queue_timeout_seconds=seconds) as scene:
        limits = scene.gateway.limits
        assert (limits.queue_timeout, limits.bulk_queue_timeout) == (seconds, bulk)


async def test_the_waiting_requests_of_a_key_that_expires_end() -> None:
    """Those of other clients keep their places, and so do those of the key while it works."""
    async with stage() as scene:
        gateway = scene.gateway
        server_id = ServerId((await scene.register(max_concurrency=1))["id"])
        gateway.load.started(server_id, "tiny")
        for name, seconds in (("soon", 30.0), ("later", 60.0)):
            key = ClientKey(id=name, name=name, digest=name.encode().hex(), created_at=0.0, expires_at=scene.clock.wall + seconds)
            await gateway.store.save_key(key)
        await gateway.refresh()
        clients = {name: RecordingClient() for name in ("soon", "later", "nobody")}
        exchanges = [Exchange(gateway, sent_by(name, envelope(), gateway.now()), client) for name, client in clients.items()]
        for exchange in exchanges:
            gateway.begin(exchange)
            exchange.start()
        for seconds, statuses in ((29.0, [None, None, None]), (1.0, [401, None, None]), (30.0, [401, 401, None])):
            for _ in range(round(seconds)):
                sweep(scene, 1.0)
            assert [client.status for client in clients.values()] == statuses
        gateway.load.finished(server_id, "tiny", seconds=None, failed=False, first_byte_timeout=1.0)
