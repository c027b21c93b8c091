"""Programs from the days of `openai.ChatCompletion.create()`: the old library, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.deployment import Deployment
from support import behaviours
from support.backends import Backend
from support.busy import check_program
from support.processes import GatewayProcess
from support.require import leave_out

pytestmark = pytest.mark.e2e

Deploy = Callable[..., Deployment]
PROGRAMS = Path(__file__).parent / "programs"
PROGRAM = """
import json, sys
import openai
openai.api_base, openai.api_key, model = sys.argv[1], "anything", sys.argv[2]
messages = [{"role": "user", "content": "Hello"}]
plain = openai.ChatCompletion.create(model=model, messages=messages)
parts = list(openai.ChatCompletion.create(model=model, messages=messages, stream=True))
text = openai.Completion.create(model=model, prompt="Hello")
vector = openai.Embedding.create(model=model, input="Hello")
try:
    openai.ChatCompletion.create(model="nobody-has-this", messages=messages)
except openai.error.InvalidRequestError as error:
    refusal = [error.http_status, error.code, error.param]
print(json.dumps({
    "version": openai.version.VERSION,
    "models": [entry["id"] for entry in openai.Model.list()["data"]],
    "plain": plain["choices"][0]["message"]["content"],
    "stream": "".join(part["choices"][0]["delta"].get("content", "") for part in parts),
    "text": text["choices"][0]["text"],
    "vector": len(vector["data"][0]["embedding"]),
    "refusal": refusal,
}))
"""
BROKEN = """
import sys
import openai
openai.api_base, openai.api_key = sys.argv[1], "anything"
said = []
try:
    for part in openai.ChatCompletion.create(model=sys.argv[2], messages=[{"role": "user", "content": "Hello"}], stream=True):
        said.append(part["choices"][0]["delta"].get("content", ""))
except openai.error.APIError as error:
    print("APIError", len(said))
"""


@pytest.fixture(scope="session")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with openai 0.28, made once per session."""
    home = tmp_path_factory.mktemp("old") / "venv"
    venv.create(home, with_pip=True)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "openai==0.28.*"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        leave_out(f"openai 0.28 cannot be installed: {done.stderr.strip()[-300:]}")
    return python


def clean_environment() -> dict[str, str]:
    """Return our environment without what the library or another Python would read."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON"))}


def run(python: Path, program: str, deployment: Deployment) -> str:
    """Run a program of the old days, and return what it prints."""
    command = [str(python), "-c", program, deployment.gateway.base_url, deployment.model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=clean_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_old_library_works_unmodified(deploy: Deploy, old_python: Path) -> None:
    """FR-API-INF-008: plain, streamed, completions, embeddings, and its errors."""
    deployment = deploy(Backend("one"), Backend("two"))
    got = json.loads(run(old_python, PROGRAM, deployment))
    assert got["version"].startswith("0.28.")
    assert deployment.model in got["models"]
    for kind in ("plain", "stream", "text"):
        assert got[kind].split()[1:] == ["word1", "word2", "word3", "word4"]
    assert got["vector"] == 3
    assert got["refusal"] == [404, "model_not_found", "model"]


def test_the_old_library_reads_a_stream_with_comments(gateway: GatewayProcess, old_python: Path) -> None:
    """It ignores them, and raises an error that comes after the head."""
    check_program(gateway, "waiting-for-old", [str(old_python), str(PROGRAMS / "waiting_openai_028.py")], env=clean_environment())


def test_the_old_library_learns_of_a_broken_stream(deploy: Deploy, old_python: Path) -> None:
    """S01: it raises, too."""
    assert run(old_python, BROKEN, deploy(Backend("dying", behaviours.cut_stream(3)))).split() == ["APIError", "3"]
