"""launch/slurm/ on a real Slurm cluster of two virtual nodes, 2 nodes × 2 processes: whatever ends a job, the run goes
on, and its student is that of a run that nothing disturbed."""

import json
import time
from pathlib import Path

import pytest
from launched import ROOT, until
from slurm_cluster import SlurmCluster, can_freeze, missing
from small_run import Run, write_recipe

STEPS = 80
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
pytestmark = pytest.mark.cluster
KINDS = ["cgroup", pytest.param("linuxproc", id="second-linuxproc")] if can_freeze() else ["linuxproc"]
if missing():
    KINDS = [pytest.param("none", marks=pytest.mark.skip(reason=missing()))]


@pytest.fixture(scope="module", params=KINDS)
def cluster(request, tmp_path_factory):
    folder = Path(f"/tmp/dkd-slurm-{request.param}-{time.time_ns() % 10**9}")
    with SlurmCluster(folder, request.param) as cluster:
        if not can_freeze():
            print("proctrack/cgroup was not tried: /sys/fs/cgroup/freezer cannot be written")
        yield cluster


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("slurm") / "recipe.yaml", STEPS, timeout=60)


@pytest.fixture(scope="module")
def undisturbed(cluster, recipe, tmp_path_factory):
    """SHA-256 of the student of a run that nothing disturbs: by the project's own script, with its launch check."""
    job = Job(cluster, recipe, tmp_path_factory.mktemp("undisturbed"), CHECK=1)
    job.until_finished(120)
    said = job.said()
    assert "launch-check: all is well" in said
    assert "4: 2 on node1, 2 on node2" in said
    assert job.restarts() == 0
    logs = sorted(
        path.relative_to(job.run_dir / "logs").parts[0] for path in (job.run_dir / "logs").rglob("stdout.log")
    )
    assert logs == [f"job-{job.number}-start-0-node-{node}" for node in (0, 0, 1, 1)]
    return job.run.student()


class Job:
    """A training that was submitted, and what can be seen of it."""

    def __init__(self, cluster, recipe, folder, *options, script=SCRIPT, words=None, CHECK=0, **variables):
        self.cluster, self.run_dir, self.output = cluster, folder / "run", folder / "output"
        self.run = Run(self.run_dir)
        words = [recipe, f"run.dir={self.run_dir}"] if words is None else words
        self.number = cluster.submit(
            "--nodes=2",
            "--gpus-per-node=0",
            "--cpus-per-task=2",
            f"--output={self.output}",
            f"--chdir={ROOT}",
            *options,
            script,
            *words,
            DKD=ROOT,
            ENGINE="cpu",
            PROCESSES_PER_NODE=2,
            CHECK=CHECK,
            OMP_NUM_THREADS=1,
            **variables,
        )

    def said(self):
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def restarts(self):
        return self.cluster.state(self.number)[1]

    def until(self, condition, seconds):
        try:
            return until(condition, seconds)
        except AssertionError as error:
            raise AssertionError(
                f"{error}; {self.cluster.state(self.number)}; {self.said()[-4000:]}; {self.cluster.logs()}"
            ) from None

    def until_step(self, step, seconds=90):
        self.until(lambda: self.run.step() >= step, seconds)

    def until_finished(self, seconds=150):
        self.until(
            lambda: self.cluster.state(self.number)[0] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
            seconds,
        )
        assert self.cluster.state(self.number)[0] == "COMPLETED", self.said()[-4000:]
        assert self.run.is_finished(), self.said()[-4000:]


def start(cluster, recipe, folder, *options, **variables):
    cluster.until_idle(60)
    return Job(cluster, recipe, folder, *options, **variables)


def test_near_its_time_limit_it_stops_behind_a_checkpoint_and_requeues_itself(cluster, recipe, undisturbed, tmp_path):
    # Slurm looks at time limits now and then: the run must not be done before it does.
    job = start(cluster, recipe, tmp_path, "--time=20", "--signal=B:USR1@120", SLOWER_UNTIL=tmp_path / "requeued")
    job.until_step(15)
    # Two minutes or less before the new limit, which it must not reach.
    cluster.scontrol("update", f"jobid={job.number}", f"TimeLimit={1 + (cluster.seconds(job.number) + 30) // 60}")
    job.until(lambda: cluster.state(job.number)[0] == "PENDING", 60)
    (tmp_path / "requeued").touch()
    cluster.scontrol("update", f"jobid={job.number}", "TimeLimit=20")
    job.until_finished()
    assert job.restarts() == 1
    starts = job.run.starts()
    assert starts[0] == 0
    assert starts[1] >= 15
    assert "stopped after a checkpoint; going back into the queue" in job.said()
    assert "by SIGUSR1; the same command resumes it" in job.said()
    assert job.run.student() == undisturbed


@pytest.mark.short
def test_a_requeue_by_hand_goes_on(cluster, recipe, undisturbed, tmp_path):
    job = start(cluster, recipe, tmp_path)
    job.until_step(15)
    cluster.scontrol("requeue", job.number)
    job.until_finished()
    assert job.restarts() == 1
    assert job.run.starts()[1] >= 10
    assert job.run.student() == undisturbed


def test_a_job_of_a_higher_partition_takes_its_place_for_a_while(cluster, recipe, undisturbed, tmp_path):
    job = start(cluster, recipe, tmp_path)
    job.until_step(15)
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    job.until(lambda: cluster.state(other)[0] == "COMPLETED", 90)
    job.until_finished()
    assert job.restarts() == 1
    assert job.run.starts()[1] >= 15  # not from the checkpoint after step 10: it stopped behind one of its own
    assert job.run.student() == undisturbed


def test_a_node_that_is_set_down_does_not_end_the_run(cluster, recipe, undisturbed, tmp_path):
    job = start(cluster, recipe, tmp_path)
    job.until_step(15)
    cluster.scontrol("update", "nodename=node2", "state=down", "reason=test")
    job.until(lambda: cluster.state(job.number)[0] == "PENDING", 90)
    cluster.bring_back("node2")
    job.until_finished()
    assert job.run.starts()[1] >= 10
    assert job.run.student() == undisturbed


@pytest.mark.short
def test_scancel_ends_it_for_good(cluster, recipe, tmp_path):
    job = start(cluster, recipe, tmp_path)
    job.until_step(5)
    cluster.cancel(job.number)
    cluster.until_idle(90)
    time.sleep(10)  # longer than a requeued job waits here
    assert cluster.state(job.number) == ("CANCELLED", 0), job.said()
    assert not (job.run_dir / "FINISHED").exists()


def test_a_stop_file_ends_it_behind_a_checkpoint(cluster, recipe, undisturbed, tmp_path):
    job = start(cluster, recipe, tmp_path)
    job.until_step(5)
    (job.run_dir / "STOP").touch()
    job.until(lambda: cluster.state(job.number)[0] == "COMPLETED", 60)
    assert job.restarts() == 0
    assert json.loads((job.run_dir / "STOPPED").read_text())["by"] == "STOP"
    assert not (job.run_dir / "STOP").exists()
    stopped_at = json.loads((job.run_dir / "STOPPED").read_text())["step"]
    again = start(cluster, recipe, tmp_path)
    again.until_finished()
    assert again.run.starts() == [0, stopped_at]
    assert again.run.student() == undisturbed


def test_one_task_of_an_array_is_requeued_alone(cluster, recipe, tmp_path):
    cluster.until_idle(60)
    options = ["--array=0-1", "--nodes=1", f"--output={tmp_path}/output-%a"]
    variables = {"RUNS": tmp_path / "runs"}
    job = Job(
        cluster,
        recipe,
        tmp_path,
        *options,
        script=ROOT / "launch" / "slurm" / "array.sbatch",
        words=[recipe],
        **variables,
    )
    first, second = (tmp_path / "runs" / f"seed_{seed}" for seed in (0, 1))
    job.until(lambda: all((run / "metrics.jsonl").exists() for run in (first, second)), 90)
    cluster.scontrol("requeue", f"{job.number}_1")
    job.until(lambda: all((run / "FINISHED").exists() for run in (first, second)), 180)
    starts = [len(json.loads((run / "provenance.json").read_text())) for run in (first, second)]
    assert starts == [1, 2]
