"""Hand keys that were made a moment ago to the one page that shows them.

1. The browser carries what the keys can be computed of, sealed, in a cookie for the path of that page. Only the session (or the admin key)
   that made the keys can open it, within `SEALED_SECONDS`.
2. It can be opened once, in whatever process: the store forgets it then, and the page takes the cookie away.
"""

import json
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from urllib.parse import quote

import attrs
from cryptography.fernet import Fernet, InvalidToken

from multiverse_gateway.core.key_names import nth_secret
from multiverse_gateway.entry.identity import is_secure, presented_keys
from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.sessions import cookie_values

SEALED_SECONDS = 60
_NAME = "mvg_new_keys"
_SEALED = re.compile(r"[A-Za-z0-9_=-]{1,1000}")


@attrs.frozen(kw_only=True)
class MadeKeys:
    """Keys that were made, or one that was renewed; `key_id` is that of the first, by which its page is found."""

    key_id: str
    seed: bytes = attrs.field(repr=False)
    count: int = 1

    @property
    def secrets(self) -> list[str]:
        """The keys themselves, in the order in which they were made."""
        return [nth_secret(self.seed, number) for number in range(self.count)]


class SealedKeys:
    """Seal and open what the next page shows."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._sessions = renderer.sessions

    async def seal(self, visit: Visit, made: MadeKeys, path: str) -> str:
        """Return the header that hands the keys to the page at `path`."""
        text = json.dumps({"id": made.key_id, "seed": made.seed.hex(), "count": made.count})
        sealed = _fernet(visit).encrypt_at_time(text.encode(), self._now()).decode()
        await self._sessions.keep_once(sealed, SEALED_SECONDS)
        return self._cookie(visit, sealed, path, SEALED_SECONDS)

    async def open(self, visit: Visit, key_id: str) -> MadeKeys | None:
        """Return the keys that were handed to the page of this key; `None` after the first time, and for whatever we did not seal."""
        for sealed in self._sealed(visit):
            with suppress(InvalidToken):
                held = json.loads(_fernet(visit).decrypt_at_time(sealed.encode(), SEALED_SECONDS, self._now()))
                if held["id"] == key_id and await self._sessions.use_once(sealed):
                    return MadeKeys(key_id=key_id, seed=bytes.fromhex(held["seed"]), count=held["count"])
        return None

    def end(self, visit: Visit, path: str) -> str:
        """Return the header that takes the cookie of the page at `path` away."""
        return self._cookie(visit, "", path, 0)

    def _sealed(self, visit: Visit) -> Iterator[str]:
        for name in (f"__Secure-{_NAME}", _NAME):
            for value in cookie_values(visit.request.scope["headers"], name):
                if _SEALED.fullmatch(value):
                    yield value

    def _cookie(self, visit: Visit, value: str, path: str, seconds: int) -> str:
        secure = is_secure(visit.request.scope, self._renderer.rules.trusted)
        name = f"__Secure-{_NAME}" if secure else _NAME
        place = quote(path, safe="/%:@!$&'()*+=~")
        return f"{name}={value}; HttpOnly; Max-Age={seconds}; Path={place}; SameSite=Strict{'; Secure' if secure else ''}"

    def _now(self) -> int:
        return int(self._renderer.gateway.wall())


def _fernet(visit: Visit) -> Fernet:
    """Return the cipher of a session, or of the admin key that a program sends instead."""
    owner = visit.session.token.encode() if visit.session else b"\0".join(presented_keys(visit.request.scope["headers"]))
    return Fernet(urlsafe_b64encode(sha256(b"new client keys\0" + owner).digest()))
