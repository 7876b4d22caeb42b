"""The pages of the documentation: links, anchors, width, and what they quote from the code."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dkd.config.reference import recipe_keys, replace_generated

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "configs").rglob("*.md")], key=lambda page: page.as_posix()
)
COMMANDS = (
    "new",
    "distill",
    "train",
    "teach",
    "cache",
    "launch",
    "evaluate",
    "status",
    "inspect",
    "plan",
    "find-lr",
    "compare",
    "report",
    "export",
    "check-loss",
    "launch-check",
    "files",
)
# A page that `python -m benchmarks.cifar10_short` writes, and one whose lines are as wide as the code's.
OTHER_WIDTH = {"configs/official/cifar10_short/results.md"}


def name(page):
    return page.relative_to(ROOT).as_posix()


def prose(text):
    """Return the page without blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and most renderers make them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_an_anchor(page):
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            problems.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file):
            problems.append(f"{target}: no such heading")
    assert not problems


def test_links_are_found():
    """The check above is not empty."""
    assert sum(len(re.findall(r"\]\([^)]+\)", page.read_text())) for page in PAGES) > 100


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) not in OTHER_WIDTH], ids=name)
def test_lines_are_at_most_100_characters_wide(page):
    """Tables, pictures and code are as wide as they must be."""
    free = ("|", "!", "    ")
    wide = [line for line in prose(page.read_text()).splitlines() if len(line) > 100 and not line.startswith(free)]
    assert not wide


def test_the_index_names_every_page():
    linked = {
        (DOCS / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)]+)\)", (DOCS / "index.md").read_text())
    }
    assert [name(page) for page in sorted(DOCS.rglob("*.md")) if page not in linked and page.name != "index.md"] == []


def test_the_reference_of_the_recipe_is_what_the_schema_says():
    page = (DOCS / "reference" / "recipe.md").read_text()
    assert page == replace_generated(page), "run: python -m dkd.config.reference docs/reference/recipe.md"


def test_every_key_of_the_recipe_has_a_meaning():
    assert [key.path for _, keys in recipe_keys() for key in keys if not key.meaning] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_documented(command):
    shown = subprocess.run(
        [sys.executable, "-m", "dkd", command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    usage = shown[: shown.index("\n\n")]
    page = (DOCS / "reference" / "commands.md").read_text()
    section = page[page.index(f"## dkd {command}\n") :].split("\n## ")[0]
    options = set(re.findall(r"--[a-z-]+", usage))
    assert options <= set(re.findall(r"--[a-z-]+", section))


def strings_of_the_code():
    """Return all texts in the code and the scripts; the fields of f-strings are replaced by a zero byte."""
    found = []
    for path in sorted((ROOT / "dkd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found + [path.read_text() for path in sorted((ROOT / "launch").rglob("*")) if path.is_file()]


def test_the_messages_of_the_troubleshooting_page_are_messages_of_the_code():
    """`…` stands for names and numbers; the words between must follow each other in one text of the code."""
    texts = strings_of_the_code()
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = [
        " ".join(message.split())
        for item in re.findall(r"^- ((?:`[^`]+`(?:,\s)?)+):\s", page, re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", item)
    ]
    assert len(quoted) == len(re.findall(r"^- `", page, re.MULTILINE)) + 1  # one entry has two messages
    unknown = []
    for message in quoted:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        if not any(pattern.search(text) for text in texts):
            unknown.append(message)
    assert not unknown, "no longer messages of the code:\n" + "\n".join(unknown)


def test_the_lines_of_metrics_are_json():
    page = (DOCS / "reference" / "metrics.md").read_text()
    blocks = re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)
    kinds = [set(json.loads(block)) for block in blocks]
    assert len(kinds) == 4
    assert "loss" in kinds[0]
    assert ["evaluation" in kinds[1], "checkpoint" in kinds[2], "skipped" in kinds[3]] == [True] * 3


def test_paths_in_the_pages_exist():
    """What a page names as a file or folder of the repository is there."""
    problems = []
    for page in PAGES:
        for path in re.findall(
            r"(?<![\w/.])((?:dkd|launch|configs|benchmarks|tests|docs)/[\w./-]*\w)", page.read_text()
        ):
            if not (ROOT / path).exists():
                problems.append(f"{name(page)}: {path}")
    assert problems == []
