"""What commands share: settings from where they are called, output for people or programs."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from multiverse_gateway.settings import Settings, SettingsError, load_settings
from multiverse_gateway.settings.sources import Written, as_written, names_written

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with settings; the default is multiverse.toml in this directory.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


class Unusable(click.ClickException):
    """The command or a setting cannot be used as it is."""

    exit_code = 2


def refuse(message: str) -> NoReturn:
    """End with exit code 2: the command or a setting cannot be used.

    Raises:
        Unusable: always.
    """
    raise Unusable(message)


def settings_here(config: Path | None = None, overrides: Mapping[str, object] | None = None) -> Settings:
    """Return the settings that count in the working directory; what is wrong with them ends the command with exit code 2."""
    try:
        return load_settings(env=os.environ, cwd=Path.cwd(), config=config, overrides=overrides or {})
    except SettingsError as error:
        refuse(str(error))


def names_here(config: Path | None = None, overrides: Mapping[str, object] | None = None) -> Written:
    """Return how the settings were written that `settings_here` reads from the same sources, for `as_written`."""
    return names_written(env=os.environ, cwd=Path.cwd(), config=config, overrides=overrides or {})


def refuse_setting(error: SettingsError, config: Path | None = None) -> NoReturn:
    """End with exit code 2: a setting that was read by `settings_here` cannot be used. The message names it as it was written.

    Raises:
        Unusable: always.
    """
    refuse(as_written(error, names_here(config)))


def print_json(value: object) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> None:
    """Print rows as an aligned table with headings."""
    from tabulate import tabulate

    click.echo(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))


def printable(text: object) -> str:
    """Return a text of somebody else's as it may be shown on a terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))


def trimmed(text: str | None) -> str | None:
    r"""Return an option or a variable without the white space that files and shells add; nothing left means none.

    >>> trimmed("a-key\n"), trimmed(" ")
    ('a-key', None)
    """
    return (text or "").strip() or None


def host_for_url(host: str) -> str:
    """Return where a gateway that listens on `host` is reached from this machine, as a URL has it."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host).strip("[]")  # noqa: S104  compared, not bound
    return f"[{reached}]" if ":" in reached else reached
