"""Several workers on one machine behave as one gateway."""

from __future__ import annotations

import httpx2
import pytest

from support.backends import Backend
from support.processes import GatewayProcess
from support.sockets import wait_until

pytestmark = pytest.mark.e2e

QUESTION = {"model": "shared", "messages": [{"role": "user", "content": "hello"}]}
ONE_USE = httpx2.Limits(max_keepalive_connections=0)
"""A connection for each request."""


def statuses(gateway: GatewayProcess) -> set[int]:
    """Ask on new connections until every worker has most likely answered."""
    with httpx2.Client(limits=ONE_USE) as client:
        return {client.post(f"{gateway.base_url}/chat/completions", json=QUESTION).status_code for _ in range(30)}


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


def pages(gateway: GatewayProcess, cookie: str) -> set[int]:
    """Ask for a page on new connections until every worker has most likely answered."""
    with httpx2.Client(limits=ONE_USE, headers={"cookie": cookie}) as client:
        return {client.get(f"{gateway.url}/settings").status_code for _ in range(20)}


def test_who_signs_in_at_one_worker_is_signed_in_at_all() -> None:
    """At once; and out of all within a second of leaving."""
    with GatewayProcess({}, args=("--workers", "3")) as gateway, httpx2.Client(base_url=gateway.url) as browser:
        form = browser.get("/login").text
        token = form.split('name="form_token" value="')[1].split('"')[0]
        answer = browser.post("/login", data={"form_token": token, "key": gateway.admin_key}, headers={"origin": gateway.url})
        assert answer.status_code == 303, answer.text
        cookie = f"mvg_session={browser.cookies['mvg_session']}"
        assert pages(gateway, cookie) == {200}
        csrf = browser.get("/session").json()["token"]
        assert browser.post("/logout", data={"csrf": csrf}, headers={"origin": gateway.url}).status_code == 303
        wait_until(lambda: pages(gateway, cookie) == {401}, within=10)
