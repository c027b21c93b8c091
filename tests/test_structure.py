"""How large the parts of the package may grow and what may share a name, read off the source with plain `ast`.

The exceptions are parts that are still too large, and names that still mean two things. Those lists may only shrink: a test fails when an
exception is no longer needed, too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

import attrs
import pytest

from support.source import FILES, PACKAGE, SOURCE, imports

MOST_LINES_OF_A_MODULE = 500
MOST_LINES_OF_A_CLASS = 350
MOST_ATTRIBUTES = 20

LARGE_CLASSES = {
    "settings.declaration.Settings",  # stays: one field per setting, and nothing but fields
    "api.response_types.ServerRecord",  # these stay: one field per field of the API, and nothing but fields
    "api.response_types.ServerDetail",
    "api.response_types.Registered",
    "core.health.state.Health",  # one too many, of which 13 are those that the stores keep
}


@attrs.frozen
class Class:
    """A class of the package: its dotted name without that of the package, and how large it is."""

    name: str
    lines: int
    attributes: frozenset[str]
    bases: tuple[str, ...] = ()
    """The names of the classes that it inherits from, as they are written."""

    @property
    def is_large(self) -> bool:
        """Return whether it has too many lines or instance attributes."""
        return self.lines > MOST_LINES_OF_A_CLASS or len(self.attributes) > MOST_ATTRIBUTES


def module_of(path: str) -> str:
    """Return the dotted name of a source file, its path relative to `src`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def classes(tree: ast.AST, module: str) -> Iterator[Class]:
    """Find every class of a module, those inside functions and classes too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            bases = tuple(ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases)
            yield Class(f"{module}.{node.name}", lines, frozenset(attributes(node)), bases)


def with_inherited(found: Iterable[Class]) -> list[Class]:
    """Add to each class the attributes of the classes that it inherits from, directly or through others, if they are among those found.

    A base with a private name is looked for in the same module; a public name stands once in the package.
    """
    all_of_them = list(found)
    by_name = {each.name.rpartition(".")[2]: each for each in all_of_them} | {each.name: each for each in all_of_them}

    def inherited(each: Class) -> frozenset[str]:
        module = each.name.rpartition(".")[0]
        bases = [by_name.get(f"{module}.{base}") or by_name.get(base) for base in each.bases]
        return each.attributes.union(*(inherited(base) for base in bases if base is not None and base is not each))

    return [attrs.evolve(each, attributes=inherited(each)) for each in all_of_them]


def attributes(node: ast.ClassDef) -> Iterator[str]:
    """Find the instance attributes of a class: fields that it declares, its slots, and what its methods set on `self`."""
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and "ClassVar" not in ast.unparse(part.annotation):
            yield part.target.id
        elif isinstance(part, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__slots__" for target in part.targets):
            yield from ast.literal_eval(part.value)
        elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (
                inner.attr
                for inner in ast.walk(part)
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self"
            )


def shared(names: Iterable[tuple[str, str]]) -> Mapping[str, list[str]]:
    """Return the names that stand in several places, each with these places; `names` are pairs of a name and a place."""
    places = defaultdict(list)
    for name, place in names:
        places[name].append(place)
    return {name: found for name, found in places.items() if len(found) > 1}


def arrows(sources: Mapping[str, str]) -> Mapping[str, set[str]]:
    """Return the modules that each module imports, inside functions and for type checkers too; `sources` are texts by path."""
    modules = {module_of(path) for path in sources}
    found: dict[str, set[str]] = {}
    for path, source in sources.items():
        module = module_of(path)
        targets = (each.target for each in imports(ast.parse(source), module, is_package=path.endswith("/__init__.py")))
        found[module] = {part for part in (_module_in(target, modules) for target in targets) if part not in (None, module)}
    return found


def _module_in(target: str, modules: set[str]) -> str | None:
    """Return the module that an imported name stands in; `None` if it is not ours."""
    if target in modules:
        return target
    parent = target.rpartition(".")[0]
    return parent if parent in modules else None


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of an import cycle, the first one again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


SOURCES = {path: (SOURCE / path).read_text(encoding="utf-8") for path in FILES}
CLASSES = with_inherited(
    found
    for path, source in SOURCES.items()
    for found in classes(ast.parse(source), module_of(path).removeprefix(PACKAGE).removeprefix("."))
)


def test_modules_are_short() -> None:
    """A module has at most 500 lines."""
    long = {module_of(path).removeprefix(f"{PACKAGE}.") for path, text in SOURCES.items() if text.count("\n") > MOST_LINES_OF_A_MODULE}
    assert long == set()


def test_classes_are_small() -> None:
    """A class has at most 20 instance attributes, inherited ones among them, and 350 lines."""
    assert {found.name for found in CLASSES if found.is_large} == LARGE_CLASSES


def test_a_class_name_means_one_thing() -> None:
    """The name of a public class stands once in the package."""
    names = ((found.name.rpartition(".")[2], found.name) for found in CLASSES)
    assert shared((name, place) for name, place in names if not name.startswith("_")) == {}


def test_a_module_name_means_one_thing() -> None:
    """The name of a module stands once in the package, so that it says which module is meant."""
    names = ((module_of(path).rpartition(".")[2], path) for path in FILES)
    assert shared(names) == {}


def test_no_imports_go_in_circles() -> None:
    """No module imports, through others, itself."""
    assert cycle(arrows(SOURCES)) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class Point:\n    x: int\n    y: int = 0\n    origin: ClassVar[int] = 0\n    name = 'point'", {"x", "y"}),
        ("class Point:\n    __slots__ = ('x', 'y')", {"x", "y"}),
        ("class Point:\n    def __init__(self, at):\n        self.x, self.y = at\n        at.z = self.w", {"x", "y"}),
        ("class Point:\n    async def move(self):\n        self.x: int = 1\n        self.y += 1\n        self.x.z = 1", {"x", "y"}),
        ("class Way:\n    def back(self):\n        class Point:\n            x: int", set()),
    ],
)
def test_instance_attributes_are_found(source: str, expected: set[str]) -> None:
    """Declared fields, slots and assignments to `self` count; what belongs to the class or to another object does not."""
    (found, *_) = classes(ast.parse(source), "space")
    assert found.attributes == expected


def test_inherited_attributes_count() -> None:
    """Those of a base count, whether it stands in the same module or not, and those of its own bases; a name outside does not matter."""
    first = classes(ast.parse("class Point(Protocol):\n    x: int\nclass _Far(Point):\n    y: int"), "space")
    second = classes(ast.parse("class Solid(_Far, space.Point[int]):\n    z: int\nclass _Far:\n    w: int"), "bodies")
    found = {each.name: each.attributes for each in with_inherited([*first, *second])}
    assert found == {"space.Point": {"x"}, "space._Far": {"x", "y"}, "bodies.Solid": {"z", "w", "x"}, "bodies._Far": {"w"}}


def test_a_large_class_is_found() -> None:
    """The limits themselves are allowed."""
    fields = "".join(f"    x{number}: int\n" for number in range(MOST_ATTRIBUTES))
    lines = "    pass\n" * (MOST_LINES_OF_A_CLASS - 1)
    for body, is_large in ((fields, False), (fields + "    y: int\n", True), (lines, False), (lines + "    pass\n", True)):
        assert [found.is_large for found in classes(ast.parse(f"class Point:\n{body}"), "space")] == [is_large]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a.py": "import b", "b.py": "from c import x", "c.py": "import os"}, set()),
        ({"a.py": "import b", "b.py": "from c import x", "c.py": "def f():\n    import a"}, {"a", "b", "c"}),
        ({"a.py": "import b", "b.py": "if TYPE_CHECKING:\n    from a import x"}, {"a", "b"}),
        ({"p/__init__.py": "from p.a import x", "p/a.py": "from p import b", "p/b.py": ""}, set()),
        ({"p/__init__.py": "from .a import x", "p/a.py": "from . import y"}, {"p", "p.a"}),
    ],
)
def test_a_circle_is_found(sources: Mapping[str, str], expected: set[str]) -> None:
    """Imports inside functions and for type checkers count; an import of a module does not count as one of its package."""
    assert set(cycle(arrows(sources))) == expected
