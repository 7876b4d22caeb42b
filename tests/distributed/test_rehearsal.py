"""The tests of one GPU run on CPUs, too, so that a person with a GPU meets no mistake of the tests themselves."""

import sys

import pytest
from launched import ROOT, run

FILE = "tests/distributed/test_one_gpu.py"
# Each way of starting ranks once; `make rehearse-gpu` runs all.
SOME = "launch_check or of_plain_formulas and 2 or memory"


def outcome(words, **variables):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-m",
        "gpu",
        "-rs",
        FILE,
        "-k",
        words,
    ]
    return run(command, 300, check=False, cwd=ROOT, **variables)


@pytest.mark.slow
def test_the_tests_of_one_gpu_pass_on_cpus():
    result = outcome(SOME, DKD_REHEARSE_GPU="1")
    assert result.returncode == 0, result.stdout[-6000:]
    assert "3 passed" in result.stdout


def test_without_a_gpu_they_say_that_nothing_is_checked():
    result = outcome("launch_check", DKD_REHEARSE_GPU="0")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "there is no GPU: nothing is checked; make rehearse-gpu runs it on CPUs" in result.stdout
