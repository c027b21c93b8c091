"""What grows with gateways, servers and requests: the figures of docs/explanation/scaling.md.

`measure` runs gateways and a real PostgreSQL on this machine (five minutes), `costs` measures what each call to PostgreSQL costs, and
`simulate` goes on from there to a hundred gateways and ten thousand servers, with the same figures each time (two minutes).
"""

import argparse
import asyncio
import sys
from pathlib import Path

from benchmarks.scaling.plan import Plan
from benchmarks.scaling.tables import print_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="nox -s scaling --", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "costs", "simulate"), default="measure")
    parser.add_argument("--servers", type=int, nargs="*", default=[10, 100, 1000], help="to measure with")
    parser.add_argument("--gateways", type=int, nargs="*", default=[1, 3], help="to measure with")
    parser.add_argument("--cores", type=int, default=4, help="of the simulated PostgreSQL")
    parser.add_argument("--seed", type=int, default=1, help="of the simulation")
    given = parser.parse_args()
    if given.what == "simulate":
        print_all(Plan(gateways=1, servers=1, cores=given.cores, seed=given.seed))
        return 0
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # real services are started as the tests start them
    from benchmarks.scaling import costs, measure

    if given.what == "measure":
        measure.measure(given.servers, given.gateways)
    else:
        print("| call | ms | ms of PostgreSQL's CPU | ms of the gateway's CPU |\n|---|---|---|---|")
        for servers in given.servers:
            asyncio.run(costs.measure_costs(servers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
