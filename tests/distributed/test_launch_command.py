"""`dkd launch` with real ranks: what it prints last, its exit codes, and its signals."""

import json
import os
import signal

from launched import DKD, Launch, limit, run, until

RECIPE = """
run: {trackers: []}
data: {train: digits, validation: digits, classes: 10, transforms: digits, image_size: 8, workers: 1}
student: {name: "small_models:Slow"}
train: {global_batch: 32, epochs: 1, precision: fp32}
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
schedule: {name: cosine}
checkpoint: {every_epochs: null, every_steps: 100}
"""
START = (*DKD, "launch", "-n", "2")


def recipe_of(folder):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_ctrl_c_stops_the_ranks_after_a_checkpoint(tmp_path):
    """Started in another folder, under FSDP2; the ranks' exit code is the launcher's."""
    folder, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    command = [*START, "--engine", "fsdp2", recipe_of(tmp_path), f"run.dir={folder}"]
    with Launch(command, tmp_path / "log", cwd=tmp_path, DKD_STOP_EXIT_CODE="75") as launch:
        until(lambda: metrics.exists() and '"step": 3,' in metrics.read_text(), limit(60), launch)
        os.kill(launch.process.pid, signal.SIGINT)
        code = launch.wait(limit(60))
    said = launch.said()
    assert code == 75, said
    assert "2 processes of fsdp2 on cpu" in said
    assert "dkd: asked to stop by SIGINT: the ranks stop after a checkpoint" in said
    stopped = json.loads((folder / "PREEMPTED").read_text())
    assert (folder / "checkpoints" / f"step_{stopped['step']:08}").is_dir()
    assert said.splitlines()[-1] == f"dkd: stopped after step {stopped['step']} by SIGTERM; the same command resumes it"


def test_what_the_ranks_refuse_is_the_last_line(tmp_path):
    result = run([*START, recipe_of(tmp_path), f"run.dir={tmp_path / 'run'}", "data.train=/no/*.parquet"], check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == ["dkd: data.train: no file matches '/no/*.parquet'"]
