"""Imports only go down: the rule of the architecture, read off the source with plain `ast`.

```
cli -> app -> pages -> api -> web -> entry -> gateway, monitor -> balancers, probes, relay, stores -> protocols -> core
```
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

import pytest

from support.source import FILES, PACKAGE, SOURCE, imports

CORE_MAY_IMPORT = sys.stdlib_module_names | {"attr", "attrs", "msgspec"}
NOT_PURE = {"asyncio", "logging", "random", "secrets", "sqlite3", "ssl", "subprocess", "threading", "time"}
HTTP_CLIENTS = {"aiohttp", "http.client", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib.request", "urllib3"}
HTTP = ("web", "api", "pages")
ABOVE = {"api": ("api", "pages", "app", "cli"), "pages": ("pages", "app", "cli")}
"""The parts that may import the presentation: what the API reads and writes, and what the pages show."""
SIBLINGS = ("balancers", "probes", "relay", "stores")
PLUGGABLE = ("balancers", "probes", "stores")
MAY_NAME_CONCRETE = ("app", "cli", "plugins")
OPTIONAL = {"limits", "opentelemetry", "psycopg", "psycopg_pool", "redis", "uvloop"}  # limits: needed by who uses redis only


def within(module: str, *parts: str) -> bool:
    """Tell whether our module is one of these parts of the package or lies in one."""
    return any(module == f"{PACKAGE}.{part}" or module.startswith(f"{PACKAGE}.{part}.") for part in parts)


def offences(path: str, source: str) -> Iterator[str]:
    """Say what breaks the rule in one source file; `path` is relative to `src`."""
    parts = path.removesuffix(".py").split("/")
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    tree = ast.parse(source)

    if within(module, "core"):
        yield from (f"{node.lineno}: core has no async" for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef))

    for found in imports(tree, module, is_package=is_package):
        where = f"{found.line}: {found.target}"
        ours = found.is_in(PACKAGE)
        if within(module, "core"):
            if not found.is_in(f"{PACKAGE}.core", *CORE_MAY_IMPORT):
                yield f"{where}: core imports only itself, the standard library, attrs and msgspec"
            if found.is_in(*NOT_PURE):
                yield f"{where}: core has no I/O, no clock, no randomness"
        if within(module, *HTTP) and found.is_in(f"{PACKAGE}.stores", *HTTP_CLIENTS):
            yield f"{where}: {', '.join(HTTP)} import no store and no HTTP client"
        for part, importers in ABOVE.items():
            if found.is_in(f"{PACKAGE}.{part}") and not within(module, *importers):
                yield f"{where}: {part} is only imported by {', '.join(importers)}"
        if within(module, "entry", *SIBLINGS) and found.is_in("starlette"):
            yield f"{where}: Starlette belongs to {', '.join(HTTP)}"
        if within(module, *SIBLINGS):
            if found.is_in("starlette"):
                yield f"{where}: Starlette belongs to {', '.join(HTTP)}"
            if any(found.is_in(f"{PACKAGE}.{part}") and not within(module, part) for part in SIBLINGS):
                yield f"{where}: {', '.join(SIBLINGS)} do not know each other"
        for part in PLUGGABLE:
            if ours and found.is_in(f"{PACKAGE}.{part}") and not within(module, part, *MAY_NAME_CONCRETE):
                yield f"{where}: only {', '.join(MAY_NAME_CONCRETE)} name a concrete balancer, probe or store"
        if found.in_function and not within(module, "cli") and not found.is_in(*OPTIONAL):
            yield f"{where}: imports stand at the top of the file, but for optional extras"


@pytest.mark.parametrize("path", FILES)
def test_imports_only_go_down(path: str) -> None:
    """No file of the package breaks the rule."""
    assert list(offences(path, (SOURCE / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/health.py", "import anyio"),
        ("core/health.py", "import time"),
        ("core/health.py", "from multiverse_gateway import gateway"),
        ("core/health.py", "from .. import gateway"),
        ("core/health.py", "class Health:\n    async def advance(self): ..."),
        ("api/admin.py", "from multiverse_gateway.stores.sqlite import SqliteStore"),
        ("api/admin.py", "from ..stores import sqlite"),
        ("api/admin.py", "import httpx2"),
        ("api/admin.py", "from urllib import request"),
        ("stores/sqlite.py", "from starlette.requests import Request"),
        ("stores/sqlite.py", "from multiverse_gateway.relay import wire"),
        ("relay/wire.py", "import multiverse_gateway.balancers.round_robin"),
        ("gateway.py", "from multiverse_gateway.balancers.round_robin import RoundRobin"),
        ("gateway.py", "if TYPE_CHECKING:\n    from multiverse_gateway import stores"),
        ("gateway.py", "def start():\n    import json"),
        ("__init__.py", "from .stores import memory"),
        ("registration.py", "from multiverse_gateway.api.request_types import Registration"),
        ("api/admin.py", "from multiverse_gateway.pages.words import span"),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str) -> None:
    """The check sees each way to break the rule, however the import is written."""
    assert list(offences(f"{PACKAGE}/{path}", source)) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/health.py", "import attrs, msgspec, enum\nfrom multiverse_gateway.core.servers import Server\nfrom . import errors"),
        ("core/__init__.py", "from .health import Health\nfrom multiverse_gateway.core import servers"),
        ("stores/sqlite.py", "import sqlite_utils\nfrom .rows import to_row\nfrom multiverse_gateway.core.servers import Server"),
        ("stores/postgres.py", "def create(settings):\n    import psycopg"),
        ("cli/run.py", "def run():\n    from multiverse_gateway.stores import sqlite"),
        ("app.py", "from multiverse_gateway.probes.models import create"),
        ("pages/routes.py", "import starlette.responses\nfrom multiverse_gateway.gateway import Gateway"),
    ],
)
def test_what_is_allowed_is_left_alone(path: str, source: str) -> None:
    """The check does not cry over imports that go down."""
    assert list(offences(f"{PACKAGE}/{path}", source)) == []
