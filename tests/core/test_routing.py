"""Which servers could take a request, and what the table is made of."""

from __future__ import annotations

from math import inf
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.health import Blame, Health, HealthState, NextProbe, Rest, is_last, supports
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.routing import (
    Candidates,
    Model,
    Route,
    RoutingTable,
    build_table,
    candidates,
    close_names,
    server_at,
    with_health,
)
from multiverse_gateway.core.servers import Capabilities, Server, ServerId

CHAT = "/v1/chat/completions"
NOW = 1000.0
WELL = HealthState.HEALTHY


def server(name: str, *, model: str = "llama", cap: int | None = None, streaming: bool = True, **changes: Any) -> Server:
    values: dict[str, Any] = {"registered_at": float(ord(name[0])), "created_at": 0.0, "updated_at": 0.0} | changes
    return Server(
        id=ServerId(name),
        model_name=model,
        endpoint_url=f"http://{name}",
        max_concurrency=cap,
        capabilities=Capabilities(streaming=streaming),
        **values,
    )


def table_of(*pairs: tuple[Server, Health]) -> RoutingTable:
    return build_table(1, [each for each, _ in pairs], {each.id: health for each, health in pairs})


def model_of(*pairs: tuple[Server, Health]) -> Model:
    return table_of(*pairs).models["llama"]


def health(state: HealthState = WELL, **changes: Any) -> Health:
    return attrs.evolve(Health(state=state, next_probe=NextProbe(at=NOW + 7)), **changes)


def loaded(**slots: int) -> Load:
    load = Load()
    for name, count in slots.items():
        for _ in range(count):
            load.started(ServerId(name), "llama")
    return load


def find(
    *pairs: tuple[Server, Health], load: Load | None = None, stream: bool = False, path: str = CHAT, excluded: str = "", now: float = NOW
) -> Candidates:
    return candidates(
        model_of(*pairs),
        load if load is not None else Load(),
        stream=stream,
        path=path,
        excluded=frozenset(ServerId(name) for name in excluded),
        now=now,
    )


def names(found: Candidates) -> str:
    return "".join(each.id for each in found.ready)


# The table


def test_the_table_groups_by_model_in_order_of_registration() -> None:
    """Servers of a model stand as they were registered, ties by their ids, whatever order the store gives."""
    late = server("a", registered_at=9.0)
    servers = [late, server("d", registered_at=1.0), server("c", registered_at=1.0), server("x", model="phi")]
    table = build_table(5, servers, {late.id: health()})
    assert table.version == 5
    assert {name: [route.server.id for route in model.routes] for name, model in table.models.items()} == {
        "llama": ["c", "d", "a"],
        "phi": ["x"],
    }
    assert set(table.routes) == {"a", "c", "d", "x"}
    assert table.routes[late.id].health == health()
    assert build_table(0, [], {}).models == {}


def test_health_of_another_generation_is_worth_nothing() -> None:
    """A server whose address changed, or of which nothing is stored, starts unproven."""
    changed = server("a", generation=3)
    table = build_table(1, [changed, server("b")], {changed.id: health(generation=2)})
    assert table.routes[changed.id].health == Health(generation=3)
    assert table.routes[ServerId("b")].health == Health()
    assert build_table(1, [changed], {changed.id: health(generation=3)}).routes[changed.id].health.state is WELL


def test_a_table_is_replaced_not_changed() -> None:
    """A request keeps the table that it began with; other models are shared between the two."""
    table = table_of((server("a"), health()), (server("b"), health()), (server("x", model="phi"), health()))
    ill = health(HealthState.UNHEALTHY)
    changed = with_health(table, ServerId("b"), ill)
    assert table.routes[ServerId("b")].health.state is WELL
    assert [route.health.state for route in table.models["llama"].routes] == [WELL, WELL]
    assert changed.routes[ServerId("b")].health is ill
    assert [route.health.state for route in changed.models["llama"].routes] == [WELL, HealthState.UNHEALTHY]
    assert changed.models["phi"] is table.models["phi"]
    assert changed.routes[ServerId("a")] is table.routes[ServerId("a")]
    assert (changed.version, list(changed.models), list(changed.routes)) == (table.version, list(table.models), list(table.routes))


def test_health_of_a_removed_server_is_dropped() -> None:
    """A probe that was in flight when the owner removed the server brings nothing back."""
    table = table_of((server("a"), health()))
    assert with_health(table, ServerId("gone"), health()) is table


# Who is ready


def test_all_that_are_well_are_ready() -> None:
    """The usual case, answered without looking at anybody, in the order of registration, twice the same."""
    model = model_of((server("c"), health()), (server("a"), health()), (server("b"), health()))
    found = candidates(model, Load(), stream=True, path=CHAT, excluded=(), now=NOW)
    assert found == Candidates(ready=tuple(route.server for route in model.routes))
    assert names(found) == "abc"
    assert candidates(model, Load(), stream=True, path=CHAT, excluded=(), now=NOW) is found


def test_those_tried_already_are_left_out() -> None:
    """F07: attempts of a request are all on different servers."""
    three = [(server(name), health()) for name in "abc"]
    assert names(find(*three, excluded="b")) == "ac"
    assert find(*three, excluded="abc") == Candidates()


@pytest.mark.parametrize("state", list(HealthState))
def test_only_the_well_take_requests(state: HealthState) -> None:
    """F01, F17, H01: a server that is out gets nothing, however it came there."""
    found = find((server("a"), health(state)), (server("b"), health()))
    assert names(found) == ("ab" if state in (WELL, HealthState.HALF_OPEN) else "b")
    assert names(find((server("a"), health(state)))) == ("a" if state in (WELL, HealthState.SUSPECT, HealthState.HALF_OPEN) else "")
    assert found.last_resort is None


@pytest.mark.parametrize(
    ("state", "returns_in"),
    [
        (HealthState.PROBING, 7.0),
        (HealthState.UNHEALTHY, 7.0),
        (HealthState.MISCONFIGURED, 7.0),
        (HealthState.DEACTIVATED, 7.0),
    ],
)
def test_who_is_out_returns_with_its_next_probe(state: HealthState, returns_in: float) -> None:
    """H11: the client is told when to come back."""
    assert find((server("a"), health(state))) == Candidates(returns_in=returns_in)
    assert find((server("a"), health(state, next_probe=NextProbe(at=NOW - 5)))).returns_in == 0.0
    assert find((server("a"), health(state)), (server("b"), health(state, next_probe=NextProbe(at=NOW + 3)))).returns_in == 3.0


def test_the_archived_do_not_return() -> None:
    """Nothing is promised of a server that is not probed any more."""
    assert find((server("a"), health(HealthState.ARCHIVED, next_probe=NextProbe(at=inf)))) == Candidates()


def test_who_rests_is_left_out_until_its_time_has_come() -> None:
    """F10, F13: others serve meanwhile; when all rest, the earliest return is told."""
    resting, other = (server("a"), health(rest=Rest(until=NOW + 3, status=429))), (server("b"), health())
    assert names(find(resting, other)) == "b"
    assert names(find(resting, other, now=NOW + 3)) == "ab"
    assert names(find(resting, (server("b", cap=9), health()), now=NOW + 3)) == "ab"
    alone = find(resting, (server("c"), health(rest=Rest(until=NOW + 30, status=503))))
    assert alone == Candidates(busy=429, returns_in=3.0)
    assert find(resting, (server("c"), health(HealthState.UNHEALTHY, next_probe=NextProbe(at=NOW + 1)))).returns_in == 1.0


def test_a_server_that_asked_one_client_for_a_pause_may_serve_others() -> None:
    """S4: if no other server is ready; and never beyond its cap."""
    refused = health(rest=Rest(until=NOW + 3, status=429, client="one"))
    alone = find((server("a"), refused), (server("b"), health(rest=Rest(until=NOW + 3, status=429))))
    assert alone.ready_for("one") == []
    assert [each.id for each in alone.ready_for("other")] == ["a"]
    with_another = find((server("a"), refused), (server("b"), health()))
    assert [each.id for each in with_another.ready_for("other")] == ["b"]
    capped = (server("a", cap=1), refused)
    assert not find(capped, load=loaded(a=1)).ready_for("other")
    assert not find((server("a"), refused), (server("b", cap=1), health()), load=loaded(b=1)).ready_for("other")


def test_caps_are_kept() -> None:
    """L07, L08: a server at its cap gets nothing more; waiting for it makes sense, and the message is not "resting"."""
    capped, other = (server("a", cap=2), health()), (server("b"), health())
    assert names(find(capped, load=loaded(a=1))) == "a"
    assert find(capped, load=loaded(a=2)) == Candidates(full=True)
    found = find(capped, other, load=loaded(a=2, b=50))
    assert (names(found), found.full) == ("b", True)
    busy_too = find(capped, (server("c"), health(rest=Rest(until=NOW + 3, status=429))), load=loaded(a=2))
    assert (busy_too.full, busy_too.busy, busy_too.returns_in) == (True, None, 3.0)


def test_a_half_open_server_takes_one_request() -> None:
    """H12: the next waits as for any other slot."""
    half = (server("a", cap=50), health(HealthState.HALF_OPEN))
    assert names(find(half)) == "a"
    assert find(half, load=loaded(a=1)) == Candidates(full=True)


@pytest.mark.parametrize(
    "reason", [{"state": HealthState.SUSPECT}, {"blame": Blame(doubted_until=NOW + 5)}, {"blame": Blame(lacking_until=NOW + 5)}]
)
def test_suspect_and_doubted_servers_are_chosen_last(reason: dict[str, Any]) -> None:
    """S12: they are ready only if no better server is; before those that do not know the call, and within their caps."""
    last = server("a"), attrs.evolve(health(), **reason)
    assert names(find(last, (server("b"), health()))) == "b"
    assert names(find(last, (server("b"), health()), excluded="b")) == "a"
    assert names(find(last, last)) == "aa"
    found = find(last, (server("b", cap=1), health()), load=loaded(b=1))
    assert (names(found), found.full) == ("a", True)
    assert names(find(last, (server("b"), health(rest=Rest(until=NOW + 9))))) == "a"
    assert names(find(last, (server("b"), health(unsupported=((CHAT, NOW + 9),))))) == "a"
    assert find((server("a", cap=1), last[1]), load=loaded(a=1)) == Candidates(full=True)
    if "state" not in reason:
        assert names(find(last, (server("b"), health()), now=NOW + 5)) == "ab"


def test_a_stream_needs_a_server_that_streams() -> None:
    """FR-API-REG: servers registered without streaming are kept from streams, and no others are refused for it."""
    mute, other = (server("a", streaming=False), health()), (server("b"), health())
    assert names(find(mute, other, stream=True)) == "b"
    assert names(find(mute, other)) == "ab"
    assert find(mute, stream=True) == Candidates(streaming_unsupported=True)
    assert names(find(mute)) == "a"
    ill = (server("b"), health(HealthState.UNHEALTHY))
    assert not find(mute, ill, stream=True).streaming_unsupported
    assert not find(mute, other, stream=True, excluded="b").streaming_unsupported
    off = (server("b"), health(HealthState.DEACTIVATED))
    assert find(mute, off, stream=True).streaming_unsupported
    assert not find((server("a", streaming=False), health(HealthState.DEACTIVATED)), stream=True).streaming_unsupported


def test_who_does_not_support_the_path_comes_last() -> None:
    """Class G: it is left out while others can serve, and asked again when nobody else is there, for its answer says it best."""
    lacking = (server("a"), health(unsupported=((CHAT, NOW + 100),)))
    assert names(find(lacking, (server("b"), health()))) == "b"
    assert names(find(lacking, (server("b"), health()), path="/v1/embeddings")) == "ab"
    assert names(find(lacking, (server("b"), health()), now=NOW + 100)) == "ab"
    assert names(find(lacking)) == "a"
    assert names(find(lacking, (server("b"), health(HealthState.UNHEALTHY)))) == "a"
    assert find(lacking, (server("b"), health(rest=Rest(until=NOW + 2, status=429)))) == Candidates(busy=429, returns_in=2.0)
    assert find(lacking, (server("b", cap=1), health()), load=loaded(b=1)) == Candidates(full=True)
    full = (server("a", cap=1), health(unsupported=((CHAT, NOW + 100),)))
    assert find(full, load=loaded(a=1)) == Candidates()


# The last resort


def suspect(name: str, *, struck_at: float = 0.0, by_traffic: bool = True, **changes: Any) -> tuple[Server, Health]:
    return server(name), health(HealthState.UNHEALTHY, by_traffic=by_traffic, blame=Blame(struck_at=struck_at), **changes)


def resort(*pairs: tuple[Server, Health], **options: Any) -> str | None:
    found = find(*pairs, **options)
    assert not found.ready
    return None if found.last_resort is None else found.last_resort.id


def test_the_least_recently_failed_is_the_last_resort() -> None:
    """H11: only when nobody is usable, and one request at a time."""
    three = [suspect("a", struck_at=30.0), suspect("b", struck_at=10.0), suspect("c", struck_at=20.0)]
    assert resort(*three) == "b"
    assert resort(*three, load=loaded(b=1)) is None
    assert resort(*three, load=loaded(a=1)) is None
    assert find(*three, load=loaded(a=1)).last_resort_taken
    assert not find(*three).last_resort_taken
    assert resort(*three, excluded="b") == "c"
    assert resort(*three, excluded="b", load=loaded(b=1)) is None
    assert resort(*three, suspect("d", by_traffic=False), load=loaded(d=1)) is None
    assert find(*three, (server("d"), health())).last_resort is None


def test_who_failed_a_probe_is_no_resort() -> None:
    """H11: by probe means 503 at once."""
    found = find(suspect("a", by_traffic=False), suspect("b", by_traffic=False))
    assert (found.last_resort, found.returns_in) == (None, 7.0)
    assert resort(suspect("a", struck_at=5.0, by_traffic=False), suspect("b", struck_at=9.0)) == "b"


def test_the_last_resort_must_be_able_to_serve() -> None:
    """It streams if a stream is asked for, does not rest, and is not asked while waiting for a slot is enough."""
    mute = server("a", streaming=False), health(HealthState.UNHEALTHY, by_traffic=True)
    assert resort(mute, stream=True) is None
    assert resort(mute) == "a"
    assert resort(suspect("a", rest=Rest(until=NOW + 1))) is None
    assert resort(suspect("a", rest=Rest(until=NOW))) == "a"
    assert resort(suspect("a"), (server("b", cap=1), health()), load=loaded(b=1)) is None
    assert resort(suspect("a"), (server("b"), health(rest=Rest(until=NOW + 9)))) == "a"


# Everything at once

PATHS = [CHAT, "/v1/embeddings"]


@st.composite
def routes(draw: st.DrawFn) -> list[tuple[Server, Health]]:
    """Draw up to five servers of one model in any condition."""
    found = []
    around = st.floats(NOW - 60, NOW + 60)
    for name in "abcde"[: draw(st.integers(0, 5))]:
        each = server(name, cap=draw(st.none() | st.integers(1, 3)), streaming=draw(st.booleans()))
        known = Health(
            state=draw(st.just(WELL) | st.sampled_from(list(HealthState))),
            by_traffic=draw(st.booleans()),
            next_probe=NextProbe(at=NOW + draw(st.floats(-100, 100))),
            rest=Rest(until=draw(st.just(0.0) | around), status=draw(st.sampled_from([429, 503]))),
            blame=Blame(
                struck_at=draw(st.floats(0, NOW)),
                doubted_until=draw(st.just(0.0) | around),
                lacking_until=draw(st.just(0.0) | around),
            ),
            unsupported=draw(st.just(()) | st.tuples(st.tuples(st.sampled_from(PATHS), st.floats(NOW - 60, NOW + 60)))),
        )
        found.append((each, known))
    return found


@given(
    routes(),
    st.dictionaries(st.sampled_from("abcde"), st.integers(0, 3)),
    st.booleans(),
    st.sampled_from(PATHS),
    st.sets(st.sampled_from("abcde")),
)
def test_candidates_keep_their_promises(
    pairs: list[tuple[Server, Health]], slots: dict[str, int], stream: bool, path: str, excluded: set[str]
) -> None:
    """Whatever the state of the servers, the shortcut included: who is ready may take the request, and nobody who may is left out."""
    load = loaded(**slots)
    model = Model("llama", tuple(Route(each, known) for each, known in pairs))
    found = candidates(model, load, stream=stream, path=path, excluded={ServerId(name) for name in excluded}, now=NOW)

    def fits(each: Server) -> bool:
        return each.id not in excluded and (each.capabilities.streaming or not stream)

    def has_slot(each: Server, known: Health) -> bool:
        cap = 1 if known.state is HealthState.HALF_OPEN else each.max_concurrency
        return cap is None or load.in_flight(each.id) < cap

    def is_usable(known: Health) -> bool:
        return known.status == "healthy" and known.rest.until <= NOW and supports(known, path, NOW)

    usable = [(each, known) for each, known in pairs if fits(each) and is_usable(known)]
    free = [each for each, known in usable if has_slot(each, known)]
    if free or found.full or found.busy:
        assert list(found.ready) == ([each for each, known in pairs if each in free and not is_last(known, NOW)] or free)
    by_id = {each.id: known for each, known in pairs}
    for each in found.ready:
        known = by_id[each.id]
        assert fits(each)
        assert known.status == "healthy"
        assert known.rest.until <= NOW
        assert has_slot(each, known)
    assert found.full == any(not has_slot(each, known) for each, known in usable)
    assert not (found.busy and (found.ready or found.full))
    assert found.returns_in is None or 0.0 <= found.returns_in <= 100.0
    suspected = [each for each, known in pairs if fits(each) and known.state is HealthState.UNHEALTHY and known.by_traffic]
    if found.last_resort_taken:
        assert suspected
        assert not found.ready
        assert not found.full
        assert found.last_resort is None
    if found.last_resort is not None:
        assert not found.ready
        assert not found.full
        assert by_id[found.last_resort.id].state is HealthState.UNHEALTHY
        assert by_id[found.last_resort.id].by_traffic
        assert fits(found.last_resort)
        assert not any(load.in_flight(each.id) for each, known in pairs if known.state is HealthState.UNHEALTHY)


# Names


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lama3", ["llama3", "Llama3.1"]),
        ("LLAMA3", ["llama3", "Llama3.1"]),
        ("phi4", ["phi-4"]),
        ("gpt-4o", []),
        ("", []),
        ("x" * 100_000, []),
    ],
)
def test_names_that_were_nearly_right(written: str, meant: list[str]) -> None:
    """FR-ERROR-005: a slip of the pen is answered with the names that there are, case or not."""
    assert close_names(written, ["llama3", "phi-4", "Llama3.1", "bge-m3"]) == meant


def test_names_that_differ_in_case_only_are_one() -> None:
    """The first of them is named; at most three are."""
    assert close_names("model", ["Model", "MODEL"]) == ["Model"]
    assert len(close_names("model", [f"model{number}" for number in range(10_000)])) == 3
    assert close_names("model", []) == []


# Stored responses


def test_the_servers_at_one_url_have_the_same_responses() -> None:
    """The server itself comes first; another model's at the same URL will do; no other does."""
    here = server("here")
    twin, elsewhere = attrs.evolve(here, id=ServerId("a twin")), server("elsewhere")
    for servers, expected in (([twin, here], here), ([elsewhere, twin], twin), ([elsewhere], None)):
        assert server_at(here, build_table(1, servers, {}).models["llama"]) == expected
    assert server_at(here, None) is None
