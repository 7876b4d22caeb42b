"""What is recognised as a run, and what happens when somebody else changes the folder of one, or trains in it."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finished_run import said, starts, train
from launched import ROOT, Launch
from safetensors.torch import load_file

from dkd.checkpoints import CheckpointFolder, checkpointer
from dkd.cli import main
from dkd.runs.directory import RunDirectory
from dkd.training import resume
from dkd.training.trainer import Trainer

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


def changed_while_training(monkeypatch, action, at=1):
    """Do `action` in the middle of a training, before the step after `at`."""
    train_step = Trainer.train_step

    def acting(trainer):
        if trainer.state.step == at:
            trainer.parts.checkpointer.wait()
            action()
        return train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", acting)


def no_locks(*_):
    raise OSError(37, "No locks available")


def another_start(run):
    run_dir = RunDirectory(run, writes=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "lockf", no_locks)  # which would be refused, as another process's
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
    changed_while_training(monkeypatch, lambda: moved.rename(run), at=2)
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
    with Launch([sys.executable, "-c", code, run], subprocess.PIPE, stdin=subprocess.PIPE) as other:
        assert other.process.stdout.readline() == "held\n"
        assert train(run) == 2
        (line,) = said(capsys)
        assert f"another process is training in it (process {other.process.pid} on " in line
        other.process.stdin.close()


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert train(tmp_path / "run", "train.max_steps=1") == 0
    assert (
        "cannot be locked (No locks available): nothing keeps a second training from starting"
        in capsys.readouterr().err
    )
