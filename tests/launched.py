"""Runs the cases of tests/ranks/ under a real launch, many cases in one launch: starting processes costs far more than any case."""

import json
import os
import subprocess
import sys
from pathlib import Path

TIME_LIMIT = 420  # seconds; a hang ends the test, not the suite


def launch(world_size, folder):
    """Run every case on `world_size` processes. Returns, for each case, the list of what the ranks returned."""
    script = Path(__file__).parent / "ranks" / "run_cases.py"
    command = [sys.executable, str(script), str(folder)]
    if world_size > 1:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size), str(script), str(folder)
        ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    ranks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world_size)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}
