"""What a launch and its restarts may do in a run directory: replace the run that was there, or resume its own."""

import shutil
from dataclasses import replace

import pytest
from finished_run import starts, train

from dkd.config import RecipeError, load_recipe
from dkd.launch import Launch, Start
from dkd.runs import launches
from dkd.runs.directory import check_run_directory


def start_of(monkeypatch, **variables):
    """From here on, this process passes for a new one, started in that environment."""
    monkeypatch.setattr(launches, "begun_here", set())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def by_torchrun(folder, attempt):
    """What torch's launcher gives to rank 0."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_ERROR_FILE": f"/tmp/torchelastic_x/{folder}/attempt_{attempt}/0/error.json",
    }


@pytest.mark.parametrize("option", ["--overwrite", "--fresh"])
def test_a_restart_by_the_launcher_resumes_what_the_launch_has_begun(run, monkeypatch, capsys, option):
    """It has the same command line as the first start. What torch's flight recorder has left stays with its run."""
    (run / "flight_recorder_rank_0").touch()
    if option == "--fresh":
        shutil.rmtree(run)
    start_of(monkeypatch, **by_torchrun("none_a", 0))
    assert train(run, option) == 0
    assert starts(run) == [0]
    assert not (run / "flight_recorder_rank_0").exists()
    (run / "flight_recorder_rank_1").touch()
    start_of(monkeypatch, **by_torchrun("none_a", 1))
    assert train(run, option) == 0
    assert starts(run) == [0, 3]
    assert (run / "flight_recorder_rank_1").exists()
    assert f"{option} holds for its first start" in capsys.readouterr().err
    # Another launcher is another launch, even of the same name.
    start_of(monkeypatch, **by_torchrun("none_b", 0))
    assert train(run, option) == (0 if option == "--overwrite" else 2)
    assert starts(run) == ([0] if option == "--overwrite" else [0, 3])


def test_a_restart_does_not_resume_an_older_run_that_the_first_start_did_not_come_to_replace(run, monkeypatch):
    start_of(monkeypatch, **by_torchrun("none_a", 1))
    assert train(run, "--overwrite") == 0
    assert starts(run) == [0]


def test_a_requeued_job_resumes_what_it_has_begun_and_replaces_what_it_has_not(run, monkeypatch):
    """train.sbatch passes --overwrite on at each start."""
    job = {"SLURM_JOB_ID": "70", "SLURM_CLUSTER_NAME": "c"}
    start_of(monkeypatch, **job, SLURM_RESTART_COUNT="1")  # the first was cancelled before it came so far
    assert train(run, "--overwrite") == 0
    assert starts(run) == [0]
    start_of(monkeypatch, SLURM_RESTART_COUNT="2")
    assert train(run, "--overwrite") == 0
    assert starts(run) == [0, 3]
    start_of(monkeypatch, SLURM_JOB_ID="71", SLURM_RESTART_COUNT="2")
    assert train(run, "--overwrite") == 0
    assert starts(run) == [0]
    # The first job comes back from the queue: it has had its replacement.
    start_of(monkeypatch, SLURM_JOB_ID="70", SLURM_RESTART_COUNT="3")
    assert train(run, "--overwrite") == 0
    assert starts(run) == [0, 3]


def test_each_task_of_an_array_is_a_job_of_its_own(run, monkeypatch):
    task = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "0"}
    start_of(monkeypatch, **task)
    assert train(run, "--overwrite") == 0
    start_of(monkeypatch, SLURM_ARRAY_TASK_ID="1", SLURM_RESTART_COUNT="1")
    assert train(run, "--overwrite") == 0
    assert starts(run) == [0]


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_ID": "70"}], ids=["a shell", "an interactive job"])
def test_two_launches_by_hand_replace_twice(run, monkeypatch, variables):
    for _ in range(2):
        start_of(monkeypatch, **variables)
        assert train(run, "--overwrite") == 0
        assert starts(run) == [0]


def test_a_batch_system_may_name_the_launch(run, monkeypatch):
    start_of(monkeypatch, DKD_LAUNCH_ID="job-of-kubernetes")
    assert train(run, "--overwrite") == 0
    start_of(monkeypatch)
    assert train(run, "--overwrite") == 0
    assert starts(run) == [0, 3]


def test_a_restart_with_another_recipe_is_refused_as_any_resume_is(run, monkeypatch, capsys):
    start_of(monkeypatch, DKD_LAUNCH_ID="a")
    assert train(run, "--overwrite") == 0
    start_of(monkeypatch)
    assert train(run, "--overwrite", "train.max_steps=4") == 2
    assert "train.max_steps: 3 before, 4 now" in capsys.readouterr().err
    assert train(run, "--overwrite", "train.max_steps=4", "--allow-recipe-change") == 0
    assert starts(run) == [0, 3]


def test_a_half_written_note_of_a_launch_hides_no_other(tmp_path):
    start = launches.Start(launchers=("a",))
    (tmp_path / launches.LAUNCHES_FILE).write_text('{"launchers": ["b"], "slu')
    launches.note(tmp_path, start)
    assert launches.in_effect("replace", tmp_path, start) == "resume"
    assert launches.in_effect("replace", tmp_path, launches.Start(launchers=("b",))) == "replace"


def test_a_machine_that_takes_the_place_of_another_belongs_to_the_launch(tmp_path):
    """Each machine has a launcher of its own; rank 0 may be on the new one."""
    launches.note(tmp_path, launches.together([launches.Start(("a 1",)), launches.Start(("b 1",))]))
    restart = launches.together([launches.Start(("c 1",)), launches.Start(("b 1",))])
    assert launches.in_effect("replace", tmp_path, restart) == "resume"


def test_on_several_machines_only_all_ranks_together_know_a_restart(run):
    """A machine that is new cannot refuse --fresh for itself."""
    recipe = load_recipe(run / "recipe.yaml")
    launch = Launch(world_size=2, local_world_size=1, start=Start(launchers=("a new launcher",)))
    assert check_run_directory(recipe, launch, "refuse", False) == []
    with pytest.raises(RecipeError, match="holds a run already, and --fresh was asked for"):
        check_run_directory(recipe, replace(launch, local_world_size=2), "refuse", False)


def test_overwriting_removes_the_folders_of_the_trackers_that_the_run_has_used(run):
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("trackers: []", "trackers: [wandb]"))
    for name in ("wandb", "mlflow"):
        (run / name).mkdir()
    assert train(run, "--overwrite", "train.max_steps=1") == 0
    assert not (run / "wandb").exists()
    assert (run / "mlflow").exists()  # a user's own: the run has not used it
