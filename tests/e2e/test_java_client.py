"""Java programs: the JDK's HttpClient offers an upgrade to h2c with every request, and LangChain4j and Spring AI are built on it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.deployment import Deployment
from support.backends import Backend
from support.processes import DOORS
from support.require import require_program

pytestmark = pytest.mark.e2e

Deploy = Callable[..., Deployment]
PROGRAM = Path(__file__).parent / "programs" / "Chat.java"


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_the_jdk_is_served_with_its_defaults(deploy: Deploy) -> None:
    """Plain and streamed completions and the list of models, several on one connection."""
    java = require_program("java", "a program for the JDK")
    deployment = deploy(Backend("good"))
    done = subprocess.run(
        [java, str(PROGRAM), deployment.gateway.url, deployment.model],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    answers = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [(version, status) for version, status, _ in answers] == [("HTTP_1_1", "200")] * 9
    for plain, stream, models in zip(answers[::3], answers[1::3], answers[2::3], strict=True):
        assert json.loads(plain[2])["choices"]
        assert stream[2].rstrip("|").endswith("data: [DONE]")
        assert deployment.model in models[2]
