"""The prose of the project: what a person reads on the pages of the documentation, in messages, in templates and in docstrings.

Each `Prose` holds the text of one place in a file, without code: no fences, no `names`, no URLs and no placeholders.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import attrs

from support.rewording import is_prose

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "multiverse_gateway"
_ERRORS = re.compile(r"(?:Error|Exception|Required|Refusal|Setting|Parameter|refuse|unusable\w*|[a-z_]*error)$")
_LOG = {"debug", "info", "warning", "error", "exception", "critical", "log"}
_NOT_PROSE = ("stores/sqlite", "stores/postgres", "stores/schema")
"""Modules whose plain texts are mostly SQL: only the texts of their errors and log records are read."""


@attrs.frozen
class Prose:
    """A text with its place; `kind` is `page`, `template`, `script`, `message`, `error` or `docstring`."""

    path: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} ({self.kind})"


def everything() -> list[Prose]:
    """Return the prose of the whole project."""
    pages = [path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"]
    found = [prose for path in sorted([*pages, *(ROOT / "docs").rglob("*.md")]) for prose in paragraphs(path)]
    for path in sorted(PACKAGE.rglob("*.html")):
        found += template(path)
    for path in sorted(PACKAGE.rglob("*.py")):
        found += module(path)
    return found


def paragraphs(path: Path) -> Iterator[Prose]:
    """Yield the paragraphs, list items, headings and cells of a page."""
    text = re.sub(r"<!--.*?-->", _blank, path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^( *)```.*?^\1```", _blank, text, flags=re.DOTALL | re.MULTILINE)
    start, block = 1, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        begins = re.match(r"\s*(?:[-*#>|:=!]|\d+\.\s|$)", line)
        if begins and block:
            yield Prose(path, start, "page", plain(" ".join(block)))
            block = []
        if line.lstrip().startswith("|"):
            for cell in line.strip().strip("|").split("|"):
                yield Prose(path, number, "page", plain(cell.strip()))
        elif line.strip():
            start = start if block else number
            block.append(line.strip())


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]+", "", match[0])


def plain(text: str) -> str:
    """Return a text without code, targets of links and marks."""
    text = re.sub(r"``[^`]+``|`[^`]*`", "X", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\{[^}]*\}|https?://\S+|</?[a-z][^>]*>|:[a-z]+-[a-z-]+:", " ", text)
    return re.sub(r"[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}", "", text)


def template(path: Path) -> Iterator[Prose]:
    """Yield the lines of a template, without its tags."""
    text = re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}|<script.*?</script>|<[^>]*>", _blank, path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield Prose(path, number, "template", plain(line.strip()))


def attributes(path: Path) -> Iterator[Prose]:
    """Yield the texts in the attributes of a template that people see or hear."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for found in re.finditer(r'\b(?:placeholder|title|aria-label|data-label|data-busy|alt)="([^"]*)"', line):
            if text := plain(re.sub(r"\{\{.*?\}\}|\{%.*?%\}", " ", found[1])).strip():
                yield Prose(path, number, "template", text)


def script(path: Path) -> Iterator[Prose]:
    """Yield the texts of a script that read like sentences or labels."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        code = re.sub(r"(?:^|\s)//.*|/\*.*?\*/", "", line)
        for found in re.finditer(r'"((?:[^"\\]|\\.)*)"|`((?:[^`\\]|\\.)*)`', code):
            text = re.sub(r"\$\{[^}]*\}", "X", found[1] or found[2] or "")
            if re.match(r"[A-Z][a-z]+(?: |$)", text) or is_prose(text):
                yield Prose(path, number, "script", text)


def module(path: Path) -> Iterator[Prose]:
    """Yield the docstrings and the texts of a module that read like sentences."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_errors = path.relative_to(PACKAGE).as_posix().startswith(_NOT_PROSE)
    docstrings = {id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    errors = {id(text): kind for node in ast.walk(tree) if isinstance(node, ast.Call) and (kind := _speaks(node)) for text in _texts(node)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant | ast.JoinedStr) or id(node) in inside:
            continue
        text = written(node)
        if id(node) in docstrings:
            if text:
                yield Prose(path, node.lineno, "docstring", without_code(text))
        elif id(node) in errors:
            yield Prose(path, node.lineno, errors[id(node)], plain(text))
        elif is_prose(text) and not only_errors and not text.lstrip().startswith(("<", "SELECT", "INSERT", "UPDATE", "DELETE")):
            yield Prose(path, node.lineno, "message", plain(text))


def written(node: ast.expr) -> str:
    """Return a text, with `X` for each placeholder."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _speaks(call: ast.Call) -> str | None:
    """Return `error` for a call that makes an error, `message` for one that writes a log record, and `None` for any other."""
    name = ast.unparse(call.func)
    if isinstance(call.func, ast.Attribute) and call.func.attr in _LOG and "log" in name.lower():
        return "message"
    return "error" if _ERRORS.search(name) else None


def _texts(call: ast.Call) -> Iterator[ast.expr]:
    for argument in call.args:
        if isinstance(argument, ast.Constant | ast.JoinedStr) and " " in written(argument):
            yield argument


def without_code(text: str) -> str:
    """Return a docstring without examples and indented blocks."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*(?:>>>|\.\.\. )", line)]
    return plain("\n".join(lines))
