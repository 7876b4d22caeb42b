"""The quickstart: a teacher, a student taught by it, and the same student alone, on scikit-learn's digits. Prints one
table.

python -m benchmarks.quickstart   what `make quickstart` runs: 3 seeds each, means and paired difference
python -m benchmarks.quickstart --seeds 1      one seed, which may fall either way: 449 images, and 5 epochs
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_TEACHER = ["teacher=null", "losses.at=null", "losses.sp=null", "losses.kd=null"]


def train(recipe: str, run: str, *overrides: str, processes: int = 2) -> dict[str, Any]:
    """Run `dkd train` under `accelerate launch`, saying the command. Returns the run's student.json."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml"]
    command += ["--num_processes", str(processes), "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    command += ["-m", "dkd", "train", recipe, f"run.dir={run}", "--overwrite", *overrides]
    print(f"\n$ accelerate launch {shlex.join(command[3:])}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((ROOT / run / "student.json").read_text())


def row(title: str, run: dict[str, Any]) -> str:
    evaluation = run["evaluation"]
    accuracy = f"{100 * evaluation['top1']:.2f} % ({evaluation['top1_correct']}/{evaluation['samples']})"
    name = run["architecture"]["name"]
    return (
        f"{title:<28}{name:<10}{run['parameters']:>12,}{accuracy:>22}{run['seconds']:>10.1f}{run['global_batch']:>14}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="seeds 0 … N−1 of the two students (default 3)"
    )
    parser.add_argument(
        "--processes", type=int, default=2, choices=(1, 2), help="processes of each training (default 2)"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="epochs of the two students (default: the recipe's 5)")
    options = parser.parse_args()
    length = [f"train.epochs={options.epochs}"] if options.epochs else []

    teacher = train("configs/quickstart_teacher.yaml", "runs/quickstart_teacher", processes=options.processes)
    pairs = []
    for seed in range(options.seeds):
        suffix = f"_seed{seed}" if seed else ""
        taught = train(
            "configs/quickstart.yaml",
            f"runs/quickstart{suffix}",
            f"run.seed={seed}",
            *length,
            processes=options.processes,
        )
        alone = train(
            "configs/quickstart.yaml",
            f"runs/quickstart_no_teacher{suffix}",
            "run.name=quickstart_no_teacher",
            f"run.seed={seed}",
            *WITHOUT_TEACHER,
            *length,
            processes=options.processes,
        )
        pairs.append((taught, alone))

    print(f"\n{'':<28}{'model':<10}{'parameters':>12}{'top-1':>22}{'seconds':>10}{'global batch':>14}")
    print(row("teacher", teacher))
    for seed, (taught, alone) in enumerate(pairs):
        label = f", seed {seed}" if options.seeds > 1 else ""
        print(row(f"student alone{label}", alone))
        print(row(f"student distilled{label}", taught))
    if len(pairs) > 1:
        differences = [100 * (taught["evaluation"]["top1"] - alone["evaluation"]["top1"]) for taught, alone in pairs]
        for title, runs in (("alone", [alone for _, alone in pairs]), ("distilled", [taught for taught, _ in pairs])):
            print(f"mean of {len(runs)} seeds, {title}: {100 * mean(run['evaluation']['top1'] for run in runs):.2f} %")
        print(
            f"distilled − alone, same seed: {mean(differences):+.2f} points, standard deviation "
            f"{stdev(differences):.2f}"
        )
    print("\nfiles: runs/quickstart_teacher, runs/quickstart, runs/quickstart_no_teacher")
    print(
        "each with student.safetensors, student.json, metrics.jsonl, recipe.yaml, provenance.json, tensorboard/, "
        "checkpoints/"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
