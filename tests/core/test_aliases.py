"""What an alias comes to, and which of its models a request gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.aliases import MAX_ALIASES, Alias, by_key, models_of, plan_alias, plan_import_of_aliases
from multiverse_gateway.core.errors import InvalidField
from multiverse_gateway.core.fairness import FairQueue, Flow, Ticket
from multiverse_gateway.core.health import Health, HealthState, fresh
from multiverse_gateway.core.load import Load
from multiverse_gateway.core.needs import Needs
from multiverse_gateway.core.routing import Candidates, RoutingTable, build_table, candidates, pools_of, with_health
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.testing.store import make_server

WELL = fresh(1, now=0, wall=0)


def alias(name: str, *models: str) -> Alias:
    """Return an alias."""
    return Alias(name=name, models=models, created_at=1.0, updated_at=1.0)


def test_an_alias_that_leads_to_itself_is_rejected() -> None:
    """Directly over others, in any spelling; only in its own list does its name stand for the model of that name."""
    known = [alias("a", "b:latest"), alias("b", "c"), alias("x", "y")]
    with pytest.raises(InvalidField, match="must not lead back to the alias itself, as c → a → b → c does"):
        plan_alias("c", ["phi", "a"], known, wall=2.0)
    saved = plan_alias("c", ["c", "phi", "phi", "x"], known, wall=2.0)
    assert (saved.models, saved.created_at, saved.updated_at) == (("c", "phi", "x"), 2.0, 2.0)
    again = plan_alias("a:latest", ["qwen"], known, wall=3.0)
    assert (again.name, again.created_at, again.updated_at) == ("a", 1.0, 3.0)


def test_an_alias_stands_for_something() -> None:
    with pytest.raises(InvalidField, match="must name at least one model"):
        plan_alias("a", [], [], wall=1.0)


def test_there_are_only_so_many_aliases() -> None:
    known = [alias(f"a{number}", "x") for number in range(MAX_ALIASES)]
    with pytest.raises(InvalidField, match="1,000 aliases"):
        plan_alias("one more", ["x"], known, wall=1.0)
    assert plan_alias("a5", ["y"], known, wall=1.0).models == ("y",)


def test_an_import_of_aliases_saves_those_that_change() -> None:
    """A name is found in any spelling and keeps its first one; unchanged aliases keep their times; the limit counts what would be there."""
    known = [alias("a", "b"), alias("best:latest", "phi")]
    saved = plan_import_of_aliases([("best", ["phi"]), ("a", ["c", "c"]), ("new", ["a"])], known, wall=9.0)
    assert [(each.name, each.models, each.created_at, each.updated_at) for each in saved] == [
        ("a", ("c",), 1.0, 9.0),
        ("new", ("a",), 9.0, 9.0),
    ]
    assert plan_import_of_aliases([], known, wall=9.0) == ()
    with pytest.raises(InvalidField, match="at least one model"):
        plan_import_of_aliases([("new", [])], known, wall=9.0)
    with pytest.raises(InvalidField, match="at least one model"):
        plan_alias("new", [], known, wall=9.0)
    full = [alias(f"a{number}", "x") for number in range(MAX_ALIASES)]
    with pytest.raises(InvalidField, match="would make 1,001 aliases"):
        plan_import_of_aliases([("new", ["x"])], full, wall=9.0)
    assert len(plan_import_of_aliases([("a5", ["y"])], full, wall=9.0)) == 1


names = st.sampled_from("abcdef")


@given(lists=st.dictionaries(names, st.lists(names, min_size=1, max_size=4), max_size=6))
def test_what_an_alias_comes_to_is_a_list_of_models(lists: dict[str, list[str]]) -> None:
    """Whatever two processes saved at once: it ends, each model stands there once, and saved aliases without loops give no other alias."""
    known: list[Alias] = []
    for name, models in lists.items():
        try:
            known.append(plan_alias(name, models, known, wall=1.0))
        except InvalidField:
            known.append(alias(name, *models))  # as another process did at the same time
    aliases = by_key(known)
    for key in aliases:
        found = models_of(key, aliases)
        assert len(set(found)) == len(found)
        assert all(member not in aliases or member in aliases[member].models for member in found)


def servers(*models: str, cap: int | None = 1) -> list[Server]:
    """Return a server of each model, on a host of its own."""
    return [make_server(f"at {name}", model_name=name, upstream_model=None, max_concurrency=cap) for name in models]


def table_of(listed: list[Server], *aliases: Alias, health: dict[str, Health] | None = None) -> RoutingTable:
    """Return the table of healthy servers."""
    return build_table(1, listed, {each.id: (health or {}).get(each.id, WELL) for each in listed}, aliases=aliases)


def found_for(table: RoutingTable, load: Load, key: str = "best") -> Candidates:
    """Return the candidates for a chat with the alias."""
    model = table.find(key)
    assert model is not None
    return candidates(model, load, stream=False, path="/v1/chat/completions", excluded=(), now=0.0)


def ready(table: RoutingTable, load: Load) -> list[str]:
    """Return which servers a request for the alias can get."""
    return [server.id for server in found_for(table, load).ready]


def test_a_request_gets_the_first_model_with_a_free_slot() -> None:
    table, load = table_of(servers("large", "small", "other"), alias("best", "missing", "large", "small")), Load()
    assert ready(table, load) == ["at large"]
    load.started(ServerId("at large"), "large")
    assert ready(table, load) == ["at small"]
    load.started(ServerId("at small"), "small")
    assert (ready(table, load), found_for(table, load).full) == ([], True), "it waits: another model is no substitute"


def test_a_request_skips_models_without_a_usable_server() -> None:
    ill = Health(state=HealthState.DEACTIVATED)
    table = table_of(servers("large", "small"), alias("best", "large", "small"), health={"at large": ill})
    assert ready(table, Load()) == ["at small"]
    table = with_health(table, ServerId("at large"), WELL)
    assert ready(table, Load()) == ["at large"], "the table of a newer health has the alias, too"
    table = with_health(with_health(table, ServerId("at large"), ill), ServerId("at small"), ill)
    assert (ready(table, Load()), found_for(table, Load()).full) == ([], False)
    suspect = Health(state=HealthState.UNHEALTHY, by_traffic=True)
    assert found_for(with_health(table, ServerId("at small"), suspect), Load()).last_resort is not None


def test_an_alias_without_models_has_no_server() -> None:
    table = table_of(servers("large"), alias("best", "missing"))
    assert found_for(table, Load()) == Candidates()


def test_an_alias_hides_the_model_of_its_name() -> None:
    table = table_of(servers("best", "large", cap=None), alias("best", "large", "best"))
    assert ready(table, Load()) == ["at large"]
    assert found_for(table, Load(), "large").ready[0].id == "at large"


def test_what_a_request_needs_holds_for_each_model_of_an_alias() -> None:
    table = table_of(servers("large", "small", cap=None), alias("best", "large", "small"))
    model = table.find("best")
    assert model is not None
    assert [tier.name for tier in model.suited(Needs()).tiers] == ["large", "small"]


def test_requests_for_an_alias_wait_for_the_slots_of_its_models() -> None:
    """The slots of a host are shared by its models and the aliases that stand for them."""
    pools = pools_of(table_of([*servers("large", "small", cap=2), *servers("free", cap=None)], alias("best", "large", "small", "free")))
    found = {host_id: (pool.models, [pool.slots_of(name) for name in pool.models]) for host_id, pool in pools.items()}
    assert found == {
        "host of at large": (("large", "best"), [2, 2]),
        "host of at small": (("small", "best"), [2, 2]),
        "host of at free": (("free", "best"), [None, None]),
    }
    pair = [make_server(name, model_name=name, upstream_model=None, max_concurrency=1, host_id="lab") for name in ("large", "small")]
    (pool,) = pools_of(table_of(pair, alias("best", "large", "small"))).values()
    assert [pool.slots_of(name) for name in ("large", "small", "best")] == [1, 1, 1]


@pytest.mark.parametrize("others", [(), ("small",)])
def test_an_alias_and_its_model_share_the_slots_fairly(others: tuple[str, ...]) -> None:
    """The model that ran last goes first only where another model would have to be loaded."""
    pair = [make_server(name, model_name=name, upstream_model=None, max_concurrency=1, host_id="lab") for name in ("large", *others)]
    queue = FairQueue()
    queue.serve(pools_of(table_of(pair, alias("best", "large"))))
    running, heavy, light = (Ticket(model, Flow(client), Chat()) for model, client in (("large", "a"), ("large", "a"), ("best", "b")))
    queue.begin(running, 0.0, "lab")
    queue.join(heavy, 1.0)
    queue.join(light, 1.0)
    queue.end(running, 2.0)
    assert queue.pick_for("lab", 2.0) is (heavy if others else light)


class Chat:
    """What the queue asks of a request."""

    needs = None

    def estimated_cost(self) -> float:
        """Return an estimate."""
        return 900.0

    def actual_cost(self) -> float:
        """Return what it cost."""
        return 900.0
