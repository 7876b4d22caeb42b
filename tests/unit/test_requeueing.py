"""What train.sbatch does with how a training ends, with stand-ins for srun and scontrol. On a real cluster:
tests/cluster/test_slurm.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import limit

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/bin/bash
trap : USR1  # from before a test can see that it runs; train.sbatch asks again and again
echo "$@" >> "$FAKE/steps"
case "$*" in
    *launch-check*) eval "${FAKE_CHECK:-true}" ;;
    *) eval "${FAKE_TRAIN:-true}" ;;
esac
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$FAKE/asked"
case $1 in
    show)
        if [ "$2" = job ]; then echo "   JobState=${FAKE_STATE:-RUNNING} Reason=None"
        else printf 'node1\\nnode2\\n'; fi ;;
    requeue) exit "${FAKE_REQUEUE:-0}" ;;
esac
"""
STOPPED_AT = """echo '{{"by": "SIGUSR1", "step": 7, "steps": 9, "steps_this_start": {}}}' > "$RUN_DIR/PREEMPTED"; """
FINISHED = """touch "$RUN_DIR/FINISHED"; """


class Batch:
    """One start of the batch script."""

    def __init__(self, folder, *words, **variables):
        self.folder, self.run_dir = folder, folder / "run"
        self.run_dir.mkdir(exist_ok=True)
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        slurm = {
            "SLURM_JOB_ID": "70",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_RESTART_COUNT": "0",
        }
        self.process = subprocess.Popen(
            [
                "bash",
                ROOT / "launch" / "slurm" / "train.sbatch",
                "configs/quickstart.yaml",
                f"run.dir={self.run_dir}",
                *words,
            ],
            cwd=ROOT,
            env={**kept, **slurm, "PATH": path, "FAKE": str(folder), "ENGINE": "cpu", "CHECK": "0", **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def finish(self):
        said, _ = self.process.communicate(timeout=limit(60))
        return self.process.returncode, said

    def steps(self):
        """What srun was asked to run."""
        path = self.folder / "steps"
        return [line.partition("node.sh ")[2] for line in path.read_text().splitlines()] if path.exists() else []

    def requeued(self):
        path = self.folder / "asked"
        return (
            [line.split()[1] for line in path.read_text().splitlines() if line.startswith("requeue")]
            if path.exists()
            else []
        )


def test_a_finished_training_ends_the_job(tmp_path):
    batch = Batch(tmp_path, FAKE_TRAIN=FINISHED, CHECK="1")
    code, said = batch.finish()
    assert code == 0, said
    assert "finished: " in said
    words = f"configs/quickstart.yaml run.dir={tmp_path}/run"
    assert batch.steps() == [f"launch-check --seconds 50 {words}", f"train {words}"]
    assert batch.requeued() == []


def test_a_stopped_training_goes_back_into_the_queue(tmp_path):
    batch = Batch(tmp_path, FAKE_TRAIN=STOPPED_AT.format(7))
    code, said = batch.finish()
    assert (code, batch.requeued()) == (0, ["70"]), said


def test_a_task_of_an_array_requeues_itself_and_not_the_array(tmp_path):
    """Its job number is the array's."""
    batch = Batch(tmp_path, FAKE_TRAIN=STOPPED_AT.format(7), SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="3")
    code, said = batch.finish()
    assert (code, batch.requeued()) == (0, ["70_3"]), said


def test_a_cancelled_job_does_not_come_back(tmp_path):
    batch = Batch(tmp_path, FAKE_TRAIN=STOPPED_AT.format(7), FAKE_STATE="CANCELLED")
    assert batch.finish()[0] == 0
    assert batch.requeued() == []


def test_two_starts_without_a_step_are_the_last(tmp_path):
    none = STOPPED_AT.format(0)
    assert Batch(tmp_path, FAKE_TRAIN=none).finish()[0] == 0
    batch = Batch(tmp_path, FAKE_TRAIN=none, SLURM_RESTART_COUNT="1")
    code, said = batch.finish()
    assert code == 1
    assert "ask for more --time" in said
    assert batch.requeued() == ["70"]


@pytest.mark.parametrize("marker", ["FINISHED", "STOPPED"])
def test_a_file_of_an_earlier_start_does_not_hide_a_failure(tmp_path, marker):
    batch = Batch(tmp_path, FAKE_TRAIN="exit 2")
    (batch.run_dir / marker).touch()
    code, said = batch.finish()
    assert code == 2, said
    assert "ended with 2" in said


def test_a_failed_check_trains_nothing(tmp_path):
    batch = Batch(tmp_path, FAKE_CHECK="exit 1", CHECK="1")
    code, said = batch.finish()
    assert code == 1
    assert "nothing was trained" in said
    assert len(batch.steps()) == 1


def test_a_warning_while_the_launch_is_checked_requeues_the_job(tmp_path):
    batch = Batch(tmp_path, FAKE_CHECK='trap "" USR1; sleep 3', CHECK="1")
    end = time.monotonic() + limit(30)
    while not batch.steps() and time.monotonic() < end:
        time.sleep(0.1)
    batch.process.send_signal(signal.SIGUSR1)
    code, said = batch.finish()
    assert (code, batch.requeued()) == (0, ["70"]), said
    assert len(batch.steps()) == 1


def test_the_warning_reaches_the_training_and_its_exit_code_the_job(tmp_path):
    train = 'trap "asked=1" USR1; while [ -z "$asked" ]; do sleep 0.1; done; exit 3'
    batch = Batch(tmp_path, FAKE_TRAIN=train)
    end = time.monotonic() + limit(30)
    while not batch.steps() and time.monotonic() < end:
        time.sleep(0.1)
    batch.process.send_signal(signal.SIGUSR1)
    code, said = batch.finish()
    assert code == 3, said


def test_options_go_to_the_training_alone_and_are_the_same_after_a_requeue(tmp_path):
    """dkd itself knows a later start of the job, and replaces nothing that the job has begun (test_run_directory.py).
    After a start that was cut off before it had replaced the older run, a start without the option would resume that
    run."""
    batch = Batch(tmp_path, "--overwrite", "--allow-recipe-change", FAKE_TRAIN=FINISHED, CHECK="1")
    assert batch.finish()[0] == 0
    check, train = batch.steps()
    assert "--overwrite" not in check
    assert train.endswith("--overwrite --allow-recipe-change")
    batch = Batch(
        tmp_path, "--overwrite", "--allow-recipe-change", FAKE_TRAIN=FINISHED, CHECK="1", SLURM_RESTART_COUNT="1"
    )
    assert batch.finish()[0] == 0
    assert batch.steps()[2:] == [
        f"train configs/quickstart.yaml run.dir={tmp_path}/run --overwrite --allow-recipe-change"
    ]


def test_a_container_without_the_jobs_variables_gets_those_that_tell_a_restart_from_a_new_launch(tmp_path):
    """Without them, each requeue with --overwrite would be a launch that replaces what the one before has done."""
    (tmp_path / "accelerate").write_text("#!/bin/bash\nenv > $0.environment\n")
    (tmp_path / "accelerate").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    job = {
        "SLURM_JOB_ID": "71",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_NODEID": "0",
    }
    variables = dict.fromkeys(("SETUP", "VENV", "CONDA_ENV", "NETWORK_INTERFACE", "DRY_RUN", "RUN_DIR"), "")
    variables |= {
        "PATH": path,
        "CONTAINER": f"env -i PATH={path}",
        "ENGINE": "x",
        "SLURM_NNODES": "1",
        "PROCESSES_PER_NODE": "1",
    }
    variables |= {"MASTER_ADDR": "node1", "MASTER_PORT": "1", "MAX_RESTARTS": "0", **job}
    command = ["bash", ROOT / "launch" / "slurm" / "node.sh", "train", "recipe.yaml"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=limit(30))
    assert result.returncode == 0, result.stderr
    inside = dict(line.partition("=")[::2] for line in (tmp_path / "accelerate.environment").read_text().splitlines())
    assert {name: inside.get(name) for name in job} == job
    assert inside["DKD_STOP_EXIT_CODE"] == "0"
    assert "MASTER_ADDR" not in inside


def test_what_an_environments_script_prints_is_not_taken_for_the_run(tmp_path):
    setup = tmp_path / "setup"
    setup.write_text('echo "Loading cuda"; export LIBRARIES=$NOT_SET/lib; false\n')
    batch = Batch(tmp_path, FAKE_TRAIN=FINISHED, SETUP=str(setup))
    code, said = batch.finish()
    assert code == 0, said
    assert f"finished: {tmp_path}/run\n" in said
