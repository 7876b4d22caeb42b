"""Damaged files of a run."""

import os
import shutil
import sys
from pathlib import Path

import launched
import pytest
from finished_run import said, starts, train

from dkd.checkpoints import CheckpointFolder
from dkd.cli import main


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
        '{"step": 1, "loss": "low"}',
        '{"evaluation": {"steps": [], "epoch": 1, "top1": 1}}',
        '{"evaluation": {"steps": 3}}',
        "null",
        '{"checkpoint": {"step": 3, "stall": "long"}}',
        '{"step": 1, "loss": 1' + "0" * 400 + "}",
        '{"evaluation": 1}',
        "\x00\x00",
    ]
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
    result = launched.run(command, 60, check=False)
    assert result.stdout.count("cannot be read: Permission denied") == 2, result
