"""The commands of the README, for real, on small settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launched import DKD, child_environment, limit, run

from dkd.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "train.max_steps=3",
    "train.precision=fp32",
    "train.global_batch=32",
    "train.micro_batch=16",
    "data.image_size=16",
]


def test_help_answers_without_importing_torch():
    code = """
import sys
from dkd.cli import main
try:
    main(["--help"])
finally:
    print(sorted({"torch", "pydantic", "numpy"} & set(sys.modules)))
"""
    output = run([sys.executable, "-c", code]).stdout
    assert "examples:" in output
    assert output.splitlines()[-1] == "[]"


def test_help_has_one_line_for_each_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS.values():
        assert len(command.summary) <= 60
        assert [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"    {command.name} ")] == [
            command.summary
        ]


def completions(tmp_path, line):
    """Return what a shell is offered for `line` when its cursor is at the end, by argcomplete's protocol."""
    answer = tmp_path / "completions"
    protocol = {
        "_ARGCOMPLETE": "1",  # the command is the first word of the line
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())),
    }
    answer.unlink(missing_ok=True)
    process = subprocess.run(
        [sys.executable, "-m", "dkd"], cwd=ROOT, env=child_environment(**protocol), timeout=limit(60), check=False
    )
    assert process.returncode == 0
    return [word.rstrip() for word in answer.read_text().split("\n")]  # a space after the only word


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("dkd tr", ["train"]),
        ("dkd l", ["launch", "launch-check"]),
        ("dkd --v", ["--version"]),
        ("dkd train --ov", ["--overwrite"]),
        ("dkd train configs/quickstart.yaml train.epochs=1 --dr", ["--dry-run"]),
        ("dkd export --format ", ["safetensors", "torchvision", "onnx"]),
        ("dkd train configs/quickstart_t", ["configs/quickstart_teacher.yaml"]),
        ("dkd launch-check --seconds 9 configs/offi", ["configs/official/"]),
        ("dkd plan READ", [""]),  # no recipe
        ("dkd evaluate READ", ["README.md"]),
    ],
)
def test_a_shell_completes_commands_options_and_files(tmp_path, line, wanted):
    assert completions(tmp_path, line) == wanted


def test_a_shell_completes_all_commands(tmp_path):
    assert set(completions(tmp_path, "dkd ")) >= {*COMMANDS, "--help", "--version"}


def test_the_digits_are_scikit_learns_and_do_not_need_it_imported():
    """Its import takes as long as everything that a test does with them."""
    code = """
import sys
import numpy as np
from dkd.data import open_source
ours = [open_source("digits", training=training) for training in (True, False)]
print("sklearn" in sys.modules, "scipy" in sys.modules)
from sklearn.datasets import load_digits
digits = load_digits()
of_validation = np.arange(len(digits.target)) % 4 == 3
for source, chosen in zip(ours, (~of_validation, of_validation)):
    assert np.array_equal(source.labels, digits.target[chosen])
    pixels = np.stack([source.image(i).numpy() for i in range(len(source))])
    assert np.array_equal(pixels, np.round(digits.images[chosen, None] * (255 / 16)).astype(np.uint8).repeat(3, axis=1))
"""
    assert run([sys.executable, "-c", code]).stdout.split() == ["False", "False"]


@pytest.mark.parametrize("arguments", [["train", "--help"], ["evaluate", "--help"], ["inspect", "--help"]])
def test_every_command_explains_itself_with_examples(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["train", "--no-option", "x.yaml"], ["inspect", "--classes", "0", "resnet8"]],
)
def test_wrong_commands_end_with_code_2(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_one_rank_prints_what_a_dry_run_finds(tmp_path, capsys, monkeypatch):
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        words = ["configs/quickstart.yaml", "teacher.weights=random", f"run.dir={tmp_path / 'run'}", "--dry-run"]
        assert main(["train", *words]) == 0
        assert ("2 processes" in capsys.readouterr().out) == (rank == "0")


def test_one_rank_of_a_machine_prints_what_is_wrong_with_the_arguments(capsys, monkeypatch):
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as exit_:
            main(["train", "--no-option", "x.yaml"])
        assert exit_.value.code == 2
        assert ("--no-option" in capsys.readouterr().err) is printed


def test_inspect_lists_taps(capsys):
    assert main(["inspect", "wrn_16_1", "--image-size", "32", "--classes", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["block3", "64×8×8", "131,520"] for line in lines), lines
    assert main(["inspect", "--list"]) == 0
    assert "torchvision/resnet34" in capsys.readouterr().out
    assert main(["inspect", "wrn_16_3"]) == 2
    assert "did you mean" in capsys.readouterr().err


# Those of configs/official are checked by tests/unit/test_official_recipes.py; photos_*, whose images and teachers are
# the user's, by tests/unit/test_library_models.py.
OWN_RECIPES = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "configs").rglob("*.yaml")
    if "official" not in p.parts and not p.name.startswith("photos_")
)


@pytest.mark.parametrize("recipe", OWN_RECIPES)
def test_every_recipe_of_the_repository_is_valid(recipe):
    from dkd.config import load_recipe
    from dkd.preflight.models import model_problems

    loaded = load_recipe(ROOT / recipe)
    assert loaded.run.dir == f"runs/{loaded.run.name}"
    problems = [
        str(p)
        for p in model_problems(loaded, loaded.data.image_size or {"imagenet": 224}.get(loaded.data.transforms, 32), 64)
    ]
    assert all("no such file" in problem for problem in problems), problems  # a teacher that is not written yet


@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_options_of_training_work_together(tmp_path, compiled):
    """Compiled models (a minute's work for a compiler), gradient clipping, a teacher with its own input, a schedule of
    loss weights, no decay on norm and bias."""
    run(
        [
            *DKD,
            "train",
            "configs/quickstart.yaml",
            f"run.dir={tmp_path}/run",
            "teacher.weights=random",
            "teacher.input_size=32",
            "teacher.normalization={mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}",
            "losses.at.resize=map",
            "losses.kd=null",
            "losses.at.beta={start: 100, end: 0, schedule: cosine}",
            "losses.ce.label_smoothing=0.1",
            "optimizer.decay_norm_and_bias=false",
            "train.clip_grad_norm=1.0",
            f"train.compile.teacher={compiled}",
            f"train.compile.student={compiled}",
            "run.trackers=[]",
            "run.log_every=2",
            *TINY,
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 3]
    assert lines[0]["weight/at"] > lines[1]["weight/at"]
