"""Why a request went to a server."""

from __future__ import annotations

import attrs

from multiverse_gateway.core.explaining import MAX_EXPLAINED, compared, described, judged
from multiverse_gateway.core.health import HealthState, fresh
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.routing import Verdict, build_table
from multiverse_gateway.core.servers import ServerId
from support.exchanges import MODEL, envelope, server

NOW = 1000.0
HEALTHY = fresh(1, now=NOW, wall=NOW)
DEAD = attrs.evolve(HEALTHY, state=HealthState.UNHEALTHY)


def test_each_server_of_the_model_is_judged() -> None:
    servers = [server("a"), server("b", cap=1), server("c"), server("d"), server("e", model="other")]
    health = {each.id: DEAD if each.id == "c" else HEALTHY for each in servers}
    load = Load()
    load.started(ServerId("b"), MODEL)
    table = build_table(1, servers, health)
    found = judged(table.models[MODEL], load, envelope(), excluded={ServerId("d")}, now=NOW)
    assert [(route.server.id, verdict) for route, verdict in found] == [
        ("a", Verdict.READY),
        ("b", Verdict.FULL),
        ("c", Verdict.ILL),
        ("d", Verdict.TRIED),
    ]
    assert [each.id for each in compared(found)] == ["a"]
    shown = described(found, load, {ServerId("a"): 1 / 3})
    assert [(one["server"], one["in_flight"], one["score"]) for one in shown] == [
        ("a", 0, 0.3333),
        ("b", 1, None),
        ("c", 0, None),
        ("d", 0, None),
    ]


def test_a_request_for_one_server_is_explained_by_that_one() -> None:
    servers = [server("a"), server("b")]
    table = build_table(1, servers, {each.id: HEALTHY for each in servers})
    asked = attrs.evolve(envelope(), server_id=ServerId("b"))
    assert [route.server.id for route, _ in judged(table.models[MODEL], Load(), asked, excluded=(), now=NOW)] == ["b"]
    assert judged(None, Load(), asked, excluded=(), now=NOW) == []


def test_the_last_servers_are_compared_when_no_better_one_is_ready() -> None:
    servers = [server("a")]
    table = build_table(1, servers, {servers[0].id: attrs.evolve(HEALTHY, state=HealthState.SUSPECT)})
    found = judged(table.models[MODEL], Load(), envelope(), excluded=(), now=NOW)
    assert [each.id for each in compared(found)] == ["a"]


def test_an_explanation_fits_into_a_header() -> None:
    servers = [server(f"s{number}") for number in range(100)]
    table = build_table(1, servers, {each.id: HEALTHY for each in servers})
    found = judged(table.models[MODEL], Load(), envelope(), excluded=(), now=NOW)
    assert len(described(found, Load(), {})) == MAX_EXPLAINED
