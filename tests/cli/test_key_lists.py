"""`keys create --from`: a key for each name of a list, in a file that the next run continues; with a real gateway."""

from __future__ import annotations

import csv
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner, Result

from multiverse_gateway.cli import main
from multiverse_gateway.cli.key_lists import open_key_file
from support.processes import GatewayProcess, environment

pytestmark = pytest.mark.e2e

NAMES = ["Ada", "Jürgen Müller", "Ng, Anna", "O'Brien", "李明", "=1+1", "'quoted'"]


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """Return a gateway that asks users for a key."""
    with GatewayProcess({"REQUIRE_CLIENT_AUTH": "true"}) as process:
        yield process


@pytest.fixture
def names(tmp_path: Path, gateway: GatewayProcess) -> Path:
    """Return a list of names; no key is in use."""
    for record in keys_of(gateway):
        gateway.admin("DELETE", f"/keys/{record['id']}")
    return write(tmp_path, *NAMES)


def write(folder: Path, *lines: str) -> Path:
    path = folder / "names.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def call(gateway: GatewayProcess, *arguments: object) -> Result:
    command = ["keys", *map(str, arguments), "--gateway", gateway.url, "--admin-key", gateway.admin_key]
    return CliRunner().invoke(main, command)


def keys_of(gateway: GatewayProcess) -> list[dict[str, Any]]:
    return list(gateway.admin("GET", "/keys").json())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def status(gateway: GatewayProcess, key: str) -> int:
    return httpx2.get(f"{gateway.url}/v1/models", headers={"authorization": f"Bearer {key}"}, trust_env=False).status_code


def test_each_name_gets_a_key_once(gateway: GatewayProcess, names: Path) -> None:
    """Of any language, in a file of mode 0600 without formulas; the same command again changes nothing, and continues a longer list."""
    file = names.with_name("keys.csv")
    made = call(gateway, "create", "--from", names, "--days", 30, "--daily-limit", 9)
    assert (made.exit_code, made.output) == (0, f"Keys in {file}: 7 created.\n")
    rows = rows_of(file)
    assert [row["name"] for row in rows] == ["Ada", "Jürgen Müller", "Ng, Anna", "O'Brien", "李明", "'=1+1", "''quoted'"]
    assert {row["OPENAI_BASE_URL"] for row in rows} == {f"{gateway.url}/v1"}
    assert [status(gateway, row["OPENAI_API_KEY"]) for row in rows] == [200] * 7
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    records = {record["name"]: record for record in keys_of(gateway) if record["works"]}
    assert sorted(records) == sorted(NAMES)
    assert {record["daily_limit"] for record in records.values()} == {9}
    again = call(gateway, "create", "--from", write(names.parent, *NAMES, "Zoë"), "--json")
    assert json.loads(again.output) == {"file": str(file), "created": ["Zoë"], "renewed": [], "kept": NAMES, "missing": []}
    assert rows_of(file)[:7] == rows
    other = names.with_name("others.csv")
    assert (
        call(gateway, "create", "--from", write(names.parent, "Chloé"), "--output", other, "--base-url", "https://g.example/v1").exit_code
        == 0
    )
    assert rows_of(other)[0]["OPENAI_BASE_URL"] == "https://g.example/v1"


def test_all_lines_are_checked_first(gateway: GatewayProcess, names: Path) -> None:
    """Each bad line is named, and no key is made."""
    bad = write(names.parent, "Ada", "Ada", "", "B\u202eob", "x" * 65)
    refused = call(gateway, "create", "--from", bad)
    assert refused.exit_code == 2
    for problem in ("line 2: Ada is on line 1", "line 4: the name must not contain", "U+202E", "line 5: the name must have at most 64"):
        assert problem in refused.output
    assert not names.with_name("keys.csv").exists()
    assert not [record for record in keys_of(gateway) if record["works"]]
    assert "holds no name" in call(gateway, "create", "--from", write(names.parent, " ")).output
    bad.write_bytes("Jürgen".encode("latin-1"))
    assert "UTF-8" in call(gateway, "create", "--from", bad).output
    assert "cannot be read" in call(gateway, "create", "--from", bad.with_name("missing.txt")).output


def test_a_key_that_is_not_in_the_file_is_reported_and_can_be_renewed(gateway: GatewayProcess, names: Path) -> None:
    """So is one whose line was cut off in the middle, or that was renewed elsewhere; a key that was revoked is made again."""
    file = names.with_name("keys.csv")
    write(names.parent, "Ada", "Ng, Anna", "O'Brien", "Zoë")
    assert call(gateway, "create", "--from", names).exit_code == 0
    before = rows_of(file)
    assert call(gateway, "renew", "Ada").exit_code == 0
    assert call(gateway, "revoke", "O'Brien").exit_code == 0
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rfind(b"mvg-client-") + 20])
    again = call(gateway, "create", "--from", names)
    assert again.exit_code == 1
    assert "Keys in" in again.output
    assert "1 created, 1 were there already" in again.output
    for missing in ("Ada has a key already", "Zoë has a key already", "--renew-missing"):
        assert missing in again.output
    done = call(gateway, "create", "--from", names, "--renew-missing")
    assert (done.exit_code, "2 renewed, 2 were there already" in done.output) == (0, True)
    newest = {row["name"]: row["OPENAI_API_KEY"] for row in rows_of(file)}
    assert sorted(newest) == ["Ada", "Ng, Anna", "O'Brien", "Zoë"]
    assert [status(gateway, key) for key in newest.values()] == [200] * 4
    assert status(gateway, before[0]["OPENAI_API_KEY"]) == 401


def test_a_command_that_dies_in_the_middle_is_continued(gateway: GatewayProcess, names: Path) -> None:
    """SIGKILL at any moment: what is in the file works, and the next run makes the rest."""
    people = [f"Person {number}" for number in range(12)]
    write(names.parent, *people)
    file = names.with_name("keys.csv")
    command = [sys.executable, "-m", "multiverse_gateway", "keys", "create", "--from", str(names), "--gateway", gateway.url]
    with subprocess.Popen(command, env=environment({"ADMIN_API_KEY": gateway.admin_key}), cwd=names.parent) as process:
        while not (file.exists() and file.read_bytes().count(b"\n") > 3):
            assert process.poll() is None
        process.kill()
    assert call(gateway, "create", "--from", names, "--renew-missing").exit_code == 0
    newest = {row["name"]: row["OPENAI_API_KEY"] for row in rows_of(file)}
    assert sorted(newest) == sorted(people)
    assert {status(gateway, key) for key in newest.values()} == {200}


def test_two_commands_do_not_write_one_file(gateway: GatewayProcess, names: Path) -> None:
    """The second one says so and makes nothing."""
    with open_key_file(names.with_name("keys.csv")):
        refused = call(gateway, "create", "--from", names)
    assert refused.exit_code == 1
    assert "another command is writing" in refused.output
    assert call(gateway, "create", "--from", names).exit_code == 0


def test_a_file_of_another_kind_is_left_alone(gateway: GatewayProcess, names: Path) -> None:
    """So are devices and folders; a file that all may read is closed to others."""
    file = names.with_name("keys.csv")
    for content in ("a,b\n1,2\n", "=\n", "\n"):
        file.write_text(content)
        refused = call(gateway, "create", "--from", names)
        assert (refused.exit_code, file.read_text()) == (2, content)
        assert "is not a list of keys" in refused.output
    file.write_bytes(b"\xff\n")
    assert "is not a list of keys" in call(gateway, "create", "--from", names).output
    assert "is not a file" in call(gateway, "create", "--from", names, "--output", "/dev/null").output
    assert "cannot be written" in call(gateway, "create", "--from", names, "--output", names.parent / "missing" / "keys.csv").output
    file.write_text("name,OPENAI_BASE_URL,OPENAI_API_KEY\n")
    file.chmod(0o644)
    assert call(gateway, "create", "--from", names).exit_code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_full_disk_loses_no_key(gateway: GatewayProcess, names: Path) -> None:
    """The message holds the key that could not be written."""
    command = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150)); from multiverse_gateway.cli import main; main()"
    )
    arguments = ["keys", "create", "--from", str(names), "--gateway", gateway.url]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        env=environment({"ADMIN_API_KEY": gateway.admin_key}),
        cwd=names.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "keep the key of" in done.stderr
    lost = next(word for word in done.stderr.split() if word.startswith("mvg-client-"))
    assert status(gateway, lost) == 200


def test_a_gateway_that_does_not_answer_is_reported(gateway: GatewayProcess, names: Path) -> None:
    """Without a traceback; the file is there for the next run."""
    refused = CliRunner().invoke(main, ["keys", "create", "--from", str(names), "--gateway", "http://127.0.0.1:1", "--admin-key", "x"])
    assert refused.exit_code == 1
    assert "no gateway answers" in refused.output
    assert call(gateway, "create", "--from", names).exit_code == 0


@pytest.mark.parametrize("arguments", [(), ("Ada", "--from", "names.txt"), ("Ada", "--output", "x.csv"), ("Ada", "--renew-missing")])
def test_a_name_or_a_list(arguments: tuple[str, ...]) -> None:
    """One of them, and what belongs to it."""
    refused = CliRunner().invoke(main, ["keys", "create", *arguments, "--admin-key", "x", "--gateway", "http://127.0.0.1:1"])
    assert refused.exit_code == 2
    assert "--from" in refused.output
