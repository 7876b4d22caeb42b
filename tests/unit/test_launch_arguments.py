"""What `dkd launch` starts, and what it refuses before it starts anything. With real ranks:
tests/distributed/test_launch_command.py."""

import pytest
from launched import ROOT

from dkd.cli import main
from dkd.commands.launch import command as launch_command
from dkd.engines import starting

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture
def started(monkeypatch):
    """What would have been started."""
    calls = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(starting, "run_ranks", lambda *arguments: calls.append(arguments) or 7)
    monkeypatch.setattr(starting, "devices", lambda: 8)
    return calls


@pytest.mark.parametrize(
    ("words", "ranks", "processes", "engine", "restarts"),
    [
        ([QUICKSTART], ["train", QUICKSTART], 8, "ddp", 0),
        (["-n", "2", QUICKSTART, "run.dir=a"], ["train", QUICKSTART, "run.dir=a"], 2, "ddp", 0),
        (
            [QUICKSTART, "--engine", "zero2", "--dry-run", "run.dir=a", "--overwrite", "--max-restarts", "3"],
            ["train", QUICKSTART, "run.dir=a", "--dry-run", "--overwrite"],
            8,
            "zero2",
            3,
        ),
        (
            ["train", QUICKSTART, "--fresh", "--allow-recipe-change"],
            ["train", QUICKSTART, "--fresh", "--allow-recipe-change"],
            8,
            "ddp",
            0,
        ),
        (["-n", "2", "evaluate", "runs/a"], ["evaluate", "runs/a"], 2, "ddp", 0),
        (
            ["-n", "2", "--", "evaluate", "runs/a", "--trust-code"],
            ["evaluate", "runs/a", "--trust-code"],
            2,
            "ddp",
            0,
        ),
        (["--", "launch-check", "--seconds", "9"], ["launch-check", "--seconds", "9"], 8, "ddp", 0),
        (["--", QUICKSTART, "--dry-run"], ["train", QUICKSTART, "--dry-run"], 8, "ddp", 0),
    ],
)
def test_the_ranks_get_their_command_and_its_options(started, words, ranks, processes, engine, restarts):
    assert main(["launch", *words]) == 7
    assert started == [(ranks, processes, engine, restarts)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such.yaml"], "no such recipe: 'no-such.yaml'"),
        ([QUICKSTART, "student.nmae=a"], "student.nmae: unknown key; did you mean student.name?"),
        (["evaluate"], "RUN_OR_CHECKPOINT"),
        (["--", "evaluate", "runs/a", "--dry-run"], "unrecognized arguments: --dry-run"),
    ],
)
def test_wrong_input_starts_nothing(started, capsys, words, message):
    assert main(["launch", *words]) == 2
    assert message in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize("words", [[], ["-n", "0", QUICKSTART], ["--max-restarts", "-1", QUICKSTART], ["--"]])
def test_wrong_options_start_nothing(started, words):
    with pytest.raises(SystemExit) as exit_:
        main(["launch", *words])
    assert exit_.value.code == 2
    assert started == []


def test_a_rank_starts_no_ranks(started, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["launch", QUICKSTART]) == 2
    assert "a launcher has already started this process" in capsys.readouterr().err
    assert started == []


def test_other_commands_start_ranks_by_a_function(started):
    assert launch_command.start(["train", QUICKSTART]) == 7
    assert launch_command.start(["train", QUICKSTART], processes=2, engine="fsdp2", max_restarts=1) == 7
    assert started == [(["train", QUICKSTART], 8, "ddp", 0), (["train", QUICKSTART], 2, "fsdp2", 1)]


def test_each_process_needs_a_gpu_of_its_own_where_there_are_gpus(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(starting, "has_gpu", lambda: True)
    monkeypatch.setattr(starting, "devices", lambda: 2)
    assert main(["launch", "-n", "3", QUICKSTART]) == 2
    assert "this machine has 2 GPUs, and each process needs one; take -n 2, or --engine cpu" in capsys.readouterr().err
    starting.check_processes(2, "ddp")
    starting.check_processes(3, "cpu")


def test_engines_are_the_files_of_launch(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    files = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
    assert [starting.engine_file(engine) for engine in starting.ENGINES] == files
    own = tmp_path / "own.yaml"
    assert main(["launch", "--engine", str(own), QUICKSTART]) == 2
    assert f"--engine {own}: no such file; take one of cpu, ddp, fsdp2, zero1, zero2, zero3" in capsys.readouterr().err
    own.touch()
    assert starting.engine_file(str(own)) == own
