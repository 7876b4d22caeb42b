"""The folder of a run: who may write what in it, what is recognised in it, and what happens when somebody else changes
it."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import limit
from safetensors.torch import load_file

from dkd.checkpoints import CheckpointFolder, checkpointer
from dkd.cli import main
from dkd.config import RecipeError, load_recipe
from dkd.runs import launches
from dkd.runs.directory import RunDirectory, check_run_directory
from dkd.training import resume
from dkd.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
TRAINING = [
    "configs/quickstart_teacher.yaml", "student.name=resnet8", "train.max_steps=3", "train.precision=fp32", "run.trackers=[]",
    "data.workers=0", "checkpoint.every_steps=1", "checkpoint.keep_last=3", "train.micro_batch=null", "train.global_batch=32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher and no batch system but those that a test names; and nothing that appears late."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "DKD_")):
            monkeypatch.delenv(name)
    for module in (checkpointer, resume):
        monkeypatch.setattr(module, "LOOK_AGAIN_SECONDS", 0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 3 steps with a checkpoint after each."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def train(run, *words):
    return main(["train", *TRAINING, f"run.dir={run}", *words])


def said(capsys):
    """Lines of dkd, none of which is a traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("dkd: ")]


def starts(run):
    return [start["step"] for start in json.loads((run / "provenance.json").read_text())]


def launched(*words):
    """By torch's launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, words)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit(420), env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


# ---- launches and their restarts ----


def start_of(monkeypatch, **variables):
    """From here on, this process passes for a new one, started in that environment."""
    monkeypatch.setattr(launches, "_begun_here", set())
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
    """It has the same command line as the first start."""
    if option == "--fresh":
        shutil.rmtree(run)
    start_of(monkeypatch, **by_torchrun("none_a", 0))
    assert train(run, option) == 0
    assert starts(run) == [0]
    start_of(monkeypatch, **by_torchrun("none_a", 1))
    assert train(run, option) == 0
    assert starts(run) == [0, 3]
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


def test_on_several_machines_only_all_ranks_together_know_a_restart(run, monkeypatch):
    """A machine that is new cannot refuse --fresh for itself."""
    recipe = load_recipe(run / "recipe.yaml")
    start_of(monkeypatch, **by_torchrun("none_new", 0), WORLD_SIZE="2", LOCAL_WORLD_SIZE="1")
    assert check_run_directory(recipe, "refuse", False) == []
    start_of(monkeypatch, LOCAL_WORLD_SIZE="2")
    with pytest.raises(RecipeError, match="holds a run already, and --fresh was asked for"):
        check_run_directory(recipe, "refuse", False)


def test_a_real_launcher_that_restarts_its_ranks(run):
    """`--max_restarts` and `--overwrite`: the older run is replaced once, and the checkpoints of this one are not."""
    launched(
        "--nproc_per_node", "1", "--max_restarts", "1", "-m", "dkd", "train", *TRAINING, "student.name=small_models:FailsOnce",
        "student.norm=null", "checkpoint.background=false", f"run.dir={run}", "--overwrite",
    )  # fmt: skip
    assert starts(run) == [0, 2]


# ---- links ----


@pytest.mark.parametrize("name", [
    ".lock", ".owner", ".launches", "recipe.yaml", "provenance.json", "metrics.jsonl", "metrics.superseded.jsonl", "FINISHED",
    "student.json",
])  # fmt: skip
@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_what_a_link_leads_to_is_never_written(run, tmp_path, capsys, name, option):
    target = tmp_path / "somebody's file"
    shutil.copy(run / name, target) if (run / name).is_file() else target.write_text("text\n")
    before = target.read_bytes()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    code = train(run, *option)
    assert target.read_bytes() == before
    if option and not name.startswith("."):
        assert code == 0  # removed with the run that is replaced
        assert not (run / name).is_symlink()
    else:
        assert code == 2
        (line,) = said(capsys)
        assert f"'{run / name}' is a link" in line


def test_a_link_where_files_were_once_written_before_they_were_renamed_is_not_followed(run, tmp_path):
    target = tmp_path / "target"
    target.write_text("text\n")
    for name in ("recipe.yaml", "provenance.json", "FINISHED"):
        (run / f".{name}.writing").symlink_to(target)
    for name in ("student.safetensors", "student.json"):
        (run / f".{name}.partial").symlink_to(target)
    (run / f".writing_{'0' * 16}_recipe.yaml").write_text("left by a process that was killed")
    (run / f".writing_{'0' * 16}_student.onnx").write_text("being written by dkd export")
    assert train(run) == 0
    assert target.read_text() == "text\n"
    assert [path.name for path in run.glob(".writing_*")] == [f".writing_{'0' * 16}_student.onnx"]


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_a_folder_of_checkpoints_that_is_a_link_is_refused_and_left_alone(run, tmp_path, capsys, option):
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert train(run, *option) == 2
    assert "checkpoints' is a link" in said(capsys)[0]
    assert CheckpointFolder(tmp_path / "elsewhere").steps() == [1, 2, 3]


def test_a_link_that_appears_while_a_run_trains_is_not_followed(tmp_path):
    run_dir = RunDirectory(tmp_path / "run", writes=True)
    run_dir.place.claim()
    (tmp_path / "elsewhere").mkdir()
    run_dir.checkpoints.path.mkdir()
    run_dir.checkpoints.writing_path(5).symlink_to(tmp_path / "elsewhere")
    run_dir.checkpoints.begin(5)
    assert not run_dir.checkpoints.writing_path(5).is_symlink()
    shutil.rmtree(run_dir.checkpoints.path)
    run_dir.checkpoints.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="is a link"):
        run_dir.checkpoints.begin(6)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    run_dir.close()


def test_run_dir_itself_may_be_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    assert train(tmp_path / "run") == 0
    assert (tmp_path / "elsewhere" / "student.safetensors").is_file()


def test_run_dir_that_is_a_link_to_nothing_is_refused(tmp_path, capsys):
    (tmp_path / "run").symlink_to(tmp_path / "nothing")
    assert train(tmp_path / "run") == 2
    assert "is a link to something that is not there" in said(capsys)[0]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        assert train(tmp_path / "run", "train.max_steps=1") == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"student.safetensors", "student.json", "recipe.yaml", "metrics.jsonl", "state.json", ".lock"} <= {
        path.name for path in files
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


# ---- what is recognised as a run ----

OWN_RECIPE = "# mine, with comments\n" + (ROOT / "configs" / "quickstart_teacher.yaml").read_text()


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--fresh"], ["--allow-recipe-change"]])
def test_a_recipe_of_the_users_own_is_never_rewritten(tmp_path, capsys, option):
    (tmp_path / "recipe.yaml").write_text(OWN_RECIPE)
    assert train(tmp_path, *option) == 2
    (line,) = said(capsys)
    assert "holds a recipe.yaml, and no run that has written it" in line
    assert f"'{tmp_path}/run'" in line
    assert (tmp_path / "recipe.yaml").read_text() == OWN_RECIPE
    assert main(["status", str(tmp_path)]) == 0
    assert "no run has been started here" in capsys.readouterr().out


def test_a_start_that_was_killed_before_it_had_anything_to_lose_is_no_run(trained, tmp_path):
    shutil.copy(trained / "provenance.json", tmp_path)  # the first file that a start writes
    assert train(tmp_path, "train.max_steps=1") == 0


# ---- a folder that somebody else changes ----


def changed_while_training(monkeypatch, action, at=1):
    """Do `action` in the middle of a training, before the step after `at`."""
    step = Trainer._step

    def acting(trainer, number, batches):
        if number == at:
            trainer.checkpointer.wait()
            action()
        return step(trainer, number, batches)

    monkeypatch.setattr(Trainer, "_step", acting)


def another_start(run):
    run_dir = RunDirectory(run, writes=True)
    run_dir.place._take_lock = list  # as on a file system without locks
    run_dir.place.claim()
    run_dir.close()


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced", "emptied", "taken by another training"])
def test_a_run_whose_folder_is_changed_does_not_end_as_if_all_were_well(tmp_path, monkeypatch, capsys, how):
    run, moved = tmp_path / "run", tmp_path / "moved"
    actions = {
        "deleted": lambda: shutil.rmtree(run),
        "moved": lambda: run.rename(moved),
        "replaced": lambda: (run.rename(moved), run.mkdir(), (run / "metrics.jsonl").touch()),
        "emptied": lambda: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in run.iterdir()],
        "taken by another training": lambda: another_start(run),
    }
    changed_while_training(monkeypatch, actions[how])
    assert train(run) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "Traceback" not in line]
    assert (
        sum(line.startswith("warning: the checkpoint after step 2 could not be written (run.dir ") for line in lines)
        == 1
    )
    (last,) = [line for line in lines if line.startswith("dkd: ")]
    words = {
        "emptied": "files of the run were deleted",
        "deleted": "was deleted",
        "taken by another training": "was taken by another training",
    }
    assert words.get(how, how) in last
    assert not any("finished in" in line for line in lines)
    # The student is not lost, and nothing is written into a folder that is another's.
    rescued = Path(last.partition("the finished student is in '")[2].partition("'")[0])
    assert (rescued == moved) == (how in ("moved", "replaced"))
    assert (rescued == run) == (how == "emptied")
    assert load_file(rescued / "student.safetensors")
    assert not (rescued / "FINISHED").exists()
    if how == "replaced":
        assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
    if how in ("moved", "replaced"):
        # Where it is now, the run goes on from its last checkpoint.
        monkeypatch.undo()
        assert train(moved) == 0
        assert starts(moved) == [0, 1]
        assert torch.equal(
            load_file(moved / "student.safetensors")["fc.bias"], load_file(rescued / "student.safetensors")["fc.bias"]
        )


def test_a_folder_that_is_moved_back_in_time_loses_nothing(tmp_path, monkeypatch, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved"
    changed_while_training(monkeypatch, lambda: run.rename(moved))
    moving = Trainer._step

    def moving_back(trainer, number, batches):
        if number == 2:
            trainer.checkpointer.wait()
            moved.rename(run)
        return moving(trainer, number, batches)

    monkeypatch.setattr(Trainer, "_step", moving_back)
    assert train(run) == 0
    assert "could not be written" in capsys.readouterr().err
    assert CheckpointFolder(run / "checkpoints").steps() == [1, 3]
    assert (run / "FINISHED").exists()


def test_pruning_touches_no_folder_of_another_run(tmp_path):
    from dkd.config.schema import CheckpointSection

    run_dir = RunDirectory(tmp_path / "run", writes=True)
    run_dir.place.claim()
    (tmp_path / "run").rename(tmp_path / "moved")
    other = CheckpointFolder(tmp_path / "run" / "checkpoints")
    for step in (1, 2, 3):
        other.path_of(step).mkdir(parents=True)
    other.writing_path(4).mkdir()
    writer = checkpointer.Checkpointer(CheckpointSection(keep_last=1), run_dir.checkpoints, None, 0, 1, 60)
    assert "was replaced by another folder" in writer.prune()
    run_dir.checkpoints.discard(4)
    assert other.steps() == [1, 2, 3]
    assert other.writing_path(4).is_dir()
    run_dir.close()


def test_why_older_checkpoints_stay_is_reported_at_the_end(run, monkeypatch, capsys):
    monkeypatch.setattr(
        CheckpointFolder, "remove_all_but", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert train(run) == 0
    assert "warning: older checkpoints could not be removed ([Errno 13] Permission denied)" in capsys.readouterr().err


# ---- two launches in one folder ----


def test_the_recipe_is_compared_again_when_the_folder_is_claimed(tmp_path, monkeypatch, trained, capsys):
    """Another launch of another recipe may have trained in it while this one was opening its data."""
    check = resume.RunDirectory.take_over

    def late(run_dir, *rest):
        shutil.copytree(trained, run_dir.path, dirs_exist_ok=True)
        return check(run_dir, *rest)

    monkeypatch.setattr(resume.RunDirectory, "take_over", late)
    assert train(tmp_path / "run", "optimizer.lr=0.01") == 2
    assert any("optimizer.lr: " in line for line in said(capsys))
    assert starts(tmp_path / "run") == [0]


def test_a_refused_second_training_hears_who_holds_the_folder(run, capsys):
    code = """
import sys
from pathlib import Path
from dkd.runs.place import RunPlace
place = RunPlace(Path(sys.argv[1]))
place.claim()
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, run]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline() == b"held\n"
        assert train(run) == 2
        (line,) = said(capsys)
        assert f"another process is training in it (process {other.pid} on " in line
        other.stdin.close()


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    import fcntl

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    assert train(tmp_path / "run", "train.max_steps=1") == 0
    assert (
        "cannot be locked (No locks available): nothing keeps a second training from starting"
        in capsys.readouterr().err
    )


# ---- damage ----


def as_folder(path):
    path.unlink()
    path.mkdir()


def no_text(path):
    path.write_bytes(b"\xff\xfe\x00{")


def deep(path):
    path.write_text("[" * 100_000)


def digits(path):
    path.write_text("9" * 5_000)


@pytest.mark.parametrize("harm", [as_folder, no_text, deep, digits])
@pytest.mark.parametrize("name", ["metrics.jsonl", "student.json", "provenance.json"])
def test_damaged_files_end_commands_with_one_line_and_code_2(run, tmp_path, capsys, name, harm):
    harm(run / name)
    commands = {
        "status": ["status", run],
        "report": ["report", run, "--output", tmp_path / "report.html", "--images", "20"],
        "evaluate": ["evaluate", run],
    }
    readers = {"metrics.jsonl": ["status", "report"], "student.json": ["report", "evaluate"], "provenance.json": []}
    for command, words in commands.items():
        if name == "provenance.json" and command != "status":
            continue
        code = main([*map(str, words)])
        lines = said(capsys)
        if command in readers[name]:
            assert code == 2, command
            (line,) = lines
            assert f"'{run / name}'" in line
        else:
            assert code == 0, (command, lines)


@pytest.mark.parametrize("facts", [
    '{"architecture": {"name": "resnet8", "classes": 10}, "parameters": "many", "image_size": 8}',
    '{"architecture": {"name": "resnet8", "classes": 10}, "seconds": [1], "image_size": 8}',
    '{"architecture": {"name": "resnet8", "classes": 10}, "image_size": 8, "normalization": {"mean": 3}}',
    '["a", "list"]',
])  # fmt: skip
def test_a_description_of_other_kinds_than_a_students_is_damage(run, tmp_path, capsys, facts):
    (run / "student.json").write_text(facts)
    for words in (
        ["report", run, "--output", tmp_path / "r.html"],
        ["evaluate", run],
        ["export", run, "--format", "safetensors"],
    ):
        assert main([*map(str, words)]) == 2
        assert "student.json' is damaged: " in said(capsys)[0]


def test_lines_of_metrics_that_are_damaged_do_not_count_and_are_counted(run, tmp_path, capsys):
    good = (run / "metrics.jsonl").read_text()
    wrong = [
        '{"step": 1, "loss": "low"}', '{"evaluation": {"steps": [], "epoch": 1, "top1": 1}}', '{"evaluation": {"steps": 3}}', "null",
        '{"checkpoint": {"step": 3, "stall": "long"}}', '{"step": 1, "loss": 1' + "0" * 400 + "}", '{"evaluation": 1}', "\x00\x00",
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text(good + "\n".join(wrong) + "\n" + '{"step": 4, "lo')
    assert main(["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "last logged  step 3" in out
    assert f"damaged      {len(wrong)} lines of metrics.jsonl" in out
    assert main(["report", str(run), "--output", str(tmp_path / "r.html"), "--images", "20"]) == 0
    assert f"{len(wrong)} lines of metrics.jsonl are damaged" in (tmp_path / "r.html").read_text()
    # A start sets them aside.
    assert train(run) == 0
    assert set(wrong) <= set((run / "metrics.superseded.jsonl").read_text().splitlines())


@pytest.mark.parametrize("harm", [no_text, lambda path: path.write_text("[1, 2]"), lambda path: path.write_text("{}")])
def test_a_damaged_provenance_is_set_aside_and_the_run_goes_on(run, capsys, harm):
    harm(run / "provenance.json")
    damaged = (run / "provenance.json").read_bytes()
    assert train(run) == 0
    assert "it is now provenance.damaged.json" in capsys.readouterr().err
    assert (run / "provenance.damaged.json").read_bytes() == damaged
    assert starts(run) == [3]


def test_names_that_only_look_like_a_checkpoints_stop_no_resume(run, capsys):
    checkpoints = run / "checkpoints"
    for name in ("step_000000005", "step_0000000٥", "step_00000009x", "step_0000000010"):
        (checkpoints / name).mkdir()
    assert train(run) == 0
    assert "3 of 3 steps done" in capsys.readouterr().err
    assert (checkpoints / "step_000000005").is_dir()
    assert main(["status", str(run)]) == 0
    assert "checkpoints  step 1, step 2, step 3\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_a_file_in_the_place_of_the_checkpoints_is_refused_before_training(tmp_path, capsys, option):
    (tmp_path / "checkpoints").write_text("")
    assert train(tmp_path, *option) == 2
    assert "checkpoints' is a file, where the folder of checkpoints is to be" in said(capsys)[0]


def test_a_checkpoint_that_is_a_link_is_reported_once(run, tmp_path, capsys):
    """Its target may be anywhere; and it is removed without touching that."""
    newest = run / "checkpoints" / "step_00000003"
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    (run / "checkpoints" / "step_00000001").rename(tmp_path / "older")
    (run / "checkpoints" / "step_00000001").symlink_to(tmp_path / "older")
    less = ["checkpoint.keep_last=1", "--allow-recipe-change"]
    assert train(run, *less) == 0
    err = capsys.readouterr().err
    assert (
        "step_00000003: it is a link; put the folder that it leads to in its place; an older checkpoint is taken" in err
    )
    assert "2 of 3 steps done" in err
    assert train(run, *less) == 0
    assert "warning" not in capsys.readouterr().err
    assert CheckpointFolder(run / "checkpoints").steps() == [3]
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()
    assert (tmp_path / "older" / "manifest.json").is_file()


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may read everything")
def test_a_student_that_may_not_be_read_is_reported_with_the_reason(run):
    """As another user than its owner."""
    (run / "student.safetensors").chmod(0o000)
    for folder in (run, *run.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    code = """
import sys
from pathlib import Path
from dkd.models.weights import WeightsError, read_file
for device in ("cpu", "meta"):
    try:
        read_file(Path(sys.argv[1]), device)
    except WeightsError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, run / "student.safetensors"]
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit(60))
    assert result.stdout.count("cannot be read: Permission denied") == 2, result


# ---- several ranks ----


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Case -> what two ranks came to, all in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    launched("--nproc_per_node", "2", ROOT / "tests" / "ranks" / "run_directory_cases.py", folder)
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {case: [rank[case] for rank in found] for case in found[0]}


def test_a_file_that_appears_late_is_waited_for(ranks):
    for result in ranks["late_file"]:
        assert result == {"errors": {"1": None, "2": None, "3": None}}


def test_a_checkpoint_that_one_rank_sees_late_is_resumed(ranks):
    for result in ranks["late_at_resume"]:
        assert result == {"first_step": 2}


@pytest.mark.parametrize("case", ["private_folder", "private_copy"])
def test_a_run_dir_that_is_not_the_same_on_each_rank_is_refused_on_all(ranks, case):
    first, second = ranks[case]
    assert first == second
    assert "is not on every rank the folder that rank 0 on " in first["refused"]
    assert ": rank 1 on " in first["refused"]
    wanted = {"private_folder": "there is no such folder", "private_copy": "is of another start"}
    assert wanted[case] in first["refused"]


def test_a_folder_that_becomes_private_fails_its_checkpoints_on_all_ranks(ranks):
    first, second = ranks["private_checkpoints"]
    assert first == second
    assert "rank 1 on " in first["errors"]["3"]
    assert "does not see" in first["errors"]["3"]
    assert first["ended"].startswith("the last checkpoint could not be written: rank 1 on ")


def test_all_ranks_hear_that_the_folder_was_moved(ranks):
    first, second = ranks["moved"]
    assert first == second
    assert "was moved to " in first["errors"]["3"]
    assert "was moved to " in first["ended"]
    assert "the finished student is in " in first["ended"]
