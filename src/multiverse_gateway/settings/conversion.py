"""How a value that is written in a file, in the environment or in Python becomes one of the type that its setting has."""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from multiverse_gateway.settings.checks import rejection

_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def convert(value: object, field: "attrs.Attribute[Any]") -> object:
    """Return a value as the type of its field.

    Texts are read as in the environment. A value that already has the type is returned unchanged.

    Raises:
        UnusableSetting: The value does not fit the type; the message names the setting and says what to write.
    """
    try:
        return _CONVERTERS[field.type](value, field)
    except (ValueError, OverflowError) as error:
        raise rejection(field, value, str(error)) from None


def _to_bool(value: object, _: object) -> bool:
    truth = value if isinstance(value, bool) else _TRUTH.get(str(value).strip().lower())
    if truth is None:
        raise ValueError("write true or false")
    return truth


def _to_int(value: object, _: object) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise ValueError("write a whole number")
    return int(text)


def _to_float(value: object, _: object) -> float:
    if isinstance(value, float) and math.isfinite(value):
        return value
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?(?:[0-9]{1,18}\.?[0-9]*|\.[0-9]+)", text):
        raise ValueError("write a number")
    return float(text)


def _to_str(value: object, field: "attrs.Attribute[Any]") -> str:
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, list | tuple | set | frozenset):
        value = ",".join(_to_tuple(value, field))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ValueError("write a string in quotes")
    value = value.strip()
    return value.upper() if field.name == "log_level" else value


def _to_str_or_none(value: object, field: "attrs.Attribute[Any]") -> str | None:
    return None if value is None else _to_str(value, field)


def _to_tuple(value: object, _: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple | set | frozenset) or not all(isinstance(item, str) for item in items):
        raise ValueError("write a list of strings")
    return tuple(item.strip() for item in items if item.strip())


_CONVERTERS: Mapping[Any, Callable[[object, "attrs.Attribute[Any]"], object]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    str | None: _to_str_or_none,
    tuple[str, ...]: _to_tuple,
}
