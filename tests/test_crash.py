"""Ranks of a training are killed while it goes on; the same command finishes it as if nothing had been."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_training_whose_ranks_are_killed_ends_as_an_undisturbed_one():
    command = [sys.executable, "-m", "benchmarks.crash", "--trials", "3", "--inside", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=420)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 finished runs differ" in result.stdout
