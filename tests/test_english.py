"""What people read is plain American English: documentation, messages, templates and docstrings.

`codespell` knows common misspellings and British spellings, `proselint` clichés and redundant words. The rules here catch what a
native speaker would not write. Every text that breaks one is rewritten: there is no list of exceptions.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import attrs
import pytest

from support.prose import PACKAGE, Prose, attributes, everything, script, without_code
from support.require import require

WORDS_ONLY = {"page", "message", "error", "docstring", "template"}
TEXTS = WORDS_ONLY - {"template"}
SENTENCES = {"page", "message", "error"}
PAGE = {"template", "message", "script"}
TASTE = ("typography.", "lexical_illusions", "weasel_words.very", "needless_variants", "cliches.misc.gnu_diction")
"""Checks of proselint that judge typography, which code needs as it is, or forbid terms of the glossary ("last resort")."""


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@attrs.frozen
class Rule:
    """A pattern that no text of these kinds may contain, what to write instead, and a sentence that breaks the rule."""

    pattern: re.Pattern[str] = attrs.field(converter=_compiled)
    kinds: set[str]
    advice: str
    bad: str


RULES = [
    Rule(
        r"(?i)\bwho (?:only|waits|asks|hears|comes|came)\b",
        TEXTS,
        "name the client, the request or the person",
        "who only asks writes nothing",
    ),
    Rule(
        r"(?i)\b(?:be it|anew|lest|thus|hence|whoever|whomever|whilst|amongst|whereby|therein|thereof|hereby|albeit)\b",
        TEXTS,
        "use a plainer word",
        "the keys are sealed anew",
    ),
    Rule(r"\bTell whether\b", TEXTS, 'begin with "Return whether"', "Tell whether it is open."),
    Rule(r"\A(?:Tell|Say|Hear|Be) ", {"docstring"}, "begin with the field's verb", "Say why a server was chosen."),
    Rule(r"(?i)\bnot \w+ is (?:whether|what|how)\b", TEXTS, "put the subject first", "Not asked is whether the level is wanted."),
    Rule(r"(?i)\b(?:no|every)body\b", TEXTS, '"no client", "every server"', "nobody waits for it"),
    Rule(r"(?<![Tt]here )\bis no (?!longer\b|more\b|better\b)[a-z]", TEXTS, '"is not a …"', "The admin key is no client key."),
    Rule(r"(?i)\bcounts of use\b", TEXTS, '"usage counts"', "the counts of use"),
    Rule(
        r"(?i)\bdial(?:led|ling)\b|\b(?:mis)?spelt\b|\blearnt\b|\btowards\b|\bafterwards\b",
        WORDS_ONLY,
        "American spelling",
        "an address is dialled",
    ),
    Rule(
        r"(?i)\b(?:behaviour|colour|favour|neighbour|honour|licence|judgement|cancelled|cancelling|signalled|modelled|modelling)",
        WORDS_ONLY,
        "American spelling",
        "their behaviour",
    ),
    Rule(r"(?:^|[.:;] )(?:Who|What|Whatever|Whichever|Whoever) [^?.:]*[.;]", SENTENCES, "name the subject", "What they sent is lost."),
    Rule(r"\b([a-z]{2,}) \1\b", TEXTS, "drop the second one", "it is in the the log"),
]
PLAIN_IN_TESTS = {"nobody waits for it", "The admin key is no client key."}
"""Rules for what users read, which the docstrings of tests may break."""
FOR_TESTS = [rule for rule in RULES if "docstring" in rule.kinds and rule.bad not in PLAIN_IN_TESTS]
PAGE_WORDS = [
    Rule(r"(?i)\bprob(?:e|es|ed|ing)\b", PAGE, 'pages say "check"', "It did not pass its probe."),
    Rule(r"(?i)\bInference Gateway\b", PAGE, '"Multiverse Gateway"', "Multiverse Inference Gateway"),
    Rule(r"(?i)\bin flight\b", PAGE, '"running"', "4 in flight"),
    Rule(r"\btaken out\b|\bTaken out\b", PAGE, '"offline"', "Taken out"),
    Rule(r"\bEvery (?:model|status|owner|part|level)\b", PAGE, '"All …"', "Every model"),
    Rule(r"\bUsual order\b|\bReversed\b", PAGE, '"Ascending", "Descending"', "Usual order"),
    Rule(r"\bLeast level\b", PAGE, '"Level"', "Least level"),
    Rule(r"(?i)\blongest answer\b|\bmost tokens\b", PAGE, '"Max output tokens"', "Longest answer"),
    Rule(r"\bRequests at once\b", PAGE, '"Max concurrent requests"', "Requests at once"),
    Rule(r"\(needed\)|\bis needed\b", PAGE, '"required"', "Model name (needed)"),
    Rule(r"(?i)\bfor ever\b|\bas everybody\b", PAGE, '"never", "default"', "for ever"),
    Rule(r"\bNo such\b|\bno such (?:page|field|server|key)\b", PAGE, '"… not found"', "There is no such page"),
    Rule(r"\b(?:Look at it|Try it|Keep it|Make it|Go on)\b", PAGE, "name what the button does", "Try it"),
    Rule(r"(?i)\bpossible again\b", PAGE, '"Try again in 5 s."', "Possible again in 5 s."),
    Rule(r"\bnobody serves\b|\b(?:model|models) (?:is|are) served\b", PAGE, '"available", "no server for"', "every model is served"),
    Rule(r"(?i)\blet in\b|\bname found\b|\bone-token\b", PAGE, "use the terms of networks", "Let in"),
    Rule(r"\bstudent_id\b", PAGE, '"owner"', "the student_id"),
    Rule(r"\b[Ss]tands? (?:in|on|at)\b", PAGE, '"is in"', "It stands in its settings."),
    Rule(r"\bNothing was asked\b|\bUse of the last\b", PAGE, '"No requests yet", "Usage, last 30 days"', "Nothing was asked yet."),
    Rule(r"\bthat is over\b|\bWhose\b", PAGE, "say it in the terms of the glossary", "Whose is it?"),
]
VERBS = re.compile(
    r"(?i)\b(?:is|are|was|were|be|been|has|have|had|do|does|did|can|cannot|could|must|may|will|would|should|need|needs|"
    r"add|allow|know|knows|supports?|answer|ask|choose|close|compare|contain|contains|create|encode|ends?|fails?|failed|finds?|found|gave|gets?|give|go|holds?|install|"
    r"lacks?|leads?|leave|list|lists|load|looks?|made|make|means?|misses|name|names|open|pass(?:es)?|put|rejects?|refuses?|register|reload|remove|"
    r"repair|restore|run|runs|save|say|says|send|sent|set|sets|show|shows|spell|start|state|states|stop|takes?|tell|took|try|use|used|wait|want|write|wrote|"
    r"[a-z]+ed|ended|lost|broke)\b"
)


@cache
def prose() -> list[Prose]:
    """Return everything that is checked."""
    return everything()


def broken(rule: Rule, texts: list[Prose]) -> Iterator[str]:
    """Yield the places where a rule is broken, with the words."""
    for text in texts:
        if text.kind in rule.kinds:
            for found in rule.pattern.finditer(text.text):
                yield f"{text}: {found[0]!r}: {rule.advice}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.bad)
def test_texts_keep_the_rules(rule: Rule) -> None:
    """Each rule catches its own example, and nothing else in the project."""
    assert rule.pattern.search(rule.bad)
    assert list(broken(rule, prose())) == []


@cache
def shown_on_pages() -> list[Prose]:
    """Return the texts of the pages: templates, and the messages of their modules and scripts."""
    pages = PACKAGE / "pages"
    found = [text for text in prose() if text.path.is_relative_to(pages)]
    found += [text for path in sorted((pages / "templates").glob("*.html")) for text in attributes(path)]
    return found + [text for path in sorted((pages / "static" / "js").glob("*.js")) for text in script(path)]


@pytest.mark.parametrize("rule", PAGE_WORDS, ids=lambda rule: rule.bad)
def test_pages_keep_to_the_glossary(rule: Rule) -> None:
    """One word for one thing, the one that the field uses; each rule catches its own example."""
    assert rule.pattern.search(rule.bad)
    assert list(broken(rule, shown_on_pages())) == []


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if "docstring" in rule.kinds and rule.bad not in PLAIN_IN_TESTS], ids=lambda rule: rule.bad
)
def test_tests_and_benchmarks_keep_the_rules(rule: Rule) -> None:
    """Their docstrings are read as often as those of the package; some rules are about what users read, and hold there only."""
    assert list(broken(rule, docstrings_of_tests())) == []


@cache
def docstrings_of_tests() -> list[Prose]:
    """Return the docstrings of the tests and benchmarks."""
    root = PACKAGE.parents[1]
    return [
        Prose(path, getattr(node, "lineno", 1), "docstring", without_code(text))
        for directory in ("tests", "benchmarks")
        for path in sorted((root / directory).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for text in [ast.get_docstring(node)]
        if text
    ]


def test_every_error_is_a_sentence() -> None:
    """The text of an error has a verb: it says what happened, and what to do."""
    errors = [text for text in prose() if text.kind == "error" and len(text.text.split()) > 2]
    assert len(errors) > 50
    assert [str(text) for text in errors if not VERBS.search(text.text)] == []


def test_a_docstring_says_something() -> None:
    """A public name that has a docstring has more than four words: what the caller may rely on."""
    short = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {docstring}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
        for docstring in [ast.get_docstring(node)]
        if docstring and len(docstring.split()) <= 4
    ]
    assert short == []


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the prose of each file into a file of its own, on the same lines, and return the directory."""
    directory = tmp_path_factory.mktemp("prose")
    files: dict[str, dict[int, str]] = {}
    for text in prose():
        lines = files.setdefault(str(text).partition(":")[0], {})
        for number, line in enumerate(text.text.split("\n"), text.line):
            lines[number] = f"{lines.get(number, '')} {line}".strip()
    for name, lines in files.items():
        path = directory / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines.get(number, "") for number in range(1, max(lines) + 1)) + "\n", encoding="utf-8")
    return directory


def test_words_are_spelled_correctly(written: Path) -> None:
    """In American English."""
    require("codespell_lib", "the spelling of texts")
    command = [sys.executable, "-m", "codespell_lib", "--builtin", "clear,rare,en-GB_to_en-US", "."]
    done = subprocess.run(command, cwd=written, stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout == ""


def test_proselint_finds_nothing(written: Path) -> None:
    """No clichés, redundant or archaic words."""
    require("proselint", "the style of texts")
    command = [sys.executable, "-m", "proselint", "check", "--output-format", "json", "."]
    done = subprocess.run(command, cwd=written, stdout=subprocess.PIPE, text=True, check=False)
    files = json.loads(done.stdout)["result"]
    assert files
    hits = [
        f"{name.rpartition('/prose')[2]}:{hit['pos'][0]}: {hit['message']}"
        for name, file in files.items()
        for hit in file["diagnostics"]
        if not hit["check_path"].startswith(TASTE)
    ]
    assert hits == []
