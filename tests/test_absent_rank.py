"""A rank that does not come ends all ranks within the process group's timeout, with a message that names it."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from launched import child_environment, limit, pause

TESTS = Path(__file__).resolve().parent
AT_MOST = limit(
    20
)  # seconds from the moment that both ranks are at work; the groups' timeouts are 4 and 5 on an idle machine


def start(*arguments, **options):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *map(str, arguments),
    ]
    environment = child_environment()
    # A session of its own, so that no rank outlives a test that fails.
    return subprocess.Popen(
        command,
        text=True,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def wait(launch):
    try:
        launch.wait(AT_MOST)
    finally:
        if launch.poll() is None:
            os.killpg(launch.pid, signal.SIGKILL)


def test_in_a_users_own_loop():
    with start(TESTS / "ranks" / "absent_rank.py", stderr=subprocess.STDOUT) as launch:
        seen = ""
        while seen.count("ready") < 2:
            line = launch.stdout.readline()
            assert line, seen
            seen += line
        wait(launch)
        out = launch.stdout.read()
    assert "absent: not all ranks joined this loss (rank 1: call 1 of it, with 4×4×2×2, 4×4×2×2; " in out
    assert "this is rank 0: call 2 of it, with 3×4×2×2, 3×4×2×2)" in out


def test_in_the_trainer(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
run: {{dir: {tmp_path / "run"}, trackers: [], collective_timeout: 120}}
data: {{train: digits, validation: digits, classes: 10, transforms: digits, image_size: 8}}
student: {{name: "small_models:Stopping"}}
train: {{global_batch: 8, epochs: 1, precision: fp32}}
optimizer: {{name: sgd, lr: 0.01}}
schedule: {{name: constant}}
""")
    with (tmp_path / "errors").open("w") as errors, start("-m", "dkd", "train", recipe, stderr=errors) as launch:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while launch.poll() is None and not (metrics.exists() and '"step": 2' in metrics.read_text()):
            time.sleep(0.1)
        wait(launch)
    assert launch.returncode == 1
    said = (tmp_path / "errors").read_text()
    assert "dkd: rank 0 cannot go on: " in said, said
    host = platform.node()
    assert f"| rank 1 on {host}: step 5, forward; this is rank 0 on {host}: step 5, backward and update" in said, said
    assert "rank0]: Traceback" not in said


def test_until_the_first_step_is_done_a_rank_may_be_later_than_the_others_wait_afterwards(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
run: {{dir: {tmp_path / "run"}, trackers: [], collective_timeout: {pause(4)}}}
data: {{train: digits, validation: digits, classes: 10, transforms: digits, image_size: 8}}
student: {{name: "small_models:Late"}}
train: {{global_batch: 8, epochs: 1, max_steps: 4, precision: fp32}}
optimizer: {{name: sgd, lr: 0.01}}
schedule: {{name: constant}}
""")
    with start("-m", "dkd", "train", recipe, stderr=subprocess.STDOUT) as launch:
        out, _ = launch.communicate(timeout=limit(90))
    assert launch.returncode == 0, out
    assert (tmp_path / "run" / "FINISHED").exists()
