"""Checkpoints on disk: whole or not there, verified before they are read, and read without running code."""

import enum
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from few_images import write_images
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dkd.checkpoints import CheckpointError, CheckpointFolder, load_tensors, save_tensors, saved_tensors
from dkd.checkpoints.checkpointer import newest_intact
from dkd.checkpoints.facts import FORMAT
from dkd.checkpoints.folder import MANIFEST
from dkd.cli import main
from dkd.config import load_recipe
from dkd.runs.directory import RunDirectory

TRAINING = [
    "configs/quickstart.yaml",
    "teacher.weights=random",
    "train.max_steps=3",
    "train.precision=fp32",
    "run.trackers=[]",
    "data.workers=0",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=3",
    "train.micro_batch=null",
    "train.global_batch=32",
]


@pytest.fixture(autouse=True)
def nothing_is_late(monkeypatch):
    """What is missing here stays missing: nobody need look again for it."""
    from dkd.checkpoints import checkpointer

    monkeypatch.setattr(checkpointer, "LOOK_AGAIN_SECONDS", 0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 3 steps with a checkpoint after each."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 0
    assert CheckpointFolder(run / "checkpoints").steps() == [1, 2, 3]
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def removed(path):
    path.unlink()


def emptied(path):
    path.write_bytes(b"")


HARMS = [truncated, flipped, removed, emptied]
FILES = [
    "manifest.json",
    "recipe.yaml",
    "state.json",
    "student.json",
    "student.safetensors",
    "training/.metadata",
    "training/__0_0.distcp",
]


def test_a_checkpoint_has_these_files_and_no_others(run):
    folder = run / "checkpoints" / "step_00000003"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == FILES


def test_a_checkpoint_of_another_format_is_refused_by_name(run, capsys):
    for step in (1, 2, 3):
        folder = run / "checkpoints" / f"step_{step:08}"
        facts = json.loads((folder / "state.json").read_text())
        assert facts["format"] == FORMAT
        (folder / "state.json").write_text(json.dumps({**facts, "format": FORMAT + 1}))
        manifest = json.loads((folder / MANIFEST).read_text())
        content = (folder / "state.json").read_bytes()
        manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    (run / "FINISHED").unlink()
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 2
    message = (
        f"is of format {FORMAT + 1}, and this version of dkd reads format {FORMAT}: resume it with the version that"
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_harmed_file_makes_the_checkpoint_before_the_newest(run, name, harm):
    folder = CheckpointFolder(run / "checkpoints")
    harm(folder.path_of(3) / name)
    step, problems = newest_intact(folder)
    assert step == 2
    assert len(problems) == 1
    assert name in problems[0]
    harm(folder.path_of(2) / name)
    assert newest_intact(folder)[0] == 1
    harm(folder.path_of(1) / name)
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        newest_intact(folder)


@pytest.mark.parametrize("harm", HARMS)
def test_training_goes_on_from_the_checkpoint_before_and_ends_the_same(run, trained, capsys, harm):
    harm(run / "checkpoints" / "step_00000003" / "training" / "__0_0.distcp")
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 0
    said = capsys.readouterr().err
    assert "warning: " in said
    assert "an older checkpoint is taken" in said
    assert "step_00000002, 2 of 3 steps done" in said
    assert (run / "student.safetensors").read_bytes() == (trained / "student.safetensors").read_bytes()
    assert CheckpointFolder(run / "checkpoints").problem(3) is None


def test_training_ends_with_exit_code_2_when_no_checkpoint_is_whole(run, capsys):
    for step in (1, 2, 3):
        removed(run / "checkpoints" / f"step_{step:08d}" / MANIFEST)
    before = sorted(run.rglob("*"))
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 2
    assert "no checkpoint is intact: " in capsys.readouterr().err
    assert sorted(p for p in run.rglob("*") if p.name != ".lock") == [p for p in before if p.name != ".lock"]


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def sealed(folder, step):
    """Write the manifest anew: whoever can write a checkpoint can do that too."""
    path = folder.path_of(step).rename(folder.writing_path(step))
    (path / MANIFEST).unlink()
    folder.commit(step)


def test_metadata_that_would_run_code_is_not_loaded(run, tmp_path):
    folder, marker = CheckpointFolder(run / "checkpoints"), tmp_path / "ran"
    (folder.path_of(3) / "training" / ".metadata").write_bytes(pickle.dumps(RunsCode(marker)))
    sealed(folder, 3)
    step, problems = newest_intact(folder)
    assert step == 2
    assert "names posix.mkdir, which is no part of a checkpoint; it was not loaded" in problems[0]
    assert not marker.exists()


def test_metadata_that_calls_a_tensor_bytes_is_not_loaded(run):
    """torch would unpickle the bytes."""
    folder = CheckpointFolder(run / "checkpoints")
    path = folder.path_of(3) / "training" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["model/fc.bias"] = BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))
    sealed(folder, 3)
    assert newest_intact(folder)[0] == 2


def test_metadata_that_points_elsewhere_is_not_loaded(run):
    folder = CheckpointFolder(run / "checkpoints")
    path = folder.path_of(3) / "training" / ".metadata"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"__0_0.distcp", b"../../../a.b"))
    assert path.read_bytes() != content
    sealed(folder, 3)
    step, problems = newest_intact(folder)
    assert step == 2
    assert "more than tensors of this folder" in problems[0]


def test_tensor_files_that_would_run_code_are_not_loaded(run, tmp_path, capsys):
    folder, marker = CheckpointFolder(run / "checkpoints"), tmp_path / "ran"
    path = folder.path_of(3) / "training" / "__0_0.distcp"
    buffer = io.BytesIO()
    torch.save(RunsCode(marker), buffer)
    # At the place of every tensor: torch reads each from its own offset.
    size = path.stat().st_size
    metadata = pickle.loads((path.parent / ".metadata").read_bytes())
    content = bytearray(size)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(buffer.getvalue())
    content[: len(buffer.getvalue())] = buffer.getvalue()
    path.write_bytes(content)
    (path.parent / ".metadata").write_bytes(pickle.dumps(metadata))
    sealed(folder, 3)
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not marker.exists()


def test_metadata_that_changes_a_class_is_not_loaded(run):
    """A pickle may set attributes of what it names: of a class, for all of the process."""
    folder = CheckpointFolder(run / "checkpoints")
    path = folder.path_of(3) / "training" / ".metadata"
    code = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n}S'fqn'\nS'elsewhere'\nsb."
    path.write_bytes(b"\x80\x02" + code)
    sealed(folder, 3)
    step, problems = newest_intact(folder)
    assert step == 2
    assert "changes a class" in problems[0]


class MembersByGetattr(pickle.Pickler):
    """Pickles the members of an Enum as getattr(class, name)."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_metadata_that_asks_for_attributes_is_not_loaded(run):
    """Some versions of Python pickle the members of an Enum by getattr; it must get nothing else."""
    folder = CheckpointFolder(run / "checkpoints")
    path = folder.path_of(3) / "training" / ".metadata"
    before = saved_tensors(path.parent)
    by_getattr = io.BytesIO()
    MembersByGetattr(by_getattr).dump(pickle.loads(path.read_bytes()))
    assert b"getattr" in by_getattr.getvalue()
    path.write_bytes(by_getattr.getvalue())
    assert saved_tensors(path.parent) == before
    module = b"torch.distributed.checkpoint.metadata"
    good = b"cbuiltins\ngetattr\n(c" + module + b"\n_MEM_FORMAT_ENCODING\nS'TORCH_CONTIGUOUS_FORMAT'\ntR."
    for asked in (b"__init__", b"__class__"):
        path.write_bytes(good.replace(b"TORCH_CONTIGUOUS_FORMAT", asked))
        with pytest.raises(CheckpointError, match="which is no part of a checkpoint"):
            saved_tensors(path.parent)


def test_a_link_is_no_file_of_a_checkpoint(run, tmp_path):
    folder = CheckpointFolder(run / "checkpoints")
    path = folder.path_of(3) / "training" / "__0_0.distcp"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    step, problems = newest_intact(folder)
    assert step == 2
    assert "is a link" in problems[0]


def test_damaged_checkpoints_are_set_aside_and_do_not_displace_whole_ones(run):
    for step in (2, 3):
        truncated(run / "checkpoints" / f"step_{step:08d}" / "state.json")
    less = [part.replace("keep_last=3", "keep_last=1") for part in TRAINING]
    assert main(["train", *less, f"run.dir={run}", "--allow-recipe-change"]) == 0
    folder = CheckpointFolder(run / "checkpoints")
    assert folder.steps() == [3]
    assert newest_intact(folder) == (3, [])
    assert sorted(path.name for path in folder.path.glob("damaged_*")) == ["damaged_00000002", "damaged_00000003"]


def test_other_training_data_are_refused(tmp_path, capsys):
    write_images(tmp_path / "a.parquet", 64)
    training = [*TRAINING, f"data.train={tmp_path}/*.parquet", f"run.dir={tmp_path}/run"]
    assert main(["train", *training]) == 0
    write_images(tmp_path / "b.parquet", 16)
    assert main(["train", *training]) == 2
    assert "the training data are not what they were: 64 images" in capsys.readouterr().err


def test_what_is_being_written_is_never_taken_for_a_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert newest_intact(folder) == (None, [])
    folder.writing_path(5).mkdir(parents=True)
    (folder.writing_path(5) / "a").write_text("half")
    (folder.path / "removing_00000001").mkdir()
    assert folder.steps() == []
    folder.remove_unfinished()
    assert list(folder.path.iterdir()) == []


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {
        "a/b": torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last),
        "half": torch.randn(7).bfloat16(),
        "number": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3),
    }
    save_tensors(tmp_path / "x", tensors, None)
    assert {name: (saved.shape, saved.dtype) for name, saved in saved_tensors(tmp_path / "x").items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    loaded = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    load_tensors(tmp_path / "x", loaded, None)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_missing_tensor_is_an_error(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.zeros(2)}, None)
    with pytest.raises(CheckpointError, match="b"):
        load_tensors(tmp_path / "x", {"b": torch.zeros(2)}, None)


def test_a_finished_run_that_is_started_again_stays_as_it_is(run, trained, capsys):
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 0
    assert "3 of 3 steps done" in capsys.readouterr().err
    assert (run / "student.safetensors").read_bytes() == (trained / "student.safetensors").read_bytes()
    evaluations = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "evaluation" in line
    ]
    assert len(evaluations) == 1
    starts = json.loads((run / "provenance.json").read_text())
    assert [start["step"] for start in starts] == [0, 3]


def test_a_run_goes_on_longer_when_the_recipe_may_change(run, capsys):
    longer = [part.replace("max_steps=3", "max_steps=5") for part in TRAINING]
    assert main(["train", *longer, f"run.dir={run}"]) == 2
    assert "train.max_steps: 3 before, 5 now" in capsys.readouterr().err
    assert main(["train", *longer, f"run.dir={run}", "--allow-recipe-change"]) == 0
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5]


def test_a_student_that_cannot_be_written_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    from dkd.training import saving

    write = saving.save_student

    def full(folder, *args):
        if folder.name == "run":
            raise SafetensorError("I/O error: File too large (os error 27)")
        return write(folder, *args)

    monkeypatch.setattr(saving, "save_student", full)
    assert main(["train", *TRAINING, f"run.dir={tmp_path}/run"]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dkd: ")]
    assert said.startswith("dkd: the finished student cannot be written: SafetensorError: I/O error: File too large")


def test_metrics_that_a_full_disk_does_not_take_are_written_once_when_it_does(tmp_path):
    import resource

    run_dir = RunDirectory(tmp_path, writes=True)
    run_dir.start(load_recipe("configs/quickstart.yaml"), world_size=1, step=0)
    lines = [{"step": step, "loss": "x" * 50} for step in range(1, 9)]
    said = []
    try:
        for line in lines:
            limit = 200 if line["step"] in range(3, 6) else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            said.append(run_dir.log(line))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run_dir.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines
    assert sum(message is not None for message in said) == 1


@pytest.fixture
def small_disk(trained, tmp_path):
    """A file system with room for two and a half checkpoints, and a way to make it larger."""
    path = tmp_path / "disk"
    path.mkdir()
    checkpoint = sum(
        file.stat().st_size for file in (trained / "checkpoints" / "step_00000003").rglob("*") if file.is_file()
    )
    size = f"size={int(2.5 * checkpoint)}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this user may not mount a small file system: {mounted.stderr.strip()}")
    yield path, lambda: subprocess.run(["mount", "-o", "remount,size=30m", path], check=True)
    subprocess.run(["umount", "--lazy", path], check=True)


def test_on_a_full_disk_training_goes_on_and_older_checkpoints_stay(small_disk, trained, capsys):
    path, enlarge = small_disk
    run = path / "run"
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 1
    said = capsys.readouterr().err
    assert "warning: the checkpoint after step 3 could not be written" in said
    assert "is the disk full?" in said or "No space left on device" in said
    assert "the last checkpoint could not be written" in said
    folder = CheckpointFolder(run / "checkpoints")
    assert newest_intact(folder) == (2, [])
    assert folder.problem(1) is None
    enlarge()
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 0
    assert (run / "student.safetensors").read_bytes() == (trained / "student.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.seed=1", "the run was taught by wrn_16_2 with weights"),  # the teacher's weights are random, by the seed
        ("train.global_batch=64", "the run is 3 steps of 32 samples long"),
        ("train.max_steps=2", "has done 3 steps already, more than the 2"),
        (
            "optimizer={name: adamw, lr: 0.001}",
            "the optimizer's state in it is momentum_buffer; adamw of this recipe keeps exp_avg",
        ),
        ("train.ema={decay: 0.9}", "average/conv1.weight is not in it"),
        ("student.name=resnet20", "is not in it"),
    ],
)
def test_what_a_run_cannot_go_on_with_is_said(run, capsys, change, message):
    assert main(["train", *TRAINING, f"run.dir={run}", "--allow-recipe-change", change]) == 2
    assert message in capsys.readouterr().err


def test_two_trainings_in_one_run_directory_are_refused(run, capsys):
    lock = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    hold = f"{lock}; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(["train", *TRAINING, f"run.dir={run}"]) == 2
        other.stdin.close()
    assert "another process is training in it" in capsys.readouterr().err


def test_the_best_checkpoints_are_kept_beside_the_newest(tmp_path):
    from dkd.checkpoints.checkpointer import Checkpointer
    from dkd.config.schema import CheckpointSection

    folder = CheckpointFolder(tmp_path)
    for step in range(1, 8):
        folder.path_of(step).mkdir(parents=True)
    checkpointer = Checkpointer(CheckpointSection(keep_last=2, keep_best=2), folder, None, 0, 1, 60)
    checkpointer.evaluations = {1: 0.3, 2: 0.9, 4: 0.5, 6: 0.4}
    checkpointer.prune()
    assert folder.steps() == [2, 4, 6, 7]


def test_the_clock_asks_for_checkpoints_too(monkeypatch):
    from dkd.checkpoints import schedule as schedules
    from dkd.config.schema import CheckpointSection

    now = [0.0]
    monkeypatch.setattr(schedules.time, "monotonic", lambda: now[0])
    schedule = schedules.CheckpointSchedule(CheckpointSection(every_epochs=2, every_steps=7, every_minutes=1), 10, 100)
    assert [step for step in range(1, 101) if schedule.due(step, False)] == sorted(
        {*range(7, 101, 7), *range(20, 101, 20)}
    )
    assert not schedule.minutes_over()
    now[0] = 61.0
    assert schedule.minutes_over()
    assert schedule.due(1, schedule.minutes_over())
    assert not schedule.minutes_over()
