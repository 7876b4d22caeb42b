"""A run that is asked to stop ends behind a checkpoint, with a file and an exit code that say so; the same command goes
on."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import child_environment, limit

from dkd.distributed import stop_signals

TESTS = Path(__file__).resolve().parent
RECIPE = """
run: {trackers: []}
data: {train: digits, validation: digits, classes: 10, transforms: digits, image_size: 8, workers: 1}
student: {name: "small_models:Slow"}
train: {global_batch: 32, epochs: 1, max_steps: 30, precision: fp32}
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
schedule: {name: cosine}
checkpoint: {every_epochs: null, every_steps: 100}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def start(*words):
    environment = child_environment()
    command = [sys.executable, "-m", "dkd", *map(str, words)]
    return subprocess.Popen(
        command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process, action=lambda: None, run=None, step=0):
    """Act behind a step; returns the exit code and what was said."""
    try:
        end = time.monotonic() + limit(60)
        while run is not None and time.monotonic() < end and process.poll() is None:
            path = run / "metrics.jsonl"
            if path.exists() and f'"step": {step},' in path.read_text():
                action()
                break
            time.sleep(0.1)
        said, _ = process.communicate(timeout=limit(90))
        return process.returncode, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def student(run):
    return hashlib.sha256((run / "student.safetensors").read_bytes()).hexdigest()


def test_signals_and_the_stop_file(recipe, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finish(start("train", recipe, f"run.dir={whole}"))[0] == 0
    train = ("train", recipe, f"run.dir={run}")

    # To all its processes, as batch systems do: image loaders go on, or there would be no checkpoint.
    first = start(*train)
    code, said = finish(first, lambda: os.killpg(first.pid, signal.SIGTERM), run, step=5)
    assert code == 75, said
    assert "dkd: stopped after step " in said
    assert "by SIGTERM; the same command goes on" in said
    preempted = json.loads((run / "PREEMPTED").read_text())
    assert preempted["by"] == "SIGTERM"
    assert 5 < preempted["step"] == preempted["steps_this_start"] < 15
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{preempted['step']:08d}"]

    code, said = finish(start(*train), lambda: (run / "STOP").touch(), run, step=preempted["step"] + 2)
    assert code == 75, said
    assert not (run / "PREEMPTED").exists()
    assert not (run / "STOP").exists()
    stopped = json.loads((run / "STOPPED").read_text())
    assert stopped["by"] == "STOP"
    code, said = finish(start("status", recipe, f"run.dir={run}"))
    assert code == 0
    assert f"stopped by hand by STOP after step {stopped['step']} of 30; the same command goes on" in said

    code, said = finish(start(*train))
    assert code == 0, said
    assert sorted(path.name for path in run.iterdir() if path.name.isupper()) == ["FINISHED"]
    assert student(run) == student(whole)
    assert ": finished (" in finish(start("status", run))[1]
    assert finish(start("status", recipe, f"run.dir={run}", "--print-directory")) == (0, f"{run}\n")


def test_a_terminal_that_closes_asks_a_run_to_stop_unless_nohup_started_it():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for ignored in (False, True):
            signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
            stop_signals.note_signals()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_signals.signalled() == (None if ignored else signal.SIGHUP)
            stop_signals.stop_noting()
            assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
