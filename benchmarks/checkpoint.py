"""How long training stands still for a checkpoint, written beside it and not.

python -m benchmarks.checkpoint         a ResNet-50 with SGD (205 MB of state), 2 processes, DDP, FSDP2 and ZeRO-2
python -m benchmarks.checkpoint --student torchvision/vit_b_16 --engines fsdp2

`background` trains on while a copy of the state is written; `waiting` (checkpoint.background=false) does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 16, 4
RECIPE = [
    "configs/quickstart_teacher.yaml", "student.norm=null", "data.image_size=64", "train.global_batch=16",
    "train.micro_batch=8",
    f"train.max_steps={STEPS}", "optimizer.lr=0.001", "run.trackers=[]", "checkpoint.every_epochs=null",
    f"checkpoint.every_steps={EVERY}",
    "evaluation.batch=64",
]  # fmt: skip


def written(
    student: str, engine: str, background: bool, processes: int, folder: Path
) -> tuple[list[dict[str, float]], float]:
    """The checkpoints of a training, but for the last, which nothing follows; and the median step in seconds."""
    run = folder / f"{engine}_{background}"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{engine}.yaml"]
    command += [
        "--num_processes",
        str(processes),
        "--main_process_port",
        "0",
        "-m",
        "dkd",
        "train",
        *RECIPE,
        f"student.name={student}",
    ]
    command += [f"run.dir={run}", f"checkpoint.background={str(background).lower()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise SystemExit(result.stderr[-3000:])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [16 / line["images_per_second"] for line in lines if "step" in line][2:]
    return [line["checkpoint"] for line in lines if "checkpoint" in line][:-1], statistics.median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="torchvision/resnet50", metavar="MODEL")
    parser.add_argument(
        "--engines", nargs="+", default=["ddp", "fsdp2", "zero2"], metavar="NAME", help="files of launch/accelerate/"
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    options = parser.parse_args()
    print(f"{'':>8} {'':>12} {'MB':>6} {'stands still, s':>16} {'writing, s':>11} {'a step, s':>10}")
    with tempfile.TemporaryDirectory(prefix="dkd_checkpoint_") as name:
        for engine in options.engines:
            stalls = {}
            for background in (True, False):
                checkpoints, step = written(options.student, engine, background, options.processes, Path(name))
                # Not in the background, the writing is part of the standstill.
                stall = statistics.median(c["stall"] + (0 if background else c["seconds"]) for c in checkpoints)
                stalls[background] = stall
                seconds = statistics.median(c["seconds"] for c in checkpoints)
                way = "background" if background else "waiting"
                print(
                    f"{engine:>8} {way:>12} {checkpoints[0]['bytes'] / 1e6:>6.0f} {stall:>16.3f} {seconds:>11.2f} "
                    f"{step:>10.2f}",
                    flush=True,
                )
            print(f"{engine:>8} {'':>12} {'':>6} {stalls[False] / stalls[True]:>15.1f}x shorter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
