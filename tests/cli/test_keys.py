"""The command `keys`, with a real gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx2
import pytest
from click.testing import CliRunner, Result

from multiverse_gateway.cli import main
from support.backends import Backend
from support.processes import GatewayProcess

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """Return a gateway that asks users for a key, though there is none yet."""
    with GatewayProcess({"REQUIRE_CLIENT_AUTH": "true"}) as process:
        yield process


def call(gateway: GatewayProcess, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["keys", *arguments, "--gateway", gateway.url, "--admin-key", gateway.admin_key])


def status(gateway: GatewayProcess, key: str) -> int:
    return httpx2.get(f"{gateway.url}/v1/models", headers={"authorization": f"Bearer {key}"}, trust_env=False).status_code


def test_a_key_is_made_listed_and_revoked(gateway: GatewayProcess) -> None:
    limits = ("--days", "30", "--rate-limit", "100", "--daily-limit", "1000")
    made = call(gateway, "create", "alice", *limits, "--model", "tiny", "--model", "org/large")
    assert made.exit_code == 0, made.output
    key = next(line.split()[1] for line in made.output.splitlines() if line.startswith("  key"))
    assert (status(gateway, key), status(gateway, key[:-1])) == (200, 401)
    listed = call(gateway, "list").output
    assert "alice" in listed
    assert "tiny, org/large" in listed
    assert "0 of 1000" in listed
    assert key not in listed
    (record,) = json.loads(call(gateway, "list", "--json").output)
    assert (record["name"], record["rate_limit"], record["daily_limit"], record["works"]) == ("alice", 100, 1000, True)
    again = call(gateway, "create", "alice")
    assert again.exit_code == 1
    assert "already" in again.output
    assert "Revoked" in call(gateway, "revoke", "alice").output
    assert status(gateway, key) == 401
    assert "There are no client keys" in call(gateway, "list").output
    assert "revoked" in call(gateway, "list", "--all").output
    missing = call(gateway, "revoke", "alice")
    assert missing.exit_code == 1
    assert "there is no client key alice" in missing.output


def test_limits_of_a_key_can_be_changed(gateway: GatewayProcess) -> None:
    """Those that the command does not name stay."""

    def shown(*arguments: str) -> tuple[object, ...]:
        record = json.loads(call(gateway, *arguments, "--json").output)
        return tuple(record[name] for name in ("max_at_once", "bulk", "rate_limit", "daily_limit"))

    assert shown("create", "nightly", "--bulk", "--max-at-once", "200", "--daily-limit", "7") == (200, True, None, 7)
    assert "nightly (bulk)" in call(gateway, "list").output
    assert shown("set-limits", "nightly", "--max-at-once", "0") == (0, True, None, 7)
    assert shown("set-limits", "nightly", "--interactive", "--rate-limit", "9", "--daily-limit", "0") == (0, False, 9, None)
    assert "Changed the key of nightly" in call(gateway, "set-limits", "nightly", "--bulk").output
    assert call(gateway, "set-limits", "nightly").exit_code == 2
    assert "there is no client key nobody" in call(gateway, "set-limits", "nobody", "--bulk").output
    assert call(gateway, "revoke", "nightly").exit_code == 0


def test_a_key_is_renamed_blocked_and_renewed(gateway: GatewayProcess) -> None:
    """By its name, in any spelling of the same characters, or by its id."""
    made = json.loads(call(gateway, "create", "Jürgen", "--model", "tiny", "--json").output)
    assert "Renamed the key of Ng, Anna." in call(gateway, "rename", "Ju\u0308rgen", "Ng, Anna").output
    assert "Blocked the key of Ng, Anna." in call(gateway, "block", "Ng, Anna").output
    assert status(gateway, made["key"]) == 403
    listed = call(gateway, "list").output
    assert "blocked" in listed
    assert f"{made['key'][:15]}…{made['key'][-4:]}" in listed
    assert "Unblocked" in call(gateway, "unblock", made["id"]).output
    assert status(gateway, made["key"]) == 200
    renewed = call(gateway, "renew", "Ng, Anna")
    key = next(line.split()[1] for line in renewed.output.splitlines() if line.startswith("  key"))
    assert [status(gateway, each) for each in (made["key"], key)] == [401, 200]
    changed = json.loads(call(gateway, "set-limits", "Ng, Anna", "--days", "3", "--all-models", "--json").output)
    assert (changed["models"], changed["expires_at"] is not None) == ([], True)
    changed = json.loads(call(gateway, "set-limits", "Ng, Anna", "--days", "0", "--model", "tiny", "--model", "b", "--json").output)
    assert (changed["models"], changed["expires_at"]) == (["tiny", "b"], None)
    assert call(gateway, "set-limits", "Ng, Anna", "--model", "tiny", "--all-models").exit_code == 2
    refused = call(gateway, "rename", "Ng, Anna", "a\u202eb")
    assert refused.exit_code == 1
    assert "remove U+202E" in refused.output
    assert call(gateway, "revoke", "Ng, Anna").exit_code == 0


def test_the_models_are_listed_with_the_admin_key_where_keys_are_required(gateway: GatewayProcess) -> None:
    """And with a client key those that it may use; without either the gateway says what to send."""
    with Backend("one", models=["tiny"]) as backend:
        options = ["--gateway", gateway.url, "--admin-key", gateway.admin_key]
        registered = CliRunner().invoke(main, ["register", backend.url, "tiny", "--owner", "ada", *options])
        assert registered.exit_code == 0, registered.output
        assert "ada" in CliRunner().invoke(main, ["servers", *options]).output
        key = json.loads(call(gateway, "create", "models", "--model", "other", "--json").output)["key"]
        for more, shown in (((), [("tiny", 1, 1)]), (("--client-key", key), [])):
            listed = json.loads(CliRunner().invoke(main, ["models", "--json", *options, *more]).output)
            assert [(model["id"], model["available_servers"], model["total_servers"]) for model in listed] == shown
        refused = CliRunner().invoke(main, ["models", "--gateway", gateway.url])
        assert (refused.exit_code, "send your key" in refused.output) == (1, True)
        assert call(gateway, "block", "models").exit_code == 0
        blocked = CliRunner().invoke(main, ["models", "--client-key", key, *options])
        assert (blocked.exit_code, "has blocked your API key" in blocked.output) == (1, True)
        assert call(gateway, "revoke", "models").exit_code == 0


def test_a_key_for_a_program(gateway: GatewayProcess) -> None:
    made = json.loads(call(gateway, "create", "script", "--json").output)
    assert status(gateway, made["key"]) == 200
    assert json.loads(call(gateway, "revoke", made["id"], "--json").output)["works"] is False
