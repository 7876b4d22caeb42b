"""The examples of docs/guides/own_*.md, run as they stand there: the module written to a file, the command started
beside it."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import launched
import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["train.epochs=1", "train.max_steps=2", "run.trackers=[]", "teacher.weights=random", "data.workers=0"]


@pytest.fixture(params=["own_loss", "own_model", "own_data"])
def example(request, tmp_path):
    """Page, commands and YAML of one page; its module lies in a folder beside configs/."""
    page = (ROOT / "docs" / "guides" / f"{request.param}.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        if (named := re.match(r"# (\w+\.py)\n", block)) is not None:
            (tmp_path / named[1]).write_text(block)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = [
        shlex.split(line, comments=True)
        for line in re.findall(r"^    (dkd .*)$", page.replace("\\\n", " "), re.MULTILINE)
    ]
    described, *_ = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    return request.param, tmp_path, commands, described


def run(folder, *arguments):
    return launched.run([*launched.DKD, *arguments], check=False, cwd=folder)


def check_losses_that_train(folder, commands):
    """Losses with parameters train, accumulated too, and leave none of their parameters in the student."""
    for number, (command, name) in enumerate(zip(commands, ("my_fitnet", "my_nce"), strict=True)):
        run_dir = folder / f"trained{number}"
        more = ["train.micro_batch=32", "optimizer.adapters.lr=0.02"]
        result = run(folder, *command[1:], *SHORT, *more, f"run.dir={run_dir}")
        assert result.returncode == 0, result.stderr[-3000:]
        first, second = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][:2]
        assert first[name] != second[name] > 0
        assert f"the loss {name} trains" in result.stderr
        assert not [key for key in load_file(run_dir / "student.safetensors") if "regress" in key or "losses" in key]


def test_the_example_trains_and_is_used(example):
    """The page's own command, shortened; and the recipe with the page's YAML in it."""
    page, folder, commands, described = example
    trains, *others = [command for command in commands if command[:2] == ["dkd", "train"] and len(command) > 3]
    assert len(others) == (2 if page == "own_loss" else 0)
    teacher = [] if page == "own_data" else SHORT
    shortened = [*trains[1:], *(teacher or [o for o in SHORT if not o.startswith("teacher")]), f"run.dir={folder}/run"]
    result = run(folder, *shortened)
    assert result.returncode == 0, result.stderr[-3000:]
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    recipe = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    if page == "own_loss":
        assert logged[0]["positions"] > 0
        assert logged[0]["weight/positions"] == 10
        assert described["losses"]["custom"][0]["loss"] == recipe["losses"]["custom"][0]["loss"]
        check_losses_that_train(folder, others)
        for name, loss in (("my_projected:ProjectedInfoNCE", 4), ("my_fitnet:FitNet", 0)):
            found = [command for command in commands if command[2:3] == [name]]
            assert bool(found) == bool(loss)
            for command in found:
                checked = run(folder, *command[1:])
                assert checked.stdout.endswith("the loss is the same on 1 and on 2 processes\n"), checked.stderr[-2000:]
        (check,) = [command for command in commands if command[2:3] == ["my_contrast:InfoNCE"]]
        checked = run(folder, *check[1:-1], "2")  # of 4 processes
        assert checked.returncode == 0, checked.stderr[-2000:]
        assert checked.stdout.endswith("the loss is the same on 1 and on 2 processes\n")
        (check,) = [command for command in commands if command[2:3] == ["my_relations:RelativeProducts"]]
        checked = run(folder, *check[1:])
        assert checked.returncode == 0, checked.stderr[-2000:]
        assert checked.stdout.endswith("the loss is the same on 1 and on 2 processes\n")
        spec = importlib.util.spec_from_file_location("my_relations", folder / "my_relations.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loss, generator = module.RelativeProducts(), torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
        assert torch.autograd.gradcheck(lambda q: loss(q, teacher), student.requires_grad_())
    elif page == "own_model":
        assert (recipe["student"]["name"], recipe["student"]["options"]) == (
            described["student"]["name"],
            described["student"]["options"],
        )
        (inspects,) = [command for command in commands if command[1] == "inspect"]
        shown = run(folder, *inspects[1:]).stdout
        assert re.search(r"down +32×16×16", shown), shown
        assert run(folder, "export", folder / "run", "--format", "onnx").returncode == 2  # code, not trusted
        exported = run(folder, "export", folder / "run", "--format", "onnx", "--trust-code")
        assert exported.returncode == 0, exported.stderr[-2000:]
    else:
        assert recipe["data"]["train"] == described["data"]["train"] == "python:my_data:stripes"
        evaluation = next(line["evaluation"] for line in logged if "evaluation" in line)
        assert evaluation["samples"] == 128
        refused = run(folder, "evaluate", folder / "run")
        assert refused.returncode == 2
        assert "allow it with --trust-code" in refused.stderr
        assert run(folder, "evaluate", folder / "run", "--trust-code").returncode == 0
        report = run(folder, "report", folder / "run")
        assert report.returncode == 0, report.stderr[-2000:]
        assert "allow it with --trust-code" in (folder / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("module", "overrides", "said"),
    [
        (
            "",
            ['losses.custom=[{name: mine, loss: "gone:Loss", weight: 1, of: labels}]'],
            "losses.custom.0.loss: 'gone:Loss': cannot import",
        ),
        ("x = 1", ['losses.custom=[{name: mine, loss: "my_code:y", weight: 1, of: labels}]'], "has no callable 'y'"),
        (
            "class A:\n    def __init__(self, n):\n        raise RuntimeError('no')",
            ['losses.custom=[{name: mine, loss: "my_code:A", weight: 1, of: labels, options: {n: 1}}]'],
            "cannot be made with options {'n': 1}: RuntimeError: no (my_code.py:3)",
        ),
        (
            "from torch import nn\ndef a():\n    return nn.Linear(2, 2)",
            ['losses.custom=[{name: mine, loss: "my_code:a", weight: 1, of: labels}]'],
            "fails on 2 random samples: TypeError: Linear.forward() got an unexpected keyword argument 'layout'",
        ),
        ("", ['losses.custom=[{name: ce, loss: "a:b", weight: 1, of: labels}]'], "name 'ce' is taken"),
        ("", ['losses.custom=[{name: mine, loss: "a:b", weight: 1}]'], "of: features needs pairs"),
        (
            "",
            ['losses.custom=[{name: mine, loss: "a:b", weight: 1, of: labels, piars: []}]'],
            "unknown key; did you mean",
        ),
        (
            "",
            [
                "losses.custom=[{name: m, loss: 'a:b', weight: 1, of: labels}, {name: m, loss: 'a:b', weight: 1, of: "
                "labels}]"
            ],
            "two losses of one name",
        ),
        ("", ["data.train=python:gone:data"], "data.train: 'gone:data': cannot import 'gone'"),
        ("def data(training):\n    return [1]", ["data.train=python:my_code:data"], "returned list, without `labels`"),
        (
            "class D(list):\n    labels = [0, 1] * 40\ndef data(training):\n    return D([7] * 80)",
            ["data.train=python:my_code:data", "data.validation=python:my_code:data"],
            "image 0 of my_code:data cannot be read",
        ),
    ],
)
def test_mistakes_in_ones_own_code_are_one_line_and_exit_code_2(tmp_path, module, overrides, said):
    (tmp_path / "my_code.py").write_text(module)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    result = run(
        tmp_path, "train", "configs/quickstart.yaml", "teacher.weights=random", f"run.dir={tmp_path}/run", *overrides
    )
    assert result.returncode == 2, result.stderr[-2000:]
    assert said in result.stderr
    assert all(line.startswith("dkd: ") for line in result.stderr.splitlines()), result.stderr
