"""What one setting may be: the checks that `declaration` puts on its fields, and the error that names a setting and the remedy."""

import difflib
import re
from collections.abc import Callable, Iterable
from ipaddress import ip_network
from typing import Any

import attrs

from multiverse_gateway.core.addresses import AddressPolicy
from multiverse_gateway.core.origins import ANY, normalize_origin
from multiverse_gateway.core.paths import is_root

PREFIX = "MULTIVERSE_"
MASK = "********"
MIN_ADMIN_KEY_LENGTH = 16
_PASSWORD = re.compile(r"(?<=://)([^/@\s]*?):[^/\s]*@")


class SettingsError(ValueError):
    """A setting cannot be used; the message names it and says what to write instead."""


class UnusableSetting(SettingsError):
    """One setting has a value that cannot be used: `field` names it in `Settings`, and `remedy` says why, and what to write instead.

    `shown` is the value as it may be shown, empty for a secret. `subject` is what the user wrote, where that is known.
    """

    def __init__(self, field: str, shown: str, remedy: str, *, subject: str | None = None) -> None:
        super().__init__(f"{subject or canonical(field) + shown} cannot be used: {remedy}")
        self.field = field
        self.shown = shown
        self.remedy = remedy


def canonical(field: str) -> str:
    """Return the name of a setting in the environment."""
    return PREFIX + field.upper()


def mask_url(url: str) -> str:
    """Return a URL, or a text that contains some, with the passwords masked."""
    return _PASSWORD.sub(rf"\1:{MASK}@", url)


def rejection(field: "attrs.Attribute[Any]", value: object, remedy: str) -> UnusableSetting:
    """Return the error of a value that a field cannot take; `remedy` says why, and what to write instead."""
    shown = "" if field.metadata["secret"] else mask_url(f"={value}")
    return UnusableSetting(field.name, shown, mask_url(remedy))


Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def between(low: float, high: float, unit: str = "") -> Validator:
    """Return a check for a number in a range, both ends included."""

    def check(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise rejection(field, value, f"write a number from {low:,} to {high:,}{unit}")

    return check


def one_of(*choices: str) -> Validator:
    """Return a check for one of these words."""

    def check(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
        if value not in choices:
            raise rejection(field, value, f"write one of {', '.join(choices)}{_did_you_mean(str(value), choices)}")

    return check


def seconds(low: float, high: float) -> Validator:
    """Return a check for a duration in a range."""
    return between(low, high, " seconds")


def byte_count(low: int, high: int) -> Validator:
    """Return a check for a size in a range."""
    return between(low, high, " bytes")


def no_longer_than(other: str) -> Validator:
    """Return a check that a duration does not exceed that of another setting, which is declared earlier."""

    def check(settings: object, field: "attrs.Attribute[Any]", value: float) -> None:
        limit: float = getattr(settings, other)
        if value > limit:
            raise rejection(field, value, f"it is longer than {PREFIX}{other.upper()}={limit:g}; make it shorter")

    return check


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def check_host(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    """Check an address or name to listen on."""
    if not value or any(character.isspace() or character in "/@" for character in value):
        raise rejection(field, value, "write the address to listen on, such as 127.0.0.1, or 0.0.0.0 for all")


def check_database(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    """Check the URL of a store."""
    scheme, separator, rest = value.partition("://")
    if not separator or not scheme or not value.isprintable():
        raise rejection(field, mask_url(value), "write a URL such as sqlite:///./multiverse.db or postgresql://user@host/database")
    if scheme == "sqlite" and not rest.startswith("/"):
        raise rejection(field, value, f"a path follows three slashes: sqlite:///{rest or './multiverse.db'}")


def check_rate_storage(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    """Check the URL of the storage where requests are counted."""
    schemes = ("memory", "redis", "rediss", "valkey", "valkeys", "redis+unix")
    if value.partition("://")[0] not in schemes or "://" not in value:
        raise rejection(field, mask_url(value), "write memory://, or redis://host:6379/0 for several gateways")


def check_admin_key(_: object, field: "attrs.Attribute[Any]", value: str | None) -> None:
    """Check that a key is hard to guess and can be sent in a header."""
    if value is not None and (len(value) < MIN_ADMIN_KEY_LENGTH or not value.isascii() or not value.isprintable() or " " in value):
        raise rejection(
            field,
            value,
            f"it is too easy to guess or cannot be sent in a header; set at least {MIN_ADMIN_KEY_LENGTH} random ASCII characters "
            "without spaces, or leave it out",
        )


def check_client_keys(_: object, field: "attrs.Attribute[Any]", value: tuple[str, ...]) -> None:
    """Check that client keys are long enough and can be sent in a header."""
    if any(not key.isascii() or not key.isprintable() or " " in key or len(key) < 8 for key in value):
        raise rejection(
            field, value, "a key is shorter than 8 characters, or holds spaces or characters beyond ASCII; write long random keys"
        )


def check_origins(_: object, field: "attrs.Attribute[Any]", value: tuple[str, ...]) -> None:
    """Check origins of web pages; `*` stands for all."""
    for origin in value:
        if origin != ANY and normalize_origin(origin.rstrip("/")) is None:
            raise rejection(field, origin, "write origins such as https://class.example without a path, or *")


def check_root(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    """Check the path below which a proxy serves the gateway."""
    if not is_root(value.rstrip("/")):
        raise rejection(field, value, "write a path such as /ai, which begins with none of the gateway's own paths")


def check_own_origins(_: object, field: "attrs.Attribute[Any]", value: tuple[str, ...]) -> None:
    """Check the addresses by which browsers reach the gateway."""
    for origin in value:
        if normalize_origin(origin.rstrip("/")) is None:
            raise rejection(field, origin, "write origins such as https://models.example without a path")


def check_proxies(_: object, field: "attrs.Attribute[Any]", value: tuple[str, ...]) -> None:
    """Check that a setting lists networks of proxies."""
    for text in value:
        try:
            ip_network(text)
        except ValueError as error:
            raise rejection(field, text, f"{error}; write addresses or networks such as 10.0.0.5, 10.1.0.0/16") from None


def check_networks(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    """Check which private networks are open."""
    try:
        AddressPolicy.parse(value)
    except ValueError as error:
        raise rejection(field, value, str(error)) from None


def check_name(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    """Check the form of a name of a plug-in."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        raise rejection(field, value, "write one of the names that `multiverse-gateway plugins` lists")


def check_secrets(_: object, field: "attrs.Attribute[Any]", value: str | None) -> None:
    """Check the length of each secret; commas stand between them."""
    for key in (value or "").split(",") if value is not None else ():
        if len(key.strip()) < 32:
            raise rejection(
                field, value, "it is too short; write at least 32 random characters (openssl rand -base64 32); the newest key first"
            )
