"""The code in our documentation, as a reader would use it.

A fence runs as it stands, in the order of its page, in one shell: `bash` and `python`. `toml`, `json`, `ini` (settings) and `yaml`
are read by what reads them. With `title="NAME"` a fence is a file that the later ones find. A comment above a fence says otherwise:

    <!-- not run: why it cannot be -->
    <!-- client: openai==3.*, openai==2.54.* -->        `nox -s clients` runs it, once with each of these packages
    <!-- from PATH -->                                  it is a copy of a part of that file, which another test runs; with a
                                                        title the later fences of the page find it, too
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]
MODEL = "llama-3.2-1b"
GATEWAY, SERVER = "https://gateway.example", "http://192.0.2.7:8080"
"""What pages call the gateway and a model server."""
RUN = ("bash", "python")
READ = ("toml", "json", "ini", "yaml")
SHOWN = ("text", "nginx", "javascript", "promql")

_FENCE = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>not run|client|from):? (?P<words>[^\n]*?) -->\n+)?"
    r"^(?P<indent>[ ]*)```(?P<language>[a-z]+)(?P<more>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@attrs.frozen
class Snippet:
    """One fence: `mark` and `words` are those of the comment above it."""

    page: Path
    line: int
    language: str
    text: str
    title: str | None
    mark: str | None
    words: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Return every page, README and examples included."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets(page: Path) -> Iterator[Snippet]:
    """Return the fences of a page."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        indent = len(found["indent"])
        title = re.search(r'title="([^"]+)"', found["more"])
        yield Snippet(
            page,
            text.count("\n", 0, found.start("language")) + 1,
            found["language"],
            "".join(line[indent:] if line.strip() else line for line in found["text"].splitlines(keepends=True)),
            title[1] if title else None,
            found["mark"],
            found["words"] or "",
        )


def placed(text: str, places: Mapping[str, str]) -> str:
    """Replace the names that pages use by where things are now."""
    for name, place in places.items():
        text = text.replace(name, place)
    return text
