"""Train a small run of 3 steps with a checkpoint after each, and read what has become of it."""

import json

from dkd.cli import main

TRAINING = [
    "configs/quickstart_teacher.yaml",
    "student.name=resnet8",
    "train.max_steps=3",
    "train.precision=fp32",
    "run.trackers=[]",
    "data.workers=0",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=3",
    "train.micro_batch=null",
    "train.global_batch=32",
]


def train(run, *words):
    """Run `dkd train` in this process and return its exit code."""
    return main(["train", *TRAINING, f"run.dir={run}", *words])


def said(capsys):
    """Return the lines of dkd on stderr, none of which is a traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("dkd: ")]


def starts(run):
    """Return after how many steps each start of the run began."""
    return [start["step"] for start in json.loads((run / "provenance.json").read_text())]
