"""The ASGI door: what leaves through `send`, and what a client that leaves or stalls does to its exchange."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import attrs
import pytest

from multiverse_gateway.core.failover import FailureClass
from multiverse_gateway.core.sse import DONE_EVENT
from multiverse_gateway.relay.asgi import HIGH_WATER, AsgiClient, Message, answer
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.ports import Phase
from support.answers import chat_event
from support.exchanges import JSON, MODEL, SPEECH, RecordingEngine, server

ONE = chat_event("one", MODEL, {"content": "Hello"})
LAST = chat_event("one", MODEL, {}, finish="stop")
BIG = chat_event("one", MODEL, {"content": "x" * HIGH_WATER})
LONG = 3600.0


@attrs.define(eq=False)
class HttpServer:
    """The server below the door: it takes messages while its gate is open."""

    sent: list[Message] = attrs.field(factory=list)
    gate: anyio.Event = attrs.field(factory=anyio.Event)
    offered: int = 0
    """How many messages the door has tried to send."""
    error: Exception | None = None
    keeps_cancellations: bool = False
    """Whether it returns as if nothing had been, as hypercorn does while it closes a connection."""
    _left: anyio.Event = attrs.field(factory=anyio.Event)
    _changed: asyncio.Condition = attrs.field(factory=asyncio.Condition)
    _received: int = 0

    async def receive(self) -> Message:
        """Send a stray message first, then wait for the client to leave."""
        self._received += 1
        if self._received == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message when the gate is open."""
        self.offered += 1
        await self._tell()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            if not self.keeps_cancellations:
                raise
        if self.error is not None:
            raise self.error
        self.sent.append(message)
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds that a message changes."""
        with anyio.fail_after(10):
            async with self._changed:
                await self._changed.wait_for(holds)

    def leave(self) -> None:
        """Let the client leave."""
        self._left.set()

    def shut(self) -> None:
        """Take nothing more until `gate` is set."""
        self.gate = anyio.Event()

    @property
    def data(self) -> bytes:
        """The body so far."""
        return b"".join(message["body"] for message in self.sent if message["type"] == "http.response.body")

    @property
    def more(self) -> list[bool]:
        """What each body message said of more to come."""
        return [message["more_body"] for message in self.sent if message["type"] == "http.response.body"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        """The headers of the head."""
        return dict(self.sent[0]["headers"])


@attrs.define(eq=False)
class Door:
    """One request at the door."""

    http: HttpServer
    stage: RecordingEngine
    exchange: Exchange
    scope: anyio.CancelScope
    errors: list[Exception] = attrs.field(factory=list)


@asynccontextmanager
async def door(
    *, write_timeout: float = LONG, version: str = "1.1", cap: int | None = None, is_open: bool = True, **fields: Any
) -> AsyncIterator[Door]:
    """Let one request be answered; when the block is left, the answer must come to its end by itself."""
    stage = RecordingEngine([server("a", cap=cap), server("b", cap=cap, registered_at=1)])
    http = HttpServer()
    if is_open:
        http.gate.set()
    client = AsgiClient()
    exchange = stage.exchange(client, **fields)
    scope = {"type": "http", "http_version": version}
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            it = Door(http, stage, exchange, group.cancel_scope)

            async def run() -> None:
                try:
                    await answer(client, exchange, scope, http.receive, http.send, write_timeout=write_timeout)
                except Exception as error:
                    it.errors.append(error)

            group.start_soon(run)
            await anyio.wait_all_tasks_blocked()
            yield it
    assert exchange.phase in (Phase.OVER, Phase.DRAINING)
    assert stage.load.total == 0
    assert stage.room.queue.waiting(MODEL) == 0


async def test_a_plain_answer_has_its_length() -> None:
    async with door() as it:
        it.stage.last.answer(body=b'{"a":1}')
    assert [message["type"] for message in it.http.sent] == ["http.response.start", "http.response.body"]
    assert it.http.sent[0]["status"] == 200
    assert it.http.headers[b"content-length"] == b"7"
    assert (it.http.data, it.http.more) == (b'{"a":1}', [False])


async def test_a_refusal_needs_no_server() -> None:
    async with door(model="other") as it:
        pass
    assert (it.http.sent[0]["status"], it.http.more) == (404, [False])
    assert int(it.http.headers[b"content-length"]) == len(it.http.data)


async def test_events_leave_as_they_come() -> None:
    async with door(stream=True) as it:
        it.stage.last.stream(ONE)
        await it.http.until(lambda: it.http.data == ONE)
        assert b"content-length" not in it.http.headers
        it.stage.last.body(LAST + DONE_EVENT)
    assert (it.http.data, it.http.more) == (ONE + LAST + DONE_EVENT, [True, False])


async def test_what_comes_while_the_head_is_on_its_way_leaves_at_once_after_it() -> None:
    """In one piece; being woken for it again sends nothing."""
    async with door(stream=True, is_open=False) as it:
        it.stage.last.stream(ONE)
        await it.http.until(lambda: it.http.offered == 1)
        it.stage.last.body(LAST)
        it.http.gate.set()
        await it.http.until(lambda: bool(it.http.data))
        await anyio.wait_all_tasks_blocked()
        assert (it.http.data, it.http.more) == (ONE + LAST, [True])
        it.stage.last.body(DONE_EVENT)
    assert it.http.more == [True, False]


async def test_an_end_without_a_last_piece_is_sent() -> None:
    async with door(path=SPEECH) as it:
        it.stage.last.head()
        it.stage.last.body(b"x")
        await it.http.until(lambda: it.http.data == b"x")
        it.stage.last.end()
    assert (it.http.data, it.http.more) == (b"x", [True, False])


@pytest.mark.parametrize(("version", "more"), [("1.0", [True, True]), ("1.1", [True, True]), ("2", [True, False]), ("3", [True, False])])
async def test_a_broken_stream_is_left_unfinished_where_that_can_be_seen(version: str, more: list[bool]) -> None:
    """HTTP/1 closes without the last chunk; HTTP/2 cannot, and ends the stream after the error event."""
    async with door(stream=True, version=version) as it:
        it.stage.last.stream(ONE)
        await it.http.until(lambda: it.http.data == ONE)
        it.stage.last.fail(FailureClass.BROKEN)
    assert it.http.data.startswith(ONE + b'data: {"error":')
    assert it.http.more == more


@pytest.mark.parametrize(("version", "more"), [("1.1", [True]), ("2", [True, False])])
async def test_a_broken_raw_answer_is_too(version: str, more: list[bool]) -> None:
    async with door(path=SPEECH, version=version) as it:
        it.stage.last.head()
        it.stage.last.body(b"x")
        await it.http.until(lambda: it.http.data == b"x")
        it.stage.last.fail(FailureClass.BROKEN)
    assert (it.http.data, it.http.more) == (b"x", more)


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.TRYING, Phase.BACKOFF, Phase.RELAYING])
@pytest.mark.parametrize("how", ["leaves", "is cancelled"])
async def test_a_client_that_leaves_is_noticed_in_every_phase(phase: Phase, how: str) -> None:
    """D01, D02: the attempt is closed and its slot given back, whatever the exchange was waiting for."""
    async with door(stream=True, cap=1) as it:
        if phase is Phase.QUEUED:
            it.exchange.interrupt()
            for _ in range(2):
                it.stage.start()
            it.exchange = it.stage.exchange(AsgiClient(), stream=True)
        elif phase is Phase.BACKOFF:
            it.stage.last.fail(FailureClass.BROKEN)
        elif phase is Phase.RELAYING:
            it.stage.last.stream(ONE)
            await it.http.until(lambda: it.http.data == ONE)
        if phase is Phase.QUEUED:
            await answer_until_left(it, how)
            for exchange in it.stage.exchanges[1:3]:
                exchange.client_gone()
            return
        assert it.exchange.phase is phase
        if how == "leaves":
            it.http.leave()
        else:
            it.scope.cancel()
    assert (it.exchange.phase, it.exchange.response.status, it.exchange.response.error_code) == (Phase.OVER, 499, "client_gone")
    assert not [sending for sending in it.stage.sendings if sending.is_live]


async def answer_until_left(it: Door, how: str) -> None:
    """Answer an exchange that has to wait for a slot, until its client leaves."""
    http = HttpServer()
    http.gate.set()
    client = it.exchange.response.client
    assert isinstance(client, AsgiClient)
    async with anyio.create_task_group() as group:

        async def run() -> None:
            await answer(client, it.exchange, {}, http.receive, http.send, write_timeout=LONG)

        group.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        assert it.exchange.phase is Phase.QUEUED
        if how == "leaves":
            http.leave()
        else:
            group.cancel_scope.cancel()
    assert (it.exchange.response.status, http.sent) == (499, [])
    assert it.stage.room.queue.waiting(MODEL) == 0


async def test_a_client_that_leaves_while_it_is_sent_to_is_noticed() -> None:
    async with door(stream=True) as it:
        it.http.shut()
        it.stage.last.stream(ONE)
        await it.http.until(lambda: it.http.offered == 1)
        it.http.leave()
    assert (it.exchange.response.status, it.http.sent) == (499, [])


async def test_reading_stops_with_the_client_and_goes_on_with_it() -> None:
    """At most `HIGH_WATER` bytes and one chunk are held; what is held goes out in one piece."""
    async with door(stream=True) as it:
        it.stage.last.stream(ONE)
        await it.http.until(lambda: it.http.data == ONE)
        it.http.shut()
        it.stage.last.body(ONE)
        await it.http.until(lambda: it.http.offered == 3)
        assert not it.stage.last.paused
        it.stage.last.body(BIG, ONE)
        paused = it.stage.last.paused
        it.http.gate.set()
        await it.http.until(lambda: len(it.http.data) == 3 * len(ONE) + len(BIG))
        await anyio.wait_all_tasks_blocked()
        assert (paused, it.stage.last.paused) == (True, False)
        it.stage.last.body(DONE_EVENT)
    assert it.http.data == ONE + ONE + BIG + ONE + DONE_EVENT


async def test_reading_stays_stopped_while_there_is_more_to_send() -> None:
    async with door(stream=True) as it:
        it.http.shut()
        it.stage.last.stream(BIG)
        await it.http.until(lambda: it.http.offered == 1)
        assert it.stage.last.paused
        gate = it.http.gate
        it.http.shut()
        gate.set()
        await it.http.until(lambda: it.http.offered == 2)
        assert it.stage.last.paused
        it.http.leave()


@pytest.mark.parametrize("shut", ["before the head", "after the head"])
async def test_a_stalled_client_is_given_up(shut: str) -> None:
    """L01: a message that is not taken in time ends the exchange and closes the attempt."""
    async with door(stream=True, write_timeout=0.01) as it:
        if shut == "after the head":
            it.stage.last.stream(ONE)
            await it.http.until(lambda: it.http.data == ONE)
            it.http.shut()
            it.stage.last.body(ONE)
        else:
            it.http.shut()
            it.stage.last.stream(ONE)
    assert (it.exchange.phase, it.exchange.response.status, it.exchange.response.error_code) == (Phase.OVER, 499, "client_stalled")
    assert it.stage.last.aborted
    assert it.errors == []


async def test_a_slow_client_is_not_a_stalled_one() -> None:
    """A large answer goes out in slices, each with its own time: what counts is that the client goes on reading."""
    async with door() as it:
        it.stage.last.answer(body=b"[" + b" " * 3 * HIGH_WATER + b"]")
    assert it.http.headers[b"content-length"] == b"%d" % (3 * HIGH_WATER + 2)
    assert it.http.data == b"[" + b" " * 3 * HIGH_WATER + b"]"
    assert max(len(message["body"]) for message in it.http.sent[1:]) <= HIGH_WATER
    assert it.http.more == [True, True, True, False]


async def test_a_server_that_says_that_the_client_is_gone_is_believed() -> None:
    """ASGI: `send` may raise OSError after a disconnect. Nobody is to blame."""
    async with door(stream=True) as it:
        it.http.error = ConnectionResetError("gone")
        it.stage.last.stream(ONE)
    assert (it.exchange.response.status, it.exchange.response.error_code, it.errors) == (499, "client_gone", [])
    assert it.stage.last.aborted


async def test_a_fault_of_the_server_below_is_not_hidden() -> None:
    """Anything else that `send` raises is a bug somewhere: the exchange is dropped and the error goes on."""
    async with door(stream=True) as it:
        it.http.error = RuntimeError("a bug")
        it.stage.last.stream(ONE)
    assert [str(error) for error in it.errors] == ["a bug"]
    assert it.exchange.response.status == 499


async def test_shutdown_reaches_the_client() -> None:
    async with door(stream=True) as it:
        it.stage.last.stream(ONE)
        await it.http.until(lambda: it.http.data == ONE)
        it.exchange.interrupt()
    assert b"gateway_shutting_down" in it.http.data
    async with door(stream=True) as it:
        it.exchange.interrupt()
    assert (it.http.sent[0]["status"], it.http.headers[b"retry-after"], it.http.more) == (503, b"5", [False])


async def test_an_exchange_that_was_refused_before_its_start_is_answered() -> None:
    """The gateway may be stopped between a request's arrival and its start."""
    stage = RecordingEngine([server("a")])
    http = HttpServer()
    http.gate.set()
    client = AsgiClient()
    exchange = stage.exchange(client)
    exchange.interrupt()
    await answer(client, exchange, {}, http.receive, http.send, write_timeout=LONG)
    assert (http.sent[0]["status"], stage.sendings) == (503, [])


async def test_a_head_without_a_body_goes_out_with_the_end() -> None:
    async with door() as it:
        it.stage.last.answer(400, JSON, b"")
    assert (it.http.headers[b"content-length"], it.http.data, it.http.more) == (b"0", b"", [False])


async def test_a_server_below_that_keeps_a_cancellation_to_itself() -> None:
    """The client leaves while the last message is being sent: nothing is raised."""
    async with door(is_open=False) as it:
        it.http.keeps_cancellations = True
        it.stage.last.answer()
        await it.http.until(lambda: it.http.offered == 1)
        it.http.leave()
    assert it.errors == []
