"""Secrets in compressed pages: each response carries other bytes, so that its length says nothing about the secret (BREACH)."""

import base64
import binascii
import re
import secrets
from typing import Final

_LENGTH: Final = 32
_PLAIN: Final = re.compile(r"[0-9a-f]{64}")


def masked(token: str) -> str:
    """Return a token of 64 hexadecimal digits with a random mask, different each time.

    >>> token = "ab" * 32
    >>> masked(token) != masked(token), unmasked(masked(token)) == token
    (True, True)
    """
    mask = secrets.token_bytes(_LENGTH)
    return base64.urlsafe_b64encode(mask + _xor(mask, bytes.fromhex(token))).decode()


def unmasked(text: str) -> str:
    """Return the token that a text masks; a token without a mask, and a text that is neither, are returned as they are.

    >>> unmasked("ab" * 32) == "ab" * 32, unmasked("nonsense")
    (True, 'nonsense')
    """
    if _PLAIN.fullmatch(text):
        return text
    try:
        raw = base64.b64decode(text.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        return text
    return _xor(raw[:_LENGTH], raw[_LENGTH:]).hex() if len(raw) == 2 * _LENGTH else text


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(one ^ other for one, other in zip(left, right, strict=True))
