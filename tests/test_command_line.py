"""The commands of the README, for real, on small settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launched import child_environment, limit

from dkd import load_student
from dkd.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "train.max_steps=3",
    "train.precision=fp32",
    "train.global_batch=32",
    "train.micro_batch=16",
    "data.image_size=16",
]


def run(*command, cwd=ROOT):
    result = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=limit(300),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def launch(processes, *arguments):
    return run(
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml", "--num_processes", processes,
        "--main_process_port", 0, "-m", "dkd", *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher written on one process, a student distilled from it on two: the two commands of the README."""
    folder = tmp_path_factory.mktemp("runs")
    run(sys.executable, "-m", "dkd", "train", "configs/quickstart_teacher.yaml", f"run.dir={folder}/teacher", *TINY)
    output = launch(
        2, "train", "configs/quickstart.yaml", f"run.dir={folder}/student", f"teacher.weights={folder}/teacher/student.safetensors",
        "train.ema={decay: 0.5}", "data.workers=1", *TINY,
    )  # fmt: skip
    return folder, output


def test_a_run_directory_holds_what_it_promises(runs):
    folder, output = runs
    student = folder / "student"
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3]
    assert {"loss", "ce", "at", "sp", "kd", "lr", "images_per_second", "data_wait", "sp_row_difference"} <= set(
        lines[0]
    )
    total = sum(lines[0][f"weight/{term}"] * lines[0][term] for term in ("ce", "at", "sp", "kd"))
    assert total == pytest.approx(lines[0]["loss"], rel=1e-6)
    assert yaml.safe_load((student / "recipe.yaml").read_text())["train"]["max_steps"] == 3
    (provenance,) = json.loads((student / "provenance.json").read_text())
    assert provenance["world_size"] == 2
    assert "train.max_steps=3" in provenance["command"]
    assert provenance["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert list(student.glob("tensorboard/**/events.out.tfevents.*"))
    assert [path.name for path in (student / "checkpoints").iterdir()] == ["step_00000003"]
    assert "quickstart: 78,042 parameters, 2 processes" in output.stderr
    assert output.stderr.count("finished in") == 1  # one process speaks


def test_the_finished_student_loads_without_the_trainer(runs):
    folder, _ = runs
    model = load_student(folder / "student")
    description = json.loads((folder / "student" / "student.json").read_text())
    assert description["architecture"] == {"name": "resnet8", "classes": 10, "norm": None, "options": {}}
    assert description["weights"] == "average"
    assert description["evaluation"]["samples"] == 449
    assert description["parameters"] == sum(p.numel() for p in model.parameters())
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_evaluation_repeats_what_training_measured(runs, capfd):
    folder, _ = runs
    measured = json.loads((folder / "student" / "student.json").read_text())["evaluation"]
    assert main(["evaluate", str(folder / "student"), "evaluation.batch=100"]) == 0
    alone = json.loads(capfd.readouterr().out.splitlines()[-1])
    checkpoint = folder / "student" / "checkpoints" / "step_00000003"
    together = json.loads(launch(2, "evaluate", checkpoint, "evaluation.batch=7").stdout.splitlines()[-1])
    for evaluation in (alone, together):
        assert [evaluation[key] for key in ("samples", "top1_correct", "top5_correct")] == [
            measured[key] for key in ("samples", "top1_correct", "top5_correct")
        ]
        assert evaluation["loss"] == pytest.approx(measured["loss"], rel=1e-5)


def test_what_cannot_be_evaluated_is_said(runs, tmp_path, capsys):
    folder, _ = runs
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "belongs to no run" in capsys.readouterr().err
    assert main(["evaluate", str(folder / "student"), "data.validation=no/such.parquet"]) == 2
    assert "no file matches 'no/such.parquet'" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text((folder / "student" / "recipe.yaml").read_text())
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "student.json" in capsys.readouterr().err


def test_help_answers_without_importing_torch():
    code = """
import sys
from dkd.cli import main
try:
    main(["--help"])
finally:
    print(sorted({"torch", "pydantic", "numpy"} & set(sys.modules)))
"""
    output = run(sys.executable, "-c", code).stdout
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
        ("dkd l", ["launch-check"]),
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
    assert run(sys.executable, "-c", code).stdout.split() == ["False", "False"]


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


def test_inspect_lists_taps(capsys):
    assert main(["inspect", "wrn_16_1", "--image-size", "32", "--classes", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["block3", "64×8×8", "131,520"] for line in lines), lines
    assert main(["inspect", "--list"]) == 0
    assert "torchvision/resnet34" in capsys.readouterr().out
    assert main(["inspect", "wrn_16_3"]) == 2
    assert "did you mean" in capsys.readouterr().err


# Those of configs/official are checked by tests/test_official_recipes.py.
OWN_RECIPES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml") if "official" not in p.parts)


@pytest.mark.parametrize("recipe", OWN_RECIPES)
def test_every_recipe_of_the_repository_is_valid(recipe):
    from dkd.config import load_recipe
    from dkd.preflight.checks import model_problems

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
        sys.executable, "-m", "dkd", "train", "configs/quickstart.yaml", f"run.dir={tmp_path}/run", "teacher.weights=random",
        "teacher.input_size=32", "teacher.normalization={mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}", "losses.at.resize=map",
        "losses.kd=null", "losses.at.beta={start: 100, end: 0, schedule: cosine}", "losses.ce.label_smoothing=0.1",
        "optimizer.decay_norm_and_bias=false", "train.clip_grad_norm=1.0", 
        f"train.compile.teacher={compiled}", f"train.compile.student={compiled}",
        "run.trackers=[]", "run.log_every=2", *TINY,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 3]
    assert lines[0]["weight/at"] > lines[1]["weight/at"]
