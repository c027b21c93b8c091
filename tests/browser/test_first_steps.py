"""The first steps of an operator, on a computer where engines listen on their usual ports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import environment

pytestmark = pytest.mark.e2e

JOURNEY = Path(__file__).with_name("first_steps_here.py")
NAMESPACE = ("unshare", "--net", sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(JOURNEY))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root makes namespaces")
def test_the_engines_of_this_computer_are_offered_and_used() -> None:
    """In a network of its own, in which nothing else uses the ports: `first_steps_here.py` is the journey."""
    env = environment({name: value for name, value in os.environ.items() if name.startswith(("PYTHONPATH", "MVG_TEST"))})
    done = subprocess.run(
        NAMESPACE, cwd=JOURNEY.parents[2], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
