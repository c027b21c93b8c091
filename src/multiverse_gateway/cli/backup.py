"""Commands that copy the registry, bring a copy back, move it to PostgreSQL, and renew the secret of the servers' keys."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import attrs
import click

from multiverse_gateway import plugins
from multiverse_gateway.cli.common import config_option, json_option, names_here, print_json, refuse, refuse_setting, settings_here
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.settings import Settings, SettingsError
from multiverse_gateway.settings.sources import as_written
from multiverse_gateway.stores.sqlite import SqliteStore, database_path
from multiverse_gateway.stores.sqlite_copies import back_up, dump_tables, exclusive_access, restore
from multiverse_gateway.stores.vault import key_file, rotated


def _database(settings: Settings, config: Path | None = None) -> Path:
    if not settings.database_url.startswith("sqlite:"):
        refuse("This command is for SQLite; use pg_dump and pg_restore for PostgreSQL; memory:// has nothing to back up")
    try:
        return database_path(settings.database_url)
    except SettingsError as error:
        refuse_setting(error, config)


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")


@click.command("backup")
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@config_option
@json_option
def backup_command(file: Path | None, config: Path | None, as_json: bool) -> None:
    """Copy the registry's database to a file; the gateway may be running.

    Without FILE the copy goes into the folder "backups" beside the database. It is checked before it gets its name, and only its owner
    may read it.
    """
    path = _database(settings_here(config), config)
    target = file or path.parent / "backups" / f"{path.stem}-{_stamp()}{path.suffix}"
    try:
        held = back_up(path, target)
    except StorageUnavailable as error:
        raise click.ClickException(error.message) from None
    if held is None:
        raise click.ClickException(f"{target} exists already; choose another name")
    if as_json:
        print_json({"file": str(target), **attrs.asdict(held)})
        return
    click.echo(f"{target} holds {held.servers} servers.")
    if key_file(path).exists():
        click.echo(f"The servers' keys in it are encrypted; also keep a copy of {key_file(path)} too, in another place.")


@click.command("restore")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--force",
    is_flag=True,
    help="Restore even if the database changed after the copy was made; the changes stay in the database that is set aside.",
)
@config_option
@json_option
def restore_command(file: Path, force: bool, config: Path | None, as_json: bool) -> None:
    """Restore a copy that `backup` made; the gateway must not be running.

    The database that was there is kept beside it.
    """
    path = _database(settings_here(config), config)
    aside = path.with_name(f"{path.name}.replaced-{_stamp()}")
    try:
        held = restore(path, file, aside, force=force)
    except StorageUnavailable as error:
        raise click.ClickException(error.message) from None
    kept = str(aside) if aside.exists() else None
    if as_json:
        print_json({"file": str(path), "kept": kept, **attrs.asdict(held)})
        return
    click.echo(f"{path} holds {held.servers} servers again." + (f" The previous database is {kept}." if kept else ""))


@click.command("migrate-store")
@click.argument("source")
@click.argument("target")
@config_option
@json_option
def migrate_store_command(source: str, target: str, config: Path | None, as_json: bool) -> None:
    """Copy a registry from SQLite to PostgreSQL; the gateway must not be running.

    SOURCE is the URL of the file, such as sqlite:///./multiverse.db, TARGET that of an empty database, such as
    postgresql://user@host/database (PGPASSWORD or ~/.pgpass keep the password off the command line). Servers, health, history, client
    keys, counts and the admin key are copied and compared, all or nothing; SOURCE stays as it is. MULTIVERSE_BACKEND_KEY_SECRET
    encrypts the servers' keys in TARGET.
    """
    settings = settings_here(config)
    if not source.startswith("sqlite:") or not target.startswith(("postgres:", "postgresql:")):
        refuse("A registry is copied from sqlite:///FILE to postgresql://…: write the two URLs in this order")
    try:
        path = database_path(source)
    except SettingsError as error:
        refuse(as_written(error, {"MULTIVERSE_DATABASE_URL": ("SOURCE", "")}))
    if not path.exists():
        raise click.ClickException(f"There is no database {path}")
    try:
        store = plugins.store(attrs.evolve(settings, database_url=target))
        counts = anyio.run(_copy, path, settings.backend_key_secret, store)
    except SettingsError as error:
        refuse(as_written(error, {**names_here(config), "MULTIVERSE_DATABASE_URL": ("TARGET", "")}))
    except StorageUnavailable as error:
        raise click.ClickException(error.message) from None
    if as_json:
        print_json(counts)
        return
    click.echo("Copied: " + ", ".join(f"{count:,} {table.replace('_', ' ')}" for table, count in counts.items()) + ".")
    click.echo("Start the gateways with MULTIVERSE_DATABASE_URL and MULTIVERSE_BACKEND_KEY_SECRET of the new database.")


async def _copy(path: Path, secret: str | None, target: Any) -> dict[str, int]:
    from multiverse_gateway.stores.postgres_filling import fill  # an extra
    from multiverse_gateway.stores.postgres_schema import TABLES

    await target.open()
    try:
        counts: dict[str, int] = await fill(target, dump_tables(path, secret, TABLES))
    finally:
        await target.aclose()
    return counts


@click.command("rotate-key")
@config_option
def rotate_key_command(config: Path | None) -> None:
    """Renew the secret that encrypts the servers' keys; the gateway must not be running.

    Where MULTIVERSE_BACKEND_KEY_SECRET is set, the new secret is written there, before the old one with a comma between them, and the
    next start encrypts all keys again.
    """
    settings = settings_here(config)
    path = _database(settings, config)
    if settings.backend_key_secret is not None:
        refuse("MULTIVERSE_BACKEND_KEY_SECRET holds the secret: write the new one before it, with a comma, and restart the gateway")
    if not path.exists() or not key_file(path).exists():
        raise click.ClickException(f"There is no secret yet: {key_file(path)} is made at the first start")
    try:
        with exclusive_access(path):
            pass
        with rotated(path):
            anyio.run(_open_once, path)
    except StorageUnavailable as error:
        raise click.ClickException(error.message) from None
    except OSError as error:
        raise click.ClickException(f"{key_file(path)} cannot be written: {error.strerror}") from None
    click.echo(f"{key_file(path)} holds a new secret, and all keys are encrypted with it. Copies made before need the old one.")


async def _open_once(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.aclose()
