"""The composition root: building an application opens nothing; its lifespan does."""

import subprocess
import sys
from pathlib import Path

import pytest

from multiverse_gateway.core.addresses import refusal
from multiverse_gateway.relay.local_addresses import local_addresses
from support.gateways import stage
from support.require import require

SCRIPT = """
import os, sys
from multiverse_gateway import Settings, create_app
import multiverse_gateway.app  # imported now: only what `create_app` itself does counts

WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
opened = []

def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if flags & WRITING or set(mode or "") & set("wax+"):
            opened.append((event, path))
    elif event == "socket.gethostname":  # a library's import asks the system for its name, which opens nothing
        pass
    elif event.startswith(("socket.", "sqlite3.", "subprocess.", "_thread.start", "asyncio.")):
        opened.append((event, *map(str, arguments[:1])))
    elif event in {"os.mkdir", "os.remove", "os.rename", "os.chmod", "os.fork", "os.posix_spawn", "tempfile.mkstemp", "tempfile.mkdtemp"}:
        opened.append((event, *map(str, arguments[:1])))

settings = Settings(**eval(sys.argv[1]))
sys.addaudithook(hook)
app = create_app(settings)
assert not opened, opened
if len(sys.argv) > 2:  # shows that the hook sees what the lifespan opens
    import asyncio

    async def live():
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(live())
    assert {event for event, *_ in opened} >= set(sys.argv[2].split()), opened
print("as expected")
"""


def build(tmp_path: Path, settings: dict[str, object], *opened_by_lifespan: str) -> str:
    """Build an application in a process of its own, and return what that printed."""
    arguments = [sys.executable, "-B", "-W", "error", "-c", SCRIPT, repr(settings), *opened_by_lifespan]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    return done.stdout + done.stderr


def assert_builds(tmp_path: Path, **settings: object) -> None:
    """Build an application with these settings, and see that it opened nothing."""
    assert build(tmp_path, settings) == "as expected\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.e2e
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"host": "::", "database_url": "memory://", "balancer": "least_busy", "probe": "chat"},
        {"host": "localhost", "log_file": "logs/gateway.log", "backend_key_secret": "s" * 32, "admin_api_key": "k" * 32},
        {"ui": False, "enable_cors": True, "root_path": "/ai", "verify_backend_tls": False},
    ],
    ids=["defaults", "memory", "files", "api"],
)
def test_an_application_is_built_without_opening_anything(tmp_path: Path, settings: dict[str, object]) -> None:
    """No socket, file, directory, database, thread or process, whatever the settings name."""
    assert_builds(tmp_path, **settings)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("psycopg", {"database_url": "postgresql://user:password@127.0.0.1:9/database", "backend_key_secret": "s" * 32}),
        ("redis", {"rate_limit_storage": "redis://127.0.0.1:9/0"}),
        ("opentelemetry.exporter.otlp.proto.http", {"otel": True}),
    ],
)
def test_no_service_is_contacted_before_the_lifespan(tmp_path: Path, module: str, settings: dict[str, object]) -> None:
    """Neither PostgreSQL nor Redis nor the collector of telemetry."""
    require(module, "the extra that the settings name")
    assert_builds(tmp_path, **settings)


@pytest.mark.e2e
def test_the_lifespan_opens_what_the_settings_name(tmp_path: Path) -> None:
    """The same check sees the database and the sockets of the lifespan, which asks for this machine's addresses."""
    assert build(tmp_path, {"host": "0.0.0.0", "database_url": "sqlite:///./here.db"}, "sqlite3.connect socket.connect") == "as expected\n"
    assert (tmp_path / "here.db").exists()


async def test_a_running_gateway_rejects_the_addresses_of_its_own_machine() -> None:
    """It listens on all of them; before it runs, it knows the loopback addresses only."""
    async with stage(host="0.0.0.0", port=8000, allow_private_networks="true") as running:
        policy = running.gateway.network.address_policy
        assert {refusal(address, 8000, policy) for address in {"127.0.0.1", *local_addresses()}} == {"own listener"}
