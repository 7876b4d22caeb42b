"""The words of dkd: docstrings are sentences, and words that a reader has to translate are not used."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "dkd").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted(path for folder in ("launch", "configs") for path in (ROOT / folder).rglob("*") if path.is_file())
# A function's docstring begins with a verb, not with one of these.
NO_VERBS = {
    *(
        "A",
        "All",
        "An",
        "As",
        "At",
        "Behind",
        "By",
        "For",
        "From",
        "How",
        "In",
        "Its",
        "Of",
        "On",
        "One",
        "That",
        "The",
    ),
    *("Until", "What", "When", "Where", "Whether", "Which", "Why", "With"),
}
# Word: what to write instead.
WORDS = {
    "behind": "after",
    "go on": "continue, or resume",
    "goes on": "continues, or resumes",
    "going on": "running",
    "went on": "continued",
    "leave word": "report",
    "left word": "reported",
    "somebody": "a person, a user",
    "somebody's": "a user's",
    "tells of": "reports",
    "comes about": "happens",
}
PATTERN = re.compile(r"\b(" + "|".join(sorted(WORDS, key=len, reverse=True)) + r")\b", re.IGNORECASE)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_of_functions_begin_with_a_verb(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            first = re.split(r"\W", text)[0]
            assert first not in NO_VERBS, f"{name_of(path)}:{node.lineno}: {text.splitlines()[0]}"


@pytest.mark.parametrize("path", [*MODULES, *PAGES], ids=name_of)
def test_words_need_no_translation(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = PATTERN.search(line)
        assert not found, f"{name_of(path)}:{number}: {found.group()!r}: write {WORDS[found.group().lower()]}"
