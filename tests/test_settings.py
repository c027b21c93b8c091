"""The settings: where they come from, which of them wins, and what stops the start."""

import contextlib
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.addresses import refusal
from multiverse_gateway.settings import Settings, SettingsError, load_settings
from multiverse_gateway.settings.checks import UnusableSetting
from multiverse_gateway.settings.declaration import FIELDS, env_example
from multiverse_gateway.settings.policies import address_policy, health_policy, retry_policy
from multiverse_gateway.settings.sources import parse_dotenv

ROOT = Path(__file__).parents[1]
KEY = "an-admin-key-of-the-test"


def test_defaults_are_usable_as_they_are(tmp_path: Path) -> None:
    """An empty directory and environment give the defaults."""
    assert load_settings(env={}, cwd=tmp_path) == Settings()


def test_later_sources_win(tmp_path: Path) -> None:
    """Flags win over the environment, it over .env, that over the TOML file."""
    (tmp_path / "multiverse.toml").write_text("port = 1\nlog_level = 'DEBUG'\nmax_queue = 7\nbalancer = 'weighted'\n")
    (tmp_path / ".env").write_text("PORT=2\nLOG_LEVEL=WARNING\nMULTIVERSE_MAX_QUEUE=8\n")
    settings = load_settings(env={"PORT": "3", "LOG_LEVEL": "error"}, cwd=tmp_path, overrides={"port": "4", "host": None})
    assert (settings.port, settings.log_level, settings.max_queue, settings.balancer) == (4, "ERROR", 8, "weighted")


def test_the_canonical_name_wins_over_the_plain_one(tmp_path: Path) -> None:
    """Both names are read."""
    assert load_settings(env={"MULTIVERSE_PORT": "1", "PORT": "2"}, cwd=tmp_path).port == 1
    assert load_settings(env={"PORT": "2"}, cwd=tmp_path).port == 2


@pytest.mark.parametrize(
    ("env", "address", "key"),
    [
        ({}, 60, 600),
        ({"RATE_LIMIT_PER_MINUTE": "60"}, 60, 60),
        ({"RATE_LIMIT_PER_MINUTE": "5"}, 5, 5),
        ({"RATE_LIMIT_PER_MINUTE": "0"}, 0, 0),
        ({"RATE_LIMIT_PER_MINUTE": ""}, 60, 600),
        ({"KEY_RATE_LIMIT_PER_MINUTE": "5"}, 60, 5),
        ({"RATE_LIMIT_PER_MINUTE": "0", "MULTIVERSE_KEY_RATE_LIMIT_PER_MINUTE": "7"}, 0, 7),
        ({"RATE_LIMIT_PER_MINUTE": "5", "KEY_RATE_LIMIT_PER_MINUTE": ""}, 5, 5),
    ],
)
def test_the_limit_of_an_address_holds_for_keys_where_only_that_is_set(env: dict[str, str], address: int, key: int, tmp_path: Path) -> None:
    """NFR-SEC-004: also where it is set to its default; in Python any other value does."""
    settings = load_settings(env=env, cwd=tmp_path)
    assert (settings.rate_limit_per_minute, settings.key_rate_limit_per_minute) == (address, key)
    assert Settings(rate_limit_per_minute=5).key_rate_limit_per_minute == 5
    assert attrs.evolve(settings, port=81).key_rate_limit_per_minute == key


BY_TYPE: dict[object, list[object]] = {
    bool: [True, False, "true", "off", 1],
    int: [1, "1", " 64 "],
    float: [30, 30.0, "30", "30.5"],
    str: ["", "text", True, ["10.0.0.0/8"], Path("a-path")],
    str | None: [None, "a-text-of-at-least-thirty-two-characters", Path("a-path-of-at-least-thirty-two-characters")],
    tuple[str, ...]: [(), [], ["10.0.0.0/8"], "10.0.0.0/8", {"10.0.0.0/8"}, ""],
}
STRANGE: list[object] = [
    None,
    True,
    0,
    -1,
    7,
    0.5,
    1e400,
    float("nan"),
    10**400,
    "",
    "x",
    b"x",
    [],
    [1],
    (None,),
    {},
    {"a": 1},
    object(),
    Path("x"),
]


@pytest.mark.parametrize("name", FIELDS)
def test_python_may_pass_any_value(name: str) -> None:
    """Every setting takes its own type and what the environment could say, or names itself and the remedy; nothing fails inside."""
    for value in [*BY_TYPE[FIELDS[name].type], *STRANGE]:
        taken, error = made_with(name, value)
        assert has_type(taken, FIELDS[name].type) if error is None else names_itself(error, name), (value, taken, error)
    assert getattr(attrs.evolve(Settings()), name) == getattr(Settings(), name)


def made_with(name: str, value: object) -> tuple[object, UnusableSetting | None]:
    """Return what a setting becomes that is made with a value, and the error if it is refused."""
    given: dict[str, Any] = {name: value}
    try:
        return getattr(Settings(**given), name), None
    except UnusableSetting as error:
        return None, error


def names_itself(error: UnusableSetting, name: str) -> bool:
    """Return whether an error is about one setting and has a remedy."""
    return error.field == name and str(error).startswith(f"MULTIVERSE_{name.upper()}") and len(error.remedy) > 10


def has_type(value: object, kind: object) -> bool:
    """Return whether a value has the type of a field exactly."""
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return value is None if kind == str | None and value is None else type(value) is (str if kind == str | None else kind)


@pytest.mark.parametrize(
    ("given", "name", "taken"),
    [
        ({"allow_private_networks": True}, "allow_private_networks", "true"),
        ({"allow_private_networks": False}, "allow_private_networks", "false"),
        ({"allow_private_networks": ["10.0.0.0/8", "fd00::/8"]}, "allow_private_networks", "10.0.0.0/8,fd00::/8"),
        ({"cors_origins": "https://a.example, https://b.example"}, "cors_origins", ("https://a.example", "https://b.example")),
        ({"require_client_auth": "yes"}, "require_client_auth", True),
        ({"port": "81"}, "port", 81),
        ({"request_timeout_seconds": 60}, "request_timeout_seconds", 60.0),
        ({"log_file": Path("a.log")}, "log_file", "a.log"),
        ({"log_level": "debug"}, "log_level", "DEBUG"),
    ],
)
def test_python_values_mean_what_they_say(given: dict[str, Any], name: str, taken: object) -> None:
    """As they would in the environment."""
    assert getattr(Settings(**given), name) == taken


def test_host_needs_the_prefix(tmp_path: Path) -> None:
    """Shells set HOST to the name of the machine."""
    assert load_settings(env={"HOST": "laptop"}, cwd=tmp_path).host == "127.0.0.1"
    assert load_settings(env={"MULTIVERSE_HOST": "0.0.0.0"}, cwd=tmp_path).host == "0.0.0.0"


def test_an_empty_value_means_the_default(tmp_path: Path) -> None:
    """Also when a weaker source has another value."""
    (tmp_path / ".env").write_text("PORT=9\n")
    assert load_settings(env={"PORT": "", "ADMIN_API_KEY": ""}, cwd=tmp_path) == Settings()


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    """The file of --config is read instead of multiverse.toml."""
    (tmp_path / "other.toml").write_text('port = 5\ncors_origins = ["https://a.example"]\nallow_private_networks = true\n')
    settings = load_settings(env={}, cwd=tmp_path, config=tmp_path / "other.toml")
    assert (settings.port, settings.cors_origins, settings.allow_private_networks) == (5, ("https://a.example",), "true")
    with pytest.raises(SettingsError, match=r"missing\.toml cannot be read"):
        load_settings(env={}, cwd=tmp_path, config=tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MULTIVERSE_PROT": "1"}, r"MULTIVERSE_PROT in the environment is not a setting; did you mean MULTIVERSE_PORT\?"),
        ({"MULTIVERSE_ZZZ": "1"}, "MULTIVERSE_ZZZ in the environment is not a setting; remove it"),
        ({"PORT": "eighty"}, "PORT=eighty in the environment cannot be used: write a whole number"),
        ({"PORT": "70000"}, "^PORT=70000 in the environment cannot be used: write a number from 0 to 65,535"),
        (
            {"HEALTH_CHECK_INTERVAL_SECONDS": "0.5"},
            "^HEALTH_CHECK_INTERVAL_SECONDS=0.5 in the environment cannot be used: .* 1 to 300 seconds",
        ),
        ({"HEALTH_CHECK_INTERVAL_SECONDS": "nan"}, "cannot be used: write a number"),
        ({"ENABLE_CORS": "maybe"}, "ENABLE_CORS=maybe in the environment cannot be used: write true or false"),
        ({"ADMIN_API_KEY": "hunter2"}, "^ADMIN_API_KEY in the environment cannot be used: .* at least 16"),
        ({"CLIENT_API_KEYS": "short"}, "^CLIENT_API_KEYS in the environment cannot be used"),
        ({"BACKEND_KEY_SECRET": "short"}, "^BACKEND_KEY_SECRET in the environment cannot be used"),
        ({"ALLOW_PRIVATE_NETWORKS": "10.0.0.1/8"}, "^ALLOW_PRIVATE_NETWORKS=10.0.0.1/8 in the environment cannot be used"),
        ({"ALLOW_PRIVATE_NETWORKS": "169.254.0.0/16"}, "^ALLOW_PRIVATE_NETWORKS=169.254.0.0/16 in the environment cannot be used"),
        ({"TRUSTED_PROXIES": "proxy.example"}, "^TRUSTED_PROXIES=proxy.example in the environment cannot be used"),
        ({"AUTO_DEREGISTER": "deactivated"}, r"did you mean deactivate\?"),
        ({"LOG_LEVEL": "LOUD"}, "^LOG_LEVEL=LOUD in the environment cannot be used: write one of DEBUG"),
        ({"LOG_FORMAT": "xml"}, "^LOG_FORMAT=xml in the environment cannot be used"),
        ({"DATABASE_URL": "multiverse.db"}, "^DATABASE_URL=multiverse.db in the environment cannot be used"),
        ({"DATABASE_URL": "sqlite://multiverse.db"}, "sqlite:///multiverse.db"),
        ({"RATE_LIMIT_STORAGE": "disk"}, "^RATE_LIMIT_STORAGE=disk in the environment cannot be used"),
        ({"CORS_ORIGINS": "https://a.example/path"}, "^CORS_ORIGINS=https://a.example/path in the environment cannot be used"),
        ({"CORS_ORIGINS": "null"}, "^CORS_ORIGINS=null in the environment cannot be used"),
        ({"PUBLIC_URL": "https://a.example/path"}, "^PUBLIC_URL=https://a.example/path in the environment cannot be used"),
        ({"ROOT_PATH": "ai"}, "^ROOT_PATH=ai in the environment cannot be used: write a path such as /ai"),
        ({"ROOT_PATH": "/admin"}, "^ROOT_PATH=/admin in the environment cannot be used"),
        ({"ROOT_PATH": "/a/../b"}, r"^ROOT_PATH=/a/\.\./b in the environment cannot be used"),
        ({"PUBLIC_URL": "*"}, r"^PUBLIC_URL=\* in the environment cannot be used: write origins such as https://models.example"),
        ({"BALANCER": "round robin"}, "^BALANCER=round robin in the environment cannot be used"),
        (
            {"CONNECT_TIMEOUT_SECONDS": "130"},
            "CONNECT_TIMEOUT_SECONDS=130.0 in the environment cannot be used: it is longer than MULTIVERSE_FIRST_BYTE",
        ),
        ({"FIRST_BYTE_TIMEOUT_SECONDS": "301"}, "it is longer than MULTIVERSE_REQUEST_TIMEOUT_SECONDS=300"),
    ],
)
def test_what_cannot_work_stops_the_start(env: dict[str, str], message: str, tmp_path: Path) -> None:
    """The message names the setting and the remedy."""
    with pytest.raises(SettingsError, match=message):
        load_settings(env=env, cwd=tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("multiverse.toml", "prot = 1", r"prot in .*multiverse\.toml is not a setting; did you mean port\?"),
        ("multiverse.toml", "port = ", "is not valid TOML"),
        ("multiverse.toml", "port = true", "write a whole number"),
        ("multiverse.toml", "ui = 2", "write true or false"),
        ("multiverse.toml", "cors_origins = [1]", "write a list of strings"),
        ("multiverse.toml", "host = 1", "write a string in quotes"),
        (".env", "MULTIVERSE_PROT=1", r"MULTIVERSE_PROT in \.env is not a setting"),
        (".env", "PORT 1", r"line 1 of \.env cannot be read"),
        (".env", 'PORT="1', r"line 1 of \.env has an unclosed quote"),
    ],
)
def test_what_is_wrong_in_a_file_stops_the_start(name: str, text: str, message: str, tmp_path: Path) -> None:
    """The message names the file."""
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(env={}, cwd=tmp_path)


@pytest.mark.parametrize(
    ("files", "env", "flags", "message"),
    [
        ({}, {"PORT": "70000"}, {}, "PORT=70000 in the environment cannot be used: "),
        ({}, {"MULTIVERSE_PORT": "70000", "PORT": "1"}, {}, "MULTIVERSE_PORT=70000 in the environment cannot be used: "),
        ({}, {}, {"port": "70000"}, "--port=70000 cannot be used: "),
        ({}, {}, {"log_level": "loud"}, "--log-level=LOUD cannot be used: "),
        ({".env": "PORT=70000\n"}, {}, {}, "PORT=70000 in .env cannot be used: "),
        ({"multiverse.toml": "port = 70_000\n"}, {}, {}, "port=70000 in {cwd}/multiverse.toml cannot be used: "),
        ({"multiverse.toml": "port = 70_000\n"}, {"PORT": "80000"}, {}, "PORT=80000 in the environment cannot be used: "),
        (
            {".env": "REQUEST_TIMEOUT_SECONDS=5\n"},
            {"FIRST_BYTE_TIMEOUT_SECONDS": "6"},
            {},
            "FIRST_BYTE_TIMEOUT_SECONDS=6.0 in the environment cannot be used: it is longer than REQUEST_TIMEOUT_SECONDS=5;",
        ),
        ({}, {"ADMIN_API_KEY": "hunter2"}, {}, "ADMIN_API_KEY in the environment cannot be used: "),
        ({}, {"DATABASE_URL": "://u:hunter2@db"}, {}, "DATABASE_URL=://u:********@db in the environment cannot be used: "),
        ({}, {"BALANCER": "mysql://u:hunter2@db"}, {}, "BALANCER=mysql://u:********@db in the environment cannot be used: "),
        (
            {},
            {"ALLOW_PRIVATE_NETWORKS": "redis://u:hunter2@db"},
            {},
            "ALLOW_PRIVATE_NETWORKS=redis://u:********@db in the environment cannot be used: 'redis://u:********@db' is not a network",
        ),
        ({}, {"RATE_LIMIT_STORAGE": "unix:///x"}, {}, "RATE_LIMIT_STORAGE=unix:///x in the environment cannot be used: "),
        ({"multiverse.toml": 'database_url = "sqlite:///a\\u0000b"\n'}, {}, {}, "database_url=sqlite:///a"),
    ],
)
def test_a_setting_is_called_what_the_user_called_it(
    files: dict[str, str], env: dict[str, str], flags: dict[str, str], message: str, tmp_path: Path
) -> None:
    """With its source, whichever check finds the mistake."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(env=env, cwd=tmp_path, overrides=flags)
    assert str(caught.value).startswith(message.replace("{cwd}", str(tmp_path)))


@pytest.mark.parametrize("service", ["MULTIVERSE", "MULTIVERSE_GATEWAY", "MULTIVERSE_RATE_LIMIT", "MULTIVERSE_A_PORT"])
@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])
def test_what_kubernetes_adds_for_a_service_is_passed_over(service: str, protocol: str, tmp_path: Path) -> None:
    """For any Service of the namespace whose name begins like our settings, the one that makes `MULTIVERSE_PORT` included."""
    address = f"{protocol.lower()}://10.96.0.12:80"
    env = {
        f"{service}_SERVICE_HOST": "10.96.0.12",
        f"{service}_SERVICE_PORT": "80",
        f"{service}_SERVICE_PORT_HTTP": "80",
        f"{service}_SERVICE_PORT_HTTP_ALT": "8080",
        f"{service}_PORT": address,
        f"{service}_PORT_80_{protocol}": address,
        f"{service}_PORT_80_{protocol}_PROTO": protocol.lower(),
        f"{service}_PORT_80_{protocol}_PORT": "80",
        f"{service}_PORT_80_{protocol}_ADDR": "10.96.0.12",
    }
    assert load_settings(env=env, cwd=tmp_path) == Settings()
    assert load_settings(env={**env, "PORT": "81"}, cwd=tmp_path).port == 81


@pytest.mark.parametrize(
    "env",
    [
        {"MULTIVERSE_HTTP_PORT": "8080"},
        {"MULTIVERSE_PORT": "eighty"},
        {"MULTIVERSE_PORT": "http://10.96.0.12:80"},
        {"PORT": "tcp://10.96.0.12:80"},
        {"MULTIVERSE_SERVICE": "x"},
        {"MULTIVERSE_PORT_80": "tcp://10.96.0.12:80"},
        {"MULTIVERSE_PORTS": "tcp://10.96.0.12:80"},
    ],
)
def test_a_misspelt_port_is_still_refused(env: dict[str, str], tmp_path: Path) -> None:
    """Only what service links make is passed over, and only in the environment."""
    with pytest.raises(SettingsError, match=next(iter(env))):
        load_settings(env=env, cwd=tmp_path)
    (tmp_path / ".env").write_text("MULTIVERSE_GATEWAY_PORT=tcp://10.96.0.12:80\n")
    with pytest.raises(SettingsError, match=r"MULTIVERSE_GATEWAY_PORT in \.env"):
        load_settings(env={}, cwd=tmp_path)


def test_other_programs_names_are_left_alone(tmp_path: Path) -> None:
    """Only our prefix makes an unknown name an error."""
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=x\n")
    assert load_settings(env={"PATH": "/bin", "GATEWAY": "1"}, cwd=tmp_path) == Settings()


def test_messages_hold_no_secret(tmp_path: Path) -> None:
    """A weak key is not shown in the log of the start."""
    for env in ({"ADMIN_API_KEY": "hunter2"}, {"DATABASE_URL": "postgresql//user:hunter2@db"}, {"DATABASE_URL": "://user:hunter2@db"}):
        with pytest.raises(SettingsError) as caught:
            load_settings(env=env, cwd=tmp_path)
        if "ADMIN_API_KEY" in env or "://" in env["DATABASE_URL"]:
            assert "hunter2" not in str(caught.value)


def test_timeouts_shrink_by_themselves() -> None:
    """A short request deadline shortens what was not given."""
    settings = Settings(request_timeout_seconds=2)
    assert (settings.first_byte_timeout_seconds, settings.connect_timeout_seconds, settings.idle_timeout_seconds) == (2, 2, 2)
    assert settings.dns_timeout_seconds == 2
    assert Settings().connect_timeout_seconds == 5
    assert Settings(first_byte_timeout_seconds=1).connect_timeout_seconds == 1


def test_secrets_show_nowhere() -> None:
    """Neither in repr nor among the masked values; whether one is set does show."""
    settings = Settings(
        admin_api_key=KEY,
        client_api_keys=("client-key-1",),
        backend_key_secret="s" * 40,
        database_url="postgresql://user:pass-word@db/gateway",
        rate_limit_storage="redis://:pass-word@cache:6379/0",
    )
    for shown in (repr(settings), str(settings.masked())):
        assert not [secret for secret in (KEY, "client-key-1", "s" * 40, "pass-word") if secret in shown]
    assert settings.masked()["admin_api_key"] == "********"
    assert Settings().masked()["admin_api_key"] is None
    assert settings.masked()["database_url"] == "postgresql://user:********@db/gateway"


def test_env_example_is_what_the_command_prints() -> None:
    """`.env.example` documents every setting; `multiverse-gateway settings --env` rewrites it."""
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == env_example()


def test_env_example_can_be_used(tmp_path: Path) -> None:
    """Every line works when its # is taken away, and each setting is there with its description."""
    lines = [line.removeprefix("# ") for line in env_example().splitlines() if re.match(r"# MULTIVERSE_[A-Z_]+=", line)]
    (tmp_path / ".env").write_text("\n".join(lines))
    load_settings(env={}, cwd=tmp_path)
    fields = attrs.fields(Settings)
    assert [line.partition("=")[0] for line in lines] == [f"MULTIVERSE_{field.name.upper()}" for field in fields]
    assert all(field.metadata["description"].endswith(".") for field in fields)


@given(st.text())
def test_any_dotenv_is_read_or_refused(text: str) -> None:
    """Nothing but SettingsError comes out."""
    with contextlib.suppress(SettingsError):
        parse_dotenv(text)


@given(
    st.dictionaries(
        st.sampled_from(["PORT", "ADMIN_API_KEY", "MULTIVERSE_UI", "TRUSTED_PROXIES", "LOG_LEVEL", "MAX_BODY_BYTES"]), st.text()
    )
)
def test_any_environment_is_used_or_refused(env: dict[str, str]) -> None:
    """Nothing but SettingsError comes out."""
    with contextlib.suppress(SettingsError):
        load_settings(env=env, cwd=Path("/nowhere"))


def test_policies_follow_the_settings() -> None:
    """What core decides by comes from here."""
    settings = Settings(health_check_interval_seconds=7, max_consecutive_failures=5, auto_deregister="off", max_retry_attempts=1)
    health = health_policy(settings)
    assert (health.interval, health.max_consecutive_failures, health.auto_deregister.value) == (7, 5, "off")
    assert retry_policy(settings).max_retries == 1


def test_the_own_listener_is_closed_to_the_gateway() -> None:
    """Whatever networks are open."""
    policy = address_policy(Settings(host="localhost", port=8000, allow_private_networks="true"))
    assert refusal("127.0.0.1", 8000, policy) == "own listener"
    assert refusal("127.0.0.1", 8001, policy) is None
    everywhere = address_policy(Settings(host="0.0.0.0", port=8000, allow_private_networks="true"), local=["192.168.1.5"])
    assert refusal("127.0.0.1", 8000, everywhere) == refusal("192.168.1.5", 8000, everywhere) == "own listener"
    assert refusal("192.168.1.6", 8000, everywhere) is refusal("192.168.1.5", 8001, everywhere) is None
    assert address_policy(Settings(host="gateway.example")).own == frozenset()
