"""Every file in `examples/` does what it says, against a running gateway."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from support.backends import Backend
from support.processes import ADMIN_KEY, GatewayProcess, WebChild, environment
from support.require import require
from support.sockets import free_port

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = "tiny"


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """Return a model server."""
    with Backend("one", models=[MODEL]) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(backend: Backend) -> Iterator[GatewayProcess]:
    """Return a gateway that knows it."""
    with GatewayProcess() as process:
        process.register(MODEL, backend.url)
        yield process


def run(name: str, *arguments: str, url: str, succeeds: bool = True) -> str:
    """Run an example as its first lines say, and return what it prints."""
    env = environment({"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none", "ADMIN_API_KEY": ADMIN_KEY})
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) is succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_list_of_examples_is_complete() -> None:
    """And so is this module."""
    names = {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")}
    listed = set(re.findall(r"\(([a-z_]+(?:\.py)?)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == names
    assert not [name for name in names if f'"{name.removesuffix(".py")}' not in Path(__file__).read_text()]


def test_a_server_is_registered(gateway: GatewayProcess, backend: Backend) -> None:
    """And why not, when it is not."""
    assert "is healthy" in run("register_server.py", MODEL, backend.url, "ada", url=gateway.url)
    assert "http" in run("register_server.py", MODEL, "ftp://nowhere.example", url=gateway.url, succeeds=False)


def test_a_model_is_used(gateway: GatewayProcess) -> None:
    """Synchronously, streaming, and many times at once."""
    assert run("use_model.py", MODEL, "Who", "are", "you?", url=gateway.url).count("word1") == 2
    assert run("use_model_async.py", MODEL, url=gateway.url).count("(server ") == 4


def test_models_and_health_are_shown(gateway: GatewayProcess) -> None:
    """A missing model is a complaint."""
    assert run("list_models.py", url=gateway.url) == f"{MODEL}: 1 of 1 servers are healthy\n"
    assert run("check_health.py", MODEL, url=gateway.url) == ""
    assert "No server of other" in run("check_health.py", MODEL, "other", url=gateway.url, succeeds=False)
    assert "does not answer" in run("check_health.py", url=f"http://127.0.0.1:{free_port()}", succeeds=False)


class Embedded(WebChild):
    """An example served by hypercorn, as its first lines say."""

    ready_path = "/ai/readyz"


@pytest.mark.parametrize("name", ["embed_starlette", "embed_fastapi"])
def test_the_gateway_is_embedded(name: str, backend: Backend, tmp_path: Path) -> None:
    """Below /ai of somebody else's application."""
    if name == "embed_fastapi":
        require("fastapi", "the gateway inside a FastAPI application")
    port = free_port()
    command = [sys.executable, "-m", "hypercorn", f"{name}:app", "--bind", f"127.0.0.1:{port}"]
    env = environment({"ADMIN_API_KEY": ADMIN_KEY, "ALLOW_PRIVATE_NETWORKS": "true"})
    env["PYTHONPATH"] += os.pathsep + str(EXAMPLES)
    child = Embedded(command, port=port, log=tmp_path / "log", env=env, cwd=tmp_path)
    try:
        child.start()
        run("register_server.py", MODEL, backend.url, url=f"{child.url}/ai")
        assert "word1" in run("use_model.py", MODEL, url=f"{child.url}/ai")
        assert MODEL in httpx2.get(child.url, trust_env=False).text
    finally:
        child.kill()


def test_a_class_gets_keys(backend: Backend, tmp_path: Path) -> None:
    """A student's key works, a guess does not; the script can be run again, and bad lines are named."""
    names = tmp_path / "names.txt"
    names.write_text("Ada\n\nJürgen Müller\n", encoding="utf-8")
    with GatewayProcess({"REQUIRE_CLIENT_AUTH": "true", "CLIENT_API_KEYS": "the-key-of-the-instructor"}) as process:
        process.register(MODEL, backend.url)
        run("class_setup.py", str(names), "30", url=process.url)
        rows = list(csv.DictReader((tmp_path / "keys.csv").read_text(encoding="utf-8").splitlines()))
        assert [(row["name"], row["OPENAI_BASE_URL"]) for row in rows] == [(name, f"{process.url}/v1") for name in ("Ada", "Jürgen Müller")]
        for key, status in ((rows[1]["OPENAI_API_KEY"], 200), ("a-guess-at-a-key", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert process.call("GET", "/v1/models", headers=headers).status_code == status
        assert "2 were there already" in run("class_setup.py", str(names), url=process.url)
        names.write_text("Ada\nAda\n")
        assert "line 2: Ada is on line 1 already" in run("class_setup.py", str(names), url=process.url, succeeds=False)


def test_the_balancer_is_a_package(backend: Backend, tmp_path: Path) -> None:
    """Installed, it is found by its name, keeps the contract and serves."""
    package = EXAMPLES / "fill_first"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "lib"), str(package)]
    subprocess.run(command, check=True, timeout=300)
    env = environment({})
    env["PYTHONPATH"] += os.pathsep + str(tmp_path / "lib")
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(package / "test_fill_first.py"),
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(tests, env=env, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    with GatewayProcess({"BALANCER": "fill_first", "PYTHONPATH": env["PYTHONPATH"]}) as process:
        process.register(MODEL, backend.url)
        assert process.chat(MODEL).status_code == 200
