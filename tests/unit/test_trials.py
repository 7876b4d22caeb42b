"""What `dkd launch-check` reports of collectives that give wrong numbers."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dkd.commands.launch_check.findings import Findings
from dkd.commands.launch_check.trials import try_collectives
from dkd.global_batch import collectives


@contextmanager
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tried():
    found = Findings()
    with one_rank():
        try_collectives(0, 1, torch.device("cpu"), found)
    return found


def test_right_numbers_are_no_problem():
    assert tried().problems == []


@pytest.mark.parametrize(
    ("owner", "function", "wrong", "named"),
    [
        (dist, "all_to_all_single", lambda got, sent, **more: got.fill_(7), "all-to-all"),
        (collectives, "reduce_scatter_rows", lambda rows, group=None: 2 * rows, "reduce-scatter or all-gather"),
        (collectives, "all_gather_rows", lambda rows, group=None: rows.flip(0), "reduce-scatter or all-gather"),
    ],
)
def test_wrong_numbers_are_a_problem_with_the_ranks(owner, function, wrong, named):
    with mock.patch.object(owner, function, wrong):
        assert tried().problems == [f"{named} gives wrong numbers on rank 0"]
