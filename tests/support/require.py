"""What a test needs beyond the test group: without it the test is left out and says why, or fails where nothing may be left out."""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest

STRICT = os.environ.get("MVG_TEST_STRICT", "") not in ("", "0")
"""True where whatever is left out is a failure."""


def leave_out(reason: str) -> NoReturn:
    """Leave the running test out, or fail it in strict mode."""
    if STRICT:
        pytest.fail(f"left out in strict mode: {reason}", pytrace=False)
    pytest.skip(reason)


def require(name: str, reason: str) -> ModuleType:
    """Import module `name`; `reason` says what it is needed for.

    At the top of a test module this leaves the whole module out, so call it in a fixture when other tests can do without.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        leave_out(f"module {name} is missing ({error}): {reason}")


def require_program(name: str, reason: str) -> str:
    """Return the path of program `name`; `reason` says what it is needed for."""
    path = shutil.which(name)
    if path is None:
        leave_out(f"program {name} is missing: {reason}")
    return path
