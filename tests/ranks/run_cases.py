"""Runs the cases that a file names, in this process, which may be one rank of many; writes what they return to
FOLDER/rankN.json."""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import evaluation_cases
import loss_cases
import trainer_cases

from dkd.engines.engine import leave_process_group

CASES = [*loss_cases.CASES, *evaluation_cases.CASES, *trainer_cases.CASES]


def main():
    folder, wanted = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank = dist.get_rank() if dist.is_initialized() else 0
    results = {}
    for case in CASES:
        if case.__name__ not in wanted:
            continue
        torch.manual_seed(0)
        try:
            results[case.__name__] = case(folder)
        except Exception:
            results[case.__name__] = {"error": traceback.format_exc()}
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
