"""The command `wall`: links to the wall view of a running gateway."""

import click

from multiverse_gateway.cli.client import client_for, gateway_options
from multiverse_gateway.cli.common import json_option, print_json, print_table, printable


@click.group("wall")
def wall_command() -> None:
    """Create, list and revoke links that show the state of the servers on a screen.

    Such a link opens the wall view without sign-in.
    """


@wall_command.command("create")
@click.argument("name")
@gateway_options
@json_option
def create(name: str, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """Create a link for a screen. It is shown only once; the gateway keeps only the hash of its token."""
    client = client_for(gateway_url, admin_key)
    made = client.admin("POST", "/wall-links", json={"name": name})
    if as_json:
        print_json(made)
        return
    click.echo(f"Created a wall link for {printable(made['name'])}. It is shown only once; open it on the screen:")
    click.echo(f"  {printable(client.url.rstrip('/') + made['path'])}")


@wall_command.command("list")
@gateway_options
@json_option
def list_links(gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """List the links, without their tokens."""
    links = client_for(gateway_url, admin_key).admin("GET", "/wall-links")
    if as_json:
        print_json(links)
    elif not links:
        click.echo("There are no wall links. Create one with `multiverse-gateway wall create NAME`.")
    else:
        print_table([(printable(link["name"]), link["created_at"], link["id"]) for link in links], ("name", "created", "id"))


@wall_command.command("revoke")
@click.argument("link")
@gateway_options
@json_option
def revoke(link: str, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """Revoke a link; screens that show it lose it within two seconds. LINK is its id or its name."""
    client = client_for(gateway_url, admin_key)
    ids = [record["id"] for record in client.admin("GET", "/wall-links") if link in (record["id"], record["name"])]
    if not ids:
        raise click.ClickException(f"there is no wall link {printable(link)}; `multiverse-gateway wall list` lists all of them")
    revoked = client.admin("DELETE", f"/wall-links/{ids[0]}")
    if as_json:
        print_json(revoked)
    else:
        click.echo(f"Revoked the wall link of {printable(revoked['name'])}.")
