"""Ranks of a training are killed while it goes on; the same command finishes it as if nothing had been."""

import subprocess
import sys
from pathlib import Path

import pytest
from launched import child_environment, limit

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("trials", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_training_whose_ranks_are_killed_ends_as_an_undisturbed_one(trials):
    """The first kill comes while a checkpoint is being written. tests/cluster kills ranks on two machines, and ten
    times in a row."""
    command = [sys.executable, "-m", "benchmarks.crash", "--trials", str(trials), "--inside", "1"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=limit(600), env=child_environment()
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 finished runs differ" in result.stdout
