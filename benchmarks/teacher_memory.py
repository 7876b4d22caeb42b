"""What a teacher costs each rank in memory and time, whole or in shards.

    python -m benchmarks.teacher_memory                 ViT-L/16 on 1, 2 and 4 processes: a few minutes, 8 GB of memory
    python -m benchmarks.teacher_memory --teacher torchvision/vit_b_16 --worlds 2

Random weights in a safetensors file, float32, loaded as a training loads them; then forwards of `--batch` images on
each rank. On CPUs, with gloo over loopback. Peak memory is the process's largest resident set beyond what it held with
all libraries imported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

PLACEMENTS = ("replicated", "fsdp2")


def worker(options: argparse.Namespace) -> None:
    """One rank, one placement."""
    import torch
    import torch.distributed as dist

    from dkd.build.models import build_teacher
    from dkd.config.loading import validate
    from dkd.engines.accelerated import leave_process_group
    from dkd.engines.arithmetic import Arithmetic
    from dkd.engines.sharded_weights import parameter_counts
    from dkd.launch import Launch

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tap = options.tap
    recipe = validate(
        {
            "data": {"train": "digits", "validation": "digits", "classes": 1000, "transforms": "digits"},
            "student": {"name": "torchvision/resnet18"},
            "teacher": {"name": options.teacher, "weights": options.weights, "placement": options.placement},
            "losses": {"sp": {"gamma": 1, "reference_batch": 1, "pairs": [["layer4", tap]]}},
            "train": {"global_batch": 1, "epochs": 1, "precision": "fp32", "channels_last": False},
            "optimizer": {"name": "sgd", "lr": 1},
            "schedule": {"name": "constant"},
        }
    )
    before = resident()
    teacher = build_teacher(recipe, Launch.read(), Arithmetic.of(recipe), torch.device("cpu"))
    assert teacher is not None
    built = resident()
    images = torch.randn(options.batch, 3, 224, 224)
    seconds = []
    for _ in range(options.forwards):
        dist.barrier()
        started = time.perf_counter()
        teacher(images)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    kept, total = parameter_counts(teacher)
    found = {
        "kept": 4 * kept,
        "total": 4 * total,
        "built": built - before,
        "peak": resident() - before,
        "seconds": median(seconds[1:]),
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    if dist.get_rank() == 0:
        worst = {key: max(rank[key] for rank in every) for key in found}
        Path(options.worker).write_text(json.dumps(worst))
    leave_process_group()


def resident() -> int:
    """The largest resident set of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher", default="torchvision/vit_l_16", help="a model by name (default torchvision/vit_l_16)"
    )
    parser.add_argument(
        "--tap", default="encoder.layers.encoder_layer_23", help="the last tap (default ViT-L's last block)"
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], metavar="W")
    parser.add_argument("--batch", type=int, default=1, help="images a rank forwards at once (default 1)")
    parser.add_argument("--forwards", type=int, default=3, help="forwards; the first is not timed (default 3)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    parser.add_argument("--placement", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    if options.forwards < 2 or options.batch < 1 or min(options.worlds) < 1:
        parser.error("--forwards takes a number from 2, --batch and --worlds numbers from 1")
    print("| W | teacher | parameters kept a rank, MB | peak when built, MB | peak with forwards, MB | forward, s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.safetensors"
        write_weights(options.teacher, weights)
        for world in options.worlds:
            for placement in PLACEMENTS:
                result = Path(folder) / "result.json"
                torchrun = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc_per_node",
                    str(world),
                ]
                named = [
                    "--teacher",
                    options.teacher,
                    "--tap",
                    options.tap,
                    "--batch",
                    str(options.batch),
                    "--forwards",
                    str(options.forwards),
                ]
                mine = ["--worker", str(result), "--weights", str(weights), "--placement", placement]
                # Freed memory goes back to the system, so that the resident set shows what is held.
                environment = {
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                    "MALLOC_MMAP_THRESHOLD_": "1048576",
                }
                command = [*torchrun, "-m", "benchmarks.teacher_memory", *named, *mine]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"a measurement failed:\n{done.stderr[-4000:]}")
                found = json.loads(result.read_text())
                megabytes = " | ".join(f"{found[key] / 1e6:.0f}" for key in ("kept", "built", "peak"))
                print(f"| {world} | {placement} | {megabytes} | {found['seconds']:.1f} |", flush=True)
    return 0


def write_weights(name: str, path: Path) -> None:
    from safetensors.torch import save_file

    from dkd.models import ModelSpec, build_model

    save_file(build_model(ModelSpec(name, 1000)).state_dict(), path)


if __name__ == "__main__":
    sys.exit(main())
