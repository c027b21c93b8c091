"""Tables of medians in Markdown, each figure beside nginx's of the same run."""

import statistics
from collections.abc import Mapping, Sequence

Results = dict[str, dict[str, list[dict[str, object]]]]
"""What was measured, by test, candidate and round."""

_BASE = "nginx"
_COLUMNS: Mapping[str, Sequence[tuple[str, str, float]]] = {
    "plain": (("cpu_us", "CPU µs per request", 1), ("p50_us", "p50 ms", 1e3), ("p99_us", "p99 ms", 1e3), ("errors", "errors", 1)),
    "stream": (
        ("cpu_us", "CPU µs per chunk", 1),
        ("first_p50_us", "first token p50 ms", 1e3),
        ("first_p99_us", "first token p99 ms", 1e3),
        ("chunk_p50_us", "chunk p50 ms", 1e3),
        ("chunk_p99_us", "chunk p99 ms", 1e3),
        ("errors", "errors", 1),
    ),
    "latency": (("p50_us", "p50 ms", 1e3), ("p99_us", "p99 ms", 1e3), ("cpu_us", "CPU µs per request", 1), ("errors", "errors", 1)),
    "100k": (("cpu_us", "CPU µs per request", 1), ("errors", "errors", 1)),
    "5m": (("cpu_us", "CPU µs per request", 1), ("errors", "errors", 1)),
    "memory": (("rest", "at rest MB", 1 << 20), ("idle", "idle stream KB", 1024), ("stalled", "stalled stream KB", 1024)),
    "start": (("first_request", "first request s", 1), ("help", "--help s", 1)),
}
_TITLES = {
    "plain": "Plain requests, 64 connections",
    "stream": "Streams: 100 at 50 chunks a second",
    "latency": "Plain requests, 100 a second, open loop",
    "100k": "Prompts of 100 KB",
    "5m": "Prompts of 5 MB",
    "memory": "Memory",
    "start": "Start",
}


def median(rounds: Sequence[Mapping[str, object]], figure: str) -> float | None:
    """Return the median of a figure over the rounds that have it.

    >>> median([{"a": 3}, {"a": 1}, {}, {"a": 2.5}], "a")
    2.5
    """
    values = [value for result in rounds if isinstance(value := result.get(figure), int | float)]
    return statistics.median(values) if values else None


def page(about: Mapping[str, object], results: Results) -> str:
    """Return all tables."""
    words = ", ".join(f"{name} {value}" for name, value in about.items())
    return "\n\n".join([words, *(table(test, by_name) for test, by_name in results.items())])


def table(test: str, by_name: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    """Return one test's table; processor time also as a multiple of nginx's."""
    columns = _COLUMNS[test]
    base = median(by_name.get(_BASE, ()), "cpu_us")
    heads = ["", *(title for _, title, _ in columns), *([f"x {_BASE}"] if base else [])]
    lines = [f"### {_TITLES[test]}", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, rounds in by_name.items():
        cells = [shown(median(rounds, figure), unit) for figure, _, unit in columns]
        if base:
            cpu = median(rounds, "cpu_us")
            cells.append("-" if cpu is None else f"{cpu / base:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: float | None, unit: float) -> str:
    """Write a figure with three digits.

    >>> shown(1234.5, 1), shown(1234.5, 1000), shown(None, 1)
    ('1,234', '1.23', '-')
    """
    if value is None:
        return "-"
    value /= unit
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"
