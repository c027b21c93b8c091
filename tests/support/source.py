"""The source files of the package, and what they import, read off with plain `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import attrs

PACKAGE = "multiverse_gateway"
SOURCE = Path(__file__).parents[2] / "src"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in (SOURCE / PACKAGE).rglob("*.py"))
"""Paths of the source files, relative to `SOURCE`."""


@attrs.frozen
class Import:
    """One imported name, as a full dotted path, and where it stands."""

    target: str
    line: int
    in_function: bool

    def is_in(self, *modules: str) -> bool:
        """Return whether the name is one of these modules or lies in one."""
        return any(self.target == module or self.target.startswith(f"{module}.") for module in modules)


def imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Import]:
    """Find every import of a module, those under `if TYPE_CHECKING` too: they are arrows as well."""

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            yield from (Import(f"{base}.{alias.name}", node.lineno, in_function) for alias in node.names)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(tree, False)
