"""Losses side by side at their published weights: students without a teacher, with eight losses or sums of
losses, and without labels. CIFAR-10, small ResNets, paired by seed.

    python -m benchmarks.methods_study --data FOLDER                   everything: 12 rows, 3 seeds, 40 trainings
    python -m benchmarks.methods_study --data DIR --seeds 5 --jobs 4   five seeds, four trainings at a time
    python -m benchmarks.methods_study --data DIR --rows none kd --epochs 2    a part, shortened
    python -m benchmarks.methods_study --table --output DIR            the table of what is finished so far, with logs

Started again, it continues: finished runs stay, an interrupted one starts again. The folder of --data holds
train-*.parquet and test-*.parquet. Each training is one process of OMP_NUM_THREADS threads (by default the cores,
divided by --jobs).

Runs of one seed have the same initial weights, batches and augmentation. A student of `queue` sees no label. What it
has learned is measured by a linear probe: a second training, with labels, of a new head on the frozen student. The same
probe of a student that is not trained says what the probe reaches by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import scope_study
from benchmarks.scope_study import MODEL, build_parser, interval, parse, train_all, write_results

BATCH = 128
STAGES = ["layer1", "layer2", "layer3"]
KD: dict[str, Any] = {"ce": {"weight": 0.1}, "kd": {"alpha": 0.9, "temperature": 4}}
LOSSES: dict[str, dict[str, Any]] = {
    "kd": KD,
    # mdistiller's β for ResNet-56 → ResNet-20; for ×4 ResNets it has 8.
    "dkd": {"dkd": {"alpha": 1, "beta": 2, "temperature": 4}},
    "kd_ls": {"ce": {"weight": 0.1}, "kd": {"alpha": 9, "temperature": 2, "standardize": True}},
    "dist": {"dist": {"weight": 2, "tau": 1}},
    "pkt": {"pkt": {"weight": 30000, "reference_batch": 64, "pairs": [["pool", "pool"]]}},
    "fitnet": {"fitnet": {"preset": "repdistiller", "pairs": [["layer2", "layer2"]]}},
    "crd": {"crd": {"preset": "repdistiller", "pairs": [["pool", "pool"]]}},
    "at_kd": {**KD, "at": {"preset": "repdistiller", "pairs": [[stage, stage] for stage in STAGES]}},
    # The temperatures are SEED's.
    "queue": {
        "ce": None,
        "queue": {"weight": 1, "temperature": 0.2, "teacher_temperature": 0.01, "pairs": [["pool", "pool"]]},
    },
}
ROWS = {
    "none": "no teacher",
    "kd": "KD",
    "dkd": "DKD",
    "kd_ls": "KD-LS",
    "dist": "DIST",
    "pkt": "PKT",
    "fitnet": "FitNet",
    "crd": "CRD",
    "at_kd": "AT + KD",
}
PROBES = {
    "queue_probe": "queue, without labels",
    "untrained_probe": "not trained, BatchNorm frozen",
    "untrained_bn_probe": "not trained, BatchNorm measuring",
}
PROBE_LR = 1.0
"""Of 0.01, 0.1 and 1, tried with seed 100, the best for the students that are not trained."""


class Training(scope_study.Training):
    """One run: a row of the table, the student of `queue` before its probe, or the teacher; with one seed."""

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return self.loss if self.loss == "teacher" else f"{self.loss}-seed{self.seed}"

    def recipe(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return the recipe of this run: the teacher is that of the scope study."""
        recipe = scope_study.Training("teacher").recipe(options)
        recipe["run"] |= {"name": f"methods_study_{self.name}", "dir": str(options.runs / self.name), "seed": self.seed}
        if self.loss == "teacher":
            return recipe
        recipe["data"]["train"] = f"{options.data}/{options.images}"
        recipe["student"] = {"name": MODEL, "options": {"depth": 8}}
        recipe["train"]["epochs"] = options.epochs
        if self.loss in LOSSES:
            weights = str(options.runs / "teacher/student.safetensors")
            recipe["teacher"] = {"name": MODEL, "options": {"depth": 20}, "weights": weights}
            recipe["losses"] = deepcopy(LOSSES[self.loss])  # --set changes them
        if self.loss in PROBES:
            frozen = self.loss != "untrained_bn_probe"
            recipe["student"] |= {"freeze": ["conv1", "bn1", *STAGES], "freeze_batch_norm": frozen}
            recipe["optimizer"] |= {"lr": PROBE_LR, "weight_decay": 0}
        if self.loss == "queue_probe":
            weights = str(options.runs / Training("queue", seed=self.seed).name / "student.safetensors")
            recipe["student"] |= {"weights": weights, "head": "new"}
        return recipe


def list_jobs(rows: Sequence[str], seeds: int) -> list[list[Training]]:
    """Return the students' runs, seed by seed, so that an interrupted table is a smaller table. Those of one job come
    one after another."""
    return [
        [Training(loss, seed=seed) for loss in (("queue", row) if row == "queue_probe" else (row,))]
        for seed in range(seeds)
        for row in rows
    ]


def table(runs: Path, rows: Sequence[str], seeds: int) -> str:
    """Mean top-1 of each row, and its differences to the student without a teacher and to KD, paired by seed; of a
    probe also to those of students that are not trained."""
    top1 = {row: _top1(runs, row, seeds) for row in (*ROWS, *PROBES)}
    lines = []
    teacher = Training("teacher").result(runs)
    if teacher is not None:
        evaluation = teacher["evaluation"]
        lines = [f"Teacher: {100 * evaluation['top1']:.2f} % ({evaluation['samples']} images).", ""]
    lines += ["| student | seeds | top-1 | − no teacher | − KD |", "|---|---|---|---|---|"]
    lines += [_line(ROWS[row], top1[row], [top1["none"], top1["kd"]]) for row in ROWS if row in rows]
    lines += ["", "| linear probe of a student | seeds | top-1 | − no teacher | − KD | − frozen | − measuring |"]
    lines += ["|---|---|---|---|---|---|---|"]
    baselines = [top1[row] for row in ("none", "kd", "untrained_probe", "untrained_bn_probe")]
    lines += [_line(PROBES[row], top1[row], baselines) for row in PROBES if row in rows]
    lines += [
        "",
        "top-1 is the mean over a row's own seeds. Differences are points of top-1 over the seeds that",
        "both rows have finished, paired by seed; ± is half of Student's 95 % interval. `frozen` and",
        "`measuring` are the probes of the students that are not trained.",
    ]
    return "\n".join(lines)


def _top1(runs: Path, row: str, seeds: int) -> dict[int, float]:
    found = ((seed, Training(row, seed=seed).top1(runs)) for seed in range(seeds))
    return {seed: value for seed, value in found if value is not None}


def _line(title: str, top1: dict[int, float], baselines: Sequence[dict[int, float]]) -> str:
    """Return a row's line; no difference to itself."""
    differences = [
        "" if baseline is top1 else interval([value - baseline[s] for s, value in top1.items() if s in baseline])
        for baseline in baselines
    ]
    own = f"{mean(top1.values()):.2f} %" if top1 else ""
    return f"| {title} | {len(top1)} | {own} | " + " | ".join(differences) + " |"


def main() -> int:
    parser = build_parser(__doc__, "methods_study", epochs=8)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *PROBES], default=[*ROWS, *PROBES])
    options = parse(parser)
    teacher, jobs = Training("teacher"), list_jobs(options.rows, options.seeds)
    if not options.table:
        train_all(teacher, jobs, options)
    text = table(options.runs, options.rows, options.seeds)
    print(f"\n{text}")
    if options.output is not None:
        write_results(options, text, [teacher, *(training for job in jobs for training in job)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
