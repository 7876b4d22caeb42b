"""What `dkd launch-check` reports of ranks that are not alike."""

import pytest

from dkd.commands.launch_check.facts import compare
from dkd.commands.launch_check.findings import Findings

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
            {"host": "node1", "device_id": "0", "shares_gpus": True},
            [],
            [
                "rank 0 and rank 1 have the same GPU of node1, as the environment asks NCCL to allow: for tests, not "
                "for training"
            ],
        ),
        (
            {"clock": 100.0},
            [],
            ["clocks differ by 100 s, or ranks joined that far apart; the clock of node1 is late"],
        ),
    ],
)
def test_ranks_that_are_not_alike_are_reported(changes, problems, warnings):
    first = {**FACTS, "package torch": "2.14", "device_id": "0", "clock": 0.0}
    found = Findings()
    compare([first, {**first, "host": "node2", "device_id": "1", **changes}], found)
    assert (found.problems, found.warnings) == (problems, warnings)
