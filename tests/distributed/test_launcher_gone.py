"""Ranks whose launcher was killed with SIGKILL, which it cannot pass on to them."""

import json

import pytest
from launched import DKD, Launch, ranks, torchrun_command, until

RECIPE = """
run: {trackers: []}
data: {train: digits, validation: digits, classes: 10, transforms: digits, image_size: 8}
student: {name: "small_models:Slow"}
train: {global_batch: 32, epochs: 100, precision: fp32}
optimizer: {name: sgd, lr: 0.05}
schedule: {name: cosine}
checkpoint: {every_epochs: null, every_steps: 2}
"""


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(torchrun_command(2, "-m", "dkd", "train"), id="torchrun"),
        pytest.param([*DKD, "launch", "-n", "2"], id="dkd launch", marks=pytest.mark.slow),
    ],
)
def test_they_stop_after_a_checkpoint(tmp_path, launcher):
    """One has been written before: the ranks then need the launcher's key-value store no more."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = tmp_path / "run"
    command = [*launcher, tmp_path / "recipe.yaml", f"run.dir={run}"]
    with Launch(command, tmp_path / "log", ACCELERATE_USE_CPU="true") as launch:
        until((run / "checkpoints" / "step_00000002").is_dir, 120, launch)
        launch.process.kill()
        launch.process.wait()
        until((run / "PREEMPTED").exists, 60)
        until(lambda: not ranks(run), 60)
    stopped = json.loads((run / "PREEMPTED").read_text())
    assert stopped["by"] == "SIGTERM"
    assert (run / "checkpoints" / f"step_{stopped['step']:08}").is_dir()
    lost = f"the launcher (pid {launch.process.pid}) of this rank is gone"
    # Each rank looks once a second; the first one that finds out stops both, and the other may be gone before it looks.
    assert 1 <= launch.said().count(lost) <= 2
