"""Remove secrets from texts: those that were registered, however they are quoted, and whatever looks like one."""

import json
import re
from collections.abc import Iterable

import attrs

MASK = "[secret]"
MIN_SECRET_LENGTH = 6

_SHAPES = re.compile(
    r"(?P<bearer>(?i:bearer)\s+)[^\s\"',;]+"
    r"|(?P<header>(?i:x-api-key)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+"
    r"|(?P<user>://[^/\s:@]*:)[^/\s@]+(?=@)"
    r"|\bsk-[A-Za-z0-9_-]{6,}"
    r"|\bmvg-[a-z]+-[A-Za-z0-9_-]{16,}"
)


@attrs.define
class Redactor:
    """Replace secrets in texts by `MASK`: the registered ones, and what has the shape of one."""

    _secrets: set[str] = attrs.field(factory=set, repr=False)
    _compiled: tuple[int, re.Pattern[str]] | None = attrs.field(default=None, init=False, repr=False)
    """The pattern, and how many secrets it covers. It is compiled at the first text after a new secret: a start may register thousands."""
    cleaned: dict[str, str] = attrs.field(factory=dict, init=False, repr=False)
    """The memo of `records.clean`: short texts and their cleaned form. Most texts in a log have been logged before."""

    def add(self, secret: str) -> None:
        """Register a secret, in its JSON and `repr` forms too; one shorter than six characters would mask ordinary words and is ignored."""
        if len(secret) >= MIN_SECRET_LENGTH and secret not in self._secrets:
            self._secrets.add(secret)
            self.cleaned = {}  # replaced, not cleared: another thread may be about to store an old result in the previous one

    def secrets(self) -> Iterable[str]:
        """Return the secrets that are removed from every record."""
        return list(self._secrets)

    def __call__(self, text: str) -> str:
        """Return the text without secrets."""
        if self._secrets:
            text = self._pattern().sub(MASK, text)
        if text.isalnum():  # every shape contains a space, a colon or a dash
            return text
        return _SHAPES.sub(lambda match: (match["bearer"] or match["header"] or match["user"] or "") + MASK, text)

    def _pattern(self) -> re.Pattern[str]:
        compiled = self._compiled  # read once: another thread may store an older pattern meanwhile
        if compiled is not None and compiled[0] == len(self._secrets):
            return compiled[1]
        secrets = list(self._secrets)
        forms = {form for secret in secrets for form in (secret, *_quoted_forms(secret))}
        longest_first = sorted(forms, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._compiled = len(secrets), pattern
        return pattern


def _quoted_forms(secret: str) -> Iterable[str]:
    """Return a secret as it appears in JSON, in JSON within JSON, and in `repr`."""
    once = json.dumps(secret)[1:-1]
    return once, json.dumps(once)[1:-1], repr(secret)[1:-1]
