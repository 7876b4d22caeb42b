"""What `dkd status` reports: by the lock whether a run is running, and how far it is."""

import json
import shutil
import subprocess
import sys

import pytest
from finished_run import train
from launched import Launch, child_environment, limit, until

from dkd.cli import main
from dkd.runs.place import RunPlace, is_locked
from dkd.runs.status import read_status, runs_in

HOLD = """
import sys, time
from pathlib import Path
from dkd.runs.place import RunPlace
place = RunPlace(Path(sys.argv[1]))
place.claim()
Path(sys.argv[2]).touch()
time.sleep(3600)
"""
LOOK = "import sys; from pathlib import Path; from dkd.runs.place import is_locked; print(is_locked(Path(sys.argv[1])))"


def status(capsys, *words):
    assert main(["status", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def seen_by_another_process(run):
    command = [sys.executable, "-c", LOOK, str(run)]
    result = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=True, timeout=limit(60)
    )
    return result.stdout.strip()


@pytest.fixture
def unfinished(run):
    """A run of 3 steps of which 2 were done when it was killed."""
    (run / "FINISHED").unlink()
    shutil.rmtree(run / "checkpoints" / "step_00000003")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line.get("step", 0) in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**line, "images_per_second": 64.0}) + "\n" for line in kept))
    return run


def test_the_lock_tells_a_running_run_from_an_interrupted_one(unfinished, tmp_path, capsys):
    held = tmp_path / "held"
    with Launch([sys.executable, "-c", HOLD, unfinished, held], tmp_path / "log") as holder:
        until(held.exists, limit(60), holder)
        lines = status(capsys, unfinished)
        assert lines[0].startswith(f"{unfinished}: running (process {holder.process.pid} on ")
        # 1 step of 32 images is left, at 64 images a second.
        assert lines[1] == "progress     step 2 of 3 (67 %), 64 images/s, 0:00 left, without evaluations"
        (facts,) = json.loads("\n".join(status(capsys, unfinished.parent, "--json")))
        assert [facts[key] for key in ("state", "step", "total_steps", "images_per_second", "seconds_left")] == [
            "running",
            2,
            3,
            64.0,
            0.5,
        ]
        # Looking has not taken the lock away: another training is still refused.
        assert train(unfinished) == 2
        assert "another process is training in it" in capsys.readouterr().err
    lines = status(capsys, unfinished)
    assert lines[0].startswith(f"{unfinished}: interrupted, last written ")
    assert lines[1] == "progress     step 2 of 3 (67 %)"


def test_a_process_that_looks_at_its_own_run_keeps_its_lock(unfinished):
    place = RunPlace(unfinished)
    place.claim()
    assert read_status(unfinished).state == "running"
    assert seen_by_another_process(unfinished) == "True"
    place.close()
    assert read_status(unfinished).state == "interrupted"
    assert seen_by_another_process(unfinished) == "False"


@pytest.mark.parametrize("lock", ["not held", "not there"])
def test_a_run_of_another_machine_is_not_called_interrupted(unfinished, capsys, lock):
    """Its lock may not be visible on a network file system."""
    owner = json.loads((unfinished / ".owner").read_text())
    (unfinished / ".owner").write_text(json.dumps({**owner, "host": "another"}))
    if lock == "not there":
        (unfinished / ".lock").unlink()
    assert is_locked(unfinished) is (None if lock == "not there" else False)
    line = status(capsys, unfinished)[0]
    assert "running on another, or interrupted: no lock of it is visible on this machine, last written " in line


def test_a_start_that_has_not_removed_the_marker_of_the_last_one_is_running(run):
    (run / "FINISHED").rename(run / "PREEMPTED")
    facts = {"by": "SIGTERM", "step": 2, "steps": 3, "time": "2001-01-01T00:00:00+00:00", "host": "h"}
    (run / "PREEMPTED").write_text(json.dumps(facts))
    assert read_status(run).state == "preempted"
    place = RunPlace(run)
    place.claim()
    assert read_status(run).state == "running"
    place.close()


def test_a_folder_of_runs_has_one_line_for_each(unfinished, tmp_path, capsys):
    folder = tmp_path / "runs"
    shutil.copytree(unfinished, folder / "killed")
    shutil.copytree(unfinished, folder / "a_longer_name")
    (folder / "a_longer_name" / "FINISHED").write_text('{"steps": 3}')
    (folder / "no_run").mkdir()
    assert [path.name for path in runs_in(folder)] == ["a_longer_name", "killed"]
    assert [line.split("  ")[:2] for line in status(capsys, folder)] == [
        ["a_longer_name", "finished"],
        ["killed", ""],
    ]
    assert len(json.loads("\n".join(status(capsys, folder, "--json")))) == 2


def test_numbers_that_are_not_finite_are_none_in_json(run, capsys):
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '{"step": 3, "epoch": 0, "loss": NaN, "weight/ce": 1.0, "ce": NaN}\n')
    facts = json.loads("\n".join(status(capsys, run, "--json")), parse_constant=pytest.fail)
    assert facts["logged"]["loss"] is None
    assert facts["state"] == "finished"
