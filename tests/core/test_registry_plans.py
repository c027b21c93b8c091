"""What a registration, a change or an import makes of the registered servers: decided without a store."""

from __future__ import annotations

from itertools import count

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.api.request_types import Registration
from multiverse_gateway.core.caps import Stated
from multiverse_gateway.core.errors import AlreadyRegistered
from multiverse_gateway.core.registry_plans import (
    DESCRIBED,
    Imported,
    ImportPlan,
    described,
    new_server,
    pair_of,
    plan_change,
    plan_import,
    plan_registration,
    with_same_pair,
)
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.testing.store import make_server

WALL = 1000.0


def plan(*servers: Server, items: list[Imported], removed: tuple[str, ...] = ()) -> ImportPlan:
    """Plan an import whose new ids are n1, n2, …"""
    numbers = count(1)
    return plan_import(servers, {ServerId(name) for name in removed}, items, wall=WALL, new_id=lambda: ServerId(f"n{next(numbers)}"))


def test_a_registration_states_all_that_is_not_the_gateways() -> None:
    """A field that is added to registrations reaches the server, or this fails."""
    assert {field.name for field in attrs.fields(Registration)} == set(DESCRIBED)
    server = make_server()
    assert described(new_server(server, server_id=ServerId("x"), wall=WALL)) == described(server)


def test_a_new_server_begins_now_or_when_it_was_registered_elsewhere() -> None:
    """Never later than now."""
    server = make_server()
    times = [new_server(server, server_id=ServerId("x"), wall=WALL, registered_at=at).registered_at for at in (None, 5.0, 2000.0)]
    assert times == [WALL, 5.0, WALL]


def test_one_model_at_one_url_is_one_server_however_its_name_is_written() -> None:
    servers = [make_server("a"), make_server("b", model_name="llama:latest")]
    assert with_same_pair(servers, make_server("b", model_name="llama")) is servers[1]
    assert with_same_pair(servers, make_server("c")) is None


def test_a_registration_of_a_new_pair_gets_what_its_engine_states() -> None:
    wanted = make_server("b", max_concurrency=None)
    made = plan_registration([make_server("a")], wanted, stated=Stated(4, "llama.cpp states 4 slots"))
    assert (made.server, made.is_new, made.cap.limit) == (attrs.evolve(wanted, max_concurrency=4), True, 4)


def test_a_known_pair_keeps_its_id_its_cap_and_its_owner() -> None:
    """It gets all else that the registration states."""
    existing = make_server("a", generation=3)
    wanted = make_server("new", endpoint_url=existing.endpoint_url, weight=9, max_concurrency=None, updated_at=WALL, owner_digest="cd" * 32)
    made = plan_registration([existing], wanted, stated=Stated(4, "llama.cpp states 4 slots"))
    assert not made.is_new
    assert made.server == attrs.evolve(existing, weight=9, updated_at=WALL)
    named = plan_registration([existing], wanted, stated=None).server
    assert named == attrs.evolve(existing, weight=9, updated_at=WALL, max_concurrency=None)
    orphan = attrs.evolve(existing, owner_digest=None)
    assert plan_registration([orphan], wanted, stated=None).server.owner_digest == "cd" * 32


@pytest.mark.parametrize("change", [{"api_key": "another key"}, {"model_name": "tiny:latest"}])
def test_another_key_or_name_begins_a_generation(change: dict[str, object]) -> None:
    existing = make_server("a", generation=3)
    made = plan_registration([existing], attrs.evolve(existing, **change), stated=None)  # type: ignore[arg-type]
    assert (made.server.generation, made.server.id) == (4, "a")


@pytest.mark.parametrize(
    ("change", "is_active", "needs_probe", "is_change", "generation"),
    [
        ({}, True, False, False, 1),
        ({"weight": 9}, True, False, True, 1),
        ({"api_key": None}, True, True, True, 2),
        ({"endpoint_url": "http://other.example"}, True, True, True, 2),
        ({}, False, True, True, 1),
        ({"weight": 9}, False, True, True, 1),
    ],
)
def test_what_a_change_means(change: dict[str, object], is_active: bool, needs_probe: bool, is_change: bool, generation: int) -> None:
    """A server that was taken out is probed whatever changes; nothing is saved where nothing is other than before."""
    current = make_server("a", opened_address=None)
    wanted = attrs.evolve(current, **change)  # type: ignore[arg-type]
    made = plan_change([current, make_server("b")], current, wanted, is_active=is_active, wall=WALL)
    assert (made.needs_probe, made.is_change) == (needs_probe, is_change)
    assert made.server == attrs.evolve(wanted, generation=generation, updated_at=WALL)


def test_no_change_makes_the_pair_of_another_server() -> None:
    current, other = make_server("a"), make_server("b")
    with pytest.raises(AlreadyRegistered):
        plan_change([current, other], current, attrs.evolve(current, endpoint_url=other.endpoint_url), is_active=True, wall=WALL)


def test_an_import_finds_servers_by_pair_or_id() -> None:
    """Each item is new, changed or as it was."""
    same, moved, again = make_server("same"), make_server("moved"), make_server("again")
    made = plan(
        same,
        moved,
        again,
        items=[
            Imported(registration=same, id=ServerId("whatever"), has_key=True),
            Imported(registration=attrs.evolve(moved, endpoint_url="http://new.example"), id=moved.id, has_key=True),
            Imported(registration=attrs.evolve(again, weight=9), has_key=True),
            Imported(registration=make_server("fresh"), id=ServerId("fresh"), registered_at=7.0, has_key=True),
            Imported(registration=make_server("gone"), id=ServerId("gone")),
            Imported(registration=make_server("written by hand")),
        ],
        removed=("gone",),
    )
    assert (made.created, made.updated, made.unchanged) == (3, 2, 1)
    assert [(server.id, server.generation, server.registered_at) for server in made.saves] == [
        ("moved", 2, 1.5),
        ("again", 1, 1.5),
        ("fresh", 1, 7.0),
        ("n1", 1, WALL),
        ("n2", 1, WALL),
    ]
    assert {server.updated_at for server in made.saves} == {WALL}


def test_an_import_keeps_a_key_that_it_does_not_name() -> None:
    """Naming none is naming it: the key goes, and a generation begins."""
    server = make_server()
    without = attrs.evolve(server, api_key=None)
    assert plan(server, items=[Imported(registration=without)]).unchanged == 1
    [saved] = plan(server, items=[Imported(registration=without, has_key=True)]).saves
    assert (saved.api_key, saved.generation) == (None, 2)


def test_items_of_one_import_see_each_other() -> None:
    """The same pair twice is one server, and a pair that an earlier item gave up is free."""
    first, second = make_server("a"), make_server("b")
    twice = [Imported(registration=first, has_key=True), Imported(registration=attrs.evolve(first, weight=9), has_key=True)]
    made = plan(items=twice)
    assert [(server.id, server.weight) for server in made.saves] == [("n1", 2), ("n1", 9)]
    swapped = [
        Imported(registration=attrs.evolve(first, endpoint_url="http://c.example"), id=first.id, has_key=True),
        Imported(registration=attrs.evolve(second, endpoint_url=first.endpoint_url), id=second.id, has_key=True),
    ]
    assert [server.id for server in plan(first, second, items=swapped).saves] == ["a", "b"]


def test_servers_that_shared_a_pair_can_be_parted() -> None:
    """Versions that compared whole names let one server be registered under two spellings."""
    one, other = make_server("a", model_name="m"), make_server("b", model_name="m:latest", endpoint_url="http://a.example:8000")
    items = [
        Imported(registration=attrs.evolve(server, endpoint_url=f"http://{server.id}.new"), id=server.id, has_key=True)
        for server in (one, other)
    ]
    assert [server.id for server in plan(one, other, items=items).saves] == ["a", "b"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["m", "m:latest", "n"]), st.sampled_from([None, *"abcd"])), max_size=8))
def test_an_import_is_idempotent_and_makes_no_pair_twice(rows: list[tuple[str, str, str | None]]) -> None:
    """However its items overlap: what the last of them says about a server stays."""
    items = [
        Imported(registration=make_server(host, model_name=model), id=None if name is None else ServerId(name))
        for host, model, name in rows
    ]
    saved = {server.id: server for server in plan(items=items).saves}
    pairs = [pair_of(server) for server in saved.values()]
    assert len(pairs) == len(set(pairs))
    last = items[-1:]
    assert plan(*saved.values(), items=last).unchanged == len(last)


OPENED = "127.0.0.1:11434"


@pytest.mark.parametrize(
    ("change", "opened_address"),
    [
        ({}, OPENED),
        ({"weight": 9}, OPENED),
        ({"model_name": "other"}, OPENED),
        ({"api_key": "another key"}, OPENED),
        ({"endpoint_url": "http://127.0.0.1:11435"}, None),
        ({"endpoint_url": "http://127.0.0.1:11434/other"}, None),
        ({"endpoint_url": "http://rebound.example:11434"}, None),
        ({"endpoint_url": "http://gpu.example"}, None),
    ],
)
def test_an_opening_ends_with_its_url(change: dict[str, object], opened_address: str | None) -> None:
    """Whether the API changes the server or an import does; a change back opens nothing."""
    current = make_server("a", endpoint_url="http://127.0.0.1:11434", opened_address=OPENED)
    wanted = attrs.evolve(current, **change)  # type: ignore[arg-type]
    changed = plan_change([current], current, wanted, is_active=True, wall=WALL).server
    assert changed.opened_address == opened_address
    assert plan_change([changed], changed, current, is_active=True, wall=WALL).server.opened_address == opened_address
    imported = plan(current, items=[Imported(registration=wanted, id=current.id, has_key=True)])
    assert [server.opened_address for server in imported.saves] == ([opened_address] if change else [])


def test_no_registration_and_no_import_opens_an_address() -> None:
    """Their descriptions do not hold one; only the operator's offer, which the gateway makes itself, does."""
    assert "opened_address" not in DESCRIBED
    stranger = make_server("a", opened_address=OPENED)
    assert new_server(stranger, server_id=ServerId("b"), wall=WALL).opened_address is None
    saved = plan(items=[Imported(registration=stranger)]).saves
    assert [server.opened_address for server in saved] == [None]


@pytest.mark.parametrize(("existing", "wanted", "expected"), [(None, OPENED, OPENED), (OPENED, None, OPENED), (None, None, None)])
def test_a_known_pair_keeps_its_opening_or_gets_one(existing: str | None, wanted: str | None, expected: str | None) -> None:
    known = make_server("a", opened_address=existing)
    made = plan_registration([known], attrs.evolve(known, opened_address=wanted), stated=None)
    assert made.server.opened_address == expected
