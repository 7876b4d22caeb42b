"""A run that is asked to stop stops after a checkpoint, with a file and an exit code that report it; the same command
resumes it. What a request to stop is: signals, the stop file, and the exit code."""

import hashlib
import json
import os
import signal

import launched
import pytest
from launched import DKD, limit, run, until

from dkd.distributed import stop_signals
from dkd.distributed.stop_signals import StopRequests
from dkd.launch import Launch

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


def training(recipe, run, tmp_path, action=lambda launch: None, step=None):
    """Train, and act after a step has been logged; returns the exit code and what was said."""
    log = tmp_path / f"log{len(list(tmp_path.glob('log*')))}"
    with launched.Launch([*DKD, "train", recipe, f"run.dir={run}"], log) as launch:
        if step is not None:
            metrics = run / "metrics.jsonl"
            until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), limit(60), launch)
            action(launch)
        return launch.wait(limit(90)), launch.said()


def status(*words):
    result = run([*DKD, "status", *words])
    return result.stdout + result.stderr


def student(folder):
    return hashlib.sha256((folder / "student.safetensors").read_bytes()).hexdigest()


def test_signals_and_the_stop_file(recipe, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert training(recipe, whole, tmp_path)[0] == 0

    # To all its processes, as batch systems do: image loaders go on, or there would be no checkpoint.
    code, said = training(
        recipe, folder, tmp_path, lambda launch: os.killpg(launch.process.pid, signal.SIGTERM), step=5
    )
    assert code == 0, said
    assert "dkd: stopped after step " in said
    assert "by SIGTERM; the same command resumes it" in said
    preempted = json.loads((folder / "PREEMPTED").read_text())
    assert preempted["by"] == "SIGTERM"
    assert 5 < preempted["step"] == preempted["steps_this_start"] < 15
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{preempted['step']:08d}"]

    code, said = training(recipe, folder, tmp_path, lambda _: (folder / "STOP").touch(), step=preempted["step"] + 2)
    assert code == 0, said
    assert not (folder / "PREEMPTED").exists()
    assert not (folder / "STOP").exists()
    stopped = json.loads((folder / "STOPPED").read_text())
    assert stopped["by"] == "STOP"
    said = status(recipe, f"run.dir={folder}")
    assert f"stopped by hand by STOP after step {stopped['step']} of 30; the same command resumes it" in said

    code, said = training(recipe, folder, tmp_path)
    assert code == 0, said
    assert sorted(path.name for path in folder.iterdir() if path.name.isupper()) == ["FINISHED"]
    assert student(folder) == student(whole)
    assert ": finished (" in status(folder)
    assert status(recipe, f"run.dir={folder}", "--print-directory") == f"{folder}\n"


def test_a_terminal_that_closes_asks_a_run_to_stop_unless_nohup_started_it():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for ignored in (False, True):
            signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
            stop_signals.note_signals(Launch())
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_signals.signalled() == (None if ignored else signal.SIGHUP)
            stop_signals.stop_noting(Launch())
            assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def noted():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, where the tests themselves are started by nohup
    kept = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    stop_signals.note_signals(Launch())
    yield
    stop_signals.stop_noting(Launch())
    assert {number: signal.getsignal(number) for number in stop_signals.SIGNALS} == kept
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", stop_signals.SIGNALS)
def test_a_signal_leaves_a_note_and_does_nothing_else(noted, tmp_path, number):
    requests = StopRequests(tmp_path, looks=True)
    assert requests.asked_by() is None
    os.kill(os.getpid(), number)
    assert requests.asked_by() == number.name
    (tmp_path / "STOP").touch()
    assert requests.asked_by(look=True) == "STOP"


def test_a_stop_file_is_seen_by_the_rank_that_looks(noted, tmp_path):
    (tmp_path / "STOP").touch()
    assert StopRequests(tmp_path, looks=True).asked_by() == "STOP"
    assert StopRequests(tmp_path, looks=False).asked_by() is None


def test_after_training_a_launcher_cannot_end_a_rank_that_ends_by_itself():
    kept = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    try:
        stop_signals.note_signals(Launch(has_launcher=True))
        stop_signals.stop_noting(Launch(has_launcher=True))
        assert {signal.getsignal(number) for number in stop_signals.SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("launch", "code"),
    [
        (Launch(), 0),
        (Launch(has_launcher=True), 0),
        (Launch(restarts_ranks=True), 0),
        (Launch(stop_exit_code=75), 75),
        (Launch(stop_exit_code=75, has_launcher=True), 75),
        (Launch(stop_exit_code=75, restarts_ranks=True), 0),  # the launcher would start the run again
    ],
)
def test_the_exit_code_of_a_stop(launch, code):
    assert stop_signals.exit_code(launch) == code
