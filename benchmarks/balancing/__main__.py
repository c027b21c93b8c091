"""Compare the balancers on hosts as they are: nox -s balancing -- --help. The fair queue: nox -s balancing -- fairness --help."""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence

import attrs
from benchmarks.balancing import fairness
from benchmarks.balancing.hosts import Kind, Mood
from benchmarks.balancing.simulation import ORACLE, Outcome, simulate

HEADS = ("", "p50 s", "p95 s", "p99 s", "good answers", "tries")
BALANCERS = ("round_robin", "weighted", "least_busy", "two_choices", ORACLE)

FAST = Kind(first=0.15, token=0.01, slots=16, contention=0.05)
DESKTOP = Kind(first=0.4, token=0.02, slots=4)
LAPTOP = Kind(first=1.5, token=0.08, slots=1)

MIXED = (FAST, FAST, DESKTOP, DESKTOP, DESKTOP, LAPTOP, LAPTOP, LAPTOP)
SCENARIOS: Mapping[str, Sequence[Kind]] = {
    "equal": (DESKTOP,) * 6,
    "mixed": MIXED,
    "mixed, slots declared": tuple(attrs.evolve(kind, declares_slots=True) for kind in MIXED),
    "bursty": tuple(attrs.evolve(DESKTOP, mood=Mood.SLOW) for _ in range(6)),
    "one fails fast": (*((DESKTOP,) * 5), attrs.evolve(DESKTOP, failing=0.7)),
    "coming and going": tuple(attrs.evolve(DESKTOP, mood=Mood.DOWN, well_for=90, ill_for=20) for _ in range(6)),
}


def line(name: str, outcome: Outcome) -> str:
    times = " | ".join(f"{outcome.percentile(part):.2f}" for part in (0.5, 0.95, 0.99))
    return f"| {name} | {times} | {outcome.goodput:.1%} | {outcome.tries:.2f} |"


def main() -> int:
    if sys.argv[1:2] == ["fairness"]:
        return fairness.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="nox -s balancing --", description=__doc__)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--busy", type=float, nargs="+", default=[0.5, 0.8], help="parts of what all hosts together can do")
    parser.add_argument("--scenarios", help=f"of {'; '.join(SCENARIOS)}, with semicolons between them; all")
    parser.add_argument("--balancers", default=",".join(BALANCERS), help="names as in the settings, and oracle, which knows everything")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    for scenario in given.scenarios.split(";") if given.scenarios else SCENARIOS:
        for busy in given.busy:
            print(f"\n### {scenario}, {busy:.0%} busy\n\n| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}")
            for name in given.balancers.split(","):
                outcome = simulate(SCENARIOS[scenario], balancer=name, busy=busy, requests=given.requests, seed=given.seed)
                print(line(name, outcome), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
