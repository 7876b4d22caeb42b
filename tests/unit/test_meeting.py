"""The ranks of a start find each other in a store that has seen others; signs of life; asking a run to stop."""

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from launched import limit, pause

from dkd.commands.launch_check.facts import compare
from dkd.commands.launch_check.findings import Findings
from dkd.distributed import stop_signals
from dkd.distributed.heartbeat import RankStatus, told
from dkd.distributed.rendezvous import Refused, RendezvousError, meet
from dkd.distributed.stop_signals import StopRequests


@pytest.fixture
def store():
    """A server, and a client for each rank, as in a launch: clients of one connection wait for each other."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=limit(10)))


def together(store, ranks, timeout=None, refusals=None, delays=None):
    """What each rank's `meet` returned or raised."""
    found = {}

    def run(rank):
        time.sleep((delays or {}).get(rank, 0))
        try:
            found[rank] = meet(store(), rank, 3, limit(10) if timeout is None else timeout, (refusals or {}).get(rank))
        except (RendezvousError, Refused) as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_start_has_a_name_of_its_own_whatever_earlier_ones_left(store):
    names = [together(store, (0, 1, 2), delays={start % 3: 0.3}) for start in range(4)]
    assert all(len(set(start.values())) == 1 for start in names)
    assert len({start[0] for start in names}) == 4


def test_ranks_of_a_start_that_died_before_it_met_do_not_take_part(store):
    """Ranks 0 and 2 came, and were killed; then all three come, rank 2 long after the others."""
    assert all(isinstance(found, RendezvousError) for found in together(store, (0, 2), timeout=pause(0.5)).values())
    found = together(store, (0, 1, 2), delays={2: 1.0})
    assert len(set(found.values())) == 1
    assert isinstance(found[0], str)


def test_a_first_rank_that_comes_again_starts_those_that_waited_for_the_one_before(store):
    found = {}
    waiting = threading.Thread(target=lambda: found.update(together(store, (1, 2), timeout=limit(10))))
    waiting.start()
    time.sleep(0.3)  # they are there, and rank 0 offers them its name before it ends
    assert isinstance(together(store, (0,), timeout=0)[0], RendezvousError)
    found |= together(store, (0,))
    waiting.join()
    assert len(set(found.values())) == 1


def test_who_did_not_come_is_named(store):
    found = together(store, (0, 1), timeout=pause(0.5))
    assert f"rank 2 did not come within {pause(0.5):g} s; this is rank 0 on " in str(found[0])
    assert f"rank 0 did not start this rank within {pause(0.5):g} s" in str(found[1])


def test_a_rank_that_cannot_take_part_tells_all(store):
    found = together(store, (0, 1, 2), refusals={1: "data.train: not here"})
    assert all(isinstance(error, Refused) for error in found.values())
    assert {str(error) for error in found.values()} == {f"rank 1 on {os.uname().nodename}: data.train: not here"}
    # And an earlier refusal is forgotten.
    assert len(set(together(store, (0, 1, 2)).values())) == 1


def signs(**places):
    """rank0=(count, place, what, end)"""
    return {
        int(rank[4:]): RankStatus(count, "node", place, what, end) for rank, (count, place, what, end) in places.items()
    }


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        # Rank 1 hangs: it gives signs of life, and is behind.
        (
            signs(rank0=(5, (2,), "backward", ""), rank1=(5, (1,), "forward", "")),
            signs(rank0=(8, (2,), "backward", "gave up waiting"), rank1=(8, (1,), "forward", "")),
            ["rank 1 on node: forward"],
        ),
        # Rank 1 is gone; how far it had come tells nothing.
        (
            signs(rank0=(5, (2,), "backward", ""), rank1=(5, (2,), "backward", "")),
            signs(rank0=(8, (2,), "backward", ""), rank1=(5, (2,), "backward", "")),
            ["rank 1 on node: no sign of life, last seen at backward"],
        ),
        # Rank 1 ended by itself; rank 2 waits, as this one does.
        (
            signs(
                rank0=(5, (2,), "x", ""), rank1=(5, (2,), "x", "ValueError: 3"), rank2=(5, (2,), "x", "gave up waiting")
            ),
            signs(
                rank0=(8, (2,), "x", ""), rank1=(5, (2,), "x", "ValueError: 3"), rank2=(5, (2,), "x", "gave up waiting")
            ),
            ["rank 1 on node: ended at x: ValueError: 3"],
        ),
        (signs(rank0=(5, (2,), "x", "")), signs(rank0=(6, (2,), "x", "")), ["rank 1: has not come"]),
    ],
)
def test_what_signs_of_life_say(before, now, said):
    assert told(before, now, 0, max(len(now), 2)) == said


@pytest.fixture
def noted():
    kept = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    stop_signals.note_signals()
    yield
    stop_signals.stop_noting()
    assert {number: signal.getsignal(number) for number in stop_signals.SIGNALS} == kept


@pytest.mark.parametrize("number", stop_signals.SIGNALS)
def test_a_signal_leaves_a_note_and_does_nothing_else(noted, tmp_path, number):
    requests = StopRequests(tmp_path, looks=True)
    assert requests.asked_by() is None
    os.kill(os.getpid(), number)
    assert requests.asked_by() == number.name
    (tmp_path / "STOP").touch()
    assert requests.asked_by(look=True) == "STOP"


def test_a_stop_file_is_seen_by_the_rank_that_looks(noted, tmp_path):
    (tmp_path / "STOP").touch()
    assert StopRequests(tmp_path, looks=True).asked_by() == "STOP"
    assert StopRequests(tmp_path, looks=False).asked_by() is None


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({}, 75),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, 75),
        ({"TORCHELASTIC_MAX_RESTARTS": "3"}, 0),
        ({"DKD_STOP_EXIT_CODE": "9"}, 9),
    ],
)
def test_the_exit_code_of_a_stop(monkeypatch, variables, code):
    for name in ("TORCHELASTIC_MAX_RESTARTS", "DKD_STOP_EXIT_CODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert stop_signals.exit_code() == code


FACTS = {
    "host": "node1",
    "engine": "ddp",
    "device": "cuda",
    "device_name": "A",
    "memory": 80,
    "nccl": "2",
    "python": "3.11",
    "code": "c",
}


@pytest.mark.parametrize(
    ("changes", "problems", "warnings"),
    [
        ({}, [], []),
        ({"package torch": "2.13"}, ["torch differs: 2.14 on rank 0 (node1); 2.13 on rank 1 (node2)"], []),
        ({"code": "d"}, ["the code of dkd differs: c on rank 0 (node1); d on rank 1 (node2)"], []),
        ({"device_name": "B"}, [], ["the devices differ: A on rank 0 (node1); B on rank 1 (node2)"]),
        (
            {"host": "node1", "device_id": "0"},
            ["rank 0 and rank 1 have the same GPU of node1: give each process a GPU of its own"],
            [],
        ),
        (
            {"clock": 100.0},
            [],
            ["clocks differ by 100 s, or ranks joined that far apart; the clock of node1 is behind"],
        ),
    ],
)
def test_ranks_that_are_not_alike_are_told(changes, problems, warnings):
    first = {**FACTS, "package torch": "2.14", "device_id": "0", "clock": 0.0}
    found = Findings()
    compare([first, {**first, "host": "node2", "device_id": "1", **changes}], found)
    assert (found.problems, found.warnings) == (problems, warnings)
