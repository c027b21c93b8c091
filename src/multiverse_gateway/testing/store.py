"""What every store must do, as tests. Needs pytest with the anyio plug-in."""

from typing import Any

import anyio
import attrs
import pytest

from multiverse_gateway.core.aliases import Alias
from multiverse_gateway.core.engine_facts import Abilities, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.errors import AlreadyRegistered, ServerNotFound
from multiverse_gateway.core.health import Health, HealthState
from multiverse_gateway.core.servers import ClientKey, HostId, ServerId, WallLink
from multiverse_gateway.core.usage import MAX_COUNT, Counts, Usage, UsageKey
from multiverse_gateway.protocols import Store
from multiverse_gateway.testing.store_values import make_host, make_key, make_response, make_result, make_server, make_usage

__all__ = [
    "CoordinationContract",
    "HostStoreContract",
    "RegistryStoreContract",
    "ResponseStoreContract",
    "SessionStoreContract",
    "StoreContract",
    "UsageStoreContract",
    "UsageSumStoreContract",
    "WallLinkStoreContract",
    "make_host",
    "make_key",
    "make_response",
    "make_result",
    "make_server",
    "make_usage",
]


_DAYS_AND_MODELS = (("2026-05-01", "a"), ("2026-05-01", "b"), ("2026-05-02", "a"))


class RegistryStoreContract:
    """What every store must do. Subclass it with an async fixture `store` that yields an empty, open store."""

    async def test_a_saved_server_is_loaded_as_it_was(self, store: Store) -> None:
        """Every field comes back, and health only once it was saved."""
        server = make_server()
        await store.save_server(server)
        registry = await store.load()
        assert registry.servers == (server,)
        assert registry.servers[0].api_key == server.api_key
        assert not registry.health

    async def test_saving_again_replaces(self, store: Store) -> None:
        """A store keeps one record per id, the one saved last."""
        await store.save_server(make_server())
        changed = make_server(model_name="other", api_key=None, max_concurrency=None, generation=2)
        await store.save_server(changed)
        assert (await store.load()).servers == (changed,)

    async def test_a_removed_server_is_gone_once(self, store: Store) -> None:
        """The second removal finds nothing; the record is still known, and the pair can be registered again."""
        await store.save_server(make_server())
        assert await store.remove_server(ServerId("one")) is True
        assert await store.remove_server(ServerId("one")) is False
        assert await store.remove_server(ServerId("never")) is False
        assert (await store.load()).servers == ()
        assert [server.id for server in await store.removed()] == ["one"]
        assert [(server.api_key, server.owner_digest) for server in await store.removed()] == [(None, None)]
        again = make_server("one again", endpoint_url="http://one.example:8000")
        await store.save_server(again)
        assert (await store.load()).servers == (again,)

    async def test_one_pair_is_one_server(self, store: Store) -> None:
        """A second record of the same model and URL is refused, whichever way it would come about; nothing changes."""
        await store.save_server(make_server())
        await store.save_server(make_server("two"))
        before = await store.version()
        for name in ("three", "two"):
            with pytest.raises(AlreadyRegistered):
                await store.save_server(make_server(name, endpoint_url="http://one.example:8000"))
        assert await store.version() == before
        assert {server.id for server in (await store.load()).servers} == {"one", "two"}

    async def test_nothing_brings_a_removed_server_back(self, store: Store) -> None:
        """Not even a change that began before it was removed; other servers are saved as ever."""
        await store.save_server(make_server())
        await store.remove_server(ServerId("one"))
        before = await store.version()
        with pytest.raises(ServerNotFound):
            await store.save_server(make_server(generation=2))
        assert ((await store.load()).servers, await store.version()) == ((), before)

    async def test_waiting_for_a_change_ends(self, store: Store) -> None:
        """Whether or not anything changed: the caller asks for the version in any case."""
        with anyio.fail_after(5):
            for _ in range(3):
                await store.changed(0.01)

    async def test_a_new_generation_shows(self, store: Store) -> None:
        """The same state of another generation is news to other processes."""
        await store.save_server(make_server())
        await store.save_health({ServerId("one"): Health(state=HealthState.HEALTHY)}, [])
        await store.save_server(make_server(generation=2))
        before = await store.version()
        await store.save_health({ServerId("one"): Health(state=HealthState.HEALTHY, generation=2)}, [])
        assert await store.version() > before

    async def test_many_at_once_lose_nothing(self, store: Store) -> None:
        """Each call counts, whatever else runs."""
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(store.save_server, make_server(f"s{number}"))
                group.start_soon(store.load)
        assert {server.id for server in (await store.load()).servers} == {f"s{number}" for number in range(20)}

    async def test_the_version_grows_with_servers_and_states(self, store: Store) -> None:
        """And only with those: a check that found the same leaves it."""
        seen = [await store.version()]
        await store.save_server(make_server())
        seen.append(await store.version())
        health = Health(state=HealthState.HEALTHY, last_checked_at=1.0)
        await store.save_health({ServerId("one"): health}, [])
        seen.append(await store.version())
        await store.save_health({ServerId("one"): attrs.evolve(health, state=HealthState.UNHEALTHY)}, [])
        seen.append(await store.version())
        await store.save_health({ServerId("one"): attrs.evolve(health, measured=Measured(kind=EngineKind.VLLM))}, [])
        seen.append(await store.version())
        await store.remove_server(ServerId("one"))
        seen.append(await store.version())
        assert seen == sorted(set(seen))

        await store.save_server(make_server("two"))
        await store.save_health({ServerId("two"): health}, [])
        before = await store.version()
        await store.save_health({ServerId("two"): attrs.evolve(health, last_checked_at=9.0)}, [make_result("two")])
        assert await store.version() == before == (await store.load()).version

    async def test_health_is_kept(self, store: Store) -> None:
        """What is shared between processes comes back."""
        await store.save_server(make_server(generation=3))
        health = Health(
            state=HealthState.DEACTIVATED,
            generation=3,
            consecutive_failures=4,
            by_traffic=True,
            reason="no answer",
            warning="a warning",
            measured=Measured(
                kind=EngineKind.OLLAMA, slots=1, model=ModelFacts(name="tiny", gpu_share=1.0, abilities=Abilities(chat=True, vision=False))
            ),
            last_checked_at=5.0,
            last_passed_at=4.0,
            last_transition_at=3.0,
            models=("tiny", "other"),
        )
        for state in (HealthState.DEACTIVATED, HealthState.SUSPECT):
            kept = attrs.evolve(health, state=state)
            await store.save_health({ServerId("one"): kept}, [])
            assert (await store.load()).health == {"one": kept}

    async def test_health_of_the_past_is_dropped(self, store: Store) -> None:
        """An older generation's, a removed server's, an unknown one's: no resurrection by a probe in flight."""
        await store.save_server(make_server(generation=2))
        await store.save_server(make_server("two"))
        await store.remove_server(ServerId("two"))
        before = await store.version()
        old = Health(state=HealthState.HEALTHY, generation=1)
        await store.save_health({ServerId("one"): old, ServerId("two"): old, ServerId("three"): old}, [make_result("two")])
        registry = await store.load()
        assert not registry.health
        assert [server.id for server in registry.servers] == ["one"]
        assert await store.version() == before

    async def test_the_last_hundred_checks_are_kept(self, store: Store) -> None:
        """Newest first, each server's own."""
        await store.save_server(make_server())
        await store.save_server(make_server("two"))
        await store.save_health({}, [make_result("one", number, passed=number % 2 == 0) for number in range(130)])
        await store.save_health({}, [make_result("two", 7), make_result("one", 130)])
        history = await store.history(ServerId("one"), 200)
        assert [result.checked_at for result in history] == [float(number) for number in range(130, 30, -1)]
        assert history[1] == make_result("one", 129, passed=False)
        assert len(await store.history(ServerId("one"), 5)) == 5
        assert list(await store.history(ServerId("two"), 5)) == [make_result("two", 7)]
        await store.save_health({}, [make_result("three", 1)])
        assert not await store.history(ServerId("three"), 5)

    async def test_client_keys_are_kept(self, store: Store) -> None:
        """Every field comes back, with the registry, and others see at once that something changed."""
        seen = [await store.version()]
        await store.save_key(make_key())
        seen.append(await store.version())
        plain = ClientKey(id="id of bob", name="bob", digest="cd" * 32, created_at=2.5)
        await store.save_key(plain)
        seen.append(await store.version())
        assert (await store.load()).keys == (make_key(), plain)
        await store.save_key(make_key(name="renamed", id="id of alice"))
        assert [key.name for key in (await store.load()).keys] == ["renamed", "bob"]
        assert [*seen, await store.version()] == sorted({*seen, await store.version()})

    async def test_a_revoked_key_stays_revoked(self, store: Store) -> None:
        """Also when a change that began before is saved after it."""
        await store.save_key(make_key())
        await store.save_key(make_key(revoked_at=5.0))
        await store.save_key(make_key(rate_limit=9))
        assert (await store.load()).keys == (make_key(rate_limit=9, revoked_at=5.0),)


class CoordinationContract:
    """What every store must do for the processes that share it. Subclass it like `RegistryStoreContract`."""

    async def test_one_holder_has_the_lease(self, store: Store) -> None:
        """It can be renewed, and taken by another once it ran out."""
        assert await store.claim("probe", "first", 60.0) is True
        assert await store.claim("probe", "first", 60.0) is True
        assert await store.claim("probe", "second", 60.0) is False
        assert await store.claim("other", "second", 60.0) is True
        assert await store.claim("probe", "first", -1.0) is True
        assert await store.claim("probe", "second", 60.0) is True
        assert await store.claim("probe", "first", 0.0) is False
        assert await store.claim("probe", "second", 0.0) is True
        assert await store.claim("probe", "first", 60.0) is True

    async def test_the_first_secret_stays(self, store: Store) -> None:
        """A later caller gets the secret that is stored already."""
        assert await store.secret("key", "first") == "first"
        assert await store.secret("key", "second") == "first"
        assert await store.secret("other", "second") == "second"


class SessionStoreContract:
    """What a store must do that keeps sessions. Subclass it like `RegistryStoreContract`."""

    async def test_a_session_counts_until_it_is_closed(self, store: Store) -> None:
        """The version grows with it; an expired session is forgotten sooner or later; a session can be closed once."""
        before = await store.version()
        await store.open_session("over", 1.0)
        await store.open_session("ab" * 32, 1e10)
        assert (opened := await store.version()) > before
        assert (await store.load()).sessions == {"ab" * 32: 1e10}
        assert await store.close_session("ab" * 32)
        assert not await store.close_session("ab" * 32)
        assert await store.version() > opened
        assert not (await store.load()).sessions


class WallLinkStoreContract:
    """What a store must do that keeps the links to the wall view. Subclass it like `RegistryStoreContract`."""

    async def test_a_wall_link_works_until_it_is_removed(self, store: Store) -> None:
        """The version grows with it; a link can be removed once."""
        before = await store.version()
        links = tuple(WallLink(id=name, name=f"{name} „Aula“", digest="ab" * 32, created_at=1.5 + at) for at, name in enumerate("ba"))
        for link in links:
            await store.save_wall_link(link)
        await store.save_wall_link(links[0])
        assert (saved := await store.version()) > before
        assert (await store.load()).wall_links == links
        assert await store.remove_wall_link("b")
        assert not await store.remove_wall_link("b")
        assert await store.version() > saved
        assert (await store.load()).wall_links == links[1:]


class HostStoreContract:
    """What a store must do that keeps hosts and aliases. Subclass it with an async fixture `store` that yields an empty, open store."""

    async def test_a_host_is_kept_with_its_servers(self, store: Store) -> None:
        """All or none is saved; removing the host removes them all, and another host's server stays."""
        host = make_host()
        servers = [make_server(name, host_id=host.id) for name in ("one", "two")]
        before = await store.version()
        await store.save_host(host, servers)
        await store.save_server(make_server("another"))
        assert await store.version() > before
        registry = await store.load()
        assert (registry.hosts, registry.hosts[0].api_key) == ((host,), "the host's own key")
        assert {server.id: server.host_id for server in registry.servers} == {"one": "host", "two": "host", "another": "host of another"}
        changed = make_host(api_key=None, max_concurrency=None, offers=(), owner=None)
        await store.save_host(changed)
        assert ((await store.load()).hosts, len((await store.load()).servers)) == ((changed,), 3)
        with pytest.raises(AlreadyRegistered):
            await store.save_host(host, [make_server("fourth"), make_server("third", endpoint_url="http://one.example:8000")])
        assert ((await store.load()).hosts, len((await store.load()).servers)) == ((changed,), 3)
        assert await store.remove_host(host.id)
        assert not await store.remove_host(host.id)
        registry = await store.load()
        assert (registry.hosts, [server.id for server in registry.servers]) == ((), ["another"])
        assert {server.id for server in await store.removed()} == {"one", "two"}
        assert await store.remove_host(HostId("host of another")), "a host that was never saved is its servers"
        assert (await store.load()).servers == ()

    async def test_a_host_goes_with_its_last_server(self, store: Store) -> None:
        """Its key is forgotten then; one that offers patterns stays."""
        for name, offers in (("named", ()), ("offering", ("*",))):
            servers = [make_server(f"{name} {number}", host_id=name) for number in range(2)]
            await store.save_host(make_host(name, offers=offers), servers)
        for name in ("named 0", "offering 0", "named 1"):
            assert {host.id for host in (await store.load()).hosts} == {"named", "offering"}
            assert await store.remove_server(ServerId(name))
        assert await store.remove_server(ServerId("offering 1"))
        assert [host.id for host in (await store.load()).hosts] == ["offering"]

    async def test_an_alias_is_kept_until_it_is_removed(self, store: Store) -> None:
        """There is one of each name, the one that was saved last."""
        aliases = tuple(Alias(name=name, models=("qwen3:8b", "tiny"), created_at=at, updated_at=at) for at, name in enumerate("ab"))
        before = await store.version()
        for alias in reversed(aliases):
            await store.save_alias(alias)
        await store.save_alias(changed := attrs.evolve(aliases[0], models=("tiny",), updated_at=5.0))
        assert await store.version() > before
        assert set((await store.load()).aliases) == {changed, aliases[1]}
        assert await store.remove_alias("b")
        assert not await store.remove_alias("b")
        assert (await store.load()).aliases == (changed,)


class UsageStoreContract:
    """What a store must do that counts use. Subclass it like `RegistryStoreContract`."""

    async def test_usage_adds_up(self, store: Store) -> None:
        """By everything in its key; each day can be asked for."""
        await store.add_usage("first", [make_usage("2026-05-01"), make_usage("2026-05-02", client="")])
        before = await store.version()
        await store.add_usage("second", [make_usage("2026-05-02", 2), make_usage("2026-05-01", 3), make_usage("2026-05-03", model="b")])
        assert await store.version() == before
        everything = await store.usage("2026-05-01", "2026-05-03")
        assert [(usage.key.day, usage.key.client, usage.counts.requests) for usage in everything] == [
            ("2026-05-01", "id of alice", 4),
            ("2026-05-02", "", 1),
            ("2026-05-02", "id of alice", 2),
            ("2026-05-03", "id of alice", 1),
        ]
        assert everything[0].counts == Counts(requests=4, failed=2, prompt_tokens=40, completion_tokens=1 << 41, canceled=4)
        assert everything[3] == make_usage("2026-05-03", model="b")
        assert [usage.key.day for usage in await store.usage("2026-05-02", "2026-05-02")] == ["2026-05-02"] * 2
        assert not await store.usage("2026-05-04", "2027-01-01")

    async def test_requests_of_a_day_are_known_by_client(self, store: Store) -> None:
        """Whatever they asked for, and of that day only."""
        assert await store.requests_on("2026-05-01") == {}
        rows = [make_usage("2026-05-01", 2), make_usage("2026-05-01", 3, model="b"), make_usage("2026-05-02", 9)]
        await store.add_usage("first", [*rows, make_usage("2026-05-01", client="")])
        await store.add_usage("second", [make_usage("2026-05-01", 4, server_id="two")])
        assert await store.requests_on("2026-05-01") == {"id of alice": 9, "": 1}
        assert await store.requests_on("2026-05-03") == {}

    async def test_sums_stop_at_the_largest_count(self, store: Store) -> None:
        """However much a server reports: no sum overflows, and later rows are added and read as before."""
        key = make_usage("2026-05-01").key
        for batch, tokens in enumerate([MAX_COUNT, MAX_COUNT, 2**63, 2**80, 1]):
            counts = Counts(requests=1, failed=tokens, prompt_tokens=tokens, completion_tokens=7, canceled=tokens)
            await store.add_usage(f"batch {batch}", [make_usage("2026-05-02"), Usage(key=key, counts=counts)])
        first, second = await store.usage("2026-05-01", "2026-05-02")
        assert first.counts == Counts(requests=5, failed=MAX_COUNT, prompt_tokens=MAX_COUNT, completion_tokens=35, canceled=MAX_COUNT)
        assert second.counts.requests == 5

    async def test_the_requests_of_a_day_stop_at_the_largest_count(self, store: Store) -> None:
        """Also when those of each row are within the limit, and their sum is not."""
        await store.add_usage("first", [make_usage("2026-05-01", MAX_COUNT, model=f"model {number}") for number in range(3)])
        assert await store.requests_on("2026-05-01") == {"id of alice": MAX_COUNT}

    async def test_a_batch_of_usage_counts_once(self, store: Store) -> None:
        """A caller that does not know whether it was saved saves it again."""
        for _ in range(2):
            await store.add_usage("first", [make_usage("2026-05-01")])
        await store.add_usage("empty", [])
        assert list(await store.usage("2026-05-01", "2026-05-01")) == [make_usage("2026-05-01")]

    async def test_usage_added_at_once_is_not_lost(self, store: Store) -> None:
        """Each batch counts, whatever else runs."""
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(store.add_usage, f"batch {number}", [make_usage("2026-05-01"), make_usage("2026-05-02")])
        assert [usage.counts.requests for usage in await store.usage("2026-05-01", "2026-05-02")] == [20, 20]


class UsageSumStoreContract:
    """What a store must do that sums usage counts. Subclass it with `UsageStoreContract`."""

    async def test_usage_is_summed_by_the_parts_that_are_named(self, store: Store) -> None:
        """In their order; the other parts of the keys are empty, and without parts there is one sum, or none of nothing."""
        rows = [make_usage(day, number, model=model) for number, (day, model) in enumerate(_DAYS_AND_MODELS, 1)]
        await store.add_usage("first", [*rows, make_usage("2026-05-03", 8, client="", model="b")])
        by_model = await store.sum_usage("2026-05-01", "2026-05-02", by=["model"], only={})
        assert [(row.key, row.counts.requests) for row in by_model] == [(UsageKey("", "a"), 4), (UsageKey("", "b"), 2)]
        by_day = await store.sum_usage("2026-05-01", "2026-05-03", by={"day", "client"}, only={"model": ["b", "c"]})
        assert [(row.key.day, row.key.client, row.counts.requests) for row in by_day] == [
            ("2026-05-01", "id of alice", 2),
            ("2026-05-03", "", 8),
        ]
        (total,) = await store.sum_usage("2026-05-01", "2026-05-03", by=(), only={"client": ["id of alice"], "server_id": ["one"]})
        assert total == Usage(
            key=UsageKey("", ""), counts=make_usage("", 6).counts + Counts(failed=2, canceled=4, completion_tokens=2 << 40)
        )
        for part, values in (("model", ["d"]), ("model", []), ("owner", ["'; drop table usage"])):
            only = {part: values}
            assert not await store.sum_usage("2026-05-01", "2026-05-03", by=(), only=only)
        assert not await store.sum_usage("2026-05-04", "2026-05-05", by=["model"], only={})

    async def test_all_parts_together_are_the_rows(self, store: Store) -> None:
        """Names of any script come back as they were."""
        await store.add_usage("first", [make_usage("2026-05-01", model="李明 'x'", owner="Jürgen"), make_usage("2026-05-02")])
        parts = [field.name for field in attrs.fields(UsageKey)]
        assert list(await store.sum_usage("2026-05-01", "2026-05-02", by=parts, only={})) == list(
            await store.usage("2026-05-01", "2026-05-02")
        )
        (row,) = await store.sum_usage("2026-05-01", "2026-05-02", by=["owner"], only={"model": ["李明 'x'"]})
        assert row.key.owner == "Jürgen"

    async def test_sums_of_rows_stop_at_the_largest_count(self, store: Store) -> None:
        """Also when each of the rows is within the limit."""
        rows = [make_usage("2026-05-01", model=f"model {number}") for number in range(3)]
        large = [attrs.evolve(row, counts=Counts(prompt_tokens=MAX_COUNT)) for row in rows]
        await store.add_usage("first", large)
        (total,) = await store.sum_usage("2026-05-01", "2026-05-01", by=["day"], only={})
        assert total.counts == Counts(prompt_tokens=MAX_COUNT)


class StoreContract(
    RegistryStoreContract,
    CoordinationContract,
    SessionStoreContract,
    WallLinkStoreContract,
    HostStoreContract,
    UsageStoreContract,
):
    """What a store must do that has all parts."""


class ResponseStoreContract:
    """What a store must do that keeps the places of stored responses. Subclass it like `StoreContract`."""

    async def test_the_place_of_a_response_is_found(self, store: Any) -> None:
        """Every field comes back; the version does not grow, because nothing else changed."""
        before = await store.version()
        await store.save_responses([make_response(), make_response("b" * 64, server_id=ServerId("two"), until=2e10)])
        assert await store.find_response("a" * 64) == make_response()
        assert await store.find_response("b" * 64) == make_response("b" * 64, server_id=ServerId("two"), until=2e10)
        assert await store.find_response("c" * 64) is None
        assert await store.version() == before

    async def test_a_response_is_where_it_was_made_last(self, store: Any) -> None:
        """Saving the same key again replaces; an empty batch changes nothing."""
        await store.save_responses([make_response()])
        moved = make_response(server_id=ServerId("two"), generation=1, until=3e10)
        await store.save_responses([moved])
        await store.save_responses([])
        assert await store.find_response("a" * 64) == moved

    async def test_a_response_is_forgotten_when_its_time_is_over(self, store: Any) -> None:
        """At the latest when the next batch is saved."""
        await store.save_responses([make_response(until=1.0)])
        await store.save_responses([make_response("b" * 64)])
        assert await store.find_response("a" * 64) is None

    async def test_batches_saved_at_once_are_all_kept(self, store: Any) -> None:
        """Also when they hold the same keys in another order."""
        keys = [f"{number:064x}" for number in range(20)]
        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(store.save_responses, [make_response(key) for key in (keys if number % 2 else reversed(keys))])
        for key in keys:
            assert await store.find_response(key) == make_response(key)
