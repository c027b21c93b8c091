"""What every test has: one async backend, the hypothesis profiles, and a closing report of what was left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest

from support.require import STRICT
from support.services import PostgresServer

collect_ignore = ["faults/fuzz.py"]  # a program of its own, whose fuzzer need not be installed
collect_ignore_glob = ["e2e/programs/*"]  # each of them runs with the libraries of an environment of its own

hypothesis.settings.register_profile("standard", deadline=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=3000, print_blob=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "standard")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio: the relay is asyncio by design."""
    return "asyncio"


def left_out(reporter: pytest.TerminalReporter) -> Counter[str]:
    """Count the skipped tests by their reason."""
    reports = [report for report in reporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let several workers begin with what starts processes and end with what is short: none is left alone with a long file."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a strict run in which anything was skipped, whichever way."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if STRICT and isinstance(reporter, pytest.TerminalReporter) and left_out(reporter) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was left out and why."""
    reasons = left_out(terminalreporter)
    deselected = len(terminalreporter.stats.get("deselected", []))
    if not reasons and not deselected:
        return
    terminalreporter.section("left out" + (" (strict: a failure)" if STRICT and reasons else ""))
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count} x {reason}")
    if deselected:
        terminalreporter.line(f"{deselected} x not selected by the command line")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Return a PostgreSQL server that no test may hurt; each asks it for a schema of its own."""
    with PostgresServer() as server:
        yield server
