"""What a rank reports of others while it hangs in a collective from which no exception comes, as with NCCL."""

import platform

import pytest
from launched import CASES, Launch, limit, pause, torchrun_command, until

HOST = platform.node()


@pytest.fixture
def start(tmp_path):
    """Start two ranks, of which rank 1 does as told, and yield the launch once both are at work."""
    started = []

    def begin(what):
        launch = Launch(torchrun_command(2, CASES / "heartbeat_alone.py", what), tmp_path / "log")
        started.append(launch)
        until(lambda: launch.said().count("ready") == 2, limit(60), launch)
        return launch

    yield begin
    for launch in started:
        launch.__exit__()


def test_it_ends_when_another_rank_has_reported_its_end(start):
    launch = start("ends")
    until(lambda: "dkd: rank 0 cannot continue" in launch.said(), limit(40), launch)
    reported = f"another rank has ended | rank 1 on {HOST}: ended at step 1, forward: the GPU's memory is full; this is"
    assert f"{reported} rank 0 on {HOST}: step 1, forward" in launch.said()
    assert launch.wait(limit(60)) == 1


def test_a_rank_without_a_heartbeat_is_reported_once(start):
    launch = start("stops")
    lost = f"dkd: rank 0 at step 1, forward: rank 1 on {HOST}: no heartbeat, last seen at step 1, forward"
    until(lambda: lost in launch.said(), limit(40), launch)
    assert launch.said().count("no heartbeat") == 1


def test_a_rank_that_has_done_its_part_is_not_lost(start):
    launch = start("leaves")
    with pytest.raises(AssertionError, match="not within"):
        until(lambda: "no heartbeat" in launch.said(), pause(14), launch)
