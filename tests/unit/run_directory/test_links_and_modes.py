"""A run directory with links in it, and the modes of its files."""

import os
import shutil
import stat

import pytest
from finished_run import said, train

from dkd.checkpoints import CheckpointFolder
from dkd.runs.directory import RunDirectory


@pytest.mark.parametrize(
    "name",
    [
        ".lock",
        ".owner",
        ".launches",
        "recipe.yaml",
        "provenance.json",
        "metrics.jsonl",
        "metrics.superseded.jsonl",
        "FINISHED",
        "student.json",
    ],
)
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
