"""Commands on two ranks of a real launch: what they write, what they print, and how they end."""

import json
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from launched import DKD, Launch, accelerate_command, limit, run, torchrun_command

from dkd import load_student
from dkd.cli import main
from dkd.data import open_source

TINY = [
    "train.max_steps=3",
    "train.precision=fp32",
    "train.global_batch=32",
    "train.micro_batch=16",
    "data.image_size=16",
]


ALONE = [
    "teacher=null",
    "losses={}",
    "run.trackers=[]",
    "train.precision=fp32",
    "train.global_batch=448",
    "data.image_size=8",
    "train.max_steps=2",
]


def launch(processes, *arguments):
    return run(accelerate_command(processes, "-m", "dkd", *arguments))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher written on one process, a student distilled from it on two: the two commands of the README."""
    folder = tmp_path_factory.mktemp("runs")
    run([*DKD, "train", "configs/quickstart_teacher.yaml", f"run.dir={folder}/teacher", *TINY])
    output = launch(
        2,
        "train",
        "configs/quickstart.yaml",
        f"run.dir={folder}/student",
        f"teacher.weights={folder}/teacher/student.safetensors",
        "train.ema={decay: 0.5}",
        "data.workers=1",
        *TINY,
    )
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


def test_evaluation_repeats_what_training_measured(runs, tmp_path, capfd):
    folder, _ = runs
    measured = json.loads((folder / "student" / "student.json").read_text())["evaluation"]
    files = [tmp_path / "alone.parquet", tmp_path / "together.parquet"]
    words = ["--teacher", "--predictions"]
    assert main(["evaluate", str(folder / "student"), "evaluation.batch=100", *words, str(files[0])]) == 0
    alone = json.loads(capfd.readouterr().out.splitlines()[-1])
    checkpoint = folder / "student" / "checkpoints" / "step_00000003"
    arguments = ["evaluate", checkpoint, "evaluation.batch=7", "data.workers=2", *words, files[1]]
    together = json.loads(launch(2, *arguments).stdout.splitlines()[-1])
    for evaluation in (alone, together):
        assert [evaluation[key] for key in ("samples", "top1_correct", "top5_correct")] == [
            measured[key] for key in ("samples", "top1_correct", "top5_correct")
        ]
        assert evaluation["loss"] == pytest.approx(measured["loss"], rel=1e-5)
        for key in ("top1", "teacher_top1"):
            assert evaluation["agreement"][key] == measured["agreement"][key]
        for key in ("kl", "cka"):
            assert evaluation["agreement"][key] == pytest.approx(measured["agreement"][key], rel=1e-4)
    # One row for each image, in the order of the data set, whichever rank and worker process had it.
    source = open_source("digits", training=False)
    rows = [parquet.read_table(file).to_pydict() for file in files]
    for found in rows:
        assert found["label"] == source.labels.tolist()
        assert [label == first for label, first in zip(found["label"], found["prediction"], strict=True)].count(
            True
        ) == measured["top1_correct"]
    assert rows[0]["prediction"] == rows[1]["prediction"]
    assert np.array(rows[1]["scores"]) == pytest.approx(np.array(rows[0]["scores"]), abs=1e-5)


def test_what_cannot_be_evaluated_is_said(runs, tmp_path, capsys):
    folder, _ = runs
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "belongs to no run" in capsys.readouterr().err
    assert main(["evaluate", str(folder / "student"), "data.validation=no/such.parquet"]) == 2
    assert "no file matches 'no/such.parquet'" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text((folder / "student" / "recipe.yaml").read_text())
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "student.json" in capsys.readouterr().err


def test_a_wrong_recipe_ends_every_process_of_a_launch(tmp_path):
    words = ["train", "configs/quickstart.yaml", "teacher.weights=random", f"run.dir={tmp_path / 'run'}"]
    result = run(torchrun_command(2, "-m", "dkd", *words, "data.train=x.parquet"), check=False)
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if line.startswith("dkd: ")] == [
        "dkd: data.train: no file matches 'x.parquet'"
    ]
    # And once more where a person looks: torchrun's own lines end with the root cause.
    assert result.stderr.rstrip().splitlines()[-2] == "  traceback : dkd: data.train: no file matches 'x.parquet'"


def test_two_ranks_go_to_their_end_when_the_reader_of_their_log_leaves(tmp_path):
    """As `dkd train ... |& head -1` does."""
    words = ["train", "configs/quickstart.yaml", f"run.dir={tmp_path / 'run'}", *ALONE]
    with Launch(torchrun_command(2, "-m", "dkd", *words), subprocess.PIPE) as launch:
        assert launch.process.stdout.readline()
        launch.process.stdout.close()
        assert launch.wait(limit(180)) == 0
    assert (tmp_path / "run" / "FINISHED").exists()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


RANKS = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
SCRIPT = "import sys, dkd; dkd.train(sys.argv[1], sys.argv[2:])"


@pytest.mark.parametrize(
    ("how", "variables", "override", "message"),
    [
        (
            "command",
            {"DKD_STOP_EXIT_CODE": "abc"},
            [],
            "DKD_STOP_EXIT_CODE must be a whole number from 0 to 255, not 'abc'",
        ),
        ("function", {}, ["data.train=/nowhere/*.parquet"], "/nowhere/*.parquet"),
    ],
)
def test_what_is_wrong_on_one_machine_ends_all_ranks(tmp_path, how, variables, override, message):
    """A variable or a place of data that is wrong on the second of two machines alone."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
run: {trackers: []}
data: {train: digits, validation: digits, classes: 10, transforms: digits, image_size: 8}
student: {name: resnet8}
train: {global_batch: 32, epochs: 1, max_steps: 1, precision: fp32}
optimizer: {name: sgd, lr: 0.05}
schedule: {name: cosine}
"""
    )
    start = [*DKD, "train"] if how == "command" else [sys.executable, "-c", SCRIPT]
    ranks, port = [], str(free_port())
    for rank in (0, 1):
        own = {**RANKS, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": "0", **(variables if rank else {})}
        command = [*start, recipe, f"run.dir={tmp_path / 'run'}", *(override if rank else [])]
        ranks.append(Launch(command, tmp_path / f"log{rank}", **own))
    with ranks[0], ranks[1]:
        codes = [each.process.wait(timeout=limit(60)) for each in ranks]
        said = [each.said() for each in ranks]
    assert message in said[0], said[0]
    assert message in said[1], said[1]
    assert codes == ([2, 2] if how == "command" else [1, 1])
    assert "Traceback" not in said[0] or how == "function"
    assert not (tmp_path / "run").exists()
