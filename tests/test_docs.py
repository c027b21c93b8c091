"""What exists is documented."""

import importlib
import json
import re
import runpy
import tomllib
from pathlib import Path

import attrs
import click
import pytest

import multiverse_gateway
from multiverse_gateway import GatewayError, Settings
from multiverse_gateway.cli import main
from multiverse_gateway.core.health import HealthState
from multiverse_gateway.observability.metrics import Gauges, Meter, families

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"


def every_error(parent: type[GatewayError]) -> set[type[GatewayError]]:
    """Return the tree below an error."""
    return {parent}.union(*(every_error(child) for child in parent.__subclasses__()))


@pytest.mark.parametrize("field", attrs.fields(Settings), ids=lambda field: field.name)
def test_every_setting_is_in_the_reference(field: "attrs.Attribute[object]") -> None:
    """The page shows `.env.example`, which another test holds equal to the settings themselves."""
    assert '--8<-- ".env.example"' in (REFERENCE / "settings.md").read_text()
    if field.name != "ui":
        assert field.name.upper() in (ROOT / ".env.example").read_text()


def test_every_command_is_in_the_reference() -> None:
    """By its name."""
    assert isinstance(main, click.Group)
    page = (REFERENCE / "command-line.md").read_text()
    missing = [name for name in main.list_commands(click.Context(main)) if f"`{name}" not in page]
    assert not missing


def test_every_error_code_is_in_the_reference() -> None:
    """By its code."""
    importlib.import_module("multiverse_gateway.app")
    page = (REFERENCE / "http-api.md").read_text()
    codes = {error.code for error in every_error(GatewayError) if error.code is not None}
    assert not sorted(code for code in codes if f"`{code}`" not in page)


def test_every_session_that_is_named_exists() -> None:
    """Nox runs a function only if it is marked as a session."""
    sessions = set(re.findall(r"^@nox\.session.*\ndef (\w+?)_?\(", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    named = {name for page in pages for name in re.findall(r"nox -s ([a-z0-9]+)", page.read_text(encoding="utf-8"))}
    assert "scaling" in named
    assert not named - sessions


def test_every_public_name_is_in_the_reference() -> None:
    """And is there."""
    page = (REFERENCE / "api.md").read_text()
    names = [name for name in multiverse_gateway.__all__ if name != "__version__"]
    assert not [name for name in names if f"::: multiverse_gateway.{name}\n" not in page]
    assert all(hasattr(multiverse_gateway, name) for name in names)


def test_every_dependency_is_justified() -> None:
    """One line each."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "explanation" / "dependencies.md").read_text()
    wanted = [requirement.split(";")[0].split(">")[0].split("~")[0].split("[")[0].strip() for requirement in project["dependencies"]]
    assert not [name for name in wanted if f"| {name} |" not in page]


def test_every_page_is_in_the_list_for_language_models() -> None:
    """`llms.txt` names the pages of the navigation, and no others."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = {page.removesuffix(".md") for page in re.findall(r": ([a-z/-]+\.md)$", navigation, re.MULTILINE)}
    site = re.search(r"^site_url: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert site is not None
    listed = {found.strip("/") for found in re.findall(rf"\({re.escape(site[1])}([a-z/-]+)\)", (ROOT / "docs" / "llms.txt").read_text())}
    assert listed == pages - {"index"}


def test_every_term_of_the_glossary_is_linked_where_it_is_used() -> None:
    """Other pages link to each term, and to no term that is missing."""
    terms = set(re.findall(r"\*\*\{ #([a-z-]+) \}", (REFERENCE / "glossary.md").read_text()))
    pages = [page.read_text() for page in (ROOT / "docs").rglob("*.md")]
    assert {term for page in pages for term in re.findall(r"glossary\.md#([a-z-]+)", page)} == terms


def test_the_changelog_can_be_cut_into_releases() -> None:
    """The notes of a release are its section, without its heading and without its neighbors."""
    notes = runpy.run_path(str(ROOT / "scripts" / "release_notes.py"))["notes"]
    text = "# Changelog\n\n## [Unreleased]\n\n- next\n\n## [1.1.0] - 2026-01-02\n\n### Added\n\n- one\n\n## [1.0.0]\n\n[1.0.0]: https://x\n"
    assert notes(text, "1.1.0") == "### Added\n\n- one"
    assert notes(text, "1.0.0") is None
    assert notes(text, "2.0.0") is None
    assert notes((ROOT / "CHANGELOG.md").read_text(), "Unreleased")


def test_every_metric_is_in_the_reference() -> None:
    """And the reference names no other."""
    gauges = Gauges(at=0, requests=0, waiting={}, servers=[], answer_bytes=0, waiting_retries=0, body_bytes=0, is_shedding=False, tasks=0)
    kinds = {"counter": "_total", "info": "_info"}
    found = {family.name + kinds.get(family.type, "") for family in families(Meter(), gauges)}
    page = (REFERENCE / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(multiverse_\w+)`", page, re.MULTILINE)) == found


def test_the_dashboard_asks_for_figures_that_there_are() -> None:
    """Every panel of the Grafana file names only metrics of the reference, and states and outcomes that exist."""
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ()))
    page = (REFERENCE / "metrics.md").read_text()
    names = {re.sub(r"_bucket$", "", name) for name in re.findall(r"\bmultiverse_\w+", asked)}
    assert len(names) > 10
    assert not [name for name in names if f"`{name}`" not in page]
    states = {word for found in re.findall(r'state[!=]~"([^"]*)"', asked) for word in found.split("|")}
    assert states <= {state.value for state in HealthState}
