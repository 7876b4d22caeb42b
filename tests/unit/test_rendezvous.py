"""The ranks of a start find each other in a key-value store that has seen other starts."""

import os
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from launched import limit, pause

from dkd.distributed.rendezvous import Refused, RendezvousError, meet


@pytest.fixture
def store():
    """A server, and a client for each rank, as in a launch: clients of one connection wait for each other."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=limit(10)))


def together(store, ranks, timeout=None, refusals=None, delays=None, gpus=None):
    """Return what each rank's `meet` returned or raised."""
    found = {}

    def run(rank):
        time.sleep((delays or {}).get(rank, 0))
        seconds = limit(10) if timeout is None else timeout
        try:
            found[rank] = meet(store(), rank, 3, seconds, (refusals or {}).get(rank), (gpus or {}).get(rank))
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


def test_ranks_of_a_start_that_died_before_its_rendezvous_do_not_take_part(store):
    """Ranks 0 and 2 joined and were killed; then all three join, rank 2 long after the others."""
    assert all(isinstance(found, RendezvousError) for found in together(store, (0, 2), timeout=pause(0.5)).values())
    found = together(store, (0, 1, 2), delays={2: 1.0})
    assert len(set(found.values())) == 1
    assert isinstance(found[0], str)


def test_a_rank_0_that_is_restarted_starts_the_ranks_that_waited_for_the_one_before(store):
    found = {}
    waiting = threading.Thread(target=lambda: found.update(together(store, (1, 2), timeout=limit(10))))
    waiting.start()
    time.sleep(0.3)  # they are there, and rank 0 offers them its name before it ends
    assert isinstance(together(store, (0,), timeout=0)[0], RendezvousError)
    found |= together(store, (0,))
    waiting.join()
    assert len(set(found.values())) == 1


def test_a_rank_that_does_not_arrive_is_named(store):
    found = together(store, (0, 1), timeout=pause(0.5))
    assert f"rank 2 did not arrive within {pause(0.5):g} s; this is rank 0 on " in str(found[0])
    assert f"rank 0 did not start this rank within {pause(0.5):g} s" in str(found[1])


def test_the_refusal_of_one_rank_is_raised_on_all(store):
    found = together(store, (0, 1, 2), refusals={1: "data.train: not here"})
    assert all(isinstance(error, Refused) for error in found.values())
    assert {str(error) for error in found.values()} == {f"rank 1 on {os.uname().nodename}: data.train: not here"}
    # And an earlier refusal is forgotten.
    assert len(set(together(store, (0, 1, 2)).values())) == 1


def test_two_ranks_of_one_gpu_end_all_ranks(store):
    found = together(store, (0, 1, 2), gpus={0: "node1 GPU-a", 1: "node1 GPU-b", 2: "node1 GPU-a"})
    assert all(isinstance(error, Refused) for error in found.values())
    (message,) = {str(error) for error in found.values()}
    assert message.startswith(f"rank 2 on {os.uname().nodename}: it has the same GPU as rank 0: start one process for")
    gpus = [{0: "node1 GPU-a", 1: "node2 GPU-a", 2: "node1 GPU-b"}, {0: None, 1: None, 2: None}]
    for apart in gpus:
        assert len(set(together(store, (0, 1, 2), gpus=apart).values())) == 1
