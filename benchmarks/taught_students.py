"""One teacher, five students: what `python -m benchmarks.teach_once --students` measures.

A WRN-40-2 that was trained on scikit-learn's digits for some epochs teaches five students of other architectures by
AT, SP and KD, in float32. Each student is trained twice, in turn: with the live teacher, and with `teacher.cache`,
which the first of them fills and the others read. Both trainings are `dkd train` of one recipe, processes of their own,
and their students must be equal to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEACHER, TAPS = "wrn_40_2", ("block1", "block2", "block3")
PERIOD = 2
"""Epochs that are stored, and repeat."""
# The student's features at the resolutions of the teacher's blocks (32, 16 and 8); None: the student has none there.
STUDENTS: dict[str, tuple[str | None, str, str]] = {
    "wrn_16_1": ("block1", "block2", "block3"),
    "resnet8": ("layer1", "layer2", "layer3"),
    "resnet14": ("layer1", "layer2", "layer3"),
    "vgg8_cifar": ("block0", "block1", "block2"),
    "shufflenetv2_x0_5": (None, "layer1", "layer2"),
}


def recipe(folder: Path, name: str, epochs: int) -> dict[str, Any]:
    """Return what teacher and students have in common."""
    return {
        "run": {"dir": str(folder / name), "trackers": []},
        "data": {
            "train": "digits",
            "validation": "digits",
            "classes": 10,
            "transforms": "cifar",
            "augmentation_period": PERIOD,
        },
        "student": {"name": TEACHER},
        "train": {"global_batch": 64, "epochs": epochs, "precision": "fp32"},
        "evaluation": {"agreement": False},
        "optimizer": {"name": "sgd", "lr": 0.05, "nesterov": True, "weight_decay": 5e-4},
        "schedule": {"name": "one_cycle"},
    }


def with_teacher(values: dict[str, Any], student: str, weights: Path, cache: Path | None) -> dict[str, Any]:
    """Return the recipe of a student."""
    pairs = [[mine, tap] for mine, tap in zip(STUDENTS[student], TAPS, strict=True) if mine is not None]
    return {
        **values,
        "student": {"name": student},
        "teacher": {"name": TEACHER, "weights": str(weights), "cache": None if cache is None else str(cache)},
        "losses": {
            "at": {"beta": 1000, "pairs": pairs},
            "sp": {"gamma": 3000, "reference_batch": 64, "pairs": pairs[-1:]},
            "kd": {"alpha": 0.9},
        },
    }


def train(folder: Path, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run `dkd train` in a process of its own. Returns its seconds by the clock and of the CPUs, the accuracy of the
    student, and SHA-256."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    begun, used = time.perf_counter(), cpu_seconds()
    command = [sys.executable, "-m", "dkd", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a training failed:\n{done.stderr[-4000:]}")
    seconds, of_cpus = time.perf_counter() - begun, cpu_seconds() - used
    student = folder / name / "student.safetensors"
    stated = json.loads(student.with_suffix(".json").read_text())
    digest = hashlib.sha256(student.read_bytes()).hexdigest()
    return {"seconds": seconds, "cpu_seconds": of_cpus, "top1": stated["evaluation"]["top1"], "sha256": digest}


def cpu_seconds() -> float:
    """Return the seconds of CPUs that processes which this one has started, and which have ended, have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def study(epochs: int, file: str | None) -> int:
    """Train everything, print the table, and return 1 where a student differs."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = train(folder, "teacher", recipe(folder, "teacher", epochs))
        print(f"{TEACHER}: {epochs} epochs alone, {teacher['seconds']:.0f} s, top-1 {100 * teacher['top1']:.1f} %")
        weights, cache = folder / "teacher" / "student.safetensors", folder / "taught"
        print("\n| student | live, s (of CPUs) | with the cache, s (of CPUs) | live/cache | top-1 | SHA-256 |")
        print("|---|---|---|---|---|---|", flush=True)
        for student in STUDENTS:
            runs = {}
            for way in ("live", "cached"):
                name = f"{student}_{way}"
                values = recipe(folder, name, epochs)
                runs[way] = train(
                    folder, name, with_teacher(values, student, weights, cache if way == "cached" else None)
                )
            found[student] = runs
            same = runs["live"]["sha256"] == runs["cached"]["sha256"]
            top1, digest = 100 * runs["live"]["top1"], runs["live"]["sha256"][:12]
            print(f"| {student} | {times(runs)} | {top1:.1f} % | {digest if same else 'DIFFERS'} |", flush=True)
        size = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    each = ("seconds", "cpu_seconds")
    total = {
        way: {name: sum(runs[way][name] for runs in found.values()) for name in each} for way in ("live", "cached")
    }
    print(f"| all | {times(total)} | | |")
    print(f"\n{epochs} epochs each, of which {PERIOD} are stored: {size / 1e6:.1f} MB")
    if file:
        text = json.dumps({"teacher": teacher, "students": found, "bytes": size}, indent=1)
        Path(file).write_text(text + "\n")
    return 0 if all(runs["live"]["sha256"] == runs["cached"]["sha256"] for runs in found.values()) else 1


def times(runs: dict[str, dict[str, Any]]) -> str:
    """Return the columns of the times of both ways."""
    live, cached = runs["live"], runs["cached"]
    columns = [f"{way['seconds']:.0f} ({way['cpu_seconds']:.0f})" for way in (live, cached)]
    return " | ".join([*columns, f"{live['seconds'] / cached['seconds']:.2f}"])
