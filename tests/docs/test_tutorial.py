"""The tutorial and the quick starts, followed by copying every line in an environment that has only Python.

`pip install multiverse-gateway` installs a wheel that is packed here from the sources. The libraries that it needs are those of
the tests, so that nothing is downloaded. Ports are replaced by free ones; nothing else is changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from multiverse_gateway import __version__
from support.processes import environment
from support.require import require
from support.snippets import ROOT, placed, snippets
from support.sockets import free_port, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform == "win32", reason="the commands are for a POSIX shell")]

TUTORIAL = ROOT / "docs" / "tutorial.md"
STARTS = (ROOT / "README.md", ROOT / "docs" / "index.md")
QUICK_STARTS = [snippet for page in STARTS for snippet in snippets(page) if "test_tutorial.py" in snippet.words]
SECONDS = 60.0
"""How long any one step may take."""


def pack(directory: Path) -> Path:
    """Write a wheel of the package, with the requirements and the commands of `pyproject.toml`, and return its directory."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = f"multiverse_gateway-{__version__}"
    metadata = ["Metadata-Version: 2.4", "Name: multiverse-gateway", f"Version: {__version__}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
    points = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [line for group, names in points.items() for line in (f"[{group}]", *(f"{key} = {value}" for key, value in names.items()))]
    files = {
        "METADATA": "\n".join(metadata) + "\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "\n".join(lines) + "\n",
        "RECORD": "",
    }
    source = ROOT / "src"
    directory.mkdir()
    with zipfile.ZipFile(directory / f"{name}-py3-none-any.whl", "w") as wheel:
        for path in sorted((source / "multiverse_gateway").rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                wheel.write(path, path.relative_to(source))
        for file, text in files.items():
            wheel.writestr(f"{name}.dist-info/{file}", text)
    return directory


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the variables of a shell that finds Python and a wheel of the package, but no installed command."""
    require("ensurepip", "virtual environments with pip")
    root = tmp_path_factory.mktemp("fresh")
    for directory in ("bin", "libraries", "home"):
        (root / directory).mkdir()
    (root / "bin" / "python3").symlink_to(getattr(sys, "_base_executable", sys.executable))
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(("multiverse", "pip", "setuptools", "__")) and path.suffix != ".pth":
            (root / "libraries" / path.name).symlink_to(path)
    env = environment({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(pack(root / "wheels")), "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    env |= {"PATH": f"{root / 'bin'}:/usr/bin:/bin", "PYTHONPATH": str(root / "libraries"), "HOME": str(root / "home"), "NO_COLOR": "1"}
    return {name: value for name, value in env.items() if name not in ("ADMIN_API_KEY", "VIRTUAL_ENV")}


class Terminal:
    """A shell that gets the lines of a page as if they were pasted; it ends at the first command that fails."""

    def __init__(self, directory: Path, env: Mapping[str, str], name: str) -> None:
        self._log = directory / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-e", "-o", "pipefail", "-s"],
                cwd=directory,
                env=env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """Everything that was printed so far."""
        return self._log.read_text(errors="replace")

    def paste(self, text: str) -> None:
        """Type lines."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the shell has ended: `wait_for` shows why
            self._process.stdin.write(text.encode() + b"\n")
            self._process.stdin.flush()

    def run(self, text: str) -> str:
        """Paste lines, wait until the shell has run them all, and return what they printed."""
        before = len(self.text)
        self.paste(f"{text}\necho '-- done'")
        return self.wait_for(r"-- done\n", after=before)

    def wait_for(self, pattern: str, *, after: int = 0) -> str:
        """Wait until something is printed that matches, and return the text up to there. Raises AssertionError with what was printed."""
        wait_until(lambda: re.search(pattern, self.text[after:]) or self._process.poll() is not None, within=SECONDS)
        found = re.search(pattern, self.text[after:])
        assert found is not None, self.text
        return self.text[after : after + found.end()]

    def interrupt(self) -> None:
        """Press Ctrl-C, and wait until what ran has ended."""
        os.killpg(self._process.pid, signal.SIGINT)
        self._process.communicate(timeout=SECONDS)

    def close(self) -> None:
        """End everything that runs in it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=SECONDS)


def _key_in(text: str) -> str:
    """Return the admin key that a gateway printed."""
    return text.partition("admin key  ")[2].split()[0]


@pytest.fixture
def terminals(tmp_path: Path, fresh: dict[str, str]) -> Iterator[list[Terminal]]:
    """Return a list with the first terminal; what is appended to it is closed, too."""
    opened = [Terminal(tmp_path, fresh, "first")]
    yield opened
    for terminal in opened:
        terminal.close()


def test_the_tutorial_can_be_followed_by_copying(tmp_path: Path, fresh: dict[str, str], terminals: list[Terminal]) -> None:
    """Each step works as written: servers in terminals of their own, the rest in one, which gets the key that the gateway printed."""
    gateway, ada, grace = free_port(), free_port(), free_port()
    ports = {":8000": f":{gateway}", ":9001": f":{ada}", ":9002": f":{grace}", " 9001": f" {ada}", " 9002": f" {grace}"}
    env = {**fresh, "MULTIVERSE_PORT": str(gateway)}
    first, asked, key = terminals[0], [], ""
    for snippet in snippets(TUTORIAL):
        text = placed(snippet.text, ports).rstrip()
        if snippet.title:
            (tmp_path / snippet.title).write_text(text)
        elif snippet.words.startswith("it serves until it is stopped"):
            terminals.append(terminal := Terminal(tmp_path, env, f"terminal-{len(terminals)}"))
            prelude = "" if "activate" in text else ". gateway/bin/activate\n"
            terminal.paste(f"{prelude}{text}")
            shown = terminal.wait_for(r"admin key +(\S+)\n[^$]*login\?token=\S+" if "run" in text else r"^\d+\n")
            key = key or _key_in(shown)
        elif snippet.words.startswith("it listens on every address"):
            terminals[1].interrupt()
            terminals.append(terminal := Terminal(tmp_path, env, f"terminal-{len(terminals)}"))
            terminal.paste(f". gateway/bin/activate\n{text.replace('0.0.0.0', '127.0.0.2')}")  # tests open nothing to the network
            terminal.wait_for(r"for others +nothing yet")
        else:
            if "must be stopped first" in snippet.words:
                terminals[2].interrupt()
            shown = first.run(f"{text}\n{key}" if "read -r" in text else text)
            asked.append(shown.count("this is server Ada") * "A" + shown.count("this is server Grace") * "G") if "ask.py" in text else None
    assert asked == ["A", "AG", "GG"]


def test_the_quick_starts_work_in_a_fresh_environment(fresh: dict[str, str], terminals: list[Terminal]) -> None:
    """Those of README and of the first page install the package before they use it; a demo that keeps running says how to go on."""
    (here,) = terminals
    here.run("python3 -m venv here\n. here/bin/activate")
    assert shutil.which("multiverse-gateway", path=fresh["PATH"]) is None
    for snippet in reversed(QUICK_STARTS):  # the demo of README runs until it is stopped
        before = len(here.text)
        here.paste(f"pip uninstall --yes multiverse-gateway\n{snippet.text}\necho '-- done'")
        shown = here.wait_for(r"-- done\n|Now you", after=before)
        assert "Successfully installed multiverse-gateway" in shown
        assert "took over" in shown


def test_both_quick_starts_are_tried() -> None:
    """The pages say so in a comment, which names this file."""
    assert len(QUICK_STARTS) == 2
