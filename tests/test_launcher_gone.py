"""Ranks whose launcher was killed with SIGKILL, which it cannot pass on to them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
RECIPE = """
run: {trackers: []}
data: {train: digits, validation: digits, classes: 10, transforms: digits, image_size: 8}
student: {name: "small_models:Slow"}
train: {global_batch: 32, epochs: 100, precision: fp32}
optimizer: {name: sgd, lr: 0.05}
schedule: {name: cosine}
checkpoint: {every_epochs: null, every_steps: 2}
"""


def test_they_stop_after_a_checkpoint(tmp_path):
    """One has been written before: the ranks then need the launcher's key-value store no more."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "dkd",
        "train",
    ]
    run = tmp_path / "run"
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(
            [*command, tmp_path / "recipe.yaml", f"run.dir={run}"], env=environment, stdout=said, stderr=said
        )
    try:
        wait_for((run / "checkpoints" / "step_00000002").is_dir, tmp_path, 120)
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        wait_for((run / "PREEMPTED").exists, tmp_path, 60)
        wait_for(lambda: not ranks_of(run), tmp_path, 60)
    finally:
        for pid in ranks_of(run):
            os.kill(pid, signal.SIGKILL)
    stopped = json.loads((run / "PREEMPTED").read_text())
    assert stopped["by"] == "SIGTERM"
    assert (run / "checkpoints" / f"step_{stopped['step']:08}").is_dir()
    assert (tmp_path / "said").read_text().count(f"the launcher (pid {launcher.pid}) of this rank is gone") == 2


def wait_for(condition, folder, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (folder / "said").read_text()[-3000:]
        time.sleep(0.2)


def ranks_of(run):
    """Processes whose command line names that run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"run.dir={run}" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found
