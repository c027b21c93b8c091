"""What the command says of itself, and the commands that need no gateway."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from multiverse_gateway._version import __version__
from multiverse_gateway.cli import COMMANDS, Commands, main
from multiverse_gateway.cli.common import host_for_url, printable
from multiverse_gateway.settings.declaration import env_example
from support.processes import environment


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty directory, without the developer's settings."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - environment({}).keys():
        monkeypatch.delenv(name)
    return tmp_path


def call(*arguments: str, **more: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, list(arguments), env=more or None)


def test_help_lists_every_command() -> None:
    """With a sentence each."""
    result = call("--help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for name, (_, summary) in COMMANDS.items():
        assert f"{name} {summary}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str) -> None:
    """The help page begins with the sentence of the list."""
    assert isinstance(main, Commands)
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name
    assert (command.help or "").startswith(COMMANDS[name][1])
    assert call(name, "--help").exit_code == 0


def test_unknown_commands_are_refused() -> None:
    """With exit code 2."""
    assert call("serve").exit_code == 2


def test_version() -> None:
    """Name and number."""
    assert call("--version").output == f"multiverse-gateway, version {__version__}\n"


@pytest.mark.e2e
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_quick(empty_directory: Path, option: str) -> None:
    """Nothing heavy is imported for them."""
    heavy = {"asyncio", "starlette", "hypercorn", "httpx2", "jinja2", "cattrs", "msgspec", "multiverse_gateway.gateway"}
    asked = f"from multiverse_gateway.cli import main; main([{option!r}], standalone_mode=False); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", f"import sys; {asked}"], check=True, capture_output=True, text=True, env=environment({}))
    assert heavy.isdisjoint(said.stdout.split())


def test_settings_are_shown_masked() -> None:
    """What differs from the default is marked."""
    result = call("settings", PORT="8123", ADMIN_API_KEY="an-admin-key-of-the-test")
    assert result.exit_code == 0
    assert "an-admin-key" not in result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("port "))
    assert "8123" in line
    assert "changed" in line


def test_settings_as_json() -> None:
    """All of them."""
    shown = json.loads(call("settings", "--json", CLIENT_API_KEYS="client-key-1,client-key-2").output)
    assert (shown["port"], shown["client_api_keys"], shown["admin_api_key"]) == (8000, "********", None)


def test_settings_as_env() -> None:
    """Even where the settings themselves are wrong: it is how they get mended."""
    result = call("settings", "--env", PORT="wrong")
    assert (result.exit_code, result.output) == (0, env_example())


def test_wrong_settings_end_with_2() -> None:
    """The message names the setting."""
    result = call("settings", PORT="wrong")
    assert result.exit_code == 2
    assert "Error: PORT=wrong in the environment cannot be used" in result.output


def test_plugins_lists_our_own() -> None:
    """With kind, name and package."""
    found = json.loads(call("plugins", "--json").output)
    assert {"kind": "balancer", "name": "round_robin"}.items() <= found[[item["name"] for item in found].index("round_robin")].items()
    assert "round_robin" in call("plugins").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "70000"), "Error: --port=70000 cannot be used"),
        (("--balancer", "foo"), "Error: --balancer=foo cannot be used: there is no balancer named foo; write one of least_busy"),
        (("--probe", "foo"), "Error: --probe=foo cannot be used: there is no probe named foo; write one of chat, models"),
        (
            ("--database-url", "mysql://u:a-password@x/y"),
            "Error: --database-url=mysql://u:********@x/y cannot be used: there is no store for",
        ),
        (("--database-url", "sqlite:///."), "Error: --database-url=sqlite:///. cannot be used: it has no file name"),
        (("--database-url", "postgresql://db:port/x"), "Error: --database-url cannot be used: write postgresql://"),
        (("--rate-limit-storage", "redis://host:port"), "Error: --rate-limit-storage=redis://host:port cannot be used: write redis://"),
        (("--log-file", "/"), "Error: --log-file=/ cannot be used: it cannot be written"),
        (("--config", "missing.toml"), "missing.toml cannot be read"),
        (("--certfile", __file__), "--certfile and --keyfile belong together"),
        (("--admin-api-key", "x"), "No such option"),
    ],
)
def test_run_refuses_what_cannot_work(arguments: tuple[str, ...], message: str) -> None:
    """With exit code 2; secrets are no options, as everybody on a machine can read its command lines."""
    result = call("run", *arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DATABASE_URL", "mysql://x/y", "there is no store for mysql://"),
        ("MULTIVERSE_DATABASE_URL", "mysql://x/y", "there is no store for mysql://"),
        ("BALANCER", "foo", "there is no balancer named foo"),
        ("MULTIVERSE_BALANCER", "foo", "there is no balancer named foo"),
        ("PROBE", "foo", "there is no probe named foo"),
        ("MULTIVERSE_PROBE", "chta", "there is no probe named chta"),
    ],
)
@pytest.mark.parametrize("place", ["the environment", ".env"])
def test_a_plug_in_that_is_not_there_is_refused_by_the_name_of_its_setting(
    name: str, value: str, message: str, place: str, empty_directory: Path
) -> None:
    """As it was written, where it was written."""
    if place == ".env":
        (empty_directory / ".env").write_text(f"{name}={value}\n")
    result = call("run", "--port", "0", **({} if place == ".env" else {name: value}))
    assert result.exit_code == 2
    assert f"Error: {name}={value} in {place} cannot be used: {message}" in result.output


def test_an_address_of_another_machine_is_refused_by_the_name_of_its_setting() -> None:
    result = call("run", MULTIVERSE_HOST="no.such.host.invalid", PORT="0")
    assert result.exit_code == 1
    assert "Error: MULTIVERSE_HOST=no.such.host.invalid in the environment cannot be used" in result.output


def test_where_a_gateway_is_reached() -> None:
    """A listener on all addresses is reached on loopback."""
    assert [host_for_url(host) for host in ("0.0.0.0", "::", "::1", "gpu.example")] == ["127.0.0.1", "[::1]", "[::1]", "gpu.example"]


def test_others_texts_cannot_move_the_cursor() -> None:
    """Control characters are shown, not sent to the terminal."""
    assert printable("ok \x1b[2J") == "ok \\x1b[2J"
