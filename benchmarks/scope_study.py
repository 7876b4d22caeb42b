"""When the global batch matters: SP, PKT and DIST over the global batch against the same losses over micro-batches of
8, 16, 32 and 128 rows, at equal weight for each row. CIFAR-10, small ResNets, paired by seed.

    python -m benchmarks.scope_study --data FOLDER                   everything: 28 rows, 3 seeds, 85 trainings
    python -m benchmarks.scope_study --data DIR --seeds 5 --jobs 4   five seeds, four trainings at a time
    python -m benchmarks.scope_study --data DIR --losses sp --micro-batches 8 --epochs 2    a part, shortened
    python -m benchmarks.scope_study --table --output DIR            the table of what is finished so far, and the logs

Started again, it continues: finished runs stay, an interrupted one starts again. The folder of --data holds
train-*.parquet and test-*.parquet. Each training is one process of OMP_NUM_THREADS threads (by default the cores,
divided by --jobs).

A step has 512 rows in micro-batches of m rows. `global` compares all 512 rows with each other, `local` only the rows of
a micro-batch: what 512/m ranks compute that do not exchange features. Both see the same micro-batches, so BatchNorm is
the same in both, and runs of one seed have the same initial weights, batches and augmentation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from benchmarks.cifar10_short import ROOT, T95

if TYPE_CHECKING:
    from torch import nn

GLOBAL_BATCH = 512
MICRO_BATCHES = (8, 16, 32, 128)
ARMS = {"local": "micro", "global": "step"}
"""Values of the key `batch` of a loss."""
# PKT's weight and DIST's (that for ImageNet) are published ones. With SP's published γ of 3000 a training this short
# ends below one without a teacher; the factor τ² of DIST's setting for CIFAR, τ = 4, makes a still larger term.
LOSSES: dict[str, dict[str, Any]] = {
    "sp": {"gamma": 1000, "reference_batch": 128, "pairs": [["layer3", "layer3"]]},
    "pkt": {"weight": 30000, "reference_batch": 64, "pairs": [["layer3", "layer3"]]},
    "dist": {"weight": 2, "tau": 1},
}
MODEL = "benchmarks.scope_study:small_resnet"


def small_resnet(depth: int, num_classes: int = 10) -> nn.Module:
    """Build a CIFAR ResNet whose first convolution has stride 2, which takes a quarter of the time."""
    from dkd.models.zoo.cifar_resnet import DEPTHS_AND_WIDTHS, CifarResNet

    model = CifarResNet(*DEPTHS_AND_WIDTHS[f"resnet{depth}"], num_classes=num_classes)
    model.conv1.stride = (2, 2)
    return model


@dataclass(frozen=True)
class Training:
    """One run: a loss (or the teacher, or a student without one), over which rows, with one micro-batch and seed."""

    loss: str
    arm: str = ""
    micro_batch: int = 128
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        if self.loss == "teacher":
            return self.loss
        return f"{'_'.join(filter(None, (self.loss, self.arm)))}-m{self.micro_batch}-seed{self.seed}"

    def result(self, runs: Path) -> dict[str, Any] | None:
        """Return student.json of the finished run; None: not finished."""
        folder = runs / self.name
        return json.loads((folder / "student.json").read_text()) if (folder / "FINISHED").exists() else None

    def top1(self, runs: Path) -> float | None:
        """Return the accuracy of the finished student in percent; None: not finished."""
        result = self.result(runs)
        return None if result is None else 100 * result["evaluation"]["top1"]

    def recipe(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return the recipe of this run."""
        teacher = self.loss == "teacher"
        recipe: dict[str, Any] = {
            "run": {
                "name": f"scope_study_{self.name}",
                "dir": str(options.runs / self.name),
                "seed": self.seed,
                "trackers": [],
                "log_every": 10,
            },
            "data": {
                "train": f"{options.data}/{'train-*.parquet' if teacher else options.images}",
                "validation": f"{options.data}/test-*.parquet",
                "classes": 10,
                "transforms": "cifar",
                "workers": 0,
            },
            "student": {"name": MODEL, "options": {"depth": 20 if teacher else 8}},
            "train": {
                "global_batch": 128 if teacher else GLOBAL_BATCH,
                "micro_batch": self.micro_batch,
                "epochs": options.teacher_epochs if teacher else options.epochs,
                "precision": "fp32",
            },
            "evaluation": {"batch": 500, "every_epochs": 1000, "agreement": False},
            "optimizer": {"name": "sgd", "lr": 0.1 if teacher else 0.3, "nesterov": True, "weight_decay": 5e-4},
            "schedule": {"name": "one_cycle"},
            "checkpoint": {"every_epochs": None},
        }
        if self.loss in LOSSES:
            weights = str(options.runs / "teacher/student.safetensors")
            recipe["teacher"] = {"name": MODEL, "options": {"depth": 20}, "weights": weights}
            recipe["losses"] = {self.loss: {**LOSSES[self.loss], "batch": ARMS[self.arm]}}
        return recipe


def list_trainings(losses: Sequence[str], micro_batches: Sequence[int], seeds: int) -> list[Training]:
    """Return the students' runs, seed by seed, so that an interrupted table is a smaller table; the smallest
    micro-batch is first."""
    return [
        training
        for seed in range(seeds)
        for m in micro_batches
        for training in (
            Training("none", "", m, seed),
            *(Training(loss, arm, m, seed) for loss in losses for arm in ARMS),
        )
    ]


def train(training: Training, options: argparse.Namespace) -> None:
    """Train a run that is not finished; its output goes to a log beside the run's folder."""
    if training.result(options.runs) is not None:
        return
    import dkd

    options.runs.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (
        (options.runs / f"{training.name}.log").open("a") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            result = dkd.train(training.recipe(options), options.set)
        except (dkd.InputError, dkd.RunError) as error:
            raise SystemExit(f"{training.name}: {error}") from error
    assert result.top1 is not None
    seconds = time.monotonic() - started
    print(f"{time.strftime('%H:%M:%S')}  {training.name:<24} {100 * result.top1:6.2f} %  {seconds:4.0f} s", flush=True)


def interval(values: Sequence[float]) -> str:
    """Return the mean with Student's 95 % interval, as text."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    half = T95.get(len(values) - 1, 1.96) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.2f} ± {half:.2f}"


def table(runs: Path, losses: Sequence[str], micro_batches: Sequence[int], seeds: int) -> str:
    """Mean top-1 of the three students of each loss and micro-batch, and their differences, paired by seed."""
    teacher = Training("teacher").result(runs)
    lines = []
    if teacher is not None:
        evaluation = teacher["evaluation"]
        lines = [f"Teacher: {100 * evaluation['top1']:.2f} % ({evaluation['samples']} images).", ""]
    lines += [
        "| loss | m | seeds | no teacher | local | global | local − none | global − none | global − local |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    over_all = []
    for loss in losses:
        of_loss: dict[int, list[float]] = {}  # seed: global − local of each micro-batch
        for m in micro_batches:
            top1 = {
                seed: (none, local, whole)
                for seed in range(seeds)
                if (none := Training("none", "", m, seed).top1(runs)) is not None
                and (local := Training(loss, "local", m, seed).top1(runs)) is not None
                and (whole := Training(loss, "global", m, seed).top1(runs)) is not None
            }
            for seed, (_, local, whole) in top1.items():
                of_loss.setdefault(seed, []).append(whole - local)
            means = [f"{mean(values):.2f} %" for values in zip(*top1.values(), strict=True)] or [""] * 3
            differences = [interval([row[a] - row[b] for row in top1.values()]) for a, b in ((1, 0), (2, 0), (2, 1))]
            lines.append(f"| {loss.upper()} | {m} | {len(top1)} | " + " | ".join([*means, *differences]) + " |")
        complete = [mean(values) for values in of_loss.values() if len(values) == len(micro_batches)]
        if complete:
            over_all.append(f"| {loss.upper()} | {len(complete)} | {interval(complete)} |")
    lines += [
        "",
        "m is the number of rows of a micro-batch, which are the rows that `local` compares. All numbers",
        "of a line are of the seeds that all three students have finished. Differences are points of",
        "top-1, paired by seed; ± is half of Student's 95 % interval.",
    ]
    if over_all:
        lines += ["", "| loss, mean over m | seeds | global − local |", "|---|---|---|", *over_all]
    return "\n".join(lines)


def write_results(options: argparse.Namespace, text: str, trainings: Sequence[Training]) -> None:
    """Write the table, and the facts and metrics of each finished run."""
    logs = options.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    facts = {}
    for training in trainings:
        result = training.result(options.runs)
        if result is None:
            continue
        shutil.copyfile(options.runs / training.name / "metrics.jsonl", logs / f"{training.name}.jsonl")
        starts = json.loads((options.runs / training.name / "provenance.json").read_text())
        facts[training.name] = {
            **{key: result[key] for key in ("evaluation", "steps", "seconds", "global_batch", "world_size")},
            **{key: starts[-1][key] for key in ("python", "packages")},
        }
    (options.output / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    (options.output / "results.md").write_text(text + "\n")
    print(f"\n{options.output}: results.md, results.json, logs/")


def build_parser(doc: str | None, folder: str, epochs: int) -> argparse.ArgumentParser:
    """Return the options of a study of paired trainings, whose runs lie in `runs/folder`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        default="data/cifar10",
        metavar="FOLDER",
        help="train-*.parquet and test-*.parquet (default data/cifar10)",
    )
    parser.add_argument(
        "--images",
        default="train-0000[01]-*.parquet",
        metavar="GLOB",
        help="files of --data that the students see (default train-0000[01]-*.parquet); the teacher sees all",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 … N−1 (default 3)")
    parser.add_argument("--epochs", type=int, default=epochs, metavar="N", help=f"of the students (default {epochs})")
    parser.add_argument("--teacher-epochs", type=int, default=6, metavar="N", help="(default 6)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default 1)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / folder, metavar="FOLDER", help="where runs lie")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the table, results and logs there")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="further keys of the recipes")
    parser.add_argument("--table", action="store_true", help="train nothing")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options, with absolute paths of runs and data."""
    options = parser.parse_args()
    options.runs, options.data = options.runs.resolve(), Path(options.data).resolve()
    return options


def train_all(teacher: Training, jobs: Sequence[Sequence[Training]], options: argparse.Namespace) -> None:
    """Train the teacher, and then the trainings of each job one after another, `options.jobs` jobs at a time."""
    # torch reads it when it is imported, which only `train` does.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    train(teacher, options)
    run = partial(_train_in_order, options=options)
    if options.jobs == 1:
        for job in jobs:
            run(job)
    else:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(run, jobs))


def _train_in_order(trainings: Sequence[Training], options: argparse.Namespace) -> None:
    for training in trainings:
        train(training, options)


def main() -> int:
    parser = build_parser(__doc__, "scope_study", epochs=3)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--micro-batches", nargs="+", type=int, default=list(MICRO_BATCHES), metavar="m")
    options = parse(parser)
    teacher, students = Training("teacher"), list_trainings(options.losses, options.micro_batches, options.seeds)
    if not options.table:
        train_all(teacher, [[student] for student in students], options)
    text = table(options.runs, options.losses, options.micro_batches, options.seeds)
    print(f"\n{text}")
    if options.output is not None:
        write_results(options, text, [teacher, *students])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
