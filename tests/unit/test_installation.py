"""The command that adds an extra, for each way of installing dkd; and the targets that `make help` lists."""

import json
import re
import shlex

import pytest
from launched import ROOT, run

from dkd.installation import command_for


def test_a_clone_stays_editable(tmp_path):
    assert command_for("timm") == f"pip install -e '{ROOT}[timm]'"
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    assert shlex.split(command_for("timm", source=clone))[-1] == f"{clone}[timm]"


@pytest.mark.parametrize(
    ("origin", "requirement"),
    [
        ("", "dkd[onnx]"),
        ("no JSON", "dkd[onnx]"),
        ("[1]", "dkd[onnx]"),
        ({"url": "file:///wheels/dkd.whl", "archive_info": {}}, "dkd[onnx] @ file:///wheels/dkd.whl"),
        ({"url": "https://host/dkd.git", "vcs_info": {"vcs": "git"}}, "dkd[onnx] @ git+https://host/dkd.git"),
        (
            {"url": "https://host/dkd.git", "vcs_info": {"vcs": "git", "requested_revision": "v1"}},
            "dkd[onnx] @ git+https://host/dkd.git@v1",
        ),
    ],
)
def test_another_installation_comes_from_where_it_came_from(tmp_path, origin, requirement):
    text = origin if isinstance(origin, str) else json.dumps(origin)
    assert shlex.split(command_for("onnx", source=tmp_path, origin=text)) == ["pip", "install", requirement]


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE).group(1).split())
    assert set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE)) == targets
    shown = run(["make", "--no-print-directory", "help"]).stdout
    assert {line.split()[1] for line in shown.splitlines() if line.startswith("make ")} == targets
