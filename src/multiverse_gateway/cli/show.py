"""Commands that show what is set and what is installed."""

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import attrs
import click

from multiverse_gateway.cli.common import config_option, json_option, print_json, print_table, settings_here
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.declaration import env_example

GROUPS = ("balancers", "probes", "stores")


@click.command("settings")
@config_option
@click.option("--env", "as_env", is_flag=True, help="Print a commented .env with all settings and their defaults.")
@json_option
def settings_command(config: Path | None, as_env: bool, as_json: bool) -> None:
    """Show the settings in effect, secrets masked."""
    if as_env:
        click.echo(env_example(), nl=False)
        return
    settings = settings_here(config)
    if as_json:
        print_json(settings.masked())
        return
    defaults = Settings().masked()
    fields = attrs.fields_dict(Settings)
    rows = [
        (name, _shown(value), "" if value == defaults[name] else "changed", fields[name].metadata["description"])
        for name, value in settings.masked().items()
    ]
    print_table(rows, ("setting", "value", "", "what it is"))


def _shown(value: object) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


@click.command("plugins")
@json_option
def plugins_command(as_json: bool) -> None:
    """List the balancers, probes and stores that are installed."""
    plugins = [_described(kind, entry) for kind in GROUPS for entry in sorted(entry_points(group=f"multiverse_gateway.{kind}"))]
    if as_json:
        print_json(plugins)
    else:
        print_table([list(item.values()) for item in plugins], ("kind", "name", "package", "version", "made by"))


def _described(kind: str, entry: EntryPoint) -> dict[str, str]:
    package = entry.dist
    return {
        "kind": kind.removesuffix("s"),
        "name": entry.name,
        "package": package.name if package else "",
        "version": package.version if package else "",
        "factory": entry.value,
    }


@click.command("openapi")
def openapi_command() -> None:
    """Print the description of the HTTP API (OpenAPI 3.1, JSON)."""
    from multiverse_gateway.api.openapi import document
    from multiverse_gateway.app import create_app

    print_json(document(create_app(Settings(database_url="memory://")).routes))
