"""The command `keys create --from`: a key for each name of a list, written to a file that the next run continues.

1. All lines are checked before the first key is made.
2. Each key stands in the file, durably, before the next one is made; the file is its owner's alone. If something fails, no key that was
   made before is lost, and the same command continues.
3. A name that has a key keeps it. If that key is not in the file, it cannot be shown any more: the command reports it, and
   `--renew-missing` replaces it.
"""

import csv
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import click

from multiverse_gateway.cli.client import GatewayClient, GatewayRefusal, is_in_use
from multiverse_gateway.cli.common import printable, refuse
from multiverse_gateway.core.errors import KeyNameTaken
from multiverse_gateway.core.key_names import KEY_PREFIX, hint_of, names_of
from multiverse_gateway.core.spreadsheets import csv_of, text_of

HEADER = ("name", "OPENAI_BASE_URL", "OPENAI_API_KEY")
_KEY = re.compile(re.escape(KEY_PREFIX) + r"[A-Za-z0-9_-]{43}")


@attrs.define(eq=False)
class KeyFile:
    """A CSV file of keys that is open for appending; `keys` are those that it holds, by name, the last one of each."""

    path: Path
    keys: dict[str, str] = attrs.field(repr=False)
    _descriptor: int

    def add(self, name: str, base_url: str, key: str) -> None:
        """Append a line and make it durable.

        Raises:
            ClickException: It cannot be written; the message holds the key, which would be lost otherwise.
        """
        try:
            _write(self._descriptor, csv_of([(name, base_url, key)]).encode())
        except OSError as error:
            raise click.ClickException(
                f"{self.path} cannot be written ({error.strerror}): keep the key of {printable(name)}, {key}"
            ) from None
        self.keys[name] = key


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


@contextmanager
def open_key_file(path: Path) -> Iterator[KeyFile]:
    """Open a file of keys, or make it, with mode 0600; a last line that was cut off is removed.

    Raises:
        ClickException: It cannot be used, it is another kind of file, or another command is writing it.
    """
    descriptor = None
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                refuse(f"{path} is not a file; name one with --output")
            _lock(descriptor, path)
            path.chmod(0o600)
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                os.ftruncate(descriptor, len(whole))
            keys = _keys_in(whole, path)
            if not whole:
                _write(descriptor, csv_of([HEADER]).encode())
        except OSError as error:
            raise click.ClickException(f"{path} cannot be written: {error.strerror}") from None
        yield KeyFile(path, keys, descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    with suppress(ImportError):  # where there are no such locks
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.ClickException(f"another command is writing {path}; wait until it has ended") from None


def _keys_in(data: bytes, path: Path) -> dict[str, str]:
    """Return the keys of a file by name; each line is read by itself, so that a broken one hides no other."""
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        lines = [""]
    rows = [next(csv.reader([line]), []) for line in lines]
    if lines and tuple(rows[0]) != HEADER:
        refuse(f"{path} is not a list of keys: its first line is not {','.join(HEADER)}; name another file with --output")
    return {text_of(row[0]): row[2] for row in rows[1:] if len(row) == len(HEADER) and _KEY.fullmatch(row[2])}


@attrs.define(kw_only=True)
class ListOutcome:
    """What became of the names of a list."""

    created: list[str] = attrs.field(factory=list)
    renewed: list[str] = attrs.field(factory=list)
    kept: list[str] = attrs.field(factory=list)
    """Names whose key is in the file already."""
    missing: list[str] = attrs.field(factory=list)
    """Names that have a key, which is not in the file."""

    @property
    def added(self) -> int:
        """How many lines were added to the file."""
        return len(self.created) + len(self.renewed)


def names_from(path: Path) -> tuple[str, ...]:
    """Read the names of a list, one per line.

    Raises:
        ClickException: It cannot be read, it holds no name, or a line cannot be used; the messages name all such lines.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        refuse(f"{path} is not encoded in UTF-8; save it in UTF-8")
    found = names_of(text.split("\n"))
    for number, problem in found.problems:
        click.echo(f"{path}, line {number}: {printable(problem)}", err=True)
    if found.problems:
        refuse("no key was created: correct these lines and run the command again")
    if not found.names:
        refuse(f"{path} holds no name; write one per line")
    return found.names


def create_all(
    client: GatewayClient, names: Sequence[str], file: KeyFile, terms: Mapping[str, Any], *, base_url: str, renew_missing: bool
) -> ListOutcome:
    """Make a key for each name that has none, and add it to the file.

    Raises:
        ClickException: The gateway or the file failed; the message says how many keys were added before.
    """
    outcome = ListOutcome()
    try:
        records = {record["name"]: record for record in client.admin("GET", "/keys") if is_in_use(record)}
        for name in names:
            _create_one(client, name, records.get(name), file, terms, base_url, outcome, renew_missing=renew_missing)
    except click.ClickException as error:
        if not outcome.added:
            raise
        raise click.ClickException(
            f"{error.message}\n{outcome.added} keys were added to {file.path}; run the same command again to continue"
        ) from None
    return outcome


def _create_one(
    client: GatewayClient,
    name: str,
    record: Mapping[str, Any] | None,
    file: KeyFile,
    terms: Mapping[str, Any],
    base_url: str,
    outcome: ListOutcome,
    *,
    renew_missing: bool,
) -> None:
    if record is not None and name in file.keys and record.get("hint") in (None, hint_of(file.keys[name])):
        outcome.kept.append(name)
    elif record is None:
        try:
            made = client.admin("POST", "/keys", json={**terms, "name": name})
        except GatewayRefusal as error:
            if error.code != KeyNameTaken.code:
                raise
            outcome.missing.append(name)  # another command made it a moment ago
            return
        file.add(name, base_url, made["key"])
        outcome.created.append(name)
    elif renew_missing:
        made = client.admin("POST", f"/keys/{record['id']}/renew")
        file.add(name, base_url, made["key"])
        outcome.renewed.append(name)
    else:
        outcome.missing.append(name)
