"""The benchmarks run; what they measure is not judged here."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(module, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_the_step_benchmark_prints_its_table():
    out = run("step", "--student", "resnet8", "--teacher", "resnet8", "--batch", 4, "--rounds", 1, "--steps", 1)
    assert "both (the defaults)" in out
    assert "share of the step, defaults: data" in out


def test_the_global_batch_benchmark_counts_the_bytes_of_the_formulas():
    """It would end with 1 if it did not, or if the strategies disagreed with common practice."""
    out = run("global_batch", "--worlds", 2, "--links", "loopback", "--shapes", "pooled", "wrn3", "--rounds", 1)
    assert "| pooled features, 2,048, 64 | 2 | loopback |" in out
    assert "FAILED" not in out
