"""What a client key may be called, and how the keys themselves look.

1. Any printable text of any language is a name. Nothing in it can change how the text around it is shown: no control characters, no
   characters that turn the direction of writing, no invisible ones.
2. Two spellings of the same characters are one name: names are kept in Unicode's form NFC, with single blanks.
"""

import hmac
import unicodedata
from base64 import urlsafe_b64encode
from collections.abc import Sequence

import attrs

MAX_KEY_NAME = 64
"""Characters of a name, after it was put into NFC."""
KEY_PREFIX = "mvg-client-"
SEED_BYTES = 32
_JOINERS = "\u200c\u200d"
"""Persian, the scripts of India, and emoji need these two invisible characters between others."""
_LOOKS_EMPTY = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks of Unicode that show nothing."""


class UnfitName(ValueError):
    """A text cannot be a name. The message completes a sentence that begins with "The name"."""


def key_name(text: str) -> str:
    """Return a name as it is kept: in NFC, without white space around it, with one blank for any other white space on its line.

    >>> key_name(" Ju\\u0308rgen\\u3000Müller "), key_name("Ng, Anna"), key_name("李明")
    ('Jürgen Müller', 'Ng, Anna', '李明')
    >>> key_name("Ada\\u202e")
    Traceback (most recent call last):
        ...
    multiverse_gateway.core.key_names.UnfitName: must not contain control or invisible characters; remove U+202E

    Raises:
        UnfitName: It is empty or too long, or it has characters that a name may not have.
    """
    blanks = "".join(" " if unicodedata.category(character) == "Zs" else character for character in text.strip())
    name = " ".join(part for part in unicodedata.normalize("NFC", blanks).split(" ") if part)
    if not name:
        raise UnfitName("must not be empty")
    unfit = next((number for number, character in enumerate(name) if not _is_visible(name, number, character)), None)
    if unfit is not None:
        raise UnfitName(f"must not contain control or invisible characters; remove U+{ord(name[unfit]):04X}")
    if unicodedata.category(name[0]).startswith("M"):
        raise UnfitName(f"must not begin with a mark that joins the character before it; remove U+{ord(name[0]):04X}")
    if len(name) > MAX_KEY_NAME:
        raise UnfitName(f"must have at most {MAX_KEY_NAME} characters; this one has {len(name):,}")
    return name


def _is_visible(name: str, number: int, character: str) -> bool:
    if character in _JOINERS:
        around = name[max(0, number - 1) : number + 2]
        return len(around) == 3 and not around[0].isascii() and not around[2].isascii() and around[2] not in _JOINERS
    return character.isprintable() and character not in _LOOKS_EMPTY


@attrs.frozen
class NameList:
    """The names of a list as they are kept, in its order, and what is wrong with its lines, by number from 1."""

    names: tuple[str, ...]
    problems: tuple[tuple[int, str], ...]


def names_of(lines: Sequence[str]) -> NameList:
    """Read a list of names, one per line; empty lines are skipped. A name that is listed twice is a problem.

    >>> names_of(["Ada", "", " Ng, Anna "]).names
    ('Ada', 'Ng, Anna')
    >>> names_of(["Ada", "Ada"]).problems
    ((2, 'Ada is on line 1 already; give each key a name of its own'),)
    """
    seen: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff") if number == 1 else line  # what some programs write at the beginning of a file
        if not text.strip():
            continue
        try:
            name = key_name(text)
        except UnfitName as error:
            problems.append((number, f"the name {error}"))
            continue
        if name in seen:
            problems.append((number, f"{name} is on line {seen[name]} already; give each key a name of its own"))
        else:
            seen[name] = number
    return NameList(tuple(seen), tuple(problems))


def nth_secret(seed: bytes, number: int) -> str:
    """Return the key with this number of those that a random seed makes: of the seed, and of no other key, it can be computed.

    >>> key = nth_secret(b"random" * 6, 0)
    >>> key.startswith("mvg-client-"), len(key), key != nth_secret(b"random" * 6, 1)
    (True, 54, True)
    """
    digest = hmac.digest(seed, f"client key {number}".encode(), "sha256")
    return KEY_PREFIX + urlsafe_b64encode(digest).rstrip(b"=").decode()


def hint_of(secret: str) -> str:
    """Return the beginning and the end of a key, by which people recognize it: 8 of its 43 random characters.

    >>> hint_of("mvg-client-" + "abcdefghij" * 4 + "xyz")
    'mvg-client-abcd…jxyz'
    """
    return f"{secret[: len(KEY_PREFIX) + 4]}…{secret[-4:]}"
