"""Feed one target of `targets.py` what a coverage-guided fuzzer thinks up: `nox -s fuzz`, or

    pip install atheris
    python tests/faults/fuzz.py sse -max_total_time=600

Options are libFuzzer's. It ends with exit code 0 when the time is up, and otherwise with the input that broke a promise.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["multiverse_gateway"]):
    from faults.targets import TARGETS, seeds


def main(arguments: list[str]) -> None:
    """Fuzz the target that is named first."""
    if not arguments or arguments[0] not in TARGETS:
        sys.exit(f"name one of: {', '.join(TARGETS)}")
    name, *options = arguments
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds(name)):
            Path(corpus, f"seed-{number}").write_bytes(seed)
        atheris.Setup([sys.argv[0], *options, "-max_len=2000", "-verbosity=0", "-print_final_stats=1", corpus], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
