"""More ranks than GPUs end together, with one reason and exit code 2, before NCCL is asked for anything."""

import platform
import re

import pytest
from launched import CASES, run, torchrun_command

HOST = platform.node()


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        (1, f"rank 1 on {HOST}: it has the same GPU as rank 0: start one process for each GPU, or let the launcher"),
        (2, f"rank 2 on {HOST}: process 2 of this machine (LOCAL_RANK) sees 2 GPUs, numbered from 0: start one"),
    ],
)
def test_more_ranks_than_gpus_are_refused_together(gpus, reason):
    result = run(torchrun_command(3, CASES / "seen_gpus.py", gpus), 120, check=False)
    said = result.stdout + result.stderr
    assert reason in said, said
    # torchrun lists how each rank ended; a rank that takes longer than the first may get its SIGTERM.
    codes = re.findall(r"exitcode +: (-?\d+)", said)
    assert len(codes) == 3, said
    assert "2" in codes, said
    assert set(codes) <= {"2", "-15"}, said
