"""Where settings come from: `multiverse.toml`, `.env`, the environment and command-line flags."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from multiverse_gateway.settings.checks import PREFIX, SettingsError, UnusableSetting, canonical
from multiverse_gateway.settings.declaration import FIELDS, Settings

CONFIG_FILE = "multiverse.toml"
_FIELD_OF: Mapping[str, str] = {PREFIX + name.upper(): name for name in FIELDS} | {
    name.upper(): name for name, field in FIELDS.items() if field.metadata["plain"]
}
"""Each name that may be written, in capitals, with the setting it means."""

Written = Mapping[str, tuple[str, str]]
"""The settings that are given, by canonical name: as the user wrote the name, and in what; a flag says that by itself."""


def load_settings(
    *, env: Mapping[str, str], cwd: Path, config: Path | None = None, overrides: Mapping[str, object] | None = None
) -> Settings:
    """Read all sources and return the settings; `overrides` are the flags by field name, `None` for those not given.

    An empty value means the default. Plain names (`PORT`) count besides the canonical ones (`MULTIVERSE_PORT`). What Kubernetes adds to
    the environment for a Service whose name begins like ours (`MULTIVERSE_GATEWAY_PORT=tcp://10.96.0.12:80`) is passed over.

    Raises:
        SettingsError: A file cannot be read, a name is unknown, or a value cannot work; the message names it as it was written, and the
            remedy.
    """
    values: dict[str, object] = {}
    written: dict[str, tuple[str, str]] = {}
    try:
        for source, values_of_source in _sources(env, cwd, config, overrides or {}):
            for name, (given, value) in values_of_source.items():
                values.pop(name, None)
                written[canonical(name)] = given, source
                if value != "":
                    values[name] = value
        if "rate_limit_per_minute" in values:  # also when it is set to its default
            values.setdefault("key_rate_limit_per_minute", values["rate_limit_per_minute"])
        return Settings(**values)  # type: ignore[arg-type]  # each field converts what it is given
    except SettingsError as error:
        raise _renamed(error, written) from None


def names_written(
    *, env: Mapping[str, str], cwd: Path, config: Path | None = None, overrides: Mapping[str, object] | None = None
) -> Written:
    """Return how the settings that `load_settings` reads from these sources were written, for `as_written`.

    Raises:
        SettingsError: A file cannot be read, or a name is unknown.
    """
    sources = _sources(env, cwd, config, overrides or {})
    return {canonical(name): (given, source) for source, values in sources for name, (given, _) in values.items()}


def as_written(error: Exception, written: Written) -> str:
    """Return the message of an error, in which settings have the names that the user knows them by.

    >>> as_written(UnusableSetting("port", "=70000", "write less"), {"MULTIVERSE_PORT": ("PORT", "the environment")})
    'PORT=70000 in the environment cannot be used: write less'
    """
    return str(_renamed(error, written))


def _renamed(error: Exception, written: Written) -> SettingsError:
    def given(match: re.Match[str]) -> str:
        return written.get(match[0], (match[0], ""))[0]

    def rename(text: str) -> str:
        return re.sub(rf"{PREFIX}[A-Z_]+", given, text)

    if not isinstance(error, UnusableSetting):
        return SettingsError(rename(str(error)))
    name = canonical(error.field)
    subject = None
    if name in written:
        own_name, source = written[name]
        subject = f"{own_name}{error.shown}" + (f" in {source}" if source else "")
    return UnusableSetting(error.field, error.shown, rename(error.remedy), subject=subject)


_Found = dict[str, tuple[str, object]]
"""What one source holds, by field: the name as it was written, and the value."""


def _sources(env: Mapping[str, str], cwd: Path, config: Path | None, overrides: Mapping[str, object]) -> Iterable[tuple[str, _Found]]:
    """Yield the sources, the weakest first."""
    yield from _toml_source(cwd, config)
    yield from _dotenv_source(cwd / ".env")
    yield "the environment", _by_field({name: value for name, value in env.items() if not _is_service_link(name, value)}, "the environment")
    flags = {name: (f"--{name.replace('_', '-')}", value) for name, value in overrides.items() if value is not None}
    yield "", flags


_SERVICE_LINK = re.compile(r".+_SERVICE_(?:HOST|PORT(?:_[A-Z0-9_]+)?)|.+_PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_[A-Z]+)?")


def _is_service_link(name: str, value: str) -> bool:
    """Return whether Kubernetes added a variable for a Service: pods get them for every Service of their namespace.

    >>> _is_service_link("MULTIVERSE_GATEWAY_PORT", "tcp://10.96.0.12:80"), _is_service_link("MULTIVERSE_HTTP_PORT", "8080")
    (True, False)
    """
    is_address = name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://"))
    return is_address or _SERVICE_LINK.fullmatch(name) is not None


def _by_field(pairs: Mapping[str, object], source: str, *, ours: bool = False) -> _Found:
    """Return the values by field name; the canonical name wins. In a file of our own (`ours`) every name must mean something."""
    values: _Found = {}
    for name in sorted(pairs, key=lambda name: name.upper().startswith(PREFIX)):
        key = name.upper() if ours or name.upper().startswith(PREFIX) else name
        if ours and PREFIX + key in _FIELD_OF:
            key = PREFIX + key
        if key in _FIELD_OF:
            values[_FIELD_OF[key]] = name, pairs[name]
        elif ours or key.startswith(PREFIX):
            close = difflib.get_close_matches(key.removeprefix(PREFIX).lower(), FIELDS, n=1)
            hint = f"did you mean {close[0] if ours else PREFIX + close[0].upper()}?" if close else "remove it"
            raise SettingsError(f"{name} in {source} is not a setting; {hint} (`multiverse-gateway settings --env` lists all)")
    return values


def _toml_source(cwd: Path, config: Path | None) -> Iterable[tuple[str, _Found]]:
    path = config or cwd / CONFIG_FILE
    if config is None and not path.exists():
        return
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({_words(error)}); name a readable file with --config") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML ({error}); write lines such as port = 8000") from None
    yield str(path), _by_field(table, str(path), ours=True)


_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
_QUOTED = re.compile(r"""(?:"((?:[^"\\]|\\.)*)"|'([^']*)')\s*(?:#.*)?""")


def _dotenv_source(path: Path) -> Iterable[tuple[str, _Found]]:
    if not path.is_file():
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({_words(error)}); repair or remove it") from None
    yield ".env", _by_field(parse_dotenv(text), ".env")


def parse_dotenv(text: str) -> dict[str, str]:
    r"""Read `NAME=value` lines: comments, `export`, quotes and the escapes of double quotes are understood.

    >>> parse_dotenv('# a comment\nexport PORT=80 # the usual\nADMIN_API_KEY="a # b"')
    {'PORT': '80', 'ADMIN_API_KEY': 'a # b'}

    Raises:
        SettingsError: A line is none of these.
    """
    values = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise SettingsError(f"line {number} of .env cannot be read; write NAME=value, or # before a comment")
        values[match[1]] = _unquote(match[2], number)
    return values


def _unquote(text: str, number: int) -> str:
    if text[:1] not in ('"', "'"):
        return re.split(r"(?:^|\s)#", text, maxsplit=1)[0].strip()
    match = _QUOTED.fullmatch(text)
    if match is None:
        raise SettingsError(f"line {number} of .env has an unclosed quote; close it")
    return match[2] if match[1] is None else re.sub(r"\\(.)", r"\1", match[1])


def _words(error: Exception) -> str:
    return error.strerror or "unreadable" if isinstance(error, OSError) else "it is not UTF-8"
