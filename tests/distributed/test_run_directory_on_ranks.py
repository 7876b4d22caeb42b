"""A run directory under a real launcher: it restarts its ranks, or two ranks do not see the folder alike."""

import sys

import pytest
import run_directory_cases
from finished_run import TRAINING, starts
from launched import run, torchrun_command
from shared_launches import SharedLaunches, launch, names_in


def test_a_real_launcher_that_restarts_its_ranks(tmp_path):
    """`--max_restarts` and `--overwrite`: the older run is replaced once, and the checkpoints of this one are not."""
    folder = tmp_path / "run"
    train = ["dkd", "train", *TRAINING, f"run.dir={folder}"]
    run([sys.executable, "-m", *train])
    fails = ["student.name=small_models:FailsOnce", "student.norm=null", "checkpoint.background=false"]
    run(torchrun_command(1, "--max_restarts", 1, "-m", *train, *fails, "--overwrite"), 420)
    assert starts(folder) == [0, 2]


CASES = {case.__name__: (f"run_directory_cases:{case.__name__}",) for case in run_directory_cases.CASES}


def uses(item):
    """Return the cases that a test speaks of."""
    names = names_in(item, set(CASES))
    if "private_copy" in names:
        names.add("late_file")  # whose run is copied
    return [(2, {name: CASES[name] for name in CASES if name in names})]


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """Case -> what two ranks came to, all in one launch."""

    def start(world, cases):
        ordered = {name: case for name, case in CASES.items() if name in cases}
        return launch(world, tmp_path_factory.mktemp("ranks"), ordered, 420)

    return SharedLaunches(request, uses, start)[2]


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
