"""The servers' own keys at rest: encrypted with a secret that lives outside the database."""

import base64
import hashlib
import os
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from multiverse_gateway.core.errors import StorageUnavailable


def _derived(secret: str) -> Fernet:
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(secret.strip().encode()).digest()))


class Vault:
    """Encrypt with the newest secret, decrypt with any of them (comma-separated, the newest first)."""

    def __init__(self, secrets: str) -> None:
        self._fernet = MultiFernet([_derived(secret) for secret in secrets.split(",")])

    def seal(self, key: str | None) -> str | None:
        """Encrypt a key."""
        return None if key is None else self._fernet.encrypt(key.encode()).decode()

    def unseal(self, sealed: str | None) -> str | None:
        """Decrypt a key.

        Raises:
            StorageUnavailable: It was encrypted with a secret that this vault does not have.
        """
        if sealed is None:
            return None
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise StorageUnavailable(
                "The servers' keys in the database are encrypted with another secret: set MULTIVERSE_BACKEND_KEY_SECRET to the "
                "one that was used (several with commas), or bring back the .key file that stood beside the database"
            ) from None


def secret_beside(database: Path) -> str:
    """Return the secret in the file beside the database, made at first use, readable by its owner only; safe when several start at once."""
    path = database.with_name(f"{database.name}.key")
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    if not path.exists():
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(Fernet.generate_key())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text("ascii").strip()
