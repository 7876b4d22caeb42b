"""The share of a step that a loss of relations takes on several processes.

    python -m benchmarks.relations_share                     SP in WRN-16-2 → WRN-16-1 and ResNet-34 → ResNet-18, W = 2
    python -m benchmarks.relations_share --loss pkt --world 4 --pairs wrn
    python -m benchmarks.relations_share --precision bf16      bfloat16 and channels_last, as training has it where CPUs
                                                               have bfloat16 units

Steps of a loop with the trainer's own DistillationStep under DistributedDataParallel, on the CPU with gloo, one thread
a process, random images. The time in the forward and in the backward of the loss is measured by a clock on every
rank, after a barrier: a rank that arrives later is not the loss's doing. Printed are medians over steps of the slowest
rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from dkd import (
    CKA,
    PKT,
    CorrelationCongruence,
    CrossEntropy,
    DistillationStep,
    FeatureTerm,
    FrozenTeacher,
    LabelTerm,
    Objective,
    RelationalLoss,
    RKDDistance,
    SimilarityPreserving,
    TappedModel,
)
from dkd.distillation.objective import Term
from dkd.global_batch import relational
from dkd.models import ModelSpec, build_model

LOSSES: dict[str, Callable[..., RelationalLoss]] = {
    "sp": SimilarityPreserving,
    "pkt": PKT,
    "cc": CorrelationCongruence,
    "cka": CKA,
    "rkd": RKDDistance,
}
# Student, teacher, taps of both, rows of a rank, pixels, classes.
PAIRS: dict[str, tuple[str, str, str, str, int, int, int]] = {
    "wrn": ("wrn_16_1", "wrn_16_2", "block3", "block3", 64, 32, 10),
    "r34_r18": ("torchvision/resnet18", "torchvision/resnet34", "layer4", "layer4", 8, 224, 1000),
}


class Clock:
    """Adds up the seconds in functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same, and is measured."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            dist.barrier()
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun

        return measured


def measure(pair: str, loss: RelationalLoss, steps: int, half: bool) -> dict[str, float]:
    """Return the medians of this rank: seconds of a step, and of the loss in it.

    Args:
        half: in bfloat16 and channels_last, and not in plain float32.
    """
    student_name, teacher_name, tap, teacher_tap, rows, pixels, classes = PAIRS[pair]
    names = student_name, teacher_name
    memory_format, autocast = (torch.channels_last, torch.bfloat16) if half else (torch.contiguous_format, None)
    models = [build_model(ModelSpec(name, classes)).to(memory_format=memory_format) for name in names]
    student = TappedModel(models[0], [tap], autocast=autocast)
    teacher = FrozenTeacher(models[1], [teacher_tap], needs_logits=False, autocast=autocast)
    wrapped = torch.nn.parallel.DistributedDataParallel(student)
    clock = Clock()
    loss.forward = clock.around(loss.forward)  # type: ignore[method-assign]
    loss.begin = clock.around(loss.begin)  # type: ignore[method-assign]
    terms: list[Term] = [
        LabelTerm("ce", lambda step: 1.0, CrossEntropy()),
        FeatureTerm("relations", lambda step: 1.0, loss, [(tap, teacher_tap)], relational=True),
    ]
    step = DistillationStep(wrapped, teacher, Objective(terms), model=student, memory_format=memory_format)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    images, labels = torch.randn(rows, 3, pixels, pixels), torch.randint(classes, (rows,))
    found: list[tuple[float, float]] = []
    for number in range(steps + 2):
        dist.barrier()
        begun, clock.seconds = time.perf_counter(), 0.0
        step.begin([(images, labels)], number)
        step.loss(0).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        step.end()
        found.append((time.perf_counter() - begun, clock.seconds))
    return {"step": median(each for each, _ in found[2:]), "loss": median(each for _, each in found[2:])}


def worker(options: argparse.Namespace) -> None:
    """One rank; rank 0 writes what was found."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for pair in options.pairs:
        half = options.precision == "bf16"
        loss = LOSSES[options.loss](channels_last=half)
        original = relational.compute_gradients
        seconds: list[float] = []

        def timed(*args: Any, original: Callable[..., Any] = original, seconds: list[float] = seconds) -> Any:
            dist.barrier()
            begun = time.perf_counter()
            try:
                return original(*args)
            finally:
                seconds.append(time.perf_counter() - begun)

        relational.compute_gradients = timed  # type: ignore[assignment]
        try:
            numbers = measure(pair, loss, options.steps, half)
        finally:
            relational.compute_gradients = original
        numbers["backward"] = median(seconds[2:])
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, numbers)
        found[pair] = {key: max(each[key] for each in everyone) for key in numbers}
    if dist.get_rank() == 0:
        Path(options.worker).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # as benchmarks.global_batch does


def main() -> int:
    """Launch the ranks, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default="sp")
    parser.add_argument("--world", type=int, default=2, metavar="W", help="processes (default 2)")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: channels_last too")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "found.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(options.world),
        ]
        command += ["-m", "benchmarks.relations_share", "--worker", str(result), "--loss", options.loss]
        command += ["--steps", str(options.steps), "--precision", options.precision, "--pairs", *options.pairs]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        found = json.loads(result.read_text())
    print(f"| pair | rows a rank | W | step, ms | {options.loss}: forward, ms | backward, ms | share of the step |")
    print("|---|---|---|---|---|---|---|")
    for pair, numbers in found.items():
        share = (numbers["loss"] + numbers["backward"]) / numbers["step"]
        milliseconds = " | ".join(f"{1000 * numbers[key]:.1f}" for key in ("step", "loss", "backward"))
        print(f"| {pair} | {PAIRS[pair][4]} | {options.world} | {milliseconds} | {100 * share:.1f} % |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
