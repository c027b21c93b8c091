"""Whatever is done to them in whatever order, SQLite and PostgreSQL hold and answer what memory does."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from multiverse_gateway import GatewayError, Health, HealthState, ServerId, Store
from multiverse_gateway.core.aliases import Alias
from multiverse_gateway.core.servers import Capabilities, Metadata, WallLink
from multiverse_gateway.stores.memory import MemoryStore
from multiverse_gateway.stores.sqlite import SqliteStore
from multiverse_gateway.testing.store import make_host, make_key, make_response, make_result, make_server, make_usage
from support.require import require
from support.services import SECRET, PostgresServer

IDS = st.sampled_from(["s1", "s2", "s3", "s4"])
DAYS = st.sampled_from(["2026-05-01", "2026-05-02"])
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
INSTANTS = st.floats(0, 4e9, width=64)
SERVERS = st.builds(
    make_server,
    IDS,
    endpoint_url=st.sampled_from([f"http://{host}.example" for host in "abc"]),
    api_key=st.none() | st.text("abc", min_size=1),
    capabilities=st.builds(Capabilities, max_tokens=st.none() | st.integers(1, 10**9), streaming=st.booleans()),
    metadata=st.builds(Metadata, student_id=st.none() | WORDS, description=st.none() | WORDS),
    generation=st.integers(1, 3),
    registered_at=st.sampled_from([1.0, 2.0]),
    updated_at=INSTANTS,
)
HEALTHS = st.builds(
    Health,
    state=st.sampled_from(HealthState),
    generation=st.integers(1, 3),
    consecutive_failures=st.integers(0, 5),
    by_traffic=st.booleans(),
    reason=st.none() | WORDS,
    last_checked_at=st.none() | INSTANTS,
    models=st.lists(WORDS, max_size=2).map(tuple),
)
RESULTS = st.builds(make_result, IDS, st.integers(0, 1000), passed=st.booleans())
LIMITS = st.none() | st.integers(1, 99)
KEYS = st.builds(make_key, st.sampled_from(["alice", "bob"]), revoked_at=st.none() | INSTANTS, rate_limit=LIMITS, daily_limit=LIMITS)


class Agreement(RuleBasedStateMachine):
    """Do everything to the model and to a real store, and compare every answer; `make` yields a store that is not open yet."""

    make: ClassVar[Callable[[Path], Store]]

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="agreement-"))
        self.model: Store = MemoryStore()
        self.real = type(self).make(self.folder)
        self.run(self.real.open())

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.run(self.real.aclose())
            self.loop.close()
            shutil.rmtree(self.folder)

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Return what a call answers; an error's class and words are an answer too."""
        try:
            return self.loop.run_until_complete(call)
        except GatewayError as error:
            return type(error), error.message

    def both(self, name: str, *values: Any, **named: Any) -> Any:
        """Call both stores."""
        answers = [self.run(getattr(store, name)(*values, **named)) for store in (self.model, self.real)]
        assert answers[0] == answers[1], (name, values)
        return answers[0]

    @rule(server=SERVERS)
    def save_server(self, server: Any) -> None:
        self.both("save_server", server)

    @rule(name=IDS)
    def remove_server(self, name: str) -> None:
        self.both("remove_server", ServerId(name))

    @rule(changes=st.dictionaries(IDS, HEALTHS, max_size=3), results=st.lists(RESULTS, max_size=4))
    def save_health(self, changes: dict[str, Health], results: list[Any]) -> None:
        self.both("save_health", changes, results)

    @rule(key=KEYS)
    def save_key(self, key: Any) -> None:
        self.both("save_key", key)

    @rule(batch=st.sampled_from("abc"), days=st.lists(DAYS, max_size=3), requests=st.integers(0, 1 << 40))
    def add_usage(self, batch: str, days: list[str], requests: int) -> None:
        self.both("add_usage", batch, [make_usage(day, requests) for day in days])

    @rule(by=st.sets(st.sampled_from(["day", "model", "client"])), models=st.none() | st.lists(st.sampled_from(["tiny", "x"]), max_size=2))
    def sum_usage(self, by: set[str], models: list[str] | None) -> None:
        self.both("sum_usage", "2026-05-01", "2026-05-02", by=by, only={} if models is None else {"model": models})

    @rule(role=st.sampled_from("xy"), holder=st.sampled_from("ab"), ttl=st.sampled_from([0.0, 600.0]))
    def claim(self, role: str, holder: str, ttl: float) -> None:
        self.both("claim", role, holder, ttl)

    @rule(name=st.sampled_from("xy"), proposal=WORDS)
    def secret(self, name: str, proposal: str) -> None:
        self.both("secret", name, proposal)

    @rule(digest=st.sampled_from(["d1", "d2"]), is_open=st.booleans())
    def session(self, digest: str, is_open: bool) -> None:
        self.both("open_session", digest, 1e10) if is_open else self.both("close_session", digest)

    @rule(name=st.sampled_from("ab"), is_saved=st.booleans())
    def wall_link(self, name: str, is_saved: bool) -> None:
        link = WallLink(id=name, name="Hall", digest="ab" * 32, created_at=float(ord(name)))
        self.both("save_wall_link", link) if is_saved else self.both("remove_wall_link", name)

    @rule(host=st.sampled_from("xy"), servers=st.lists(SERVERS, max_size=3), is_saved=st.booleans())
    def host(self, host: str, servers: list[Any], is_saved: bool) -> None:
        owned = [attrs.evolve(server, host_id=host) for server in servers]
        self.both("save_host", make_host(host), owned) if is_saved else self.both("remove_host", host)

    @rule(name=st.sampled_from("ab"), is_saved=st.booleans())
    def alias(self, name: str, is_saved: bool) -> None:
        alias = Alias(name=name, models=("tiny",), created_at=1.0, updated_at=1.0)
        self.both("save_alias", alias) if is_saved else self.both("remove_alias", name)

    @rule(keys=st.lists(st.sampled_from("abc"), max_size=3, unique=True), server=IDS, until=st.sampled_from([1.0, 1e10]))
    def responses(self, keys: list[str], server: str, until: float) -> None:
        self.both("save_responses", [make_response(key, server_id=server, until=until) for key in keys])
        for key in "abc":
            self.both("find_response", key)

    @rule(name=IDS)
    def history(self, name: str) -> None:
        self.both("history", ServerId(name), 100)

    @invariant()
    def the_same_is_there(self) -> None:
        if not hasattr(self, "real"):
            return
        model, real = self.run(self.model.load()), self.run(self.real.load())
        assert sorted(model.servers, key=lambda server: server.id) == sorted(real.servers, key=lambda server: server.id)
        unordered = ("keys", "wall_links", "hosts", "aliases")
        blank = {"servers": (), "version": 0, **dict.fromkeys(unordered, ())}
        assert attrs.evolve(model, **blank) == attrs.evolve(real, **blank)
        for name in unordered:
            assert set(getattr(model, name)) == set(getattr(real, name)), name
        grown = (model.version, real.version)
        before = getattr(self, "versions", grown)
        assert (grown[0] > before[0]) == (grown[1] > before[1])
        self.versions = grown
        gone = self.both_removed()
        assert gone[0] == gone[1]
        self.both("usage", "2026-05-01", "2026-05-02")
        self.both("requests_on", "2026-05-01")

    def both_removed(self) -> list[set[Any]]:
        """Return who was removed: in which order is a matter of clocks."""
        return [set(self.run(store.removed())) for store in (self.model, self.real)]


def agree(make: Callable[[Path], Store], examples: int) -> None:
    """Try so many histories on a store."""
    machine: Any = type("Machine", (Agreement,), {"make": staticmethod(make)})
    machine.TestCase.settings = settings(
        max_examples=max(examples, settings().max_examples // 20),
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase("runTest").runTest()


def test_sqlite_agrees_with_memory() -> None:
    """In a file of its own for each history."""
    agree(lambda folder: SqliteStore(folder / "registry.db"), 8)


@pytest.mark.e2e
def test_postgres_agrees_with_memory(postgres: PostgresServer) -> None:
    """In a schema of its own for each history."""
    require("psycopg", "the store for PostgreSQL")
    from multiverse_gateway.stores.postgres import PostgresStore

    agree(lambda folder: PostgresStore(postgres.database(), secret=SECRET), 8)
