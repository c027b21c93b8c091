"""`login-link`: sign in again without the admin key, next to a gateway that is running."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner, Result

from multiverse_gateway.cli import main
from support.processes import GatewayProcess

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with GatewayProcess({"WORKERS": "2"}) as process:
        yield process


def link_of(folder: Path, *arguments: str, **settings: str) -> Result:
    """Run the command in the folder of a gateway."""
    with chdir(folder):
        return CliRunner().invoke(main, ["login-link", *arguments], env=settings)


def test_a_link_signs_in_once_in_whatever_process(gateway: GatewayProcess) -> None:
    """At once, and with the cookie of a session; the second time not. It shows no key."""
    database = f"sqlite:///{gateway.database}"
    done = link_of(gateway.directory, "--gateway", f"{gateway.url}/v1", DATABASE_URL=database)
    assert done.exit_code == 0, done.stderr
    link = done.stdout.strip()
    assert link.startswith(f"{gateway.url}/login?token=")
    assert "once, within 15 minutes" in done.stderr
    signed_in = httpx2.get(link, trust_env=False)
    assert (signed_in.status_code, signed_in.headers["location"]) == (303, "/dashboard")
    cookies = dict([signed_in.headers["set-cookie"].partition(";")[0].split("=", 1)])
    assert httpx2.get(f"{gateway.url}/keys", headers={"accept": "text/html"}, cookies=cookies, trust_env=False).status_code == 200
    assert httpx2.get(link, trust_env=False).status_code == 403


def test_the_link_has_the_address_of_the_gateway(gateway: GatewayProcess) -> None:
    """The public one, if there is one, with the path that it is served below."""
    settings = {"DATABASE_URL": f"sqlite:///{gateway.database}", "PORT": "8123"}
    assert link_of(gateway.directory, **settings).stdout.startswith("http://127.0.0.1:8123/login?token=")
    public = {"PUBLIC_URL": "https://gateway.example,https://other.example", "ROOT_PATH": "/ai"}
    assert link_of(gateway.directory, **settings, **public).stdout.startswith("https://gateway.example/ai/login?token=")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"DATABASE_URL": "memory://"}, "sign in with the admin key"),
        ({"DATABASE_URL": "sqlite:///./nothing.db"}, "there is no database"),
        ({"DATABASE_URL": "sqlite:///./empty.db"}, "of another version"),
        ({"DATABASE_URL": "sqlite:///./broken.db"}, "cannot be read"),
        ({"MULTIVERSE_UI": "false"}, "has no pages"),
    ],
)
def test_where_there_can_be_no_link_it_says_why(tmp_path: Path, settings: dict[str, str], problem: str) -> None:
    """And makes nothing."""
    (tmp_path / "empty.db").touch()
    (tmp_path / "broken.db").write_bytes(os.urandom(4096))
    before = sorted(tmp_path.iterdir())
    refused = link_of(tmp_path, **settings)
    assert refused.exit_code in (1, 2)
    assert problem in refused.stderr
    assert sorted(tmp_path.iterdir()) == before
