"""The settings: one frozen value, made from a TOML file, `.env`, the environment and command-line flags.

1. Later sources win: `multiverse.toml`, `.env`, environment, flags. In one source `MULTIVERSE_PORT` wins over `PORT`.
2. A value that cannot work stops the start. So does a name with our prefix that means nothing: it is a misspelling.
3. Secrets never show in `repr`, in messages of errors, or in `masked()`.
"""

import difflib
import re
import socket
import tomllib
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import attrs

from multiverse_gateway.core.addresses import AddressPolicy
from multiverse_gateway.core.failover import RetryPolicy
from multiverse_gateway.core.health import AutoDeregister, HealthPolicy
from multiverse_gateway.core.origins import ANY, OriginPolicy, normalize_origin
from multiverse_gateway.core.paths import is_root

PREFIX = "MULTIVERSE_"
CONFIG_FILE = "multiverse.toml"
MIN_ADMIN_KEY_LENGTH = 16
UNKNOWN_PER_MINUTE = 60
KEY_PER_MINUTE = 600
_MIB = 1 << 20
_MASK = "********"
_PASSWORD = re.compile(r"(?<=://)([^/@\s]*?):[^/\s]*@")


class SettingsError(ValueError):
    """A setting cannot be used; the message names it and says what to write instead."""


def _mask_url(url: str) -> str:
    return _PASSWORD.sub(rf"\1:{_MASK}@", url)


def _show_secret(value: object) -> str:
    return repr(_MASK) if value else repr(value)


def _fail(field: "attrs.Attribute[Any]", value: object, remedy: str) -> SettingsError:
    shown = "" if field.metadata["secret"] else f"={value}"
    return SettingsError(_mask_url(f"{PREFIX}{field.name.upper()}{shown} cannot be used: {remedy}"))


_Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _between(low: float, high: float, unit: str = "") -> _Check:
    def check(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _fail(field, value, f"write a number from {low:,} to {high:,}{unit}")

    return check


def _one_of(*words: str) -> _Check:
    def check(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
        if value not in words:
            raise _fail(field, value, f"write one of {', '.join(words)}{_did_you_mean(str(value), words)}")

    return check


def _seconds(low: float, high: float) -> _Check:
    return _between(low, high, " seconds")


def _bytes(low: int, high: int) -> _Check:
    return _between(low, high, " bytes")


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _check_host(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    if not value or any(character.isspace() or character in "/@" for character in value):
        raise _fail(field, value, "write the address to listen on, such as 127.0.0.1, or 0.0.0.0 for all")


def _check_database(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    scheme, separator, rest = value.partition("://")
    if not separator or not scheme or not value.isprintable():
        raise _fail(field, _mask_url(value), "write a URL such as sqlite:///./multiverse.db or postgresql://user@host/database")
    if scheme == "sqlite" and not rest.startswith("/"):
        raise _fail(field, value, f"a path follows three slashes: sqlite:///{rest or './multiverse.db'}")


def _check_rate_storage(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    schemes = ("memory", "redis", "rediss", "valkey", "valkeys", "redis+unix")
    if value.partition("://")[0] not in schemes or "://" not in value:
        raise _fail(field, _mask_url(value), "write memory://, or redis://host:6379/0 for several gateways")


def _check_admin_key(_: object, field: "attrs.Attribute[Any]", value: str | None) -> None:
    if value is not None and (len(value) < MIN_ADMIN_KEY_LENGTH or not value.isascii() or not value.isprintable() or " " in value):
        raise _fail(
            field,
            value,
            f"it is too easy to guess or cannot be sent in a header; write at least {MIN_ADMIN_KEY_LENGTH} random ASCII characters "
            "without spaces, or leave it out",
        )


def _check_client_keys(_: object, field: "attrs.Attribute[Any]", value: tuple[str, ...]) -> None:
    if any(not key.isascii() or not key.isprintable() or " " in key or len(key) < 8 for key in value):
        raise _fail(field, value, "a key is shorter than 8 characters, or holds spaces or characters beyond ASCII; write long random keys")


def _check_origins(_: object, field: "attrs.Attribute[Any]", value: tuple[str, ...]) -> None:
    for origin in value:
        if origin != ANY and normalize_origin(origin.rstrip("/")) is None:
            raise _fail(field, origin, "write origins such as https://class.example without a path, or *")


def _check_root(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    if not is_root(value.rstrip("/")):
        raise _fail(field, value, "write a path such as /ai, which begins with none of the gateway's own paths")


def _check_own_origins(_: object, field: "attrs.Attribute[Any]", value: tuple[str, ...]) -> None:
    for origin in value:
        if normalize_origin(origin.rstrip("/")) is None:
            raise _fail(field, origin, "write origins such as https://models.example without a path")


def _check_proxies(_: object, field: "attrs.Attribute[Any]", value: tuple[str, ...]) -> None:
    for text in value:
        try:
            ip_network(text)
        except ValueError as error:
            raise _fail(field, text, f"{error}; write addresses or networks such as 10.0.0.5, 10.1.0.0/16") from None


def _check_networks(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    try:
        AddressPolicy.parse(value)
    except ValueError as error:
        raise _fail(field, value, str(error)) from None


def _check_word(_: object, field: "attrs.Attribute[Any]", value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        raise _fail(field, value, "write one of the names that `multiverse-gateway plugins` lists")


def _check_secret(_: object, field: "attrs.Attribute[Any]", value: str | None) -> None:
    for key in (value or "").split(",") if value is not None else ():
        if len(key.strip()) < 32:
            raise _fail(
                field, value, "it is too short; write at least 32 random characters (openssl rand -base64 32); the newest key first"
            )


def _check_first_byte(settings: "Settings", field: "attrs.Attribute[Any]", value: float) -> None:
    _seconds(0.05, 3600)(settings, field, value)
    if value > settings.request_timeout_seconds:
        raise _fail(
            field, value, f"it is longer than {PREFIX}REQUEST_TIMEOUT_SECONDS={settings.request_timeout_seconds:g}; make it shorter"
        )


def _check_connect(settings: "Settings", field: "attrs.Attribute[Any]", value: float) -> None:
    _seconds(0.05, 300)(settings, field, value)
    if value > settings.first_byte_timeout_seconds:
        raise _fail(
            field, value, f"it is longer than {PREFIX}FIRST_BYTE_TIMEOUT_SECONDS={settings.first_byte_timeout_seconds:g}; make it shorter"
        )


def _at_most(limit: float, other: str) -> Any:
    """Make a default that shrinks to the value of another setting."""
    return attrs.Factory(lambda settings: min(limit, getattr(settings, other)), takes_self=True)


def _key_rate_limit(settings: "Settings") -> int:
    """Return the default limit of a key: that of an address, where it is not the default one."""
    limit = settings.rate_limit_per_minute
    return KEY_PER_MINUTE if limit == UNKNOWN_PER_MINUTE else limit


def _setting(
    default: Any, description: str, *checks: _Check, plain: bool = True, secret: bool = False, example: str | None = None, url: bool = False
) -> Any:
    """Declare a setting: `plain` ones may be written without the prefix, `example` is what `.env.example` shows."""
    show: Any = _show_secret if secret else (lambda value: repr(_mask_url(value))) if url else True
    kind = {"description": description, "plain": plain, "secret": secret, "example": example, "url": url}
    return attrs.field(default=default, validator=list(checks), repr=show, metadata=kind)


@attrs.frozen(kw_only=True)
class Settings:
    """Everything that can be set, with its default; each field's metadata holds its description.

    >>> Settings(request_timeout_seconds=60).first_byte_timeout_seconds
    60
    >>> Settings(port=70_000)
    Traceback (most recent call last):
        ...
    multiverse_gateway.settings.SettingsError: MULTIVERSE_PORT=70000 cannot be used: write a number from 0 to 65,535

    Raises:
        SettingsError: A value is out of its range, or contradicts another.
    """

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 for all of this machine's.", _check_host, plain=False)
    port: int = _setting(8000, "Port to listen on; 0 for any free one.", _between(0, 65_535))
    workers: int = _setting(1, "Processes that serve; more than 1 only on Linux.", _between(1, 64), plain=False)
    direct_door: bool = _setting(
        True, "Serve inference on HTTP/1.1 by the direct door; false leaves everything to hypercorn, at five times the cost.", plain=False
    )

    admin_api_key: str | None = _setting(
        None,
        "Key of the operators, at least 16 characters. Without it one is made at the first start and shown once.",
        _check_admin_key,
        secret=True,
        example="write-at-least-16-random-characters",
    )
    require_client_auth: bool = _setting(
        False, "Ask users for a client key: one made with `multiverse-gateway keys create`, or of the list below."
    )
    client_api_keys: tuple[str, ...] = _setting(
        (), "Keys of the users, with commas between them.", _check_client_keys, secret=True, example="key-of-the-class,key-of-the-lab"
    )

    database_url: str = _setting(
        "sqlite:///./multiverse.db",
        "Where the registry lives: a SQLite file, or postgresql://user:password@host/database for several gateways.",
        _check_database,
        url=True,
    )
    backend_key_secret: str | None = _setting(
        None,
        "Secret that encrypts the servers' keys at rest; with commas, the newest first. SQLite does without: a file beside it holds one.",
        _check_secret,
        secret=True,
        example="output-of-openssl-rand-base64-32",
    )

    health_check_interval_seconds: float = _setting(60.0, "Longest age of a server's verdict, 1 to 300 seconds.", _seconds(1, 300))
    health_check_timeout_seconds: float = _setting(10.0, "Seconds that one probe may take.", _seconds(0.1, 120))
    max_consecutive_failures: int = _setting(3, "Failed probes in a row after which a server is taken out.", _between(1, 100))
    auto_deregister: str = _setting(
        "deactivate",
        "What taking out means: deactivate (comes back by itself), delete, or off.",
        _one_of(*AutoDeregister),
    )
    probe: str = _setting("models", "How servers are probed: models (reads their list), chat (one token), or a plug-in.", _check_word)

    balancer: str = _setting(
        "round_robin",
        "How one of several servers is chosen: round_robin, weighted, least_busy (best where hosts differ), two_choices, or a plug-in.",
        _check_word,
    )
    max_retry_attempts: int = _setting(2, "Further servers that are tried after a failed attempt.", _between(0, 10))
    max_in_flight: int = _setting(1024, "Inference requests that may run at once.", _between(1, 100_000), plain=False)
    max_queue: int = _setting(256, "Requests per model that may wait while all its servers are full.", _between(0, 10_000), plain=False)
    queue_timeout_seconds: float = _setting(60.0, "Seconds that a request may wait for a free server.", _seconds(0, 3600), plain=False)

    request_timeout_seconds: float = _setting(
        300.0, "Seconds from a request's arrival to its complete answer, or to the first event of a stream.", _seconds(0.1, 86_400)
    )
    first_byte_timeout_seconds: float = _setting(
        _at_most(120.0, "request_timeout_seconds"),
        "Seconds that a server may take to its first byte or event; shrinks to the request's.",
        _check_first_byte,
    )
    connect_timeout_seconds: float = _setting(
        _at_most(5.0, "first_byte_timeout_seconds"),
        "Seconds to connect to a server, name and TLS included; shrinks to the request's.",
        _check_connect,
    )
    idle_timeout_seconds: float = _setting(
        _at_most(60.0, "request_timeout_seconds"),
        "Seconds of silence after which a server's answer counts as broken; shrinks to the request's.",
        _seconds(0.05, 3600),
    )
    dns_timeout_seconds: float = _setting(
        _at_most(3.0, "connect_timeout_seconds"), "Seconds to resolve a server's name.", _seconds(0.05, 300), plain=False
    )
    write_timeout_seconds: float = _setting(
        30.0, "Seconds that a server may refuse to take more of a request.", _seconds(0.05, 3600), plain=False
    )
    client_head_timeout_seconds: float = _setting(
        10.0, "Seconds in which the head of a client's request must have arrived.", _seconds(0.05, 300), plain=False
    )
    client_body_timeout_seconds: float = _setting(
        30.0, "Seconds that may pass between two pieces of a request's body.", _seconds(0.05, 3600), plain=False
    )
    client_write_timeout_seconds: float = _setting(
        60.0, "Seconds that a client may refuse to take more of an answer.", _seconds(0.05, 3600), plain=False
    )
    max_stream_seconds: float = _setting(3600.0, "Seconds that one stream may last.", _seconds(1, 604_800), plain=False)
    shutdown_grace_seconds: float = _setting(30.0, "Seconds that running requests get to finish when the gateway stops.", _seconds(0, 3600))

    max_body_bytes: int = _setting(20 * _MIB, "Largest inference request.", _bytes(1024, 1 << 30))
    max_admin_body_bytes: int = _setting(_MIB, "Largest request of any other kind.", _bytes(1024, 1 << 30))
    body_budget_bytes: int = _setting(128 * _MIB, "Memory for all request bodies together.", _bytes(1024, 1 << 40), plain=False)
    answer_budget_bytes: int = _setting(
        256 * _MIB, "Memory for all large answers together, until their clients have read them.", _bytes(1024, 1 << 40)
    )
    max_embeddings_bytes: int = _setting(
        64 * _MIB, "Largest answer to a request for embeddings, which is not held whole.", _bytes(1024, 1 << 40)
    )
    max_response_bytes: int = _setting(16 * _MIB, "Largest answer of a server that is no stream.", _bytes(1024, 1 << 30), plain=False)
    max_event_bytes: int = _setting(_MIB, "Largest event of a streamed chat or text completion.", _bytes(1024, 1 << 30), plain=False)
    max_large_event_bytes: int = _setting(
        16 * _MIB, "Largest event of any other stream, such as an image or a whole response.", _bytes(1024, 1 << 30), plain=False
    )
    max_stream_bytes: int = _setting(64 * _MIB, "Largest stream.", _bytes(1024, 1 << 40), plain=False)

    count_stream_tokens: bool = _setting(
        True,
        "Ask servers for the token counts of those streams whose clients do not say whether they want them; clients do not see them.",
        plain=False,
    )
    rate_limit_per_minute: int = _setting(
        UNKNOWN_PER_MINUTE,
        "Inference requests per minute from an address without a client key; 0 for no limit. "
        "Model lists, and requests from this machine that no proxy forwarded, do not count.",
        _between(0, 1_000_000),
    )
    key_rate_limit_per_minute: int = _setting(
        attrs.Factory(_key_rate_limit, takes_self=True),
        "Inference requests per minute with a client key; 0 for no limit. The one above holds for keys too where only that is set.",
        _between(0, 1_000_000),
    )
    rate_limit_storage: str = _setting(
        "memory://", "Where requests are counted: memory://, or redis://host:6379/0 for several gateways.", _check_rate_storage, url=True
    )
    trusted_proxies: tuple[str, ...] = _setting(
        (),
        "Proxies whose X-Forwarded-For is believed, as networks with commas between them; nobody by default.",
        _check_proxies,
        example="127.0.0.1/32",
    )
    root_path: str = _setting(
        "",
        "Path below which a proxy serves the gateway, such as /ai; the proxy may leave it in the paths of requests or take it off.",
        _check_root,
        example="/ai",
    )
    public_url: tuple[str, ...] = _setting(
        (),
        "Addresses by which browsers reach this gateway, with commas between them; needed only where a proxy changes the header Host.",
        _check_own_origins,
        example="https://models.example",
    )
    metrics_key: str | None = _setting(
        None,
        "Key that /metrics asks for, as `Authorization: Bearer`. Without it whoever reaches the port may read the figures.",
        _check_admin_key,
        plain=False,
        secret=True,
        example="write-at-least-16-random-characters",
    )
    otel: bool = _setting(
        False,
        "Send traces and metrics by OpenTelemetry's protocol (extra otel); OTEL_EXPORTER_OTLP_ENDPOINT says where to.",
        plain=False,
    )
    allow_private_networks: str = _setting(
        "",
        "Servers in private networks: false, true, or the networks allowed, with commas between them.",
        _check_networks,
        example="10.0.0.0/8,192.168.0.0/16",
    )
    verify_backend_tls: bool = _setting(True, "Verify the certificates of servers; false only while developing.")
    enable_cors: bool = _setting(False, "Let web pages of other origins use the inference API, without cookies.")
    cors_origins: tuple[str, ...] = _setting(
        (),
        "Origins allowed then, with commas between them; every origin if none is named.",
        _check_origins,
        example="https://class.example",
    )

    ui: bool = _setting(True, "Serve the pages for browsers.", plain=False)
    public_dashboard: bool = _setting(False, "Show dashboard and models to everybody, read-only, without URLs and owners.")

    log_level: str = _setting("INFO", "Least level that is logged.", _one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    log_format: str = _setting("text", "How records are written: text or json.", _one_of("text", "json"))
    log_file: str | None = _setting(
        None, "File that is logged to as well; 5 older ones of 10 MiB are kept.", example="/var/log/multiverse.log"
    )

    def masked(self) -> dict[str, object]:
        """Return all settings by name, secrets and passwords masked: what the log, the page and the command show."""
        return {field.name: _masked(field, getattr(self, field.name)) for field in attrs.fields(Settings)}


def _masked(field: "attrs.Attribute[Any]", value: object) -> object:
    if field.metadata["secret"]:
        return _MASK if value else None
    return _mask_url(value) if field.metadata["url"] and isinstance(value, str) else value


def unusable(settings: Settings, name: str, remedy: str) -> SettingsError:
    """Return the refusal of a setting whose value turned out to be impossible; `remedy` says why, and what to write instead.

    >>> unusable(Settings(balancer="best"), "balancer", "there is none of this name")
    SettingsError('MULTIVERSE_BALANCER=best cannot be used: there is none of this name')
    """
    field = _FIELDS[name]
    return _fail(field, _masked(field, getattr(settings, name)), remedy)


_FIELDS: Mapping[str, "attrs.Attribute[Any]"] = {field.name: field for field in attrs.fields(Settings)}
_NAMES: Mapping[str, str] = {PREFIX + name.upper(): name for name in _FIELDS} | {
    name.upper(): name for name, field in _FIELDS.items() if field.metadata["plain"]
}


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
        for source, found in _sources(env, cwd, config, overrides or {}):
            for name, (given, value) in found.items():
                values.pop(name, None)
                written[_canonical(name)] = given, source
                if value != "":
                    values[name] = _convert(_FIELDS[name], value)
        if "rate_limit_per_minute" in values:  # also when it is set to its default
            values.setdefault("key_rate_limit_per_minute", values["rate_limit_per_minute"])
        return Settings(**values)  # type: ignore[arg-type]  # _convert made each value fit its field
    except SettingsError as error:
        raise SettingsError(as_written(str(error), written)) from None


def names_written(
    *, env: Mapping[str, str], cwd: Path, config: Path | None = None, overrides: Mapping[str, object] | None = None
) -> Written:
    """Return how the settings that `load_settings` reads from these sources were written, for `as_written`.

    Raises:
        SettingsError: A file cannot be read, or a name is unknown.
    """
    sources = _sources(env, cwd, config, overrides or {})
    return {_canonical(name): (given, source) for source, found in sources for name, (given, _) in found.items()}


def as_written(message: str, written: Written) -> str:
    """Return a message in which settings have the names that the user knows them by.

    >>> as_written("MULTIVERSE_PORT=70000 cannot be used: write less", {"MULTIVERSE_PORT": ("PORT", "the environment")})
    'PORT=70000 in the environment cannot be used: write less'
    """

    def rename(match: re.Match[str]) -> str:
        known = written.get(match["name"])
        if known is None:
            return match[0]
        given, source = known
        place = f" in {source}" if source else ""
        return f"{given}{match['value']}{place}{match['verb']}" if match["verb"] else given

    return re.sub(rf"(?s)(?P<name>{PREFIX}[A-Z_]+)(?:(?P<value>(?:=.*?)?)(?P<verb> cannot be used))?", rename, message)


def _canonical(name: str) -> str:
    return PREFIX + name.upper()


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
    found: _Found = {}
    for name in sorted(pairs, key=lambda name: name.upper().startswith(PREFIX)):
        key = name.upper() if ours or name.upper().startswith(PREFIX) else name
        if ours and PREFIX + key in _NAMES:
            key = PREFIX + key
        if key in _NAMES:
            found[_NAMES[key]] = name, pairs[name]
        elif ours or key.startswith(PREFIX):
            close = difflib.get_close_matches(key.removeprefix(PREFIX).lower(), _FIELDS, n=1)
            hint = f"did you mean {close[0] if ours else PREFIX + close[0].upper()}?" if close else "remove it"
            raise SettingsError(f"{name} in {source} is no setting; {hint} (`multiverse-gateway settings --env` lists all)")
    return found


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
        raise SettingsError(f"{path} cannot be read ({_words(error)}); mend or remove it") from None
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
        raise SettingsError(f"line {number} of .env has a quote that does not end; close it")
    return match[2] if match[1] is None else re.sub(r"\\(.)", r"\1", match[1])


def _words(error: Exception) -> str:
    return error.strerror or "unreadable" if isinstance(error, OSError) else "it is not UTF-8"


_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _convert(field: "attrs.Attribute[Any]", value: object) -> object:
    """Make a text, or what TOML or a flag gave, fit the field."""
    try:
        return _CONVERTERS[field.type](field, value)
    except ValueError as error:
        raise _fail(field, _mask_url(str(value)), str(error)) from None


def _to_bool(_: object, value: object) -> bool:
    truth = value if isinstance(value, bool) else _TRUTH.get(str(value).strip().lower())
    if truth is None:
        raise ValueError("write true or false")
    return truth


def _to_int(_: object, value: object) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise ValueError("write a whole number")
    return int(text)


def _to_float(_: object, value: object) -> float:
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)", text):
        raise ValueError("write a number")
    return float(text)


def _to_str(field: "attrs.Attribute[Any]", value: object) -> str:
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if not isinstance(value, str):
        raise ValueError("write a text between quotes")
    value = value.strip()
    return value.upper() if field.name == "log_level" else value


def _to_tuple(_: object, value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    if not all(isinstance(item, str) for item in items):
        raise ValueError("write a list of texts")
    return tuple(item.strip() for item in items if item.strip())


_CONVERTERS: Mapping[Any, Callable[[Any, object], object]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    str | None: _to_str,
    tuple[str, ...]: _to_tuple,
}


def env_example() -> str:
    """Return the text of `.env.example`: each setting with its description and its default, commented out."""
    defaults = Settings()
    lines = [
        "# Settings of Multiverse Gateway. Copy this file to .env in the directory where the gateway starts,",
        "# and take the # away from what you change. The environment wins over this file.",
    ]
    for name, field in _FIELDS.items():
        value = field.metadata["example"] or _written(getattr(defaults, name))
        lines += ["", f"# {field.metadata['description']}", f"# {PREFIX}{name.upper()}={value}"]
    return "\n".join(lines) + "\n"


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else ",".join(value) if isinstance(value, tuple) else str(value)


def health_policy(settings: Settings) -> HealthPolicy:
    """Return what the health of servers depends on."""
    return HealthPolicy(
        max_consecutive_failures=settings.max_consecutive_failures,
        interval=settings.health_check_interval_seconds,
        timeout=settings.health_check_timeout_seconds,
        auto_deregister=AutoDeregister(settings.auto_deregister),
        first_byte_timeout=settings.first_byte_timeout_seconds,
    )


def retry_policy(settings: Settings) -> RetryPolicy:
    """Return what a further attempt depends on."""
    return RetryPolicy(max_retries=settings.max_retry_attempts)


def origin_policy(settings: Settings) -> OriginPolicy:
    """Return which web pages may use the gateway."""
    return OriginPolicy.parse(settings.public_url, (settings.cors_origins or (ANY,)) if settings.enable_cors else ())


def address_policy(settings: Settings) -> AddressPolicy:
    """Return which addresses may be dialled; the gateway's own listener never is.

    A listener on all addresses is named with those by which this machine reaches others; asking for them sends nothing.
    """
    if settings.host in ("0.0.0.0", "::"):  # noqa: S104  # compared, not bound
        hosts = {settings.host, *_outgoing_addresses()}
    elif settings.host == "localhost":
        hosts = {"127.0.0.1", "::1"}
    else:
        hosts = {settings.host.strip("[]")}
    own = frozenset((host, settings.port) for host in hosts if _is_address(host))
    return AddressPolicy.parse(settings.allow_private_networks, own=own)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _outgoing_addresses() -> Iterable[str]:
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                yield str(probe.getsockname()[0]).partition("%")[0]
        except OSError:
            continue
