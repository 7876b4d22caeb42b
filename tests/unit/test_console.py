"""A log that cannot be written never ends a training, nor does it change its exit code."""

import io
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import DKD, Launch, child_environment, limit

from dkd import console
from dkd.cli import main
from dkd.runs.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
ALONE = ["teacher=null", "losses={}", "run.trackers=[]"]
TINY = [*ALONE, "train.precision=fp32", "train.global_batch=448", "data.image_size=8", "train.max_steps=2"]


class Full(io.StringIO):
    def write(self, text=""):
        raise OSError(28, "No space left on device")

    flush = write


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, Full(), closed()], ids=["none", "on a full disk", "closed"])
def test_a_line_that_cannot_be_written_is_dropped(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    console.say("a line")


def test_what_other_code_prints_cannot_fail_either(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(sys, "stdout", None)
    console.never_fail()
    console.never_fail()  # a second training of the same process
    print("to nobody")
    print("to a full disk", file=sys.stderr, flush=True)
    sys.stderr.writelines(["two", "lines"])
    assert not sys.stderr.closed


def test_letters_that_a_terminal_does_not_know_are_written_otherwise(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    console.never_fail()
    console.say("γ → 3")
    assert raw.getvalue() == b"\\u03b3 \\u2192 3\n"


def test_a_training_goes_to_its_end_while_its_log_is_on_a_full_disk(tmp_path):
    words = ["train", ROOT / "configs" / "quickstart.yaml", f"run.dir={tmp_path / 'run'}", *TINY]
    with Launch([*DKD, *words], "/dev/full") as launch:
        assert launch.wait(limit(120)) == 0
    assert (tmp_path / "run" / "FINISHED").exists()


class Tracker:
    """One whose server is gone, and which raises an error of its own for that."""

    name = "a tracker"

    def finish(self):
        raise LookupError("no answer")


class Tracking:
    """What RunLogger uses of Accelerate."""

    def __init__(self):
        self.trackers, self.calls = [Tracker()], 0

    def log(self, values, step):
        self.calls += 1
        if self.trackers:
            raise LookupError("no answer")


def test_a_tracker_that_fails_after_days_ends_no_training(tmp_path, capsys):
    from dkd.engines.trackers import Trackers
    from dkd.runs.directory import RunDirectory
    from dkd.runs.logger import RunLogger
    from dkd.runs.progress import Progress

    accelerator = Tracking()
    log = RunLogger(RunDirectory(tmp_path, writes=True), Trackers(accelerator), Progress(3, 0, 1, shown=True))
    log.write({"step": 1}, {"loss": 1.0}, 1)
    log.write({"step": 2}, {"loss": 1.0}, 2)
    assert capsys.readouterr().err.count("trackers cannot write (LookupError: no answer") == 1
    accelerator.trackers = [Tracker()]
    log.close()
    assert "a tracker cannot write (LookupError: no answer" in capsys.readouterr().err


def test_a_tracker_that_does_not_start_is_wrong_input(tmp_path, monkeypatch, capsys):
    from accelerate import Accelerator

    def fail(*arguments, **more):
        raise LookupError("no key")

    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    words = [
        "train",
        str(ROOT / "configs" / "quickstart.yaml"),
        f"run.dir={tmp_path / 'run'}",
        *TINY,
        "run.trackers=[tensorboard]",
    ]
    assert main(words) == 2
    assert "run.trackers: tensorboard cannot start: LookupError: no key" in capsys.readouterr().err


def test_a_program_that_configures_logging_does_not_silence_the_reason_of_an_end(tmp_path, capsys):
    import logging.config

    with console.log_file(tmp_path / "train.log", 0) as note:
        logging.disable(logging.CRITICAL)
        try:
            console.say("one")
        finally:
            logging.disable(logging.NOTSET)
        logging.config.dictConfig({"version": 1})  # disables all loggers, and closes all handlers
        console.say("two")
        note("three")
    assert capsys.readouterr().err == "one\ntwo\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.rpartition(" rank 0 ")[2] for line in lines] == ["INFO one", "INFO two", "ERROR three"]


def test_a_log_file_that_hangs_holds_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "LONGEST_WRITE", 0.1)
    os.mkfifo(tmp_path / "train.log")  # to open it waits for a reader
    begun = time.monotonic()
    with console.log_file(tmp_path / "train.log", 0):
        for _ in range(1000):
            console.say("line")
    assert time.monotonic() - begun < limit(2)


def test_a_level_that_was_set_before_dkd_was_used_is_kept(tmp_path):
    code = """
import logging, dkd
logging.getLogger("dkd").setLevel(logging.ERROR)
from dkd import console
console.say("quiet")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, timeout=limit(30)
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("level", "shown"), [("INFO", True), ("ERROR", False)])
def test_a_bar_is_shown_on_a_terminal_unless_lines_are_silenced(monkeypatch, level, shown):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console.LOGGER, "level", getattr(logging, level))
    progress = Progress(10, 0, 32, shown=True)
    progress.step(3, {"loss": 1.5})
    progress.say("a line")
    progress.close()
    assert bool(terminal.getvalue()) == shown
