"""What a process knows of the servers' health, and what it saves of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import pytest

from multiverse_gateway.core.errors import StorageRefused, StorageUnavailable
from multiverse_gateway.core.failover import Failure, FailureClass
from multiverse_gateway.core.health import AttemptFailed, AutoDeregister, Health, HealthPolicy, HealthState, Refused, fresh
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.health_book import CONFIRM_SECONDS, HealthBook
from multiverse_gateway.protocols import ProbeResult, Registry
from multiverse_gateway.stores.memory import MemoryStore
from multiverse_gateway.testing.store import make_server
from support.gateways import Clock

AUTH = Failure(FailureClass.AUTH, "it refused the gateway", 401)


class Saving(MemoryStore):
    """A store that notes what health it was given, and can refuse some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[set[str], int]] = []
        self.refused: set[str] = set()
        self.is_broken = False

    async def save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        """Note the servers, and how many results there are."""
        if self.is_broken:
            raise StorageUnavailable("gone")
        if self.refused & {*changes, *(result.server_id for result in results)}:
            raise StorageRefused("never")
        self.saved.append(({*changes}, len(results)))


@attrs.define
class Scene:
    """A book with two servers, and what it told about changes."""

    store: Saving = attrs.Factory(Saving)
    clock: Clock = attrs.Factory(Clock)
    changes: list[tuple[str, str, str]] = attrs.Factory(list)

    def book(self, **policy: object) -> HealthBook:
        """Make the book."""
        book = HealthBook(
            HealthPolicy(**policy),  # type: ignore[arg-type]
            store=self.store,
            now=lambda: self.clock.monotonic,
            wall=lambda: self.clock.wall,
            random=lambda: 0.5,
            changed=lambda server, before, after: self.changes.append((server.id, before.state.value, after.state.value)),
        )
        self.follow(book, make_server("one"), make_server("two"))
        return book

    def follow(self, book: HealthBook, *servers: Server) -> set[str]:
        """Give the book another registry with healthy servers; return those that left."""
        health = {server.id: fresh(server.generation, now=self.clock.monotonic, wall=self.clock.wall) for server in servers}
        return {*book.follow(Registry(version=book.table.version + 1, servers=servers, health=health))}

    def result(self, name: str, *, passed: bool = False) -> ProbeResult:
        """Return the result of a probe."""
        reason = None if passed else "off"
        return ProbeResult(server_id=ServerId(name), generation=1, passed=passed, checked_at=self.clock.wall, duration=0.1, reason=reason)


def state(book: HealthBook, name: str = "one") -> HealthState:
    """Return the state of a server."""
    return book.table.routes[ServerId(name)].health.state


async def test_a_failed_probe_changes_the_table_is_told_and_saved_once() -> None:
    scene = Scene()
    book = scene.book()
    table = book.table
    assert book.note_result(scene.result("one")) == "failed"
    assert (state(book), table.routes[ServerId("one")].health.state) == (HealthState.UNHEALTHY, HealthState.HEALTHY)
    assert scene.changes == [("one", "healthy", "unhealthy")]
    await book.flush()
    await book.flush()
    assert scene.store.saved == [({"one"}, 1)]


def test_results_and_events_of_unknown_servers_are_ignored() -> None:
    scene = Scene()
    book = scene.book()
    assert book.note_result(scene.result("three")) is None
    book.report(ServerId("three"), AttemptFailed(generation=1, failure=AUTH, path="/v1/x", client="a", number=1))
    assert not book.adopt(ServerId("three"), fresh(1, now=0.0, wall=0.0))
    assert scene.changes == []


async def test_what_cannot_be_saved_is_saved_later() -> None:
    scene = Scene()
    book = scene.book()
    book.note_result(scene.result("one"))
    scene.store.is_broken = True
    with pytest.raises(StorageUnavailable):
        await book.flush()
    scene.store.is_broken = False
    book.note_result(scene.result("two"))
    await book.flush()
    assert scene.store.saved == [({"one", "two"}, 2)]


async def test_a_server_that_the_store_refuses_holds_up_no_other_one() -> None:
    scene = Scene()
    book = scene.book()
    book.note_result(scene.result("one"))
    book.note_result(scene.result("two"))
    scene.store.refused = {"one"}
    await book.flush()
    await book.flush()
    assert scene.store.saved == [({"two"}, 1)]


def test_what_is_not_saved_yet_outlasts_the_record_of_the_store() -> None:
    scene = Scene()
    book = scene.book()
    book.note_result(scene.result("one"))
    left = scene.follow(book, make_server("one"))
    assert (state(book), left) == (HealthState.UNHEALTHY, {"two"})


def test_a_new_generation_begins_with_what_the_store_knows() -> None:
    scene = Scene()
    book = scene.book()
    book.note_result(scene.result("one"))
    scene.follow(book, attrs.evolve(make_server("one"), generation=2))
    assert state(book) is HealthState.HEALTHY


def test_a_refusal_is_to_be_confirmed_once_in_a_minute() -> None:
    scene = Scene()
    book = scene.book()
    refusal = AttemptFailed(generation=1, failure=AUTH, path="/v1/chat/completions", client="a", number=1)
    book.report(ServerId("one"), refusal)
    assert [(server.id, path) for server, path in book.doubted_accesses()] == [("one", "/v1/chat/completions")]
    book.report(ServerId("one"), refusal)
    assert book.doubted_accesses() == []
    scene.clock.advance(CONFIRM_SECONDS)
    assert len(book.doubted_accesses()) == 1
    book.report(ServerId("one"), refusal)
    book.report(ServerId("one"), Refused(generation=1, reason="it refuses the key", path="/v1/chat/completions"))
    scene.clock.advance(CONFIRM_SECONDS)
    assert book.doubted_accesses() == [], "it is confirmed already"


def test_a_server_that_failed_for_too_long_is_to_be_deleted() -> None:
    scene = Scene()
    book = scene.book(auto_deregister=AutoDeregister.DELETE, archive_after=3600.0)
    for _ in range(10):
        book.note_result(scene.result("one"))
        scene.clock.advance(1000.0)
    assert (state(book), book.doomed) == (HealthState.DEACTIVATED, {"one"})
    scene.follow(book, make_server("two"))
    assert book.doomed == set()
