"""Several workers on one machine behave as one gateway."""

from __future__ import annotations

import httpx2
import pytest

from support.backends import Backend
from support.processes import GatewayProcess
from support.sockets import wait_until

pytestmark = pytest.mark.e2e

QUESTION = {"model": "shared", "messages": [{"role": "user", "content": "hello"}]}


def statuses(gateway: GatewayProcess) -> set[int]:
    """Ask on new connections until every worker has most likely answered."""
    found = set()
    for _ in range(30):
        with httpx2.Client() as client:
            found.add(client.post(f"{gateway.base_url}/chat/completions", json=QUESTION).status_code)
    return found


def test_what_one_worker_learns_all_know() -> None:
    """Registered with one, a server is served by all; removed with one, it is gone from all; one of them probes."""
    with (
        Backend("one", models=("shared",)) as backend,
        GatewayProcess({"HEALTH_CHECK_INTERVAL_SECONDS": "1"}, args=("--workers", "3")) as gateway,
    ):
        server = gateway.register("shared", backend.url)
        wait_until(lambda: statuses(gateway) == {200}, within=5)
        before, hits = len(backend.probes), backend.hits
        wait_until(lambda: len(backend.probes) >= before + 4, within=10)
        assert backend.hits == hits
        assert gateway.admin("DELETE", f"/register/{server}").status_code == 200
        wait_until(lambda: statuses(gateway) == {404}, within=5)
        hits = backend.hits
        assert statuses(gateway) == {404}
        assert backend.hits == hits
