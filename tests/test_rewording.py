"""Sentences are for people: no part of the program decides anything by their words.

Every sentence of the package is replaced by other words in a process of its own, and servers that fail in many ways are registered,
tested and probed there. Whatever is not a sentence must be the same as before.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.rewording import Rewording, is_prose, reworded

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "multiverse_gateway"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


@contextmanager
def outcomes_of(words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that prints all outcomes, and see that it ends."""
    command = [sys.executable, "-m", "support.rewording", words]
    with subprocess.Popen(command, cwd=ROOT / "tests", stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.e2e
def test_other_words_change_nothing_but_the_words() -> None:
    """The failing step of both connection tests, states after probes, forms, error codes and exit codes stay as they are."""
    with outcomes_of("plain") as first, outcomes_of("reworded") as second:
        plain, other = (json.loads(process.communicate(timeout=60)[0]) for process in (first, second))
    assert other == plain
    assert plain["well"]["state"] == "healthy"
    assert plain["nowhere"]["test"] == [200, [["address", False]]]


def test_the_words_of_a_text_change_and_nothing_else() -> None:
    """White space, punctuation and placeholders stay; two equal texts become different ones."""
    text = "no connection: is it on, {name}? (%s)"
    first, second = reworded(text, "here"), reworded(text, "there")
    assert first != second
    assert "connection" not in first
    assert "{name}? (%s)" in first
    assert first.count(" ") == text.count(" ")


def test_sentences_are_reworded_and_names_are_not() -> None:
    """In plain and formatted texts, but neither in docstrings nor in patterns."""
    source = '''
def f(status):
    """Return what a person reads."""
    re.search("the words of others", x)
    return "application/json", f"status {status} is odd", "content-type", "the server is busy"
'''
    module = Rewording("module")
    changed = ast.unparse(module.visit(ast.parse(source)))
    assert module.count == 3, changed
    assert "Return what a person reads." in changed
    assert "the words of others" in changed
    assert "'application/json'" in changed
    assert "is busy" not in changed
    assert "is odd" not in changed


def comparisons(source: str) -> Iterator[str]:
    """Yield where a module compares a text with prose, or looks for a text in the words of an error."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            finds = any(map(_is_sentence, sides)) or (any(map(_is_message, sides)) and any(map(_is_constant, sides)))
            searches = isinstance(node.ops[0], ast.In | ast.NotIn) and any(map(_is_message, node.comparators))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            finds = node.func.attr in SEARCHES and any(map(_is_sentence, node.args))
            searches = node.func.attr in SEARCHES and _is_message(node.func.value)
        else:
            continue
        if finds or searches:
            yield f"{node.lineno}: {ast.unparse(node)}"


SEARCHES = {"count", "endswith", "find", "index", "partition", "removeprefix", "removesuffix", "replace", "split", "startswith"}
FOREIGN = {"stores/postgres_database.py"}
"""Modules that have nothing but the words of somebody else's error: libpq gives no code for a connection that fails."""


def _is_sentence(node: ast.expr) -> bool:
    """Return whether an expression is a text that reads like prose."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and is_prose(node.value)


def _is_constant(node: ast.expr) -> bool:
    """Return whether an expression names a constant."""
    return isinstance(node, ast.Name) and node.id.isupper()


def _is_message(node: ast.expr) -> bool:
    """Return whether an expression is the text of an error or a reason for people."""
    if isinstance(node, ast.Call):
        is_text = ast.unparse(node.func) == "str" and ast.unparse(node.args[0]) in ("error", "problem", "exception", "failure")
        return is_text or ast.unparse(node.func) in ("as_written", "message_of")
    return isinstance(node, ast.Attribute) and node.attr in ("message", "reason", "warning", "finding", "words")


@pytest.mark.parametrize("path", sorted({*FILES} - FOREIGN))
def test_no_module_compares_words(path: str) -> None:
    """Enums and fields say what happened; the text of an error is shown, never searched."""
    assert list(comparisons((SOURCE / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        'x = "host name leads nowhere" in reason',
        'x = "1 MiB" in str(error)',
        "x = mark in result.reason",
        'x = reason == "own listener"',
        'x = "the server" not in words',
        'x = message.replace("endpoint_url names an address", "This is an address")',
        'x = error.message.partition(";")',
        'x = message_of(error).partition(";")[0]',
        "x = failure.reason != JSON_FOR_STREAM",
    ],
)
def test_a_comparison_of_words_is_found(source: str) -> None:
    """The check sees each way in which this was done before."""
    assert list(comparisons(source)) != []
