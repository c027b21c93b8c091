"""The pictures of the documentation are those that `nox -s screenshots` takes."""

from __future__ import annotations

import re
from pathlib import Path

from browser.pictures import IMAGES, PICTURES

ROOT = Path(__file__).parents[2]
LIMIT = 700_000
"""Bytes of all pictures together: a clone and a page load pay for them."""


def test_every_picture_is_taken_by_the_session_and_shown_somewhere() -> None:
    """None is stale, none is missing, none is left over."""
    there = {path.stem for path in IMAGES.glob("*.webp")}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"images/([a-z-]+)\.webp", page.read_text())}
    assert there == set(PICTURES)
    assert shown == there


def test_the_pictures_are_small() -> None:
    """All together."""
    assert sum(path.stat().st_size for path in IMAGES.glob("*.webp")) < LIMIT
