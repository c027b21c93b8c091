"""The files that pages load."""

from __future__ import annotations

import re

import pytest

from multiverse_gateway.pages.assets import STATIC, load_assets

TEMPLATES = STATIC.parent / "templates"
PAGES = sorted(path.name for path in TEMPLATES.glob("*.html") if not path.name.startswith("_"))
BUDGET = 60_000
"""Bytes of scripts on a page, as they travel."""
BUDGETS = {"playground.html": 120_000}
"""Pages that may load more: the playground renders Markdown and highlights code."""
API_DOCS_READER = "vendor/swagger-ui-bundle.js"
"""Only /docs loads it; the budget does not count it."""


def scripts_of(page: str) -> set[str]:
    """Return the scripts that a page can load: those in its templates, and whatever these import, at once or later."""
    html = (TEMPLATES / "base.html").read_text(encoding="utf-8") + (TEMPLATES / page).read_text(encoding="utf-8")
    waiting, found = set(re.findall(r"static\('([^']+\.js)'\)", html)), set[str]()
    while waiting:
        name = waiting.pop()
        found.add(name)
        text = "" if name.startswith("vendor/") else (STATIC / name).read_text(encoding="utf-8")
        patterns = {re.sub(r"\$\{\w+\}", "*", path) for path in re.findall(r"""["'`](\.\.?/[^"'`]+\.js)""", text)}
        imported = {path.resolve().relative_to(STATIC).as_posix() for pattern in patterns for path in (STATIC / "js").glob(pattern)}
        waiting |= imported - found
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_scripts_of_a_page_stay_within_their_budget(page: str) -> None:
    """HTMX, our own and those of others, even when a page loads some of them only for some answers."""
    files = load_assets().files
    scripts = {name: len(files[name].packed) for name in scripts_of(page) - {API_DOCS_READER}}
    assert sum(scripts.values()) < BUDGETS.get(page, BUDGET), scripts


def test_no_text_of_a_script_spans_lines() -> None:
    """Scripts travel without indentation, which such a text would lose."""
    for path in (STATIC / "js").glob("*.js"):
        assert not [line for line in path.read_text(encoding="utf-8").splitlines() if line.replace("```", "").count("`") % 2], path.name


def test_every_script_belongs_to_a_page() -> None:
    """Otherwise the budgets would not count it."""
    scripts = {name for name in load_assets().files if name.endswith(".js")}
    assert set.union(*(scripts_of(page) for page in PAGES)) == scripts


def test_colours_stand_in_one_place() -> None:
    """Neither the pages' style sheet nor the scripts nor the templates name a color."""
    ours = [STATIC / "pages.css", *(STATIC / "js").glob("*.js"), *(STATIC.parent / "templates").glob("*.html")]
    for path in ours:
        text = re.sub(r"&#\d+;|href=\"#[^\"]*\"", "", path.read_text(encoding="utf-8"))
        assert re.findall(r"#[0-9a-fA-F]{3,8}\b(?![\w-])|\brgba?\(|\bhsla?\(", text) == [], path.name


def test_nothing_is_asked_of_others() -> None:
    """No file of ours, nor of those that we carry, is loaded from elsewhere."""
    for path in [*STATIC.glob("*.css"), *STATIC.glob("vendor/*.css")]:
        assert not re.findall(r"url\(\s*['\"]?(?:https?:)?//|@import", path.read_text(encoding="utf-8")), path.name


def test_templates_only_repeat_and_choose() -> None:
    """What they show is decided elsewhere: no arithmetic of states, no looking into the gateway."""
    for path in (STATIC.parent / "templates").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        words = set(re.findall(r"{%-?\s*(\w+)", text))
        allowed = {
            "if",
            "elif",
            "else",
            "endif",
            "for",
            "endfor",
            "include",
            "extends",
            "block",
            "endblock",
            "from",
            "macro",
            "endmacro",
            "set",
        }
        assert words <= allowed, (path.name, words - allowed)
        assert not re.findall(r"{[{%][^}]*\bgateway\.", text), path.name
