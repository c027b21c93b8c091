"""Client keys change while several processes serve: nothing is given twice, nothing is undone, and every process follows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx2
import pytest

from support.backends import Backend
from support.processes import GatewayProcess
from support.sockets import wait_until

pytestmark = pytest.mark.e2e

WORKERS = 2


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """Return a gateway of two processes on one file, with a model."""
    with GatewayProcess({"WORKERS": str(WORKERS), "REQUIRE_CLIENT_AUTH": "true"}) as process, Backend("one", models=["tiny"]) as backend:
        process.register("tiny", backend.url)
        yield process


def together(calls: list[tuple[str, str, Any]], gateway: GatewayProcess) -> list[httpx2.Response]:
    """Send admin calls at once, each on a connection of its own, so that they spread over the processes."""

    def send(call: tuple[str, str, Any]) -> httpx2.Response:
        method, path, body = call
        return httpx2.request(
            method, f"{gateway.url}/admin{path}", json=body, headers={"x-api-key": gateway.admin_key}, trust_env=False, timeout=30
        )

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(send, calls))


def chat(gateway: GatewayProcess, key: str, *, stream: bool = False) -> httpx2.Response:
    """Ask on a new connection."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    return httpx2.post(f"{gateway.base_url}/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, trust_env=False)


def test_of_many_that_want_a_name_one_gets_it(gateway: GatewayProcess) -> None:
    """Also when the processes are asked at the same moment, for new keys and for other names of keys."""
    answers = together([("POST", "/keys", {"name": f"racer {number % 4}"}) for number in range(16)], gateway)
    assert sorted(answer.status_code for answer in answers) == [201] * 4 + [400] * 12
    ids = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    renamed = together([("PATCH", f"/keys/{key_id}", {"name": "winner"}) for key_id in ids], gateway)
    assert sorted(answer.status_code for answer in renamed) == [200, 400, 400, 400]
    names = [record["name"] for record in gateway.admin("GET", "/keys").json()]
    assert len(set(names)) == len(names)


def test_changes_at_once_do_not_undo_each_other(gateway: GatewayProcess) -> None:
    """A renewal, a block and limits that are set by several calls at once all hold afterward; the old key never works again."""
    made = gateway.admin("POST", "/keys", {"name": "busy"}).json()
    path = f"/keys/{made['id']}"
    calls: list[tuple[str, str, Any]] = [("PATCH", path, {"rate_limit": 1000 + number}) for number in range(6)]
    calls += [("POST", f"{path}/renew", None), ("PATCH", path, {"blocked": True}), ("PATCH", path, {"models": ["tiny"]})]
    answers = together(calls, gateway)
    assert {answer.status_code for answer in answers} == {200}
    new = answers[6].json()["key"]
    (record,) = [record for record in gateway.admin("GET", "/keys").json() if record["id"] == made["id"]]
    assert (record["state"], record["models"], record["hint"]) == ("blocked", ["tiny"], f"{new[:15]}…{new[-4:]}")
    assert record["rate_limit"] in range(1000, 1006)
    wait_until(lambda: [chat(gateway, key).status_code for key in (made["key"], new) * 4] == [401, 403] * 4, within=10)
    gateway.admin("PATCH", path, {"blocked": False})
    wait_until(lambda: [chat(gateway, key).status_code for key in (made["key"], new) * 4] == [401, 200] * 4, within=10)


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_key_says_so_at_every_door(gateway: GatewayProcess, stream: bool) -> None:
    """Over HTTP/1.1 plain and streamed, and on the calls that are not relayed."""
    made = gateway.admin("POST", "/keys", {"name": f"door {stream}"}).json()
    gateway.admin("PATCH", f"/keys/{made['id']}", {"blocked": True})
    wait_until(lambda: [chat(gateway, made["key"], stream=stream).status_code for _ in range(6)] == [403] * 6, within=10)
    refused = chat(gateway, made["key"], stream=stream)
    error = refused.json()["error"]
    assert (error["code"], error["type"], refused.headers["x-should-retry"]) == ("key_blocked", "permission_error", "false")
    for path in ("/v1/models", "/v1/queue"):
        assert httpx2.get(f"{gateway.url}{path}", headers={"x-api-key": made["key"]}, trust_env=False).status_code == 403
    message = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
    spoken = httpx2.post(f"{gateway.base_url}/messages", json=message, headers={"x-api-key": made["key"]}, trust_env=False)
    assert (spoken.status_code, spoken.json()["error"]["type"]) == (403, "permission_error")


def test_the_page_shows_a_new_key_once_whichever_process_answers(gateway: GatewayProcess) -> None:
    """Each request may go to another process; of many that open the page at once, one sees the key."""
    headers = {"x-api-key": gateway.admin_key, "accept": "text/html"}
    for number in range(4):
        made = httpx2.post(f"{gateway.url}/keys", data={"names": f"page {number}"}, headers=headers, trust_env=False)
        cookie = made.headers["set-cookie"].partition(";")[0]
        place = gateway.url + made.headers["location"]
        get = partial(httpx2.get, place, headers={**headers, "cookie": cookie}, trust_env=False)
        with ThreadPoolExecutor(6) as pool:
            pages = [asked.result().text for asked in [pool.submit(get) for _ in range(6)]]
        assert sum(bool(re.search(r"mvg-client-[\w-]{43}", page)) for page in pages) == 1
