"""The command `keys`: client keys of a running gateway."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import click

from multiverse_gateway.cli.client import GatewayClient, client_for, gateway_options, is_in_use, state_of_key
from multiverse_gateway.cli.common import json_option, print_json, print_table, printable
from multiverse_gateway.cli.key_lists import ListOutcome, create_all, names_from, open_key_file
from multiverse_gateway.core.key_names import UnfitName, key_name
from multiverse_gateway.core.servers import MAX_AT_ONCE, MAX_DAILY_LIMIT

MAX_DAYS = 36_500


@click.group("keys")
def keys_command() -> None:
    """Create, list, change, block, renew and revoke the client keys of a running gateway."""


@keys_command.command("create")
@click.argument("name", required=False)
@gateway_options
@click.option(
    "--from", "names_file", type=click.Path(path_type=Path, dir_okay=False), help="A list of names, one per line, instead of NAME."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --from: the CSV file that the keys are added to, readable only by you; the default is keys.csv beside the list.",
)
@click.option("--base-url", help="With --from: the address for the holders of the keys; the default is the gateway's URL with /v1.")
@click.option("--renew-missing", is_flag=True, help="With --from: renew keys that exist but are not in the file.")
@click.option("--days", type=click.IntRange(1, MAX_DAYS), help="Days until the key expires; by default it never expires.")
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
    name: str | None,
    gateway_url: str | None,
    admin_key: str | None,
    names_file: Path | None,
    output: Path | None,
    base_url: str | None,
    renew_missing: bool,
    days: int | None,
    rate_limit: int | None,
    daily_limit: int | None,
    max_at_once: int | None,
    bulk: bool,
    models: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a client key, or one for each name of a list.

    The key is shown this once; the gateway keeps only its hash. With --from FILE, keys are added to a CSV file (name, OPENAI_BASE_URL,
    OPENAI_API_KEY). All names are checked first, names that have a key are left out, and the command can be run again to continue.
    """
    terms: dict[str, Any] = {
        "rate_limit": rate_limit,
        "daily_limit": daily_limit,
        "max_at_once": max_at_once,
        "bulk": bulk,
        "models": list(models),
    }
    if days is not None:
        terms["expires_at"] = _days_ahead(days)
    if (name is None) is (names_file is None):
        raise click.UsageError("give a NAME, or a list of names with --from FILE")
    if names_file is not None:
        _create_list(
            client_for(gateway_url, admin_key), names_file, output, terms, base_url=base_url, renew_missing=renew_missing, as_json=as_json
        )
        return
    if output is not None or base_url is not None or renew_missing:
        raise click.UsageError("--output, --base-url and --renew-missing are for a list of names: --from FILE")
    _show_made(
        client_for(gateway_url, admin_key).admin("POST", "/keys", json={**terms, "name": name}), "Created a key for", as_json=as_json
    )


def _days_ahead(days: int) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).isoformat()


def _show_made(made: Mapping[str, Any], event: str, *, as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    click.echo(f"{event} {printable(made['name'])}. It is shown only once; keep it safe:")
    click.echo(f"  key   {printable(made['key'])}")
    click.echo(f"  id    {printable(made['id'])}")
    if made["expires_at"]:
        click.echo(f"  until {printable(made['expires_at'])}")


def _create_list(
    client: GatewayClient,
    names_file: Path,
    output: Path | None,
    terms: Mapping[str, Any],
    *,
    base_url: str | None,
    renew_missing: bool,
    as_json: bool,
) -> None:
    names = names_from(names_file)
    path = output or names_file.with_name("keys.csv")
    with open_key_file(path) as file:
        outcome = create_all(client, names, file, terms, base_url=base_url or f"{client.url}/v1", renew_missing=renew_missing)
    if as_json:
        print_json({"file": str(path), **attrs.asdict(outcome)})
    else:
        click.echo(_summary(outcome, path))
    for name in outcome.missing:
        click.echo(f"{printable(name)} has a key already, which is not in {path}", err=True)
    if outcome.missing:
        raise click.ClickException("run the command with --renew-missing to replace these keys, or choose other names")


def _summary(outcome: ListOutcome, path: Path) -> str:
    parts = [f"{len(outcome.created)} created"]
    if outcome.renewed:
        parts.append(f"{len(outcome.renewed)} renewed")
    if outcome.kept:
        parts.append(f"{len(outcome.kept)} were there already")
    return f"Keys in {path}: {', '.join(parts)}."


@keys_command.command("list")
@gateway_options
@click.option("--all", "everything", is_flag=True, help="Include keys that have expired or were revoked.")
@json_option
def list_keys(gateway_url: str | None, admin_key: str | None, everything: bool, as_json: bool) -> None:
    """List the client keys; never the keys themselves."""
    keys = [key for key in client_for(gateway_url, admin_key).admin("GET", "/keys") if everything or is_in_use(key)]
    if as_json:
        print_json(keys)
        return
    if not keys:
        click.echo("There are no client keys. Create one with `multiverse-gateway keys create NAME`.")
        return
    rows = [
        (
            printable(key["name"]) + (" (bulk)" if key["bulk"] else ""),
            printable(state_of_key(key)),
            printable(key.get("hint") or "-"),
            printable(key["expires_at"] or "-"),
            "-" if key["rate_limit"] is None else key["rate_limit"],
            "-" if key["daily_limit"] is None else f"{key['used_today']} of {key['daily_limit']}",
            key["max_at_once"] or "-",
            printable(", ".join(key["models"]) or "all"),
            printable(key["id"]),
        )
        for key in keys
    ]
    print_table(rows, ("name", "state", "key", "until", "per minute", "today", "at once", "models", "id"))


@keys_command.command("set-limits")
@click.argument("key")
@gateway_options
@click.option("--days", type=click.IntRange(0, MAX_DAYS), help="Days from now until the key expires, 0 for never.")
@click.option("--rate-limit", type=click.IntRange(0, 1_000_000), help="Requests per minute, 0 for no limit.")
@click.option("--daily-limit", type=click.IntRange(0, MAX_DAILY_LIMIT), help="Requests to models per day (UTC), 0 for no limit.")
@click.option(
    "--max-at-once",
    type=click.IntRange(0, MAX_AT_ONCE),
    help="Requests that may run and wait together when another one would have to wait, 0 for no limit.",
)
@click.option("--bulk/--interactive", default=None, help="Whether requests with this key yield to interactive ones of other clients.")
@click.option("--model", "models", multiple=True, help="A model that it may use; repeat the option for several.")
@click.option("--all-models", is_flag=True, help="It may use all models.")
@json_option
def set_limits(
    key: str,
    gateway_url: str | None,
    admin_key: str | None,
    days: int | None,
    rate_limit: int | None,
    daily_limit: int | None,
    max_at_once: int | None,
    bulk: bool | None,
    models: tuple[str, ...],
    all_models: bool,
    as_json: bool,
) -> None:
    """Change limits of a client key; those that are not named stay. KEY is its id, or the name of one that is active or blocked."""
    named = {"rate_limit": rate_limit, "daily_limit": daily_limit, "max_at_once": max_at_once, "bulk": bulk}
    body: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if models and all_models:
        raise click.UsageError("--model and --all-models contradict each other; leave one of them out")
    if models or all_models:
        body["models"] = list(models)
    if days is not None:
        body["expires_at"] = _days_ahead(days) if days else None
    if not body:
        raise click.UsageError("name a limit to change, such as --max-at-once 16")
    if daily_limit == 0:
        body["daily_limit"] = None
    _change(key, gateway_url, admin_key, body, "Changed", as_json=as_json)


@keys_command.command("rename")
@click.argument("key")
@click.argument("name")
@gateway_options
@json_option
def rename(key: str, name: str, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """Give a client key another name. KEY is its id, or the name of one that is active or blocked."""
    _change(key, gateway_url, admin_key, {"name": name}, "Renamed", as_json=as_json)


@keys_command.command("block")
@click.argument("key")
@gateway_options
@json_option
def block(key: str, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """Reject a client key until it is unblocked. KEY is its id, or the name of one that is active."""
    _change(key, gateway_url, admin_key, {"blocked": True}, "Blocked", as_json=as_json)


@keys_command.command("unblock")
@click.argument("key")
@gateway_options
@json_option
def unblock(key: str, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """Accept a blocked client key again. KEY is its id or its name."""
    _change(key, gateway_url, admin_key, {"blocked": False}, "Unblocked", as_json=as_json)


def _change(key: str, gateway_url: str | None, admin_key: str | None, body: Mapping[str, Any], event: str, *, as_json: bool) -> None:
    client = client_for(gateway_url, admin_key)
    changed = client.admin("PATCH", f"/keys/{_id_of(client, key)}", json=body)
    _show(changed, event, as_json=as_json)


def _show(record: Mapping[str, Any], event: str, *, as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        click.echo(f"{event} the key of {printable(record['name'])}.")


@keys_command.command("renew")
@click.argument("key")
@gateway_options
@json_option
def renew(key: str, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """Replace a client key by a new one of the same name and limits, which is shown once; the old one is rejected immediately.

    KEY is its id, or the name of one that is active or blocked.
    """
    client = client_for(gateway_url, admin_key)
    _show_made(client.admin("POST", f"/keys/{_id_of(client, key)}/renew"), "Renewed the key of", as_json=as_json)


@keys_command.command("revoke")
@click.argument("key")
@gateway_options
@json_option
def revoke(key: str, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """End a client key for good. KEY is its id, or the name of one that is active or blocked."""
    client = client_for(gateway_url, admin_key)
    _show(client.admin("DELETE", f"/keys/{_id_of(client, key)}"), "Revoked", as_json=as_json)


def _id_of(client: GatewayClient, key: str) -> str:
    names = {key, _normalized(key)}
    ids = [
        record["id"] for record in client.admin("GET", "/keys") if key == record["id"] or (record["name"] in names and is_in_use(record))
    ]
    if not ids:
        raise click.ClickException(f"there is no client key {printable(key)}; `multiverse-gateway keys list --all` lists all of them")
    return str(ids[0])


def _normalized(name: str) -> str:
    try:
        return key_name(name)
    except UnfitName:
        return name
