"""The command `multiverse-gateway`: it serves, shows, and talks to a running gateway.

Commands are imported when they are called, so that `--help` and `--version` answer at once. Exit codes: 0 all is well, 1 it did
not work, 2 the command or a setting cannot be used.
"""

import importlib
from collections.abc import Mapping

import click

from multiverse_gateway._version import __version__

COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("run", "Serve the gateway until it is stopped."),
    "demo": ("demo", "Show the gateway at work: one of two model servers dies, and no client notices."),
    "check": ("check", "Check step by step whether a gateway can use a model server."),
    "register": ("registry", "Offer a model server to a running gateway."),
    "servers": ("registry", "List the registered servers and their health."),
    "hosts": ("host_commands", "List the hosts with their models, or change one for all its models at once."),
    "aliases": ("alias_commands", "Define names that stand for models, in order of preference."),
    "models": ("registry", "List the models that can be used."),
    "keys": ("keys", "Create, list, change, block, renew and revoke the client keys of a running gateway."),
    "login-link": ("login_link", "Print a link that signs in to the pages once, within 15 minutes."),
    "wall": ("wall_commands", "Create, list and revoke links that show the state of the servers on a screen."),
    "export": ("registry", "Write the registry of a running gateway as JSON."),
    "import": ("registry", "Read an exported registry into a running gateway."),
    "backup": ("backup", "Copy the registry's database to a file; the gateway may be running."),
    "restore": ("backup", "Restore a copy that `backup` made; the gateway must not be running."),
    "migrate-store": ("backup", "Copy a registry from SQLite to PostgreSQL; the gateway must not be running."),
    "rotate-key": ("backup", "Renew the secret that encrypts the servers' keys; the gateway must not be running."),
    "settings": ("show", "Show the settings in effect, secrets masked."),
    "openapi": ("show", "Print the description of the HTTP API (OpenAPI 3.1, JSON)."),
    "plugins": ("show", "List the balancers, probes and stores that are installed."),
}
"""Module and help of each command, in the order of the help page."""


class Commands(click.Group):
    """A group that knows its commands' names and helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"multiverse_gateway.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="multiverse-gateway")
def main() -> None:
    """Make one dependable, OpenAI-compatible service out of many undependable model servers.

    New here? `multiverse-gateway demo` shows it in a minute, `multiverse-gateway run` starts it.
    """
