"""The simulation of many gateways: nothing gets lost in it, it agrees with what was measured, and it finds limits."""

from __future__ import annotations

import itertools
from pathlib import Path

import attrs
import pytest
from benchmarks.clock import Clock
from benchmarks.scaling.plan import Call, Cost, Costs, Plan
from benchmarks.scaling.simulation import Line, World, simulate
from benchmarks.scaling.tables import FULL, SIZES, excess, limit, line
from hypothesis import given, settings
from hypothesis import strategies as st

from multiverse_gateway.core.health import HealthPolicy
from multiverse_gateway.core.probing import shard_count
from multiverse_gateway.monitor import FOLLOW_SECONDS

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "scaling.md"
CALM = Plan(gateways=3, servers=100, outages_per_hour=0.0)
MEASURED = [(1, 10, 7), (3, 10, 19), (1, 100, 8), (3, 100, 19), (1, 1000, 19), (3, 1000, 53)]
"""Gateways, servers and transactions per second, as the page on scaling has them."""

plans = st.builds(
    Plan,
    gateways=st.integers(1, 4),
    servers=st.integers(1, 250),
    requests=st.floats(0.0, 1000.0),
    outages_per_hour=st.floats(0.0, 60.0),
    outage=st.floats(1.0, 600.0),
    cores=st.integers(1, 4),
    seed=st.integers(0, 9),
)


@given(st.integers(1, 4), st.lists(st.floats(0.0, 10.0), max_size=20))
def test_a_line_serves_all_in_their_order(places: int, uses: list[float]) -> None:
    """Never more than it has places for, and as soon as one is free: it is never idle while somebody waits."""
    clock, begun, most = Clock(), [], 0
    queue = Line(clock, places)

    def left(number: int) -> None:
        nonlocal most
        most = max(most, queue.taken)
        begun.append((clock.now - uses[number], number))

    for number, seconds in enumerate(uses):
        queue.use(seconds, lambda number=number: left(number))  # type: ignore[misc]
    most = queue.taken
    clock.run(lambda: False)
    assert most <= places
    assert queue.taken == 0
    assert queue.busy == pytest.approx(sum(uses))
    assert sorted(number for _, number in begun) == list(range(len(uses)))
    starts = [began for began, _ in sorted(begun, key=lambda item: item[1])]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(starts))
    assert clock.now <= sum(uses) / places + max(uses, default=0.0) + 1e-9


@settings(max_examples=30)
@given(plans)
def test_nothing_gets_lost(plan: Plan) -> None:
    """Every check becomes a row of history, and every change is seen once by each of the other gateways."""
    world = World(plan)
    world.run(60.0)
    probes = world.counted.probes
    assert world.counted.rows <= probes
    world.run(65.0)
    assert world.counted.rows >= probes
    found = sum(
        len(instants)
        for member in world.members
        for finder, instants in world.database.news[1 : member.version + 1]
        if finder is not member
    )
    assert len(world.counted.delays) == found
    assert world.counted.changes == world.database.version == len(world.database.news) - 1
    assert all(member.version <= world.database.version for member in world.members)
    assert all(delay >= 0 for delay in world.counted.delays)


@settings(max_examples=15)
@given(plans)
def test_a_plan_decides_everything_and_nothing_is_used_beyond_its_end(plan: Plan) -> None:
    """The same plan, the same outcome to the last digit; what is under way at the end counts whole, so 1 may be passed a little."""
    plan = attrs.evolve(plan, warm_up=10.0, lasts=100.0)
    outcome = simulate(plan)
    assert outcome == simulate(plan)
    assert all(0.0 <= share < 1.0 + plan.silence / plan.lasts for share in (outcome.cores, outcome.row, outcome.most_probes))


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(20, 200), st.integers(2, 4))
def test_more_gateways_ask_more_and_probe_the_same(gateways: int, servers: int, times: int) -> None:
    """Whatever their number, each server is probed once per interval."""
    few = simulate(Plan(gateways=gateways, servers=servers, outages_per_hour=0.0))
    many = simulate(Plan(gateways=times * gateways, servers=servers, outages_per_hour=0.0))
    assert many.transactions > few.transactions
    assert many.cores > few.cores
    assert many.probes == pytest.approx(few.probes)
    assert many.most_probes <= few.most_probes + 1e-9


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(20, 200), st.integers(2, 4))
def test_more_servers_are_more_work(gateways: int, servers: int, times: int) -> None:
    """More probes, rows and CPU, and as soon as there are several shards more questions about their leases."""
    few = simulate(Plan(gateways=gateways, servers=servers, outages_per_hour=0.0))
    many = simulate(Plan(gateways=gateways, servers=times * servers, outages_per_hour=0.0))
    assert many.probes > few.probes
    assert many.rows > few.rows
    assert many.row > few.row
    assert many.cpu > few.cpu
    if shard_count(times * servers) > shard_count(servers):
        assert many.transactions > few.transactions


def test_more_outages_are_more_changes_and_readings() -> None:
    """And none are none."""
    calm, usual, rough = (simulate(attrs.evolve(CALM, servers=500, outages_per_hour=outages)) for outages in (0.0, 1.0, 10.0))
    assert calm.changes == calm.reads == 0
    assert 0 < usual.changes < rough.changes
    assert usual.reads < rough.reads
    assert usual.cores < rough.cores


def test_requests_cost_counts_of_use_only() -> None:
    """No request asks the database."""
    idle, busy = (simulate(attrs.evolve(CALM, requests=requests)) for requests in (0.0, 1000.0))
    assert busy.transactions - idle.transactions == pytest.approx(2 * 3 / 5, abs=0.1)  # a batch of each in five seconds
    assert busy.cores > idle.cores
    assert busy.cpu > idle.cpu


@pytest.mark.parametrize(("gateways", "servers", "transactions"), MEASURED)
def test_it_agrees_with_what_was_measured(gateways: int, servers: int, transactions: float) -> None:
    """Within a third, on real gateways and a real PostgreSQL."""
    policy = HealthPolicy(interval=20.0, timeout=5.0)
    outcome = simulate(Plan(gateways=gateways, servers=servers, requests=0.0, outages_per_hour=0.0, policy=policy))
    assert outcome.transactions == pytest.approx(transactions, rel=0.33)
    assert outcome.probes == pytest.approx(1.5 * servers / policy.interval, rel=0.15)


def test_verdicts_wait_for_a_core_as_all_else_does() -> None:
    """A database that is short of CPU saves late, too."""
    world, saved = World(CALM), list[float]()
    for _ in range(CALM.cores):
        world.database.cores.use(10.0)
    world.database.save(world.members[0], 1, [], lambda: saved.append(world.clock.now))
    world.run(20.0)
    assert 10.0 < saved[0] < 11.0


def test_a_change_is_seen_as_soon_as_it_is_saved() -> None:
    """By everybody, where nothing is short of anything: half a second until it is saved, and a moment to be told and to read."""
    outcome = simulate(attrs.evolve(CALM, outages_per_hour=10.0))
    assert 0 < outcome.seen[0] < outcome.seen[1] < FOLLOW_SECONDS + 0.2
    assert outcome.oldest <= CALM.policy.interval


def test_a_limit_is_where_something_runs_out() -> None:
    """The greatest size that is borne; a database that is slower by far bears fewer."""
    sizes = (10, 50, 100, 200, 400)
    slow = attrs.evolve(
        CALM, outages_per_hour=1.0, costs=Costs(ask=Call(there=Cost(0.1), here=Cost(0.1)), read=Call(there=Cost(0.5), here=Cost(0.5)))
    )
    most, why = limit(attrs.evolve(CALM, gateways=1, outages_per_hour=10.0), sizes)
    borne, beyond = (
        attrs.evolve(CALM, gateways=1, outages_per_hour=10.0, servers=servers) for servers in (most, sizes[sizes.index(most) + 1])
    )
    assert excess(borne, simulate(borne)) is None
    assert max(simulate(borne).shares.values()) <= FULL
    assert why == excess(beyond, simulate(beyond)) is not None
    assert limit(CALM, sizes) == (400, None)
    assert limit(attrs.evolve(slow, gateways=50), sizes) == (0, "CPU of PostgreSQL")


def test_a_line_of_the_table_has_all_columns() -> None:
    """No other gateway sees the changes of a lone one."""
    assert line(attrs.evolve(CALM, gateways=1), simulate(attrs.evolve(CALM, gateways=1))).count(" | ") == 12
    assert "| none |" in line(attrs.evolve(CALM, gateways=1), simulate(attrs.evolve(CALM, gateways=1)))


@pytest.mark.parametrize(("gateways", "servers"), [size for size in SIZES if size[1] <= 1000])
def test_the_page_shows_what_comes_out(gateways: int, servers: int) -> None:
    """When this fails, `nox -s scaling -- simulate` prints the tables again."""
    plan = Plan(gateways=gateways, servers=servers)
    assert line(plan, simulate(plan)) in PAGE.read_text(encoding="utf-8")
