"""Holders of leases: a process on the same machine sees when one has died, and nobody takes a living one for dead."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from multiverse_gateway.core.probing import LEASE_ROLE
from multiverse_gateway.holders import is_gone, new_holder
from multiverse_gateway.stores.sqlite import SqliteStore
from support.processes import GatewayProcess, environment
from support.sockets import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which process a name means")

HOLD = "import sys; from multiverse_gateway.holders import new_holder; print(new_holder(), flush=True); sys.stdin.read()"


@contextmanager
def holding(*prefix: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a process that has a name, and lend both."""
    command = [*prefix, sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment({})) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_each_name_is_another_one() -> None:
    """Also of one process, whose names have the same process in them."""
    first, second = new_holder(), new_holder()
    assert first != second
    assert first.partition("@")[2] == second.partition("@")[2] != ""


def test_a_killed_process_is_gone_before_and_after_its_parent_knows() -> None:
    """Waited for or not; until then it is not, stopped or not."""
    with holding() as (process, name):
        assert not is_gone(name)
        os.kill(process.pid, signal.SIGSTOP)
        assert not is_gone(name)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_gone(name)
        process.wait()
        assert is_gone(name)


def test_another_process_with_the_same_id_is_not_taken_for_the_holder() -> None:
    """Its start is another one."""
    name = new_holder()
    head, _, start = name.rpartition("/")
    assert is_gone(f"{head}/{int(start) - 1}")
    assert not is_gone(name)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root makes namespaces")
@pytest.mark.parametrize("options", [("--pid", "--fork"), ("--pid", "--fork", "--mount-proc"), ("--time",), ("--uts",)])
def test_a_process_of_another_container_is_never_taken_for_dead(options: tuple[str, ...]) -> None:
    """Where its id, its start or its machine means something else, its lease expires by itself."""
    changes = ("sh", "-c", 'hostname another-host; exec "$@"', "sh") if options == ("--uts",) else ()
    with holding("unshare", *options, *changes) as (process, name):
        assert not is_gone(name)
        process.kill()
        process.wait()
        assert not is_gone(name)
        assert name.partition("@")[2].partition("/")[0] != new_holder().partition("@")[2].partition("/")[0]


@pytest.mark.parametrize("rest", ["", "x", "x/1", "0/1", "-1/1", "1", "99999999999999999999/1", "²/1", "our own/"])
def test_a_name_that_says_nothing_is_not_dead(rest: str) -> None:
    """Names of older versions and of other programs are among them."""
    place = new_holder().partition("@")[2].partition("/")[0]
    rest = rest.replace("our own", str(os.getpid()))
    assert not is_gone(f"token@{place}/{rest}")
    assert not is_gone(f"token@another-place/{rest}")
    assert not is_gone("0123456789abcdef")


async def test_the_lease_of_a_dead_process_is_free(tmp_path: Path) -> None:
    """In the file that two processes share: at once, and only that one."""
    store = SqliteStore(tmp_path / "registry.db")
    await store.open()
    with holding() as (process, name), holding() as (_, other):
        assert await store.claim("first", name, 60.0)
        assert await store.claim("second", other, 60.0)
        assert not await store.claim("first", "us", 60.0)
        process.kill()
        process.wait()
        assert await store.claim("first", "us", 0.0)
        assert await store.claim("first", "us", 60.0)
        assert not await store.claim("first", name, 60.0)
        assert not await store.claim("second", "us", 60.0)
    await store.aclose()


@pytest.mark.e2e
def test_a_killed_gateway_is_replaced_as_prober_before_its_lease_is_over(tmp_path: Path) -> None:
    """Two gateways on one machine and one file: the other one probes, however long the lease of the dead one lasts."""
    with GatewayProcess(cwd=tmp_path) as first:
        wait_until(lambda: "this process probes" in first.log_text())
        folder = tmp_path / "second"
        folder.mkdir()
        with GatewayProcess({"DATABASE_URL": f"sqlite:///{first.database.as_posix()}"}, cwd=folder) as second:
            os.kill(first.pid, signal.SIGKILL)
            with closing(sqlite3.connect(first.database, timeout=10)) as db, db:
                assert db.execute("update leases set until = ? where role = ?", [time.time() + 3000, LEASE_ROLE]).rowcount == 1
            wait_until(lambda: "this process probes" in second.log_text(), within=10)
