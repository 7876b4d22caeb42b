"""Ranks of a training are killed while it goes on; the same command finishes it as if nothing had been."""

import sys

import pytest
from launched import run


@pytest.mark.parametrize("trials", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_training_whose_ranks_are_killed_ends_as_an_undisturbed_one(trials):
    """The first kill comes while a checkpoint is being written. tests/cluster kills ranks on two machines, and ten
    times in a row."""
    command = [sys.executable, "-m", "benchmarks.crash", "--trials", str(trials), "--inside", "1"]
    result = run(command, 600)
    assert "0 finished runs differ" in result.stdout
