"""How names are resolved by the system."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from multiverse_gateway.relay.resolver import MAX_LOOKUPS, SystemResolver
from support.sockets import until


class Names:
    """A system whose answers for some names do not come before they are let go."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, *, type: int) -> Any:
        self.asked.append(host)
        if host.startswith("hanging"):
            assert self.gate.wait(10)
        if host.startswith("lost"):
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        if host.startswith("bad"):
            raise UnicodeError("label too long")
        return [(socket.AF_INET, type, 6, "", ("192.0.2.7", port)), (socket.AF_INET6, type, 6, "", ("2001:db8::7", port, 0, 0))]


@pytest.fixture
def names() -> Iterator[Names]:
    """Return them; nothing hangs after the test."""
    made = Names()
    yield made
    made.gate.set()


async def test_a_hanging_name_holds_up_no_other(names: Names) -> None:
    """Forty lookups hang, more than any pool of threads has; another name is answered, and so are other threads' tasks."""
    resolve = SystemResolver(names)
    hanging = [asyncio.ensure_future(resolve(f"hanging-{number}", 80)) for number in range(40)]
    await until(lambda: len(names.asked) == 40)
    assert await resolve("good", 80) == ["192.0.2.7", "2001:db8::7"]
    assert await asyncio.to_thread(lambda: 7) == 7
    names.gate.set()
    assert await asyncio.gather(*hanging) == [["192.0.2.7", "2001:db8::7"]] * 40


async def test_a_name_is_looked_up_once_at_a_time(names: Names) -> None:
    """Who gives up leaves the lookup to the others; after its answer the name is asked for again."""
    resolve = SystemResolver(names)
    waiting = [asyncio.ensure_future(resolve("hanging", 80)) for _ in range(10)]
    await until(lambda: names.asked == ["hanging"])
    waiting.pop().cancel()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(resolve("hanging", 80), 0.01)
    names.gate.set()
    assert len(await asyncio.gather(*waiting)) == 9
    assert names.asked == ["hanging"]
    await resolve("hanging", 80)
    assert names.asked == ["hanging"] * 2


@pytest.mark.parametrize("host", ["lost", "bad"])
async def test_a_name_without_address_is_an_error(names: Names, host: str) -> None:
    """Whatever the system calls it."""
    with pytest.raises(OSError, match="no address"):
        await SystemResolver(names)(host, 80)


async def test_lookups_are_bounded(names: Names) -> None:
    """What is beyond is refused at once, until there is room."""
    resolve = SystemResolver(names)
    hanging = [asyncio.ensure_future(resolve(f"hanging-{number}", 80)) for number in range(MAX_LOOKUPS)]
    await until(lambda: len(names.asked) == MAX_LOOKUPS)
    with pytest.raises(OSError, match="too many"):
        await resolve("good", 80)
    names.gate.set()
    await asyncio.gather(*hanging)
    assert await resolve("good", 80)


async def test_a_lookup_that_no_thread_can_do_is_over(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error at once, and the next one is a lookup again."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolve = SystemResolver(names)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="no thread"):
            await resolve("good", 80)
    assert await resolve("good", 80) == ["192.0.2.7", "2001:db8::7"]


async def test_the_system_knows_this_machine() -> None:
    """With the real lookup."""
    assert "127.0.0.1" in await SystemResolver()("localhost", 80)


def test_an_answer_after_the_end_reaches_nobody(names: Names) -> None:
    """The loop is closed by then; neither the thread nor the end of the loop waits or fails."""
    resolve = SystemResolver(names)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(resolve("hanging", 80), 0.01)

    asyncio.run(give_up())
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "multiverse-names"]
    names.gate.set()
    thread.join(5)
    assert not thread.is_alive()
