"""The servers' own keys at rest: encrypted with a secret that lives outside the database."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.stores.files import keep_private, publish, replace_file

LEAST_LENGTH = 32


def _derived(secret: str) -> Fernet:
    """Make a key of a secret: a fast hash is right, for the secret is long and random."""
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(secret.strip().encode()).digest()))


class Vault:
    """Encrypt with the first secret, decrypt with any of them.

    >>> vault = Vault(["a new secret", "the old secret"])
    >>> vault.unseal(vault.seal("sk-1"))
    'sk-1'
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        keys = [_derived(secret) for secret in secrets]
        self._newest = keys[0]
        self._all = MultiFernet(keys)

    def seal(self, key: str | None) -> str | None:
        """Encrypt a key with the newest secret."""
        return None if key is None else self._newest.encrypt(key.encode()).decode()

    def unseal(self, sealed: str | None) -> str | None:
        """Decrypt a key.

        Raises:
            StorageUnavailable: It was encrypted with a secret that this vault does not have.
        """
        if sealed is None:
            return None
        try:
            return self._all.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise StorageUnavailable(
                "The servers' keys in the database are encrypted with another secret: set MULTIVERSE_BACKEND_KEY_SECRET to that "
                "secret (separate several by commas), or restore the .key file that was beside the database"
            ) from None

    def is_newest(self, sealed: str) -> bool:
        """Return whether a key is encrypted with the first secret."""
        try:
            self._newest.decrypt(sealed.encode())
        except InvalidToken:
            return False
        return True


def key_file(database: Path) -> Path:
    """Return the path of the file that holds the secret where no setting does."""
    return database.with_name(f"{database.name}.key")


def _write_secret(draft: Path) -> None:
    draft.write_bytes(Fernet.generate_key())


def _read_secrets(path: Path) -> list[str]:
    """Return what the file holds, the newest first; there are two while `rotate` is at work."""
    secrets = path.read_text("utf-8", errors="replace").split()
    if not secrets or min(map(len, secrets)) < LEAST_LENGTH:
        raise StorageUnavailable(f"The file {path} no longer contains a secret: restore it from a backup")
    return secrets


@contextmanager
def rotated(database: Path) -> Iterator[None]:
    """Give a database a new secret; in the block, opening its vault encrypts all keys again. The old secret is dropped only if that worked.

    Raises:
        StorageUnavailable: The file holds no secret.
        OSError: The file cannot be read or written.
    """
    path = key_file(database)
    new = Fernet.generate_key().decode()
    replace_file(path, "\n".join([new, *_read_secrets(path)]).encode())
    yield
    replace_file(path, new.encode())


def open_vault(database: Path, secret: str | None, *, may_create: bool) -> Vault:
    """Make the vault of a database: with the secrets of the setting (the newest first), or else that of the file beside it.

    What the file holds can be decrypted in any case. It is made at the first start, unless there are keys that need the lost one.

    Raises:
        StorageUnavailable: There is neither a secret nor the file.
        OSError: The file cannot be read or made.
    """
    path = key_file(database)
    secrets = [] if secret is None else secret.split(",")
    if not secrets and may_create and not path.exists():
        publish(path, _write_secret)
    if path.exists():
        keep_private(path)
        secrets += _read_secrets(path)
    if not secrets:
        raise StorageUnavailable(
            f"The servers' keys in the database are encrypted, and the file {path} that "
            "contained the secret is missing: restore it, or set "
            "MULTIVERSE_BACKEND_KEY_SECRET to the secret"
        )
    return Vault(secrets)
