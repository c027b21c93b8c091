"""The tables of the simulation, as docs/explanation/scaling.md shows them."""

import attrs
from benchmarks.scaling.plan import Outcome, Plan
from benchmarks.scaling.simulation import simulate

FULL = 0.7
"""The part of anything that may be used: beyond it queues grow fast."""
SEEN_WITHIN = 2.0
"""What the documentation promises of a change."""
SIZES = ((1, 100), (3, 100), (3, 1000), (10, 1000), (30, 3000), (100, 3000), (10, 10_000), (30, 10_000), (100, 10_000))
"""Gateways and servers."""
GATEWAYS = (1, 3, 10, 30, 100)
SERVERS = (100, 200, 500, 1000, 2000, 3000, 4000, 5000, 6000, 8000, 10_000)
OUTAGES = (0.1, 1.0, 4.0)
"""Per hour and server."""
REQUESTS = (1.0, 100.0, 1000.0)
"""Per second and gateway."""
HEADS = (
    "gateways",
    "servers",
    "probes/s",
    "probes under way",
    "history rows/s",
    "changes/s",
    "registry read/s",
    "transactions/s",
    "CPU of PostgreSQL",
    "writes",
    "CPU of a gateway",
    "seen after, p50 and p99",
    "oldest verdict",
)


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> str:
    return f"{row(*names)}\n{'|---' * len(names)}|"


def line(plan: Plan, outcome: Outcome) -> str:
    """Return a simulated plan as a row of the first table."""
    rates = [f"{rate:,.1f}" for rate in (outcome.rows, outcome.changes, outcome.reads)]
    shares = [f"{share:.1%}" for share in (outcome.cores, outcome.row, outcome.cpu)]
    seen = "none" if plan.gateways == 1 else "{:.2f} s, {:.2f} s".format(*outcome.seen)
    return row(
        f"{plan.gateways:,}",
        f"{plan.servers:,}",
        f"{outcome.probes:,.1f}",
        f"{outcome.most_probes:.0%}",
        *rates,
        f"{outcome.transactions:,.0f}",
        *shares,
        seen,
        f"{outcome.oldest:.0f} s",
    )


def excess(plan: Plan, outcome: Outcome) -> str | None:
    """Return what there is too little of, if anything."""
    fullest, share = max(outcome.shares.items(), key=lambda item: item[1])
    if share > FULL:
        return fullest
    if outcome.seen[1] > SEEN_WITHIN:
        return "changes seen late"
    return "verdicts too old" if outcome.oldest > plan.policy.interval + plan.policy.timeout else None


def limit(plan: Plan, sizes: tuple[int, ...] = SERVERS) -> tuple[int, str | None]:
    """Return the greatest of these numbers of servers that the plan's gateways bear, 0 if none, and what forbids the next one."""
    low, high, reason = 0, len(sizes), None
    while low < high:
        middle = (low + high) // 2
        larger = attrs.evolve(plan, servers=sizes[middle])
        found = excess(larger, simulate(larger))
        low, high, reason = (middle + 1, high, reason) if found is None else (low, middle, found)
    return (sizes[low - 1] if low else 0), reason


def print_all(plan: Plan) -> None:
    """Simulate and print everything; what the tables vary replaces what the plan says of it."""
    print(f"One PostgreSQL of {plan.cores} cores; interval {plan.policy.interval:g} s.\n\n{head(*HEADS)}")
    for gateways, servers in SIZES:
        sized = attrs.evolve(plan, gateways=gateways, servers=servers)
        print(line(sized, simulate(sized)), flush=True)
    print("\nThe most servers, and what there is too little of for more:\n")
    print(head("gateways", *(f"{outages:g} outages per server and hour" for outages in OUTAGES)))
    for gateways in GATEWAYS:
        found = [limit(attrs.evolve(plan, gateways=gateways, outages_per_hour=outages)) for outages in OUTAGES]
        print(row(gateways, *(f"{most:,}" + (f" ({why})" if why else " and more") for most, why in found)), flush=True)
    print(f"\nRequests cost PostgreSQL only their usage counts:\n\n{head('gateways', *(f'{rate:g} requests/s each' for rate in REQUESTS))}")
    for gateways in GATEWAYS:
        busy = [simulate(attrs.evolve(plan, gateways=gateways, servers=1000, requests=rate)).cores for rate in REQUESTS]
        print(row(gateways, *(f"{share:.1%}" for share in busy)), flush=True)
