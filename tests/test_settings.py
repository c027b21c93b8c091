"""The settings: where they come from, which of them wins, and what stops the start."""

import contextlib
import re
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.addresses import refusal
from multiverse_gateway.settings import (
    Settings,
    SettingsError,
    address_policy,
    env_example,
    health_policy,
    load_settings,
    parse_dotenv,
    retry_policy,
)

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
        ({"MULTIVERSE_PROT": "1"}, r"MULTIVERSE_PROT in the environment is no setting; did you mean MULTIVERSE_PORT\?"),
        ({"MULTIVERSE_ZZZ": "1"}, "MULTIVERSE_ZZZ in the environment is no setting; remove it"),
        ({"PORT": "eighty"}, "MULTIVERSE_PORT=eighty in the environment cannot be used: write a whole number"),
        ({"PORT": "70000"}, "MULTIVERSE_PORT=70000 cannot be used: write a number from 0 to 65,535"),
        ({"HEALTH_CHECK_INTERVAL_SECONDS": "0.5"}, "MULTIVERSE_HEALTH_CHECK_INTERVAL_SECONDS=0.5 cannot be used: .* 1 to 300 seconds"),
        ({"HEALTH_CHECK_INTERVAL_SECONDS": "nan"}, "cannot be used: write a number"),
        ({"ENABLE_CORS": "maybe"}, "MULTIVERSE_ENABLE_CORS=maybe in the environment cannot be used: write true or false"),
        ({"ADMIN_API_KEY": "hunter2"}, "MULTIVERSE_ADMIN_API_KEY cannot be used: .* at least 16"),
        ({"CLIENT_API_KEYS": "short"}, "MULTIVERSE_CLIENT_API_KEYS cannot be used"),
        ({"BACKEND_KEY_SECRET": "short"}, "MULTIVERSE_BACKEND_KEY_SECRET cannot be used"),
        ({"ALLOW_PRIVATE_NETWORKS": "10.0.0.1/8"}, "MULTIVERSE_ALLOW_PRIVATE_NETWORKS=10.0.0.1/8 cannot be used"),
        ({"ALLOW_PRIVATE_NETWORKS": "169.254.0.0/16"}, "MULTIVERSE_ALLOW_PRIVATE_NETWORKS=169.254.0.0/16 cannot be used"),
        ({"TRUSTED_PROXIES": "proxy.example"}, "MULTIVERSE_TRUSTED_PROXIES=proxy.example cannot be used"),
        ({"AUTO_DEREGISTER": "deactivated"}, r"did you mean deactivate\?"),
        ({"LOG_LEVEL": "LOUD"}, "MULTIVERSE_LOG_LEVEL=LOUD cannot be used: write one of DEBUG"),
        ({"LOG_FORMAT": "xml"}, "MULTIVERSE_LOG_FORMAT=xml cannot be used"),
        ({"DATABASE_URL": "multiverse.db"}, "MULTIVERSE_DATABASE_URL=multiverse.db cannot be used"),
        ({"DATABASE_URL": "sqlite://multiverse.db"}, "sqlite:///multiverse.db"),
        ({"RATE_LIMIT_STORAGE": "disk"}, "MULTIVERSE_RATE_LIMIT_STORAGE=disk cannot be used"),
        ({"CORS_ORIGINS": "https://a.example/path"}, "MULTIVERSE_CORS_ORIGINS=https://a.example/path cannot be used"),
        ({"BALANCER": "round robin"}, "MULTIVERSE_BALANCER=round robin cannot be used"),
        (
            {"CONNECT_TIMEOUT_SECONDS": "130"},
            "MULTIVERSE_CONNECT_TIMEOUT_SECONDS=130.0 cannot be used: it is longer than MULTIVERSE_FIRST_BYTE",
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
        ("multiverse.toml", "prot = 1", r"prot in .*multiverse\.toml is no setting; did you mean port\?"),
        ("multiverse.toml", "port = ", "is not valid TOML"),
        ("multiverse.toml", "port = true", "write a whole number"),
        ("multiverse.toml", "ui = 2", "write true or false"),
        ("multiverse.toml", "cors_origins = [1]", "write a list of texts"),
        ("multiverse.toml", "host = 1", "write a text between quotes"),
        (".env", "MULTIVERSE_PROT=1", r"MULTIVERSE_PROT in \.env is no setting"),
        (".env", "PORT 1", r"line 1 of \.env cannot be read"),
        (".env", 'PORT="1', r"line 1 of \.env has a quote that does not end"),
    ],
)
def test_what_is_wrong_in_a_file_stops_the_start(name: str, text: str, message: str, tmp_path: Path) -> None:
    """The message names the file."""
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(env={}, cwd=tmp_path)


def test_other_programs_names_are_left_alone(tmp_path: Path) -> None:
    """Only our prefix makes an unknown name an error."""
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=x\n")
    assert load_settings(env={"PATH": "/bin", "GATEWAY": "1"}, cwd=tmp_path) == Settings()


def test_messages_hold_no_secret(tmp_path: Path) -> None:
    """A weak key is not shown to whoever reads the log of the start."""
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
    everywhere = address_policy(Settings(host="0.0.0.0", port=8000, allow_private_networks="true"))
    assert refusal("127.0.0.1", 8000, everywhere) == "own listener"
    assert address_policy(Settings(host="gateway.example")).own == frozenset()
