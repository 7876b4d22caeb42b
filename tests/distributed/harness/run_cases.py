"""Run the cases that a file names, in this process, which may be one rank of many.

    run_cases.py FOLDER CASES.json

CASES.json holds name -> ["module:function", arguments]; the function is called with FOLDER and the arguments. What each
case returns, or its error, is written to FOLDER/rankN.json.
"""

import importlib
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dkd.engines.accelerated import leave_process_group


def begin():
    """Join the process group, if a launcher has started this process; return the rank."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # float32 in full, as the comparisons want it.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=600))
    return dist.get_rank()


def function_of(path):
    """Return the function of "module:function"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def run_case(function, folder, arguments):
    """Return what the case returns, or its error as text: the others run all the same."""
    torch.manual_seed(0)
    try:
        return function(folder, *arguments)
    except Exception:
        return {"error": traceback.format_exc()}


def main():
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    functions = {name: function_of(path) for name, (path, _) in cases.items()}
    rank = begin()
    results = {}
    for name, (_, arguments) in cases.items():
        results[name] = run_case(functions[name], folder, arguments)
        if isinstance(results[name], dict) and "error" in results[name]:
            print(f"rank {rank}: {name}: {results[name]['error']}", flush=True)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
