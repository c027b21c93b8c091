"""The command `wall`, with a real gateway of two processes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx2
import pytest
from click.testing import CliRunner, Result

from multiverse_gateway.cli import main
from support.processes import GatewayProcess
from support.sockets import wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """Return a gateway of two processes that logs everything."""
    with GatewayProcess({"LOG_LEVEL": "DEBUG"}, args=("--workers", "2")) as process:
        yield process


def call(gateway: GatewayProcess, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["wall", *arguments, "--gateway", gateway.url, "--admin-key", gateway.admin_key])


def statuses(gateway: GatewayProcess, cookie: str, path: str) -> set[int]:
    """Return how both processes answer, each on some of many connections."""
    headers = {"cookie": f"mvg_wall={cookie}", "hx-request": "true"}
    return {httpx2.get(f"{gateway.url}{path}", headers=headers, trust_env=False).status_code for _ in range(12)}


def test_a_wall_link_is_made_listed_and_revoked_in_every_process(gateway: GatewayProcess) -> None:
    """Its token is shown once, and no log has it."""
    made = call(gateway, "create", "Room 204")
    assert made.exit_code == 0, made.output
    (token,) = re.findall(r"/wall#(mvg-wall-[\w-]{43})\n", made.output)
    wait_until(lambda: statuses(gateway, token, "/live/state") == {200}, within=5)
    opened = httpx2.post(f"{gateway.url}/wall/open", data={"token": token}, trust_env=False)
    assert (opened.status_code, opened.headers["location"]) == (303, "/wall")
    listed = call(gateway, "list").output
    assert ("Room 204" in listed, token in listed) == (True, False)
    (record,) = json.loads(call(gateway, "list", "--json").output)
    assert set(record) == {"id", "name", "created_at"}
    assert "already" in call(gateway, "create", "Room 204").output
    assert "Revoked" in call(gateway, "revoke", "Room 204").output
    wait_until(lambda: statuses(gateway, token, "/live/state") == {401}, within=5)
    assert "There are no wall links" in call(gateway, "list").output
    missing = call(gateway, "revoke", "Room 204")
    assert (missing.exit_code, "there is no wall link Room 204" in missing.output) == (1, True)
    assert json.loads(call(gateway, "create", "Hall", "--json").output)["path"].startswith("/wall#")
    revoked = call(gateway, "revoke", "Hall", "--json")
    assert json.loads(revoked.output)["name"] == "Hall"
    assert token not in gateway.log_text()
