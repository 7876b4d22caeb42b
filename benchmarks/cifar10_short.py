"""What each loss does for accuracy: CIFAR-10, a WRN-16-2 teacher trained here, WRN-16-1 students with several seeds a
row.

    python -m benchmarks.cifar10_short --data FOLDER  the recipes of configs/official/cifar10_short, 3 seeds
    python -m benchmarks.cifar10_short --data DIR --seeds 5 --jobs 6           six trainings at a time (on a GPU)
    python -m benchmarks.cifar10_short --data DIR --rows none at --epochs 2    a part, shortened
    python -m benchmarks.cifar10_short --table                                 the table of what is finished so far

Started again, it continues: finished runs stay, interrupted ones resume. The folder of --data holds train-*.parquet and
test-*.parquet.
Students are compared with the student without a teacher of the same seed: same initial weights, same batches, same
augmentation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "configs/official/cifar10_short"
ROWS = {
    "none": "no teacher",
    "kd": "KD",
    "at": "AT",
    "sp_local": "SP, local (128 rows)",
    "sp_global": "SP, global (512 rows)",
    "at_kd": "AT + KD, β decaying",
    "at_sp": "AT + SP, global",
    "dist": "DIST",
    "dkd": "DKD",
    "pkt": "PKT",
    "crd": "CRD",
}
# Student's t for a two-sided 95 % interval, by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True)
class Training:
    """One run: a recipe of the folder with one seed."""

    row: str
    seed: int
    runs: Path

    @property
    def folder(self) -> Path:
        return self.runs / (self.row if self.row == "teacher" else f"{self.row}-seed{self.seed}")

    def result(self) -> dict[str, Any] | None:
        """student.json of the finished run; None: not finished."""
        return json.loads((self.folder / "student.json").read_text()) if (self.folder / "FINISHED").exists() else None


def train(training: Training, options: argparse.Namespace) -> None:
    """Run `dkd train`, or resume it; its output goes to the run's output.log. Exits when it fails."""
    if training.result() is not None:
        return
    epochs = options.teacher_epochs if training.row == "teacher" else options.epochs
    overrides = [
        f"run.dir={training.folder}",
        f"run.seed={training.seed}",
        "run.trackers=[]",
        f"data.train={options.data}/train-*.parquet",
        f"data.validation={options.data}/test-*.parquet",
        *(
            []
            if training.row in ("teacher", "none")
            else [f"teacher.weights={training.runs}/teacher/student.safetensors"]
        ),
        *([f"train.epochs={epochs}"] if epochs else []),
        *options.set,
    ]
    command = [sys.executable]
    if options.processes > 1:
        command += [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            "launch/accelerate/cpu.yaml",
            "--main_process_port",
            "0",
        ]
        command += ["--num_processes", str(options.processes), "--num_cpu_threads_per_process", "1"]
    command += ["-m", "dkd", "train", str((RECIPES / f"{training.row}.yaml").relative_to(ROOT)), *overrides]
    training.folder.parent.mkdir(parents=True, exist_ok=True)
    log = training.folder.with_suffix(".log")
    started = time.monotonic()
    with log.open("a") as output:
        threads = max(1, (os.cpu_count() or 1) // (options.jobs * options.processes))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False).returncode
    result = training.result()
    if code or result is None:
        raise SystemExit(
            f"{training.folder.name} ended with exit code {code}; the end of {log}:\n{log.read_text()[-3000:]}"
        )
    top1 = 100 * result["evaluation"]["top1"]
    print(f"{training.folder.name:<20} {top1:6.2f} %   {time.monotonic() - started:5.0f} s", flush=True)


def table(runs: Path, rows: list[str], seeds: int) -> str:
    """Mean top-1, its standard deviation over seeds, and the difference to the untaught student of the same seed."""
    teacher = Training("teacher", 0, runs).result()
    lines = []
    if teacher is not None:
        evaluation = teacher["evaluation"]
        lines += [
            f"Teacher: {teacher['architecture']['name']}, {100 * evaluation['top1']:.2f} % ({evaluation['samples']} "
            "images).",
            "",
        ]
    lines += [
        "| student | seeds | mean top-1 | sd | against no teacher, same seed | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    top1 = {
        row: {seed: found for seed in range(seeds) if (found := _top1(Training(row, seed, runs))) is not None}
        for row in rows
    }
    for row in rows:
        values = list(top1[row].values())
        if not values:
            lines.append(f"| {ROWS[row]} | 0 | | | | |")
            continue
        spread = f"{stdev(values):.2f}" if len(values) > 1 else ""
        alone = top1.get("none", {})
        differences = [value - alone[seed] for seed, value in top1[row].items() if row != "none" and seed in alone]
        against = f"{mean(differences):+.2f}" if differences else ""
        interval = ""
        if len(differences) > 1:
            half = T95.get(len(differences) - 1, 1.96) * stdev(differences) / len(differences) ** 0.5
            interval = f"{mean(differences) - half:+.2f} … {mean(differences) + half:+.2f}"
        lines.append(f"| {ROWS[row]} | {len(values)} | {mean(values):.2f} % | {spread} | {against} | {interval} |")
    lines += [
        "",
        "Means are over a row's own seeds, differences over those it shares with the student without a teacher; top-1 "
        "of the last epoch.",
    ]
    both = [
        (top1[a][s], top1[b][s])
        for a, b in [("sp_global", "sp_local")]
        if a in top1 and b in top1
        for s in top1[a]
        if s in top1[b]
    ]
    if len(both) > 1:
        differences = [a - b for a, b in both]
        half = T95.get(len(both) - 1, 1.96) * stdev(differences) / len(both) ** 0.5
        lines += [
            "",
            f"SP global against local, same seed: {mean(differences):+.2f} points, 95 % interval ± {half:.2f}.",
        ]
    return "\n".join(lines)


def _top1(training: Training) -> float | None:
    result = training.result()
    return None if result is None else 100 * result["evaluation"]["top1"]


def write_results(options: argparse.Namespace, text: str) -> None:
    """The table, each run's student.json facts and its metrics, beside the recipes."""
    logs = options.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    trainings = [Training("teacher", 0, options.runs)] + [
        Training(r, s, options.runs) for r in options.rows for s in range(options.seeds)
    ]
    facts = {}
    for training in trainings:
        result = training.result()
        if result is None:
            continue
        shutil.copyfile(training.folder / "metrics.jsonl", logs / f"{training.folder.name}.jsonl")
        starts = json.loads((training.folder / "provenance.json").read_text())
        facts[training.folder.name] = {
            **{
                key: result[key]
                for key in ("evaluation", "steps", "seconds", "global_batch", "world_size", "parameters")
            },
            **{key: starts[-1][key] for key in ("python", "packages")},
        }
    (options.output / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    (options.output / "results.md").write_text(text + "\n")
    print(f"\n{options.output}: results.md, results.json, logs/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        default="data/cifar10",
        metavar="FOLDER",
        help="train-*.parquet and test-*.parquet (default data/cifar10)",
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 … N−1 (default 3)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of the students (default: the recipes')")
    parser.add_argument("--teacher-epochs", type=int, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default 1)")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="CPU processes of each training (default 1)"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/cifar10_short", metavar="FOLDER", help="where runs lie"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the table, results and logs there")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="further keys of the recipes")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    options.runs, options.data = options.runs.resolve(), Path(options.data).resolve()
    if not options.table:
        # Seed by seed, so that an interrupted table is a smaller table; what needs no teacher does not wait for it.
        todo = [Training(row, seed, options.runs) for seed in range(options.seeds) for row in options.rows]
        alone = [training for training in todo if training.row == "none"]
        for trainings in (
            [Training("teacher", 0, options.runs), *alone],
            [training for training in todo if training not in alone],
        ):
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(lambda training: train(training, options), trainings))
    text = table(options.runs, options.rows, options.seeds)
    print(f"\n{text}")
    if options.output is not None:
        write_results(options, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
