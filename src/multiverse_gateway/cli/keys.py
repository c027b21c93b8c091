"""The command `keys`: client keys of a running gateway."""

from datetime import UTC, datetime, timedelta
from typing import Any

import click

from multiverse_gateway.cli.client import GatewayClient, client_for, gateway_options
from multiverse_gateway.cli.common import json_option, print_json, print_table, printable
from multiverse_gateway.core.servers import MAX_AT_ONCE, MAX_DAILY_LIMIT


@click.group("keys")
def keys_command() -> None:
    """Create, list and revoke the client keys of a running gateway."""


@keys_command.command("create")
@click.argument("name")
@gateway_options
@click.option("--days", type=click.IntRange(1, 36_500), help="Days until the key expires; by default it never expires.")
@click.option(
    "--rate-limit",
    type=click.IntRange(0, 1_000_000),
    help="Requests per minute; 0 means no limit. The default is KEY_RATE_LIMIT_PER_MINUTE.",
)
@click.option("--daily-limit", type=click.IntRange(1, MAX_DAILY_LIMIT), help="Requests to models per day (UTC); no limit by default.")
@click.option(
    "--max-at-once",
    type=click.IntRange(0, MAX_AT_ONCE),
    help="Requests that may run and wait together when another one would have to wait, 0 for no limit; MAX_AT_ONCE_PER_KEY by default.",
)
@click.option("--bulk", is_flag=True, help="Requests with this key yield to interactive ones.")
@click.option("--model", "models", multiple=True, help="A model that it may use; repeat the option for several. All models by default.")
@json_option
def create(
    name: str,
    gateway_url: str | None,
    admin_key: str | None,
    days: int | None,
    rate_limit: int | None,
    daily_limit: int | None,
    max_at_once: int | None,
    bulk: bool,
    models: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a client key. It is shown this once; the gateway keeps only its hash."""
    body: dict[str, Any] = {
        "name": name,
        "rate_limit": rate_limit,
        "daily_limit": daily_limit,
        "max_at_once": max_at_once,
        "bulk": bulk,
        "models": list(models),
    }
    if days is not None:
        body["expires_at"] = (datetime.now(UTC) + timedelta(days=days)).isoformat()
    made = client_for(gateway_url, admin_key).admin("POST", "/keys", json=body)
    if as_json:
        print_json(made)
        return
    click.echo(f"Created a key for {printable(made['name'])}. It is shown only once; keep it safe:")
    click.echo(f"  key   {printable(made['key'])}")
    click.echo(f"  id    {printable(made['id'])}")
    if made["expires_at"]:
        click.echo(f"  until {printable(made['expires_at'])}")


@keys_command.command("list")
@gateway_options
@click.option("--all", "everything", is_flag=True, help="Include keys that have expired or were revoked.")
@json_option
def list_keys(gateway_url: str | None, admin_key: str | None, everything: bool, as_json: bool) -> None:
    """List the client keys; never the keys themselves."""
    keys = [key for key in client_for(gateway_url, admin_key).admin("GET", "/keys") if key["works"] or everything]
    if as_json:
        print_json(keys)
        return
    if not keys:
        click.echo("There are no client keys. Create one with `multiverse-gateway keys create NAME`.")
        return
    rows = [
        (
            printable(key["name"]) + (" (bulk)" if key["bulk"] else ""),
            "works" if key["works"] else "revoked" if key["revoked_at"] else "expired",
            printable(key["expires_at"] or "-"),
            "-" if key["rate_limit"] is None else key["rate_limit"],
            "-" if key["daily_limit"] is None else f"{key['used_today']} of {key['daily_limit']}",
            key["max_at_once"] or "-",
            printable(", ".join(key["models"]) or "all"),
            printable(key["id"]),
        )
        for key in keys
    ]
    print_table(rows, ("name", "state", "until", "per minute", "today", "at once", "models", "id"))


@keys_command.command("set-limits")
@click.argument("key")
@gateway_options
@click.option("--rate-limit", type=click.IntRange(0, 1_000_000), help="Requests per minute, 0 for no limit.")
@click.option("--daily-limit", type=click.IntRange(0, MAX_DAILY_LIMIT), help="Requests to models per day (UTC), 0 for no limit.")
@click.option(
    "--max-at-once",
    type=click.IntRange(0, MAX_AT_ONCE),
    help="Requests that may run and wait together when another one would have to wait, 0 for no limit.",
)
@click.option("--bulk/--interactive", default=None, help="Whether requests with this key yield to interactive ones of other clients.")
@json_option
def set_limits(
    key: str,
    gateway_url: str | None,
    admin_key: str | None,
    rate_limit: int | None,
    daily_limit: int | None,
    max_at_once: int | None,
    bulk: bool | None,
    as_json: bool,
) -> None:
    """Change limits of a client key; those that are not named stay. KEY is its id, or the name of one that works."""
    named = {"rate_limit": rate_limit, "daily_limit": daily_limit, "max_at_once": max_at_once, "bulk": bulk}
    body: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if not body:
        raise click.UsageError("name a limit to change, such as --max-at-once 16")
    if daily_limit == 0:
        body["daily_limit"] = None
    client = client_for(gateway_url, admin_key)
    changed = client.admin("PATCH", f"/keys/{_id_of(client, key)}", json=body)
    if as_json:
        print_json(changed)
    else:
        click.echo(f"Changed the key of {printable(changed['name'])}.")


@keys_command.command("revoke")
@click.argument("key")
@gateway_options
@json_option
def revoke(key: str, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """End a client key for good. KEY is its id, or the name of one that works."""
    client = client_for(gateway_url, admin_key)
    revoked = client.admin("DELETE", f"/keys/{_id_of(client, key)}")
    if as_json:
        print_json(revoked)
    else:
        click.echo(f"Revoked the key of {printable(revoked['name'])}.")


def _id_of(client: GatewayClient, key: str) -> str:
    ids = [record["id"] for record in client.admin("GET", "/keys") if key == record["id"] or (record["works"] and key == record["name"])]
    if not ids:
        raise click.ClickException(f"there is no client key {printable(key)}; `multiverse-gateway keys list --all` lists all of them")
    return str(ids[0])
