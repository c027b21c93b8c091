"""The files that pages load."""

from __future__ import annotations

import re

from multiverse_gateway.pages.assets import STATIC, load_assets

BUDGET = 60_000
"""Bytes of scripts on a page, as they travel."""
OF_THE_API_DOCS = {"vendor/swagger-ui-bundle.js", "js/docs.js"}
"""Only /docs loads them."""


def test_the_scripts_of_a_page_stay_within_their_budget() -> None:
    """All of ours and HTMX together; the reader of the API's description stands alone."""
    files = load_assets().files
    scripts = {name: len(asset.packed) for name, asset in files.items() if name.endswith(".js") and name not in OF_THE_API_DOCS}
    assert sum(scripts.values()) < BUDGET, scripts


def test_colours_stand_in_one_place() -> None:
    """Neither the pages' style sheet nor the scripts nor the templates name a colour."""
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
