"""Which servers belong to one host, and what becomes of its cap when servers come, change and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.errors import AlreadyRegistered, InvalidField
from multiverse_gateway.core.health import fresh
from multiverse_gateway.core.hosts import Host, HostIndex, all_hosts, host_identity
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.registry_plans import HostChange, HostPlan, plan_host_change
from multiverse_gateway.core.routing import RoutingTable, build_table, candidates, has_slot, pools_of
from multiverse_gateway.core.servers import HostId, Metadata, Server, model_key
from multiverse_gateway.testing.store import make_host, make_server


def server(name: str, **facts: Any) -> Server:
    """Return a server of the host "lab", which is reached at one URL with one key."""
    values = {
        "model_name": name,
        "endpoint_url": "http://lab:1",
        "max_concurrency": None,
        "host_id": "lab",
        "upstream_model": None,
        **facts,
    }
    return make_server(name, **values)


def placed(new: Server, *servers: Server, before: Server | None = None, states_cap: bool = True, **host: Any) -> tuple[Server, Host]:
    """Return what a registration makes of a server beside others, and of its host."""
    stored = [make_host("lab", endpoint_url="http://lab:1", api_key=new.api_key, owner="s1", offers=(), **host)] if host else []
    hosts = all_hosts(servers, stored)
    return HostIndex.of(servers, hosts).place(new, before=before, states_cap=states_cap, new_id=HostId("new"), wall=9.0)


def test_a_server_joins_the_host_of_its_owner_url_and_key() -> None:
    known = server("a")
    for facts in ({"endpoint_url": "http://other:1"}, {"api_key": "another"}, {"metadata": Metadata(student_id="another")}):
        assert placed(server("b", host_id="?", **facts), known)[0].host_id == "new", facts
    assert placed(server("b", host_id="?"), known)[0].host_id == "lab"
    assert placed(server("b", host_id="?"))[0].host_id == "new"


def test_a_host_changes_with_its_only_server() -> None:
    """A new address or key is that of the host; with other servers there, the changed one gets a host of its own."""
    before = server("a")
    moved = attrs.evolve(before, endpoint_url="http://lab:2", api_key="new key")
    found, host = placed(moved, before, before=before, max_concurrency=4)
    assert (found.host_id, host.endpoint_url, host.api_key, host.updated_at) == ("lab", "http://lab:2", "new key", 9.0)
    assert placed(moved, before, server("b"), before=before, max_concurrency=4)[0].host_id == "new"


def test_the_cap_of_a_host_is_that_of_its_only_server() -> None:
    before = server("a", max_concurrency=4)
    for cap in (2, 8, None):
        _, host = placed(attrs.evolve(before, max_concurrency=cap), before, before=before, max_concurrency=4)
        assert host.max_concurrency == cap


def test_the_cap_of_a_larger_host_grows_with_what_is_stated_and_never_shrinks() -> None:
    known = server("a", max_concurrency=4)
    for cap, states_cap, becomes in ((2, True, 4), (8, True, 8), (None, True, None), (8, False, 4), (None, False, 4)):
        _, host = placed(server("b", max_concurrency=cap), known, states_cap=states_cap, max_concurrency=4)
        assert host.max_concurrency == becomes, (cap, states_cap)
    unlimited = server("a")
    assert placed(server("b", max_concurrency=2), unlimited)[1].max_concurrency is None


def test_a_cap_of_its_own_outlives_other_changes_of_the_only_server() -> None:
    """A change that leaves the server's cap as it was leaves the host's, too."""
    before = server("a", max_concurrency=2)
    assert placed(attrs.evolve(before, weight=3), before, before=before, max_concurrency=4)[1].max_concurrency == 4
    assert placed(attrs.evolve(before, max_concurrency=3), before, before=before, max_concurrency=4)[1].max_concurrency == 3


def planned(*servers: Server, is_active: bool = True, others: Sequence[Host] = (), cap: int | None = 4, **fields: Any) -> HostPlan:
    """Return what a change of the host "lab" means for these servers."""
    host = make_host("lab", endpoint_url="http://lab:1", api_key="sk", owner="s1", offers=(), max_concurrency=cap)
    change = HostChange(fields=fields)
    return plan_host_change(servers, [host, *others], host, change, is_active=is_active, wall=9.0)


def keyed(name: str, **facts: Any) -> Server:
    """Return a server of the host "lab" with its key and owner."""
    return server(name, **{"api_key": "sk", "metadata": Metadata(student_id="s1", description="d"), **facts})


def test_a_new_url_or_key_of_a_host_begins_a_new_generation_of_all_its_servers() -> None:
    """The loopback address that was opened for a server closes with the URL only."""
    servers = [keyed("a", opened_address="127.0.0.1:1"), keyed("b"), keyed("c", host_id="other", endpoint_url="http://other:1")]
    for fields, opened in (({"endpoint_url": "http://new:1"}, None), ({"api_key": None}, "127.0.0.1:1")):
        plan = planned(*servers, **fields)
        assert (plan.needs_probe, plan.is_change, plan.host.updated_at) == (True, True, 9.0)
        assert [after.id for after in plan.servers] == ["a", "b"]
        for before, after in zip(servers, plan.servers, strict=False):
            assert after.generation == before.generation + 1
            assert (after.endpoint_url, after.api_key) == (plan.host.endpoint_url, plan.host.api_key)
            assert (after.metadata, after.owner_digest) == (before.metadata, before.owner_digest)
        assert plan.servers[0].opened_address == opened


def test_the_cap_and_the_owner_of_a_host_change_without_a_probe() -> None:
    """Servers with the cap of the host follow it, those with another one keep it; nothing else changes."""
    servers = [keyed("a", max_concurrency=4), keyed("b", max_concurrency=1), keyed("c", max_concurrency=None)]
    for cap in (2, None):
        plan = planned(*servers, max_concurrency=cap)
        assert [after.max_concurrency for after in plan.servers] == [cap, 1, None]
        assert (plan.needs_probe, plan.is_change, plan.host.max_concurrency) == (False, True, cap)
        assert plan.servers[1:] == tuple(servers[1:])
    plan = planned(*servers, owner="s2")
    assert (plan.needs_probe, {after.metadata.student_id for after in plan.servers}) == (False, {"s2"})
    assert {after.metadata.description for after in plan.servers} == {"d"}
    assert [after.generation for after in plan.servers] == [before.generation for before in servers]
    assert not planned(*servers, max_concurrency=4).is_change
    assert planned(*servers, is_active=False).needs_probe
    assert not planned(is_active=False).needs_probe, "a host without servers has nothing to probe"


def test_two_hosts_do_not_become_one_by_a_change() -> None:
    """Neither a server with the same model and URL nor a host with the same owner, URL and key may be there."""
    elsewhere = keyed("x", model_name="a", host_id="other", endpoint_url="http://other:1", api_key="another")
    with pytest.raises(AlreadyRegistered):
        planned(keyed("a"), elsewhere, endpoint_url="http://other:1")
    other = make_host("other", endpoint_url="http://other:1", api_key="sk", owner="s1")
    with pytest.raises(InvalidField, match="another host"):
        planned(keyed("a"), others=[other], endpoint_url="http://other:1")
    assert planned(keyed("a"), others=[other], max_concurrency=1).is_change


def table_of(servers: list[Server], cap: int | None) -> RoutingTable:
    """Return the routing table of healthy servers of the host "lab" with a cap."""
    host = make_host("lab", max_concurrency=cap)
    return build_table(1, servers, {each.id: fresh(1, now=0, wall=0) for each in servers}, [host])


caps = st.none() | st.integers(1, 4)


@given(own=st.lists(caps, min_size=1, max_size=4), cap=caps, steps=st.lists(st.tuples(st.integers(0, 3), st.booleans(), caps), max_size=60))
def test_the_cap_of_a_host_is_never_exceeded(own: list[int | None], cap: int | None, steps: list[tuple[int, bool, int | None]]) -> None:
    """Over any starts, ends and changes of the cap: nothing begins above the cap of its server or host, and everything ends at 0."""
    servers = [server(f"m{number}", max_concurrency=each) for number, each in enumerate(own)]
    table, load, running = table_of(servers, cap), Load(), list[Server]()
    for number, ends, new_cap in steps:
        each = servers[number % len(servers)]
        model = table.models[model_key(each.model_name)]
        found = candidates(model, load, stream=False, path="/v1/chat/completions", excluded=(), now=0.0)
        if ends and running:
            gone = running.pop(number % len(running))
            load.finished(gone.id, gone.model_name, gone.host_id, seconds=0.1, failed=False, first_byte_timeout=1.0)
            table = table_of(servers, cap := new_cap)
        elif found.ready:
            assert has_slot(table.routes[each.id], load)
            load.started(each.id, each.model_name, each.host_id)
            running.append(each)
            assert cap is None or len(running) <= cap
            assert each.max_concurrency is None or load.in_flight(each.id) <= each.max_concurrency
        else:
            assert found.full
        assert load.host_in_flight(HostId("lab")) == len(running)
    for each in running:
        load.finished(each.id, each.model_name, each.host_id, seconds=0.1, failed=False, first_byte_timeout=1.0)
    assert (load.host_in_flight(HostId("lab")), load.total) == (0, 0)


def test_the_models_of_a_host_share_its_slots() -> None:
    """A model with a smaller cap of its own may use fewer of them."""
    (pool,) = pools_of(table_of([server("a", max_concurrency=1), server("b")], 4)).values()
    assert (pool.models, pool.slots, pool.slots_of("a"), pool.slots_of("b")) == (("a", "b"), 4, 1, 4)
    (pool,) = pools_of(table_of([server("a", max_concurrency=1), server("b", max_concurrency=2)], None)).values()
    assert (pool.slots, pool.slots_of("a"), pool.slots_of("b")) == (3, 1, 2)
    (pool,) = pools_of(table_of([server("a"), server("b")], None)).values()
    assert pool.slots is None


def test_hosts_that_were_not_saved_are_those_that_their_servers_show() -> None:
    """As after an update, or with a store that keeps none; a saved host without servers is shown only if it offers something."""
    alone = server("c", host_id="c", endpoint_url="http://c:1", max_concurrency=2)
    saved = [make_host("lab", max_concurrency=7), make_host("gone", offers=()), make_host("offering", offers=("*",))]
    hosts = all_hosts([server("a"), server("b"), alone], saved)
    assert {host_id: host.max_concurrency for host_id, host in hosts.items()} == {"lab": 7, "c": 2, "offering": 3}
    assert (hosts[HostId("c")].owner, hosts[HostId("c")].endpoint_url) == host_identity(alone)[:2]
    assert build_table(1, [alone], {}).hosts[HostId("c")].id == "c"


def test_servers_that_are_placed_one_after_the_other_find_each_other() -> None:
    """As in an import: the second model joins the host that the first one got, and a host that moved is found at its new address."""
    first = server("a", host_id="?")
    index = HostIndex.of([], {})
    placed_first, host = index.place(first, before=None, states_cap=True, new_id=HostId("one"), wall=1.0)
    second, _ = index.place(server("b", host_id="?"), before=None, states_cap=True, new_id=HostId("two"), wall=1.0)
    assert (placed_first.host_id, second.host_id, host.id) == ("one", "one", "one")
    alone = HostIndex.of([placed_first], {host.id: host})
    moved, _ = alone.place(
        attrs.evolve(placed_first, endpoint_url="http://lab:2"), before=placed_first, states_cap=True, new_id=HostId("x"), wall=2.0
    )
    joined = [
        alone.place(server(name, endpoint_url=url, host_id="?"), before=None, states_cap=True, new_id=HostId("new"), wall=3.0)[0].host_id
        for name, url in (("c", "http://lab:2"), ("d", "http://lab:1"))
    ]
    assert (moved.host_id, joined) == ("one", ["one", "new"])
