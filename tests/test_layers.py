"""Imports only go down: the rule of the architecture, read off the source with plain `ast`.

A part is a package or a module directly in `multiverse_gateway`. `FLOORS` orders all of them, and `docs/explanation/architecture.md` shows
them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.source import FILES, PACKAGE, SOURCE, imports

FLOORS = (
    ("__main__",),
    ("cli", "__init__"),
    ("app",),
    ("pages",),
    ("api",),
    ("web", "accounts", "alias_book", "host_book", "issued_keys", "local_engines", "wall_links"),
    ("entry", "registration", "connection_test"),
    ("gateway", "monitor", "model_trials"),
    ("server_checks",),
    ("housekeeping", "plugins"),
    ("usage_book", "response_places", "probes", "dialing", "engines"),
    (
        *("relay", "balancers", "stores", "observability"),
        *("health_book", "registration_book", "storage"),
        *("access_checks", "admin_key", "testing"),
    ),
    ("protocols", "settings"),
    ("core", "holders", "_version"),
)
"""The parts of the package, the highest floor first. A part imports parts of lower floors only."""
FLOOR_OF = {part: floor for floor, parts in enumerate(reversed(FLOORS)) for part in parts}
ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "explanation" / "architecture.md"

CORE_MAY_IMPORT = sys.stdlib_module_names | {"attr", "attrs", "msgspec"}
NOT_PURE = {"asyncio", "logging", "random", "secrets", "sqlite3", "ssl", "subprocess", "threading", "time"}
HTTP_CLIENTS = {"aiohttp", "http.client", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib.request", "urllib3"}
HTTP = ("web", "api", "pages")
SIBLINGS = ("balancers", "probes", "relay", "stores")
PLUGGABLE = ("balancers", "probes", "stores")
MAY_NAME_CONCRETE = ("app", "cli", "plugins")
OPTIONAL = {"limits", "opentelemetry", "psycopg", "psycopg_pool", "redis", "uvloop"}  # limits: needed by who uses redis only


def within(module: str, *parts: str) -> bool:
    """Return whether our module is one of these parts of the package or lies in one."""
    return any(module == f"{PACKAGE}.{part}" or module.startswith(f"{PACKAGE}.{part}.") for part in parts)


def part_of(module: str) -> str:
    """Return the part that one of our modules, or a name in it, belongs to; a name of the package itself belongs to `__init__`."""
    part = module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]
    return part if part in FLOOR_OF else "__init__"


def offences(path: str, source: str) -> Iterator[str]:
    """Yield what breaks the rule in one source file; `path` is relative to `src`."""
    parts = path.removesuffix(".py").split("/")
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    tree = ast.parse(source)

    if within(module, "core"):
        yield from (f"{node.lineno}: core has no async" for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef))

    for found in imports(tree, module, is_package=is_package):
        where = f"{found.line}: {found.target}"
        ours = found.is_in(PACKAGE)
        own, other = part_of(module), part_of(found.target)
        if ours and own != other and FLOOR_OF[own] <= FLOOR_OF[other]:
            yield f"{where}: {own} does not stand above {other}"
        if within(module, "core"):
            if not found.is_in(f"{PACKAGE}.core", *CORE_MAY_IMPORT):
                yield f"{where}: core imports only itself, the standard library, attrs and msgspec"
            if found.is_in(*NOT_PURE):
                yield f"{where}: core has no I/O, no clock, no randomness"
        if within(module, *HTTP) and found.is_in(f"{PACKAGE}.stores", *HTTP_CLIENTS):
            yield f"{where}: {', '.join(HTTP)} import no store and no HTTP client"
        if within(module, "entry", *SIBLINGS) and found.is_in("starlette"):
            yield f"{where}: Starlette belongs to {', '.join(HTTP)}"
        if within(module, *SIBLINGS) and any(found.is_in(f"{PACKAGE}.{part}") and not within(module, part) for part in SIBLINGS):
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
        ("entry/intake.py", "from multiverse_gateway.web import paths"),
        ("web/paths.py", "from multiverse_gateway.api import admin"),
        ("api/admin.py", "from ..pages.views import rows"),
        ("pages/routes.py", "from multiverse_gateway import app"),
        ("app.py", "def start():\n    from multiverse_gateway.cli import main"),
        ("gateway.py", "from multiverse_gateway import Settings"),
        ("gateway.py", "import multiverse_gateway"),
        ("gateway.py", "from multiverse_gateway.monitor import Monitor"),
        ("relay/wire.py", "from multiverse_gateway.observability.metrics import Meter"),
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
        ("pages/routes.py", "from multiverse_gateway.pages import views\nfrom . import words\nfrom ..api import admin"),
        ("cli/run.py", "from multiverse_gateway.app import create_app"),
    ],
)
def test_what_is_allowed_is_left_alone(path: str, source: str) -> None:
    """The check does not cry over imports that go down."""
    assert list(offences(f"{PACKAGE}/{path}", source)) == []


# The picture of the architecture


def floors_of(picture: str) -> Sequence[Sequence[str]]:
    """Return the parts on each floor of a picture. A floor whose line ends with a dot continues on the next line."""
    cells = [re.split(r" {2,}", line, maxsplit=1)[0] for line in picture.strip().splitlines()]
    return [floor.split(" · ") for floor in "\n".join(cells).replace(" ·\n", " · ").splitlines()]


def table_after(text: str, heading: str) -> Iterator[Sequence[str]]:
    """Return the names in code in the first column of the table below a heading row, row by row."""
    for line in text.partition(f"\n{heading}\n")[2].splitlines():
        if not line.startswith("|"):
            return
        yield re.findall("`([^`]+)`", line.split("|")[1])


def test_each_part_stands_on_one_floor() -> None:
    """Every package and every module directly in `multiverse_gateway`, and nothing else."""
    tree = {path.split("/")[1].removesuffix(".py") for path in FILES}
    assert sorted(part for floor in FLOORS for part in floor) == sorted(tree)


def test_the_picture_shows_the_floors() -> None:
    """The picture of the documentation has the parts and the order that this test enforces."""
    (picture,) = re.findall(r"```text\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL)
    assert [tuple(floor) for floor in floors_of(picture)] == list(FLOORS)


def test_the_table_explains_each_part() -> None:
    """Every part has a row, and only one."""
    explained = [part for row in table_after(ARCHITECTURE.read_text(encoding="utf-8"), "| part | contains |") for part in row]
    assert sorted(explained) == sorted(FLOOR_OF)


def test_places_to_contribute_exist() -> None:
    """Every place that CONTRIBUTING names is there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall("`([a-z_0-9/]+(?:/|\\.py|\\.md))`", text.partition("## Where things are")[2].partition("\n## ")[0])
    assert len(named) > 10
    assert [place for place in named if not ((SOURCE / PACKAGE / place).exists() or (ROOT / place).exists())] == []


@pytest.mark.parametrize(
    ("picture", "floors"),
    [
        ("cli  starts a process\ncore  decides\n", [["cli"], ["core"]]),
        ("web · accounts   HTTP\ncore", [["web", "accounts"], ["core"]]),
        ("relay · stores ·  many\nstorage   parts\ncore  decides", [["relay", "stores", "storage"], ["core"]]),
    ],
)
def test_a_picture_is_read_floor_by_floor(picture: str, floors: list[list[str]]) -> None:
    """Parts are separated by dots, and explained on the right."""
    assert floors_of(picture) == floors
