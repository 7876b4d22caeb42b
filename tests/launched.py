"""Launches of this suite: scripts of tests/ranks/ on several processes, and how long a launch may take.

Starting processes costs far more than any case, so a launch runs many cases, and only those that the selected tests ask
for.
"""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# `make test-all` asks for long trainings; the claims of most are made in the first steps already, or not at all.
LONG = os.environ.get("DKD_TEST_LONG") == "1"
STEPS = 20 if LONG else 8

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS / "ranks"


@functools.cache
def slowness():
    """How many times as long as on an idle machine of 2020 something takes here and now: other work on the machine
    counts, too.

    Measured once, at the start of a session; the processes that tests start are given the number.
    """
    if "DKD_TEST_SLOWNESS" in os.environ:
        return float(os.environ["DKD_TEST_SLOWNESS"])
    begun = time.perf_counter()
    total = 0
    for number in range(1_000_000):
        total += number * number
    return max(1.0, (time.perf_counter() - begun) / 0.08)


def limit(seconds):
    """Seconds after which a process that is expected to take a tenth of `seconds` hangs. Never a measure of speed."""
    return seconds * max(2.0, 2 * slowness())


def pause(seconds):
    """Seconds for what tests wait for on purpose, such as a rank that is to be given up: longer where everything else
    takes longer."""
    return seconds * slowness()


def child_environment(**more):
    """Of a process that a test starts: one thread, no GPU, this checkout's modules."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), str(SCRIPTS), *filter(None, map(str, sys.path))])
    given = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": paths,
        "DKD_TEST_SLOWNESS": f"{slowness():.3g}",
    }
    return {**os.environ, **given, **more}


def torchrun(world_size, script, *arguments, seconds=300, environment=None):
    """Run a script on `world_size` processes of this machine, 0: on one without a launcher; a failure shows what they
    printed."""
    command = [sys.executable]
    if world_size > 0:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    command += [str(script), *map(str, arguments)]
    environment = environment or child_environment(DS_ACCELERATOR="cpu")
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=limit(seconds), env=environment, cwd=TESTS.parent
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def read_ranks(folder, world_size):
    """What each rank has left in `folder`."""
    return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def launch(world_size, folder, cases):
    """Run the named cases of tests/ranks/run_cases.py. Returns, for each case, the list of what the ranks returned."""
    (Path(folder) / "cases.json").write_text(json.dumps(sorted(cases)))
    # One process has no process group here: what a user's own loop is without a launcher.
    torchrun(world_size if world_size > 1 else 0, SCRIPTS / "run_cases.py", folder, Path(folder) / "cases.json")
    ranks = read_ranks(folder, world_size)
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def names_in(function, known):
    """Which of the known names a test function speaks of, in its own code and in the functions inside it."""
    found, codes = set(), [function.__code__]
    while codes:
        for constant in codes.pop().co_consts:
            if hasattr(constant, "co_consts"):
                codes.append(constant)
            elif isinstance(constant, str | tuple | frozenset):
                found |= (
                    {constant} & known
                    if isinstance(constant, str)
                    else {c for c in constant if isinstance(c, str)} & known
                )
    return found


def parameters(item):
    """The parameters of a collected test."""
    return item.callspec.params if hasattr(item, "callspec") else {}
