"""A rank that does not come ends all ranks within the process group's timeout, with a message that names it."""

import platform
import subprocess

from launched import CASES, Launch, limit, pause, torchrun_command, until

# Seconds from the moment that both ranks are at work; the groups' timeouts are 4 and 5 on an idle machine.
AT_MOST = limit(20)


def start(tmp_path, *words):
    return Launch(torchrun_command(2, *words), tmp_path / "log", stdin=subprocess.PIPE)


def test_in_a_users_own_loop(tmp_path):
    with start(tmp_path, CASES / "absent_rank.py") as launch:
        until(lambda: launch.said().count("ready") == 2, limit(60), launch)
        launch.wait(AT_MOST)
        out = launch.said()
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
    metrics = tmp_path / "run" / "metrics.jsonl"
    with start(tmp_path, "-m", "dkd", "train", recipe) as launch:
        until(lambda: metrics.exists() and '"step": 2' in metrics.read_text(), limit(90), launch)
        assert launch.wait(AT_MOST) == 1
        said = launch.said()
    assert "dkd: rank 0 cannot continue: " in said, said
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
    with start(tmp_path, "-m", "dkd", "train", recipe) as launch:
        assert launch.wait(limit(90)) == 0, launch.said()
    assert (tmp_path / "run" / "FINISHED").exists()
