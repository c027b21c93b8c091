"""The command `login-link`: sign in to the pages again when the admin key is not at hand."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import anyio
import click
from sqlite_utils import Database

from multiverse_gateway.cli.common import config_option, host_for_url, refuse, settings_here
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.pages.sessions import LINK_SECONDS, new_link
from multiverse_gateway.plugins import store as store_of
from multiverse_gateway.settings import Settings, SettingsError
from multiverse_gateway.stores.sqlite import database_path
from multiverse_gateway.stores.sqlite_schema import state_of


@click.command("login-link")
@config_option
@click.option(
    "--gateway", "gateway_url", metavar="URL", help="Root URL of the gateway in the link; the default is PUBLIC_URL, or its own address."
)
def login_link_command(config: Path | None, gateway_url: str | None) -> None:
    """Print a link that signs in to the pages once, within 15 minutes.

    The link is written to the database of the gateway that is configured in this directory; the gateway may be running. So the command
    needs no admin key, but the right to write that database: run it as the gateway's user.
    """
    settings = settings_here(config)
    if not settings.ui:
        refuse("this gateway has no pages: MULTIVERSE_UI is false")
    _require_database(settings)
    token, digest = new_link()
    try:
        anyio.run(_keep, settings, digest)
    except StorageUnavailable as error:
        raise click.ClickException(error.message) from None
    except SettingsError as error:
        refuse(str(error))
    click.echo(f"{_root(settings, gateway_url)}/login?token={token}")
    click.echo("It signs in once, within 15 minutes.", err=True)


def _require_database(settings: Settings) -> None:
    """Check that the database is there and of this version: the command makes none and changes no tables under a running gateway."""
    kind = settings.database_url.partition("://")[0]
    if kind == "memory":
        refuse("with memory:// only the running gateway knows its sign-in links: sign in with the admin key")
    if kind != "sqlite":
        return
    path = database_path(settings.database_url)
    if not path.exists():
        refuse(f"there is no database {path}: run the command in the gateway's directory, or start the gateway first")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            is_current = state_of(Database(connection, execute_plugins=False)).is_current
    except sqlite3.Error:
        raise click.ClickException(f"the database {path} cannot be read") from None
    if not is_current:
        refuse(f"the database {path} is of another version: start this version of the gateway on it once")


async def _keep(settings: Settings, digest: str) -> None:
    store = store_of(settings)
    await store.open()
    try:
        await store.open_session(digest, time.time() + LINK_SECONDS)
    finally:
        await store.aclose()


def _root(settings: Settings, gateway_url: str | None) -> str:
    if gateway_url:
        return gateway_url.rstrip("/").removesuffix("/v1")
    if settings.public_url:
        return settings.public_url[0].rstrip("/") + settings.root_path
    return f"http://{host_for_url(settings.host)}:{settings.port}{settings.root_path}"
