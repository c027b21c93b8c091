"""Whatever stands in the documentation as code does what the page says."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from multiverse_gateway.settings import load_settings
from multiverse_gateway.settings.sources import parse_dotenv
from support.backends import Backend
from support.processes import ADMIN_KEY, GatewayProcess, environment
from support.require import require
from support.snippets import GATEWAY, MODEL, READ, ROOT, RUN, SERVER, SHOWN, Snippet, pages, placed, snippets
from support.sockets import serving

ALL = [snippet for page in pages() for snippet in snippets(page)]
FOLLOWED = ROOT / "docs" / "tutorial.md"
"""The page that `test_tutorial.py` runs in its own way."""
PAGES = [page for page in pages() if page != FOLLOWED]
TO_RUN = [page for page in PAGES if any(snippet.language in RUN and snippet.mark is None for snippet in snippets(page))]


@pytest.mark.parametrize("snippet", ALL, ids=str)
def test_a_snippet_is_run_or_says_why_not(snippet: Snippet) -> None:
    """Its language is one of those that we know what to do with."""
    assert snippet.language in (*RUN, *READ, *SHOWN)
    if snippet.mark == "not run":
        assert len(snippet.words) >= 10, "say why"
    elif snippet.mark == "from":
        assert snippet.text.strip() in (ROOT / snippet.words).read_text()
    elif snippet.mark is None:
        assert snippet.language != "javascript"


@pytest.mark.parametrize("snippet", [snippet for snippet in ALL if snippet.language in READ and not snippet.mark], ids=str)
def test_a_file_can_be_read(snippet: Snippet, tmp_path: Path) -> None:
    """By what will read it."""
    if snippet.text.lstrip().startswith("--8<--"):
        return
    match snippet.language:
        case "toml":
            assert tomllib.loads(snippet.text)
        case "json":
            assert json.loads(snippet.text)
        case "yaml":
            assert require("yaml", "the YAML in the documentation").safe_load(snippet.text)
        case "ini":
            (tmp_path / ".env").write_text(snippet.text)
            assert parse_dotenv(snippet.text)
            load_settings(env={}, cwd=tmp_path)


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, str]]:
    """Run a gateway with the model that the pages speak of, and return where everything is."""
    with (
        serving(*(backends := [Backend(name, models=[MODEL]) for name in ("one", "two")])),
        GatewayProcess() as gateway,
    ):
        for backend in backends:
            gateway.register(MODEL, backend.url)
        yield {GATEWAY: gateway.url, "http://127.0.0.1:8000": gateway.url, SERVER: backends[0].url}


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform == "win32", reason="the snippets are for a POSIX shell")
@pytest.mark.parametrize("page", TO_RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page: Path, places: dict[str, str], tmp_path: Path) -> None:
    """From its first snippet to its last, in one shell."""
    lines = ["set -euo pipefail"]
    for number, snippet in enumerate(snippets(page)):
        if snippet.mark is not None and not (snippet.mark == "from" and snippet.title):
            continue
        text = placed(snippet.text, places)
        if snippet.title:
            (tmp_path / snippet.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / snippet.title).write_text(text)
        elif snippet.language == "python":
            (tmp_path / f"snippet-{number}.py").write_text(text)
            lines += [f"echo '--- {snippet}'", f"python snippet-{number}.py"]
        elif snippet.language == "bash":
            lines += [f"echo '--- {snippet}'", text]
    env = environment({"OPENAI_BASE_URL": f"{places[GATEWAY]}/v1", "OPENAI_API_KEY": "none", "ADMIN_API_KEY": ADMIN_KEY, "NO_COLOR": "1"})
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "ALLOW_PRIVATE_NETWORKS": "true"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
