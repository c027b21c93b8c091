"""Commands about hosts: the computers of a running gateway, each with all its models."""

from typing import Any
from urllib.parse import quote

import click

from multiverse_gateway.cli.client import GatewayClient, client_for, gateway_options
from multiverse_gateway.cli.common import json_option, print_json, print_table, printable, refuse


@click.group("hosts", invoke_without_command=True)
@gateway_options
@json_option
@click.pass_context
def hosts_command(context: click.Context, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """List the hosts with their models, or change one for all its models at once.

    A host is one engine on one computer. Models that are registered with the same owner, URL and key belong to one host.
    """
    if context.invoked_subcommand is not None:
        return
    records = client_for(gateway_url, admin_key).admin("GET", "/hosts")
    if as_json:
        print_json(records)
    elif records:
        print_table([_row(record) for record in records], ("URL", "owner", "limit", "running", "models", "id"))
    else:
        click.echo("No host is registered. Offer a model with `multiverse-gateway register URL MODEL`.")


def _row(record: dict[str, Any]) -> list[str]:
    limit = record["max_concurrency"]
    parts = (
        record["endpoint_url"],
        record["owner"] or "",
        "none" if limit is None else limit,
        record["in_flight"],
        ", ".join(_model(server) for server in record["servers"]),
        record["id"],
    )
    return [printable(part) for part in parts]


def _model(server: dict[str, Any]) -> str:
    name, state = str(server["model_name"]), server["state"]
    return name if state == "healthy" else f"{name} ({state})"


def _client(context: click.Context, gateway_url: str | None, admin_key: str | None) -> GatewayClient:
    """Return a client of the gateway that the options name, before the subcommand or after it."""
    before = context.parent.params if context.parent is not None else {}
    return client_for(gateway_url or before.get("gateway_url"), admin_key or before.get("admin_key"))


@hosts_command.command("set")
@click.argument("host_id", metavar="ID")
@click.option("--max-concurrency", type=click.IntRange(1, 4096), help="Maximum number of requests at once on all its models together.")
@click.option("--no-max-concurrency", is_flag=True, help="No limit on requests at once.")
@gateway_options
@json_option
@click.pass_context
def set_host(
    context: click.Context,
    host_id: str,
    max_concurrency: int | None,
    no_max_concurrency: bool,
    gateway_url: str | None,
    admin_key: str | None,
    as_json: bool,
) -> None:
    """Change how many requests the host ID gets at once, on all its models together.

    Models that had the limit of the host get the new one; those with a limit of their own keep it.
    """
    if (max_concurrency is None) is not no_max_concurrency:
        refuse("give either --max-concurrency or --no-max-concurrency")
    path = f"/hosts/{quote(host_id, safe='')}"
    record = _client(context, gateway_url, admin_key).admin("PUT", path, json={"max_concurrency": max_concurrency})
    if as_json:
        print_json(record)
        return
    limit = record["max_concurrency"]
    click.echo(f"{printable(record['endpoint_url'])} gets {'any number of' if limit is None else f'at most {limit}'} requests at once.")


@hosts_command.command("remove")
@click.argument("host_id", metavar="ID")
@gateway_options
@click.pass_context
def remove_host(context: click.Context, host_id: str, gateway_url: str | None, admin_key: str | None) -> None:
    """Remove the host ID with all its models."""
    removed = _client(context, gateway_url, admin_key).admin("DELETE", f"/hosts/{quote(host_id, safe='')}")
    count = len(removed["registration_ids"])
    click.echo(f"The host was removed with {count} {'model' if count == 1 else 'models'}.")
