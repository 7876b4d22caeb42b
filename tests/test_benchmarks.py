"""The benchmarks run; what they measure is not judged here."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_step_benchmark_prints_its_table():
    command = [
        sys.executable,
        "-m",
        "benchmarks.step",
        "--student",
        "resnet8",
        "--teacher",
        "resnet8",
        "--batch",
        "4",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "both (the defaults)" in result.stdout
    assert "share of the step, defaults: data" in result.stdout
