"""How much memory a piece of a test takes: it shows, without a clock, whether hostile input is decoded as a whole."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def peak_of_memory() -> Iterator[Callable[[], int]]:
    """Return a function that says, after the block, how many bytes Python held at most for what the block allocated."""
    peak = 0
    tracemalloc.start()
    try:
        yield lambda: peak
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
