"""Commands about aliases: names that stand for models of a running gateway."""

from urllib.parse import quote

import click

from multiverse_gateway.cli.client import client_for, gateway_options
from multiverse_gateway.cli.common import json_option, print_json, print_table, printable


@click.group("aliases")
def aliases_command() -> None:
    """Define names that stand for models, in order of preference."""


@aliases_command.command("list")
@gateway_options
@json_option
def list_aliases(gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """List the aliases and the models that they stand for."""
    records = client_for(gateway_url, admin_key).admin("GET", "/aliases")
    if as_json:
        print_json(records)
    elif records:
        print_table([(printable(record["name"]), printable(", ".join(record["models"]))) for record in records], ("alias", "models"))
    else:
        click.echo("No alias is defined. Define one with `multiverse-gateway aliases set NAME MODEL ...`.")


@aliases_command.command("set")
@click.argument("name")
@click.argument("models", nargs=-1, required=True)
@gateway_options
@json_option
def set_alias(name: str, models: tuple[str, ...], gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """Let NAME stand for MODELS, the preferred one first.

    Each request for NAME gets the first of the models with a free slot, or else waits for the first one with a usable server.
    """
    record = client_for(gateway_url, admin_key).admin("PUT", f"/aliases/{quote(name)}", json={"models": list(models)})
    if as_json:
        print_json(record)
    else:
        click.echo(f"{printable(record['name'])} stands for {printable(', '.join(record['models']))}.")


@aliases_command.command("remove")
@click.argument("name")
@gateway_options
def remove_alias(name: str, gateway_url: str | None, admin_key: str | None) -> None:
    """Remove an alias; its models stay."""
    record = client_for(gateway_url, admin_key).admin("DELETE", f"/aliases/{quote(name)}")
    click.echo(f"{printable(record['name'])} was removed.")
