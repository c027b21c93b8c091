"""The package with every sentence reworded: an import hook that replaces the words of each text that reads like prose.

Two texts that are equal before are different after: each one's new words depend on where it is written. So whatever compares texts, or
looks for one in another, sees something else than before.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from hashlib import blake2b
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

PACKAGE = "multiverse_gateway"
_PROSE = re.compile(r"[a-z]{2,},? (?:[a-z]|\{|\x00|/)|\x00 [a-z]{2,}|[a-z]{2,} \x00")
_WORD = re.compile(r"%[a-z]|\{[^}]*\}|[A-Za-z]{2,}")
_LEFT_ALONE = ("stores.sqlite", "stores.postgres", "observability.")
"""Modules whose texts are SQL, or formats of the log and of metrics."""


def is_prose(text: str) -> bool:
    """Return whether a text reads like a sentence or a part of one, and not like a name, a path or a header."""
    return _PROSE.search(text) is not None


def reworded(text: str, place: str) -> str:
    """Return a text with other words, which depend on `place`; white space, punctuation and placeholders stay."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        if not word.isalpha():
            return word
        digest = blake2b(f"{place} {match.start()}".encode(), digest_size=6).hexdigest()
        letters = digest.translate(str.maketrans("0123456789", "ghijklmnop"))
        return letters.capitalize() if word[0].isupper() else letters

    return _WORD.sub(other, text)


class Rewording(ast.NodeTransformer):
    """Reword the texts of one module, but for its docstrings, patterns and annotations."""

    def __init__(self, module: str) -> None:
        self._module = module
        self.count = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Leave patterns alone: they are matched with texts of others."""
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id == "re":
            return node
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        """Leave docstrings alone."""
        return node if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Reword all parts of a formatted text, or none."""
        self.generic_visit_values(node)
        whole = "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        if is_prose(whole):
            for part in node.values:
                if isinstance(part, ast.Constant):
                    part.value = self._other(part)
        return node

    def generic_visit_values(self, node: ast.JoinedStr) -> None:
        """Visit the expressions inside a formatted text."""
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                part.value = self.visit(part.value)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Reword a plain text."""
        if isinstance(node.value, str) and is_prose(node.value):
            node.value = self._other(node)
        return node

    def _other(self, node: ast.Constant) -> str:
        self.count += 1
        return reworded(str(node.value), f"{self._module} {node.lineno} {node.col_offset}")


class Loader(SourceFileLoader):
    """Compile a module with other words; nothing is written to disk."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the module's code."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        if not fullname.removeprefix(f"{PACKAGE}.").startswith(_LEFT_ALONE):
            tree = Rewording(fullname).visit(tree)
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class Finder(MetaPathFinder):
    """Find the modules of the package for `Loader`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the usual spec, with our loader."""
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(fullname, spec.loader.path)
        return spec


def install() -> None:
    """Let every import of the package from now on bring other words."""
    assert PACKAGE not in sys.modules
    sys.meta_path.insert(0, Finder())


if __name__ == "__main__":  # python -m support.rewording plain|reworded
    if sys.argv[1] == "reworded":
        install()
    from support import outcomes

    outcomes.print_all()
