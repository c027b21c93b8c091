"""Every setting, with its default, its description and its checks."""

from collections.abc import Mapping
from typing import Any

import attrs

from multiverse_gateway.core.health import AutoDeregister
from multiverse_gateway.core.servers import MAX_AT_ONCE
from multiverse_gateway.settings.checks import (
    MASK,
    PREFIX,
    UnusableSetting,
    Validator,
    between,
    byte_count,
    check_admin_key,
    check_client_keys,
    check_database,
    check_host,
    check_name,
    check_networks,
    check_origins,
    check_own_origins,
    check_proxies,
    check_rate_storage,
    check_root,
    check_secrets,
    mask_url,
    no_longer_than,
    one_of,
    rejection,
    seconds,
)
from multiverse_gateway.settings.conversion import convert

UNKNOWN_PER_MINUTE = 60
KEY_PER_MINUTE = 600
_MIB = 1 << 20


def _at_most(limit: float, other: str) -> Any:
    """Make a default that shrinks to the value of another setting."""
    return attrs.Factory(lambda settings: min(limit, getattr(settings, other)), takes_self=True)


def _key_rate_limit(settings: "Settings") -> int:
    """Return the default limit of a key: that of an address, where it is not the default one."""
    limit = settings.rate_limit_per_minute
    return KEY_PER_MINUTE if limit == UNKNOWN_PER_MINUTE else limit


def _show_secret(value: object) -> str:
    return repr(MASK) if value else repr(value)


def _setting(
    default: Any,
    description: str,
    *checks: Validator,
    plain: bool = True,
    secret: bool = False,
    example: str | None = None,
    url: bool = False,
) -> Any:
    """Declare a setting: `plain` ones may be written without the prefix, `example` is what `.env.example` shows."""
    show: Any = _show_secret if secret else (lambda value: repr(mask_url(value))) if url else True
    kind = {"description": description, "plain": plain, "secret": secret, "example": example, "url": url}
    converter = attrs.Converter(convert, takes_field=True)
    return attrs.field(default=default, converter=converter, validator=list(checks), repr=show, metadata=kind)


@attrs.frozen(kw_only=True)
class Settings:
    """Everything that can be set, with its default; each field's metadata holds its description.

    A value may have the type of its field, or be written as in the environment: `True` and `"true"`, `8000` and `"8000"`, a list and a text
    with commas.

    >>> Settings(request_timeout_seconds=60).first_byte_timeout_seconds
    60.0
    >>> Settings(allow_private_networks=["10.0.0.0/8", "192.168.0.0/16"]).allow_private_networks
    '10.0.0.0/8,192.168.0.0/16'
    >>> Settings(port=70_000)
    Traceback (most recent call last):
        ...
    multiverse_gateway.settings.checks.UnusableSetting: MULTIVERSE_PORT=70000 cannot be used: write a number from 0 to 65,535

    Raises:
        SettingsError: A value is out of its range, or contradicts another.
    """

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 listens on all addresses of this machine.", check_host, plain=False)
    port: int = _setting(8000, "Port to listen on; 0 takes any free port.", between(0, 65_535))
    workers: int = _setting(1, "Number of worker processes; more than 1 needs Linux.", between(1, 64), plain=False)
    direct_door: bool = _setting(
        True,
        "Serve inference over HTTP/1.1 with the gateway's own, fastest listener; with false each request costs five times as much.",
        plain=False,
    )

    admin_api_key: str | None = _setting(
        None,
        "Admin key of the operators, at least 16 characters. If it is not set, the first start creates one and prints it once.",
        check_admin_key,
        secret=True,
        example="write-at-least-16-random-characters",
    )
    require_client_auth: bool = _setting(
        False, "Require a client key: one made with `multiverse-gateway keys create`, or one of the list below."
    )
    client_api_keys: tuple[str, ...] = _setting(
        (), "Client keys, separated by commas.", check_client_keys, secret=True, example="key-of-the-class,key-of-the-lab"
    )

    database_url: str = _setting(
        "sqlite:///./multiverse.db",
        "Database of the registry: a SQLite file, or postgresql://user:password@host/database for several gateways.",
        check_database,
        url=True,
    )
    backend_key_secret: str | None = _setting(
        None,
        "Secret that encrypts the servers' keys at rest; several are separated by commas, the newest first. "
        "With SQLite it is optional: a file beside the database holds one.",
        check_secrets,
        secret=True,
        example="output-of-openssl-rand-base64-32",
    )

    health_check_interval_seconds: float = _setting(60.0, "Seconds after which a server is probed again, 1 to 300.", seconds(1, 300))
    health_check_timeout_seconds: float = _setting(10.0, "Timeout of a probe, in seconds.", seconds(0.1, 120))
    max_consecutive_failures: int = _setting(3, "Number of failed probes in a row after which a server is taken out.", between(1, 100))
    auto_deregister: str = _setting(
        "deactivate",
        "What happens to a server that is taken out: deactivate (it returns by itself), delete, or off.",
        one_of(*AutoDeregister),
    )
    probe: str = _setting(
        "models", "How servers are probed: models (reads the list of models), chat (asks for one token), or a plug-in.", check_name
    )

    balancer: str = _setting(
        "round_robin",
        "How the gateway chooses one of several servers: round_robin, weighted, least_busy "
        "(best if hosts differ), two_choices, or a plug-in.",
        check_name,
    )
    max_retry_attempts: int = _setting(2, "Number of further servers to try after a failed attempt.", between(0, 10))
    max_in_flight: int = _setting(1024, "Maximum number of inference requests in progress.", between(1, 100_000), plain=False)
    max_queue: int = _setting(
        256,
        "Maximum number of requests per model that wait for a free server, up to a quarter of MAX_IN_FLIGHT.",
        between(0, 10_000),
        plain=False,
    )
    queue_timeout_seconds: float = _setting(60.0, "Seconds that a request waits for a free server.", seconds(0, 3600), plain=False)

    request_timeout_seconds: float = _setting(
        300.0, "Seconds from a request's arrival to its complete answer, or to the first event of a stream.", seconds(0.1, 86_400)
    )
    first_byte_timeout_seconds: float = _setting(
        _at_most(120.0, "request_timeout_seconds"),
        "Seconds from a request to the server's first byte or event; never more than the request has left.",
        seconds(0.05, 3600),
        no_longer_than("request_timeout_seconds"),
    )
    connect_timeout_seconds: float = _setting(
        _at_most(5.0, "first_byte_timeout_seconds"),
        "Seconds to connect to a server, including DNS and TLS; never more than the request has left.",
        seconds(0.05, 300),
        no_longer_than("first_byte_timeout_seconds"),
    )
    idle_timeout_seconds: float = _setting(
        _at_most(60.0, "request_timeout_seconds"),
        "Seconds of silence after which a server's answer counts as broken; never more than the request has left.",
        seconds(0.05, 3600),
    )
    dns_timeout_seconds: float = _setting(
        _at_most(3.0, "connect_timeout_seconds"), "Seconds to resolve a server's name.", seconds(0.05, 300), plain=False
    )
    write_timeout_seconds: float = _setting(30.0, "Seconds that a server may stop reading a request.", seconds(0.05, 3600), plain=False)
    client_head_timeout_seconds: float = _setting(
        10.0, "Seconds within which the head of a client's request must arrive.", seconds(0.05, 300), plain=False
    )
    client_body_timeout_seconds: float = _setting(
        30.0, "Seconds that may pass between two pieces of a request body.", seconds(0.05, 3600), plain=False
    )
    client_write_timeout_seconds: float = _setting(
        60.0, "Seconds that a client may stop reading an answer.", seconds(0.05, 3600), plain=False
    )
    max_stream_seconds: float = _setting(3600.0, "Maximum duration of a stream, in seconds.", seconds(1, 604_800), plain=False)
    shutdown_grace_seconds: float = _setting(
        30.0, "Seconds that requests in progress get to finish when the gateway stops.", seconds(0, 3600)
    )

    max_body_bytes: int = _setting(20 * _MIB, "Maximum size of an inference request, in bytes.", byte_count(1024, 1 << 30))
    max_admin_body_bytes: int = _setting(_MIB, "Maximum size of any other request, in bytes.", byte_count(1024, 1 << 30))
    body_budget_bytes: int = _setting(
        128 * _MIB, "Memory for all request bodies together, in bytes.", byte_count(1024, 1 << 40), plain=False
    )
    answer_budget_bytes: int = _setting(
        256 * _MIB, "Memory for all large answers that clients have not read yet, in bytes.", byte_count(1024, 1 << 40)
    )
    max_embeddings_bytes: int = _setting(
        64 * _MIB, "Maximum size of an answer with embeddings, in bytes; it is relayed as it arrives.", byte_count(1024, 1 << 40)
    )
    max_response_bytes: int = _setting(
        16 * _MIB, "Maximum size of an answer that is not streamed, in bytes.", byte_count(1024, 1 << 30), plain=False
    )
    max_event_bytes: int = _setting(
        _MIB, "Maximum size of an event in a streamed chat or text completion, in bytes.", byte_count(1024, 1 << 30), plain=False
    )
    max_large_event_bytes: int = _setting(
        16 * _MIB,
        "Maximum size of an event in any other stream, such as an image or a whole response, in bytes.",
        byte_count(1024, 1 << 30),
        plain=False,
    )
    max_stream_bytes: int = _setting(64 * _MIB, "Maximum size of a stream, in bytes.", byte_count(1024, 1 << 40), plain=False)

    count_stream_tokens: bool = _setting(
        True,
        "If a streaming request does not set stream_options, ask the server for token counts, and hide them from the client.",
        plain=False,
    )
    rate_limit_per_minute: int = _setting(
        UNKNOWN_PER_MINUTE,
        "Inference requests per minute from an address without a client key; 0 for no limit. "
        "Model lists, and requests from this machine that no proxy forwarded, do not count.",
        between(0, 1_000_000),
    )
    key_rate_limit_per_minute: int = _setting(
        attrs.Factory(_key_rate_limit, takes_self=True),
        "Inference requests per minute with a client key; 0 means no limit. If only the limit above is set, it applies to keys too.",
        between(0, 1_000_000),
    )
    max_at_once_per_key: int = _setting(
        64,
        "Requests that a client key may have running and waiting before one that would have to wait is rejected; 0 means no limit. "
        "Applies to CLIENT_API_KEYS, and to new keys that set no limit of their own.",
        between(0, MAX_AT_ONCE),
    )
    max_at_once_per_address: int = _setting(
        256,
        "The same for an address without a client key; 0 means no limit. Requests from "
        "this machine that no proxy forwarded are not limited.",
        between(0, MAX_AT_ONCE),
    )
    rate_limit_storage: str = _setting(
        "memory://",
        "Where the rate limits are counted: memory://, or redis://host:6379/0 for several gateways.",
        check_rate_storage,
        url=True,
    )
    trusted_proxies: tuple[str, ...] = _setting(
        (),
        "Proxies whose X-Forwarded-For is trusted, as networks separated by commas; none by default.",
        check_proxies,
        example="127.0.0.1/32",
    )
    root_path: str = _setting(
        "",
        "Path under which a proxy serves the gateway, such as /ai; the proxy may keep it in the paths of requests or remove it.",
        check_root,
        example="/ai",
    )
    public_url: tuple[str, ...] = _setting(
        (),
        "URLs by which browsers reach this gateway, separated by commas; needed only if a proxy changes the Host header.",
        check_own_origins,
        example="https://models.example",
    )
    metrics_key: str | None = _setting(
        None,
        "Key that /metrics requires, as `Authorization: Bearer`. Without it, any client that reaches the port can read the metrics.",
        check_admin_key,
        plain=False,
        secret=True,
        example="write-at-least-16-random-characters",
    )
    otel: bool = _setting(
        False,
        "Send traces and metrics with OpenTelemetry (extra otel) to OTEL_EXPORTER_OTLP_ENDPOINT.",
        plain=False,
    )
    allow_private_networks: str = _setting(
        "",
        "Allow servers in private networks: false, true, or a list of networks, separated by commas.",
        check_networks,
        example="10.0.0.0/8,192.168.0.0/16",
    )
    verify_backend_tls: bool = _setting(True, "Verify the TLS certificates of servers; use false only in development.")
    enable_cors: bool = _setting(False, "Let web pages of other origins use the inference API (CORS), without cookies.")
    cors_origins: tuple[str, ...] = _setting(
        (),
        "Origins that CORS allows, separated by commas; every origin if the list is empty.",
        check_origins,
        example="https://class.example",
    )

    ui: bool = _setting(True, "Serve the pages for browsers.", plain=False)
    public_dashboard: bool = _setting(False, "Show the dashboard and the models without signing in, read-only, without URLs and owners.")

    log_level: str = _setting("INFO", "Minimum log level.", one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    log_format: str = _setting("text", "Format of log records: text or json.", one_of("text", "json"))
    log_file: str | None = _setting(
        None, "File to which the log is also written; 5 older files of 10 MiB are kept.", example="/var/log/multiverse.log"
    )

    def masked(self) -> dict[str, object]:
        """Return all settings by name, secrets and passwords masked: what the log, the page and the command show."""
        return {field.name: _masked(field, getattr(self, field.name)) for field in attrs.fields(Settings)}


def _masked(field: "attrs.Attribute[Any]", value: object) -> object:
    if field.metadata["secret"]:
        return MASK if value else None
    return mask_url(value) if field.metadata["url"] and isinstance(value, str) else value


def unusable(settings: Settings, name: str, remedy: str) -> UnusableSetting:
    """Return the refusal of a setting whose value turned out to be impossible; `remedy` says why, and what to write instead.

    >>> unusable(Settings(balancer="best"), "balancer", "there is none of this name")
    UnusableSetting('MULTIVERSE_BALANCER=best cannot be used: there is none of this name')
    """
    field = FIELDS[name]
    return rejection(field, _masked(field, getattr(settings, name)), remedy)


def unusable_value(name: str, value: object, remedy: str) -> UnusableSetting:
    """Return the refusal of a value that a setting has, or would have; see `unusable`."""
    return rejection(FIELDS[name], value, remedy)


FIELDS: Mapping[str, "attrs.Attribute[Any]"] = {field.name: field for field in attrs.fields(Settings)}
"""The settings by name, in the order of their declaration."""


def env_example() -> str:
    """Return the text of `.env.example`: each setting with its description and its default, commented out."""
    defaults = Settings()
    lines = [
        "# Settings of Multiverse Gateway. Copy this file to .env in the directory where the gateway starts, and remove",
        "# the # in front of each line that you change. Environment variables take precedence over this file.",
    ]
    for name, field in FIELDS.items():
        value = field.metadata["example"] or _written(getattr(defaults, name))
        lines += ["", f"# {field.metadata['description']}", f"# {PREFIX}{name.upper()}={value}"]
    return "\n".join(lines) + "\n"


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else ",".join(value) if isinstance(value, tuple) else str(value)
